"""JPEG compression with the real codec, and a differentiable JPEG for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from bench.protocols import Defense
from bench.registry import DEFENSES
from defenses import _jpeg


@DEFENSES.register_module(name="jpeg")
class Jpeg(Defense):
    """JPEG, encoded and decoded by libjpeg-turbo through Pillow.

    Sources: Dziugaite, Ghahramani, Roy 2016; Das et al. 2017; quality 75 as in Guo et al., ICLR 2018, and the
    baselines of NRP (75, 50, 20) and CAFD (75).

    The codec has no gradient. The surrogate is a JPEG of our own that follows libjpeg step by step (colour conversion,
    chroma subsampling, 8x8 DCT, standard tables scaled by quality, inverse DCT, smooth chroma upsampling). By
    `gradient` its quantisation is `cubic`: round(x) + (x - round(x))^3, whose derivative 3 (x - round(x))^2 is that
    of Shin and Song (NIPS workshop 2017), or `straight_through`: round(x) with derivative 1, by which most of the
    pipeline cancels out. `cubic` makes the far stronger attack, the more so the lower the quality. All other
    roundings and clamps pass gradients straight through.

    Limitations: broken by BPDA (Athalye, Carlini, Wagner 2018) and by differentiable JPEG (Shin and Song 2017).

    Args:
        quality: 1 (worst) to 100.
        subsampling: chroma resolution; "4:2:0" is what Pillow and most papers use by default.
        rounding: how floats become 8-bit integers: `round` to the nearest, or `truncate` as torchvision's ToPILImage
            (hence Guo et al.'s code) and ART do, which darkens by half a grey level on average.
        gradient: derivative of the surrogate's quantisation.

    Raises:
        ValueError: quality is outside 1..100.
    """

    differentiable = False

    def __init__(
        self,
        quality: int = 75,
        subsampling: _jpeg.Subsampling = "4:2:0",
        rounding: Literal["round", "truncate"] = "round",
        gradient: Literal["cubic", "straight_through"] = "cubic",
    ) -> None:
        super().__init__()
        if not 1 <= quality <= 100:
            raise ValueError(f"quality must be in 1..100, got {quality}")
        self.quality = quality
        self.subsampling = subsampling
        self.to_int: Callable[[Tensor], Tensor] = torch.round if rounding == "round" else torch.floor
        self.gradient = gradient

    def forward(self, images: Tensor) -> Tensor:
        """Decoded images, multiples of 1/255, on the device of `images`."""
        return _jpeg.codec(images, self.quality, self.subsampling, self.to_int)

    def surrogate(self, images: Tensor) -> Tensor:
        """Differentiable JPEG of `images`, (B, 3, H, W) to the same, batched on their device."""
        quantise = _jpeg.cubic_round if self.gradient == "cubic" else _jpeg.straight_round
        levels = _jpeg.straight_through(images * 255, lambda x: self.to_int(x).clamp(0, 255))
        return _jpeg.differentiable_jpeg(levels, self.quality, self.subsampling, quantise) / 255
