"""From names to a trained checkpoint: which recipe, on which data, for which target, and how good it became.

A training is named by recipe, profile, role and seed, and keyed by its content: a checkpoint found by name counts only
if its key is the one its recipe, data and target have now.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bench.errors import DataError, GridError, NotApplicable, PluginError, unknown
from bench.grid import Profile, TrainingSettings, load_profile, split_spec
from bench.keys import content_key
from bench.plan import task_instance
from bench.protocols import Attack, Batch, Dataset, Defense, ImageRNG, ModelSource, Sample, TargetModel
from bench.registry import ATTACKS, DATASETS, DEFENSES, METRICS, MODELS, TASKS
from bench.rng import derive_seed
from bench.threat import settled
from bench.weights import read_meta
from defenses._learned import SHIPPED
from defenses.training.adversary import Adversary, AttackAdversary, attacks_identity
from defenses.training.guide import whole_batches
from defenses.training.loop import Loop, Progress, Scalars, Trainer
from defenses.training.objectives import objective
from defenses.training.recipe import RECIPES, Recipe, recipe
from tasks.microbatch import one_thread

Precision = Literal["float32", "bfloat16", "float16"]

_MERGED = ("network_args", "objective_args", "critic_args")


@dataclass(frozen=True)
class Training:
    """One checkpoint to make.

    Attributes:
        recipe_name, recipe: what is trained, at the profile's size.
        profile, role, seed: for what; the rest of the name.
        source: the target model.
        data: training images.
        images: how many of them.
        settings: where the numbers come from.
    """

    recipe_name: str
    recipe: Recipe
    profile: Profile
    role: str
    source: ModelSource
    data: Dataset
    images: int
    settings: TrainingSettings

    @property
    def name(self) -> str:
        """Name of the checkpoint, without suffix."""
        seed = f"-s{self.recipe.seed}" if self.recipe.seed else ""
        return f"{self.recipe_name}-{self.profile.name}-{self.role}{seed}"

    @property
    def command(self) -> str:
        """What makes it."""
        own = f" --recipe {self.recipe_name}" if self.recipe_name != self.recipe.defense else ""
        seed = f" --seed {self.recipe.seed}" if self.recipe.seed else ""
        return (
            f"python -m bench train --defense {self.recipe.defense}{own} --role {self.role} "
            f"--profile {self.profile.name}{seed}"
        )

    @functools.cached_property
    def attacks(self) -> list[tuple[Attack, float]]:
        """The training adversaries with their weights.

        Raises:
            BenchError: an attack the recipe names is unknown, has wrong parameters, is not for the target's task or
                needs labels that the images do not have.
        """
        out = []
        losses = TASKS.resolve(self.source.task).losses
        for spec in self.recipe.attacks:
            where = f"recipe {self.recipe_name}, attacks"
            attack = ATTACKS.create(str(spec["name"]), dict(spec.get("params", {})), where)
            if attack.tasks is not None and self.source.task not in attack.tasks:
                raise PluginError(f"{where}: attack '{attack.name}' cannot attack {self.source.task}")
            if not self.data.labelled and _asks_labels(attack):
                other = ", or give it `labels: predicted`" if "labels" in attack.params else ""
                raise PluginError(
                    f"{where}: attack '{attack.name}' needs labels, which dataset {self.data.name} does not have; "
                    f"expected one without, such as ssp{other}"
                )
            for kind in attack.loss_kinds():
                if kind not in losses:
                    raise PluginError(
                        f"{where}: attack '{attack.name}': "
                        + unknown(f"loss of task {self.source.task}", kind, losses)
                    )
            # What is trained sees the images, too.
            attack = settled(attack, self.source.task, shared=False)
            out.append((attack, float(spec.get("weight", 1.0))))
        return out

    @functools.cached_property
    def payload(self) -> dict[str, Any]:
        """Everything the weights are a function of.

        Raises:
            BenchError: as `attacks`, or labels are needed that the images do not have.
        """
        losses = objective(self.recipe.objective, dict(self.recipe.objective_args))
        if losses.labelled and not self.data.labelled:
            raise PluginError(
                f"recipe {self.recipe_name}: its loss needs labels, which dataset {self.data.name} does not have"
            )
        seen = bool(self.attacks) or losses.guided
        # Files by digest, not by path.
        recipe = self.recipe.but(objective_args={**self.recipe.objective_args, **losses.files()})
        return recipe.payload(
            self.source.identity() if seen else None,
            {
                "task": self.source.task,
                "dataset": self.data.name,
                "fingerprint": self.data.fingerprint(),
                "input": self.source.input_spec() if self.settings.resize else {},
                "images": self.images,
                **({} if self.settings.crop is None else {"crop": self.settings.crop}),
                # Left out where it is false, as before it existed: those checkpoints stay valid.
                **({"crop_anew": True} if self.settings.crop_anew else {}),
            },
            attacks_identity(self.attacks, self.recipe.static) if self.attacks else None,
        )

    @functools.cached_property
    def key(self) -> str:
        """SHA-256 of the payload."""
        return content_key(self.payload)

    def find(self, folders: Sequence[Path]) -> tuple[Path | None, str]:
        """The checkpoint, and why there is none.

        Args:
            folders: looked through in order, then the shipped ones.
        """
        reason = "there is none"
        for folder in (*folders, SHIPPED):
            path = folder / f"{self.name}.safetensors"
            if not path.is_file():
                continue
            if read_meta(path).get("key") == self.key:
                return path, ""
            reason = f"{path} was made by another recipe, from other data or for other target weights"
        return None, reason

    def samples(self, target: TargetModel) -> Prepared:
        """The training images as `target` sees them, or as they are where the profile says so."""
        settings = self.settings
        return Prepared(
            self.data,
            target if settings.resize else None,
            self.images,
            settings.crop,
            self.recipe.seed if settings.crop_anew else None,
        )

    # -- doing it ---------------------------------------------------------------------------------------------------
    def trainer(
        self,
        target: TargetModel,
        state: Path | None,
        device: torch.device,
        precision: Precision = "float32",
    ) -> Trainer:
        """The loop, ready to start or to go on from `state`; what a static adversary makes is kept beside its folder.

        Raises:
            BenchError: the recipe does not fit the data or the target.
        """
        cache = None
        if state is not None and self.recipe.static and self.attacks:
            shared = content_key(
                {k: v for k, v in self.payload.items() if k in ("target", "data", "adversary")}
            )
            cache = (state.parent.parent / f"adversarial-{shared[:16]}.safetensors", shared)
        return Trainer(
            self.recipe,
            self.samples(target),
            self.adversary(target),
            target,
            key=self.key,
            state=state,
            cache=cache,
            save_every=200,
            device=device,
            precision=precision,
        )

    def adversary(self, target: TargetModel, static: bool | None = None) -> Adversary | None:
        """What makes the adversarial images, None where the recipe takes none."""
        if not self.attacks:
            return None
        return AttackAdversary(self.attacks, target, static=self.recipe.static if static is None else static)

    def estimate(self, device: torch.device) -> float:
        """Seconds the whole training will take, from a few steps that are thrown away."""
        target = load_target(self.source, device)
        trainer = self.trainer(target, None, device)
        trainer.adversary = Clean()
        trainer.run(until=1)
        began = time.perf_counter()
        trainer.run(until=min(3, trainer.total))
        step = (time.perf_counter() - began) / max(min(3, trainer.total) - 1, 1)
        adversary = self.adversary(target, static=False)
        if adversary is None:
            return step * trainer.total
        samples = self.samples(target)
        batch = Batch.of([samples[i] for i in range(min(self.recipe.batch, self.images))]).to(device)
        began = time.perf_counter()
        adversary(batch, "estimate")
        attack = (time.perf_counter() - began) / len(batch)
        attacked = self.images if self.recipe.static else trainer.total * self.recipe.batch
        return step * trainer.total + attack * attacked


def _asks_labels(attack: Attack) -> bool:
    """It follows the label it is given: not noise, features, or the target's own prediction."""
    return attack.labelled and bool(attack.needs) and attack.params.get("labels") != "predicted"


