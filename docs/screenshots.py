"""The pictures of the documentation, taken in headless Chromium, at the width of a desktop and of a
phone.

    python docs/screenshots.py RUN OUT

RUN is an evaluated run on the embedded digits, as of `vgg-transfer finetune --out RUN` and
`vgg-transfer evaluate RUN`. The photos are digits that this program draws, so that all content of
the pictures belongs to the project or to scikit-learn's digits. docs/serve.png and docs/report.png
are OUT/serve-1020.png and OUT/report-1000.png.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from chromium import Page, browser
from served_runs import started

DIGITS = "362"
HEIGHTS = {1280: 900, 1020: 640, 1000: 1262, 390: 844}


def draw(digit: str, path: Path) -> Path:
    """A photo of a written digit, wider than high."""
    image = Image.new("RGB", (540, 360), (12, 14, 20))
    font = ImageFont.load_default(330)
    place = {"fill": (240, 240, 235), "font": font, "anchor": "mm", "stroke_width": 9}
    ImageDraw.Draw(image).text((270, 185), digit, **place, stroke_fill=place["fill"])
    image.filter(ImageFilter.GaussianBlur(5)).save(path)
    return path


def classify(page: Page, photos: list[Path]) -> None:
    """Choose photos on the page, and wait for their answers and overlays."""
    page.choose_files("#files", *photos)
    page.wait(f"document.querySelectorAll('.answer').length === {len(photos)}")
    page.wait("[...document.querySelectorAll('.shown button')].every(b => !b.hidden)")
    page.wait("[...document.images].every(i => i.complete && i.naturalWidth)")


def main() -> int:
    """Take all pictures."""
    run, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder) / "profile") as page:
        photos = [draw(digit, Path(folder) / f"{digit}.png") for digit in DIGITS]
        with started(run.resolve()) as (url, _):
            for width in (1280, 1020, 390):
                page.open(url, width, HEIGHTS[width])
                page.screenshot(out / f"start-{width}.png")
                classify(page, photos)
                page.screenshot(out / f"serve-{width}.png")
                page.run("document.getElementById('tab-errors').click()")
                page.wait("document.querySelector('#errors img')?.naturalWidth > 0")
                page.screenshot(out / f"errors-{width}.png")
        for width in (1280, 1000, 390):
            page.open((run / "report.html").resolve().as_uri(), width, HEIGHTS[width])
            page.screenshot(out / f"report-{width}.png")
        print(out, *page.problems)
    return 0


if __name__ == "__main__":
    sys.exit(main())
