import importlib
import json
import sys

import pytest

from recipes import startup


def test_hidden_packages_are_imported_later(tmp_path, monkeypatch):
    (tmp_path / "planted_package.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with startup._hidden(["planted_package", "json"]):
        with pytest.raises(ImportError):
            importlib.import_module("planted_package")
        assert importlib.import_module("json") is json  # it had been imported before
    assert importlib.import_module("planted_package")
    del sys.modules["planted_package"]
    assert sys.modules["json"] is json
