"""Automatic checks on attacks, models and defenses: what is broken stops its cell, what is suspect is flagged.

Three kinds. Hard checks raise CheckError while a cell is computed. Flags are short names in a row (`FLAGS` explains
them): they come from the records of a craft (`cell_findings`), from comparing cells on the same images
(`group_findings`), from scores recorded with the weights (`reference_findings`) and from the model itself
(`model_findings`). Notes are worth knowing and make nothing suspect; only `python -m bench audit` prints them.

Cells are compared image by image, never by their separate intervals: the sign that counts is that of the mean
difference of the per-image scores, and only when chance does not explain it (`paired_scores`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from bench.errors import CheckError, DataError
from bench.protocols import Attack, Batch, Defense, ImageRNG, ModelSource, TargetModel
from bench.stats import Difference, paired_scores

if TYPE_CHECKING:
    from bench.plan import Cell

TOLERANCE = 1e-6
_SLACK = 1e-3
"""What sums over an image may round: the share by which `Attack.excess` may be above 0."""
FEW = 10
"""Images below which a clean score is not held against the recorded one."""
Scores = Mapping[str, float]
"""Image id -> score in [0,1], larger = less harmed."""


@dataclass(frozen=True)
class Flag:
    """What a finding means.

    Attributes:
        check: number of the check.
        level: `flag` makes a cell suspect, `note` does not.
        text: what was seen.
        next: what to do about it.
    """

    check: str
    level: Literal["flag", "note"]
    text: str
    next: str


@dataclass(frozen=True)
class Finding:
    """A name of `FLAGS`, and the numbers behind it."""

    flag: str
    detail: str = ""

    @property
    def suspect(self) -> bool:
        """It is more than a note."""
        return FLAGS[self.flag].level == "flag"


_MASKED = "level bpda, with a `surrogate` in the defense; then the attack `square` at level white_box"
_MORE = "at bpda: level white_box, or a better `surrogate`; else more eot, steps or queries; report the adaptive line"
FLAGS: dict[str, Flag] = {
    "zero-gradient": Flag(
        "V3", "flag", "more than half of the images had an exactly zero gradient at the first or last step: masked",
        f"{_MASKED}; where logits are saturated, loss: dlr or margin",
    ),
    "some-zero-gradient": Flag(
        "V3", "flag", "more than 1 % of the images had an exactly zero gradient at the first or last step", _MASKED
    ),
    "nonfinite-gradient": Flag(
        "V3", "flag", "NaN or infinite gradients appeared during the attack",
        "python -m bench show CELL --grid GRID; loss: margin",
    ),
    "sparse-gradient": Flag(
        "V3", "flag", "more than 99 % of the gradient's entries were exactly zero: masked", _MASKED
    ),
    "gradient-underflow": Flag(
        "V3", "flag", "the gradient's largest entry was below 1e-12: saturated logits", "loss: dlr or margin"
    ),
    "unchanged": Flag(
        "V3", "flag", "more than 1 % of the images came back unchanged from an attack with a budget",
        "start: uniform, or another loss",
    ),
    "loss-fell": Flag(
        "V15", "flag", "the attack's objective ended below its start for more than 5 % of the images",
        "a smaller alpha; return_best: true",
    ),
    "below-noise": Flag(
        "V6", "flag",
        "random noise of the same eps does at least as much harm: attack broken or gradients masked",
        "the same attack on defense none; if it is strong there, level bpda, or white_box with more eot",
    ),
    "below-single-step": Flag(
        "V9", "flag", "a single-step attack of the same eps does more harm: gradients masked",
        "a smaller alpha and return_best: true; if it stays, level bpda",
    ),
    "oblivious-above-adaptive": Flag(
        "V10", "flag", "an attacker who ignores the defense does more harm than one who knows it",
        _MORE,
    ),
    "transfer-above-adaptive": Flag(
        "V10", "flag", "another model's gradients do more harm than those of the defended model: masked",
        _MORE,
    ),
    "gray-above-adaptive": Flag(
        "V10", "flag", "a surrogate's gradients do more harm than those of the deployed defense: masked",
        _MORE,
    ),
    "full-gradient-suspect": Flag(
        "V11", "flag", "the stand-in's gradient harms more than the defense's true one",
        "look in the defense for rounding, clamping or detach; report level bpda",
    ),
    "no-eot": Flag(
        "V13", "flag", "a random defense was attacked with a single draw a step", "threats: [{level: LEVEL, eot: 20}]"
    ),
    "few-draws": Flag(
        "V13", "note", "fewer than 20 draws a step where what is left turns on the draw",
        "threats: [{level: LEVEL, eot: 20}]; python -m bench audit GRID --costly",
    ),
    "weak-on-undefended": Flag(
        "V5", "flag", "the attack leaves more of the undefended model than it should: attack broken",
        "more steps, another loss",
    ),
    "clean-off-reference": Flag(
        "V4", "flag", "the clean score is not the one recorded with the weights",
        "python -m bench doctor; python -m bench zoo build MODEL",
    ),
    "channels-swapped": Flag(
        "V19", "flag", "the model does better on images with red and blue swapped",
        "the channel order in the model's preprocessing",
    ),
    # -- what the audit's extra cells find
    "noise-of-many-draws": Flag(
        "V6", "flag", "the best of many random draws of the same eps does more harm: gradients masked", _MASKED
    ),
    "not-converged": Flag(
        "V7", "flag", "more steps or restarts do more harm: not converged", "the larger number of steps or restarts"
    ),
    "more-steps-weaker": Flag(
        "V7", "flag", "more steps do less harm", "return_best: true; a smaller alpha"
    ),
    "eps-not-monotone": Flag("V8", "flag", "a larger eps does less harm: gradients masked", _MASKED),
    "unbounded-not-broken": Flag(
        "V8", "flag", "at eps 128/255, where any image can be any other, something survives: gradients masked",
        _MASKED,
    ),
    "query-beats-gradient": Flag(
        "V12", "flag", "search over scores finds what gradients do not: masked", _MASKED
    ),
    "query-beats-stand-in": Flag(
        "V12", "flag",
        "search over scores finds what the gradient of BPDA's stand-in does not: the stand-in misleads, no robustness",
        "level white_box where there is a true gradient, or a better `surrogate`; report the adaptive line",
    ),
    "eot-too-few": Flag("V13", "flag", "more draws a step do more harm", "threats: [{level: LEVEL, eot: 20}]"),
    "last-is-worse": Flag("V14", "flag", "the best iterate does more harm than the last", "return_best: true"),
    "one-loss-is-not-enough": Flag(
        "V16", "flag", "other losses, taken image by image, do more harm", "add those losses to the block"
    ),
    "fails-unit-test": Flag(
        "V18", "flag", "the attack misses perturbations that exist, on a linear model", "more steps, a larger alpha"
    ),
    # -- notes
    "nothing-to-attack": Flag("V25", "note", "images without objects or labelled pixels", "leave them out"),
    "still-rising": Flag(
        "V15", "note", "the last tenth of the steps makes a full share of the gain", "more steps (V7)"
    ),
    "last-not-best": Flag("V14", "note", "the best iterate had a clearly larger loss", "return_best: true"),
    "attack-helps": Flag(
        "V21", "note", "images that were wrong are right under attack", "the sign of the objective; labels"
    ),
    "rounding-matters": Flag("V22", "note", "8-bit images give another result", "evaluate: {formats: [float, uint8]}"),
    "noise-defends-too": Flag(
        "V20", "note", "random noise undoes this minimal perturbation as well: no sign of robustness",
        "an attack with a budget",
    ),
    "defense-hurts": Flag(
        "V27", "note", "under its strongest attack the bare model keeps more", "read the adaptive line"
    ),
}  # fmt: skip


# -- images -----------------------------------------------------------------------------------------------------------
def check_images(images: Tensor, ids: Sequence[str], where: str) -> None:
    """Clean images must be finite and in [0,1].

    Raises:
        DataError: names the first image that is not.
    """
    for image, image_id in zip(images, ids, strict=True):
        if not torch.isfinite(image).all():
            raise DataError(f"{where}, image {image_id}: NaN or infinite pixels")
        low, high = float(image.min()), float(image.max())
        if low < -TOLERANCE or high > 1 + TOLERANCE:
            raise DataError(
                f"{where}, image {image_id}: pixels span [{low:.3g}, {high:.3g}], expected [0, 1]"
            )


def norms(clean: Tensor, adversarial: Tensor) -> tuple[Tensor, Tensor]:
    """(L-infinity, L2) distance of each image, (B,) each, in [0,1] pixel units."""
    delta = (adversarial - clean).flatten(1)
    return delta.abs().amax(1), delta.double().norm(dim=1).float()


def check_adversarials(attack: Attack, clean: Tensor, adversarial: Tensor, ids: Sequence[str]) -> None:
    """Checks V1 and V2: budget, range, shape, finite, not blanked.

    Raises:
        CheckError: names the attack, the image and what it violates.
    """
    name = f"attack '{attack.name}'"
    if adversarial.shape != clean.shape or adversarial.dtype != clean.dtype:
        raise CheckError(
            f"{name} returned {tuple(adversarial.shape)} {adversarial.dtype}, "
            f"expected {tuple(clean.shape)} {clean.dtype}"
        )
    linf, l2 = norms(clean, adversarial)
    excess = attack.excess(clean, adversarial)
    for i, image_id in enumerate(ids):
        image = adversarial[i]
        if not torch.isfinite(image).all():
            raise CheckError(f"{name}, image {image_id}: NaN or infinite pixels")
        if image.min() < -TOLERANCE or image.max() > 1 + TOLERANCE:
            raise CheckError(f"{name}, image {image_id}: pixels leave [0, 1]")
        if attack.eps is not None:
            moved = float(linf[i] if attack.norm == "linf" else l2[i])
            if moved > float(attack.eps) + TOLERANCE * (
                1 if attack.norm == "linf" else clean[i].numel() ** 0.5
            ):
                raise CheckError(
                    f"{name}, image {image_id}: moved by {moved:.6f} ({attack.norm}), eps is "
                    f"{float(attack.eps):.6f} ({attack.eps})"
                )
        if excess is not None and float(excess[i]) > _SLACK:
            raise CheckError(f"{name}, image {image_id}: beyond its own budget by {float(excess[i]):.2%}")
        if float(image.max()) == float(image.min()) and float(clean[i].max()) != float(clean[i].min()):
            raise CheckError(f"{name}, image {image_id}: returned a constant image")


# -- models and defenses ----------------------------------------------------------------------------------------------
def digest(module: torch.nn.Module) -> tuple[int, ...]:
    """The number of modules in training mode, then a cheap checksum of each parameter and buffer.

    Buffers that are not saved with the weights do not count: they hold what is looked up or derived on first use.
    """
    training = sum(m.training for m in module.modules())
    out = []
    with torch.no_grad():
        for tensor in module.state_dict().values():
            data = tensor.detach().contiguous().reshape(-1)
            whole = data.view(torch.int32 if data.element_size() == 4 else torch.uint8)
            out.append(whole.sum(dtype=torch.int64))
    if not out:
        return (training,)
    return (training, *torch.stack([v.to(out[0].device) for v in out]).tolist())


def check_frozen(module: torch.nn.Module, before: tuple[int, ...], what: str, by: str) -> None:
    """Check V24: evaluation mode as it was, no gradients left on parameters, every bit of the weights as it was.

    Args:
        module: the network.
        before: its `digest` when it was loaded.
        what, by: what messages call it, and who is to blame.

    Raises:
        CheckError: it has changed.
    """
    after = digest(module)
    if after[0] != before[0]:
        raise CheckError(f"{by} left {what} in training mode")
    if any(p.grad is not None for p in module.parameters()):
        raise CheckError(f"{by} left gradients on the parameters of {what}")
    if after != before:
        raise CheckError(f"{by} changed weights or statistics of {what}")


def check_defense(defense: Defense, image: Tensor, rng: ImageRNG) -> None:
    """Check V13: equal draws give equal images, and nothing comes from torch's global generator.

    Args:
        defense: what is checked.
        image: (1, 3, H, W) in [0,1].
        rng: one stream.

    Raises:
        CheckError: it is not reproducible.
    """
    outs = []
    with torch.no_grad(), torch.random.fork_rng():
        for seed in (0, 1):
            torch.manual_seed(seed)
            outs.append(defense.purify(image, ImageRNG(rng.seeds)).images)
    # More than what kernels may round otherwise from call to call.
    if outs[0].shape != outs[1].shape or not torch.allclose(outs[0], outs[1], rtol=0, atol=1e-4):
        kind = "the same draws" if defense.stochastic else "`stochastic` False"
        raise CheckError(
            f"defense '{defense.name}' gives different images for {kind}: random numbers must come from the rng it is "
            "given (and `stochastic` be True)"
        )


ENOUGH = 8
"""Images without which `model_findings` cannot tell whether colours are swapped."""


def model_findings(model: TargetModel, name: str, batch: Batch, rng: ImageRNG) -> list[Finding]:
    """Checks V19, V25 and V26 on the images of one batch: the adapter's gradient, colours, boxes, ignored pixels.

    Args:
        model: the frozen model.
        name: what messages call it.
        batch: its clean images with ground truth.
        rng: one stream an image.

    Raises:
        CheckError: the gradient disagrees with finite differences, the loss with itself, or ground truth with the
            images.
    """
    _check_boxes(batch)
    kind = model.losses[0]
    size = min(len(batch), 1 if model.task == "detection" else 2 if model.task == "segmentation" else 5)
    few = Batch(batch.images[:size], batch.targets[:size], batch.ids[:size])

    def loss(images: Tensor, of: Batch, streams: ImageRNG) -> Tensor:
        return model.loss(images, of.targets, kind, rng=ImageRNG(streams.seeds))

    streams = rng.select(range(size))
    x = few.images.detach().clone().requires_grad_(True)
    value = loss(x, few, streams)
    (grad,) = torch.autograd.grad(value.sum(), x)
    with torch.no_grad():
        again = loss(few.images, few, streams)
        # Kernels may round otherwise without gradients; another sample of boxes changes far more than this.
        if not torch.allclose(again, value.detach(), rtol=1e-3, atol=1e-5):
            raise CheckError(
                f"loss '{kind}' of {name} differs between two calls with the same images and draws"
            )
        # A loss over a random sample of proposals jumps when they move: finite differences mean nothing there.
        if not model.jumps and torch.equal(loss(few.images, few, streams.fork("other")), again):
            _check_gradient(lambda images: loss(images, few, streams), few.images, grad.detach(), name)
        if model.task == "segmentation":
            _check_ignored(model, name, kind)
        return _colours(lambda images, of: loss(images, of, rng.select(range(len(of)))), batch)


def _check_boxes(batch: Batch) -> None:
    height, width = batch.images.shape[-2:]
    for image_id, target in zip(batch.ids, batch.targets, strict=True):
        corners = getattr(target, "corners", None)
        if corners is None:
            return
        boxes = np.asarray(corners(), dtype=np.float64).reshape(-1, 4)
        if len(boxes) and (
            boxes.min() < -1 or boxes[:, 2].max() > width + 1 or boxes[:, 3].max() > height + 1
        ):
            raise CheckError(
                f"image {image_id}: ground-truth boxes leave the {width} x {height} image the model works on"
            )


def _check_gradient(loss: Callable[[Tensor], Tensor], images: Tensor, grad: Tensor, name: str) -> None:
    """V19: central differences along each image's own gradient, which they must confirm within 5 %."""
    length = grad.flatten(1).norm(dim=1)
    # A loss of 700 is rounded to about 1e-4: a slope that is lost in this says nothing.
    usable = length > (5e-5 * loss(images).abs()).clamp(min=1e-3)
    if not usable.any():
        return
    unit = grad / length.clamp(min=1e-12).view(-1, 1, 1, 1)
    error = math.inf
    for h in (1e-2, 1e-3, 1e-1):
        slope = (loss(images + h * unit) - loss(images - h * unit)) / (2 * h)
        error = min(error, float(((slope - length).abs() / length)[usable].median()))
        if error <= 0.05:
            return
    raise CheckError(
        f"gradient of {name} is off by {100 * error:.0f} % from finite differences along itself "
        "(at most 5 % expected)"
    )


