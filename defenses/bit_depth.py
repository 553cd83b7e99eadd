"""Fewer grey levels."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from bench.protocols import Defense
from bench.registry import DEFENSES


@DEFENSES.register_module(name="bit_depth")
class BitDepth(Defense):
    """Quantises every value to a few levels.

    Three rules are in use and differ (n = 2^bits):

    - `evademl`: round(x (n - 1)) / (n - 1), n levels (Xu, Evans, Qi, NDSS 2018, and their code EvadeML-Zoo);
    - `guo`: round(x n) / n, n + 1 levels (code of Guo et al., ICLR 2018);
    - `ares`: floor(x n) / n, levels below 1 plus 1 itself (ARES 2.0; there with 4 bits).

    The default is 3 bits as in Guo et al.'s paper (their code's default of 8 does nothing), with `evademl`'s rule,
    the only one with exactly 2^bits levels. Halves round to even, as in NumPy.

    No gradient: the derivative is zero almost everywhere. The surrogate is the identity.

    Limitations: broken by BPDA with the identity (Athalye, Carlini, Wagner 2018).

    Args:
        bits: bits kept per value, 1 to 8.
        rule: one of the above.

    Raises:
        ValueError: bits is outside 1..8.
    """

    differentiable = False

    def __init__(self, bits: int = 3, rule: Literal["evademl", "guo", "ares"] = "evademl") -> None:
        super().__init__()
        if not 1 <= bits <= 8:
            raise ValueError(f"bits must be in 1..8, got {bits}")
        self.levels = 2**bits - 1 if rule == "evademl" else 2**bits
        self.rule = rule

    def forward(self, images: Tensor) -> Tensor:
        """Quantised images in [0,1], same shape."""
        scaled = images.detach().clamp(0, 1) * self.levels
        out: Tensor = (scaled.floor() if self.rule == "ares" else scaled.round()) / self.levels
        return out
