"""The embedded data and models as plug-ins of a grid."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.errors import DataError, PluginError, WeightsError
from bench.registry import DATASETS, MODELS
from tasks.classification import cifar_nets
from tasks.mini import data, manifest


def test_digits_are_the_samples() -> None:
    dataset = DATASETS.create("mini_digits", {"split": "test"})
    assert len(dataset) == 500 and len(dataset.ids()) == 500 and dataset.task == "classification"
    pixels, label = data.sample("test", 7)
    item = dataset[7]
    assert item.target == label and item.id == dataset.ids()[7] == "test_000007"
    assert torch.equal((item.image * 255).round().byte(), torch.from_numpy(pixels.transpose(2, 0, 1).copy()))
    assert item.image.dtype == torch.float32


def test_scenes_are_the_scenes() -> None:
    dataset = DATASETS.create("mini_scenes_seg", {"count": 3})
    scene = data.scene("test", 2)
    item = dataset[2]
    assert item.image.shape == (3, 96, 96) and item.target.shape == (96, 96)
    assert torch.equal(item.target, torch.from_numpy(scene.label_map).long())
    assert len(dataset.classes) == 11 and len(dataset) == 3


def test_fingerprints_tell_splits_and_kinds_apart_but_not_counts() -> None:
    def mark(name: str, **params: object) -> str:
        return DATASETS.create(name, params).fingerprint()

    assert mark("mini_digits") == mark("mini_digits", count=9)
    assert len({mark("mini_digits"), mark("mini_digits", split="val"), mark("mini_scenes_seg")}) == 3


def test_bad_parameters_get_one_line() -> None:
    with pytest.raises(DataError, match="dataset 'mini_digits': count is 0"):
        DATASETS.create("mini_digits", {"count": 0})
    with pytest.raises(PluginError, match="split"):
        DATASETS.create("mini_scenes_seg", {"split": "tset"})
    with pytest.raises(IndexError):
        DATASETS.create("mini_digits")[500]


@pytest.mark.parametrize("name", ["mini_vgg", "mini_resnet", "mini_wrn"])
def test_models_predict_the_digits(name: str) -> None:
    source = MODELS.create(name)
    assert source.identity()["sha256"] == manifest.entry(name)["sha256"]
    model = source.load(torch.device("cpu"))
    dataset = DATASETS.create("mini_digits", {"count": 40})
    items = [model.prepare(dataset[i]) for i in range(40)]
    found = model.predict(torch.stack([item.image for item in items]))
    assert sum(int(f) == item.target for f, item in zip(found, items, strict=True)) >= 36
    assert not any(p.requires_grad for p in model.parameters())


def test_damaged_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "mini_vgg.safetensors"
    monkeypatch.setattr(manifest, "weights_path", lambda name, folder=None: copy)
    with pytest.raises(WeightsError, match=r"mini_vgg\.safetensors does not exist: .*zoo build mini_vgg"):
        MODELS.create("mini_vgg").identity()
    copy.write_bytes((manifest.WEIGHTS_DIR / "mini_vgg.safetensors").read_bytes()[:-10])
    with pytest.raises(WeightsError, match="is damaged or of another training"):
        MODELS.create("mini_vgg").load(torch.device("cpu"))


def test_a_classifier_does_not_import_the_mm_libraries() -> None:
    code = (
        "import sys, torch; from bench.registry import DATASETS, MODELS;"
        "MODELS.create('mini_vgg').load(torch.device('cpu')); DATASETS.create('mini_digits')[0];"
        "print(sorted(m for m in ('mmdet', 'mmseg', 'mmcv', 'sklearn') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("network", "millions"),
    [
        # Parameter counts of the papers' networks with 10 classes, in millions.
        (lambda: cifar_nets.WideResNet(34, 10), 46.16),
        (lambda: cifar_nets.WideResNet(28, 10), 36.48),
        (lambda: cifar_nets.VGG.of_depth(19), 20.04),
        (lambda: cifar_nets.ResNet(cifar_nets.Bottleneck, (3, 4, 6, 3)), 23.52),
        (lambda: cifar_nets.ResNet(cifar_nets.BasicBlock, (2, 2, 2, 2)), 11.17),
    ],
)
def test_paper_sizes(network: object, millions: float) -> None:
    with torch.device("meta"):
        model = network()  # type: ignore[operator]
    assert cifar_nets.parameter_count(model) / 1e6 == pytest.approx(millions, abs=0.006)


def test_nets_take_other_sizes_and_refuse_bad_ones() -> None:
    for build in (cifar_nets.mini_vgg, cifar_nets.mini_resnet, cifar_nets.mini_wrn):
        assert build().eval()(torch.zeros(2, 3, 40, 48)).shape == (2, 10)
    with pytest.raises(ValueError, match="depth: 20 is not one of 11, 13, 16, 19"):
        cifar_nets.VGG.of_depth(20)
    with pytest.raises(ValueError, match="depth: 30"):
        cifar_nets.WideResNet(30)
