"""Bars: quantities of cells, grouped by one label and told apart by another."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from bench.errors import GridError
from bench.figures.base import COLUMNS, FigureKind, Source, Where, labels, legend, panels, select
from bench.figures.curve import Dimension, refuse_twins
from bench.figures.quantities import Distance, Quantities, scale
from bench.plan import Plan
from bench.plotting import COLORS, HATCHES, INK
from bench.registry import FIGURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


WIDEST = 11.0
"""Inches of the figure; groups that do not fit go into further panels below."""


@FIGURES.register_module(name="bars")
class Bars(FigureKind):
    """Quantities as bars: CAFD's Fig. 5 (Zhou et al. 2021), NRP's Fig. 4 and 5 (Naseer et al. 2020).

    Args:
        y: quantities (`bench.figures.quantities`); a panel each.
        where: which cells.
        groups: what runs along the axis.
        bars: what tells the bars of a group apart.
        distance: the distance of features of the quantity `feature_distance`.
    """

    def __init__(
        self,
        y: list[str],
        where: Where = {},  # noqa: B006
        groups: Dimension = "attack",
        bars: Dimension = "defense",
        distance: Distance | None = None,
    ) -> None:
        if groups == bars:
            raise GridError(f"groups and bars are both '{groups}'")
        self.where, self.groups, self.bars = where, groups, bars
        self.shown = (groups, bars)
        self.quantities = Quantities(y, distance)

    def check(self, plan: Plan) -> None:
        """See `FigureKind.check`; also refuses two cells for one bar."""
        cells = select(plan, self.where)
        self.quantities.check(cells)
        places = [(COLUMNS[self.groups](cell), COLUMNS[self.bars](cell)) for cell in cells]
        refuse_twins(cells, places, "bar", "`groups` or `bars`")

    def compute(self, source: Source) -> pd.DataFrame:
        """Columns role, defense, attack, level_label, quantity, value, low, high, n."""
        return pd.DataFrame(
            [
                {**labels(cell), "quantity": name, **found}
                for cell in source.applicable(select(source.plan, self.where))
                for name, found in self.quantities.of(source, cell).items()
            ]
        )

    def draw(self, lines: pd.DataFrame) -> Figure:
        """A panel for each quantity, one below the other, or several where its groups do not fit side by side.

        Whiskers are 95 % intervals.
        """
        quantities = list(dict.fromkeys(lines["quantity"]))
        groups, bars = (list(dict.fromkeys(lines[c])) for c in (self.groups, self.bars))
        present = {
            g: [b for b in bars if b in set(lines[lines[self.groups] == g][self.bars])] for g in groups
        }
        rows = broken(groups, [len(present[g]) + 1 for g in groups], int((WIDEST - 0.9) / 0.34))
        total = max(sum(len(present[g]) + 1 for g in row) for row in rows)
        size = (min(WIDEST, max(5.0, 0.9 + 0.34 * total)), 3.2)
        figure, grid = panels(len(quantities) * len(rows), 1, size)
        places = [(quantity, row) for quantity in quantities for row in rows]
        for (axes,), (quantity, row) in zip(grid, places, strict=True):
            times, label = scale(quantity)
            part = lines[lines["quantity"] == quantity]
            start, centres = 0.0, []
            for group in row:
                for place, bar in enumerate(present[group]):
                    line = part[(part[self.groups] == group) & (part[self.bars] == bar)].iloc[0]
                    value, kind = float(line["value"]) * times, bars.index(bar)
                    axes.bar(
                        start + place, value, width=0.92, color=COLORS[kind % len(COLORS)], alpha=0.75,
                        hatch=HATCHES[kind % len(HATCHES)], edgecolor=INK, linewidth=0.7,
                        yerr=[[value - line["low"] * times], [line["high"] * times - value]],
                        error_kw={"elinewidth": 0.8, "ecolor": INK, "capsize": 2},
                        label=bar if bar not in axes.get_legend_handles_labels()[1] else None,
                    )  # fmt: skip
                centres.append(start + (len(present[group]) - 1) / 2)
                start += len(present[group]) + 1
            width = int(12 * figure.get_figwidth() / (max(map(len, rows)) + 1))
            names = [textwrap.fill(str(group).replace("+", " + "), width) for group in row]
            axes.set_xticks(centres, names, fontsize=9)
            if len(rows) > 1:
                # Bars of one quantity can be compared across its panels.
                axes.set_xlim(-1, total - 1)
                axes.set_ylim(top=max(part["high"].max() * times * 1.05, axes.get_ylim()[1]))
            axes.grid(visible=False, axis="x")
            axes.set_ylabel(label)
            if label.count("%"):
                axes.set_ylim(0, 105)
        if len(bars) > 1:
            legend(figure, *(axes for (axes,) in grid))
        return figure


def broken(groups: Sequence[str], sizes: Sequence[int], room: int) -> list[list[str]]:
    """Groups in rows, in order, as many in each as fit into its room; at least one.

    Args:
        groups: their names.
        sizes: what each takes.
        room: of a row.
    """
    rows: list[list[str]] = [[]]
    left = room
    for group, size in zip(groups, sizes, strict=True):
        if rows[-1] and size > left:
            rows.append([])
            left = room
        rows[-1].append(group)
        left -= size
    return rows
