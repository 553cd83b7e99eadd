"""FPD, which the papers compare with and nobody can run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bench.errors import NotApplicable
from bench.protocols import Defense
from bench.registry import DEFENSES

REASON = (
    "FPD is unavailable: it changes the classifier itself and has no public code; the papers that use its generator "
    "do not say how"
)


@DEFENSES.register_module(name="fpd")
class FPD(Defense):
    """Feature pyramid decoder (Li et al., CVPR 2020): listed because tables name it, and unavailable.

    It adds denoising blocks, a restoration decoder and a Lipschitz constrained layer to a classifier and trains them
    together; it is no preprocessing defense, and no code is public. Its cells are skipped with this reason.
    """

    trained = True
    unavailable = REASON

    def forward(self, images: Tensor, *args: Any) -> Tensor:
        """Raises NotApplicable, always."""
        raise NotApplicable(REASON)
