"""Recipes of the mini classifiers: digits blended on the fly, contrast falling to its final value, AdamW."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.classification import cifar_nets
from tasks.mini import data, manifest, measure
from tasks.mini.zoo import Progress, recipe

MEAN, STD = 0.5, 0.25
#: Loss of one training step, to be decreased: the network, images ``(B, 3, H, W)`` in [0,1], labels ``(B,)``, the step.
Objective = Callable[[nn.Module, Tensor, Tensor, int], Tensor]
COMMON: dict[str, Any] = {
    "batch": 64, "lr": 3e-3, "weight_decay": 0.02, "warmup": 0.2, "easy_share": 0.4,
    "contrast": data.CONTRAST, "photo_contrast": data.PHOTO_CONTRAST, "optimizer": "AdamW", "schedule": "one cycle",
    "mean": MEAN, "std": STD,
}  # fmt: skip


def to_tensor(images: np.ndarray[Any, Any]) -> Tensor:
    """``(B, H, W, 3)`` uint8 to ``(B, 3, H, W)`` float32 in [0,1]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 255


class BackboneClassifier(nn.Module):
    """The last stage of a segmenter's or detector's backbone, averaged, and one linear layer."""

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(channels, len(data.CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x)[-1].mean(dim=(2, 3)))  # type: ignore[no-any-return]


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Class scores ``(B, K)`` of images ``(B, 3, H, W)`` in [0,1]."""
    return model((images - MEAN) / STD)  # type: ignore[no-any-return]


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Tensor:
    """The objective of standard training."""
    return F.cross_entropy(logits(model, images), labels)


def train_classifier(
    model: nn.Module,
    *,
    epochs: int,
    seed: int,
    device: str | torch.device,
    progress: Progress,
    batch: int,
    lr: float,
    weight_decay: float,
    warmup: float,
    easy_share: float,
    contrast: int,
    size: int = data.IMAGE_SIZE,
    objective: Objective = cross_entropy,
    replays: int = 1,
) -> None:
    """Train ``model`` in place; an epoch takes as many steps as show each training digit about once.

    Every digit that is shown is blended anew. ``replays`` is the number of steps in a row that a batch is shown for.
    """
    per_epoch = data.SPLIT_SIZES["train"] // batch
    total = epochs * per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total, pct_start=warmup)
    model.to(device).train()
    for step in range(total):
        if step % replays == 0:
            shown = data.curriculum_contrast(step, total, contrast, easy_share)
            first = step // replays * batch
            arrays, digits = data.samples(
                "train", range(first, first + batch), seed=seed, size=size, contrast=shown
            )
            images, labels = to_tensor(arrays).to(device), torch.from_numpy(digits).to(device)
        loss = objective(model, images, labels, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % per_epoch == 0:
            progress(step + 1, total, f"loss {loss.item():.3f}")
    model.eval()


def score_classifier(
    model: nn.Module, split: str = "test", device: str | torch.device = "cpu"
) -> dict[str, float]:
    """Top-1 accuracy on a split: clean, and under PGD-20 and PGD-40 at eps 8/255, alpha 2/255, random start."""
    arrays, digits = data.samples(split, range(data.SPLIT_SIZES[split]))
    images, labels = to_tensor(arrays).to(device), torch.from_numpy(digits).to(device)
    model = model.to(device).eval()

    def forward(x: Tensor) -> Tensor:
        return logits(model, x)

    scores = {"clean": measure.accuracy(forward, images, labels)}
    for steps in (20, 40):
        adv = torch.cat([
            measure.sign_attack(
                forward, x, y, eps=8 / 255, alpha=2 / 255, steps=steps, random_start=True, seed=k
            )
            for k, (x, y) in enumerate(zip(images.split(100), labels.split(100), strict=True))
        ])  # fmt: skip
        scores[f"pgd{steps}_8/255"] = measure.accuracy(forward, adv, labels)
    return scores


def build_classifier(
    name: str,
    parameters: Mapping[str, Any],
    out_dir: Path,
    *,
    seed: int,
    device: str | torch.device,
    progress: Progress,
    start: str | None = None,
    objective: Callable[[nn.Module], Objective] | None = None,
) -> dict[str, float]:
    """Train a classifier, write its weights in half precision, and score them.

    Args:
        name: of the weights.
        parameters: of the recipe.
        out_dir: folder of the weights.
        seed: of the first weights and of the data.
        device: where to train.
        progress: told about each epoch.
        start: shipped model whose network and weights to start from; a new network called ``name`` unless given.
        objective: makes the objective for the network; cross entropy unless given.

    Returns:
        Scores, and the ``seconds`` that the training took.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(cifar_nets, start or name)()
    if start:
        model.load_state_dict(manifest.load(start))
    began = time.perf_counter()
    train_classifier(
        model, epochs=parameters["epochs"], seed=seed, device=device, progress=progress,
        objective=cross_entropy if objective is None else objective(model), replays=parameters.get("replays", 1),
        **{k: parameters[k] for k in ("batch", "lr", "weight_decay", "warmup", "easy_share", "contrast")},
    )  # fmt: skip
    seconds = time.perf_counter() - began
    manifest.write_rounded(model, name, out_dir)
    return {**score_classifier(model, device=device), "seconds": seconds}


_VGG = {**COMMON, "epochs": 60, "network": "VGG((1, 1, 2), (16, 32, 64))"}
RESNET = {**COMMON, "epochs": 80, "network": "ResNet(BasicBlock, (1, 1, 1), 16)"}
_WRN = {**COMMON, "epochs": 80, "network": "WideResNet(10, 2, base=8)"}


@recipe("mini_vgg", seed=1, parameters=_VGG)
def build_vgg(
    out_dir: Path, *, seed: int, device: str | torch.device, progress: Progress
) -> Mapping[str, Any]:
    """VGG of four convolutions on the mini digits."""
    return build_classifier("mini_vgg", _VGG, out_dir, seed=seed, device=device, progress=progress)


@recipe("mini_resnet", seed=2, parameters=RESNET)
def build_resnet(
    out_dir: Path, *, seed: int, device: str | torch.device, progress: Progress
) -> Mapping[str, Any]:
    """ResNet-8 on the mini digits."""
    return build_classifier("mini_resnet", RESNET, out_dir, seed=seed, device=device, progress=progress)


@recipe("mini_wrn", seed=3, parameters=_WRN)
def build_wrn(
    out_dir: Path, *, seed: int, device: str | torch.device, progress: Progress
) -> Mapping[str, Any]:
    """WRN-10-2 with a stem of 8 channels on the mini digits."""
    return build_classifier("mini_wrn", _WRN, out_dir, seed=seed, device=device, progress=progress)
