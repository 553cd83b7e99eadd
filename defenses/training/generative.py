"""What the generative defenses are trained for: Defense-GAN's WGAN-GP, DISCO's pixels, DiffPure's noise prediction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.errors import PluginError
from bench.rng import derive_seed
from defenses.networks.diffusion import DDPMUNet, diffused
from defenses.networks.wgan import WGANGenerator, scaled
from defenses.training import losses
from defenses.training.objectives import OBJECTIVES, Objective, Step, Terms


class WGANObjective(Objective):
    """Wasserstein GAN with gradient penalty (Gulrajani et al., NeurIPS 2017), on clean images alone.

    The critic is updated on every batch, the generator on every `critic_steps`-th, each time from new latent vectors
    z ~ N(0, 1).

    Args:
        penalty: weight lambda of the gradient penalty.
        critic_steps: batches per update of the generator (n_critic).
        resize: training images of another size are scaled to that of the generator, as `resize` of the defense does.
    """

    guided = False
    attacked = False
    adversarial = True

    def __init__(self, penalty: float = 10.0, critic_steps: int = 5, resize: bool = False) -> None:
        if critic_steps < 1:
            raise ValueError(f"critic_steps must be at least 1, got {critic_steps}")
        self.penalty, self.generator_every, self.resize = penalty, critic_steps, resize

    def generator(self, step: Step) -> Terms:
        assert step.critic is not None
        return {"gan": -step.critic(self._generated(step, "generator")).mean()}

    def fakes(self, step: Step) -> tuple[Tensor, ...]:
        """Generated images, in the range of the network."""
        return (self._generated(step, "critic"),)

    def critic(self, step: Step, purified: Sequence[Tensor]) -> Terms:
        assert step.critic is not None
        fake = purified[0]
        real = step.inner(scaled(step.clean, (int(fake.shape[-2]), int(fake.shape[-1]))))
        share = _uniform(step, "interpolate", (len(real), 1, 1, 1))
        return {
            "critic": step.critic(fake).mean() - step.critic(real).mean(),
            "penalty": self.penalty * gradient_penalty(step.critic, real, fake, share),
        }

    def _generated(self, step: Step, name: str) -> Tensor:
        """Images (B, 3, H, W) of new latent vectors, in the range of the network."""
        network = step.network
        if not isinstance(network, WGANGenerator):
            raise PluginError(f"objective 'wgan_gp' trains network 'wgan', not {type(network).__name__}")
        if network.size != step.clean.shape[-2:] and not self.resize:
            raise PluginError(
                f"network 'wgan' makes images of {network.size}, training images are {tuple(step.clean.shape[-2:])}: "
                "set network_args.size, or objective_args.resize to have them scaled"
            )
        latents = torch.randn(len(step.clean), network.latent, generator=_stream(step, name))
        images: Tensor = network(latents.to(step.clean.device))
        return images


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """Mean over images of (||gradient of the critic||_2 - 1)^2 at real + share (fake - real).

    Defense-GAN's code takes the norm over one axis of the image only; this is the paper's, over all of it.

    Args:
        critic: (B, 3, H, W) to (B, 1), image by image.
        real, fake: (B, 3, H, W).
        share: (B, 1, 1, 1) in [0,1].
    """
    between = (real + share * (fake - real)).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return ((gradient.float().flatten(1).square().sum(1) + 1e-12).sqrt() - 1).square().mean()


class DISCOObjective(Objective):
    """DISCO (section 3): L1 between the colours predicted from an adversarial image and those of the clean one."""

    guided = False

    def generator(self, step: Step) -> Terms:
        return {"pixels": losses.l1(step.inner(step.purify(step.adversarial)), step.inner(step.clean))}


class DiffusionObjective(Objective):
    """The simple loss of DDPM (Ho et al., NeurIPS 2020, equation 14), on clean images alone.

    Each image is diffused to a step of its own, drawn evenly from those the network is meant for, and the network
    predicts the noise.

    Args:
        ema: decay of the moving average of the weights, which is what the defense uses; 0 = none.
    """

    guided = False
    attacked = False

    def __init__(self, ema: float = 0.9999) -> None:
        if not 0 <= ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {ema}")
        self.average = ema

    def generator(self, step: Step) -> Terms:
        network = step.network
        if not isinstance(network, DDPMUNet):
            raise PluginError(f"objective 'ddpm' trains network 'ddpm', not {type(network).__name__}")
        images = step.inner(step.clean)
        when = (_uniform(step, "step", (len(images),)) * network.known).long().clamp(max=network.known - 1)
        noise = torch.randn(images.shape, generator=_stream(step, "noise")).to(images.device)
        # Dropout draws from the global generator: it is lent the step's seed, so that a resumed run draws the same.
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            torch.manual_seed(derive_seed(step.seed, "dropout"))
            predicted = network(diffused(images, network.alpha_bar[when.cpu()].to(images), noise), when)
        return {"noise": F.mse_loss(predicted, noise)}


def _uniform(step: Step, name: str, shape: Sequence[int]) -> Tensor:
    return torch.rand(tuple(shape), generator=_stream(step, name)).to(step.clean.device)


def _stream(step: Step, name: str) -> torch.Generator:
    """Random numbers of this step: on the CPU, so that they are the same on every device."""
    return torch.Generator().manual_seed(derive_seed(step.seed, name))


OBJECTIVES.update(wgan_gp=WGANObjective, disco=DISCOObjective, ddpm=DiffusionObjective)
