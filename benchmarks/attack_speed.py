"""Seconds and passes of our attacks beside those of other libraries and the bare passes, on the mini WideResNet.

    OMP_NUM_THREADS=1 python -m benchmarks.attack_speed [--images 64] [--repeats 5] [--only ddn ...] [--markdown FILE]

Everything runs on one thread, in a process that keeps freed memory as the workers of a run do, and calls the same
network through the same adapter. Seconds are processor time, which other processes do not lengthen by waiting for the
core. Contestants take turns, in an order that is drawn anew for every repeat, since what ran before leaves its mark on
memory and caches, and ratios are medians over repeats of two runs of the same repeat: what else the machine does then
hits both. Attacks that take little time are repeated more.

`floor` is what the passes that our attack made would cost without an attack around them: as many forward and backward
passes of the whole batch. Passes are counted at the network, per image. Beside every time stands what it bought: the
share of images misclassified, and the median length of the perturbation of those (L2, or L-infinity for attacks in
that norm).

Libraries other than foolbox take part where they can be imported: `bash tools/libraries.sh` installs them.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from bench.memory import keep_freed
from bench.protocols import TargetModel
from bench.registry import MODELS
from benchmarks.contestants import Case, Network, digits, markdown, table

EPS, ALPHA = 8 / 255, 2 / 255

SHORTEST = 4.0
"""Seconds that our attack runs in all, at least."""


class Counter:
    """Counts images that pass the network, forward and backward."""

    def __init__(self, network: nn.Module) -> None:
        self.forwards = self.backwards = 0
        network.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.forwards += len(output)
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, grad: Tensor) -> None:
        self.backwards += len(grad)


def cases() -> list[Case]:
    """What is compared."""
    ddn = {"foolbox": ("DDNAttack", {"steps": 100}), "adv_lib": ("ddn", {"steps": 100, "levels": None})}
    deepfool: dict[str, tuple[str, dict[str, Any]]] = {
        "foolbox": ("L2DeepFoolAttack", {}),
        "torchattacks": ("DeepFool", {}),
        "art": ("DeepFool", {"max_iter": 50, "nb_grads": 10}),
        "adv_lib": ("df", {"steps": 50}),
    }
    return [
        Case(
            "fgsm",
            ("fgsm", {}),
            {
                "foolbox": ("LinfFastGradientAttack", {}),
                "torchattacks": ("FGSM", {"eps": EPS}),
                "art": ("FastGradientMethod", {"eps": EPS}),
            },
            EPS,
            float("inf"),
        ),
        Case(
            "pgd, 20 steps",
            ("pgd", {"steps": 20}),
            {
                "foolbox": ("LinfProjectedGradientDescentAttack", {"abs_stepsize": ALPHA, "steps": 20}),
                "torchattacks": ("PGD", {"eps": EPS, "alpha": ALPHA, "steps": 20}),
                "art": ("ProjectedGradientDescent", {"eps": EPS, "eps_step": ALPHA, "max_iter": 20}),
            },
            EPS,
            float("inf"),
        ),
        Case(
            "mi_fgsm, 10 steps",
            ("mi_fgsm", {"eps": "8/255"}),
            {
                "foolbox": (
                    "LinfMomentumIterativeFastGradientMethod",
                    {"abs_stepsize": EPS / 10, "steps": 10, "random_start": False},
                ),
                "torchattacks": ("MIFGSM", {"eps": EPS, "alpha": EPS / 10, "steps": 10}),
            },
            EPS,
            float("inf"),
        ),
        Case("ddn, 100 steps", ("ddn", {"levels": None}), ddn),
        Case(
            "ddn, 44 steps + 10 halvings, against 100",
            ("ddn", {"steps": 44, "refine": 10, "gamma": 0.08, "initial_norm": 0.4, "levels": None}),
            ddn,
        ),
        Case("deepfool", ("deepfool", {}), deepfool),
        Case("deepfool, 4 candidates, against all", ("deepfool", {"candidates": 4}), deepfool),
        Case(
            "deepfool_linf",
            ("deepfool_linf", {}),
            {
                "foolbox": ("LinfDeepFoolAttack", {}),
                "adv_lib": ("df", {"steps": 50, "norm": float("inf")}),
            },
            None,
            float("inf"),
        ),
        Case(
            "cw_l2, 9 x 100 steps",
            ("cw_l2", {"steps": 100}),
            {
                "foolbox": ("L2CarliniWagnerAttack", {"steps": 100}),
                "art": ("CarliniL2Method", {"max_iter": 100, "binary_search_steps": 9}),
                "adv_lib": ("carlini_wagner_l2", {"max_iterations": 100}),
            },
            images=32,
        ),
        Case(
            "stadv, 100 steps",
            ("stadv", {"steps": 100}),
            {"advertorch": ("SpatialTransformAttack", {"max_iterations": 100})},
            images=32,
        ),
        Case(
            "stadv, 40 larger steps, against 100",
            ("stadv", {"steps": 40, "lr": 0.08}),
            {"advertorch": ("SpatialTransformAttack", {"max_iterations": 100})},
            images=32,
        ),
        # Where the search for c begins near its end; as DDN's, a setting of ours against the other's usual one.
        Case(
            "cw_l2, 6 x 60 steps from c = 1, 3 refined, against 9 x 100",
            ("cw_l2", {"steps": 60, "binary_search_steps": 6, "initial_c": 1.0, "refined": 3}),
            {"foolbox": ("L2CarliniWagnerAttack", {"steps": 100})},
            images=32,
        ),
    ]


# -- measuring ---------------------------------------------------------------------------------------------------------
def bare(network: nn.Module, images: Tensor, forwards: int, backwards: int) -> None:
    """So many forward passes of the batch, with the backward passes spread evenly over them."""
    done = 0
    for i in range(forwards):
        x = images.clone().requires_grad_(True)
        total = network(x).sum()
        until = round(backwards * (i + 1) / forwards)
        for k in range(done, until):
            torch.autograd.grad(total, x, retain_graph=k + 1 < until)
        done = until


@dataclass
class Times:
    """What was seen of one contestant."""

    seconds: list[float] = field(default_factory=list)
    forwards: float = 0.0
    backwards: float = 0.0
    success: float = 0.0
    distance: float = float("nan")


def measure(
    case: Case, target: TargetModel, counter: Counter, images: Tensor, labels: Tensor, repeats: int
) -> dict:
    """`Times` of each contestant of a case by name, `floor` among them."""
    network = Network(target)
    runs = {name: case.run(name, target) for name in ["ours", *case.libraries()]}
    seen = {name: Times() for name in [*runs, "floor"]}
    passes = [0, 0]

    def once(name: str) -> None:
        counter.forwards = counter.backwards = 0
        begun = time.process_time()
        if name == "floor":
            bare(network, images, *passes)
        else:
            out = runs[name](images, labels)
        seen[name].seconds.append(time.process_time() - begun)
        seen[name].forwards = counter.forwards / len(images)
        seen[name].backwards = counter.backwards / len(images)
        if name == "ours":
            passes[:] = [max(1, round(seen[name].forwards)), round(seen[name].backwards)]
        if name != "floor" and len(seen[name].seconds) == 1:
            with torch.no_grad():
                wrong = network(out).argmax(1) != labels
            delta = (out - images).flatten(1)[wrong].norm(case.norm, dim=1)
            seen[name].success = float(wrong.float().mean())
            seen[name].distance = float(delta.median()) if len(delta) else float("nan")

    # Not counted: what is loaded or chosen at the first call; it also tells the floor its passes.
    warm = slice(0, min(8, len(images)))
    for run in runs.values():
        if case.images is None:
            run(images[warm], labels[warm])
    once("ours")
    seen["ours"].seconds.clear()
    draw = random.Random(0)
    while len(seen["ours"].seconds) < repeats or sum(seen["ours"].seconds) < SHORTEST:
        for name in draw.sample(list(seen), len(seen)):
            once(name)
    return seen


def ratio(ours: Times, other: Times) -> float:
    """Median over repeats of our time over the other's."""
    return statistics.median(a / b for a, b in zip(ours.seconds, other.seconds, strict=True))


