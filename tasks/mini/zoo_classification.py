"""Recipes of the mini classifiers: digits blended on the fly, contrast falling to its final value, AdamW."""

from __future__ import annotations

import time
from collections.abc import Mapping
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
_COMMON: dict[str, Any] = {
    "batch": 64, "lr": 3e-3, "weight_decay": 0.02, "warmup": 0.2, "easy_share": 0.4,
    "contrast": data.CONTRAST, "photo_contrast": data.PHOTO_CONTRAST, "optimizer": "AdamW", "schedule": "one cycle",
    "mean": MEAN, "std": STD,
}  # fmt: skip


def to_tensor(images: np.ndarray[Any, Any]) -> Tensor:
    """``(B, H, W, 3)`` uint8 to ``(B, 3, H, W)`` float32 in [0,1]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 255


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
) -> None:
    """Train ``model`` in place; an epoch shows each training digit about once, in a new blend."""
    per_epoch = data.SPLIT_SIZES["train"] // batch
    total = epochs * per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total, pct_start=warmup)
    model.to(device).train()
    for step in range(total):
        shown = data.curriculum_contrast(step, total, contrast, easy_share)
        arrays, digits = data.samples(
            "train", range(step * batch, (step + 1) * batch), seed=seed, size=size, contrast=shown
        )
        images, labels = to_tensor(arrays).to(device), torch.from_numpy(digits).to(device)
        loss = F.cross_entropy(model((images - MEAN) / STD), labels)
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
        return model((x - MEAN) / STD)  # type: ignore[no-any-return]

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


def _build(
    name: str,
    parameters: Mapping[str, Any],
    out_dir: Path,
    seed: int,
    device: str | torch.device,
    progress: Progress,
) -> dict[str, float]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(cifar_nets, name)()
    start = time.perf_counter()
    train_classifier(
        model, epochs=parameters["epochs"], seed=seed, device=device, progress=progress,
        **{k: _COMMON[k] for k in ("batch", "lr", "weight_decay", "warmup", "easy_share", "contrast")},
    )  # fmt: skip
    seconds = time.perf_counter() - start
    path = manifest.weights_path(name, out_dir)
    manifest.save_half(model.state_dict(), path)
    model.load_state_dict(manifest.load_float(path))
    return {**score_classifier(model, device=device), "seconds": seconds}


_VGG = {**_COMMON, "epochs": 60, "network": "VGG((1, 1, 2), (16, 32, 64))"}
_RESNET = {**_COMMON, "epochs": 80, "network": "ResNet(BasicBlock, (1, 1, 1), 16)"}
_WRN = {**_COMMON, "epochs": 80, "network": "WideResNet(10, 2, base=8)"}


@recipe("mini_vgg", seed=1, parameters=_VGG)
def build_vgg(
    out_dir: Path, *, seed: int, device: str | torch.device, progress: Progress
) -> Mapping[str, Any]:
    """VGG of four convolutions on the mini digits."""
    return _build("mini_vgg", _VGG, out_dir, seed, device, progress)


@recipe("mini_resnet", seed=2, parameters=_RESNET)
def build_resnet(
    out_dir: Path, *, seed: int, device: str | torch.device, progress: Progress
) -> Mapping[str, Any]:
    """ResNet-8 on the mini digits."""
    return _build("mini_resnet", _RESNET, out_dir, seed, device, progress)


@recipe("mini_wrn", seed=3, parameters=_WRN)
def build_wrn(
    out_dir: Path, *, seed: int, device: str | torch.device, progress: Progress
) -> Mapping[str, Any]:
    """WRN-10-2 with a stem of 8 channels on the mini digits."""
    return _build("mini_wrn", _WRN, out_dir, seed, device, progress)
