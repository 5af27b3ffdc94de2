"""Bodies of requests and answers, as TensorFlow Serving documents them."""

import base64
import functools
import json

import numpy as np
import pytest

from transfer.serving import rest
from transfer.serving.served_model import BadImageError

B64 = {"b64": base64.b64encode(b"abc").decode()}
PIXELS = [[[0, 128, 255]]]


def parse(**body):
    return rest.parse(json.dumps(body).encode())


@pytest.mark.parametrize("wrapped", [lambda x: x, lambda x: {"image_bytes": x}])
def test_instances_are_files(wrapped):
    request = parse(instances=[wrapped(B64)] * 2, signature_name="serving_default")
    assert request.images == [b"abc", b"abc"]
    assert not request.is_columnar


@pytest.mark.parametrize("body", [{"inputs": [B64]}, {"inputs": {"image_bytes": [B64]}}])
def test_inputs_are_columnar(body):
    request = parse(**body)
    assert request.images == [b"abc"]
    assert request.is_columnar


def test_pixels_are_rgb():
    gray, alpha = [[[7]]], [[[1, 2, 3, 4]]]
    images = parse(instances=[PIXELS, {"pixels": gray}, alpha]).images
    assert [image.tolist() for image in images] == [PIXELS, [[[7, 7, 7]]], [[[1, 2, 3]]]]
    assert {image.dtype for image in images} == {np.dtype(np.uint8)}


DEEP = functools.reduce(lambda inner, _: [inner], range(100), 1)

BAD_IMAGES = {
    "text": ("/etc/passwd", "of type str; expected"),
    "path": ({"path": "/etc/passwd"}, "of type dict; expected"),
    "no base64": ({"b64": "?"}, "not base64"),
    "float": ([[[0.5, 1.0, 2.0]]], "float64"),
    "bool": ([[[True, False, True]]], "bool"),
    "ragged": ([[[1, 2, 3]], [[1, 2]]], "different lengths"),
    "flat": ([1, 2, 3], r"shape \(3,\)"),
    "two channels": ([[[1, 2]]], "2 channels"),
    "too bright": ([[[1, 2, 256]]], "from 1 to 256"),
    "huge integer": ([[[1, 2, 10**30]]], "object"),
    "null": (None, "NoneType"),
    "long text": (["a" * 100_000] + ["b"] * 100_000, "text among the pixels"),  # not 40 GB
    "deep": (DEEP, "different lengths"),
    "empty": ([], "shape"),
}


@pytest.mark.parametrize("value, message", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_image_does_not_fail_the_others(value, message):
    bad, good = parse(instances=[value, B64]).images
    assert isinstance(bad, BadImageError)
    with pytest.raises(BadImageError, match=message):
        raise bad
    assert good == b"abc"


BAD_BODIES = {
    "no JSON": (b"{", "not JSON"),
    "not UTF-8": (b"\xff", "not JSON"),
    "deep": (b"[" * 100_000, "not JSON"),
    "long number": (b'{"instances": [' + b"1" * 10_000 + b"]}", "not JSON"),
    "list": (b"[1]", "list; expected an object"),
    "nothing": (b"{}", "no instances"),
    "both": (b'{"instances": [1], "inputs": [1]}', "instances and inputs"),
    "empty": (b'{"instances": []}', "no images"),
    "one": (b'{"instances": 5}', "no images"),
    "signature": (b'{"signature_name": "x", "instances": [1]}', "signature_name is 'x'"),
}


@pytest.mark.parametrize("body, message", BAD_BODIES.values(), ids=BAD_BODIES)
def test_bad_body_is_refused(body, message):
    with pytest.raises(rest.RequestError, match=message) as error:
        rest.parse(body)
    assert error.value.status == 400


ROWS = [np.array([0.25, 0.75], np.float32), BadImageError("no image")]
GOOD = {"probabilities": [0.25, 0.75], "label": "b"}


def test_answer_has_an_error_for_each_bad_instance():
    request = rest.PredictRequest([b"", b""], is_columnar=False)
    assert rest.answer(request, ROWS, ["a", "b"]) == {"predictions": [GOOD, {"error": "no image"}]}
    with pytest.raises(rest.RequestError, match="image 0: no image"):
        rest.answer(request, ROWS[1:], ["a", "b"])


def test_columnar_answer_has_columns_and_no_errors():
    request = rest.PredictRequest([b"", b""], is_columnar=True)
    expected = {"outputs": {"probabilities": [[0.25, 0.75]] * 2, "label": ["b", "b"]}}
    assert rest.answer(request, ROWS[:1] * 2, ["a", "b"]) == expected
    with pytest.raises(rest.RequestError, match="image 1: no image"):
        rest.answer(request, ROWS, ["a", "b"])


@pytest.mark.parametrize("threshold, not_sure", [(0.7, False), (0.75, False), (0.8, True)])
def test_answer_says_not_sure_below_threshold(threshold, not_sure):
    request = rest.PredictRequest([b""], is_columnar=False)
    answer = rest.answer(request, ROWS[:1], ["a", "b"], threshold)
    assert answer == {"predictions": [GOOD | {"not_sure": not_sure}]}
