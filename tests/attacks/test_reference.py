"""Objectives that compare with the clean image: within the same draw of a stochastic defense, else with one output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.objectives import BoundLoss, Loss
from bench.plan import reference_of
from bench.protocols import Defense, ImageRNG
from bench.registry import ATTACKS, DEFENSES
from bench.threat import ModelOracle, Victim
from tasks.classification.model import LogitsClassifier

STEPS = {"eps": "8/255", "alpha": "2/255", "steps": 6}
COMPARING: dict[str, tuple[str, dict[str, Any]]] = {
    "tap": ("tap", STEPS),
    "ssp": ("ssp", STEPS),
    "cafa": ("cafa", STEPS),
    "pgd_kl": ("pgd_kl", STEPS),
    "pgd-kl-restarts": ("pgd", {**STEPS, "loss": "kl", "restarts": 2}),
    "pgd-kl-diverse": ("iterative", {**STEPS, "loss": "kl", "start": "uniform", "di_prob": 0.5}),
}


class Net(nn.Module):
    """Ends in pooled maps and a linear layer, as all attacks here ask."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.second(self.first(x).relu()).relu().mean((2, 3)))
        return out


class Blur(Defense):
    """Deterministic, and no identity."""

    def forward(self, images: Tensor, *args: Any) -> Tensor:
        return nn.functional.avg_pool2d(images, 3, 1, 1)


@pytest.fixture(scope="module")
def target() -> LogitsClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
        with torch.no_grad():
            net.fc.weight *= 100
        return LogitsClassifier(net, 5).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise() -> Defense:
    made: Defense = DEFENSES.create("noise", {"eps": "8/255"})
    return made.eval()


def oracle_of(
    attack: Any, target: LogitsClassifier, defense: Defense | None, eot: int = 1, mode: str = "exact"
) -> ModelOracle:
    kind: Any = "none" if defense is None else mode
    return ModelOracle(Victim((target,), defense, kind, eot), attack, ImageRNG(range(4)))


def once(self: Loss, oracle: Any, images: Tensor, targets: Sequence[Any], targeted: bool) -> BoundLoss:
    """The reference of one draw for all draws."""
    return BoundLoss(self, tuple(targets), self.reference(oracle, images), -1.0 if targeted else 1.0)


@pytest.mark.parametrize("name", COMPARING)
@pytest.mark.parametrize("defended", [False, True])
def test_deterministic_victims_are_asked_once(
    name: str, defended: bool, target: LogitsClassifier, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = ATTACKS.create(*COMPARING[name])
    defense = Blur().eval() if defended else None

    def run() -> tuple[Tensor, list[int]]:
        oracle = oracle_of(attack, target, defense)
        out = attack.run(oracle, images, [0, 1, 2, 3], ImageRNG(range(4)))
        return out, [trace.forwards for trace in oracle.traces]

    assert not oracle_of(attack, target, defense).stochastic
    now, passes = run()
    monkeypatch.setattr(Loss, "bind", once)
    before, passes_before = run()
    assert torch.equal(now, before) and passes == passes_before


@pytest.mark.parametrize("name", ["tap", "ssp", "cafa", "pgd_kl"])
@pytest.mark.parametrize(("mode", "eot"), [("exact", 1), ("exact", 3), ("bpda", 2)])
def test_an_unperturbed_image_is_at_no_distance_in_every_draw(
    name: str, mode: str, eot: int, target: LogitsClassifier, images: Tensor, noise: Defense
) -> None:
    attack = ATTACKS.create(*COMPARING[name])
    oracle = oracle_of(attack, target, noise, eot, mode)
    assert oracle.stochastic and attack.compares
    bound = attack.loss.bind(oracle, images, (0, 1, 2, 3), False)
    assert bound.reference is None
    seen: list[Tensor] = []

    def distance(view: Any, x: Tensor) -> Tensor:
        # TAP's cross-entropy, which is no distance, is the same with both.
        value = bound(view, x)
        if name == "tap":
            logits = view.logits(x)
            value = value - nn.functional.cross_entropy(logits, torch.arange(4), reduction="none")
        seen.append(value.detach())
        return value

    oracle.gradient(images, distance)
    oracle.value(images, distance)
    assert len(seen) == 2 * eot
    for value in seen:
        assert value.abs().max() <= 1e-5
    oracle.gradient(images.flip(0), distance)
    assert (seen[-1] > 1e-4).all()


def test_draws_differ_between_calls_and_draws_and_not_within(
    target: LogitsClassifier, images: Tensor, noise: Defense
) -> None:
    """What `same draw` rests on: logits and features, the whole batch and parts of it."""
    attack = ATTACKS.create("cafa", {"mode": "paper"})
    oracle = oracle_of(attack, target, noise, eot=2)
    drawn: list[Tensor] = []

    def objective(view: Any, x: Tensor) -> Tensor:
        logits = view.logits(x)
        assert torch.equal(logits, view.logits(images))
        assert torch.equal(view.features(x, "second"), view.features(images, "second"))
        part = view.select([2, 0])
        assert torch.allclose(part.logits(images[[2, 0]]), logits[[2, 0]], atol=1e-6)
        assert torch.allclose(
            view.select([3]).features(x[[3]], "second"), view.features(x, "second")[[3]], atol=1e-6
        )
        drawn.append(logits.detach())
        return logits.sum(1)

    oracle.gradient(images, objective)
    oracle.gradient(images, objective)
    assert len(drawn) == 4
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[i + 1 :])
    # Alone an image draws what it draws in company.
    alone: list[Tensor] = []
    single = oracle_of(attack, target, noise, eot=2).select([1])
    single.gradient(
        images[[1]], lambda view, x: alone.append(view.logits(x).detach()) or view.logits(x).sum(1)
    )
    for a, b in zip(alone, drawn, strict=False):
        assert torch.allclose(a[0], b[1], atol=1e-6)


