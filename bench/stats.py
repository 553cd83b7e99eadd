"""Intervals, paired comparisons and the per-image worst case: what turns per-image rows into defensible numbers.

Metrics that are means of 0/1 values get a Wilson interval (Wilson 1927, eq. 4 of Brown, Cai and DasGupta 2001), every
other metric a percentile bootstrap over images (Efron 1979). Two defenses measured on the same images are compared in
pairs: bootstrap with shared weights for any metric; Newcombe's interval and the exact McNemar test for 0/1 values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats as scipy_stats

from bench.protocols import Metric

__all__ = [
    "Difference",
    "Estimate",
    "Interval",
    "WorstCase",
    "bootstrap_interval",
    "estimate",
    "mcnemar",
    "paired_difference",
    "paired_proportions",
    "paired_scores",
    "wilson",
    "worst_case",
]

LEVEL = 0.95
SAMPLES = 1000


class Interval(NamedTuple):
    """Lower and upper end, in the metric's own unit (a fraction for "%" metrics)."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A metric's value with its interval and the number of images behind it."""

    value: float
    low: float
    high: float
    n: int


class Difference(NamedTuple):
    """A metric's change between two runs on the same images, with its paired interval."""

    value: float
    low: float
    high: float


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")


def wilson(successes: float, n: int, level: float = LEVEL) -> Interval:
    """Wilson score interval of a proportion.

    `successes` need not be whole: a mean over repeats is a mean of values in [0,1], whose variance is at most that of
    a 0/1 mean, so the interval is then conservative. Without images nothing is known and the interval is [0, 1]; NaN
    successes, of a metric that is undefined on its images, make both ends NaN.

    Args:
        successes: sum of the per-image values, 0 to n.
        n: number of images.
        level: coverage, e.g. 0.95.

    Raises:
        ValueError: successes outside 0..n, or level outside (0,1).
    """
    _check_level(level)
    if math.isnan(successes):
        return Interval(math.nan, math.nan)
    if n < 0 or not 0 <= successes <= n:
        raise ValueError(f"successes must lie between 0 and n, got {successes} of {n}")
    if n == 0:
        return Interval(0.0, 1.0)
    z = float(scipy_stats.norm.ppf(0.5 + level / 2))
    p = successes / n
    scale = 1 / (1 + z * z / n)
    centre = scale * (p + z * z / (2 * n))
    half = scale * z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and n the closed form is exact only up to rounding; the ends of the scale are meant.
    return Interval(
        0.0 if successes == 0 else max(0.0, centre - half), 1.0 if successes == n else min(1.0, centre + half)
    )


def bootstrap_interval(
    metric: Metric, prepared: Any, n: int, seed: int, samples: int = SAMPLES, level: float = LEVEL
) -> Interval:
    """Percentile bootstrap over images: each sample draws n images with replacement, as multinomial counts.

    A sample on which the metric is undefined (NaN) is left out; if all are, both ends are NaN.

    Args:
        metric: whose `value(prepared, weights)` is resampled.
        prepared: what `metric.prepare` made of the rows.
        n: number of images in `prepared`.
        seed: the same seed gives the same interval.
        samples: number of bootstrap samples.
        level: coverage.

    Raises:
        ValueError: no images or no samples, or level outside (0,1).
    """

    def values(weights: np.ndarray) -> np.ndarray:
        return metric.values(prepared, weights)

    return _percentiles(_resample(values, n, seed, samples), level)


def paired_difference(
    metric: Metric,
    prepared: Any,
    baseline: Any,
    n: int,
    seed: int,
    samples: int = SAMPLES,
    level: float = LEVEL,
) -> Difference:
    """`prepared` minus `baseline` (say, a defense minus no defense) with a paired bootstrap interval.

    Both must come from the same n images in the same order. Every sample weighs the images of both sides alike, so
    what is hard for both cancels and the interval is narrower than two separate ones suggest.

    Raises:
        ValueError: as `bootstrap_interval`.
    """

    def values(weights: np.ndarray) -> np.ndarray:
        difference: np.ndarray = metric.values(prepared, weights) - metric.values(baseline, weights)
        return difference

    interval = _percentiles(_resample(values, n, seed, samples), level)
    return Difference(metric.value(prepared) - metric.value(baseline), *interval)


def paired_proportions(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> Difference:
    """Mean of first - second, 0/1 values of the same images, with Newcombe's interval (1998, method 10).

    It is made of the two Wilson intervals and how far the sides go together. A bootstrap of few images finds no spread
    where no image differs; this does: 25 images alike leave 13 points to either side.

    Args:
        first, second: (n,) values 0 or 1 of the same images in the same order.
        level: coverage.

    Raises:
        ValueError: unequal lengths, other values, or no images.
    """
    a, b = _binary(first, second)
    n = len(a)
    if n == 0:
        raise ValueError("expected at least one image")
    both, neither = float((a * b).sum()), float(((1 - a) * (1 - b)).sum())
    only_a, only_b = float((a * (1 - b)).sum()), float(((1 - a) * b).sum())
    together = both * neither - only_a * only_b
    if together > 0:
        # The correction for continuity, which makes him method 10 and not 8.
        together = max(together - n / 2, 0.0)
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    phi = together / math.sqrt(margins) if margins else 0.0
    p, q = float(a.mean()), float(b.mean())
    (p_low, p_high), (q_low, q_high) = wilson(a.sum(), n, level), wilson(b.sum(), n, level)

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))

    value = p - q
    return Difference(value, value - reach(p - p_low, q_high - q), value + reach(p_high - p, q - q_low))


