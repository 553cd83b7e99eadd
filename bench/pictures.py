"""What the numbers look like: an image of a cell clean, attacked and purified, and what the model saw in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.errors import GridError, StoreError, unknown
from bench.plan import Cell, task_instance
from bench.store import Store
from bench.views import View, for_each_view

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOISE_GAIN = 10


@dataclass(frozen=True)
class Strip:
    """One row of a picture.

    Attributes:
        title: what it shows.
        task, classes: how predictions are drawn.
        panels: (heading, image (3, H, W) in [0,1], prediction or None to draw none).
        truth: ground truth.
    """

    title: str
    task: str
    classes: Sequence[str]
    panels: tuple[tuple[str, Tensor, Any], ...]
    truth: Any


def strip(cell: Cell, store: Store, image: str | int, device: torch.device) -> Strip:
    """The row of one image of a cell that has run.

    Args:
        cell: with an attack.
        store: holds its adversarial images.
        image: id, or position in the dataset.
        device: where the models run.

    Raises:
        GridError: a cell that is skipped or has no attack, or an image it does not have.
        StoreError: the adversarial image is not there yet.
    """
    if cell.craft is None:
        raise GridError(f"cell '{cell.label}' has no adversarial images: {cell.skip or 'it is not attacked'}")
    ids = cell.target.ids
    if isinstance(image, int):
        if not 0 <= image < len(ids):
            raise GridError(f"image {image}: cell '{cell.label}' has images 0 to {len(ids) - 1}")
        image = ids[image]
    elif image not in ids:
        raise GridError(unknown(f"image of cell '{cell.label}'", image, ids))
    views: list[View] = []
    for_each_view(cell, store, device, views.append, [image])
    (view,) = views
    clean, attacked, predict = view.batch.images, view.attacked, view.model.predict
    panels: list[tuple[str, Tensor, Any]] = []
    with torch.no_grad():
        for heading, pixels in (("clean", clean), ("attacked", attacked)):
            panels.append((heading, pixels[0].cpu(), predict(pixels)[0]))
        noise = (NOISE_GAIN * (attacked - clean) + 0.5).clamp(0, 1)
        panels.append((f"noise x{NOISE_GAIN}", noise[0].cpu(), None))
        for heading, pixels in (("attacked, purified", attacked), ("clean, purified", clean)):
            purified = view.purify(pixels)
            # Predictions are in the coordinates of the image before the defense moved it.
            said = predict(purified.images, geometry=purified.geometry)[0]
            shown = purified.images if purified.images.shape == clean.shape else pixels
            panels.append((heading, shown[0].cpu(), said))
    title = f"{cell.target.role}: {cell.defense_label}\n{cell.attack_label}, {cell.level_label}"
    return Strip(title, cell.target.task, cell.target.dataset.classes, tuple(panels), view.batch.targets[0])


def picture(strips: Sequence[Strip], size: float = 1.9) -> Figure:
    """A figure of rows; `size` is the side of one image in inches."""
    from matplotlib.figure import Figure

    columns = len(strips[0].panels) + 1
    figure = Figure(figsize=(size * columns, (size + 0.45) * len(strips)), layout="constrained")
    grid = figure.subplots(len(strips), columns, squeeze=False)
    for axes_row, row in zip(grid, strips, strict=True):
        truth = ("ground truth", row.panels[0][1], row.truth)
        for axes, (heading, image, prediction) in zip(axes_row, (truth, *row.panels), strict=True):
            axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(heading, fontsize=8)
            caption = ""
            if prediction is not None:
                caption = task_instance(row.task).draw(axes, prediction, row.classes)
            axes.set_xlim(-0.5, image.shape[-1] - 0.5)
            axes.set_ylim(image.shape[-2] - 0.5, -0.5)
            axes.set_xlabel(caption, fontsize=8)
        axes_row[0].set_ylabel(row.title, fontsize=7)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write as PNG or SVG, by the file's suffix.

    Raises:
        GridError: another suffix.
        StoreError: the file cannot be written.
    """
    if path.suffix not in (".png", ".svg"):
        raise GridError(f"{path}: expected a .png or .svg file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise StoreError(f"picture {path} cannot be written: {error.strerror or error}") from None
