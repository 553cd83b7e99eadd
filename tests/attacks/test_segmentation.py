"""SegPGD, C&W, DeepFool and SEA on label maps: steps worked out by hand, budgets, independence, strength."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.pixels import MaskedUnitLogit, SegPGDLoss
from attacks.sea import SEA, _stages
from attacks.segmentation import DeepFoolSeg
from bench.errors import GridError, PluginError
from bench.protocols import Attack, Geometry, ImageRNG, TargetModel
from bench.registry import ATTACKS, DATASETS, METRICS, MODELS, TASKS
from bench.threat import ModelOracle, Victim

EPS = 8 / 255
ATTACK = {
    "segpgd": {"steps": 5},
    "cw_seg": {"eps": "8/255", "alpha": "2/255", "steps": 5},
    "cw_seg-confident": {"eps": "8/255", "alpha": "2/255", "steps": 5, "kappa": 2},
    "cw_seg-targeted": {"eps": "8/255", "alpha": "2/255", "steps": 5, "target": "next"},
    "deepfool_seg": {"eps": "8/255", "steps": 5},
    "sea": {"steps": 10},
    "sea-code": {"steps": 6, "losses": ["segpgd", "mask_logit"]},
    "sea-random": {"steps": 10, "start": "uniform", "losses": ["js"], "shrink": False},
}


class Pixelwise(TargetModel):
    """A segmenter that looks at small neighbourhoods of its own images only."""

    task = "segmentation"
    losses = ("ce", "margin")
    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 1))
        with torch.no_grad():
            self.net[0].weight *= 5
            self.net[2].weight *= 3
        self.eval().requires_grad_(False)

    def logits(self, images: Tensor, *, geometry: Geometry | None = None) -> Tensor:
        return torch.cat([self.net(image[None]) for image in images])

    def loss(self, images: Tensor, targets: Sequence[Any], kind: str, **_: Any) -> Tensor:
        raise AssertionError("these attacks work from logits")

    def predict(self, images: Tensor, *, geometry: Geometry | None = None) -> list[Any]:
        return list(self.logits(images).argmax(1))


@pytest.fixture(scope="module")
def target() -> Pixelwise:
    return Pixelwise()


@pytest.fixture(scope="module")
def batch(target: Pixelwise) -> tuple[Tensor, list[Tensor]]:
    """Four images; the labels are the predictions, with a quarter wrong and a border ignored."""
    g = torch.Generator().manual_seed(1)
    images = (torch.rand(4, 3, 10, 12, generator=g) * 1.2 - 0.1).clamp(0, 1)
    labels = torch.stack(target.predict(images))
    wrong = torch.rand(labels.shape, generator=g) < 0.25
    labels[wrong] = (labels[wrong] + 1) % 4
    labels[:, 0] = 255
    return images, list(labels)


def create(case: str) -> Attack:
    attack: Attack = ATTACKS.create(case.split("-")[0], ATTACK[case])
    return attack


def run(
    attack: Attack, target: TargetModel, images: Tensor, targets: Sequence[Any], seeds: Sequence[int]
) -> Tensor:
    rng = ImageRNG(seeds)
    if attack.target is not None:
        task = TASKS.create("segmentation")
        targets = task.attack_targets(attack.target, targets, target.num_classes, rng.fork("target"))
    oracle = ModelOracle(Victim((target,)), attack, rng.fork("oracle"))
    out = attack.run(oracle, images, targets, rng.fork("attack"))
    assert all(trace.nonfinite == 0 for trace in oracle.traces)
    assert all(trace.backwards == attack.passes() for trace in oracle.traces)
    return out


def right(target: TargetModel, images: Tensor, labels: Sequence[Tensor]) -> list[float]:
    task = TASKS.create("segmentation")
    return [task.rows(p, y)["score"] for p, y in zip(target.predict(images), labels, strict=True)]


@pytest.mark.parametrize("case", list(ATTACK))
def test_budget_company_and_unlabelled_images(case, target, batch):
    images, labels = batch
    labels = [*labels[:3], torch.full_like(labels[3], 255)]
    before = images.clone()
    attack = create(case)
    out = run(attack, target, images, labels, [0, 1, 2, 3])
    assert torch.equal(images, before) and torch.isfinite(out).all()
    assert out.min() >= 0 and out.max() <= 1 and (out - images).abs().max() <= EPS + 1e-6
    assert torch.equal(out[3], images[3])  # nothing is labelled
    assert ((out - images)[:3].abs().flatten(1).amax(1) > 0).all()
    part = run(create(case), target, images[[2, 0]], [labels[2], labels[0]], [2, 0])
    assert torch.equal(part, out[[2, 0]])
    clean, attacked = right(target, images[:3], labels[:3]), right(target, out[:3], labels[:3])
    assert all(a < c for a, c in zip(attacked, clean, strict=True))


def test_segpgd_step_by_step(target, batch):
    images, labels = batch
    y = torch.stack(labels)
    x = images
    for t in (1, 2, 3):
        x = x.clone().requires_grad_(True)
        z = target.net(x)
        lam = (t - 1) / (2 * 3)
        ce = nn.functional.cross_entropy(z, y, reduction="none", ignore_index=255)
        good = z.argmax(1) == y
        loss = (1 - lam) * ce[good].sum() + lam * ce[~good].sum()
        (g,) = torch.autograd.grad(loss, x)
        x = (x + 2 / 255 * g.sign()).detach()
        x = torch.minimum(torch.maximum(x, images - EPS), images + EPS).clamp(0, 1)
    attack = ATTACKS.create("segpgd", {"steps": 3, "start": "none"})
    torch.testing.assert_close(run(attack, target, images, labels, range(4)), x, rtol=0, atol=1e-6)


def test_deepfool_reaches_the_boundary_of_a_linear_segmenter_in_one_step():
    class Linear(Pixelwise):
        """Logits (0, w . x): one pixel of every image is right while w . x < 0."""

        def logits(self, images: Tensor, *, geometry: Geometry | None = None) -> Tensor:
            score = (images * torch.tensor([0.2, -0.5, 0.1]).view(3, 1, 1)).sum(1)
            return torch.stack([torch.zeros_like(score), score], 1)

    Linear.num_classes = 2
    image = torch.tensor([0.5, 0.3, 0.4]).view(1, 3, 1, 1)  # w . x = -0.01
    labels = [torch.tensor([[1]])]
    target = Linear()
    assert right(target, image, labels) == [0.0]
    image[0, 1] = 0.25  # w . x = 0.015, label 1 wins by 0.015; ||w||_1 = 0.8
    out = run(ATTACKS.create("deepfool_seg", {"steps": 1}), target, image, labels, [0])
    expected = -torch.tensor([1.0, -1.0, 1.0]) * 1.02 * 0.015 / 0.8
    torch.testing.assert_close((out - image).flatten(), expected, rtol=0, atol=1e-6)
    assert right(target, out, labels) == [0.0]
    # Done: a second step has nothing to do.
    more = run(ATTACKS.create("deepfool_seg", {"steps": 2}), target, image, labels, [0])
    assert torch.equal(more, out)
    attack = DeepFoolSeg()
    step = attack._move(torch.tensor([-1e6, -1.0]), torch.zeros(2, 3, 1, 1))
    assert (step == 0).all()  # no gradient, no step


def test_sea_stages():
    assert [(round(e / EPS, 6), n) for e, n in _stages(EPS, 300)] == [(2.0, 90), (1.5, 90), (1.0, 120)]
    assert [n for _, n in _stages(EPS, 3)] == [3]  # too few for wider stages
    assert SEA(steps=10).passes() == 3 * (10 + 3)


def test_sea_keeps_the_worst_of_its_losses(target, batch):
    images, labels = batch
    alone = {
        loss: run(ATTACKS.create("sea", {"steps": 10, "losses": [loss]}), target, images, labels, range(4))
        for loss in ("mask_ce", "mask_ce_balanced", "js")
    }
    scores = {loss: right(target, out, labels) for loss, out in alone.items()}
    out = run(ATTACKS.create("sea", {"steps": 10}), target, images, labels, range(4))
    for i, score in enumerate(right(target, out, labels)):
        assert score == min(s[i] for s in scores.values())
        assert any(torch.equal(out[i], one[i]) for one in alone.values())


def test_the_losses_of_the_code_of_sea(target, batch):
    """Values by hand at the first and a later step, ignored pixels left out; and each is an attack by itself."""
    images, labels = batch
    y = torch.stack(labels)
    z = target.net(images)
    counted, good = y != 255, z.argmax(1) == y
    index = y.where(counted, 0)[:, None]
    unit = z.gather(1, index)[:, 0] / z.square().sum(1).sqrt()
    expected = -(unit * good).sum((1, 2)) / counted.sum((1, 2))
    torch.testing.assert_close(MaskedUnitLogit().of(z, y), expected)
    torch.testing.assert_close(MaskedUnitLogit().of(7 * z, y), expected)
    ce = nn.functional.cross_entropy(z, y, reduction="none", ignore_index=255)
    for step, share in ((0, 0.0), (5, 0.25), (10, 0.5)):
        weighed = (torch.where(good, 1 - share, share) * ce).sum((1, 2)) / counted.sum((1, 2))
        torch.testing.assert_close(SegPGDLoss().at(step, 10).of(z, y), weighed)
    before = right(target, images, labels)
    for loss in ("segpgd", "mask_logit"):
        out = run(ATTACKS.create("sea", {"steps": 10, "losses": [loss]}), target, images, labels, range(4))
        assert all(a < b for a, b in zip(right(target, out, labels), before, strict=True)), loss


def test_segpgd_in_sea_moves_its_weights(target, batch):
    """The loss of step t of a stage is the one of SegPGD; another stage begins anew."""
    seen: list[float] = []

    class Spy(SegPGDLoss):
        def of(self, logits: Tensor, labels: Tensor) -> Tensor:
            seen.append(self.share)
            return super().of(logits, labels)

        def at(self, step: int, steps: int) -> SegPGDLoss:
            return Spy(step / (2 * steps))

    attack = SEA(steps=10, losses=("segpgd",))
    attack.losses = [Spy()]
    oracle = ModelOracle(Victim((target,)), attack, ImageRNG(range(4)))
    attack.run(oracle, *batch, ImageRNG(range(4)))
    assert seen == [t / 6 for t in range(4)] * 2 + [t / 8 for t in range(5)]


def test_sea_never_returns_worse_than_its_start(target, batch):
    images, labels = batch
    few, many = (
        run(ATTACKS.create("sea", {"steps": n, "losses": ["js"], "shrink": False}), target, images, labels, range(4))
        for n in (1, 20)
    )  # fmt: skip
    scores = [right(target, x, labels) for x in (images, few, many)]
    assert all(a >= b >= c for a, b, c in zip(*scores, strict=True))


def test_bad_parameters(target, batch):
    for name, params, message in (
        ("sea", {"losses": []}, "losses"),
        ("sea", {"losses": ["ce"]}, "losses"),
        ("cw_seg", {"kappa": -1}, "kappa"),
        ("segpgd", {"steps": 0}, "steps"),
        ("deepfool_seg", {"eps": 8}, "8/255"),
    ):
        with pytest.raises(PluginError, match=message):
            ATTACKS.create(name, params)
    with pytest.raises(GridError, match="class_pixels: 2 numbers for a model of 4 classes"):
        run(ATTACKS.create("sea", {"steps": 1, "class_pixels": [1, 2]}), target, *batch, range(4))


def test_stronger_than_bim_on_a_trained_segmenter():
    """Cross-entropy keeps working on pixels that are wrong already; these attacks do not."""
    model = MODELS.create("mini_pspnet").load(torch.device("cpu"))
    data = DATASETS.create("mini_scenes_seg")
    samples = [model.prepare(data[i]) for i in range(3)]
    images, labels = torch.stack([s.image for s in samples]), [s.target for s in samples]
    metrics = [METRICS.create(name) for name in ("miou", "pixel_accuracy")]
    task = TASKS.create("segmentation")

    def scores(out: Tensor) -> list[float]:
        rows = [task.rows(p, y) for p, y in zip(model.predict(out), labels, strict=True)]
        return [metric.value(metric.prepare(rows)) for metric in metrics]

    same = {"eps": "8/255", "alpha": "2/255", "steps": 10}
    bim = scores(run(ATTACKS.create("bim", same), model, images, labels, range(3)))
    assert bim[0] < 0.3 * scores(images)[0]
    for name, params in (
        ("segpgd", {"steps": 10}), ("cw_seg", same), ("deepfool_seg", {"eps": "8/255", "steps": 10}),
        ("sea", {"steps": 10}),
    ):  # fmt: skip
        found = scores(run(ATTACKS.create(name, params), model, images, labels, range(3)))
        assert found[0] <= bim[0] and found[1] <= bim[1], (name, found, bim)
