"""The loop: closed forms on linear models, its options, and what it must never do."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from attacks.iterative import Iterative
from bench.errors import CheckError, PluginError
from bench.protocols import Attack, Gradient
from bench.registry import ATTACKS

EPS = Fraction(8, 255)
GRADIENT_ATTACKS = [
    ("fgsm", {}),
    ("fgsm", {"norm": "l2", "eps": "1/2"}),
    ("r_fgsm", {}),
    ("bim", {}),
    ("pgd", {"steps": 4}),
    ("pgd", {"steps": 4, "norm": "l2", "eps": "1/2", "alpha": "1/5"}),
    ("pgd", {"steps": 4, "loss": "kl", "start": "normal"}),
    ("pgd", {"steps": 4, "loss": "margin"}),
    ("pgd", {"steps": 4, "loss": "dlr"}),
    ("pgd", {"steps": 3, "restarts": 2, "return_best": True, "best_by": "fooled"}),
    ("pgd", {"steps": 4, "stop_when_fooled": True}),
    ("det_pgd", {"loss": "ce", "steps": 4}),
    ("mi_fgsm", {}),
    ("di_fgsm", {"steps": 5}),
    ("ti_fgsm", {"kernel": 5}),
    ("fgsm_ti", {"kernel": 5}),
    ("mi_fgsm_ti", {"kernel": 5}),
    ("dim", {"steps": 5}),
    ("dim_ti", {"steps": 5, "kernel": 5}),
    ("dim_ti", {"steps": 5, "kernel": 5, "canvas": "native", "ratio": "3/2"}),
    ("di_fgsm", {"steps": 5, "ratio": "9/10", "interpolation": "bilinear"}),
    ("dim", {"steps": 5, "ratio": "1/2"}),
    ("dim", {"steps": 5, "ratio": "3/2", "interpolation": "bilinear"}),
    ("dim_ti", {"steps": 5, "kernel": 5, "canvas": "native", "ratio": "3/2", "interpolation": "bilinear"}),
    ("noise", {}),
    ("noise", {"kind": "uniform", "draws": 3}),
    ("none", {}),
]
IDS = [f"{name}-{'-'.join(str(v) for v in params.values())}" for name, params in GRADIENT_ATTACKS]


def budget(attack: Attack, clean: Tensor, adversarial: Tensor) -> None:
    assert adversarial.shape == clean.shape and adversarial.dtype == clean.dtype
    assert torch.isfinite(adversarial).all()
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    delta = (adversarial - clean).flatten(1).double()
    if attack.norm == "linf":
        assert delta.abs().max() <= float(attack.eps) + 1e-6
    elif attack.norm == "l2":
        assert delta.norm(dim=1).max() <= float(attack.eps) * (1 + 1e-6) + 1e-6
    else:
        assert (delta == 0).all()


# -- closed forms -------------------------------------------------------------------------------------------------
@pytest.fixture
def linear(lab):
    weight = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(3))
    images = 0.3 + 0.4 * torch.rand(3, 3, 6, 5, generator=torch.Generator().manual_seed(4))
    return lab.Classifier(lab.Linear(weight), 2), weight, images


@pytest.mark.parametrize(
    "attack",
    [
        {"name": "fgsm"},
        {"name": "bim", "steps": 3},
        {"name": "bim", "alpha": "5/255", "steps": 4},
        {"name": "pgd", "steps": 20},
        {"name": "pgd", "loss": "margin", "steps": 20},
        {"name": "mi_fgsm", "eps": "8/255"},
        {"name": "r_fgsm", "eps": "8/255", "random_step": "1/2550"},
    ],
    ids=lambda a: (
        "-".join(a.values()) if all(isinstance(v, str) for v in a.values()) else str(list(a.values()))
    ),
)
def test_linf_optimum_of_a_linear_model(lab, linear, attack):
    target, weight, images = linear
    params = dict(attack)
    name = params.pop("name")
    out = lab.run(ATTACKS.create(name, params), target, images, [1, 0, 1])
    direction = torch.stack([-weight.sign(), weight.sign(), -weight.sign()])
    if name == "r_fgsm":  # its random step costs up to twice its size
        assert (out - (images + float(EPS) * direction)).abs().max() <= 2 / 2550 + 1e-6
    else:
        torch.testing.assert_close(out, images + float(EPS) * direction, rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", ["none", "uniform"])
def test_l2_optimum_of_a_linear_model(lab, linear, start):
    target, weight, images = linear
    attack = ATTACKS.create("pgd", {"norm": "l2", "eps": "1/4", "alpha": "1/10", "steps": 40, "start": start})
    out = lab.run(attack, target, images, [1, 1, 1])
    torch.testing.assert_close(out, images - 0.25 * weight / weight.norm(), rtol=0, atol=1e-5)


def test_targeted_goes_the_other_way(lab, linear):
    target, weight, images = linear
    for loss in ("ce", "margin"):
        out = lab.run(ATTACKS.create("bim", {"loss": loss, "target": "random"}), target, images, [1, 1, 1])
        torch.testing.assert_close(out, images + float(EPS) * weight.sign(), rtol=0, atol=1e-6)


def test_targeted_reaches_its_target(lab):
    target = lab.Classifier(lab.convnet(), 5)
    images, _ = lab.batch(6)
    wrong = [(p + 1) % 5 for p in target.predict(images)]
    for loss in ("ce", "margin", "dlr"):
        attack = ATTACKS.create(
            "pgd", {"target": "random", "loss": loss, "eps": "1/4", "alpha": "1/100", "steps": 30}
        )
        assert attack.target == "random"
        before = F.cross_entropy(target.logits(images), torch.tensor(wrong), reduction="none")
        after = F.cross_entropy(
            target.logits(lab.run(attack, target, images, wrong)), torch.tensor(wrong), reduction="none"
        )
        assert (after < before).all()


def test_r_fgsm_formula(lab):
    target = lab.Classifier(lab.convnet(), 5)
    images, labels = lab.batch()
    attack = ATTACKS.create("r_fgsm", {"eps": "16/255"})
    out = lab.run(attack, target, images, labels)
    eps, b = 16 / 255, 8 / 255
    first = (images + b * lab.rng(4).signs(images.shape[1:])).clamp(0, 1).requires_grad_()
    F.cross_entropy(target.net(first), torch.tensor(labels), reduction="sum").backward()
    expected = (first.detach() + (eps - b) * first.grad.sign()).clamp(0, 1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_kl_climbs_from_noise_and_refuses_the_clean_start(lab):
    with pytest.raises(PluginError, match="zero gradient at the clean image"):
        ATTACKS.create("bim", {"loss": "kl"})
    with pytest.raises(PluginError, match="zero gradient at the clean image"):
        ATTACKS.create("pgd", {"loss": "kl", "start": "none"})
    with pytest.raises(PluginError, match="cannot be targeted"):
        ATTACKS.create("pgd", {"loss": "kl", "target": "random"})
    target = lab.Classifier(lab.convnet(), 5)
    images, _ = lab.batch()

    def divergence(x: Tensor) -> Tensor:
        p = target.net(images).softmax(1)
        return (p * (p.log() - target.net(x).softmax(1).log())).sum(1)

    attack = ATTACKS.create("pgd", {"loss": "kl", "start": "normal", "eps": "8/255", "steps": 10})
    # The labels do not matter.
    out = lab.run(attack, target, images, [None] * 4)
    noise = lab.run(ATTACKS.create("noise", {}), target, images, [None] * 4)
    assert (divergence(out) > 3 * divergence(noise)).all()


# -- what may not happen ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "params"), GRADIENT_ATTACKS, ids=IDS)
def test_every_attack_keeps_its_promises(lab, name, params):
    attack = ATTACKS.create(name, params)
    target = lab.Classifier(lab.convnet(), 5, one_by_one=True)
    images, labels = lab.batch(5, (14, 11))
    before, state = images.clone(), torch.get_rng_state()
    oracle = lab.oracle(target, attack, 5)
    out = attack.run(oracle, images, labels, lab.rng(5))
    assert torch.equal(images, before) and not images.requires_grad and out.data_ptr() != images.data_ptr()
    assert torch.equal(torch.get_rng_state(), state), "draws from the global generator"
    budget(attack, images, out)
    if name not in ("none", "noise"):
        assert ((out - images).flatten(1).abs().max(1).values > 0).all()
        # Early exit only ever takes fewer passes than announced.
        done = max(trace.backwards for trace in oracle.traces)
        assert done <= attack.passes() if attack.stop_when_fooled else done == attack.passes()
        assert set(attack.loss_kinds()) <= {"ce"}
    # Same seeds, same images; other seeds, other images exactly when the attack is stochastic.
    assert torch.equal(out, lab.run(attack, target, images, labels))
    other = lab.run(attack, target, images, labels, key="another")
    assert torch.equal(out, other) != attack.stochastic
    # Any split of the batch gives the same bits.
    for cut in (1, 3):
        parts = []
        for part in (slice(0, cut), slice(cut, 5)):
            index = list(range(5))[part]
            view = lab.oracle(target, attack, 5).select(index)
            parts.append(attack.run(view, images[part], labels[part], lab.rng(5).select(index)))
        assert torch.equal(torch.cat(parts), out)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 3),
    size=st.tuples(st.integers(4, 20), st.integers(4, 20)),
    levels=st.integers(1, 128),
    alpha=st.integers(1, 255),
    norm=st.sampled_from(["linf", "l2"]),
    start=st.sampled_from(["none", "uniform", "radial", "normal", "sign"]),
    momentum=st.sampled_from([0.0, 1.0]),
    kernel=st.sampled_from([None, 3, 15]),
    diversity=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**20),
)
def test_budget_and_range(
    lab, count, size, levels, alpha, norm, start, momentum, kernel, diversity, dtype, seed
):
    if norm == "linf" and start == "radial":
        start = "uniform"
    attack = ATTACKS.create(
        "iterative",
        {
            "norm": norm,
            "eps": Fraction(levels, 255),
            "alpha": Fraction(alpha, 255),
            "steps": 3,
            "start": start,
            "momentum": momentum,
            "ti_kernel": kernel,
            "di_prob": diversity,
        },
    )
    images, labels = lab.batch(count, size, seed)
    images = images.to(dtype)
    target = lab.Classifier(lab.convnet().to(dtype), 5)
    budget(attack, images, lab.run(attack, target, images, labels))


def test_budget_to_the_last_bit(lab):
    """Every representable neighbourhood: |x' - x| never exceeds eps by more than the rounding of the difference."""
    images = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    target = lab.Classifier(lab.convnet(), 5)
    for levels in (1, 4, 8, 16, 31):
        attack = ATTACKS.create("pgd", {"eps": Fraction(levels, 255), "alpha": "1/255", "steps": 5})
        delta = (lab.run(attack, target, images, [0]).double() - images.double()).abs().max()
        assert delta <= levels / 255 + 6e-8