class Clean:
    """No adversary: the clean images."""

    def __call__(self, batch: Batch, draw: object) -> torch.Tensor:
        """The images as they are."""
        return batch.images

    def identity(self) -> Any:
        """Nothing."""
        return None

    def prepare(self, batches: Any, cache: Path | None, key: str) -> None:
        """Nothing."""


class Prepared:
    """The first images of a dataset as the target sees them, kept in memory while they are few.

    Args:
        data: the dataset.
        target: prepares each sample; None = they are taken as they are.
        count: how many.
        crop: side of the square that is cut from each; None = all of it.
        seed: of places of the squares that are drawn anew in every epoch; None = each image has one, whatever the seed.
        keep: bytes of pixels to keep at most.
    """

    def __init__(
        self,
        data: Dataset,
        target: TargetModel | None,
        count: int,
        crop: int | None = None,
        seed: int | None = None,
        keep: int = 2 << 30,
    ) -> None:
        self.data, self.target, self.count, self.crop, self.seed = data, target, count, crop, seed
        self._kept: dict[int, Sample] = {}
        self._left = keep

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Sample:
        return self.shown(index, 0)

    def shown(self, index: int, epoch: int) -> Sample:
        """Image `index` as it is in `epoch`: another square of it in each, where there is a seed.

        Raises:
            DataError: it cannot be read, or no such square fits.
        """
        sample = self._whole(index)
        if self.crop is None or self.seed is None:
            return sample
        return cropped(sample, self.crop, (self.seed, epoch))

    def _whole(self, index: int) -> Sample:
        """What is the same in all epochs."""
        known = self._kept.get(index)
        if known is not None:
            return known
        sample = self.data[index]
        if self.target is not None:
            sample = self.target.prepare(sample)
        if self.crop is not None and self.seed is None:
            sample = cropped(sample, self.crop)
        size = sample.image.numel() * sample.image.element_size()
        if size <= self._left:
            self._left -= size
            self._kept[index] = sample
        return sample


