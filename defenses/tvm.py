"""Total-variation minimisation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bench.protocols import Defense
from bench.registry import DEFENSES
from bench.rng import ImageRNG
from defenses import _tv


@DEFENSES.register_module(name="tvm")
class Tvm(Defense):
    """Replaces each image by a nearby one of small total variation ("TVM"), on the device of the images.

    Source: Guo, Rana, Cisse, van der Maaten, ICLR 2018; solvers of Chambolle 2004 and Goldstein, Osher 2009. Both
    minimise lam TV(u) + 1/2 |u - x|^2, each channel by itself.

    What a paper's weight means depends on the solver's convention, hence `weight_is`:

    - `lam`: the weight of the total variation, larger is smoother. 0.03 in Guo et al., 0.003 in CAFD (Zhou et al.,
      ICCV 2021); both went to scikit-image's Bregman solver as 1 / weight.
    - `bregman`: scikit-image's weight of the data term, 1 / lam, smaller is smoother: 10 and 30 in NRP (Naseer et
      al., CVPR 2020).

    Solvers:

    - `bregman`: equals `skimage.restoration.denoise_tv_bregman(image, weight)`. An image stops when its change over
      all channels is small, as in the papers' calls; scikit-image's own multi-channel mode stops each channel alone
      and starts every channel from the previous one's result. At the default tolerance it stops after some ten
      sweeps, long before convergence, and therefore smooths a little whatever the weight; its border pulls the first
      row and column towards the second.
    - `chambolle`: equals `denoise_tv_chambolle(image, lam, channel_axis=...)`; each channel stops on its own.

    With p > 0 every value is dropped with probability p and filled in (Guo et al.: p = 0.5, 10 Gauss-Seidel sweeps
    per iteration, tolerance 0.01), which makes the defense stochastic and needs `bregman`. A value that is zero counts
    as kept, as in their code. The default p = 0 is what CAFD and NRP evaluate.

    Differentiable: the backward pass is the exact adjoint of the iterations that were run. The surrogate for BPDA is
    the identity, as in Athalye et al.

    Limitations: broken by BPDA with the identity, averaged over the dropped values (Athalye, Carlini, Wagner 2018).

    Args:
        weight: strength, in the convention of `weight_is`.
        weight_is: `lam` or `bregman`, see above.
        method: solver.
        p: probability of dropping a value, in [0, 1).
        tolerance: None for the reference's: 0.001 (bregman), 0.01 (bregman with p > 0), 0.0002 (chambolle).
        max_iter: None for the reference's: 100 (bregman), 200 (chambolle).
        border: dropped values at the image border average their 2 or 3 neighbours (`paper`), or divide the sum by 4
            as Guo et al.'s code does, which darkens them (`code`). No effect when p = 0.

    Raises:
        ValueError: a parameter is out of range, or p > 0 with `chambolle`.
    """

    def __init__(
        self,
        weight: float = 0.03,
        weight_is: Literal["lam", "bregman"] = "lam",
        method: Literal["bregman", "chambolle"] = "bregman",
        p: float = 0.0,
        tolerance: float | None = None,
        max_iter: int | None = None,
        border: Literal["paper", "code"] = "paper",
    ) -> None:
        super().__init__()
        if weight <= 0:
            raise ValueError(f"weight must be positive, got {weight}")
        if not 0 <= p < 1:
            raise ValueError(f"p must be in [0, 1), got {p}")
        if p > 0 and method == "chambolle":
            raise ValueError("p > 0 needs method 'bregman': Chambolle's solver cannot leave values out")
        if max_iter is not None and max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {max_iter}")
        if tolerance is not None and tolerance < 0:
            raise ValueError(f"tolerance must not be negative, got {tolerance}")
        self.lam = weight if weight_is == "lam" else 1 / weight
        self.method = method
        self.p = p
        self.stochastic = p > 0
        usual = 2e-4 if method == "chambolle" else 1e-2 if p > 0 else 1e-3
        self.tolerance = usual if tolerance is None else tolerance
        self.max_iter = max_iter or (200 if method == "chambolle" else 100)
        self.border = border

    def forward(self, images: Tensor, rng: ImageRNG | None = None) -> Tensor:
        """Smoothed images, same shape; `rng` is needed when p > 0."""
        if self.method == "chambolle":
            return _tv.chambolle(images, self.lam, self.tolerance, self.max_iter)
        if self.p == 0:
            return _tv.bregman(images, 1 / self.lam, self.tolerance, self.max_iter)
        assert rng is not None
        kept = rng.uniform(images.shape[1:], device=images.device) >= self.p
        kept |= images.detach() == 0
        dropped = torch.where(kept, images, torch.zeros_like(images))
        return _tv.masked_bregman(
            dropped, kept, 1 / self.lam, self.tolerance, self.max_iter, quarter=self.border == "code"
        )

    def surrogate(self, images: Tensor, rng: ImageRNG | None = None) -> Tensor:
        """The identity."""
        return images
