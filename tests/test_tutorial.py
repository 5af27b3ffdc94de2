"""Code blocks of some pages of the documentation run in order and print the documented output."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NUM_BLOCKS = {"tutorial": 14, "features": 9, "scikit-learn": 2}
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in NUM_BLOCKS}
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_print_documented_output(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    namespace: dict = {}
    text = PAGES[page]
    blocks = BLOCK.findall(text)
    assert len(blocks) == NUM_BLOCKS[page]
    for code, expected in blocks:
        line = text[: text.index(code)].count("\n")
        exec(compile("\n" * line + code, f"docs/{page}.md", "exec"), namespace)
        assert capsys.readouterr().out == expected, f"the block at line {line + 1}"


def test_every_print_of_the_tutorial_has_documented_output():
    for code, expected in BLOCK.findall(PAGES["tutorial"]):
        assert code.count("print(") == len(expected.splitlines()), code


@pytest.mark.parametrize("text", PAGES.values(), ids=PAGES)
def test_all_outputs_follow_a_code_block(text):
    assert text.count("```text") == sum(bool(expected) for _, expected in BLOCK.findall(text))
