"""The frozen target that a defense is trained for: its outputs, its features and its last linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.errors import NotApplicable, WeightsError
from bench.protocols import ImageRNG, TargetModel
from tasks import heads
from tasks.detection.objects import Objects

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

    @property
    def has_logits(self) -> bool:
        """The target has class scores of the whole image or of every pixel; detectors have none."""
        return type(self.target).logits is not TargetModel.logits

    def task_loss(self, images: Tensor, targets: Sequence[Any], seed: int) -> Tensor:
        """Mean over images of the loss the target was trained with: `ce`, for detectors `total` (masks included).

        Raises:
            WeightsError: the data lacks what this loss needs (masks).
        """
        kind = "total" if "total" in self.target.losses else "ce"
        rng = ImageRNG.for_images(seed, [str(i) for i in range(len(images))])
        return _refused(lambda: self.target.loss(images, targets, kind, rng=rng).mean())

    def task_loss_from(self, logits: Tensor, targets: Sequence[Any]) -> Tensor:
        """`task_loss` from logits that are known already: `ce`."""
        return self.target.loss_from_logits(logits, targets, "ce").mean()

    def aligned(
        self, images: Tensor, targets: Sequence[Any], layer: str | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features of the images, and the feature vector with its class of every labelled thing in them.

        A thing is an image (classification), a pixel (segmentation) or a ground-truth box (detection).

        Args:
            images: (B, 3, H, W).
            targets: their ground truth.
            layer: of the features; None = logits; of detectors the maps that class features are cropped from.

        Returns:
            Features (B, ...), vectors (N, C), classes (N,), negative where there is no class to learn.

        Raises:
            WeightsError: neither labels, label maps nor boxes, or a target that cannot give them.
        """
        if self.task == "detection":
            return self._boxes(images, targets, layer)
        features = self.outputs(images, layer)
        labels = labels_of(targets, images.device)
        if labels.ndim == 1:
            # Maps are pooled, as the network does before its last linear layer.
            vectors = features.mean((2, 3)) if features.ndim == 4 else features.flatten(1)
        elif features.ndim == 4:
            labels = _at_size(labels, (int(features.shape[2]), int(features.shape[3]))).flatten()
            vectors = features.permute(0, 2, 3, 1).flatten(0, 2)
        else:
            raise WeightsError(
                f"classes of pixels need a layer of maps; '{layer}' returns {tuple(features.shape[1:])}"
            )
        return features, vectors, torch.where(labels < self.num_classes, labels, -1)

    def _boxes(
        self, images: Tensor, targets: Sequence[Any], layer: str | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        target: Any = self.target
        if not hasattr(target, "class_features"):
            raise WeightsError(f"the target {type(target).__name__} has no class features of boxes")
        maps = target.feature_maps(images)
        vectors, labels = target.class_features(images, targets, maps)
        if layer is None:
            return torch.cat([x.flatten(1) for x in maps], 1), vectors, labels
        return self.features(images, layer), vectors, labels

    def linear(self) -> nn.Linear | nn.Conv2d:
        """The last linear map, from features to classes: a linear layer, of a segmenter a 1x1 convolution.

        Raises:
            WeightsError: the target does not end in one, so it has no class activation features.
        """
        return _refused(lambda: heads.final_linear(self.target))

    def class_rows(self, images: Tensor, maps: Tensor) -> Tensor:
        """Its rows for the classes predicted in `images`, as they multiply `maps`; see `tasks.heads.class_rows`."""
        return heads.class_rows(self.linear(), maps, lambda: self.logits(images))

    def layer(self, name: str | None, images: Tensor) -> str:
        """The layer meant by `name`.

        None or `maps`: the last maps before the last linear map (and its pooling), of a detector its neck.
        `convolution`: the last convolution. `features`: what stands for what the target sees
        (`tasks.heads.feature_layer`). Anything else is the name of a module.

        Args:
            name: as recipes say it.
            images: of the size the target will see, (B, 3, H, W).

        Raises:
            WeightsError: the target has no such layer.
        """
        if name in (None, "maps"):
            if self.task == "detection":
                return "neck" if hasattr(getattr(self.target, "network", None), "neck") else "backbone"
            return _refused(lambda: heads.last_maps(self.target, images))
        if name == "features":
            return _refused(lambda: heads.feature_layer(self.target, images))
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
    """One plane per class, (B, classes, H, W): 1 where the label is that class.

    Of an image the whole plane, of a label map its pixels, of objects their boxes. Labels outside 0..classes-1 (ignored
    pixels) have no plane.
    """
    planes = torch.zeros(len(targets), classes, *size, device=device)
    if targets and isinstance(targets[0], Objects):
        for plane, target in zip(planes, targets, strict=True):
            boxes = target.corners().round().astype(int)
            for (x1, y1, x2, y2), label in zip(boxes.tolist(), target.labels.tolist(), strict=True):
                plane[label, max(y1, 0) : y2, max(x1, 0) : x2] = 1
        return planes
    for plane, label in zip(planes, labels_of(targets, device), strict=True):
        for k in label.unique().tolist():
            if 0 <= k < classes:
                plane[k] = (label == k).float().expand(size)
    return planes


def _at_size(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Label maps (B, H, W) at another size: each cell takes the label at its centre."""
    if tuple(labels.shape[1:]) == size:
        return labels
    return F.interpolate(labels[:, None].float(), size=size, mode="nearest-exact")[:, 0].long()


def labels_of(targets: Sequence[Any], device: torch.device) -> Tensor:
    """Labels as one tensor: (B,) for images, (B, H, W) for label maps.

    Raises:
        WeightsError: the targets are neither.
    """
    try:
        return torch.stack([torch.as_tensor(t).long() for t in targets]).to(device)
    except (TypeError, ValueError, RuntimeError):
        raise WeightsError(
            f"this recipe needs a class label per image, per pixel or per box; targets are {type(targets[0]).__name__}"
        ) from None
