"""Training of the generative defenses: their losses by hand, averages of weights, batches without adversary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.errors import PluginError
from bench.protocols import Sample
from bench.registry import DEFENSES
from bench.rng import ImageRNG
from bench.weights import load_state
from defenses.networks.diffusion import DDPMUNet, diffused
from defenses.networks.wgan import WGANGenerator
from defenses.training.generative import gradient_penalty
from defenses.training.loop import Trainer
from defenses.training.objectives import Step, objective
from defenses.training.recipe import recipe

SMALL = {
    "defense_gan": {"network_args": {"size": (16, 16), "width": 4, "latent": 6}, "critic_args": {"width": 4}},
    "diffpure": {
        "network_args": {"width": 4, "multipliers": (1, 2), "blocks": 1}, "objective_args": {"ema": 0.75},
        "flip": False,
    },
}  # fmt: skip


def trainer(name: str, samples, **kwargs) -> Trainer:
    small = recipe(name).but(**{**SMALL[name], "epochs": 3, "batch": 4, **kwargs.pop("changes", {})})
    return Trainer(small, samples, None, None, key="k", **kwargs)


def step_of(network: nn.Module | None, critic: nn.Module | None = None) -> Step:
    clean = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return Step(
        clean,
        clean * 0.5,
        [0] * 4,
        lambda x: x * 0.5,
        lambda x: 2 * x - 1,
        None,
        critic,
        seed=7,
        network=network,
    )


class Linear(nn.Module):
    """a times the sum of the image."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x.flatten(1).sum(1, keepdim=True)


class Square(nn.Module):
    """Half the squared length of the image: its gradient is the image."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).square().sum(1, keepdim=True) / 2


# -- WGAN-GP --------------------------------------------------------------------------------------------------------
def test_gradient_penalty_by_hand():
    real, fake = torch.rand(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    share = torch.tensor([0.0, 0.25, 1.0]).view(3, 1, 1, 1)
    # The gradient of a linear critic has length |a| sqrt(48) everywhere, and the penalty has one in a.
    critic = Linear(0.5)
    value = gradient_penalty(critic, real, fake, share)
    length = 0.5 * 48**0.5
    assert float(value.detach()) == pytest.approx((length - 1) ** 2, rel=1e-5)
    value.backward()
    assert float(critic.a.grad) == pytest.approx(2 * (length - 1) * 48**0.5, rel=1e-4)
    between = [real[0], 0.75 * real[1] + 0.25 * fake[1], fake[2]]
    expected = sum((float(x.norm()) - 1) ** 2 for x in between) / 3
    assert float(gradient_penalty(Square(), real, fake, share).detach()) == pytest.approx(expected, rel=1e-5)


def test_wgan_terms_by_hand():
    torch.manual_seed(0)
    network, critic = WGANGenerator((16, 16), 4, 6), Linear(0.1)
    goal, step = objective("wgan_gp", {"penalty": 3.0}), step_of(network, critic)
    (fake,) = goal.fakes(step)
    assert fake.shape == (4, 3, 16, 16) and fake.abs().max() <= 1
    terms = goal.critic(step, [fake.detach()])
    sums = [0.1 * float(x.flatten(1).sum(1).mean()) for x in (fake.detach(), 2 * step.clean - 1)]
    assert float(terms["critic"]) == pytest.approx(sums[0] - sums[1], rel=1e-4)
    assert float(terms["penalty"]) == pytest.approx(3 * (0.1 * 768**0.5 - 1) ** 2, rel=1e-4)
    own = goal.generator(step)["gan"]
    own.backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    # Critic and generator see different latent vectors, the same ones in every run.
    assert float(own.detach()) != pytest.approx(-sums[0], rel=1e-6)
    assert torch.equal(goal.fakes(step)[0], fake)
    step.seed = 8
    assert not torch.equal(goal.fakes(step)[0], fake)


def test_the_generator_moves_on_every_fifth_batch(samples):
    t = trainer("defense_gan", samples, changes={"epochs": 4})
    moved, before = [], torch.zeros(())

    def look(done, terms):
        nonlocal before
        now = torch.cat([p.detach().flatten() for p in t.network.parameters()])
        moved.append(not torch.equal(now, before))
        assert ("gan" in terms) == moved[-1] and {"critic", "penalty"} <= set(terms)
        before = now

    history = t.run(scalars=look)
    assert moved == [i % 5 == 0 for i in range(12)]
    # An epoch's mean is over the batches that had the term.
    assert ["gan" in epoch for epoch in history.epochs] == [True, True, False, True]


def test_generator_of_another_size_is_refused(samples):
    t = trainer("defense_gan", samples, changes={"network_args": {"size": (24, 24), "width": 4}})
    with pytest.raises(PluginError, match=r"makes images of \(24, 24\), training images are \(16, 16\)"):
        t.run()


def test_images_are_scaled_to_the_generator(samples):
    """As the defense scales them; the critic then judges images of the generator's size."""
    small = {"network_args": {"size": (8, 12), "width": 4, "latent": 6}, "objective_args": {"resize": True}}
    t = trainer("defense_gan", samples, changes={**small, "epochs": 1})
    assert t.critic is not None and t.critic(torch.zeros(1, 3, 8, 12)).shape == (1, 1)
    step = step_of(t.network, Linear(0.1))
    (fake,) = t.objective.fakes(step)
    assert fake.shape == (4, 3, 8, 12)
    seen = F.interpolate(step.clean, (8, 12), mode="bilinear", align_corners=False, antialias=True)
    sums = [0.1 * float(x.flatten(1).sum(1).mean()) for x in (fake.detach(), 2 * seen - 1)]
    critic = t.objective.critic(step, [fake.detach()])["critic"]
    assert float(critic.detach()) == pytest.approx(sums[0] - sums[1], rel=1e-4)
    assert {"critic", "penalty", "gan"} <= set(t.run().epochs[0])


