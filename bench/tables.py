"""Tables: pivots of one long frame, written as markdown, csv, latex and html.

The frame has one line per (cell, metric, image format); `COLUMNS` says what a line holds. A `TableSpec`, usually from a
grid, says which lines a table shows and what runs down and across. What a table never does: show a number without its
threat level, put two threat levels or two lines into one number, or leave out a cell without saying why. Files carry
no times, so the same results give the same bytes.
"""

from __future__ import annotations

import html as html_escape
import io
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from tabulate import tabulate

from bench.checks import FLAGS
from bench.errors import GridError, StoreError, unknown
from bench.files import save

__all__ = [
    "COLUMNS",
    "FORMATS",
    "LEVELS",
    "WORST_CASE",
    "Entry",
    "Table",
    "TableSpec",
    "build",
    "complete",
    "long_csv",
    "markdown",
    "notes",
    "pivot",
    "read_long",
    "render",
    "write_table",
    "write_tables",
]

Orders = Mapping[str, Sequence[str]]

LEVELS = ("clean", "oblivious", "transfer", "gray_box", "bpda", "white_box", "adaptive")
"""Threat levels in the order tables show them: what the attacker knows grows to the right."""

WORST_CASE = "worst case"
"""`attack` of the lines that hold the per-image worst case over all attacks of their level."""

COLUMNS: dict[str, type] = {
    "grid": str,
    "cell": str,
    "role": str,
    "task": str,
    "dataset": str,
    "model": str,
    "defense": str,
    "attack": str,
    "level": str,
    "level_label": str,
    "seed": int,
    "image_format": str,
    "metric": str,
    "unit": str,
    "higher_is_better": bool,
    "value": float,
    "low": float,
    "high": float,
    "n": int,
    "n_total": int,
    "repeats": int,
    "value_worst": float,
    "status": str,
    "reason": str,
    "flags": tuple,
}
"""Columns every frame has; more (parameters, weights, counts, seconds) may follow and are kept.

`level` is one of `LEVELS`, `level_label` how tables print it ("bpda (EOT 10)"); `value`, `low` and `high` are in the
metric's own unit (fractions where `unit` is "%"); `value_worst` is the worst of `repeats` evaluations of a stochastic
defense, NaN otherwise; `n` of `n_total` images were evaluated; `status` is ok, partial, skip, error or pending and
`reason` says why; `flags` name the checks that make the attack suspect. Ordered categories of a column are its order in
tables; otherwise values keep the order in which they first appear.
"""

# What tells two results apart. `seed` is apart: lines that differ in nothing else are averaged.
_IDENTITY = (
    "grid",
    "task",
    "role",
    "dataset",
    "model",
    "defense",
    "level",
    "level_label",
    "attack",
    "metric",
    "image_format",
)
_HEADERS = (*_IDENTITY, "seed")
_STATUS_TEXT = {"skip": "–", "error": "err", "pending": "…"}
_FINISHED = ("ok", "partial")
_HEADER_NAMES = {"level": "threat model", "level_label": "threat model", "image_format": "images"}
_FORMAT_NAMES = {"float": "float images", "uint8": "images rounded to 8 bits"}
_SUPERSCRIPT = str.maketrans("0123456789,", "⁰¹²³⁴⁵⁶⁷⁸⁹·")


# -- the long frame -----------------------------------------------------------------------------------------------
def long_csv(lines: pd.DataFrame) -> str:
    """The lines as they are, all digits, flags joined by semicolons."""
    return str(lines.assign(flags=lines["flags"].map(";".join)).to_csv(index=False, lineterminator="\n"))


