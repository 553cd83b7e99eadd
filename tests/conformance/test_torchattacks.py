"""The same images as torchattacks where its flags allow the same algorithm; runs where that library is installed."""

from __future__ import annotations

import pytest
import torch

ta = pytest.importorskip("torchattacks")
EPS, ALPHA = 16 / 255, 1.6 / 255


@pytest.mark.parametrize(
    ("name", "params", "theirs", "flags"),
    [
        ("fgsm", {"eps": "16/255"}, "FGSM", {"eps": EPS}),
        ("bim", {"eps": "16/255"}, "BIM", {"eps": EPS, "alpha": ALPHA, "steps": 10}),
        ("mi_fgsm", {}, "MIFGSM", {"eps": EPS, "alpha": ALPHA, "steps": 10, "decay": 1.0}),
        ("ti_fgsm", {}, "TIFGSM", {"eps": EPS, "alpha": ALPHA, "decay": 0.0, "diversity_prob": 0.0}),
        ("mi_fgsm_ti", {}, "TIFGSM", {"eps": EPS, "alpha": ALPHA, "decay": 1.0, "diversity_prob": 0.0}),
    ],
)
def test_same_images(setting, name, params, theirs, flags):
    attack = getattr(ta, theirs)(setting.net, **flags)
    if theirs == "TIFGSM":
        attack.stacked_kernel = attack.stacked_kernel.to(setting.images.dtype)
    other = attack(setting.images, setting.labels)
    torch.testing.assert_close(setting.run(name, params), other, rtol=0, atol=1e-6)
