"""APGD: optimum of a linear model, step size schedule, target classes, restarts, what happens to failures."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from attacks.adaptive import Ascent
from attacks.projections import Box
from attacks.steps import sign
from bench.errors import NotApplicable, PluginError
from bench.protocols import Defense, Gradient
from bench.registry import ATTACKS


@pytest.fixture
def victim(lab):
    target = lab.Classifier(lab.convnet(), 5, one_by_one=True)
    images, _ = lab.batch(8)
    return target, images, target.predict(images)


@pytest.mark.parametrize(("norm", "eps"), [("linf", "8/255"), ("l2", "1/4")])
def test_optimum_of_a_linear_model(lab, norm, eps):
    weight = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(3))
    images = 0.3 + 0.4 * torch.rand(3, 3, 6, 5, generator=torch.Generator().manual_seed(4))
    attack = ATTACKS.create("apgd", {"norm": norm, "eps": eps, "loss": "margin", "steps": 100})
    out = lab.run(attack, lab.Classifier(lab.Linear(weight), 2), images, [1, 0, 1])
    sign = torch.tensor([-1.0, 1.0, -1.0]).view(3, 1, 1, 1)
    step = weight.sign() * 8 / 255 if norm == "linf" else 0.25 * weight / weight.norm()
    torch.testing.assert_close(out, images + sign * step, rtol=0, atol=2e-5 if norm == "linf" else 1e-3)


def test_steps_halve_as_in_the_paper():
    def flat(*values):
        return torch.tensor(values)

    def image(*values):
        return flat(*values).view(-1, 1, 1, 1)

    # Rises: 4 of 4 (keeps its step), 3 of 4 (halves), 4 of 4 but no better than at the last checkpoint (halves), the
    # same after a checkpoint that halved (keeps).
    state = Ascent(
        Box(), sign, steps=19, rho=0.75, momentum=0.75, window=4,
        x=image(1.0, 2.0, 3.0, 4.0), previous=image(0.0, 0.0, 0.0, 0.0), grad=image(1.0, 1.0, 1.0, 1.0),
        best=image(5.0, 6.0, 7.0, 8.0), best_grad=image(9.0, 9.0, 9.0, 9.0),
        best_value=flat(2.0, 2.0, 1.0, 1.0), last=flat(2.0, 2.0, 1.0, 1.0), step=image(1.0, 1.0, 1.0, 1.0),
        rises=flat(4.0, 3.0, 4.0, 4.0), reduced=torch.tensor([False, False, False, True]),
        best_before=flat(1.0, 1.0, 1.0, 1.0),
    )  # fmt: skip
    state.check()
    assert state.step.flatten().tolist() == [1.0, 0.5, 0.5, 1.0]
    assert state.x.flatten().tolist() == [1.0, 6.0, 7.0, 4.0]
    assert state.grad.flatten().tolist() == [1.0, 9.0, 9.0, 1.0]
    assert state.reduced.tolist() == [False, True, True, False] and state.rises.sum() == 0
    seen = Gradient(flat(3.0, 1.0, 1.0, float("nan")), image(0.0, 0.0, 0.0, 0.0))
    state.arrive(image(0.1, 0.2, 0.3, 0.4), seen)
    assert state.rises.tolist() == [1.0, 0.0, 0.0, 0.0] and state.best_value.tolist() == [3.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize("loss", ["ce", "dlr", "margin", "dlr_targeted"])
def test_beats_plain_ascent(lab, victim, loss):
    target, images, labels = victim
    params = {"loss": loss, "eps": "6/255", "steps": 40}
    if loss == "dlr_targeted":
        params["classes"] = 4
    ours = lab.run(ATTACKS.create("apgd", params), target, images, labels)
    bim = lab.run(
        ATTACKS.create("bim", {"eps": "6/255", "alpha": "1/255", "steps": 40}), target, images, labels
    )

    def standing(x):
        return sum(p == y for p, y in zip(target.predict(x), labels, strict=True))

    assert standing(ours) <= standing(bim) < len(labels)
    # What failed is the image of largest loss, or the clean one.
    clean = lab.run(ATTACKS.create("apgd", {**params, "failed": "clean"}), target, images, labels)
    for i, p in enumerate(target.predict(ours)):
        assert torch.equal(clean[i], images[i] if p == labels[i] else ours[i])


def test_targeted_reaches_its_target(lab, victim):
    target, images, labels = victim
    wrong = [(y + 1) % 5 for y in labels]
    for loss in ("ce", "margin", "dlr"):
        attack = ATTACKS.create("apgd", {"loss": loss, "eps": "1/4", "steps": 30, "target": "next"})
        before = F.cross_entropy(target.logits(images), torch.tensor(wrong), reduction="none")
        after = F.cross_entropy(
            target.logits(lab.run(attack, target, images, wrong)), torch.tensor(wrong), reduction="none"
        )
        assert (after < before).all()


def test_restarts_and_early_exit_spare_the_fooled(lab, victim):
    target, images, labels = victim
    params = {"eps": "6/255", "steps": 10, "restarts": 3}
    for stop in (False, True):
        attack = ATTACKS.create("apgd", {**params, "stop_when_fooled": stop})
        oracle = lab.oracle(target, attack, 8)
        out = attack.run(oracle, images, labels, lab.rng(8))
        passes = [trace.backwards for trace in oracle.traces]
        hit = [p != y for p, y in zip(target.predict(out), labels, strict=True)]
        assert any(hit)
        for fooled, count in zip(hit, passes, strict=True):
            assert count <= attack.passes() if fooled else count == attack.passes()
        assert stop == any(count % 11 for count in passes)


def test_stochastic_defense_is_averaged(lab, victim):
    target, images, labels = victim

    class Jitter(Defense):
        stochastic = True

        def forward(self, x, rng):
            return x + 0.02 * rng.normal(x.shape[1:])

    attack = ATTACKS.create("apgd", {"steps": 4})
    oracle = lab.oracle(target, attack, 8, Jitter(), eot=3)
    attack.run(oracle, images, labels, lab.rng(8))
    assert {trace.backwards for trace in oracle.traces} == {15}


def test_too_few_classes_is_a_skip(lab):
    images, _ = lab.batch(2, classes=2)
    for loss, classes in (("dlr", 2), ("dlr_targeted", 3)):
        target = lab.Classifier(lab.convnet(classes), classes)
        with pytest.raises(NotApplicable, match=f"needs .* the model has {classes}"):
            lab.run(ATTACKS.create("apgd", {"loss": loss}), target, images, [0, 1])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"loss": "dlr_targeted", "target": "next"}, "picks its targets itself"),
        ({"eps": 8}, "did you mean 8/255"),
        ({"steps": 0}, "steps"),
        ({"loss": "cw"}, "loss"),
        ({"step": 3}, "did you mean 'steps'"),
        ({"loss": "dlr", "classes": 50}, "classes: 50 belongs to loss dlr_targeted"),
        ({"target": 3}, "target: expected a string, got 3: did you mean 'class:3'[?]"),
    ],
)
def test_bad_input(params, message):
    with pytest.raises(PluginError, match=message):
        ATTACKS.create("apgd", params)
