"""Worst cases: over a level's attacks, and over everything the attacker can try."""

from __future__ import annotations

import pandas as pd
import pytest
import yaml

from bench.cli import main
from bench.frame import ADAPTIVE, WORST, cell_frame, load_rows
from bench.plan import Options, make_plan
from bench.runner import cell_record
from bench.store import Store
from tests.bench.test_run import GRID


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Options, Store]:
    folder = tmp_path_factory.mktemp("frame")
    grid = folder / "toy.yaml"
    grid.write_text(yaml.safe_dump({**GRID, "evaluate": {"repeats": 2}}))
    main(
        [
            "run",
            "--grid",
            str(grid),
            "--store",
            str(folder / "s"),
            "--out",
            str(folder / "o"),
            "-q",
            "--workers",
            "1",
        ]
    )
    options = Options(grid)
    return cell_frame(make_plan(options), Store(folder / "s")), options, Store(folder / "s")


def test_adaptive_is_the_worst_of_every_image_over_all_levels(
    ran: tuple[pd.DataFrame, Options, Store],
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
    ran: tuple[pd.DataFrame, Options, Store],
) -> None:
    frame = ran[0]
    worst = frame[(frame["attack"] == WORST) & (frame["defense"] == "jpeg")]
    status = {level: set(lines["status"]) for level, lines in worst.groupby("level", observed=True)}
    assert status["white_box"] == {"skip"} and status[ADAPTIVE] == {"ok"}


def test_nothing_is_above_what_it_contains(ran: tuple[pd.DataFrame, Options, Store]) -> None:
    frame = ran[0]
    ok = frame[(frame["status"] == "ok") & (frame["level"] != "clean")]
    for (_, _), part in ok.groupby(["defense", "metric"], observed=True):
        lowest = float(part["value"].min() if part["higher_is_better"].all() else part["value"].max())
        assert float(part[part["level"] == ADAPTIVE]["value"].iloc[0]) == pytest.approx(lowest, nan_ok=True)


def test_before_anything_has_run_it_is_pending(ran: tuple[pd.DataFrame, Options, Store]) -> None:
    frame = cell_frame(make_plan(ran[1]), None)
    assert set(frame[frame["level"] == ADAPTIVE]["status"]) == {"pending"}