def test_more_steps_are_not_weaker(lab):
    target = lab.Classifier(lab.convnet(), 5)
    images, labels = lab.batch(16)

    def loss(name: str, **params: object) -> Tensor:
        out = lab.run(ATTACKS.create(name, params), target, images, labels)
        return F.cross_entropy(target.net(out), torch.tensor(labels), reduction="none")

    single = loss("fgsm")
    noise = loss("noise")
    last = loss("bim", alpha="1/255", steps=2)
    for steps in (4, 8, 40):
        more = loss("bim", alpha="1/255", steps=steps)
        assert (more >= last - 1e-4).all()
        last = more
    assert (last >= single - 1e-4).all() and (single > noise).all()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.integers(1, 12),
    more=st.integers(1, 30),
    levels=st.integers(1, 64),
    share=st.integers(2, 8),
    norm=st.sampled_from(["linf", "l2"]),
    start=st.sampled_from(["none", "uniform"]),
    momentum=st.sampled_from([0.0, 1.0]),
    loss=st.sampled_from(["ce", "margin"]),
    best=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_no_number_of_steps_is_weaker_than_a_smaller_one(
    lab, steps, more, levels, share, norm, start, momentum, loss, best, seed
):
    """For each image where the best iterate is returned; on the mean, but for noise, where the last one is."""
    target = lab.Classifier(lab.convnet(), 5)
    images, labels = lab.batch(8, (12, 12), seed)
    eps = Fraction(levels, 255) * (1 if norm == "linf" else 8)
    harm = []
    for count in (steps, steps + more):
        attack = ATTACKS.create(
            "iterative",
            {
                "norm": norm,
                "eps": eps,
                "alpha": eps / share,
                "steps": count,
                "start": start,
                "momentum": momentum,
                "loss": loss,
                "return_best": best,
            },
        )
        logits = target.net(lab.run(attack, target, images, labels))
        truth = torch.tensor(labels)
        others = logits.scatter(1, truth[:, None], -torch.inf).amax(1)
        value = others - logits.gather(1, truth[:, None])[:, 0]
        harm.append(F.cross_entropy(logits, truth, reduction="none") if loss == "ce" else value)
    if best:
        assert (harm[1] >= harm[0] - 1e-5).all()
    assert harm[1].mean() >= harm[0].mean() - 0.02 * (1 + harm[0].abs().mean())


