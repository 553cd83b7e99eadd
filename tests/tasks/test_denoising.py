"""Metrics taken from pixels: asked for by a grid, right by hand, for every task, and absent where nobody asks."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Run = Callable[..., tuple[int, str, str]]
GRID: dict[str, Any] = {
    "name": "denoising",
    "images": {"classification": 6, "segmentation": 2, "detection": 2},
    "evaluate": {"metrics": ["denoising_loss"]},
    "defenses": {"shift": {"name": "noise", "eps": "8/255"}, "r&p": "random_resize_pad"},
    "attacks": {
        "corner": {"name": "noise", "eps": "8/255"},
        "pgd": {"name": "pgd", "eps": "8/255", "alpha": "4/255", "steps": 3},
    },
    "blocks": [
        {
            "roles": ["classification", "pspnet", "ssd"],
            "defenses": ["none", "shift"],
            "attacks": ["corner"],
            "threats": ["oblivious"],
        },
        {
            "roles": ["classification"],
            "defenses": ["none", "r&p"],
            "attacks": ["pgd"],
            "threats": ["oblivious"],
        },
    ],
    "tables": [
        {
            "name": "main",
            "rows": ["role", "level_label", "attack"],
            "columns": ["defense"],
            "metric": "denoising_loss",
            "decimals": 4,
        }
    ],
}


def run(bench: Run, folder: Path, **changes: Any) -> tuple[int, str, list[dict[str, str]]]:
    (folder / "grid.yaml").write_text(yaml.safe_dump({**GRID, **changes}))
    code, _, err = bench(
        "run", "--grid", str(folder / "grid.yaml"), "--store", str(folder / "store"), "--out", str(folder / "out"),
        "--workers", "1",
    )  # fmt: skip
    if code:
        return code, err, []
    with (folder / "out" / "results.csv").open() as file:
        return code, err, list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("denoising")


def test_values_and_where_there_are_none(bench: Run, folder: Path) -> None:
    code, err, rows = run(bench, folder)
    assert code == 0, err
    found = {
        (row["role"], row["defense"], row["attack"]): row for row in rows if row["metric"] == "denoising_loss"
    }
    for role in ("classification", "pspnet", "ssd"):
        assert float(found[role, "none", "clean"]["value"]) == 0
        # Noise moves every pixel by eps, attack and defense alike, where the ends of [0,1] do not stop it.
        eps = 8 / 255
        assert 0.7 * eps < float(found[role, "none", "corner"]["value"]) <= eps + 1e-6
        assert 0.7 * eps < float(found[role, "shift", "clean"]["value"]) <= eps + 1e-6
        row = found[role, "shift", "clean"]
        assert float(row["low"]) <= float(row["value"]) <= float(row["high"]) and row["repeats"] == "3"
        assert row["higher_is_better"] == "False" and row["unit"] == ""
    assert found["classification", "none", "worst case"]["value"] != ""
    # The image comes back larger: pixels have no counterpart, and every other metric has its value.
    assert found["classification", "r&p", "pgd"]["value"] == ""
    other = [r for r in rows if r["defense"] == "r&p" and r["attack"] == "pgd" and r["metric"] == "accuracy"]
    assert [bool(row["value"]) for row in other] == [True]
    assert "0.0000" in (folder / "out" / "main.md").read_text()


def test_nobody_asked(bench: Run, folder: Path) -> None:
    code, err, rows = run(bench, folder, evaluate={}, tables=[])
    assert code == 0, err
    assert "denoising_loss" not in {row["metric"] for row in rows}


def test_a_name_that_is_none(bench: Run, tmp_path: Path) -> None:
    code, err, _ = run(bench, tmp_path, evaluate={"metrics": ["denoising_los"]})
    line = err.strip().splitlines()[-1]
    assert code == 2 and "evaluate.metrics" in line and "did you mean 'denoising_loss'" in line
    code, err, _ = run(bench, tmp_path, evaluate={"metrics": ["accuracy"]})
    assert code == 2 and "accuracy" in err.strip().splitlines()[-1] and "Traceback" not in err
