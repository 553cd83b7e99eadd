"""Feature distillation: a JPEG whose quantisation is made for networks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bench.protocols import Defense
from bench.registry import DEFENSES
from defenses import _jpeg


@DEFENSES.register_module(name="feature_distillation")
class FeatureDistillation(Defense):
    """Quantises 8x8 DCT blocks coarsely where perturbations live and finely where networks look.

    Source: Liu et al., CVPR 2019 ("JPEG" in the tables of the alignment paper). Two public versions differ:

    - `rgb`, the authors' code: each RGB channel in grey levels 0..255 without the usual shift by 128; step 25 for the
      4x4 lowest frequencies, 30 for the rest; no rounding to 8 bits.
    - `ycbcr`, a third-party port (sibosutd): 8-bit YCbCr shifted by 128; step 1.5 for the 15 lowest zig-zag bands,
      41.5 for the rest (its quality factor 50); the result is rounded to 8 bits. Colours are converted as Pillow
      does, which cuts off fractions and so darkens a little.

    What differs from the authors' code: any image size (blocks at the border are filled up with copies of the last
    row and column), and the first image of a batch is purified like the others, where the code's loop leaves it out.
    The paper's two-pass variant is not included.

    The quantisation has no gradient. The surrogate replaces its rounding by `gradient`: `cubic`,
    round(x) + (x - round(x))^3 (Shin and Song 2017), or `straight_through`.

    Limitations: as JPEG's: BPDA with a differentiable quantisation (Shin and Song 2017; Athalye et al. 2018).

    Args:
        variant: `rgb` or `ycbcr`, see above.
        gradient: derivative of the surrogate's quantisation.
    """

    differentiable = False
    steps: Tensor

    def __init__(
        self,
        variant: Literal["rgb", "ycbcr"] = "rgb",
        gradient: Literal["cubic", "straight_through"] = "cubic",
    ) -> None:
        super().__init__()
        self.variant = variant
        self.gradient = gradient
        row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
        if variant == "rgb":
            steps = torch.where((row < 4) & (column < 4), 25.0, 30.0)
        else:
            steps = torch.where(row + column < 5, 1.5, 41.5)
        self.register_buffer("steps", steps.double().flatten(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Quantised images in [0,1], same shape."""
        with torch.no_grad():
            return self._compress(images.detach(), torch.round)

    def surrogate(self, images: Tensor) -> Tensor:
        """The same with a differentiable quantisation."""
        return self._compress(images, _jpeg.cubic_round if self.gradient == "cubic" else _jpeg.straight_round)

    def _compress(self, images: Tensor, quantise: _jpeg.Rounding) -> Tensor:
        steps = self.steps.to(images.device)

        def squeeze(coefficients: Tensor) -> Tensor:
            # Grey levels are integers, so many coefficients are at ties: cut off what the arithmetic left on them,
            # or the result would depend on how a batch is split.
            exact = _jpeg.straight_through(coefficients, lambda x: (x * 4096).round() / 4096)
            return quantise(exact / steps) * steps

        levels = images.double() * 255
        if self.variant == "ycbcr":
            levels = _jpeg.straight_through(levels, lambda x: x.round().clamp(0, 255))
            levels = _jpeg.straight_through(_jpeg.rgb_to_ycc(levels), _cut) - 128
            levels = _jpeg.straight_through(_jpeg.blockwise(levels, squeeze) + 128, _to_byte)
            levels = _jpeg.straight_through(_jpeg.ycc_to_rgb(levels), _cut)
        else:
            levels = _jpeg.blockwise(levels, squeeze)
        levels = _jpeg.straight_through(levels, lambda x: x.clamp(0, 255))
        return (levels / 255).to(images.dtype)


def _to_byte(levels: Tensor) -> Tensor:
    return levels.round().clamp(0, 255)


def _cut(levels: Tensor) -> Tensor:
    """Towards zero, as Pillow's colour conversion rounds; a whole number that arithmetic left just below stays."""
    return (levels + 1e-6).floor().clamp(0, 255)
