"""Noise schedules and noise predictors: the U-Net of DDPM (Ho et al., NeurIPS 2020), and checkpoints of `diffusers`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.errors import WeightsError
from defenses.networks.padding import padded

Schedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]


def alpha_bars(
    timesteps: int = 1000, schedule: str = "linear", beta_start: float = 1e-4, beta_end: float = 0.02
) -> Tensor:
    """Share of the signal's variance that is left after 1, 2, ... `timesteps` diffusion steps, (timesteps,) float64.

    What samplers need is its small difference to 1, hence the precision.

    Args:
        timesteps: number of steps.
        schedule: `linear` (DDPM), `scaled_linear` (linear in sqrt(beta)) or `squaredcos_cap_v2` (the cosine of Nichol
            and Dhariwal 2021); the names of `diffusers`.
        beta_start, beta_end: first and last beta of the linear ones.

    Raises:
        ValueError: no such schedule, or no steps.
    """
    if timesteps < 1:
        raise ValueError(f"timesteps must be at least 1, got {timesteps}")
    if schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float64).square()
    elif schedule == "squaredcos_cap_v2":
        edges = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        left = ((edges + 0.008) / 1.008 * math.pi / 2).cos().square()
        betas = (1 - left[1:] / left[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"schedule '{schedule}' is not one of linear, scaled_linear, squaredcos_cap_v2")
    return (1 - betas).cumprod(0)


def diffused(images: Tensor, alpha_bar: Tensor, noise: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) e with e ~ N(0, 1) (Ho et al. 2020, equation 4).

    Args:
        images: x_0, (B, 3, H, W) in [-1,1].
        alpha_bar: of each image, (B,), or of all, ().
        noise: e, of the shape of `images`.
    """
    alpha_bar = alpha_bar.reshape(-1, 1, 1, 1)
    return alpha_bar.sqrt() * images + (1 - alpha_bar).sqrt() * noise


class NoisePredictor(Protocol):
    """What a sampler asks of a network: the attributes of `DDPMUNet`, and the noise."""

    alpha_bar: Tensor
    known: int

    def __call__(self, images: Tensor, steps: Tensor) -> Tensor: ...


