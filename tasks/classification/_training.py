"""Training of target classifiers of the CIFAR kind (`python -m bench train-target`).

The loop is the one that trains the defenses; what is here is what a classifier needs: networks at their published
sizes, SGD with Nesterov momentum, crops and flips, and adversarial training with the opponents of the embedded zoo.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from bench.errors import DataError, GridError, WeightsError, unknown
from bench.grid import split_spec
from bench.keys import content_key
from bench.protocols import Batch, Dataset, Sample
from bench.registry import ATTACKS, DATASETS, MODELS
from bench.rng import derive_seed
from bench.units import parse_fraction
from bench.weights import apply_state, load_state, read_meta, save_safetensors, sha256_file
from defenses.training.adversary import AttackAdversary
from defenses.training.guide import whole_batches
from defenses.training.loop import Loop, Progress, Samples
from defenses.training.session import Precision, Prepared, run_recorded, steady
from tasks.classification import cifar_nets
from tasks.classification.cifar import like_ours
from tasks.classification.model import LogitsClassifier

VERSION = 1
"""Part of every key; raise it when the training makes other weights of the same recipe."""
NORMALISED_BY = 10_000
"""Images that mean and standard deviation are taken from."""
HELD_OUT = 10
"""One image of this many is held out where a dataset has no other split to score on."""
_DIGITS = {*"0123456789", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}

Adversarial = Literal["none", "pgd", "trades", "free", "doa"]
DOA: dict[str, Any] = {"adversary": {"side": 7, "alpha": "0.05", "steps": 30, "batch_norm": "running"}}
"""The square of CAFD's DOA; step and number are those of its authors' code for CIFAR-10."""


@dataclass(frozen=True)
class TargetRecipe:
    """How a target is trained; the defaults are those of Zagoruyko and Komodakis 2016 with a cosine schedule.

    Attributes:
        arch: a name of `cifar_nets.build`.
        epochs, batch_size: length. With `free` each batch is shown eight times: as many epochs are eight times as long.
        lr, momentum, weight_decay: SGD with Nesterov momentum.
        schedule: the learning rate falls to 0 along half a cosine (Loshchilov and Hutter 2017), or at `milestones`.
        milestones, gamma: epochs after which the learning rate is multiplied by gamma (`multistep`).
        padding: black pixels around an image before a crop of its size is taken; 0 = no crops.
        flip: horizontal flips, half of the time.
        normalise: images are centred and scaled by the mean and standard deviation of the training images' channels.
        label_smoothing: probability mass that the other classes share (Szegedy et al. 2016).
        adversarial: `pgd` (Madry et al. 2018), `trades` (Zhang et al. 2019), `free` (Shafahi et al. 2019) or `doa`
            (Wu et al. 2020, see `Occlusion`): as many forward passes a step as a square has places, 676 at 32x32.
        size: images are resized to this many pixels a side, inside the gradient; None = never.
        precision: of the forward passes.
        seed: of initial weights, order, crops, flips and attacks.
    """

    arch: str
    epochs: int = 200
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "multistep"] = "cosine"
    milestones: tuple[int, ...] = (60, 120, 160)
    gamma: float = 0.2
    padding: int = 4
    flip: bool = True
    normalise: bool = True
    label_smoothing: float = 0.0
    adversarial: Adversarial = "none"
    size: int | None = None
    precision: Precision = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        hints = get_type_hints(TargetRecipe)
        for name in ("schedule", "adversarial", "precision"):
            if getattr(self, name) not in get_args(hints[name]):
                raise GridError(f"--{name}: {unknown(name, getattr(self, name), get_args(hints[name]))}")
        for name, least in (
            ("epochs", 1),
            ("batch_size", 1),
            ("weight_decay", 0),
            ("padding", 0),
            ("gamma", 0),
        ):
            if not getattr(self, name) >= least:
                raise GridError(f"--{name.replace('_', '-')}: {getattr(self, name)} is not {least} or more")
        if not self.lr > 0:
            raise GridError(f"--lr: {self.lr} is not above 0")
        if not 0 <= self.label_smoothing < 1:
            raise GridError(f"--label-smoothing: {self.label_smoothing} is not in [0, 1)")
        if list(self.milestones) != sorted({m for m in self.milestones if m > 0}):
            raise GridError(f"--milestones: {list(self.milestones)} are not rising numbers of epochs")

    def learning_rate(self, epoch: int, part: float = 0.0) -> float:
        """Learning rate in `epoch` (from 0), `part` of it done."""
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * (epoch + part) / self.epochs))
        return self.lr * self.gamma ** sum(epoch >= m for m in self.milestones)

    @property
    def opponent(self) -> dict[str, Any]:
        """What makes the adversarial images, as the zoo's recipes have it; {} for standard training."""
        from tasks.mini import zoo_adversarial as zoo

        known = {"pgd": zoo.AT, "trades": zoo.TRADES, "free": zoo.FREE, "doa": DOA}.get(self.adversarial, {})
        return {k: known[k] for k in ("adversary", "beta", "replays", "eps", "alpha") if k in known}


