"""Images without ground truth, from the grid to the table: attacked, marked, and no number made of nothing."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torchvision.transforms.functional import to_pil_image

from bench.registry import TASKS

PLUGIN = Path(__file__).resolve().parents[1] / "plugins" / "empty_truth.py"
BUDGET = {"eps": "8/255", "alpha": "2/255", "steps": 5}
SEGMENTATION: dict[str, Any] = {
    "noise": {"name": "noise", "eps": "8/255"},
    "bim": {"name": "bim", **BUDGET, "steps": 10},
    "bim-t": {"name": "bim", **BUDGET, "target": "next"},
    "segpgd": {"name": "segpgd", **BUDGET},
    "cw_seg": {"name": "cw_seg", **BUDGET},
    "deepfool_seg": {"name": "deepfool_seg", "eps": "8/255", "steps": 5},
    "sea": {"name": "sea", "eps": "8/255", "steps": 2},
}
DETECTION: dict[str, Any] = {
    "noise": {"name": "noise", "eps": "8/255"},
    "loc": {"name": "bim", "loss": "loc", **BUDGET, "steps": 10},
    "dag": {"name": "dag", "eps": "8/255", "steps": 2},
    "tog-mislabelling": {"name": "tog", "mode": "mislabelling", **BUDGET},
    "tog-vanishing": {"name": "tog", "mode": "vanishing", **BUDGET},
}


@pytest.mark.parametrize(
    ("dataset", "model", "attacks", "metric"),
    [
        ("ignored_scenes", "mini_pspnet", SEGMENTATION, "miou"),
        ("empty_scenes", "mini_ssd", DETECTION, "box_map50"),
    ],
)
def test_nothing_to_attack(
    bench: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    dataset: str,
    model: str,
    attacks: dict[str, Any],
    metric: str,
) -> None:
    profile = {
        "name": "empty",
        "roles": {"scenes": {"dataset": {"name": dataset, "count": 2}, "model": model}},
    }
    grid = {
        "name": "empty",
        "profile": str(tmp_path / "profile.yaml"),
        "plugins": [str(PLUGIN)],
        "defenses": {"jpeg": "jpeg"},
        "attacks": attacks,
        "blocks": [
            {
                "roles": ["scenes"],
                "defenses": ["jpeg"],
                "attacks": [*attacks],
                "threats": ["oblivious", "bpda"],
            },
            # What is recorded of the weights says nothing about these images.
            {"roles": ["scenes"], "defenses": ["none"], "attacks": [*attacks], "threats": ["oblivious"]},
        ],
        "tables": [{"name": "main", "rows": ["level", "attack"], "columns": ["defense"], "metric": metric}],
    }
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(profile))
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    where = ("--grid", str(tmp_path / "grid.yaml"), "--store", str(tmp_path / "store"))
    code, _, err = bench("run", *where, "--out", str(tmp_path / "out"), "--workers", "1")
    assert code == 0, err
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    # Of nothing there is no mean: neither 0 nor 100 %.
    wanted = [row for row in rows if row["metric"] == metric]
    assert len(wanted) >= 2 * len(attacks) and {row["value"] for row in wanted} == {""}
    assert "n/a" in (tmp_path / "out" / "main.md").read_text()
    code, said, _ = bench("audit", *where)
    assert code == 0 and "SUSPECT" not in said
    for name in attacks.keys() - {"noise"}:
        for level in ("oblivious", "bpda"):
            (line,) = [text for text in said.splitlines() if f"jpeg / {name} / {level}:" in text]
            assert "nothing-to-attack (2 of 2 images)" in line


def test_images_without_a_label_are_one_line(
    bench: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """Nothing can be judged by them, so nothing is written."""
    for number in range(3):
        to_pil_image(torch.rand(3, 40, 40)).save(tmp_path / f"{number}.png")
    dataset = {
        "name": "photographs",
        "root": str(tmp_path),
        "listed": False,
        "size": 32,
        "side": 32,
        "count": 3,
    }
    profile = {"name": "p", "roles": {"classification": {"dataset": dataset, "model": "mini_resnet"}}}
    block = {
        "roles": ["classification"], "defenses": ["none"], "attacks": ["pgd"], "threats": ["oblivious"],
    }  # fmt: skip
    grid = {
        "name": "unlabelled",
        "profile": str(tmp_path / "profile.yaml"),
        "defenses": {"none": "none"},
        "attacks": {"pgd": {"name": "pgd", "steps": 2}},
        "blocks": [block],
    }
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(profile))
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    options = ("--grid", str(tmp_path / "grid.yaml"), "--store", str(tmp_path / "s"), "--workers", "1")
    code, _, err = bench("run", *options, "--out", str(tmp_path / "o"))
    assert code == 2 and "Traceback" not in err
    assert "dataset photographs, image 0: it has no label: attacks and accuracy need one" in " ".join(
        err.split()
    )


def test_labels_must_be_classes_of_the_model() -> None:
    task = TASKS.create("classification")
    task.check_truth(9, 10)
    for label, message in (
        (-1, "it has no label"),
        (None, "it has no label"),
        (10, "label 10, but the model's classes are 0..9"),
    ):
        with pytest.raises(ValueError, match=message):
            task.check_truth(label, 10)
