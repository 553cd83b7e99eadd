"""Intervals against closed forms and SciPy, and the per-image worst case on hand-made rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from bench.protocols import Metric
from bench.stats import (
    bootstrap_interval,
    estimate,
    mcnemar,
    paired_difference,
    paired_proportions,
    wilson,
    worst_case,
)


class MeanScore(Metric):
    """Weighted mean of the scores."""

    name = "mean score"
    params: Mapping[str, Any] = {}
    task = "toy"

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        return np.array([row["score"] for row in rows], dtype=np.float64)

    def value(self, prepared: Any, weights: np.ndarray | None = None) -> float:
        return float(np.average(prepared, weights=weights))


class Accuracy(MeanScore):
    interval = "wilson"


class PooledRatio(MeanScore):
    """A ratio of sums, as mIoU is: not a mean over images."""

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        return np.array([[row["inter"], row["union"]] for row in rows], dtype=np.float64)

    def value(self, prepared: Any, weights: np.ndarray | None = None) -> float:
        inter, union = (prepared if weights is None else prepared * weights[:, None]).sum(0)
        return float(inter / union) if union else math.nan


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize(
    ("successes", "n"), [(0, 1), (1, 1), (0, 20), (7, 20), (20, 20), (413, 500), (9999, 10000)]
)
def test_wilson_agrees_with_scipy(successes: int, n: int, level: float) -> None:
    reference = scipy_stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    assert wilson(successes, n, level) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_wilson_known_value() -> None:
    # 81 of 263: worked example of Newcombe (1998), method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@given(n=st.integers(1, 10_000), data=st.data())
def test_wilson_contains_the_estimate_and_stays_in_range(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    mirrored = wilson(n - successes, n)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((low, high), abs=1e-12)


def test_wilson_of_nothing_knows_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n", "level"), [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 0.0), (1, 2, 95)])
def test_wilson_refuses_impossible_input(successes: int, n: int, level: float) -> None:
    with pytest.raises(ValueError, match="must lie between"):
        wilson(successes, n, level)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.8, 0.97])
def test_wilson_covers_as_often_as_it_says(p: float) -> None:
    """Exact coverage, summed over all outcomes of 100 images: near 95 % for every true accuracy."""
    n = 100
    hits = [low <= p <= high for low, high in (wilson(k, n) for k in range(n + 1))]
    coverage = float(scipy_stats.binom.pmf(np.arange(n + 1), n, p) @ np.array(hits))
    assert 0.92 < coverage < 0.98


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(0.4, 0.1, 400)
    metric = MeanScore()
    low, high = bootstrap_interval(metric, values, len(values), seed=1, samples=4000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=half * 0.08)
    assert high == pytest.approx(values.mean() + half, abs=half * 0.08)


def test_bootstrap_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    metric = MeanScore()
    hits = 0
    for trial in range(250):
        low, high = bootstrap_interval(metric, generator.uniform(0, 1, 80), 80, seed=trial, samples=200)
        hits += low <= 0.5 <= high
    assert 0.89 < hits / 250 < 0.985


def test_bootstrap_weights_are_counts_of_n_images() -> None:
    seen: list[np.ndarray] = []

    class Spy(MeanScore):
        def value(self, prepared: Any, weights: np.ndarray | None = None) -> float:
            assert weights is not None
            seen.append(weights)
            return super().value(prepared, weights)

    bootstrap_interval(Spy(), np.linspace(0, 1, 7), 7, seed=0, samples=50)
    assert len(seen) == 50
    assert all(w.shape == (7,) and w.sum() == 7 and w.min() >= 0 for w in seen)
    assert len({w.tobytes() for w in seen}) > 1


def test_bootstrap_depends_on_the_seed_alone() -> None:
    values = np.linspace(0, 1, 30)
    first = bootstrap_interval(MeanScore(), values, 30, seed=5)
    assert bootstrap_interval(MeanScore(), values, 30, seed=5) == first
    assert bootstrap_interval(MeanScore(), values, 30, seed=6) != first


def test_bootstrap_leaves_out_undefined_samples() -> None:
    prepared = np.array([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    assert bootstrap_interval(PooledRatio(), prepared, 3, seed=0, samples=100) == (0.5, 0.5)
    low, high = bootstrap_interval(PooledRatio(), prepared * 0, 3, seed=0, samples=10)
    assert math.isnan(low) and math.isnan(high)


def test_bootstrap_refuses_no_images() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        bootstrap_interval(MeanScore(), np.array([]), 0, seed=0)


def test_estimate_uses_the_interval_of_the_metric() -> None:
    rows = [{"score": float(i < 30)} for i in range(40)]
    got = estimate(Accuracy(), rows, seed=0)
    assert got == (0.75, *wilson(30, 40), 40)
    resampled = estimate(MeanScore(), rows, seed=0)
    assert (resampled.low, resampled.high) == bootstrap_interval(
        MeanScore(), MeanScore().prepare(rows), 40, seed=0
    )
    with pytest.raises(ValueError, match="at least one image"):
        estimate(Accuracy(), [], seed=0)


def test_paired_interval_is_narrower_when_sides_agree() -> None:
    generator = np.random.default_rng(0)
    hard = generator.uniform(0, 1, 200)
    baseline, defended = hard * 0.8, hard * 0.8 + 0.05 + generator.normal(0, 0.01, 200)
    metric = MeanScore()
    difference = paired_difference(metric, defended, baseline, 200, seed=0)
    assert difference.value == pytest.approx(defended.mean() - baseline.mean())
    assert 0 < difference.low < 0.05 < difference.high
    single = bootstrap_interval(metric, defended, 200, seed=0)
    assert difference.high - difference.low < (single.high - single.low) / 10


def test_paired_difference_to_itself_is_zero() -> None:
    values = np.linspace(0, 1, 25)
    assert paired_difference(MeanScore(), values, values, 25, seed=0) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17: 2635, table III, method 10.
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((20, 12, 2, 16), 0.0562, 0.3292),
        ((1, 97, 0, 2), 0.9031, 0.9867),
        ((54, 0, 0, 0), -0.0664, 0.0664),
    ],
)
def test_paired_proportions_published_values(
    counts: tuple[int, int, int, int], low: float, high: float
) -> None:
    both, only_first, only_second, neither = counts
    first = [1] * both + [1] * only_first + [0] * only_second + [0] * neither
    second = [1] * both + [0] * only_first + [1] * only_second + [0] * neither
    found = paired_proportions(first, second)
    assert found.value == pytest.approx((only_first - only_second) / sum(counts))
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    mirrored = paired_proportions(second, first)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


def test_paired_proportions_cover_the_truth() -> None:
    generator = np.random.default_rng(0)
    cells = np.array([0.6, 0.15, 0.05, 0.2])
    drawn = generator.choice(4, (1000, 25), p=cells)
    first, second = np.isin(drawn, (0, 1)).astype(float), np.isin(drawn, (0, 2)).astype(float)
    found = [paired_proportions(list(a), list(b)) for a, b in zip(first, second, strict=True)]
    assert 0.93 <= np.mean([one.low <= 0.1 <= one.high for one in found]) <= 0.99
    with pytest.raises(ValueError, match="at least one image"):
        paired_proportions([], [])


def test_mcnemar_known_values() -> None:
    # 1 against 9 discordant images: 2 * (C(10,0) + C(10,1)) / 2**10.
    first = [1] + [0] * 9 + [1] * 50
    second = [0] + [1] * 9 + [1] * 50
    assert mcnemar(first, second) == pytest.approx(22 / 1024)
    assert mcnemar(second, first) == pytest.approx(22 / 1024)
    assert mcnemar([True, False], [True, False]) == 1.0


def test_mcnemar_refuses_what_is_not_paired_or_binary() -> None:
    with pytest.raises(ValueError, match="equal length"):
        mcnemar([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="0/1"):
        mcnemar([0.5, 1], [0, 1])  # type: ignore[list-item]


def scored(**scores: float) -> list[dict[str, Any]]:
    return [{"id": image, "score": score} for image, score in scores.items()]


def test_worst_case_takes_the_lowest_score_and_the_first_of_a_tie() -> None:
    pgd, mi = scored(a=1.0, b=0.0, c=0.4), scored(c=0.3, b=0.0, a=1.0)
    rows, attacks = worst_case({"pgd": pgd, "mi": mi})
    assert attacks == ["pgd", "pgd", "mi"]
    assert rows[0] is pgd[0] and rows[1] is pgd[1] and rows[2] is mi[0]


def test_worst_case_accuracy_counts_images_that_survive_all_attacks() -> None:
    correct = np.random.default_rng(0).integers(0, 2, (4, 60))
    rows = {
        f"attack{i}": scored(**{str(j): int(c) for j, c in enumerate(line)}) for i, line in enumerate(correct)
    }
    worst = worst_case(rows)
    assert estimate(Accuracy(), worst.rows, seed=0).value == pytest.approx(correct.all(axis=0).mean())


def test_worst_case_refuses_attacks_on_different_images() -> None:
    with pytest.raises(ValueError, match="pgd and mi differ in 1, first 'b'"):
        worst_case({"pgd": scored(a=1.0, b=1.0), "mi": scored(a=1.0)})
    with pytest.raises(ValueError, match="rows of mi hold an image twice"):
        worst_case({"pgd": scored(a=1.0), "mi": scored(a=1.0) * 2})
    with pytest.raises(ValueError, match="at least one attack"):
        worst_case({})


@pytest.mark.parametrize("row", [{"id": "a"}, {"id": "a", "score": math.nan}])
def test_worst_case_refuses_rows_without_score(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="image 'a' has no score under mi"):
        worst_case({"pgd": scored(a=1.0), "mi": [row]})
