"""CW, DDN and DeepFool: distances on linear models, what every one of them promises, and bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.errors import GridError, NotApplicable, PluginError
from bench.protocols import Defense, ImageRNG
from bench.registry import ATTACKS, DATASETS, MODELS
from bench.threat import ModelOracle, Victim

# Options that are not in the papers: see the attacks' docstrings.
NEWTON = {"newton": True, "gamma": 0.7, "alpha": 3}
MOVING = {"binary_search_steps": 1, "initial_c": None, "c_rate": 0.1, "final_lr": 0.003, "beta1": 0.5}
SHRINKING = {"initial_c": None, "c_rate": 0.1, "lr": 0.02, "final_lr": 0.001, "beta1": 0.5, "shrink": 0.95}

ATTACKS_AND_PARAMS = [
    ("cw_l2", {"steps": 12, "binary_search_steps": 3, "initial_c": 1, "lr": 0.1}),
    (
        "cw_l2",
        {
            "steps": 24,
            "binary_search_steps": 1,
            "initial_c": None,
            "lr": 0.1,
            "c_rate": 0.2,
            "final_lr": 0.01,
        },
    ),
    (
        "cw_l2",
        {"steps": 12, "binary_search_steps": 3, "initial_c": None, "lr": 0.1, "c_rate": 0.2, "beta1": 0.5},
    ),
    ("cw_l2", {"steps": 4, "binary_search_steps": 11, "lr": 0.1, "kappa": 1, "abort_early": False}),
    ("cw_linf", {"steps": 10, "lr": 0.05, "initial_c": 0.1, "largest_c": 10, "smallest_tau": "1/50"}),
    ("cw_linf", {"steps": 20, "lr": 0.05, "c_rate": 0.1, "initial_c": None, "final_lr": 0.01, "beta1": 0.5}),
    ("cw_pgd", {"steps": 4}),
    ("ddn", {"steps": 10}),
    ("ddn", {"steps": 6, "levels": None, "gamma": 0.3, "refine": 4}),
    ("ddn", {"steps": 10, "gamma": 0.7, "alpha": 3, "newton": True}),
    ("deepfool", {"steps": 4}),
    ("deepfool", {"steps": 4, "later": 3}),
    ("deepfool", {"steps": 2, "eps": "1/4", "candidates": 3}),
    ("deepfool_linf", {"steps": 4, "overshoot": 0.1}),
    ("deepfool_linf", {"steps": 3, "eps": "4/255"}),
    ("deepfool_linf", {"steps": 3, "eps": "4/255", "candidates": 4, "later": 2}),
]
IDS = [f"{name}-{'-'.join(str(v) for v in params.values())}" for name, params in ATTACKS_AND_PARAMS]
MINIMAL = [case for case in ATTACKS_AND_PARAMS if case[0] != "cw_pgd" and "eps" not in case[1]]


# -- closed forms -------------------------------------------------------------------------------------------------
class Affine(nn.Module):
    """Three classes, z_k = w_k . (x - 1/2) + b_k."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.register_buffer("weight", 0.15 * torch.randn(3, 3 * 6 * 5, generator=g))
        self.register_buffer("bias", torch.tensor([1.0, 0.3, -0.2]))

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1) - 0.5) @ self.weight.T + self.bias


def boundaries(net: Affine, images: Tensor, labels: Tensor, order: float) -> Tensor:
    """Distances (B, 2) to the boundaries with the two other classes, in the norm whose dual is `order`."""
    z, out = net(images), []
    for i, y in enumerate(labels.tolist()):
        out.append(
            [
                (z[i, y] - z[i, k]).item()
                / torch.linalg.vector_norm(net.weight[k] - net.weight[y], order).item()
                for k in range(3)
                if k != y
            ]
        )
    return torch.tensor(out)


