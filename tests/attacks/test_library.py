"""Attacks of other libraries through the oracle: norms, failures, seeds, and what is refused."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from bench.errors import CheckError, GridError, PluginError
from bench.protocols import Defense
from bench.registry import ATTACKS

foolbox = pytest.importorskip("foolbox")


def make(attack: str, library: str = "foolbox", **more):
    return ATTACKS.create("library", {"library": library, "attack": attack, **more})


@pytest.fixture
def victim(lab):
    target = lab.Classifier(lab.convnet(), 5, one_by_one=True)
    images, _ = lab.batch(4)
    return target, images, target.predict(images)


def same_as_foolbox(victim, attack, eps):
    target, images, labels = victim
    model = foolbox.PyTorchModel(target.net, bounds=(0, 1), device="cpu")
    return torch.cat(
        [
            attack(model, x[None], torch.tensor([y]), epsilons=eps)[1]
            for x, y in zip(images, labels, strict=True)
        ]
    )


@pytest.mark.parametrize(
    ("name", "params", "eps", "norm"),
    [
        ("L2DeepFoolAttack", {"steps": 20}, None, "l2"),
        ("LinfDeepFoolAttack", {}, "8/255", "linf"),
        ("L2CarliniWagnerAttack", {"steps": 15, "stepsize": 0.1, "initial_const": 10}, None, "l2"),
        ("DDNAttack", {"steps": 10}, None, "l2"),
        ("LinfBasicIterativeAttack", {"abs_stepsize": "2/255", "steps": 10}, "8/255", "linf"),
    ],
)
def test_it_is_foolbox(lab, victim, name, params, eps, norm):
    target, images, labels = victim
    attack = make(name, params=params, eps=eps, failed="kept")
    assert attack.norm == norm and attack.needs == {"gradient", "logits"}
    plain = {k: 2 / 255 if v == "2/255" else v for k, v in params.items()}
    theirs = same_as_foolbox(
        victim, getattr(foolbox.attacks, name)(**plain), None if eps is None else 8 / 255
    )
    torch.testing.assert_close(lab.run(attack, target, images, labels), theirs, rtol=0, atol=1e-6)


def test_without_gradient(lab, victim):
    target, images, _ = victim

    class Quantise(Defense):
        differentiable = False

        def forward(self, x):
            return (x.detach() * 7).round() / 7

    labels = target.predict(Quantise()(images))
    attack = make("BoundaryAttack", params={"steps": 15})
    assert attack.needs == {"logits"}
    oracle = lab.oracle(target, attack, 4, Quantise())
    out = attack.run(oracle, images, labels, lab.rng(4))
    broken = [p != y for p, y in zip(target.predict(Quantise()(out)), labels, strict=True)]
    assert sum(broken) >= 3 and all(trace.backwards == 0 for trace in oracle.traces)


def test_several_candidates_at_once_and_no_norm(lab, victim):
    target, images, labels = victim
    attack = make("SpatialAttack", params={"num_translations": 3, "num_rotations": 3})
    assert attack.norm is None and attack.eps is None
    out = lab.run(attack, target, images, labels)
    moved = (out != images).flatten(1).any(1).tolist()
    wrong = [p != y for p, y in zip(target.predict(out), labels, strict=True)]
    assert moved == wrong
    made = lab.run(make("InversionAttack", params={"distance": "l2"}), target, images, labels)
    assert made.min() >= 0 and made.max() <= 1


def test_failures_come_back_clean_or_as_they_are(lab, victim):
    target, images, labels = victim
    weak = {"params": {"steps": 1}, "eps": "1/2550"}
    kept = lab.run(make("LinfPGD", **weak), target, images, labels)
    clean = lab.run(make("LinfPGD", failed="clean", **weak), target, images, labels)
    wrong = torch.tensor([p != y for p, y in zip(target.predict(kept), labels, strict=True)])
    assert not wrong.all() and (kept != images).flatten(1).any(1).all()
    assert torch.equal(clean[~wrong], images[~wrong]) and torch.equal(clean[wrong], kept[wrong])


@pytest.mark.parametrize("eps", [None, "1/4"])
@pytest.mark.parametrize("name", ["L2CarliniWagnerAttack", "EADAttack"])
@pytest.mark.parametrize("failed", ["kept", "clean"])
def test_what_foolbox_does_not_fool_is_clean_and_not_black(lab, victim, name, eps, failed):
    target, images, labels = victim
    # So short a search with so small a constant finds nothing.
    params = {"steps": 1, "binary_search_steps": 1, "initial_const": 1e-9}
    theirs = same_as_foolbox(victim, getattr(foolbox.attacks, name)(**params), None)
    assert not theirs.any()
    attack = make(name, params=params, eps=eps, failed=failed)
    assert torch.equal(lab.run(attack, target, images, labels), images)


@pytest.mark.parametrize("where", ["__init__", "run"])
def test_a_package_that_foolbox_lacks_is_named(lab, victim, monkeypatch, where):
    """As numba, which foolbox's Brendel-Bethge attacks import when they are made, and others might when they run."""

    def lacking(*_, **__):
        raise ModuleNotFoundError("No module named 'numba.experimental'", name="numba.experimental")

    monkeypatch.setattr(foolbox.attacks.DDNAttack, where, lacking)
    with pytest.raises(
        PluginError,
        match=r"foolbox's DDNAttack needs the package 'numba', which is not installed: pip install numba$",
    ):
        lab.run(make("DDNAttack"), *victim)


