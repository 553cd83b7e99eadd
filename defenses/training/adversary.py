"""Who makes the adversarial images of the training: attacks on the target, or images made before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.errors import DataError, PluginError
from bench.protocols import Attack, Batch, ImageRNG, TargetModel
from bench.rng import derive_seed
from bench.threat import ModelOracle, Victim
from bench.weights import load_state, save_safetensors
from defenses.training.guide import whole_batches


class Adversary(Protocol):
    """Adversarial counterparts of a batch, (B, 3, H, W) in [0,1], detached; `draw` names the random numbers."""

    def __call__(self, batch: Batch, draw: object) -> Tensor: ...

    def identity(self) -> Any:
        """What it is, for the recipe's key."""
        ...

    def prepare(self, batches: Iterable[Batch], cache: Path | None, key: str) -> None:
        """Called once before training, with all images in order."""
        ...


def attacks_identity(attacks: Sequence[tuple[Attack, float]], static: bool) -> Any:
    """What an `AttackAdversary` is, for the recipe's key; needs no target."""
    return {"attacks": [{"attack": a.identity(), "weight": w} for a, w in attacks], "static": static}


class AttackAdversary:
    """Attacks on the bare target through the harness's own oracle (level oblivious).

    Of several attacks each image gets one, at random by its weight (HGD trains on seven sets; the detection recipe of
    the alignment defense flips a coin between losses).

    Args:
        attacks: untargeted attacks with their weights.
        target: the model they see.
        static: every image is attacked once and keeps its result in all epochs, as HGD, CAFD and APE-GAN save theirs;
            otherwise each epoch attacks anew. All of them are kept in memory: for sets that do not fit, see
            `Precomputed`.

    Raises:
        PluginError: no attacks, a targeted one, or weights that are not positive.
    """

    def __init__(
        self, attacks: Sequence[tuple[Attack, float]], target: TargetModel, *, static: bool = False
    ) -> None:
        if not attacks or any(weight <= 0 for _, weight in attacks):
            raise PluginError("a training adversary needs at least one attack, each with a positive weight")
        for attack, _ in attacks:
            if attack.target is not None:
                raise PluginError(f"attack '{attack.name}' is targeted; training adversaries are untargeted")
        self.attacks, self.static = tuple(attacks), static
        self.target = target
        self._made: dict[str, Tensor] = {}

    def identity(self) -> Any:
        """The attacks with their weights, and whether their images are kept."""
        return attacks_identity(self.attacks, self.static)

    def prepare(self, batches: Iterable[Batch], cache: Path | None, key: str) -> None:
        """Attack all images of a static adversary, in this order; nothing to do for another.

        The order is fixed because the last bits of a network's results depend on the batch: a resumed training must
        see the same images.

        Args:
            batches: all training images.
            cache: file to keep the adversarial images in, for resuming; None = memory alone.
            key: the recipe's, checked when the file is read.

        Raises:
            WeightsError: the file is unreadable.
        """
        if not self.static or self._made:
            return
        if cache is not None and cache.exists():
            loaded = load_state(cache)
            if loaded.meta.get("key") == key:
                self._made = loaded.state
                return
        for batch in batches:
            made = self._run(batch, "static").cpu()
            self._made |= dict(zip(batch.ids, made.unbind(), strict=True))
        if cache is not None:
            save_safetensors(cache, self._made, meta={"key": key})

    def __call__(self, batch: Batch, draw: object) -> Tensor:
        """Adversarial images of `batch`; a static adversary ignores `draw`.

        Raises:
            DataError: a static adversary was not given an image to prepare.
        """
        if not self.static:
            return self._run(batch, draw)
        for name in batch.ids:
            if name not in self._made:
                raise DataError(f"training image {name} was not there when the adversarial images were made")
        return torch.stack([self._made[name] for name in batch.ids]).to(batch.images.device)

    def _run(self, batch: Batch, draw: object) -> Tensor:
        out = batch.images.clone()
        chosen = [self._choose(name, draw) for name in batch.ids]
        for k, (attack, _) in enumerate(self.attacks):
            index = [i for i, c in enumerate(chosen) if c == k]
            if not index:
                continue
            part = _select(batch, index)
            rng = ImageRNG.for_images(("train", k, draw), part.ids)
            oracle = ModelOracle(Victim((self.target,)), attack, rng.fork("oracle"))
            with whole_batches(self.target, len(part)):
                out[index] = attack.run(oracle, part.images, part.targets, rng).detach().clamp(0, 1)
        return out

    def _choose(self, name: str, draw: object) -> int:
        if len(self.attacks) == 1:
            return 0
        weights = torch.tensor([w for _, w in self.attacks], dtype=torch.float64).cumsum(0)
        point = (derive_seed("choose", draw, name) % 2**32) / 2**32 * float(weights[-1])
        return min(int((weights <= point).sum()), len(self.attacks) - 1)


class Precomputed:
    """Images made before, by id.

    Args:
        images: image (3, H, W) in [0,1] of every id the training data has.
        digest: what they are, for the recipe's key.
    """

    def __init__(self, images: Mapping[str, Tensor], digest: str) -> None:
        self.images, self.digest = images, digest

    def identity(self) -> Any:
        """The digest."""
        return {"precomputed": self.digest}

    def prepare(self, batches: Iterable[Batch], cache: Path | None, key: str) -> None:
        """Nothing: they are there."""

    def __call__(self, batch: Batch, draw: object) -> Tensor:
        """Their images.

        Raises:
            DataError: one is missing or of another size.
        """
        for name, clean in zip(batch.ids, batch.images, strict=True):
            if name not in self.images or self.images[name].shape != clean.shape:
                raise DataError(
                    f"the precomputed adversarial images have none of size {tuple(clean.shape)} for image {name}"
                )
        return torch.stack([self.images[name] for name in batch.ids]).to(batch.images.device)


def _select(batch: Batch, index: Sequence[int]) -> Batch:
    return Batch(
        batch.images[list(index)],
        tuple(batch.targets[i] for i in index),
        tuple(batch.ids[i] for i in index),
    )
