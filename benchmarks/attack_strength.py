"""Success of our attacks beside those of other libraries at equal eps, step size and steps.

    OMP_NUM_THREADS=1 python -m benchmarks.attack_strength [--count 500] [--steps 5] [--only pgd ...]
        [--starts 3] [--csv FILE] [--markdown FILE]

The victim is the mini WideResNet on the embedded test digits. eps is small enough that attacks fail on some images:
where all succeed, nothing is compared. An attack with an eps is judged by the share of images it gets misclassified
(that reach their target, where it has one); one that looks for the nearest adversarial image also by the median length
of its perturbation, an image that is not fooled counting as infinitely far. Ours is `not weaker` if it fools at least
as many less one point and its median length is at most 1.01 times theirs. Attacks that draw
random numbers run from several starts, and an image counts with the share of them that fool it: where ours then fools
fewer by more than a point, it is `within chance` if an exact sign test on the images that one of the two fools more
often does not reject, at 5 %, that they are equally strong. A library whose images
leave the budget is not compared.

foolbox and pyautoattack are dependencies of the project; `bash tools/libraries.sh` installs the others. Those that
cannot be imported are left out.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from scipy.stats import binomtest
from torch import Tensor

from bench.protocols import TargetModel
from bench.registry import ATTACKS, MODELS
from benchmarks.contestants import MOVING, NEWTON, Case, digits, markdown, table

INF = float("inf")
EPS, ALPHA, L2, L2_ALPHA = "4/255", "1/255", 0.5, 0.125
E, A = 4 / 255, 1 / 255
# Query attacks get more: at the eps of the others they find nothing in so few queries.
WIDE = "12/255"
# Images per call of the network, for all, where there are so many.
BATCH = 50


def cases(steps: int = 5) -> list[Case]:
    """What is compared; `steps` is the number of gradient steps of attacks with an eps."""
    return [
        *_single_step(), *_projected(steps), *_transferable(steps), *_auto(steps), *_scores(), *_nearest()
    ]  # fmt: skip


def _single_step() -> list[Case]:
    return [
        Case(
            "fgsm",
            ("fgsm", {"eps": EPS}),
            {
                "foolbox": ("LinfFastGradientAttack", {}),
                "torchattacks": ("FGSM", {"eps": E}),
                "art": ("FastGradientMethod", {"eps": E}),
            },
            E,
            INF,
        ),
        Case(
            "fgsm, l2",
            ("fgsm", {"norm": "l2", "eps": L2}),
            {"foolbox": ("L2FastGradientAttack", {}), "art": ("FastGradientMethod", {"eps": L2, "norm": 2})},
            L2,
        ),
        Case(
            "r_fgsm",
            ("r_fgsm", {"eps": EPS}),
            {"torchattacks": ("RFGSM", {"eps": E, "alpha": E / 2, "steps": 1})},
            E,
            INF,
        ),
    ]


def _projected(steps: int) -> list[Case]:
    foolbox = {"abs_stepsize": A, "steps": steps}
    others = {"eps": E, "alpha": A, "steps": steps}
    art = {"eps": E, "eps_step": A, "max_iter": steps}
    adv_lib = {"ε": E, "absolute_step_size": A, "steps": steps}
    ours = {"eps": EPS, "alpha": ALPHA, "steps": steps}
    l2 = {"eps": L2, "alpha": L2_ALPHA, "steps": steps}
    pgd: dict[str, tuple[str, dict[str, Any]]] = {
        "foolbox": ("LinfProjectedGradientDescentAttack", foolbox),
        "torchattacks": ("PGD", others),
        "art": ("ProjectedGradientDescent", {**art, "num_random_init": 1}),
        "adv_lib": ("pgd_linf", adv_lib),
    }
    return [
        Case(
            f"bim, {steps} steps",
            ("bim", ours),
            {
                "foolbox": ("LinfBasicIterativeAttack", {**foolbox, "random_start": False}),
                "torchattacks": ("BIM", others),
                "art": ("BasicIterativeMethod", art),
            },
            E,
            INF,
        ),
        Case(f"pgd, {steps} steps", ("pgd", ours), pgd, E, INF),
        Case(
            f"pgd to the next class, {steps} steps",
            ("pgd", {**ours, "target": "next"}),
            pgd,
            E,
            INF,
            None,
            True,
        ),
        Case(
            f"pgd, l2, {steps} steps",
            ("pgd", {"norm": "l2", **l2}),
            {
                "foolbox": (
                    "L2ProjectedGradientDescentAttack",
                    {"abs_stepsize": L2_ALPHA, "steps": steps, "random_start": True},
                ),
                "torchattacks": ("PGDL2", l2),
                "art": (
                    "ProjectedGradientDescent",
                    {"norm": 2, "eps": L2, "eps_step": L2_ALPHA, "max_iter": steps, "num_random_init": 1},
                ),
            },
            L2,
        ),
        Case(
            f"pgd, l2, from a direction, {steps} steps",
            ("pgd", {"norm": "l2", **l2, "start": "radial"}),
            {"torchattacks": ("PGDL2", l2)},
            L2,
        ),
        Case(
            f"pgd on the margin, {steps} steps",
            ("cw_pgd", {**ours, "start": "uniform"}),
            {"adv_lib": ("pgd_linf", {**adv_lib, "loss_function": "dl"})},
            E,
            INF,
        ),
        Case(
            f"pgd on dlr, {steps} steps",
            ("pgd", {**ours, "loss": "dlr"}),
            {"adv_lib": ("pgd_linf", {**adv_lib, "loss_function": "dlr"})},
            E,
            INF,
        ),
        Case(f"pgd_kl, {steps} steps", ("pgd_kl", ours), {"torchattacks": ("TPGD", others)}, E, INF),
        Case(
            "eot_pgd, 3 steps of 2 draws",
            ("eot_pgd", {**ours, "steps": 3, "draws": 2}),
            {"torchattacks": ("EOTPGD", {**others, "steps": 3, "eot_iter": 2})},
            E,
            INF,
        ),
    ]


def _transferable(steps: int) -> list[Case]:
    ours, theirs = {"eps": EPS, "alpha": ALPHA, "steps": steps}, {"eps": E, "alpha": A, "steps": steps}
    return [
        Case(
            f"mi_fgsm, {steps} steps",
            ("mi_fgsm", ours),
            {
                "foolbox": (
                    "LinfMomentumIterativeFastGradientMethod",
                    {"abs_stepsize": A, "steps": steps, "random_start": False},
                ),
                "torchattacks": ("MIFGSM", {**theirs, "decay": 1.0}),
                "art": ("MomentumIterativeMethod", {"eps": E, "eps_step": A, "max_iter": steps}),
            },
            E,
            INF,
        ),
        Case(
            f"di_fgsm, {steps} steps",
            ("di_fgsm", ours),
            {"torchattacks": ("DIFGSM", theirs)},
            E,
            INF,
        ),
        Case(
            f"dim, {steps} steps",
            ("dim", ours),
            {"torchattacks": ("DIFGSM", {**theirs, "decay": 1.0, "diversity_prob": 0.7})},
            E,
            INF,
        ),
        # torchattacks hands the victim images of their own size, where the paper enlarges them.
        *(
            Case(
                f"{name}, {steps} steps, native canvas",
                (name, {**ours, "canvas": "native"}),
                {"torchattacks": ("DIFGSM", {**theirs, **more})},
                E,
                INF,
            )
            for name, more in (("di_fgsm", {}), ("dim", {"decay": 1.0, "diversity_prob": 0.7}))
        ),
        # The transformation of torchattacks, which is neither of the two: shrunk to nine tenths or more, bilinearly.
        *(
            Case(
                f"{name}, {steps} steps, shrunk",
                (name, {**ours, "ratio": "9/10", "interpolation": "bilinear"}),
                {"torchattacks": (theirs_name, {**theirs, **more})},
                E,
                INF,
            )
            for name, theirs_name, more in (
                ("di_fgsm", "DIFGSM", {}),
                ("dim", "DIFGSM", {"decay": 1.0, "diversity_prob": 0.7}),
                ("dim_ti", "TIFGSM", {"decay": 1.0, "diversity_prob": 0.7}),
            )
        ),
        Case(
            f"ti_fgsm, {steps} steps",
            ("ti_fgsm", ours),
            {"torchattacks": ("TIFGSM", {**theirs, "diversity_prob": 0.0})},
            E,
            INF,
        ),
        Case(
            f"mi_fgsm_ti, {steps} steps",
            ("mi_fgsm_ti", ours),
            {"torchattacks": ("TIFGSM", {**theirs, "decay": 1.0, "diversity_prob": 0.0})},
            E,
            INF,
        ),
        Case(
            f"dim_ti, {steps} steps",
            ("dim_ti", ours),
            {"torchattacks": ("TIFGSM", {**theirs, "decay": 1.0, "diversity_prob": 0.7})},
            E,
            INF,
        ),
    ]


def _auto(steps: int) -> list[Case]:
    return [
        Case(
            f"apgd on ce, {steps} steps",
            ("apgd", {"eps": EPS, "steps": steps}),
            {
                "pyautoattack": ("APGDAttack", {"n_iter": steps}),
                "torchattacks": ("APGD", {"eps": E, "steps": steps}),
                "art": (
                    "AutoProjectedGradientDescent",
                    {"eps": E, "eps_step": 2 * E, "max_iter": steps, "nb_random_init": 1},
                ),
                "adv_lib": ("apgd", {"eps": E, "norm": INF, "n_iter": steps, "loss_function": "ce"}),
            },
            E,
            INF,
        ),
        Case(
            f"apgd on dlr, {steps} steps",
            ("apgd", {"loss": "dlr", "eps": EPS, "steps": steps}),
            {
                "pyautoattack": ("APGDAttack", {"n_iter": steps, "loss": "dlr"}),
                "torchattacks": ("APGD", {"eps": E, "steps": steps, "loss": "dlr"}),
                "adv_lib": ("apgd", {"eps": E, "norm": INF, "n_iter": steps}),
            },
            E,
            INF,
        ),
        Case(
            f"apgd on ce, l2, {steps} steps",
            ("apgd", {"norm": "l2", "eps": L2, "steps": steps}),
            {
                "pyautoattack": ("APGDAttack", {"n_iter": steps, "norm": "L2"}),
                "torchattacks": ("APGD", {"eps": L2, "steps": steps, "norm": "L2"}),
                "adv_lib": ("apgd", {"eps": L2, "norm": 2, "n_iter": steps, "loss_function": "ce"}),
            },
            L2,
        ),
        Case(
            "apgd towards 9 classes, 2 steps",
            ("apgd", {"loss": "dlr_targeted", "eps": EPS, "steps": 2}),
            {
                "pyautoattack": ("APGDAttack_targeted", {"n_iter": 2}),
                "torchattacks": ("APGDT", {"eps": E, "steps": 2}),
                "adv_lib": ("apgd_targeted", {"eps": E, "norm": INF, "n_iter": 2, "num_targets": 9}),
            },
            E,
            INF,
        ),
    ]


def _scores() -> list[Case]:
    wide = 12 / 255
    return [
        Case(
            "square, 60 queries",
            ("square", {"eps": WIDE, "queries": 60}),
            {
                "pyautoattack": ("SquareAttack", {"n_queries": 60}),
                "torchattacks": ("Square", {"eps": wide, "n_queries": 60}),
                "art": ("SquareAttack", {"eps": wide, "max_iter": 60}),
            },
            wide,
            INF,
        ),
        Case(
            "spsa, 5 steps of 8 samples",
            ("spsa", {"eps": WIDE, "steps": 5, "samples": 8}),
            {"torchattacks": ("SPSA", {"eps": wide, "nb_iter": 5, "nb_sample": 8, "max_batch_size": 8})},
            wide,
            INF,
        ),
    ]


def _nearest() -> list[Case]:
    cw = {"steps": 15, "binary_search_steps": 2, "initial_c": 1.0, "lr": 0.02, "abort_early": False}
    line_search = {
        "max_iter": 15, "binary_search_steps": 2, "initial_const": 1.0, "learning_rate": 0.02, "max_halving": 1,
        "max_doubling": 1,
    }  # fmt: skip
    twenty = {
        "foolbox": ("DDNAttack", {"steps": 20}),
        "adv_lib": ("ddn", {"steps": 20, "levels": None}),
    }
    searches = {
        "foolbox": (
            "L2CarliniWagnerAttack",
            {
                "steps": 15,
                "binary_search_steps": 2,
                "initial_const": 1.0,
                "stepsize": 0.02,
                "abort_early": False,
            },
        ),
        "adv_lib": (
            "carlini_wagner_l2",
            {
                "max_iterations": 15,
                "binary_search_steps": 2,
                "initial_const": 1.0,
                "learning_rate": 0.02,
                "abort_early": False,
            },
        ),
        "art": ("CarliniL2Method", line_search),
    }
    return [
        Case(
            "ddn, 20 steps",
            ("ddn", {"steps": 20, "levels": None}),
            twenty,
        ),
        # Not the algorithm of the libraries, for the same number of passes.
        Case(
            "ddn, 20 steps of Newton's",
            ("ddn", {"steps": 20, **NEWTON}),
            twenty,
        ),
        Case(
            "ddn in 256 levels, 20 steps",
            ("ddn", {"steps": 20}),
            {"adv_lib": ("ddn", {"steps": 20})},
        ),
        Case(
            "deepfool, 20 steps",
            ("deepfool", {"steps": 20}),
            {
                "foolbox": ("L2DeepFoolAttack", {"steps": 20}),
                "torchattacks": ("DeepFool", {"steps": 20}),
                "art": ("DeepFool", {"max_iter": 20, "nb_grads": 10, "epsilon": 0.02}),
                "adv_lib": ("df", {"steps": 20}),
            },
        ),
        Case(
            "deepfool_linf, 20 steps",
            ("deepfool_linf", {"steps": 20}),
            {
                "foolbox": ("LinfDeepFoolAttack", {"steps": 20}),
                "adv_lib": ("df", {"steps": 20, "norm": INF}),
            },
            None,
            INF,
        ),
        Case("cw_l2, 2 x 15 steps", ("cw_l2", cw), searches),
        # Not the algorithm of the libraries; 31 passes against 30, and ART's 570.
        Case(
            "cw_l2, 30 steps with c moving",
            (
                "cw_l2",
                {"steps": 30, **MOVING},
            ),
            searches,
        ),
        # A step of ART's line search takes 5 forward and 19 backward passes: ours makes 100 of each here, ART 155 and
        # 570.
        Case(
            "cw_l2, 2 x 50 steps, against 2 x 15 by line search",
            ("cw_l2", {**cw, "steps": 50}),
            {"art": ("CarliniL2Method", line_search)},
        ),
        Case(
            "cw_l2, 15 steps at c = 1",
            ("cw_l2", {**cw, "binary_search_steps": 1}),
            {"torchattacks": ("CW", {"c": 1, "steps": 15, "lr": 0.02})},
        ),
        Case(
            "stadv, 100 steps",
            ("stadv", {"steps": 100}),
            {"advertorch": ("SpatialTransformAttack", {"max_iterations": 100})},
        ),
        Case(
            "cw_linf, 5 steps at a c",
            ("cw_linf", {"steps": 5, "lr": 0.01, "initial_c": 1.0, "shrink": 0.7}),
            {
                "adv_lib": (
                    "carlini_wagner_linf",
                    {
                        "max_iterations": 5,
                        "learning_rate": 0.01,
                        "initial_const": 1.0,
                        "decrease_factor": 0.7,
                    },
                )
            },
            None,
            INF,
        ),
    ]


@dataclass(frozen=True)
class Outcome:
    """What one contestant reached, over all its starts.

    Attributes:
        fooled: share of the starts after which an image is misclassified, or has reached its target, (B,).
        length: median length of the perturbation; infinite where fewer than half of the images are fooled.
        longest: of all.
        seconds: wall time.
    """

    fooled: Tensor
    length: float
    longest: float
    seconds: float


@dataclass(frozen=True)
class Row:
    """Our attack against that of one library.

    `only_ours` and `only_theirs` count the images that one of the two fools more often; lengths are None for attacks
    with an eps.
    """

    attack: str
    library: str
    images: int
    starts: int
    ours: float
    theirs: float
    points: float
    only_ours: int
    only_theirs: int
    length_ours: float | None
    length_theirs: float | None
    seconds_ours: float
    seconds_theirs: float
    verdict: str


def victim(name: str) -> TargetModel:
    """A model that takes its images in batches as large as they come: fast, where no bits have to be reproduced."""
    target = MODELS.create(name).load(torch.device("cpu"))
    logits = target.logits

    def fitting(images: Tensor, **more: Any) -> Tensor:
        target.micro_batch = min(BATCH, max(1, len(images)))
        return logits(images, **more)

    target.logits = fitting
    return target


def outcome(
    case: Case, by: str, target: TargetModel, images: Tensor, labels: Tensor, starts: int = 1
) -> Outcome:
    """The attack of `by` on all images at once, from each start."""
    goals = (labels + 1) % 10 if case.targeted else labels
    fooled, lengths, seconds = [], [], 0.0
    for start in range(starts):
        with torch.random.fork_rng():
            torch.manual_seed(start)
            np.random.seed(start)  # noqa: NPY002 - what ART draws from
            begun = time.perf_counter()
            made = case.run(by, target, start)(images.clone(), goals).detach()
            seconds += time.perf_counter() - begun
        with torch.no_grad():
            reached = target.logits(made).argmax(1) == goals
        fooled.append(reached if case.targeted else ~reached)
        lengths.append((made - images).flatten(1).norm(case.norm, dim=1))
    far = torch.where(torch.stack(fooled), torch.stack(lengths), INF)
    longest = float(torch.stack(lengths).max())
    return Outcome(torch.stack(fooled).double().mean(0), float(far.median()), longest, seconds)


def compare(
    case: Case, target: TargetModel, images: Tensor, labels: Tensor, starts: int = 1
) -> Iterator[Row]:
    """Ours against every library at hand, one row each; `starts` counts for attacks that draw random numbers."""
    libraries = case.libraries()
    if not libraries:
        return
    name, params = case.ours
    if not ATTACKS.create(name, params).stochastic:
        starts = 1
    ours = outcome(case, "ours", target, images, labels, starts)
    for library in libraries:
        theirs = outcome(case, library, target, images, labels, starts)
        only_ours = int((ours.fooled > theirs.fooled).sum())
        only_theirs = int((theirs.fooled > ours.fooled).sum())
        points = 100 * float((ours.fooled - theirs.fooled).mean())
        if case.eps is not None and theirs.longest > 1.001 * case.eps:
            verdict = "theirs leaves the budget"
        elif case.eps is None and ours.length > 1.01 * theirs.length:
            verdict = "weaker"
        elif points >= -1:
            verdict = "not weaker"
        else:
            luck = binomtest(only_ours, only_ours + only_theirs).pvalue
            verdict = "within chance" if luck >= 0.05 else "weaker"
        lengths = (None, None) if case.eps is not None else (ours.length, theirs.length)
        yield Row(
            case.label, library, len(images), starts, float(ours.fooled.mean()), float(theirs.fooled.mean()), points,
            only_ours, only_theirs, *lengths, ours.seconds, theirs.seconds, verdict,
        )  # fmt: skip


HEADER = (
    "attack",
    "library",
    "starts",
    "ours %",
    "theirs %",
    "points",
    "only ours",
    "only theirs",
    "length",
    "theirs",
    "verdict",
)
WORDS = ("attack", "library", "verdict")


def cells(row: Row) -> tuple[str, ...]:
    """A row as `HEADER` has it."""
    lengths = [f"{v:.4f}" if v is not None else "" for v in (row.length_ours, row.length_theirs)]
    shares = (f"{100 * row.ours:.1f}", f"{100 * row.theirs:.1f}", f"{row.points:+.1f}")
    only = (str(row.only_ours), str(row.only_theirs))
    return (row.attack, row.library, str(row.starts), *shares, *only, *lengths, row.verdict)


def save(rows: Sequence[Row], path: Path) -> None:
    """Rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=500, help="number of test digits")
    parser.add_argument("--steps", type=int, default=5, help="gradient steps of attacks with an eps")
    parser.add_argument("--starts", type=int, default=3, help="starts of attacks that draw random numbers")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose label begins with one of these")
    parser.add_argument("--csv", type=Path, help="file for the rows")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    options = parser.parse_args(arguments)
    if min(options.count, options.steps, options.starts) < 1:
        parser.error("--count, --steps and --starts: expected 1 or more")
    every = cases(options.steps)
    chosen = [c for c in every if not options.only or c.label.startswith(tuple(options.only))]
    if not chosen:
        parser.error(f"--only: no such case; there are {', '.join(c.label for c in every)}")
    torch.set_num_threads(1)
    target = victim("mini_wrn")
    images, labels = digits(options.count)
    console = Console(width=130)
    rows = []
    for case in chosen:
        begun = time.perf_counter()
        rows += compare(case, target, images, labels, options.starts)
        console.print(f"{case.label}: {time.perf_counter() - begun:.1f} s", style="dim")
        if options.csv is not None:
            save(rows, options.csv)
    printed = table(f"attack strength: mini_wrn, {options.count} test digits", HEADER, WORDS)
    for row in rows:
        printed.add_row(*cells(row))
    console.print(printed)
    if options.markdown is not None:
        options.markdown.write_text(markdown(HEADER, [*map(cells, rows)], WORDS), encoding="utf-8")


if __name__ == "__main__":
    main()
