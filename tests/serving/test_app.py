"""The application answers as TensorFlow Serving does, equals the classifier, and refuses the rest.

Requests are made in this process, without sockets.
"""

import asyncio
import base64
import csv
import io
import json
import os
import threading
import time

import httpx
import numpy as np
import pytest
from PIL import Image
from served_runs import evaluated_run

from transfer import Classifier, open_source
from transfer.core.files import write_text
from transfer.images.decoding import read_image
from transfer.serving.app import Settings, build_app
from transfer.serving.confident_errors import ConfidentError, ConfidentErrors
from transfer.serving.limits import loopback_hosts
from transfer.serving.served_model import ServedModel

URL = "/v1/models/tiny:predict"
HOST = "http://127.0.0.1:8501"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_card, saved_vgg):
    """An evaluated run with errors: some labels of its photos are wrong."""
    folder = tmp_path_factory.mktemp("served")
    model = saved_vgg(folder / "model" / "tiny", card=tiny_card)
    return evaluated_run(folder / "run", model, 30, 6, "--epochs", 1)


@pytest.fixture(scope="module")
def classifier(run):
    return Classifier.load(run)


@pytest.fixture(scope="module")
def model(classifier):
    return ServedModel(classifier, max_pixels=10_000)


@pytest.fixture
def errors(run):
    (run / "corrections.csv").unlink(missing_ok=True)
    return ConfidentErrors(run)


@pytest.fixture
def ask(model, errors):
    """Answers of the application to requests; each request is a method, path and options."""

    def ask(*requests, **settings):
        settings = {"name": "tiny", "hosts": loopback_hosts("127.0.0.1", 8501)} | settings
        app = build_app(model, Settings(**settings), errors)

        async def main():
            transport = httpx.ASGITransport(app)
            client = httpx.AsyncClient(transport=transport, base_url=HOST)
            async with app.router.lifespan_context(app), client:
                calls = [client.request(*request[:2], **request[2]) for request in requests]
                return await asyncio.gather(*calls)

        answers = asyncio.run(main())
        return answers[0] if len(answers) == 1 else answers

    return ask


def encoded(size=(40, 30), kind="PNG", color=(200, 30, 40)):
    data = io.BytesIO()
    Image.new("RGB", size, color).save(data, kind)
    return data.getvalue()


def predict(*images, url=URL, **options):
    instances = [{"b64": base64.b64encode(image).decode()} for image in images]
    return ("POST", url, {"json": {"instances": instances}, **options})


def get(path, **options):
    return ("GET", path, options)


def test_answers_equal_the_classifier(ask, classifier, run):
    files = sorted((run.parent / "photos").rglob("*.*"))[:20]
    answer = ask(predict(*(path.read_bytes() for path in files)))
    assert answer.status_code == 200
    found = answer.json()["predictions"]
    for path, row in zip(files, found, strict=True):
        expected = classifier.probabilities(read_image(path.read_bytes())[None])[0].numpy()
        np.testing.assert_allclose(row["probabilities"], expected, rtol=0, atol=1e-6)
        assert row["label"] == classifier.labels[expected.argmax()]


def test_pixels_equal_files(ask):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    body = {"signature_name": "pixels", "instances": [pixels.tolist()]}
    of_file, of_pixels = ask(predict(data.getvalue()), ("POST", URL, {"json": body}))
    np.testing.assert_allclose(
        of_file.json()["predictions"][0]["probabilities"],
        of_pixels.json()["predictions"][0]["probabilities"],
        atol=1e-6,
    )


def test_bad_image_does_not_fail_others(ask):
    good, bad, large = ask(predict(encoded(), b"no image", encoded((101, 100)))).json()[
        "predictions"
    ]
    assert sum(good["probabilities"]) == pytest.approx(1)
    assert "not an image" in bad["error"]
    assert "101 x 100 pixels; expected at most 10,000" in large["error"]
    answer = ask(predict(b"no image"))
    assert answer.status_code == 400
    assert answer.json().keys() == {"error"}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_large_images_are_refused_in_every_format(ask, kind):
    answer = ask(predict(encoded((200, 100), kind)))
    assert (answer.status_code, "expected at most" in answer.text) == (400, True)


def test_status_health_labels_and_metrics(ask, classifier):
    status, version, health, labels, metrics = ask(
        get("/v1/models/tiny"), get("/v1/models/tiny/versions/1"), get("/healthz"), get("/labels"),
        get("/metrics"),
    )  # fmt: skip
    no_error = {"error_code": "OK", "error_message": ""}
    expected = {
        "model_version_status": [{"version": "1", "state": "AVAILABLE", "status": no_error}]
    }
    assert status.json() == version.json() == expected
    assert health.status_code == 200
    assert labels.json() == {"labels": classifier.labels}
    assert "vgg_transfer_batch_images_bucket" in metrics.text
    assert metrics.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize(
    "request_",
    [
        get("/v1/models/other"),
        get("/v1/models/tiny/versions/2"),
        predict(encoded(), url="/v1/models/other:predict"),
        get("/etc/passwd"),
        get("/../../etc/passwd"),
        get("/confident-errors/9999/photo"),
        get(f"/confident-errors/{'9' * 5000}/overlay"),
        get("/confident-errors/-1/photo"),
        ("POST", "/overlay/99", {"content": encoded()}),
    ],
)
def test_unknown_things_are_not_found(ask, request_):
    answer = ask(request_)
    assert answer.status_code == 404
    assert answer.json().keys() == {"error"}


