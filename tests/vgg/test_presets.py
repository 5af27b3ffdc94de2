"""What the files beside the weights of a preset say of them."""

import json

import pytest
from published_files import NUM_CLASSES, write_timm

from transfer.vgg.published import containers, layouts, presets

TIMM = {
    "architecture": "vgg11_bn",
    "num_classes": NUM_CLASSES,
    "pretrained_cfg": {"mean": [0.5, 0.4, 0.2], "std": [0.1, 0.2, 0.4]},
    "label_names": [f"kind {number}" for number in range(NUM_CLASSES)],
}


def beside(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return presets.of_timm(folder / "model.safetensors")


def test_model_of_timm_has_its_preprocessing_and_class_names(tmp_path):
    write_timm(tmp_path / "model.safetensors")
    beside(tmp_path, TIMM)
    published = layouts.identify(containers.read(tmp_path / "model.safetensors"))
    assert published.preprocess == {"mean": [127.5, 102, 51], "std": [25.5, 51, 102]}
    assert published.labels == TIMM["label_names"]


def test_class_names_of_timm_are_in_the_order_of_their_numbers(tmp_path):
    names = {"10": "ten", "2": "two", "0": "zero"}
    assert beside(tmp_path, {**TIMM, "label_names": names}).labels == ["zero", "two", "ten"]


@pytest.mark.parametrize("config", [
    {},
    [],
    {**TIMM, "architecture": "resnet18"},
    {**TIMM, "pretrained_cfg": "vgg"},
    {**TIMM, "pretrained_cfg": {"mean": [0.5], "std": ["a"]}},
    {**TIMM, "pretrained_cfg": {"mean": [0.5, 0.5], "std": [1, 1]}},
    {**TIMM, "pretrained_cfg": {"mean": None, "std": [1, 1, 0]}},
])  # fmt: skip
def test_files_of_other_models_beside_it_are_ignored(tmp_path, config):
    assert beside(tmp_path, config) == presets.Preset()