def test_losses_are_summed_not_averaged(lab):
    """The gradient handed to a normalising step does not shrink with the batch."""
    target = lab.Classifier(lab.convnet(), 5, one_by_one=True)
    images, labels = lab.batch(8)
    attack = ATTACKS.create(
        "iterative", {"norm": "none", "eps": None, "alpha": 1, "steps": 1, "step": "sign"}
    )
    bound = attack.loss.bind(lab.oracle(target, attack, 8), images, labels, False)
    whole = lab.oracle(target, attack, 8).gradient(images, bound).grad
    alone = lab.oracle(target, attack, 1).gradient(images[:1], bound.select([0])).grad
    assert torch.equal(whole[:1], alone)


# -- planted gradients --------------------------------------------------------------------------------------------
class Planted:
    """An oracle that returns the gradients it was given, one per step."""

    num_classes = 5

    def __init__(self, *grads: Tensor) -> None:
        self.grads, self.seen = list(grads), []

    def __len__(self) -> int:
        return len(self.grads[0])

    def gradient(self, images, objective):
        self.seen.append(images)
        return Gradient(torch.zeros(len(images)), self.grads[len(self.seen) - 1])


def test_momentum_survives_zero_and_nan(lab):
    g = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    poisoned = g.clone()
    poisoned[0, 0, 0, 0], poisoned[0, 1, 0, 0] = float("nan"), float("inf")
    last = -5 * g.flip(-1)
    grads = (g, torch.zeros_like(g), torch.full_like(g, float("nan")), poisoned, last)
    images = torch.full((2, 3, 4, 4), 0.5)
    attack = ATTACKS.create("mi_fgsm", {"eps": "1/4", "alpha": "1/100", "steps": 5})
    oracle = Planted(*grads)
    out = attack.run(oracle, images, [0, 0], lab.rng(2))
    clean_up = torch.where(torch.isfinite(poisoned), poisoned, 0.0)
    total = torch.zeros_like(g)
    x = images
    for grad in (g, None, None, clean_up, last):
        if grad is not None:
            total = total + grad / grad.abs().mean((1, 2, 3), keepdim=True)
        x = x + 0.01 * total.sign()
    torch.testing.assert_close(out, x, rtol=0, atol=1e-6)
    # A zero gradient at the first step leaves the image where it is, once.
    assert not torch.equal(oracle.seen[1], oracle.seen[2])


