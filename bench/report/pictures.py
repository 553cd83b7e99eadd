"""What only a store knows of cells: versions they ran with, and what their images look like."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import dataclass

import pandas as pd
import torch

from bench.errors import BenchError
from bench.frame import ADAPTIVE, WORST
from bench.pictures import RIGHT, Strip, picture, strip
from bench.plan import Cell, Plan
from bench.runner import cell_record
from bench.store import Store

LOG = logging.getLogger(__name__)
IMAGE_BYTES = 250_000
TOTAL_BYTES = 6_000_000
_RESOLUTIONS = (110, 80, 55)
_KNOWLEDGE = ("white_box", "bpda", "gray_box", "oblivious", "transfer")


@dataclass(frozen=True)
class Example:
    """One image of one cell.

    Attributes:
        cell, level_label: which cell.
        title: role, defense, attack and level.
        image: id of the image.
        text: what the model said of each panel, in words.
        png: the picture.
    """

    cell: str
    level_label: str
    title: str
    image: str
    text: str
    png: bytes


def versions_of(plan: Plan, store: Store) -> dict[str, str]:
    """Cell (16 characters of its key) -> versions, code and machine its first image was evaluated with."""
    found: dict[str, str] = {}
    for key, cell in {cell.key: cell for cell in plan.cells if cell.skip is None}.items():
        record = cell_record(store, cell)
        done = record.done()
        first = next((i for i in cell.target.ids if i in done), None)
        if first is None:
            continue
        environment = json.loads(record.read_rows([first])[0]["environment"])
        parts = [f"{name} {version}" for name, version in sorted(environment["versions"].items())]
        git = environment.get("git") or {}
        if "commit" in git:
            parts.append(f"commit {git['commit'][:12]}" + (" with local changes" if git.get("dirty") else ""))
        found[key[:16]] = ", ".join([*parts, f"on {environment['device']}"])
    return found


def chosen_cells(plan: Plan, lines: pd.DataFrame, count: int) -> list[Cell]:
    """At most `count` attacked cells of each role: no defense, then the defenses that hold best in the worst case.

    Of each defense: the attack, noise apart, that costs most at the most knowing level that ran.
    """
    chosen: list[Cell] = []
    for role in dict.fromkeys(lines["role"]):
        part = lines[(lines["role"] == role) & (lines["status"] == "ok")]
        part = part[part["metric"] == lines[lines["role"] == role]["metric"].iloc[0]]
        if not len(part):
            continue
        sign = 1.0 if bool(part["higher_is_better"].iloc[0]) else -1.0
        worst = part[(part["attack"] == WORST) & (part["level"] == ADAPTIVE)]
        held = {d: sign * v for d, v in zip(worst["defense"], worst["value"], strict=True)}
        names = sorted(
            dict.fromkeys(part["defense"]), key=lambda d: (d != "none", -held.get(d, float("-inf")))
        )
        for defense in names[:count]:
            ran = part[(part["defense"] == defense) & ~part["attack"].isin((WORST, "clean"))]
            ran = ran[ran["attack_name"] != "noise"]
            level = next((known for known in _KNOWLEDGE if (ran["level"] == known).any()), None)
            if level is None:
                continue
            ran = ran[ran["level"] == level]
            line = ran.iloc[int((sign * ran["value"]).to_numpy().argmin())]
            chosen += [
                cell
                for cell in plan.cells
                if cell.key.startswith(line["cell"]) and cell.level_label == line["level_label"]
            ][:1]
    return chosen


def first_right(plan: Plan, store: Store, role: str) -> int:
    """Position of the first image that the role's first defense on clean images gets right: a score of `RIGHT`.

    The best scored image where none is; 0 where no clean cell has finished.
    """
    for cell in plan.cells:
        if cell.target.role == role and cell.attack is None and cell.skip is None:
            record = cell_record(store, cell)
            ids = cell.target.ids
            if record.missing(ids):
                continue
            scores = [float(row["score"]) for row in record.read_rows(ids)]
            return next((i for i, score in enumerate(scores) if score >= RIGHT), scores.index(max(scores)))
    return 0


def examples_of(
    plan: Plan, store: Store, lines: pd.DataFrame, count: int, image: int | None
) -> tuple[list[Example], list[str]]:
    """Pictures of `count` cells a role, and what was left out and why.

    Args:
        plan, store: the grid and where its adversarial images are.
        lines: the long frame.
        count: cells a role.
        image: position in the dataset (the last image of a smaller one); None = see `first_right`.
    """
    found: list[Example] = []
    omitted: list[str] = []
    device = torch.device("cpu")
    places: dict[str, int] = {}
    for cell in chosen_cells(plan, lines, count):
        role = cell.target.role
        if role not in places:
            places[role] = first_right(plan, store, role) if image is None else image
        place = min(places[role], len(cell.target.ids) - 1)
        try:
            row = strip(cell, store, place, device)
        except BenchError as error:
            omitted.append(str(error))
            continue
        png, text = _drawn(row)
        if len(png) > IMAGE_BYTES:
            omitted.append(f"{cell.label}: its picture takes more than {IMAGE_BYTES // 1000} kB")
            continue
        if sum(len(e.png) for e in found) + len(png) > TOTAL_BYTES:
            omitted.append(
                f"{cell.label} and what follows: pictures take {TOTAL_BYTES // 1_000_000} MB already"
            )
            break
        title = f"{cell.target.role}: {cell.defense_label} against {cell.attack_label}, {cell.level_label}"
        found.append(Example(cell.key[:16], cell.level_label, title, cell.target.ids[place], text, png))
    return found, omitted


def _drawn(row: Strip) -> tuple[bytes, str]:
    """The picture at the best resolution that fits, and the captions below its panels."""
    figure = picture([row])
    captions = [f"{axes.get_title()}: {axes.get_xlabel()}" for axes in figure.axes if axes.get_xlabel()]
    data = b""
    for dpi in _RESOLUTIONS:
        sink = io.BytesIO()
        figure.savefig(sink, format="png", dpi=dpi, metadata={"Software": None})
        data = sink.getvalue()
        if len(data) <= IMAGE_BYTES:
            break
    return data, "; ".join(captions)
