"""The adapter in front of MMSegmentation's segmenters, and where segmenters come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.errors import GridError, unknown
from bench.protocols import Geometry, ImageRNG
from bench.registry import MODELS
from tasks.microbatch import default_size, micro_batches
from tasks.mm.base import MiniSource, OpenMMLabModel, OpenMMLabSource, moved
from tasks.mm.configs import InputSpec, Package
from tasks.segmentation.task import IGNORE, label_map

__all__ = ["MMSegmentation", "MiniDeepLabV3", "MiniPSPNet", "MiniPSPNetSAT", "Segmenter"]


class Segmenter(OpenMMLabModel):
    """A frozen mmseg encoder-decoder; auxiliary heads, which inference does not use, play no part.

    Loss kinds, both means over the labelled pixels of an image: `ce`, the cross-entropy (Arnab et al. 2018);
    `margin`, best wrong logit minus true logit over the pixels that are still right, 0 for the others, so that no
    gradient is spent on what is already wrong.

    An image is judged at the size `prepare` gives it. Where a defense moved its pixels, logits are brought back to
    that size first, for losses and predictions alike, so that an attack optimises exactly what is judged.

    Args:
        network: as `tasks.mm.base.build_network` makes it, with weights.
        spec: what happens to an image before the data preprocessor.
        num_classes: number of classes it predicts.
        micro_batch: images per call of the network, whatever the batch (see `tasks.microbatch`); None = the device's
            safe default.

    Raises:
        GridError: a network with a single output channel, which has no class scores.
    """

    task: ClassVar[str] = "segmentation"
    losses: ClassVar[tuple[str, ...]] = ("ce", "margin")

    def __init__(
        self, network: nn.Module, spec: InputSpec, num_classes: int, micro_batch: int | None = None
    ) -> None:
        super().__init__(network, spec, num_classes)
        from mmengine.config import ConfigDict

        self.micro_batch = micro_batch
        self.jumps = any(getattr(module, "jumps", False) for module in network.modules())
        # mmseg reads its fields as attributes, which a plain dict does not have.
        self.network.test_cfg = ConfigDict(self.network.test_cfg or {"mode": "whole"})
        channels = getattr(network, "out_channels", num_classes)
        if channels != num_classes:
            raise GridError(
                f"the segmenter has {channels} output channels for {num_classes} classes; expected one each"
            )

    def _apply(self, *args: Any, **kwargs: Any) -> Segmenter:
        # The data preprocessor notes its device in its own `to`, which moving a module around it does not call.
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.network.data_preprocessor.to(next(self.network.parameters()).device)
        return self

    def resize_target(self, target: Any, scale: tuple[float, float]) -> Tensor:
        """The label map of an image resized by (y, x) factors, by nearest neighbour as mmseg resizes label maps.

        Raises:
            DataError: the dataset has labels that the model does not.
        """
        labels = label_map(target, self.num_classes)
        if scale == (1.0, 1.0):
            return labels
        import mmcv

        size = (round(labels.shape[1] * scale[1]), round(labels.shape[0] * scale[0]))
        small = mmcv.imresize(labels.numpy().astype(np.uint8), size, interpolation="nearest", backend="cv2")
        return torch.from_numpy(np.ascontiguousarray(small)).long()

    def new_sample(self, metainfo: dict[str, Any]) -> Any:
        """An empty SegDataSample."""
        from mmseg.structures import SegDataSample

        return SegDataSample(metainfo=metainfo)

    def run_up_to(self, layer: str, inputs: Tensor) -> None:
        """Run backbone and neck, and the decode head where `layer` is part of it."""
        if layer.split(".")[0] in ("backbone", "neck"):
            super().run_up_to(layer, inputs)
            return
        self.network.encode_decode(inputs, _metas(inputs))

    # -- queries ------------------------------------------------------------------------------------------------
    def logits(self, images: Tensor, *, geometry: Geometry | None = None) -> Tensor:
        """Class scores (B, K, H, W) in float32, at the size of the prepared images, by the config's test mode."""
        size = self.micro_batch or default_size(images.device)
        out = micro_batches(self._inference, images, size).float()
        if geometry is None or _still(geometry):
            return out
        return torch.cat(
            [_back(out[i : i + 1], *moved(geometry, i), geometry.in_size) for i in range(len(images))]
        )

    def _inference(self, images: Tensor) -> Tensor:
        height, width = int(images.shape[-2]), int(images.shape[-1])
        inputs = self.preprocess(images, self.new_samples(images))
        # Logits come at the padded size, and all padding is below and to the right.
        out: Tensor = self.network.inference(inputs, _metas(inputs))
        return out[..., :height, :width]

    def loss(
        self,
        images: Tensor,
        targets: Sequence[Any],
        kind: str,
        *,
        geometry: Geometry | None = None,
        rng: ImageRNG | None = None,
    ) -> Tensor:
        """Loss of each image, (B,), against label maps of the prepared size; see `loss_from_logits`."""
        return self.loss_from_logits(self.logits(images, geometry=geometry), targets, kind)

    def loss_from_logits(self, logits: Tensor, targets: Sequence[Any], kind: str) -> Tensor:
        """Loss of each image, (B,), in float32; larger is worse. An image without labelled pixels has loss 0.

        Args:
            logits: (B, K, H, W).
            targets: B label maps (H, W), 255 where ignored.
            kind: `ce` or `margin`.

        Raises:
            GridError: no such kind of loss.
            DataError: labels that the model does not have.
        """
        if kind not in self.losses:
            raise GridError(unknown("loss of task segmentation", kind, self.losses))
        z = logits.float()
        labels = torch.stack([label_map(t, self.num_classes) for t in targets]).to(z.device)
        if labels.shape[1:] != z.shape[2:]:
            raise GridError(
                f"label maps have {tuple(labels.shape[1:])} pixels, the logits {tuple(z.shape[2:])}: "
                "prepare the samples first"
            )
        counted = labels != IGNORE
        if kind == "ce":
            values = F.cross_entropy(z, labels, reduction="none", ignore_index=IGNORE)
        else:
            index = labels.where(counted, 0)[:, None]
            true = z.gather(1, index).squeeze(1)
            wrong = z.scatter(1, index, float("-inf")).amax(1)
            values = (wrong - true).clamp(max=0) * counted
        return values.flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)

    def predict(self, images: Tensor, *, geometry: Geometry | None = None) -> list[Tensor]:
        """Label maps (H, W), int64 on the CPU, at the size of the prepared images."""
        with torch.no_grad():
            return list(self.logits(images, geometry=geometry).argmax(1).cpu())


