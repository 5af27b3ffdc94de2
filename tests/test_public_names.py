"""The public names are as documented, and the examples in their docstrings run."""

import doctest
from pathlib import Path

import pytest

import transfer


def test_public_names_are_these():
    assert transfer.__all__ == [
        "Backbone",
        "Card",
        "Classifier",
        "Features",
        "FineTuneResult",
        "ForbiddenOpError",
        "Head",
        "MetaGraph",
        "Prediction",
        "Preprocess",
        "build_head",
        "convert",
        "evaluate",
        "export",
        "extract_features",
        "fine_tune",
        "grow",
        "load_meta_graph",
        "open_source",
        "predict",
        "save_meta_graph",
        "to_keras",
    ]
    assert sorted(dir(transfer)) == sorted(transfer.__all__)
    assert all(getattr(transfer, name).__doc__ for name in transfer.__all__)


@pytest.mark.slow_variants
@pytest.mark.parametrize("name", transfer.__all__)
def test_docstring_example_runs(name, tmp_path, monkeypatch):
    (tmp_path / "pretrained").symlink_to(Path(__file__).resolve().parents[1] / "pretrained")
    monkeypatch.chdir(tmp_path)
    public = getattr(transfer, name)
    doctests = doctest.DocTestFinder(recurse=False).find(public, name, globs={})
    assert any(test.examples for test in doctests), f"{name} has no example"
    for test in doctests:
        report = []
        failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
        assert not failed, "".join(report)