def cropped(sample: Sample, side: int, draw: tuple[object, ...] = ()) -> Sample:
    """A square of an image and of its label map, at a place that the image's id and `draw` decide.

    Args:
        sample: image (3, H, W) with a label, or a label map (H, W).
        side: of the square, in pixels.
        draw: what else names the random numbers; () = the place is the image's own for good.

    Raises:
        DataError: the image is smaller, or its ground truth is objects.
    """
    height, width = int(sample.image.shape[-2]), int(sample.image.shape[-1])
    if min(height, width) < side:
        raise DataError(
            f"training.crop: image {sample.id} is {height}x{width} pixels, a crop of {side} does not fit"
        )
    # Static adversaries are kept by image and shared between recipes: there the place has neither epoch nor seed.
    y = derive_seed("crop y", *draw, sample.id) % (height - side + 1)
    x = derive_seed("crop x", *draw, sample.id) % (width - side + 1)
    target = sample.target
    if isinstance(target, Tensor) and target.ndim == 2:
        target = target[y : y + side, x : x + side]
    elif not isinstance(target, int):
        raise DataError(
            f"training.crop: ground truth of image {sample.id} is {type(target).__name__}; only labels and label maps "
            "can be cropped"
        )
    return Sample(sample.image[:, y : y + side, x : x + side].clone(), target, sample.id)


@functools.lru_cache(maxsize=2)
def load_target(source: ModelSource, device: torch.device) -> TargetModel:
    """The frozen target; the last two stay loaded."""
    return source.load(device)


def plan_training(profile: str, role: str, recipe_name: str, seed: int = 0) -> Training:
    """What makes the checkpoint of these names.

    Args:
        profile: name or path.
        role: a role of the profile.
        recipe_name: a name of `defenses.training.recipe.RECIPES`.
        seed: of weights, order and attacks.

    Raises:
        NotApplicable: the recipe cannot be trained for targets of this task.
        BenchError: an unknown name, a wrong value in the profile's `training`, or data that is missing.
    """
    return _plan_training(profile, role, recipe_name, seed)


