"""Curves: quantities of cells against a parameter of their attacks."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from bench.errors import GridError, unknown
from bench.figures.base import COLUMNS, FigureKind, Source, Where, attacked, labels, legend, panels
from bench.figures.quantities import Distance, Quantities, scale
from bench.plan import Cell, Plan
from bench.plotting import stroke
from bench.registry import FIGURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Dimension = Literal["attack", "defense", "role", "level_label"]
DIMENSIONS: tuple[Dimension, ...] = ("attack", "defense", "role", "level_label")


@FIGURES.register_module(name="curve")
class Curve(FigureKind):
    """Quantities against a parameter of attacks: Fig. 3, 6 of CAFD (Zhou et al. 2021), 3 of NRP (Naseer et al. 2020).

    Attacks that agree in all but `x` (and the step size `alpha`, which may follow it) are one attack; its name is what
    their labels have in front of the number.

    Args:
        x: parameter of the attacks, such as steps or eps.
        y: quantities (`bench.figures.quantities`); a row of panels each.
        where: which cells.
        curves: what tells curves apart.
        panels: what tells columns of panels apart; None = one column.
        distance: the distance of features of the quantity `feature_distance`.
    """

    def __init__(
        self,
        x: str,
        y: list[str],
        where: Where = {},  # noqa: B006
        curves: Dimension = "attack",
        panels: Dimension | None = None,
        distance: Distance | None = None,
    ) -> None:
        if curves == panels:
            raise GridError(f"curves and panels are both '{curves}'")
        self.x, self.where, self.curves, self.panels = x, where, curves, panels
        self.shown = (curves, panels or "")
        self.quantities = Quantities(y, distance)

    def check(self, plan: Plan) -> None:
        """See `FigureKind.check`; also refuses points that would lie on top of each other."""
        cells = attacked(plan, self.where)
        self.quantities.check(cells)
        families = _families(cells, self.x)
        places = []
        for cell in cells:
            at = {**labels(cell), "attack": families[cell.attack_label]}
            places.append((at[self.curves], at.get(str(self.panels)), position(cell, self.x)))
        refuse_twins(cells, places, "point", "`curves` or `panels`")

    def compute(self, source: Source) -> pd.DataFrame:
        """Columns role, defense, attack, level_label, x (its name and value), quantity, value, low, high, n."""
        cells = source.applicable(attacked(source.plan, self.where))
        families = _families(cells, self.x)
        lines = [
            {
                **labels(cell), "attack": families[cell.attack_label], "x": self.x, "at": position(cell, self.x),
                "quantity": name, **found,
            }
            for cell in cells
            for name, found in self.quantities.of(source, cell).items()
        ]  # fmt: skip
        return pd.DataFrame(lines)

    def draw(self, lines: pd.DataFrame) -> Figure:
        """Panels: a row for each quantity, a column for each value of `panels`; bands are 95 % intervals."""
        quantities = list(dict.fromkeys(lines["quantity"]))
        columns = [None] if self.panels is None else list(dict.fromkeys(lines[self.panels]))
        # One column of panels reads better side by side.
        turned = self.panels is None
        shape = (1, len(quantities)) if turned else (len(quantities), len(columns))
        figure, grid = panels(*shape, (4.3, 3.2), sharex=True, sharey=False if turned else "row")
        curves = list(dict.fromkeys(lines[self.curves]))
        factor = 255 if self.x == "eps" else 1
        for row, quantity in enumerate(quantities):
            times, label = scale(quantity)
            for column, value in enumerate(columns):
                axes = grid[0][row] if turned else grid[row][column]
                part = lines[lines["quantity"] == quantity]
                part = part if value is None else part[part[str(self.panels)] == value]
                for place, name in enumerate(curves):
                    points = part[part[self.curves] == name].sort_values("at")
                    xs, look = points["at"] * factor, stroke(place)
                    low, high = points["low"] * times, points["high"] * times
                    axes.fill_between(xs, low, high, color=look["color"], alpha=0.1, linewidth=0)
                    axes.plot(xs, points["value"] * times, label=name, **look)
                _ticks(axes, sorted(set(lines["at"] * factor)))
                if turned or row == len(quantities) - 1:
                    axes.set_xlabel("eps (of 255)" if self.x == "eps" else self.x)
                if turned or column == 0:
                    axes.set_ylabel(label)
                if value is not None and row == 0:
                    axes.set_title(str(value), fontsize=10)
        legend(figure, grid[0][0])
        return figure


def refuse_twins(cells: Sequence[Cell], places: Sequence[Hashable], what: str, options: str) -> None:
    """Each cell must have a place of its own in the figure.

    Args:
        cells, places: the cells, and where each is drawn.
        what: a place, in a word.
        options: the parameters that tell cells apart.

    Raises:
        GridError: two cells share a place; says what they differ in.
    """
    taken: dict[Hashable, Cell] = {}
    for cell, place in zip(cells, places, strict=True):
        other = taken.setdefault(place, cell)
        if other is not cell:
            free = [d for d in DIMENSIONS if COLUMNS[d](cell) != COLUMNS[d](other)]
            raise GridError(
                f"cells '{other.label}' and '{cell.label}' are one {what}: choose with `where` among "
                f"{', '.join(free)}, or name it in {options}"
            )


def position(cell: Cell, parameter: str) -> float:
    """The value of an attack's parameter.

    Raises:
        GridError: it has none of that name, or it is no number.
    """
    assert cell.attack is not None
    params = cell.attack.params
    if parameter not in params:
        raise GridError(f"x: attack '{cell.attack_label}': {unknown('parameter', parameter, params)}")
    try:
        return float(Fraction(str(params[parameter])))
    except (ValueError, ZeroDivisionError):
        raise GridError(
            f"x: attack '{cell.attack_label}' has {parameter} {params[parameter]}, expected a number"
        ) from None


def _families(cells: Sequence[Cell], parameter: str) -> dict[str, str]:
    """Label of an attack -> name of all attacks that differ from it in the parameter alone."""
    groups: dict[str, list[str]] = {}
    for cell in cells:
        assert cell.attack is not None
        params = {k: v for k, v in cell.attack.params.items() if k not in (parameter, "alpha")}
        known = groups.setdefault(json.dumps([cell.attack.name, params], sort_keys=True), [])
        if cell.attack_label not in known:
            known.append(cell.attack_label)
    names: dict[str, str] = {}
    for members in groups.values():
        name = re.sub(r"[-_ ]*[\d./]*$", "", members[0]) if len(members) > 1 else members[0]
        name = name if name and all(m.startswith(name) for m in members) else members[0]
        if name in names.values():
            name = members[0]
        names |= dict.fromkeys(members, name)
    return names


def _ticks(axes: Any, at: Sequence[float]) -> None:
    if at[0] > 0 and at[-1] >= 8 * at[0]:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(at, [f"{x:.4g}" for x in at])
