"""From the `figures` of a grid to files."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from bench.errors import BenchError, GridError, unknown
from bench.figures import FigureSpec
from bench.figures.base import FigureKind, Source, constant
from bench.files import save
from bench.plan import Plan
from bench.plotting import rendered, styled
from bench.registry import FIGURES
from bench.store import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_figures", "draw_figure", "figure_kinds", "write_figures"]

logger = logging.getLogger(__name__)


def figure_kinds(plan: Plan, names: Iterable[str] | None = None) -> list[tuple[FigureSpec, FigureKind]]:
    """The figures of a grid, or some of them by name, each with its kind.

    Raises:
        GridError: no such figure; an unknown kind, parameter, label or quantity, named with the nearest.
    """
    specs = plan.grid.figures
    known = {spec.name for spec in specs}
    for name in names or ():
        if name not in known:
            raise GridError(f"{plan.options.grid}: {unknown('figure', name, known)}")
    found = []
    for index, spec in enumerate(specs):
        if names is not None and spec.name not in names:
            continue
        at = f"{plan.options.grid}, figures[{index}]"
        kind: FigureKind = FIGURES.create(spec.kind, spec.parameters, at)
        try:
            kind.check(plan)
        except BenchError as error:
            raise type(error)(f"{at}: {error}") from None
        found.append((spec, kind))
    return found


def check_figures(plan: Plan) -> None:
    """Refuse figures that cannot be drawn: a mistake must not cost a run first.

    Raises:
        GridError: see `figure_kinds`.
    """
    figure_kinds(plan)


def write_figures(
    plan: Plan, store: Store, folder: Path, device: torch.device, names: Iterable[str] | None = None
) -> list[Path]:
    """Draw figures of a grid that has run: NAME.png, NAME.svg, and the numbers as NAME.csv.

    The numbers depend on the grid and its seed alone, not on batches or the number of threads.

    Args:
        plan: the grid.
        store: its rows and adversarial images.
        folder: where to; made if missing.
        device: where models run.
        names: which; all when None.

    Raises:
        GridError: see `figure_kinds`.
        StoreError: cells have not been run, or a file cannot be written.
    """
    if device.type == "cpu":
        # As in a run: kernels split their sums by the number of threads.
        torch.set_num_threads(1)
    source = Source(plan, store, device)
    written = []
    for spec, kind in figure_kinds(plan, None if names is None else tuple(names)):
        try:
            lines = kind.compute(source)
        except BenchError as error:
            raise type(error)(f"figure '{spec.name}': {error}") from None
        svg, png = rendered(draw_figure(kind, lines, spec.title or spec.name, plan.profile), spec.name)
        numbers = str(lines.to_csv(index=False, lineterminator="\n")).encode()
        for suffix, content in (("png", png), ("svg", svg), ("csv", numbers)):
            written.append(folder / f"{spec.name}.{suffix}")
            save(written[-1], content)
        logger.info("figure %s: %d lines", spec.name, len(lines))
    return written


def draw_figure(kind: FigureKind, lines: pd.DataFrame, title: str, profile: str) -> Figure:
    """The figure of computed numbers, headed by its title and by what all of them have in common."""
    figure = styled(lambda: kind.draw(lines))
    width = int(figure.get_figwidth() * 11.5)
    # So that a list of sources can be broken.
    below = constant(lines, kind.shown).replace("+", " + ")
    text = textwrap.wrap(f"profile {profile}{f': {below}' if below else ''}", width)
    styled(lambda: figure.suptitle("\n".join([*textwrap.wrap(title, width), *text]), fontsize=10.5))
    return figure
