"""Numbers of a cell: its metrics, how many images it fools, and how far it moves the target's features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bench.errors import GridError, StoreError, unknown
from bench.figures.base import Source, mean_line
from bench.frame import cell_metrics
from bench.grid import split_spec
from bench.plan import Cell
from bench.protocols import Attack, ImageRNG
from bench.registry import ATTACKS, METRICS
from bench.stats import wilson
from bench.threat import ModelOracle, Victim
from bench.views import View

FOOLING = "fooling_rate"
DISTANCE = "feature_distance"
OWN = (FOOLING, DISTANCE)

Distance = str | dict[str, Any]
"""An attack that ascends a distance of features (`cafa`, `ssp`), with its parameters: the distance is the attack's."""


class Quantities:
    """What a figure shows of each cell.

    `feature_distance`: mean over images of the distance between the target's features of what comes out of the defense
    and of the clean image. Anything else is a metric of the cell, as tables have it.

    Args:
        names: of quantities.
        distance: see `Distance`; `{name: cafa, mode: paper}` is equation 1 of Zhou et al. 2021,
            `{name: ssp, mode: paper}` the mean absolute difference of Naseer et al. 2020.

    Raises:
        GridError: `feature_distance` without a distance, or one that is no distance of features.
    """

    def __init__(self, names: Sequence[str], distance: Distance | None) -> None:
        self.names = tuple(dict.fromkeys(names))
        self.distance: Attack | None = None
        if not self.names:
            raise GridError(f"y: expected quantities, such as {FOOLING} or a metric")
        if (DISTANCE in self.names) != (distance is not None):
            raise GridError(f"`distance` belongs to the quantity '{DISTANCE}', and that needs it")
        if distance is not None:
            name, params, _ = split_spec(distance, "distance")
            attack: Any = ATTACKS.create(name, params, "distance")
            if not getattr(getattr(attack, "loss", None), "flat_at_clean", False):
                raise GridError(
                    f"distance: attack '{name}' does not ascend a distance of features; cafa and ssp do"
                )
            self.distance = attack

    def check(self, cells: Sequence[Cell]) -> None:
        """Refuse quantities that a cell's task does not have.

        Raises:
            GridError: the quantity, with the nearest name.
        """
        for cell in cells:
            task = cell.target.task
            own = [FOOLING] if task == "classification" else []
            for name in self.names:
                if name not in (known := [*cell_metrics(cell), *own, DISTANCE]):
                    raise GridError(f"y: {unknown(f'quantity of task {task}', name, known)}")

    def of(self, source: Source, cell: Cell) -> dict[str, dict[str, Any]]:
        """Quantity -> its value, low, high (95 %) and n.

        Raises:
            StoreError: the cell has not been run.
        """
        seen: dict[str, list[float]] = {name: [] for name in self.names if name in OWN}

        def consume(view: View) -> None:
            found = {}
            out = view.purify(view.attacked)
            if FOOLING in seen:
                said = view.model.predict(out.images, geometry=out.geometry)
                kept = view.purify(view.batch.images)
                before = view.model.predict(kept.images, geometry=kept.geometry)
                found[FOOLING] = [float(int(a) != int(b)) for a, b in zip(said, before, strict=True)]
            if DISTANCE in seen:
                if out.images.shape != view.batch.images.shape:
                    raise GridError(f"cell '{cell.label}': the defense resizes images: no {DISTANCE} exists")
                found[DISTANCE] = self.distances(view, out.images).tolist()
            for name, values in found.items():
                seen[name] += values

        if seen:
            source.views(cell, consume)
        lines = {name: mean_line(values) for name, values in seen.items()}
        if FOOLING in lines:
            line = lines[FOOLING]
            line["low"], line["high"] = wilson(line["value"] * line["n"], line["n"])
        return {name: lines[name] if name in lines else _metric(source, cell, name) for name in self.names}

    def distances(self, view: View, images: torch.Tensor) -> torch.Tensor:
        """Distance of each image's features from those of its clean form, (B,)."""
        attack: Any = self.distance
        rng = ImageRNG.for_images(view.cell.key, view.batch.ids).fork(DISTANCE)
        oracle = ModelOracle(Victim((view.model,)), attack, rng)
        objective = attack.loss.bind(oracle, view.batch.images, view.batch.targets, False)
        values: torch.Tensor = objective(oracle, images)
        return values


def _metric(source: Source, cell: Cell, name: str) -> dict[str, Any]:
    frame = source.frame
    lines = frame[
        (frame["cell"] == cell.key[:16])
        & (frame["metric"] == name)
        & (frame["attack"] == cell.attack_label)
        & (frame["defense"] == cell.defense_label)
        & (frame["role"] == cell.target.role)
    ]
    line = lines.iloc[0]
    if line["status"] not in ("ok", "partial"):
        raise StoreError(
            f"cell '{cell.label}' is {line['status']}{f': {line.reason}' if line['reason'] else ''}: run the grid first"
        )
    return {key: line[key] for key in ("value", "low", "high", "n")}


def scale(name: str) -> tuple[float, str]:
    """What to multiply a quantity by for print, and its axis label."""
    if name == DISTANCE:
        return 1.0, "feature distance"
    if name == FOOLING:
        return 100.0, "fooling rate (%)"
    metric = METRICS.create(name)
    percent = metric.unit == "%"
    arrow = "↑" if metric.higher_is_better else "↓"
    return (100.0 if percent else 1.0), f"{name}{' (%)' if percent else ''} {arrow}"
