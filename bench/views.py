"""Batches of a cell as they were evaluated: clean, attacked, and behind the defense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.errors import StoreError
from bench.plan import Cell
from bench.protocols import Batch, Defense, ImageRNG, TargetModel, Warped
from bench.runner import craft_record, for_each_batch, in_format, load_model
from bench.store import Store

__all__ = ["View", "for_each_view"]


@dataclass(frozen=True)
class View:
    """Some images of a cell.

    Attributes:
        cell, model, defense: what they are of.
        batch: clean, as the model prepares them.
        attacked: what stood before the defense, (B, 3, H, W); the clean images in a cell without an attack.
        rng: the cell's streams of these images.
    """

    cell: Cell
    model: TargetModel
    defense: Defense
    batch: Batch
    attacked: Tensor
    rng: ImageRNG

    def purify(self, images: Tensor) -> Warped:
        """`images` behind the defense, with the draws that the first evaluation of the rows had."""
        return self.defense.purify(images, self.rng.fork("repeat", 0))


def for_each_view(
    cell: Cell,
    store: Store,
    device: torch.device,
    consume: Callable[[View], None],
    ids: Sequence[str] | None = None,
    batch_size: int | None = None,
) -> None:
    """Feed `consume` the images of a cell, batch by batch, in order and without gradients.

    Args:
        cell: one that is not skipped.
        store: holds its adversarial images.
        device: where the models run.
        consume: may be called again for a batch that did not fit, in halves.
        ids: some of its images; all when None.
        batch_size: by default the task's.

    Raises:
        StoreError: an adversarial image is not there yet.
    """
    wanted = cell.target.ids if ids is None else ids
    record = None if cell.craft is None else craft_record(store, cell.craft)
    missing = [] if record is None else record.missing(wanted)
    if missing:
        raise StoreError(
            f"cell '{cell.label}', image {missing[0]} has not been attacked yet: run the grid first"
        )
    model = load_model(cell.target, device)
    defense = cell.defense.to(device)

    def feed(batch: Batch) -> None:
        attacked = batch.images if record is None else record.read_images(batch.ids)[0].to(device)
        attacked = in_format(attacked, cell.image_format)
        with torch.no_grad():
            consume(View(cell, model, defense, batch, attacked, ImageRNG.for_images(cell.key, batch.ids)))

    for_each_batch(cell.target, model, wanted, batch_size, device, feed)