@pytest.fixture
def affine(lab):
    net = Affine()
    images = 0.4 + 0.2 * torch.rand(6, 3, 6, 5, generator=torch.Generator().manual_seed(4))
    return lab.Classifier(net, 3), net, images, net(images).argmax(1)


@pytest.mark.parametrize(
    ("name", "params", "order", "slack"),
    [
        ("cw_l2", {"steps": 200, "initial_c": 0.01, "binary_search_steps": 10}, 2, 0.005),
        ("cw_l2", {**MOVING, "steps": 100, "lr": 0.02}, 2, 0.005),
        # The gradient of the cross-entropy is not quite normal to the nearest boundary: the third class pulls.
        ("ddn", {"steps": 100, "levels": None}, 2, 0.09),
        ("ddn", {"steps": 13, "levels": None, **NEWTON}, 2, 0.09),
        ("deepfool", {"overshoot": 0.001}, 2, 0.005),
        ("deepfool", {"overshoot": 0.001, "later": 2}, 2, 0.005),
        ("deepfool_linf", {"overshoot": 0.001}, 1, 0.01),
        ("deepfool_linf", {"overshoot": 0.001, "later": 2}, 1, 0.01),
        ("cw_linf", {"steps": 100, "initial_c": 0.01, "lr": 2e-3}, 1, 0.12),
        ("cw_linf", {**SHRINKING, "steps": 150}, 1, 0.12),
    ],
)
def test_distance_to_a_linear_boundary(lab, affine, name, params, order, slack):
    """Nothing is nearer than the boundary, and what is found is within `slack` of it."""
    target, net, images, labels = affine
    out = lab.run(ATTACKS.create(name, params), target, images, labels.tolist())
    assert (net(out).argmax(1) != labels).all()
    delta = (out - images).flatten(1).double()
    moved = delta.norm(dim=1) if order == 2 else delta.abs().amax(1)
    nearest = boundaries(net, images, labels, order).min(1).values
    assert (moved >= nearest * (1 - 1e-4)).all()
    # DeepFool adds 1e-4 to each step.
    assert (moved <= nearest * (1 + slack) + 2e-4).all(), moved / nearest


@pytest.mark.parametrize(
    ("name", "params", "slack"),
    [
        ("cw_l2", {"steps": 200, "initial_c": 0.01, "binary_search_steps": 10}, 0.01),
        ("ddn", {"steps": 100, "levels": None}, 0.09),
    ],
)
def test_distance_to_the_target(lab, affine, name, params, slack):
    """The nearest point of the target's region: an edge of it where the runner-up is in the way."""
    target, net, images, labels = affine
    wrong = (labels + 1) % 3
    out = lab.run(ATTACKS.create(name, {**params, "target": "random"}), target, images, wrong.tolist())
    assert (net(out).argmax(1) == wrong).all()
    moved = (out - images).flatten(1).double().norm(dim=1)
    for i, (y, t) in enumerate(zip(labels.tolist(), wrong.tolist(), strict=True)):
        z = net(images)[i].double()
        other = 3 - y - t
        a = torch.stack([net.weight[t] - net.weight[y], net.weight[t] - net.weight[other]]).double()
        gap = torch.stack([z[y] - z[t], z[other] - z[t]])
        # Least squares on either boundary or on both, the nearest of those inside.
        points = []
        for rows in ([0], [1], [0, 1]):
            step = torch.linalg.pinv(a[rows]) @ gap[rows].clamp(min=0)
            if (a @ step >= gap - 1e-9).all():
                points.append(step.norm().item())
        assert min(points) * (1 - 1e-4) <= moved[i] <= min(points) * (1 + slack)


