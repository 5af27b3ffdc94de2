"""The code blocks of the tutorial run in order and print the documented output."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "tutorial.md").read_text()
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_code_blocks_print_documented_output(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    namespace: dict = {}
    blocks = BLOCK.findall(TEXT)
    assert len(blocks) > 10
    for code, expected in blocks:
        line = TEXT[: TEXT.index(code)].count("\n")
        exec(compile("\n" * line + code, "docs/tutorial.md", "exec"), namespace)
        assert capsys.readouterr().out == expected, f"the block at line {line + 1}"


def test_every_print_has_documented_output():
    for code, expected in BLOCK.findall(TEXT):
        assert code.count("print(") == len(expected.splitlines()), code


def test_all_outputs_follow_a_code_block():
    assert TEXT.count("```text") == sum(bool(expected) for _, expected in BLOCK.findall(TEXT))
