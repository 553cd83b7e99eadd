"""The alignment generator: adversarial and clean images led to the same place."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from bench.registry import DEFENSES
from defenses._learned import Learned


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
        weights, recipe, trained_for, train_seed: the checkpoint; see `defenses._learned.Learned`.
        size: side at which the network runs; None = that of the images.

    Raises:
        WeightsError: the checkpoint is missing, unreadable or of another network.
    """

    networks = ("global",)
    kind = "alignment"
    fixed_space = "symmetric"

    def __init__(
        self,
        size: Annotated[int, Field(ge=8)] | None = None,
        **checkpoint: Any,
    ) -> None:
        super().__init__(**checkpoint)
        self.size = size

    def purified(self, images: Tensor) -> Tensor:
        """The generator's output for one group of images, at their own size."""
        if self.size is None:
            return super().purified(images)
        inner = F.interpolate(images, size=(self.size, self.size), mode="bilinear", align_corners=True)
        out = super().purified(inner)
        return F.interpolate(out, size=images.shape[-2:], mode="bilinear", align_corners=True)