def test_more_candidates_than_classes_are_refused(lab, victim):
    target, images, labels = victim
    attack = make("L2DeepFoolAttack", params={"candidates": 6, "steps": 1})
    attack.check_classes(6)
    with pytest.raises(GridError, match=r"params.candidates: 6 is more than the 5 classes of the model"):
        lab.run(attack, target, images, labels)


def test_the_library_gets_what_its_annotations_say():
    """And not always what a grid says: 5.0 steps are 5, a quoted number is a number, an integer stays what it is."""
    attack = make(
        "L2CarliniWagnerAttack",
        params={"steps": 5.0, "stepsize": "1e-2", "confidence": 1, "initial_const": "1/4"},
    )
    assert attack._attack.params == {"steps": 5, "stepsize": 0.01, "confidence": 1, "initial_const": 0.25}
    assert isinstance(attack._attack.params["steps"], int)
    assert attack.params["params"]["steps"] == 5.0


def test_annotations_for_type_checkers_alone_hide_no_others(monkeypatch):
    """As in ART, whose victims are imported under TYPE_CHECKING."""
    from foolbox.attacks.base import MinimizationAttack

    class Annotated(MinimizationAttack):
        distance = foolbox.distances.l2

        def __init__(
            self,
            one: Absent | None = None,  # noqa: F821
            eps_step: int | float | np.ndarray = 1,
            way: str = None,  # noqa: RUF013 - as libraries write it
        ) -> None:
            self.values = one, eps_step, way

        def run(self, *_, **__):
            raise AssertionError

    # Names in annotations are those of the module.
    monkeypatch.setitem(globals(), "np", np)
    monkeypatch.setattr(foolbox.attacks, "Annotated", Annotated, raising=False)
    assert make("Annotated", params={"one": "any", "eps_step": 2, "way": None})._attack.instance.values == (
        "any",
        2,
        None,
    )
    with pytest.raises(PluginError, match=r"params.eps_step: expected a number, got 'abc'"):
        make("Annotated", params={"eps_step": "abc"})


