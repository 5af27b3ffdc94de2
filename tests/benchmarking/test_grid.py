"""The text form of the axes of a study."""

import pytest

from transfer.benchmarking.grid import parse_grid, show_grid


def test_values_have_the_types_of_their_options():
    axes = parse_grid(
        "shots_per_class=5,default freeze-until=tap,none learning_rate=1e-3 augment=true,false "
        "hidden=|64|64,32 solver=lbfgs schedule=fc7:2,none:1| image_size=32,32x48"
    )
    assert axes == {
        "shots_per_class": [5, None],
        "freeze_until": ["tap", "none"],
        "learning_rate": [0.001],
        "augment": [True, False],
        "hidden": [(), (64,), (64, 32)],
        "solver": ["lbfgs"],
        "schedule": ["fc7:2,none:1"],
        "image_size": [32, "32x48"],
    }
    assert list(axes)[:2] == ["shots_per_class", "freeze_until"]
    assert parse_grid(show_grid(axes)) == axes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the grid is empty"),
        ("seed", "'seed' is not an axis; expected OPTION=VALUE"),
        ("seed=0,1 seed=2", "seed occurs twice"),
        ("seed=0,0", "lists a value twice"),
        ("seed=one", "seed='one'; expected an integer"),
        ("augment=yes", "expected true or false"),
        ("solver=newton", "expected one of auto, gradient, ridge, lbfgs"),
    ],
)
def test_invalid_grid_is_refused_with_what_was_expected(text, message):
    with pytest.raises(ValueError, match=message):
        parse_grid(text)


def test_unknown_option_is_refused_with_a_suggestion():
    with pytest.raises(TypeError, match="did you mean learning_rate"):
        parse_grid("learning_rat=1")
