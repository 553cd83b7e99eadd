"""The mini detectors: thresholds of the shipped weights, and the recipe's machinery."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.registry import MODELS
from bench.weights import load_state
from tasks.mini import manifest, zoo, zoo_detection
from tasks.mm.configs import load_config

NAMES = ("mini_ssd", "mini_mask_rcnn")
CONFIGS = Path(zoo_detection.CONFIGS)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_scores_meet_the_thresholds(name: str) -> None:
    entry = manifest.entry(name)
    scores = entry["scores"]
    assert scores["box_map50"] >= 0.75
    assert scores["box_map50, cls+loc, eps 8/255, 20 steps"] <= 0.05
    if name == "mini_mask_rcnn":
        assert scores["mask_map50"] >= 0.7
    assert entry["rebuild"] == f"python -m bench zoo build {name}"
    assert entry["recipe"]["scene_contrast"] == zoo_detection.CONTRAST
    assert entry["sha256"] == load_state(manifest.weights_path(name)).sha256


def test_both_together_are_small() -> None:
    assert sum(manifest.weights_path(name).stat().st_size for name in NAMES) <= 5.5e6


@pytest.mark.parametrize("name", NAMES)
def test_shipped_weights_see_and_fall(name: str) -> None:
    model = MODELS.create(name).load(torch.device("cpu"))
    config = load_config("mmdet", str(CONFIGS / f"{name}.py"))
    clean = zoo_detection.score_detector(model.network, config, count=16, kinds=())
    assert clean["box_map50"] > 0.75
    if name == "mini_mask_rcnn":
        assert clean["mask_map50"] > 0.7
    attacked = zoo_detection.score_detector(model.network, config, count=4, kinds=("cls+loc",))
    assert attacked["box_map50, cls+loc, eps 8/255, 20 steps"] < 0.25
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_and_writes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole recipe in miniature: a few steps, few scenes; deterministic for a seed."""
    (tmp_path / "configs").mkdir()
    text = (CONFIGS / f"{name}.py").read_text()
    assert "batch, iters = 16, " in text
    short = (
        text.replace("batch, iters = 16, ", "batch, iters = 2, 3 #")
        .replace("end=200", "end=1")
        .replace("begin=200", "begin=1")
    )
    (tmp_path / "configs" / f"{name}.py").write_text(short)
    monkeypatch.setattr(zoo_detection, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(zoo_detection, "TEST_SCENES", 2)
    monkeypatch.setitem(zoo_detection._PRETRAIN, "epochs", 1)
    monkeypatch.setattr(zoo_detection.data, "SPLIT_SIZES", {**zoo_detection.data.SPLIT_SIZES, "train": 128})
    monkeypatch.setattr(
        zoo_detection,
        "score_detector",
        lambda network, config, **_: {"box_map50": float(len(list(network.parameters())))},
    )
    told: list[tuple[int, int]] = []
    entries = [
        zoo.build(name, tmp_path / folder, progress=lambda done, total, note: told.append((done, total)))
        for folder in ("first", "second")
    ]
    assert entries[0]["sha256"] == entries[1]["sha256"]
    assert told and all(done <= total for done, total in told)
    state = load_state(tmp_path / "first" / f"{name}.safetensors").state
    assert state.keys() == load_state(manifest.weights_path(name)).state.keys()
    shipped = manifest.entry(name)
    assert (
        shipped["scores"]["box_map50"] != entries[0]["scores"]["box_map50"]
    )  # the shipped manifest was left alone
