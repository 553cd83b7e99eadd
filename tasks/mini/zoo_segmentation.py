"""Recipes of the mini segmenters: backbone from digit classification, then mmengine's Runner on fresh scenes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.mini import data, measure
from tasks.mini.zoo import Progress, recipe
from tasks.mini.zoo_classification import MEAN, STD, to_tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tasks.mini._runner import BuildOptions

CONFIGS = Path(__file__).parents[1] / "segmentation" / "configs"
#: Scenes that the recorded scores are measured on.
TEST_SCENES = 200
_PRETRAIN: dict[str, Any] = {
    "epochs": 40, "batch": 64, "lr": 3e-3, "weight_decay": 0.02, "warmup": 0.2, "easy_share": 0.4,
    "contrast": data.SCENE_CONTRAST, "size": 64,
}  # fmt: skip


def segmentation_logits(model: nn.Module, images: Tensor) -> Tensor:
    """``(B, 3, H, W)`` RGB images in [0,1] to ``(B, 11, H, W)`` logits of an mmseg encoder-decoder of this zoo."""
    low = model.decode_head(model.backbone((images - MEAN) / STD))  # type: ignore[operator]
    return F.interpolate(low, size=images.shape[-2:], mode="bilinear", align_corners=False)


#: Attacks whose mIoU is recorded: the grid's usual budget, and the one of the segmentation papers.
ATTACKS: dict[str, dict[str, Any]] = {
    "bim10_8/255": {"eps": 8 / 255, "alpha": 2 / 255, "steps": 10},
    "bim4_0.03": {"eps": 0.03, "alpha": 0.01, "steps": 4},
}


def score_segmenter(
    model: nn.Module,
    split: str = "test",
    count: int = TEST_SCENES,
    device: str | torch.device = "cpu",
    attacks: Sequence[str] = tuple(ATTACKS),
) -> dict[str, float]:
    """Mean IoU over scenes 0 to ``count - 1`` of a split: ``clean``, and under each of the ``attacks``."""
    scenes = [data.scene(split, i) for i in range(count)]
    images = to_tensor(np.stack([s.image for s in scenes])).to(device)
    labels = torch.from_numpy(np.stack([s.label_map for s in scenes]).astype(np.int64)).to(device)
    model = model.to(device).eval()

    def forward(x: Tensor) -> Tensor:
        return segmentation_logits(model, x)

    def score(attack: Mapping[str, Any] | None) -> float:
        counts = torch.zeros(11, 11, dtype=torch.int64, device=device)
        for x, y in zip(images.split(20), labels.split(20), strict=True):
            moved = x
            if attack is not None:
                moved = measure.sign_attack(
                    forward, x, y, random_start=False, ignore=data.IGNORE_LABEL, **attack
                )
            with torch.no_grad():
                counts += measure.confusion(forward(moved).argmax(1), y, 11, data.IGNORE_LABEL)
        return measure.mean_iou(counts)

    return {"clean": score(None), **{name: score(ATTACKS[name]) for name in attacks}}


def build_segmenter(name: str, out_dir: Path, **options: Unpack[BuildOptions]) -> dict[str, float]:
    """Train a segmenter as its config says, write its weights in half precision, and score them.

    Args:
        name: of the config and of the weights.
        out_dir: folder of the weights.
        options: see `tasks.mini._runner.BuildOptions`.

    Returns:
        Scores, and the ``seconds`` that the training took.
    """
    from tasks.mm import ops

    ops.install()
    from mmengine.config import Config
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    from tasks.mini import _streams  # noqa: F401  registers MiniSceneStream
    from tasks.mini._runner import build

    register_all_modules(init_default_scope=True)
    config = Config.fromfile(CONFIGS / f"{name}.py")
    config.train_dataloader.dataset.seed = options["seed"]
    model, seconds = build(name, MODELS, config, out_dir, pretrain=_PRETRAIN, **options)
    return {**score_segmenter(model, device=options["device"]), "seconds": seconds}


def parameters(name: str, *, pretrained: bool = True) -> dict[str, Any]:
    """What a segmenter's training depends on; ``pretrained``: its backbone is trained on digits first."""
    return {
        "config": f"tasks/segmentation/configs/{name}.py", **({"backbone": _PRETRAIN} if pretrained else {}),
        "test_scenes": TEST_SCENES, "scene_contrast": data.SCENE_CONTRAST, "photo_contrast": data.PHOTO_CONTRAST,
    }  # fmt: skip


@recipe("mini_pspnet", seed=11, parameters=parameters("mini_pspnet"))
def build_pspnet(
    out_dir: Path, *, seed: int, device: str | torch.device, progress: Progress
) -> Mapping[str, Any]:
    """PSPNet on a narrow ResNet-18, on the mini scenes."""
    return build_segmenter("mini_pspnet", out_dir, seed=seed, device=device, progress=progress)


@recipe("mini_deeplabv3", seed=12, parameters=parameters("mini_deeplabv3"))
def build_deeplabv3(
    out_dir: Path, *, seed: int, device: str | torch.device, progress: Progress
) -> Mapping[str, Any]:
    """DeepLabv3 on a narrow ResNet-18, on the mini scenes."""
    return build_segmenter("mini_deeplabv3", out_dir, seed=seed, device=device, progress=progress)
