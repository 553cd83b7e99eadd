"""The page: lines of the long frame as tables that unfold, around plots and pictures, in one HTML file."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bench.checks import FLAGS
from bench.errors import GridError
from bench.frame import ADAPTIVE, WORST, passes
from bench.plan import Options
from bench.report.plots import KNOWING, Plot, parameters, percent
from bench.tables import LEVELS, Table, TableSpec, build, notes
from bench.written import STATUS, grid_order

if TYPE_CHECKING:
    from bench.grid import Grid

__all__ = ["MEANINGS", "Example", "Pictures", "Source", "render_page"]

MEANINGS = {
    "clean": "not attacked",
    "oblivious": "gradients of the bare model; the attacker does not know there is a defense",
    "transfer": "gradients of other models",
    "gray_box": "gradients of the model behind a defense of the attacker's own, not the deployed one",
    "bpda": "forward through the deployed defense, backward through its differentiable stand-in",
    "white_box": "the true gradient through the deployed defense",
    "adaptive": "per image the worst over all levels and attacks of the grid: what is left in the end",
}
"""Threat levels in the order of what the attacker knows, in words."""


@dataclass(frozen=True)
class Source:
    """Where the lines come from, and so what reproduces them.

    Attributes:
        path: grid file; None when it is not known.
        grid: what is in it.
        profile: as `--profile`; "" = the grid's own, None = as the lines say.
        limit: images per role, as `--limit`.
        plugins: plug-in files, as `--plugin`.
        store: as `--store`; None = the default one.
        without: as `--without`.
    """

    path: Path | None
    grid: Grid | None
    profile: str | None
    limit: int | None
    plugins: tuple[str, ...] = ()
    store: Path | None = None
    without: tuple[str, ...] = ()

    def command(self, verb: str, line: Mapping[str, Any], cell: str = "") -> str:
        """The command line that runs or shows the cell of `line`, for a shell in the project's folder."""
        path = self.path if self.path is not None else Path(f"{line['grid']}.yaml")
        profile = str(line.get("profile") or "") if self.profile is None else self.profile
        options = Options(
            path, profile or None, int(line["seed"]), self.limit, plugins=self.plugins, without=self.without
        )
        given = options.words(self.store)
        return shlex.join(
            ["python", "-m", "bench", verb, *([cell] if cell else []), "--grid", path.as_posix(), *given]
        )


@dataclass(frozen=True)
class Example:
    """One image of one cell.

    Attributes:
        cell: 16 characters of the cell's key.
        image: id of the image.
        panels: from left to right, what each shows and what the model said of it, in words, and the picture of it, as
            a data address; all of one size.
    """

    cell: str
    image: str
    panels: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Pictures:
    """The pictures of a page.

    Attributes:
        examples: one a cell.
        omitted: which cells have none, and why.
        rule: how the image was chosen, in words.
        missing: why there are no pictures at all.
    """

    examples: tuple[Example, ...] = ()
    omitted: tuple[str, ...] = ()
    rule: str = ""
    missing: str = ""


