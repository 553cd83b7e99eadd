"""What is left of the tables and figures of a grid from which labels are left out (`--without`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bench.figures import FigureSpec
from bench.grid import Grid
from bench.tables import TableSpec

Labels = Mapping[str, frozenset[str]]

#: Labels of lines that come of several cells, or of none that is attacked: no cell has to have them.
_DERIVED = {"worst case", "adaptive", "clean"}


def cut(grid: Grid, gone: Labels, cells: Iterable[Mapping[str, str]]) -> Grid:
    """The grid with its tables and figures cut to what is left; those of which nothing is left are gone.

    Args:
        grid: whose blocks are cut already.
        gone: column -> labels that are not there any more, metrics and tasks among them.
        cells: labels of those that are, by column.
    """
    there = list(cells)
    tables: list[TableSpec] = []
    for spec in grid.tables:
        where = _where(spec.where, gone, there)
        wanted = [spec.metric] if isinstance(spec.metric, str) else spec.metric
        kept = None if wanted is None else [name for name in wanted if name not in gone.get("metric", ())]
        if where is not None and kept != []:
            metric = spec.metric if kept == wanted else kept
            tables.append(spec.model_copy(update={"where": where, "metric": metric}))
    figures: list[FigureSpec] = []
    for figure in grid.figures:
        chosen = figure.parameters.get("where", {})
        if not isinstance(chosen, Mapping):
            figures.append(figure)  # to be refused as it is
        elif (where := _where(chosen, gone, there)) is not None:
            changed: dict[str, Any] = {"where": where} if "where" in figure.parameters else {}
            series = figure.parameters.get("series")
            if isinstance(series, Mapping):
                kept_series = {
                    name: own for name, own in series.items()
                    if not isinstance(own, Mapping) or _where({**where, **own}, gone, there) is not None
                }  # fmt: skip
                if series and not kept_series:
                    continue
                changed["series"] = kept_series
            figures.append(FigureSpec(**{**figure.model_dump(), **changed}))
    return grid.model_copy(update={"tables": tables, "figures": figures})


def _where(
    where: Mapping[str, Any], gone: Labels, cells: Iterable[Mapping[str, str]]
) -> dict[str, Any] | None:
    """What a table or figure chooses, less what is gone; None if that leaves nothing to choose."""
    left: dict[str, Any] = {}
    for column, value in where.items():
        wanted = value if isinstance(value, list) else [value]
        kept = [label for label in wanted if label not in gone.get(column, frozenset())]
        if wanted and not kept:
            return None
        left[column] = value if kept == wanted else kept
        labels = {str(label) for label in kept}
        if not labels & _DERIVED:
            cells = [cell for cell in cells if column not in cell or cell[column] in labels]
    return left if list(cells) else None
