"""High-level representation guided denoiser (HGD), and its pixel, feature and class guided relatives."""

from __future__ import annotations

from typing import Any

from bench.registry import DEFENSES
from defenses._learned import Learned, Space


@DEFENSES.register_module(name="hgd")
class HGD(Learned):
    """A denoising U-Net that predicts minus the noise, trained so that the target's outputs come back.

    Source: Liao et al., CVPR 2018, and their code. One network, four guides, which are recipes of the training and
    not parameters: pixels (PGD-denoiser), the topmost feature map (FGD), logits (LGD, what is called HGD here), class
    labels (CGD). DUNET (with laterals, adds its input) or DAE, as the checkpoint says.

    The paper's code runs the denoiser on the target's normalised images: `imagenet` for ResNets, `symmetric` ([-1,1])
    for Inceptions. CAFD retrained it on `unit` ([0,1]). Neither clamps; the harness does.

    Limitations: no gradient is masked. The paper evaluates obliviously: attacks do not see the denoiser.

    Args:
        weights, recipe, trained_for, train_seed: the checkpoint; see `defenses._learned.Learned`.
        space: value range of the network; None = what the checkpoint says, else unit.

    Raises:
        WeightsError: the checkpoint is missing, unreadable, of another network or of another value range.
    """

    networks = ("dunet", "dae")
    kind = "hgd"

    def __init__(
        self,
        space: Space | None = None,
        **checkpoint: Any,
    ) -> None:
        super().__init__(**checkpoint)
        self.work_in(space)
