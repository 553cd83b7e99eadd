"""Defense-GAN, DISCO and DiffPure: what they compute, what they draw, which gradients they have, what they refuse."""

from __future__ import annotations

import builtins
import math

import pytest
import torch
from torch.nn import functional as F

from bench.chain import Chain, bpda
from bench.errors import NotApplicable, PluginError, WeightsError
from bench.registry import DEFENSES
from bench.rng import ImageRNG
from bench.weights import save_safetensors
from defenses.networks.build import purifier
from defenses.networks.diffusion import alpha_bars, diffused
from defenses.networks.disco import DISCONet, local_coordinates
from defenses.networks.wgan import WGANCritic, WGANGenerator

NETWORKS = {
    "defense_gan": ("wgan", {"size": [24, 24], "width": 4, "latent": 6}),
    "disco": ("disco", {"width": 8, "blocks": 1, "hidden": 12, "layers": 2}),
    "diffpure": ("ddpm", {"width": 8, "multipliers": [1, 2], "blocks": 1}),
}
CASES = {
    "defense_gan": ("defense_gan", {"R": 2, "L": 3, "resize": True}),
    "disco": ("disco", {}),
    "disco-cascade": ("disco", {"K": 2}),
    "diffpure": ("diffpure", {"t_star": 0.05, "steps": 3}),
    "diffpure-ddim": ("diffpure", {"t_star": 0.05, "sampler": "ddim", "steps": 3}),
    "diffpure-clip": ("diffpure", {"steps": 2, "clip_denoised": True, "surrogate_steps": 1}),
}


def filled(name: str):
    """A network whose every weight does something; DDPM's starts with some at zero."""
    torch.manual_seed(3)
    network = purifier(*NETWORKS[name])
    for parameter in network.parameters():
        if not parameter.any() or parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return network


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for name, (network, args) in NETWORKS.items():
        meta = {"network": {"name": network, "args": args}, "space": "symmetric"}
        save_safetensors(folder / f"{name}.safetensors", filled(name).state_dict(), meta=meta)
    return {name: str(folder / f"{name}.safetensors") for name in NETWORKS}


@pytest.fixture(params=list(CASES))
def defense(request, files):
    name, params = CASES[request.param]
    return DEFENSES.create(name, {"weights": files[name], **params}).eval()


def purify(defense, images, rng):
    return defense.purify(images, rng if defense.stochastic else None).images


# -- what every defense promises ----------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(24, 24), (31, 45), (5, 9)])
def test_shape_range_dtype_and_the_same_for_the_same_seed(defense, size, photos, streams):
    images = photos(2, *size)
    before = images.clone()
    out = purify(defense, images, streams(2))
    assert out.shape == images.shape and out.dtype == torch.float32
    assert 0 <= out.min() and out.max() <= 1
    assert torch.equal(images, before)
    torch.manual_seed(9)  # the global generator has no say
    assert torch.equal(purify(defense, images, streams(2)), out)
    assert torch.equal(purify(defense, images, streams(2, "other")), out) != defense.stochastic


@pytest.mark.parametrize("size", [(24, 24), (15, 21)])
def test_company_does_not_matter(defense, size, photos, streams):
    images = photos(4, *size)
    whole = purify(defense, images, streams(4))
    for part in ([0], [1, 2], [3, 0]):
        assert torch.equal(purify(defense, images[part], streams(4).select(part)), whole[part])


def test_white_box_gradient_is_the_true_one_or_declared_absent(defense, photos, streams, true_gradient):
    images = photos(1, 24, 24)
    if not defense.differentiable:
        assert not purify(defense, images.requires_grad_(), streams(1)).requires_grad
        return
    true_gradient(defense, images)


def test_bpda_has_exact_values_and_the_gradient_of_the_surrogate(defense, photos, streams):
    images = photos(2, 24, 24).requires_grad_()
    out = bpda(defense, images, streams(2)).images
    assert torch.equal(out.detach(), purify(defense, images.detach(), streams(2)))
    (grad,) = torch.autograd.grad(out.sum(), images)
    if defense.params.get("surrogate_steps") is None:
        assert torch.equal(grad, torch.ones_like(grad))
    else:
        short = DEFENSES.create(defense.name, {**defense.params, "steps": 1, "surrogate_steps": None})
        (expected,) = torch.autograd.grad(short.purify(images, streams(2)).images.sum(), images)
        assert torch.equal(grad, expected) and not torch.equal(grad, torch.ones_like(grad))


