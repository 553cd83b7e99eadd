"""What a plug-in has to be. Read this file first: everything else follows from it.

Images between components are float32 NCHW RGB in [0,1]. Normalisation, channel order, 0..255 and padding live inside
the models of a task and nowhere else. A grid crosses targets (dataset + model), defenses, attacks and threat models:

    Dataset ── Sample ──► TargetModel.prepare ──► Batch ──► Attack(Oracle) ──► adversarial images
                                                                 │
      rows ◄── Task.rows ◄── TargetModel.predict ◄── Defense ◄───┘
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from bench.errors import NotApplicable
from bench.rng import ImageRNG
from bench.units import Pixels

if TYPE_CHECKING:
    from fractions import Fraction

    import numpy as np
    from matplotlib.axes import Axes

__all__ = [
    "Attack",
    "Batch",
    "Dataset",
    "Defense",
    "Geometry",
    "ImageRNG",
    "Metric",
    "ModelSource",
    "Oracle",
    "Pixels",
    "Sample",
    "Site",
    "TargetModel",
    "Task",
    "Warped",
]

Needs = Literal["gradient", "logits", "features", "decision"]


# -- data ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sample:
    """One image (3, H, W) in [0,1], its ground truth (the task knows the type) and an id unique in its dataset."""

    image: Tensor
    target: Any
    id: str


@dataclass(frozen=True)
class Batch:
    """Images (B, 3, H, W) of one size with their targets and ids, at the resolution the attack works at."""

    images: Tensor
    targets: tuple[Any, ...]
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Batch:
        """Stack samples of equal size."""
        return cls(
            torch.stack([s.image for s in samples]),
            tuple(s.target for s in samples),
            tuple(s.id for s in samples),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its images on `device`; targets stay where they are."""
        return replace(self, images=self.images.to(device))


class Dataset(ABC):
    """Labelled images of one split. Constructing it is cheap; files are touched on first access.

    Attributes:
        task: name of the task its targets belong to.
        classes: class names, in label order.
        labelled: its images have ground truth; otherwise every target is -1, and they serve trainings that need none.
    """

    name: str
    params: Mapping[str, Any]
    task: ClassVar[str]
    labelled: ClassVar[bool] = True
    classes: Sequence[str]

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Image `index` at its original size with ground truth in original coordinates."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of the content, independent of where it lies; part of every cache key."""

    def ids(self) -> Sequence[str]:
        """Ids of all images, in order, without loading them."""
        return [str(i) for i in range(len(self))]


# -- geometry -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Geometry:
    """Where the pixels of each image went: position_out = position_in * scale + offset, per image, (y, x).

    Attributes:
        scale, offset: (B, 2) float tensors.
        in_size, out_size: (H, W) before and after.
    """

    scale: Tensor
    offset: Tensor
    in_size: tuple[int, int]
    out_size: tuple[int, int]

    def then(self, other: Geometry) -> Geometry:
        """First self, then `other`."""
        return Geometry(
            self.scale * other.scale, self.offset * other.scale + other.offset, self.in_size, other.out_size
        )

    def select(self, index: Sequence[int] | Tensor) -> Geometry:
        """The geometry of some of the images."""
        picked = torch.as_tensor(index, dtype=torch.long)
        return replace(self, scale=self.scale[picked], offset=self.offset[picked])


@dataclass(frozen=True)
class Warped:
    """Images whose pixels moved, together with how: what a resizing or padding defense returns."""

    images: Tensor
    geometry: Geometry


