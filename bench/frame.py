"""From stored rows to one long pandas frame: a line per cell and metric, with intervals, worst cases and flags."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from bench.checks import Finding, cell_findings, group_findings, reference_findings
from bench.keys import canonical, content_key
from bench.plan import Cell, Plan, task_instance
from bench.protocols import Metric
from bench.registry import ATTACKS, METRICS
from bench.runner import cell_record, not_applicable, noted_findings
from bench.stats import bootstrap_interval, wilson, worst_case
from bench.store import Record, Store

WORST = "worst case"
ADAPTIVE = "adaptive"
"""The level of an attacker who tries everything in the grid: the per-image worst over its levels and attacks."""
SUMMARY_VERSION = 7

COLUMNS = [
    "grid", "profile", "cell", "role", "task", "dataset", "model", "defense", "attack", "level", "level_label",
    "seed", "image_format", "metric", "unit", "higher_is_better", "value", "low", "high", "n", "n_total", "repeats",
    "value_worst", "status", "reason", "flags", "attack_name", "attack_params", "defense_params", "weights",
    "forwards", "backwards", "linf_max", "seconds", "cost",
]  # fmt: skip
"""A line's columns. `forwards` and `backwards` are the passes of the attack over all images; `backwards` is 0 for
attacks whose library takes the gradients, which nobody counts (`passes`)."""
#: Columns that differ from run to run; left out of committed tables.
VOLATILE = ("seconds", "cost")


def passes(line: Mapping[Any, Any]) -> str:
    """What a line's attack cost, in words."""
    name, forwards, backwards = (line.get(key) for key in ("attack_name", "forwards", "backwards"))
    if name in ATTACKS.names() and not ATTACKS.resolve(str(name)).counts_backwards:
        return f"{forwards or 0} forward passes, backward passes not counted: its library takes the gradients"
    return f"{forwards or 0} forward and {backwards or 0} backward passes"


class Repeated(Metric):
    """A metric averaged over the repeats of a stochastic defense, on the same images.

    Its intervals are then those of what tables print: images are drawn again, each with all its repeats.

    Args:
        metric: what is averaged.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """`rows` hold lists of statistics, one entry a repeat."""
        repeats = len(rows[0]["stats"]) if rows else 0
        return [self.metric.prepare([row["stats"][r] for row in rows]) for r in range(repeats)]

    def value(self, prepared: list[Any], weights: np.ndarray | None = None) -> float:
        """Mean over repeats."""
        return float(np.mean([self.metric.value(p, weights) for p in prepared]))

    def values(self, prepared: list[Any], weights: np.ndarray) -> np.ndarray:
        """`value` for each row of `weights`."""
        out: np.ndarray = np.mean([self.metric.values(p, weights) for p in prepared], axis=0)
        return out

    def each(self, prepared: list[Any]) -> list[float]:
        """One value a repeat."""
        return [float(self.metric.value(p)) for p in prepared]


def load_rows(record: Record, ids: Sequence[str]) -> list[dict[str, Any]]:
    """Stored rows of the images that have one, in order, `stats` and `scores` decoded."""
    present = record.done()
    rows = record.read_rows([i for i in ids if i in present])
    return [{**row, "stats": json.loads(row["stats"]), "scores": json.loads(row["scores"])} for row in rows]


def cell_metrics(cell: Cell) -> tuple[str, ...]:
    """The metrics of a cell: the task's own, headline first, others registered for it, and those taken from pixels."""
    task = cell.target.task
    own = task_instance(task).metrics
    others = (n for n in METRICS.names() if METRICS.resolve(n).task == task and n not in own)
    return (*own, *others, *cell.metrics)


def _summary_key(cell: Cell, ids: Sequence[str]) -> dict[str, Any]:
    return {
        "ids": list(ids),
        "version": SUMMARY_VERSION,
        "seed": cell.seed,
        "metrics": cell_metrics(cell),
    }