def test_tiny_gradients_are_normalised_like_others(lab):
    """A saturated model's gradient of 1e-30 has a direction; a constant added to the mean would erase it."""
    g = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = torch.full((1, 3, 4, 4), 0.5)
    attack = ATTACKS.create("mi_fgsm", {"eps": "1/4", "alpha": "1/100", "steps": 2})
    h = g.flip(-1) * 0.5 + g
    outs = [attack.run(Planted(s * g, h), images, [0], lab.rng(1)) for s in (1.0, 1e-30)]
    assert torch.equal(*outs)


# -- options ------------------------------------------------------------------------------------------------------
def test_return_best_keeps_the_best_iterate(lab):
    target = lab.Classifier(lab.convnet(), 5)
    images, labels = lab.batch(8)

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(target.net(x), torch.tensor(labels), reduction="none")

    # A step far larger than eps makes iterates jump between corners, so the last is not always the best.
    common = {"eps": "1/4", "alpha": "1/2", "steps": 7}
    last = lab.run(ATTACKS.create("bim", common), target, images, labels)
    best = lab.run(ATTACKS.create("bim", {**common, "return_best": True}), target, images, labels)
    assert (loss(best) >= loss(last) - 1e-6).all() and (loss(best) > loss(last) + 1e-6).any()
    for steps in range(1, 8):  # and none of the iterates is better
        x = lab.run(ATTACKS.create("bim", {**common, "steps": steps}), target, images, labels)
        assert (loss(best) >= loss(x) - 1e-6).all()


