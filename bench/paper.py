"""The papers' tables: every printed number, in the paper's own layout, and our numbers beside them.

`results/paper/PAPER.csv` holds one line a printed cell, `results/paper/tables.yaml` how the paper arranges and marks
them; `results/paper/README.md` says what a column means. A table is named PAPER/TABLE, such as cafd/table1.
"""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from bench.errors import GridError, unknown
from bench.files import write_text

if TYPE_CHECKING:
    import pandas as pd

    from bench.tables import Table

__all__ = [
    "LEVEL_OF",
    "PAPERS",
    "Layout",
    "PrintedCell",
    "PrintedPanel",
    "PrintedTable",
    "Value",
    "agreement",
    "compare",
    "comparison_markdown",
    "frame_metric",
    "layout",
    "no_grid",
    "not_covered",
    "only_on",
    "paper_app",
    "printed_table",
    "render",
    "table_ids",
    "values",
]

ROOT = Path(__file__).resolve().parent.parent / "results" / "paper"
PAPERS = ("cafd", "alignment", "nrp", "hgd")
FORMATS = ("markdown", "csv", "latex", "html")

LEVEL_OF = {
    "clean": "clean",
    "oblivious": "oblivious",
    "black_box": "transfer",
    "bpda": "bpda",
    "white_box_adaptive": "white_box",
    "gray_box": "gray_box",
    # The defense was made for another model; the attacker still sees the bare target.
    "cross_model": "oblivious",
    "model_transfer": "oblivious",
}
"""The papers' threat models -> threat levels of the frame."""

_METRICS = {
    "accuracy_percent": ("accuracy", "accuracy (%)"),
    "error_rate_percent": ("error_rate", "error rate (%)"),
    "attack_success_percent": ("error_rate", "attack success (%)"),
    "miou_percent": ("miou", "mIoU (%)"),
    "map_percent": ("box_map50", "mAP (%)"),
    "top1": ("accuracy", "top-1 accuracy (%)"),
    "top5": ("top5", "top-5 accuracy (%)"),
    "l1_denoising_loss": ("denoising_loss", "L1 denoising loss"),
    "normalized_score": (None, "normalized score"),
    "seconds": (None, "seconds"),
    "rank": (None, "rank"),
}


# -- values ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Value:
    """One printed cell.

    Attributes:
        paper, table: where it stands.
        task, dataset, target_model: what is evaluated; empty where the paper does not say.
        source_model: where gradients, or the defense's training, come from when that is another model.
        threat: one of `LEVEL_OF`.
        defense, attack: our ids; `defense_label` and `attack_label` as printed.
        eps: L-infinity budget in units of 1/255, as text; empty for clean images and other norms.
        metric: unit included, such as error_rate_percent.
        higher_is_better: from the defender's side.
        text: the number as printed; empty for a dash and where the source text is illegible.
        provenance: printed; cleaned (stray marks removed, digits intact); other table (damaged here, taken from the
            same cell printed elsewhere); dash (not reported); illegible.
        note: what else a reader should know.
    """

    paper: str
    table: str
    task: str
    dataset: str
    target_model: str
    source_model: str
    threat: str
    defense: str
    defense_label: str
    attack: str
    attack_label: str
    eps: str
    metric: str
    higher_is_better: bool
    text: str
    provenance: str
    note: str

    @property
    def number(self) -> float:
        """The printed number; NaN where there is none."""
        return float(self.text) if self.text else math.nan

    @property
    def level(self) -> str:
        """Threat level in the frame's words."""
        return LEVEL_OF[self.threat]


@lru_cache
def values(paper: str) -> tuple[Value, ...]:
    """All printed cells of a paper, table by table, row by row.

    Raises:
        GridError: no such paper.
    """
    if paper not in PAPERS:
        raise GridError(unknown("paper", paper, PAPERS))
    with (ROOT / f"{paper}.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Value(
                paper=paper,
                higher_is_better=line.pop("higher_is_better") == "true",
                text=line.pop("value"),
                **line,
            )
            for line in csv.DictReader(file)
        )


@lru_cache
def _uncovered() -> Mapping[str, Sequence[Mapping[str, Any]]]:
    from bench.grid import read_yaml

    file = ROOT / "not_covered.yaml"
    return read_yaml(file) if file.is_file() else {}


