"""The same images as torchattacks where its flags allow the same algorithm; runs where that library is installed."""

from __future__ import annotations

import pytest
import torch

ta = pytest.importorskip("torchattacks", reason="no torchattacks: run tools/libraries.sh")
EPS, ALPHA = 16 / 255, 1.6 / 255
STEPS = {"eps": EPS, "alpha": ALPHA, "steps": 10}
L2 = {"norm": "l2", "eps": 0.5, "alpha": 0.1, "steps": 10}


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    ("name", "params", "theirs", "flags"),
    [
        ("fgsm", {"eps": "16/255"}, "FGSM", {"eps": EPS}),
        ("bim", {"eps": "16/255"}, "BIM", STEPS),
        (
            "pgd",
            {"eps": "16/255", "alpha": "8/1275", "steps": 10, "start": "none"},
            "PGD",
            {**STEPS, "random_start": False},
        ),
        (
            "pgd",
            {**L2, "start": "none"},
            "PGDL2",
            {"eps": 0.5, "alpha": 0.1, "steps": 10, "random_start": False, "eps_for_division": 1e-20},
        ),
        (
            "eot_pgd",
            {"eps": "16/255", "alpha": "8/1275", "steps": 10, "start": "none", "draws": 2},
            "EOTPGD",
            {**STEPS, "random_start": False},
        ),
        ("mi_fgsm", {}, "MIFGSM", {**STEPS, "decay": 1.0}),
        ("mi_fgsm", {}, "DIFGSM", {**STEPS, "decay": 1.0, "diversity_prob": 0.0}),
        ("bim", {"eps": "16/255"}, "DIFGSM", {**STEPS, "decay": 0.0, "diversity_prob": 0.0}),
        ("ti_fgsm", {}, "TIFGSM", {**STEPS, "decay": 0.0, "diversity_prob": 0.0}),
        ("mi_fgsm_ti", {}, "TIFGSM", {**STEPS, "decay": 1.0, "diversity_prob": 0.0}),
    ],
)
def test_same_images(setting, name, params, theirs, flags, targeted):
    attack = getattr(ta, theirs)(setting.net, **flags)
    if theirs == "TIFGSM":
        attack.stacked_kernel = attack.stacked_kernel.to(setting.images.dtype)
    if targeted:
        attack.set_mode_targeted_by_label(quiet=True)
    other = attack(setting.images, setting.wrong if targeted else setting.labels)
    ours = setting.run(name, params, targeted)
    assert (ours - setting.images).abs().max() > 0.01
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)


def same_start(monkeypatch, noise):
    """Both sides begin at the image plus the same numbers in [-1, 1], times what each scales them with."""
    monkeypatch.setattr(
        "attacks.iterative.start", lambda kind, scale, norm, clean, rng: clean + scale * noise(clean)
    )


def test_pgd_from_the_same_start(setting, monkeypatch):
    fixed = torch.rand(setting.images.shape, dtype=torch.float64) * 2 - 1
    same_start(monkeypatch, lambda clean: fixed)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: self.copy_(high * fixed))
    other = ta.PGD(setting.net, **STEPS)(setting.images, setting.labels)
    ours = setting.run("pgd", {"eps": "16/255", "alpha": "8/1275", "steps": 10})
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)


def test_kl_from_the_same_noise(setting, monkeypatch):
    fixed = torch.randn(setting.images.shape, dtype=torch.float64)
    same_start(monkeypatch, lambda clean: fixed)
    monkeypatch.setattr(torch, "randn_like", lambda images: fixed)
    other = ta.TPGD(setting.net, **STEPS)(setting.images, setting.labels)
    ours = setting.run("pgd_kl", {"eps": "16/255", "alpha": "8/1275", "steps": 10})
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)


def test_random_step_first(setting, monkeypatch):
    fixed = torch.randn(setting.images.shape, dtype=torch.float64)
    same_start(monkeypatch, lambda clean: fixed.sign())
    monkeypatch.setattr(torch, "randn_like", lambda images: fixed)
    # The paper's form; its default is ten steps of another length.
    other = ta.RFGSM(setting.net, eps=EPS, alpha=EPS / 2, steps=1)(setting.images, setting.labels)
    torch.testing.assert_close(setting.run("r_fgsm", {"eps": "16/255"}), other, rtol=0, atol=1e-6)


class Draws:
    """torchattacks' draws of input diversity, made of the numbers that ours draws for one image."""

    def __init__(self, numbers):
        self.steps, self.left = iter(numbers.tolist()), []

    def randint(self, low, high, size, dtype):
        if not self.left:
            # It asks for size, top and left, then for the chance; ours draws the chance first.
            self.chance, *self.left = next(self.steps)
        return torch.tensor([low + int(self.left.pop(0) * (high - low))], dtype=dtype)

    def rand(self, count):
        return torch.tensor([self.chance])


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    ("name", "theirs", "flags"),
    [
        ("di_fgsm", "DIFGSM", {"decay": 0.0, "diversity_prob": 0.5}),
        ("dim", "DIFGSM", {"decay": 1.0, "diversity_prob": 0.7}),
        ("dim_ti", "TIFGSM", {"decay": 1.0, "diversity_prob": 0.7}),
    ],
)
@pytest.mark.parametrize("rate", [0.9, 0.6])
def test_diverse_inputs_by_the_same_draws(setting, monkeypatch, name, theirs, flags, targeted, rate):
    rng, own = setting.rng(), []
    # It draws once for the whole batch, ours for each image: so it gets them one by one.
    numbers = torch.stack([rng.uniform((4,)).double() for _ in range(STEPS["steps"])], 1)
    for i in range(len(setting.images)):
        attack = getattr(ta, theirs)(setting.net, **STEPS, **flags, resize_rate=rate)
        if theirs == "TIFGSM":
            attack.stacked_kernel = attack.stacked_kernel.to(setting.images.dtype)
        if targeted:
            attack.set_mode_targeted_by_label(quiet=True)
        with monkeypatch.context() as patch:
            draws = Draws(numbers[i])
            patch.setattr(torch, "randint", draws.randint)
            patch.setattr(torch, "rand", draws.rand)
            labels = setting.wrong if targeted else setting.labels
            own.append(attack(setting.images[i : i + 1], labels[i : i + 1]))
    params = {"eps": "16/255", "alpha": "8/1275", "steps": 10}
    shrinking = {"ratio": str(rate), "interpolation": "bilinear"}
    ours = setting.run(name, {**params, **shrinking}, targeted)
    torch.testing.assert_close(ours, torch.cat(own), rtol=0, atol=1e-6)
    still = {"di_fgsm": "bim", "dim": "mi_fgsm", "dim_ti": "mi_fgsm_ti"}[name]
    assert ((ours - setting.run(still, params, targeted)).abs().flatten(1).amax(1) > 0.01).all()
