"""The adapter in front of every classifier: [0,1] RGB images in, logits, losses, features and decisions out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from bench.errors import BenchError, DataError, GridError, unknown
from bench.protocols import Geometry, ImageRNG, Sample, TargetModel
from tasks.classification.task import TOP, Decision
from tasks.microbatch import default_size, micro_batches

__all__ = ["LogitsClassifier", "Preparation"]


@dataclass(frozen=True)
class Preparation:
    """What happens to an image of a dataset before it reaches the network and the attack.

    Attributes:
        transform: resizing and cropping of an 8-bit PIL image, as the network's authors do it; None = leave as it is.
        spec: the same in words, for keys.
        size: (H, W) the network expects afterwards; None = any.
    """

    transform: Callable[[Image.Image], Image.Image] | None = None
    spec: Mapping[str, Any] = field(default_factory=dict)
    size: tuple[int, int] | None = None

    def apply(self, image: Tensor) -> Tensor:
        """Image (3, H, W) in [0,1] as the network wants it, same range.

        Raises:
            DataError: the network wants another size and nothing resizes.
        """
        if self.transform is not None:
            pixels = (image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().cpu().numpy()
            changed = np.array(self.transform(Image.fromarray(pixels)).convert("RGB"))
            image = torch.from_numpy(changed).permute(2, 0, 1).contiguous().float() / 255
        size = (int(image.shape[-2]), int(image.shape[-1]))
        if self.size is not None and size != self.size:
            raise DataError(
                f"the model expects images of {self.size[0]}x{self.size[1]} pixels, the dataset has {size[0]}x{size[1]}"
            )
        return image


class LogitsClassifier(TargetModel):
    """A frozen network that maps normalised images (B, 3, H, W) to logits (B, num_classes).

    Args:
        network: takes images after `(images - mean) / std`.
        num_classes: number of logits.
        mean, std: per channel, in [0,1] units; None when the network normalises by itself.
        preparation: what `prepare` does to a sample.
        fixed_size: (H, W) the network insists on. Images a defense made larger or smaller are resized to it, bilinearly
            and inside the gradient; None when the network takes any size.
        micro_batch: images per call of the network, whatever the batch (see `tasks.microbatch`); None = the device's
            safe default. Larger is faster and only right for networks whose results do not depend on an image's place.

    Raises:
        ValueError: wrong mean, std or micro_batch.
    """

    task: ClassVar[str] = "classification"
    losses: ClassVar[tuple[str, ...]] = ("ce", "margin", "dlr")
    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        preparation: Preparation | None = None,
        fixed_size: tuple[int, int] | None = None,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise ValueError("mean and std go together")
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch: {micro_batch} is not 1 or more")
        self.network = network
        self.num_classes = num_classes
        self.preparation = preparation or Preparation()
        self.fixed_size = fixed_size
        self.micro_batch = micro_batch
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and (len(values) != 3 or (name == "std" and min(values) <= 0)):
                raise ValueError(
                    f"{name}: {list(values)} is not three numbers" + " above 0" * (name == "std")
                )
            buffer = None if values is None else torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(name, buffer, persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> LogitsClassifier:
        """Stays in evaluation mode, whatever is asked: a target is frozen."""
        super().train(False)
        return self

    def prepare(self, sample: Sample) -> Sample:
        """The image resized and cropped as the network's authors do; the label stays."""
        image = self.preparation.apply(sample.image)
        return sample if image is sample.image else Sample(image, sample.target, sample.id)

    # -- queries ------------------------------------------------------------------------------------------------
    def logits(self, images: Tensor, *, geometry: Geometry | None = None) -> Tensor:
        """(B, num_classes) in float32; a label has no place in the image, so `geometry` changes nothing."""
        out = self._run(self.network, images)
        if out.shape != (len(images), self.num_classes):
            raise BenchError(
                f"the network turned images {tuple(images.shape)} into {tuple(out.shape)}, "
                f"expected ({len(images)}, {self.num_classes}): does it take images of this size?"
            )
        return out.float()

    def loss(
        self,
        images: Tensor,
        targets: Sequence[Any],
        kind: str,
        *,
        geometry: Geometry | None = None,
        rng: ImageRNG | None = None,
    ) -> Tensor:
        """Loss of each image, (B,); see `loss_from_logits`."""
        return self.loss_from_logits(self.logits(images, geometry=geometry), targets, kind)

    def loss_from_logits(self, logits: Tensor, targets: Sequence[Any], kind: str) -> Tensor:
        """Loss of each image, (B,), in float32; larger is worse.

        `ce`: cross-entropy. `margin`: best wrong logit minus the true one (Carlini and Wagner 2017, f6, unclipped).
        `dlr`: the margin divided by the gap between the first and the third largest logit (Croce and Hein 2020, eq. 6).

        Args:
            logits: (B, K).
            targets: B labels.
            kind: one of `losses`.

        Raises:
            GridError: unknown kind, or `dlr` with fewer than three classes.
        """
        z = logits.float()
        y = torch.as_tensor([int(t) for t in targets], dtype=torch.long, device=z.device)
        if kind == "ce":
            return F.cross_entropy(z, y, reduction="none")
        if kind not in self.losses:
            raise GridError(unknown("loss of task classification", kind, self.losses))
        true = z.gather(1, y[:, None]).squeeze(1)
        wrong = z.scatter(1, y[:, None], float("-inf")).amax(1)
        if kind == "margin":
            return wrong - true
        if z.shape[1] < 3:
            raise GridError(f"loss 'dlr' needs three classes or more, the model has {z.shape[1]}")
        largest = z.topk(3, dim=1).values
        return (wrong - true) / (largest[:, 0] - largest[:, 2] + 1e-12)

    def predict(self, images: Tensor, *, geometry: Geometry | None = None) -> list[Decision]:
        """The label of each image with its confidence and margin, and the likeliest labels."""
        with torch.no_grad():
            z = self.logits(images, geometry=geometry)
            confidence, label = z.softmax(1).max(1)
            # A tie goes to the lower label, as in argmax, on every device.
            label = (z == z.amax(1, keepdim=True)).int().argmax(1)
            best = z.topk(min(2, z.shape[1]), dim=1).values
            margin = best[:, 0] - best[:, -1]
            # Stable for the same reason: `topk` orders ties as it likes.
            top = z.sort(dim=1, descending=True, stable=True).indices[:, :TOP]
        return [
            Decision(int(k), float(c), float(m), tuple(t))
            for k, c, m, t in zip(
                label.tolist(), confidence.tolist(), margin.tolist(), top.tolist(), strict=True
            )
        ]

    def features(self, images: Tensor, layer: str) -> Tensor:
        """Output of module `layer` (a name such as `features.8`), (B, C, ...); of its last call where it runs twice.

        Raises:
            GridError: no such layer, or its output is not one tensor with an image per row.
        """
        modules = dict(self.network.named_modules())
        if layer not in modules or not layer:
            raise GridError(
                unknown(f"layer of {type(self.network).__name__}", layer, (n for n in modules if n))
            )

        def run(x: Tensor) -> Tensor:
            seen: list[Any] = []
            # Cloned at once: an in-place ReLU after the layer would overwrite what it returned.
            keep = modules[layer].register_forward_hook(
                lambda _module, _inputs, out: seen.append(out.clone() if isinstance(out, Tensor) else out)
            )
            try:
                self.network(x)
            finally:
                keep.remove()
            if not seen:
                raise GridError(f"layer '{layer}' of {type(self.network).__name__} is never run")
            if not isinstance(seen[-1], Tensor) or seen[-1].ndim < 2 or len(seen[-1]) != len(x):
                raise GridError(
                    f"layer '{layer}' of {type(self.network).__name__} does not return one row per image"
                )
            return seen[-1]

        return self._run(run, images).float()

    def _run(self, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        x = images
        if self.fixed_size is not None and tuple(x.shape[-2:]) != self.fixed_size:
            x = F.interpolate(x, size=self.fixed_size, mode="bilinear", align_corners=False)
        if self.mean is not None:
            assert self.std is not None  # they go together
            x = (x - self.mean) / self.std
        return micro_batches(network, x, self.micro_batch or default_size(x.device))