def not_covered(value: Value) -> str | None:
    """Why no grid measures a printed cell; None where one does, be it on one profile alone."""
    entry = _entry(value)
    return None if entry is None or "profile" in entry else str(entry["reason"])


def only_on(value: Value) -> str | None:
    """The one profile on which a grid measures a printed cell; None where it does on others too, or nowhere."""
    entry = _entry(value)
    return None if entry is None or "profile" not in entry else str(entry["profile"])


def _entry(value: Value) -> Mapping[str, Any] | None:
    for entry in _uncovered().get(f"{value.paper}/{value.table}", ()):
        wanted = entry["where"].items()
        if all(getattr(value, k) in (v if isinstance(v, list) else [v]) for k, v in wanted):
            return entry
    return None


def frame_metric(value: Value) -> str | None:
    """The metric of the frame that measures what a printed cell does; None where there is none."""
    if value.task == "segmentation" and value.metric == "accuracy_percent":
        return "pixel_accuracy"
    if value.task == "instance_segmentation" and value.metric == "map_percent":
        return "mask_map50"
    return _METRICS[value.metric][0]


# -- layout ---------------------------------------------------------------------------------------------------------
Where = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Marks:
    """Which values a table sets off; the keys of `marks` in tables.yaml."""

    best: bool = False
    second: bool = False
    within: Sequence[str] = ()
    exclude: Where = field(default_factory=dict)
    pick: str = ""
    basis: str = "none"


@dataclass(frozen=True)
class Part:
    """A part of a table with a heading of its own; a panel in tables.yaml."""

    title: str = ""
    corner: Sequence[str] | None = None
    where: Where = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """How one table is printed; the keys of tables.yaml."""

    id: str
    paper: str
    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    corner: Sequence[str] = ("",)
    over: Sequence[str] = ()
    names: Mapping[str, Mapping[str, str | Sequence[str]]] = field(default_factory=dict)
    panels: Sequence[Part] = (Part(),)
    suffix: Sequence[Mapping[str, Any]] = ()
    marks: Marks = field(default_factory=Marks)
    notes: Sequence[str] = ()

    def label(self, value: Value, axis: Sequence[str]) -> tuple[str, ...]:
        """A value's header labels along `rows` or `columns`, outermost first."""
        found: list[str] = []
        for name in axis:
            raw = getattr(value, name)
            shown = self.names.get(name, {}).get(raw, raw)
            found.extend([shown] if isinstance(shown, str) else shown)
        return tuple(found)


@lru_cache
def _layouts() -> dict[str, Layout]:
    from bench.grid import read_yaml

    found: dict[str, Layout] = {}
    for paper, book in read_yaml(ROOT / "tables.yaml").items():
        shared = {key: book[key] for key in ("corner", "rows", "columns", "names", "suffix") if key in book}
        for table, own in book["tables"].items():
            spec = {**shared, **own}
            spec["names"] = {**shared.get("names", {}), **own.get("names", {})}
            spec["panels"] = tuple(Part(**panel) for panel in own.get("panels", ({},)))
            spec["marks"] = Marks(**own.get("marks", {}))
            number = table.removeprefix("table")
            spec["title"] = f"{book['name']}, Table {number}: {own['title']}"
            found[f"{paper}/{table}"] = Layout(id=f"{paper}/{table}", paper=paper, **spec)
    return found


def table_ids() -> tuple[str, ...]:
    """All tables, in the papers' order."""
    return tuple(_layouts())


def layout(id: str) -> Layout:
    """How a table is printed.

    Raises:
        GridError: no such table.
    """
    if id not in _layouts():
        raise GridError(unknown("table", id, _layouts()))
    return _layouts()[id]


def no_grid(name: str) -> str:
    """Why no grid of this name, PAPER_TABLE, can repeat a printed table; "" where nothing is said against it."""
    paper, _, table = name.partition("_")
    id = f"{paper}/{table}"
    whole = [entry["reason"] for entry in _uncovered().get(id, ()) if entry["where"] == {"table": table}]
    if not whole:
        return ""
    return f"no grid repeats {id} ({whole[0]}); `python -m bench paper {id}` prints it"


# -- printed tables -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PrintedCell:
    """A value as the table shows it: `text` with its suffix, – for a dash, ? where the source text is illegible."""

    value: Value
    text: str
    bold: bool = False
    underline: bool = False
    notes: tuple[int, ...] = ()


