"""The one training loop: deterministic by seed, resumable at any step, stops when it diverges.

Everything random is a function of (seed, epoch, step, image id), so a resumed run needs no generator states: it goes
on with the same orders, attacks and flips, and ends with the same weights as one that was never interrupted.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bench.errors import BenchError, DataError, PluginError, WeightsError
from bench.protocols import Batch, Sample, TargetModel
from bench.rng import derive_seed
from bench.weights import apply_state, load_state, save_safetensors
from defenses._learned import mean_std
from defenses.training.adversary import Adversary
from defenses.training.guide import Guide, whole_batches
from defenses.training.objectives import Step, objective
from defenses.training.recipe import Recipe

logger = logging.getLogger(__name__)

STATE_VERSION = 2
PREPARED = 64
"""Images per call of a static adversary."""


class TrainingDiverged(BenchError):
    """A loss term or a gradient is not finite; the message names the step, the term and the last good state."""


class Samples(Protocol):
    """Training images: a list of samples, or a dataset that makes them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


@runtime_checkable
class ShownAnew(Samples, Protocol):
    """Training images that an epoch may show otherwise than the one before, under the same ids and in one size."""

    def shown(self, index: int, epoch: int) -> Sample:
        """Image `index` as `epoch` (from 0) has it: a function of both, so that a resumed run sees the same."""
        ...


Progress = Callable[[int, int, str], None]
Scalars = Callable[[int, Mapping[str, float]], None]


@dataclass
class History:
    """Mean of every loss term in every epoch."""

    epochs: list[dict[str, float]] = field(default_factory=list)

    def last(self) -> str:
        """The newest epoch in a few words."""
        return ", ".join(f"{name} {value:.4g}" for name, value in (self.epochs or [{}])[-1].items())