@pytest.mark.parametrize("name", list(NETWORKS))
def test_without_weights_there_is_one_clear_line(name, photos, streams):
    defense = DEFENSES.create(name)
    assert not defense.ready and defense.trained
    for run in (lambda: purify(defense, photos(1, 24, 24), streams(1)), defense.identity):
        with pytest.raises(WeightsError, match=f"bench train --defense {name} ") as error:
            run()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_identity_names_the_weights_by_content(name, files):
    identity = DEFENSES.create(name, {"weights": files[name]}).identity()
    assert len(identity["weights"]) == 64 and "weights" not in identity["params"]


# -- Defense-GAN ----------------------------------------------------------------------------------------------------
def test_search_is_gradient_descent_with_momentum(files, photos):
    """Against torch.optim.SGD, with the learning rate lowered after 80 % of the steps."""
    defense = DEFENSES.create("defense_gan", {"weights": files["defense_gan"], "R": 1, "L": 10})
    image = photos(1, 24, 24)
    z = ImageRNG([5]).normal((1, 6))[0] / 6**0.5
    z.requires_grad_()
    optimizer = torch.optim.SGD([z], lr=10.0, momentum=0.7)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [8], 0.1)
    for _ in range(10):
        optimizer.zero_grad()
        F.mse_loss(defense.network(z), image * 2 - 1).backward()
        optimizer.step(), schedule.step()
    expected = (defense.network(z).detach() + 1) / 2
    assert torch.allclose(defense(image, ImageRNG([5])), expected, atol=1e-5)


def test_the_best_restart_is_taken_and_longer_searches_come_closer(files):
    def distance(**params):
        defense = DEFENSES.create("defense_gan", {"weights": files["defense_gan"], **params})
        target = defense.network(torch.linspace(-1, 1, 12).view(2, 6)).detach() / 2 + 0.5
        found = defense(target, ImageRNG([1, 2]))
        return (found - target).square().flatten(1).mean(1)

    short, long, one, many = distance(R=3, L=2), distance(R=3, L=60), distance(R=1, L=5), distance(R=6, L=5)
    assert (long < short).all() and (many <= one + 1e-7).all() and (many < one).any()


def test_the_result_is_an_image_of_the_generator(files, photos):
    """Two searches from the same restarts for two images share nothing but the generator's range."""
    defense = DEFENSES.create("defense_gan", {"weights": files["defense_gan"], "R": 1, "L": 1, "lr": 1e-12})
    out = defense(photos(1, 24, 24), ImageRNG([4]))
    start = ImageRNG([4]).normal((1, 6))[0] / 6**0.5
    assert torch.allclose(out, defense.network(start) / 2 + 0.5, atol=1e-6)


def test_other_sizes_are_not_applicable_unless_resized(files, photos, streams):
    defense = DEFENSES.create("defense_gan", {"weights": files["defense_gan"], "L": 1})
    with pytest.raises(NotApplicable, match="makes images of 24x24, not 31x45"):
        defense.check_input((31, 45))
    with pytest.raises(NotApplicable):
        defense.purify(photos(1, 31, 45), streams(1))
    assert defense.check_input((24, 24)) is None
    DEFENSES.create("defense_gan", {"weights": files["defense_gan"], "resize": True}).check_input((31, 45))


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 32), (20, 50)])
def test_generator_sizes(size):
    network = WGANGenerator(size, 4, 5)
    assert network(torch.randn(2, 5)).shape == (2, 3, *size) == (2, 3, *network.size)
    assert WGANCritic(4, size)(torch.rand(2, 3, *size)).shape == (2, 1)
    with pytest.raises(ValueError, match="8 or more"):
        WGANGenerator((4, 4))


def test_parameter_counts_at_paper_size():
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in purifier(name, {}).parameters())
            for name in ("wgan", "disco", "ddpm")
        }
    dense = 128 * 4096 + 4096
    filters = [(256, 128), (128, 64), (64, 64), (64, 3)]
    assert counts["wgan"] == dense + sum(a * b * 25 + b for a, b in filters)
    # EDSR-baseline without its tail, and a perceptron 580-256-256-256-256-3.
    encoder = 1_792 + 33 * 36_928
    assert counts["disco"] == encoder + 580 * 256 + 256 + 3 * (256 * 256 + 256) + 256 * 3 + 3
    assert counts["ddpm"] == 35_746_307  # 35.7 M in the paper


