"""`inspect` from end to end, on a small network."""

import json

import pytest

from recipes.cli import main


def test_inspect_prints_one_screen(model, capsys):
    assert main(["inspect", str(model)]) == 0
    out = capsys.readouterr().out
    for part in ("images:0", "takes the images", "fc7", "12 of the graph's 12 variables matched"):
        assert part in out
    assert "keep_prob: 1.0, 0.5 while training" in out
    assert f"vgg-transfer finetune --model {model}" in out
    assert len(out.splitlines()) < 50


def test_inspect_lists_the_cuts(model, capsys):
    assert main(["inspect", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("cuts for --freeze-until"))
    # 3x3 convolutions of 8, then 8 and 16 channels at 16 and 8 pixels, then 256 x 32 and 32 x 32
    work = [16 * 16 * 27 * 8, 8 * 8 * 9 * 8 * 8, 8 * 8 * 9 * 8 * 16, 256 * 32, 32 * 32]
    share = f"{work[0] / sum(work):.1%}"
    after = sum([9 * 8 * 8 + 8, 9 * 8 * 16 + 16, 256 * 32 + 32, 32 * 32 + 32])
    assert lines[first + 1].split() == [
        "pool1", "[8,", "8,", "8]", "2.0", "kB", share, f"{after / (after + 27 * 8 + 8):.1%}"
    ]  # fmt: skip


def test_inspect_prints_json(own_model, capsys):
    own_model.with_name("tiny.data-00000-of-00001").unlink()
    assert main(["inspect", str(own_model.with_name("tiny.meta")), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["taps"][0]["shape"] == [None, 32]
    assert found["checkpoint"]["matched"] == 12
    assert "lacks its data" in found["checkpoint"]["problem"]


@pytest.mark.slow
def test_command_suggested_by_inspect_works(tmp_path, model, capsys):
    assert main(["inspect", str(model), "--json"]) == 0
    command = json.loads(capsys.readouterr().out)["command"]
    flags = ["--epochs", "1", "--out", str(tmp_path / "run"), "--shots-per-class", "4"]
    assert main([*command.split()[1:], *flags]) == 0