def read_long(path: Path) -> pd.DataFrame:
    """A frame that `write_tables` left as `results.csv`.

    Columns beyond `COLUMNS` come back as text.

    Raises:
        StoreError: the file is missing, no such file, or lacks columns.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):
            raise ValueError("it is cut off in its last line")
        raw = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
        missing = [column for column in COLUMNS if column not in raw]
        if missing:
            raise ValueError(f"no column '{missing[0]}'")
        for column, kind in COLUMNS.items():
            if kind is float:
                filled = _numbers(raw[column], r"|-?(\d+\.?\d*|\d*\.\d+)([eE][-+]?\d+)?|-?inf|nan")
                raw[column] = pd.Series([float(v) if v else math.nan for v in filled], dtype="float64")
            elif kind is int:
                raw[column] = pd.Series([int(v) for v in _numbers(raw[column], r"-?\d+")], dtype="int64")
            elif kind is bool:
                raw[column] = raw[column] == "True"
            elif kind is tuple:
                raw[column] = pd.Series(
                    [tuple(v.split(";")) if v else () for v in raw[column]], dtype="object"
                )
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: not a table of results: {error}") from None
    return raw


def _numbers(column: pd.Series, pattern: str) -> Iterator[str]:
    """The texts of a column, each of which has to be a number."""
    for place, text in enumerate(column):
        if re.fullmatch(pattern, str(text)) is None:
            raise ValueError(f"row {place + 2}, {column.name}: expected a number, found '{text}'")
        yield str(text)


def notes(lines: pd.DataFrame) -> list[str]:
    """What a reader should know about all tables of a frame: unfinished and suspect cells, counted by reason."""
    words = {"error": "failed", "pending": "not run", "skip": "skipped", "partial": "partly run"}
    cells = lines.drop_duplicates([column for column in _HEADERS if column != "metric"])
    found: list[str] = []
    for status, word in words.items():
        for reason, count in Counter(cells.loc[cells["status"] == status, "reason"]).items():
            found.append(f"{count} {_plural(count)} {word}" + (f": {reason}" if reason else ""))
    for flag, count in Counter(flag for flags in cells["flags"] for flag in flags).items():
        found.append(f"{count} {_plural(count)} suspect: {_explained(flag)}")
    return found


def _plural(count: int) -> str:
    return "cell" if count == 1 else "cells"


def _explained(flag: str) -> str:
    return f"{flag} ({FLAGS[flag].text})" if flag in FLAGS else flag


def _checked(lines: pd.DataFrame) -> pd.DataFrame:
    """The frame with plain columns, after a check that it is one."""
    for column in COLUMNS:
        if column not in lines:
            raise ValueError(f"the frame has no column '{column}'")
    plain = lines.reset_index(drop=True)
    for column in _HEADERS:
        if plain[column].isna().any():
            raise ValueError(f"the frame has lines without {column}")
        plain[column] = plain[column].astype("object")
    for column, known in (("level", LEVELS), ("status", (*_FINISHED, *_STATUS_TEXT))):
        for value in set(plain[column]) - set(known):
            raise ValueError(unknown(column, str(value), known))
    return plain


# -- what a table shows -------------------------------------------------------------------------------------------
Header = Literal[
    "grid",
    "task",
    "role",
    "dataset",
    "model",
    "defense",
    "level",
    "level_label",
    "attack",
    "metric",
    "image_format",
    "seed",
]
Value = str | int | float


class TableSpec(BaseModel):
    """One table of a grid: which lines, what runs down, what runs across, how numbers look.

    Attributes:
        name: file name without suffix.
        title: headline; the name if empty.
        where: column -> value or list of values a line must have. Worst-case lines have attack "worst case".
        rows: columns of the frame that run down.
        columns: columns of the frame that run across, outermost first.
        metric: one metric, several, or all that the lines have; several become an innermost header.
        image_format: float, or uint8 for images rounded to 8 bits; ignored where `image_format` is a header.
        decimals: digits after the point; 1 for percentages and 3 otherwise unless given.
        interval: print the 95 % interval. With several seeds the spread over seeds takes its place.
        repeats: print the worst of the repeated evaluations of stochastic defenses, too.
        bold: mark the best defense among cells that otherwise agree; suspect and partial cells do not compete.
        transpose: swap rows and columns.
        paper: the printed table this one repeats, and which label is which there (`bench.paper.compare`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    title: str = ""
    where: dict[str, Value | list[Value]] = Field(default_factory=dict)
    rows: Annotated[list[Header], Field(min_length=1)] = ["defense"]
    columns: list[Header] = ["role", "level_label", "attack"]
    metric: str | list[str] | None = None
    image_format: Literal["float", "uint8"] = "float"
    decimals: Annotated[int, Field(ge=0, le=12)] | None = None
    interval: bool = False
    repeats: bool = False
    bold: Literal["best", "none"] = "best"
    transpose: bool = False
    paper: dict[str, Any] | None = None

    @field_validator("where")
    @classmethod
    def _known_columns(cls, where: dict[str, Value | list[Value]]) -> dict[str, Value | list[Value]]:
        for column in where:
            if column not in (*_HEADERS, "cell"):
                raise ValueError(unknown("column", column, (*_HEADERS, "cell")))
        return where

    @model_validator(mode="after")
    def _once(self) -> TableSpec:
        headers = [*self.rows, *self.columns]
        for header in headers:
            if headers.count(header) > 1:
                raise ValueError(f"'{header}' is named twice in rows and columns")
        return self


@dataclass(frozen=True)
class Entry:
    """One cell of a table, not yet in any file format.

    Attributes:
        text: what is printed, without marks.
        value: the number behind it in the metric's own unit; NaN where there is none.
        bold: best of its group.
        underline: second of its group.
        suspect: a check made its attack suspect.
        notes: numbers of its footnotes, from 1.
    """

    text: str
    value: float = math.nan
    bold: bool = False
    underline: bool = False
    suspect: bool = False
    notes: tuple[int, ...] = ()

    def marks(self) -> str:
        """The dagger of a suspect cell and its footnote numbers."""
        return ("†" if self.suspect else "") + ",".join(str(note) for note in self.notes).translate(
            _SUPERSCRIPT
        )

    def markdown(self) -> str:
        """The cell in GitHub markdown."""
        # <ins>, because GitHub drops <u>.
        text = f"<ins>{self.text}</ins>" if self.underline else self.text
        return (f"**{text}**" if self.bold else text) + self.marks()


@dataclass(frozen=True)
class Table:
    """A pivot with everything its writers need.

    Attributes:
        name: file name without suffix.
        title: headline.
        caption: metric, threat level, image format and number of images, as far as no header shows them.
        row_names, column_names: the headers' names.
        rows, columns: header tuples, in grid order.
        entries: (row, column) -> cell; a combination the grid does not have is absent.
        notes: footnotes, in order.
        level: the threat level when no header shows it.
        lines: the lines of the frame behind the table, in grid order.
    """

    name: str
    title: str
    caption: str
    row_names: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    column_names: tuple[str, ...]
    columns: tuple[tuple[str, ...], ...]
    entries: Mapping[tuple[tuple[str, ...], tuple[str, ...]], Entry]
    notes: tuple[str, ...]
    level: str | None
    lines: pd.DataFrame

    def strings(self, render: Callable[[Entry], str], header: Callable[[str], str] = str) -> pd.DataFrame:
        """The table as strings, each entry through `render` and each header label through `header`."""
        cells = [
            [
                render(self.entries[row, column]) if (row, column) in self.entries else ""
                for column in self.columns
            ]
            for row in self.rows
        ]
        return pd.DataFrame(
            cells,
            index=_index(self.rows, self.row_names, header),
            columns=_index(self.columns, self.column_names, header),
            dtype="object",
        )


def pivot(lines: pd.DataFrame, spec: TableSpec, orders: Orders | None = None) -> pd.DataFrame:
    """The table as a frame of strings: what `build` makes, marked up as in markdown.

    Raises:
        GridError: as `build`.
    """
    return build(lines, spec, orders).strings(Entry.markdown)


def build(lines: pd.DataFrame, spec: TableSpec, orders: Orders | None = None) -> Table:
    """Pivot `lines` (see `frame`) as `spec` says.

    Lines that differ in `seed` alone become mean ± standard deviation, if all of them finished.

    Args:
        lines: the long frame.
        spec: the table.
        orders: column -> its values in grid order, where the frame's categories do not say; values not listed follow.

    Raises:
        GridError: an unknown column or value in `where`, an unknown metric, no lines left, threat levels that no
            header tells apart, or several lines in one cell.
        ValueError: `lines` is no such frame.
    """
    plain = _checked(lines)
    order = _Order(lines, orders or {})
    chosen, metrics = _select(plain, spec, order)
    rows, columns = list(spec.rows), list(spec.columns)
    if len(metrics) > 1 and "metric" not in (*rows, *columns):
        columns.append("metric")
    headers = [*rows, *columns]
    level = _level_outside(chosen, spec, headers)
    chosen = order.sort(chosen, headers)

    groups: dict[tuple[tuple[Any, ...], tuple[Any, ...]], list[dict[str, Any]]] = {}
    records: list[dict[str, Any]] = [
        {str(k): v for k, v in line.items()} for line in chosen.to_dict("records")
    ]
    for line in records:
        key = (tuple(line[h] for h in rows), tuple(line[h] for h in columns))
        groups.setdefault(key, []).append(line)
    for (row, column), group in groups.items():
        _check_collision(spec, headers, (*row, *column), group)

    labels = _Labels(records, headers, metrics)
    row_keys = order.sorted_keys({row for row, _ in groups}, rows)
    column_keys = order.sorted_keys({column for _, column in groups}, columns)
    draft = {key: _draft(group, spec, labels) for key, group in groups.items()}
    if spec.bold == "best" and "defense" in headers:
        _embolden(draft, headers)
    if spec.transpose:
        draft = {(column, row): entry for (row, column), entry in draft.items()}
        rows, columns, row_keys, column_keys = columns, rows, column_keys, row_keys

    notes: dict[str, int] = {}
    entries: dict[tuple[tuple[str, ...], tuple[str, ...]], Entry] = {}
    row_labels = {key: labels.of(rows, key, innermost=False) for key in row_keys}
    column_labels = {key: labels.of(columns, key, innermost=True) for key in column_keys}
    for row in row_keys:
        for column in column_keys:
            if (row, column) in draft:
                item = draft[row, column]
                numbers = tuple(notes.setdefault(note, len(notes) + 1) for note in item.notes)
                entries[row_labels[row], column_labels[column]] = replace(item.entry, notes=numbers)
    return Table(
        name=spec.name,
        title=spec.title or spec.name,
        caption=_caption(chosen, spec, headers, metrics, level),
        row_names=tuple(_HEADER_NAMES.get(name, name) for name in rows) or ("",),
        rows=tuple(row_labels[key] for key in row_keys),
        column_names=tuple(_HEADER_NAMES.get(name, name) for name in columns) or ("",),
        columns=tuple(column_labels[key] for key in column_keys),
        entries=entries,
        notes=tuple(notes),
        level=level,
        lines=chosen,
    )


# -- selection and order ------------------------------------------------------------------------------------------
class _Order:
    """Ranks of the values of each header column."""

    def __init__(self, lines: pd.DataFrame, orders: Orders) -> None:
        for column in orders:
            if column not in (*_HEADERS, "cell"):
                raise ValueError(unknown("column", column, (*_HEADERS, "cell")))
        self.known: dict[str, list[Any]] = {}
        for column in (*_HEADERS, "cell"):
            last = [WORST_CASE] if column == "attack" else []
            listed = list(orders.get(column, ()))
            kind = lines[column].dtype
            if isinstance(kind, pd.CategoricalDtype) and kind.ordered:
                listed = list(kind.categories)
            listed = [value for value in listed if value not in last]
            rest = [value for value in dict.fromkeys(lines[column]) if value not in (*listed, *last)]
            if column == "level":
                rest = [level for level in LEVELS if level not in listed]
            elif column == "level_label":
                level_of = dict(zip(lines["level_label"], lines["level"], strict=True))
                rest.sort(key=lambda label: LEVELS.index(level_of[label]))
            elif column == "seed":
                rest.sort()
            self.known[column] = [*listed, *rest, *last]
        self._rank = {column: {v: i for i, v in enumerate(values)} for column, values in self.known.items()}

    def sorted_keys(self, keys: Iterable[tuple[Any, ...]], headers: Sequence[str]) -> list[tuple[Any, ...]]:
        return sorted(keys, key=lambda key: [self._rank[h][v] for h, v in zip(headers, key, strict=True)])

    def sort(self, lines: pd.DataFrame, headers: Sequence[str]) -> pd.DataFrame:
        by = [*headers, *(column for column in (*_HEADERS, "cell") if column not in headers)]
        ranks = pd.DataFrame({column: lines[column].map(self._rank[column]) for column in by})
        return lines.loc[ranks.sort_values(by, kind="stable").index].reset_index(drop=True)


def selected(lines: pd.DataFrame, spec: TableSpec) -> pd.DataFrame:
    """The lines a table is made of.

    Raises:
        GridError: see `build`.
    """
    return _select(_checked(lines), spec, _Order(lines, {}))[0]


def _select(lines: pd.DataFrame, spec: TableSpec, order: _Order) -> tuple[pd.DataFrame, list[str]]:
    chosen = lines
    for column, wanted in spec.where.items():
        values = [str(v) for v in (wanted if isinstance(wanted, list) else [wanted])]
        known = [str(v) for v in order.known[column]]
        for value in values:
            if value not in known:
                raise GridError(f"table '{spec.name}', where: " + unknown(column, value, known))
        chosen = chosen[chosen[column].astype(str).isin(values)]
    if "image_format" not in (*spec.rows, *spec.columns):
        chosen = chosen[chosen["image_format"] == spec.image_format]
    present = set(chosen["metric"])
    if spec.metric is not None:
        wanted_metrics = [spec.metric] if isinstance(spec.metric, str) else spec.metric
        for metric in wanted_metrics:
            if metric not in order.known["metric"]:
                raise GridError(f"table '{spec.name}': " + unknown("metric", metric, order.known["metric"]))
        chosen = chosen[chosen["metric"].isin(wanted_metrics)]
        present &= set(wanted_metrics)
    if chosen.empty:
        raise GridError(
            f"table '{spec.name}' selects none of the {len(lines)} result lines (where: {spec.where}, "
            f"metric: {spec.metric}, image_format: {spec.image_format})"
        )
    return chosen, [metric for metric in order.known["metric"] if metric in present]


def _level_outside(chosen: pd.DataFrame, spec: TableSpec, headers: Sequence[str]) -> str | None:
    """The one threat level of a table whose headers do not show it; None when they do."""
    if "level" in headers or "level_label" in headers:
        return None
    found = sorted(set(chosen["level_label"]))
    if len(found) > 1:
        raise GridError(
            f"table '{spec.name}' would show numbers of {len(found)} threat models ({', '.join(found)}) without saying "
            "which is which: add level_label to rows or columns, or one level to where"
        )
    return str(found[0])


def _check_collision(
    spec: TableSpec, headers: Sequence[str], key: Sequence[Any], group: Sequence[Mapping[str, Any]]
) -> None:
    if len(group) == 1:
        return
    place = ", ".join(f"{h} {v}" for h, v in zip(headers, key, strict=True))
    differing = {
        column: sorted({str(line[column]) for line in group}) for column in _IDENTITY if column not in headers
    }
    differing = {column: values for column, values in differing.items() if len(values) > 1}
    if "level" in differing and "level_label" in differing:
        del differing["level"]
    if differing:
        named = "; ".join(f"{column} ({', '.join(values)})" for column, values in differing.items())
        raise GridError(
            f"table '{spec.name}': {len(group)} lines fall into one cell ({place}): they differ in {named}; "
            "add that to rows, columns or where"
        )
    if len({line["seed"] for line in group}) < len(group):
        cells = ", ".join(str(line["cell"]) for line in group)
        raise GridError(
            f"table '{spec.name}': {len(group)} lines fall into one cell ({place}) and differ in nothing a table can "
            f"show (cells {cells}): give them names of their own in the grid"
        )


# -- entries ------------------------------------------------------------------------------------------------------
class _Labels:
    """How header values and metrics are printed."""

    def __init__(
        self, records: Sequence[Mapping[str, Any]], headers: Sequence[str], metrics: Sequence[str]
    ) -> None:
        self._metric: dict[str, str] = {}
        self._arrow: dict[str, str] = {}
        for line in records:
            metric, arrow = str(line["metric"]), "↑" if line["higher_is_better"] else "↓"
            label = f"{metric} ({line['unit']}) {arrow}" if line["unit"] else f"{metric} {arrow}"
            if self._metric.setdefault(metric, label) != label:
                raise ValueError(f"metric '{metric}' has lines of different unit or direction")
            self._arrow[metric] = arrow
        self._single = metrics[0] if "metric" not in headers else None
        # A level header prints the level's label where all of its lines share one, and the others get a footnote.
        self._label_of_level: dict[str, str] = {}
        self._by_level = "level" in headers and "level_label" not in headers
        for level in {str(line["level"]) for line in records}:
            labels = {str(line["level_label"]) for line in records if line["level"] == level}
            self._label_of_level[level] = labels.pop() if len(labels) == 1 else level

    def of(self, headers: Sequence[str], key: Sequence[Any], innermost: bool) -> tuple[str, ...]:
        if not headers:
            return (self._metric[self._single] if self._single else "",)
        parts = [self._one(header, value) for header, value in zip(headers, key, strict=True)]
        if innermost and self._single:
            parts[-1] = f"{parts[-1]} {self._arrow[self._single]}"
        return tuple(parts)

    def _one(self, header: str, value: Any) -> str:
        if header == "metric":
            return self._metric[value]
        if header == "level" and self._by_level:
            return self._label_of_level[value]
        return str(value)

    def level_note(self, line: Mapping[str, Any]) -> str | None:
        if self._by_level and line["level_label"] != self._label_of_level[line["level"]]:
            return str(line["level_label"])
        return None


@dataclass
class _Draft:
    entry: Entry
    notes: list[str]
    competes: bool
    higher_is_better: bool


def _draft(group: Sequence[Mapping[str, Any]], spec: TableSpec, labels: _Labels) -> _Draft:
    first = group[0]
    higher = bool(first["higher_is_better"])
    unfinished = [line for line in group if line["status"] not in _FINISHED]
    if unfinished:
        # A mean over some of the seeds is no mean: the cell says what is missing instead.
        ranked = sorted(unfinished, key=lambda line: ("error", "pending", "skip").index(line["status"]))
        status, reason = str(ranked[0]["status"]), str(ranked[0]["reason"])
        share = f" ({len(unfinished)} of {len(group)} seeds)" if len(group) > 1 else ""
        note = f"{status}{share}: {reason or ('not run yet' if status == 'pending' else 'no reason given')}"
        return _Draft(Entry(_STATUS_TEXT[status]), [note], False, higher)

    def show(value: float) -> str:
        decimals = spec.decimals if spec.decimals is not None else (1 if first["unit"] == "%" else 3)
        return f"{value * 100 if first['unit'] == '%' else value:.{decimals}f}"

    remarks: list[str] = []
    values = [float(line["value"]) for line in group]
    value = statistics.fmean(values)
    if math.isnan(value):
        text = "n/a"
        remarks.append("undefined on these images")
    elif len(values) > 1:
        text = f"{show(value)} ± {show(statistics.stdev(values))}"
    else:
        text = show(value)
        if spec.interval and not (math.isnan(first["low"]) or math.isnan(first["high"])):
            text += f" [{show(first['low'])}, {show(first['high'])}]"
    worst = [float(line["value_worst"]) for line in group if not math.isnan(line["value_worst"])]
    if spec.repeats and worst:
        text += f" (worst of {first['repeats']}: {show(min(worst) if higher else max(worst))})"
    partial = [line for line in group if line["n"] < line["n_total"]]
    if partial:
        least = min(partial, key=lambda line: line["n"] / line["n_total"])
        text += f" n={least['n']}/{least['n_total']}"
    flags = list(dict.fromkeys(flag for line in group for flag in line["flags"]))
    remarks += [f"suspect attack: {_explained(flag)}" for flag in flags]
    level_note = labels.level_note(first)
    if level_note:
        remarks.append(level_note)
    competes = not flags and not partial and not math.isnan(value)
    return _Draft(Entry(text, value, suspect=bool(flags)), remarks, competes, higher)


def _embolden(
    draft: Mapping[tuple[tuple[Any, ...], tuple[Any, ...]], _Draft], headers: Sequence[str]
) -> None:
    at = headers.index("defense")
    rivals: dict[tuple[Any, ...], list[_Draft]] = {}
    for (row, column), item in draft.items():
        key = (*row, *column)
        if item.competes:
            rivals.setdefault(key[:at] + key[at + 1 :], []).append(item)
    for items in rivals.values():
        if len(items) < 2:
            continue
        pick = max if items[0].higher_is_better else min
        best = pick(items, key=lambda item: item.entry.value)
        number = best.entry.text.split(" ", 1)[0]
        for item in items:
            # What prints alike is alike: a difference below the last digit does not decide.
            if item.entry.text.split(" ", 1)[0] == number:
                item.entry = replace(item.entry, bold=True)


def _caption(
    chosen: pd.DataFrame, spec: TableSpec, headers: Sequence[str], metrics: Sequence[str], level: str | None
) -> str:
    parts: list[str] = []
    if "metric" not in headers:
        unit = chosen["unit"].iloc[0]
        direction = "higher is better" if chosen["higher_is_better"].iloc[0] else "lower is better"
        parts.append(f"{metrics[0]}{f' ({unit})' if unit else ''}, {direction}")
    if level is not None:
        parts.append(f"threat model: {level}")
    # A role names its task, dataset and model well enough.
    for column in () if "role" in headers else ("task", "dataset", "model"):
        values = set(chosen[column])
        if column not in headers and len(values) == 1:
            parts.append(f"{column}: {values.pop()}")
    if "image_format" not in headers:
        parts.append(_FORMAT_NAMES.get(spec.image_format, spec.image_format))
    done = chosen[chosen["status"].isin(_FINISHED)]
    if len(done):
        totals = sorted(set(done["n_total"]))
        parts.append(f"n = {totals[0]}" if len(totals) == 1 else f"n = {totals[0]} to {totals[-1]}")
    seeds = chosen["seed"].nunique()
    if seeds > 1 and "seed" not in headers:
        parts.append(f"mean ± standard deviation over {seeds} seeds")
    elif spec.interval:
        parts.append("95 % intervals in brackets")
    if chosen["flags"].map(len).any():
        parts.append("† suspect attack")
    return "; ".join(parts)


def _index(keys: Sequence[tuple[str, ...]], names: Sequence[str], header: Callable[[str], str]) -> pd.Index:
    shown = [tuple(header(part) for part in key) for key in keys]
    titles = [header(name) for name in names]
    if len(titles) == 1:
        return pd.Index([key[0] for key in shown], name=titles[0], dtype="object")
    return pd.MultiIndex.from_tuples(shown, names=titles)


# -- writers ------------------------------------------------------------------------------------------------------
def _markdown(table: Table) -> str:
    """The table in GitHub markdown with its title, caption and footnotes."""
    headers = [*table.row_names, *(_flat(column) for column in table.columns)]
    body = [
        [
            *row,
            *(table.entries[row, c].markdown() if (row, c) in table.entries else "" for c in table.columns),
        ]
        for row in table.rows
    ]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in body]
    text = tabulate(
        escaped,
        headers=[header.replace("|", "\\|") for header in headers],
        tablefmt="pipe",
        disable_numparse=True,
        colalign=["left"] * len(table.row_names) + ["right"] * len(table.columns),
    )
    notes = [f"{str(i).translate(_SUPERSCRIPT)} {note}" for i, note in enumerate(table.notes, 1)]
    parts = [f"### {table.title}", table.caption, text, "  \n".join(notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _wide_csv(table: Table) -> str:
    """The pivot as plain numbers in the metric's own unit (fractions, not %); cells without a number are empty."""
    lead = ["threat model"] if table.level is not None else []
    headers = [*table.row_names, *lead, *(_plain(_flat(column)) for column in table.columns)]
    body = [
        [
            *(_plain(label) for label in row),
            *([table.level] if table.level is not None else []),
            *(table.entries[row, c].value if (row, c) in table.entries else math.nan for c in table.columns),
        ]
        for row in table.rows
    ]
    return _csv(pd.DataFrame(body, columns=pd.Index(headers, dtype="object")))


def _latex(table: Table) -> str:
    """A `table` environment with booktabs rules; needs the booktabs package."""

    def entry(item: Entry) -> str:
        text = _latex_text(item.text)
        marks = (r"$^\dagger$" if item.suspect else "") + _latex_marks(item.notes)
        text = rf"\underline{{{text}}}" if item.underline else text
        return (rf"\textbf{{{text}}}" if item.bold else text) + marks

    body = table.strings(entry, _latex_text)
    body.columns.names = [None] * body.columns.nlevels
    tabular = body.style.to_latex(
        hrules=True,
        column_format="l" * len(table.row_names) + "r" * len(table.columns),
        multicol_align="c",
        sparse_index=False,
    )
    caption = _latex_text(f"{table.title}. {table.caption}.")
    notes = [f"{_latex_marks((i,))} {_latex_text(note)}" for i, note in enumerate(table.notes, 1)]
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}", rf"\label{{tab:{table.name}}}"]
    lines.append(tabular.rstrip("\n"))
    if notes:
        lines.append(r"\par\footnotesize " + r"\\ ".join(notes))
    lines.append(r"\end{table}")
    return "\n".join(lines) + "\n"


def _html(table: Table) -> str:
    """A `figure` element with the table, its caption and footnotes; everything escaped."""

    def entry(item: Entry) -> str:
        text = html_escape.escape(item.text)
        marks = ("†" if item.suspect else "") + ",".join(str(note) for note in item.notes)
        text = f"<u>{text}</u>" if item.underline else text
        return (f"<b>{text}</b>" if item.bold else text) + (f"<sup>{marks}</sup>" if marks else "")

    buffer = io.StringIO()
    table.strings(entry, html_escape.escape).to_html(buffer, escape=False, border=0, classes=["bench"])
    title, caption = html_escape.escape(table.title), html_escape.escape(table.caption)
    notes = "".join(f"<li>{html_escape.escape(note)}</li>\n" for note in table.notes)
    lines = [
        f'<figure id="{table.name}">',
        f"<figcaption><b>{title}</b><br>{caption}</figcaption>",
        buffer.getvalue().rstrip(),
        *([f'<ol class="notes">\n{notes}</ol>'] if notes else []),
        "</figure>",
    ]
    # ASCII, so that the fragment reads the same whatever charset the page around it declares.
    return ("\n".join(lines) + "\n").encode("ascii", "xmlcharrefreplace").decode()


_WRITERS: dict[str, Callable[[Table], str]] = {
    "markdown": _markdown,
    "csv": _wide_csv,
    "latex": _latex,
    "html": _html,
}
FORMATS: dict[str, str] = {
    "markdown": "md",
    "csv": "csv",
    "latex": "tex",
    "html": "html",
    "parquet": "parquet",
}
"""Format -> file suffix. Parquet holds the long frame, the others a pivot."""


def render(lines: pd.DataFrame, spec: TableSpec, format: str, orders: Orders | None = None) -> str:
    """One table as text in `format`: markdown, csv, latex or html.

    Raises:
        GridError: as `build`, or the format is no text format.
    """
    return write_table(build(lines, spec, orders), format)


def write_table(table: Table, format: str) -> str:
    """A finished table as text in `format`: markdown, csv, latex or html.

    Raises:
        GridError: the format is no text format.
    """
    if format not in _WRITERS:
        raise GridError(unknown("text format", format, _WRITERS))
    return _WRITERS[format](table)


def markdown(lines: pd.DataFrame, spec: TableSpec, orders: Orders | None = None) -> str:
    """One table in GitHub markdown, with title, caption and footnotes.

    Raises:
        GridError: as `build`.
    """
    return render(lines, spec, "markdown", orders)


def complete(folder: Path) -> bool:
    """Whether the results in a folder are those of a run in which nothing failed or was left out."""
    try:
        found = set(pd.read_csv(folder / "results.csv", usecols=["status"], dtype=str)["status"])
    except (OSError, ValueError):
        return False
    return bool(found) and found <= {"ok", "skip"}


def write_tables(
    lines: pd.DataFrame,
    specs: Sequence[TableSpec],
    folder: Path,
    *,
    title: str = "",
    remark: str = "",
    formats: Iterable[str] = ("markdown", "csv"),
    orders: Orders | None = None,
) -> list[Path]:
    """Write every table in every format, all lines as results.csv, and all tables on one page as README.md.

    Everything is rendered before the first file is touched, and each file is replaced as a whole.

    Args:
        lines: the long frame, without columns that differ from run to run.
        specs: the tables; names must differ.
        folder: where to; made if missing.
        title: headline of the page.
        remark: what stands below it.
        formats: of `FORMATS`; "parquet" is the long frame as results.parquet.
        orders: as `build`.

    Raises:
        GridError: as `build`, an unknown format, or two tables of one name.
        StoreError: a file cannot be written.
    """
    tables = [build(lines, spec, orders) for spec in specs]
    content: dict[str, bytes] = {"results.csv": long_csv(lines).encode()}
    pages = [f"# {title}" if title else "", remark, *(_markdown(table).rstrip("\n") for table in tables)]
    listed = "\n".join(f"- {note}" for note in notes(lines))
    content["README.md"] = ("\n\n".join(part for part in (*pages, listed) if part) + "\n").encode()
    for format in formats:
        if format not in FORMATS:
            raise GridError(unknown("table format", format, FORMATS))
        if format == "parquet":
            content["results.parquet"] = parquet(lines)
            continue
        for table in tables:
            name = f"{table.name}.{FORMATS[format]}"
            if name in content:
                raise GridError(
                    f"table '{table.name}': {name} is written already; give the table another name"
                )
            content[name] = _WRITERS[format](table).encode()
    for name, data in content.items():
        save(folder / name, data)
    return [folder / name for name in content]


def _flat(column: Sequence[str]) -> str:
    """Header levels on one line; a level that repeats the one before it is dropped."""
    parts = [
        part for i, part in enumerate(column) if i + 1 == len(column) or column[i + 1].rstrip(" ↑↓") != part
    ]
    return " / ".join(parts)


def _plain(label: str) -> str:
    """A label without unit and arrow, which describe printed numbers."""
    return label.rstrip("↑↓").rstrip().removesuffix(" (%)")


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "±": r"$\pm$",
        "≥": r"$\geq$",
        "≤": r"$\leq$",
        "×": r"$\times$",
        "✗": r"$\times$",
        "–": "--",
        "…": r"\ldots{}",
        "†": r"$^\dagger$",
        "∞": r"$\infty$",
        "ε": r"$\varepsilon$",
        "→": r"$\to$",
        "⇒": r"$\Rightarrow$",
        "⊕": r"$\oplus$",
        "✓": r"$\surd$",
    }
)


def _latex_text(text: str) -> str:
    return text.translate(_LATEX)


def _latex_marks(notes: Sequence[int]) -> str:
    return f"$^{{{','.join(str(note) for note in notes)}}}$" if notes else ""


def _csv(data: pd.DataFrame) -> str:
    return str(data.to_csv(index=False, lineterminator="\n"))


def parquet(lines: pd.DataFrame) -> bytes:
    """The long frame as a Parquet file."""
    sink = io.BytesIO()
    lines.assign(flags=lines["flags"].map(list)).to_parquet(sink, index=False)
    return sink.getvalue()
