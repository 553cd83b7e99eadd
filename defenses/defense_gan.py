"""Defense-GAN: the image a generator can make that is nearest to the input."""

from __future__ import annotations

import math
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor

from bench.errors import NotApplicable
from bench.protocols import ImageRNG
from bench.registry import DEFENSES
from defenses._learned import Learned
from defenses.networks.wgan import WGANGenerator, scaled
from tasks.microbatch import micro_batches


@DEFENSES.register_module(name="defense_gan")
class DefenseGAN(Learned):
    """Replaces an image by the nearest one in the range of a WGAN-GP generator trained on clean images.

    Source: Samangouei, Kabkab, Chellappa, ICLR 2018, and their code. z* = argmin ||G(z) - x||^2 by L steps of gradient
    descent with momentum from each of R random z, each drawn from N(0, 1/latent); the best of the R images is the
    result. The defaults are those of its code, which takes the mean over pixels for the square (in [-1,1]) and lowers
    the learning rate tenfold after 80 % of the steps; on CelebA R is 2.

    Not differentiable as a whole: the search has no gradient worth the name (200 steps with an argmin at their end).
    The surrogate for BPDA is the identity, the attack with which Athalye, Carlini, Wagner (ICML 2018, section 5.4)
    broke it, since G(z*) is meant to be close to x.

    The generator makes images of one size. Others are not applicable, unless `resize` has them scaled there and back.

    Limitations: what the generator cannot make is lost. The paper shows digits, clothes and aligned faces; natural
    images lose most of their clean accuracy.

    Args:
        weights, recipe, trained_for, train_seed: the checkpoint; see `defenses._learned.Learned`.
        R: random restarts.
        L: gradient steps.
        lr: learning rate of the search.
        momentum: of the search.
        resize: take images of any size (bilinear).

    Raises:
        WeightsError: the checkpoint is missing, unreadable or of another network.
    """

    networks = ("wgan",)
    kind = "defense_gan"
    fixed_space = "symmetric"
    differentiable = False
    stochastic = True

    def __init__(
        self,
        R: Annotated[int, Field(ge=1)] = 10,
        L: Annotated[int, Field(ge=1)] = 200,
        lr: Annotated[float, Field(gt=0)] = 10.0,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.7,
        resize: bool = False,
        **checkpoint: Any,
    ) -> None:
        super().__init__(**checkpoint)
        self.R, self.L, self.lr, self.momentum, self.resize = R, L, lr, momentum, resize

    def check_input(self, size: tuple[int, int]) -> None:
        """Raise NotApplicable when the generator makes images of another size."""
        if self.network is not None and not self.resize and tuple(size) != self._size:
            made, given = ("x".join(map(str, s)) for s in (self._size, size))
            raise NotApplicable(
                f"the generator of defense '{self.name}' makes images of {made}, not {given} (see resize)"
            )

    def forward(  # type: ignore[override]  # what is `stochastic` is given rng, see `Defense`
        self, images: Tensor, rng: ImageRNG
    ) -> Tensor:
        """The nearest generated images, (B, 3, H, W), without gradient; `rng` gives the restarts.

        Raises:
            NotApplicable: the generator makes images of another size.
            WeightsError: there are no weights.
        """
        latent = self._generator().latent
        size = (int(images.shape[-2]), int(images.shape[-1]))
        self.check_input(size)
        starts = rng.normal((self.R, latent), images.device).to(images.dtype) / math.sqrt(latent)
        # One tensor, so that an image and its restarts go through together.
        together = torch.cat([images.detach().flatten(1), starts.flatten(1)], 1)
        return micro_batches(lambda group: self._search(group, size), together, self.group(images.device))

    @property
    def _size(self) -> tuple[int, int]:
        return self._generator().size

    def _generator(self) -> WGANGenerator:
        """The network: the only kind that `networks` names."""
        return cast("WGANGenerator", self._network())

    def _search(self, together: Tensor, size: tuple[int, int]) -> Tensor:
        """The nearest images, from rows of pixels and restarts: (B, 3 H W + R latent) to (B, 3, H, W), in [0,1]."""
        network = self._network()
        pixels = 3 * math.prod(size)
        # Copies, because matrix products sum in an order that depends on where in memory a row begins.
        x = together[:, :pixels].clone(memory_format=torch.contiguous_format).view(-1, 3, *size)
        z = together[:, pixels:].clone(memory_format=torch.contiguous_format)
        wanted = (scaled(x, self._size) - self.mean) / self.std
        wanted = wanted.repeat_interleave(self.R, 0)
        z = z.view(len(wanted), -1)
        velocity = torch.zeros_like(z)
        for step in range(self.L):
            with torch.enable_grad():
                z.requires_grad_(True)
                (gradient,) = torch.autograd.grad(_distance(network(z), wanted).sum(), z)
            rate = self.lr * (0.1 if step >= math.ceil(0.8 * self.L) else 1.0)
            velocity = self.momentum * velocity + gradient
            z = z.detach() - rate * velocity
        with torch.no_grad():
            made = network(z)
            best = _distance(made, wanted).view(-1, self.R).argmin(1)
            chosen = made.unflatten(0, (-1, self.R))[torch.arange(len(best)), best]
            return scaled(chosen * self.std + self.mean, size)


def _distance(images: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared difference of each image, (B,)."""
    return (images - wanted).square().flatten(1).mean(1)
