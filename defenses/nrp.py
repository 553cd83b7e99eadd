"""Neural representation purifier (NRP)."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from bench.protocols import ImageRNG, Pixels
from bench.registry import DEFENSES
from defenses._learned import Learned


@DEFENSES.register_module(name="nrp")
class NRP(Learned):
    """A purifier trained without labels against attacks on the features of one network, for any target and task.

    Source: Naseer et al., CVPR 2020, and their code. Takes the published `NRP.pth` and `NRP_resG.pth` (both for
    l_inf up to 16/255) and checkpoints of its U-Net variant; which network it is, the file says. Ablations (GNP,
    FGSP, without L_feat, without L_img, vanilla GAN) differ in training alone.

    Dynamic inference, the paper's answer to attacks through the purifier, adds Gaussian noise to the input, projected
    to a ball and to [0,1]. The code's ball of 16/255 cuts the noise off at 1.25 standard deviations. The code writes
    results as 8-bit PNG: the chain `[nrp, {bit_depth: {bits: 8}}]`.

    Limitations: no gradient is masked; the authors publish a script that goes through it.

    Args:
        weights, recipe, trained_for, train_seed: the checkpoint; see `defenses._learned.Learned`.
        dynamic: noise before the purifier.
        sigma: standard deviation of that noise.
        eps: radius of the ball it is projected to.

    Raises:
        WeightsError: the checkpoint is missing, unreadable or of another network.
    """

    networks = ("nrp", "nrp_resg", "unet")
    kind = "nrp"
    fixed_space = "unit"
    source = "its authors publish NRP.pth and NRP_resG.pth"

    def __init__(
        self,
        dynamic: bool = False,
        sigma: Annotated[float, Field(ge=0)] = 0.05,
        eps: Pixels = Fraction(16, 255),
        **checkpoint: Any,
    ) -> None:
        super().__init__(**checkpoint)
        self.stochastic = dynamic
        self.sigma, self.eps = sigma, float(eps)

    def forward(self, images: Tensor, rng: ImageRNG | None = None) -> Tensor:
        """Purified images, (B, 3, H, W); `rng` gives the noise of dynamic inference."""
        return super().forward(images if rng is None else self.disturbed(images, rng))

    def disturbed(self, images: Tensor, rng: ImageRNG) -> Tensor:
        """What dynamic inference feeds the purifier; the gradient ends where [0,1] does, as in the authors' code."""
        noise = self.sigma * rng.normal(images.shape[1:], images.device)
        return (images + noise.clamp(-self.eps, self.eps)).clamp(0, 1)
