import json

import pytest

from transfer.models.card import Card, read_card, write_card


def test_card_round_trips(tmp_path):
    card = Card(input="x:0", image_size=64, feeds={"keep_prob:0": 1.0}, eval={"accuracy": 0.5})
    write_card(tmp_path / "m.json", card)
    assert read_card(tmp_path / "m.json") == card
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]


def test_card_keeps_custom_means(tmp_path):
    means = {"mean": [93.594, 104.7624, 129.1863], "order": "BGR"}
    write_card(tmp_path / "m.json", Card(preprocess=means))
    assert json.loads((tmp_path / "m.json").read_text())["preprocess"] == means
    assert read_card(tmp_path / "m.json").preprocess == means
    (tmp_path / "m.json").write_text('{"preprocess": 3}')
    with pytest.raises(ValueError, match="preprocess is 3; expected a str | dict"):
        read_card(tmp_path / "m.json")


def test_unknown_keys_are_ignored(tmp_path):
    (tmp_path / "m.json").write_text('{"tap": "fc7:0", "colour": "blue"}')
    assert read_card(tmp_path / "m.json") == Card(tap="fc7:0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a card"),
        ("[]", "expected a JSON object"),
        ('{"image_size": "big"}', "image_size is 'big'; expected an int, or height"),
        ('{"tap": 7}', "tap is 7; expected a str"),
        ('{"outputs": {"logits": 5}}', "outputs is .*; expected other values in it"),
        ('{"taps": [1]}', "taps is .*; expected other values in it"),
        ('{"image_size": 1000000}', "image_size is 1000000; expected an int, or height"),
    ],
)
def test_invalid_cards_are_rejected(tmp_path, text, message):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_card(tmp_path / "m.json")


def test_image_sizes_are_one_number_or_two(tmp_path):
    write_card(tmp_path / "m.json", Card(image_size=(100, 200)))
    assert '"image_size": [' in (tmp_path / "m.json").read_text()
    assert read_card(tmp_path / "m.json").image_size == (100, 200)
    (tmp_path / "m.json").write_text('{"image_size": [64, 64]}')
    assert read_card(tmp_path / "m.json").image_size == 64
