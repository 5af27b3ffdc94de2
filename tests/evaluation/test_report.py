"""Rendering of report.html in headless Chromium, if installed."""

import base64
import html
import json
import re
import shlex
import shutil
import subprocess

import numpy as np
import pytest
import tensorflow as tf
from chromium import CHROMIUM, FLAGS, browser
from commands import finetune
from PIL import Image

from recipes.cli import main
from transfer import Backbone, Card, Classifier, Head, Preprocess
from transfer.data.dataset import Source
from transfer.evaluation import metrics, pictures, prediction, report
from transfer.images.decoding import read_image

PROBE = """
<script>
addEventListener("load", () => {
  const images = [...document.images];
  const found = {
    images: images.length,
    broken: images.filter(image => !image.naturalWidth).length,
    without_text: images.filter(image => !image.alt).length,
    outside: [...document.querySelectorAll("[src],[href]")]
      .map(e => e.src || e.href).filter(url => !url.startsWith("data:")),
    too_wide: document.documentElement.scrollWidth - innerWidth,
    figures: Object.fromEntries([...document.querySelectorAll("#figures tr")].slice(1)
      .map(row => [row.cells[0].innerText, row.cells[1].innerText])),
  };
  document.body.dataset.found = JSON.stringify(found);
});
</script>
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from conftest import make_image_folder, save_vgg

    folder = tmp_path_factory.mktemp("report")
    card = Card(input="images:0", tap="fc7:0", image_size=16, preprocess="unit")
    model = save_vgg(folder / "model" / "tiny", card=card)
    photos = make_image_folder(folder / "photos", 30)
    for name in ("<b>&amp;", "d'été", "$\\q$"):  # names that must be escaped
        shutil.copytree(photos / "red", photos / name)
    assert finetune(folder / "run", model, photos) == 0
    assert main(["evaluate", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def many_classes(tmp_path_factory):
    """Folder with the report of 3,000 images in 1,000 classes; the positions that were read."""
    from conftest import save_vgg

    folder = tmp_path_factory.mktemp("many")
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.arange(3000) % 1000)
    group = generator.permutation(1000) // 10
    logits = generator.normal(size=(3000, 1000)).astype(np.float32)
    logits += 4 * (group == group[labels][:, None])
    logits[np.arange(3000), labels] += 2
    read = []

    def examples(_, positions):
        read.extend(positions)
        pictures = [np.full((64, 64, 3), labels[p] % 256, np.uint8) for p in positions]
        columns = {"image": [tf.io.encode_png(pixels).numpy() for pixels in pictures]}
        columns |= {"label": labels[positions], "name": [f"{p}.png" for p in positions]}
        return tf.data.Dataset.from_tensor_slices(columns)

    source = Source(
        name="synthetic",
        class_names=[f"class {number} {'with a long name' * 5}" for number in range(1000)],
        sizes={"test": 3000},
        examples=examples,
        labels=lambda _: labels,
        names=lambda _: [f"{number}.png" for number in range(3000)],
        ids=lambda _: np.arange(3000).astype("S16"),
    )
    card = Card(input="images:0", tap="fc7:0", image_size=16, preprocess="unit")
    backbone = Backbone(save_vgg(folder / "model" / "tiny", card=card))
    preprocess = Preprocess("unit", 16)
    classifier = Classifier(backbone, Head(1000), preprocess, source.class_names)
    classifier.build_from_size()
    split = source.split("test")
    figures = metrics.measure(logits, labels, source.class_names, resamples=3)
    figures |= prediction.summarize(logits, labels)
    evaluated = report.Evaluated(classifier, split, logits, labels, figures)
    summary = report.RunSummary("many", "tiny", "fc7", {}, {}, {}, None, [])
    report.write(folder, evaluated, summary)
    return folder, read


def chromium(page, *flags):
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    command = [CHROMIUM, *FLAGS, "--enable-logging=stderr", "--virtual-time-budget=5000", *flags]
    return subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, timeout=300, check=True
    )


def look(folder, tmp_path, width):
    """What a browser finds on the report of a folder."""
    page = tmp_path / "page.html"
    page.write_text((folder / "report.html").read_text() + PROBE)
    result = chromium(page, f"--window-size={width},900", "--dump-dom")
    assert not re.findall(r"CONSOLE.*", result.stderr)
    text = re.search(r'data-found="([^"]*)"', result.stdout)[1]
    found = json.loads(html.unescape(text))
    assert (found["broken"], found["without_text"], found["outside"]) == (0, 0, [])
    assert found["too_wide"] <= 0
    return found


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_report_renders_in_browser(run, tmp_path, width):
    found = look(run, tmp_path, width)
    assert found["images"] >= 4 + 2  # plots, and the least certain images with heat maps
    reported = json.loads((run / "metrics.json").read_text())["eval"]
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert json.loads((run / "metrics.json").read_text())["evaluation"] == evaluation
    assert {key: evaluation[key] for key in ("accuracy", "loss", "top5")} == {
        key: reported[key] for key in ("accuracy", "loss", "top5")
    }
    expected = {title: evaluation.get(key) for key, title in report._HEADLINES.items()}
    expected["F1, mean of the classes"] = evaluation["macro"]["f1"]
    assert found["figures"] == {title: f"{value:.4f}" for title, value in expected.items()}


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_picture_is_enlarged_with_its_overlay_and_classes_are_filtered(run, tmp_path, width):
    with browser(tmp_path) as page:
        page.open((run / "report.html").as_uri(), width)
        names = page.run("[...document.querySelectorAll('#filter option')].map(o => o.value)")
        assert names[0] == "" and "<b>&amp;" in names and "$\\q$" in names
        page.run(
            "(() => { const s = document.querySelector('#filter select'); s.value = '<b>&amp;';"
            "s.dispatchEvent(new Event('change')) })()"
        )
        shown = page.run(
            "[...document.querySelectorAll('[data-label]:not([hidden])')]"
            ".map(e => [e.dataset.label, e.dataset.prediction])"
        )
        assert shown and all("<b>&amp;" in pair for pair in shown)
        page.run("document.querySelector('.pictures li:not([hidden]) .zoom').click()")
        page.wait("document.querySelector('dialog').open")
        sizes = page.run(
            "[...document.querySelectorAll('dialog img')]"
            ".map(i => [i.naturalWidth, i.naturalHeight])"
        )
        assert len(sizes) == 2 and sizes[0] == sizes[1]
        page.run("document.querySelector('dialog button').click()")
        assert not page.run("document.querySelector('dialog').open")
        assert page.run("document.documentElement.scrollWidth - innerWidth") <= 0
        assert page.problems == []


def test_pictures_have_a_bounded_size():
    large = Image.fromarray(pictures._thumbnail(np.full((2000, 3000, 3), 128, np.uint8)))
    assert large.size == (480, 320)
    noise = np.random.default_rng(0).integers(0, 256, (320, 480, 3)).astype(np.uint8)
    for image, width in ((large, 480), (Image.fromarray(noise), 224)):
        jpeg = base64.b64decode(pictures._jpeg(image))
        assert len(jpeg) <= 40_000
        assert read_image(jpeg).shape[1] <= width


@pytest.mark.slow
def test_report_prints(run, tmp_path):
    chromium(run / "report.html", f"--print-to-pdf={tmp_path / 'report.pdf'}")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_names_in_report_are_escaped(run):
    page = (run / "report.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;amp;" in page


@pytest.mark.slow
def test_plots_are_also_files(run):
    plots = {path.stem: path for path in (run / "plots").iterdir()}
    assert plots.keys() == {
        "learning_curves",
        "confusion",
        "calibration",
        "risk_coverage",
        "classes",
    }
    for path in plots.values():
        with Image.open(path) as image:
            assert image.width > 300


@pytest.mark.slow
def test_report_has_config_and_commands(run, tmp_path):
    page = html.unescape((run / "report.html").read_text())
    assert "freeze_until: fc7" in page
    assert re.search(r"trained on photos, \d+ images, \d+ epochs", page)
    assert f"<pre>vgg-transfer evaluate {run}</pre>" in page
    command = shlex.split(re.search(r"<pre>(vgg-transfer finetune .*)</pre>", page)[1])
    assert main([*command[1:-1], str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["eval"] == json.loads((run / "metrics.json").read_text())["eval"]


@pytest.mark.slow
def test_report_of_many_classes_is_small_and_reads_only_its_images(many_classes):
    folder, read = many_classes
    page = (folder / "report.html").read_text()
    pictures = page.count("data:image/jpeg")
    heat_maps = page.count("the same, with the part in red")
    assert heat_maps == 2 * report.NUM_PICTURES
    assert 0 < len(read) == len(set(read)) <= pictures - heat_maps <= 2 * 12 + 20 * 3
    assert len(page) < 2e6
    assert page.count("<tr><td>") == 8  # metrics
    assert page.count("<tr data-label=") == 1000  # classes
    assert "All 1,000 classes" in page
    plots = {path.stem for path in (folder / "plots").iterdir()}
    assert plots == {"confusion", "calibration", "risk_coverage", "f1", "classes"}


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_report_of_many_classes_renders_in_browser(many_classes, tmp_path, width):
    assert look(many_classes[0], tmp_path, width)["images"] >= 4 + 24 + 24