@pytest.mark.parametrize("name", COMPARING)
def test_company_does_not_matter_in_front_of_noise(
    name: str, target: LogitsClassifier, images: Tensor, noise: Defense
) -> None:
    attack = ATTACKS.create(*COMPARING[name])
    whole = attack.run(oracle_of(attack, target, noise, 2), images, [0, 1, 2, 3], ImageRNG(range(4)))
    part_of = ModelOracle(Victim((target,), noise, "exact", 2), attack, ImageRNG([2, 1]))
    part = attack.run(part_of, images[[2, 1]], [2, 1], ImageRNG([2, 1]))
    assert torch.allclose(part, whole[[2, 1]], atol=1e-6)


def test_a_part_keeps_its_own_clean_images(target: LogitsClassifier, images: Tensor, noise: Defense) -> None:
    attack = ATTACKS.create(*COMPARING["ssp"])
    bound = attack.loss.bind(oracle_of(attack, target, noise), images, (0,) * 4, False)
    part = bound.select([3, 1])
    assert part.clean is not None and torch.equal(part.clean, images[[3, 1]])


def test_tap_is_not_led_astray_by_noise(noise: Defense) -> None:
    """In front of noise it breaks a trained classifier about as well as PGD."""
    from bench.protocols import Batch
    from bench.registry import DATASETS, MODELS

    model = MODELS.create("mini_resnet").load(torch.device("cpu"))
    data = DATASETS.create("mini_digits")
    batch = Batch.of([model.prepare(data[i]) for i in range(8)])
    left = {}
    for name in ("pgd", "tap"):
        attack = ATTACKS.create(name, {"eps": "8/255", "alpha": "2/255", "steps": 10})
        streams = ImageRNG.for_images(name, batch.ids)
        oracle = ModelOracle(Victim((model,), noise, "exact", 4), attack, streams.fork("oracle"))
        out = attack.run(oracle, batch.images, batch.targets, streams)
        seen = noise.purify(out, streams.fork("judge")).images
        left[name] = sum(a == b for a, b in zip(model.predict(seen), batch.targets, strict=True))
    assert left["tap"] <= left["pgd"] + 1


def test_keys_tell_where_the_reference_belongs_to_a_draw(noise: Defense) -> None:
    for name, params in COMPARING.values():
        attack = ATTACKS.create(name, params)
        assert reference_of(attack, noise) == {"reference": "of the same draw"}
        assert reference_of(attack, Blur()) == reference_of(attack, None) == {}
    assert reference_of(ATTACKS.create("pgd"), noise) == {}