# -- DISCO ----------------------------------------------------------------------------------------------------------
def test_disco_loss_by_hand():
    step = step_of(None)
    terms = objective("disco", {}).generator(step)
    assert float(terms["pixels"]) == pytest.approx(2 * float((step.clean * 0.75).mean()), rel=1e-5)
    with pytest.raises(PluginError, match="needs adversarial images"):
        Trainer(recipe("disco"), [Sample(torch.rand(3, 8, 8), 0, "0")], None, None, key="k")


# -- diffusion ------------------------------------------------------------------------------------------------------
class Spy(DDPMUNet):
    """Predicts zero and remembers what it was asked."""

    def forward(self, images: Tensor, steps: Tensor) -> Tensor:
        self.seen = images, steps
        return images * 0


def test_diffusion_loss_by_hand():
    goal, network = objective("ddpm", {}), Spy(4, (1,), 1)
    assert goal.average == 0.9999
    step = step_of(network)
    loss = goal.generator(step)["noise"]
    x, when = network.seen
    assert when.shape == (4,) and len(set(when.tolist())) > 1 and 0 <= when.min() and when.max() < 1000
    bar = network.alpha_bar[when].float().view(-1, 1, 1, 1)
    noise = (x - bar.sqrt() * (2 * step.clean - 1)) / (1 - bar).sqrt()
    # What was added is standard normal noise, and a prediction of zero has its mean square as loss.
    assert float(noise.mean()) == pytest.approx(0, abs=0.06) and float(noise.std()) == pytest.approx(
        1, abs=0.06
    )
    assert float(loss) == pytest.approx(float(noise.square().mean()), rel=1e-3)
    assert torch.allclose(diffused(2 * step.clean - 1, bar, noise), x, atol=1e-5)


def test_only_the_part_that_is_run_is_trained():
    seen = []
    for seed in range(30):
        network = Spy(4, (1,), 1, until=0.1)
        step = step_of(network)
        step.seed = seed
        objective("ddpm", {}).generator(step)
        seen += network.seen[1].tolist()
    assert max(seen) < 100 and max(seen) > 80 and min(seen) < 20


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_the_average_of_the_weights_is_kept_resumed_and_written(samples, tmp_path):
    t, path = trainer("diffpure", samples), []
    t.run(scalars=lambda done, terms: path.append(weights(t.network).clone()))
    expected = path[0]
    for now in path[1:]:
        expected = 0.75 * expected + 0.25 * now
    assert len(path) == 9 and torch.allclose(weights(t.average.module), expected, atol=1e-6)
    assert not torch.allclose(weights(t.network), expected, atol=1e-5)
    state = tmp_path / "state.safetensors"
    trainer("diffpure", samples, state=state).run(until=4)
    again = trainer("diffpure", samples, state=state)
    again.run()
    assert torch.equal(weights(again.average.module), weights(t.average.module))
    again.write(tmp_path / "w.safetensors", half=False)
    written = load_state(tmp_path / "w.safetensors").state
    assert set(written) == set(t.network.state_dict())
    assert all(torch.equal(v, written[k]) for k, v in t.average.module.state_dict().items())


@pytest.mark.parametrize("name", list(SMALL))
def test_trained_checkpoints_are_what_the_defenses_read(name, samples, tmp_path):
    t = trainer(name, samples, changes={"epochs": 1})
    t.run()
    t.write(tmp_path / "w.safetensors")
    params = {"L": 1} if name == "defense_gan" else {"steps": 2}
    defense = DEFENSES.create(name, {"weights": str(tmp_path / "w.safetensors"), **params})
    assert defense.space == "symmetric" and defense.meta["key"] == "k"
    images = torch.stack([s.image for s in samples[:2]])
    assert defense.purify(images, ImageRNG([1, 2])).images.shape == images.shape


def test_diffusion_learns(samples):
    flat = [Sample(torch.full((3, 16, 16), 0.5), 0, s.id) for s in samples]
    t = trainer(
        "diffpure",
        flat,
        changes={
            "epochs": 10,
            "lr": 2e-2,
            "network_args": {**SMALL["diffpure"]["network_args"], "dropout": 0.0},
        },
    )
    history = t.run()
    assert history.epochs[-1]["noise"] < 0.6 * history.epochs[0]["noise"]


@pytest.mark.parametrize(
    ("name", "network"), [("wgan_gp", DDPMUNet(4, (1,), 1)), ("ddpm", WGANGenerator((16, 16), 4))]
)
def test_objectives_refuse_networks_they_cannot_train(name, network):
    with pytest.raises(PluginError, match=f"objective '{name}' trains network"):
        objective(name, {}).generator(step_of(network, Linear(1.0)))


def test_wrong_arguments():
    with pytest.raises(PluginError, match="critic_steps must be at least 1"):
        objective("wgan_gp", {"critic_steps": 0})
    with pytest.raises(PluginError, match=r"ema must be in \[0, 1\)"):
        objective("ddpm", {"ema": 1.0})
