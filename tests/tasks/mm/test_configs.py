"""Configs of mmdet and mmseg, read offline."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.errors import GridError
from tasks.mm import configs, ops

ops.install()


def test_packaged_names_cover_both_packages() -> None:
    detection, segmentation = configs.config_names("mmdet"), configs.config_names("mmseg")
    for name in ("ssd300_coco", "mask-rcnn_r50_fpn_1x_coco", "retinanet/retinanet_r50_fpn_1x_coco"):
        assert detection[name].is_file()
    assert segmentation["pspnet_r50-d8_4xb2-40k_cityscapes-512x1024"].is_file()
    assert not any("_base_" in name for name in detection)


@pytest.mark.parametrize(
    ("package", "name", "hint"),
    [
        ("mmdet", "ssd30_coco", "did you mean 'ssd300_coco'"),
        ("mmdet", "mask_rcnn_r50_fpn_1x_coco", "'mask-rcnn_r50_fpn_1x_coco'"),
        ("mmseg", "pspnet_r50-d8", "names start with it"),
        ("mmseg", "no/such/config.py", "does not exist"),
    ],
)
def test_unknown_names(package: configs.Package, name: str, hint: str) -> None:
    with pytest.raises(GridError) as error:
        configs.find_config(package, name)
    assert hint in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_broken_config_is_one_line(tmp_path: Path) -> None:
    for text, part in (("model = dict(", "cannot be read"), ("a = 1", "has no 'model'")):
        path = tmp_path / f"c{len(text)}.py"
        path.write_text(text)
        with pytest.raises(GridError) as error:
            configs.load_config("mmdet", str(path))
        assert part in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_nothing_is_fetched_or_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("reached for the network or a shell")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    config = configs.load_config("mmseg", "pspnet_r50-d8_4xb2-40k_cityscapes-512x1024")
    assert configs.input_spec(config).scale == (2048, 1024)


def test_model_config_is_offline() -> None:
    config = configs.load_config("mmseg", "pspnet_r50-d8_4xb2-40k_cityscapes-512x1024")
    assert "SyncBN" in json.dumps(config.model.to_dict()) and "open-mmlab://" in json.dumps(
        config.model.to_dict()
    )
    text = json.dumps(configs.model_config(config))
    assert "SyncBN" not in text and "open-mmlab://" not in text
    assert '"BN"' in text
    assert "SyncBN" in json.dumps(config.model.to_dict())  # the config itself is left alone

    config = configs.load_config("mmdet", "mask-rcnn_r50_fpn_1x_coco")
    assert "torchvision://" not in json.dumps(configs.model_config(config))
    nested = {"a": [{"init_cfg": [{"type": "Kaiming"}, {"type": "Pretrained", "checkpoint": "http://x"}]}],
              "timm": {"pretrained": True}, "norm_cfg": {"type": "mmdet.SyncBN"}}  # fmt: skip
    assert configs._offline(nested) == {
        "a": [{"init_cfg": [{"type": "Kaiming"}]}], "timm": {"pretrained": False}, "norm_cfg": {"type": "BN"}
    }  # fmt: skip


def test_digest_ignores_the_path_but_not_the_model(tmp_path: Path) -> None:
    source = configs.find_config("mmdet", "ssd300_coco")
    config = configs.load_config("mmdet", "ssd300_coco")
    copy = tmp_path / "elsewhere.py"
    copy.write_text(config.pretty_text)
    assert configs.digest(configs.load_config("mmdet", str(copy))) == configs.digest(config)
    config.model.bbox_head.num_classes = 3
    assert configs.digest(config) != configs.digest(configs.load_config("mmdet", str(source)))


@pytest.mark.parametrize(
    ("package", "name", "scale", "keep"),
    [
        ("mmdet", "ssd300_coco", (300, 300), False),
        ("mmdet", "mask-rcnn_r50_fpn_1x_coco", (1333, 800), True),
        ("mmseg", "deeplabv3_r50-d8_4xb2-40k_cityscapes-512x1024", (2048, 1024), True),
    ],
)
def test_input_spec(package: configs.Package, name: str, scale: tuple[int, int], keep: bool) -> None:
    spec = configs.input_spec(configs.load_config(package, name))
    assert (spec.scale, spec.keep_ratio, spec.padding((10, 10))) == (scale, keep, (0, 0))


def test_input_spec_of_a_padding_pipeline_and_of_an_unknown_step() -> None:
    from mmengine.config import Config

    steps = [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", "scale": (64, 64), "keep_ratio": True},
        {"type": "Pad", "size": (64, 64), "pad_val": {"img": (114, 113, 112)}},
        {"type": "LoadAnnotations"},
        {"type": "PackDetInputs"},
    ]
    spec = configs.input_spec(Config({"test_pipeline": steps}))
    assert spec.padding((64, 40)) == (0, 24)
    padded = spec.pad(torch.full((3, 64, 40), 7.0))
    assert padded.shape == (3, 64, 64)
    assert padded[:, 0, 0].tolist() == [7, 7, 7]
    assert padded[:, -1, -1].tolist() == pytest.approx([114, 113, 112])
    nested = {
        "test_dataloader": {"dataset": {"type": "R", "dataset": {"pipeline": steps}}},
        "test_pipeline": [],
    }
    assert configs.input_spec(Config(nested)) == spec
    with pytest.raises(GridError, match="step 'Normalize' is not supported"):
        configs.input_spec(Config({"test_pipeline": [*steps, {"type": "Normalize"}]}), "config x")
    with pytest.raises(GridError, match="no test pipeline"):
        configs.input_spec(Config({"model": {}}))


@pytest.mark.parametrize("size", [(427, 640), (333, 500), (96, 96), (61, 97)])
@pytest.mark.parametrize(("scale", "keep"), [((300, 300), False), ((213, 128), True), ((96, 96), True)])
def test_resize_equals_the_stock_transform(size: tuple[int, int], scale: tuple[int, int], keep: bool) -> None:
    from mmcv.transforms import Resize

    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    stock = Resize(scale=scale, keep_ratio=keep)({"img": pixels, "img_shape": size})
    spec = configs.InputSpec(scale=scale, keep_ratio=keep)
    image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    resized, factors = spec.resize(image)
    assert np.array_equal((resized * 255).round().byte().permute(1, 2, 0).numpy(), stock["img"])
    assert factors == pytest.approx(stock["scale_factor"][::-1])
    assert spec.resized(size) == tuple(resized.shape[1:])


def test_checkpoint_hint() -> None:
    hint = configs.checkpoint_hint("mmdet", "ssd300_coco")
    assert "ssd300_coco_20210803_015428-d231a06e.pth" in hint
    assert "deeplabv3_r50-d8" in configs.checkpoint_hint(
        "mmseg", "deeplabv3_r50-d8_4xb2-40k_cityscapes-512x1024"
    )
    assert "x.py" in configs.checkpoint_hint("mmdet", "/a/x.py")
