"""Seconds and passes of our attacks beside those of other libraries and the bare passes, on the mini WideResNet.

    OMP_NUM_THREADS=1 python -m benchmarks.attack_speed [--images 64] [--repeats 5] [--only ddn ...] [--markdown FILE]

Everything runs on one thread, in a process that keeps freed memory as the workers of a run do, and calls the same
network through the same adapter. Seconds are processor time, which other processes do not lengthen by waiting for the
core. Contestants take turns, in an order that is drawn anew for every repeat, since what ran before leaves its mark on
memory and caches, and ratios are medians over repeats of two runs of the same repeat: what else the machine does then
hits both. Attacks that take little time are repeated more.

Where an attack looks for the nearest adversarial image, every library takes part with its defaults and with our
hyper-parameters, as far as it has them. A library counts as `as near` with a setting if that fools as many images and
neither the median nor the mean length of its perturbations is more than 1 % above ours; the second table says how we
stand against the fastest of those, or where there is none against the one that comes nearest. Attacks with an eps all
run with the same settings, and what counts is that they fool as many images, less one in twenty, on the mean over
all repeats: their random starts differ.

`floor` is what the passes that our attack made would cost without an attack around them: as many forward and backward
passes of the whole batch. Passes are counted at the network, per image. Beside every time stands what it bought: the
share of images misclassified, and the median and mean length of the perturbation of those (L2, or L-infinity for
attacks in that norm). Cases that end in `another problem` are beside a library that does not transform its images as
ours does there: neither times nor success say who is better.

Libraries other than foolbox take part where they can be imported: `bash tools/libraries.sh` installs them.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from bench.memory import keep_freed
from bench.protocols import TargetModel
from bench.registry import MODELS
from benchmarks import attack_strength
from benchmarks.contestants import MOVING, NEWTON, Case, Network, digits, markdown, table

EPS, ALPHA, INF = 8 / 255, 2 / 255, float("inf")
CW_IMAGES = 32

SAME = 1.01
"""Lengths up to this factor apart count as equal."""

SHORTEST = 1.0
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
    return [*_budgets(), *_ddn(), *_deepfool(), *_carlini_wagner(), *_stadv()]


def _budgets() -> list[Case]:
    """Attacks with an eps, all with the same settings."""
    named = {case.label: case for case in attack_strength.cases(steps=10)}
    pgd = {
        "foolbox": ("LinfProjectedGradientDescentAttack", {"abs_stepsize": ALPHA, "steps": 20}),
        "torchattacks": ("PGD", {"eps": EPS, "alpha": ALPHA, "steps": 20}),
        "art": ("ProjectedGradientDescent", {"eps": EPS, "eps_step": ALPHA, "max_iter": 20}),
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
            INF,
        ),
        Case("pgd, 20 steps", ("pgd", {"steps": 20}), pgd, EPS, INF),
        # As where attack and evaluation share the pipeline.
        Case("pgd, 20 steps, fooled leave", ("pgd", {"steps": 20, "stop_when_fooled": True}), pgd, EPS, INF),
        *(
            named[label]
            for label in (
                "mi_fgsm, 10 steps", "pgd, l2, 10 steps", "pgd_kl, 10 steps", "eot_pgd, 3 steps of 2 draws",
                "di_fgsm, 10 steps, shrunk", "dim, 10 steps, shrunk",
                "ti_fgsm, 10 steps", "apgd on ce, 10 steps", "apgd on ce, l2, 10 steps",
            )
        ),
        # The paper's transformation, which torchattacks has not: as published the network sees larger images.
        *(
            replace(named[label], label=f"{label}, another problem")
            for label in (
                "di_fgsm, 10 steps", "dim, 10 steps",
                "di_fgsm, 10 steps, native canvas", "dim, 10 steps, native canvas",
            )
        ),
    ]  # fmt: skip


def _ddn() -> list[Case]:
    def settings(*adv_lib: tuple[int, float]) -> dict[str, tuple[str, dict[str, Any]]]:
        """Both libraries by default and, with our first norm, at so many steps and with this gamma."""
        found: dict[str, tuple[str, dict[str, Any]]] = {
            "foolbox": ("DDNAttack", {"steps": 100}),
            "adv_lib": ("ddn", {"steps": 100, "levels": None}),
        }
        for number, (steps, gamma) in enumerate(adv_lib):
            name = f"{steps} steps, gamma {gamma}, norm 0.4"
            arguments = {"steps": steps, "init_norm": 0.4, "γ": gamma, "levels": None}
            found[f"adv_lib: {name}"] = ("ddn", arguments)
            if number == 0:
                arguments = {"steps": steps, "init_epsilon": 0.4, "gamma": gamma}
                found[f"foolbox: {name}"] = ("DDNAttack", arguments)
        return found

    newton = {**NEWTON, "initial_norm": 0.4}
    return [
        Case("ddn, 100 steps", ("ddn", {"levels": None}), settings()),
        Case(
            "ddn, 13 steps of Newton's",
            ("ddn", {**newton, "steps": 13}),
            {
                **settings((26, 0.15), (26, 0.2), (28, 0.12), (30, 0.12), (32, 0.12), (36, 0.08)),
                # Another algorithm for the same end.
                "adv_lib: fmn, 26 steps": ("fmn", {"norm": 2, "steps": 26}),
                "adv_lib: fmn, 50 steps": ("fmn", {"norm": 2, "steps": 50}),
            },
        ),
        Case(
            "ddn, 20 steps of Newton's",
            ("ddn", {**newton, "steps": 20}),
            settings((40, 0.08), (44, 0.08), (54, 0.08), (54, 0.12), (75, 0.05)),
        ),
    ]


def _deepfool() -> list[Case]:
    def settings(norm: float, *candidates: int) -> dict[str, tuple[str, dict[str, Any]]]:
        """The fast libraries by default, and the one that can with so many candidates."""
        cls = "L2DeepFoolAttack" if norm == 2 else "LinfDeepFoolAttack"
        found: dict[str, tuple[str, dict[str, Any]]] = {
            "foolbox": (cls, {}),
            "adv_lib": ("df", {"steps": 50, "norm": norm}),
        }
        for count in candidates:
            found[f"foolbox: {count} candidates"] = (cls, {"candidates": count})
        return found

    # Ten times slower: once, with the candidates of both cases.
    slow: dict[str, tuple[str, dict[str, Any]]] = {
        "torchattacks": ("DeepFool", {}),
        "art": ("DeepFool", {"max_iter": 50, "nb_grads": 10}),
        "art: 4 candidates": ("DeepFool", {"max_iter": 50, "nb_grads": 4}),
    }
    made = [Case("deepfool, beside slow libraries", ("deepfool", {}), slow, images=8)]
    for name, norm in (("deepfool", 2.0), ("deepfool_linf", INF)):
        made += [
            Case(name, (name, {}), settings(norm), None, norm),
            Case(f"{name}, 4 candidates", (name, {"candidates": 4}), settings(norm, 4), None, norm),
            Case(f"{name}, 10 candidates, then 2", (name, {"later": 2}), settings(norm, 4), None, norm),
            Case(
                f"{name}, 4 candidates, then 2",
                (name, {"candidates": 4, "later": 2}),
                settings(norm, 4, 2),
                None,
                norm,
            ),
        ]
    return made


def _carlini_wagner() -> list[Case]:
    def settings(steps: int, rounds: int, c: float) -> dict[str, tuple[str, dict[str, Any]]]:
        name = f"{rounds} x {steps} from c = {c:g}"
        return {
            f"foolbox: {name}": (
                "L2CarliniWagnerAttack",
                {"steps": steps, "binary_search_steps": rounds, "initial_const": c},
            ),
            f"adv_lib: {name}": (
                "carlini_wagner_l2",
                {"max_iterations": steps, "binary_search_steps": rounds, "initial_const": c},
            ),
        }

    linf: dict[str, tuple[str, dict[str, Any]]] = {
        f"adv_lib: {steps} steps at a c": (
            "carlini_wagner_linf",
            {"max_iterations": steps, "learning_rate": 0.01, "initial_const": 1.0},
        )
        for steps in (10, 15, 20, 30)
    }
    return [
        Case("cw_l2, 9 x 100", ("cw_l2", {"steps": 100}), settings(100, 9, 1e-3), images=CW_IMAGES),
        Case(
            "cw_l2, 6 x 60 from c = 1",
            ("cw_l2", {"steps": 60, "binary_search_steps": 6, "initial_c": 1.0}),
            settings(60, 6, 1.0),
            images=CW_IMAGES,
        ),
        Case(
            "cw_l2, 40 steps with c moving",
            ("cw_l2", {"steps": 40, **MOVING}),
            {
                **settings(100, 9, 1e-3),
                **settings(60, 6, 1.0),
                **settings(60, 4, 1.0),
                **settings(60, 3, 1.0),
                **settings(40, 4, 1.0),
            },
            images=CW_IMAGES,
        ),
        *(
            Case(label, ("cw_linf", params), linf, None, INF)
            for label, params in (
                ("cw_linf, 20 steps at a c", {"steps": 20, "lr": 0.01, "initial_c": 1.0}),
                ("cw_linf, 40 steps with c moving", {
                    "steps": 40, "initial_c": None, "c_rate": 0.1, "lr": 0.02, "final_lr": 0.001, "beta1": 0.5,
                    "shrink": 0.95,
                }),
            )
        ),
    ]  # fmt: skip


def _stadv() -> list[Case]:
    advertorch: dict[str, tuple[str, dict[str, Any]]] = {
        "advertorch": ("SpatialTransformAttack", {"max_iterations": 100}),
        "advertorch: 40 steps": ("SpatialTransformAttack", {"max_iterations": 40}),
        "advertorch: 40 steps, weight 0.05": (
            "SpatialTransformAttack",
            {"max_iterations": 40, "initial_const": 0.05},
        ),
    }
    return [
        Case("stadv, 100 steps", ("stadv", {"steps": 100}), advertorch, images=16),
        Case("stadv, 40 larger steps", ("stadv", {"steps": 40, "lr": 0.08}), advertorch, images=16),
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
    mean: float = float("nan")


def measure(
    case: Case, target: TargetModel, counter: Counter, images: Tensor, labels: Tensor, repeats: int
) -> dict:
    """`Times` of each contestant of a case by name, `floor` among them."""
    network = Network(target)
    runs = {name: case.run(name, target) for name in ["ours", *case.libraries()]}
    seen = {name: Times() for name in [*runs, "floor"]}
    passes = [0, 0]

    def once(name: str) -> None:
        start = len(seen[name].seconds)
        # Attacks with an eps begin anew in each repeat, all of them from the repeat's number.
        run = case.run("ours", target, start) if name == "ours" and case.eps is not None else runs.get(name)
        torch.manual_seed(start)
        np.random.seed(start)  # noqa: NPY002 - what ART draws from
        counter.forwards = counter.backwards = 0
        begun = time.process_time()
        if run is None:
            bare(network, images, *passes)
        else:
            out = run(images, labels).detach()
        seen[name].seconds.append(time.process_time() - begun)
        seen[name].forwards = counter.forwards / len(images)
        seen[name].backwards = counter.backwards / len(images)
        if name == "ours":
            passes[:] = [max(1, round(seen[name].forwards)), round(seen[name].backwards)]
        count = start + 1
        if run is None or count > (1 if case.eps is None else repeats):
            return
        with torch.no_grad():
            wrong = network(out).argmax(1) != labels
        # Some draw once for the whole batch: one run would be luck.
        seen[name].success += (float(wrong.float().mean()) - seen[name].success) / count
        if count == 1:
            delta = (out - images).flatten(1)[wrong].norm(case.norm, dim=1)
            if len(delta):
                seen[name].distance, seen[name].mean = float(delta.median()), float(delta.mean())

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


def as_near(case: Case, ours: Times, other: Times) -> bool:
    """Whether a library reaches what ours does (see the head of this file)."""
    if case.eps is not None:
        return other.success >= ours.success - 0.05
    shorter = other.distance <= SAME * ours.distance and other.mean <= SAME * ours.mean
    return shorter and other.success >= ours.success


HEADER = (
    "attack",
    "by",
    "images",
    "seconds",
    "ours / it",
    "forwards",
    "backwards",
    "fooled",
    "median",
    "mean",
    "as near",
)
WORDS = ("attack", "by", "as near")
VERDICT = ("attack", "fastest library as near", "ours / it", "2x")


def cells(case: Case, count: int, seen: Mapping[str, Times]) -> list[tuple[str, ...]]:
    """The rows of one case, as `HEADER` has them."""
    rows = []
    for name, times in seen.items():
        bought: tuple[str, ...] = ("", "", "", "")
        if name != "floor":
            near = name != "ours" and as_near(case, seen["ours"], times)
            bought = (
                f"{times.success:.1%}",
                f"{times.distance:.4f}",
                f"{times.mean:.4f}",
                "yes" if near else "",
            )
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


def verdict(case: Case, seen: Mapping[str, Times]) -> tuple[str, ...]:
    """Ours against the fastest library that is as near, or the nearest of all where none is, as `VERDICT` has it."""
    ours = seen["ours"]
    others = {name: times for name, times in seen.items() if name not in ("ours", "floor")}
    against = {name: ratio(ours, times) for name, times in others.items() if as_near(case, ours, times)}
    if against:
        name = shown = max(against, key=lambda name: against[name])
    elif others:
        name = min(others, key=lambda name: (-others[name].success, others[name].mean))
        shown = f"none; nearest {name}"
    else:
        return (case.label, "none", "", "")
    times, other = ratio(ours, others[name]), others[name]
    if not against and (other.mean < ours.mean or other.distance < ours.distance):
        # Neither is nearer than the other in both.
        return (case.label, shown, f"{times:.2f}", "")
    return (case.label, shown, f"{times:.2f}", "yes" if times <= 0.5 else "no")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--images", type=int, default=64, help="images in the batch (at most 32 for cw_l2, 16 for stadv)"
    )
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
    groups, verdicts = [], []
    console = Console(width=150)
    for case in chosen:
        count = min(case.images or options.images, options.images)
        console.print(f"{case.label} ...", style="dim")
        seen = measure(case, target, counter, images[:count], labels[:count], options.repeats)
        groups.append(cells(case, count, seen))
        verdicts.append(verdict(case, seen))
    printed = table("attack speed: mini_wrn, mini_digits, one thread", HEADER, WORDS)
    for rows in groups:
        for row in rows:
            printed.add_row(*row)
        printed.add_section()
    console.print(printed)
    stand = table("against the fastest library that is as near", VERDICT, VERDICT[:2])
    for row in verdicts:
        stand.add_row(*row)
    console.print(stand)
    if options.markdown is not None:
        text = markdown(VERDICT, verdicts, VERDICT[:2])
        text += "\n" + markdown(HEADER, [*itertools.chain(*groups)], WORDS)
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
