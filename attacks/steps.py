"""Step directions: the steepest ascent direction of unit length under a norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor], Tensor]


def norms(images: Tensor) -> Tensor:
    """L2 norm of each image, (B, 1, 1, 1).

    Summed in double precision, so that the result does not depend on how a sum over a batch is split.
    """
    flat = images.flatten(1).double()
    return flat.mul(flat).sum(1).sqrt().to(images.dtype).view(-1, 1, 1, 1)


def finite(grad: Tensor) -> Tensor:
    """NaN and infinite entries as zero; the oracle has recorded them."""
    # A finite sum has finite terms, and costs less than replacing what is not there.
    if grad.sum().isfinite():
        return grad
    return torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)


def sign(grad: Tensor) -> Tensor:
    """Signs, the steepest ascent in the L-infinity norm (Goodfellow et al. 2015). (B, 3, H, W) in and out."""
    return grad.sign()


def l2(grad: Tensor) -> Tensor:
    """Unit length per image, the steepest ascent in the L2 norm; a zero gradient stays zero."""
    length = norms(grad)
    return grad / length.masked_fill(length == 0, 1.0)


def linf(grad: Tensor) -> Tensor:
    """The gradient itself at unit L-infinity length per image; a zero gradient stays zero."""
    length = grad.abs().flatten(1).amax(1).view(-1, 1, 1, 1)
    return grad / length.masked_fill(length == 0, 1.0)


STEPS: dict[str, Step] = {"sign": sign, "l2": l2, "linf": linf}
