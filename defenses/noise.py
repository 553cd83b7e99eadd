"""Random noise: the baseline that shows how little an attack needs to be disturbed."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from torch import Tensor

from bench.protocols import Defense, Pixels
from bench.registry import DEFENSES
from bench.rng import ImageRNG


@DEFENSES.register_module(name="noise")
class Noise(Defense):
    """Adds noise of a given size, drawn anew for every image and call.

    It removes nothing; a purifier that does not beat it under the same threat model has not purified. Differentiable:
    the derivative is the identity (purify's clamp passes gradients straight through).

    Limitations: adaptive attacks average over draws (EOT, Athalye et al. 2018). Perturbations of minimal norm
    (DeepFool, CW) crafted without the defense fall to it almost always, which says nothing about robustness.

    Args:
        eps: size in [0,1] pixel units: +-eps per pixel and channel (`sign`), half-width (`uniform`) or standard
            deviation (`gaussian`).
        kind: distribution of the noise.
    """

    stochastic = True

    def __init__(
        self, eps: Pixels = Fraction(8, 255), kind: Literal["sign", "uniform", "gaussian"] = "sign"
    ) -> None:
        super().__init__()
        self.eps = float(eps)
        self.kind = kind

    def forward(self, images: Tensor, rng: ImageRNG) -> Tensor:
        """`images` plus noise; may leave [0,1] by the size of the noise until `purify` clamps it."""
        shape, device = images.shape[1:], images.device
        if self.kind == "sign":
            noise = rng.signs(shape, device)
        elif self.kind == "uniform":
            noise = rng.uniform(shape, -1.0, 1.0, device)
        else:
            noise = rng.normal(shape, device)
        return images + self.eps * noise.to(images.dtype)
