"""The output of `vgg-transfer plan`."""

import shlex
from dataclasses import replace

import pytest

from recipes.cli import main
from recipes.console import with_flags
from recipes.finetune_flags import FinetuneConfig
from recipes.plan import recommended
from transfer.finetuning import forecast as forecast_module
from transfer.finetuning.cost import CutCost
from transfer.finetuning.forecast import Forecast, describe, describe_trial
from transfer.finetuning.full_trial import FullTrial
from transfer.finetuning.tap_choice import TapChoice, TapScore


def forecast(tap="pool5"):
    scores = [TapScore(name, 512, 0.8, (0.7, 0.9)) for name in ("fc7", "pool5")]
    best = next(score for score in scores if score.tap == tap)
    costs = [CutCost(cut, 20, 3.0, 60.0, 7300.0, 900.0, 30.0, 1000) for cut in (tap, "none")]
    return Forecast(TapChoice(scores, best, 0.79, (0.69, 0.89), 100), costs, 100, 40)


def test_recommended_command_has_the_given_flags():
    config = FinetuneConfig(
        image_folder="my photos", freeze_until="none", feed=("a=1", "b=2"), augment=True
    )
    assert shlex.split(recommended(config, forecast().options)) == [
        *("vgg-transfer", "finetune", "--image-folder", "my photos", "--augment"),
        *("--tap", "pool5", "--feed", "a=1", "--feed", "b=2"),
    ]


def test_tables_have_a_row_per_tap_and_per_cut():
    lines = [*describe(forecast("fc7"), "vgg-transfer finetune")]
    assert "recommended: vgg-transfer finetune" in lines
    assert sum(line.startswith("| ") for line in lines) == 2 + 2 + 2  # with the headers
    (head,) = [line for line in lines if line.startswith("| none")]
    cells = [cell.strip() for cell in head.strip("|").split("|")]
    assert cells == ["none", "20", "1,000", "3 s", "60 s", "2.0 h", "900", "30"]
    assert any("accuracy 0.790, " in line and "0.690 to 0.890 on" in line for line in lines)


def test_costs_of_the_tap_that_was_given_have_their_own_table():
    of_given = [CutCost("pool5", 20, 3.0, 60.0, 66.0, 900.0, 30.0, 1000)]
    lines = [*describe(replace(forecast("fc7"), given=("pool5", of_given)))]
    assert any(line.startswith("runs with the tap pool5 on this machine") for line in lines)
    assert sum(line.startswith("| pool5 ") and "1,000" in line for line in lines) == 1


def test_accuracy_is_said_to_be_that_of_a_solved_head():
    """The options that were given may train one by gradient descent."""
    trained = forecast()
    solved = [replace(cost, solver="ridge") for cost in trained.costs]
    for costs, count in ((trained.costs, 1), (solved, 0)):
        lines = [*describe(replace(trained, costs=costs))]
        assert sum("is that of a head that is solved for" in line for line in lines) == count


def test_paths_in_the_recommended_command_are_as_given(
    monkeypatch, capsys, own_image_folder, model
):
    """Also those that are named like an option."""
    monkeypatch.setattr(forecast_module, "forecast", lambda request: forecast())
    monkeypatch.chdir(own_image_folder.parent)
    folder = own_image_folder.rename(own_image_folder.with_name("image_folder"))
    flags = ["plan", "image_folder", "--model", str(model), "--freeze-until", "pool4"]
    assert main(flags) == 0
    assert main([*flags, "--out", str(folder)]) == 1
    printed = capsys.readouterr()
    command = f"vgg-transfer finetune --image-folder image_folder --model {model} --tap pool5"
    assert f"recommended: {command}" in printed.out.splitlines()
    assert "  in place of --freeze-until pool4" in printed.out.splitlines()
    assert "is not empty" in printed.err


def test_trial_of_full_fine_tuning_is_called_an_estimate():
    trial = FullTrial(0.85, 0.8, (0.01, 0.09), 80, 20)
    assert [*describe_trial(replace(forecast(), trial=trial))] == [
        "  an estimate from 80 training images, tested on 20 others: full fine-tuning 0.850, "
        "the head 0.800",
        "  difference +0.050 (95 % interval +0.010 to +0.090)",
    ]
    (line,) = describe_trial(replace(forecast(), few=object(), trial_s=600.0))
    assert with_flags(line).endswith("as that takes 10 min; --trial-minutes 15 tries it")
    assert not [*describe_trial(forecast())]


@pytest.mark.parametrize("flags", [["--schedule", "fc7:1"], ["--strategy", "mirrored"]])
def test_plan_refuses_what_it_does_not_estimate(model, image_folder, flags, capsys):
    words = ["plan", str(image_folder), "--model", str(model), *flags]
    assert main(words) == 1
    assert f"leave out {flags[0]}" in capsys.readouterr().err