class TargetTrainer(Loop):
    """Trains a classifier; see `Loop` for resuming.

    Args:
        recipe: how.
        samples: training images of one size, with labels below `num_classes`.
        num_classes: number of logits.
        mean, std: of each channel, in [0,1] units.
        key, state, save_every, device: as in `Loop`.
        start: weights to begin with; None = new ones.

    Attributes:
        target: the network behind its adapter, as grids use it.

    Raises:
        BenchError: an unknown network, or images it cannot take.
    """

    def __init__(
        self,
        recipe: TargetRecipe,
        samples: Samples,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        key: str,
        state: Path | None = None,
        save_every: int | None = None,
        device: torch.device | str = "cpu",
        start: Start | None = None,
    ) -> None:
        super().__init__(
            recipe.arch, samples, key=key, seed=recipe.seed, epochs=recipe.epochs, batch=recipe.batch_size,
            state=state, save_every=save_every, device=device, precision=recipe.precision,
        )  # fmt: skip
        self.recipe = recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("network", recipe.seed))
            network = cifar_nets.build(recipe.arch, num_classes)
        if start is not None:
            apply_state(network, start.state, what=f"--init: {start.path}, as {recipe.arch}")
        size = None if recipe.size is None else (recipe.size, recipe.size)
        least, given = cifar_nets.smallest_input(network), min(size or tuple(samples[0].image.shape[-2:]))
        if given < least:
            raise GridError(
                f"{recipe.arch} needs images of {least}x{least} pixels, these have {given}: give --size {least}"
            )
        self.target = LogitsClassifier(network, num_classes, mean=mean, std=std, fixed_size=size).to(
            self.device
        )
        self.network = network.requires_grad_(True).train()
        self._opponent: Callable[[Tensor, list[int], list[str]], Tensor] | None = None
        self._free = None
        plan = recipe.opponent
        if recipe.adversarial in ("pgd", "trades"):
            from tasks.mini.zoo_adversarial import Opponent

            self._opponent = Opponent(self.target, plan["adversary"], ("target", recipe.seed))
        elif recipe.adversarial == "free":
            from tasks.mini.zoo_adversarial import Free

            self._free = Free(*(float(parse_fraction(plan[name])) for name in ("eps", "alpha")))
        elif recipe.adversarial == "doa":
            square = plan["adversary"]
            if given < square["side"]:
                raise GridError(
                    f"--adversarial: doa needs images of {square['side']} pixels a side, these have {given}"
                )
            self._opponent = Occlusion(
                self.target, square["side"], float(parse_fraction(square["alpha"])), square["steps"]
            )
        self._begin({"network": self.network})

    def _optimizer(self, module: nn.Module) -> torch.optim.SGD:
        r = self.recipe
        return torch.optim.SGD(
            module.parameters(), r.lr, r.momentum, weight_decay=r.weight_decay, nesterov=r.momentum > 0
        )

    def _learning_rate(self, epoch: int, part: float) -> float:
        return self.recipe.learning_rate(epoch, part)

    @contextmanager
    def _session(self, progress: Progress | None) -> Iterator[None]:
        # The fastest kernels of a GPU add in no fixed order.
        steadily = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
        with steadily, whole_batches(self.target, self.recipe.batch_size):
            yield

    def _train_step(self, epoch: int, index: int) -> dict[str, float]:
        batch = self._batch(epoch, index)
        draws = [derive_seed("augment", self.seed, epoch, name) for name in batch.ids]
        images = augmented(batch.images, draws, self.recipe.padding, self.recipe.flip)
        labels = torch.tensor([int(t) for t in batch.targets], device=self.device)
        if self._free is not None:
            return self._free_step(images, labels)
        adversarial = images
        if self._opponent is not None:
            # Signs of float16 gradients are lost where nothing scales the loss.
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
                ids = [f"{epoch}/{name}" for name in batch.ids]
                adversarial = self._opponent(images, labels.tolist(), ids)
        with self._autocast():
            terms = self._terms(images, adversarial, labels)
        return self._descend("network", self.network, terms)

    def _terms(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.recipe.adversarial != "trades":
            return {"ce": self._cross_entropy(self.target.logits(adversarial), labels)}
        clean = self.target.logits(images)
        moved = self.target.logits(adversarial).log_softmax(1)
        apart = F.kl_div(moved, clean.softmax(1), reduction="batchmean")
        return {"ce": self._cross_entropy(clean, labels), "kl": self.recipe.opponent["beta"] * apart}

    def _free_step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        assert self._free is not None
        values: dict[str, float] = {}
        for _ in range(self.recipe.opponent["replays"]):
            with self._autocast():
                terms = self._terms(images, self._free.perturbed(images), labels)
            values = self._descend("network", self.network, terms)
        return values

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)

    def _extra(self) -> dict[str, Tensor]:
        moved = None if self._free is None else self._free.perturbation
        if moved is None or moved.grad is None:
            return {}
        return {"perturbation": moved.detach(), "gradient": moved.grad}

    def _take(self, extra: Mapping[str, Tensor]) -> None:
        if self._free is not None and extra:
            moved = extra["perturbation"].to(self.device).requires_grad_()
            moved.grad = extra["gradient"].to(self.device)
            self._free.perturbation = moved


