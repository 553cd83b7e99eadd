"""The loop: it learns, resumes to the same bits, and stops with one line when it diverges."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.errors import DataError, PluginError, WeightsError
from bench.protocols import Batch, Sample
from bench.registry import ATTACKS, DEFENSES
from bench.weights import save_safetensors
from defenses.training.adversary import AttackAdversary, Precomputed
from defenses.training.guide import Guide, label_planes
from defenses.training.loop import Trainer, TrainingDiverged, plot, write_history
from defenses.training.objectives import OBJECTIVES, Step, objective
from defenses.training.recipe import RECIPES, Recipe, recipe
from tasks.classification.model import LogitsClassifier


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def target() -> LogitsClassifier:
    torch.manual_seed(0)
    return LogitsClassifier(Net(), 4)


def pgd(target, static: bool = False) -> AttackAdversary:
    attack = ATTACKS.create("pgd", {"steps": 2})
    return AttackAdversary([(attack, 1.0)], target, static=static)


SMALL = {"epochs": 3, "batch": 4}
NETWORK = {
    "dunet": {"width": 4}, "dae": {"width": 4}, "nrp": {"width": 4, "blocks": 1, "growth": 4},
    "nrp_resg": {"width": 4, "blocks": 1}, "unet": {"width": 4, "depth": 2}, "apegan": {"width": 4},
    "global": {"width": 4, "downsamplings": 1, "blocks": 1},
    "wgan": {"width": 4, "size": (16, 16), "latent": 8}, "disco": {"width": 4, "blocks": 1, "hidden": 8},
    "ddpm": {"width": 4, "multipliers": (1, 2), "blocks": 1},
}  # fmt: skip


def small(name: str, **changes) -> Recipe:
    full = recipe(name)
    critic = {} if full.critic is None else {"critic_args": {**full.critic_args, "width": 4}}
    if full.critic in ("cafd", "nrp"):
        critic["critic"] = "cafd"  # NRP's five blocks need 32 pixels
    network = {**full.network_args, **NETWORK[full.network]}
    return full.but(network_args=network, **critic, **{**SMALL, **changes})


def trainer(name: str, samples, target, **kwargs) -> Trainer:
    changes = kwargs.pop("changes", {})
    adversary = kwargs.pop("adversary", None) or pgd(target)
    return Trainer(small(name, **changes), samples, adversary, target, key=kwargs.pop("key", "k"), **kwargs)


def weights(t: Trainer) -> Tensor:
    return torch.cat([v.flatten().double() for v in t.network.state_dict().values()])


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_trains_its_network_and_discriminator(name, samples, target):
    t = trainer(name, samples, target, changes={"epochs": 1})
    before = weights(t)
    critic = (
        None if t.critic is None else torch.cat([p.detach().flatten().clone() for p in t.critic.parameters()])
    )
    history = t.run()
    assert t.step == t.total == 3 and len(history.epochs) == 1
    assert not torch.equal(weights(t), before)
    if critic is not None:
        assert not torch.equal(torch.cat([p.detach().flatten() for p in t.critic.parameters()]), critic)
        assert "critic" in history.epochs[0]
    assert all(p.grad is None for p in target.parameters())
    assert target.micro_batch is None


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_names_defenses_and_objectives_that_exist(name):
    r = RECIPES[name]
    assert r.defense in DEFENSES.names() and r.objective in OBJECTIVES
    assert r.network in DEFENSES.resolve(r.defense).networks
    assert (r.critic is not None) == objective(r.objective, dict(r.objective_args)).adversarial
    for spec in r.attacks:
        ATTACKS.validate(spec["name"], spec["params"])


@pytest.mark.parametrize("name", ["hgd", "hgd_pixels"])
def test_loss_falls(name, samples, target):
    t = trainer(name, samples, target, changes={"epochs": 12, "lr": 3e-3, "milestones": ()})
    history = t.run()
    assert sum(history.epochs[-1].values()) < 0.7 * sum(history.epochs[0].values())


def test_same_seed_same_weights(samples, target):
    one, two, other = (
        trainer("cafd", samples, target, changes={"seed": seed, "epochs": 1}) for seed in (1, 1, 2)
    )
    torch.manual_seed(5)
    one.run()
    torch.manual_seed(6)  # the global generator has no say
    two.run()
    other.run()
    assert torch.equal(weights(one), weights(two)) and not torch.equal(weights(one), weights(other))


@pytest.mark.parametrize("name", ["cafd", "apegan", "alignment", "hgd", "defense_gan", "diffpure"])
@pytest.mark.parametrize("stop", [2, 3, 7])
def test_resumed_run_ends_with_the_same_bits(name, stop, samples, target, tmp_path):
    static = name == "cafd"
    straight = trainer(name, samples, target, adversary=pgd(target, static))
    history = straight.run()
    state = tmp_path / "state.safetensors"
    trainer(name, samples, target, state=state, adversary=pgd(target, static)).run(until=stop)
    assert (tmp_path / "state.adversarial.safetensors").exists() == static
    if stop == 3:
        # Whoever deletes the images gets the same ones again.
        (tmp_path / "state.adversarial.safetensors").unlink(missing_ok=True)
    again = trainer(name, samples, target, state=state, adversary=pgd(target, static))
    assert again.step == stop
    resumed = again.run()
    assert torch.equal(weights(again), weights(straight))
    assert resumed.epochs == history.epochs


class Shifted(list[Sample]):
    """Images that every epoch shows at another place; ids and labels stay."""

    def shown(self, index: int, epoch: int) -> Sample:
        sample = self[index]
        return Sample(sample.image.roll(epoch, 2), sample.target, sample.id)


@pytest.mark.parametrize("stop", [2, 3, 7])
def test_images_that_change_from_epoch_to_epoch(stop, samples, target, tmp_path):
    seen: list[tuple[int, str, Tensor]] = []

    class Watched(Shifted):
        def shown(self, index: int, epoch: int) -> Sample:
            sample = super().shown(index, epoch)
            seen.append((epoch, sample.id, sample.image))
            return sample

    straight, still = trainer("cafd", Watched(samples), target), trainer("cafd", samples, target)
    straight.run(), still.run()
    assert [epoch for epoch, _, _ in seen] == [0] * 12 + [1] * 12 + [2] * 12
    images = {(epoch, name): image for epoch, name, image in seen}
    assert all(torch.equal(images[1, name], images[0, name].roll(1, 2)) for _, name, _ in seen)
    assert not torch.equal(weights(straight), weights(still))
    # A resumed run sees what one that was never interrupted saw.
    state = tmp_path / "state.safetensors"
    trainer("cafd", Shifted(samples), target, state=state).run(until=stop)
    again = trainer("cafd", Shifted(samples), target, state=state)
    assert again.run().epochs == straight.history.epochs
    assert torch.equal(weights(again), weights(straight))


KILLED = """
import os, sys, signal
sys.path[:0] = [{root!r}, {tests!r}]
import test_loop as t
import torch
torch.set_num_threads(1)
torch.manual_seed(0)
target = t.LogitsClassifier(t.Net(), 4)
g = torch.Generator().manual_seed(1)
images = torch.rand(12, 3, 16, 16, generator=g)
samples = [t.Sample(x, i % 4, str(i)) for i, x in enumerate(images)]
run = t.trainer("cafd", samples, target, state=t.Path({state!r}), save_every=1)
run.run(lambda done, total, note: os.kill(os.getpid(), signal.SIGKILL) if done == 5 else None)
"""


def test_survives_kill_9(samples, target, tmp_path):
    state = tmp_path / "state.safetensors"
    here = Path(__file__)
    code = KILLED.format(root=str(here.parents[3]), tests=str(here.parent), state=str(state))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=120)
    assert done.returncode == -9, done.stderr.decode()[-500:]
    again = trainer("cafd", samples, target, state=state)
    assert again.step == 5
    straight = trainer("cafd", samples, target)
    straight.run(), again.run()
    assert torch.equal(weights(again), weights(straight))


def test_state_of_another_recipe_is_refused(samples, target, tmp_path):
    state = tmp_path / "state.safetensors"
    trainer("hgd", samples, target, state=state).run(until=1)
    with pytest.raises(WeightsError, match="belongs to another recipe"):
        trainer("hgd", samples, target, state=state, key="other")
    save_safetensors(state, {"x": torch.zeros(1)}, meta={"key": "k"})
    with pytest.raises(WeightsError, match="another version"):
        trainer("hgd", samples, target, state=state)


class Poison:
    """An adversary that breaks at a given call."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def identity(self):
        return "poison"

    def prepare(self, batches, cache, key):
        pass

    def __call__(self, batch: Batch, draw: object) -> Tensor:
        self.calls += 1
        return batch.images * (float("inf") if self.calls == self.at else 1)


