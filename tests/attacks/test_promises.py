"""What every attack owes the harness, whatever its algorithm: budget, range, reproducible bits, clean images intact."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from attacks.cross_domain import Generator
from bench.grid import GRIDS, load_grid
from bench.protocols import Attack, Geometry, ImageRNG, TargetModel
from bench.registry import ATTACKS, DATASETS, MODELS, TASKS
from bench.threat import ModelOracle, Victim
from bench.weights import save_safetensors

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


# -- whatever the images, the budget and the batch ----------------------------------------------------------------
GIVEN = {
    "apgd": {"steps": 3},
    "bim": {"steps": 2},
    "dim": {"steps": 2},
    "eot_pgd": {"steps": 2, "draws": 2},
    "fgsm": {},
    "mi_fgsm": {"steps": 2},
    "nes": {"steps": 2, "samples": 2},
    "pgd": {"steps": 2},
    "pgd_kl": {"steps": 2},
    "spsa": {"steps": 2, "samples": 2},
    "square": {"queries": 4},
    "stadv": {"steps": 3, "searches": 1},
    "tap": {"steps": 2},
    "ti_fgsm": {"steps": 2},
}
L2_TOO = ("apgd", "bim", "fgsm", "pgd", "square")
NO_EPS = ("stadv",)
SEGMENTERS = {
    "segpgd": {"steps": 2},
    "cw_seg": {"alpha": "1/255", "steps": 2},
    "deepfool_seg": {"steps": 2},
    "sea": {"steps": 4, "losses": ["mask_ce", "segpgd"]},
}
DETECTORS = {
    "tog": {"steps": 2},
    "dag": {"gamma": "2/255", "steps": 2},
    "det_pgd": {"steps": 2, "start": "uniform", "alpha": "1/255"},
}
THRIFTY = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def kept(attack: Attack, images: Tensor, out: Tensor) -> None:
    """Shape, type, range and budget."""
    assert out.shape == images.shape and out.dtype == images.dtype and not out.requires_grad
    assert torch.isfinite(out).all() and out.min() >= 0 and out.max() <= 1
    if attack.eps is not None:
        delta = (out - images).flatten(1).double()
        length = delta.abs().amax(1) if attack.norm == "linf" else delta.norm(dim=1)
        assert length.max() <= float(attack.eps) * (1 + 1e-6) + 1e-6


def again_and_in_parts(
    attack: Attack, target: TargetModel, images: Tensor, targets: Sequence[Any], cut: int
) -> Tensor:
    """The result of a run; the images are as they were, a second run and one in two parts give the same bits."""
    count, before = len(images), images.clone()

    def run(at: Sequence[int]) -> Tensor:
        rng = ImageRNG.for_images("given", [str(i) for i in at])
        oracle = ModelOracle(Victim((target,)), attack, rng.fork("oracle"))
        return attack.run(oracle, images[list(at)], [targets[i] for i in at], rng.fork("attack"))

    out = run(range(count))
    assert torch.equal(images, before), "the clean images have changed"
    assert torch.equal(out, run(range(count))), "another result with the same seeds"
    if 0 < cut < count:
        parts = torch.cat([run(range(cut)), run(range(cut, count))])
        assert torch.equal(parts, out), "the batch's composition changes the result"
    return out


@settings(max_examples=60, **THRIFTY)
@given(
    name=st.sampled_from(sorted(GIVEN)),
    norm=st.sampled_from(["linf", "l2"]),
    levels=st.integers(1, 255),
    count=st.integers(1, 3),
    cut=st.integers(1, 2),
    size=st.tuples(st.integers(5, 17), st.integers(5, 17)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    black=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_classifier_attack(lab, name, norm, levels, count, cut, size, dtype, black, seed):
    eps = {} if name in NO_EPS else {"eps": Fraction(levels, 255)}
    attack = ATTACKS.create(name, {**GIVEN[name], **eps, **({"norm": norm} if name in L2_TOO else {})})
    target = lab.Classifier(lab.convnet().to(dtype), 5, one_by_one=True)
    images, labels = lab.batch(count, size, seed)
    images = ((images > 0.5) if black else images).to(dtype)
    out = again_and_in_parts(attack, target, images, labels, cut)
    kept(attack, images, out)
    if name == "stadv":
        # Pixels are moved and mixed: a channel stays between its smallest and its largest value.
        assert attack.excess(images, out).max() <= 1e-6


class Segmenter(TargetModel):
    """A fixed map of every pixel, in any precision; images pass it singly."""

    task = "segmentation"
    losses = ("ce",)
    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
        self.register_buffer("weight", 2 * weight)

    def logits(self, images: Tensor, *, geometry: Geometry | None = None) -> Tensor:
        weight = self.weight.to(images.dtype)
        return torch.cat([F.conv2d(image[None] - 0.5, weight, padding=1).tanh() * 3 for image in images])

    def loss(self, images: Tensor, targets: Sequence[Any], kind: str, **_: Any) -> Tensor:
        raise AssertionError("these attacks work from logits")

    def predict(self, images: Tensor, *, geometry: Geometry | None = None) -> list[Any]:
        return list(self.logits(images).argmax(1))


@settings(max_examples=24, **THRIFTY)
@given(
    name=st.sampled_from(sorted(SEGMENTERS)),
    levels=st.integers(1, 64),
    count=st.integers(1, 3),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_any_segmenter_attack(lab, name, levels, count, size, ignored, dtype, seed):
    attack = ATTACKS.create(name, {**SEGMENTERS[name], "eps": Fraction(levels, 255)})
    images = lab.batch(count, size, seed)[0].to(dtype)
    labels = torch.randint(0, 4, (count, *size), generator=torch.Generator().manual_seed(seed))
    labels[torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) < ignored] = 255
    out = again_and_in_parts(attack, Segmenter(), images, list(labels), 1)
    kept(attack, images, out)
    if ignored == 1:
        assert torch.equal(out, images)


@pytest.fixture(scope="module")
def ssd():
    return MODELS.create("mini_ssd").load(torch.device("cpu"))


@settings(max_examples=6, **THRIFTY)
@given(name=st.sampled_from(sorted(DETECTORS)), levels=st.integers(1, 64), count=st.integers(1, 2))
def test_any_detector_attack(ssd, name, levels, count):
    attack = ATTACKS.create(name, {**DETECTORS[name], "eps": Fraction(levels, 255)})
    data = DATASETS.create("mini_scenes_det")
    samples = [data[3 + i] for i in range(count)]
    images = torch.stack([s.image for s in samples])
    targets = [s.target for s in samples]
    if attack.target is not None:
        rng = ImageRNG.for_images("goals", map(str, range(count)))
        targets = TASKS.create("detection").attack_targets(attack.target, targets, 10, rng)
    kept(attack, images, again_and_in_parts(attack, ssd, images, targets, 1))


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    path = tmp_path_factory.mktemp("cda") / "generator.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_safetensors(path, Generator(blocks=2, width=4).state_dict())
    return str(path)


@settings(max_examples=8, **THRIFTY)
@given(
    levels=st.integers(1, 255),
    count=st.integers(1, 3),
    size=st.tuples(st.integers(8, 17), st.integers(8, 17)),
    seed=st.integers(0, 999),
)
def test_any_generated_perturbation(lab, generator, levels, count, size, seed):
    attack = ATTACKS.create(
        "cda", {"weights": generator, "blocks": 2, "width": 4, "eps": Fraction(levels, 255)}
    )
    images, labels = lab.batch(count, size, seed)
    kept(attack, images, again_and_in_parts(attack, lab.Classifier(lab.convnet(), 5), images, labels, 1))


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