def _check_ignored(model: TargetModel, name: str, kind: str) -> None:
    """V26: no gradient at the logits of ignored pixels."""
    classes = model.num_classes
    logits = torch.linspace(-1, 1, classes * 36, device=next(model.buffers(), torch.zeros(1)).device)
    logits = logits.view(36, classes).T.reshape(1, classes, 6, 6).clone().requires_grad_(True)
    labels = torch.zeros(6, 6, dtype=torch.long)
    labels[:3, :3] = 255
    with torch.enable_grad():
        try:
            value = model.loss_from_logits(logits, [labels], kind)
        except NotImplementedError:
            return
        (grad,) = torch.autograd.grad(value.sum(), logits)
    if bool((grad[0, :, :3, :3] != 0).any()):
        raise CheckError(f"loss '{kind}' of {name} has a gradient on ignored pixels")


def _colours(loss: Callable[[Tensor, Batch], Tensor], batch: Batch, most: int = 16) -> list[Finding]:
    """V19: on coloured images the model must not do better with red and blue swapped."""
    means = batch.images.flatten(2).mean(2)
    chosen = ((means[:, 0] - means[:, 2]).abs() > 0.02).nonzero()[:, 0].tolist()[:most]
    if len(chosen) < ENOUGH:
        return []
    some = Batch(
        batch.images[chosen], tuple(batch.targets[i] for i in chosen), tuple(batch.ids[i] for i in chosen)
    )
    own, swapped = loss(some.images, some), loss(some.images.flip(1), some)
    better = int((swapped < own).sum())
    # One-sided sign test.
    chance = sum(math.comb(len(chosen), k) for k in range(better, len(chosen) + 1)) / 2 ** len(chosen)
    # Models that hardly look at colours win and lose small sums either way.
    clear = float(own.mean()) > 1.5 * float(swapped.mean())
    if chance < 0.01 and clear:
        losses = f"mean loss {float(own.mean()):.3g}, swapped {float(swapped.mean()):.3g}"
        detail = f"{better} of {len(chosen)} images; {losses}"
        return [Finding("channels-swapped", detail)]
    return []


