"""Recipes of adversarially trained targets: AT, TRADES and Free classifiers, a SAT segmenter, an MTD detector.

They share networks and training loops with their standard siblings. What is new is what a step trains on: adversarial
images that the project's own attacks make against the network as it is at that step. ``batch_norm`` of a recipe says
with which statistics the network runs meanwhile, as the authors' code has it: ``training`` (those of the batch, also
recorded in the running ones) or ``running``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.protocols import Batch, TargetModel
from bench.registry import ATTACKS
from bench.units import parse_fraction
from tasks.mini import data
from tasks.mini.zoo import Progress, recipe
from tasks.mini.zoo_classification import (
    MEAN,
    RESNET,
    STD,
    Objective,
    build_classifier,
    cross_entropy,
    logits,
)
from tasks.mini.zoo_detection import build_detector
from tasks.mini.zoo_detection import parameters as detection_parameters
from tasks.mini.zoo_segmentation import build_segmenter
from tasks.mini.zoo_segmentation import parameters as segmentation_parameters


class Opponent:
    """Makes adversarial images against a network that is being trained.

    Each attack sees the network through the harness's own oracle. Of several attacks each image gets the result whose
    ``total`` loss is the largest (the task-oriented domain of Zhang and Wang 2019).

    Args:
        target: the network behind its adapter, of this class alone: it freezes the network, which is undone here.
        adversary: ``attacks`` (specs as in a grid: ``name`` and parameters) and ``batch_norm``.
        key: what the random starts depend on, beside the image.
    """

    def __init__(self, target: TargetModel, adversary: Mapping[str, Any], key: object) -> None:
        from defenses.training.adversary import AttackAdversary

        self.target, self.key = target, key
        self.network: nn.Module = target.network  # type: ignore[assignment]
        self.batch_statistics = adversary["batch_norm"] == "training"
        self._attacks = []
        for spec in adversary["attacks"]:
            params = {name: value for name, value in spec.items() if name != "name"}
            self._attacks.append(AttackAdversary([(ATTACKS.create(spec["name"], params), 1.0)], target))
        self.network.requires_grad_(True).train()

    def __call__(self, images: Tensor, targets: Iterable[Any], ids: Iterable[object]) -> Tensor:
        """Adversarial counterparts of images (B, 3, H, W) in [0,1], detached; leaves the network in training mode."""
        batch = Batch(images, tuple(targets), tuple(str(i) for i in ids))
        self.network.train(self.batch_statistics)
        try:
            found = [attack(batch, self.key) for attack in self._attacks]
            return found[0] if len(found) == 1 else self._hardest(found, batch)
        finally:
            self.network.train()

    def _hardest(self, found: list[Tensor], batch: Batch) -> Tensor:
        with torch.no_grad():
            losses = torch.stack([self.target.loss(images, batch.targets, "total") for images in found])
        return torch.stack(found)[losses.argmax(0), torch.arange(len(batch))]


# -- classification -----------------------------------------------------------------------------------------------
def classifier_opponent(network: nn.Module, adversary: Mapping[str, Any], key: object) -> Opponent:
    """The opponent of a classifier of the zoo."""
    from tasks.classification.model import LogitsClassifier

    target = LogitsClassifier(network, len(data.CLASSES), mean=[MEAN] * 3, std=[STD] * 3)
    return Opponent(target, adversary, key)


def _shown(images: Tensor, step: int) -> range:
    """Numbers of a step's images in the training stream; they name the random starts."""
    return range(step * len(images), (step + 1) * len(images))


