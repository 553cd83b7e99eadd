"""A few photographs as COCO's training images are published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

#: Name, width and height; the last is a greyscale file, of which COCO has some hundreds.
IMAGES = {
    "000000000009.jpg": (64, 48),
    "000000000025.jpg": (64, 43),
    "000000000030.jpg": (48, 64),
    "000000000034.jpg": (50, 50),
    "000000000036.jpg": (48, 60),
    "000000000042.jpg": (64, 40),
}
GREY = "000000000042.jpg"


def write_coco_images(root: Path, split: str = "train2017", enlarged: int = 1) -> list[str]:
    """Random smooth JPEGs of several shapes in `root/coco/SPLIT`; their names.

    Args:
        root: the data root.
        split: name of the folder.
        enlarged: times the sizes of `IMAGES`; 10 is COCO's own.
    """
    folder = root / "coco" / split
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, (width, height) in IMAGES.items():
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(
            (width * enlarged, height * enlarged), Image.Resampling.BICUBIC
        )
        (image.convert("L") if name == GREY else image).save(folder / name, quality=90)
    return list(IMAGES)