# -- one cell ---------------------------------------------------------------------------------------------------------
def undefended(cell: Cell) -> bool:
    """The cell's defense is none."""
    return bool(cell.payload["defense"].get("name") == "none")


def sees(cell: Cell) -> bool:
    """The attack's gradients are those of the pipeline it is judged on: only then must more effort harm more."""
    if cell.attack is None or cell.craft is None or not cell.attack.needs or cell.level == "transfer":
        return False
    return cell.level in ("bpda", "white_box") or undefended(cell)


def asks(attack: Attack | None) -> bool:
    """It asks the victim, for gradients, scores or decisions (noise and fixed perturbations do not)."""
    return attack is not None and bool(attack.needs) and attack.name != "noise"


def by_gradient(attack: Attack | None) -> bool:
    """It follows gradients (noise and query attacks do not)."""
    return attack is not None and "gradient" in attack.needs and attack.name != "noise"


def direct(attack: Attack | None) -> bool:
    """It increases a loss of the victim itself: attacks on features and universal ones need not beat simpler ones."""
    return attack is not None and by_gradient(attack) and "features" not in attack.needs


def undone_by_noise(cell: Cell) -> bool:
    """V20 applies: the attack looks for the nearest adversarial image of another pipeline than one with noise."""
    attack = cell.attack
    if attack is None or attack.eps is not None or not by_gradient(attack):
        return False
    return cell.level in ("oblivious", "transfer") and cell.defense.name != "noise"


