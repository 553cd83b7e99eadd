"""Recipes of the mini detectors: mmdet models trained by mmengine's Runner on fresh scenes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tasks.mini import data
from tasks.mini.zoo import Progress, recipe

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tasks.mini._runner import BuildOptions

CONFIGS = Path(__file__).parents[1] / "detection" / "configs"
#: Contrast of the digits in detection scenes, in 1/255: fainter than in segmentation scenes, where finding every pixel
#: is harder. Chosen on the validation split with undefended detectors.
CONTRAST = 54
#: Scenes that the recorded scores are measured on.
TEST_SCENES = 100
_PRETRAIN: dict[str, Any] = {
    "epochs": 30, "batch": 64, "lr": 3e-3, "weight_decay": 0.02, "warmup": 0.2, "easy_share": 0.4,
    "contrast": 90, "size": 64,
}  # fmt: skip


def score_detector(
    network: nn.Module,
    config: Any,
    split: str = "test",
    count: int = TEST_SCENES,
    *,
    eps: float = 8 / 255,
    alpha: float = 2 / 255,
    steps: int = 20,
    kinds: tuple[str, ...] = ("cls", "loc", "cls+loc"),
) -> dict[str, float]:
    """Mean average precision of a detector on scenes: clean, and under sign-gradient ascent on its losses.

    The attack starts at the image. It is written out here so that a recipe can be judged before any attack plug-in
    is; it feeds no table.

    Args:
        network: an mmdet detector.
        config: its parsed config.
        split: which scenes.
        count: how many.
        eps: radius of the L-infinity ball, in units of [0,1].
        alpha: step.
        steps: number of steps.
        kinds: losses to ascend.
    """
    from tasks.detection.datasets import MiniScenes
    from tasks.detection.model import Detector
    from tasks.detection.task import BoxMAP, BoxMAP50, Detection, MaskMAP50
    from tasks.mm.configs import input_spec

    frozen = [parameter.requires_grad for parameter in network.parameters()]
    training = network.training
    device = next(network.parameters()).device
    model = Detector(network, input_spec(config), len(data.CLASSES))
    scenes = MiniScenes(split=split, count=count)  # type: ignore[arg-type]
    samples = [model.prepare(scenes[index]) for index in range(count)]
    task = Detection()

    def score(kind: str | None) -> list[dict[str, Any]]:
        rows = []
        for sample in samples:
            clean = sample.image[None].to(device)
            x = clean.clone()
            for _ in range(steps if kind else 0):
                x.requires_grad_(True)
                (grad,) = torch.autograd.grad(model.loss(x, [sample.target], kind or "").sum(), x)
                x = (x.detach() + alpha * grad.sign()).clamp(clean - eps, clean + eps).clamp(0, 1)
            (found,) = model.predict(x.detach())
            rows.append(task.rows(found, sample.target))
        return rows

    def value(metric: Any, rows: list[dict[str, Any]]) -> float:
        return round(float(metric.value(metric.prepare(rows))), 4)

    clean = score(None)
    scores = {"box_map50": value(BoxMAP50(), clean), "box_map": value(BoxMAP(), clean)}
    if model.with_mask:
        scores["mask_map50"] = value(MaskMAP50(), clean)
    for kind in kinds:
        scores[f"box_map50, {kind}, eps {round(eps * 255)}/255, {steps} steps"] = value(
            BoxMAP50(), score(kind)
        )
    for parameter, flag in zip(network.parameters(), frozen, strict=True):
        parameter.requires_grad_(flag)
    network.train(training)
    return scores


def build_detector(name: str, out_dir: Path, **options: Unpack[BuildOptions]) -> dict[str, float]:
    """Train a detector as its config says, write its weights in half precision, and score them.

    Args:
        name: of the config and of the weights.
        out_dir: folder of the weights.
        options: see `tasks.mini._runner.BuildOptions`.

    Returns:
        Scores, and the ``seconds`` that the training took.
    """
    from tasks.mm import ops

    ops.install()
    import mmdet.models  # noqa: F401 - registers
    from mmdet.registry import MODELS
    from mmengine.config import Config

    from tasks.mini import _detection_stream  # noqa: F401 - registers
    from tasks.mini._runner import build

    config = Config.fromfile(CONFIGS / f"{name}.py")
    config.train_dataloader.dataset.update(seed=options["seed"], contrast=CONTRAST)
    pretrain = _PRETRAIN if config.pretrain_backbone else None
    model, seconds = build(name, MODELS, config, out_dir, pretrain=pretrain, **options)
    return {**score_detector(model, config), "seconds": seconds}


def parameters(name: str, *, pretrained: bool) -> dict[str, Any]:
    """What a detector's training depends on; ``pretrained``: its backbone is trained on digits first."""
    return {
        "config": f"tasks/detection/configs/{name}.py", "scene_contrast": CONTRAST, "test_scenes": TEST_SCENES,
        "photo_contrast": data.PHOTO_CONTRAST, **({"backbone": _PRETRAIN} if pretrained else {}),
    }  # fmt: skip


@recipe("mini_ssd", seed=21, parameters=parameters("mini_ssd", pretrained=False))
def build_ssd(
    out_dir: Path, *, seed: int, device: str | torch.device, progress: Progress
) -> Mapping[str, Any]:
    """SSD on a narrow ResNet-18, on the mini scenes."""
    return build_detector("mini_ssd", out_dir, seed=seed, device=device, progress=progress)


@recipe("mini_mask_rcnn", seed=22, parameters=parameters("mini_mask_rcnn", pretrained=True))
def build_mask_rcnn(
    out_dir: Path, *, seed: int, device: str | torch.device, progress: Progress
) -> Mapping[str, Any]:
    """Mask R-CNN on a narrow ResNet-18, on the mini scenes."""
    return build_detector("mini_mask_rcnn", out_dir, seed=seed, device=device, progress=progress)
