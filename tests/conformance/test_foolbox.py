"""The same images as foolbox wherever the algorithm is the same."""

from __future__ import annotations

import pytest
import torch

from attacks.starts import start as random_start

foolbox = pytest.importorskip("foolbox")
attacks = pytest.importorskip("foolbox.attacks")
eagerpy = pytest.importorskip("eagerpy")


def theirs(setting, attack, eps: float, targeted: bool = False) -> torch.Tensor:
    model = foolbox.PyTorchModel(setting.net, bounds=(0, 1), device="cpu")
    goal = (
        foolbox.criteria.TargetedMisclassification(setting.wrong)
        if targeted
        else foolbox.criteria.Misclassification(setting.labels)
    )
    _, clipped, _ = attack(model, setting.images, goal, epsilons=eps)
    return clipped


def same(ours: torch.Tensor, other: torch.Tensor, clean: torch.Tensor) -> None:
    assert (ours - clean).abs().max() > 0.01
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("eps", [4, 8, 16])
def test_fgsm(setting, eps):
    other = theirs(setting, attacks.LinfFastGradientAttack(), eps / 255)
    same(setting.run("fgsm", {"eps": f"{eps}/255"}), other, setting.images)


def test_fgm_l2(setting):
    other = theirs(setting, attacks.L2FastGradientAttack(), 0.5)
    same(setting.run("fgsm", {"norm": "l2", "eps": 0.5}), other, setting.images)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("steps", [3, 10, 40])
def test_bim_linf(setting, steps, targeted):
    attack = attacks.LinfBasicIterativeAttack(abs_stepsize=2 / 255, steps=steps, random_start=False)
    other = theirs(setting, attack, 8 / 255, targeted)
    same(setting.run("bim", {"alpha": "2/255", "steps": steps}, targeted), other, setting.images)


@pytest.mark.parametrize("targeted", [False, True])
def test_bim_l2(setting, targeted):
    attack = attacks.L2BasicIterativeAttack(abs_stepsize=0.1, steps=20, random_start=False)
    other = theirs(setting, attack, 0.5, targeted)
    same(
        setting.run("bim", {"norm": "l2", "eps": 0.5, "alpha": 0.1, "steps": 20}, targeted),
        other,
        setting.images,
    )


@pytest.mark.parametrize(
    ("norm", "eps", "alpha", "base"),
    [
        ("linf", "8/255", "2/255", "LinfProjectedGradientDescentAttack"),
        ("l2", "1/2", "1/8", "L2ProjectedGradientDescentAttack"),
    ],
)
def test_pgd_from_the_same_start(setting, norm, eps, alpha, base):
    numbers = [int(part) for part in eps.split("/")]
    radius = numbers[0] / numbers[1]
    begin = random_start("uniform", radius, norm, setting.images, setting.rng())
    assert not torch.equal(begin, setting.images)

    class SameStart(getattr(attacks, base)):
        def get_random_start(self, x0, epsilon):
            return eagerpy.astensor(begin)

    step = [int(part) for part in alpha.split("/")]
    attack = SameStart(abs_stepsize=step[0] / step[1], steps=20, random_start=True)
    other = theirs(setting, attack, radius)
    same(setting.run("pgd", {"norm": norm, "eps": eps, "alpha": alpha, "steps": 20}), other, setting.images)


@pytest.mark.parametrize("targeted", [False, True])
def test_mi_fgsm_of_signs(setting, targeted):
    """Foolbox accumulates signs where the paper accumulates normalised gradients."""
    attack = attacks.LinfMomentumIterativeFastGradientMethod(
        momentum=0.8, abs_stepsize=2 / 255, steps=10, random_start=False
    )
    other = theirs(setting, attack, 8 / 255, targeted)
    params = {"eps": "8/255", "alpha": "2/255", "decay": 0.8, "momentum_norm": "sign"}
    same(setting.run("mi_fgsm", params, targeted), other, setting.images)
    params["momentum_norm"] = "mean"
    assert not torch.equal(setting.run("mi_fgsm", params, targeted), other)


def test_success_equals_foolbox_with_its_own_start(setting):
    """Random starts differ, so success is compared: with the same budget ours is not weaker."""
    torch.manual_seed(0)
    attack = attacks.LinfProjectedGradientDescentAttack(abs_stepsize=1 / 255, steps=40, random_start=True)
    other = theirs(setting, attack, 4 / 255)
    ours = setting.run("pgd", {"eps": "4/255", "alpha": "1/255", "steps": 40})
    broken, broken_by_them = ((setting.net(x).argmax(1) != setting.labels).sum() for x in (ours, other))
    assert broken >= broken_by_them - 1