@dataclass(frozen=True)
class PrintedPanel:
    """A part of a table: `cells[row][column]`, None where the paper has no cell."""

    title: str
    corner: tuple[str, ...]
    columns: tuple[tuple[str, ...], ...]
    rows: tuple[tuple[str, ...], ...]
    cells: tuple[tuple[PrintedCell | None, ...], ...]


@dataclass(frozen=True)
class PrintedTable:
    """A table in the paper's layout.

    Attributes:
        id: PAPER/TABLE.
        title: paper, number and what it shows.
        caption: metrics and threat models.
        over: header lines above all columns.
        panels: its parts, top to bottom.
        footnotes: how damaged cells were read; `PrintedCell.notes` counts them from 1.
        notes: slips of the paper and choices of ours.
    """

    id: str
    title: str
    caption: str
    over: tuple[str, ...]
    panels: tuple[PrintedPanel, ...]
    footnotes: tuple[str, ...]
    notes: tuple[str, ...]


def printed_table(id: str) -> PrintedTable:
    """A table of a paper as it is printed.

    Raises:
        GridError: no such table.
    """
    spec = layout(id)
    chosen = [value for value in values(spec.paper) if f"{spec.paper}/{value.table}" == id]
    footnotes: dict[str, int] = {}
    panels = []
    for part in spec.panels:
        inside = [value for value in chosen if _matches(value, part.where)]
        grid = {(spec.label(v, spec.rows), spec.label(v, spec.columns)): v for v in inside}
        if len(grid) < len(inside):
            raise ValueError(f"{id}: {len(inside)} values for {len(grid)} cells")
        marked = _marked(spec, inside)
        rows = tuple(dict.fromkeys(row for row, _ in grid))
        columns = tuple(dict.fromkeys(column for _, column in grid))
        cells = tuple(
            tuple(
                _cell(spec, grid[row, column], marked, footnotes) if (row, column) in grid else None
                for column in columns
            )
            for row in rows
        )
        panels.append(PrintedPanel(part.title, tuple(part.corner or spec.corner), columns, rows, cells))
    return PrintedTable(
        id, spec.title, _caption(chosen), tuple(spec.over), tuple(panels), tuple(footnotes), tuple(spec.notes)
    )


def _matches(value: Value, where: Where) -> bool:
    return all(getattr(value, name) in wanted for name, wanted in where.items())


def _marked(spec: Layout, inside: Sequence[Value]) -> dict[Value, str]:
    """Value -> best or second. Equal values share a mark; the second is the next value after the best."""
    marks, found = spec.marks, {}
    groups: dict[tuple[str, ...], list[Value]] = {}
    for value in inside if marks.best else ():
        if value.text and not (marks.exclude and _matches(value, marks.exclude)):
            key = (*spec.label(value, spec.columns), *(getattr(value, name) for name in marks.within))
            groups.setdefault(key, []).append(value)
    for rivals in groups.values():
        high = marks.pick == "high" if marks.pick else rivals[0].higher_is_better
        ranked = sorted({value.number for value in rivals}, reverse=high)
        names = dict(zip(ranked, ("best", "second") if marks.second else ("best",), strict=False))
        found.update({value: names[value.number] for value in rivals if value.number in names})
    return found


def _cell(spec: Layout, value: Value, marked: Mapping[Value, str], footnotes: dict[str, int]) -> PrintedCell:
    text = value.text + "".join(rule["text"] for rule in spec.suffix if _matches(value, rule["where"]))
    notes: tuple[int, ...] = ()
    if value.provenance == "dash":
        text = "–"
    elif value.provenance == "illegible":
        text = "?"
    if value.provenance not in ("printed", "dash"):
        notes = (footnotes.setdefault(value.note, len(footnotes) + 1),)
    mark = marked.get(value)
    return PrintedCell(value, text, bold=mark == "best", underline=mark == "second", notes=notes)


def _caption(chosen: Sequence[Value]) -> str:
    parts = []
    for higher in (True, False):
        metrics = dict.fromkeys(
            _METRICS[v.metric][1] for v in chosen if v.higher_is_better is higher and v.metric != "rank"
        )
        if metrics:
            parts.append(
                f"{', '.join(metrics)}: {'higher' if higher else 'lower'} is better for the defender"
            )
    threats = dict.fromkeys(v.threat.replace("_", " ") for v in chosen)
    return "; ".join([*parts, f"threat model: {', '.join(threats)}"])


