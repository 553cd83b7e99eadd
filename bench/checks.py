"""Automatic checks on adversarial images: broken attacks stop their cell, suspect ones are flagged in its row.

Hard checks raise CheckError. Soft ones are flags, short strings that a table marks and explains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.errors import CheckError, DataError
from bench.protocols import Attack

TOLERANCE = 1e-6

FLAGS: dict[str, str] = {
    "zero-gradient": "more than half of the images had an exactly zero gradient at the first or last step: masked",
    "some-zero-gradient": "more than 1 % of the images had an exactly zero gradient at the first or last step",
    "nonfinite-gradient": "NaN or infinite gradients appeared during the attack",
    "unchanged": "more than 1 % of the images came back unchanged from an attack with a budget",
    "loss-fell": "the attack's objective ended below its start for more than 5 % of the images",
    "below-noise": "random noise of the same eps does at least as much harm: attack broken or gradients masked",
    "below-single-step": "a single-step attack of the same eps does more harm: gradients masked",
    "oblivious-above-adaptive": "an attacker who ignores the defense does more harm than one who knows it",
}


def check_images(images: Tensor, ids: Sequence[str], where: str) -> None:
    """Clean images must be finite and in [0,1].

    Raises:
        DataError: names the first image that is not.
    """
    for image, image_id in zip(images, ids, strict=True):
        if not torch.isfinite(image).all():
            raise DataError(f"{where}, image {image_id}: NaN or infinite pixels")
        low, high = float(image.min()), float(image.max())
        if low < -TOLERANCE or high > 1 + TOLERANCE:
            raise DataError(
                f"{where}, image {image_id}: pixels span [{low:.3g}, {high:.3g}], expected [0, 1]"
            )


def norms(clean: Tensor, adversarial: Tensor) -> tuple[Tensor, Tensor]:
    """(L-infinity, L2) distance of each image, (B,) each, in [0,1] pixel units."""
    delta = (adversarial - clean).flatten(1)
    return delta.abs().amax(1), delta.double().norm(dim=1).float()


def check_adversarials(attack: Attack, clean: Tensor, adversarial: Tensor, ids: Sequence[str]) -> None:
    """Checks V1 and V2: budget, range, shape, finite, not blanked.

    Raises:
        CheckError: names the attack, the image and what it violates.
    """
    name = f"attack '{attack.name}'"
    if adversarial.shape != clean.shape or adversarial.dtype != clean.dtype:
        raise CheckError(
            f"{name} returned {tuple(adversarial.shape)} {adversarial.dtype}, "
            f"expected {tuple(clean.shape)} {clean.dtype}"
        )
    linf, l2 = norms(clean, adversarial)
    for i, image_id in enumerate(ids):
        image = adversarial[i]
        if not torch.isfinite(image).all():
            raise CheckError(f"{name}, image {image_id}: NaN or infinite pixels")
        if image.min() < -TOLERANCE or image.max() > 1 + TOLERANCE:
            raise CheckError(f"{name}, image {image_id}: pixels leave [0, 1]")
        if attack.eps is not None:
            moved = float(linf[i] if attack.norm == "linf" else l2[i])
            if moved > float(attack.eps) + TOLERANCE * (
                1 if attack.norm == "linf" else clean[i].numel() ** 0.5
            ):
                raise CheckError(
                    f"{name}, image {image_id}: moved by {moved:.6f} ({attack.norm}), eps is "
                    f"{float(attack.eps):.6f} ({attack.eps})"
                )
        if float(image.max()) == float(image.min()) and float(clean[i].max()) != float(clean[i].min()):
            raise CheckError(f"{name}, image {image_id}: returned a constant image")


def craft_flags(attack: Attack, infos: Sequence[Mapping[str, Any]]) -> list[str]:
    """Soft checks V3 and V15 over the per-image records of a craft."""
    flags: list[str] = []
    count = len(infos)
    if not count:
        return flags
    if "gradient" in attack.needs:
        zero = max(
            sum(bool(i["first_zero"]) for i in infos) / count,
            sum(bool(i["last_zero"]) for i in infos) / count,
        )
        if zero > 0.5:
            flags.append("zero-gradient")
        elif zero > 0.01:
            flags.append("some-zero-gradient")
        if any(i["nonfinite"] for i in infos):
            flags.append("nonfinite-gradient")
        fell = [
            i
            for i in infos
            if i["steps"] > 1 and i["last_loss"] < i["first_loss"] - 1e-6 * abs(i["first_loss"])
        ]
        if len(fell) / count > 0.05:
            flags.append("loss-fell")
    if attack.eps is not None and sum(i["linf"] == 0 for i in infos) / count > 0.01:
        flags.append("unchanged")
    return flags
