"""Attacks of this project and of other libraries as functions of images and labels, on one network.

Libraries outside the environment are looked for in `.libraries` too, where `tools/libraries.sh` installs them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from bench.protocols import ImageRNG, TargetModel
from bench.registry import ATTACKS, DATASETS
from bench.threat import ModelOracle, Victim

# Appended, never put first: torchattacks brings a package `robustbench` that is not robustbench.
sys.path.append(str(Path(__file__).resolve().parents[1] / ".libraries"))

# Searches of ours that are not in the papers, at the settings that are compared.
NEWTON: dict[str, Any] = {"newton": True, "gamma": 0.7, "alpha": 3.0, "levels": None}
MOVING: dict[str, Any] = {
    "binary_search_steps": 1, "initial_c": None, "c_rate": 0.1, "lr": 0.05, "final_lr": 0.003, "beta1": 0.5,
}  # fmt: skip

Run = Callable[[Tensor, Tensor], Tensor]
"""Adversarial images (B, 3, H, W) for images and their labels, or for the labels to reach where an attack has some."""


class Network(nn.Module):
    """The target's logits as libraries want them."""

    def __init__(self, target: TargetModel) -> None:
        super().__init__()
        self.target = target
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.target.logits(images)


@dataclass(frozen=True)
class Case:
    """Attacks to compare: ours by name and parameters, and those of libraries by class and arguments.

    A key of `others` is a library, or `library: setting` where it takes part with several settings.
    """

    label: str
    ours: tuple[str, dict[str, Any]]
    others: dict[str, tuple[str, dict[str, Any]]]
    eps: float | None = None
    norm: float = 2.0
    images: int | None = None
    targeted: bool = False

    def run(self, by: str, target: TargetModel, start: int = 0) -> Run:
        """The attack of `by`, `ours` or a library, on `target`; `start` seeds ours, libraries draw globally."""
        if by == "ours":
            return ours(target, *self.ours, start)
        return LIBRARIES[library(by)](Network(target), *self.others[by], self.eps, self.targeted)

    def libraries(self) -> list[str]:
        """Those of the others whose libraries can be imported."""
        return [name for name in self.others if importlib.util.find_spec(library(name)) is not None]


def library(contestant: str) -> str:
    """The library that a key of `Case.others` belongs to."""
    return contestant.split(":", 1)[0]


def digits(count: int) -> tuple[Tensor, Tensor]:
    """The first embedded test digits: images (B, 3, 32, 32) and labels (B,)."""
    dataset = DATASETS.create("mini_digits", {"count": count})
    samples = [dataset[i] for i in range(count)]
    return torch.stack([s.image for s in samples]), torch.tensor([s.target for s in samples])


def ours(target: TargetModel, name: str, params: dict[str, Any], start: int = 0) -> Run:
    """An attack of this project behind its oracle; `start` seeds what it draws."""

    attack = ATTACKS.create(name, params)

    def run(images: Tensor, labels: Tensor) -> Tensor:
        rng = ImageRNG.for_images(f"contest{start or ''}", map(str, range(len(images))))
        oracle = ModelOracle(Victim((target,)), attack, rng.fork("oracle"))
        return attack.run(oracle, images, labels.tolist(), rng.fork("attack"))

    return run


def foolbox(network: nn.Module, name: str, arguments: dict[str, Any], eps: float | None, goal: bool) -> Run:
    """An attack of foolbox."""
    import foolbox as fb

    model = fb.PyTorchModel(network, bounds=(0, 1), device="cpu")
    attack = getattr(fb.attacks, name)(**arguments)
    criterion = fb.criteria.TargetedMisclassification if goal else fb.criteria.Misclassification

    def run(images: Tensor, labels: Tensor) -> Tensor:
        raw, clipped, _ = attack(model, images, criterion(labels), epsilons=eps)
        return raw if eps is None else clipped

    return run


def torchattacks(
    network: nn.Module, name: str, arguments: dict[str, Any], eps: float | None, goal: bool
) -> Run:
    """An attack of torchattacks."""
    import torchattacks as ta

    cls = getattr(ta, name)
    # Those with a seed of their own would begin at the same place every time.
    seeded = {"seed": torch.initial_seed()} if "seed" in inspect.signature(cls).parameters else {}
    attack = cls(network, **seeded, **arguments)
    if goal:
        attack.set_mode_targeted_by_label(quiet=True)
    return attack  # type: ignore[no-any-return]


def art(network: nn.Module, name: str, arguments: dict[str, Any], eps: float | None, goal: bool) -> Run:
    """An attack of the Adversarial Robustness Toolbox."""
    from art.attacks import evasion
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        network, nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0, 1), device_type="cpu"
    )
    cls = getattr(evasion, name)

    def run(images: Tensor, labels: Tensor) -> Tensor:
        common = {"batch_size": len(images), "verbose": False, **({"targeted": True} if goal else {})}
        # FastGradientMethod has nothing to say.
        common = {key: value for key, value in common.items() if key in cls.attack_params}
        attack = cls(classifier, **common, **arguments)
        return torch.from_numpy(attack.generate(images.numpy(), F.one_hot(labels, 10).numpy()))

    return run


def adv_lib(network: nn.Module, name: str, arguments: dict[str, Any], eps: float | None, goal: bool) -> Run:
    """An attack of adv-lib."""
    from adv_lib import attacks

    def run(images: Tensor, labels: Tensor) -> Tensor:
        made: Tensor = getattr(attacks, name)(network, images, labels, targeted=goal, **arguments)
        return made.detach()

    return run


def advertorch(
    network: nn.Module, name: str, arguments: dict[str, Any], eps: float | None, goal: bool
) -> Run:
    """An attack of advertorch; what it fails on, which it returns black, comes back clean."""
    # Its last version imports this function, which torch has since dropped, for an attack that is not used here.
    vars(importlib.import_module("torch.autograd.gradcheck"))["zero_gradients"] = None
    from advertorch import attacks

    attack = getattr(attacks, name)(network, num_classes=10, targeted=goal, **arguments)

    def run(images: Tensor, labels: Tensor) -> Tensor:
        made: Tensor = attack.perturb(images, labels)
        return torch.where((made == 0).flatten(1).all(1).view(-1, 1, 1, 1), images, made)

    return run


def pyautoattack(
    network: nn.Module, name: str, arguments: dict[str, Any], eps: float | None, goal: bool
) -> Run:
    """A part of AutoAttack."""
    from pyautoattack import autopgd_base, square

    cls = getattr(square if name == "SquareAttack" else autopgd_base, name)
    attack = cls(network, eps=eps, device="cpu", seed=torch.initial_seed(), **arguments)
    return attack.perturb  # type: ignore[no-any-return]


LIBRARIES = {
    "foolbox": foolbox,
    "torchattacks": torchattacks,
    "art": art,
    "adv_lib": adv_lib,
    "advertorch": advertorch,
    "pyautoattack": pyautoattack,
}


def table(title: str, header: Sequence[str], words: Container[str]) -> Table:
    """An empty table for the terminal; columns named in `words` stand left, numbers right."""
    made = Table(title=title)
    for name in header:
        made.add_column(name, justify="left" if name in words else "right")
    return made


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: Container[str]) -> str:
    """The same with its rows, in markdown."""
    rule = ["---" if name in words else "--:" for name in header]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows)) + "\n"