# -- writers --------------------------------------------------------------------------------------------------------
def render(id: str, format: str = "markdown") -> str:
    """A table of a paper as text: markdown, latex and html in its layout, csv as plain numbers.

    Raises:
        GridError: no such table or format.
    """
    if format not in FORMATS:
        raise GridError(unknown("format", format, FORMATS))
    table = printed_table(id)
    if format == "markdown":
        return _markdown(table)
    if format == "csv":
        return _csv(table)
    from bench.tables import write_table

    return "\n".join(write_table(part, format) for part in _plain_tables(table))


def _markdown(table: PrintedTable) -> str:
    """Header levels below the first are rows in bold, and so are the titles of parts: markdown has one header row."""
    from bench.tables import Entry

    blocks: list[list[list[str]]] = []
    previous: tuple[Any, ...] = ()
    for panel in table.panels:
        heads = (panel.corner, panel.columns)
        if heads != previous:
            blocks.append(_header(table.over, panel))
        previous = heads
        width = len(panel.corner) + len(panel.columns)
        if panel.title:
            blocks[-1].append([f"**{panel.title}**"] + [""] * (width - 1))
        for labels, cells in zip(_merged(panel.rows), panel.cells, strict=True):
            shown = [
                ""
                if c is None
                else Entry(c.text, bold=c.bold, underline=c.underline, notes=c.notes).markdown()
                for c in cells
            ]
            blocks[-1].append([*labels, *shown])
    texts = [_pipe(block, len(table.panels[0].corner)) for block in blocks]
    foot = "  \n".join(f"{Entry('', notes=(i,)).marks()} {text}" for i, text in enumerate(table.footnotes, 1))
    notes = "\n".join(f"- {text}" for text in table.notes)
    parts = [f"### {table.title}", table.caption, *texts, foot, notes]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(over: Sequence[str], panel: PrintedPanel) -> list[list[str]]:
    depth = len(panel.columns[0])
    lines = [[head] + [""] * (len(panel.columns) - 1) for head in over]
    merged = list(_merged(panel.columns))
    lines += [[labels[level] for labels in merged] for level in range(depth)]
    lines = [line for line in lines if any(line)]
    stub = [list(panel.corner)] + [[""] * len(panel.corner)] * (len(lines) - 1)
    rows = [[*left, *right] for left, right in zip(stub, lines, strict=True)]
    return [rows[0], *([f"**{text}**" if text else "" for text in row] for row in rows[1:])]