def test_divergence_stops_and_names_step_term_and_state(samples, target, tmp_path):
    state = tmp_path / "state.safetensors"
    t = trainer("hgd", samples, target, state=state, adversary=Poison(5))
    with pytest.raises(
        TrainingDiverged, match=r"diverged at step 5 \(epoch 2\): loss term 'logits' is nan"
    ) as error:
        t.run()
    assert f"after step 3, is in {state}" in str(error.value) and "\n" not in str(error.value)
    again = trainer("hgd", samples, target, state=state)
    assert again.step == 3 and torch.isfinite(weights(again)).all()


def test_checkpoint_is_what_the_defense_reads(samples, target, tmp_path):
    t = trainer("alignment", samples, target, changes={"epochs": 1})
    t.run()
    path = tmp_path / "w.safetensors"
    t.write(path, meta={"scores": {"clean": 0.5}})
    defense = DEFENSES.create("alignment", {"weights": str(path)})
    assert (
        defense.meta["key"] == "k" and defense.meta["scores"] == {"clean": 0.5} and defense.meta["steps"] == 3
    )
    images = torch.stack([s.image for s in samples[:2]])
    with torch.no_grad():
        assert torch.allclose(defense(images), t._purify(images), atol=5e-3)
    assert path.stat().st_size < 2 * sum(p.numel() for p in t.network.parameters()) + 20_000


