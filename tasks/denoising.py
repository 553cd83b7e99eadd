"""How far purified images are from clean ones."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from bench.protocols import PixelMetric
from bench.registry import METRICS


@METRICS.register_module(name="denoising_loss")
class DenoisingLoss(PixelMetric):
    """Mean absolute difference of the pixels of purified and clean image, in [0,1] (Liao et al., CVPR 2018, Table 2).

    Of a clean image it is what the defense itself changes; without a defense it is the length of the perturbation.
    """

    higher_is_better: ClassVar[bool] = False

    def measure(self, clean: Tensor, purified: Tensor) -> Tensor:
        """|purified - clean|, a mean over the pixels of each image, (B,)."""
        return (purified - clean).abs().flatten(1).mean(1)