# -- the target ---------------------------------------------------------------------------------------------------
class TargetModel(nn.Module, ABC):
    """A frozen network behind [0,1] RGB images: evaluation mode, no parameter gradients.

    Attributes:
        task: name of the task.
        losses: loss kinds `loss` accepts.
        num_classes: number of classes it predicts.
        jumps: the loss is discontinuous in the image (unpooling by indices), so that finite differences, by which the
            harness checks gradients, say nothing.
    """

    task: ClassVar[str]
    losses: ClassVar[tuple[str, ...]]
    num_classes: int
    jumps: bool = False

    def prepare(self, sample: Sample) -> Sample:
        """Resize image and ground truth to the resolution the network works at (and attacks perturb)."""
        return sample

    @abstractmethod
    def loss(
        self,
        images: Tensor,
        targets: Sequence[Any],
        kind: str,
        *,
        geometry: Geometry | None = None,
        rng: ImageRNG | None = None,
    ) -> Tensor:
        """Loss of each image, shape (B,), differentiable to the pixels; no image's loss depends on another image.

        Args:
            images: (B, 3, H, W) in [0,1].
            targets: ground truth in the coordinates of `prepare`d images.
            kind: one of `losses`; larger means a worse prediction.
            geometry: how `images` were moved since `prepare`; ground truth follows.
            rng: streams for models whose loss samples (Mask R-CNN).
        """

    @abstractmethod
    def predict(self, images: Tensor, *, geometry: Geometry | None = None) -> list[Any]:
        """One prediction per image, in the coordinates of `prepare`d images (undoing `geometry`)."""

    def logits(self, images: Tensor, *, geometry: Geometry | None = None) -> Tensor:
        """Class scores before softmax: (B, K) or (B, K, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} has no logits")

    def features(self, images: Tensor, layer: str) -> Tensor:
        """Activations of `layer`, (B, C, ...)."""
        raise NotImplementedError(f"{type(self).__name__} has no features")

    def loss_from_logits(self, logits: Tensor, targets: Sequence[Any], kind: str) -> Tensor:
        """Loss of each image, (B,), from logits; what an ensemble that averages logits needs."""
        raise NotImplementedError(f"{type(self).__name__} has no loss on logits")


class ModelSource(ABC):
    """Where a target model comes from. Constructing it is cheap; `load` builds the network.

    Attributes:
        task: name of the task the model serves.
    """

    name: str
    params: Mapping[str, Any]
    task: str

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the model is, for keys and rows: architecture, parameters, SHA-256 of its weights; no paths."""

    @abstractmethod
    def load(self, device: torch.device) -> TargetModel:
        """The frozen model on `device`.

        Raises:
            WeightsError: the checkpoint is missing, unsafe, damaged or of another model.
        """

    def recorded(self) -> dict[str, float]:
        """Scores recorded with the weights: `clean` (the task's first metric), and under attacks by any other name."""
        return {}

    def input_spec(self) -> dict[str, Any]:
        """What `prepare` does to a sample, for keys; {} when nothing."""
        return {}


class Task(ABC):
    """How predictions of one kind are judged.

    Attributes:
        metrics: names of its metrics in METRICS; the first is the headline.
        losses: loss kinds that attacks may ask of its models (`TargetModel.loss`).
        batch_size: images per batch unless the user says otherwise.
    """

    name: str
    metrics: ClassVar[tuple[str, ...]]
    losses: ClassVar[tuple[str, ...]]
    batch_size: ClassVar[int] = 32

    @abstractmethod
    def rows(self, prediction: Any, target: Any) -> dict[str, Any]:
        """JSON-ready statistics of one image from which every metric of the task aggregates exactly.

        Must hold `score` in [0,1], the image's own result (1 = as good as it gets): the per-image worst case over
        attacks is the attack with the lowest score.
        """

    def draw(self, axes: Axes, prediction: Any, classes: Sequence[str]) -> str:
        """Draw a prediction, or ground truth, over the image that `axes` shows in its own pixels.

        Returns:
            A caption: the label of the image, or "" where the drawing says all.
        """
        return ""

    def words(self, prediction: Any, classes: Sequence[str]) -> str:
        """A prediction, or ground truth, in one line of words, for whoever does not see the drawing."""
        return ""

    def verdict(self, prediction: Any, target: Any) -> str:
        """How right a prediction is, in a few words."""
        return f"score {self.rows(prediction, target)['score']:.2f}"

    def check_truth(self, target: Any, num_classes: int) -> None:  # noqa: B027 - empty scenes are scenes
        """Refuse ground truth that a model of `num_classes` classes can neither be attacked at nor judged by.

        Raises:
            ValueError: says what was found and what is expected.
        """

    def attack_targets(
        self, rule: str, targets: Sequence[Any], num_classes: int, rng: ImageRNG
    ) -> tuple[Any, ...]:
        """Wrong targets for a targeted attack, by `rule`.

        Raises:
            GridError: the task has no such rule.
        """
        from bench.errors import GridError

        raise GridError(f"target '{rule}': task {self.name} has no targeted attacks")

    def check_target(self, rule: str, num_classes: int) -> None:  # noqa: B027 - may know nothing before images are seen
        """Refuse a target rule that no image of `num_classes` classes could follow, before anything runs.

        Raises:
            GridError: no such rule, or it names a class that does not exist.
        """


