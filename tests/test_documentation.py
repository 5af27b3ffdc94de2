"""The documentation agrees with the code."""

import re
from pathlib import Path

import pytest
import yaml

import transfer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "benchmarks/README.md"]


def test_api_page_lists_public_names_in_order():
    page = (ROOT / "docs" / "api.md").read_text()
    assert re.findall(r"^::: transfer\.(\w+)$", page, re.MULTILINE) == transfer.__dir__()


def test_all_pages_are_in_the_navigation():
    navigation = re.search(
        r"^nav:\n.*", (ROOT / "mkdocs.yml").read_text(), re.DOTALL | re.MULTILINE
    )
    pages = [page for section in yaml.safe_load(navigation[0])["nav"] for page in _pages(section)]
    assert sorted(pages) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def _pages(section):
    if isinstance(section, str):
        return [section]
    entries = section.values() if isinstance(section, dict) else section
    return [page for entry in entries for page in _pages(entry)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_documentation_exist(page):
    named = re.findall(
        r"\b((?:transfer|recipes|tests|benchmarks|docs)/[\w/]+\.\w+)", page.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []
