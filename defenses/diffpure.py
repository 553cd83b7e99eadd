"""DiffPure: noise over the image, and a diffusion model that takes it away again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.errors import PluginError
from bench.protocols import ImageRNG
from bench.registry import DEFENSES
from bench.weights import sha256_file
from defenses._learned import Learned
from defenses.networks.diffusion import NoisePredictor, diffused, load_diffusers
from tasks.microbatch import micro_batches


@DEFENSES.register_module(name="diffpure")
class DiffPure(Learned):
    """Diffuses the image to t*, where noise has drowned the perturbation, and runs the reverse process back to 0.

    Source: Nie, Guo, Huang, Xiao, Vahdat, Anandkumar, ICML 2022, and their code: t* = 0.1 for CIFAR-10 at l_inf 8/255,
    0.075 at l2 0.5, 0.15 for ImageNet at 4/255. They integrate the reverse VP-SDE with a step per timestep, of which
    ancestral sampling of DDPM is the discretisation used here (their code's `ddpm` for guided diffusion); DDIM (Song et
    al., ICLR 2021) leaves the noise of the reverse steps out. With fewer `steps` than timesteps, evenly many are
    skipped (Nichol and Dhariwal 2021).

    The gradient is the true one, through all steps: each is computed once more in the backward pass instead of being
    kept (checkpointing), so that memory does not grow with the steps. The paper's adjoint method approximates that
    gradient, which overstates robustness (Lee and Kim, ICCV 2023). They attack through a chain of few steps: with
    `surrogate_steps` that is what BPDA does; without, its gradient is the identity.

    Weights: a checkpoint of this project, or a folder that `diffusers` saved (an unconditional UNet2DModel, or a
    pipeline with one, such as google/ddpm-cifar10-32), for which that package must be installed.

    Limitations: as good as its diffusion model. Random: attacks need EOT, and scores have a spread.

    Args:
        weights: checkpoint or folder; None = the one trained by `recipe` for the role it stands in front of.
        recipe, trained_for, train_seed: which one (`defenses._learned.Learned`).
        t_star: part of the diffusion process that is run, in (0, 1].
        sampler: reverse steps: `ddpm` or `ddim`.
        steps: their number; None = one for every timestep up to t*.
        clip_denoised: cut each step's estimate of the clean image off at [0,1], as guided diffusion's sampler. The
            gradient ends where it is cut.
        surrogate_steps: reverse steps of the chain BPDA differentiates; None = the identity.

    Raises:
        WeightsError: the checkpoint is missing, unreadable or of another network, or `diffusers` is not installed.
        ValueError: more steps than timesteps up to t*, or a t* that the network was not trained for.
    """

    networks = ("ddpm",)
    kind = "diffpure"
    fixed_space = "symmetric"
    source = "a folder of diffusers with an unconditional UNet2DModel will do"
    stochastic = True

    def __init__(
        self,
        weights: Path | None = None,
        t_star: Annotated[float, Field(gt=0, le=1)] = 0.1,
        sampler: Literal["ddpm", "ddim"] = "ddpm",
        steps: Annotated[int, Field(ge=1)] | None = None,
        clip_denoised: bool = False,
        surrogate_steps: Annotated[int, Field(ge=1)] | None = None,
        **choice: Any,
    ) -> None:
        folder = weights.expanduser() if weights is not None and weights.expanduser().is_dir() else None
        super().__init__(weights if folder is None else None, **choice)
        if folder is not None:
            if self._choice != (self.kind, None, 0):
                raise PluginError(
                    f"defense '{self.kind}': weights names a folder; recipe, trained_for and train_seed do not apply"
                )
            self.network, files = load_diffusers(folder)
            digests = "".join(sha256_file(file) for file in files)
            self.sha256 = hashlib.sha256(digests.encode()).hexdigest()
        self.t_star, self.sampler, self.steps = t_star, sampler, steps
        self.clip_denoised, self.surrogate_steps = clip_denoised, surrogate_steps
        if self.network is not None:
            for count in (steps, surrogate_steps):
                self.timesteps(count)

    def timesteps(self, steps: int | None) -> list[int]:
        """The timesteps the reverse process visits, counted from 0, last first; the first of them is that of t*.

        Raises:
            ValueError: there are fewer than `steps`, or the network was not trained for t*.
            WeightsError: there are no weights.
        """
        network = self._predictor()
        count = len(network.alpha_bar)
        last = max(round(self.t_star * count), 1)
        if last > network.known:
            raise ValueError(
                f"t_star {self.t_star} is timestep {last} of {count}; the network was trained up to {network.known}"
            )
        steps = last if steps is None else steps
        if steps > last:
            raise ValueError(
                f"{steps} reverse steps asked for, but t_star = {self.t_star} is timestep {last} of {count}"
            )
        return [(i + 1) * last // steps - 1 for i in reversed(range(steps))]

    def forward(  # type: ignore[override]  # what is `stochastic` is given rng, see `Defense`
        self, images: Tensor, rng: ImageRNG
    ) -> Tensor:
        """Purified images, (B, 3, H, W) in [0,1] to about [0,1]; `rng` gives the noise.

        Raises:
            WeightsError: there are no weights.
        """
        return self._chain(images, rng, self.steps)

    def surrogate(self, images: Tensor, rng: ImageRNG) -> Tensor:
        """What BPDA differentiates: the chain of `surrogate_steps`, or the identity."""
        return images if self.surrogate_steps is None else self._chain(images, rng, self.surrogate_steps)

    def _predictor(self) -> NoisePredictor:
        """The network by what is asked of it, which `nn.Module` does not say."""
        return cast("NoisePredictor", self._network())

    def _chain(self, images: Tensor, rng: ImageRNG, steps: int | None) -> Tensor:
        alpha_bar = self._predictor().alpha_bar
        times = self.timesteps(steps)

        def noise() -> Tensor:
            return rng.normal(images.shape[1:], images.device).to(images.dtype)

        x = diffused((images - self.mean) / self.std, alpha_bar[times[0]].to(images), noise())
        for time, after in zip(times, [*times[1:], None], strict=True):
            later = 1.0 if after is None else float(alpha_bar[after])
            fresh = noise() if self.sampler == "ddpm" and after is not None else None
            if torch.is_grad_enabled() and x.requires_grad:
                x = checkpoint(
                    self._reverse, x, time, later, fresh, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = self._reverse(x, time, later, fresh)
        return x * self.std + self.mean

    def _reverse(self, x: Tensor, time: int, later: float, fresh: Tensor | None) -> Tensor:
        """One reverse step, from x at timestep `time` to where alpha_bar is `later`.

        Song et al. (2021), equation 12: the estimate of x_0 is diffused again with the predicted noise, of which a
        part is replaced by `fresh` noise; with the variance below that is DDPM's posterior, without it is DDIM.
        """
        network = self._predictor()
        when = torch.full((self.group(x.device),), time, device=x.device)
        noise = micro_batches(lambda group: network(group, when), x, len(when))
        now = float(network.alpha_bar[time])
        image = (x - (1 - now) ** 0.5 * noise) / now**0.5
        if self.clip_denoised:
            image = image.clamp(-1, 1)
            noise = (x - now**0.5 * image) / (1 - now) ** 0.5
        if fresh is None:
            out: Tensor = later**0.5 * image + (1 - later) ** 0.5 * noise
        else:
            variance = (1 - later) / (1 - now) * (1 - now / later)
            out = later**0.5 * image + (1 - later - variance) ** 0.5 * noise + variance**0.5 * fresh
        return out
