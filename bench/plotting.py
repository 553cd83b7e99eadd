"""How plots look: told apart by markers, line styles and words, with colour only on top; the same bytes every time."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLORS", "DASHES", "HATCHES", "INK", "MARKERS", "PAPER", "rendered", "stroke", "styled"]

# Written into the SVG as they are; the report's page replaces them, so that plots follow its light or dark colours.
INK = "#1f1f1f"
PAPER = "#fefefe"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#b0568c", "#b58900", "#4a90c2", "#8a6fd1")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")
DASHES = ("-", "--", "-.", ":")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo", "+++")

T = TypeVar("T")
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "font.size": 10, "font.family": "sans-serif", "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.facecolor": "none",
    "figure.facecolor": PAPER, "savefig.facecolor": PAPER, "legend.frameon": False, "legend.labelcolor": INK,
    "axes.grid": True, "grid.color": INK, "grid.alpha": 0.18, "grid.linewidth": 0.6, "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True,
    # Each image in an SVG with its own pixels, also where several lie on each other.
    "image.composite_image": False,
}  # fmt: skip


def styled(draw: Callable[[], T], **more: Any) -> T:
    """What `draw` returns, run in this style and `more` of matplotlib's settings."""
    import matplotlib as mpl

    style: Any = {**_STYLE, **more}
    with mpl.rc_context(style):
        return draw()


def stroke(place: int) -> dict[str, Any]:
    """How the curve at this place looks; signs get smaller, so that those of curves that run together all show."""
    return {
        "color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)], "markersize": max(4, 8 - place),
        "linestyle": DASHES[place % len(DASHES)], "linewidth": 1.4,
    }  # fmt: skip


def rendered(figure: Figure, name: str) -> tuple[bytes, bytes]:
    """The figure as SVG and as PNG, without dates; `name` keeps the ids of several SVGs on one page apart."""

    def save(format: str, **options: Any) -> bytes:
        sink = io.BytesIO()
        figure.savefig(sink, format=format, **options)
        return sink.getvalue()

    # Ids in the SVG are hashes; with a salt of their own they are the same in every run.
    salt = {"svg.hashsalt": name}
    svg = styled(lambda: save("svg", metadata={"Date": None, "Creator": None}), **salt)
    return svg, styled(lambda: save("png", dpi=160, metadata={"Software": None}))