@pytest.mark.parametrize("best_by", ["loss", "fooled"])
def test_restarts_keep_the_best_run(lab, best_by):
    target = lab.Classifier(lab.convnet(), 5)
    images, _ = lab.batch(12)
    labels = target.predict(images)

    def score(x: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(target.net(x), torch.tensor(labels), reduction="none")
        return loss, torch.tensor([p != y for p, y in zip(target.predict(x), labels, strict=True)])

    common = {"eps": "8/255", "alpha": "8/255", "steps": 1, "best_by": best_by}
    one = lab.run(ATTACKS.create("pgd", common), target, images, labels)
    many = lab.run(ATTACKS.create("pgd", {**common, "restarts": 8}), target, images, labels)
    (loss1, fooled1), (loss8, fooled8) = score(one), score(many)
    # The first run of many is the single run, so no image gets worse and some get better.
    if best_by == "loss":
        assert (loss8 >= loss1 - 1e-6).all() and (loss8 > loss1 + 1e-6).any()
    else:
        assert (fooled8 | ~fooled1).all()


def test_fooled_images_leave_the_batch(lab):
    target = lab.Classifier(lab.convnet(), 5, one_by_one=True)
    images, _ = lab.batch(12)
    labels = target.predict(images)
    params = {"eps": "1/4", "alpha": "1/100", "steps": 25, "start": "none"}
    full = ATTACKS.create("pgd", params)
    early = ATTACKS.create("pgd", {**params, "stop_when_fooled": True})
    oracle = lab.oracle(target, early, 12)
    out = early.run(oracle, images, labels, lab.rng(12))
    looks = [trace.backwards for trace in oracle.traces]
    # Knowing a success costs no pass of its own.
    assert [trace.forwards for trace in oracle.traces] == looks
    fooled = [p != y for p, y in zip(target.predict(out), labels, strict=True)]
    assert any(fooled) and len(set(looks)) > 1

    def after(steps: int, i: int) -> torch.Tensor:
        if steps == 0:
            return images[i]
        return lab.run(ATTACKS.create("pgd", {**params, "steps": steps}), target, images, labels)[i]

    for i, look in enumerate(looks):
        # Each image is the first iterate that fools the victim, or the last one.
        steps = look - 1 if target.predict(after(look - 1, i)[None])[0] != labels[i] else look
        assert look == 25 or steps == look - 1
        assert torch.equal(after(steps, i), out[i])
        for earlier in range(steps):
            assert target.predict(after(earlier, i)[None])[0] == labels[i]
    final = target.predict(lab.run(full, target, images, labels))
    assert sum(fooled) >= sum(p != y for p, y in zip(final, labels, strict=True))


def ended(lab, attack, target, images, labels) -> tuple[list, list[int]]:
    """What the victim sees in the images that an attack ends with, and how many gradients each took."""
    oracle = lab.oracle(target, attack, len(images))
    out = attack.run(oracle, images, labels, lab.rng(len(images)))
    return target.predict(out), [trace.backwards for trace in oracle.traces]


def test_targeted_images_leave_at_their_target(lab):
    target = lab.Classifier(lab.convnet(), 5, one_by_one=True)
    images, _ = lab.batch(12)
    wrong = [(p + 1) % 5 for p in target.predict(images)]
    params = {"eps": "1/4", "alpha": "1/100", "steps": 25, "target": "random", "stop_when_fooled": True}
    attack = ATTACKS.create("bim", params)
    predicted, taken = ended(lab, attack, target, images, wrong)
    assert len(set(taken)) > 1
    for p, t, steps in zip(predicted, wrong, taken, strict=True):
        assert p == t or steps == 25


def test_restarts_are_for_images_that_were_not_fooled(lab):
    target = lab.Classifier(lab.convnet(), 5, one_by_one=True)
    images, _ = lab.batch(12)
    labels = target.predict(images)
    params = {"eps": "1/8", "alpha": "1/100", "steps": 10, "restarts": 3, "stop_when_fooled": True}
    attack = ATTACKS.create("pgd", params)
    predicted, taken = ended(lab, attack, target, images, labels)
    for p, y, steps in zip(predicted, labels, taken, strict=True):
        assert p != y or steps == attack.passes()
    # One that the first run fools takes part in no other: at most its steps and the look at the last.
    assert min(taken) <= 11


def test_what_is_wrong_already_is_left_alone(lab):
    target = lab.Classifier(lab.convnet(), 5)
    images, _ = lab.batch(6)
    labels = [(p + 1) % 5 for p in target.predict(images)]
    for name, params in (
        ("bim", {}),
        ("iterative", {"di_prob": 0.5}),
        ("pgd", {"loss": "margin", "start": "none"}),
    ):
        attack = ATTACKS.create(name, params)
        stops = ATTACKS.create(name, {**params, "stop_when_fooled": True})
        assert torch.equal(lab.run(stops, target, images, labels), images)
        assert not torch.equal(lab.run(attack, target, images, labels), images)


def test_diverse_images_leave_by_their_own_class(lab):
    target = lab.Classifier(lab.convnet(), 5, one_by_one=True)
    images, _ = lab.batch(12)
    labels = target.predict(images)
    params = {"eps": "1/4", "alpha": "1/100", "steps": 25, "di_prob": 0.5, "stop_when_fooled": True}
    attack = ATTACKS.create("iterative", params)
    assert attack.needs == {"gradient", "decision"}
    predicted, taken = ended(lab, attack, target, images, labels)
    assert len(set(taken)) > 1
    for p, y, steps in zip(predicted, labels, taken, strict=True):
        assert p != y or steps == 25


def test_early_exit_of_targeted_restarts(lab):
    target = lab.Classifier(lab.convnet(), 5, one_by_one=True)
    images, _ = lab.batch(8)
    wrong = [(p + 1) % 5 for p in target.predict(images)]
    params = {
        "eps": "1/2",
        "alpha": "1/20",
        "steps": 10,
        "restarts": 3,
        "target": "random",
        "stop_when_fooled": True,
    }
    attack = ATTACKS.create("pgd", params)
    oracle = lab.oracle(target, attack, 8)
    out = attack.run(oracle, images, wrong, lab.rng(8))
    budget(attack, images, out)
    for trace, p, t in zip(oracle.traces, target.predict(out), wrong, strict=True):
        assert trace.backwards < attack.passes() or p != t


def test_predicted_labels_replace_the_true_ones(lab):
    target = lab.Classifier(lab.convnet(), 5)
    images, labels = lab.batch(6)
    predicted = target.predict(images)
    assert predicted != labels
    for name in ("fgsm", "bim"):
        leak_free = lab.run(ATTACKS.create(name, {"labels": "predicted"}), target, images, labels)
        assert torch.equal(leak_free, lab.run(ATTACKS.create(name, {}), target, images, predicted))
        assert not torch.equal(leak_free, lab.run(ATTACKS.create(name, {}), target, images, labels))


def test_what_an_attack_declares():
    def of(name: str, **params: object) -> Iterative:
        return ATTACKS.create(name, params)

    assert (
        of("bim").needs == {"gradient"} and of("bim").tasks is None and list(of("bim").loss_kinds()) == ["ce"]
    )
    assert list(of("det_pgd").loss_kinds()) == ["cls"] and not of("det_pgd").stochastic
    assert list(of("bim", loss="cls+loc").loss_kinds()) == ["cls+loc"]
    margin = of("pgd", loss="margin")
    assert (
        margin.needs == {"gradient", "logits"}
        and margin.tasks == {"classification"}
        and not margin.loss_kinds()
    )
    assert of("pgd", loss="kl", start="normal").tasks == {"classification", "segmentation"}
    assert of("pgd", stop_when_fooled=True).needs == {"gradient", "logits"}
    assert of("pgd", stop_when_fooled=True, restarts=2).needs == {"gradient", "logits", "decision"}
    assert of("bim", stop_when_fooled=True).tasks == {"classification"}
    assert of("pgd", restarts=2, best_by="fooled").tasks == {"classification"}
    assert of("pgd", restarts=2).needs == {"gradient"} and of("pgd", restarts=2).passes() == 42
    assert of("none").needs == frozenset() and of("none").eps is None and of("none").norm is None
    assert of("noise").needs == frozenset() and of("noise", draws=5).needs == {"gradient"}
    assert (
        of("pgd").stochastic
        and not of("bim").stochastic
        and of("dim").stochastic
        and not of("mi_fgsm").stochastic
    )
    assert of("i_fgsm").params == of("bim").params and of("pgd", eps=0.031).params["eps"] == "31/1000"
    assert of("dim_ti").params["eps"] == "16/255" and of("pgd", norm="l2", eps=3, alpha=1).eps == 3


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("pgd", {"eps": 8}, "did you mean 8/255"),
        ("pgd", {"eps": 0}, "eps: 0"),
        ("pgd", {"alpha": "-1/255"}, "alpha: -1/255"),
        ("mi_fgsm", {"eps": 16}, "did you mean 16/255"),
        ("bim", {"steps": 0}, "steps: .*greater than or equal to 1, got 0"),
        ("pgd", {"restarts": 0}, "restarts"),
        ("pgd", {"norm": "l1"}, "norm: .*'linf' or 'l2'"),
        ("pgd", {"kappa": 1}, "kappa belongs to loss 'margin'"),
        ("pgd", {"step": 3}, "did you mean 'steps'"),
        ("ti_fgsm", {"kernel": 4}, "kernel: expected an odd number, got 4"),
        ("dim", {"prob": 1.5}, "prob: .*less than or equal to 1"),
        ("dim", {"ratio": "1"}, "ratio in "),
        ("dim", {"ratio": "0"}, "ratio in "),
        ("dim", {"ratio": "5/2"}, "ratio in "),
        ("dim", {"interpolation": "bicubic"}, "interpolation: "),
        ("r_fgsm", {"random_step": "16/255"}, "smaller than eps"),
        ("iterative", {"restarts": 2}, "random start"),
        ("iterative", {"norm": "none"}, "eps must be null"),
        ("iterative", {"norm": "none", "eps": None}, "alpha is required"),
        ("iterative", {"return_best": True, "di_prob": 0.5}, "input diversity makes random"),
        ("iterative", {"start": "uniform", "start_scale": "9/255"}, "larger than eps"),
        ("iterative", {"start_scale": "9/255"}, "needs a start"),
        ("pgd", {"start": "radial"}, "goes with norm l2"),
        ("fgsm", {"labels": "predicted", "target": "random"}, "no meaning"),
    ],
)
def test_wrong_parameters_get_one_line(name, params, message):
    with pytest.raises(PluginError, match=message) as error:
        ATTACKS.create(name, params, "grid.yaml, attacks[0]")
    assert str(error.value).startswith("grid.yaml, attacks[0]: attack '") and "\n" not in str(error.value)


