"""The alignment generator: adversarial and clean images led to the same place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from bench.registry import DEFENSES
from defenses._learned import Learned, TrainSeed


@DEFENSES.register_module(name="alignment")
class Alignment(Learned):
    """pix2pixHD's generator, trained so that adversarial images come out as clean images do.

    Source: Xu et al. (ICLR 2021 submission; arXiv 2212.05387) and their code. Pixel-level, feature-level and
    class-aware terms, and the ablations LI, LF (w/o c), LI+F (w/o c), LT, LT+F (w/o c) and Full, differ in training
    alone. "Full with jpeg" is the chain `[alignment, jpeg]`; the paper does not give its quality.

    The network works in [-1,1]. In the paper it runs at 512x512 for segmentation and 256x256 for detection while the
    target sees another size: `size` resizes there and back (bilinear, corners aligned, as the code).

    Limitations: no gradient is masked. The paper's "white-box" means white-box for the target: its attacks never see
    the generator.

    Args:
        weights: checkpoint; None = the one trained by `recipe` for the role it stands in front of.
        recipe, trained_for, train_seed: which one (`defenses._learned.Learned`).
        size: side at which the network runs; None = that of the images.

    Raises:
        WeightsError: the checkpoint is missing, unreadable or of another network.
    """

    networks = ("global",)
    kind = "alignment"
    default_space = "symmetric"

    def __init__(
        self,
        weights: Path | None = None,
        recipe: str | None = None,
        trained_for: str | None = None,
        train_seed: TrainSeed = 0,
        size: Annotated[int, Field(ge=8)] | None = None,
    ) -> None:
        super().__init__(weights, "symmetric", recipe, trained_for, train_seed)
        self.size = size

    def purified(self, images: Tensor) -> Tensor:
        """The generator's output for one group of images, at their own size."""
        if self.size is None:
            return super().purified(images)
        inner = F.interpolate(images, size=(self.size, self.size), mode="bilinear", align_corners=True)
        out = super().purified(inner)
        return F.interpolate(out, size=images.shape[-2:], mode="bilinear", align_corners=True)
