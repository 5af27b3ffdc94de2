"""The notebooks run from the first cell to the last, and are committed without outputs."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    content = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def check_features(values):
    assert values["scores"].mean() > 0.8


def check_losses(values):
    assert values["history"][-1] < values["history"][0] / 2


def check_cuts(values):
    assert min(values["accuracy"].values()) > 0.3


def check_tf1(values):
    assert values["accuracy"] > 0.5
    assert values["unchanged"]


def check_accuracy(values):
    assert values["accuracy"] > 0.6


CHECKS = {
    "features_for_svm_and_tsne": check_features,
    "fine_tune_image_folder": check_accuracy,
    "frozen_against_full": check_cuts,
    "new_head_on_tf1_graph": check_tf1,
    "perceptual_and_style_loss": check_losses,
    "tf1_checkpoint_to_keras": check_accuracy,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@each_notebook
def test_notebook_runs_and_learns(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    values = {"__name__": "__main__"}
    for number, cell in enumerate(cells(path, "code")):
        exec(compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec"), values)
    plt.close("all")
    CHECKS[path.stem](values)


@each_notebook
def test_notebook_has_no_outputs_and_installs_the_package_first(path):
    code = cells(path, "code")
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert code[0]["source"] == cells(NOTEBOOKS[0], "code")[0]["source"]
    assert 'find_spec("transfer") is None' in "".join(code[0]["source"])
    assert "colab.research.google.com/github" not in path.read_text()  # no public address is known


def test_notebooks_are_checked_and_listed():
    names = {path.stem for path in NOTEBOOKS}
    assert names == CHECKS.keys()
    page = (ROOT / "docs" / "examples.md").read_text()
    assert names == set(re.findall(r"`examples/(\w+)\.ipynb`", page))
    assert "(docs/examples.md)" in (ROOT / "README.md").read_text()