def paired_scores(first: np.ndarray, second: np.ndarray, level: float = LEVEL) -> Difference:
    """Mean of first - second over the same images; its interval excludes 0 only when chance does not explain it.

    Student's paired interval; for 0/1 scores it is widened to hold 0 unless the exact McNemar test rejects, for other
    scores unless three images differ.

    Args:
        first, second: (n,) scores of the same images in the same order.
        level: coverage.

    Raises:
        ValueError: unequal lengths.
    """
    _check_level(level)
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"expected two sequences of equal length, got shapes {first.shape} and {second.shape}"
        )
    n = len(first)
    if n < 2:
        return Difference(float((first - second).mean()) if n else math.nan, -math.inf, math.inf)
    delta = first - second
    value = float(delta.mean())
    half = float(scipy_stats.t.ppf(0.5 + level / 2, n - 1) * delta.std(ddof=1) / math.sqrt(n))
    low, high = value - half, value + half
    if np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        if mcnemar(first.tolist(), second.tolist()) >= 1 - level:
            low, high = min(low, 0.0), max(high, 0.0)
    elif np.count_nonzero(delta) < 3:
        low, high = min(low, 0.0), max(high, 0.0)
    return Difference(value, low, high)


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value of the exact McNemar test: could the images only one side gets right be a fair coin's?

    Args:
        first: 0/1 per image.
        second: 0/1 for the same images in the same order.

    Raises:
        ValueError: unequal lengths, or values other than 0 and 1.
    """
    a, b = _binary(first, second)
    only_first = int(((a == 1) & (b == 0)).sum())
    only_second = int(((a == 0) & (b == 1)).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(scipy_stats.binomtest(only_first, only_first + only_second, 0.5).pvalue)


def _binary(first: Sequence[float], second: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"expected two sequences of equal length, got shapes {a.shape} and {b.shape}")
    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise ValueError("expected 0/1 values only")
    return a, b


def estimate(
    metric: Metric, rows: Sequence[Mapping[str, Any]], seed: int, samples: int = SAMPLES, level: float = LEVEL
) -> Estimate:
    """The metric of `rows` (one per image) with the interval its class asks for.

    Raises:
        ValueError: no rows.
    """
    n = len(rows)
    if n == 0:
        raise ValueError(f"metric '{metric.name}' needs at least one image")
    prepared = metric.prepare(rows)
    value = metric.value(prepared)
    if metric.interval == "wilson":
        # Means of float 0/1 values may leave [0,1] by a rounding error.
        interval = wilson(min(max(value, 0.0), 1.0) * n, n, level)
    else:
        interval = bootstrap_interval(metric, prepared, n, seed, samples, level)
    return Estimate(value, interval.low, interval.high, n)


class WorstCase(NamedTuple):
    """Per image, the row under the attack that hurt it most, and that attack."""

    rows: list[Mapping[str, Any]]
    attacks: list[str]


def worst_case(rows_by_attack: Mapping[str, Sequence[Mapping[str, Any]]]) -> WorstCase:
    """Choose for each image the attack with the lowest `score`; the first attack wins a tie.

    For accuracy this is "robust to all attacks". mAP and mIoU are not means over images, so their worst case is the
    metric of the chosen rows, which the attacker could reach but perhaps not the lowest over all choices.

    Args:
        rows_by_attack: attack -> one row per image, with `id` and `score` in [0,1]; every attack on the same images.

    Returns:
        Rows in the order of the first attack's.

    Raises:
        ValueError: no attacks, attacks on different images, an image twice, a missing or NaN score.
    """
    if not rows_by_attack:
        raise ValueError("the worst case needs at least one attack")
    attacks = list(rows_by_attack)
    by_id: dict[str, dict[str, Mapping[str, Any]]] = {}
    for attack, rows in rows_by_attack.items():
        by_id[attack] = {str(row["id"]): row for row in rows}
        if len(by_id[attack]) < len(rows):
            raise ValueError(f"the rows of {attack} hold an image twice")
        differing = by_id[attacks[0]].keys() ^ by_id[attack].keys()
        if differing:
            raise ValueError(
                f"the worst case needs every attack on the same images: {attacks[0]} and {attack} differ in "
                f"{len(differing)}, first '{min(differing)}'"
            )
    worst = WorstCase([], [])
    for image in by_id[attacks[0]]:
        best, lowest = attacks[0], math.inf
        for attack in attacks:
            score = by_id[attack][image].get("score")
            if score is None or math.isnan(score):
                raise ValueError(f"image '{image}' has no score under {attack}")
            if score < lowest:
                best, lowest = attack, score
        worst.rows.append(by_id[best][image])
        worst.attacks.append(best)
    return worst


def _resample(values: Callable[[np.ndarray], np.ndarray], n: int, seed: int, samples: int) -> np.ndarray:
    if n < 1 or samples < 1:
        raise ValueError(
            f"the bootstrap needs at least one image and one sample, got n={n}, samples={samples}"
        )
    generator = np.random.default_rng(seed)
    # In pieces: a (samples, n) matrix would be large for full validation sets.
    piece = max(1, min(samples, 2_000_000 // n))
    uniform = np.full(n, 1 / n)
    sizes = [min(piece, samples - start) for start in range(0, samples, piece)]
    return np.concatenate([values(generator.multinomial(n, uniform, size)) for size in sizes])


def _percentiles(values: np.ndarray, level: float) -> Interval:
    _check_level(level)
    defined = values[~np.isnan(values)]
    if defined.size == 0:
        return Interval(math.nan, math.nan)
    low, high = np.quantile(defined, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(low), float(high))
