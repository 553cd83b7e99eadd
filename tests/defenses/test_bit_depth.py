import numpy as np
import pytest
import torch

from bench.chain import bpda
from bench.errors import PluginError
from bench.registry import DEFENSES

RAMP = torch.linspace(0, 1, 1001).expand(1, 3, 1, 1001)
RULES = {
    "evademl": lambda x, n: np.rint(x * (n - 1)) / (n - 1),
    "guo": lambda x, n: np.rint(x * n) / n,
    "ares": lambda x, n: np.floor(x * n) / n,
}


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_follows_the_rule(rule, bits):
    out = DEFENSES.create("bit_depth", {"bits": bits, "rule": rule})(RAMP)
    assert np.array_equal(out.numpy(), RULES[rule](RAMP.numpy(), np.float32(2**bits)))
    assert len(out.unique()) == {"evademl": 2**bits, "guo": 2**bits + 1, "ares": 2**bits + 1}[rule]


def test_8_bits_leave_8_bit_images_alone(photos):
    images = photos(2, 32, 32)
    assert torch.allclose(DEFENSES.create("bit_depth", {"bits": 8})(images), images, atol=1e-7)


def test_bpda_gradient_is_the_identity(photos):
    images = photos(2, 8, 8).requires_grad_()
    defense = DEFENSES.create("bit_depth")
    cotangent = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad(bpda(defense, images).images, images, cotangent)
    assert torch.equal(grad, cotangent)


def test_bits_out_of_range_are_refused():
    with pytest.raises(PluginError, match=r"bit_depth.*1\.\.8, got 9"):
        DEFENSES.create("bit_depth", {"bits": 9})