@functools.lru_cache(maxsize=512)
def _plan_training(profile_name: str, role: str, recipe_name: str, seed: int) -> Training:
    profile, source = load_profile(profile_name)
    if role not in profile.roles:
        raise GridError(f"{source}: {unknown('role', role, profile.roles)}")
    binding = profile.roles[role]
    at = f"{source}, roles.{role}"
    name, params, _ = split_spec(binding.model, f"{at}.model")
    model: ModelSource = MODELS.create(name, params, f"{at}.model")
    role = _shared(profile, role, model.task)
    where, settings = _settings(profile, role, model.task)
    data = _dataset(profile, role, settings.dataset, f"{source}, training.{where}.dataset")
    sized = _sized(recipe(recipe_name), recipe_name, settings, f"{source}, training.{where}.recipes")
    if sized.tasks is not None and model.task not in sized.tasks:
        raise NotApplicable(
            f"recipe '{recipe_name}' trains for {', '.join(sized.tasks)}, not for {model.task}"
        )
    if settings.crop_anew and sized.static and sized.attacks:
        raise GridError(
            f"{source}, training.{where}.crop_anew: true, but recipe '{recipe_name}' attacks each image once and keeps "
            f"the result (static: true); expected `static: false` in training.{where}.recipes"
        )
    try:
        there = len(data)
    except DataError as error:
        raise DataError(f"{source}, training.{where}.dataset: {error}") from None
    images = there if settings.images is None else settings.images
    if images > there:
        raise GridError(
            f"{source}, training.{where}.images: {images} images asked for, {data.name} has {there}"
        )
    return Training(recipe_name, sized.but(seed=seed), profile, role, model, data, images, settings)


@functools.lru_cache(maxsize=512)
def training_role(profile: str, role: str, task: str) -> str:
    """The role of a profile (by name or path) under which checkpoints for `role` are kept.

    Raises:
        GridError: no such profile, or a mistake in it.
    """
    return _shared(load_profile(profile)[0], role, task)


def _shared(profile: Profile, role: str, task: str) -> str:
    """The first role with the same model and training images as `role`: they have their checkpoints in common."""

    def learned_from(name: str) -> Any:
        data, params, _ = split_spec(profile.roles[name].dataset, f"roles.{name}.dataset")
        settings = _settings(profile, name, task)[1]
        return {"name": data, **params, **settings.dataset}, settings

    model, wanted = profile.roles[role].model, learned_from(role)
    return next(r for r, b in profile.roles.items() if b.model == model and learned_from(r) == wanted)


def _settings(profile: Profile, role: str, task: str) -> tuple[str, TrainingSettings]:
    for name in (role, task):
        if name in profile.training:
            return name, profile.training[name]
    return task, TrainingSettings()


def _dataset(profile: Profile, role: str, changes: Mapping[str, Any], where: str) -> Dataset:
    name, params, _ = split_spec(profile.roles[role].dataset, where)
    chosen = dict(changes)
    name = str(chosen.pop("name", name))
    dataset: Dataset = DATASETS.create(name, {**params, **chosen}, where)
    return dataset


def _sized(base: Recipe, name: str, settings: TrainingSettings, where: str) -> Recipe:
    """`base` with the profile's values for its defense, then for itself; arguments are merged, not replaced."""
    for key in settings.recipes:
        if key not in RECIPES and key not in {r.defense for r in RECIPES.values()}:
            raise GridError(f"{where}: {unknown('recipe or defense', key, RECIPES)}")
    sized, family = base, RECIPES.get(base.defense, base)
    for key in dict.fromkeys((base.defense, name)):
        changes = dict(settings.recipes.get(key, {}))
        if key != name:
            # What fits the defense's usual network means nothing to another one.
            for field, own in (("network", "network_args"), ("critic", "critic_args")):
                if getattr(base, field) != getattr(family, field):
                    changes.pop(own, None)
        for field in _MERGED:
            if field in changes:
                changes[field] = {**getattr(sized, field), **changes[field]}
        for field in ("betas", "milestones", "attacks"):
            if field in changes:
                changes[field] = tuple(changes[field])
        try:
            sized = sized.but(**changes)
        except (PluginError, TypeError) as error:
            raise GridError(f"{where}.{key}: {error}") from None
    return sized


