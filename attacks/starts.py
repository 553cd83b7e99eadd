"""Where an attack begins: the perturbation added to the clean image before the first step."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from attacks.steps import norms
from bench.protocols import ImageRNG

StartKind = Literal["none", "uniform", "radial", "normal", "sign"]


def start(kind: StartKind, scale: float, norm: str, images: Tensor, rng: ImageRNG) -> Tensor:
    """Perturbed images, (B, 3, H, W), not yet projected.

    Args:
        kind: `none` = the clean image; `uniform` = uniform in the ball of `norm` (Madry et al. 2018), which in many
            dimensions of L2 is nearly on its surface; `radial` = a random direction of the L2 ball and a uniform length
            along it; `normal` = Gaussian noise (TRADES starts at 0.001); `sign` = +-scale by the sign of Gaussian
            noise, the random step of R+FGSM (Tramer et al. 2018).
        scale: radius, standard deviation or step, in [0,1] pixel units.
        norm: linf or l2, the ball of `uniform`; l2 for `radial`.
        images: clean images.
        rng: one stream per image.
    """
    if kind == "none":
        return images.clone()
    shape, device = images.shape[1:], images.device
    if kind == "normal":
        noise = scale * rng.normal(shape, device)
    elif kind == "sign":
        noise = scale * rng.signs(shape, device)
    elif norm == "l2":
        # A direction on the sphere, at a radius whose d-th power is uniform, is uniform in the ball.
        direction = rng.normal(shape, device)
        radius = rng.uniform((), device=device).double()
        if kind == "uniform":
            radius = radius.pow(1.0 / direction[0].numel())
        noise = direction / norms(direction) * (scale * radius.to(torch.float32)).view(-1, 1, 1, 1)
    else:
        noise = rng.uniform(shape, -scale, scale, device)
    return images + noise.to(images.dtype)
