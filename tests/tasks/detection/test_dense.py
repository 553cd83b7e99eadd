"""Scores of all candidates: hand-computed losses, and agreement with what mmdet predicts from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bench.errors import GridError, NotApplicable
from bench.protocols import Geometry, Sample
from tasks.detection.datasets import MiniScenes
from tasks.detection.dense import (
    Candidates,
    candidates,
    class_probabilities,
    emptiness,
    objectness,
    swap_margin,
)
from tasks.detection.model import Detector

CPU = torch.device("cpu")
BOXES = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [40, 40, 50, 50], [0, 0, 10, 9]])


def log(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).log()


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    scenes = MiniScenes(count=2)
    return [scenes[i] for i in range(2)]


# -- formulas -------------------------------------------------------------------------------------------------------
def test_objectness_and_emptiness() -> None:
    softmax = Candidates(BOXES[:2], log([0.1, 0.4, 0.5], [0.05, 0.05, 0.9]) + 3.0, False)
    assert objectness(softmax).item() == pytest.approx(-(math.log(0.5) + math.log(0.9)) / 2)
    assert emptiness(softmax).item() == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2)
    logits = torch.tensor([[0.0, math.log(3)], [-2.0, 0.0]])  # p = (1/2, 3/4) and (0.119, 1/2), independent
    nothing = [0.5 * 0.25, (1 - 1 / (1 + math.exp(2))) * 0.5]
    sigmoid = Candidates(BOXES[:2], logits, True)
    assert objectness(sigmoid).item() == pytest.approx(-sum(map(math.log, nothing)) / 2)
    assert emptiness(sigmoid).item() == pytest.approx(-sum(math.log(1 - n) for n in nothing) / 2)


def test_stages_add_up_and_may_be_empty() -> None:
    first = torch.tensor([[math.log(3)], [0.0]])  # objectness 3/4 and 1/2
    second = log([0.2, 0.8])
    both = Candidates(BOXES[:1], second, False, first)
    assert objectness(both).item() == pytest.approx(-math.log(0.8) - (math.log(0.25) + math.log(0.5)) / 2)
    assert emptiness(both).item() == pytest.approx(-math.log(0.2) - (math.log(0.75) + math.log(0.5)) / 2)
    none = Candidates(BOXES[:0], torch.zeros(0, 2), False, first)
    assert objectness(none).item() == pytest.approx(-(math.log(0.25) + math.log(0.5)) / 2)


def test_certain_candidates_have_finite_losses_and_gradients() -> None:
    for sigmoid in (False, True):
        logits = torch.tensor([[80.0, -80, -80], [-90, -90, 90], [-200, -200, -200]]).requires_grad_(True)
        for loss in (objectness, emptiness):
            value = loss(Candidates(BOXES[:3], logits, sigmoid))
            (gradient,) = torch.autograd.grad(value, logits)
            assert torch.isfinite(value) and torch.isfinite(gradient).all()


def test_swap_margin() -> None:
    # Candidates on the first object (true 0, wrong 1): 0 and 3 say 0, 1 says 1. The third candidate is on nothing.
    logits = torch.tensor([[5.0, 2, 0, 1], [1, 3, 0, 0], [9, 0, 0, 0], [4, 3.5, 0, 0]], requires_grad=True)
    found = Candidates(BOXES, logits, False)
    objects = torch.tensor([[0.0, 0, 10, 10], [60, 60, 70, 70]])
    true, wrong = torch.tensor([0, 2]), torch.tensor([1, 0])
    value = swap_margin(found, objects, true, wrong, overlap=0.1)
    assert value.item() == pytest.approx((2 - 5) + (3.5 - 4))
    (gradient,) = torch.autograd.grad(value, logits)
    expected = torch.zeros(4, 4)
    expected[[0, 3], 1], expected[[0, 3], 0] = 1.0, -1.0
    assert torch.equal(gradient, expected)
    # 1 overlaps by 1/3; asked for more, or told that it is right, the answer changes.
    assert swap_margin(found, objects, torch.tensor([1, 2]), true, overlap=0.1).item() == pytest.approx(1 - 3)
    assert swap_margin(found, objects, torch.tensor([1, 2]), true, overlap=0.4).item() == 0.0


# -- against mmdet --------------------------------------------------------------------------------------------------
def test_candidates_are_what_the_detector_scores(model: Detector, samples: list[Sample]) -> None:
    image = samples[0].image[None]
    network = model.network
    with torch.no_grad():
        inputs, data = model.collate(image, model.new_samples(image))
        found = candidates(network, inputs, data)
        features = network.extract_feat(inputs)
        if model.with_mask:
            (own,) = network.rpn_head.predict(features, data, rescale=False)
            assert torch.equal(found.boxes, own.bboxes)
            rois = torch.cat([torch.zeros(len(own.bboxes), 1), own.bboxes], 1)
            assert torch.equal(found.logits, network.roi_head._bbox_forward(features, rois)["cls_score"])
            more = candidates(network, inputs, data, nms=0.9)
            assert len(more.boxes) > len(found.boxes) and more.proposal_logits is not None
        else:
            assert found.proposal_logits is None
            assert len(found.boxes) == len(found.logits)
            # Every detection is an anchor near the object with the same score.
            (seen,) = model.predict(image)
            probabilities = found.logits.softmax(1)
            for box, score, label in zip(seen.boxes, seen.scores, seen.labels, strict=True):
                gap, at = (probabilities[:, label] - score).abs().min(0)
                assert gap < 1e-6
                anchor = found.boxes[at]
                centre, other = (anchor[:2] + anchor[2:]) / 2, (box[:2] + box[2:]) / 2
                assert (centre - other).abs().max() < 24


def test_class_scores_of_detections(model: Detector, samples: list[Sample]) -> None:
    for found in model.predict(torch.stack([s.image for s in samples])):
        assert found.class_scores is not None and found.class_scores.shape == (len(found), 10)
        own = found.class_scores.gather(1, found.labels[:, None])[:, 0]
        torch.testing.assert_close(own, found.scores, rtol=0, atol=1e-6)
        assert (found.class_scores.sum(1) <= 1 + 1e-5).all()
        kept = found.above(0.5)
        assert (kept.scores >= 0.5).all() and len(kept) == int((found.scores >= 0.5).sum())
        assert kept.class_scores is not None and len(kept.class_scores) == len(kept)
    assert not model.network.roi_head.bbox_head._forward_hooks if model.with_mask else True


def test_detections_become_objects(model: Detector, samples: list[Sample]) -> None:
    truth = samples[0].target.resized((2.0, 0.5))
    (found,) = model.predict(samples[0].image[None])
    objects = found.as_objects(truth)
    assert objects.size == truth.size and objects.scale == truth.scale and objects.masks is None
    torch.testing.assert_close(torch.from_numpy(objects.corners()).float(), found.boxes, rtol=1e-5, atol=1e-4)
    assert objects.labels.tolist() == found.labels.tolist()


def test_no_ground_truth_is_needed(model: Detector, samples: list[Sample]) -> None:
    images = torch.stack([s.image for s in samples])
    truth = [s.target for s in samples]
    for kind in ("objectness", "emptiness"):
        values = model.loss(images, truth, kind)
        assert (values > 0).all() and torch.equal(values, model.loss(images, truth[::-1], kind))
    # A blank picture holds fewer objects than a scene.
    blank = torch.full_like(images[:1], 0.5)
    assert model.loss(blank, truth[:1], "objectness") < model.loss(images[:1], truth[:1], "objectness")


def test_swap_needs_wrong_labels_and_follows_the_pixels(model: Detector, samples: list[Sample]) -> None:
    image, truth = samples[0].image[None], samples[0].target
    with pytest.raises(GridError, match="give the attack a target rule"):
        model.loss(image, [truth], "swap")
    wrong = truth.relabelled((truth.labels + 1) % 10)
    here = model.loss(image, [wrong], "swap")
    assert here < 0
    # On a wider canvas the objects are where the geometry says; without it they are looked for beside themselves.
    canvas = torch.full((1, 3, 96, 192), 0.5)
    canvas[..., 96:] = image
    shifted = Geometry(torch.ones(1, 2), torch.tensor([[0.0, 96.0]]), (96, 96), (96, 192))
    assert model.loss(canvas, [wrong], "swap", geometry=shifted) < 0.2 * here
    assert model.loss(canvas, [wrong], "swap") > 0.2 * here


def test_detectors_without_candidates() -> None:
    network = nn.Module()
    network.extract_feat = lambda inputs: inputs
    network.bbox_head = nn.Linear(1, 1)
    with pytest.raises(NotApplicable, match="no anchors"):
        candidates(network, torch.zeros(1, 3, 4, 4), [])
    with class_probabilities(network) as seen:
        network.bbox_head(torch.zeros(1, 1))
    assert seen == []