# -- a whole training ------------------------------------------------------------------------------------------------
def train(
    training: Training,
    folder: Path,
    out: Path,
    *,
    device: torch.device,
    precision: Precision = "float32",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train, write the checkpoint with its scores, and the curves; goes on where an interrupted run stopped.

    Args:
        training: what.
        folder: the training's own folder: state, curves (PNG, JSON lines), TensorBoard scalars.
        out: folder for the checkpoint.
        device, precision: where and in what numbers.
        progress: told about every step.

    Returns:
        The checkpoint's metadata.

    Raises:
        BenchError: the training cannot start or diverged.
    """
    with steady(device):
        target = load_target(training.source, device)
        trainer = training.trainer(target, folder / "state.safetensors", device, precision)
        seconds = run_recorded(trainer, folder, progress)
        meta = {
            "recipe": training.recipe_name,
            "profile": training.profile.name,
            "role": training.role,
            "seed": training.recipe.seed,
            "rebuild": training.command,
            "seconds": seconds,
            "payload": training.payload,
            "chosen": dict(trainer.objective.chosen),
        }
        # What is scored is what is written, rounding included; it is found by others only once it is complete.
        draft = folder / "unscored.safetensors"
        trainer.write(draft, meta=meta)
        path = out / f"{training.name}.safetensors"
        trainer.write(path, meta={**meta, "scores": score(training, draft, device)})
        draft.unlink()
        (folder / "state.safetensors").unlink(missing_ok=True)
    return read_meta(path)


def steady(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """One CPU thread, so that sums are made in the same order whatever the machine's core count; on a GPU nothing."""
    return one_thread() if device.type == "cpu" else contextlib.nullcontext()


def run_recorded(loop: Loop, folder: Path, progress: Progress | None) -> int:
    """Run a training to its end and write its curves (PNG, JSON lines, TensorBoard scalars) into `folder`.

    Returns:
        Seconds it took, interrupted runs included.
    """
    from defenses.training.loop import plot, write_history

    scalars, close = _tensorboard(folder / "tensorboard", loop.step)
    began, before = time.perf_counter(), loop.seconds
    try:
        history = loop.run(progress, scalars=scalars)
    finally:
        close()
    plot(history, folder / "curves.png")
    write_history(history, folder / "history.jsonl")
    return round(before + time.perf_counter() - began)


def score(training: Training, checkpoint: Path, device: torch.device) -> dict[str, float]:
    """Main metric of the target on unseen images: clean and attacked, without and with the defense.

    The attack is oblivious: it sees the bare target. {} where the profile's `training` names no score.
    """
    settings = training.settings.score
    if settings is None:
        return {}
    where = f"profile {training.profile.name}, training.score"
    data = _dataset(training.profile, training.role, settings.dataset, f"{where}.dataset")
    name, params, _ = split_spec(settings.attack, f"{where}.attack")
    attack: Attack = ATTACKS.create(name, params, f"{where}.attack")
    defense: Defense = DEFENSES.create(training.recipe.defense, {"weights": str(checkpoint)})
    defense.eval().requires_grad_(False).to(device)
    target = load_target(training.source, device)
    adversary = AttackAdversary([(attack, 1.0)], target)
    task = task_instance(training.source.task)
    metric = METRICS.create(task.metrics[0])
    rows: dict[str, list[Any]] = {"clean": [], "attacked": [], "clean_defended": [], "attacked_defended": []}
    count = min(settings.images, len(data))
    size = task.batch_size
    for first in range(0, count, size):
        batch = Batch.of([target.prepare(data[i]) for i in range(first, min(first + size, count))]).to(device)
        attacked = adversary(batch, "score")
        for kind, images in (("clean", batch.images), ("attacked", attacked)):
            rng = ImageRNG.for_images(("score", kind), batch.ids)
            with torch.no_grad(), whole_batches(target, len(batch)):
                purified = defense.purify(images, rng)
                found = {
                    kind: target.predict(images),
                    f"{kind}_defended": target.predict(purified.images, geometry=purified.geometry),
                }
            for column, predictions in found.items():
                rows[column] += [task.rows(p, t) for p, t in zip(predictions, batch.targets, strict=True)]
    values = {column: round(float(metric.value(metric.prepare(r))), 4) for column, r in rows.items()}
    return {f"{task.metrics[0]}_{column}": value for column, value in values.items()}


def _tensorboard(folder: Path, step: int) -> tuple[Scalars, Any]:
    from torch.utils.tensorboard import SummaryWriter

    # Steps after the saved state are repeated by a resumed run; `purge_step` hides the first try.
    writer = SummaryWriter(str(folder), purge_step=step or None)

    def scalars(done: int, terms: Mapping[str, float]) -> None:
        for name, value in terms.items():
            writer.add_scalar(f"loss/{name}", value, done)

    return scalars, writer.close


__all__ = ["Training", "load_target", "plan_training", "run_recorded", "score", "steady", "train"]
