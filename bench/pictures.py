"""What the numbers look like: images of a cell clean, attacked and purified, and what the model saw in each."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.errors import GridError, NotApplicable, unknown
from bench.files import save as write
from bench.plan import Cell, task_instance
from bench.protocols import Geometry
from bench.store import Store
from bench.views import View, for_each_view

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOISE_GAIN = 10
RIGHT = 0.9
"""Score from which on an image counts as right where scores are not 0 or 1."""

Column = Literal["truth", "clean", "attacked", "noise", "purified", "clean_purified", "left"]
HEADINGS: dict[Column, str] = {
    "truth": "ground truth",
    "clean": "clean",
    "attacked": "attacked",
    "noise": f"noise x{NOISE_GAIN}",
    "purified": "attacked, purified",
    "clean_purified": "clean, purified",
    "left": f"noise left x{NOISE_GAIN}",
}
COLUMNS: tuple[Column, ...] = ("truth", "clean", "attacked", "noise", "purified", "clean_purified")


@dataclass(frozen=True)
class Panel:
    """One image of a row.

    Attributes:
        heading: what it shows.
        image: (3, H, W) in [0,1].
        prediction: drawn over it, or ground truth; None = nothing is.
        score, verdict: of the prediction (`Task.rows`, `Task.verdict`); None and "" for ground truth.
        cam: class activation map (h, w) of the predicted class, drawn over it; None = none is.
        likeness: correlation of this map with that of the clean image; None for its own, of another size or a flat one.
        noise: mean absolute difference from the clean image, of 255, where that is what is shown.
    """

    heading: str
    image: Tensor
    prediction: Any = None
    score: float | None = None
    verdict: str = ""
    cam: Tensor | None = None
    likeness: float | None = None
    noise: float | None = None


@dataclass(frozen=True)
class Strip:
    """One row of a picture: an image of a cell.

    Attributes:
        title: what it shows.
        task, classes: how predictions are drawn.
        image: its id.
        panels: from left to right.
        truth: ground truth.
    """

    title: str
    task: str
    classes: Sequence[str]
    image: str
    panels: tuple[Panel, ...]
    truth: Any


def strip(
    cell: Cell,
    store: Store,
    image: str | int,
    device: torch.device,
    columns: Sequence[Column] = COLUMNS,
    cam: bool = False,
) -> Strip:
    """The row of one image of a cell that has run.

    Args:
        cell: with an attack.
        store: holds its adversarial images.
        image: id, or position in the dataset.
        device: where the models run.
        columns, cam: as `strips_of`.

    Raises:
        GridError: a cell that is skipped or has no attack, or an image it does not have; as `strips_of`.
        StoreError: the adversarial image is not there yet.
    """
    if cell.craft is None:
        raise GridError(f"cell '{cell.label}' has no adversarial images: {cell.skip or 'it is not attacked'}")
    ids = cell.target.ids
    if isinstance(image, int):
        image = position(cell, image)
    elif image not in ids:
        raise GridError(unknown(f"image of cell '{cell.label}'", image, ids))
    found: list[Strip] = []
    for_each_view(cell, store, device, lambda view: found.extend(strips_of(view, columns, cam)), [image])
    return found[0]


def position(cell: Cell, place: int) -> str:
    """Id of the image at this position of a cell's dataset.

    Raises:
        GridError: it has fewer.
    """
    ids = cell.target.ids
    if not 0 <= place < len(ids):
        raise GridError(f"image {place}: cell '{cell.label}' has images 0 to {len(ids) - 1}")
    return ids[place]


def strips_of(view: View, columns: Sequence[Column] = COLUMNS, cam: bool = False) -> list[Strip]:
    """A row for each image of a view.

    Args:
        view: of a cell with an attack.
        columns: what to show. `noise` is what the attack added, `left` what is still there behind the defense, both
            times `NOISE_GAIN` around grey.
        cam: after these, the class activation map of each image that has a prediction (`class_activation_maps`).

    Raises:
        GridError: the target has no class activation maps, or `left` of a defense that resizes.
    """
    clean, truths = view.batch.images, view.batch.targets
    found: list[list[Panel]] = []
    with torch.no_grad():
        given = _given(view, columns)
        for column in columns:
            heading = HEADINGS[column]
            if column == "truth":
                found.append([Panel(heading, x, y) for x, y in zip(clean.cpu(), truths, strict=True)])
            elif column in ("noise", "left"):
                other = given["attacked" if column == "noise" else "purified"].seen
                if other.shape != clean.shape:
                    raise GridError(
                        f"cell '{view.cell.label}': the defense resizes images: noise cannot be compared"
                    )
                found.append([_noise(heading, x) for x in (other - clean).cpu()])
            else:
                found.append(_predicted(view, heading, given[column]))
        if cam:
            reference = _maps(view, clean)
            for column in columns:
                if column in given:
                    found.append(_activated(view, HEADINGS[column], given[column].seen, reference))
    cell = view.cell
    title = f"{cell.target.role}: {cell.defense_label}\n{cell.attack_label}, {cell.level_label}"
    return [
        Strip(title, cell.target.task, cell.target.dataset.classes, image, panels, truth)
        for image, panels, truth in zip(view.batch.ids, zip(*found, strict=True), truths, strict=True)
    ]


@dataclass(frozen=True)
class _Given:
    """Images before the defense, what the model gets of them, and how they were moved; (B, 3, H, W)."""

    pixels: Tensor
    seen: Tensor
    geometry: Geometry | None = None


def _given(view: View, columns: Sequence[Column]) -> dict[Column, _Given]:
    """The images that predictions are of."""
    clean, attacked = view.batch.images, view.attacked
    given: dict[Column, _Given] = {"clean": _Given(clean, clean), "attacked": _Given(attacked, attacked)}
    wanted = {"purified" if column == "left" else column for column in columns}
    for column, pixels in (("purified", attacked), ("clean_purified", clean)):
        if column in wanted:
            out = view.purify(pixels)
            given[column] = _Given(pixels, out.images, out.geometry)
    return given


def _noise(heading: str, noise: Tensor) -> Panel:
    return Panel(
        heading, (NOISE_GAIN * noise + 0.5).clamp(0, 1), noise=255 * float(noise.double().abs().mean())
    )


def _predicted(view: View, heading: str, given: _Given) -> list[Panel]:
    task = task_instance(view.cell.target.task)
    # Predictions are in the coordinates of the image before the defense moved it.
    predictions = view.model.predict(given.seen, geometry=given.geometry)
    shown = given.seen if given.seen.shape == given.pixels.shape else given.pixels
    return [
        Panel(heading, x, said, float(task.rows(said, truth)["score"]), task.verdict(said, truth))
        for x, said, truth in zip(shown.cpu(), predictions, view.batch.targets, strict=True)
    ]


def _activated(view: View, heading: str, seen: Tensor, reference: Tensor) -> list[Panel]:
    heading, alike = f"class activation,\n{heading}", seen is not view.batch.images
    return [
        Panel(heading, x, cam=m, likeness=likeness(m, clean) if alike else None)
        for x, m, clean in zip(seen.cpu(), _maps(view, seen), reference, strict=True)
    ]


def _maps(view: View, images: Tensor) -> Tensor:
    from tasks.heads import class_activation_maps

    try:
        return class_activation_maps(view.model, images).cpu()
    except NotApplicable as error:
        raise GridError(f"cell '{view.cell.label}': {error}") from None


def likeness(a: Tensor, b: Tensor) -> float | None:
    """Correlation of two maps (h, w) over their places; None where they differ in size or one is flat."""
    if a.shape != b.shape:
        return None
    a, b = (m.double().flatten() - m.double().mean() for m in (a, b))
    spread = float(a.norm() * b.norm())
    return float((a * b).sum()) / spread if spread else None


def picture(strips: Sequence[Strip], size: float = 1.9) -> Figure:
    """A figure of rows of equal columns; `size` is the side of one image in inches."""
    from matplotlib.figure import Figure

    columns = len(strips[0].panels)
    figure = Figure(figsize=(size * columns, (size + 0.45) * len(strips)), layout="constrained")
    grid = figure.subplots(len(strips), columns, squeeze=False)
    for place, (axes_row, row) in enumerate(zip(grid, strips, strict=True)):
        for axes, panel in zip(axes_row, row.panels, strict=True):
            _draw(axes, panel, row)
            if place == 0:
                axes.set_title(panel.heading, fontsize=9)
        axes_row[0].set_ylabel(row.title, fontsize=8)
    return figure


def _draw(axes: Axes, panel: Panel, row: Strip) -> None:
    height, width = panel.image.shape[-2:]
    image = panel.image.permute(1, 2, 0).clamp(0, 1).numpy()
    caption = "" if panel.noise is None else f"mean {panel.noise:.1f} of 255"
    if panel.cam is not None:
        # Grey, so that colours are the map's alone; each map has its own range, as in the papers.
        axes.imshow(image.mean(2), cmap="gray", vmin=0, vmax=1, interpolation="none")
        overlay = enlarged(panel.cam, (height, width)).numpy()
        axes.imshow(overlay, cmap="jet", alpha=0.5, vmin=0, vmax=1, interpolation="none")
        if overlay.max() > 0:
            axes.contour(overlay, levels=[0.5], colors="white", linewidths=1)
        if panel.likeness is not None:
            caption = f"like clean's: {panel.likeness:.2f}"
    else:
        axes.imshow(image, interpolation="none")
    if panel.prediction is not None:
        caption = task_instance(row.task).draw(axes, panel.prediction, row.classes)
        caption += (" " if len(panel.verdict) == 1 else "\n") * bool(panel.verdict) + panel.verdict
    axes.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.set_xlabel(caption, fontsize=9)
    axes.spines[:].set_visible(True)


def enlarged(cam: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (h, w) stretched to [0,1] by its own least and greatest value, bilinearly to `size`; 0 where it is flat."""
    spread = cam - cam.min()
    spread = spread / spread.max().clamp(min=1e-12)
    return F.interpolate(spread[None, None].float(), size=size, mode="bilinear", align_corners=False)[0, 0]


def save(figure: Figure, path: Path) -> None:
    """Write as PNG or SVG, by the file's suffix.

    Raises:
        GridError: another suffix.
        StoreError: the file cannot be written.
    """
    if path.suffix not in (".png", ".svg"):
        raise GridError(f"{path}: expected a .png or .svg file")
    sink = io.BytesIO()
    figure.savefig(sink, format=path.suffix[1:], dpi=110)
    write(path, sink.getvalue())
