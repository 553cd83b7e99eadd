"""APGD, Square and the whole cascade against pyautoattack, on a smooth random network and on the mini classifier."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attacks.apgd import APGD
from bench.protocols import Batch, Gradient, ImageRNG, Objective
from bench.registry import ATTACKS, DATASETS, MODELS
from bench.threat import ModelOracle, Victim

base = pytest.importorskip("pyautoattack.autopgd_base")
COUNT, EPS = 50, 2


class Double(ModelOracle):
    """The oracle without its rounding of values to single precision."""

    def gradient(self, images: Tensor, objective: Objective) -> Gradient:
        x = images.detach().requires_grad_()
        values = objective(self, x)
        return Gradient(values.detach(), torch.autograd.grad(values.sum(), x)[0])


class Mini:
    """The mini VGG on test digits, run in one batch: the comparison needs no reproducible bits."""

    def __init__(self) -> None:
        data = DATASETS.create("mini_digits")
        self.model = MODELS.create("mini_vgg").load(torch.device("cpu"))
        self.model.micro_batch = COUNT
        batch = Batch.of([data[i] for i in range(COUNT)])
        self.images, self.targets = batch.images, [int(t) for t in batch.targets]
        self.labels = torch.tensor(self.targets)

    def run(self, name: str, **params: object) -> Tensor:
        attack = ATTACKS.create(name, params)
        rng = ImageRNG.for_images("mini", map(str, range(COUNT)))
        oracle = ModelOracle(Victim((self.model,)), attack, rng.fork("oracle"))
        return attack.run(oracle, self.images, self.targets, rng)

    def standing(self, images: Tensor) -> int:
        return int((self.model.logits(images).argmax(1) == self.labels).sum())


@pytest.fixture(scope="module")
def mini() -> Mini:
    return Mini()


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 2 / 255), ("l2", 0.25)])
def test_apgd_takes_the_same_path(setting, monkeypatch, loss, norm, eps):
    """From one start, all steps, checkpoints and best points agree; in double precision, so signs cannot flip."""
    attack = ATTACKS.create("apgd", {"loss": loss, "norm": norm, "eps": eps, "steps": 40})
    delta = torch.randn(setting.images.shape, dtype=torch.float64)
    length = delta.flatten(1).norm(dim=1) if norm == "l2" else delta.abs().flatten(1).amax(1)
    delta = delta / length.view(-1, 1, 1, 1)
    monkeypatch.setattr(APGD, "_start", lambda self, climb: delta[climb.index])
    look = APGD._look
    last = torch.empty(0)

    def watched(self, climb, best, objective, x):
        nonlocal last
        last = x
        return look(self, climb, best, objective, x)

    monkeypatch.setattr(APGD, "_look", watched)
    rng = setting.rng()
    oracle = Double(Victim((setting.target,)), attack, rng)
    attack.run(oracle, setting.images, setting.labels.tolist(), rng)
    path: list[Tensor] = []
    losses: list[Tensor] = []

    class Library(base.APGDAttack):
        """Its first window compares the first value with 0; the paper, and ours, compare it with the start's."""

        def check_oscillation(self, x, j, k, y5, k3=0.75):
            rises = sum((losses[i + 1] > losses[i]).double() for i in range(j + 1 - k, j + 1))
            return (rises <= k * k3).double()

    def network(x: Tensor) -> Tensor:
        logits = setting.net(x)
        cross = F.cross_entropy(logits, setting.labels, reduction="none")
        losses.append((cross if loss == "ce" else theirs.dlr_loss(logits, setting.labels)).detach())
        path.append(x.detach().clone())
        return logits

    kind = "L2" if norm == "l2" else "Linf"
    theirs = Library(network, n_iter=40, norm=kind, eps=eps, loss=loss, device="cpu")
    theirs.init_hyperparam(setting.images)
    begin = (setting.images + eps * delta).clamp(0, 1)
    theirs.attack_single_run(setting.images, setting.labels, x_init=begin)
    # With the label in third place the ratio is 1 whatever the image: its gradient is rounding.
    kept = (
        torch.stack(losses).amax(0) < 1 - 1e-9 if loss == "dlr" else torch.ones(len(last), dtype=torch.bool)
    )
    assert kept.sum() >= 2
    torch.testing.assert_close(last[kept], path[-1][kept], rtol=0, atol=1e-6)
    assert (last - begin).abs().max() > 0.5 * eps * (norm == "linf")


@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_breaks_as_many(mini, loss):
    ours = mini.run("apgd", loss=loss, eps=f"{EPS}/255", steps=20)
    theirs = base.APGDAttack(mini.model.logits, n_iter=20, eps=EPS / 255, loss=loss, device="cpu")
    left = mini.standing(theirs.perturb(mini.images, mini.labels))
    assert mini.standing(ours) <= left + 0.01 * COUNT
    assert left < 0.9 * mini.standing(mini.images)


def test_apgd_on_targets_breaks_as_many(mini):
    ours = mini.run("apgd", loss="dlr_targeted", eps=f"{EPS}/255", steps=10, classes=2)
    theirs = base.APGDAttack_targeted(
        mini.model.logits, n_iter=10, eps=EPS / 255, n_target_classes=2, device="cpu"
    )
    assert mini.standing(ours) <= mini.standing(theirs.perturb(mini.images, mini.labels)) + 0.01 * COUNT


@pytest.mark.parametrize(("norm", "eps"), [("linf", 16 / 255), ("l2", 1.5)])
def test_square_breaks_as_many(mini, norm, eps):
    from pyautoattack.square import SquareAttack

    ours = mini.run("square", norm=norm, eps=eps, queries=80, p=0.3)
    kind = "L2" if norm == "l2" else "Linf"
    theirs = SquareAttack(
        mini.model.logits, norm=kind, eps=eps, n_queries=80, p_init=0.3, device="cpu", seed=1
    )
    left = mini.standing(theirs.perturb(mini.images, mini.labels))
    # Both are random searches: their draws differ, so their luck does.
    assert mini.standing(ours) <= left + 0.06 * COUNT and left < 0.9 * COUNT


def test_autoattack_is_the_library(mini):
    """One image at a time under its own seed gives the library's success; what still stands comes back clean."""
    from pyautoattack import AutoAttack

    members = ["apgd-ce", "apgd-t", "fab-t", "square"]
    params = {"eps": "2/255", "steps": 4, "queries": 10}
    count, whole = 10, (mini.images, mini.targets, mini.labels)
    mini.images, mini.targets, mini.labels = (part[:count] for part in whole)
    try:
        attack = ATTACKS.create("autoattack", params)
        rng = ImageRNG.for_images("mini", map(str, range(count)))
        mini.model.micro_batch = 1
        oracle = ModelOracle(Victim((mini.model,)), attack, rng.fork("oracle"))
        ours = attack.run(oracle, mini.images, mini.targets, rng)
        theirs = AutoAttack(mini.model.logits, eps=2 / 255, seed=0)
        attack._configure(theirs, 10)
        assert theirs.attacks_to_run == members
        other, _ = theirs.run_standard_evaluation(mini.images, mini.labels, batch_size=count)
        assert abs(mini.standing(ours) - mini.standing(other)) <= 1
        clean = (ours == mini.images).flatten(1).all(1)
        stands = mini.model.logits(ours).argmax(1) == mini.labels
        wrong = mini.model.logits(mini.images).argmax(1) != mini.labels
        assert torch.equal(clean, stands | wrong) and stands.any() and not stands.all()
    finally:
        mini.images, mini.targets, mini.labels = whole
        mini.model.micro_batch = COUNT
