"""Minimal-norm attacks: the same images as foolbox where the algorithm is the same, else not weaker and not farther."""

from __future__ import annotations

import pytest
import torch

from bench.protocols import ImageRNG
from bench.registry import ATTACKS
from bench.threat import ModelOracle, Victim

foolbox = pytest.importorskip("foolbox")
attacks = pytest.importorskip("foolbox.attacks")


def theirs(setting, attack, targeted: bool = False) -> torch.Tensor:
    model = foolbox.PyTorchModel(setting.net, bounds=(0, 1), device="cpu")
    goal = (
        foolbox.criteria.TargetedMisclassification(setting.wrong)
        if targeted
        else foolbox.criteria.Misclassification(setting.labels)
    )
    return attack(model, setting.images, goal, epsilons=None)[0]


def same(
    setting, ours: torch.Tensor, other: torch.Tensor, targeted: bool = False, atol: float = 1e-6
) -> None:
    reached = setting.net(ours).argmax(1)
    assert (reached == setting.wrong if targeted else reached != setting.labels).all()
    torch.testing.assert_close(ours, other, rtol=0, atol=atol)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("kappa", [0, 2])
def test_cw_l2(setting, kappa, targeted):
    attack = attacks.L2CarliniWagnerAttack(
        binary_search_steps=6,
        steps=40,
        stepsize=0.05,
        confidence=kappa,
        initial_const=0.01,
        abort_early=False,
    )
    params = {"binary_search_steps": 6, "steps": 40, "lr": 0.05, "kappa": kappa, "initial_c": 0.01}
    ours = setting.run("cw_l2", {**params, "abort_early": False}, targeted)
    same(setting, ours, theirs(setting, attack, targeted), targeted, atol=1e-5)


def test_cw_l2_repeats_the_best_c_last(setting):
    attack = attacks.L2CarliniWagnerAttack(binary_search_steps=10, steps=15, stepsize=0.1, abort_early=False)
    params = {"binary_search_steps": 10, "steps": 15, "lr": 0.1, "abort_early": False}
    same(setting, setting.run("cw_l2", params), theirs(setting, attack), atol=1e-5)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("steps", [1, 20, 60])
def test_ddn(setting, steps, targeted):
    attack = attacks.DDNAttack(steps=steps, init_epsilon=0.7, gamma=0.08)
    ours = setting.run("ddn", {"steps": steps, "initial_norm": 0.7, "gamma": 0.08, "levels": None}, targeted)
    other = theirs(setting, attack, targeted)
    if steps == 1:
        assert torch.equal(ours, setting.images)
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)
    if steps == 60:
        same(setting, ours, other, targeted)


@pytest.mark.parametrize("candidates", [2, 4, 10])
@pytest.mark.parametrize("overshoot", [0.02, 0.5])
@pytest.mark.parametrize(
    ("name", "cls"), [("deepfool", "L2DeepFoolAttack"), ("deepfool_linf", "LinfDeepFoolAttack")]
)
def test_deepfool(setting, name, cls, overshoot, candidates):
    attack = getattr(attacks, cls)(steps=30, candidates=candidates, overshoot=overshoot)
    ours = setting.run(name, {"steps": 30, "candidates": candidates, "overshoot": overshoot})
    same(setting, ours, theirs(setting, attack))


@pytest.fixture(scope="module")
def mini():
    """The mini WideResNet with forty test images, seen by both libraries."""
    from bench.registry import DATASETS, MODELS

    target = MODELS.create("mini_wrn").load(torch.device("cpu"))
    dataset = DATASETS.create("mini_digits")
    samples = [dataset[i] for i in range(40)]

    class Mini:
        images = torch.stack([s.image for s in samples])
        labels = torch.tensor([s.target for s in samples])

        class net(torch.nn.Module):
            def forward(self, images):
                return target.logits(images)

        @staticmethod
        def run(name, params):
            attack = ATTACKS.create(name, params)
            rng = ImageRNG.for_images("mini", map(str, range(40)))
            oracle = ModelOracle(Victim((target,)), attack, rng)
            return attack.run(oracle, Mini.images, Mini.labels.tolist(), rng.fork("attack"))

    Mini.net = Mini.net().eval()
    return Mini


@pytest.mark.parametrize(
    ("name", "params", "cls", "flags"),
    [
        ("ddn", {"steps": 30, "levels": None}, "DDNAttack", {"steps": 30}),
        ("deepfool", {}, "L2DeepFoolAttack", {}),
        ("deepfool_linf", {}, "LinfDeepFoolAttack", {}),
        (
            "cw_l2",
            # Early abort is per image here and by the whole batch there.
            {"steps": 30, "binary_search_steps": 2, "initial_c": 0.2, "abort_early": False},
            "L2CarliniWagnerAttack",
            {"steps": 30, "binary_search_steps": 2, "initial_const": 0.2, "abort_early": False},
        ),
    ],
)
def test_on_a_trained_network(mini, name, params, cls, flags):
    """Success and median distance; rounding sends a few images to other, equally near places."""
    ours, other = mini.run(name, params), theirs(mini, getattr(attacks, cls)(**flags))
    order = float("inf") if name == "deepfool_linf" else 2
    median, success = [], []
    for images in (ours, other):
        fooled = mini.net(images).argmax(1) != mini.labels
        success.append(int(fooled.sum()))
        median.append((images - mini.images).flatten(1)[fooled].norm(order, dim=1).median())
    assert success[0] >= success[1] and success[0] >= 39
    assert median[0] <= 1.01 * median[1]
