"""Wrong labels for targeted attacks on what has many labels an image: label maps and objects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.errors import GridError, unknown
from bench.protocols import ImageRNG

__all__ = ["check_rule", "check_wrong", "wrong_classes"]

_RULES = ("class:K", "next", "random")


def check_rule(rule: str, task: str, num_classes: int, rules: Sequence[str] = _RULES) -> int | None:
    """Refuse a rule that `task` does not know, or that names a class a model of `num_classes` does not have.

    Returns:
        K of `class:K`, None for other rules.

    Raises:
        GridError: see above, or there is no wrong class to choose.
    """
    if num_classes < 2:
        raise GridError(f"target '{rule}': a model of {num_classes} classes has no wrong class")
    if rule in rules and rule != "class:K":
        return None
    if not rule.startswith("class:"):
        raise GridError(unknown(f"target rule of task {task}", rule, rules))
    number = rule.removeprefix("class:").strip()
    if not number.isdecimal():
        raise GridError(f"target '{rule}': expected class:K with a class number, such as class:3")
    if int(number) >= num_classes:
        raise GridError(
            f"target '{rule}': class {number} does not exist, the model has {num_classes} classes"
        )
    return int(number)


def wrong_classes(rule: str, task: str, num_classes: int, rng: ImageRNG) -> np.ndarray:
    """The class that each class is to be mistaken for, (B, num_classes) int64.

    `next`: the class plus one, the last goes to 0. `random`: any other class with equal chance, drawn for each class of
    each image (Xie et al. 2017 map classes to classes). `class:K`: class K, which itself stays K.

    Raises:
        GridError: unknown rule, a class the model does not have, or no wrong class to choose.
    """
    number = check_rule(rule, task, num_classes)
    classes = np.arange(num_classes)
    if rule == "next":
        return np.tile((classes + 1) % num_classes, (len(rng), 1))
    if rule == "random":
        # As many numbers for every image, so that no image depends on how many labels another has.
        steps = rng.integers(1, num_classes, (num_classes,)).numpy()
        wrong: np.ndarray = (classes + steps) % num_classes
        return wrong
    return np.full((len(rng), num_classes), number)


def check_wrong(rule: str, labels: np.ndarray, wrong: np.ndarray) -> None:
    """Refuse a target that asks for what an image is already: `class:K` where it shows nothing else.

    Args:
        rule: the rule the target comes from.
        labels: the image's true labels, those that count.
        wrong: what they are to be mistaken for, in the same shape.

    Raises:
        GridError: there are labels, and none of them is to change.
    """
    if labels.size and np.array_equal(labels, wrong):
        raise GridError(
            f"target '{rule}': an image has no label but {int(labels.flat[0])} itself; use next or random"
        )
