"""MI, TI and DI against an independent implementation in plain torch and scipy, written from the papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import signal
from torch import Tensor
from torch.nn import functional as F

EPS, ALPHA = 16 / 255, 1.6 / 255


def kernel(size: int) -> Tensor:
    line = signal.windows.gaussian(size, (size - 1) / 6)
    weights = np.outer(line, line)
    return torch.from_numpy(weights / weights.sum()).expand(3, 1, size, size)


def reference(
    setting, *, decay: float, size: int | None, draws=None, ratio: float = 330 / 299, sign: int = 1
) -> Tensor:
    """The published loop, one image at a time; `draws` are the uniform numbers (image, step, 4) of input diversity."""
    outs = []
    targets = setting.labels if sign > 0 else setting.wrong
    for i, (clean, label) in enumerate(zip(setting.images, targets, strict=True)):
        x, g = clean[None].clone(), torch.zeros_like(clean[None])
        for step in range(10):
            x = x.detach().requires_grad_()
            seen = x
            if draws is not None:
                gate, a, b, c = draws[i, step].tolist()
                if gate < 0.7:
                    h, w = clean.shape[-2:]
                    H, W = round(h * ratio), round(w * ratio)
                    r, s = h + int(a * (H - h)), w + int(a * (W - w))
                    top, left = int(b * (H - r)), int(c * (W - s))
                    seen = F.interpolate(x, size=(r, s), mode="nearest")
                    seen = F.pad(seen, (left, W - s - left, top, H - r - top))
            F.cross_entropy(setting.net(seen), label[None]).backward()
            grad = sign * x.grad
            if size is not None:
                grad = F.conv2d(grad, kernel(size), padding=size // 2, groups=3)
            grad = grad / grad.abs().mean()
            g = decay * g + grad
            x = x.detach() + ALPHA * g.sign()
            x = clean + (x - clean).clamp(-EPS, EPS)
            x = x.clamp(0, 1)
        outs.append(x[0])
    return torch.stack(outs)


def diversity_draws(setting) -> Tensor:
    rng = setting.rng()
    return torch.stack([rng.uniform((4,)) for _ in range(10)], 1).double()


@pytest.mark.parametrize(
    ("name", "params", "how"),
    [
        ("mi_fgsm", {}, {"decay": 1.0, "size": None}),
        ("mi_fgsm", {"decay": 0.5}, {"decay": 0.5, "size": None}),
        ("ti_fgsm", {}, {"decay": 0.0, "size": 15}),
        ("mi_fgsm_ti", {}, {"decay": 1.0, "size": 15}),
        ("mi_fgsm_ti", {"kernel": 5}, {"decay": 1.0, "size": 5}),
        ("dim", {}, {"decay": 1.0, "size": None, "draws": True}),
        ("dim_ti", {}, {"decay": 1.0, "size": 15, "draws": True}),
        ("dim_ti", {"kernel": 3, "ratio": "3/2"}, {"decay": 1.0, "size": 3, "draws": True, "ratio": 1.5}),
    ],
)
@pytest.mark.parametrize("targeted", [False, True])
def test_published_loops(setting, name, params, how, targeted):
    how = dict(how)
    if how.pop("draws", False):
        how["draws"] = diversity_draws(setting)
    expected = reference(setting, sign=-1 if targeted else 1, **how)
    ours = setting.run(name, params, targeted)
    assert (ours - setting.images).abs().max() > 0.05
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_dlr_equals_autoattack(setting):
    base = pytest.importorskip("pyautoattack.autopgd_base")
    from attacks.objectives import DLR

    class Oracle:
        def logits(self, images: Tensor) -> Tensor:
            return setting.net(images)

    ours = DLR()(Oracle(), setting.images, setting.labels.tolist(), None)
    attack = base.APGDAttack(setting.net, eps=0.1, device="cpu")
    torch.testing.assert_close(ours, attack.dlr_loss(setting.net(setting.images), setting.labels))
