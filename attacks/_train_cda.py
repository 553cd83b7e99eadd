"""Training of CDA generators.

python -m attacks._train_cda --dataset '{name: mini_digits, split: train}' --model mini_vgg --out cda.safetensors
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from attacks.cross_domain import Generator
from bench.errors import BenchError
from bench.grid import split_spec
from bench.protocols import Dataset, TargetModel
from bench.registry import DATASETS, MODELS
from bench.units import parse_fraction
from bench.weights import save_safetensors

logger = logging.getLogger(__name__)


def relativistic_loss(clean: Tensor, adversarial: Tensor) -> Tensor:
    """CE(z(x') - z(x), argmax z(x)), (B,), from logits (B, K): what G increases (Naseer et al. 2019, eq. 4)."""
    return F.cross_entropy(adversarial - clean, clean.argmax(1), reduction="none")


def train(
    model: TargetModel,
    images: Tensor,
    *,
    eps: float = 10 / 255,
    steps: int,
    batch: int = 15,
    lr: float = 2e-4,
    blocks: int = 6,
    width: int = 64,
    seed: int = 0,
) -> Generator:
    """A generator against `model`, by Adam with betas (0.5, 0.999), from images (N, 3, H, W) in [0,1] of any kind.

    The published run takes 10 epochs of ImageNet at batch 15 and eps 10/255. The result depends on `seed` alone.

    Args:
        model: the network it learns to fool; its labels are its own predictions.
        images: what it learns on.
        eps: radius of the budget in [0,1] pixel units.
        steps: steps of the optimiser.
        batch: images a step.
        lr: learning rate.
        blocks, width: size of the generator.
        seed: of weights, dropout and order.
    """
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        generator = Generator(blocks, width).to(images.device).train()
        optimizer = torch.optim.Adam(generator.parameters(), lr, betas=(0.5, 0.999))
        for step in range(steps):
            x = images[torch.randint(len(images), (batch,)).to(images.device)]
            made = torch.clamp(generator(x), x - eps, x + eps).clamp(0, 1)
            with torch.no_grad():
                clean = model.logits(x)
            loss = -relativistic_loss(clean, model.logits(made)).mean()
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            if (step + 1) % 100 == 0 or step + 1 == steps:
                logger.info("step %d of %d, loss %.3f", step + 1, steps, -loss.item())
    return generator.eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the module's docstring. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m attacks._train_cda", description="Train a CDA generator."
    )
    parser.add_argument("--dataset", required=True, help="a dataset as in a profile; its labels are not used")
    parser.add_argument("--model", required=True, help="a classifier as in a profile")
    parser.add_argument("--out", required=True, type=Path, help="safetensors file to write")
    parser.add_argument("--eps", default="10/255")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=15)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--blocks", type=int, default=6, help="residual blocks; 2 for small images")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        device = torch.device(options.device)
        name, params, _ = split_spec(_spec(options.dataset), "--dataset")
        data: Dataset = DATASETS.create(name, params, "--dataset")
        name, params, _ = split_spec(_spec(options.model), "--model")
        model: TargetModel = MODELS.create(name, params, "--model").load(device)
        if model.task != "classification":
            raise BenchError(
                f"--model: a CDA generator is trained against a classifier, this is for {model.task}"
            )
        images = torch.stack([model.prepare(data[i]).image for i in range(len(data))]).to(device)
        size = {"eps": str(parse_fraction(options.eps)), "blocks": options.blocks, "width": options.width}
        generator = train(
            model, images, eps=float(parse_fraction(options.eps)), steps=options.steps, batch=options.batch,
            lr=options.lr, blocks=options.blocks, width=options.width, seed=options.seed,
        )  # fmt: skip
        meta: dict[str, Any] = {"attack": "cda", "dataset": options.dataset, "model": options.model, **size}
        save_safetensors(options.out, generator.state_dict(), meta=meta)
    except (BenchError, ValueError) as error:
        logger.error("%s", error)
        return 2
    return 0


def _spec(text: str) -> Any:
    return yaml.safe_load(text)


if __name__ == "__main__":
    sys.exit(main())