class Metric(ABC):
    """A number for a set of images.

    Attributes:
        task: task whose rows it reads; "" = every task's.
        unit: "%" (values in [0,1] are printed times 100) or "" .
        higher_is_better: direction.
        interval: "wilson" for a mean of 0/1 values, else "bootstrap".
    """

    name: str
    params: Mapping[str, Any]
    task: ClassVar[str]
    unit: ClassVar[str] = "%"
    higher_is_better: ClassVar[bool] = True
    interval: ClassVar[Literal["wilson", "bootstrap"]] = "bootstrap"

    @abstractmethod
    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Gather rows (one per image, as `Task.rows` made them) into whatever `value` computes fast from."""

    @abstractmethod
    def value(self, prepared: Any, weights: np.ndarray | None = None) -> float:
        """The metric; `weights` (n_images,) counts how often each image is in the sample (bootstrap)."""

    def values(self, prepared: Any, weights: np.ndarray) -> np.ndarray:
        """`value` for each row of `weights` (samples, n_images), shape (samples,); override where one go is faster."""
        import numpy

        return numpy.array([self.value(prepared, row) for row in weights], dtype=numpy.float64)


class PixelMetric(Metric):
    """A mean over images of a number taken from pixels: a clean image, and what comes out of the defense.

    For every task, and only where `evaluate: {metrics: [...]}` of a grid names it. NaN where a defense returns images
    of another size.
    """

    task: ClassVar[str] = ""
    unit: ClassVar[str] = ""

    @abstractmethod
    def measure(self, clean: Tensor, purified: Tensor) -> Tensor:
        """Number of each image, (B,), from (B, 3, H, W) in [0,1] twice."""

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Number of every image as float64."""
        import numpy

        found = [row[self.name] for row in rows]
        return numpy.array([numpy.nan if number is None else number for number in found], dtype=numpy.float64)

    def value(self, prepared: Any, weights: np.ndarray | None = None) -> float:
        """The mean; NaN without images."""
        import numpy

        return float(numpy.average(prepared, weights=weights)) if len(prepared) else float("nan")


# -- the defense --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Site:
    """Where a defense stands: in front of one role of one profile.

    Attributes:
        profile: the profile, by name or path.
        role: the role.
        checkpoints: folders that trained checkpoints are looked for in, besides the shipped ones.
    """

    profile: str
    role: str
    checkpoints: tuple[Path, ...] = ()