@pytest.mark.parametrize(("steps", "refine", "slack"), [(100, 0, 0.005), (20, 12, 0.001)])
def test_ddn_finds_the_only_boundary(lab, steps, refine, slack):
    weight = 0.1 * torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(3))
    images = 0.4 + 0.2 * torch.rand(4, 3, 6, 5, generator=torch.Generator().manual_seed(4))
    target = lab.Classifier(lab.Linear(weight), 2)
    scores = (images * weight).flatten(1).sum(1)
    nearest = scores.abs() / weight.norm()
    attack = ATTACKS.create("ddn", {"steps": steps, "refine": refine, "levels": None})
    out = lab.run(attack, target, images, (scores > 0).long().tolist())
    moved = (out - images).flatten(1).norm(dim=1)
    assert (moved >= nearest * (1 - 1e-4)).all() and (moved <= nearest * (1 + slack)).all()


def test_confidence_is_reached(lab, affine):
    target, net, images, labels = affine
    for name, params in (
        ("cw_l2", {"steps": 50, "initial_c": 1, "lr": 0.05, "binary_search_steps": 3}),
        ("cw_linf", {"steps": 60, "initial_c": 0.1, "lr": 0.02}),
    ):
        out = lab.run(ATTACKS.create(name, {**params, "kappa": 2}), target, images, labels.tolist())
        z = net(out)
        true = z.gather(1, labels[:, None])[:, 0]
        assert (z.scatter(1, labels[:, None], float("-inf")).amax(1) - true >= 2).all(), name


# -- promises -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "params"), ATTACKS_AND_PARAMS, ids=IDS)
def test_promises(lab, name, params):
    attack = ATTACKS.create(name, params)
    target = lab.Classifier(lab.convnet(), 5, one_by_one=True)
    images, _ = lab.batch(6, (14, 11))
    labels = target.predict(images)
    labels[2] = (labels[2] + 1) % 5
    before, state = images.clone(), torch.get_rng_state()
    oracle = lab.oracle(target, attack, 6)
    out = attack.run(oracle, images, labels, lab.rng(6))
    assert torch.equal(images, before) and out.data_ptr() != images.data_ptr() and not out.requires_grad
    assert torch.equal(torch.get_rng_state(), state), "the global generator has moved"
    assert out.shape == images.shape and out.dtype == torch.float32 and torch.isfinite(out).all()
    assert out.min() >= 0 and out.max() <= 1
    delta = (out - images).flatten(1).double()
    if attack.eps is None:
        assert attack.norm is None
        fooled = torch.tensor([p != y for p, y in zip(target.predict(out), labels, strict=True)])
        assert (delta[~fooled] == 0).all(), "a failure is not the clean image"
        assert fooled.sum() >= 3, "hardly anything was fooled"
        if not params.get("kappa"):
            assert (delta[2] == 0).all(), "what is wrong already has moved"
    else:
        length = delta.abs().amax(1) if attack.norm == "linf" else delta.norm(dim=1)
        assert 0 < length.max() <= float(attack.eps) + 1e-6
    assert max(trace.backwards for trace in oracle.traces) <= attack.passes()
    assert torch.equal(out, lab.run(attack, target, images, labels)), "another result with the same seeds"
    for parts in ([[0, 1, 2, 3], [4, 5]], [[3], [5, 0], [4, 2, 1]]):
        for at in parts:
            view = lab.oracle(target, attack, 6).select(at)
            part = attack.run(view, images[at], [labels[i] for i in at], lab.rng(6).select(at))
            assert torch.equal(part, out[at]), "the batch's composition changes the result"


class Noisy(Defense):
    stochastic = True

    def forward(self, images: Tensor, rng) -> Tensor:
        return (images + 0.05 * rng.normal(images.shape[1:], images.device)).clamp(0, 1)


