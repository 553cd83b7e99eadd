"""AutoAttack through the oracle: what comes back, what is left as it was, what is refused."""

from __future__ import annotations

import sys

import pytest
import torch

from bench.errors import NotApplicable, PluginError
from bench.registry import ATTACKS

QUICK = {"steps": 5, "queries": 8, "eps": "2/255"}


@pytest.fixture
def victim(lab):
    target = lab.Classifier(lab.convnet(), 5, one_by_one=True)
    images, labels = lab.batch(6)
    return target, images, [labels[0], *target.predict(images)[1:]]


def test_failures_are_clean_or_best(lab, victim):
    target, images, labels = victim
    trace = sys.gettrace()
    out = lab.run(ATTACKS.create("autoattack", QUICK), target, images, labels)
    assert sys.gettrace() is trace
    stands = torch.tensor([p == y for p, y in zip(target.predict(out), labels, strict=True)])
    unmoved = (out == images).flatten(1).all(1)
    wrong = torch.tensor([p != y for p, y in zip(target.predict(images), labels, strict=True)])
    assert torch.equal(unmoved, stands | wrong) and stands.any() and (~stands & ~wrong).any()
    best = lab.run(ATTACKS.create("autoattack", {**QUICK, "failed": "best"}), target, images, labels)
    assert torch.equal(best[~stands], out[~stands])
    assert (best != images).flatten(1).any(1)[stands].all()
    y = torch.tensor(labels)
    gain = target.loss(best, labels, "ce") - target.loss(images, labels, "ce")
    assert (gain[stands] > 0).all() and (best - images).abs().max() <= 2 / 255 + 1e-6 and len(y) == 6


def test_rand_averages_over_draws(lab, victim):
    target, images, labels = victim
    attack = ATTACKS.create("autoattack", {"version": "rand", "steps": 2, "eps": "1/255"})
    oracle = lab.oracle(target, attack, 6)
    attack.run(oracle, images, labels, lab.rng(6))
    # Two members, three gradients each, of 20 draws.
    assert max(trace.forwards for trace in oracle.traces) > 2 * 3 * 20
    assert attack.averages and not ATTACKS.create("autoattack", QUICK).averages


def test_groups_of_images(lab, victim):
    target, images, labels = victim
    attack = ATTACKS.create("autoattack", {**QUICK, "group": 4, "attacks": ["apgd-ce", "apgd-t", "square"]})
    out = lab.run(attack, target, images, labels)
    alone = lab.run(ATTACKS.create("autoattack", {**QUICK, "attacks": ["apgd-ce"]}), target, images, labels)

    def standing(x):
        return sum(p == y for p, y in zip(target.predict(x), labels, strict=True))

    assert standing(out) <= standing(alone)


def test_few_classes(lab):
    images, _ = lab.batch(2, classes=3)
    target = lab.Classifier(lab.convnet(3), 3, one_by_one=True)
    with pytest.raises(NotApplicable, match="needs 4 classes, the model has 3"):
        lab.run(ATTACKS.create("autoattack", QUICK), target, images, [0, 1])
    lab.run(ATTACKS.create("autoattack", {"version": "rand", "steps": 1}), target, images, [0, 1])
    # Four classes have three wrong ones, fewer than the nine targets of the standard version.
    target = lab.Classifier(lab.convnet(4), 4, one_by_one=True)
    attack = ATTACKS.create("autoattack", {**QUICK, "attacks": ["apgd-t", "fab-t"]})
    lab.run(attack, target, images, target.predict(images))


def test_square_in_l2_takes_square_images(lab):
    images, _ = lab.batch(1, (12, 9))
    attack = ATTACKS.create("autoattack", {**QUICK, "norm": "l2"})
    with pytest.raises(NotApplicable, match="square images only"):
        lab.run(attack, lab.Classifier(lab.convnet(), 5), images, [0])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"version": "fast"}, "version"),
        ({"attacks": ["apgd"]}, "attacks"),
        ({"attacks": []}, "the list is empty"),
        ({"norm": "l1"}, "norm"),
        ({"eps": 8}, "did you mean 8/255"),
        ({"group": 0}, "group"),
    ],
)
def test_bad_input(params, message):
    with pytest.raises(PluginError, match=message):
        ATTACKS.create("autoattack", params)


def test_the_key_names_the_library():
    assert ATTACKS.create("autoattack", {}).identity()["library"].startswith("pyautoattack ")
