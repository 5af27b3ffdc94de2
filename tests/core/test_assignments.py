"""``NAME=VALUE`` as text."""

import pytest

from transfer.core.assignments import parse_feeds, parse_renames


def test_values_of_placeholders_are_numbers_or_switches():
    feeds = parse_feeds(["split=x:0=1.5", "training=True", "keep=1e-3"])
    assert feeds == {"split=x:0": 1.5, "training": True, "keep": 0.001}
    assert feeds["training"] is True


@pytest.mark.parametrize("text", ["keep_prob", "=1", "keep_prob=half", ""])
def test_other_feeds_are_refused(text):
    with pytest.raises(ValueError, match=f"feed={text!r}: expected NAME=VALUE with a number"):
        parse_feeds([text])


@pytest.mark.parametrize("text", ["weights", "weights=weights", "="])
def test_renames_that_change_nothing_are_refused(text):
    with pytest.raises(ValueError, match=f"rename={text!r}: expected NAME=KEY"):
        parse_renames(["a=b", text])
