"""The same images as adv-lib where its algorithm is the same; runs where that library is installed."""

from __future__ import annotations

import pytest
import torch

attacks = pytest.importorskip("adv_lib.attacks", reason="no adv-lib: run tools/libraries.sh")


def theirs(setting, name, targeted=False, **flags):
    goals = setting.wrong if targeted else setting.labels
    return getattr(attacks, name)(
        setting.net, setting.images, goals, **flags, **({"targeted": True} if targeted else {})
    ).detach()


def same(setting, ours, other, targeted=False, atol=1e-6):
    reached = setting.net(ours).argmax(1)
    assert (reached == setting.wrong if targeted else reached != setting.labels).all()
    torch.testing.assert_close(ours, other, rtol=0, atol=atol)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("levels", [None, 256])
def test_ddn(setting, levels, targeted):
    ours = setting.run("ddn", {"steps": 60, "initial_norm": 0.7, "gamma": 0.08, "levels": levels}, targeted)
    flags = {"steps": 60, "init_norm": 0.7, "γ": 0.08, "levels": levels}
    same(setting, ours, theirs(setting, "ddn", targeted, **flags), targeted)


@pytest.mark.parametrize("overshoot", [0.0, 0.02])
@pytest.mark.parametrize(("name", "norm"), [("deepfool", 2), ("deepfool_linf", float("inf"))])
def test_deepfool_away_from_the_ends_of_the_range(setting, name, norm, overshoot):
    """It clips the image after every step, ours, as the authors', adds up the steps first."""
    inner = type(setting)()
    inner.images = 0.3 + 0.4 * setting.images
    inner.labels = inner.net(inner.images).argmax(1)
    ours = inner.run(name, {"steps": 30, "overshoot": overshoot})
    assert ours.min() > 0 and ours.max() < 1
    same(inner, ours, theirs(inner, "df", steps=31, overshoot=overshoot, norm=norm))


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("kappa", [0, 2])
def test_cw_l2_is_as_near(setting, kappa, targeted):
    """Distances are from the image there and from what comes back from tanh space here: 1e-6 apart, which grows."""
    flags = {"binary_search_steps": 4, "initial_const": 0.1, "learning_rate": 0.05, "max_iterations": 40}
    other = theirs(setting, "carlini_wagner_l2", targeted, confidence=kappa, abort_early=False, **flags)
    params = {"binary_search_steps": 4, "initial_c": 0.1, "lr": 0.05, "steps": 40, "kappa": kappa}
    ours = setting.run("cw_l2", {**params, "abort_early": False}, targeted)
    logits = setting.net(ours)
    reached = logits.argmax(1)
    assert (reached == setting.wrong if targeted else reached != setting.labels).all()
    lengths = [(images - setting.images).flatten(1).norm(dim=1) for images in (ours, other)]
    torch.testing.assert_close(*lengths, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("loss", "name", "params", "targeted"),
    [
        ("ce", "bim", {}, False),
        ("ce", "bim", {}, True),
        ("dl", "cw_pgd", {"kappa": None}, False),
        ("dl", "cw_pgd", {"kappa": None}, True),
        # Targeted it has another one, which also needs the label.
        ("dlr", "iterative", {"loss": "dlr"}, False),
    ],
)
def test_pgd_up_to_its_last_success(setting, loss, name, params, targeted):
    """It returns the last iterate it saw succeed, before its last step; after as many steps, ours is the same."""
    flags = {"ε": 8 / 255, "steps": 11, "absolute_step_size": 2 / 255, "random_init": False}
    other = theirs(setting, "pgd_linf", targeted, loss_function=loss, **flags)
    ours = setting.run(name, {**params, "alpha": "2/255", "steps": 10}, targeted)
    reached = setting.net(ours).argmax(1)
    fooled = reached == setting.wrong if targeted else reached != setting.labels
    assert fooled.any()
    torch.testing.assert_close(ours[fooled], other[fooled], rtol=0, atol=1e-6)
