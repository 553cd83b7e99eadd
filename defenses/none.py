"""No defense."""

from __future__ import annotations

from torch import Tensor

from bench.protocols import Defense
from bench.registry import DEFENSES


@DEFENSES.register_module(name="none")
class NoDefense(Defense):
    """Images as they are: the undefended row of every table."""

    def forward(self, images: Tensor) -> Tensor:
        """`images`, unchanged."""
        return images
