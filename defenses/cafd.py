"""Class activation feature denoiser (CAFD)."""

from __future__ import annotations

from bench.registry import DEFENSES
from defenses._learned import Learned


@DEFENSES.register_module(name="cafd")
class CAFD(Learned):
    """HGD's DUNET, trained to bring back the target's class activation features under CAFA.

    Source: Zhou et al., ICCV 2021, and their code. Images stay in [0,1]. CAFD, CAFD' and the ablations (MSED, without
    L_adv, without L_caf) differ in training alone. Results written as PNG, as the paper's tables were, are the chain
    `[cafd, {bit_depth: {bits: 8}}]`.

    Limitations: no gradient is masked; the paper itself reports 95 % error under PGD through the denoiser.

    Args:
        weights, recipe, trained_for, train_seed: the checkpoint; see `defenses._learned.Learned`.

    Raises:
        WeightsError: the checkpoint is missing, unreadable or of another network.
    """

    networks = ("dunet",)
    kind = "cafd"
    fixed_space = "unit"
