"""Plots of results: told apart by markers, line styles and words, with colour only on top."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pandas as pd

from bench.errors import StoreError
from bench.frame import ADAPTIVE, WORST
from bench.plotting import COLORS, DASHES, INK, MARKERS, PAPER, rendered, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["KNOWING", "Plot", "main_lines", "make_plots", "parameters", "percent"]

LEVEL_MARKERS = {
    "clean": "o",
    "transfer": "v",
    "oblivious": "s",
    "gray_box": "P",
    "bpda": "^",
    "white_box": "D",
    ADAPTIVE: "X",
}

KNOWING = ("gray_box", "bpda", "white_box")
"""Levels of attackers who know of the defense."""


@dataclass(frozen=True)
class Plot:
    """A finished plot.

    Attributes:
        name: file name without suffix.
        kind: the section it belongs to: levels, scatter or sweep.
        title, text: headline, and what it shows in words.
        svg: the whole SVG file.
        png: the PNG file.
    """

    name: str
    kind: str
    title: str
    text: str
    svg: str
    png: bytes

    def inline(self) -> str:
        """The SVG element alone, in the colours of the page around it."""
        body = self.svg[self.svg.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "none")
        # The size comes from the page, the viewBox stays; names of groups would repeat from plot to plot.
        head, rest = body.split(">", 1)
        head = re.sub(r' (width|height)="[^"]*"', "", head)
        return head + ">" + re.sub(r'<g id="[^"]*"', "<g", rest)


def percent(unit: str) -> float:
    """What to multiply a value by before it is printed."""
    return 100.0 if unit == "%" else 1.0


def parameters(line: Mapping[str, Any], column: str) -> dict[str, Any]:
    """The JSON mapping in a column of one line of the frame; {} where the frame has no such column.

    Raises:
        StoreError: it is none.
    """
    text = str(line.get(column) or "{}")
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        where = f"{line['role']} / {line['defense']} / {line['attack']}"
        raise StoreError(f"results of {where}, {column}: expected a JSON mapping, got '{text[:60]}'")
    return found


def main_lines(lines: pd.DataFrame) -> pd.DataFrame:
    """Finished lines of each role's first metric and first image format, seeds averaged.

    Where seeds were averaged, `low` and `high` span the intervals of all of them.
    """
    first = lines.drop_duplicates("role").set_index("role")
    main = lines[
        (lines["metric"] == lines["role"].map(first["metric"]))
        & (lines["image_format"] == lines["role"].map(first["image_format"]))
        & lines["status"].isin(("ok", "partial"))
    ]
    keys = ["grid", "role", "defense", "attack", "level_label", "metric"]
    spans = {"value": "mean", "low": "min", "high": "max"}
    rest = {c: "first" for c in main.columns if c not in (*keys, *spans)}
    return main.groupby(keys, sort=False, as_index=False, observed=True).agg({**rest, **spans})


def make_plots(lines: pd.DataFrame) -> list[Plot]:
    """All plots that the lines of a long frame have the data for."""
    main = main_lines(lines)
    plots: list[Plot] = []
    for _, part in main.groupby("role", sort=False):
        plots.extend(_levels(part))
    for _, part in main.groupby("role", sort=False):
        plots.extend(_scatter(part))
    for key in ("eps", "steps"):
        plots.extend(_sweeps(main, key))
    return plots


# -- levels of one role ---------------------------------------------------------------------------------------------
def _worst(part: pd.DataFrame) -> pd.DataFrame:
    """Clean lines and the worst case of each level; the worst transfer where there are several sources."""
    chosen = part[part["attack"].isin(("clean", WORST))]
    sign = chosen["higher_is_better"].map(lambda up: 1.0 if up else -1.0)
    ranked = chosen.assign(_rank=sign * chosen["value"]).sort_values("_rank", kind="stable")
    return ranked.drop_duplicates(["defense", "level"])


def _levels(part: pd.DataFrame) -> Iterator[Plot]:
    worst = _worst(part)
    defenses = list(dict.fromkeys(part["defense"]))
    present = [level for level in LEVEL_MARKERS if (worst["level"] == level).any()]
    if len(present) < 2:
        return
    role, scale, label = _about(part)
    figure, axes = _figure(4.8, 1.1 + 0.52 * len(defenses))
    for place, level in enumerate(present):
        rows = worst[worst["level"] == level]
        offset = 0.56 * (place / (len(present) - 1) - 0.5)
        ys = [defenses.index(d) + offset for d in rows["defense"]]
        color = COLORS[list(LEVEL_MARKERS).index(level)]
        axes.hlines(ys, rows["low"] * scale, rows["high"] * scale, color=color, linewidth=1)
        axes.plot(
            rows["value"] * scale, ys, LEVEL_MARKERS[level], color=color, markersize=6, linestyle="none",
            markerfacecolor="none" if level in ("clean", "transfer", "oblivious") else color,
            label="adaptive (worst of all)" if level == ADAPTIVE else level,
        )  # fmt: skip
    for y in range(1, len(defenses)):
        axes.axhline(y - 0.5, color=INK, linewidth=0.4, alpha=0.4)
    axes.set_yticks(range(len(defenses)), [_short(d) for d in defenses])
    axes.set_ylim(len(defenses) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(label)
    if part["unit"].iloc[0] == "%":
        axes.set_xlim(-3, 103)
    _legend(figure, axes)
    gaps = _gaps(worst, defenses, scale, str(part["unit"].iloc[0]))
    if not worst["level"].isin(KNOWING).any():
        gaps = "No attacker who knows the defense was tried."
    yield _finish(
        figure, f"levels-{role}", "levels", _titled(role, worst), f"{label} by threat level. {gaps}"
    )


def _gaps(worst: pd.DataFrame, defenses: Sequence[str], scale: float, unit: str) -> str:
    """The oblivious and the adaptive worst case of each defense in words."""
    found = {(d, k): v for d, k, v in zip(worst["defense"], worst["level"], worst["value"], strict=True)}
    parts = [
        f"{d} {found[d, 'oblivious'] * scale:.1f} to {found[d, ADAPTIVE] * scale:.1f}"
        for d in defenses
        if (d, "oblivious") in found and (d, ADAPTIVE) in found
    ]
    return f"From oblivious to adaptive{' (%)' if unit == '%' else ''}: {', '.join(parts)}." if parts else ""


# -- clean against robust -------------------------------------------------------------------------------------------
def _scatter(part: pd.DataFrame) -> Iterator[Plot]:
    worst = _worst(part)
    level = next((k for k in reversed(LEVEL_MARKERS) if k != "clean" and (worst["level"] == k).any()), None)
    if level is None:
        return
    clean = worst[worst["level"] == "clean"].set_index("defense")
    robust = worst[worst["level"] == level].set_index("defense")
    names = [d for d in dict.fromkeys(part["defense"]) if d in clean.index and d in robust.index]
    if len(names) < 2:
        return
    role, scale, label = _about(part)
    figure, axes = _figure(4.8, 3.9)
    for place, name in enumerate(names):
        x, y = clean.loc[name], robust.loc[name]
        color = COLORS[place % len(COLORS)]
        axes.errorbar(
            x["value"] * scale, y["value"] * scale,
            xerr=[[(x["value"] - x["low"]) * scale], [(x["high"] - x["value"]) * scale]],
            yerr=[[(y["value"] - y["low"]) * scale], [(y["high"] - y["value"]) * scale]],
            fmt=MARKERS[place % len(MARKERS)], color=color, markersize=7, linewidth=0.6, label=_short(name),
        )  # fmt: skip
    axes.set_xlabel(f"clean {label}")
    axes.set_ylabel(f"{level} worst case {label}")
    _legend(figure, axes)
    points = ", ".join(
        f"{d} {clean.loc[d, 'value'] * scale:.1f} and {robust.loc[d, 'value'] * scale:.1f}" for d in names
    )
    yield _finish(
        figure,
        f"scatter-{role}",
        "scatter",
        _titled(role, worst),
        f"{label}, clean and {level} worst case: {points}.",
    )


# -- sweeps ---------------------------------------------------------------------------------------------------------
def _number(value: Any) -> float | None:
    try:
        return float(Fraction(str(value)))
    except (ValueError, ZeroDivisionError):
        return None


def _sweeps(main: pd.DataFrame, key: str) -> Iterator[Plot]:
    """Score against `key` of attacks that agree in every parameter but it (and the step size that follows it)."""
    groups: dict[tuple[str, ...], list[tuple[float, Mapping[str, Any]]]] = {}
    for record in main.to_dict("records"):
        line = {str(k): v for k, v in record.items()}
        params = parameters(line, "attack_params")
        at = _number(params.get(key))
        if line["attack"] in ("clean", WORST) or at is None:
            continue
        same = json.dumps({k: v for k, v in params.items() if k not in (key, "alpha")}, sort_keys=True)
        group = (
            str(line["role"]),
            str(line.get("attack_name") or line["attack"]),
            str(line["level_label"]),
            same,
        )
        groups.setdefault(group, []).append((at, line))
    sweeps: dict[tuple[str, ...], dict[str, dict[float, Mapping[str, Any]]]] = {}
    alike: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for which, points in groups.items():
        by_defense: dict[str, dict[float, Mapping[str, Any]]] = {}
        for at, point in points:
            by_defense.setdefault(str(point["defense"]), {}).setdefault(at, point)
        if max(map(len, by_defense.values())) >= 3:
            sweeps[which] = by_defense
            alike.setdefault(which[:3], []).append(json.loads(which[3]))
    named: dict[str, int] = {}
    for (role, attack, level, same), series in sweeps.items():
        attack += _apart(json.loads(same), alike[role, attack, level])
        part = main[main["role"] == role]
        _, scale, label = _about(part)
        clean = part[part["attack"] == "clean"].set_index("defense")["value"]
        figure, axes = _figure(4.8, 3.9)
        words = []
        for place, (defense, found) in enumerate(series.items()):
            xs = sorted(found)
            ys, low, high = ([found[x][c] * scale for x in xs] for c in ("value", "low", "high"))
            color = COLORS[place % len(COLORS)]
            axes.fill_between(_shown(xs, key), low, high, color=color, alpha=0.12, linewidth=0)
            words.append(
                f"{defense} "
                + ", ".join(f"{y:.1f} at {x:.3g}" for x, y in zip(_shown(xs, key), ys, strict=True))
            )
            if key == "eps" and defense in clean and xs[0] > 0:
                xs, ys = [0.0, *xs], [float(clean[defense]) * scale, *ys]
            axes.plot(
                _shown(xs, key), ys, marker=MARKERS[place % len(MARKERS)], color=color, markersize=6,
                linestyle=DASHES[place % len(DASHES)], linewidth=1.3, label=_short(defense),
            )  # fmt: skip
        axes.set_xlabel("eps (of 255); 0 = clean" if key == "eps" else "steps")
        axes.set_ylabel(label)
        _legend(figure, axes)
        name = _file(f"{key}-{role}-{attack}-{level}")
        named[name] = named.get(name, 0) + 1
        name += f"-{named[name]}" if named[name] > 1 else ""
        title = f"{role}: {attack}, {level}"
        yield _finish(figure, name, "sweep", title, f"{label} against {key}: {'; '.join(words)}.")


def _apart(params: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """What tells an attack's parameters from those of its namesakes, in words: " (target next)"."""
    known = dict.fromkeys(name for other in others for name in other)
    names = [name for name in known if any(other.get(name) != params.get(name) for other in others)]
    words = [f"no {name}" if params.get(name) is None else f"{name} {params[name]}" for name in names]
    return f" ({', '.join(words)})" if words else ""