def _merged(keys: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Header tuples in which a label that continues the one before it is left blank; the innermost always shows."""
    previous: tuple[str, ...] = ()
    for key in keys:
        yield tuple(
            "" if i + 1 < len(key) and previous[: i + 1] == key[: i + 1] else label
            for i, label in enumerate(key)
        )
        previous = key


def _pipe(rows: Sequence[Sequence[str]], stub: int) -> str:
    from tabulate import tabulate

    escaped = [[text.replace("|", "\\|") for text in row] for row in rows]
    align = ["left"] * stub + ["right"] * (len(rows[0]) - stub)
    return tabulate(escaped[1:], headers=escaped[0], tablefmt="pipe", disable_numparse=True, colalign=align)


def _csv(table: PrintedTable) -> str:
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    titled = any(panel.title for panel in table.panels)
    previous: tuple[Any, ...] = ()
    for panel in table.panels:
        heads = (panel.corner, panel.columns)
        if heads != previous:
            flat = [" / ".join(part for part in column if part) for column in panel.columns]
            writer.writerow([*(["part"] if titled else []), *panel.corner, *flat])
        previous = heads
        for labels, cells in zip(panel.rows, panel.cells, strict=True):
            numbers = ["" if cell is None else cell.value.text for cell in cells]
            writer.writerow([*([panel.title] if titled else []), *labels, *numbers])
    return sink.getvalue()


def _plain_tables(table: PrintedTable) -> list[Table]:
    """One table a part, for the writers of `bench.tables`."""
    import pandas as pd

    from bench.tables import Entry, Table

    found = []
    for index, panel in enumerate(table.panels):
        last = index + 1 == len(table.panels)
        columns = [(*table.over, *column) for column in panel.columns]
        entries = {
            (row, column): Entry(c.text, c.value.number, c.bold, c.underline, notes=c.notes)
            for row, cells in zip(panel.rows, panel.cells, strict=True)
            for column, c in zip(columns, cells, strict=True)
            if c is not None
        }
        found.append(
            Table(
                name=table.id.replace("/", "_") + (f"_{index + 1}" if len(table.panels) > 1 else ""),
                title=table.title + (f" ({panel.title})" if panel.title else ""),
                caption=table.caption,
                row_names=panel.corner,
                rows=panel.rows,
                column_names=("",) * len(columns[0]),
                columns=tuple(columns),
                entries=entries,
                notes=(*table.footnotes, *table.notes) if last else (),
                level=None,
                lines=pd.DataFrame(),
            )
        )
    return found


# -- our numbers beside the paper's ---------------------------------------------------------------------------------
_MAIN = {
    "role": ("target_model",),
    "model": ("target_model",),
    "dataset": ("dataset",),
    "defense": ("defense_label", "defense"),
    "attack": ("attack_label", "attack"),
    "level": ("threat",),
    "level_label": ("threat",),
    "metric": ("metric",),
}
"""Columns of the frame -> fields of a value that one of their labels may name."""


def compare(
    frame: pd.DataFrame, mapping: Mapping[str, Any], left_out: Mapping[str, Collection[str]] | None = None
) -> pd.DataFrame:
    """Measured and printed numbers, cell for cell.

    A line of the frame meets the printed value that has its threat level and metric and whatever `mapping` says of its
    labels. Lines whose label a mapped column does not list are left out, and so are printed values without a line.
    Where several attacks meet a value that the paper prints as their mean, `mean: true` compares their mean.

    Args:
        frame: lines of `bench.frame.cell_frame`.
        mapping: the key `paper` of a grid's table. `table`: PAPER/TABLE. `where`: field of a printed value -> what all
            have (a value or a list). `mean`: see above. `role`, `dataset`, `model`, `defense`, `attack`, `level`,
            `level_label` and `metric`: our label -> the paper's label or id, or several fields: {dataset: CIFAR-10,
            eps: 8}.
        left_out: of `bench.plan.Plan`: labels that a mapping may have although no line does, since its profile has not.

    Returns:
        One line a cell, in printed order: part, row, column (as printed), role, defense, attack, level, metric, seed,
        image_format, measured, low, high, n, status, paper, difference, undefended, gain, paper_gain, profile. Numbers
        are in points where the metric is in percent; `difference` is measured minus paper; `undefended` marks cells
        without a defense, and the gains are what lies between a cell and the undefended one under the same attack on
        the same model (defended minus undefended), NaN where the table has none; `target` is that model as the paper
        prints it, with its data. The interval of a mean is as wide as if all attacks erred together.

    Raises:
        GridError: an unknown table, key, field or label, or a line that meets several values.
    """
    import pandas as pd

    id, mean, fixed, columns = _mapping(mapping)
    spec = layout(id)
    printed = [v for v in values(spec.paper) if f"{v.paper}/{v.table}" == id]
    known = {column: {str(label) for label in frame[column].unique()} for column in columns}
    for column in columns:
        known[column] |= set((left_out or {}).get(column, ()))
    for column, labels in columns.items():
        for label, wanted in labels.items():
            if label not in known[column]:
                raise GridError(f"paper: {column}: {unknown('label', label, known[column])}")
            _check_known(printed, wanted, f"paper: {column}: {label}")
    _check_known(printed, fixed, "paper: where")
    printed = [value for value in printed if _meets(value, fixed)]
    order = {value: index for index, value in enumerate(printed)}
    found: list[tuple[Value, dict[str, Any]]] = []
    for line in frame.to_dict("records"):
        if any(str(line[column]) not in labels for column, labels in columns.items()):
            continue
        selectors = [labels[str(line[column])] for column, labels in columns.items()]
        met = [
            value
            for value in printed
            if all(_meets(value, selector) for selector in selectors)
            and ("level" in columns or "level_label" in columns or value.level == line["level"])
            and ("metric" in columns or frame_metric(value) == line["metric"])
        ]
        if len(met) > 1:
            place = ", ".join(
                f"{name} {line[name]}" for name in ("role", "defense", "attack", "level", "metric")
            )
            shown = " and ".join(_place(spec, value) for value in met[:2])
            raise GridError(
                f"paper: {place} meets {len(met)} values of {id}: {shown}; tell them apart in where"
            )
        if met:
            found.append((met[0], _compared(spec, met[0], line)))
    if mean:
        found = _means(found)
    found.sort(key=lambda item: order[item[0]])
    bare = {_setting(value, row): row for value, row in found if row["undefended"]}
    for value, row in found:
        base = bare.get(_setting(value, row))
        for name, number in (("gain", "measured"), ("paper_gain", "paper")):
            row[name] = math.nan if base is None or base is row else row[number] - base[number]
    return pd.DataFrame([row for _, row in found], columns=_COMPARED)


_COMPARED = [
    "part", "row", "column", "role", "defense", "attack", "level", "metric", "seed", "image_format", "measured", "low",
    "high", "n", "status", "paper", "difference", "undefended", "gain", "paper_gain", "target", "percent",
    "profile",
]  # fmt: skip
_Meeting = Mapping[tuple[str, ...], Sequence[str]]


def _mapping(mapping: Mapping[str, Any]) -> tuple[str, bool, _Meeting, dict[str, dict[str, _Meeting]]]:
    """Table, whether values are means, what all values have, and for each mapped column what a label means."""
    for key in mapping:
        if key not in (known := ("table", "where", "mean", *_MAIN)):
            raise GridError(f"paper: {unknown('key', str(key), known)}")
    if "table" not in mapping:
        raise GridError("paper: this key is required: table, such as cafd/table1")
    columns = {
        column: {str(label): _meeting(column, wanted) for label, wanted in mapping[column].items()}
        for column in _MAIN
        if column in mapping
    }
    mean = mapping.get("mean", False)
    if not isinstance(mean, bool):
        raise GridError(f"paper: mean: expected true or false, got {mean!r}")
    return str(mapping["table"]), mean, _meeting("where", mapping.get("where", {})), columns


def _meeting(column: str, wanted: Any) -> _Meeting:
    """Fields, any of which must have one of the values."""

    def listed(value: Any) -> list[str]:
        return [str(item) for item in (value if isinstance(value, list) else [value])]

    if not isinstance(wanted, Mapping):
        if column == "where":
            raise GridError("paper: where: expected fields of a printed value, such as {dataset: CIFAR-10}")
        return {_MAIN[column]: listed(wanted)}
    for name in wanted:
        if name not in _FIELDS:
            raise GridError(f"paper: {column}: {unknown('field', str(name), _FIELDS)}")
    return {(str(name),): listed(value) for name, value in wanted.items()}


_FIELDS = (
    "task", "dataset", "target_model", "source_model", "threat", "defense", "defense_label", "attack", "attack_label",
    "eps", "metric",
)  # fmt: skip


def _meets(value: Value, wanted: _Meeting) -> bool:
    return all(any(getattr(value, name) in options for name in names) for names, options in wanted.items())


def _check_known(printed: Sequence[Value], wanted: _Meeting, where: str) -> None:
    for names, options in wanted.items():
        for option in options:
            if not any(getattr(value, name) == option for value in printed for name in names):
                there = {getattr(value, names[0]) for value in printed}
                raise GridError(f"{where}: {unknown(names[0].replace('_', ' '), option, there)}")


def _place(spec: Layout, value: Value) -> str:
    labels = [*spec.label(value, spec.rows), *spec.label(value, spec.columns)]
    part = [part.title for part in spec.panels if part.title and _matches(value, part.where)]
    return " / ".join([*part, *(label for label in labels if label)])


def _means(found: Sequence[tuple[Value, dict[str, Any]]]) -> list[tuple[Value, dict[str, Any]]]:
    """One row in place of all that meet the same value on the same role."""
    groups: dict[tuple[Any, ...], list[tuple[Value, dict[str, Any]]]] = {}
    for value, row in found:
        groups.setdefault((value, row["role"], row["seed"], row["image_format"]), []).append((value, row))
    out = []
    for members in groups.values():
        value, rows = members[0][0], [row for _, row in members]
        mean = {
            name: math.fsum(row[name] for row in rows) / len(rows) for name in ("measured", "low", "high")
        }
        text = {name: "+".join(dict.fromkeys(row[name] for row in rows)) for name in ("attack", "level")}
        open_ = next((row["status"] for row in rows if row["status"] != "ok"), "ok")
        out.append(
            (
                value,
                {
                    **rows[0], **mean, **text, "n": min(row["n"] for row in rows), "status": open_,
                    "difference": mean["measured"] - value.number,
                },
            )
        )  # fmt: skip
    return out


def _setting(value: Value, row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a defended cell and its undefended one share; a retrained model is a defense of the same model."""
    ours = (row["seed"], row["image_format"])
    return (value.dataset, value.target_model, value.attack, value.eps, value.metric, *ours)