def test_fooled_needs_classes(lab):
    class Maps(lab.Classifier):
        def predict(self, images, *, geometry=None):
            return [torch.zeros(2, 2) for _ in images]

    images, labels = lab.batch()
    with pytest.raises(CheckError, match="compares classes"):
        attack = ATTACKS.create("pgd", {"restarts": 2, "best_by": "fooled"})
        lab.run(attack, Maps(lab.convnet(), 5), images, labels)


def test_uniform_start_fills_the_ball(lab):
    from attacks.starts import start

    images = torch.full((400, 3, 2, 2), 0.5)
    for norm in ("linf", "l2"):
        delta = (start("uniform", 0.1, norm, images, lab.rng(400)) - images).flatten(1)
        size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        assert size.max() <= 0.1 + 1e-6
        # P(size <= r) = (r / eps)^12 in twelve dimensions.
        share = float((size <= 0.1 * 0.5 ** (1 / 12)).float().mean())
        assert abs(share - 0.5) < 0.1
    length = (start("radial", 0.1, "l2", images, lab.rng(400)) - images).flatten(1).norm(dim=1)
    assert length.max() <= 0.1 + 1e-6 and abs(float((length <= 0.03).float().mean()) - 0.3) < 0.1
    noise = start("normal", 0.001, "linf", images, lab.rng(400)) - images
    assert abs(float(noise.std()) - 0.001) < 5e-5
    signs = start("sign", 0.01, "linf", images, lab.rng(400)) - images
    torch.testing.assert_close(signs.abs(), torch.full_like(signs, 0.01), rtol=0, atol=1e-6)