def render_page(
    lines: pd.DataFrame,
    source: Source,
    plots: Sequence[Plot],
    pictures: Pictures,
    versions: Mapping[str, str] | None = None,
) -> str:
    """The HTML page, everything inside.

    Args:
        lines: the long frame, plain columns.
        source: the grid behind it.
        plots: of `bench.report.plots.make_plots`.
        pictures: of cells, and why others have none.
        versions: cell -> what it ran with; None or without a cell = not known.

    Raises:
        StoreError: parameters in the frame that are not JSON.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    # Most cells ran with the same versions: the page says them once.
    sets = list(dict.fromkeys((versions or {}).values()))
    cells = _cells(lines, source, {cell: sets.index(text) + 1 for cell, text in (versions or {}).items()})
    _place(pictures.examples, cells)
    page = environment.get_template("page.html.j2").render(
        title=source.grid.title if source.grid and source.grid.title else str(lines["grid"].iloc[0]),
        grid=", ".join(dict.fromkeys(map(str, lines["grid"]))),
        profile=", ".join(dict.fromkeys(map(str, lines.get("profile", [])))),
        roles=_roles(lines),
        notes=notes(lines),
        cells=cells,
        worst=_worst(cells),
        levels=[level for level in LEVELS if any(c["level"] == level for c in cells)],
        meanings=MEANINGS,
        flags={flag: FLAGS[flag].text if flag in FLAGS else "" for cell in cells for flag in cell["flags"]},
        choices={
            name: list(dict.fromkeys(cell[name] for cell in cells))
            for name in ("role", "defense", "attack", "level", "state", "image_format", "pictured")
        },
        tables=_tables(lines, source),
        plots={kind: [p for p in plots if p.kind == kind] for kind in ("levels", "scatter", "sweep")},
        pictures=pictures,
        versions=sets,
        run=source.command("run", {str(k): v for k, v in lines.iloc[0].items()}),
        known=source.path is not None,
        style=Markup(_text("style.css")),  # noqa: S704
        script=Markup(_text("script.js")),  # noqa: S704
        Markup=Markup,
    )
    return page


def _text(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _place(examples: Sequence[Example], cells: Sequence[dict[str, Any]]) -> None:
    """Each picture into the row of its cell; other rows of the same cell (levels that coincide) name that row."""
    by_cell = {example.cell: example for example in examples}
    first: dict[str, str] = {}
    for cell in cells:
        example = by_cell.get(cell["cell"])
        known = first.get(cell["cell"], "")
        cell["example"] = None if known else example
        cell["same"] = known
        cell["pictured"] = "with a picture" if example else "without"
        if example is not None:
            first.setdefault(cell["cell"], cell["id"])


def _roles(lines: pd.DataFrame) -> list[dict[str, Any]]:
    found = lines.drop_duplicates("role")
    return [
        {k: line[k] for k in ("role", "task", "dataset", "model", "n_total")} for _, line in found.iterrows()
    ]


def _flat(params: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{k} = {v if isinstance(v, str) else json.dumps(v, sort_keys=True)}" for k, v in params.items()
    )


def _defense(params: Mapping[str, Any]) -> str:
    """A defense's identity in words, a chain's members in their order."""
    if "members" in params:
        return ", then ".join(_defense(member) for member in params["members"])
    inner = _flat(params.get("params", {}))
    rest = _flat({k: v for k, v in params.items() if k not in ("name", "params")})
    return f"{params.get('name', '')}({inner})" + (f" [{rest}]" if rest else "")


def _cells(lines: pd.DataFrame, source: Source, versions: Mapping[str, int]) -> list[dict[str, Any]]:
    """One entry per cell: its first metric as the row, all metrics and the rest below it."""
    keys = ["grid", "role", "defense", "attack", "level_label", "seed", "image_format"]
    cells = []
    for place, (_, part) in enumerate(lines.groupby(keys, sort=False, observed=True)):
        line = {str(k): v for k, v in part.iloc[0].to_dict().items()}
        worst = line["attack"] == WORST
        attack, defense, weights = (
            parameters(line, c) for c in ("attack_params", "defense_params", "weights")
        )
        details: list[tuple[str, str]] = []
        if worst:
            details.append(("worst of", ", ".join(_behind(lines, line)) or "nothing that finished"))
        elif attack:
            details.append(("attack", f"{line.get('attack_name', '')}({_flat(attack)})"))
        if defense:
            details.append(("defense", _defense(defense)))
        details.append(("model", f"{line['model']} on {line['dataset']}"))
        if weights:
            details.append(("weights", _flat(weights)))
        if line["cell"]:
            details.append(("cost", passes(line)))
            if not _nan(line.get("linf_max")):
                moved = float(line["linf_max"])
                details.append(("moved", f"at most {moved:.6f} ({moved * 255:.2f} of 255) in any pixel"))
            details.append(("key", str(line["cell"])))
        if int(line["repeats"]) > 1:
            details.append(("repeats", f"mean of {line['repeats']} evaluations with draws of their own"))
        if str(line["cell"]) in versions:
            details.append(("versions", f"set {versions[str(line['cell'])]}, written out at the end"))
        cells.append(
            {
                **{k: line[k] for k in (*keys, "level", "cell", "n", "n_total", "task", "reason", "status")},
                "id": f"cell-{place}",
                "worst": worst,
                "state": STATUS[line["status"]] or ("suspect" if line["flags"] else "fine"),
                "flags": list(line["flags"]),
                "metrics": [_metric(m) for m in part.to_dict("records")],
                "details": details,
                "run": source.command("run", line),
                "show": source.command("show", line, str(line["cell"])) if line["cell"] else "",
                "rank": LEVELS.index(line["level"]) if line["level"] in LEVELS else len(LEVELS),
            }
        )
    return cells


def _behind(lines: pd.DataFrame, line: Mapping[str, Any]) -> list[str]:
    """The attacks a worst case is taken over, with their level where it spans several."""
    same = lines[(lines["attack"] != WORST) & (lines["level"] != "clean") & (lines["status"] != "skip")]
    for column in ("grid", "role", "defense", "seed", "image_format"):
        same = same[same[column] == line[column]]
    if line["level"] != ADAPTIVE:
        return list(dict.fromkeys(same[same["level_label"] == line["level_label"]]["attack"]))
    return [
        f"{attack} ({', '.join(dict.fromkeys(part['level_label']))})"
        for attack, part in same.groupby("attack", sort=False)
    ]


def _nan(value: Any) -> bool:
    return value in (None, "", "nan") or (isinstance(value, float) and math.isnan(value))


def _metric(line: Mapping[Any, Any]) -> dict[str, Any]:
    unit = str(line["unit"])
    scale, digits = percent(unit), 1 if unit == "%" else 3
    there = line["status"] in ("ok", "partial") and not _nan(line["value"])

    def text(name: str) -> str:
        return f"{float(line[name]) * scale:.{digits}f}" if there and not _nan(line[name]) else ""

    return {
        "name": line["metric"],
        "label": f"{line['metric']}{f' ({unit})' if unit else ''}",
        "arrow": "↑" if line["higher_is_better"] else "↓",
        "up": bool(line["higher_is_better"]),
        "value": text("value"), "low": text("low"), "high": text("high"), "least": text("value_worst"),
        # Where a bar can be drawn: shares of its length.
        "bar": [round(100 * float(line[k]), 1) for k in ("low", "value", "high")] if there and unit == "%" else [],
    }  # fmt: skip


def _worst(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per role and defense: clean, the worst case of each level, and adaptive, by the first metric.

    Of several sources of transfer (or seeds) the worst is shown.
    """
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for cell in cells:
        if not (cell["worst"] or cell["attack"] == "clean"):
            continue
        key = (cell["grid"], cell["role"], cell["defense"], cell["image_format"])
        row = rows.setdefault(
            key,
            {"role": cell["role"], "defense": cell["defense"], "metric": cell["metrics"][0], "by": {}},
        )
        known = row["by"].get(cell["level"])
        if known is None or _harder(cell, known):
            row["by"][cell["level"]] = cell
    for row in rows.values():
        row["gap"] = _gap(row["by"]) if any(level in row["by"] for level in KNOWING) else ""
    return list(rows.values())


