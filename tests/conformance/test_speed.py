"""What the speed benchmark calls as near, whom it holds us against, and that its settings are taken."""

from __future__ import annotations

import pytest

from bench.registry import ATTACKS
from benchmarks.attack_speed import Times, as_near, cases, verdict
from benchmarks.contestants import LIBRARIES, Case, library

CASE = Case("nearest", ("ddn", {}), {"foolbox": ("DDNAttack", {}), "adv_lib: short": ("ddn", {})})
OURS = Times([1.0, 2.0], success=1.0, distance=0.5, mean=0.6)


def test_settings_are_those_of_attacks_and_libraries():
    labels = [case.label for case in cases()]
    assert len(labels) == len(set(labels))
    for case in cases():
        ATTACKS.create(*case.ours)
        assert case.others and {library(name) for name in case.others} <= set(LIBRARIES)


@pytest.mark.parametrize(
    ("success", "median", "mean", "near"),
    [
        (1.0, 0.5, 0.6, True),
        (1.0, 0.504, 0.605, True),
        (1.0, 0.51, 0.6, False),
        (1.0, 0.4, 0.62, False),
        (0.9, 0.4, 0.5, False),
    ],
)
def test_as_near(success, median, mean, near):
    assert as_near(CASE, OURS, Times(success=success, distance=median, mean=mean)) is near


def test_with_an_eps_success_counts():
    budget = Case("budget", ("fgsm", {}), {}, eps=0.1)
    assert as_near(budget, OURS, Times(success=0.96, distance=9.0, mean=9.0))
    assert not as_near(budget, OURS, Times(success=0.9, distance=0.1, mean=0.1))


def test_verdict_is_against_the_fastest_that_is_as_near():
    near = {"success": 1.0, "distance": 0.5, "mean": 0.6}
    seen = {
        "ours": OURS,
        "floor": Times([0.1, 0.1]),
        "foolbox": Times([4.0, 8.0], **near),
        "adv_lib: short": Times([0.5, 0.5], success=1.0, distance=0.7, mean=0.8),
    }
    assert verdict(CASE, seen) == ("nearest", "foolbox", "0.25", "yes")
    seen["adv_lib: short"] = Times([1.25, 2.5], **near)
    assert verdict(CASE, seen) == ("nearest", "adv_lib: short", "0.80", "no")
    assert verdict(CASE, {"ours": OURS, "floor": Times([0.1, 0.1])}) == ("nearest", "none", "", "")