# -- DISCO ------------------------------------------------------------------------------------------------------------
def test_local_coordinates_by_hand():
    rows, columns, where = local_coordinates((2, 3), (4, 2))
    assert rows.tolist() == [0, 0, 1, 1] and columns.tolist() == [0, 2]
    # Rows: pixel centres at 1/4, 3/4, 5/4, 7/4 cells; columns: at 3/4 and 9/4.
    assert where[:, 0, 0].tolist() == [-0.5, 0.5, -0.5, 0.5] and where[0, :, 1].tolist() == [0.5, -0.5]
    assert where[2, 1, 2:].tolist() == [1.0, 3.0]
    rows, columns, where = local_coordinates((3, 5), (3, 5))
    assert rows.tolist() == [0, 1, 2] and columns.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(where, torch.tensor([0.0, 0.0, 2.0, 2.0]).expand(3, 5, 4))


@pytest.mark.parametrize("size", [(6, 7), (9, 4)])
def test_disco_is_a_perceptron_on_unfolded_features(size):
    """The formulation of the paper: 3x3 features, relative position and cell size side by side, pixel by pixel."""
    torch.manual_seed(0)
    network = DISCONet(4, 1, 6, 2)
    images = torch.rand(2, 3, 6, 7)
    with torch.no_grad():
        features = network.head(images)
        features = F.unfold(network.body(features) + features, 3, padding=1).unflatten(2, (6, 7))
        rows, columns, where = local_coordinates((6, 7), size)
        near = features[:, :, rows][:, :, :, columns].permute(0, 2, 3, 1)
        inputs = torch.cat([near, where.expand(2, *size, 4)], -1)
        weight = torch.cat([network.local.weight.flatten(1), network.place.weight], 1)
        hidden = F.linear(inputs, weight, network.local.bias)
        expected = network.tail(hidden.permute(0, 3, 1, 2))
        assert torch.allclose(network(images, size), expected, atol=1e-6)
        if size == (6, 7):
            assert torch.equal(network(images), network(images, size))


def test_blending_of_four_neighbours_does_nothing_at_the_same_size():
    """LIIF's query, written out: the cells at the corners of a box of one cell, each weighted by the opposite area.

    In the last row and column its clamp makes all areas zero and so all weights equal; there it differs.
    """
    torch.manual_seed(0)
    network = DISCONet(4, 1, 6, 2)
    images, size = torch.rand(1, 3, 4, 5), (4, 5)
    centres = [-1 + (2 * torch.arange(n) + 1) / n for n in size]
    with torch.no_grad():
        features = network.head(images)
        features = network.local(network.body(features) + features)
        predictions, areas = [], []
        for shift in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
            cells, offsets = [], []
            for n, centre, side in zip(size, centres, shift, strict=True):
                corner = (centre + side / n + 1e-6).clamp(-1 + 1e-6, 1 - 1e-6)
                cells.append(((corner + 1) / 2 * n).long())
                offsets.append((centre - centre[cells[-1]]) * n)
            position = torch.stack(torch.meshgrid(*offsets, indexing="ij"), -1)
            where = torch.cat([position, torch.full((*size, 2), 2.0)], -1)
            near = features[:, :, cells[0]][:, :, :, cells[1]]
            predictions.append(network.tail(near + network.place(where).permute(2, 0, 1)))
            areas.append(position.prod(-1).abs() + 1e-9)
        blended = sum(p * a for p, a in zip(predictions, areas[::-1], strict=True)) / sum(areas)
        assert len({tuple(p.flatten().tolist()) for p in predictions}) == 4
        assert torch.allclose(network(images)[..., :-1, :-1], blended[..., :-1, :-1], atol=1e-5)


def test_disco_sees_nothing_beyond_its_neighbourhood():
    torch.manual_seed(0)
    network = DISCONet(4, 1, 6, 2)
    images = torch.rand(1, 3, 21, 21, requires_grad=True)
    (grad,) = torch.autograd.grad(network(images)[0, :, 10, 10].sum(), images)
    seen = grad.abs().sum((0, 1)).nonzero()
    # Five 3x3 convolutions: head, two in the block, one behind it, and the features around the pixel.
    assert seen.min() == 10 - 5 and seen.max() == 10 + 5


def test_cascade_is_a_chain_of_the_same(files, photos):
    images = photos(2, 16, 16)
    one, two = (DEFENSES.create("disco", {"weights": files["disco"], "K": k}) for k in (1, 2))
    assert torch.equal(two.purify(images).images, Chain([one, one]).purify(images).images)
    assert not torch.equal(two.purify(images).images, one.purify(images).images)