class DDPMUNet(nn.Module):
    """Predicts the noise in x_t: the unconditional U-Net of DDPM.

    Residual blocks (group norm, SiLU, 3x3 convolution, the time added, group norm, SiLU, dropout, 3x3 convolution) at
    each resolution, self-attention at some, strided convolutions down, nearest neighbours and a convolution up. With
    the defaults it is the CIFAR-10 network: 35,746,307 parameters. Sizes that are no multiple of its stride are padded
    and cropped back.

    Args:
        width: channels at the first resolution, a multiple of 4.
        multipliers: channels at each resolution, in widths.
        blocks: residual blocks at each resolution.
        attention: resolutions (counted from 0) with self-attention.
        dropout: in training.
        timesteps, schedule: noise schedule (`alpha_bars`).
        until: part of the process it is trained for, from the image on; less than 1 spends a small network on the part
            that a purifier runs.

    Attributes:
        alpha_bar: (timesteps,) on the CPU, see `alpha_bars`.
        known: number of timesteps it is trained for.
    """

    def __init__(
        self,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (1,),
        dropout: float = 0.1,
        timesteps: int = 1000,
        schedule: str = "linear",
        until: float = 1.0,
    ) -> None:
        super().__init__()
        if width < 4 or width % 4:
            raise ValueError(f"width must be a multiple of 4, got {width}")
        if not 0 < until <= 1:
            raise ValueError(f"until must be in (0, 1], got {until}")
        self.known = max(round(until * timesteps), 1)
        self.alpha_bar = alpha_bars(timesteps, schedule)
        self.width, self.stride = width, 2 ** (len(multipliers) - 1)
        time = 4 * width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.first = nn.Conv2d(3, width, 3, padding=1)

        def stage(inputs: int, outputs: int, level: int) -> nn.ModuleList:
            attend = _Attention(outputs) if level in attention else nn.Identity()
            return nn.ModuleList([_Residual(inputs, outputs, time, dropout), attend])

        channels, kept = width, [width]
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.down.append(stage(channels, width * multiplier, level))
                channels = width * multiplier
                kept.append(channels)
            if level < len(multipliers) - 1:
                self.down.append(nn.Conv2d(channels, channels, 3, 2, 1))
                kept.append(channels)
        self.middle = nn.ModuleList(
            [
                _Residual(channels, channels, time, dropout),
                _Attention(channels),
                _Residual(channels, channels, time, dropout),
            ]
        )
        self.up = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                self.up.append(stage(channels + kept.pop(), width * multiplier, level))
                channels = width * multiplier
            if level:
                self.up.append(nn.Conv2d(channels, channels, 3, padding=1))
        out = nn.Conv2d(channels, 3, 3, padding=1)
        _zero(out)
        self.last = nn.Sequential(_norm(channels), nn.SiLU(), out)

    def forward(self, images: Tensor, steps: Tensor) -> Tensor:
        """Noise (B, 3, H, W) in `images` (B, 3, H, W), [-1,1] plus the noise of `steps` (B,), counted from 0."""
        return padded(lambda x: self._predict(x, steps), images, self.stride)

    def _predict(self, x: Tensor, steps: Tensor) -> Tensor:
        time = self.time(_sinusoids(steps, self.width).to(x))
        x = self.first(x)
        kept = [x]
        for module in self.down:
            x = module[1](module[0](x, time)) if isinstance(module, nn.ModuleList) else module(x)
            kept.append(x)
        x = self.middle[2](self.middle[1](self.middle[0](x, time)), time)
        for module in self.up:
            if isinstance(module, nn.ModuleList):
                x = module[1](module[0](torch.cat([x, kept.pop()], 1), time))
            else:
                x = module(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        noise: Tensor = self.last(x)
        return noise


class DiffusersUNet(nn.Module):
    """A `UNet2DModel` of `diffusers` as a noise predictor of this project.

    Args:
        unet: the model; of six output channels (learned variances) the first three are used.
        alpha_bar: its noise schedule.
    """

    def __init__(self, unet: nn.Module, alpha_bar: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.alpha_bar = alpha_bar
        self.known = len(alpha_bar)
        config = cast("Mapping[str, Any]", unet.config)
        self.stride = 2 ** (len(config["block_out_channels"]) - 1)

    def forward(self, images: Tensor, steps: Tensor) -> Tensor:
        """As `DDPMUNet`."""
        return padded(lambda x: self.unet(x, steps).sample[:, :3], images, self.stride)


def load_diffusers(folder: Path) -> tuple[DiffusersUNet, list[Path]]:
    """An unconditional model that `diffusers` saved, frozen and in evaluation mode.

    Args:
        folder: of a `UNet2DModel` (config.json), whose schedule then is DDPM's linear one, or of a pipeline
            (unet/, scheduler/), whose scheduler's configuration is used.

    Returns:
        The model, and the files it is made of.

    Raises:
        WeightsError: the package is missing, or the folder holds no such model.
    """
    try:
        from diffusers import UNet2DModel
    except ImportError:
        raise WeightsError(
            f"weights folder {folder} is a checkpoint of diffusers, which is not installed: pip install diffusers"
        ) from None
    inner = folder / "unet" if (folder / "unet" / "config.json").is_file() else folder
    config = _config(inner / "config.json")
    if config.get("_class_name") != "UNet2DModel" or config.get("in_channels") != 3:
        raise WeightsError(
            f"weights folder {folder} holds {config.get('_class_name', 'no model')} for "
            f"{config.get('in_channels', 'unknown')} channels, expected a UNet2DModel for 3"
        )
    files = [inner / "config.json"]
    schedule: dict[str, Any] = {}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if inner != folder and scheduler.is_file():
        schedule = _schedule(_config(scheduler), scheduler)
        files.append(scheduler)
    weights = [
        f for f in (inner / f"diffusion_pytorch_model{s}" for s in (".safetensors", ".bin")) if f.is_file()
    ]
    if not weights:
        raise WeightsError(f"weights folder {inner} holds no diffusion_pytorch_model.safetensors or .bin")
    try:
        # A .bin is read by torch.load(weights_only=True) there, too.
        unet = UNet2DModel.from_pretrained(
            str(inner), local_files_only=True, low_cpu_mem_usage=False,
            use_safetensors=weights[0].suffix == ".safetensors",
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise WeightsError(f"weights folder {inner}: {str(error).strip().splitlines()[0][:200]}") from None
    network = DiffusersUNet(unet, alpha_bars(**schedule))
    return network.eval().requires_grad_(False), [*files, weights[0]]


def _config(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _schedule(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Arguments of `alpha_bars` from a scheduler's configuration."""
    known = {"linear", "scaled_linear", "squaredcos_cap_v2"}
    name, predicts = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    if name not in known or predicts != "epsilon" or config.get("trained_betas") is not None:
        raise WeightsError(
            f"{path}: beta_schedule {name}, prediction_type {predicts}: expected one of {', '.join(sorted(known))} "
            "without trained betas, and epsilon"
        )
    return {
        "schedule": name,
        "timesteps": int(config.get("num_train_timesteps", 1000)),
        "beta_start": float(config.get("beta_start", 1e-4)),
        "beta_end": float(config.get("beta_end", 0.02)),
    }


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.norm2, self.conv2 = _norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        _zero(self.conv2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        out: Tensor = self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))
        return out


class _Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        _zero(self.out)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.qkv(self.norm(x)).flatten(2).chunk(3, 1))
        seen = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.out(seen.transpose(1, 2).unflatten(2, x.shape[2:]))
        return out


def _norm(channels: int) -> nn.GroupNorm:
    """32 groups, as DDPM's, of at least four channels each."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels, eps=1e-6)


def _zero(layer: nn.Conv2d) -> None:
    """A residual block starts as the identity, the whole network at zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _sinusoids(steps: Tensor, width: int) -> Tensor:
    """Time embedding (B, width) of the Transformer, float32."""
    half = width // 2
    rates = torch.exp(-math.log(10000) / max(half - 1, 1) * torch.arange(half, device=steps.device))
    angles = steps.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)
