"""The adapter in front of MMDetection's detectors, and where detectors come from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from bench.errors import GridError, NotApplicable, unknown
from bench.protocols import Geometry, ImageRNG
from bench.registry import MODELS
from tasks.detection.dense import candidates, class_probabilities, emptiness, objectness, swap_margin
from tasks.detection.objects import Detections, Objects, warp_masks
from tasks.microbatch import default_size
from tasks.mm.base import MiniSource, OpenMMLabModel, OpenMMLabSource, moved, seeded
from tasks.mm.configs import InputSpec, Package

__all__ = ["Detector", "MMDetection", "MiniMaskRCNN", "MiniSSD", "MiniSSDMTD"]


#: Parts of mmdet's loss names and the kind they belong to; the first part that fits decides.
_GROUPS = (
    ("mask", "mask"), ("semantic", "mask"), ("seg", "mask"),
    ("centerness", "loc"), ("bbox", "loc"), ("iou", "loc"), ("l1", "loc"), ("dfl", "loc"), ("offset", "loc"),
    ("wh", "loc"), ("xy", "loc"), ("pts", "loc"), ("reg", "loc"),
    ("cls", "cls"), ("conf", "cls"), ("obj", "cls"), ("heatmap", "cls"), ("class", "cls"), ("rank", "cls"),
)  # fmt: skip
_KINDS: dict[str, tuple[str, ...]] = {
    "cls": ("cls",), "loc": ("loc",), "cls+loc": ("cls", "loc"), "mask": ("mask",), "total": ("cls", "loc", "mask"),
}  # fmt: skip
#: Kinds that read the scores of all anchors or proposals instead of mmdet's losses.
_DENSE = ("objectness", "emptiness", "swap")
#: How much a candidate must overlap an object to be one of its own, and proposals each other to suppress (DAG).
_OVERLAP, _NMS = 0.1, 0.9


def loss_group(name: str) -> str | None:
    """`cls`, `loc` or `mask` for an entry of mmdet's loss dictionary; None for what is no loss (`acc`).

    `loss_rpn_cls` and `loss_cls` are `cls`, `loss_rpn_bbox` and `loss_bbox` are `loc`, `loss_mask` is `mask`.

    Raises:
        GridError: a loss that belongs to none of them.
    """
    last = name.rsplit(".", 1)[-1]
    if "loss" not in last:
        return None
    for part, group in _GROUPS:
        if part in last:
            return group
    raise GridError(f"loss '{name}' of this detector is neither a class, a box nor a mask loss")


def _terms(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value:
            yield from _terms(item)


class Detector(OpenMMLabModel):
    """A frozen mmdet detector. Images pass one at a time, so that no image's loss depends on another.

    Loss kinds (Zhang and Wang 2019): `cls` and `loc` are the sums of the detector's classification and box losses,
    those of a region proposal network included; `cls+loc` is their sum; `mask` the mask loss; `total` everything.
    Targets stay the ground truth. Region proposals are constants to the gradient, as mmdet detaches them. An image
    without ground truth has loss 0 and gradient 0: an attack that starts at the image leaves it clean.

    Three more read the scores of every candidate (the anchors of a dense head, the proposals of a two-stage detector on
    the image as it is). `objectness` and `emptiness` need no ground truth: mean cross-entropy of the candidates to the
    background, which grows with every object seen, and to anything but the background (Chow et al. 2020). `swap` is
    the sum, over the candidates on an object that are still given its true label, of wrong minus true logit (Xie et
    al. 2017, eq. 2): negative, and 0 once no candidate is right. It needs targets with true and wrong labels, as the
    target rules of the task make them.
    """

    task: ClassVar[str] = "detection"
    losses: ClassVar[tuple[str, ...]] = ("cls", "loc", "cls+loc", "mask", "total", *_DENSE)

    def __init__(self, network: nn.Module, spec: InputSpec, num_classes: int) -> None:
        super().__init__(network, spec, num_classes)
        head = getattr(network, "bbox_head", None)
        if head is not None and type(head).__name__ == "SSDHead" and not hasattr(head, "loss_cls"):
            # mmdet 3.3 asks every dense head for it when predicting; SSDHead never sets it and never calls it.
            head.loss_cls = nn.CrossEntropyLoss()
        self.with_mask = bool(getattr(network, "with_mask", False))
        if not self.with_mask:
            # An attribute of this instance: the class lists what any detector may have.
            self.losses = tuple(kind for kind in type(self).losses if kind != "mask")  # type: ignore[misc]

    def resize_target(self, target: Objects, scale: tuple[float, float]) -> Objects:
        """Objects of an image resized by (y, x) factors.

        Raises:
            GridError: the dataset has other classes than the detector.
        """
        if target.num_classes != self.num_classes:
            raise GridError(
                f"the detector predicts {self.num_classes} classes, the dataset has {target.num_classes}: "
                "they do not belong together"
            )
        return target.resized(scale)

    def new_sample(self, metainfo: dict[str, Any]) -> Any:
        """An empty DetDataSample."""
        from mmdet.structures import DetDataSample

        return DetDataSample(metainfo=metainfo)

    # -- loss ---------------------------------------------------------------------------------------------------
    def loss(
        self,
        images: Tensor,
        targets: Sequence[Any],
        kind: str,
        *,
        geometry: Geometry | None = None,
        rng: ImageRNG | None = None,
    ) -> Tensor:
        """Loss of each image against its ground truth, (B,), differentiable to the pixels.

        Detectors that sample (Mask R-CNN: 256 anchors, 512 proposals by default) draw from `rng`: equal streams give
        equal losses. Without `rng` every call draws the same.

        Raises:
            GridError: no such kind of loss, or `swap` without wrong labels.
            NotApplicable: a mask loss of a detector or dataset without masks, or candidates that cannot be scored.
        """
        if kind not in (*_KINDS, *_DENSE):
            raise GridError(unknown("loss of task detection", kind, (*_KINDS, *_DENSE)))
        if kind == "mask" and not self.with_mask:
            raise NotApplicable("this detector predicts no masks, so it has no mask loss")
        seeds = [0] * len(images) if rng is None else list(rng.seeds)
        values = []
        for index, target in enumerate(targets):
            image = images[index : index + 1]
            if kind in _DENSE:
                values.append(self._dense(image, target, kind, *moved(geometry, index)))
                continue
            if kind in ("mask", "total") and self.with_mask and target.masks is None:
                raise NotApplicable(f"loss '{kind}': the dataset has no masks")
            sample = self._with_truth(image, target, *moved(geometry, index))
            if sample is None:
                values.append(image.sum() * 0.0)
                continue
            with seeded(seeds[index], images.device):
                inputs, samples = self.collate(image, [sample])
                self._pad_masks(samples[0])
                losses = self.network.loss(inputs, samples)
            values.append(self._sum(losses, kind))
        return torch.stack(values)

    def _with_truth(
        self, image: Tensor, target: Objects, scale: tuple[float, float], offset: tuple[float, float]
    ) -> Any | None:
        """A data sample with the ground truth where the pixels are now; None when no object is left to find."""
        from mmdet.structures.mask import BitmapMasks
        from mmengine.structures import InstanceData

        size = (int(image.shape[-2]), int(image.shape[-1]))
        corners, keep = self._visible(size, target, scale, offset)
        if not keep.any():
            return None
        truth = InstanceData(
            bboxes=torch.from_numpy(corners[keep]).float(),
            labels=torch.from_numpy(target.labels[keep]).long(),
        )
        if self.with_mask:
            total = (target.scale[0] * scale[0], target.scale[1] * scale[1])
            masks = warp_masks(target.bitmaps(keep), total, offset, size)
            truth.masks = BitmapMasks(masks.astype(np.uint8), *size)
        (sample,) = self.new_samples(image)
        sample.gt_instances = truth.to(image.device)
        return sample

    def _visible(
        self, size: tuple[int, int], target: Objects, scale: tuple[float, float], offset: tuple[float, float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Corners (N, 4) of the objects where the pixels are now, and which of them (N,) can be found there."""
        corners = target.corners() * np.array([scale[1], scale[0]] * 2) + np.array([offset[1], offset[0]] * 2)
        corners = corners.clip(0, np.array([size[1], size[0]] * 2))
        keep = ~target.skipped() & (corners[:, 2] - corners[:, 0] >= 1) & (corners[:, 3] - corners[:, 1] >= 1)
        return corners, keep

    def _dense(
        self,
        image: Tensor,
        target: Objects,
        kind: str,
        scale: tuple[float, float],
        offset: tuple[float, float],
    ) -> Tensor:
        """A kind of `_DENSE` of one image."""
        if kind != "swap":
            of = objectness if kind == "objectness" else emptiness
            return of(candidates(self.network, *self.collate(image, self.new_samples(image))))
        if target.true_labels is None:
            raise GridError(
                "loss 'swap' needs wrong labels besides the true ones: give the attack a target rule"
            )
        corners, keep = self._visible((int(image.shape[-2]), int(image.shape[-1])), target, scale, offset)
        if not keep.any():
            return image.sum() * 0.0
        found = candidates(self.network, *self.collate(image, self.new_samples(image)), nms=_NMS)
        boxes = torch.from_numpy(corners[keep]).to(found.boxes)
        true, wrong = (torch.from_numpy(labels[keep]).long().to(image.device)
                       for labels in (target.true_labels, target.labels))  # fmt: skip
        return swap_margin(found, boxes, true, wrong, _OVERLAP)

    def _pad_masks(self, sample: Any) -> None:
        if self.with_mask and getattr(self.network.data_preprocessor, "pad_mask", False):
            masks = sample.gt_instances.masks
            sample.gt_instances.masks = masks.pad(sample.batch_input_shape, pad_val=0)

    def _sum(self, losses: dict[str, Any], kind: str) -> Tensor:
        wanted = _KINDS[kind]
        terms = [
            term.sum()
            for name, value in losses.items()
            if loss_group(name) in wanted
            for term in _terms(value)
        ]
        if not terms:
            raise NotApplicable(f"this detector has no '{kind}' loss")
        return torch.stack(terms).sum()

    # -- features -----------------------------------------------------------------------------------------------
    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """The maps that class features are cropped from, each (B, C, H, W), differentiable to the pixels.

        Of a detector with regions, all maps of its neck; of a single-stage one, the backbone's last map, as Xu et al.
        2020 (appendix A.1) and their code have it for SSD.
        """
        groups = []
        for group in images.split(self.micro_batch or default_size(images.device)):
            inputs = self.preprocess(group, self.new_samples(group))
            if hasattr(self.network, "roi_head"):
                groups.append(list(self.network.extract_feat(inputs)))
            else:
                groups.append([self.network.backbone(inputs)[-1]])
        return [torch.cat(level).float() for level in zip(*groups, strict=True)]

    def class_features(
        self, images: Tensor, targets: Sequence[Objects], maps: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One feature vector with its class for every object that a loss would look at, image by image.

        Of a detector with regions: its RoI features of the ground-truth box, averaged over the box. Of a single-stage
        one: the mean of the backbone's last map over the cells that the box touches (Xu et al. crop it, A.1; their
        code leaves out cells at the lower and right edge).

        Args:
            images: (B, 3, H, W) in [0,1].
            targets: ground truth in their coordinates.
            maps: `feature_maps` of the images, where they are known already.

        Returns:
            Features (N, C), differentiable to the pixels, and labels (N,), int64, on their device.
        """
        levels = list(maps) if maps is not None else self.feature_maps(images)
        size = (int(images.shape[-2]), int(images.shape[-1]))
        shape = self.preprocess(images[:1].detach(), self.new_samples(images[:1])).shape[-2:]
        boxes, labels = [], []
        for index, target in enumerate(targets):
            corners, keep = self._visible(size, target, (1.0, 1.0), (0.0, 0.0))
            own = torch.from_numpy(corners[keep]).to(levels[0])
            boxes.append(torch.cat([own.new_full((len(own), 1), index), own], 1))
            labels.append(torch.from_numpy(target.labels[keep]).long())
        rois = torch.cat(boxes)
        roi_head: Any = getattr(self.network, "roi_head", None)
        if roi_head is None:
            features = _cropped(levels[-1], rois, (int(shape[0]), int(shape[1])))
        elif len(rois):
            extractors = roi_head.bbox_roi_extractor
            extractor: Any = extractors[0] if isinstance(extractors, nn.ModuleList) else extractors
            features = extractor(tuple(levels[: extractor.num_inputs]), rois).mean((2, 3))
        else:
            features = levels[0].new_zeros(0, levels[0].shape[1])
        return features, torch.cat(labels).to(features.device)

    # -- prediction ---------------------------------------------------------------------------------------------
    def predict(self, images: Tensor, *, geometry: Geometry | None = None) -> list[Detections]:
        """Detections in each image, in the coordinates of the prepared image: `geometry` is undone."""
        found = []
        with torch.no_grad():
            for index in range(len(images)):
                image = images[index : index + 1]
                inputs, samples = self.collate(image, self.new_samples(image))
                with class_probabilities(self.network) as seen:
                    (result,) = self.network.predict(inputs, samples, rescale=True)
                size = (int(image.shape[-2]), int(image.shape[-1])) if geometry is None else geometry.in_size
                found.append(self._detections(result.pred_instances, seen, size, *moved(geometry, index)))
        return found

    def _detections(
        self,
        result: Any,
        seen: Sequence[Tensor],
        size: tuple[int, int],
        scale: tuple[float, float],
        offset: tuple[float, float],
    ) -> Detections:
        boxes = result.bboxes.detach().float().cpu()
        if scale != (1.0, 1.0) or offset != (0.0, 0.0):
            boxes = (boxes - torch.tensor([offset[1], offset[0]] * 2)) / torch.tensor(
                [scale[1], scale[0]] * 2
            )
        limit = torch.tensor([size[1], size[0]] * 2, dtype=torch.float32)
        boxes = torch.minimum(boxes.clamp(min=0), limit)
        masks = None
        if self.with_mask:
            back = (1.0 / scale[0], 1.0 / scale[1])
            shift = (-offset[0] / scale[0], -offset[1] / scale[1])
            bitmaps = result.masks.detach().cpu().numpy().astype(bool)
            masks = torch.from_numpy(np.ascontiguousarray(warp_masks(bitmaps, back, shift, size)))
        scores, labels = result.scores.detach(), result.labels.detach()
        of_class = None
        if seen:
            # Suppression drops the other scores of what it keeps; the candidate with the same score has them.
            of_class = seen[-1][(seen[-1][:, labels] - scores).abs().argmin(0)].float().cpu()
        return Detections(boxes, scores.float().cpu(), labels.long().cpu(), masks, of_class)


def _cropped(features: Tensor, rois: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean (N, C) of a map (B, C, h, w) of images of `size` over the cells that each box touches.

    Args:
        rois: (N, 5): image, x1, y1, x2, y2 in pixels.
    """
    height, width = int(features.shape[2]), int(features.shape[3])
    rows = []
    for image, x1, y1, x2, y2 in rois.tolist():
        top, left = int(y1 * height / size[0]), int(x1 * width / size[1])
        bottom, right = math.ceil(y2 * height / size[0]), math.ceil(x2 * width / size[1])
        rows.append(features[int(image), :, top:bottom, left:right].mean((1, 2)))
    return torch.stack(rows) if rows else features.new_zeros(0, features.shape[1])