def _gap(by: Mapping[str, Mapping[str, Any]]) -> str:
    """What knowing the defense costs it: adaptive less oblivious, below zero where it is worse for the defender."""
    if "oblivious" not in by or ADAPTIVE not in by:
        return ""
    first, last = by["oblivious"]["metrics"][0], by[ADAPTIVE]["metrics"][0]
    if not (first["value"] and last["value"]):
        return ""
    gap = (float(last["value"]) - float(first["value"])) * (1 if last["up"] else -1)
    return f"{gap:+.{len(last['value'].partition('.')[2])}f}"


def _harder(cell: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    new, old = cell["metrics"][0], known["metrics"][0]
    if not (new["value"] and old["value"]):
        return bool(new["value"])
    return (float(new["value"]) < float(old["value"])) == bool(new["up"])


def _tables(lines: pd.DataFrame, source: Source) -> list[dict[str, Any]]:
    """The grid's own tables as it defines them; none when the grid is not known."""
    found = []
    specs: Sequence[TableSpec] = source.grid.tables if source.grid is not None else ()
    for place, spec in enumerate(specs):
        try:
            table = build(lines, spec, grid_order(lines))
        except GridError:
            # Lines of an older grid file of this name may lack what a table asks for.
            continue
        choices = [list(dict.fromkeys(row[i] for row in table.rows)) for i in range(len(table.row_names))]
        found.append({"id": f"table-{place}", "table": table, "heads": _heads(table), "choices": choices})
    return found


def _heads(table: Table) -> list[list[tuple[str, int]]]:
    """Rows of headings above the innermost one: labels with the number of columns that each spans."""
    heads = []
    for depth in range(len(table.column_names) - 1):
        spans = itertools.groupby(table.columns, key=lambda column: column[: depth + 1])
        heads.append([(outer[-1], len(list(columns))) for outer, columns in spans])
    return heads
