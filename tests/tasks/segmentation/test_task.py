"""Rows and metrics of the segmentation task, compared with mmseg's IoUMetric and with plain set arithmetic."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bench.errors import DataError
from bench.registry import METRICS, TASKS

TASK = TASKS.create("segmentation")
MIOU, ACCURACY = METRICS.create("miou"), METRICS.create("pixel_accuracy")


def maps(seed, n=12, classes=6, size=(9, 13), absent=()):
    """Predictions that are mostly right, and truths with ignored pixels."""
    generator = np.random.default_rng(seed)
    names = [k for k in range(classes) if k not in absent]
    pairs = []
    for _ in range(n):
        truth = generator.choice(names, size)
        said = np.where(generator.random(size) < 0.6, truth, generator.choice(names, size))
        truth = np.where(generator.random(size) < 0.1, 255, truth)
        pairs.append((torch.from_numpy(said).long(), torch.from_numpy(truth).long()))
    return pairs


def rows(pairs):
    return [TASK.rows(said, truth) for said, truth in pairs]


def reference(pairs, weights=None):
    """(mIoU, pixel accuracy) by confusion matrices, class by class."""
    weights = [1] * len(pairs) if weights is None else weights
    intersection, union, right, total = np.zeros(256), np.zeros(256), 0, 0
    for (said, truth), w in zip(pairs, weights, strict=True):
        said, truth = said.numpy(), truth.numpy()
        for k in range(255):
            a, b = (said == k) & (truth != 255), truth == k
            intersection[k] += w * (a & b).sum()
            union[k] += w * (a | b).sum()
        right += w * (said == truth).sum()
        total += w * (truth != 255).sum()
    return np.mean([i / u for i, u in zip(intersection, union, strict=True) if u > 0]), right / total


def values(pairs, weights=None):
    made = rows(pairs)
    return tuple(m.value(m.prepare(made), weights) for m in (MIOU, ACCURACY))


def test_rows_by_hand():
    truth = torch.tensor([[0, 0, 1], [2, 255, 255]])
    said = torch.tensor([[0, 1, 1], [0, 0, 2]])
    row = TASK.rows(said, truth)
    assert row == {
        "score": 0.5, "correct": 2, "pixels": 4, "classes": [0, 1, 2], "intersection": [1, 1, 0], "union": [3, 2, 1],
    }  # fmt: skip
    assert json.loads(json.dumps(row)) == row
    assert values([(said, truth)]) == pytest.approx(((1 / 3 + 1 / 2 + 0) / 3, 0.5))


def test_nothing_labelled():
    row = TASK.rows(torch.zeros(2, 2).long(), torch.full((2, 2), 255))
    assert row["score"] == 1.0 and row["pixels"] == 0 and row["classes"] == []
    assert all(np.isnan(m.value(m.prepare([row]))) for m in (MIOU, ACCURACY))
    others = rows(maps(0))
    assert MIOU.value(MIOU.prepare([*others, row])) == MIOU.value(MIOU.prepare(others))


def test_sizes_must_agree():
    with pytest.raises(DataError, match="label map"):
        TASK.rows(torch.zeros(2, 2).long(), torch.zeros(2, 3).long())


@pytest.mark.parametrize("absent", [(), (2,), (0, 5)])
def test_against_a_second_implementation(absent):
    pairs = maps(1, absent=absent)
    assert values(pairs) == pytest.approx(reference(pairs))
    weights = np.random.default_rng(2).integers(0, 3, len(pairs))
    assert values(pairs, weights) == pytest.approx(reference(pairs, weights))


@settings(max_examples=20)
@given(st.data())
def test_against_sets_of_pixels(data):
    label = st.sampled_from([0, 1, 2, 3, 255])
    pairs = [
        (
            torch.from_numpy(data.draw(arrays(np.int64, (3, 4), elements=st.integers(0, 3)))),
            torch.from_numpy(data.draw(arrays(np.int64, (3, 4), elements=label))),
        )
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    if any((truth != 255).any() for _, truth in pairs):
        assert values(pairs) == pytest.approx(reference(pairs))


def test_weights_count_images():
    pairs = maps(3, n=4)
    repeated = [pairs[0], pairs[0], pairs[2]]
    assert values(pairs, np.array([2, 0, 1, 0])) == pytest.approx(values(repeated))
    # A class that only left-out images show does not count as an IoU of 0.
    rare = (torch.full((2, 2), 5), torch.full((2, 2), 5))
    common = (torch.zeros(2, 2).long(), torch.zeros(2, 2).long())
    assert values([rare, common], np.array([0, 1]))[0] == 1.0


@pytest.mark.parametrize("absent", [(), (1, 4)])
def test_against_mmseg(absent):
    from tasks.mm import ops

    ops.install()
    from mmseg.evaluation import IoUMetric

    pairs = maps(4, absent=absent)
    metric = IoUMetric(iou_metrics=["mIoU"])
    metric.dataset_meta = {"classes": [str(k) for k in range(6)]}
    for said, truth in pairs:
        metric.process({}, [{"pred_sem_seg": {"data": said[None]}, "gt_sem_seg": {"data": truth[None]}}])
    theirs = metric.compute_metrics(metric.results)
    miou, accuracy = values(pairs)
    assert theirs["mIoU"] == pytest.approx(100 * miou, abs=0.006)  # mmseg rounds to two digits
    assert theirs["aAcc"] == pytest.approx(100 * accuracy, abs=0.006)


def test_directions():
    assert TASK.metrics == ("miou", "pixel_accuracy") and TASK.name == "segmentation"
    for metric in (MIOU, ACCURACY):
        assert metric.higher_is_better and metric.unit == "%" and metric.interval == "bootstrap"
