"""Random numbers that belong to an image, not to a batch.

Every random draw in an attack or a defense comes from an `ImageRNG`: one independent stream per image, seeded by a
hash of the cell's key and the image's id. Results therefore do not depend on batch size, order, device, number of
workers or the point at which a run was resumed. Numbers are drawn on the CPU and moved, so they are also the same on
every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; equal parts give equal seeds on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class ImageRNG:
    """Independent random streams, one per image of a batch.

    Args:
        seeds: one integer per image.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds: tuple[int, ...] | None = tuple(int(seed) for seed in seeds)
        self._count = len(self._seeds)
        self._derive: Callable[[], Iterable[int]] | None = None
        self._generators: list[torch.Generator] | None = None

    @classmethod
    def _lazy(cls, count: int, derive: Callable[[], Iterable[int]]) -> ImageRNG:
        """`count` streams whose seeds are derived on first use: attacks fork at every step, and most draw nothing."""
        made = cls(())
        made._seeds, made._count, made._derive = None, count, derive
        return made

    @classmethod
    def for_images(cls, key: object, ids: Iterable[str]) -> ImageRNG:
        """Streams for the images `ids` inside the cell `key`."""
        names = list(ids)
        return cls._lazy(len(names), lambda: (derive_seed(key, name) for name in names))

    def __len__(self) -> int:
        return self._count

    @property
    def seeds(self) -> tuple[int, ...]:
        """One integer per image."""
        if self._seeds is None:
            assert self._derive is not None
            self._seeds = tuple(self._derive())
        return self._seeds

    @property
    def generators(self) -> list[torch.Generator]:
        """The live generators (CPU), created on first use."""
        if self._generators is None:
            self._generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        return self._generators

    def fork(self, *name: object) -> ImageRNG:
        """New streams that depend on the seeds and `name` alone, not on what was drawn so far."""
        return self._lazy(len(self), lambda: (derive_seed(seed, *name) for seed in self.seeds))

    def select(self, index: Sequence[int] | Tensor) -> ImageRNG:
        """The streams of some of the images; they go on from where they are."""
        chosen = [int(i) for i in index]
        picked = ImageRNG([self.seeds[i] for i in chosen])
        picked._generators = [self.generators[i] for i in chosen]
        return picked

    def _stack(self, draw: Callable[[torch.Generator], Tensor], device: torch.device | str | None) -> Tensor:
        out = torch.stack([draw(generator) for generator in self.generators])
        return out if device is None else out.to(device)

    def uniform(
        self,
        shape: Sequence[int] = (),
        low: float = 0.0,
        high: float = 1.0,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Uniform numbers in [low, high), shape (B, *shape), float32."""
        out = torch.empty(len(self), *shape)
        # In place: what `torch.rand` would draw, in half the time where numbers are few and images many.
        for part, generator in zip(out.unbind(0), self.generators, strict=True):
            part.uniform_(generator=generator)
        if (low, high) != (0.0, 1.0):
            out = out * (high - low) + low
        return out if device is None else out.to(device)

    def normal(self, shape: Sequence[int] = (), device: torch.device | str | None = None) -> Tensor:
        """Standard normal numbers, shape (B, *shape), float32."""
        return self._stack(lambda g: torch.randn(tuple(shape), generator=g), device)

    def signs(self, shape: Sequence[int] = (), device: torch.device | str | None = None) -> Tensor:
        """-1 or +1 with equal chance, shape (B, *shape), float32."""
        return self._stack(lambda g: torch.randint(0, 2, tuple(shape), generator=g), device).float() * 2 - 1

    def integers(
        self, low: int, high: int, shape: Sequence[int] = (), device: torch.device | str | None = None
    ) -> Tensor:
        """Integers in [low, high), shape (B, *shape), int64."""
        return self._stack(lambda g: torch.randint(low, high, tuple(shape), generator=g), device)

    def permutation(self, n: int) -> Tensor:
        """A random order of range(n) per image, shape (B, n), int64."""
        return self._stack(lambda g: torch.randperm(n, generator=g), None)
