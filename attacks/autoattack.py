"""AutoAttack through pyautoattack, one image at a time."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from attacks.iterative import Radius, Steps
from attacks.projections import check_radius, make_projection
from attacks.scores import as_labels
from attacks.wrapped import OracleModel, contained
from bench.errors import NotApplicable
from bench.protocols import Attack, ImageRNG, Oracle
from bench.registry import ATTACKS

Member = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]
MEMBERS: dict[str, tuple[Member, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}

# The library's warnings would come once per image; the harness checks randomness and zero gradients itself.
_quiet = logging.getLogger(f"{__name__}.library")
_quiet.setLevel(logging.ERROR)


@ATTACKS.register_module(name="autoattack")
class AutoAttack(Attack):
    """The cascade of Croce and Hein (ICML 2020), untargeted: each member attacks what the ones before left standing.

    `standard`: APGD-CE, targeted APGD on the DLR loss, targeted FAB, Square. `rand`, for stochastic defenses: APGD-CE
    and APGD-DLR on gradients averaged over 20 draws; the library does the averaging, the threat model's `eot` is not
    used. Success is measured on the pipeline under attack.

    The library returns the clean image wherever no member succeeded, and for images that were wrong to begin with.
    Carried over to another pipeline (levels oblivious and transfer) such images are no attack at all: either read those
    cells together with the level at which they were crafted, or ask for `failed: best`.

    The library draws from torch's global generator and makes one stream serve a whole batch. Each image is therefore
    attacked by itself under its own seed; the generator is put back afterwards. It takes its gradients itself: backward
    passes are not counted (rows say 0).

    Args:
        version: `standard`, `plus` or `rand`.
        norm: linf or l2.
        eps: radius in [0,1] pixel units.
        attacks: members to run in this order in place of the version's.
        steps: steps of APGD and FAB; AutoAttack's are 100.
        queries: queries of Square; AutoAttack's are 5000.
        failed: for an image that no member fooled: the `clean` image, as published, or the point of largest
            cross-entropy that one more run of APGD finds (`best`).
        group: images attacked together. Above 1 a GPU is used better, but an image's result depends on its
            neighbours in the batch and is no longer reproducible image by image.
    """

    tasks = frozenset({"classification"})
    needs = frozenset({"gradient", "logits"})
    monotone = False
    stochastic = True
    counts_backwards = False

    def __init__(
        self,
        version: Literal["standard", "plus", "rand"] = "standard",
        norm: Literal["linf", "l2"] = "linf",
        eps: Radius = Fraction(8, 255),
        attacks: list[Member] | None = None,
        steps: Steps = 100,
        queries: Annotated[int, Field(ge=1)] = 5000,
        failed: Literal["clean", "best"] = "clean",
        group: Annotated[int, Field(ge=1)] = 1,
    ) -> None:
        check_radius(norm, eps)
        if attacks is not None and not attacks:
            raise ValueError("attacks: the list is empty; leave it out for the version's own")
        self.version_name, self.norm, self.eps = version, norm, eps
        self.members: tuple[Member, ...] = MEMBERS[version] if attacks is None else tuple(attacks)
        self.steps, self.queries, self.failed, self.group = steps, queries, failed, group
        self.returns_clean, self.averages = failed == "clean", version == "rand"
        self.also_scores = "square" in self.members

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "library": f"pyautoattack {importlib.metadata.version('pyautoattack')}"}

    def passes(self) -> int:
        """An upper bound: images that are fooled early cost far less."""
        draws = 20 if self.version_name == "rand" else 1
        cost = {
            "apgd-ce": self.steps * draws,
            "apgd-dlr": self.steps * draws,
            "apgd-t": 9 * self.steps * draws,
            "fab": 9 * self.steps,
            "fab-t": 9 * self.steps,
            "square": self.queries // 3,
        }
        return sum(cost[member] for member in self.members)

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Adversarial images (B, 3, H, W); the clean image (or, `failed: best`, its best) where none was found.

        Raises:
            NotApplicable: the DLR losses need more classes than the victim has, or the images do not suit a member.
        """
        least = 4 if "apgd-t" in self.members else 3 if "apgd-dlr" in self.members else 2
        if oracle.num_classes < least:
            raise NotApplicable(
                f"AutoAttack ({', '.join(self.members)}) needs {least} classes, the model has {oracle.num_classes}"
            )
        if self.norm == "l2" and "square" in self.members and images.shape[-2] != images.shape[-1]:
            raise NotApplicable(
                f"pyautoattack's Square in L2 takes square images only, these are {tuple(images.shape[-2:])}"
            )
        clean = images.detach()
        labels = as_labels(targets, clean.device)
        outs = []
        for first in range(0, len(clean), self.group):
            part = torch.arange(first, min(first + self.group, len(clean)))
            at = part.to(clean.device)
            outs.append(self._attack(oracle.select(part), clean[at], labels[at], rng.seeds[first]))
        assert self.norm is not None
        return make_projection(self.norm, clean, float(self.eps or 0))(torch.cat(outs))

    def _attack(self, oracle: Oracle, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        from pyautoattack import AutoAttack as Library

        with contained(seed, images.device):
            library = Library(
                OracleModel(oracle, images), norm="L2" if self.norm == "l2" else "Linf",
                eps=float(self.eps or 0), seed=seed, version=self.version_name, device=images.device,
            )  # fmt: skip
            self._configure(library, oracle.num_classes)
            out, _ = library.run_standard_evaluation(images.clone(), labels, batch_size=len(images))
            if self.failed == "best":
                out = self._best(library, images, labels, out, seed)
        found: Tensor = out.detach().to(images.dtype)
        return found

    def _configure(self, library: Any, num_classes: int) -> None:
        library.attacks_to_run = list(self.members)
        library.logger = library.apgd.logger = library.apgd_targeted.logger = _quiet
        for member in (library.apgd, library.apgd_targeted):
            # The checkpoints of APGD are set by its constructor.
            member.n_iter = self.steps
            member.n_iter_2 = max(int(0.22 * self.steps), 1)
            member.n_iter_min = max(int(0.06 * self.steps), 1)
            member.size_decr = max(int(0.03 * self.steps), 1)
        library.fab.n_iter, library.square.n_queries = self.steps, self.queries
        for member in (library.apgd_targeted, library.fab):
            member.n_target_classes = min(member.n_target_classes, num_classes - 1)

    def _best(self, library: Any, images: Tensor, labels: Tensor, out: Tensor, seed: int) -> Tensor:
        """`out`, with the point of largest loss in the place of images that came back clean and correct."""
        same = (out == images).flatten(1).all(1)
        with torch.no_grad():
            same &= library.get_logits(out).argmax(1) == labels
        if not same.any():
            return out
        torch.manual_seed(seed)
        library.apgd.loss = "ce"
        return torch.where(same.view(-1, 1, 1, 1), library.apgd.perturb(images, labels, best_loss=True), out)