class Occlusion:
    """Puts a grey square where it raises the loss most, and climbs the loss inside it by sign steps.

    The rectangular occlusion attack of DOA (Wu, Tong, Vorobeychik, ICLR 2020) with its exhaustive search. Of places
    with equal loss it takes the first, their code one at random; theirs leaves out the last row and column of places.

    Args:
        target: the network behind its adapter; it runs in evaluation mode meanwhile and is left in training mode.
        side: of the square, in pixels.
        alpha: step, in [0,1] units; the square may take any colour.
        steps: how many.
    """

    def __init__(self, target: LogitsClassifier, side: int, alpha: float, steps: int) -> None:
        self.target, self.side, self.alpha, self.steps = target, side, alpha, steps

    def __call__(self, images: Tensor, targets: Sequence[int], ids: Sequence[str]) -> Tensor:
        """Occluded images (B, 3, H, W) in [0,1], detached; nothing is drawn, so that `ids` decide nothing."""
        labels = torch.tensor(list(targets), device=images.device)
        self.target.network.eval()
        try:
            square = self.square(images, labels)
            x = torch.where(square, 0.5, images)
            for _ in range(self.steps):
                x.requires_grad_(True)
                (gradient,) = torch.autograd.grad(self._losses(x, labels).sum(), x)
                x = torch.where(square, (x.detach() + self.alpha * gradient.sign()).clamp(0, 1), images)
            return x.detach()
        finally:
            self.target.network.train()

    @torch.no_grad()
    def square(self, images: Tensor, labels: Tensor) -> Tensor:
        """(B, 1, H, W), true in the square whose grey raises the loss most."""
        height, width = int(images.shape[-2]), int(images.shape[-1])
        best = torch.full((len(images),), -math.inf, device=images.device)
        chosen = torch.zeros(len(images), 1, height, width, dtype=torch.bool, device=images.device)
        for top in range(height - self.side + 1):
            for left in range(width - self.side + 1):
                here = torch.zeros(1, 1, height, width, dtype=torch.bool, device=images.device)
                here[..., top : top + self.side, left : left + self.side] = True
                losses = self._losses(torch.where(here, 0.5, images), labels)
                worse = losses > best
                best = torch.where(worse, losses, best)
                chosen = torch.where(worse.view(-1, 1, 1, 1), here, chosen)
        return chosen

    def _losses(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.target.logits(images).float(), labels, reduction="none")