def summarise(rows: Sequence[Mapping[str, Any]], names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Value and 95 % interval over `rows` of every metric named."""
    out = []
    for name in names:
        metric: Metric = METRICS.create(name)
        repeated = Repeated(metric)
        prepared = repeated.prepare(rows)
        values = repeated.each(prepared)
        value = float(np.mean(values))
        if metric.interval == "wilson":
            low, high = wilson(value * len(rows), len(rows))
        else:
            low, high = bootstrap_interval(repeated, prepared, len(rows), seed)
        worst = min(values) if metric.higher_is_better else max(values)
        out.append(
            {
                "metric": name, "unit": metric.unit, "higher_is_better": metric.higher_is_better,
                "value": value, "low": low, "high": high, "value_worst": worst if len(values) > 1 else float("nan"),
            }
        )  # fmt: skip
    return out


def cell_frame(plan: Plan, store: Store | None, errors: Mapping[str, str] | None = None) -> pd.DataFrame:
    """The frame of all cells of a plan, in the grid's order, worst cases included.

    Args:
        plan: the resolved grid.
        store: where the rows are; None = as if nothing had run.
        errors: cell key or craft key -> why it failed in this run.
    """
    errors = errors or {}
    summaries = [_summary(store, cell) for cell in plan.cells]
    found = {} if store is None else _all_findings(plan, store, summaries)
    reasons = {cell.key: _skip_reason(store, cell) for cell in plan.cells}
    lines: list[dict[str, Any]] = []
    groups: dict[tuple[str, str, str, str], list[Cell]] = {}
    for cell, summary in zip(plan.cells, summaries, strict=True):
        if summary is None:
            lines.extend(_unfinished(plan, cell, reasons[cell.key], _failure(cell, errors)))
        else:
            lines.extend(_cell_lines(plan, cell, summary, found[cell.key], _failure(cell, errors)))
        if cell.attack is not None:
            group = (cell.target.role, cell.defense_label, cell.level_label, cell.image_format)
            groups.setdefault(group, []).append(cell)
    for cells in groups.values():
        lines.extend(_worst_lines(plan, store, cells, reasons))
    for cells in _by_defense(groups).values():
        lines.extend(_worst_lines(plan, store, cells, reasons, ADAPTIVE))
    frame = pd.DataFrame(lines, columns=COLUMNS)
    orders = {
        **plan.orders,
        "attack": (*plan.orders.get("attack", ()), WORST),
        "level_label": (*plan.orders.get("level_label", ()), ADAPTIVE),
    }
    for column in ("role", "defense", "attack", "level_label", "image_format"):
        frame[column] = pd.Categorical(frame[column], categories=list(orders.get(column, ())), ordered=True)
    return frame


def _base(plan: Plan, cell: Cell) -> dict[str, Any]:
    return {
        "grid": plan.grid.name, "profile": plan.profile, "cell": cell.key[:16], "role": cell.target.role,
        "task": cell.target.task, "dataset": cell.target.dataset.name, "model": _model_name(cell),
        "defense": cell.defense_label, "attack": cell.attack_label, "level": cell.level,
        "level_label": cell.level_label, "seed": cell.seed, "image_format": cell.image_format,
        "n_total": len(cell.target.ids), "repeats": cell.repeats, "reason": "", "flags": (),
        "value": float("nan"), "low": float("nan"), "high": float("nan"), "value_worst": float("nan"), "n": 0,
        "attack_name": "" if cell.attack is None else cell.attack.name,
        "attack_params": "{}" if cell.attack is None else canonical(cell.attack.params),
        "defense_params": canonical(cell.payload["defense"]),
        "weights": canonical(cell.target.model.identity()),
        "forwards": 0, "backwards": 0, "linf_max": float("nan"), "seconds": 0.0, "cost": float("nan"),
    }  # fmt: skip


def _model_name(cell: Cell) -> str:
    identity = cell.target.model.params.get("id")
    return f"{cell.target.model.name}:{identity}" if identity else cell.target.model.name


def _empty(plan: Plan, cell: Cell, **values: Any) -> list[dict[str, Any]]:
    lines = []
    for name in cell_metrics(cell):
        metric: Metric = METRICS.create(name)
        lines.append(
            {
                **_base(plan, cell),
                "metric": name,
                "unit": metric.unit,
                "higher_is_better": metric.higher_is_better,
            }
            | values
        )
    return lines


def _skip_reason(store: Store | None, cell: Cell) -> str | None:
    if cell.skip is not None or store is None:
        return cell.skip
    return not_applicable(store, cell)


def _failure(cell: Cell, errors: Mapping[str, str]) -> str | None:
    # The craft's failure is the cause; the cell's is that it has nothing to evaluate.
    return (errors.get(cell.craft.key) if cell.craft is not None else None) or errors.get(cell.key)


def _unfinished(plan: Plan, cell: Cell, skip: str | None, failure: str | None) -> list[dict[str, Any]]:
    """The lines of a cell without a single row."""
    if skip is not None:
        return _empty(plan, cell, status="skip", reason=skip)
    return _empty(plan, cell, status="error" if failure else "pending", reason=failure or "not run yet")


def _cell_lines(
    plan: Plan, cell: Cell, summary: Mapping[str, Any], found: Sequence[Finding], failure: str | None
) -> list[dict[str, Any]]:
    flags = tuple(dict.fromkeys(finding.flag for finding in found if finding.suspect))
    extra = {k: summary[k] for k in ("forwards", "backwards", "linf_max", "seconds", "cost", "n")}
    status = "ok" if summary["n"] == len(cell.target.ids) else ("error" if failure else "partial")
    return [
        {**_base(plan, cell), **extra, **line, "status": status, "reason": failure or "", "flags": flags}
        for line in summary["metrics"]
    ]


def _summary(store: Store | None, cell: Cell) -> dict[str, Any] | None:
    """What the rows of a cell come to; kept beside them. None where it has none."""
    if store is None or cell.skip is not None:
        return None
    record = cell_record(store, cell)
    done = record.done()
    ids = [i for i in cell.target.ids if i in done]
    if not ids:
        return None
    name = "summary-" + content_key(_summary_key(cell, ids))[:16]
    known = record.note(name)
    if known is not None:
        return dict(known)
    rows = load_rows(record, ids)
    infos = [{k.removeprefix("craft_"): v for k, v in row.items() if k.startswith("craft_")} for row in rows]
    infos = [info for info in infos if info]
    summary = {
        "n": len(ids),
        "metrics": summarise(rows, cell_metrics(cell), cell.seed),
        "findings": [asdict(finding) for finding in cell_findings(cell, rows)],
        "ids": ids,
        "scores": [float(row["score"]) for row in rows],
        "cost": _cost(rows),
        "forwards": sum(int(i["forwards"]) for i in infos),
        "backwards": sum(int(i["backwards"]) for i in infos),
        "linf_max": max((float(i["linf"]) for i in infos), default=float("nan")),
        "seconds": sum(float(i["seconds"]) for i in infos) + sum(float(r["seconds"]) for r in rows),
    }
    record.set_note(name, summary)
    return summary


def _cost(rows: Sequence[Mapping[str, Any]]) -> float:
    """Check V23: time of purifying and predicting an image over that of predicting it alone."""
    timed = [row for row in rows if "seconds_purify" in row]
    predict = sum(float(row["seconds_predict"]) for row in timed)
    return 1 + sum(float(row["seconds_purify"]) for row in timed) / predict if predict > 0 else float("nan")


def _by_defense(groups: Mapping[tuple[str, str, str, str], list[Cell]]) -> dict[tuple[str, ...], list[Cell]]:
    """Cells of all levels together, where there is more than one level."""
    levels: dict[tuple[str, ...], list[list[Cell]]] = {}
    for (role, defense, _, image_format), cells in groups.items():
        levels.setdefault((role, defense, image_format), []).append(cells)
    return {key: [c for cells in parts for c in cells] for key, parts in levels.items() if len(parts) > 1}


def _lowest(
    rows: Mapping[str, list[dict[str, Any]]], parts: Sequence[Sequence[str]], cell: Cell
) -> list[dict[str, Any]]:
    """For each metric, the lowest of what the attacker can reach: the per-image worst of all cells, of each level, and
    each cell alone. For a mean over images the first is the lowest; mAP and mIoU are no such means.
    """
    groups = [list(rows), *([] if len(parts) == 1 else parts)]
    reach = [worst_case({key: rows[key] for key in group}).rows for group in groups] + list(rows.values())
    summaries: dict[int, list[dict[str, Any]]] = {}
    lines = []
    for place, name in enumerate(cell_metrics(cell)):
        metric = Repeated(METRICS.create(name))
        sign = 1.0 if metric.metric.higher_is_better else -1.0
        values = [sign * metric.value(metric.prepare(candidate)) for candidate in reach]
        best = values.index(min(values))
        if best not in summaries:
            summaries[best] = summarise(reach[best], cell_metrics(cell), cell.seed)
        lines.append(summaries[best][place])
    return lines


def _worst_lines(
    plan: Plan,
    store: Store | None,
    cells: Sequence[Cell],
    reasons: Mapping[str, str | None],
    level: str | None = None,
) -> list[dict[str, Any]]:
    """What is left by the attacker who picks the attack per image; of one level, or of all when `level` = adaptive.

    Attacks without a budget do not count.
    """
    place = {"attack": WORST, "cell": ""} | ({} if level is None else {"level": level, "level_label": level})
    limited = [cell for cell in cells if cell.attack is not None and cell.attack.eps is not None]
    if not limited:
        reason = "no attack here has a budget, and without one every defense falls"
        return [{**line, **place} for line in _empty(plan, cells[0], status="skip", reason=reason)]
    # What a nearest-adversarial search finds at its own distance is no failure at the others' eps.
    cells = limited
    if level is not None:
        cells = [cell for cell in cells if reasons[cell.key] is None]
    skipped = [cell for cell in cells if reasons[cell.key] is not None]
    if not cells:
        return []
    if skipped:
        # The attacks that remain may be the weak ones: their worst case would pass for robustness.
        return [
            {**line, **place}
            for line in _empty(plan, skipped[0], status="skip", reason=reasons[skipped[0].key] or "")
        ]
    # A level that knows about a defense that is not there is another one: the same cell twice.
    cells = list({cell.key: cell for cell in cells}.values())
    first = cells[0]
    ids: list[str] = []
    if store is not None:
        done = [cell_record(store, cell).done() for cell in cells]
        ids = [i for i in first.target.ids if all(i in known for known in done)]
    if store is None or len(ids) < len(first.target.ids):
        reason = "not all attacks of this level have finished"
        return [{**line, **place} for line in _empty(plan, first, status="pending", reason=reason)]
    record = cell_record(store, first)
    parts: dict[str, list[str]] = {}
    for cell in cells:
        parts.setdefault(cell.level_label, []).append(cell.key)
    key = {**_summary_key(first, ids), "cells": list(parts.values())}
    name = "worst-" + content_key(key)[:16]
    metrics = record.note(name)
    if metrics is None:
        rows = {cell.key: load_rows(cell_record(store, cell), ids) for cell in cells}
        metrics = _lowest(rows, list(parts.values()), first)
        record.set_note(name, metrics)
    base = {**_base(plan, first), **place, "n": len(ids), "status": "ok"}
    return [{**base, **line} for line in metrics]


def findings(plan: Plan, store: Store) -> dict[str, list[Finding]]:
    """What the cheap checks say of a plan's finished cells, notes included: cell key -> findings."""
    return _judged(plan, store, [_summary(store, cell) for cell in plan.cells])


def _all_findings(
    plan: Plan, store: Store, summaries: Sequence[Mapping[str, Any] | None]
) -> dict[str, list[Finding]]:
    """What is known of the cells, by the costly checks too where they have been made (`bench.audit.note_audited`)."""
    from bench.audit import audited, extra_findings, extras, unique

    found = _judged(plan, store, summaries)
    images = audited(plan, store)
    if images is not None:
        more, _ = extra_findings([e for e in extras(plan, images) if e.parent.key in found], store)
        for key, others in more.items():
            found[key] = unique([*found[key], *others])
    return found


def _judged(
    plan: Plan, store: Store, summaries: Sequence[Mapping[str, Any] | None]
) -> dict[str, list[Finding]]:
    """`findings`, from the `_summary` of each cell."""
    from bench.audit import unit_findings

    complete: dict[str, tuple[Cell, Mapping[str, Any]]] = {}
    for cell, summary in zip(plan.cells, summaries, strict=True):
        if summary is not None:
            complete.setdefault(cell.key, (cell, summary))
    # Where the headline is no number, for want of ground truth, the scores of the images mean nothing.
    scores = {
        key: dict(zip(s["ids"], s["scores"], strict=True))
        for key, (_, s) in complete.items()
        if not math.isnan(s["metrics"][0]["value"])
    }
    across = group_findings([cell for cell, _ in complete.values()], scores)
    targets = {cell.target.role: cell.target for cell, _ in complete.values()}
    noted = {role: noted_findings(store, target) for role, target in targets.items()}
    out: dict[str, list[Finding]] = {}
    for key, (cell, summary) in complete.items():
        out[key] = [
            *(Finding(**entry) for entry in summary["findings"]),
            *reference_findings(cell, summary["metrics"]),
            *across.get(key, []),
            *noted[cell.target.role],
            *unit_findings(cell.attack),
        ]
    return out


__all__ = ["COLUMNS", "VOLATILE", "WORST", "Repeated", "cell_frame", "findings", "load_rows", "summarise"]
