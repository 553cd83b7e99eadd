"""On-the-fly training scenes as an mmdet dataset."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mmdet.registry import DATASETS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData
from torch.utils.data import Dataset

from tasks.mini import data


@DATASETS.register_module()
class MiniDetectionStream(Dataset[dict[str, Any]]):
    """``length`` scenes in a fixed order, packed as mmdet's models want them (uint8 BGR, ``DetDataSample``).

    Args:
        split: ``train``, ``val`` or ``test``.
        length: number of scenes.
        contrast: final contrast of the digits in 1/255.
        seed: seed of the scenes.
        easy_share: part of the stream over which the contrast falls to its final value; 0 for none.
    """

    METAINFO = {"classes": data.CLASSES}

    def __init__(
        self, split: str, length: int, contrast: int, seed: int = 0, easy_share: float = 0.0
    ) -> None:
        self.split, self.length, self.contrast, self.seed, self.easy_share = (
            split,
            length,
            contrast,
            seed,
            easy_share,
        )
        self.metainfo = dict(self.METAINFO)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        contrast = data.curriculum_contrast(index, self.length, self.contrast, self.easy_share)
        scene = data.scene(self.split, index, seed=self.seed, contrast=contrast)
        size = scene.image.shape[:2]
        sample = DetDataSample(metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)})
        sample.gt_instances = InstanceData(
            bboxes=torch.from_numpy(scene.boxes),
            labels=torch.from_numpy(scene.labels),
            masks=BitmapMasks(scene.masks.astype(np.uint8), *size),
        )
        image = torch.from_numpy(np.ascontiguousarray(scene.image[:, :, ::-1].transpose(2, 0, 1)))
        return {"inputs": image, "data_samples": sample}
