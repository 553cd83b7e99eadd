"""Defenses in a row, and backward passes through defenses that have no gradient.

`bpda` is the one place where Backward Pass Differentiable Approximation (Athalye, Carlini, Wagner, ICML 2018, section
4.1) is built: the value is the defense's own, the gradient is its surrogate's at the same input. In a chain every
member is treated so at the input it really got, hence the gradient of `[a, b]` at x is
J_a(x)^T J_b(a(x))^T g with J the Jacobians of the surrogates. Only what has no gradient is replaced: in a chain that is
not differentiable because of some members, the J of the others are their true ones. Otherwise a codec behind a learned
purifier would hide the purifier too, from `white_box` by the codec and from `bpda` by the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import CheckError, PluginError
from bench.protocols import Defense, Site, Warped, identity_geometry
from bench.rng import ImageRNG

Step = Callable[[Defense, Tensor, ImageRNG | None], Warped]


class Chain(Defense):
    """Several defenses, first to last: `[a, b]` purifies with a, then with b.

    Every member's output is validated and clamped before the next one sees it; geometries are composed. Each member
    draws from streams of its own, so adding a draw to one does not change the others.

    Args:
        members: defenses in the order they are applied; nested chains are flattened.

    Raises:
        PluginError: there are no members.
    """

    def __init__(self, members: Sequence[Defense]) -> None:
        super().__init__()
        flat: list[Defense] = []
        for member in members:
            flat.extend(member.members if isinstance(member, Chain) else [member])
        if not flat:
            raise PluginError("a chain needs at least one defense")
        self._modules_in_order = nn.ModuleList(flat)
        self.members: tuple[Defense, ...] = tuple(flat)
        self.name = "+".join(member.name for member in flat)
        self.params = {"members": [{"name": member.name, "params": dict(member.params)} for member in flat]}
        self.stochastic = any(member.stochastic for member in flat)
        # Constants of an ordinary defense, but properties of the members here.
        self.differentiable = all(member.differentiable for member in flat)
        self.trained = any(member.trained for member in flat)
        limited = [member.tasks for member in flat if member.tasks is not None]
        self.tasks = frozenset.intersection(*limited) if limited else None
        self.unavailable = next((member.unavailable for member in flat if member.unavailable), None)

    def forward(self, images: Tensor, *args: Any) -> Warped:
        """All members in order; always `Warped`, with the composed geometry."""
        return self._compose(lambda member, x, rng: member.purify(x, rng), images, *args)

    def surrogate(self, images: Tensor, *args: Any) -> Warped:
        """The exact values of `forward`, with the gradient of each member's surrogate at that member's own input.

        Where some members have a gradient and others not, those that do keep theirs.
        """
        return self._compose(_backward_pass if self.mixed else bpda, images, *args)

    @property
    def mixed(self) -> bool:
        """Whether some members are differentiable and others are not."""
        return len({member.differentiable for member in self.members}) == 2

    def identity(self) -> dict[str, Any]:
        """Name and the identities of all members, in order."""
        return {"name": self.name, "members": [member.identity() for member in self.members]}

    def placed(self, site: Site) -> Chain:
        """The chain of its members as they stand at `site`."""
        members = [member.placed(site) for member in self.members]
        return self if all(a is b for a, b in zip(members, self.members, strict=True)) else Chain(members)

    def retrained(self, seed: int) -> Chain:
        """The chain with its learned members retrained."""
        if not self.trained:
            super().retrained(seed)
        return Chain([member.retrained(seed) if member.trained else member for member in self.members])

    def check_input(self, size: tuple[int, int]) -> None:
        """Raise NotApplicable when a member cannot take the size that reaches it."""
        for index, member in enumerate(self.members):
            member.check_input(size)
            later = self.members[index + 1 :]
            if any(type(other).check_input is not Defense.check_input for other in later):
                size = _output_size(member, size)

    def _compose(self, step: Step, images: Tensor, rng: ImageRNG | None = None) -> Warped:
        current = Warped(images, identity_geometry(images))
        for member, streams in zip(self.members, self._streams(rng), strict=True):
            moved = step(member, current.images, streams)
            current = Warped(moved.images, current.geometry.then(moved.geometry))
        return current

    def _streams(self, rng: ImageRNG | None) -> list[ImageRNG | None]:
        """Streams for every member that depend on the state of `rng`, which goes on by one draw."""
        if rng is None or not self.stochastic:
            return [None] * len(self.members)
        base = ImageRNG(rng.integers(0, 2**62).tolist())
        return [base.fork(index, member.name) for index, member in enumerate(self.members)]


def bpda(defense: Defense, images: Tensor, rng: ImageRNG | None = None) -> Warped:
    """What `defense.purify` returns, bit for bit, with the gradient of the defense's surrogate.

    Args:
        defense: any defense; a chain is differentiated member by member. One that is its own surrogate says so with
            `surrogate = forward` in its class and runs once.
        images: (B, 3, H, W) in [0,1].
        rng: streams for a stochastic defense; value and surrogate see the same draws.

    Returns:
        Purified images in [0,1] and their geometry.

    Raises:
        CheckError: the surrogate's output has another shape than the defense's.
    """
    if isinstance(defense, Chain):
        return defense.purify_surrogate(images, rng)
    if type(defense).surrogate is type(defense).forward:
        return defense.purify(images, rng)
    replay = None if rng is None else _twin(rng)
    with torch.no_grad():
        exact = defense.purify(images, rng)
    stand_in = defense.purify_surrogate(images, replay).images
    if stand_in.shape != exact.images.shape:
        raise CheckError(
            f"defense '{defense.name}': the surrogate returns shape {tuple(stand_in.shape)}, "
            f"the defense {tuple(exact.images.shape)}"
        )
    # The difference is exactly zero, so the sum is the exact value; adding (exact - stand_in) would round.
    return Warped(exact.images + (stand_in - stand_in.detach()), exact.geometry)


def _backward_pass(member: Defense, images: Tensor, rng: ImageRNG | None) -> Warped:
    """`bpda` for what has no gradient of its own."""
    return member.purify(images, rng) if member.differentiable else bpda(member, images, rng)


def _twin(rng: ImageRNG) -> ImageRNG:
    """Streams that yield what `rng` is about to yield, without advancing it."""
    twin = ImageRNG(rng.seeds)
    for copy, generator in zip(twin.generators, rng.generators, strict=True):
        copy.set_state(generator.get_state())
    return twin


@torch.no_grad()
def _output_size(defense: Defense, size: tuple[int, int]) -> tuple[int, int]:
    """The size (H, W) that images of `size` leave `defense` with."""
    device = next((p.device for p in defense.parameters()), torch.device("cpu"))
    return defense.purify(torch.zeros(1, 3, *size, device=device), ImageRNG([0])).geometry.out_size