def test_learning_rates():
    cafd = recipe("cafd")
    rates = [cafd.learning_rate(e) for e in (0, 39, 40, 50, 60, 69)]
    assert rates == pytest.approx([1e-3, 1e-3, 3e-4, 9e-5, 2.7e-5, 2.7e-5])
    decayed = recipe("alignment").but(epochs=10, linear_decay=4)
    assert [decayed.learning_rate(e) / 2e-4 for e in (0, 6, 8)] == pytest.approx([1, 1, 0.5])


def test_key_is_the_content():
    r = recipe("cafd")
    key = r.key({"m": 1}, "data", "adversary")
    assert key == recipe("cafd").key({"m": 1}, "data", "adversary") and len(key) == 64
    others = [
        r.but(seed=1).key({"m": 1}, "data", "adversary"),
        r.but(objective_args={"caf": 100.0}).key({"m": 1}, "data", "adversary"),
        r.key({"m": 2}, "data", "adversary"),
        r.key({"m": 1}, "more", "adversary"),
        r.key({"m": 1}, "data", "other"),
    ]
    assert len({key, *others}) == 6
    # The attacks are named by the adversary, which knows their defaults.
    assert r.but(attacks=()).key({"m": 1}, "data", "adversary") == key


def test_static_adversary_attacks_once_and_online_anew(samples, target):
    batch = Batch.of(samples[:4])
    static, online = pgd(target, static=True), pgd(target)
    with pytest.raises(DataError, match="training image 0 was not there"):
        static(batch, 1)
    static.prepare([Batch.of(samples[:6])], None, "k")
    first = static(batch, 1)
    assert torch.equal(static(batch, 2), first) and (first - batch.images).abs().max() <= 8 / 255 + 1e-6
    assert not torch.equal(online(batch, 1), online(batch, 2))
    assert torch.equal(online(batch, 1), online(batch, 1))
    mixed = Batch.of([samples[5], samples[1]])
    assert torch.equal(static(mixed, 3)[1], first[1])
    assert static.identity() != online.identity()


