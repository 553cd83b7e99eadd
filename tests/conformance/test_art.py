"""The same images as the Adversarial Robustness Toolbox where its algorithm is the same; runs where it is installed.

ART computes in single precision whatever it is given, so the network does too.
"""

from __future__ import annotations

import pytest
import torch

evasion = pytest.importorskip("art.attacks.evasion", reason="no ART: run tools/libraries.sh")
EPS, ALPHA = 8 / 255, 2 / 255
STEPS = {"eps": EPS, "eps_step": ALPHA, "max_iter": 10}
L2 = {"norm": 2, "eps": 0.5, "eps_step": 0.1, "max_iter": 10}


@pytest.fixture(scope="module")
def single(setting):
    return type(setting)(torch.float32)


def theirs(single, name, flags, targeted=False):
    from art.estimators.classification import PyTorchClassifier

    victim = PyTorchClassifier(
        single.net,
        torch.nn.CrossEntropyLoss(),
        tuple(single.images.shape[1:]),
        10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = getattr(evasion, name)(victim, batch_size=len(single.images), **flags)
    goals = single.wrong if targeted else single.labels
    return torch.from_numpy(attack.generate(single.images.numpy(), y=goals.numpy()))


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    ("name", "params", "attack", "flags"),
    [
        ("fgsm", {}, "FastGradientMethod", {"eps": EPS}),
        ("fgsm", {"norm": "l2", "eps": 0.5}, "FastGradientMethod", {"norm": 2, "eps": 0.5}),
        ("bim", {"alpha": "2/255"}, "BasicIterativeMethod", {**STEPS, "verbose": False}),
        ("pgd", {"steps": 10, "start": "none"}, "ProjectedGradientDescent", {**STEPS, "verbose": False}),
        (
            "mi_fgsm",
            {"eps": "8/255", "alpha": "2/255"},
            "MomentumIterativeMethod",
            {**STEPS, "verbose": False},
        ),
        (
            "mi_fgsm",
            {"eps": "8/255", "alpha": "2/255", "decay": 0.5},
            "MomentumIterativeMethod",
            {**STEPS, "decay": 0.5, "verbose": False},
        ),
    ],
)
def test_same_images(single, name, params, attack, flags, targeted):
    other = theirs(single, attack, {**flags, "targeted": targeted}, targeted)
    ours = single.run(name, params, targeted)
    assert (ours - single.images).abs().max() > 0.01
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("targeted", [False, True])
def test_l2_away_from_the_ends_of_the_range(single, targeted):
    """It clips and then projects, ours the other way round: the same where there is nothing to clip."""
    inner = type(single)(torch.float32)
    inner.images = 0.3 + 0.4 * single.images
    inner.labels = inner.net(inner.images).argmax(1)
    inner.wrong = (inner.labels + 3) % 10
    other = theirs(
        inner, "ProjectedGradientDescent", {**L2, "verbose": False, "targeted": targeted}, targeted
    )
    ours = inner.run("pgd", {"norm": "l2", "eps": 0.5, "alpha": 0.1, "steps": 10, "start": "none"}, targeted)
    assert (ours - inner.images).flatten(1).norm(dim=1).min() > 0.4
    assert ours.min() > 0 and ours.max() < 1
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)


def test_deepfool_is_not_farther(single):
    """ART stops at the boundary and then stretches the whole perturbation: a similar path, not the same images."""
    other = theirs(single, "DeepFool", {"max_iter": 30, "epsilon": 0.02, "verbose": False})
    ours = single.run("deepfool", {"steps": 30})
    lengths = []
    for images in (ours, other):
        assert (single.net(images).argmax(1) != single.labels).all()
        lengths.append((images - single.images).flatten(1).norm(dim=1).median())
    assert lengths[0] <= 1.01 * lengths[1]
