"""Rows, wrong targets and metrics of the classification task."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import top_k_accuracy_score

from bench.errors import GridError
from bench.protocols import ImageRNG
from bench.registry import METRICS, TASKS
from bench.stats import estimate, wilson
from tasks.classification.task import Decision

TASK = TASKS.create("classification")


def rng(n, key="k"):
    return ImageRNG.for_images(key, [str(i) for i in range(n)])


def test_rows():
    right = TASK.rows(Decision(3, 0.75, 1.5), 3)
    wrong = TASK.rows(Decision(2, 0.5, 0.25), 3)
    assert right == {
        "score": 1.0,
        "correct": 1,
        "label": 3,
        "prediction": 3,
        "confidence": 0.75,
        "margin": 1.5,
    }
    assert wrong["score"] == 0.0 and wrong["correct"] == 0 and wrong["prediction"] == 2
    assert json.loads(json.dumps(right)) == right
    assert TASK.rows(3, 3)["score"] == 1.0  # a bare label will do


def test_cafd_rule():
    assert TASK.attack_targets("cafd", [0, 3, 9, 1], 10, rng(4)) == (3, 1, 3, 3)


def test_next_rule():
    assert TASK.attack_targets("next", [0, 8, 9], 10, rng(3)) == (1, 9, 0)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(0, 10**6))
def test_random_rule_is_never_the_label(labels, key):
    chosen = TASK.attack_targets("random", labels, 5, rng(len(labels), key))
    assert all(0 <= c < 5 and c != label for c, label in zip(chosen, labels, strict=True))


def test_random_rule_belongs_to_the_image_and_reaches_every_class():
    labels = [2] * 400
    chosen = TASK.attack_targets("random", labels, 5, rng(400))
    counts = np.bincount(chosen, minlength=5)
    assert counts[2] == 0 and (counts[[0, 1, 3, 4]] > 60).all()
    streams = ImageRNG.for_images("k", [str(i) for i in range(100, 200)])
    assert TASK.attack_targets("random", labels[:100], 5, streams) == chosen[100:200]


def test_class_rule():
    assert TASK.attack_targets("class:4", [0, 3], 10, rng(2)) == (4, 4)


@pytest.mark.parametrize(
    ("rule", "labels", "classes", "said"),
    [
        ("class:3", [0, 3], 10, "an image has label 3 itself"),
        ("class:10", [0], 10, "class 10 does not exist, the model has 10 classes"),
        ("cafd", [0], 3, "class 3 does not exist"),
        ("class:-1", [0], 10, "expected class:K"),
        ("class:cat", [0], 10, "expected class:K"),
        ("nxt", [0], 10, "did you mean 'next'"),
        ("random", [0], 1, "no wrong class"),
    ],
)
def test_wrong_rules(rule, labels, classes, said):
    with pytest.raises(GridError, match=said):
        TASK.attack_targets(rule, labels, classes, rng(len(labels)))


def test_metrics_against_numpy():
    generator = np.random.default_rng(0)
    labels, said = generator.integers(0, 3, 50), generator.integers(0, 3, 50)
    rows = [TASK.rows(Decision(int(s), 0.5, 0.1), int(y)) for s, y in zip(said, labels, strict=True)]
    weights = generator.integers(0, 4, 50)
    accuracy, error = METRICS.create("accuracy"), METRICS.create("error_rate")
    assert TASK.metrics == ("accuracy", "error_rate")
    for metric, hits in ((accuracy, said == labels), (error, said != labels)):
        prepared = metric.prepare(rows)
        assert metric.task == "classification" and metric.interval == "wilson" and metric.unit == "%"
        assert metric.value(prepared) == pytest.approx(hits.mean())
        assert metric.value(prepared, weights) == pytest.approx(np.average(hits, weights=weights))
        assert np.isnan(metric.value(metric.prepare([])))
    assert accuracy.higher_is_better and not error.higher_is_better


def test_rows_hold_the_likeliest_labels():
    row = TASK.rows(Decision(3, 0.75, 1.5, (3, 0, 2, 1, 4)), 2)
    assert row["top"] == [3, 0, 2, 1, 4] and json.loads(json.dumps(row)) == row


def test_top5_by_hand():
    top5 = METRICS.create("top5")
    assert (top5.task, top5.interval, top5.unit, top5.higher_is_better) == (
        "classification",
        "wilson",
        "%",
        True,
    )
    said = Decision(7, 0.5, 0.1, (7, 1, 4, 9, 2))
    rows = [TASK.rows(said, label) for label in (7, 2, 3, 9, 0)]
    prepared = top5.prepare(rows)
    assert prepared.tolist() == [1, 1, 0, 1, 0] and top5.value(prepared) == pytest.approx(3 / 5)
    assert top5.value(prepared, np.array([0, 0, 3, 1, 0])) == pytest.approx(1 / 4)
    assert np.isnan(top5.value(top5.prepare([])))


@given(st.lists(st.integers(0, 8), min_size=1, max_size=30), st.integers(0, 10**6))
def test_top5_against_scikit_learn(labels, seed):
    logits = np.random.default_rng(seed).permutation(9 * len(labels)).reshape(-1, 9).astype(float)
    order = np.argsort(-logits, axis=1)[:, :5].tolist()
    rows = [TASK.rows(Decision(o[0], 0.5, 0.1, tuple(o)), y) for o, y in zip(order, labels, strict=True)]
    top5, accuracy = METRICS.create("top5"), METRICS.create("accuracy")
    theirs = top_k_accuracy_score(labels, logits, k=5, labels=range(9))
    assert top5.value(top5.prepare(rows)) == pytest.approx(theirs)
    assert top5.value(top5.prepare(rows)) >= accuracy.value(accuracy.prepare(rows))


def test_top5_is_undefined_without_five_classes():
    """Neither for four classes, nor for a bare label, nor where one image of several has none."""
    top5, full = METRICS.create("top5"), TASK.rows(Decision(0, 0.5, 0.1, (0, 1, 2, 3, 4)), 0)
    for rows in (
        [TASK.rows(Decision(0, 0.5, 0.1, (0, 1, 2, 3)), 0)],
        [TASK.rows(0, 0)],
        [full, TASK.rows(0, 0)],
    ):
        found = estimate(top5, rows, seed=0)
        assert np.isnan([found.value, found.low, found.high]).all()
    found = estimate(top5, [full], seed=0)
    assert (found.value, found.low, found.high) == (1, *wilson(1, 1))
