"""What a defense removes, pixel by pixel, against what the attack had added."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from bench.errors import GridError
from bench.figures.base import FigureKind, Source, Where, attacked, labels, legend, panels
from bench.plan import Plan
from bench.plotting import COLORS, INK, PAPER
from bench.registry import FIGURES
from bench.views import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = 255


@FIGURES.register_module(name="noise")
class Noise(FigureKind):
    """2D histogram of adversarial against removed perturbation: HGD's Fig. 7 (Liao et al. 2018).

    Along: x* - x, what the attack added. Up: x* - T(x*), what the defense takes away. A line through the origin is fit
    to all pixels and channels; its slope is 1 where the perturbation is removed as a whole.

    Args:
        where: which cells; a panel each.
    """

    def __init__(self, where: Where = {}) -> None:  # noqa: B006
        self.where = where

    def check(self, plan: Plan) -> None:
        """See `FigureKind.check`."""
        attacked(plan, self.where)

    def compute(self, source: Source) -> pd.DataFrame:
        """Columns role, defense, attack, level_label, n, slope, correlation; added, removed (in 1/255) and count."""
        lines = []
        for cell in source.applicable(attacked(source.plan, self.where)):
            added: list[np.ndarray] = []
            removed: list[np.ndarray] = []

            def consume(
                view: View, added: list[np.ndarray] = added, removed: list[np.ndarray] = removed
            ) -> None:
                out = view.purify(view.attacked).images
                if out.shape != view.attacked.shape:
                    raise GridError(
                        f"cell '{view.cell.label}': the defense resizes images: pixels cannot be compared"
                    )
                added.append((view.attacked - view.batch.images).double().flatten().cpu().numpy())
                removed.append((view.attacked - out).double().flatten().cpu().numpy())

            source.views(cell, consume)
            x, y = np.concatenate(added), np.concatenate(removed)
            slope, correlation = fit(x, y)
            about = {
                **labels(cell),
                "n": len(cell.target.ids),
                "slope": slope,
                "correlation": correlation,
            }
            pairs = np.rint(np.stack([x, y], 1) * LEVELS).astype(int)
            bins, counts = np.unique(pairs, axis=0, return_counts=True)
            lines += [
                {**about, "added": int(a), "removed": int(b), "count": int(count)}
                for (a, b), count in zip(bins, counts, strict=True)
            ]
        return pd.DataFrame(lines)

    def draw(self, lines: pd.DataFrame) -> Figure:
        """A panel for each cell, shares of pixels in greys on a logarithmic scale; the rarest removals are cut off."""
        from matplotlib.colors import LogNorm

        names = ["role", "defense", "attack", "level_label"]
        varying = [c for c in names if lines[c].nunique() > 1] or ["defense"]
        cells = [part for _, part in lines.groupby(names, sort=False, observed=True)]
        figure, (row,) = panels(1, len(cells), (3.9, 3.6), sharex=True, sharey=True)
        wide = spacing(lines["added"].to_numpy(), lines["count"].to_numpy())
        far = max(reach(part["removed"].to_numpy(), part["count"].to_numpy()) for part in cells)
        x, y = int(np.ceil(lines["added"].abs().max() / wide)), 1 + far // wide
        edges = wide * (np.arange(-x, x + 2) - 0.5), wide * (np.arange(-y, y + 2) - 0.5)
        ends = np.array([edges[0][0], edges[0][-1]])
        for axes, part in zip(row, cells, strict=True):
            table, _, _ = np.histogram2d(part["removed"], part["added"], edges[::-1], weights=part["count"])
            shares = np.ma.masked_equal(table / part["count"].sum(), 0)
            mesh = axes.pcolormesh(*edges, shares, cmap="Greys", norm=LogNorm(1e-5, 0.3), rasterized=True)
            slope = float(part["slope"].iloc[0])
            axes.plot(ends, ends, color=PAPER, linewidth=3)
            axes.plot(
                ends, ends, color=INK, linestyle=":", linewidth=1.6, label="all of it removed (slope 1)"
            )
            axes.plot(ends, slope * ends, color=PAPER, linewidth=3.4)
            axes.plot(
                ends, slope * ends, color=COLORS[1], linestyle="--", linewidth=2, label="fit through the origin"
            )  # fmt: skip
            axes.set_title(
                f"{', '.join(str(part[c].iloc[0]) for c in varying)}\nslope {slope:.2f}, "
                f"correlation {part['correlation'].iloc[0]:.2f}",
                fontsize=10,
            )
            axes.set_xlabel("added by the attack (of 255)")
            axes.set_xlim(*ends)
            axes.set_ylim(edges[1][0], edges[1][-1])
            axes.grid(visible=False)
        row[0].set_ylabel("removed by the defense (of 255)")
        figure.colorbar(mesh, ax=row, label="share of pixels", shrink=0.9)
        legend(figure, row[0])
        return figure


def spacing(levels: np.ndarray, counts: np.ndarray) -> int:
    """Width of the bins: attacks of a few equal steps leave gaps, which would hide the rest.

    Args:
        levels: (N,) whole numbers.
        counts: (N,) how often each occurs.
    """
    return next(w for w in (8, 4, 2, 1) if w == 1 or counts[levels % w == 0].sum() >= 0.9 * counts.sum())


def reach(levels: np.ndarray, counts: np.ndarray) -> int:
    """How far from 0 all but one in a hundred lie; arguments as `spacing`."""
    order = np.argsort(abs(levels))
    enough = np.searchsorted(np.cumsum(counts[order]), 0.99 * counts.sum())
    return int(abs(levels)[order][enough])


def fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope of the least-squares line y = k x, and the correlation; NaN where either does not vary.

    Args:
        x, y: (N,).
    """
    # No product of vectors: the order of a BLAS's sums, and so the last digit, depends on the number of threads.
    power = float((x * x).sum())
    slope = float((x * y).sum()) / power if power else float("nan")
    spread = float(x.std() * y.std())
    return slope, float(((x - x.mean()) * (y - y.mean())).mean()) / spread if spread else float("nan")
