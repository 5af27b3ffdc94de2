import os

import pytest
import yaml

from recipes import cli
from transfer.core.yaml_files import MAX_BYTES, read_flags
from transfer.runs import run_folder

ALIASES = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "empty": b"",
    "comment": b"# nothing\n",
    "list": b"- epochs\n",
    "scalar": b"3",
    "keys": b"1: 2",
    "key of a list": b"? [a]\n: b",
    "binary": bytes(range(256)),
    "zeros": bytes(1000),
    "object": b"!!python/object/apply:os.system [true]",
    "open quote": b'epochs: "3',
    "tab": b"epochs:\n\t3",
    "date": b"epochs: 2020-13-45",
    "number": b"epochs: " + b"9" * 5000,
    "nested list": b"epochs: " + b"[" * 50_000,
    "nested mapping": b"{a: " * 20_000,
    "aliases": ALIASES.encode(),
    "alias of itself": b"epochs: &a [*a]",
    "large": b"epochs: 3\n" + b"#" * MAX_BYTES,
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_malicious_files_are_rejected(tmp_path, data):
    path = tmp_path / "flags.yaml"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="flags.yaml"):
        read_flags(path)


def test_endless_files_are_rejected(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(10**10)
    for path in (tmp_path / "pipe", tmp_path / "sparse", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match="expected a YAML file with flags"):
            read_flags(type(tmp_path)(path))


def test_flags_are_read(tmp_path):
    (tmp_path / "flags.yaml").write_text("epochs: 3\nfeed:\n- a=1\nhidden: [8]\nout: runs/ಕ\n")
    expected = {"epochs": 3, "feed": ["a=1"], "hidden": [8], "out": "runs/ಕ"}
    assert read_flags(tmp_path / "flags.yaml") == expected


@pytest.mark.parametrize(
    "text", ["", "- epochs\n", ALIASES, pytest.param("[" * 5000, marks=pytest.mark.slow)]
)
def test_malicious_configs_give_one_line_errors(tmp_path, capsys, text):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text(text)
    config = str(out / "config.yaml")
    for words in (
        ["finetune", "--config", config],
        ["finetune", "--config", config, "--out", str(out), "--resume"],
        ["evaluate", str(out)],
    ):
        assert cli.main(words) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert "config.yaml" in error
        assert error.count("\n") == 1


def test_resume_rejects_malicious_configs(tmp_path, capsys, model, image_folder):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text(ALIASES)
    flags = ["--model", model, "--image-folder", image_folder, "--out", out, "--resume"]
    assert cli.main(["finetune", *map(str, flags)]) == 1
    assert "aliases such as *a are not allowed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        {"nonsense": 1},
        {"epochs": [1, 2]},
        {"epochs": {"a": 1}},
        {"epochs": "many"},
        {"out": [1]},
        {"cache": "nowhere"},
        {"feed": {"a": "b"}},
    ],
    ids=str,
)
def test_unknown_flags_and_values_give_one_line_errors(tmp_path, capsys, flags):
    (tmp_path / "flags.yaml").write_text(yaml.safe_dump(flags))
    assert cli.main(["finetune", "--config", str(tmp_path / "flags.yaml")]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert next(iter(flags)) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{", '{"a": NaN}', "[" * 100_000, '{"a":' * 100_000, "\x00"]
)
def test_json_of_wrong_type_is_rejected(tmp_path, text):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match="metrics.json"):
        run_folder.read_json(tmp_path / "metrics.json")