def test_wrong_method_is_a_json_error(ask):
    answer = ask(get(URL.replace("tiny:predict", "tiny:classify")), ("POST", "/healthz", {}))
    assert [a.status_code for a in answer] == [404, 405]
    assert answer[1].json().keys() == {"error"}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8501", "127.0.0.1:80", "127.0.0.1"])
def test_other_hosts_are_refused(ask, host):
    answers = ask(get("/", headers={"host": host}), predict(encoded(), headers={"host": host}))
    for answer in answers:
        assert answer.status_code == 403
        assert "Host header" in answer.json()["error"]
    assert ask(get("/", headers={"host": host}), hosts=None).status_code == 200


@pytest.mark.parametrize("host", ["localhost:8501", "127.0.0.1:8501", "[::1]:8501"])
def test_own_hosts_are_accepted(ask, host):
    assert ask(get("/healthz", headers={"host": host})).status_code == 200


def test_pages_of_other_sites_are_refused(ask):
    origins = ["https://evil.example", "null", HOST]
    answers = ask(*(predict(encoded(), headers={"origin": origin}) for origin in origins))
    assert [answer.status_code for answer in answers] == [403, 403, 200]
    assert all("access-control-allow-origin" not in answer.headers for answer in answers)


def test_large_bodies_are_refused(ask):
    async def chunks():
        for _ in range(100):
            yield b" " * 100

    declared = predict(encoded((50, 50), "BMP"))
    undeclared = ("POST", URL, {"content": chunks()})
    for answer in ask(declared, undeclared, max_bytes=5000):
        assert answer.status_code == 413
        assert "0.005 MB" in answer.json()["error"]


def test_full_queue_says_when_to_come_back(ask):
    answers = ask(*[predict(*[encoded()] * 4) for _ in range(10)], max_waiting=8)
    codes = {answer.status_code for answer in answers}
    assert codes == {200, 503}
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert refused.headers["retry-after"] == "1"
    assert ask(predict(*[encoded()] * 9), max_waiting=8).status_code == 413


def test_too_many_overlays_are_told_to_come_back(ask, model, monkeypatch):
    monkeypatch.setattr(model, "overlay", lambda *_: time.sleep(0.002) or b"")
    answers = ask(*[("POST", "/overlay/1", {"content": encoded()})] * 100)
    assert [answer.status_code for answer in answers].count(200) == 64
    assert {a.headers["retry-after"] for a in answers if a.status_code == 503} == {"1"}


def test_rate_of_a_client_is_limited(ask):
    overlays = [get("/confident-errors/0/overlay")] * 2
    answers = ask(*[predict(encoded())] * 3, *overlays, get("/healthz"), max_rate=2)
    codes = [answer.status_code for answer in answers]
    assert (codes.count(200), codes.count(429)) == (3, 3)
    assert int(answers[codes.index(429)].headers["retry-after"]) >= 1
    photos = ask(*[get("/confident-errors/0/photo")] * 3, max_rate=2)
    assert [answer.status_code for answer in photos].count(429) == 1


def test_requests_that_arrive_together_share_batches(ask, model, monkeypatch):
    sizes, compute = [], model.probabilities
    monkeypatch.setattr(model, "probabilities", lambda x: sizes.append(len(x)) or compute(x))
    answers = ask(*[predict(encoded(color=(n, 0, 255 - n))) for n in range(64)])
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) > 32  # each got its own
    assert sum(sizes) == 64 + 1 and len(sizes) < 12


def test_page_is_self_contained_and_has_a_policy(ask):
    answer = ask(get("/"), name="</script><b>", abstain_below=0.7)
    assert "http" not in answer.text.replace("http-equiv", "")
    assert "</script><b>" not in answer.text
    assert '"abstain_below": 0.7' in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    nonce = policy.split("'nonce-")[1].split("'")[0]
    assert answer.text.count(f'nonce="{nonce}"') == 3
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_overlay_has_the_resolution_of_the_photo(ask):
    answer = ask(("POST", "/overlay/1", {"content": encoded((97, 61))}))
    assert answer.headers["content-type"] == "image/jpeg"
    assert read_image(answer.content).shape == (61, 97, 3)
    assert ask(("POST", "/overlay/1", {"content": b"no image"})).status_code == 400