class Loop:
    """What all trainings have in common: order, optimisers, number types, divergence, history, resuming.

    A subclass makes its networks, hands them to `_begin`, and says what a step does (`_train_step`).

    Args:
        name: what is trained, for messages.
        samples: training images of one size; those of `ShownAnew` may differ from epoch to epoch.
        key: of everything the weights are a function of; part of the state, so that the state of another training is
            never resumed.
        seed, epochs, batch: of the order, and length.
        state: file that holds everything needed to go on; it is replaced as a whole. None = not resumable.
        save_every: steps between states; the end of an epoch always saves.
        device: where the networks run.
        precision: `float32`; `bfloat16` or `float16` (on a GPU, losses scaled) for the forward passes (autocast).

    Attributes:
        step, total: steps done, and in all.
        seconds: time it took up to the newest state, interrupted runs included.

    Raises:
        BenchError: no images, or a precision the device lacks.
    """

    def __init__(
        self,
        name: str,
        samples: Samples,
        *,
        key: str,
        seed: int,
        epochs: int,
        batch: int,
        state: Path | None = None,
        save_every: int | None = None,
        device: torch.device | str = "cpu",
        precision: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        if len(samples) < 1:
            raise DataError(f"training of {name}: there are no training images")
        self.name, self.samples, self.key = name, samples, key
        self.seed, self.batch = seed, batch
        self.state_file, self.save_every = state, save_every
        self.device, self.precision = torch.device(device), precision
        if precision == "float16" and self.device.type != "cuda":
            raise PluginError(f"precision float16 needs a GPU, not {self.device}; bfloat16 works everywhere")
        # A last batch of one image has no batch statistics worth the name; it is left out, but for tiny data.
        self.per_epoch = max(len(samples) // batch, 1)
        self.total = self.per_epoch * epochs
        self.step = 0
        self.seconds = 0.0
        self._began = time.perf_counter()
        self.history = History()
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._order: tuple[int, list[int]] = (-1, [])
        self.saved_step = 0

    def _begin(self, trained: Mapping[str, nn.Module], kept: Mapping[str, nn.Module] | None = None) -> None:
        """Optimisers of the `trained` modules; go on from the state, if there is one, that of `kept` modules too."""
        self._trained, self._kept = dict(trained), dict(kept or {})
        self.optimizers = {name: self._optimizer(module) for name, module in self._trained.items()}
        # float16 gradients underflow without it; disabled it does nothing.
        self.scalers = {name: GradScaler(enabled=self.precision == "float16") for name in self.optimizers}
        if self.state_file is not None and self.state_file.exists():
            self._resume(self.state_file)

    # -- what a subclass says -----------------------------------------------------------------------------------------
    def _optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        raise NotImplementedError

    def _learning_rate(self, epoch: int, part: float) -> float:
        """Learning rate in `epoch` (from 0), `part` of it done."""
        raise NotImplementedError

    def _train_step(self, epoch: int, index: int) -> dict[str, float]:
        """Train on batch `index` of `epoch`; the value of every loss term."""
        raise NotImplementedError

    def _session(self, progress: Progress | None) -> AbstractContextManager[None]:
        """Entered while steps are made; what has to be ready before the first is made ready here."""
        return nullcontext()

    def _extra(self) -> dict[str, Tensor]:
        """Further tensors of the state."""
        return {}

    def _take(self, extra: Mapping[str, Tensor]) -> None:
        """Put back what `_extra` gave."""

    # -- what callers use -------------------------------------------------------------------------------------------
    def run(
        self, progress: Progress | None = None, until: int | None = None, scalars: Scalars | None = None
    ) -> History:
        """Train to the end, or to step `until`.

        Args:
            progress: called after every step with (steps done, steps in all, note).
            until: stop after this many steps; the state is saved.
            scalars: called after every step with (steps done, weighted loss terms).

        Raises:
            TrainingDiverged: a loss term or gradient is not finite; the last good state stays on disk.
        """
        end = self.total if until is None else min(until, self.total)
        self._began = time.perf_counter()
        with self._session(progress) if self.step < end else nullcontext():
            while self.step < end:
                epoch, index = divmod(self.step, self.per_epoch)
                self._prepare_epoch(epoch, index)
                terms = self._train_step(epoch, index)
                for name, value in terms.items():
                    self._sums[name] = self._sums.get(name, 0.0) + value
                    self._counts[name] = self._counts.get(name, 0) + 1
                self.step += 1
                if scalars is not None:
                    scalars(self.step, terms)
                if self.step % self.per_epoch == 0:
                    self.history.epochs.append({n: v / self._counts[n] for n, v in self._sums.items()})
                    self._sums, self._counts = {}, {}
                    self.save()
                elif self.save_every and self.step % self.save_every == 0:
                    self.save()
                if progress is not None:
                    progress(self.step, self.total, self.history.last())
        if self.step != self.saved_step:
            self.save()
        return self.history

    def _descend(self, name: str, module: nn.Module, terms: dict[str, Tensor]) -> dict[str, float]:
        values = {term: float(value.detach()) for term, value in terms.items()}
        for term, value in values.items():
            if not math.isfinite(value):
                self._diverged(f"loss term '{term}' is {value}")
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        total = torch.stack([value.float() for value in terms.values()]).sum()
        if not total.requires_grad:
            raise PluginError(f"training of {self.name}: none of its loss terms trains the {name}")
        scaler = self.scalers[name]
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        norms = [p.grad.norm() for p in module.parameters() if p.grad is not None]
        # A scaled step that overflows is left out, and the scale lowered: that is how the scale is found.
        overflow_is_fatal = not scaler.is_enabled() or scaler.get_scale() < 1.0
        if not norms or (overflow_is_fatal and not torch.isfinite(torch.stack(norms)).all()):
            largest = max(values, key=lambda term: abs(values[term]))
            self._diverged(
                f"the gradient of the {name} is not finite; "
                f"its largest loss term is '{largest}' = {values[largest]:.4g}"
            )
        scaler.step(optimizer)
        scaler.update()
        return values

    def _diverged(self, what: str) -> None:
        epoch = self.step // self.per_epoch
        kept = "no state was saved before it"
        if self.state_file is not None and self.saved_step:
            kept = f"the last good state, after step {self.saved_step}, is in {self.state_file}"
        raise TrainingDiverged(
            f"training of {self.name} diverged at step {self.step + 1} (epoch {epoch + 1}): {what}; {kept}"
        )

    def _autocast(self) -> Any:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.precision))

    # -- data -------------------------------------------------------------------------------------------------------
    def _batch(self, epoch: int, index: int) -> Batch:
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed("order", self.seed, epoch))
            self._order = (epoch, torch.randperm(len(self.samples), generator=generator).tolist())
        size = self.batch
        places = self._order[1][index * size : (index + 1) * size]
        if isinstance(self.samples, ShownAnew):
            chosen = [self.samples.shown(i, epoch) for i in places]
        else:
            chosen = [self.samples[i] for i in places]
        if len({tuple(s.image.shape) for s in chosen}) > 1:
            raise DataError(f"training of {self.name}: training images differ in size; they must be equal")
        return Batch.of(chosen).to(self.device)

    # -- optimiser and state ------------------------------------------------------------------------------------------
    def _prepare_epoch(self, epoch: int, index: int) -> None:
        rate = self._learning_rate(epoch, index / self.per_epoch)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate

    def save(self) -> None:
        """Write the state: weights, moments, position, history. All of the file or nothing."""
        self.saved_step = self.step
        self.seconds, self._began = self.seconds + time.perf_counter() - self._began, time.perf_counter()
        if self.state_file is None:
            return
        tensors = {f"extra.{name}": value for name, value in self._extra().items()}
        for which, module in {**self._trained, **self._kept}.items():
            tensors |= {f"{which}.{name}": value for name, value in module.state_dict().items()}
        for which, optimizer in self.optimizers.items():
            for index, moments in optimizer.state_dict()["state"].items():
                prefix = f"{_kind(optimizer)}.{which}.{index}"
                tensors |= {f"{prefix}.{name}": v for name, v in moments.items() if v is not None}
        meta = {
            "version": STATE_VERSION, "key": self.key, "step": self.step,
            "history": self.history.epochs, "sums": self._sums, "counts": self._counts, "seconds": self.seconds,
            "scalers": {name: scaler.state_dict() for name, scaler in self.scalers.items()},
        }  # fmt: skip
        save_safetensors(self.state_file, tensors, meta=meta)

    def _resume(self, path: Path) -> None:
        loaded = load_state(path)
        meta = loaded.meta
        if meta.get("version") != STATE_VERSION or not isinstance(meta.get("step"), int):
            raise WeightsError(f"training state {path} is of another version; delete it to start anew")
        if meta.get("key") != self.key:
            raise WeightsError(
                f"training state {path} belongs to another recipe (key {str(meta.get('key'))[:12]}, "
                f"not {self.key[:12]}); delete it or choose another folder"
            )
        self._take(_under(loaded.state, "extra"))
        for which, module in {**self._trained, **self._kept}.items():
            apply_state(module, _under(loaded.state, which), what=f"training state {path}, {which}")
        for which, optimizer in self.optimizers.items():
            moments: dict[int, dict[str, Tensor]] = {}
            for name, value in _under(loaded.state, f"{_kind(optimizer)}.{which}").items():
                index, moment = name.split(".", 1)
                moments.setdefault(int(index), {})[moment] = value
            optimizer.load_state_dict(
                {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
            )
        self.step = self.saved_step = meta["step"]
        self.history = History([dict(epoch) for epoch in meta["history"]])
        self._sums, self._counts = dict(meta["sums"]), dict(meta["counts"])
        self.seconds = float(meta.get("seconds", 0.0))
        for name, state in meta.get("scalers", {}).items():
            if state:
                self.scalers[name].load_state_dict(state)
        logger.info("training of %s goes on after step %d of %d", self.name, self.step, self.total)


class Trainer(Loop):
    """Trains a purifier after a recipe.

    Args:
        recipe: what to do.
        samples: training images of one size, already prepared for the target.
        adversary: makes their adversarial counterparts; None for a loss that is taken on clean images alone.
        target: the frozen model behind the losses; None when the recipe needs none.
        key: `Recipe.key`; part of the state, so that a state of another recipe is never resumed.
        state: file that holds everything needed to go on; it is replaced as a whole. None = not resumable.
        cache: file for the images of a static adversary, and the key they are checked by; recipes with the same data,
            target and adversary can share it. None = beside the state.
        save_every: steps between states; the end of an epoch always saves.
        device: where the networks run.
        precision: `float32`; `bfloat16` or `float16` (on a GPU, losses scaled) for the forward passes (autocast).

    Raises:
        BenchError: the recipe does not fit the data or the target, or the state belongs to another recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        samples: Samples,
        adversary: Adversary | None,
        target: TargetModel | None,
        *,
        key: str,
        state: Path | None = None,
        cache: tuple[Path, str] | None = None,
        save_every: int | None = None,
        device: torch.device | str = "cpu",
        precision: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        super().__init__(
            recipe.defense, samples, key=key, seed=recipe.seed, epochs=recipe.epochs, batch=recipe.batch, state=state,
            save_every=save_every, device=device, precision=precision,
        )  # fmt: skip
        self.recipe, self.adversary, self.cache = recipe, adversary, cache
        self.objective = objective(recipe.objective, dict(recipe.objective_args))
        if not self.objective.attacked:
            self.adversary = None
        elif adversary is None:
            raise PluginError(f"recipe of {recipe.defense}: its loss needs adversarial images ('attacks')")
        self.guide = None if target is None else Guide(target)
        if self.objective.guided and self.guide is None:
            raise PluginError(f"recipe of {recipe.defense}: its loss needs a target model, none was given")
        if self.objective.adversarial and recipe.critic is None:
            raise PluginError(f"recipe of {recipe.defense}: its loss needs a discriminator ('critic')")
        first = samples[0].image
        self.objective.check(self.guide, first[None].to(self.device))
        size = (int(first.shape[-2]), int(first.shape[-1]))
        network, critic = recipe.build(size, 0 if target is None else target.num_classes)
        self.network = network.to(self.device).train()
        self.critic = (
            critic.to(self.device).train() if critic is not None and self.objective.adversarial else None
        )
        self.mean, self.std = (x.to(self.device) for x in mean_std(recipe.space))
        self.average = (
            AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(self.objective.average))
            if self.objective.average
            else None
        )
        trained = {"network": self.network, "critic": self.critic}
        self._begin(
            {name: module for name, module in trained.items() if module is not None},
            {} if self.average is None else {"average": self.average},
        )

    def write(self, path: Path, *, half: bool = True, meta: dict[str, Any] | None = None) -> str:
        """Write the purifier as a checkpoint a defense reads; half precision unless told otherwise.

        Where the objective averages weights, the average is written.

        Args:
            path: safetensors file.
            half: store matrices and filters as float16.
            meta: more facts: scores, the command, the payload of the key.

        Returns:
            SHA-256 of the file.
        """
        facts = {
            **(meta or {}),
            "defense": self.recipe.defense,
            "network": {"name": self.recipe.network, "args": dict(self.recipe.network_args)},
            "space": self.recipe.space,
            "key": self.key,
            "steps": self.step,
            "precision": self.precision,
            "losses": self.history.epochs[-1] if self.history.epochs else {},
        }
        network = self.network if self.average is None else self.average.module
        return save_safetensors(path, network.state_dict(), meta=facts, half=half)

    @contextmanager
    def _session(self, progress: Progress | None) -> Iterator[None]:
        target = None if self.guide is None else self.guide.target
        cache, cache_key = self.cache or (None, self.key)
        if cache is None and self.state_file is not None:
            cache = self.state_file.with_name(f"{self.state_file.stem}.adversarial.safetensors")
        with whole_batches(target, self.recipe.batch) if target is not None else nullcontext():
            if self.adversary is not None:
                self.adversary.prepare(self._in_order(progress), cache, cache_key)
            yield

    # -- one step ---------------------------------------------------------------------------------------------------
    def _train_step(self, epoch: int, index: int) -> dict[str, float]:
        batch = self._batch(epoch, index)
        adversarial = batch.images
        if self.adversary is not None:
            adversarial = self.adversary(batch, (self.recipe.seed, epoch))
        adversarial = self._mix(batch, adversarial)
        clean, adversarial, targets = self._flip(batch, adversarial)
        step = Step(
            clean, adversarial, targets, self._purify, self._inner, self.guide, self.critic,
            derive_seed(self.recipe.seed, self.step), self.network,
        )  # fmt: skip
        values: dict[str, float] = {}
        if self.objective.critic_first:
            values.update(self._update_critic(step))
        if self.step % self.objective.generator_every == 0:
            for _ in range(self.objective.generator_steps):
                values.update(self._update_network(step))
        if not self.objective.critic_first:
            values.update(self._update_critic(step))
        return values

    def _update_network(self, step: Step) -> dict[str, float]:
        if self.critic is not None:
            self.critic.requires_grad_(False)
        try:
            with self._autocast():
                terms = self.objective.generator(step)
            values = self._descend("network", self.network, terms)
            if self.average is not None:
                self.average.update_parameters(self.network)
            return values
        finally:
            if self.critic is not None:
                self.critic.requires_grad_(True)

    def _update_critic(self, step: Step) -> dict[str, float]:
        if self.critic is None:
            return {}
        with torch.no_grad(), self._autocast():
            purified = self.objective.fakes(step)
        with self._autocast():
            terms = self.objective.critic(step, [x.detach() for x in purified])
        return self._descend("critic", self.critic, terms)

    def _purify(self, images: Tensor) -> Tensor:
        purified: Tensor = self.network(self._inner(images)) * self.std + self.mean
        return purified if not self.recipe.clamp else purified + (purified.clamp(0, 1) - purified).detach()

    def _inner(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    # -- data -------------------------------------------------------------------------------------------------------
    def _in_order(self, progress: Progress | None) -> Iterator[Batch]:
        # Groups of one size for all recipes, so that they can share what a static adversary makes.
        for first in range(0, len(self.samples), PREPARED):
            if progress is not None:
                progress(self.step, self.total, f"adversarial images: {first} of {len(self.samples)}")
            chosen = range(first, min(first + PREPARED, len(self.samples)))
            yield Batch.of([self.samples[i] for i in chosen]).to(self.device)

    def _mix(self, batch: Batch, adversarial: Tensor) -> Tensor:
        """Some images stay clean, where the recipe says so."""
        count = round(self.recipe.clean_share * len(batch))
        return torch.cat([batch.images[:count], adversarial[count:]]) if count else adversarial

    def _flip(self, batch: Batch, adversarial: Tensor) -> tuple[Tensor, Tensor, Sequence[Any]]:
        if not self.recipe.flip:
            return batch.images, adversarial, batch.targets
        if not all(isinstance(t, int) for t in batch.targets):
            raise PluginError(f"recipe of {self.recipe.defense}: flips are for classification")
        draws = [derive_seed("flip", self.recipe.seed, self.step, name) % 2 == 1 for name in batch.ids]
        turned = torch.tensor(draws, device=self.device).view(-1, 1, 1, 1)
        clean = torch.where(turned, batch.images.flip(3), batch.images)
        return clean, torch.where(turned, adversarial.flip(3), adversarial), batch.targets

    # -- optimiser ----------------------------------------------------------------------------------------------------
    def _optimizer(self, module: nn.Module) -> torch.optim.Adam:
        r = self.recipe
        return torch.optim.Adam(
            module.parameters(), r.lr, betas=(r.betas[0], r.betas[1]), weight_decay=r.weight_decay
        )

    def _learning_rate(self, epoch: int, part: float) -> float:
        return self.recipe.learning_rate(epoch, part)

    def _prepare_epoch(self, epoch: int, index: int) -> None:
        if index == 0 and epoch > 0 and self.recipe.reset_moments:
            self.optimizers = {name: self._optimizer(module) for name, module in self._trained.items()}
        super()._prepare_epoch(epoch, index)


def plot(history: History, path: Path) -> None:
    """Draw every loss term over the epochs, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    for name in sorted({name for epoch in history.epochs for name in epoch}):
        axes.plot(
            range(1, len(history.epochs) + 1),
            [epoch.get(name, math.nan) for epoch in history.epochs],
            label=name,
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel("weighted loss term")
    if all(value > 0 for epoch in history.epochs for value in epoch.values()):
        axes.set_yscale("log")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def write_history(history: History, path: Path) -> None:
    """Write the history as JSON lines, one an epoch."""
    lines = [json.dumps({"epoch": i + 1, **epoch}, sort_keys=True) for i, epoch in enumerate(history.epochs)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{prefix}."): value
        for name, value in state.items()
        if name.startswith(f"{prefix}.")
    }


def _kind(optimizer: torch.optim.Optimizer) -> str:
    return type(optimizer).__name__.lower()
