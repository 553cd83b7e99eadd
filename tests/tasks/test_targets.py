"""Wrong labels for label maps and objects."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.errors import GridError
from bench.protocols import ImageRNG
from bench.registry import TASKS
from tasks.detection.objects import Objects
from tasks.targets import wrong_classes


def test_rules() -> None:
    rng = ImageRNG([1, 2])
    assert wrong_classes("next", "t", 3, rng).tolist() == [[1, 2, 0]] * 2
    assert wrong_classes("class:1", "t", 3, rng).tolist() == [[1, 1, 1]] * 2
    drawn = wrong_classes("random", "t", 10, ImageRNG(range(50)))
    assert drawn.shape == (50, 10) and drawn.min() == 0 and drawn.max() == 9
    assert (drawn != np.arange(10)).all()
    assert len({tuple(row) for row in drawn.tolist()}) == 50
    assert np.array_equal(wrong_classes("random", "t", 10, ImageRNG([7])), drawn[[7]])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("nxt", "unknown target rule of task t 'nxt': did you mean 'next'"),
        ("class:x", "expected class:K with a class number"),
        ("class:3", "class 3 does not exist, the model has 3 classes"),
    ],
)
def test_bad_rules(rule: str, message: str) -> None:
    with pytest.raises(GridError, match=message):
        wrong_classes(rule, "t", 3, ImageRNG([0]))
    with pytest.raises(GridError, match="no wrong class"):
        wrong_classes("next", "t", 1, ImageRNG([0]))


def test_label_maps_keep_what_is_ignored() -> None:
    task = TASKS.create("segmentation")
    labels = torch.tensor([[0, 1], [2, 255]])
    (wrong,) = task.attack_targets("next", [labels], 3, ImageRNG([0]))
    assert wrong.tolist() == [[1, 2], [0, 255]] and wrong.dtype == torch.int64
    assert labels.tolist() == [[0, 1], [2, 255]]
    first, second = (task.attack_targets("random", [labels], 3, ImageRNG([s]))[0] for s in (0, 0))
    assert torch.equal(first, second)


def test_objects_remember_their_labels() -> None:
    task = TASKS.create("detection")
    boxes = np.array([[0.0, 0, 5, 5], [3, 3, 9, 9]])
    truth = Objects(boxes, np.array([2, 0]), (20, 20), 3, scale=(2.0, 1.0))
    (wrong,) = task.attack_targets("next", [truth], 3, ImageRNG([0]))
    assert wrong.labels.tolist() == [0, 1] and wrong.true_labels is not None
    assert wrong.true_labels.tolist() == [2, 0] and truth.true_labels is None
    assert np.array_equal(wrong.boxes, boxes) and wrong.scale == truth.scale


def test_a_target_that_every_label_has_already() -> None:
    """What is left to change decides: one other label is enough, an image without labels is none of this."""
    maps, objects = TASKS.create("segmentation"), TASKS.create("detection")

    def boxes(*labels: int) -> Objects:
        return Objects(np.ones((len(labels), 4)), np.array(labels, dtype=np.int64), (20, 20), 3)

    for task, same, other, nothing in (
        (maps, torch.tensor([[1, 255]]), torch.tensor([[1, 0]]), torch.tensor([[255, 255]])),
        (objects, boxes(1, 1), boxes(1, 2), boxes()),
    ):
        with pytest.raises(GridError, match="target 'class:1': an image has no label but 1 itself"):
            task.attack_targets("class:1", [same], 3, ImageRNG([0]))
        task.attack_targets("class:1", [other, nothing], 3, ImageRNG([0, 1]))
        task.attack_targets("next", [same], 3, ImageRNG([0]))