def _metas(inputs: Tensor) -> list[dict[str, Any]]:
    """What mmseg asks to know of each image; made anew on every call, since sliding-window inference writes into it."""
    shape = (int(inputs.shape[-2]), int(inputs.shape[-1]))
    return [{"ori_shape": shape, "img_shape": shape, "pad_shape": shape} for _ in range(len(inputs))]


def _still(geometry: Geometry) -> bool:
    return (
        geometry.in_size == geometry.out_size
        and bool((geometry.scale == 1).all())
        and bool((geometry.offset == 0).all())
    )


def _back(
    logits: Tensor, scale: tuple[float, float], offset: tuple[float, float], size: tuple[int, int]
) -> Tensor:
    """Logits (1, K, H', W') of a moved image at the `size` it had before; what the move cut off repeats the edge."""
    (top, left), (height, width) = offset, size
    inside = 0 <= top <= logits.shape[2] - height and 0 <= left <= logits.shape[3] - width
    if scale == (1.0, 1.0) and inside and top == int(top) and left == int(left):
        return logits[:, :, int(top) : int(top) + height, int(left) : int(left) + width]
    axes = []
    for length, factor, shift, moved_length in zip(size, scale, offset, logits.shape[2:], strict=True):
        # Pixel i covers [i, i + 1]: its centre i + 0.5 moved to (i + 0.5) * factor + shift, in [-1, 1] of the whole.
        centre = (torch.arange(length, dtype=torch.float64) + 0.5) * factor + shift
        axes.append((2 * centre / moved_length - 1).to(logits))
    grid = torch.stack((axes[1].expand(height, width), axes[0][:, None].expand(height, width)), -1)[None]
    return F.grid_sample(logits, grid, mode="bilinear", padding_mode="border", align_corners=False)


# -- sources ------------------------------------------------------------------------------------------------------
class _Source(OpenMMLabSource):
    package: ClassVar[Package] = "mmseg"
    adapter: ClassVar[type[OpenMMLabModel]] = Segmenter
    task = "segmentation"

    def classes(self, network: nn.Module) -> int:
        """Number of classes of the decode head.

        Raises:
            GridError: not an encoder-decoder.
        """
        if not hasattr(network, "num_classes") or not hasattr(network, "inference"):
            raise GridError(
                f"{type(network).__name__} is no encoder-decoder of mmseg with a number of classes"
            )
        return int(network.num_classes)  # type: ignore[arg-type]


@MODELS.register_module(name="mmseg")
class MMSegmentation(_Source):
    """Any MMSegmentation config with its checkpoint.

    Args:
        config: path of a config file, or the name of one packaged in mmseg
            (`pspnet_r50-d8_4xb2-40k_cityscapes-512x1024`).
        checkpoint: path of the weights (`.pth` as OpenMMLab publishes them, or `.safetensors`).
        scale: (width, height) instead of the one in the config's test pipeline.
        origin: what the checkpoint is, said when it is missing; None = the one published for the config.
    """

    def __init__(
        self, config: str, checkpoint: str, scale: tuple[int, int] | None = None, origin: str | None = None
    ) -> None:
        self.config = config
        self.checkpoint = Path(checkpoint).expanduser()
        self.origin = origin
        self.scale = scale


class _MiniSegmenter(Segmenter):
    """Results of these narrow networks do not depend on an image's place among four, and four at a time are faster."""

    def __init__(self, network: nn.Module, spec: InputSpec, num_classes: int) -> None:
        super().__init__(network, spec, num_classes, micro_batch=4)


class _Mini(MiniSource, _Source):
    """A segmenter of the mini zoo; scenes reach it at their own size."""

    adapter: ClassVar[type[OpenMMLabModel]] = _MiniSegmenter
    folder: ClassVar[Path] = Path(__file__).parent / "configs"

    def _spec(self, parsed: Any) -> InputSpec:
        return InputSpec()


@MODELS.register_module(name="mini_pspnet")
class MiniPSPNet(_Mini):
    """Narrow PSPNet for 96x96 scenes of digits, trained on the embedded data."""

    zoo_name: ClassVar[str] = "mini_pspnet"


@MODELS.register_module(name="mini_pspnet_sat")
class MiniPSPNetSAT(MiniPSPNet):
    """`mini_pspnet` after adversarial training for segmentation (SAT, Xu et al. 2021)."""

    zoo_name: ClassVar[str] = "mini_pspnet_sat"


@MODELS.register_module(name="mini_deeplabv3")
class MiniDeepLabV3(_Mini):
    """Narrow DeepLabv3 for 96x96 scenes of digits, trained on the embedded data."""

    zoo_name: ClassVar[str] = "mini_deeplabv3"
