"""Class activation feature denoiser (CAFD)."""

from __future__ import annotations

from pathlib import Path

from bench.registry import DEFENSES
from defenses._learned import Learned, TrainSeed


@DEFENSES.register_module(name="cafd")
class CAFD(Learned):
    """HGD's DUNET, trained to bring back the target's class activation features under CAFA.

    Source: Zhou et al., ICCV 2021, and their code. Images stay in [0,1]. CAFD, CAFD' and the ablations (MSED, without
    L_adv, without L_caf) differ in training alone. Results written as PNG, as the paper's tables were, are the chain
    `[cafd, {bit_depth: {bits: 8}}]`.

    Limitations: no gradient is masked; the paper itself reports 95 % error under PGD through the denoiser.

    Args:
        weights: checkpoint; None = the one trained by `recipe` for the role it stands in front of.
        recipe, trained_for, train_seed: which one (`defenses._learned.Learned`).

    Raises:
        WeightsError: the checkpoint is missing, unreadable or of another network.
    """

    networks = ("dunet",)
    kind = "cafd"

    def __init__(
        self,
        weights: Path | None = None,
        recipe: str | None = None,
        trained_for: str | None = None,
        train_seed: TrainSeed = 0,
    ) -> None:
        super().__init__(weights, "unit", recipe, trained_for, train_seed)