# -- DiffPure ---------------------------------------------------------------------------------------------------------
def test_noise_schedules_by_hand():
    assert alpha_bars(2, "linear", 0.1, 0.3).tolist() == pytest.approx([0.9, 0.63])
    assert alpha_bars(2, "scaled_linear", 0.01, 0.25).tolist() == pytest.approx([0.99, 0.99 * 0.75])
    ddpm = alpha_bars()
    assert len(ddpm) == 1000 and float(ddpm[0]) == pytest.approx(1 - 1e-4)
    assert float(ddpm[-1]) == pytest.approx(4.04e-5, rel=1e-2)
    angles = [(part / 4 + 0.008) / 1.008 * math.pi / 2 for part in range(4)]
    expected = [(math.cos(angle) / math.cos(angles[0])) ** 2 for angle in angles[1:]]
    assert alpha_bars(4, "squaredcos_cap_v2")[:3].tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="schedule 'cosine' is not one of"):
        alpha_bars(4, "cosine")


def test_forward_marginals_are_those_of_single_steps():
    """q(x_t | x_0) of equation 4 against t steps of q(x_t | x_t-1) = N(sqrt(1 - beta) x, beta), equation 2."""
    bars = alpha_bars(5, "linear", 0.1, 0.5)
    mean, variance = 1.0, 0.0
    for beta in (0.1, 0.2, 0.3, 0.4, 0.5):
        mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
    one = torch.ones(1, 3, 2, 2)
    assert torch.allclose(diffused(one, bars[4].float(), 0 * one), one * mean)
    assert torch.allclose(diffused(0 * one, bars[4].float(), one), one * variance**0.5)
    several = diffused(one.expand(2, -1, -1, -1), bars[[0, 4]].float(), torch.zeros(2, 3, 2, 2))
    assert several[:, 0, 0, 0].tolist() == pytest.approx([0.9**0.5, mean])


def test_timesteps(files):
    def times(**params):
        defense = DEFENSES.create("diffpure", {"weights": files["diffpure"], **params})
        return defense.timesteps(defense.steps)

    assert times() == list(range(99, -1, -1))
    assert times(t_star=0.2, steps=5) == [199, 159, 119, 79, 39]
    assert times(t_star=0.003, steps=2) == [2, 0] and times(steps=1) == [99]
    with pytest.raises(
        PluginError, match=r"101 reverse steps asked for, but t_star = 0\.1 is timestep 100 of 1000"
    ):
        times(steps=101)
    with pytest.raises(PluginError, match="t_star"):
        times(t_star=0.0)


class Known(torch.nn.Module):
    """A predictor that knows the clean image, and so the noise."""

    def __init__(self, image):
        super().__init__()
        self.image, self.known, self.alpha_bar = image, 1000, alpha_bars()

    def forward(self, x, when):
        bar = self.alpha_bar[when].float().view(-1, 1, 1, 1)
        return (x - bar.sqrt() * self.image) / (1 - bar).sqrt()


@pytest.mark.parametrize(
    "params", [{}, {"steps": 3}, {"sampler": "ddim"}, {"clip_denoised": True, "t_star": 1.0, "steps": 9}]
)
def test_a_perfect_predictor_gives_the_clean_image_back(params, photos, streams):
    defense = DEFENSES.create("diffpure", params)
    clean = photos(1, 8, 8)
    defense.network = Known(clean * 2 - 1)
    assert torch.allclose(defense(clean, streams(1)), clean, atol=1e-4)


def test_reverse_steps_are_the_posterior_of_ddpm(files):
    """Mean and variance of q(x_t-1 | x_t, x_0), equations 6 and 7 of Ho et al., with x_0 from the predicted noise."""
    defense = DEFENSES.create("diffpure", {"weights": files["diffpure"]}).double()
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 1, 3, 8, 8, generator=generator, dtype=torch.float64)
    bars = defense.network.alpha_bar
    now, before = bars[60], bars[59]
    alpha = now / before
    with torch.no_grad():
        noise = defense.network(x, torch.tensor([60]))
        clean = (x - (1 - now).sqrt() * noise) / now.sqrt()
        mean = before.sqrt() * (1 - alpha) / (1 - now) * clean + alpha.sqrt() * (1 - before) / (1 - now) * x
        variance = (1 - before) / (1 - now) * (1 - alpha)
        assert torch.allclose(
            defense._reverse(x, 60, float(before), z), mean + variance.sqrt() * z, atol=1e-12
        )
        ddim = before.sqrt() * clean + (1 - before).sqrt() * noise
        assert torch.allclose(defense._reverse(x, 60, float(before), None), ddim, atol=1e-12)


