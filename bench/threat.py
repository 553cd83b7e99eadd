"""Threat models: what stands behind the oracle that an attack queries, and nothing else.

| level       | gradients come from                                       | defense in the oracle    |
|-------------|-----------------------------------------------------------|--------------------------|
| `oblivious` | the bare target                                           | none                     |
| `transfer`  | other models (averaged logits when several)               | none, or as `gray_box`   |
| `gray_box`  | the target                                                | the attacker's surrogate |
| `bpda`      | the target; backward through the defense's stand-in       | the deployed one         |
| `white_box` | the target; true gradient through the defense             | the deployed one         |
| `adaptive`  | not crafted: per image the worst over all levels above     | as each of them          |

Where the defense draws random numbers the gradient is the mean over `eot` draws (expectation over transformation,
Athalye et al. 2018). Evaluation always goes through the full defended pipeline, whatever the level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bench.chain import bpda
from bench.errors import NotApplicable
from bench.protocols import (
    Attack,
    Defense,
    Geometry,
    Gradient,
    ImageRNG,
    Objective,
    TargetModel,
    Warped,
    identity_geometry,
)
from bench.registry import ATTACKS

Mode = Literal["none", "bpda", "exact"]


@dataclass
class Trace:
    """What the oracle saw of one image: passes, and the health of its gradients (checks V3, V14 and V15).

    `backwards` are those behind `Oracle.gradient`; gradients that an attack takes by itself of an oracle's logits are
    not seen (`Attack.counts_backwards`). `zeros` sums the shares of exactly zero entries over the steps, `first_max` is
    the largest entry of the first gradient, `values` are the objective's, one a step.
    """

    forwards: int = 0
    backwards: int = 0
    steps: int = 0
    zero: int = 0
    nonfinite: int = 0
    first_zero: bool = False
    last_zero: bool = False
    first_loss: float = float("nan")
    last_loss: float = float("nan")
    best_loss: float = float("-inf")
    zeros: float = 0.0
    first_max: float = float("nan")
    values: list[float] = field(default_factory=list)

    def add(self, value: float, zero: float, finite: bool, largest: float = float("nan")) -> None:
        """Record one gradient step; `zero` is the share of its entries that are exactly zero, `largest` the largest."""
        self.values.append(value)
        self.zeros += zero
        zero = zero == 1
        if self.steps == 0:
            self.first_loss, self.first_zero, self.first_max = value, zero, largest
        self.steps += 1
        self.zero += int(zero)
        self.nonfinite += int(not finite)
        self.last_loss, self.last_zero = value, zero
        self.best_loss = max(self.best_loss, value)

    def record(self) -> dict[str, Any]:
        """What is stored: the counts, `sparse` (mean share of zero entries) and `tail_gain` (the last tenth's gain)."""
        values = self.values
        tail = -(-(len(values) - 1) // 10)
        return {
            "forwards": self.forwards, "backwards": self.backwards, "steps": self.steps, "zero": self.zero,
            "nonfinite": self.nonfinite, "first_zero": self.first_zero, "last_zero": self.last_zero,
            "first_loss": self.first_loss, "last_loss": self.last_loss, "best_loss": self.best_loss,
            "sparse": self.zeros / self.steps if self.steps else 0.0, "first_max": self.first_max,
            "tail_gain": values[-1] - values[-1 - tail] if len(values) > 1 else 0.0,
        }  # fmt: skip


@dataclass(frozen=True)
class Victim:
    """The system whose gradients an attack gets.

    Attributes:
        models: one target, or several sources (then logits are averaged with `weights`; without logits, losses are).
        defense: the defense in front of them, or None.
        mode: how gradients cross the defense.
        eot: gradient draws per step when the defense is stochastic.
    """

    models: tuple[TargetModel, ...]
    defense: Defense | None = None
    mode: Mode = "none"
    eot: int = 1
    weights: tuple[float, ...] = field(default=())

    def check(self) -> None:
        """Raise NotApplicable when a gradient through the defense does not exist."""
        if self.mode == "exact" and self.defense is not None and not self.defense.differentiable:
            raise NotApplicable(
                f"defense '{self.defense.name}' is not differentiable: it has no true gradient (see level bpda)"
            )


def settled(attack: Attack, task: str, shared: bool) -> Attack:
    """The attack with `stop_when_fooled` decided, where its user leaves it open.

    Args:
        attack: from the registry; itself if it has no such parameter, or a set one.
        task: what it attacks; only classes can be wrong as a whole.
        shared: its images will be seen by the pipeline that it attacks, with the same draws, and by no other.
    """
    if attack.params.get("stop_when_fooled", False) is not None:
        return attack

    def made(stop: bool) -> Attack:
        out: Attack = ATTACKS.create(attack.name, {**attack.params, "stop_when_fooled": stop})
        return out

    stops = made(True)
    return stops if shared and (stops.tasks is None or task in stops.tasks) else made(False)


class ModelOracle:
    """The Oracle of `bench.protocols` over a Victim, bound to the images of one batch.

    Args:
        victim: what is behind it.
        attack: its `needs` limit what may be called.
        rng: one stream per image, for the defense's draws and for losses that sample.
        traces: per-image records, shared with views made by `select`.
    """

    def __init__(
        self,
        victim: Victim,
        attack: Attack,
        rng: ImageRNG,
        traces: Sequence[Trace] | None = None,
        calls: int = 0,
    ) -> None:
        self.victim = victim
        self.attack = attack
        self.num_classes = victim.models[0].num_classes
        self.traces = list(traces) if traces is not None else [Trace() for _ in range(len(rng))]
        self._rng = rng
        self._calls = calls
        self._draw: ImageRNG | None = None

    def __len__(self) -> int:
        return len(self._rng)

    @property
    def stochastic(self) -> bool:
        """A defense stands in the way and draws random numbers, anew in each draw of each call."""
        defense = self.victim.defense
        return defense is not None and self.victim.mode != "none" and defense.stochastic

    def select(self, index: Sequence[int] | Tensor) -> ModelOracle:
        """The oracle for some of its images."""
        chosen = [int(i) for i in index]
        traces = [self.traces[i] for i in chosen]
        # fork() depends on seeds alone, so a view made of seeds draws what the whole would have drawn.
        rng = ImageRNG([self._rng.seeds[i] for i in chosen])
        view = ModelOracle(self.victim, self.attack, rng, traces, self._calls)
        if self._draw is not None:
            # Made inside an objective: the view belongs to the EOT draw in progress.
            view._draw = ImageRNG([self._draw.seeds[i] for i in chosen])
        return view

    # -- queries --------------------------------------------------------------------------------------------------
    def gradient(self, images: Tensor, objective: Objective) -> Gradient:
        """Value (B,) and gradient of `objective`, averaged over EOT draws where the defense is stochastic."""
        self._allow("gradient")
        call = self._next_call()
        value = torch.zeros(len(images), device=images.device)
        grad: Tensor | None = None
        for draw in range(self._draws):
            with self._drawing(call, draw), torch.enable_grad():
                # Of the same memory: nothing writes into it (autograd refuses to, and `purify` looks).
                x = images.detach().requires_grad_(True)
                values = _per_image(objective(self, x), images)
                # A sum: each image's gradient is its own, whatever the batch.
                (g,) = torch.autograd.grad(values.sum(), x, allow_unused=True)
            value += values.detach().float() / self._draws
            if g is not None:
                part = g / self._draws if self._draws > 1 else g
                grad = part if grad is None else grad + part
            for trace in self.traces:
                trace.backwards += 1
        if grad is None:
            grad = torch.zeros_like(images)
        flat = grad.flatten(1)
        # A finite sum has finite terms: the pass over every entry is for the images where it is not.
        finite = flat.sum(1).isfinite()
        if not finite.all():
            finite = torch.isfinite(flat).all(1)
        zero = ((flat == 0).sum(1) / flat.shape[1]).tolist()
        largest = flat.abs().amax(1).tolist() if any(not t.steps for t in self.traces) else [0.0] * len(flat)
        for trace, v, z, f, m in zip(
            self.traces, value.tolist(), zero, finite.tolist(), largest, strict=True
        ):
            trace.add(v, z, f, m)
        return Gradient(value, grad)

    def value(self, images: Tensor, objective: Objective) -> Tensor:
        """Value (B,) of `objective`, averaged as `gradient` does, for the price of the forward pass."""
        call = self._next_call()
        value = torch.zeros(len(images), device=images.device)
        for draw in range(self._draws):
            with self._drawing(call, draw), torch.no_grad():
                value += _per_image(objective(self, images), images).float() / self._draws
        return value

    def loss(self, images: Tensor | Warped, targets: Sequence[Any], kind: str) -> Tensor:
        """The victim's loss (B,), differentiable to the pixels."""
        self._allow("gradient", "logits")
        defended, geometry, rng = self._defended(images)
        models = self.victim.models
        if len(models) == 1:
            return models[0].loss(defended, targets, kind, geometry=geometry, rng=rng.fork("loss"))
        try:
            logits = self._mean_logits(defended, geometry)
        except NotImplementedError:
            losses = [
                m.loss(defended, targets, kind, geometry=geometry, rng=rng.fork("loss")) for m in models
            ]
            return torch.stack([w * x for w, x in zip(self._weights(), losses, strict=True)]).sum(0)
        return models[0].loss_from_logits(logits, targets, kind)

    def logits(self, images: Tensor | Warped) -> Tensor:
        """The victim's logits (averaged over several models), differentiable."""
        self._allow("logits")
        defended, geometry, _ = self._defended(images)
        return self._mean_logits(defended, geometry)

    def features(self, images: Tensor, layer: str) -> Tensor:
        """Activations of the first model, differentiable."""
        self._allow("features")
        defended, _, _ = self._defended(images)
        return self.victim.models[0].features(defended, layer)

    def decision(self, images: Tensor) -> list[Any]:
        """Predictions of the first model behind the defense."""
        self._allow("decision", "logits")
        with torch.no_grad():
            defended, geometry, _ = self._defended(images)
            return self.victim.models[0].predict(defended, geometry=geometry)

    # -- inside ---------------------------------------------------------------------------------------------------
    def _allow(self, *needs: str) -> None:
        if not self.attack.needs.intersection(needs):
            raise PermissionError(
                f"attack '{self.attack.name}' asked for {' or '.join(needs)} "
                f"but declares needs = {sorted(self.attack.needs)}"
            )

    @property
    def _draws(self) -> int:
        """Over how many draws of the defense an objective is averaged."""
        stochastic = self.victim.defense is not None and self.victim.defense.stochastic
        return self.victim.eot if stochastic else 1

    @contextmanager
    def _drawing(self, call: int, draw: int) -> Iterator[None]:
        """Passes inside belong to one EOT draw."""
        self._draw = self._rng.fork("draw", call, draw)
        try:
            yield
        finally:
            self._draw = None

    def _next_call(self) -> int:
        self._calls += 1
        return self._calls

    def _weights(self) -> Sequence[float]:
        count = len(self.victim.models)
        return self.victim.weights or [1.0 / count] * count

    def _mean_logits(self, images: Tensor, geometry: Geometry) -> Tensor:
        models = self.victim.models
        if len(models) == 1:
            return models[0].logits(images, geometry=geometry)
        outputs = [
            w * m.logits(images, geometry=geometry) for w, m in zip(self._weights(), models, strict=True)
        ]
        return torch.stack(outputs).sum(0)

    def _defended(self, images: Tensor | Warped) -> tuple[Tensor, Geometry, ImageRNG]:
        """Images behind the defense, how they moved, and the streams of this draw."""
        rng = self._draw if self._draw is not None else self._rng.fork("call", self._next_call())
        pixels = images.images if isinstance(images, Warped) else images
        if len(pixels) != len(self):
            raise ValueError(f"the oracle is bound to {len(self)} images, got {len(pixels)}; use select()")
        geometry = images.geometry if isinstance(images, Warped) else identity_geometry(pixels)
        for trace in self.traces:
            trace.forwards += len(self.victim.models)
        defense = self.victim.defense
        if defense is None or self.victim.mode == "none":
            return pixels, geometry, rng
        draws = rng.fork("defense")
        out = bpda(defense, pixels, draws) if self.victim.mode == "bpda" else defense.purify(pixels, draws)
        return out.images, geometry.then(out.geometry), rng


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    """What an objective returned, if it is one value per image."""
    if values.shape != (len(images),):
        raise ValueError(f"an objective must return one value per image, got shape {tuple(values.shape)}")
    return values
