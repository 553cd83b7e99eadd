"""What every attack owes the harness, whatever its algorithm: budget, range, reproducible bits, clean images intact."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.grid import GRIDS, load_grid
from bench.registry import ATTACKS

AUTO = {"steps": 3, "queries": 4, "eps": "1/5", "norm": "l2"}
ATTACKS_AND_PARAMS = [
    ("apgd", {"steps": 8}),
    ("apgd", {"steps": 8, "norm": "l2", "eps": "1/2", "loss": "dlr"}),
    ("apgd", {"steps": 4, "loss": "dlr_targeted", "classes": 2, "restarts": 2, "eps": "2/255"}),
    ("apgd", {"steps": 8, "stop_when_fooled": True, "failed": "clean", "eps": "2/255"}),
    ("autoattack", {**AUTO, "attacks": ["apgd-ce", "apgd-t", "fab-t"]}),
    (
        "autoattack",
        {**AUTO, "eps": "2/255", "norm": "linf", "failed": "best", "attacks": ["apgd-ce", "square"]},
    ),
    ("library", {"library": "foolbox", "attack": "LinfPGD", "eps": "2/255", "params": {"steps": 4}}),
    ("library", {"library": "foolbox", "attack": "HopSkipJumpAttack", "params": {"steps": 1}}),
    ("stadv", {"steps": 6, "searches": 2}),
    ("stadv", {"steps": 3, "searches": 1, "optimizer": "lbfgs", "stop_when_fooled": True}),
    ("fwa", {"steps": 4, "radius": 0.05, "window": 3}),
    ("fwa", {"steps": 4, "radius": 0.05, "window": 3, "stop_when_fooled": True, "bisections": 10}),
    ("pgd_kl", {}),
    ("eot_pgd", {"steps": 3, "draws": 2}),
    ("hgd_ensemble", {"eps": "4/255"}),
    ("tap", {"steps": 4}),
    ("fff", {"steps": 4}),
]
IDS = [f"{name}-{'-'.join(str(v) for v in params.values())}" for name, params in ATTACKS_AND_PARAMS]


@pytest.mark.parametrize(("name", "params"), ATTACKS_AND_PARAMS, ids=IDS)
def test_promises(lab, name, params):
    attack = ATTACKS.create(name, params)
    target = lab.Classifier(lab.convnet(), 5, one_by_one=True)
    images, _ = lab.batch(5, (14, 11))
    labels = target.predict(images)
    before, state = images.clone(), torch.get_rng_state()
    out = attack.run(lab.oracle(target, attack, 5), images, labels, lab.rng(5))
    assert torch.equal(images, before) and out.data_ptr() != images.data_ptr() and not out.requires_grad
    assert torch.equal(torch.get_rng_state(), state), "the global generator has moved"
    assert out.shape == images.shape and out.dtype == torch.float32 and torch.isfinite(out).all()
    assert out.min() >= 0 and out.max() <= 1
    delta = (out - images).flatten(1).double()
    if attack.eps is not None:
        length = delta.abs().amax(1) if attack.norm == "linf" else delta.norm(dim=1)
        assert length.max() <= float(attack.eps) + 1e-6
    assert torch.equal(out, lab.run(attack, target, images, labels)), "another result with the same seeds"
    if attack.stochastic:
        assert not torch.equal(out, lab.run(attack, target, images, labels, key="another"))
    for cut in (1, 3):
        parts = []
        for index in (range(cut), range(cut, 5)):
            at = list(index)
            view = lab.oracle(target, attack, 5).select(at)
            parts.append(attack.run(view, images[at], [labels[i] for i in at], lab.rng(5).select(at)))
        assert torch.equal(torch.cat(parts), out), "the batch's composition changes the result"


@pytest.mark.parametrize(("name", "params"), ATTACKS_AND_PARAMS, ids=IDS)
def test_double_precision_is_kept(lab, name, params):
    if name == "autoattack":
        pytest.skip("pyautoattack works in single precision")
    attack = ATTACKS.create(name, params)
    target = lab.Classifier(lab.convnet().double(), 5, one_by_one=True)
    images = lab.batch(2, (14, 11))[0].double() * 0.999 + 1e-10
    out = lab.run(attack, target, images, target.predict(images))
    assert out.dtype == torch.float64 and torch.isfinite(out).all() and out.min() >= 0 and out.max() <= 1
    still = (out == images).flatten(1).all(1)
    assert not torch.equal(out[~still], out[~still].float().double()), "rounded on the way"
    if attack.eps is not None:
        delta = (out - images).flatten(1)
        length = delta.abs().amax(1) if attack.norm == "linf" else delta.norm(dim=1)
        assert length.max() <= float(attack.eps) * (1 + 1e-12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["apgd", "square", "spsa", "nes", "eot_pgd"]),
    norm=st.sampled_from(["linf", "l2"]),
    levels=st.integers(1, 255),
    count=st.integers(1, 3),
    size=st.tuples(st.integers(5, 17), st.integers(5, 17)),
    seed=st.integers(0, 999),
)
def test_budget_and_range(lab, name, norm, levels, count, size, seed):
    cost = {"square": {"queries": 4}, "eot_pgd": {"steps": 2, "draws": 2}}.get(name, {"steps": 3})
    more = {"samples": 2} if name in ("spsa", "nes") else {"norm": norm}
    attack = ATTACKS.create(name, {"eps": Fraction(levels, 255), **cost, **more})
    images, labels = lab.batch(count, size, seed)
    out = lab.run(attack, lab.Classifier(lab.convnet(), 5), images, labels)
    assert out.shape == images.shape and torch.isfinite(out).all() and out.min() >= 0 and out.max() <= 1
    delta = (out - images).flatten(1).double()
    length = delta.abs().amax(1) if attack.norm == "linf" else delta.norm(dim=1)
    assert length.max() <= levels / 255 * (1 + 1e-6) + 1e-6


def test_one_grid_runs_all_of_them():
    """All but the open loop, libraries' attacks, and the detectors' losses, which go by `bim` there."""
    grid = load_grid(GRIDS / "attacks.yaml")
    named = {
        ATTACKS.resolve(spec if isinstance(spec, str) else str(spec["name"]))
        for spec in grid.attacks.values()
    }
    assert {attack for block in grid.blocks for attack in block.attacks} == set(grid.attacks)
    rest = {name for name in ATTACKS.names() if ATTACKS.resolve(name) not in named}
    assert rest == {"iterative", "library", "none", "det_pgd"}