def augmented(images: Tensor, draws: Sequence[int], padding: int, flip: bool) -> Tensor:
    """Images (B, C, H, W), each cropped at random from itself with `padding` black pixels around, and maybe flipped.

    Args:
        images: in [0,1].
        draws: a large random integer for each image, which decides where the crop lies and whether it is flipped.
        padding: pixels on every side.
        flip: mirror half of the images.
    """
    height, width = images.shape[-2:]
    padded, places = F.pad(images, (padding,) * 4), 2 * padding + 1
    out = []
    for image, draw in zip(padded, draws, strict=True):
        rest, top = divmod(draw, places)
        rest, left = divmod(rest, places)
        crop = image[:, top : top + height, left : left + width]
        out.append(crop.flip(2) if flip and rest % 2 else crop)
    return torch.stack(out)


def channel_statistics(samples: Samples) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, rounded to 4 digits, from at most `NORMALISED_BY` images."""
    total, square, pixels = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for index in spread(len(samples), NORMALISED_BY):
        image = samples[index].image.double()
        total += image.sum((1, 2))
        square += image.square().sum((1, 2))
        pixels += image[0].numel()
    mean = total / pixels
    std = (square / pixels - mean.square()).clamp(min=1e-6).sqrt()
    return [round(float(x), 4) for x in mean], [round(float(x), 4) for x in std]


def spread(length: int, count: int) -> list[int]:
    """At most `count` indices below `length`, evenly spaced."""
    count = min(count, length)
    return [k * length // count for k in range(count)]


# -- what to train on ------------------------------------------------------------------------------------------------
class Part(Dataset):
    """Some images of a dataset.

    Args:
        whole: the dataset.
        indices: of its images.
    """

    task = "classification"

    def __init__(self, whole: Dataset, indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, indices
        self.name, self.params, self.classes = whole.name, whole.params, whole.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.whole[self.indices[index]]

    def fingerprint(self) -> str:
        """That of the whole, and which images."""
        return hashlib.sha256(f"{self.whole.fingerprint()} {list(self.indices)}".encode()).hexdigest()


def find_data(spec: str, test: str | None = None) -> tuple[Dataset, Dataset]:
    """Images to train on and, held out, images to score on.

    Args:
        spec: a dataset as in a profile, in YAML. Where it names no split, its `train` is meant.
        test: another one for the scores. By default the same with its split `test` or `val`; where there is none, every
            tenth image is held out.

    Raises:
        BenchError: not a dataset, not of classification, or one without labels.
    """
    name, params = _parsed(spec, "--dataset")
    splits = next((p.annotation for p in _parameters(name, "--dataset") if p.name == "split"), "")
    known = re.findall(r"'(\w+)'", splits)
    if "train" in known:
        params.setdefault("split", "train")
    data = _dataset(name, params, "--dataset")
    if test is not None:
        return data, _dataset(*_parsed(test, "--test"), "--test")
    others = [split for split in ("test", "val") if split in known and split != params.get("split")]
    if others:
        return data, _dataset(name, {**params, "split": others[0]}, "--dataset")
    if len(data) < HELD_OUT:
        raise DataError(f"--dataset: {name} has {len(data)} images, too few to hold some out; give --test")
    taken = range(0, len(data), HELD_OUT)
    return Part(data, [i for i in range(len(data)) if i not in taken]), Part(data, taken)


def _parsed(spec: str, where: str) -> tuple[str, dict[str, Any]]:
    try:
        content = yaml.safe_load(spec)
    except yaml.YAMLError as error:
        raise GridError(f"{where}: {' '.join(str(error).split())}") from None
    if not isinstance(content, str | dict):
        raise GridError(f"{where}: expected a dataset such as {{name: cifar10, root: /data}}, got {spec!r}")
    name, params, _ = split_spec(content, where)
    return name, params


def _parameters(name: str, where: str) -> Any:
    DATASETS.resolve(name, where)
    return DATASETS.parameters(name)


def _dataset(name: str, params: Mapping[str, Any], where: str) -> Dataset:
    data: Dataset = DATASETS.create(name, dict(params), where)
    if data.task != "classification":
        raise GridError(f"{where}: '{name}' is for {data.task}, expected a dataset of classification")
    if not data.labelled:
        raise GridError(f"{where}: the images of '{name}' have no labels, expected a dataset of classes")
    return data


def shows_digits(classes: Sequence[str]) -> bool:
    """Whether the classes are digits, whose mirror images mean something else or nothing."""
    return bool(classes) and {str(name).lower() for name in classes} <= _DIGITS


# -- what to start from ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Start:
    """Weights that a training goes on from.

    Attributes:
        path: their file, as the command names it.
        state: by the names of `cifar_nets`.
        sha256: of the file.
        normalisation: mean and standard deviation of each channel that they were trained with; None = not said.
    """

    path: Path
    state: Mapping[str, Tensor]
    sha256: str
    normalisation: tuple[list[float], list[float]] | None = None


def starting_point(path: Path, recipe: TargetRecipe, num_classes: int) -> Start:
    """The weights in a file, for a training of `recipe`.

    Args:
        path: of `train-target`, or a state dictionary that model `cifar` takes.
        recipe: what they are for.
        num_classes: of the training images.

    Raises:
        WeightsError: the file is missing or unreadable, of another architecture or other classes, or made on normalised
            images where the recipe says plain ones.
    """
    at = f"--init: {path}"
    try:
        loaded = load_state(path)
    except WeightsError as error:
        raise WeightsError(f"--init: {error}") from None
    said = loaded.meta.get("arch", recipe.arch)
    if said != recipe.arch:
        raise WeightsError(f"{at} is a {said}, --arch says {recipe.arch}")
    state = like_ours(loaded.state)
    head = state.get("fc.weight")
    if head is not None and len(head) != num_classes:
        raise WeightsError(f"{at} has {len(head)} classes, the training images have {num_classes}")
    # Found out before anything is set up.
    with torch.random.fork_rng(devices=[]):
        apply_state(cifar_nets.build(recipe.arch, num_classes), state, what=f"{at}, as {recipe.arch}")
    mean, std = loaded.meta.get("mean"), loaded.meta.get("std")
    if mean is None or std is None:
        return Start(path, state, loaded.sha256)
    if not recipe.normalise and (any(mean) or any(value != 1 for value in std)):
        raise WeightsError(f"{at} was trained on normalised images: leave out --no-normalise")
    return Start(path, state, loaded.sha256, (list(mean), list(std)))


# -- a whole training ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TargetTraining:
    """One checkpoint to make.

    Attributes:
        recipe: how.
        data, test: images to train on, and to score on.
        spec, test_spec: what was asked for, for the command.
        score_images: at most so many are attacked for the score.
        start: weights to begin with; None = new ones.
    """

    recipe: TargetRecipe
    data: Dataset
    test: Dataset
    spec: str
    test_spec: str | None = None
    score_images: int = 1000
    start: Start | None = None

    @functools.cached_property
    def payload(self) -> dict[str, Any]:
        """Everything the weights are a function of."""
        # The file by its digest; not there without one, so that keys stay what they were.
        begun = {} if self.start is None else {"init": self.start.sha256}
        return {
            "kind": "target", "version": VERSION, "recipe": asdict(self.recipe), "opponent": self.recipe.opponent,
            "data": {
                "dataset": self.data.name, "fingerprint": self.data.fingerprint(), "images": len(self.data),
                "classes": len(self.data.classes),
            },
            **begun,
        }  # fmt: skip

    @functools.cached_property
    def key(self) -> str:
        """SHA-256 of the payload."""
        return content_key(self.payload)

    def command(self, out: Path) -> str:
        """What makes it."""
        words = ["python", "-m", "bench", "train-target", "--arch", self.recipe.arch, "--dataset", self.spec]
        words += [] if self.test_spec is None else ["--test", self.test_spec]
        words += [] if self.start is None else ["--init", str(self.start.path)]
        usual = TargetRecipe(self.recipe.arch, flip=not shows_digits(self.data.classes))
        for name in (f.name for f in fields(usual)):
            value, option = getattr(self.recipe, name), f"--{name.replace('_', '-')}"
            if value == getattr(usual, name):
                continue
            if isinstance(value, bool):
                words.append(option if value else f"--no-{name}")
            else:
                words += [option, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
        return shlex.join([*words, "--out", str(out)])


def train_target(
    training: TargetTraining,
    folder: Path,
    out: Path,
    *,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train, write the checkpoint with its scores, and the curves; goes on where an interrupted run stopped.

    Args:
        training: what.
        folder: the training's own folder: state, curves (PNG, JSON lines), TensorBoard scalars.
        out: safetensors file; what it holds is said again, with its SHA-256, in a JSON file beside it.
        device: where.
        progress: told about every step.

    Returns:
        What the JSON file says.

    Raises:
        BenchError: the training cannot start or diverged.
    """
    recipe, data = training.recipe, training.data
    with steady(device):
        # Nothing is prepared: a network of this kind takes images as they are.
        samples = Prepared(data, LogitsClassifier(nn.Identity(), 1), len(data))
        if training.start is not None and training.start.normalisation is not None:
            mean, std = training.start.normalisation
        else:
            mean, std = channel_statistics(samples) if recipe.normalise else ([0.0] * 3, [1.0] * 3)
        classes = len(data.classes)
        trainer = TargetTrainer(
            recipe, samples, classes, mean, std, key=training.key, state=folder / "state.safetensors", save_every=500,
            device=device, start=training.start,
        )  # fmt: skip
        seconds = run_recorded(trainer, folder, progress)
        facts = {
            "arch": recipe.arch, "num_classes": classes, "classes": list(data.classes), "mean": mean, "std": std,
            "size": recipe.size, "key": training.key, "payload": training.payload, "command": training.command(out),
            "seed": recipe.seed, "seconds": seconds, "steps": trainer.step, "losses": trainer.history.epochs[-1],
        }  # fmt: skip
        # What is scored is what is written, rounding included.
        draft = folder / "unscored.safetensors"
        state = trainer.network.state_dict()
        save_safetensors(draft, state, meta=facts, half=True)
        facts["scores"] = score(draft, training.test, training.score_images, device)
        facts["scored"] = {
            "dataset": training.test.name, "fingerprint": training.test.fingerprint(),
            "images": min(training.score_images, len(training.test)),
        }  # fmt: skip
        save_safetensors(out, state, meta=facts, half=True)
        draft.unlink()
    told = {**facts, "sha256": sha256_file(out)}
    out.with_suffix(".json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    (folder / "state.safetensors").unlink(missing_ok=True)
    return told


def score(checkpoint: Path, test: Dataset, images: int, device: torch.device) -> dict[str, float]:
    """Top-1 accuracy on at most `images` evenly spaced images: clean, and under PGD-20 at eps 8/255, alpha 2/255."""
    target = MODELS.create("cifar", {"checkpoint": str(checkpoint)}).load(device)
    attack = ATTACKS.create("pgd", {"eps": "8/255", "alpha": "2/255", "steps": 20})
    adversary = AttackAdversary([(attack, 1.0)], target)
    hits = {"clean": 0, "pgd20_8/255": 0}
    chosen = spread(len(test), images)
    for first in range(0, len(chosen), 100):
        batch = Batch.of([test[i] for i in chosen[first : first + 100]]).to(device)
        with whole_batches(target, len(batch)):
            shown = (batch.images, adversary(batch, "score"))
            for name, pixels in zip(hits, shown, strict=True):
                found = [decision.label for decision in target.predict(pixels)]
                hits[name] += sum(p == t for p, t in zip(found, batch.targets, strict=True))
    return {name: round(n / len(chosen), 4) for name, n in hits.items()}


def existing(out: Path, key: str) -> bool:
    """Whether `out` is there already and the same training made it.

    Raises:
        WeightsError: another one did.
    """
    if out.exists() and read_meta(out).get("key") != key:
        raise WeightsError(f"--out: {out} is there and was made by another training; --overwrite replaces it")
    return out.exists()


def check_out(out: Path) -> None:
    """Refuse before the training what could not be written after it.

    Raises:
        WeightsError: no safetensors file, or a folder that cannot be made or written to.
    """
    if out.suffix != ".safetensors":
        raise WeightsError(f"--out: {out} does not end in .safetensors")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise WeightsError(f"--out: {out} cannot be written: {error.strerror or error}") from None
