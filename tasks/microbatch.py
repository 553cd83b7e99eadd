"""Networks run in batches of one fixed size and on one thread, so that results depend on nothing but the image.

A convolution or a matrix product picks its kernel, and with it the order of its sums, by the shape of the whole batch:
the same image alone and among others gives logits that differ in the last bits, and a gradient sign that differs with
them. At one fixed shape and number of threads the kernels are always the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bench.errors import BenchError

__all__ = ["default_size", "micro_batches", "one_thread"]


def default_size(device: torch.device) -> int:
    """Images per call for a network nobody has checked.

    On a CPU some operators treat the images of a batch differently by their place in it (remainder rows of a matrix
    product, the tail of a vectorised loop), so only one at a time is safe; elsewhere one at a time would waste the
    device.
    """
    return 1 if device.type == "cpu" else 16


def micro_batches(network: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """`network(images)` computed `size` images at a time; differentiable.

    The last group is filled up with copies of its first image, whose results are dropped.

    Args:
        network: maps (size, ...) to (size, ...).
        images: (B, ...).
        size: images per call, 1 or more.

    Returns:
        (B, ...) as `network` returns it.

    Raises:
        BenchError: the network does not return a row for each image.
    """
    if len(images) == 0:
        return network(images)
    outputs = []
    for group in images.split(size):
        missing = size - len(group)
        # The copies are detached: their share of the gradient is zero, and adding it would be work for nothing.
        full = torch.cat([group, group[:1].detach().expand(missing, *group.shape[1:])]) if missing else group
        result = network(full)
        if len(result) != size:
            raise BenchError(
                f"the network turned images {tuple(full.shape)} into {tuple(result.shape)}, expected {size} rows: "
                "does it take images of this size?"
            )
        outputs.append(result[: len(group)])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one CPU thread, so that sums are made in the same order whatever the machine's core count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
