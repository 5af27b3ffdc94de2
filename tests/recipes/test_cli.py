"""The command line as a whole: help, usage errors, suggestions, completion, exit status."""

import re
import subprocess
import sys

import pytest

from recipes.cli import VERBS, main


def test_usage_error_is_status_2(capsys):
    for arguments in (["finetune", "--epoch", "3"], ["finetune", "--epochs", "many"], ["evaluate"]):
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert main(["conquer"]) == 2


@pytest.mark.parametrize(
    "words",
    [["--seed", "1.5"], ["--seed=-.5"], ["--epochs", "2.5"], ["--hidden", "8.5"], ["--config"]],
    ids=lambda words: words[0],
)
def test_fractions_are_not_rounded_to_whole_numbers(words, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("seed: 1.5\n")
    words = [*words, str(tmp_path / "config.yaml")] if words == ["--config"] else words
    assert main(["finetune", *words]) == 2
    assert "expected a whole number" in capsys.readouterr().err


def test_help_does_not_import_tensorflow():
    code = (
        "import sys, recipes.cli as cli\n"
        "for verb in cli.VERBS: assert cli.main([verb, '--help']) == 0\n"
        "cli.main(['--help']); print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for verb in VERBS:
        assert f"Usage: vgg-transfer {verb}" in done.stdout
    assert done.stdout.endswith("False\n")
    listed = re.findall(
        r"^│ ([a-z][a-z-]+)  +\S", done.stdout.split("Usage: vgg-transfer COMMAND")[1], re.M
    )
    assert listed == list(VERBS)  # in the order of the work, each with a summary


@pytest.mark.slow
def test_quiet_shows_results_and_warnings_only(tmp_path, model, image_folder, capfd, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "")  # the flag sets it; it is unset at the end of the test
    flags = ["--model", model, "--out", tmp_path / "run", "--epochs", 2, "--cache", "off"]
    assert main([*map(str, ["finetune", image_folder, "--quiet", *flags])]) == 0
    printed = capfd.readouterr()
    assert printed.out.splitlines()[-1] == str(tmp_path / "run")
    assert [line for line in printed.err.splitlines() if not line.startswith("warning: ")] == []


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["finetun"], '"finetune"'),
        (["finetune", "--epoch", "2"], "--epochs"),
        (["predict", "run", "a.jpg", "--topk", "3"], "--top-k"),
        (["--verson"], "--version"),
        (["--quite", "finetune"], "--quiet"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_similar_verbs_and_flags_are_suggested(words, suggestion, capsys):
    assert main(words) == 2
    assert f"Did you mean {suggestion}?" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_with_verbs_and_flags(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("finetune", "check-data", "freeze-until"):
        assert word in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        assert "\ncomplete -o default -F " in script  # files, where no word fits


def test_the_package_is_a_command():
    command = [sys.executable, "-m", "recipes", "inspect", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage: vgg-transfer inspect" in done.stdout
