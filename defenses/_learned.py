"""What all learned defenses share: weights by path, value ranges, and images in groups of a fixed size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bench.errors import MissingCheckpoint, NotApplicable, PluginError, WeightsError
from bench.protocols import Defense, Site
from bench.registry import DEFENSES
from bench.weights import find_weights, load_state
from defenses.networks.build import fitting
from tasks.microbatch import default_size, micro_batches

Space = Literal["unit", "symmetric", "imagenet"]
TrainSeed = Annotated[int, Field(ge=0)]

#: Parameters that choose the weights; a key holds the weights' digest instead.
_CHOICE = ("weights", "recipe", "trained_for", "train_seed")

SHIPPED = Path(__file__).parent / "weights"

_MEAN_STD: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "unit": ((0.0,) * 3, (1.0,) * 3),
    "symmetric": ((0.5,) * 3, (0.5,) * 3),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def mean_std(space: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (1, 3, 1, 1) each, that lead from [0,1] to `space`.

    `unit` is [0,1] itself, `symmetric` is [-1,1], `imagenet` has the channel statistics of ImageNet.
    """
    mean, std = _MEAN_STD[space]
    return torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)


class Learned(Defense):
    """A network in front of the target. Without weights it can be listed and described, but not run or keyed.

    Every image goes through the network in groups of a fixed size (`tasks.microbatch`), so that its result does not
    depend on its batch.

    Args:
        weights: checkpoint; a bare name is also looked for among the shipped ones. None = the one trained by `recipe`
            for the role it stands in front of.
        recipe: recipe of that checkpoint; None = the defense's own.
        trained_for: role the checkpoint was trained for; None = the one it stands in front of. Another role makes a
            cross-model or cross-task cell.
        train_seed: seed of its training.

    Attributes:
        networks: names of the networks (`defenses.networks.build`) it can run.
        source: where weights come from, for messages.
        kind: name for messages.
        space: value range the network works in.
        fixed_space: the only one it can work in; None = what the checkpoint says, or `default_space`.
        meta: what the checkpoint says about itself: recipe, scores.

    Raises:
        WeightsError: the checkpoint is missing, unsafe, damaged or of another network or value range.
    """

    trained = True
    networks: ClassVar[tuple[str, ...]]
    kind: ClassVar[str]
    default_space: ClassVar[Space] = "unit"
    fixed_space: ClassVar[Space | None] = None
    source: ClassVar[str] = ""
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        weights: Path | None = None,
        recipe: str | None = None,
        trained_for: str | None = None,
        train_seed: TrainSeed = 0,
    ) -> None:
        super().__init__()
        if weights is not None and (recipe is not None or trained_for is not None or train_seed != 0):
            raise PluginError(
                f"defense '{self.kind}': recipe, trained_for and train_seed choose a checkpoint; weights names one: "
                "give either"
            )
        self._choice = (recipe or self.kind, trained_for, train_seed)
        self.network: torch.nn.Module | None = None
        self.sha256 = ""
        self.meta: dict[str, Any] = {}
        self._path = ""
        if weights is not None:
            path = find_weights(weights, SHIPPED)
            loaded = load_state(path, hint=self._how())
            self.network = fitting(loaded, path, self.networks, self.kind)
            self.sha256, self.meta, self._path = loaded.sha256, loaded.meta, str(path)
        self.work_in(self.fixed_space)

    def work_in(self, space: Space | None) -> None:
        """Set the value range of the network; None = what the checkpoint says, or `default_space`.

        Raises:
            WeightsError: the checkpoint was trained in another one, or an unknown one.
        """
        recorded = self.meta.get("space")
        if recorded is not None and recorded not in _MEAN_STD:
            raise WeightsError(
                f"weights file {self._path} was trained in an unknown value range '{recorded}'"
            )
        if None not in (space, recorded) and space != recorded:
            raise WeightsError(
                f"weights file {self._path} was trained in value range '{recorded}', but space is '{space}'"
            )
        self.space: str = space or recorded or self.default_space
        mean, std = mean_std(self.space)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    @property
    def ready(self) -> bool:
        """It has weights."""
        return self.network is not None

    def forward(self, images: Tensor) -> Tensor:
        """Purified images, (B, 3, H, W) in [0,1] to about [0,1]; any size.

        Raises:
            WeightsError: there are no weights.
        """
        return micro_batches(self.purified, images, self.group(images.device))

    def purified(self, images: Tensor) -> Tensor:
        """The network's output for one group of images, [0,1] to about [0,1]."""
        network = self._network()
        out: Tensor = network((images - self.mean) / self.std) * self.std + self.mean
        return out

    def group(self, device: torch.device) -> int:
        """Images per call of the network."""
        return default_size(device)

    def placed(self, site: Site) -> Defense:
        """With the checkpoint that its recipe, profile, role and seed name; itself when it has weights.

        Raises:
            MissingCheckpoint: it has not been trained.
            BenchError: the profile or the recipe cannot be used.
        """
        if self.ready or not self.kind:
            return self
        # The training imports defenses; a defense that is never trained needs none of it.
        from defenses.training.session import plan_training

        recipe, trained_for, seed = self._choice
        training = plan_training(site.profile, trained_for or site.role, recipe, seed)
        if training.recipe.defense != self.kind:
            raise PluginError(
                f"defense '{self.kind}': recipe '{recipe}' is one of defense '{training.recipe.defense}'"
            )
        path, reason = training.find(site.checkpoints)
        if path is None:
            raise MissingCheckpoint(
                f"defense '{self.kind}' has no checkpoint {training.name} ({reason}): {training.command} makes it, "
                "and run --train-missing all that a grid lacks",
                training,
            )
        params = {k: v for k, v in self.params.items() if k not in _CHOICE}
        placed: Defense = DEFENSES.create(self.name, {**params, "weights": str(path)})
        placed.eval().requires_grad_(False)
        return placed

    def retrained(self, seed: int) -> Defense:
        """The same recipe and role with another seed.

        Raises:
            NotApplicable: its weights were given by path, so there is no recipe to repeat; or it has this seed.
        """
        if self.ready:
            raise NotApplicable(f"'{self.kind}' has its weights by path: give a surrogate with other weights")
        if self._choice[2] == seed:
            raise NotApplicable(
                f"'{self.kind}' is trained with seed {seed} itself: a surrogate needs another"
            )
        other: Defense = DEFENSES.create(self.name, {**self.params, "train_seed": seed})
        return other

    def identity(self) -> dict[str, Any]:
        """Name and parameters; in place of the weights' path their digest, and what they say of their training.

        Raises:
            WeightsError: there are no weights.
        """
        self._network()
        params = {key: value for key, value in self.params.items() if key not in _CHOICE}
        trained = {key: self.meta[key] for key in ("recipe", "profile", "role", "seed") if key in self.meta}
        return {
            "name": self.name, "params": params, "version": self.version, "weights": self.sha256, "trained": trained,
        }  # fmt: skip

    def _network(self) -> torch.nn.Module:
        if self.network is None:
            raise WeightsError(f"defense '{self.kind}' has no weights (parameter 'weights'): {self._how()}")
        return self.network

    def _how(self) -> str:
        own = f"python -m bench train --defense {self.kind} --role ROLE --profile PROFILE makes them"
        return f"{self.source}; {own}" if self.source else own
