"""Attacks on the activations of many layers at once: TAP (transferable) and FFF (universal, data-free)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.iterative import Factor, Iterative, KernelSize, Steps
from attacks.objectives import BoundLoss, Loss
from attacks.projections import make_projection
from bench.errors import GridError, NotApplicable, unknown
from bench.protocols import Attack, ImageRNG, Oracle, Pixels, Warped
from bench.registry import ATTACKS
from tasks import heads

if TYPE_CHECKING:
    from bench.threat import Victim


# -- layers -------------------------------------------------------------------------------------------------------
def victim_of(oracle: Oracle) -> Victim:
    """The models behind the oracle: what is inside of them is white-box access, like their gradients.

    Raises:
        NotApplicable: this oracle does not show it.
    """
    victim: Victim | None = getattr(oracle, "victim", None)
    if victim is None:
        raise NotApplicable("the attack looks into its victim, which is not shown here")
    return victim


def network_of(oracle: Oracle) -> nn.Module:
    """The (first) network behind the oracle; see `victim_of`."""
    model = victim_of(oracle).models[0]
    return getattr(model, "network", model)


@contextmanager
def watched(network: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Outputs of `layers` (names of modules) while the network runs, in the order of its calls."""
    seen: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    modules = dict(network.named_modules())

    def keep(layer: str) -> Callable[..., None]:
        # Cloned at once: an in-place ReLU after the layer would overwrite what it returned.
        return lambda _module, _inputs, out: seen[layer].append(out.clone())

    hooks = [modules[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def activations(oracle: Oracle, images: Tensor, layers: Sequence[str]) -> list[Tensor]:
    """Activations (B, C, H, W) of each layer at `images`, differentiable, from one forward pass."""
    with watched(network_of(oracle), layers) as seen:
        oracle.logits(images)
    # A network that runs a few images at a time fills up its last group; the filling comes last.
    return [torch.cat(seen[layer])[: len(images)] for layer in layers]


def maps_of(oracle: Oracle, images: Tensor, kind: type[nn.Module] = nn.Module) -> list[tuple[str, Tensor]]:
    """Modules of `kind` that run once and return maps (1, C, H, W), with the first image's maps, as they end."""
    return heads.maps_of(network_of(oracle), lambda: oracle.select([0]).logits(images[:1]), kind)


def stage_ends(oracle: Oracle, images: Tensor) -> list[str]:
    """The last module at each resolution: what a network has to say at every scale."""
    return heads.stage_ends(network_of(oracle), lambda: oracle.select([0]).logits(images[:1]))


# -- TAP ----------------------------------------------------------------------------------------------------------
class TransferLoss(Loss):
    """J + lam * sum_l ||r(f_l(x')) - r(f_l(x))||^2 + eta * sum |R(x' - x)|; r(v) = sign(v) |v|^power, R a mean."""

    name = "tap"
    needs = frozenset({"logits", "features"})
    tasks = frozenset({"classification"})
    targeted = False

    def __init__(self, lam: float, eta: float, power: float, size: int, layers: Sequence[str] | None) -> None:
        self.lam, self.eta, self.power, self.size, self.layers = lam, eta, power, size, layers

    def bind(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], targeted: bool) -> BoundLoss:
        """The objective, with its layers found in the victim.

        Raises:
            GridError: the network has no layer of that name.
        """
        names = [name for name, _ in network_of(oracle).named_modules() if name]
        for layer in self.layers or ():
            if layer not in names:
                raise GridError(unknown("layer of the network", layer, names))
        found = self.layers or stage_ends(oracle, images)
        named = TransferLoss(self.lam, self.eta, self.power, self.size, found)
        return Loss.bind(named, oracle, images, targets, False)

    def reference(self, oracle: Oracle, images: Tensor) -> Tensor:
        """The clean images and their rooted activations, side by side, (B, pixels + activations)."""
        with torch.no_grad():
            _, roots = self._forward(oracle, images)
        return torch.cat([images.flatten(1), roots], 1)

    def __call__(
        self, oracle: Oracle, images: Tensor | Warped, targets: Sequence[Any], reference: Tensor | None
    ) -> Tensor:
        """Values (B,)."""
        assert reference is not None and isinstance(images, Tensor)
        pixels = images[0].numel()
        logits, roots = self._forward(oracle, images)
        labels = torch.tensor([int(t) for t in targets], device=logits.device)
        far = (roots - reference[:, pixels:]).square().sum(1)
        delta = images - reference[:, :pixels].view_as(images)
        smooth = F.avg_pool2d(delta, self.size, stride=1, padding=self.size // 2).abs().flatten(1).sum(1)
        return F.cross_entropy(logits, labels, reduction="none") + self.lam * far + self.eta * smooth

    def _forward(self, oracle: Oracle, images: Tensor) -> tuple[Tensor, Tensor]:
        assert self.layers is not None
        with watched(network_of(oracle), self.layers) as seen:
            logits = oracle.logits(images)
        maps = [torch.cat(seen[layer])[: len(images)].flatten(1) for layer in self.layers]
        values = torch.cat(maps, 1)
        # Away from 0, where the gradient of the root has no end.
        return logits, values.sign() * (values.abs() + 1e-6).pow(self.power)


@ATTACKS.register_module(name="tap")
class TAP(Iterative):
    """Transferable adversarial perturbations (Zhou et al., ECCV 2018): the loss, far features, and smooth pixels.

    x' = P(x' + alpha * sign grad (J + lam * D + eta * S)), see `TransferLoss`. The weights are those of a public
    re-implementation; the paper's were not available.

    Args:
        eps: radius in [0,1] pixel units.
        alpha: step size.
        steps: number of steps.
        lam: weight of the distance of features.
        eta: weight of the smoothed perturbation.
        power: exponent of the power normalisation of features.
        size: side of the mean filter.
        layers: modules whose outputs are compared; None = the last one at each resolution.
    """

    def __init__(
        self,
        eps: Pixels = Fraction(16, 255),
        alpha: Pixels = Fraction(16, 2550),
        steps: Steps = 100,
        lam: Factor = 0.005,
        eta: Factor = 0.01,
        power: Annotated[float, Field(gt=0, le=1)] = 0.5,
        size: KernelSize = 3,
        layers: list[str] | None = None,
    ) -> None:
        super().__init__(eps=eps, alpha=alpha, steps=steps)
        self.loss = TransferLoss(lam, eta, power, size, layers)
        self.needs = frozenset({"gradient", *self.loss.needs})
        self.tasks = self.loss.tasks


# -- FFF ----------------------------------------------------------------------------------------------------------
@ATTACKS.register_module(name="fff")
class FFF(Attack):
    """Fast feature fool: one perturbation for all images, found without any (Mopuri et al., BMVC 2017, section 3.2).

    It maximises sum_l log(mean |activation_l|) over all convolutions for the perturbation alone, on top of uniform
    grey (the published networks take images less their mean). Adam, from uniform noise in the ball, clipped to the
    ball; every `rescale` steps the perturbation is halved, so that it does not stay pinned to its corners. The
    published stop, when the fooling rate on other images no longer grows, is a number of steps here.

    The perturbation depends on the network, the size of the images and `seed`, never on the images; it is found once
    and used for all.

    Args:
        eps: radius in [0,1] pixel units; 10/255 in the paper.
        steps: number of steps.
        lr: Adam's learning rate as a share of eps; 0.1 of 10 grey levels in the paper's code.
        rescale: steps between halvings.
        seed: of the noise it starts from.
    """

    tasks = frozenset({"classification"})
    needs = frozenset({"gradient", "features", "logits"})
    monotone = False
    labelled = False

    def __init__(
        self,
        eps: Pixels = Fraction(10, 255),
        steps: Steps = 1000,
        lr: Annotated[float, Field(gt=0)] = 0.01,
        rescale: Annotated[int, Field(ge=1)] = 300,
        seed: int = 0,
    ) -> None:
        self.eps, self._eps = eps, float(eps)
        self.steps, self.lr, self.rescale, self.seed = steps, lr, rescale, seed
        self._found: dict[tuple[int, ...], tuple[Any, Tensor]] = {}

    def passes(self) -> int:
        """Once for all images; none for each."""
        return 1

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """All images plus the one perturbation, (B, 3, H, W) in [0,1].

        Raises:
            NotApplicable: the victim draws random numbers for each image, or does not show its network.
        """
        network = network_of(oracle)
        defense = oracle.victim.defense  # type: ignore[attr-defined]
        if defense is not None and defense.stochastic:
            raise NotApplicable(
                "one perturbation for all images has no stream of a stochastic defense to draw from"
            )
        clean = images.detach()
        key = (id(network), id(defense), *images.shape[1:])
        if key not in self._found:
            # The network is kept beside its perturbation, so that its id cannot be given to another.
            self._found[key] = ((network, defense), self._find(oracle.select([0]), clean[:1]))
        delta = self._found[key][1].to(clean)
        return make_projection("linf", clean, self._eps)(clean + delta)

    def _find(self, oracle: Oracle, image: Tensor) -> Tensor:
        layers = [name for name, _ in maps_of(oracle, image, nn.Conv2d)]
        if not layers:
            raise NotApplicable("the network has no convolution that runs once")

        def objective(oracle: Oracle, images: Tensor) -> Tensor:
            found = activations(oracle, images, layers)
            return torch.stack([(out.abs().flatten(1).mean(1) + 1e-12).log() for out in found]).sum(0)

        noise = ImageRNG([self.seed]).uniform(image.shape[1:], -self._eps, self._eps, image.device)
        noise = noise.to(image.dtype)
        delta, first, second = noise, torch.zeros_like(noise), torch.zeros_like(noise)
        for step in range(self.steps):
            grad = torch.nan_to_num(oracle.gradient((0.5 + delta).clamp(0, 1), objective).grad)
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad.square()
            scale = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            delta = delta + self.lr * self._eps * first / (1 - 0.9 ** (step + 1)) / scale
            delta = delta.clamp(-self._eps, self._eps)
            if (step + 1) % self.rescale == 0 and step + 1 < self.steps:
                delta = delta / 2
        return delta