def _shown(xs: Sequence[float], key: str) -> list[float]:
    return [x * 255 for x in xs] if key == "eps" else list(xs)


# -- shared ---------------------------------------------------------------------------------------------------------
def _about(part: pd.DataFrame) -> tuple[str, float, str]:
    """Role, scale and axis label."""
    line = part.iloc[0]
    unit = str(line["unit"])
    arrow = "↑" if bool(line["higher_is_better"]) else "↓"
    label = f"{line['metric']}{f' ({unit})' if unit else ''} {arrow}"
    return str(line["role"]), percent(unit), label


def _titled(role: str, worst: pd.DataFrame) -> str:
    """The role, with a warning where its adaptive attacker knows nothing of the defense."""
    return role if worst["level"].isin(KNOWING).any() else f"{role} (no attacker who knows the defense)"


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def _file(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    def make() -> tuple[Figure, Axes]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()

    made: tuple[Figure, Axes] = styled(make)
    return made


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    styled(
        lambda: figure.legend(
            handles,
            labels,
            loc="outside upper center",
            ncols=3,
            fontsize=9,
            handletextpad=0.4,
            columnspacing=1.2,
        )
    )


def _finish(figure: Figure, name: str, kind: str, title: str, text: str) -> Plot:
    svg, png = rendered(figure, name)
    return Plot(_file(name), kind, title, text, svg.decode(), png)
