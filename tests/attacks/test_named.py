"""PGD-KL, EOT-PGD, HGD's ensemble, TAP and FFF: what each adds to the loop, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attacks.activations import activations, maps_of, stage_ends
from bench.errors import GridError, NotApplicable, PluginError
from bench.protocols import Defense
from bench.registry import ATTACKS
from bench.threat import ModelOracle, Victim


class Jitter(Defense):
    stochastic = True

    def forward(self, x, rng):
        return x + 0.05 * rng.normal(x.shape[1:])


@pytest.fixture
def victim(lab):
    target = lab.Classifier(lab.convnet(), 5, one_by_one=True)
    images, _ = lab.batch(4)
    return target, images, target.predict(images)


def test_pgd_kl_is_the_loop_on_kl(lab, victim):
    target, images, labels = victim
    params = {"eps": "0.031", "alpha": "0.0175", "steps": 4}
    same = {**params, "loss": "kl", "start": "normal"}
    ours = lab.run(ATTACKS.create("pgd_kl", {}), target, images, labels)
    assert torch.equal(ours, lab.run(ATTACKS.create("pgd", same), target, images, labels))


def test_eot_pgd_averages(lab, victim):
    target, images, labels = victim
    attack = ATTACKS.create("eot_pgd", {"steps": 2, "draws": 5, "start": "none"})
    oracle = lab.oracle(target, attack, 4, Jitter(), eot=2)
    out = attack.run(oracle, images, labels, lab.rng(4))
    assert {trace.backwards for trace in oracle.traces} == {2 * 5 * 2}
    # The first step by hand: the mean of the five calls, each the mean of the oracle's own two draws.
    again = lab.oracle(target, attack, 4, Jitter(), eot=2)
    bound = attack.loss.bind(again, images, labels, False)
    grad = torch.stack([again.gradient(images, bound).grad for _ in range(5)]).mean(0)
    first = ATTACKS.create("eot_pgd", {"steps": 1, "draws": 5, "start": "none"})
    moved = first.run(lab.oracle(target, first, 4, Jitter(), eot=2), images, labels, lab.rng(4))
    sure = grad.abs() > 1e-6
    torch.testing.assert_close(
        moved[sure], (images + 2 / 255 * grad.sign()).clamp(0, 1)[sure], rtol=0, atol=1e-6
    )
    plain = lab.run(ATTACKS.create("pgd", {"steps": 2, "start": "none"}), target, images, labels)
    assert torch.equal(lab.run(attack, target, images, labels), plain) and not torch.equal(out, plain)


def test_ensemble_weights_and_labels(lab, victim):
    _, images, _ = victim

    class Member(lab.Classifier):
        def loss_from_logits(self, logits, targets, kind):
            return F.cross_entropy(logits, torch.tensor(list(targets)), reduction="none")

    models = tuple(Member(lab.convnet(seed=s), 5, one_by_one=True) for s in (0, 1, 2))

    def run(**params):
        attack = ATTACKS.create("hgd_ensemble", {"steps": 1, "eps": "4/255", **params})
        oracle = ModelOracle(Victim(models), attack, lab.rng(4, "oracle"))
        return attack.run(oracle, images, [0, 1, 2, 3], lab.rng(4))

    def expected(weights, labels):
        x = images.clone().requires_grad_()
        logits = sum(w * m.logits(x) for w, m in zip(weights, models, strict=True))
        F.cross_entropy(logits, labels, reduction="sum").backward()
        return (images + 4 / 255 * x.grad.sign()).clamp(0, 1)

    probabilities = [m.logits(images).softmax(1) for m in models]
    third = [1 / 3] * 3
    torch.testing.assert_close(run(), expected(third, sum(probabilities).argmax(1)), rtol=0, atol=1e-6)
    torch.testing.assert_close(run(labels="true"), expected(third, torch.arange(4)), rtol=0, atol=1e-6)
    weights = [0.5, 0.5, 0.0]
    seen = sum(w * p for w, p in zip(weights, probabilities, strict=True)).argmax(1)
    torch.testing.assert_close(run(weights=[2, 2, 0]), expected(weights, seen), rtol=0, atol=1e-6)
    with pytest.raises(GridError, match="weights: 2 given, the threat model has 3 models"):
        run(weights=[1, 2])
    with pytest.raises(PluginError, match="at least one above 0"):
        ATTACKS.create("hgd_ensemble", {"weights": [0, 0]})


# -- activations --------------------------------------------------------------------------------------------------
def test_layers_are_found_and_read(lab, victim):
    target, images, _ = victim
    attack = ATTACKS.create("tap", {})
    oracle = lab.oracle(target, attack, 4)
    names = [name for name, _ in maps_of(oracle, images, nn.Conv2d)]
    assert names == ["net.0", "net.2"]
    # The last map at each of the resolutions 12, 6 and 2.
    assert stage_ends(oracle, images) == ["net.1", "net.3", "net.4"]
    found = activations(oracle, images, ["net.0", "net.3"])
    torch.testing.assert_close(found[0], target.net[0](images))
    torch.testing.assert_close(found[1], target.net[:4](images))


def test_tap_by_hand(lab, victim):
    target, images, labels = victim
    attack = ATTACKS.create("tap", {"layers": ["net.2"], "lam": 0.3, "eta": 0.7, "power": 0.5})
    bound = attack.loss.bind(lab.oracle(target, attack, 4), images, labels, False)
    moved = (images + 0.03).clamp(0, 1)
    value = bound(lab.oracle(target, attack, 4), moved)

    def root(x):
        out = target.net[:3](x)
        return out.sign() * out.abs().sqrt()

    ce = F.cross_entropy(target.net(moved), torch.tensor(labels), reduction="none")
    far = (root(moved) - root(images)).square().flatten(1).sum(1)
    filtered = F.conv2d(moved - images, torch.full((3, 1, 3, 3), 1 / 9), padding=1, groups=3)
    torch.testing.assert_close(
        value, ce + 0.3 * far + 0.7 * filtered.abs().flatten(1).sum(1), rtol=1e-3, atol=1e-3
    )


def test_tap_climbs_its_objective_higher_than_bim(lab, victim):
    target, images, labels = victim
    params = {"eps": "8/255", "alpha": "2/255", "steps": 10}
    attack = ATTACKS.create("tap", {**params, "lam": 1.0})
    bound = attack.loss.bind(lab.oracle(target, attack, 4), images, labels, False)

    def value(x):
        return bound(lab.oracle(target, attack, 4), x)

    tap = lab.run(attack, target, images, labels)
    bim = lab.run(ATTACKS.create("bim", params), target, images, labels)
    assert value(tap).sum() > value(bim).sum() > value(images).sum()
    with pytest.raises(GridError, match=r"did you mean 'net.3'|unknown layer"):
        lab.run(ATTACKS.create("tap", {"layers": ["net.33"]}), target, images, labels)


def test_fff_is_one_perturbation_for_all(lab, victim):
    target, images, labels = victim
    attack = ATTACKS.create("fff", {"steps": 30, "eps": "8/255", "rescale": 20, "lr": 0.1})
    out = lab.run(attack, target, images, labels)
    inside = (images > 8 / 255) & (images < 1 - 8 / 255)
    deltas = torch.where(inside, out - images, torch.nan)
    spread = deltas.nan_to_num(-1e9).amax(0) - deltas.nan_to_num(1e9).amin(0)
    assert spread[inside.any(0)].max() < 1e-5
    # Found without the images: other images get the same, another seed gives another.
    alone = ATTACKS.create("fff", {"steps": 30, "eps": "8/255", "rescale": 20, "lr": 0.1})
    assert torch.equal(lab.run(alone, target, images[2:], labels[2:]), out[2:])
    other = ATTACKS.create("fff", {"steps": 30, "eps": "8/255", "seed": 1})
    assert not torch.equal(lab.run(other, target, images, labels), out)
    # It excites the convolutions more than noise of its size.
    delta = attack._found[next(iter(attack._found))][1]
    noise = 8 / 255 * torch.randn(delta.shape, generator=torch.Generator().manual_seed(0)).sign()

    def excited(d):
        x, total = 0.5 + d, 0.0
        for i, layer in enumerate(target.net[:3]):
            x = layer(x)
            total += float(x.abs().mean().log()) if i in (0, 2) else 0.0
        return total

    assert excited(delta) > excited(noise)


def test_fff_refuses_a_stochastic_defense(lab, victim):
    target, images, labels = victim
    attack = ATTACKS.create("fff", {"steps": 2})
    with pytest.raises(NotApplicable, match="stochastic defense"):
        attack.run(lab.oracle(target, attack, 4, Jitter()), images, labels, lab.rng(4))
