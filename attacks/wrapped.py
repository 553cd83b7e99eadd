"""What attacks of other libraries need: the oracle as a network, and global random numbers that stay contained."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from bench.protocols import Oracle


class OracleModel(nn.Module):
    """The oracle as a frozen network from images (n, 3, H, W) in [0,1] to logits (n, K).

    A library passes on some of its images, or several candidates for its only one; how many rows there are is all it
    says. For an oracle of one image every row is that image's; for more, rows count from the first.

    Args:
        oracle: the victim, bound to the images the library attacks.
        images: where they are and how precise they are, the network is too.
    """

    def __init__(self, oracle: Oracle, images: Tensor) -> None:
        super().__init__()
        # Libraries look for the device of the first parameter.
        self.where = nn.Parameter(images.new_zeros(1), requires_grad=False)
        self._views = {len(oracle): oracle}
        self._whole = oracle
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits, differentiable to the pixels; images that a library made more precise are rounded."""
        images = images.to(self.where.dtype)
        count = len(images)
        if count not in self._views:
            last = len(self._whole) - 1
            self._views[count] = self._whole.select([min(i, last) for i in range(count)])
        return self._views[count].logits(images)


@contextmanager
def contained(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of torch, numpy and random, and put them back, with the tracer, at the end.

    pyautoattack's check for dynamic defenses leaves `sys.settrace(None)` behind, which ends debuggers and coverage.
    """
    trace, python = sys.gettrace(), random.getstate()
    state = np.random.get_state()  # noqa: NPY002 - it is the libraries' generator that has to be put back
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            random.seed(seed)
            yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
        random.setstate(python)
        sys.settrace(trace)
