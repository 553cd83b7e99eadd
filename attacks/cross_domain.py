"""CDA: a generator that perturbs any image in one pass, trained against one network (Naseer et al., NeurIPS 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.projections import make_projection
from bench.protocols import Attack, ImageRNG, Oracle, Pixels
from bench.registry import ATTACKS
from bench.weights import apply_state, find_weights, load_state, sha256_file
from tasks.microbatch import default_size, micro_batches

SHIPPED = Path(__file__).parent / "weights"
SOURCE = "the published generators are listed at github.com/Muzammal-Naseer/Cross-domain-perturbations"


class Generator(nn.Module):
    """The published residual generator: two strided convolutions, residual blocks, two transposed ones, tanh.

    Names of parameters are the published checkpoints'.

    Args:
        blocks: residual blocks: 6 for ImageNet-sized images, 2 for small ones.
        width: channels of the first convolution, 64 as published.
    """

    def __init__(self, blocks: int = 6, width: int = 64) -> None:
        super().__init__()
        self.block1 = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.block2, self.block3 = _down(width), _down(2 * width)
        self._blocks = [f"resblock{i + 1}" for i in range(blocks)]
        for name in self._blocks:
            self.add_module(name, _Residual(4 * width))
        self.upsampl1, self.upsampl2 = _up(4 * width), _up(2 * width)
        self.blockf = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7))

    def forward(self, images: Tensor) -> Tensor:
        """Pictures in [0,1] of the images' size (B, 3, H, W), H and W at least 4; not yet inside any budget."""
        height, width = images.shape[-2:]
        x = self.block3(self.block2(self.block1(images)))
        for name in self._blocks:
            x = self.get_submodule(name)(x)
        x = self.blockf(self.upsampl2(self.upsampl1(x)))
        # Sizes that are no multiple of 4 come out larger; the published crop takes off the top and the right.
        x = x[..., x.shape[-2] - height :, :width]
        return (torch.tanh(x) + 1) / 2


def _down(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()
    )


def _up(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(width, width // 2, 3, stride=2, padding=1, output_padding=1, bias=False),
        nn.BatchNorm2d(width // 2),
        nn.ReLU(),
    )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Dropout(0.5),
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.block(x)
        return out


def smoothed(images: Tensor) -> Tensor:
    """A 3x3 Gaussian of standard deviation 1 per channel, the border mirrored (the published option `gk`)."""
    line = torch.exp(-torch.tensor([1.0, 0.0, 1.0], dtype=images.dtype, device=images.device) / 2)
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel.expand(3, 1, 3, 3), groups=3)


@ATTACKS.register_module(name="cda")
class CDA(Attack):
    """Cross-domain attack: x' = P(G(x)) (Naseer et al. 2019, section 3), G trained once, on any images, for one net.

    Nothing is asked of the victim and no labels are used, so it runs on every task, and one set of images serves all
    levels. `python -m attacks._train_cda` trains a generator; the published ones are named by path.

    Args:
        weights: the generator's checkpoint, safetensors or what torch.save wrote; a bare name is also looked for among
            the shipped ones (`attacks/weights`).
        eps: radius in [0,1] pixel units.
        blocks: residual blocks; None = as the checkpoint says, or 6 as the published ones have.
        width: channels of the first convolution; None = as the checkpoint says, or 64.
        smooth: smooth G(x) by a 3x3 Gaussian before the projection (the published option `gk`).
    """

    needs = frozenset()

    def __init__(
        self,
        weights: str,
        eps: Pixels = Fraction(10, 255),
        blocks: Annotated[int, Field(ge=1)] | None = None,
        width: Annotated[int, Field(ge=1)] | None = None,
        smooth: bool = False,
    ) -> None:
        self.path = find_weights(weights, SHIPPED)
        self.eps, self._eps = eps, float(eps)
        meta = load_state(self.path, hint=SOURCE).meta
        self.blocks: int = blocks or meta.get("blocks", 6)
        self.width: int = width or meta.get("width", 64)
        self.smooth = smooth
        self._generators: dict[torch.device, Generator] = {}

    def identity(self) -> dict[str, Any]:
        """Name and parameters, with the digest of the weights in place of their path."""
        identity = super().identity()
        identity["params"]["weights"] = sha256_file(self.path)
        return identity

    def passes(self) -> int:
        return 1

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Perturbed images, (B, 3, H, W).

        Raises:
            WeightsError: the checkpoint is of another network.
        """
        clean = images.detach()
        generator = self._generator(clean.device)
        with torch.no_grad():
            made = micro_batches(generator, clean, default_size(clean.device))
            return make_projection("linf", clean, self._eps)(smoothed(made) if self.smooth else made)

    def _generator(self, device: torch.device) -> Generator:
        if device not in self._generators:
            generator = Generator(self.blocks, self.width)
            apply_state(
                generator, load_state(self.path).state, what=f"attack 'cda', weights file {self.path}"
            )
            self._generators[device] = generator.eval().requires_grad_(False).to(device)
        return self._generators[device]