def _compared(spec: Layout, value: Value, line: Mapping[Any, Any]) -> dict[str, Any]:
    scale = 100.0 if line["unit"] == "%" else 1.0
    finished = line["status"] in ("ok", "partial")
    measured = float(line["value"]) * scale if finished else math.nan
    return {
        "part": next((part.title for part in spec.panels if _matches(value, part.where)), ""),
        "row": " / ".join(filter(None, spec.label(value, spec.rows))),
        "column": " / ".join(filter(None, spec.label(value, spec.columns))),
        **{name: str(line[name]) for name in ("role", "defense", "attack", "level", "metric", "image_format")},
        "seed": int(line["seed"]), "measured": measured, "low": float(line["low"]) * scale,
        "high": float(line["high"]) * scale, "n": int(line["n"]), "status": str(line["status"]),
        "paper": value.number, "difference": measured - value.number, "undefended": value.defense == "none",
        "target": " ".join(filter(None, [value.dataset, value.target_model])),
        "percent": line["unit"] == "%", "profile": str(line.get("profile", "")),
    }  # fmt: skip


def agreement(compared: pd.DataFrame) -> pd.DataFrame:
    """Whether the numbers of `compare` are in the paper's order, column by column.

    On data and models other than the paper's, absolute numbers mean nothing; which defense is ahead of which, and
    whether a defense is ahead of none, can still be compared.

    Returns:
        One line a printed column with something to compare (and target, seed and image format): part, column, target,
        seed, image_format, rows (with both numbers), pairs (of rows that differ in the paper), same_order (of them,
        those we have in the same order), ties (of them, those we have equal), tau (Kendall's tau-b, NaN without an
        order), signs (defended rows that differ from their undefended cell in the paper) and same_sign (of them, those
        we have on the same side); both are 0 where the paper prints no undefended cell.
    """
    import pandas as pd
    from scipy.stats import kendalltau

    keys = ["part", "column", "target", "seed", "image_format"]
    both = compared[compared["measured"].notna() & compared["paper"].notna()]
    rows = []
    for key, group in both.groupby(keys, sort=False):
        ours, theirs = list(group["measured"]), list(group["paper"])
        pairs = [
            (_sign(ours[i] - ours[j]), _sign(theirs[i] - theirs[j]))
            for i in range(len(ours))
            for j in range(i)
            if theirs[i] != theirs[j]
        ]
        gains = group[group["gain"].notna() & group["paper_gain"].notna() & (group["paper_gain"] != 0)]
        signs = [(_sign(a), _sign(b)) for a, b in zip(gains["gain"], gains["paper_gain"], strict=True)]
        if len(ours) < 2 and not signs:
            continue
        tau = float(kendalltau(ours, theirs).statistic) if len(ours) > 1 else math.nan
        rows.append(
            {
                **dict(zip(keys, key, strict=True)), "rows": len(ours), "pairs": len(pairs),
                "same_order": sum(a == b for a, b in pairs), "ties": sum(a == 0 for a, _ in pairs), "tau": tau,
                "signs": len(signs),
                "same_sign": sum(a == b for a, b in signs),
            }
        )  # fmt: skip
    columns = [*keys, "rows", "pairs", "same_order", "ties", "tau", "signs", "same_sign"]
    return pd.DataFrame(rows, columns=columns)