def test_several_attacks_share_the_images_by_weight(target):
    images = torch.rand(200, 3, 4, 4) * 0.5 + 0.25
    batch = Batch(images, tuple([0] * 200), tuple(map(str, range(200))))
    none, noise = ATTACKS.create("none"), ATTACKS.create("noise")
    out = AttackAdversary([(none, 1.0), (noise, 3.0)], target)(batch, 0)
    changed = (out != images).flatten(1).any(1)
    assert 0.65 < float(changed.float().mean()) < 0.85


def test_bad_adversaries(target, samples):
    with pytest.raises(PluginError, match="at least one attack"):
        AttackAdversary([], target)
    made = Precomputed({s.id: s.image for s in samples[:3]}, "digest")
    assert torch.equal(made(Batch.of(samples[:3]), 0), Batch.of(samples[:3]).images)
    with pytest.raises(DataError, match="image 3"):
        made(Batch.of(samples[:4]), 0)


def test_bad_recipes(samples, target):
    with pytest.raises(PluginError, match="unknown recipe 'cafdd': did you mean 'cafd'"):
        recipe("cafdd")
    with pytest.raises(PluginError, match="unknown value 'epoch': did you mean 'epochs'"):
        recipe("cafd").but(epoch=3)
    with pytest.raises(PluginError, match="its loss needs a target model"):
        Trainer(small("hgd"), samples, pgd(target), None, key="k")
    with pytest.raises(PluginError, match="needs a discriminator"):
        Trainer(small("cafd").but(critic=None), samples, pgd(target), target, key="k")
    with pytest.raises(PluginError, match="training objective 'hgd': guide: 'logit' is not one of"):
        objective("hgd", {"guide": "logit"})
    with pytest.raises(DataError, match="no training images"):
        Trainer(small("hgd"), [], pgd(target), target, key="k")


def test_a_target_without_a_final_linear_layer_is_refused(samples):
    headless = LogitsClassifier(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 4)
    with pytest.raises(WeightsError, match="ends in a linear layer with one output per class"):
        Trainer(small("cafd"), samples, pgd(headless), headless, key="k")


def test_labels_missing_for_a_recipe_that_needs_them(samples, target):
    boxes = [Sample(s.image, {"boxes": []}, s.id) for s in samples]
    t = Trainer(small("alignment"), boxes, Poison(-1), target, key="k")
    with pytest.raises(
        WeightsError, match="needs a class label per image, per pixel or per box; targets are dict"
    ):
        t.run()


def test_label_planes():
    planes = label_planes([1, 0], 3, (2, 2), torch.device("cpu"))
    assert planes.sum((2, 3)).tolist() == [[0, 4, 0], [4, 0, 0]]
    maps = label_planes([torch.tensor([[0, 2], [255, 1]])], 3, (2, 2), torch.device("cpu"))
    assert maps[0].tolist() == [[[1, 0], [0, 0]], [[0, 0], [0, 1]], [[0, 1], [0, 0]]]


def hand_step(target, network) -> Step:
    generator = torch.Generator().manual_seed(2)
    clean, adversarial = torch.rand(2, 4, 3, 8, 8, generator=generator)
    return Step(clean, adversarial, [0, 1, 2, 3], network, lambda x: 2 * x - 1, Guide(target))


def test_objective_weights_by_hand(target):
    """Terms of whole objectives, assembled once more from the plain formulas."""

    def half(x):
        return x * 0.5

    step = hand_step(target, half)
    x, a = step.clean, step.adversarial
    logits = target.logits
    with torch.no_grad():
        lgd = objective("hgd", {}).generator(step)
        assert float(lgd["logits"]) == pytest.approx(float((logits(a / 2) - logits(x)).abs().mean()))
        fgd = objective("hgd", {"guide": "features", "layer": "conv"}).generator(step)
        maps = target.features(a / 2, "conv"), target.features(x, "conv")
        assert float(fgd["features"]) == pytest.approx(float((maps[0] - maps[1]).abs().mean()))
        cgd = objective("hgd", {"guide": "labels"}).generator(step)
        expected = F.cross_entropy(logits(a / 2), torch.arange(4))
        assert float(cgd["labels"]) == pytest.approx(float(expected))
        caf = objective("cafd", {"gan": 0.0}).generator(step)
        large = [F.interpolate(m, size=32, mode="bilinear") for m in maps]
        assert float(caf["caf"]) == pytest.approx(
            1e3 * float((large[0] - large[1]).square().mean()), rel=1e-5
        )
        rows = (
            target.network.fc.weight[logits(a / 2).argmax(1)] - target.network.fc.weight[logits(x).argmax(1)]
        )
        assert float(caf["rows"]) == pytest.approx(1e-3 * float(rows.square().mean()), rel=1e-5)
        nrp = objective("nrp", {"layer": "conv", "gan": 0.0}).generator(step)
        assert float(nrp["features"]) == pytest.approx(float((maps[0] - maps[1]).abs().mean()))
        norm = (a / 2 - x).flatten(1).norm(dim=1).mean()
        assert float(nrp["image"]) == pytest.approx(1e-2 * float(norm), rel=1e-5)


