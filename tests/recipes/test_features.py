"""``vgg-transfer features``."""

import numpy as np

from recipes.cli import main


def test_features_of_a_folder_are_written(tmp_path, model, image_folder, capsys):
    out = tmp_path / "features.npz"
    flags = ["--model", model, "--preprocess", "unit", "--cache-dir", tmp_path / "cache"]
    command = ["features", image_folder, "--out", out, "--tap", "pool2,fc7", *flags]
    assert main([*map(str, command)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    with np.load(out) as arrays:
        assert len(arrays["values"]) == len(arrays["names"]) == len(arrays["labels"]) == 24
        assert arrays["taps"].tolist() == ["pool2", "fc7"]
        assert arrays["values"].shape[1] == arrays["tap_widths"].sum()


def test_unknown_format_is_refused_before_any_work(tmp_path, image_folder, capsys):
    assert main(["features", str(image_folder), "--out", str(tmp_path / "f.txt")]) == 1
    assert "features are written as .npz" in capsys.readouterr().err