# -- sources ------------------------------------------------------------------------------------------------------
def _num_classes(network: Any) -> int:
    owners = [
        getattr(getattr(network, "roi_head", None), "bbox_head", None),
        getattr(network, "bbox_head", None),
    ]
    for owner in owners:
        head: Any = owner[-1] if isinstance(owner, nn.ModuleList) else owner  # cascades hold one head a stage
        if head is not None and hasattr(head, "num_classes"):
            return int(head.num_classes)
    raise GridError(f"{type(network).__name__} has no box head with a number of classes")


class _Source(OpenMMLabSource):
    package: ClassVar[Package] = "mmdet"
    adapter: ClassVar[type[OpenMMLabModel]] = Detector
    task = "detection"

    def classes(self, network: nn.Module) -> int:
        """Number of classes of the box head."""
        return _num_classes(network)


@MODELS.register_module(name="mmdet")
class MMDetection(_Source):
    """Any MMDetection config with its checkpoint.

    Args:
        config: path of a config file, or the name of one packaged in mmdet (`mask-rcnn_r50_fpn_1x_coco`).
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


class _Mini(MiniSource, _Source):
    """A detector of the mini zoo."""

    folder: ClassVar[Path] = Path(__file__).parent / "configs"


@MODELS.register_module(name="mini_ssd")
class MiniSSD(_Mini):
    """Narrow SSD for 96x96 scenes of digits, trained on the embedded data."""

    zoo_name: ClassVar[str] = "mini_ssd"


@MODELS.register_module(name="mini_ssd_mtd")
class MiniSSDMTD(MiniSSD):
    """`mini_ssd` after adversarial training on both task losses (MTD, Zhang and Wang 2019)."""

    zoo_name: ClassVar[str] = "mini_ssd_mtd"


@MODELS.register_module(name="mini_mask_rcnn")
class MiniMaskRCNN(_Mini):
    """Narrow Mask R-CNN for 96x96 scenes of digits, trained on the embedded data."""

    zoo_name: ClassVar[str] = "mini_mask_rcnn"