@pytest.mark.parametrize(("name", "params"), ATTACKS_AND_PARAMS, ids=IDS)
def test_random_defenses_do_not_tie_images_together(lab, name, params):
    """Draws belong to an image and its own number of queries, however many others are still in the batch."""
    attack = ATTACKS.create(name, params)
    target = lab.Classifier(lab.convnet(), 5, one_by_one=True)
    images, _ = lab.batch(4, (8, 8))
    labels = target.predict(images)
    labels[0] = (labels[0] + 1) % 5
    out = attack.run(lab.oracle(target, attack, 4, Noisy(), 3), images, labels, lab.rng(4))
    assert out.min() >= 0 and out.max() <= 1 and not torch.equal(out, images)
    for i in range(4):
        view = lab.oracle(target, attack, 4, Noisy(), 3).select([i])
        alone = attack.run(view, images[i : i + 1], [labels[i]], lab.rng(4).select([i]))
        assert torch.equal(alone[0], out[i])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.sampled_from(ATTACKS_AND_PARAMS),
    count=st.integers(1, 4),
    size=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    black=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**20),
)
def test_range_and_budget(lab, case, count, size, black, dtype, seed):
    attack = ATTACKS.create(*case)
    images, labels = lab.batch(count, size, seed)
    images = ((images > 0.5) if black else images).to(dtype)
    before = images.clone()
    out = lab.run(attack, lab.Classifier(lab.convnet().to(dtype), 5), images, labels)
    assert (
        torch.equal(images, before)
        and out.dtype == dtype
        and torch.isfinite(out).all()
        and out.min() >= 0
        and out.max() <= 1
    )
    if attack.eps is not None:
        delta = (out - images).flatten(1).double()
        assert (delta.abs().amax(1) if attack.norm == "linf" else delta.norm(dim=1)).max() <= float(
            attack.eps
        ) + 1e-6


def distance(target, attack, images, labels) -> float:
    oracle = ModelOracle(Victim((target,)), attack, attack_rng(len(images)))
    out = attack.run(oracle, images, labels, attack_rng(len(images)))
    wrong = torch.tensor(target.predict(out)) != torch.tensor(labels)
    assert wrong.all()
    return float((out - images).flatten(1).norm(dim=1).mean())


def attack_rng(count: int) -> ImageRNG:
    return ImageRNG.for_images("more", map(str, range(count)))


@pytest.mark.parametrize(
    ("name", "params"),
    [("cw_l2", {"initial_c": 1, "lr": 0.02, "binary_search_steps": 3}), ("ddn", {"levels": None})],
)
def test_more_steps_come_nearer(lab, name, params):
    target = lab.Classifier(lab.convnet(), 5)
    images, _ = lab.batch(8)
    labels = target.predict(images)
    few, many = (
        distance(target, ATTACKS.create(name, {**params, "steps": n}), images, labels) for n in (15, 80)
    )
    assert many < few