def _sign(value: float) -> int:
    return int(value > 0) - int(value < 0)


def comparison_markdown(compared: pd.DataFrame, absolute: bool | None = None) -> str:
    """What `compare` found: measured, paper's and difference per cell, or only order and sign where no more means much.

    Args:
        compared: of `compare`.
        absolute: numbers may be subtracted; None = where every line comes from the profile `paper`.
    """
    from tabulate import tabulate

    if absolute is None:
        absolute = bool(len(compared)) and set(compared["profile"]) == {"paper"}

    def shown(rows: list[list[str]], heads: list[str], texts: int) -> str:
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        align = ["left"] * texts + ["right"] * (len(heads) - texts)
        return tabulate(escaped, headers=heads, tablefmt="pipe", disable_numparse=True, colalign=align)

    def number(value: float, form: str = ".2f") -> str:
        return "–" if math.isnan(value) else f"{value:{form}}"

    heads = ["part", "row", "column", "our defense", "our attack", "level", "measured", "95 %", "n", "paper"]
    rows = []
    for line in compared.to_dict("records"):
        finished = not math.isnan(line["measured"])
        # Points with two decimals; what is no percentage, such as a loss, with four.
        form = f".{2 if line['percent'] else 4}f"
        interval = f"[{line['low']:{form}}, {line['high']:{form}}]" if finished else str(line["status"])
        row = [line["part"], line["row"], line["column"], line["defense"], line["attack"], line["level"]]
        row += [number(line["measured"], form), interval, str(line["n"]), number(line["paper"], form)]
        rows.append([*row, number(line["difference"], f"+{form}")] if absolute else row)
    if absolute:
        return shown(rows, [*heads, "difference"], 6) + "\n"
    profiles = ", ".join(sorted(set(compared["profile"]))) or "none"
    why = f"Other data and models than the paper's (profile {profiles}): absolute numbers mean nothing here"
    found = agreement(compared)
    if found.empty:
        return (
            f"{why}, and no column has two rows whose order could be compared.\n\n{shown(rows, heads, 6)}\n"
        )
    orders = [
        [
            line["part"], line["column"], line["target"], str(line["rows"]),
            f"{line['same_order']} of {line['pairs']}", str(line["ties"]), number(line["tau"]),
            f"{line['same_sign']} of {line['signs']}" if line["signs"] else "–",
        ]
        for line in found.to_dict("records")
    ]  # fmt: skip
    sums = {name: int(found[name].sum()) for name in ("same_order", "pairs", "ties", "same_sign", "signs")}
    said = (
        f"{why}, so order and sign are compared. Over all columns {sums['same_order']} of {sums['pairs']} pairs of "
        f"rows stand in the paper's order ({sums['ties']} are equal here)"
    )
    if sums["signs"]:
        said += f", and {sums['same_sign']} of {sums['signs']} defended cells are on its side of the undefended one"
    said += "."
    heads_order = [
        "part",
        "column",
        "target",
        "rows",
        "pairs in order",
        "equal here",
        "Kendall's tau",
        "same side of undefended",
    ]
    return "\n\n".join([said, shown(orders, heads_order, 3), shown(rows, heads, 6)]) + "\n"


