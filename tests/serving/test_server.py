"""``vgg-transfer serve`` as a process: the page in Chromium, many connections, the end."""

import asyncio
import csv
import io
import json
import re
import resource
import signal
from pathlib import Path

import httpx
import numpy as np
import pytest
from chromium import browser
from PIL import Image
from served_runs import evaluated_run, started

from recipes.cli import main
from transfer import Classifier
from transfer.serving import server

NUM_REQUESTS = 1000


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_card, saved_vgg):
    folder = tmp_path_factory.mktemp("serve")
    model = saved_vgg(folder / "model" / "tiny", card=tiny_card)
    return evaluated_run(folder / "tiny", model, 24, 4)


@pytest.fixture(scope="module")
def url(run):
    """URL of a server, which Ctrl-C ends."""
    with started(run, "--abstain-below", "1") as (url, process):
        yield url
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_page_classifies_explains_and_corrects(run, url, tmp_path, width):
    (run / "corrections.csv").unlink(missing_ok=True)
    Image.new("RGB", (120, 80), (20, 20, 230)).save(tmp_path / "photo.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with browser(tmp_path / "profile") as page:
        page.open(url, width)
        page.choose_files("#files", tmp_path / "photo.png")
        page.wait(
            "document.querySelector('.shown img')?.src && !!document.querySelector('.answer')"
        )
        assert page.run("document.querySelector('.answer').textContent") == "Not sure"
        numbers = page.run("[...document.querySelectorAll('.number')].map(e => e.textContent)")
        pixels = np.full((1, 80, 120, 3), (20, 20, 230), np.uint8)
        expected = np.sort(Classifier.load(run).probabilities(pixels)[0])[::-1]
        assert numbers == [f"{100 * p:.1f} %" for p in expected]
        page.wait("!document.querySelector('.shown button').hidden")
        page.wait("document.querySelector('.shown img').naturalWidth === 120")
        assert page.run("document.querySelector('.shown img').naturalHeight") == 80

        page.choose_files("#files", tmp_path / "broken.png")
        page.wait("!!document.querySelector('.error')")
        assert "not an image" in page.run("document.querySelector('.error').textContent")
        page.problems.clear()  # the browser logs the status 400

        page.run("document.getElementById('tab-errors').click()")
        page.wait("document.querySelector('#errors img')?.naturalWidth > 0")
        label, other = page.run(
            "(() => { const s = document.querySelector('#errors select'); const old = s.value;"
            "s.value = [...s.options].map(o => o.value).find(v => v !== old);"
            "s.dispatchEvent(new Event('change')); return [old, s.value] })()"
        )
        page.wait("document.querySelector('#errors [role=status]').textContent.includes('written')")
        with (run / "corrections.csv").open() as file:
            (row,) = csv.DictReader(file)
        assert (row["label"], Path(row["path"]).parent.name) == (other, label)
        page.run("document.querySelector('#errors .shown button:last-child').click()")
        page.wait("document.querySelector('#errors .shown img').src.startsWith('blob:')")
        assert page.run("document.documentElement.scrollWidth - innerWidth") <= 0
        assert page.problems == []


@pytest.mark.slow
def test_thousand_connections_lose_no_request(run, url):
    """Each request gets its own answer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * NUM_REQUESTS:
        pytest.skip("needs 2,000 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * NUM_REQUESTS), hard))
    pixels = [[[[n % 256, n // 4, 255 - n // 4]] * 2] * 2 for n in range(NUM_REQUESTS)]

    async def ask_all():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=120, trust_env=False) as client:
            calls = [
                client.post(f"{url}v1/models/tiny:predict", json={"instances": [image]})
                for image in pixels
            ]
            before = await client.get(f"{url}metrics")
            answers = await asyncio.gather(*calls)
            return answers, num_predicted(await client.get(f"{url}metrics")) - num_predicted(before)

    answers, count = asyncio.run(ask_all())
    assert [answer.status_code for answer in answers] == [200] * NUM_REQUESTS
    assert count == NUM_REQUESTS
    found = [answer.json()["predictions"][0]["probabilities"] for answer in answers]
    expected = Classifier.load(run).probabilities(np.array(pixels, np.uint8))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def num_predicted(metrics):
    values = re.findall(r'^vgg_transfer_images_total.*"predicted"} (.*)$', metrics.text, re.M)
    return float(values[0]) if values else 0


@pytest.mark.slow
def test_sigterm_finishes_requests_in_flight(run):
    data = io.BytesIO()
    Image.new("RGB", (3000, 2000), (200, 20, 30)).save(data, "PNG")

    async def ask(url, process):
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            call = client.post(f"{url}overlay/0", content=data.getvalue())
            task = asyncio.create_task(call)
            await asyncio.sleep(0.15)  # it is being computed
            process.terminate()
            return await task

    with started(run) as (url, process):
        answer = asyncio.run(ask(url, process))
        assert answer.status_code == 200
        with Image.open(io.BytesIO(answer.content)) as image:
            assert image.size == (3000, 2000)
        assert process.wait(timeout=20) == 0


def test_taken_port_and_wrong_arguments_are_errors(finished_run, capsys):
    run = finished_run
    with server._bound("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(run), "--port", port]) == 1
    assert f"127.0.0.1:{port} cannot be bound" in capsys.readouterr().err
    assert main(["serve", str(run), "--abstain-below", "2"]) == 1
    assert "--abstain-below 2.0: expected a probability" in capsys.readouterr().err
    assert main(["serve", str(run), "--max-mb", "inf"]) == 1
    assert "--max-mb inf: expected a number above 0" in capsys.readouterr().err
    assert main(["serve", str(run), "--name", "a/b"]) == 1
    assert "expected a name without /" in capsys.readouterr().err
    assert main(["serve", str(run / "nothing")]) == 1


@pytest.mark.parametrize(
    "host, expected",
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_loopback_addresses(host, expected):
    assert server.is_loopback(host) is expected


@pytest.mark.slow
def test_errors_are_hidden_from_other_machines(run):
    assert server._confident_errors(run, False) == "they are shown only to this machine"
    assert len(server._confident_errors(run, True).all) > 0
    assert json.dumps(server._name_of(run)) == '"tiny"'
