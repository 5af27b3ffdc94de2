"""The pictures of the documentation, taken in headless Chromium, at the width of a desktop and of a
phone.

    python docs/screenshots.py RUN OUT

RUN is an evaluated run on the embedded digits, as of `vgg-transfer finetune --out RUN` and
`vgg-transfer evaluate RUN`. The photos are held-out images of these digits. docs/serve.png and
docs/report.png are OUT/serve-1020.png and OUT/report-1000.png.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from transfer.runs import run_data

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from chromium import Page, browser
from served_runs import started

LABELS = (3, 6, 2)
HEIGHTS = {1280: 900, 1020: 700, 1000: 1262, 390: 844}


def photos_of(run: Path, folder: Path) -> list[Path]:
    """Held-out digits of the run, as photos that are wider than high."""
    held_out = run_data.held_out(run, run_data.open_data(run))
    chosen = [int(np.flatnonzero(held_out.labels == label)[0]) for label in LABELS]
    paths = [folder / f"{label}.png" for label in LABELS]
    for position, path in zip(chosen, paths, strict=True):
        (example,) = held_out.examples(np.array([position]))
        digit = Image.open(io.BytesIO(example["image"].numpy())).convert("RGB")
        photo = Image.new("RGB", (540, 360))
        photo.paste(digit.resize((360, 360), Image.Resampling.BICUBIC), (90, 0))
        photo.save(path)
    return paths


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
        photos = photos_of(run, Path(folder))
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