def madry(opponent: Opponent) -> Objective:
    """Cross entropy at adversarial images alone (Madry et al. 2018, eq. 2.1)."""

    def objective(model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Tensor:
        return cross_entropy(model, opponent(images, labels.tolist(), _shown(images, step)), labels, step)

    return objective


def trades(opponent: Opponent, beta: float) -> Objective:
    """CE(z(x), y) + beta KL(z(x) || z(x')), both terms trained through (TRADES, authors' code)."""

    def objective(model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Tensor:
        adv = opponent(images, labels.tolist(), _shown(images, step))
        clean = logits(model, images)
        apart = F.kl_div(logits(model, adv).log_softmax(1), clean.softmax(1), reduction="batchmean")
        return F.cross_entropy(clean, labels) + beta * apart

    return objective


class Free:
    """Cross entropy at images perturbed by the gradient of the steps before (Shafahi et al. 2019, algorithm 1).

    The backward pass of a step gives the gradient of the weights and that of the perturbation, which moves by
    ``alpha`` along its sign and stays within ``eps``. It is carried on from one batch to the next.

    Args:
        eps: radius in units of [0,1].
        alpha: step of the perturbation, same units.
    """

    def __init__(self, eps: float, alpha: float) -> None:
        self.eps, self.alpha = eps, alpha
        self.perturbation: Tensor | None = None

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """The loss; its ``backward`` is what the next perturbation is made from."""
        return cross_entropy(model, self.perturbed(images), labels, step)

    def perturbed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0,1] with the perturbation that the last one and its gradient give."""
        last = self.perturbation
        if last is None:
            moved = torch.zeros_like(images)
        else:
            assert last.grad is not None
            moved = (last.detach() + self.alpha * last.grad.sign()).clamp(-self.eps, self.eps)
        self.perturbation = moved.requires_grad_()
        return (images + self.perturbation).clamp(0, 1)


#: A new network stays at chance under attack for hundreds of steps, so training goes on from the standard weights.
#: Clear digits first, as there: at their final contrast they take several times as long.
_TUNED = {**RESNET, "start": "mini_resnet", "easy_share": 0.5}
AT: dict[str, Any] = {
    **_TUNED, "epochs": 18, "loss": "cross entropy at adversarial images",
    "adversary": {
        "attacks": [{"name": "pgd", "eps": "8/255", "alpha": "2/255", "steps": 7}], "batch_norm": "training",
    },
}  # fmt: skip
TRADES: dict[str, Any] = {
    **_TUNED, "epochs": 45, "loss": "cross entropy + beta KL", "beta": 6.0,
    "adversary": {
        "attacks": [
            {"name": "pgd", "loss": "kl", "start": "normal", "eps": "0.031", "alpha": "0.007", "steps": 10}
        ],
        "batch_norm": "running",
    },
}  # fmt: skip
FREE: dict[str, Any] = {
    **_TUNED, "epochs": 160, "loss": "cross entropy at adversarial images", "replays": 8, "eps": "8/255",
    "alpha": "8/255", "adversary": {"batch_norm": "training"},
}  # fmt: skip


@recipe("mini_resnet_at", seed=4, parameters=AT)
def build_resnet_at(
    out_dir: Path, *, seed: int, device: str | torch.device, progress: Progress
) -> Mapping[str, Any]:
    """ResNet-8 on the mini digits, adversarially trained (Madry et al. 2018)."""
    name = "mini_resnet_at"
    return build_classifier(
        name, AT, out_dir, seed=seed, device=device, progress=progress, start=_TUNED["start"],
        objective=lambda model: madry(classifier_opponent(model, AT["adversary"], (name, seed))),
    )  # fmt: skip


@recipe("mini_resnet_trades", seed=5, parameters=TRADES)
def build_resnet_trades(
    out_dir: Path, *, seed: int, device: str | torch.device, progress: Progress
) -> Mapping[str, Any]:
    """ResNet-8 on the mini digits, trained with TRADES (Zhang et al. 2019)."""
    name = "mini_resnet_trades"
    return build_classifier(
        name, TRADES, out_dir, seed=seed, device=device, progress=progress, start=_TUNED["start"],
        objective=lambda model: trades(
            classifier_opponent(model, TRADES["adversary"], (name, seed)), TRADES["beta"]
        ),
    )  # fmt: skip


@recipe("mini_resnet_free", seed=6, parameters=FREE)
def build_resnet_free(
    out_dir: Path, *, seed: int, device: str | torch.device, progress: Progress
) -> Mapping[str, Any]:
    """ResNet-8 on the mini digits, free adversarial training (Shafahi et al. 2019)."""
    eps, alpha = (float(parse_fraction(FREE[key])) for key in ("eps", "alpha"))
    return build_classifier(
        "mini_resnet_free", FREE, out_dir, seed=seed, device=device, progress=progress, start=_TUNED["start"],
        objective=lambda model: Free(eps, alpha),
    )  # fmt: skip


# -- segmentation and detection -----------------------------------------------------------------------------------
class AdversarialHalf:
    """Replaces the second half of every batch by adversarial images; the first half stays clean.

    So do the code of SAT (Robust-Semantic-Segmentation, Xu et al. 2021) and that of RobustDet for MTD.

    Args:
        target: puts the network behind its adapter.
        truth: ground truth of a data sample as that adapter takes it.
        adversary: see `Opponent`.
        key: what the random starts depend on, beside the image.
    """

    def __init__(
        self,
        target: Callable[[nn.Module], TargetModel],
        truth: Callable[[Any], Any],
        adversary: Mapping[str, Any],
        key: object,
    ) -> None:
        self.target, self.truth, self.adversary, self.key = target, truth, adversary, key
        self.opponent: Opponent | None = None

    def __call__(self, model: nn.Module, step: int, batch: dict[str, Any]) -> None:
        """Change ``batch`` in place; see `tasks.mini._runner.BeforeStep`."""
        if self.opponent is None:
            self.opponent = Opponent(self.target(model), self.adversary, self.key)
        inputs, samples = batch["inputs"], batch["data_samples"]
        half = len(inputs) // 2
        device = next(model.parameters()).device
        images = torch.stack([image.flip(0) for image in inputs[half:]]).to(device).float() / 255
        numbers = range(step * len(inputs) + half, (step + 1) * len(inputs))
        adv = self.opponent(images, [self.truth(sample) for sample in samples[half:]], numbers)
        inputs[half:] = [image.flip(0) * 255 for image in adv]


def _segmenter(network: nn.Module) -> TargetModel:
    from tasks.mm.configs import InputSpec
    from tasks.segmentation.model import Segmenter

    return Segmenter(network, InputSpec(), len(data.SEG_CLASSES))


def _label_map(sample: Any) -> Tensor:
    found: Tensor = sample.gt_sem_seg.data[0]
    return found


def _detector(network: nn.Module) -> TargetModel:
    from tasks.detection.model import Detector
    from tasks.mm.configs import InputSpec

    return Detector(network, InputSpec(), len(data.CLASSES))


def _objects(sample: Any) -> Any:
    from tasks.detection.objects import Objects

    boxes = sample.gt_instances.bboxes.numpy().astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    return Objects(boxes, sample.gt_instances.labels.numpy(), sample.img_shape, len(data.CLASSES))


SAT: dict[str, Any] = {
    **segmentation_parameters("mini_pspnet_sat", pretrained=False), "start": "mini_pspnet", "adversarial_share": 0.5,
    "adversary": {
        "attacks": [{"name": "bim", "eps": "0.03", "alpha": "0.01", "steps": 3}], "batch_norm": "running",
    },
}  # fmt: skip
#: With one attack alone, this is the CLS or LOC training of the same paper.
MTD: dict[str, Any] = {
    **detection_parameters("mini_ssd_mtd", pretrained=False), "start": "mini_ssd", "adversarial_share": 0.5,
    "adversary": {
        "attacks": [
            {"name": "det_pgd", "loss": loss, "start": "uniform", "eps": "8/255", "alpha": "8/255", "steps": 1}
            for loss in ("cls", "loc")
        ],
        "batch_norm": "running",
    },
}  # fmt: skip


@recipe("mini_pspnet_sat", seed=13, parameters=SAT)
def build_pspnet_sat(
    out_dir: Path, *, seed: int, device: str | torch.device, progress: Progress
) -> Mapping[str, Any]:
    """mini_pspnet trained on with half adversarial batches (SAT, Xu et al. 2021)."""
    name = "mini_pspnet_sat"
    return build_segmenter(
        name, out_dir, seed=seed, device=device, progress=progress, start=SAT["start"],
        before=AdversarialHalf(_segmenter, _label_map, SAT["adversary"], (name, seed)),
    )  # fmt: skip


@recipe("mini_ssd_mtd", seed=23, parameters=MTD)
def build_ssd_mtd(
    out_dir: Path, *, seed: int, device: str | torch.device, progress: Progress
) -> Mapping[str, Any]:
    """mini_ssd trained on with half adversarial batches (MTD, Zhang and Wang 2019)."""
    name = "mini_ssd_mtd"
    return build_detector(
        name, out_dir, seed=seed, device=device, progress=progress, start=MTD["start"],
        before=AdversarialHalf(_detector, _objects, MTD["adversary"], (name, seed)),
    )  # fmt: skip
