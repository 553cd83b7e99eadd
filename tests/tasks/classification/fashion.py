"""A small Fashion-MNIST in the published idx format."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write_fashion(root: Path, *, train: int = 0, test: int = 5) -> dict[str, tuple[NDArray, NDArray]]:
    """Random images and labels under `root`; what each written split holds, by its prefix (train, t10k).

    Args:
        root: the data root.
        train, test: images of each split; 0 = no files.
    """
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    held = {}
    for prefix, count in (("train", train), ("t10k", test)):
        if not count:
            continue
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 0x803, count, 28, 28) + images.tobytes()
        )
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())
        held[prefix] = images, labels
    return held