def cell_findings(cell: Cell, rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Checks V3, V13, V14, V15 over a cell's rows (`stats` and `scores` decoded) with their `craft_` columns."""
    if cell.attack is None or not rows or "craft_steps" not in rows[0]:
        return []
    infos = [{k.removeprefix("craft_"): v for k, v in row.items() if k.startswith("craft_")} for row in rows]
    found = craft_findings(
        cell.attack, infos, [float(row["score"]) for row in rows] if sees(cell) else None,
        [_empty(row) for row in rows],
    )  # fmt: skip
    alone = by_gradient(cell.attack) and not cell.attack.averages
    knows = cell.level in ("bpda", "white_box") and alone
    if knows and cell.defense.stochastic and cell.craft is not None:
        if cell.craft.eot == 1:
            found.append(Finding("no-eot", "eot 1"))
        elif cell.craft.eot < DRAWS:
            undecided = sum(_spread(row) >= 0.5 for row in rows) / len(rows)
            if undecided > 0.1:
                detail = f"eot {cell.craft.eot}; another draw changes {_percent(undecided)} of the images"
                found.append(Finding("few-draws", detail))
    return found


DRAWS = 20
"""Draws a step that are enough in front of a random defense (AutoAttack's `rand`; Athalye et al. 2018 take 30)."""


def _spread(row: Mapping[str, Any]) -> float:
    """How far an image's score differs between evaluations of a random defense."""
    scores = row.get("scores") or [row["score"]]
    return float(max(scores) - min(scores))


def _empty(row: Mapping[str, Any]) -> bool:
    """Nothing in the image can be attacked: no object, no labelled pixel."""
    first = row["stats"][0]
    return 0 in (first.get("pixels"), first.get("objects"))


def craft_findings(
    attack: Attack,
    infos: Sequence[Mapping[str, Any]],
    scores: Sequence[float] | None = None,
    empty: Sequence[bool] | None = None,
) -> list[Finding]:
    """Checks V3, V14, V15 over the per-image records of a craft.

    Args:
        attack: what made the images.
        infos: one record an image (`bench.threat.Trace.record`, `linf`).
        scores: of the same images on the pipeline the attack saw; None = they were judged on another.
        empty: images with nothing to attack; they are left out.
    """
    found: list[Finding] = []
    empty = empty or [False] * len(infos)
    if any(empty):
        found.append(Finding("nothing-to-attack", f"{sum(empty)} of {len(infos)} images"))
    live = [i for i in range(len(infos)) if not empty[i]]
    if not live:
        return found

    def share(holds: Callable[[Mapping[str, Any]], bool], among: Sequence[int] = live) -> float:
        return sum(holds(infos[i]) for i in among) / len(live)

    right = live if scores is None else [i for i in live if scores[i] > 0.01]
    stops = bool(attack.params.get("stop_when_fooled"))
    if by_gradient(attack):
        # An image that is fooled may have no gradient left: hinges and masked objectives are done with it. Where the
        # pipeline that was attacked is not the one that judged, which images those are is not known.
        known = scores is not None
        first = share(lambda i: bool(i["first_zero"]), right)
        most = share(lambda i: i["steps"] > 0 and i["zero"] / i["steps"] > 0.5, right)
        last = share(lambda i: bool(i["last_zero"]), right)
        if not (known and attack.monotone):
            most = last = 0.0
        zero = max(first, most, last)
        shares = ((first, "at the first step"), (last, "at the last"), (most, "at most steps"))
        detail = ", ".join(f"{_percent(value)} of the images {where}" for value, where in shares)
        if zero > 0.5:
            found.append(Finding("zero-gradient", detail))
        elif known and zero > 0.01:
            found.append(Finding("some-zero-gradient", detail))
        nonfinite = share(lambda i: i["nonfinite"] > 0)
        if nonfinite:
            found.append(Finding("nonfinite-gradient", f"{_percent(nonfinite)} of the images"))
        sparse = _median([i.get("sparse") for i in (infos[k] for k in live)])
        if zero <= 0.5 and sparse > 0.99:
            found.append(Finding("sparse-gradient", f"{_percent(sparse)} of the entries, median over images"))
        largest = _median([infos[k].get("first_max") for k in live if not infos[k]["first_zero"]])
        if largest < 1e-12:
            found.append(Finding("gradient-underflow", f"largest entry {largest:.1g}, median over images"))
        if attack.monotone:
            # The course of an image that left at its success is short, and ends as it should.
            found.extend(_climb(functools.partial(share, among=right if stops else live)))
    # Of one that spares what is wrong already nothing follows where it is not known which images those are.
    if attack.eps is not None and not attack.returns_clean and not (attack.spares and scores is None):
        # One that stops at a success has nothing to do where the pipeline is wrong already.
        same = share(lambda i: i["linf"] == 0, right if stops or attack.spares else live)
        if same > 0.01:
            found.append(Finding("unchanged", f"{_percent(same)} of the images"))
    return found


def _climb(share: Callable[..., float]) -> list[Finding]:
    """V14 and V15: the course of one run's objective."""

    def gain(info: Mapping[str, Any]) -> float:
        return float(info["last_loss"] - info["first_loss"])

    def rising(info: Mapping[str, Any]) -> bool:
        steps, tail = info["steps"], info.get("tail_gain")
        if steps < 2 or tail is None or not gain(info) > 1e-6:
            return False
        fair = -(-(steps - 1) // 10) / (steps - 1)
        return bool(tail / gain(info) >= max(0.1, fair) - 1e-6)

    def lost(info: Mapping[str, Any]) -> bool:
        best = info["best_loss"] - info["first_loss"]
        return bool(info["steps"] > 1 and info["best_loss"] - info["last_loss"] > 0.1 * best + 1e-6)

    found = []
    fell = share(lambda i: i["steps"] > 1 and gain(i) < -1e-6 * abs(i["first_loss"]))
    if fell > 0.05:
        found.append(Finding("loss-fell", f"{_percent(fell)} of the images"))
    if (up := share(rising)) > 0.5:
        found.append(Finding("still-rising", f"{_percent(up)} of the images"))
    if (worse := share(lost)) > 0.1:
        found.append(Finding("last-not-best", f"{_percent(worse)} of the images"))
    return found


#: Losses that the recorded attacks use; others (features, fabrication) need not reach what they reach.
_DIRECT = ("ce", "margin", "dlr", "cls", "loc", "cls+loc")


def reference_findings(cell: Cell, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Checks V4 and V5 against the scores recorded with the weights, where there are any.

    A clean score of ten images or more is off when the record lies outside twice the interval; a multi-step gradient
    attack of at least 8/255 is weak when the interval of what it leaves lies above 5 points over the worst recorded
    attack.

    Args:
        cell: one of the undefended model.
        metrics: its summary lines; the first is the task's headline.
    """
    if not undefended(cell) or not metrics:
        return []
    known = recorded(cell.target.model)
    line = metrics[0]
    value, low, high = (float(line[k]) for k in ("value", "low", "high"))
    if math.isnan(value):
        return []  # no ground truth, no number: nothing is off
    if cell.attack is None:
        reference = known.get("clean")
        if reference is None:
            return []
        if len(cell.target.ids) < FEW:
            return []  # of a handful of images an interval says little, least of all of mAP or mIoU
        reach = 2 * (value - low) if reference < value else 2 * (high - value)
        if abs(value - reference) <= reach + 0.005:
            return []
        return [Finding("clean-off-reference", f"{line['metric']} {value:.3f}, recorded {reference:.3f}")]
    attack = cell.attack
    # Records under attack are named after it, with steps and eps; others are clean scores of further metrics.
    attacked = [v for name, v in known.items() if any(c.isdigit() for c in name.replace("map50", ""))]
    multi_step = by_gradient(attack) and getattr(attack, "steps", 0) >= 10 and sees(cell)
    named = attack.params.get("loss") in _DIRECT and attack.target is None
    large = attack.norm == "linf" and attack.eps is not None and float(attack.eps) >= 8 / 255
    # Input diversity and smoothed gradients trade strength on this model for transfer to others.
    params = attack.params
    blunt = getattr(attack, "diversity", None) is not None or params.get("kernel", params.get("ti_kernel"))
    strong = multi_step and named and large and not blunt
    if not attacked or not strong:
        return []
    limit = max(attacked) + 0.05
    if low <= limit:
        return []
    return [
        Finding("weak-on-undefended", f"leaves {value:.3f} {line['metric']}, expected at most {limit:.3f}")
    ]


def recorded(model: ModelSource) -> dict[str, float]:
    """Scores recorded with the weights of a model: its own, else the shipped manifest's."""
    own = model.recorded()
    if own:
        return own
    from tasks.mini import manifest

    scores = manifest.entries().get(model.name, {}).get("scores", {})
    out = {k: float(v) for k, v in scores.items() if isinstance(v, (int, float))}
    if "box_map50" in out:
        out["clean"] = out["box_map50"]
    return out


# -- several cells ----------------------------------------------------------------------------------------------------
def group_findings(cells: Sequence[Cell], scores: Mapping[str, Scores]) -> dict[str, list[Finding]]:
    """Checks V6, V9 to V12 (flags), V20, V21, V22, V27 (notes): cells against each other, on the same images.

    Args:
        cells: of one grid; those without an entry in `scores` are left out.
        scores: cell key -> image id -> score; NaN where nothing could be measured, which is left out too.

    Returns:
        cell key -> findings.
    """
    scores = {key: {i: s for i, s in of.items() if not math.isnan(s)} for key, of in scores.items()}
    scores = {key: of for key, of in scores.items() if of}
    found: dict[str, list[Finding]] = {}
    groups: dict[tuple[str, str, str], dict[str, Cell]] = {}
    for cell in cells:
        if cell.key in scores:
            groups.setdefault((cell.target.role, cell.defense_label, cell.image_format), {}).setdefault(
                cell.key, cell
            )

    def add(cell: Cell, flag: str, detail: str) -> None:
        found.setdefault(cell.key, []).append(Finding(flag, detail))

    for (role, _, image_format), group in groups.items():
        members = list(group.values())
        attacked = [c for c in members if c.attack is not None]
        for cell in attacked:
            assert cell.attack is not None
            own = scores[cell.key]
            if by_gradient(cell.attack):
                _against_noise(cell, attacked, scores, add)
                _against_single_step(cell, attacked, scores, add)
            clean = [scores[c.key] for c in members if c.attack is None]
            if clean and cell.attack.name not in ("noise", "none"):
                helped = sum(clean[0].get(i, 1) < 0.5 <= s for i, s in own.items()) / max(1, len(own))
                if helped > 0.05:
                    add(cell, "attack-helps", f"{_percent(helped)} of the images")
            if image_format == "float":
                for twin in groups.get((role, cell.defense_label, "uint8"), {}).values():
                    if (twin.attack_label, twin.level_label) == (cell.attack_label, cell.level_label):
                        gap = paired_scores(*_common(own, scores[twin.key]))
                        if gap.low > 0.005 or gap.high < -0.005:
                            add(cell, "rounding-matters", f"{_points(gap)} points of the score")
        _knowing_more(attacked, scores, add)
        _against_scores(attacked, scores, add)
    _across_defenses(groups, scores, add)
    return found


Add = Callable[["Cell", str, str], None]


def _against_noise(cell: Cell, others: Sequence[Cell], scores: Mapping[str, Scores], add: Add) -> None:
    """V6. An attack on the pipeline it sees must do more than noise as long as there is harm to do.

    Any other attack must not do clearly less.
    """
    attack = cell.attack
    assert attack is not None
    noise = [
        c for c in others
        if c.attack is not None and c.attack.name == "noise" and attack.eps is not None
        and (c.attack.eps, c.attack.norm) == (attack.eps, attack.norm)
    ]  # fmt: skip
    if not noise or attack.target is not None:
        return
    own, random = _common(scores[cell.key], scores[noise[0].key])
    gap = paired_scores(own, random)
    equal = sees(cell) and direct(attack) and len(own) >= 10 and own.mean() > 0.1 and gap.value >= 0
    if gap.low > 0 or equal:
        add(cell, "below-noise", f"leaves a score of {own.mean():.3f}, noise {random.mean():.3f}")


def _against_single_step(cell: Cell, others: Sequence[Cell], scores: Mapping[str, Scores], add: Add) -> None:
    """V9, where the attack sees what it is judged on; elsewhere single steps often transfer better."""
    attack = cell.attack
    if (
        not sees(cell)
        or attack is None
        or not direct(attack)
        or getattr(attack, "steps", 1) < 2
        or attack.eps is None
    ):
        return
    for other in others:
        single = other.attack
        if (
            single is not None and by_gradient(single) and single.name in ("fgsm", "r_fgsm")
            and other.level_label == cell.level_label
            and (single.eps, single.norm, single.target) == (attack.eps, attack.norm, attack.target)
        ):  # fmt: skip
            gap = paired_scores(*_common(scores[cell.key], scores[other.key]))
            if gap.low > 0.005:
                add(cell, "below-single-step", f"{other.attack_label} harms more by {_points(gap)} points")


_IGNORANT = {"oblivious": "oblivious", "transfer": "transfer", "gray_box": "gray"}
"""Levels that know less than the deployed defense, and what flags call them."""


def _knowing_more(cells: Sequence[Cell], scores: Mapping[str, Scores], add: Add) -> None:
    """V10 and V11, attack by attack: each level that knows the defense against each that does not."""
    attacks: dict[str, list[Cell]] = {}
    for cell in cells:
        if asks(cell.attack) and not undefended(cell):
            attacks.setdefault(cell.attack_label, []).append(cell)
    for group in attacks.values():
        for cell in group:
            if cell.level not in ("bpda", "white_box"):
                continue
            for other in group:
                if other.level not in _IGNORANT:
                    continue
                gap = paired_scores(*_common(scores[cell.key], scores[other.key]))
                if gap.low > 0:
                    add(
                        cell, f"{_IGNORANT[other.level]}-above-adaptive",
                        f"{other.level_label} harms more by {_points(gap)} points",
                    )  # fmt: skip
        levels = {c.level: c for c in group if c.level in ("bpda", "white_box") and by_gradient(c.attack)}
        if len(levels) == 2:
            gap = paired_scores(*_common(scores[levels["white_box"].key], scores[levels["bpda"].key]))
            if gap.low > 0 and gap.value > 0.02:
                add(levels["white_box"], "full-gradient-suspect", f"bpda harms more by {_points(gap)} points")


def _against_scores(cells: Sequence[Cell], scores: Mapping[str, Scores], add: Add) -> None:
    """V12: at one level and budget, all score-based attacks together against all that follow gradients."""
    levels: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        attack = cell.attack
        if attack is not None and asks(attack) and attack.eps is not None and sees(cell):
            levels.setdefault((cell.level, attack.norm, attack.eps), []).append(cell)
    for (level, *_), group in levels.items():
        follow = [
            c for c in group if c.attack is not None and by_gradient(c.attack) and not c.attack.also_scores
        ]
        search = [c for c in group if not by_gradient(c.attack)]
        if not follow or not search:
            continue
        by_gradients, by_search = _common(_lowest(follow, scores), _lowest(search, scores))
        gap = paired_scores(by_gradients, by_search)
        if gap.low > 0 and gap.value > 0.002:
            exact = level != "bpda" or all(undefended(c) for c in follow)
            names = ", ".join(dict.fromkeys(c.attack_label for c in search))
            for cell in follow:
                add(
                    cell, "query-beats-gradient" if exact else "query-beats-stand-in",
                    f"search ({names}) leaves {by_search.mean():.3f}, all gradient attacks of this level together "
                    f"{by_gradients.mean():.3f}",
                )  # fmt: skip


def _across_defenses(
    groups: Mapping[tuple[str, str, str], Mapping[str, Cell]], scores: Mapping[str, Scores], add: Add
) -> None:
    """V20 and V27: a defense against noise, and against none."""

    def named(role: str, image_format: str, name: str) -> list[Cell]:
        return [
            cell for (r, _, f), group in groups.items() if (r, f) == (role, image_format)
            for cell in group.values() if cell.payload["defense"].get("name") == name
        ]  # fmt: skip

    for (role, _, image_format), group in groups.items():
        cells = [c for c in group.values() if c.attack is not None]
        if not cells or undefended(cells[0]):
            continue
        for cell in cells:
            if not undone_by_noise(cell):
                continue
            for other in named(role, image_format, "noise"):
                same = (other.attack_label, other.level_label) == (cell.attack_label, cell.level_label)
                if same and other.defense_label != cell.defense_label:
                    mine, noise = _common(scores[cell.key], scores[other.key])
                    if mine.mean() > 0.1 and noise.mean() >= 0.9 * mine.mean():
                        add(
                            cell,
                            "noise-defends-too",
                            f"noise leaves {noise.mean():.3f}, this {mine.mean():.3f}",
                        )
        bare = [c for c in named(role, image_format, "none") if c.attack is not None]
        strong = [c for c in cells if by_gradient(c.attack)]
        if not any(by_gradient(c.attack) for c in bare) or not any(sees(c) for c in strong):
            continue
        kept, without = _common(_lowest(cells, scores), _lowest(bare, scores))
        gap = paired_scores(without, kept)
        if gap.low > 0:
            lowest = min(strong, key=lambda c: _mean(scores[c.key]))
            add(lowest, "defense-hurts", f"keeps {kept.mean():.3f}, the bare model {without.mean():.3f}")


def _lowest(cells: Sequence[Cell], scores: Mapping[str, Scores]) -> Scores:
    """Per image, the lowest score of any cell, on the images all have."""
    shared = set.intersection(*(set(scores[c.key]) for c in cells))
    return {i: min(scores[c.key][i] for c in cells) for i in scores[cells[0].key] if i in shared}


def _common(first: Scores, second: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the images both have, in the same order."""
    ids = [i for i in first if i in second]
    return np.array([first[i] for i in ids]), np.array([second[i] for i in ids])


def _mean(scores: Scores) -> float:
    return sum(scores.values()) / max(1, len(scores))


def _median(values: Sequence[Any]) -> float:
    """Median of the numbers that are there, NaN without any."""
    known = [float(v) for v in values if v is not None and not math.isnan(v)]
    return float(np.median(known)) if known else math.nan


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _points(gap: Difference) -> str:
    return f"{100 * gap.value:.1f} [{100 * gap.low:.1f}, {100 * gap.high:.1f}]"