def test_targeted(lab, victim):
    target, images, labels = victim
    wrong = [(y + 1) % 5 for y in labels]
    out = lab.run(make("LinfPGD", eps="1/4", target="next"), target, images, wrong)
    assert sum(p == t for p, t in zip(target.predict(out), wrong, strict=True)) >= 3
    with pytest.raises(CheckError, match=r"NewtonFoolAttack: ValueError: unsupported criterion"):
        lab.run(make("NewtonFoolAttack", target="next"), target, images, wrong)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"library": "foolbox", "attack": "L2DeepFool"}, "did you mean 'L2DeepFoolAttack'"),
        ({"library": "foolbox", "attack": "DDNAttack", "params": {"step": 3}}, "did you mean 'steps'"),
        (
            {"library": "foolbox", "attack": "DDNAttack", "params": {"steps": 0}},
            "foolbox's DDNAttack, params.steps: expected at least 1, got 0",
        ),
        (
            {"library": "foolbox", "attack": "L2CarliniWagnerAttack", "params": {"binary_search_steps": -1}},
            "params.binary_search_steps: expected at least 1, got -1",
        ),
        ({"library": "foolbox", "attack": "LinfPGD"}, "needs an eps"),
        ({"library": "foolbox", "attack": "LinfPGD", "eps": 8}, "did you mean 8/255"),
        ({"library": "foolbox", "attack": "InversionAttack"}, "needs params: {distance: l2}"),
        (
            {"library": "foolbox", "attack": "InversionAttack", "params": {"distance": "l3"}},
            "did you mean 'l",
        ),
        ({"library": "foolbox", "attack": "LinfDeepFoolAttack", "target": "next"}, "ignores targets"),
        ({"library": "fulbox", "attack": "LinfPGD"}, "library"),
        ({"library": "foolbox", "attack": "DatasetAttack"}, "DatasetAttack has to be fed with images"),
        ({"library": "foolbox", "attack": "BinarizationRefinementAttack"}, r"refines .*starting_points"),
        ({"library": "foolbox", "attack": "GenAttack", "eps": "8/255"}, "GenAttack needs a target"),
        (
            {"library": "foolbox", "attack": "DDNAttack", "params": {"steps": "abc"}},
            "foolbox's DDNAttack, params.steps: expected an integer, got 'abc'",
        ),
        (
            {"library": "foolbox", "attack": "DDNAttack", "params": {"steps": "1/4"}},
            "params.steps: expected an integer.*, got '1/4'",
        ),
        (
            {"library": "foolbox", "attack": "DDNAttack", "params": {"gamma": [1]}},
            r"params.gamma: expected a number, got \[1\]",
        ),
        (
            {"library": "foolbox", "attack": "EADAttack", "params": {"decision_rule": "L2"}},
            "params.decision_rule: expected 'EN' or 'L1', got 'L2'",
        ),
        (
            {"library": "foolbox", "attack": "BoundaryAttack", "params": {"init_attack": "blended"}},
            "params.init_attack: expected a MinimizationAttack, which no grid can write",
        ),
    ],
)
def test_bad_input(params, message):
    with pytest.raises(PluginError, match=message):
        ATTACKS.create("library", params)


@pytest.mark.parametrize(
    ("library", "words"), [("torchattacks", "--no-deps"), ("art", "adversarial-robustness-toolbox")]
)
def test_a_missing_library_says_how_to_install_it(monkeypatch, library, words):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        PluginError,
        match=f"'{library}' is not installed: pip install .*{words}.*bash tools/libraries.sh.*PYTHONPATH=.libraries",
    ):
        make("PGD", library)


@pytest.mark.parametrize("library", ["torchattacks", "art"])
def test_the_other_libraries_where_installed(lab, victim, library):
    pytest.importorskip(library, reason=f"no {library}: run tools/libraries.sh")
    target, images, labels = victim
    name, params = (
        ("PGD", {"steps": 5}) if library == "torchattacks" else ("ProjectedGradientDescent", {"max_iter": 5})
    )
    attack = make(name, library, eps="8/255", params=params)
    out = lab.run(attack, target, images, labels)
    assert (
        attack.norm == "linf" and sum(p != y for p, y in zip(target.predict(out), labels, strict=True)) >= 1
    )


def test_torchattacks_by_its_interface(lab, victim, monkeypatch):
    """A stand-in with the interface of torchattacks 3.5: model first, eps by name, labels, quiet targeted mode."""
    calls = []

    class Attack:
        pass

    class Step(Attack):
        def __init__(self, model, eps=8 / 255, steps=10):
            calls.append((next(model.parameters()).device.type, round(eps * 255, 6), steps))
            self.model, self.eps, self.sign = model, eps, 1

        def set_mode_targeted_by_label(self, quiet=False):
            assert quiet
            self.sign = -1

        def __call__(self, images, labels):
            images.requires_grad_()
            loss = torch.nn.functional.cross_entropy(self.model(images), labels)
            grad = torch.autograd.grad(loss, images)[0]
            return (images + self.sign * self.eps * grad.sign()).clamp(0, 1).detach()

    module = types.ModuleType("torchattacks")
    module.Step, module.attack = Step, types.ModuleType("torchattacks.attack")
    module.attack.Attack = Attack
    module.__spec__ = types.SimpleNamespace(name="torchattacks")
    monkeypatch.setitem(sys.modules, "torchattacks", module)
    monkeypatch.setitem(sys.modules, "torchattacks.attack", module.attack)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: module.__spec__)
    target, images, labels = victim
    for goal, sign in ((None, 1), ("next", -1)):
        attack = make("Step", "torchattacks", eps="4/255", params={"steps": 3}, target=goal)
        out = lab.run(attack, target, images, labels)
        fgsm = lab.run(ATTACKS.create("fgsm", {"eps": "4/255", "target": goal}), target, images, labels)
        torch.testing.assert_close(out, fgsm, rtol=0, atol=1e-6)
        assert attack.norm == "linf" and set(calls) == {("cpu", 4.0, 3)} and sign
