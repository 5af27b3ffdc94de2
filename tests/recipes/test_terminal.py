"""Escaping of names in terminal output, and closed pipes."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from recipes import cli, terminal
from transfer.core.csv_files import original
from transfer.core.escapes import escaped_json

HOSTILE = "\x1b[2J\r\x08\x9b31m\u202egnp\u2066\u2028\nb"
SHOWN = r"\x1b[2J\r\x08\x9b31m\u202egnp\u2066\u2028\nb"


def test_control_characters_are_escaped():
    assert terminal.escaped(HOSTILE) == SHOWN
    assert terminal.escaped("\udcff") == r"\udcff"


@pytest.mark.parametrize("name", ["a b.jpg", r"C:\photos", "ಕನ್ನಡ", "日本", "né", "👩\u200d🚀"])
def test_printable_names_are_not_escaped(name):
    assert terminal.escaped(name) == name


def test_escaped_json_is_equivalent():
    text = escaped_json(json.dumps(HOSTILE, ensure_ascii=False))
    assert json.loads(text) == HOSTILE
    assert text == terminal.escaped(text)


def test_streams_keep_newlines_and_tabs():
    file = io.StringIO()
    print("a\tb\x1b[1m\nc\rd", file=terminal.EscapingStream(file))
    assert file.getvalue() == "a\tb\\x1b[1m\nc\\rd\n"


def test_progress_bars_move_the_cursor():
    def bars(stream):
        for _ in tqdm(range(2), file=stream, leave=False, mininterval=0, bar_format="{n}"):
            for _ in tqdm(range(2), file=stream, mininterval=0, bar_format="{n}"):
                pass

    plain, escaped = io.StringIO(), io.StringIO()
    bars(plain)
    bars(terminal.EscapingStream(escaped))
    assert escaped.getvalue() == plain.getvalue()
    assert "\r" in plain.getvalue()
    assert "\x1b[A" in plain.getvalue()


def test_errors_are_escaped_in_all_verbs(tmp_path, capsys):
    for words in (["inspect"], ["predict"], ["evaluate"], ["finetune", "--image-folder"]):
        assert cli.main([*words, str(tmp_path / HOSTILE)]) != 0
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.err == captured.err.rstrip("\n") + "\n"
        text = captured.err[:-1] + captured.out
        assert text == terminal.escaped(text)


def test_streams_are_restored():
    before = sys.stdout, sys.stderr
    assert cli.main(["inspect", "nothing"]) == 1
    assert (sys.stdout, sys.stderr) == before


class Closed(io.StringIO):
    """A pipe whose reader has closed it."""

    def __init__(self, file):
        super().__init__()
        self.fileno = file.fileno

    def write(self, text):
        raise BrokenPipeError

    flush = isatty = write_through = lambda self: self.write("")


@pytest.mark.parametrize(("stream", "status"), [("stdout", 0), ("stderr", 141)])
def test_closed_pipe_is_not_an_error(tmp_path, monkeypatch, capsys, stream, status):
    with (tmp_path / "pipe").open("w") as file:
        monkeypatch.setattr(sys, stream, Closed(file))
        app = SimpleNamespace(meta=lambda *_, **__: getattr(sys, stream).write("x"))
        monkeypatch.setattr(cli, "app", app)
        assert cli.main([]) == status
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(os.name != "posix", reason="pipes of other systems fail in other ways")
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "PYTHONUNBUFFERED"])
def test_pipe_without_reader_is_closed_whether_or_not_output_is_buffered(unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    program = """
import sys
from recipes import terminal
assert not terminal.is_closed(sys.stderr)
try:
    print("x", flush=True)
except BrokenPipeError:
    sys.exit(0 if terminal.is_closed(sys.stdout) else "stdout is taken for open")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdout=writer,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        timeout=60,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_other_broken_pipes_are_errors(monkeypatch, capsys):
    def fail(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "app", SimpleNamespace(meta=fail))
    assert cli.main([]) == 1
    assert capsys.readouterr().err == "error: [Errno 32] Broken pipe\n"


@pytest.mark.skipif(os.name != "posix", reason="pipes of other systems fail in other ways")
def test_help_into_closed_pipe_is_not_an_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "recipes", "finetune", "--help"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=root, timeout=300)
    os.close(writer)
    assert done.returncode == 0
    assert done.stderr == b""


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    """A run with a class whose name has control characters, and a folder of its images."""
    from commands import finetune
    from conftest import make_image_folder, save_vgg

    from transfer import Card

    folder = tmp_path_factory.mktemp("hostile")
    card = Card(input="images:0", tap="fc7:0", image_size=16, preprocess="unit")
    model = save_vgg(folder / "tiny", card=card)
    photos = make_image_folder(folder / "photos")
    (photos / "red").rename(photos / "=\x1b[31mred\x9b\u202e")
    assert finetune(folder / "run", model, photos) == 0
    return folder / "run", photos


@pytest.mark.slow
def test_table_results_are_escaped(hostile_run, capsys):
    run, photos = hostile_run
    (photos / "blue" / f"{HOSTILE}.png").write_bytes((photos / "blue" / "01.png").read_bytes())
    (photos / "blue" / f"x{HOSTILE}.png").write_bytes(b"no image")
    capsys.readouterr()
    cli.main(["predict", str(run), str(photos)])
    cli.main(["check-data", "--image-folder", str(photos), "--model", "none"])
    captured = capsys.readouterr()
    assert f"blue/{SHOWN}.png" in captured.out
    assert f"x{SHOWN}.png: " in captured.err
    for line in (captured.out + captured.err.replace("\r", "")).split("\n"):
        assert line == terminal.escaped(line)


@pytest.mark.slow
def test_csv_and_jsonl_results_are_not_escaped(hostile_run, capsys):
    run, photos = hostile_run
    image = photos / "blue" / f"={HOSTILE}.png"
    image.write_bytes((photos / "blue" / "01.png").read_bytes())
    capsys.readouterr()
    assert cli.main(["predict", str(run), str(image), "--format", "jsonl"]) == 0
    out = capsys.readouterr().out
    assert out == terminal.escaped(out[:-1]) + "\n"
    found = json.loads(out)
    assert found["image"] == str(image)
    assert {p["label"] for p in found["predictions"]} == {"blue", "=\x1b[31mred\x9b\u202e"}
    assert cli.main(["predict", str(run), str(image), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out, newline="")))
    assert {original(row["image"]) for row in rows} == {str(image)}
    assert {row["label"] for row in rows} == {"blue", "'=\x1b[31mred\x9b\u202e"}


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_csv_files_have_no_formulas(hostile_run):
    run, _ = hostile_run
    assert cli.main(["evaluate", str(run), "--against", str(run)]) == 0
    for name in ("predictions.csv", "confusion.csv", "changes.csv"):
        with (run / name).open(newline="", encoding="utf-8") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    with (run / "predictions.csv").open(newline="", encoding="utf-8") as file:
        labels = {row["label"] for row in csv.DictReader(file)}
    assert labels == {"blue", "'=\x1b[31mred\x9b\u202e"}