class Defense(nn.Module):
    """A purifier T: images in [0,1] to images in [0,1], placed in front of any target.

    A subclass writes `forward(images)`, or `forward(images, rng)` when `stochastic`; the harness calls `purify`, which
    checks the result and clamps it. Return `Warped` when pixels move.

    Attributes:
        differentiable: autograd through `forward` is the true gradient (white_box needs it).
        stochastic: `forward` draws from `rng`; attacks then use EOT and evaluation repeats.
        trained: it has learned weights.
        version: raise it when the output changes for the same parameters.
        tasks: tasks it can stand in front of; None = all.
        unavailable: why it cannot be run at all; its cells are skipped with this reason.
    """

    name: str = ""
    params: Mapping[str, Any] = {}
    differentiable: bool = True
    stochastic: bool = False
    trained: bool = False
    version: ClassVar[int] = 1
    tasks: frozenset[str] | None = None
    unavailable: str | None = None

    def forward(self, images: Tensor, *args: Any) -> Tensor | Warped:
        """Purified images; (B, 3, H, W) in, the same or `Warped` out."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def surrogate(self, images: Tensor, *args: Any) -> Tensor | Warped:
        """The differentiable stand-in whose gradient BPDA uses in the backward pass; identity unless it knows better.

        Takes the same arguments as `forward` (including `rng`, which then yields the same draws) and must return the
        same shape.
        """
        return images

    def identity(self) -> dict[str, Any]:
        """What the defense is, for keys and rows; a learned one adds the SHA-256 of its weights."""
        return {"name": self.name, "params": dict(self.params), "version": self.version}

    def check_input(self, size: tuple[int, int]) -> None:
        """Raise NotApplicable when images of `size` (H, W) cannot be purified."""

    def placed(self, site: Site) -> Defense:
        """The defense as it stands at `site`: a learned one picks the checkpoint that was trained for it.

        Raises:
            MissingCheckpoint: it has not been trained.
            NotApplicable: it cannot be trained for this role.
        """
        return self

    def retrained(self, seed: int) -> Defense:
        """The same defense after another training, as an attacker who knows the recipe would make it.

        Raises:
            NotApplicable: nothing in it is trained, or its weights were given by path.
        """
        raise NotApplicable(
            f"'{self.name}' has nothing to train: who knows its recipe knows the defense itself"
        )

    def purify(self, images: Tensor, rng: ImageRNG | None = None) -> Warped:
        """`forward`, validated and clamped to [0,1].

        The clamp passes gradients straight through: a purifier that overshoots the range must not look robust because
        its saturated pixels have zero gradient.
        """
        return self._finish(images, self.forward, rng)

    def purify_surrogate(self, images: Tensor, rng: ImageRNG | None = None) -> Warped:
        """`surrogate`, validated and clamped like `purify`."""
        return self._finish(images, self.surrogate, rng)

    def _finish(self, images: Tensor, function: Any, rng: ImageRNG | None) -> Warped:
        from bench.errors import CheckError

        if self.stochastic and rng is None:
            raise ValueError(f"defense '{self.name}' is stochastic and needs an ImageRNG")
        untouched = images._version
        out = function(images, rng) if self.stochastic else function(images)
        if images._version != untouched:
            # The caller's images: an attack goes on from them, and repeats purify them again.
            raise CheckError(f"defense '{self.name}' writes into the images it is given; clone them first")
        moved = isinstance(out, Warped)
        result = out.images if moved else out
        if result.shape[:2] != images.shape[:2] or (not moved and result.shape != images.shape):
            raise CheckError(
                f"defense '{self.name}' turned shape {tuple(images.shape)} into {tuple(result.shape)}; "
                "a defense that changes size must return Warped(images, geometry)"
            )
        if not torch.isfinite(result).all():
            raise CheckError(f"defense '{self.name}' produced NaN or infinite pixels")
        result = result + (result.clamp(0, 1) - result).detach()
        if moved:
            return Warped(result, out.geometry)
        return Warped(result, identity_geometry(images))


def identity_geometry(images: Tensor) -> Geometry:
    """The geometry of images that did not move."""
    size = (int(images.shape[-2]), int(images.shape[-1]))
    return Geometry(torch.ones(len(images), 2), torch.zeros(len(images), 2), size, size)


# -- the attack ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Gradient:
    """Objective values (B,) and their gradients (B, 3, H, W), averaged over EOT draws."""

    value: Tensor
    grad: Tensor


class Objective(Protocol):
    """Per-image values (B,) to be increased, as a differentiable function of the images the attack moves."""

    def __call__(self, oracle: Oracle, images: Tensor) -> Tensor: ...


class Oracle(Protocol):
    """All that an attack sees of the victim. The threat model decides what is behind it.

    It is bound to the images of one batch; `select` narrows it to some of them. Calls outside what the attack
    declared in `needs` raise. Forward and backward passes are counted per image.

    Where a defense draws random numbers (`stochastic`), all that one objective asks in one call belongs to one draw:
    other images asked about there see the same random numbers. Between calls they differ.
    """

    num_classes: int

    @property
    def stochastic(self) -> bool:
        """The victim draws random numbers."""
        ...

    def __len__(self) -> int: ...

    def select(self, index: Sequence[int] | Tensor) -> Oracle:
        """The oracle for some of its images; counts go to the same place."""
        ...

    def gradient(self, images: Tensor, objective: Objective) -> Gradient:
        """Value and gradient of `objective` at `images`, averaged over EOT draws where something is stochastic."""
        ...

    def value(self, images: Tensor, objective: Objective) -> Tensor:
        """The value alone, averaged in the same way, without a backward pass."""
        ...

    def loss(self, images: Tensor | Warped, targets: Sequence[Any], kind: str) -> Tensor:
        """The target's loss (B,), differentiable. Inside an objective only `images` it was given may be passed."""
        ...

    def logits(self, images: Tensor | Warped) -> Tensor:
        """The target's logits, differentiable."""
        ...

    def features(self, images: Tensor, layer: str) -> Tensor:
        """The target's activations, differentiable."""
        ...

    def decision(self, images: Tensor) -> list[Any]:
        """The target's predictions."""
        ...