def test_refining_comes_nearer_and_rounds(lab):
    target = lab.Classifier(lab.convnet(), 5)
    images, _ = lab.batch(8)
    images = (images * 255).round() / 255
    labels = target.predict(images)
    runs = {
        refine: lab.run(ATTACKS.create("ddn", {"steps": 15, "refine": refine}), target, images, labels)
        for refine in (0, 6)
    }
    lengths = {refine: (out - images).flatten(1).norm(dim=1) for refine, out in runs.items()}
    assert (lengths[6] <= lengths[0]).all() and lengths[6].mean() < lengths[0].mean()
    for out in runs.values():
        torch.testing.assert_close(out * 255, (out * 255).round(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["deepfool", "deepfool_linf"])
@pytest.mark.parametrize("candidates", [2, 3, None])
def test_gradients_for_unfooled_images_alone_find_the_same(lab, name, candidates):
    """With all candidates kept, the same images for fewer passes; with two, fewer still. Old keys stay."""
    target = lab.Classifier(lab.convnet(), 5, one_by_one=True)
    images, _ = lab.batch(8)
    labels = target.predict(images)
    labels[3] = (labels[3] + 1) % 5
    runs, backwards = {}, {}
    for later in (None, candidates or 10, 2):
        attack = ATTACKS.create(name, {"candidates": candidates, "later": later})
        assert ("later" in attack.identity()["params"]) == (later is not None)
        oracle = lab.oracle(target, attack, 8)
        runs[later] = attack.run(oracle, images, labels, lab.rng(8))
        backwards[later] = sum(trace.backwards for trace in oracle.traces)
        assert max(trace.backwards for trace in oracle.traces) <= attack.passes()
    assert torch.equal(runs[None], runs[candidates or 10])
    assert backwards[None] > backwards[candidates or 10] >= backwards[2]
    fooled = [p != y for p, y in zip(target.predict(runs[2]), labels, strict=True)]
    assert all(fooled)


@pytest.mark.parametrize(
    ("name", "published", "quick", "share"),
    [
        ("cw_linf", {"steps": 20, "lr": 0.01, "initial_c": 1}, {"steps": 40, **SHRINKING}, 0.4),
        (
            "ddn",
            {"steps": 36, "gamma": 0.08, "initial_norm": 0.4},
            {"steps": 13, "initial_norm": 0.4, **NEWTON},
            0.4,
        ),
        (
            "cw_l2",
            {"steps": 60, "binary_search_steps": 4, "initial_c": 1},
            {"steps": 40, "lr": 0.05, **MOVING},
            0.25,
        ),
        # Descents that do not succeed end sooner by their last loss; those that do, as before.
        (
            "cw_l2",
            {"steps": 100, "binary_search_steps": 3, "initial_c": 0.01, "abort_on": "lowest"},
            {"steps": 100, "binary_search_steps": 3, "initial_c": 0.01},
            0.9,
        ),
    ],
)
def test_as_near_with_fewer_passes(name, published, quick, share):
    """The quick search comes as near as the other, which is the paper's where it has one, for a share of its passes."""
    trained = MODELS.create("mini_wrn").load(torch.device("cpu"))
    digits = DATASETS.create("mini_digits", {"count": 16})
    samples = [digits[i] for i in range(16)]
    images, labels = torch.stack([s.image for s in samples]), [int(s.target) for s in samples]
    lengths, passes = [], []
    for params in (published, quick):
        attack = ATTACKS.create(name, params | ({"levels": None} if name == "ddn" else {}))
        rng = ImageRNG.for_images("near", map(str, range(len(images))))
        oracle = ModelOracle(Victim((trained,)), attack, rng.fork("oracle"))
        out = attack.run(oracle, images, labels, rng.fork("attack"))
        assert (trained.logits(out).argmax(1) != torch.tensor(labels)).all()
        order = float("inf") if name == "cw_linf" else 2
        lengths.append(float((out - images).flatten(1).norm(order, dim=1).mean()))
        passes.append(sum(trace.backwards for trace in oracle.traces))
    assert lengths[1] <= lengths[0]
    assert passes[1] <= share * passes[0]


def test_options_that_are_not_in_the_papers_leave_the_published_attacks_as_they_are():
    assert not {"alpha", "newton"} & set(ATTACKS.create("ddn", {}).identity()["params"])
    for name in ("cw_l2", "cw_linf"):
        assert not {"c_rate", "final_lr", "beta1"} & set(ATTACKS.create(name, {}).identity()["params"])
    assert ATTACKS.create("cw_l2", {}).identity()["params"]["abort_on"] == "loss"
    assert "abort_on" not in ATTACKS.create("cw_l2", {"abort_on": "lowest"}).identity()["params"]


def test_the_first_weight_is_that_of_the_linear_problem(lab, affine):
    """2 (x' - x) = c grad m at the nearest point of the boundary to the runner-up, of a linear model."""
    target, net, images, labels = affine
    attack = ATTACKS.create(
        "cw_l2", {"steps": 150, "binary_search_steps": 1, "initial_c": None, "final_lr": 1e-4}
    )
    start = []
    first = attack._first_c
    attack._first_c = lambda work: start.append(first(work)) or start[-1]
    lab.run(attack, target, images, labels.tolist())
    logits = net(images)
    runner_up = logits.topk(2).indices[:, 1]
    grads = []
    for k, image in enumerate(images):
        x = image[None].requires_grad_(True)
        z = net(x)[0]
        grads.append(torch.autograd.grad(z[runner_up[k]] - z[labels[k]], x)[0][0])
    short = logits.gather(1, labels[:, None])[:, 0] - logits.gather(1, runner_up[:, None])[:, 0]
    expected = 2 * short / torch.stack(grads).flatten(1).square().sum(1)
    torch.testing.assert_close(start[0], expected, rtol=1e-4, atol=0)


def test_a_flat_victim_gets_its_clean_images_back(lab):
    class Flat(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([1.0, 0.0, -1.0]) + 0 * images.flatten(1).sum(1, keepdim=True)

    target = lab.Classifier(Flat(), 3)
    images, _ = lab.batch(3)
    for name, params in MINIMAL:
        out = lab.run(ATTACKS.create(name, params), target, images, [0, 0, 0])
        assert torch.equal(out, images), name


# -- bad input ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("cw_l2", {"steps": 0}, "steps"),
        ("cw_l2", {"binary_search_steps": 0}, "binary_search_steps"),
        ("cw_l2", {"kappa": -1}, "kappa"),
        ("cw_l2", {"lr": 0}, "lr"),
        ("cw_l2", {"targeted": True}, "did you mean 'target'"),
        ("cw_linf", {"steps": 0}, "steps"),
        ("cw_linf", {"largest_c": 1e-6}, "largest_c: 1e-06 must be larger than initial_c"),
        ("cw_linf", {"shrink": 1}, "shrink"),
        ("cw_linf", {"smallest_tau": 8}, "smallest_tau"),
        ("cw_pgd", {"eps": 0}, "eps"),
        ("cw_pgd", {"steps": 0}, "steps"),
        ("ddn", {"steps": 0}, "steps"),
        ("ddn", {"gamma": 1}, "gamma"),
        ("ddn", {"alpha": 0}, "alpha"),
        ("cw_l2", {"c_rate": 1}, "c_rate"),
        ("cw_l2", {"initial_c": 0}, "initial_c"),
        ("cw_l2", {"final_lr": 0}, "final_lr"),
        ("cw_l2", {"beta1": 1}, "beta1"),
        ("cw_linf", {"initial_c": None}, "initial_c: None needs c_rate"),
        ("cw_linf", {"final_lr": 1e-3}, "final_lr needs c_rate"),
        ("deepfool", {"candidates": 4, "later": 5}, "later: 5 must be at most candidates = 4"),
        ("deepfool_linf", {"later": 1}, "later"),
        ("ddn", {"levels": 1}, "levels"),
        ("ddn", {"eps": "8/255"}, "unknown parameter 'eps'"),
        ("deepfool", {"steps": 0}, "steps"),
        ("deepfool", {"candidates": 1}, "candidates"),
        ("deepfool", {"target": "random"}, "unknown parameter 'target'"),
        ("deepfool_linf", {"eps": 0}, "eps"),
        ("deepfool_linf", {"eps": 8}, "eps"),
    ],
)
def test_bad_parameters(name, params, message):
    with pytest.raises(PluginError, match=message) as error:
        ATTACKS.create(name, params)
    assert "\n" not in str(error.value)


def test_victims_that_do_not_fit(lab):
    images, labels = lab.batch(2)
    five = lab.Classifier(lab.convnet(), 5)
    with pytest.raises(GridError, match="candidates: 6 is more than the 5 classes"):
        lab.run(ATTACKS.create("deepfool", {"candidates": 6}), five, images, labels)
    one = lab.Classifier(lab.convnet(1), 1)
    for name, params in MINIMAL:
        with pytest.raises(NotApplicable, match="at least 2 classes"):
            lab.run(ATTACKS.create(name, params), one, images, [0, 0])
