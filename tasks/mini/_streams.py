"""On-the-fly training scenes as mmseg datasets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mmengine.structures import PixelData
from mmseg.registry import DATASETS
from mmseg.structures import SegDataSample
from torch.utils.data import Dataset

from tasks.mini import data


@DATASETS.register_module()
class MiniSceneStream(Dataset[dict[str, Any]]):
    """``length`` scenes in a fixed order, packed as mmseg's models want them (uint8 BGR, ``SegDataSample``).

    Args:
        split: ``train``, ``val`` or ``test``.
        length: number of scenes.
        seed: seed of the scenes.
        size: height and width.
        easy_share: part of the stream over which the contrast falls to its final value; 0 for none.
    """

    METAINFO = {"classes": data.SEG_CLASSES, "palette": data.SEG_PALETTE}

    def __init__(
        self, split: str, length: int, seed: int = 0, size: int = data.SCENE_SIZE, easy_share: float = 0.0
    ) -> None:
        self.split, self.length, self.seed, self.size, self.easy_share = split, length, seed, size, easy_share
        self.metainfo = dict(self.METAINFO)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        contrast = data.curriculum_contrast(index, self.length, data.SCENE_CONTRAST, self.easy_share)
        scene = data.scene(self.split, index, self.size, seed=self.seed, contrast=contrast)
        image = torch.from_numpy(np.ascontiguousarray(scene.image[:, :, ::-1].transpose(2, 0, 1)))
        sample = SegDataSample(
            gt_sem_seg=PixelData(data=torch.from_numpy(scene.label_map[None].astype(np.int64)))
        )
        size = scene.image.shape[:2]
        sample.set_metainfo(
            {"img_shape": size, "ori_shape": size, "pad_shape": size, "reduce_zero_label": False}
        )
        return {"inputs": image, "data_samples": sample}
