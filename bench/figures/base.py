"""What a kind of figure is, what it gets to draw from, and what kinds share."""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from bench.errors import GridError, StoreError, unknown
from bench.plan import CLEAN, Cell, Plan
from bench.plotting import styled
from bench.runner import not_applicable
from bench.stats import paired_scores
from bench.store import Store
from bench.views import View, for_each_view

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

Where = dict[str, str | list[str]]
"""Column -> label, or any of several labels, that a cell must have."""

COLUMNS: Mapping[str, Callable[[Cell], str]] = {
    "role": lambda cell: cell.target.role,
    "task": lambda cell: cell.target.task,
    "defense": lambda cell: cell.defense_label,
    "attack": lambda cell: cell.attack_label,
    "level": lambda cell: cell.level,
    "level_label": lambda cell: cell.level_label,
    "image_format": lambda cell: cell.image_format,
}


def select(plan: Plan, where: Where, at: str = "where") -> list[Cell]:
    """The plan's cells with these labels that are not skipped, images in the grid's first format unless `where` says.

    Raises:
        GridError: an unknown column or label, named with the nearest; or no cell is left.
    """
    chosen = {"image_format": plan.grid.evaluate.formats[0], **where}
    cells = list(plan.cells)
    for column, value in chosen.items():
        if column not in COLUMNS:
            raise GridError(f"{at}: {unknown('column', column, COLUMNS)}")
        known = {COLUMNS[column](cell) for cell in plan.cells}
        wanted = [value] if isinstance(value, str) else value
        for label in wanted:
            if label not in known:
                raise GridError(f"{at}.{column}: {unknown(column, label, known)}")
        cells = [cell for cell in cells if COLUMNS[column](cell) in wanted]
    if not cells:
        raise GridError(f"{at}: no cell of the grid has all of {dict(where)}")
    kept = [cell for cell in cells if cell.skip is None]
    if not kept:
        raise GridError(f"{at}: cell '{cells[0].label}' is skipped: {cells[0].skip}")
    return kept


def attacked(plan: Plan, where: Where, at: str = "where") -> list[Cell]:
    """`select`, cells with an attack alone.

    Raises:
        GridError: as `select`, or none of them is attacked.
    """
    cells = [cell for cell in select(plan, where, at) if cell.craft is not None]
    if not cells:
        raise GridError(f"{at}: every cell is clean, expected attacked ones")
    return cells


@dataclass(frozen=True)
class Source:
    """What figures are drawn from: a plan that has run.

    Attributes:
        plan: the grid.
        store: rows and adversarial images.
        device: where models run.
    """

    plan: Plan
    store: Store
    device: torch.device

    @functools.cached_property
    def frame(self) -> pd.DataFrame:
        """The long frame of the plan."""
        from bench.frame import cell_frame

        return cell_frame(self.plan, self.store)

    def applicable(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells that did not turn out to have no meaning when they were run; the others are logged.

        Raises:
            StoreError: none is left.
        """
        reasons = {cell.label: not_applicable(self.store, cell) for cell in cells}
        for label, reason in reasons.items():
            if reason is not None:
                logger.warning("not drawn: %s: %s", label, reason)
        kept = [cell for cell in cells if reasons[cell.label] is None]
        if not kept:
            raise StoreError(f"cell '{cells[0].label}' has no images: {reasons[cells[0].label]}")
        return kept

    def views(self, cell: Cell, consume: Callable[[View], None], ids: Sequence[str] | None = None) -> None:
        """Feed `consume` the images of a cell (`bench.views.for_each_view`).

        Raises:
            StoreError: the cell has not been run.
        """
        for_each_view(cell, self.store, self.device, consume, ids, self.plan.options.batch_size)


class FigureKind(ABC):
    """One kind of figure; the constructor's annotated arguments are its parameters in a grid.

    Attributes:
        shown: columns whose values stand in the figure itself.
    """

    name: str
    params: Mapping[str, Any]
    shown: Collection[str] = ()

    @abstractmethod
    def check(self, plan: Plan) -> None:
        """Refuse what cannot be drawn, before anything has run.

        Raises:
            GridError: an unknown label, quantity or parameter, or cells that do not fit.
        """

    @abstractmethod
    def compute(self, source: Source) -> pd.DataFrame:
        """The numbers: one line per point, with the columns `role`, `defense` and `level_label` where they apply.

        Raises:
            StoreError: cells have not been run.
        """

    @abstractmethod
    def draw(self, lines: pd.DataFrame) -> Figure:
        """The figure of these numbers."""


# -- what kinds share -----------------------------------------------------------------------------------------------
def mean_line(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Mean of one value per image with Student's 95 % interval, as columns value, low, high, n."""
    given = np.asarray(values, dtype=np.float64)
    if len(given) < 2:
        mean = float(given.mean())
        return {"value": mean, "low": mean, "high": mean, "n": len(given)}
    found = paired_scores(given, np.zeros_like(given))
    return {"value": found.value, "low": found.low, "high": found.high, "n": len(given)}


def labels(cell: Cell) -> dict[str, str]:
    """The columns that say which cell a line is of."""
    return {column: COLUMNS[column](cell) for column in ("role", "defense", "attack", "level_label")}


def panels(
    rows: int, columns: int, size: tuple[float, float], **options: Any
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of rows x columns panels, each of `size` inches."""

    def make() -> tuple[Figure, list[list[Axes]]]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.9), layout="constrained")
        return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False, **options)]

    return styled(make)


def legend(figure: Figure, *shown: Axes) -> None:
    """One legend below all panels, of what these show together, in as many columns as fit."""
    found: dict[str, Any] = {}
    for axes in shown:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    names, handles = list(found), list(found.values())
    entry = 0.85 + 0.085 * max(len(name) for name in names)
    columns = max(1, min(len(names), int(figure.get_figwidth() / entry)))
    styled(
        lambda: figure.legend(
            handles, names, loc="outside lower center", ncols=columns, fontsize=9, handlelength=3.2, columnspacing=1.4
        )
    )  # fmt: skip


def constant(lines: pd.DataFrame, shown: Collection[str] = ()) -> str:
    """What lines have in common, in words, and their threat levels unless `shown` has them: none goes without."""
    found = [
        f"{prefix}{lines[column].iloc[0]}"
        for column, prefix in (("role", ""), ("defense", "defense "), ("attack", "attack "))
        if column in lines and lines[column].nunique() == 1
    ]
    if "level_label" in lines and "level_label" not in shown:
        levels = list(dict.fromkeys(lines["level_label"]))
        found.append(" and ".join([level for level in levels if level != CLEAN] or levels))
    counts = sorted({int(n) for n in lines["n"]}) if "n" in lines else []
    if counts:
        numbers = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        found.append(f"{numbers} image{'s' * (numbers != '1')}")
    return ", ".join(found)
