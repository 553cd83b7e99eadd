"""What only a store knows of cells: versions they ran with, and what their images look like."""

from __future__ import annotations

import base64
import io
import itertools
import json
import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pandas as pd
import torch
from PIL import Image

from bench.errors import BenchError
from bench.frame import ADAPTIVE, WORST
from bench.pictures import RIGHT, Strip, picture, strip
from bench.plan import Cell, Plan
from bench.report.page import Example, Pictures
from bench.runner import cell_record, craft_record
from bench.store import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG = logging.getLogger(__name__)
TEXT_BYTES = 2_000
"""What a picture adds to the page besides its own bytes."""
_ENCODINGS: tuple[tuple[int, dict[str, object]], ...] = (
    (110, {"lossless": True}),
    (110, {"quality": 80}),
    (80, {"quality": 80}),
)
"""Dots per inch and WebP options, best first. Noise does not shrink with the resolution: it is compressed before."""
_KNOWLEDGE = ("white_box", "bpda", "gray_box", "oblivious", "transfer")


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


def chosen_cells(plan: Plan, lines: pd.DataFrame) -> Iterator[Cell]:
    """The attacked cells that finished, each once, in the order in which they deserve a picture.

    Of every role, defense and level, first the attack, noise apart, that costs most, then the next one. Within a round
    the most knowing level first; there no defense, then the defenses that hold best in the worst case, roles in turns.
    """
    main = lines.groupby("role", sort=False)["metric"].transform("first")
    part = lines[(lines["status"] == "ok") & (lines["metric"] == main)]
    part = part.assign(left=part["value"].where(part["higher_is_better"].astype(bool), -part["value"]))
    worst = part[(part["attack"] == WORST) & (part["level"] == ADAPTIVE)]
    held = {
        (role, defense): (defense != "none", -left)
        for role, defense, left in worst[["role", "defense", "left"]].itertuples(index=False)
    }
    ran = part[part["level"].isin(_KNOWLEDGE) & ~part["attack"].isin((WORST, "clean"))]
    ran = ran[ran["attack_name"] != "noise"]
    places: dict[tuple[str, str], int] = {}
    for role, group in ran.groupby("role", sort=False):
        names = dict.fromkeys(group["defense"])
        ordered = sorted(names, key=lambda d: held.get((role, d), (d != "none", float("inf"))))
        places |= {(str(role), defense): place for place, defense in enumerate(ordered)}
    ran = ran.assign(
        round=ran.groupby(["role", "defense", "level"])["left"].rank(method="first"),
        known=ran["level"].map(_KNOWLEDGE.index),
        place=[places[key] for key in zip(ran["role"], ran["defense"], strict=True)],
    ).sort_values(["round", "known", "place"], kind="stable")
    cells = {(cell.key[:16], cell.level_label): cell for cell in plan.cells}
    for key in ran.drop_duplicates("cell")[["cell", "level_label"]].itertuples(index=False, name=None):
        if key in cells:
            yield cells[key]


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
    plan: Plan, store: Store, lines: pd.DataFrame, count: int, image: int | None, room: int
) -> Pictures:
    """One picture of each of `count` cells, and what was left out and why.

    Args:
        plan, store: the grid and where its adversarial images are.
        lines: the long frame.
        count: at most so many cells.
        image: position in the dataset (the last image of a smaller one); None = see `first_right`.
        room: bytes that they may add to the page.
    """
    found: list[Example] = []
    omitted: list[str] = []
    missing = 0
    share = room // count
    device = torch.device("cpu")
    places: dict[str, int] = {}
    for cell in chosen_cells(plan, lines):
        if len(found) == count:
            break
        role = cell.target.role
        if role not in places:
            places[role] = first_right(plan, store, role) if image is None else image
        name = cell.target.ids[min(places[role], len(cell.target.ids) - 1)]
        if cell.craft is None or craft_record(store, cell.craft).missing([name]):
            missing += 1
            continue
        try:
            row = strip(cell, store, name, device)
        except BenchError as error:
            omitted.append(str(error))
            continue
        example = _drawn(cell, row, share)
        size = _size(example.panels)
        if size > room:
            omitted.append(
                f"{cell.label} and what follows: the page has no room for more; --max-mb allows more"
            )
            break
        room -= size
        found.append(example)
    if missing:
        omitted.append(f"{missing} cells whose adversarial image is not in {store.root}: run the grid again")
    rule = "the first that its model gets right when it is clean" if image is None else f"number {image}"
    why = "" if found else "see below" if omitted else "no attacked cell has finished"
    return Pictures(tuple(found), tuple(omitted), rule, why)


def _drawn(cell: Cell, row: Strip, share: int) -> Example:
    """The best picture that takes at most `share` bytes, or the smallest, panel by panel with its caption."""
    figure = picture([row])
    # The page names the cell; its level may be another one where levels coincide.
    figure.axes[0].set_ylabel("")
    captions = [": ".join(filter(None, (axes.get_title(), axes.get_xlabel()))) for axes in figure.axes]
    panels: tuple[tuple[str, str], ...] = ()
    for dpi, options in _ENCODINGS:
        panels = tuple(
            zip(captions, (_encoded(image, options) for image in _columns(figure, dpi)), strict=True)
        )
        if _size(panels) <= share:
            break
    return Example(cell.key[:16], row.image, panels)


def _size(panels: tuple[tuple[str, str], ...]) -> int:
    """Bytes that a picture adds to the page."""
    return sum(len(uri) for _, uri in panels) + TEXT_BYTES


def _columns(figure: Figure, dpi: int) -> list[Image.Image]:
    """The columns of a figure of one row, of one size, each centred on its axes: a narrow page wraps them."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=dpi)
    drawn = Image.open(sink).convert("RGB")
    scale = dpi / figure.dpi
    centres = [
        scale * (axes.get_window_extent().x0 + axes.get_window_extent().x1) / 2 for axes in figure.axes
    ]
    # Captions may be wider than the axes: cut between them.
    boxes = [box for box in (axes.get_tightbbox() for axes in figure.axes) if box is not None]
    between = [scale * (a.x1 + b.x0) / 2 for a, b in itertools.pairwise(boxes)]
    edges = [round(x) for x in (0, *between, drawn.width)]
    half = max(max(c - a, b - c) for c, (a, b) in zip(centres, itertools.pairwise(edges), strict=True))
    found = []
    for centre, (left, right) in zip(centres, itertools.pairwise(edges), strict=True):
        panel = Image.new("RGB", (math.ceil(2 * half), drawn.height), "white")
        panel.paste(drawn.crop((left, 0, right, drawn.height)), (round(half - centre + left), 0))
        found.append(panel)
    return found


def _encoded(image: Image.Image, options: dict[str, object]) -> str:
    """As a data address."""
    sink = io.BytesIO()
    image.save(sink, format="webp", **options)
    return "data:image/webp;base64," + base64.b64encode(sink.getvalue()).decode()
