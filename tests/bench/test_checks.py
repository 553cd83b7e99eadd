"""The automatic checks one by one: what must fire does, and what is legitimate does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.io import decode_image
from torchvision.utils import save_image

from bench.audit import unit_test, vary
from bench.checks import (
    FLAGS,
    Finding,
    cell_findings,
    check_adversarials,
    check_defense,
    check_frozen,
    craft_findings,
    digest,
    group_findings,
    model_findings,
    reference_findings,
)
from bench.errors import CheckError
from bench.protocols import Attack, Batch, Defense, Geometry, ImageRNG, TargetModel
from bench.registry import ATTACKS
from bench.runner import in_format
from bench.stats import paired_scores
from bench.threat import Trace


def trace(*values: float, zeros: Sequence[float] = (), **changes: Any) -> dict[str, Any]:
    """What is stored of a craft whose objective took these values."""
    made = Trace()
    for step, value in enumerate(values):
        made.add(value, zeros[step] if zeros else 0.0, True, 1.0)
    return {**made.record(), "linf": 8 / 255, **changes}


def flags(name: str, infos: Sequence[dict[str, Any]], **more: Any) -> set[str]:
    params = more.pop("params", {})
    return {f.flag for f in craft_findings(ATTACKS.create(name, params), infos, **more)}


RISING = (1.0, 3.0, 4.0, 4.5, 4.6, 4.61, 4.62, 4.625, 4.628, 4.63, 4.631, 4.632)


def test_a_craft_in_good_health_has_no_findings() -> None:
    assert flags("pgd", [trace(*RISING)] * 20) == set()


def test_zero_gradients_of_images_that_are_done_are_no_masking() -> None:
    """A hinge has no gradient once the image is fooled; while it is right, the gradient must not vanish."""
    ended = [trace(1, 3, 3, zeros=(0, 0, 1))] * 20
    assert flags("bim", ended, scores=[0.0] * 20) == set()
    assert flags("bim", ended, scores=[1.0] * 20) == {"zero-gradient"}
    assert flags("bim", ended) == set()  # judged on another pipeline: nothing follows from what is left there
    assert flags("dag", ended, scores=[0.5] * 20) == set()
    start = [trace(1, 1, 1, zeros=(1, 1, 1))]
    assert flags("bim", start * 20) == {"zero-gradient"}
    assert flags("bim", start + [trace(*RISING)] * 19, scores=[1.0] * 20) == {"some-zero-gradient"}
    assert (
        flags("bim", start + [trace(*RISING)] * 19) == set()
    )  # it may be one that the attacked model gets wrong


def test_images_with_nothing_to_attack_are_left_out() -> None:
    still = trace(0, 0, zeros=(1, 1), linf=0.0)
    infos, empty = [still] * 15 + [trace(*RISING)] * 5, [True] * 15 + [False] * 5
    assert flags("bim", infos, empty=empty) == {"nothing-to-attack"}
    assert flags("bim", infos) == {"zero-gradient", "unchanged"}


def test_only_attacks_that_keep_failures_are_flagged_as_unchanged() -> None:
    infos = [trace(*RISING, linf=0.0), *[trace(*RISING)] * 9]
    assert flags("bim", infos) == {"unchanged"}
    assert flags("apgd", infos) == {"unchanged"}
    assert flags("apgd", infos, params={"failed": "clean"}) == set()
    still, wrong = [trace(linf=0.0), *[trace(1.0)] * 9], [0.0] * 10
    assert flags("square", still, params={"stop_when_fooled": True}, scores=wrong) == set()
    assert flags("square", still, params={"stop_when_fooled": True}, scores=[1.0] * 10) == {"unchanged"}
    assert flags("square", still, params={"stop_when_fooled": False}, scores=wrong) == {"unchanged"}


def test_a_librarys_attack_may_leave_what_is_wrong_already() -> None:
    """Attacks that look for the nearest adversarial image find it where they stand; they must move what is right."""
    nearest = {"library": "foolbox", "attack": "L2DeepFoolAttack", "eps": "8/255"}
    infos = [trace(linf=0.0), *[trace(1.0)] * 9]
    wrong, right = [0.0] * 10, [1.0, *[0.0] * 9]
    assert flags("library", infos, params=nearest, scores=wrong) == set()
    assert flags("library", infos, params=nearest, scores=right) == {"unchanged"}
    # Judged behind a defense that the attack did not see: which ones it found wrong is not known.
    assert flags("library", infos, params=nearest) == set()


def test_a_falling_objective_is_flagged_unless_the_attack_declares_it() -> None:
    fell = [trace(3, 2, 1)] * 10
    assert "loss-fell" in flags("bim", fell)
    assert flags("pgd", fell, params={"restarts": 2}) == set()
    for name in ("segpgd", "sea", "ddn", "dag"):
        assert "loss-fell" not in flags(name, fell), name


def test_the_course_of_the_objective() -> None:
    assert flags("bim", [trace(1, 2)] * 4) == {"still-rising"}
    assert flags("bim", [trace(*range(30))] * 4) == {"still-rising"}
    assert flags("bim", [trace(1, 9, 8, 5, 5, 5, 5, 5)] * 4) == {"last-not-best"}


def test_the_course_of_images_that_left_at_their_success() -> None:
    left, stayed, stops = [trace(1, 2, 9)] * 6, [trace(*RISING)] * 4, {"stop_when_fooled": True}
    scores = [0.0] * 6 + [1.0] * 4
    assert flags("bim", left + stayed, scores=scores) == {"still-rising"}
    assert flags("bim", left + stayed, params=stops, scores=scores) == set()
    fell = [trace(3, 2, 1)] * 4
    assert "loss-fell" in flags("bim", left + fell, params=stops, scores=scores)


def test_sparse_and_tiny_gradients() -> None:
    assert flags("bim", [trace(1, 2, 3, 3, 3, zeros=[0.995] * 5)] * 4) == {"sparse-gradient"}
    assert flags("bim", [trace(1, 2, 3, 3, 3, first_max=1e-20)] * 4) == {"gradient-underflow"}
    assert flags("bim", [trace(1, 2, 3, 3, 3, nonfinite=1)] * 4) == {"nonfinite-gradient"}


def test_records_of_an_older_store_are_read() -> None:
    old = {k: v for k, v in trace(*RISING).items() if k not in ("sparse", "first_max", "tail_gain")}
    assert flags("pgd", [old] * 5) == set()


def test_every_flag_says_what_to_do() -> None:
    for name, flag in FLAGS.items():
        assert flag.text and flag.next and flag.check.startswith("V"), name
        assert Finding(name).suspect == (flag.level == "flag")


# -- paired comparisons -----------------------------------------------------------------------------------------------
def test_a_paired_difference_needs_more_than_chance() -> None:
    one, zero = np.ones(20), np.zeros(20)
    few = one.copy()
    few[:3] = 0
    assert paired_scores(one, few).low <= 0 < paired_scores(one, few).value  # McNemar: 2 * 0.5^3 = 0.25
    some = one.copy()
    some[:6] = 0
    gap = paired_scores(one, some)  # 2 * 0.5^6 = 0.03
    assert gap.low > 0 and gap.value == pytest.approx(0.3)
    assert paired_scores(zero, zero) == (0, 0, 0)
    # Student's interval by hand: mean 0.2, standard deviation 0.1, t(0.975, 2) = 4.3027.
    gap = paired_scores(np.array([0.4, 0.5, 0.6]), np.array([0.3, 0.3, 0.3]))
    assert gap.value == pytest.approx(0.2)
    assert gap.high - gap.low == pytest.approx(2 * 4.30265 * 0.1 / 3**0.5, rel=1e-4)
    with pytest.raises(ValueError, match="equal length"):
        paired_scores(one, np.ones(3))


# -- cells against each other -----------------------------------------------------------------------------------------
class Named(SimpleNamespace):
    __hash__ = object.__hash__


def cell(name: str, level: str, *, defense: str = "planted", key: str = "", **params: Any) -> Any:
    """As much of a cell as comparisons read."""
    attack = ATTACKS.create(name, params)
    return Named(
        key=key or f"{name}/{level}/{defense}", target=SimpleNamespace(role="r", task="classification"),
        defense_label=defense, image_format="float", attack=attack, attack_label=name, level=level, level_label=level,
        payload={"defense": {"name": defense}}, defense=SimpleNamespace(name=defense, stochastic=False),
        craft=SimpleNamespace(eot=1),
    )  # fmt: skip


def compared(left: dict[Any, Any]) -> dict[str, set[str]]:
    """Flags by cell, for cells that leave this share of 20 images, the first ones, or these scores."""
    scores = {}
    for c, share in left.items():
        values = [float(i < 20 * share) for i in range(20)] if isinstance(share, float) else share
        scores[c.key] = {str(i): float(v) for i, v in enumerate(values)}
    return {key: {f.flag for f in found} for key, found in group_findings([*left], scores).items()}


def test_every_level_that_knows_the_defense_is_held_against_those_that_do_not() -> None:
    bpda, exact = cell("pgd", "bpda"), cell("pgd", "white_box")
    found = compared({bpda: 0.9, exact: 0.0, cell("pgd", "oblivious"): 0.4, cell("pgd", "gray_box"): 0.2})
    # The stronger level does not excuse the weaker one.
    assert found == {"pgd/bpda/planted": {"oblivious-above-adaptive", "gray-above-adaptive"}}
    found = compared({bpda: 0.0, exact: 0.9, cell("pgd", "transfer"): 0.4})
    assert found == {"pgd/white_box/planted": {"transfer-above-adaptive", "full-gradient-suspect"}}
    assert compared({bpda: 0.4, exact: 0.4, cell("pgd", "oblivious"): 0.4}) == {}
    assert compared({bpda: 0.4, cell("pgd", "oblivious"): 0.3}) == {}  # two images: chance


def test_search_over_scores_is_held_against_its_own_transfer() -> None:
    left = {cell("square", "white_box"): 0.9, cell("square", "oblivious"): 0.3}
    assert compared(left) == {"square/white_box/planted": {"oblivious-above-adaptive"}}
    # Images that ask nothing of the victim are the same at every level.
    assert compared({cell("noise", "white_box"): 0.9, cell("noise", "oblivious"): 0.3}) == {}


def test_search_over_scores_must_not_beat_all_gradients_of_its_level() -> None:
    left = {cell("pgd", "white_box"): 0.9, cell("bim", "white_box"): 0.8, cell("square", "white_box"): 0.3}
    flagged = {"query-beats-gradient"}
    assert compared(left) == {"pgd/white_box/planted": flagged, "bim/white_box/planted": flagged}
    # In front of a stand-in it says something about the stand-in.
    assert compared({cell("pgd", "bpda"): 0.9, cell("square", "bpda"): 0.3}) == {
        "pgd/bpda/planted": {"query-beats-stand-in"}
    }
    assert compared(
        {cell("pgd", "oblivious", defense="none"): 0.9, cell("square", "oblivious", defense="none"): 0.3}
    ) == {"pgd/oblivious/none": flagged}
    # AutoAttack has a search of its own: it speaks for neither side.
    assert compared({**left, cell("autoattack", "white_box"): 0.0}) == {
        "pgd/white_box/planted": flagged,
        "bim/white_box/planted": flagged,
    }
    # One gradient attack that does as much is enough. Other budgets and levels do not compare, nor what cannot see.
    assert compared({**left, cell("apgd", "white_box"): 0.2}) == {}
    assert compared({cell("pgd", "white_box"): 0.9, cell("square", "white_box", eps="16/255"): 0.3}) == {}
    assert compared({cell("pgd", "bpda"): 0.9, cell("square", "white_box"): 0.3}) == {}
    assert compared({cell("pgd", "oblivious"): 0.9, cell("square", "oblivious"): 0.3}) == {}


def test_the_union_of_gradient_attacks_counts_image_by_image() -> None:
    half = [0.0] * 10 + [1.0] * 10
    left = {
        cell("pgd", "white_box"): half,
        cell("bim", "white_box"): half[::-1],
        cell("square", "white_box"): [0.0] * 20,
    }
    assert compared(left) == {}


def test_what_cannot_be_measured_is_not_compared() -> None:
    nothing = [float("nan")] * 20
    assert (
        compared(
            {cell("pgd", "bpda"): nothing, cell("pgd", "oblivious"): 0.3, cell("noise", "bpda"): nothing}
        )
        == {}
    )
    some = [float("nan")] * 4 + [1.0] * 16
    assert (
        "oblivious-above-adaptive"
        in compared({cell("pgd", "bpda"): some, cell("pgd", "oblivious"): 0.3}).popitem()[1]
    )


@pytest.mark.parametrize("name", ["clean", "pgd"])
def test_scores_without_ground_truth_are_not_off(name: str) -> None:
    judged = cell("pgd", "oblivious", defense="none", alpha="2/255", steps=20)
    judged.target.model = SimpleNamespace(name="m", recorded=lambda: {"clean": 0.9, "pgd10": 0.1})
    if name == "clean":
        judged.attack = None
    line = {"metric": "miou", "value": 0.5, "low": 0.4, "high": 0.6}
    judged.target.ids = tuple(map(str, range(10)))
    assert len(reference_findings(judged, [line])) == 1
    judged.target.ids = ("0", "1")
    assert len(reference_findings(judged, [line])) == (name == "pgd")
    assert reference_findings(judged, [{**line, "value": math.nan, "low": math.nan, "high": math.nan}]) == []


@pytest.mark.parametrize(
    ("eot", "scores", "expected"),
    [
        (1, [1.0, 1.0, 1.0], {"no-eot"}),
        (5, [1.0, 0.0, 1.0], {"few-draws"}),
        (5, [1.0, 1.0, 1.0], set()),
        (20, [1.0, 0.0, 1.0], set()),
    ],
)
def test_few_draws_are_noted_where_the_outcome_turns_on_the_draw(
    eot: int, scores: list[float], expected: set[str]
) -> None:
    judged = cell("pgd", "white_box")
    judged.defense.stochastic, judged.craft.eot = True, eot
    info = {f"craft_{k}": v for k, v in trace(*RISING).items()}
    row = {"score": sum(scores) / 3, "scores": scores, "stats": [{}], **info}
    settled = {**row, "scores": [0.0] * 3, "score": 0.0}
    assert {f.flag for f in cell_findings(judged, [row] * 3 + [settled] * 7)} == expected
    assert {f.flag for f in cell_findings(judged, [row] + [settled] * 9)} == expected - {"few-draws"}


# -- models and defenses ----------------------------------------------------------------------------------------------
class Net(TargetModel):
    """Classes by colour: red against blue."""

    task = "classification"
    losses = ("ce",)
    num_classes = 2

    def __init__(self, swapped: bool = False, factor: float = 1.0, jitter: bool = False) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)
        self.swapped, self.factor, self.jitter = swapped, factor, jitter
        self.eval().requires_grad_(False)

    def logits(self, images: Tensor, *, geometry: Geometry | None = None) -> Tensor:
        x = self.norm(images.flip(1) if self.swapped else images).flatten(2).mean(2)
        if self.factor != 1:
            x = x.detach() + self.factor * (x - x.detach())
        if self.jitter:
            x = x + torch.rand_like(x)
        return 3 * torch.stack([x[:, 0] - x[:, 2], x[:, 2] - x[:, 0]], 1)

    def loss(
        self, images: Tensor, targets: Sequence[Any], kind: str, *,
        geometry: Geometry | None = None, rng: ImageRNG | None = None,
    ) -> Tensor:  # fmt: skip
        return torch.nn.functional.cross_entropy(
            self.logits(images), torch.tensor(list(targets)), reduction="none"
        )

    def predict(self, images: Tensor, *, geometry: Geometry | None = None) -> list[Any]:
        return self.logits(images).argmax(1).tolist()


def coloured(n: int = 12) -> Batch:
    labels = [i % 2 for i in range(n)]
    images = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.2
    for image, label in zip(images, labels, strict=True):
        image[2 * label] += 0.4
    return Batch(images, tuple(labels), tuple(str(i) for i in range(n)))


def judge(net: Net) -> list[Finding]:
    batch = coloured()
    return model_findings(net, "net", batch, ImageRNG.for_images("m", batch.ids))


def test_a_sound_model_passes_and_swapped_colours_are_seen() -> None:
    assert judge(Net()) == []
    assert [f.flag for f in judge(Net(swapped=True))] == ["channels-swapped"]


def test_a_wrong_gradient_and_a_loss_of_its_own_mind_stop() -> None:
    with pytest.raises(CheckError, match=r"gradient of net is off by .* from finite differences"):
        judge(Net(factor=0.5))
    with pytest.raises(CheckError, match="differs between two calls"):
        judge(Net(jitter=True))


def test_a_loss_that_learns_from_ignored_pixels_stops() -> None:
    class Segmenter(Net):
        task = "segmentation"

        def __init__(self, counts: bool) -> None:
            super().__init__()
            self.counts = counts

        def loss_from_logits(self, logits: Tensor, targets: Sequence[Any], kind: str) -> Tensor:
            labels = torch.stack([torch.as_tensor(t) for t in targets])
            if self.counts:
                labels = labels.where(labels != 255, 0)
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=255)
            return loss.flatten(1).mean(1)

    assert [f.flag for f in judge(Segmenter(counts=False))] == []
    with pytest.raises(CheckError, match="loss 'ce' of net has a gradient on ignored pixels"):
        judge(Segmenter(counts=True))


def test_boxes_outside_the_image_stop() -> None:
    class Boxes:
        def corners(self) -> list[list[float]]:
            return [[0, 0, 300, 5]]

    batch = coloured(1)
    with pytest.raises(CheckError, match="boxes leave the 6 x 6 image"):
        model_findings(Net(), "net", Batch(batch.images, (Boxes(),), batch.ids), ImageRNG([1]))


def test_what_is_looked_up_on_first_use_is_no_change() -> None:
    net = torch.nn.Linear(2, 2)
    net.register_buffer("table", torch.empty(0), persistent=False)
    before = digest(net)
    net.table = torch.ones(3)
    check_frozen(net, before, "net", "x")


def test_a_changed_model_is_noticed() -> None:
    net = Net()
    before = digest(net)
    check_frozen(net, before, "net", "x")
    net.norm.running_mean += 1e-6  # type: ignore[operator]
    with pytest.raises(CheckError, match="x changed weights or statistics of net"):
        check_frozen(net, before, "net", "x")
    before = digest(net)
    net.norm.train()
    with pytest.raises(CheckError, match="x left net in training mode"):
        check_frozen(net, before, "net", "x")


def test_a_defense_must_draw_from_its_rng() -> None:
    class Hidden(Defense):
        def forward(self, images: Tensor, *args: Any) -> Tensor:
            return (images + 0.1 * torch.rand_like(images)).clamp(0, 1)

    class Open(Defense):
        stochastic = True

        def forward(self, images: Tensor, *args: Any) -> Tensor:
            return (images + 0.1 * args[0].signs(images.shape[1:])).clamp(0, 1)

    image = torch.full((1, 3, 4, 4), 0.5)
    state = torch.get_rng_state()
    check_defense(Open(), image, ImageRNG([3]))
    with pytest.raises(CheckError, match="gives different images for `stochastic` False"):
        check_defense(Hidden(), image, ImageRNG([3]))
    assert torch.equal(state, torch.get_rng_state())


# -- V18 and variations -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("fgsm", {}), ("bim", {"steps": 4, "alpha": "3/255"}), ("pgd", {}), ("mi_fgsm", {}), ("dim_ti", {}),
        ("pgd", {"norm": "l2", "eps": "1/2", "alpha": "1/8"}), ("apgd", {"steps": 20}), ("pgd", {"loss": "margin"}),
    ],
)  # fmt: skip
def test_planted_perturbations_are_found(name: str, params: dict[str, Any]) -> None:
    assert unit_test(ATTACKS.create(name, params)) == 1.0


def test_planted_perturbations_are_missed_by_weak_attacks() -> None:
    assert unit_test(ATTACKS.create("bim", {"steps": 2, "alpha": "1/255"})) == 0.0


@pytest.mark.parametrize(
    ("name", "params"), [("segpgd", {}), ("ddn", {}), ("noise", {}), ("pgd", {"target": "next"}), ("dag", {})]
)
def test_where_the_unit_test_has_no_meaning(name: str, params: dict[str, Any]) -> None:
    assert unit_test(ATTACKS.create(name, params)) is None


def test_vary_changes_what_an_attack_has() -> None:
    attack: Attack = ATTACKS.create("bim", {"eps": "4/255", "alpha": "1/255", "steps": 5})
    more = vary(attack, steps=10)
    assert more is not None and more.params == {**attack.params, "steps": 10} and more.eps == Fraction(4, 255)
    assert vary(attack, restarts=5) is None and vary(attack, steps=0) is None


def test_a_budget_that_is_no_norm_stops_the_cell() -> None:
    class Hungry(Attack):
        name, norm = "hungry", None

        def run(self, oracle: Any, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
            return images

        def excess(self, clean: Tensor, adversarial: Tensor) -> Tensor:
            return (adversarial - clean).flatten(1).mean(1) - 0.1

    clean = torch.linspace(0, 0.5, 24).view(2, 3, 2, 2)
    check_adversarials(Hungry(), clean, clean + 0.1, ["a", "b"])
    with pytest.raises(CheckError, match=r"attack 'hungry', image b: beyond its own budget by 5\.00%"):
        check_adversarials(Hungry(), clean, clean + torch.tensor([0.1, 0.15]).view(2, 1, 1, 1), ["a", "b"])


def test_the_8_bit_format_is_what_a_png_file_gives_back(tmp_path: Path) -> None:
    images = torch.rand(3, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    assert in_format(images, "float") is images
    for i, image in enumerate(images):
        save_image(image, tmp_path / f"{i}.png")
    read = torch.stack([decode_image(str(tmp_path / f"{i}.png")) for i in range(3)]).float() / 255
    assert torch.equal(in_format(images, "uint8"), read)
    assert torch.equal(in_format(read, "uint8"), read)
