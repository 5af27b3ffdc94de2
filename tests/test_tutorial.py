"""The code blocks of the tutorial and of the page on features run in order and print the documented
output."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("tutorial", "features")}
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_print_documented_output(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    namespace: dict = {}
    text = PAGES[page]
    blocks = BLOCK.findall(text)
    assert len(blocks) > (10 if page == "tutorial" else 3)
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