HEADER = ("attack", "by", "images", "seconds", "ours / it", "forwards", "backwards", "fooled", "length")
WORDS = ("attack", "by")


def cells(case: Case, count: int, seen: Mapping[str, Times]) -> list[tuple[str, ...]]:
    """The rows of one case, as `HEADER` has them."""
    rows = []
    for name, times in seen.items():
        bought = ("", "") if name == "floor" else (f"{times.success:.1%}", f"{times.distance:.4f}")
        rows.append((
            case.label if name == "ours" else "",
            name,
            str(count),
            f"{statistics.median(times.seconds):.3f}",
            "" if name == "ours" else f"{ratio(seen['ours'], times):.2f}",
            f"{times.forwards:.1f}",
            f"{times.backwards:.1f}",
            *bought,
        ))  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--images", type=int, default=64, help="images in the batch (at most 32 for cw_l2)")
    parser.add_argument("--repeats", type=int, default=5, help="times that every contestant runs, at least")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose label begins with one of these")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    options = parser.parse_args(arguments)
    if options.images < 1 or options.repeats < 1:
        parser.error("--images and --repeats: expected 1 or more")
    chosen = [c for c in cases() if not options.only or c.label.startswith(tuple(options.only))]
    if not chosen:
        parser.error(f"--only: no such case; there are {', '.join(c.label for c in cases())}")
    torch.set_num_threads(1)
    keep_freed()
    target = MODELS.create("mini_wrn").load(torch.device("cpu"))
    images, labels = digits(options.images)
    counter = Counter(target.network)
    groups = []
    console = Console(width=130)
    for case in chosen:
        count = min(case.images or options.images, options.images)
        console.print(f"{case.label} ...", style="dim")
        seen = measure(case, target, counter, images[:count], labels[:count], options.repeats)
        groups.append(cells(case, count, seen))
    printed = table("attack speed: mini_wrn, mini_digits, one thread", HEADER, WORDS)
    for rows in groups:
        for row in rows:
            printed.add_row(*row)
        printed.add_section()
    console.print(printed)
    if options.markdown is not None:
        options.markdown.write_text(markdown(HEADER, [*itertools.chain(*groups)], WORDS), encoding="utf-8")


if __name__ == "__main__":
    main()
