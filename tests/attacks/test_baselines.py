"""Random noise and no attack."""

from __future__ import annotations

import torch

from bench.registry import ATTACKS


def test_noise_fills_its_budget(lab):
    images = torch.full((2, 3, 64, 64), 0.5)
    target = lab.Classifier(lab.convnet(), 5)
    sign = lab.run(ATTACKS.create("noise", {"eps": "4/255"}), target, images, [0, 0]) - images
    torch.testing.assert_close(sign.abs(), torch.full_like(sign, 4 / 255), rtol=0, atol=1e-6)
    assert abs(float(sign.mean())) < 5e-4 and not torch.equal(sign[0], sign[1])
    uniform = (
        lab.run(ATTACKS.create("noise", {"eps": "4/255", "kind": "uniform"}), target, images, [0, 0]) - images
    )
    assert uniform.abs().max() <= 4 / 255 + 1e-6 and abs(float(uniform.std()) - 4 / 255 / 3**0.5) < 1e-3
    assert not target.sizes, "a single draw asked the victim"


def test_more_draws_do_more_harm(lab):
    target = lab.Classifier(lab.convnet(), 5)
    images, labels = lab.batch(8)

    def loss(draws: int) -> torch.Tensor:
        out = lab.run(ATTACKS.create("noise", {"draws": draws}), target, images, labels)
        return target.loss(out, labels, "ce")

    one, ten = loss(1), loss(10)
    assert (ten >= one - 1e-6).all() and (ten > one).any()
    pgd = target.loss(lab.run(ATTACKS.create("pgd", {"eps": "8/255"}), target, images, labels), labels, "ce")
    assert (pgd > ten).all()


def test_none_returns_a_copy(lab):
    images, labels = lab.batch()
    out = lab.run(ATTACKS.create("none", {}), lab.Classifier(lab.convnet(), 5), images, labels)
    assert torch.equal(out, images) and out.data_ptr() != images.data_ptr()
    assert ATTACKS.create("none", {}).passes() == 0
