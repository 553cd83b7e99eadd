"""The one loop behind every gradient-ascent attack: start, then gradient, transforms, step, projection, N times.

FGSM, BIM, PGD, MI, DI, TI and their combinations differ only in the parts; `iterative` exposes all of them, the named
attacks in `attacks.single_model` and `attacks.transferable` fix some. The victim, be it one network, an ensemble or a
network behind a defense, is whatever the oracle says it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, WithJsonSchema
from torch import Tensor

from attacks.objectives import BoundLoss, make_loss
from attacks.projections import Projection, check_radius, make_projection
from attacks.scores import Seen, Stop, as_labels, fooled, over_draws
from attacks.starts import StartKind, start
from attacks.steps import STEPS, finite
from attacks.transforms import (
    Canvas,
    GradientTransform,
    InputDiversity,
    Interpolation,
    Momentum,
    MomentumNorm,
    TranslationInvariance,
    select_memory,
)
from bench.errors import CheckError
from bench.protocols import Attack, ImageRNG, Needs, Oracle
from bench.registry import ATTACKS
from bench.units import parse_fraction


def _radius(value: Any) -> Fraction:
    fraction = parse_fraction(value)
    if fraction <= 0:
        raise ValueError(f"{value}: expected a positive length such as 8/255")
    return fraction


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("expected an odd number")
    return value


Steps = Annotated[int, Field(ge=1)]
"""A number of steps, at least one."""

Radius = Annotated[
    Fraction,
    BeforeValidator(_radius),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number", "exclusiveMinimum": 0}]}),
]
"""eps or alpha of an attack that offers the L2 norm, where lengths above 1 are common."""

KernelSize = Annotated[int, Field(ge=3), AfterValidator(_odd)]
"""An odd kernel size."""

Ratio = Annotated[
    Fraction,
    BeforeValidator(parse_fraction),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number", "exclusiveMinimum": 0}]}),
]
"""A ratio of lengths, exact."""

Probability = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(ge=0)]


@ATTACKS.register_module(name="iterative")
class Iterative(Attack):
    """Projected gradient ascent with every part open.

    x_0 = P(x + start);  g_t = transforms(grad objective(diversity(x_t)));  x_{t+1} = P(x_t + alpha * step(g_t)).

    The objective is the loss of the true target, or minus the loss of a wrong one (`target`). The gradient is each
    image's own: losses are summed over the batch, never averaged. Non-finite entries of a gradient count as zero (the
    oracle records them), since the sign of NaN is silently 0 and momentum would keep it for ever.

    Args:
        loss: `margin`, `dlr`, `kl` (from logits), or any loss kind of the target: `ce`; for detectors `cls`, `loc`,
            `cls+loc`, `mask`.
        kappa: confidence at which `margin` stops; None = never.
        norm: norm of the budget; `none` = the pixel range alone, then `eps` must be null.
        eps: radius of the budget in [0,1] pixel units.
        alpha: step size in the same units; None = eps / steps.
        steps: number of gradient steps N.
        step: `sign`, `l2` (unit length) or `linf` (the gradient over its largest entry); None = the one that goes with
            the norm.
        start: where the first step begins: `none`, `uniform` in the ball, `radial` (l2: a random direction and a
            uniform length), `normal` noise, `sign` noise.
        start_scale: radius, standard deviation or size of the start; None = eps, 0.001 and eps / 2.
        restarts: runs from different random starts, of which the best is kept for each image.
        momentum: decay factor mu; 0 = none.
        momentum_norm: what the gradient is divided by before it is accumulated (`attacks.transforms.Momentum`).
        ti_kernel: size of the Gaussian that smooths the gradient; None = none.
        ti_sigmas: where that Gaussian is cut off, in standard deviations.
        di_prob: chance of input diversity at each step; 0 = none.
        di_ratio: size of its canvas over that of the image; below 1 the image shrinks, to no less than that.
        di_canvas: `enlarged` (published) or `native` (resized back to the image's size).
        di_interpolation: `nearest` (published) or `bilinear`.
        target: rule for a wrong target to reach (`Task.attack_targets`); None = untargeted.
        labels: `true`, or `predicted`: the victim's own prediction for the clean image, which avoids label leaking
            (the practice of HGD's and DI's code).
        return_best: return the best iterate instead of the last one. Off for parity: every published loop here
            returns the last.
        best_by: what is better for `return_best` and `restarts`: a larger `loss`, or `fooled` first and then the loss.
        stop_when_fooled: an image leaves the batch as soon as the victim sees another class than its label (or sees the
            target). Saves time where attack and evaluation share one pipeline; off for images that another pipeline
            will see. None = as that demands (`attacks.scores.Stop`). Input diversity and `kl` take a forward pass more
            a step for it.
    """

    added: ClassVar[Mapping[str, Any]] = {"di_interpolation": "nearest"}

    def __init__(
        self,
        loss: str = "ce",
        kappa: float | None = None,
        norm: Literal["linf", "l2", "none"] = "linf",
        eps: Radius | None = Fraction(8, 255),
        alpha: Radius | None = None,
        steps: Steps = 10,
        step: Literal["sign", "l2", "linf"] | None = None,
        start: StartKind = "none",
        start_scale: Radius | None = None,
        restarts: Annotated[int, Field(ge=1)] = 1,
        momentum: Factor = 0.0,
        momentum_norm: MomentumNorm = "mean",
        ti_kernel: KernelSize | None = None,
        ti_sigmas: Annotated[float, Field(gt=0)] = 3.0,
        di_prob: Probability = 0.0,
        di_ratio: Ratio = Fraction(330, 299),
        di_canvas: Canvas = "enlarged",
        di_interpolation: Interpolation = "nearest",
        target: str | None = None,
        labels: Literal["true", "predicted"] = "true",
        return_best: bool = False,
        best_by: Literal["loss", "fooled"] = "loss",
        stop_when_fooled: Stop = None,
    ) -> None:
        self.loss = make_loss(loss, kappa)
        self.monotone = restarts == 1
        self.labelled = not self.loss.flat_at_clean
        self.norm = None if norm == "none" else norm
        self.eps, self.target = eps, target
        self._check_budget(norm, eps, alpha)
        if self.loss.flat_at_clean and start == "none":
            raise ValueError(
                f"loss '{loss}' has a zero gradient at the clean image: start must be normal, uniform or sign"
            )
        if target is not None and not self.loss.targeted:
            raise ValueError(f"loss '{loss}' uses no target, so it cannot be targeted")
        if target is not None and labels == "predicted":
            raise ValueError("labels: predicted has no meaning for a targeted attack")
        self.projection_norm = norm
        self.steps, self.restarts = steps, restarts
        # Fractions become floats here, once; parameters and rows keep them exact.
        self._eps = None if eps is None else float(eps)
        self._alpha = float(alpha if alpha is not None else Fraction(eps or 0) / steps)
        self.direction = STEPS[step or ("l2" if norm == "l2" else "sign")]
        self.start: StartKind = start
        self._start_scale = self._scale_of(start, start_scale)
        self.transforms: list[GradientTransform] = []
        if ti_kernel is not None:
            self.transforms.append(TranslationInvariance(ti_kernel, ti_sigmas))
        if momentum > 0:
            self.transforms.append(Momentum(momentum, momentum_norm))
        self.diversity = (
            InputDiversity(di_prob, di_ratio, di_canvas, di_interpolation) if di_prob > 0 else None
        )
        self.labels = labels
        self.return_best, self.best_by = return_best, best_by
        self.stop_when_fooled = stop_when_fooled is True
        self.stochastic = start != "none" or self.diversity is not None
        # Without a choice to make, the last iterate is the answer and its loss need not be known.
        self._compares = return_best or restarts > 1
        if restarts > 1 and start == "none":
            raise ValueError("restarts need a random start")
        if self._compares and self.diversity is not None:
            raise ValueError("restarts and return_best compare losses, which input diversity makes random")
        # Elsewhere the loss asks for no logits of the image itself, and its class is asked for.
        self._reads = (
            self.stop_when_fooled and self.loss.name in ("ce", "margin", "dlr") and self.diversity is None
        )
        decides = labels == "predicted" or (self._compares and (best_by == "fooled" or self.stop_when_fooled))
        needs: set[Needs] = {"gradient", *self.loss.needs}
        if self._reads:
            needs.add("logits")
        # What an attack asks for depends on its parameters, hence on the instance.
        if decides or (self.stop_when_fooled and not self._reads):
            needs.add("decision")
        self.needs = frozenset(needs)
        self.tasks = self.loss.tasks
        if decides or self.stop_when_fooled or (self.diversity is not None and self.loss.flat_at_clean):
            # Decisions are compared as classes; a clean reference map does not follow the pixels of input diversity.
            self.tasks = frozenset({"classification"})

    def _check_budget(self, norm: str, eps: Fraction | None, alpha: Fraction | None) -> None:
        if (eps is None) != (norm == "none"):
            raise ValueError("eps must be null with norm 'none' and a length such as 8/255 otherwise")
        if eps is None and alpha is None:
            raise ValueError("alpha is required without eps")
        check_radius(norm, eps)
        check_radius(norm, alpha, "alpha")

    def _scale_of(self, kind: StartKind, given: Fraction | None) -> float:
        if kind == "radial" and self.norm != "l2":
            raise ValueError("start 'radial' goes with norm l2")
        if kind == "none":
            if given is not None:
                raise ValueError("start_scale needs a start other than 'none'")
            return 0.0
        if given is not None:
            if self.eps is not None and kind != "normal" and given > self.eps:
                raise ValueError(f"start_scale: {given} is larger than eps = {self.eps}")
            return float(given)
        if kind == "normal":
            return 0.001
        if self.eps is None:
            raise ValueError("start_scale is required without eps")
        return float(self.eps / 2 if kind == "sign" else self.eps)

    # -- what the harness asks ------------------------------------------------------------------------------------
    def loss_kinds(self) -> Iterable[str]:
        return self.loss.kinds

    def passes(self) -> int:
        return self.restarts * (self.steps + int(self._compares))

    @property
    def compares(self) -> bool:
        return self.loss.compares

    # -- the attack -----------------------------------------------------------------------------------------------
    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Adversarial images (B, 3, H, W) in [0,1] and inside the budget.

        Raises:
            CheckError: `fooled` is asked of a victim whose predictions are not classes.
        """
        clean = images.detach()
        if self.labels == "predicted":
            targets = oracle.decision(clean)
        best = Best(clean)
        climb = Climb(oracle, clean, tuple(targets), rng, torch.arange(len(clean)))
        for _ in range(self.restarts):
            if len(climb.index) == 0:
                break
            self._climb(climb, best)
            if self.stop_when_fooled and self.restarts > 1:
                climb = climb.select((~best.fooled[climb.index]).nonzero()[:, 0])
        return best.images

    def _climb(self, climb: Climb, best: Best) -> None:
        """One run from one start for the images of `climb`; what it finds goes to `best`."""
        projection: Projection = make_projection(self.projection_norm, climb.clean, self._eps)
        x = projection(self._begin(climb))
        bound = self.loss.bind(climb.oracle, climb.clean, climb.targets, self.target is not None)
        memory: list[Tensor | None] = [None] * len(self.transforms)
        for step in range(self.steps):
            found: tuple[Tensor, Tensor] | None = None
            hit = self._fooled(climb, x, self.stop_when_fooled and not self._reads)
            if self._reads:
                judging = Judging(bound.at(step, self.steps))
                found = self._gradient(climb, judging, x)
                hit = judging.hit(self.target is not None)
            if hit.any():
                out, kept = hit.nonzero()[:, 0], (~hit).nonzero()[:, 0]
                best.settle(climb.index[out], x[out.to(x.device)])
                if len(kept) == 0:
                    return
                climb, bound = climb.select(kept), bound.select(kept)
                kept = kept.to(x.device)
                projection, x, memory = projection.select(kept), x[kept], select_memory(memory, kept)
                found = None if found is None else (found[0][kept], found[1][kept])
            value, grad = found or self._gradient(climb, bound.at(step, self.steps), x)
            if self.return_best:
                best.offer(climb.index, x, value, self._fooled(climb, x, self.best_by == "fooled"))
            for i, transform in enumerate(self.transforms):
                grad, memory[i] = transform(grad, memory[i])
            x = projection(self._move(value, grad).add_(x))
        if self._compares:
            hit = self._fooled(climb, x, self.best_by == "fooled" or self.stop_when_fooled)
            best.offer(climb.index, x, climb.oracle.gradient(x, bound).value, hit)
        else:
            best.settle(climb.index, x)

    def _begin(self, climb: Climb) -> Tensor:
        """Where the first step starts from, before it is projected."""
        return start(self.start, self._start_scale, self.projection_norm, climb.clean, climb.rng)

    def _gradient(self, climb: Climb, bound: BoundLoss | Judging, x: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient of the objective at `x`, through one draw of input diversity."""
        objective: Any = bound
        if self.diversity is not None:
            assert isinstance(bound, BoundLoss)
            size = (int(x.shape[-2]), int(x.shape[-1]))
            objective = self.diversity.objective(bound, self.diversity.draw(climb.rng, size))
        result = climb.oracle.gradient(x, objective)
        return result.value, finite(result.grad.detach())

    def _move(self, value: Tensor, grad: Tensor) -> Tensor:
        """The step (B, 3, H, W), a new tensor, from values (B,) and transformed gradients, before it is projected."""
        return self.direction(grad).mul_(self._alpha)

    def _fooled(self, climb: Climb, x: Tensor, asked: bool) -> Tensor:
        """(B,) bool: the victim misclassifies, or reaches the target; all False unless `asked`."""
        if not asked:
            return torch.zeros(len(x), dtype=torch.bool)
        predicted = [_class(p) for p in climb.oracle.decision(x)]
        hit = torch.tensor([p == _class(t) for p, t in zip(predicted, climb.targets, strict=True)])
        return hit if self.target is not None else ~hit


@dataclass(frozen=True)
class Judging:
    """An objective that tells which images fooled the victim when it was last computed."""

    bound: BoundLoss
    kept: list[Tensor] = field(default_factory=list)

    def __call__(self, oracle: Oracle, images: Tensor) -> Tensor:
        """Values (B,)."""
        return self.bound(Seen(oracle, self.kept), images)  # type: ignore[arg-type]

    def hit(self, targeted: bool) -> Tensor:
        """(B,) bool on the CPU, by the mean logits over all draws."""
        logits = over_draws(self.kept)
        return fooled(logits, as_labels(self.bound.targets, logits.device), targeted).cpu()


@dataclass(frozen=True)
class Climb:
    """The images an attack is working on; `index` is their place in the batch."""

    oracle: Oracle
    clean: Tensor
    targets: tuple[Any, ...]
    rng: ImageRNG
    index: Tensor

    def select(self, kept: Tensor) -> Climb:
        return Climb(
            self.oracle.select(kept),
            self.clean[kept.to(self.clean.device)],
            tuple(self.targets[i] for i in kept.tolist()),
            self.rng.select(kept),
            self.index[kept],
        )


class Best:
    """The best adversarial image found for each image of the batch."""

    def __init__(self, clean: Tensor) -> None:
        self.images = clean.clone()
        self.value = torch.full((len(clean),), float("-inf"))
        self.fooled = torch.zeros(len(clean), dtype=torch.bool)

    def offer(self, index: Tensor, images: Tensor, value: Tensor, fooled: Tensor) -> None:
        """Keep what is better: fooled before not fooled, then the larger value. NaN is never better."""
        value = value.detach().cpu()
        better = (fooled & ~self.fooled[index]) | (
            (fooled == self.fooled[index]) & (value > self.value[index])
        )
        chosen = better.nonzero()[:, 0]
        at = index[chosen]
        self.images[at.to(self.images.device)] = images[chosen.to(images.device)]
        self.value[at], self.fooled[at] = value[chosen], fooled[chosen]

    def settle(self, index: Tensor, images: Tensor) -> None:
        """Take `images` as final."""
        self.images[index.to(self.images.device)] = images
        self.value[index], self.fooled[index] = float("inf"), True


def _class(prediction: Any) -> int:
    try:
        return int(prediction)
    except (TypeError, ValueError):
        raise CheckError(
            f"'fooled' compares classes, but this task predicts {type(prediction).__name__}: use best_by: loss"
        ) from None