class Attack(ABC):
    """Turns images into adversarial images, seeing the victim only through an Oracle.

    Attributes:
        needs: what it asks the oracle for.
        tasks: tasks it can attack; None = all.
        norm: the norm of its budget, None when it has none (then `eps` is None).
        eps: radius in [0,1] pixel units; the harness projects and verifies.
        target: rule that picks the wrong target (`Task.attack_targets`); None = untargeted.
        stochastic: draws random numbers.
        monotone: one run on one objective that grows with success, so that it should end above its start. Not so for
            several objectives or restarts in turn, schedules, objectives that drop what is wrong already, and searches
            for small perturbations.
        labelled: it leaves (or seeks) the label it is given; not so where it only leaves the clean image's own output.
        returns_clean: an image it fails on comes back unchanged.
        spares: an image that is wrong already may come back unchanged.
        averages: it averages its gradients over draws of a stochastic defense by itself.
        also_scores: besides following gradients it searches over scores, so that its success tells nothing of either.
        counts_backwards: rows count its backward passes; not so where it takes gradients by itself instead of asking
            the oracle for them: the count is 0 then, whatever was spent.
        version: raise it when the output changes for the same parameters.
        added: parameters that came later, with the value at which the output is what it was without them: there they
            stay out of keys, and what was stored before stays valid.
    """

    name: str = ""
    params: Mapping[str, Any] = {}
    needs: frozenset[Needs] = frozenset({"gradient"})
    tasks: frozenset[str] | None = None
    stochastic: bool = False
    norm: Literal["linf", "l2"] | None = "linf"
    eps: Fraction | None = None
    target: str | None = None
    monotone: bool = True
    labelled: bool = True
    returns_clean: bool = False
    spares: bool = False
    averages: bool = False
    also_scores: bool = False
    counts_backwards: bool = True
    version: ClassVar[int] = 1
    added: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Adversarial images, same shape as `images` (B, 3, H, W).

        Args:
            oracle: the victim.
            images: clean images; must not be modified.
            targets: ground truth, or the wrong targets to reach when `target` is set.
            rng: one random stream per image.
        """

    def identity(self) -> dict[str, Any]:
        """What the attack is, for keys and rows."""
        params = {k: v for k, v in self.params.items() if k not in self.added or v != self.added[k]}
        return {"name": self.name, "params": params, "version": self.version}

    def passes(self) -> int:
        """Forward-backward passes per image of one run (without EOT), for the time estimate."""
        return 1

    @property
    def compares(self) -> bool:
        """Its objective holds the victim's outputs against those of the clean image: where a defense draws random
        numbers, against those of the same draw.
        """
        return False

    def excess(self, clean: Tensor, adversarial: Tensor) -> Tensor | None:
        """How far a bound that the attack promises is exceeded, in shares of it, (B,); None = it has none but `eps`.

        For budgets that are no norm. Cheap necessary conditions suffice: 0 means that nothing was found.
        """
        return None

    def check_classes(self, num_classes: int) -> None:  # noqa: B027 - most have nothing to check
        """Refuse parameters that a victim of `num_classes` classes cannot serve; asked before anything runs.

        Raises:
            GridError: names the parameter, and what is possible.
        """

    def loss_kinds(self) -> Iterable[str]:
        """Loss kinds it asks for, checked against the target before anything runs."""
        return ()
