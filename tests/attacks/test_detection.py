"""DAG, TOG and the mask loss on the mini detectors: what each is meant to do, budgets, images without objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from attacks.tog import TOG
from bench.errors import GridError, NotApplicable, PluginError
from bench.protocols import Attack, ImageRNG
from bench.registry import ATTACKS, DATASETS, METRICS, MODELS, TASKS
from bench.threat import ModelOracle, Victim
from tasks.detection.model import Detector
from tasks.detection.objects import Detections, Objects

EPS = 8 / 255
COUNT = 3
NOTHING = Objects(np.zeros((0, 4)), np.zeros(0, dtype=np.int64), (96, 96), 10)
ATTACK = {
    "dag": {"eps": "8/255", "gamma": "2/255", "steps": 6},
    "tog": {"steps": 4},
    "tog-vanishing": {"mode": "vanishing", "steps": 4},
    "tog-fabrication": {"mode": "fabrication", "steps": 4},
    "tog-likely": {"mode": "mislabelling", "steps": 4},
    "tog-targeted": {"mode": "mislabelling", "target": "next", "steps": 4},
}


def load(name: str) -> Detector:
    model = MODELS.create(name).load(torch.device("cpu"))
    assert isinstance(model, Detector)
    return model


@pytest.fixture(scope="module")
def ssd() -> Detector:
    return load("mini_ssd")


@pytest.fixture(scope="module")
def mask_rcnn() -> Detector:
    return load("mini_mask_rcnn")


@pytest.fixture(scope="module")
def scenes() -> tuple[Tensor, list[Objects]]:
    data = DATASETS.create("mini_scenes_det")
    samples = [data[i] for i in range(3, 3 + COUNT)]
    return torch.stack([s.image for s in samples]), [s.target for s in samples]


def run(
    attack: Attack, model: Detector, images: Tensor, targets: Sequence[Any], seeds: Sequence[int]
) -> Tensor:
    rng = ImageRNG(seeds)
    if attack.target is not None:
        task = TASKS.create("detection")
        targets = task.attack_targets(attack.target, targets, 10, rng.fork("target"))
    oracle = ModelOracle(Victim((model,)), attack, rng.fork("oracle"))
    out = attack.run(oracle, images, targets, rng.fork("attack"))
    assert all(trace.nonfinite == 0 and trace.backwards == attack.passes() for trace in oracle.traces)
    return out


def crafted(
    name: str, params: dict[str, Any], model: Detector, scenes: tuple[Tensor, list[Objects]]
) -> Tensor:
    return run(ATTACKS.create(name, params), model, *scenes, range(COUNT))


def score(metric: str, model: Detector, images: Tensor, targets: Sequence[Objects]) -> float:
    task, measure = TASKS.create("detection"), METRICS.create(metric)
    rows = [task.rows(p, t) for p, t in zip(model.predict(images), targets, strict=True)]
    return float(measure.value(measure.prepare(rows)))


def seen(model: Detector, images: Tensor, threshold: float) -> int:
    return sum(int((found.scores >= threshold).sum()) for found in model.predict(images))


# -- what all have in common ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", list(ATTACK))
def test_budget_company_and_determinism(
    case: str, ssd: Detector, scenes: tuple[Tensor, list[Objects]]
) -> None:
    images, targets = scenes
    before = images.clone()

    def made() -> Attack:
        attack: Attack = ATTACKS.create(case.split("-")[0], ATTACK[case])
        return attack

    out = run(made(), ssd, images, targets, range(COUNT))
    assert torch.equal(images, before) and torch.isfinite(out).all()
    assert out.min() >= 0 and out.max() <= 1 and (out - images).abs().max() <= EPS + 1e-6
    assert ((out - images).abs().flatten(1).amax(1) > 1 / 255).all()
    assert score("box_map50", ssd, out, targets) < score("box_map50", ssd, images, targets)
    alone = run(made(), ssd, images[[2, 0]], [targets[2], targets[0]], [2, 0])
    assert torch.equal(alone, out[[2, 0]])


def test_images_without_objects(ssd: Detector, scenes: tuple[Tensor, list[Objects]]) -> None:
    images = scenes[0][:2]
    crowd = replace(scenes[1][1], crowd=np.ones(len(scenes[1][1]), dtype=bool))
    for case in ("dag", "tog-targeted"):
        attack: Attack = ATTACKS.create(case.split("-")[0], ATTACK[case])
        out = run(attack, ssd, images, [NOTHING, crowd], range(2))
        assert torch.equal(out, images), case
    # What is detected counts, not what is there.
    blank = torch.full_like(images[:1], 0.5)
    assert seen(ssd, blank, 0.5) == 0
    for case in ("tog", "tog-likely"):
        attack = ATTACKS.create("tog", ATTACK[case])
        assert torch.equal(run(attack, ssd, blank, scenes[1][:1], [0]), blank), case
        assert not torch.equal(run(attack, ssd, images[:1], [NOTHING], [0]), images[:1]), case


# -- DAG --------------------------------------------------------------------------------------------------------------
def test_dag_as_published_makes_no_candidate_right(
    ssd: Detector, scenes: tuple[Tensor, list[Objects]]
) -> None:
    images, targets = scenes
    attack = ATTACKS.create("dag", {"gamma": "2/255", "steps": 25, "target": "next"})
    assert attack.eps is None and attack.norm is None
    out = run(attack, ssd, images, targets, range(COUNT))
    wrong = TASKS.create("detection").attack_targets("next", targets, 10, ImageRNG(range(COUNT)))
    assert (ssd.loss(images, wrong, "swap") < 0).all()
    assert (ssd.loss(out, wrong, "swap") == 0).all()
    assert out.min() >= 0 and out.max() <= 1
    # Done is done: more steps change nothing.
    longer = ATTACKS.create("dag", {"gamma": "2/255", "steps": 30, "target": "next"})
    assert torch.equal(run(longer, ssd, images, targets, range(COUNT)), out)


def test_behind_dag_the_right_class_stays_second(ssd: Detector, scenes: tuple[Tensor, list[Objects]]) -> None:
    """So mAP, which ranks the boxes of each class by themselves, falls less than the share of right candidates."""
    _, targets = scenes
    out = crafted("dag", {"gamma": "2/255", "steps": 25, "target": "next"}, ssd, scenes)
    seconds = objects = 0
    for found, truth in zip(ssd.predict(out), targets, strict=True):
        x, y, width, height = (
            np.asarray(truth.boxes, dtype=np.float32).T * np.tile(truth.scale[::-1], 2)[:, None]
        )
        corners = torch.from_numpy(np.stack([x, y, x + width, y + height], 1)).float()
        overlaps = box_iou(corners, torch.as_tensor(found.boxes).float()) > 0.5
        labels, scores = torch.as_tensor(found.labels), torch.as_tensor(found.scores)
        for near, label in zip(overlaps, truth.labels.tolist(), strict=True):
            right, wrong = (scores[near & here].tolist() for here in (labels == label, labels != label))
            assert max(right, default=0.0) < max(wrong)
            seconds += bool(right)
            objects += 1
    assert seconds >= 0.8 * objects > 0


def test_dag_step(ssd: Detector, scenes: tuple[Tensor, list[Objects]]) -> None:
    images, targets = scenes
    wrong = TASKS.create("detection").attack_targets("next", targets, 10, ImageRNG(range(COUNT)))
    x = images.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(ssd.loss(x, wrong, "swap").sum(), x)
    expected = (images + 1 / 510 * g / g.abs().amax((1, 2, 3), keepdim=True)).clamp(0, 1)
    out = crafted("dag", {"steps": 1, "target": "next"}, ssd, scenes)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-7)


# -- TOG --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["mini_ssd", "mini_mask_rcnn"])
def test_vanishing_removes_and_fabrication_adds(
    name: str, request: pytest.FixtureRequest, scenes: tuple[Tensor, list[Objects]]
) -> None:
    model: Detector = request.getfixturevalue(name.removeprefix("mini_"))
    images, _ = scenes
    before = [seen(model, images, t) for t in (0.5, 0.1)]
    gone = crafted("tog", {"mode": "vanishing"}, model, scenes)
    assert before[0] >= COUNT and seen(model, gone, 0.5) <= before[0] / 2
    assert seen(model, gone, 0.1) < before[1]
    more = crafted("tog", {"mode": "fabrication"}, model, scenes)
    assert seen(model, more, 0.1) >= 1.8 * before[1]


def test_untargeted_raises_the_loss_towards_its_own_detections(
    ssd: Detector, scenes: tuple[Tensor, list[Objects]]
) -> None:
    images, targets = scenes
    own = [found.above(0.5).as_objects(t) for found, t in zip(ssd.predict(images), targets, strict=True)]
    out = crafted("tog", {"steps": 4}, ssd, scenes)
    assert (ssd.loss(out, own, "cls+loc") > 2 * ssd.loss(images, own, "cls+loc")).all()


def test_mislabelling_reaches_wrong_labels(ssd: Detector, scenes: tuple[Tensor, list[Objects]]) -> None:
    images, targets = scenes
    attack = ATTACKS.create("tog", {"mode": "mislabelling", "steps": 6})
    assert isinstance(attack, TOG)
    goals = [attack._goal(found.above(0.5), t) for found, t in zip(ssd.predict(images), targets, strict=True)]
    out = run(attack, ssd, images, targets, range(COUNT))
    before, after = ssd.loss(images, goals, "cls"), ssd.loss(out, goals, "cls")
    assert (after < before).all() and after.sum() < 0.6 * before.sum()


def test_likeliest_and_least_likely_labels() -> None:
    found = Detections(
        torch.tensor([[0.0, 0, 8, 8], [4, 4, 20, 20]]), torch.tensor([0.6, 0.7]), torch.tensor([1, 0]),
        class_scores=torch.tensor([[0.1, 0.6, 0.2], [0.7, 0.05, 0.15]]),
    )  # fmt: skip
    for wrong, labels in (("ml", [2, 2]), ("ll", [0, 1])):
        goal = TOG("mislabelling", wrong=wrong)._goal(found, NOTHING)
        assert goal.labels.tolist() == labels and goal.true_labels.tolist() == [1, 0]
        assert goal.boxes.tolist() == [[0, 0, 8, 8], [4, 4, 16, 16]]
    with pytest.raises(NotApplicable, match="give the attack a target rule"):
        TOG("mislabelling")._goal(replace(found, class_scores=None), NOTHING)


# -- instance masks ---------------------------------------------------------------------------------------------------
def test_mask_loss(ssd: Detector, mask_rcnn: Detector, scenes: tuple[Tensor, list[Objects]]) -> None:
    params = {"loss": "mask", "eps": "8/255", "alpha": "2/255", "steps": 5}
    images, targets = scenes
    out = crafted("bim", params, mask_rcnn, scenes)
    streams = ImageRNG(range(COUNT))
    before, after = (mask_rcnn.loss(x, targets, "mask", rng=streams) for x in (images, out))
    assert (after > 2 * before).all()
    assert score("mask_map", mask_rcnn, out, targets) < 0.7 * score("mask_map", mask_rcnn, images, targets)
    empty = run(ATTACKS.create("bim", params), mask_rcnn, images[:1], [replace(NOTHING, masks=())], [0])
    assert torch.equal(empty, images[:1])
    with pytest.raises(NotApplicable, match="predicts no masks"):
        crafted("bim", params, ssd, scenes)


def test_bad_parameters(ssd: Detector, scenes: tuple[Tensor, list[Objects]]) -> None:
    for name, params, message in (
        ("tog", {"mode": "vanishing", "target": "next"}, "belongs to mode mislabelling"),
        ("tog", {"mode": "blinding"}, "mode"),
        ("tog", {"confidence": 1.5}, "confidence"),
        ("dag", {"gamma": 0}, "gamma"),
    ):
        with pytest.raises(PluginError, match=message):
            ATTACKS.create(name, params)
    with pytest.raises(GridError, match="class 10 does not exist"):
        crafted("dag", {"target": "class:10"}, ssd, scenes)