def test_gradients_are_not_kept_for_all_steps(files, photos, streams):
    """Checkpointing: what autograd saves does not grow by a network's activations per step."""
    images = photos(1, 16, 16).requires_grad_()

    def saved(steps: int) -> int:
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        defense = DEFENSES.create("diffpure", {"weights": files["diffpure"], "steps": steps})
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            defense.purify(images, streams(1))
        return total

    assert saved(10) - saved(5) < 5 * 20 * images.numel()


def test_a_t_star_beyond_the_training_is_refused(tmp_path):
    args = {**NETWORKS["diffpure"][1], "until": 0.15}
    path = tmp_path / "part.safetensors"
    save_safetensors(
        path, purifier("ddpm", args).state_dict(), meta={"network": {"name": "ddpm", "args": args}}
    )
    DEFENSES.create("diffpure", {"weights": str(path), "t_star": 0.15})
    with pytest.raises(
        PluginError, match=r"t_star 0\.2 is timestep 200 of 1000; the network was trained up to 150"
    ):
        DEFENSES.create("diffpure", {"weights": str(path), "t_star": 0.2})


def test_unet_of_any_size_uses_time_and_every_weight():
    network = filled("diffpure")
    x = torch.randn(2, 3, 13, 10, requires_grad=True)
    out = network.train()(x, torch.tensor([3, 400]))
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in network.named_parameters() if "bias" not in n)
    network.eval()
    with torch.no_grad():
        assert not torch.allclose(network(x, torch.tensor([3, 3])), network(x, torch.tensor([3, 400])))
        fresh = purifier(*NETWORKS["diffpure"])
        assert not fresh(x, torch.tensor([3, 400])).any()  # DDPM starts at zero


def test_diffusers_missing_is_one_line(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "diffusers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(WeightsError, match="diffusers, which is not installed: pip install"):
        DEFENSES.create("diffpure", {"weights": str(tmp_path)})


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("diffusers")
    scheduler = diffusers.DDPMScheduler(
        variance_type="fixed_small", clip_sample=False, beta_schedule="squaredcos_cap_v2"
    )
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder, unet, scheduler


def test_diffusers_folder_samples_as_diffusers_does(pipeline, photos, streams):
    folder, unet, scheduler = pipeline
    defense = DEFENSES.create("diffpure", {"weights": str(folder), "t_star": 0.01})
    images = photos(1, 16, 16)
    bars = alpha_bars(schedule="squaredcos_cap_v2")
    assert torch.allclose(scheduler.alphas_cumprod.double(), bars, atol=1e-6)
    scheduler.alphas_cumprod = bars  # near the image the difference to 1 has few digits in float32
    rng = streams(1)
    x = scheduler.add_noise(images * 2 - 1, rng.normal((3, 16, 16)), torch.tensor([9]))
    for t in range(9, -1, -1):
        with torch.no_grad():
            noise = unet.eval()(x, t).sample
        step = scheduler.step(noise, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
        theirs = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        own = rng.normal((3, 16, 16)) if t else theirs
        x = step + (scheduler._get_variance(t) ** 0.5 * (own - theirs) if t else 0)
    assert torch.allclose(defense(images, streams(1)), x / 2 + 0.5, atol=1e-4)
    assert purify(defense, photos(2, 9, 13), streams(2)).shape == (2, 3, 9, 13)
    alone = DEFENSES.create("diffpure", {"weights": str(folder / "unet")})
    assert torch.allclose(alone.network.alpha_bar, alpha_bars())
    assert alone.identity()["weights"] != defense.identity()["weights"]
    assert not any(p.requires_grad for p in defense.parameters())


def test_wrong_diffusers_folders(pipeline, tmp_path):
    with pytest.raises(WeightsError, match=r"config\.json cannot be read"):
        DEFENSES.create("diffpure", {"weights": str(tmp_path)})
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "in_channels": 4}')
    with pytest.raises(
        WeightsError, match="holds UNet2DConditionModel for 4 channels, expected a UNet2DModel for 3"
    ):
        DEFENSES.create("diffpure", {"weights": str(tmp_path)})
    with pytest.raises(PluginError, match="weights names a folder"):
        DEFENSES.create("diffpure", {"weights": str(pipeline[0]), "train_seed": 1})