class Judge(nn.Module):
    """A discriminator whose logit is the mean of the image."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3))[:, None]


def test_ape_gan_weights_by_hand(target):
    step = hand_step(target, lambda x: x * 0.5)
    step.critic = Judge()
    inner = [2 * step.adversarial / 2 - 1, 2 * step.clean - 1]
    square = float((inner[0] - inner[1]).square().mean())
    bce = float(F.softplus(-inner[0].mean((1, 2, 3))).mean())
    official = objective("apegan", {}).generator(step)
    assert float(official["image"]) == pytest.approx(0.9 * square**0.5, rel=1e-5)
    assert float(official["gan"]) == pytest.approx(0.02 * bce, rel=1e-5)
    paper = objective("apegan", {"weights": "paper"}).generator(step)
    assert float(paper["image"]) == pytest.approx(0.7 * square, rel=1e-5)
    assert float(paper["gan"]) == pytest.approx(0.3 * bce, rel=1e-5)


class Scales(nn.Module):
    """Two scales, five layers each, all the image's mean."""

    def forward(self, x: Tensor):
        mean = x[:, :3].mean((1, 2, 3))
        return [[mean] * 5, [mean] * 5]


@pytest.mark.parametrize("pairs", ["new", "traditional"])
def test_alignment_weights_by_hand(pairs, target):
    step = hand_step(target, lambda x: x * 0.5)
    step.critic = Scales()
    full = {"pairs": pairs, "conditioned": False, "perceptual": {"conv": 0.25}}
    with torch.no_grad():
        terms = objective("alignment", full).generator(step)
        x, a = step.clean, step.adversarial
        c, r = x / 2, a / 2  # what comes out of the network

        def gap(p, q):
            return float((p - q).abs().mean())

        partner = c if pairs == "new" else x
        # Pixels in [-1,1]: twice the distance in [0,1].
        assert float(terms["reconstruction"]) == pytest.approx(
            50 * 2 * (gap(c, x) + gap(r, partner)), rel=1e-5
        )
        maps = {name: target.features(i, "conv") for name, i in (("x", x), ("c", c), ("r", r))}
        wanted = maps["c"] if pairs == "new" else maps["x"]
        expected = 10 * 0.25 * (gap(maps["c"], maps["x"]) + gap(maps["r"], wanted))
        assert float(terms["perceptual"]) == pytest.approx(expected, rel=1e-5)
        means = {name: (2 * i - 1).mean((1, 2, 3)) for name, i in (("x", x), ("c", c), ("r", r))}
        fakes = ["r"] if pairs == "new" else ["c", "r"]
        real = means["c"] if pairs == "new" else means["x"]
        gan = sum(2 * float((means[f] - 1).square().mean()) for f in fakes)
        assert float(terms["gan"]) == pytest.approx(gan, rel=1e-5)
        # 10 * 4 / 4 / 2 for each of four layers in two scales.
        matching = sum(40 * gap(means[f], real) for f in fakes)
        assert float(terms["matching"]) == pytest.approx(matching, rel=1e-4)
        z = {name: target.logits(i) for name, i in (("x", x), ("c", c), ("r", r))}
        assert float(terms["features"]) == pytest.approx(
            4 * (gap(z["c"], z["x"]) + gap(z["r"], z["x"])), rel=1e-5
        )
        labels = torch.arange(4)
        task = F.cross_entropy(z["c"], labels) + F.cross_entropy(z["r"], labels)
        assert float(terms["task"]) == pytest.approx(2 * float(task), rel=1e-5)
        # One image a class: centres are the images, none differ from their own.
        align = 0.1 * sum(gap(z["x"][k], z["r"][k]) for k in range(4))
        assert float(terms["align"]) == pytest.approx(align, rel=1e-5)
        assert float(terms["intra"]) == 0
        far = sum(max(0.0, 5 - gap(z["r"][k], z["r"][i])) for k in range(4) for i in range(4) if i != k)
        assert float(terms["inter"]) == pytest.approx(0.005 * far, rel=1e-5)
        judged = objective("alignment", full).critic(step, objective("alignment", full).fakes(step))
        fake = sum(2 * float(means[f].square().mean()) for f in fakes)
        assert float(judged["critic"]) == pytest.approx(
            0.5 * (2 * float((real - 1).square().mean()) + fake), rel=1e-5
        )