# -- command line ---------------------------------------------------------------------------------------------------
class _Names(typer.core.TyperGroup):
    """What is no command is the name of a table: `bench paper cafd/table1`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["show", *args]
        return super().resolve_command(ctx, args)


paper_app = typer.Typer(
    cls=_Names,
    no_args_is_help=True,
    help="The papers' tables as printed: `bench paper list`, then `bench paper cafd/table1`.",
)


@paper_app.command("list")
def _list() -> None:
    """All tables with the number of their cells, and of those that no grid measures, or on profile paper alone.

    results/paper/not_covered.yaml has the reasons.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Grid

    heads = ("table", "cells", "of them numbers", "in no grid", "on profile paper alone", "what it shows")
    grid = Grid(*heads, box=None, pad_edge=False)
    for id in table_ids():
        paper, _, table = id.partition("/")
        inside = [value for value in values(paper) if value.table == table]
        numbers = [value for value in inside if value.text]
        left = sum(not_covered(value) is not None for value in numbers)
        there = sum(only_on(value) == "paper" for value in numbers)
        counts = (len(inside), len(numbers), left or "", there or "")
        grid.add_row(id, *map(str, counts), escape(layout(id).title))
    Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 1000).print(grid)


@paper_app.command("show")
def _show(
    name: Annotated[str, typer.Argument(help="PAPER/TABLE of `bench paper list`.")],
    format: Annotated[str, typer.Option("--format", "-f", help=f"{', '.join(FORMATS)}.")] = "markdown",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: print.")
    ] = None,
) -> None:
    """One table in the paper's layout; `bench paper NAME` does the same."""
    write_text(render(name.lower(), format), output)
