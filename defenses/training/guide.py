"""The frozen target that a defense is trained for: its outputs, its features and its last linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bench.errors import NotApplicable, WeightsError
from bench.protocols import ImageRNG, TargetModel
from tasks import heads

Found = TypeVar("Found")


class Guide:
    """What losses ask of the target; images are (B, 3, H, W) in [0,1] and gradients reach them, never the target.

    Args:
        target: the frozen model.
    """

    def __init__(self, target: TargetModel) -> None:
        self.target = target
        self.task = type(target).task
        self.num_classes = target.num_classes

    def logits(self, images: Tensor) -> Tensor:
        """Class scores (B, K) or (B, K, H, W).

        Raises:
            WeightsError: the target has none (detectors).
        """
        try:
            return self.target.logits(images)
        except NotImplementedError:
            raise WeightsError(
                f"the loss needs logits, which the {self.task} target {type(self.target).__name__} does not have: "
                "give a layer of features instead"
            ) from None

    def features(self, images: Tensor, layer: str) -> Tensor:
        """Activations of `layer`, (B, C, ...)."""
        return self.target.features(images, layer)

    def outputs(self, images: Tensor, layer: str | None) -> Tensor:
        """Features of `layer`, or logits when it is None."""
        return self.logits(images) if layer is None else self.features(images, layer)

    def task_loss(self, images: Tensor, targets: Sequence[Any], seed: int) -> Tensor:
        """Mean over images of the loss the target was trained with: `ce`, for detectors `total`."""
        kind = "total" if "total" in self.target.losses else "ce"
        rng = ImageRNG.for_images(seed, [str(i) for i in range(len(images))])
        return self.target.loss(images, targets, kind, rng=rng).mean()

    def linear(self) -> nn.Linear:
        """The last linear layer, which maps pooled features to classes.

        Raises:
            WeightsError: the target does not end in one, so it has no class activation features.
        """
        return _refused(lambda: heads.final_linear(self.target))

    def layer(self, name: str | None, images: Tensor) -> str:
        """The layer meant by `name`: None = the maps pooled for the linear layer, `convolution` = the last convolution.

        Args:
            name: as recipes say it.
            images: of the size the target will see, (B, 3, H, W).

        Raises:
            WeightsError: the target has no such layer.
        """
        if name is None:
            return _refused(lambda: heads.last_maps(self.target, images))
        return _refused(lambda: heads.last_convolution(self.target)) if name == "convolution" else name


def _refused(ask: Callable[[], Found]) -> Found:
    try:
        return ask()
    except NotApplicable as error:
        raise WeightsError(error.reason) from None


@contextmanager
def whole_batches(target: TargetModel, size: int) -> Iterator[None]:
    """Let `target` take `size` images per call while training.

    Evaluation runs small fixed groups so that an image's result does not depend on its batch; training is a function of
    its batches anyway, and would pay for that with several times the time.
    """
    if not hasattr(target, "micro_batch"):
        yield
        return
    before = target.micro_batch
    target.micro_batch = size  # type: ignore[assignment]
    try:
        yield
    finally:
        target.micro_batch = before


def label_planes(targets: Sequence[Any], classes: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """One plane per class, (B, classes, H, W): 1 where the label (of the image, or of the pixel) is that class.

    Labels outside 0..classes-1 (ignored pixels) have no plane.
    """
    planes = torch.zeros(len(targets), classes, *size, device=device)
    for plane, label in zip(planes, labels_of(targets, device), strict=True):
        for k in label.unique().tolist():
            if 0 <= k < classes:
                plane[k] = (label == k).float().expand(size)
    return planes


def labels_of(targets: Sequence[Any], device: torch.device) -> Tensor:
    """Labels as one tensor: (B,) for images, (B, H, W) for label maps.

    Raises:
        WeightsError: the targets are neither (boxes).
    """
    try:
        return torch.stack([torch.as_tensor(t).long() for t in targets]).to(device)
    except (TypeError, ValueError, RuntimeError):
        raise WeightsError(
            f"this recipe needs a class label per image or per pixel; targets are {type(targets[0]).__name__}"
        ) from None