def test_history_is_written(samples, target, tmp_path):
    t = trainer("hgd", samples, target, changes={"epochs": 2})
    seen = []
    curve = []
    history = t.run(
        lambda done, total, note: seen.append((done, total, note)),
        scalars=lambda done, terms: curve.append((done, dict(terms))),
    )
    assert [done for done, _ in curve] == list(range(1, 7))
    assert history.epochs[0]["logits"] == pytest.approx(sum(terms["logits"] for _, terms in curve[:3]) / 3)
    assert [s[0] for s in seen] == list(range(1, 7)) and seen[-1][1] == 6 and "logits" in seen[-1][2]
    write_history(history, tmp_path / "h.jsonl")
    assert len((tmp_path / "h.jsonl").read_text().splitlines()) == 2
    plot(history, tmp_path / "h.png")
    assert (tmp_path / "h.png").read_bytes()[:4] == b"\x89PNG"


def test_half_precision_forward_passes(samples, target):
    t = trainer("cafd", samples, target, precision="bfloat16", changes={"epochs": 1})
    exact = trainer("cafd", samples, target, changes={"epochs": 1})
    one, two = t.run().epochs[0], exact.run().epochs[0]
    assert all(p.dtype == torch.float32 for p in t.network.parameters())
    assert one["critic"] == pytest.approx(two["critic"], rel=0.1) and one != two


def test_clean_share_and_flips(samples, target):
    t = trainer("hgd", samples, target, changes={"clean_share": 0.5, "flip": True})
    batch = t._batch(0, 0)
    attacked = batch.images + 1
    mixed = t._mix(batch, attacked)
    assert torch.equal(mixed[:2], batch.images[:2]) and torch.equal(mixed[2:], attacked[2:])
    clean, adversarial, _ = t._flip(batch, attacked)
    assert torch.allclose(adversarial - clean, torch.ones_like(clean))
    turned = [not torch.equal(a, b) for a, b in zip(clean, batch.images, strict=True)]
    assert all(torch.equal(a, b.flip(2)) for a, b, t in zip(clean, batch.images, turned, strict=True) if t)
    many = [
        t._flip(Batch(batch.images, batch.targets, tuple(f"{k}{i}" for i in range(4))), attacked)[0]
        for k in range(9)
    ]
    assert any(not torch.equal(m, batch.images) for m in many)


def test_clamped_losses_see_what_the_target_will(samples, target):
    """What leaves [0,1] is clamped where a recipe says so, and its gradient passes; other keys stay."""
    images = torch.stack([sample.image for sample in samples[:2]])
    for clamp in (False, True):
        t = trainer("hgd", samples, target, changes={"clamp": clamp})
        with torch.no_grad():
            t.network.last.weight.mul_(1e4)
        purified = t._purify(images)
        assert bool((purified.amin() < 0) & (purified.amax() > 1)) != clamp
        (grad,) = torch.autograd.grad(purified.sum(), t.network.last.weight)
        assert grad.abs().amax() > 0
        assert ("clamp" in t.recipe.payload(None, None, None)["recipe"]) == clamp
