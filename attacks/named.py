"""Attacks with a name of their own on the one loop: PGD-KL, EOT-PGD, and HGD's I-FGSM on an ensemble."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from attacks.activations import victim_of
from attacks.iterative import Climb, Iterative, Judging, Radius, Steps
from attacks.objectives import BoundLoss
from attacks.scores import Stop
from bench.errors import GridError
from bench.protocols import ImageRNG, Oracle, Pixels
from bench.registry import ATTACKS

if TYPE_CHECKING:
    from bench.threat import Victim


@ATTACKS.register_module(name="pgd_kl")
class PGDKL(Iterative):
    """PGD on KL(softmax z(x) || softmax z(x')) from Gaussian noise, no labels (Zhang et al. 2019, TRADES, algorithm 1).

    The defaults are those of the alignment paper's training attack (CIFAR-10).

    Args:
        eps: radius in [0,1] pixel units.
        alpha: step size.
        steps: number of steps.
        noise: standard deviation of the start; at the clean image the gradient is zero.
        stop_when_fooled: see `iterative`.
    """

    added: ClassVar[Mapping[str, Any]] = {"stop_when_fooled": False}

    def __init__(
        self,
        eps: Pixels = Fraction("0.031"),
        alpha: Pixels = Fraction("0.0175"),
        steps: Steps = 4,
        noise: Pixels = Fraction(1, 1000),
        stop_when_fooled: Stop = None,
    ) -> None:
        super().__init__(
            loss="kl",
            eps=eps,
            alpha=alpha,
            steps=steps,
            start="normal",
            start_scale=noise,
            stop_when_fooled=stop_when_fooled,
        )


@ATTACKS.register_module(name="eot_pgd")
class EOTPGD(Iterative):
    """PGD whose gradient is the mean over draws of a stochastic defense (Athalye et al. 2018; Zimmermann 2019).

    Every draw is one more call of the oracle, which itself averages over the threat model's `eot` draws: a step sees
    `draws` times `eot` of them. Against a deterministic pipeline it is PGD at `draws` times the cost.

    Args:
        eps: radius in [0,1] pixel units.
        alpha: step size.
        steps: number of steps.
        draws: calls of the oracle a step; 20 as in AutoAttack's `rand`.
        loss: see `iterative`.
        norm: linf or l2.
        start: `uniform` in the ball, or `none`.
        target: rule for a wrong target; None = untargeted.
        stop_when_fooled: see `iterative`.
    """

    added: ClassVar[Mapping[str, Any]] = {"stop_when_fooled": False}

    def __init__(
        self,
        eps: Radius = Fraction(8, 255),
        alpha: Radius | None = Fraction(2, 255),
        steps: Steps = 10,
        draws: Annotated[int, Field(ge=1)] = 20,
        loss: str = "ce",
        norm: Literal["linf", "l2"] = "linf",
        start: Literal["uniform", "none"] = "uniform",
        target: str | None = None,
        stop_when_fooled: Stop = None,
    ) -> None:
        super().__init__(
            loss=loss,
            norm=norm,
            eps=eps,
            alpha=alpha,
            steps=steps,
            start=start,
            target=target,
            stop_when_fooled=stop_when_fooled,
        )
        self.draws, self.averages = draws, draws > 1

    def passes(self) -> int:
        return super().passes() * self.draws

    def _gradient(self, climb: Climb, bound: BoundLoss | Judging, x: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = super()._gradient(climb, bound, x)
        for _ in range(self.draws - 1):
            more = super()._gradient(climb, bound, x)
            value, grad = value + more[0], grad + more[1]
        return value / self.draws, grad / self.draws


@ATTACKS.register_module(name="hgd_ensemble")
class HGDEnsemble(Iterative):
    """I-FGSM on an ensemble as in HGD's code (Liao et al., CVPR 2018, section 5.1): n = 4, alpha = eps / n.

    The models' logits are averaged, the step follows the cross-entropy of that average towards the classes the ensemble
    itself sees in the clean image (largest sum of softmax outputs), which avoids label leaking. The ensemble is what
    the threat model names: level transfer with several sources. The auxiliary heads of the published Inceptions, which
    enter their loss at weight 0.4, are not part of any model here.

    Args:
        eps: radius in [0,1] pixel units; HGD tests 4/255 and 16/255.
        steps: number of steps n; 1 is the ensemble FGSM, and 2, 4, 8 its training attacks.
        weights: a weight for each model's logits, in the order of the threat model's sources; None = equal.
        labels: `predicted` by the ensemble, or `true`.
    """

    def __init__(
        self,
        eps: Pixels = Fraction(16, 255),
        steps: Steps = 4,
        weights: list[Annotated[float, Field(ge=0)]] | None = None,
        labels: Literal["predicted", "true"] = "predicted",
    ) -> None:
        if weights is not None and not sum(weights) > 0:
            raise ValueError("weights: expected at least one above 0")
        super().__init__(eps=eps, steps=steps)
        self.weights, self.labelling = weights, labels
        self.needs = frozenset({"gradient", "logits"})
        self.tasks = frozenset({"classification"})

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Adversarial images (B, 3, H, W).

        Raises:
            GridError: there are not as many weights as models.
            NotApplicable: this oracle does not show its models.
        """
        if self.weights is not None:
            oracle = self._weighted(oracle, self.weights)
        if self.labelling == "predicted":
            targets = self._seen(oracle, images.detach())
        return super().run(oracle, images, targets, rng)

    def _weighted(self, oracle: Oracle, weights: Sequence[float]) -> Oracle:
        victim = victim_of(oracle)
        if len(weights) != len(victim.models):
            raise GridError(
                f"attack '{self.name}', weights: {len(weights)} given, the threat model has {len(victim.models)} models"
            )
        return _behind(oracle, replace(victim, weights=tuple(w / sum(weights) for w in weights)))

    def _seen(self, oracle: Oracle, images: Tensor) -> tuple[int, ...]:
        """The class of the largest sum of softmax outputs, for each image."""
        victim = victim_of(oracle)
        with torch.no_grad():
            outputs = [
                _behind(oracle, replace(victim, models=(model,), weights=())).logits(images).softmax(1)
                for model in victim.models
            ]
        weights = victim.weights or [1.0] * len(outputs)
        total = torch.stack([w * p for w, p in zip(weights, outputs, strict=True)]).sum(0)
        return tuple(int(k) for k in total.argmax(1))


def _behind(oracle: Oracle, victim: Victim) -> Oracle:
    """The oracle with another victim; counts go to the same place."""
    view: Any = copy.copy(oracle)
    view.victim = victim
    return view  # type: ignore[no-any-return]
