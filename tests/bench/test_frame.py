"""Worst cases: over a level's attacks, and over everything the attacker can try."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from bench.cli import main
from bench.frame import ADAPTIVE, WORST, cell_frame, load_rows
from bench.plan import Options, make_plan
from bench.runner import cell_record
from bench.store import Store
from tests.bench.test_run import GRID

Ran = tuple[pd.DataFrame, Options, Store]


def run_grid(folder: Path, changes: Mapping[str, Any]) -> Ran:
    grid, store, out = folder / "toy.yaml", folder / "s", folder / "o"
    grid.write_text(yaml.safe_dump({**GRID, **changes}))
    main(["run", "--grid", str(grid), "--store", str(store), "--out", str(out), "-q", "--workers", "1"])
    return cell_frame(make_plan(Options(grid)), Store(store)), Options(grid), Store(store)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return run_grid(tmp_path_factory.mktemp("frame"), {"evaluate": {"repeats": 2}})


def test_attacks_without_a_budget_do_not_count(tmp_path: Path) -> None:
    """DDN fools every image, at whatever distance that takes."""
    attacks = {"weak": {"name": "fgsm", "eps": "1/255"}, "ddn": {"name": "ddn", "steps": 40}}
    block = {
        "roles": ["classification"], "defenses": ["none"], "attacks": ["weak", "ddn"], "threats": ["oblivious"],
    }  # fmt: skip
    changes = {"evaluate": {}, "attacks": attacks, "blocks": [block], "tables": []}
    frame, _, _ = run_grid(tmp_path, changes)
    values = frame[frame["metric"] == "accuracy"].set_index(["level", "attack"])["value"]
    assert values["oblivious", "ddn"] == 0 < values["oblivious", "weak"]
    assert values["oblivious", WORST] == values["oblivious", "weak"]

    (tmp_path / "alone").mkdir()
    changes["blocks"] = [{**block, "attacks": ["ddn"]}]
    frame, _, _ = run_grid(tmp_path / "alone", changes)
    worst = frame[frame["attack"] == WORST]
    assert set(worst["status"]) == {"skip"} and worst["reason"].str.contains("budget").all()


def test_adaptive_is_the_worst_of_every_image_over_all_levels(
    ran: Ran,
) -> None:
    frame, options, store = ran
    plan = make_plan(options)
    for defense in ("none", "random", "jpeg", "chain"):
        cells = [
            c for c in plan.cells if c.defense_label == defense and c.attack is not None and c.skip is None
        ]
        scores = [[row["score"] for row in load_rows(cell_record(store, c), c.target.ids)] for c in cells]
        expected = sum(min(image) for image in zip(*scores, strict=True)) / len(scores[0])
        line = frame[(frame["defense"] == defense) & (frame["level"] == ADAPTIVE)]
        assert list(line["attack"]) == [WORST] * len(line) and set(line["status"]) == {"ok"}
        assert float(line[line["metric"] == "accuracy"]["value"].iloc[0]) == pytest.approx(expected)


def test_a_skipped_level_has_no_worst_case_but_does_not_stop_the_adaptive_one(
    ran: Ran,
) -> None:
    frame = ran[0]
    worst = frame[(frame["attack"] == WORST) & (frame["defense"] == "jpeg")]
    status = {level: set(lines["status"]) for level, lines in worst.groupby("level", observed=True)}
    assert status["white_box"] == {"skip"} and status[ADAPTIVE] == {"ok"}


def test_nothing_is_above_what_it_contains(ran: Ran) -> None:
    frame = ran[0]
    ok = frame[(frame["status"] == "ok") & (frame["level"] != "clean")]
    for (_, _), part in ok.groupby(["defense", "metric"], observed=True):
        lowest = float(part["value"].min() if part["higher_is_better"].all() else part["value"].max())
        assert float(part[part["level"] == ADAPTIVE]["value"].iloc[0]) == pytest.approx(lowest, nan_ok=True)


def test_before_anything_has_run_it_is_pending(ran: Ran) -> None:
    frame = cell_frame(make_plan(ran[1]), None)
    assert set(frame[frame["level"] == ADAPTIVE]["status"]) == {"pending"}


def test_a_defense_that_cannot_be_trained_for_a_role_is_a_skip(tmp_path: Path) -> None:
    block = {"roles": ["ssd"], "defenses": ["none", "cafd"], "attacks": ["cls"], "threats": ["oblivious"]}
    attacks = {"cls": {"name": "bim", "loss": "cls", "steps": 1}}
    grid = tmp_path / "detectors.yaml"
    grid.write_text(yaml.safe_dump({"name": "d", "profile": "mini", "attacks": attacks, "blocks": [block]}))
    frame = cell_frame(make_plan(Options(grid)), None)
    lines = frame[(frame["defense"] == "cafd") & (frame["attack"] == "cls")]
    assert set(lines["status"]) == {"skip"}
    assert set(lines["reason"]) == {
        "recipe 'cafd' trains for classification, segmentation, not for detection"
    }
