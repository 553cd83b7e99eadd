"""DISCO: every pixel's colour predicted anew from the features around it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from bench.registry import DEFENSES
from defenses._learned import Learned


@DEFENSES.register_module(name="disco")
class DISCO(Learned):
    """An encoder of local features and a local implicit function, trained on pairs of adversarial and clean images.

    Source: Ho and Vasconcelos, NeurIPS 2022, and their code: EDSR-baseline without enlargement, the implicit function
    of LIIF, L1 to the clean image, in [-1,1]. It takes images of any size and knows nothing of the target; the pairs
    come from attacks on one classifier.

    A cascade runs the same network K times; each pass sees the last one's image, clamped with a gradient that goes
    straight through. The paper's cascades make adaptive attacks more expensive.

    Limitations: no gradient is masked. The paper's main tables are oblivious; with BPDA it reports much less.

    Args:
        weights, recipe, trained_for, train_seed: the checkpoint; see `defenses._learned.Learned`.
        K: passes.

    Raises:
        WeightsError: the checkpoint is missing, unreadable or of another network.
    """

    networks = ("disco",)
    kind = "disco"
    fixed_space = "symmetric"

    def __init__(
        self,
        K: Annotated[int, Field(ge=1)] = 1,
        **checkpoint: Any,
    ) -> None:
        super().__init__(**checkpoint)
        self.K = K

    def purified(self, images: Tensor) -> Tensor:
        """The output of the last pass for one group of images."""
        out = super().purified(images)
        for _ in range(self.K - 1):
            out = super().purified(out + (out.clamp(0, 1) - out).detach())
        return out