def test_errors_are_those_of_the_evaluation(ask, run):
    found = ask(get("/confident-errors")).json()["errors"]
    with (run / "predictions.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["label"] != row["prediction"]]
    assert len(found) == len(rows) > 0
    assert {error["name"] for error in found} == {row["image"] for row in rows}
    probabilities = [error["probability"] for error in found]
    assert probabilities == sorted(probabilities, reverse=True)
    photo, explained = ask(get("/confident-errors/0/photo"), get("/confident-errors/0/overlay"))
    original = read_image((run.parent / "photos" / found[0]["name"]).read_bytes())
    for answer in (photo, explained):
        assert read_image(answer.content).shape == original.shape


def test_corrections_are_a_manifest(ask, run, errors):
    first = errors.all[0]
    url = "/confident-errors/0/label"
    other = {"red": "blue", "blue": "red"}[first.label]
    for label in (other, first.label, other):
        answer = ask(("POST", url, {"json": {"label": label}}))
        assert answer.json() == {"label": label, "manifest": str(run / "corrections.csv")}
    assert ask(get("/confident-errors")).json()["errors"][0]["corrected"] == other
    (run / "corrections.csv").write_text(
        (run / "corrections.csv").read_text() + f"{run.parent}/photos/red/01.png,{first.label}\n"
    )
    ask(("POST", url, {"json": {"label": other}}))
    source = open_source(csv=str(run / "corrections.csv"))
    assert sorted(source.class_names) == ["blue", "red"]
    assert len(source.split("train")) == 2  # the added row is still there
    for body in ({"label": "green"}, {"path": "/etc/passwd"}, [], None):
        assert ask(("POST", url, {"json": body})).status_code == 400


def test_corrections_of_two_servers_are_kept(tmp_path, monkeypatch):
    (tmp_path / "predictions.csv").write_text("image,label,prediction,probability\n")
    monkeypatch.setattr(ConfidentErrors, "_path", lambda self, number: f"/{number}.png")
    second = threading.Thread(target=ConfidentErrors(tmp_path).correct, args=(1, "b"))

    def write(path, text):
        if second.ident is None:
            second.start()
            second.join(0.1)
        write_text(path, text)

    monkeypatch.setattr("transfer.serving.confident_errors.write_text", write)
    ConfidentErrors(tmp_path).correct(0, "a")
    second.join()
    assert (tmp_path / "corrections.csv").read_text() == "path,label\n/0.png,a\n/1.png,b\n"


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "image,label,prediction,p(a)\nx,b,a,?\n", "\0"])
def test_other_predictions_are_refused(tmp_path, text):
    (tmp_path / "predictions.csv").write_text(text)
    with pytest.raises(ValueError, match="is not what evaluate writes"):
        ConfidentErrors(tmp_path)


def test_predictions_of_many_classes(tmp_path):
    rows = "image,label,prediction,probability,label rank\n'=a.png,x,y,0.5,2\nb.png,x,z,0.75,3\n"
    (tmp_path / "predictions.csv").write_text(rows + "c.png,x,x,0.9,1\n")
    found = [(error.name, error.probability) for error in ConfidentErrors(tmp_path).all]
    assert found == [("b.png", 0.75), ("=a.png", 0.5)]


def test_file_of_user_is_not_overwritten(ask, run):
    (run / "corrections.csv").write_text("my,own,file\n")
    answer = ask(("POST", "/confident-errors/0/label", {"json": {"label": "red"}}))
    assert answer.status_code == 409
    assert (run / "corrections.csv").read_text() == "my,own,file\n"
    (run / "corrections.csv").unlink()


def test_images_of_datasets_without_files_are_copied(run, tmp_path, errors, monkeypatch):
    source = open_source("digits")
    monkeypatch.setattr("transfer.runs.run_data.open_data", lambda _: source)
    names, labels = source.names(source.split_names[0]), source.labels(source.split_names[0])
    errors.all = [ConfidentError(names[n], source.class_names[labels[n]], "1", 0.9) for n in (3, 8)]
    errors._run, errors._evaluated = tmp_path, None
    for number, label in enumerate(("4", "7")):
        errors.correct(number, label)
    corrected = open_source(csv=str(tmp_path / "corrections.csv")).split("train")
    assert corrected.source.class_names == ["4", "7"]
    for number, example in enumerate(corrected.examples(np.arange(2))):
        np.testing.assert_array_equal(
            read_image(example["image"].numpy()), read_image(errors.image(number))
        )
    assert json.dumps(errors.corrected()) == '["4", "7"]'


def test_an_image_of_the_same_name_with_another_label_is_of_other_data(run, errors):
    name, label = errors.all[0].name, errors.all[0].label
    errors.all[0] = ConfidentError(name, {"red": "blue", "blue": "red"}[label], label, 0.9)
    with pytest.raises(ValueError, match="was evaluated on other images"):
        errors.correct(0, label)
    assert not (run / "corrections.csv").exists()


def test_images_that_changed_since_the_evaluation_are_not_corrected(run, errors):
    photo = run.parent / "photos" / errors.all[0].name
    status = photo.stat()
    os.utime(photo, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # as another file there
    with pytest.raises(ValueError, match="its images changed since then; evaluate it again"):
        errors.correct(0, errors.all[0].label)
    assert not (run / "corrections.csv").exists()
    errors = ConfidentErrors(run)
    errors._evaluated = None  # evaluated before the ids were recorded
    assert errors.correct(0, errors.all[0].label).is_file()
