"""Folder trees of scenes: the stock dataset classes of mmdet and mmseg read back exactly what was drawn."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import DataError
from tasks.mini import data, layout
from tasks.mm import ops

COUNT = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trees")


@pytest.fixture(scope="module", autouse=True)
def operators() -> None:
    ops.install()


def test_mmdet_reads_the_coco_tree(root: Path) -> None:
    from mmdet.datasets import CocoDataset
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    tree = layout.write_tree(root, "coco", "val", COUNT)
    dataset = CocoDataset(
        ann_file="annotations/instances_val.json", data_root=str(tree), data_prefix={"img": "images/val/"},
        metainfo={"classes": data.CLASSES},
        pipeline=[{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True}],
    )  # fmt: skip
    assert len(dataset) == COUNT
    for index in range(COUNT):
        item, scene = dataset[index], data.scene("val", index)
        np.testing.assert_array_equal(item["img"][:, :, ::-1], scene.image)
        np.testing.assert_array_equal(item["gt_bboxes"].tensor.numpy(), scene.boxes)
        np.testing.assert_array_equal(item["gt_bboxes_labels"], scene.labels)
        np.testing.assert_array_equal(item["gt_masks"].masks.astype(bool), scene.masks)


def test_mmdet_reads_the_voc_tree(root: Path) -> None:
    from mmdet.datasets import VOCDataset
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    tree = layout.write_tree(root, "voc", "val", COUNT)
    dataset = VOCDataset(
        ann_file="ImageSets/Main/val.txt", data_root=str(tree), data_prefix={"sub_data_root": ""},
        metainfo={"classes": data.CLASSES},
        pipeline=[{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True}],
    )  # fmt: skip
    assert len(dataset) == COUNT
    for index in range(COUNT):
        item, scene = dataset[index], data.scene("val", index)
        np.testing.assert_array_equal(item["img"][:, :, ::-1], scene.image)
        np.testing.assert_array_equal(item["gt_bboxes"].tensor.numpy(), scene.boxes)
        np.testing.assert_array_equal(item["gt_bboxes_labels"], scene.labels)


@pytest.mark.parametrize("kind", ["voc", "cityscapes"])
def test_mmseg_reads_the_tree(root: Path, kind: str) -> None:
    from mmseg.datasets import CityscapesDataset, PascalVOCDataset
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    tree = layout.write_tree(root, kind, "val", COUNT)
    # These two classes accept only subsets of their own class names; labels pass through as they are.
    shared: dict[str, Any] = {
        "data_root": str(tree),
        "pipeline": [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}],
    }
    if kind == "voc":
        dataset = PascalVOCDataset(
            ann_file="ImageSets/Segmentation/val.txt",
            data_prefix={"img_path": "JPEGImages", "seg_map_path": "SegmentationClass"}, **shared,
        )  # fmt: skip
    else:
        dataset = CityscapesDataset(
            data_prefix={"img_path": "leftImg8bit/val", "seg_map_path": "gtFine/val"}, **shared
        )
    assert len(dataset) == COUNT
    for index in range(COUNT):
        item, scene = dataset[index], data.scene("val", index)
        np.testing.assert_array_equal(item["img"][:, :, ::-1], scene.image)
        np.testing.assert_array_equal(item["gt_seg_map"], scene.label_map)


@given(st.integers(0, 2**40), st.integers(1, 9), st.integers(1, 9))
def test_rle_is_the_mask(bits: int, height: int, width: int) -> None:
    from pycocotools import mask as coco

    mask = np.array([(bits >> (k % 41)) & 1 for k in range(height * width)], dtype=bool).reshape(
        height, width
    )
    runs = layout.rle(mask)
    decoded = coco.decode(coco.frPyObjects(runs, height, width))
    np.testing.assert_array_equal(decoded.astype(bool), mask)


def test_a_whole_tree_is_left_alone_and_a_damaged_one_rebuilt(tmp_path: Path) -> None:
    tree = layout.write_tree(tmp_path, "cityscapes", "test", 2)
    times = {p: p.stat().st_mtime_ns for p in tree.rglob("*") if p.is_file()}
    layout.write_tree(tmp_path, "cityscapes", "test", 2)
    assert {p: p.stat().st_mtime_ns for p in tree.rglob("*") if p.is_file()} == times

    image = next(tree.rglob("*_leftImg8bit.png"))
    whole = image.read_bytes()
    for damage in (whole[:-9], b"", None):
        if damage is None:
            image.unlink()
        else:
            image.write_bytes(damage)
        layout.write_tree(tmp_path, "cityscapes", "test", 2)
        assert image.read_bytes() == whole
    (tree / layout.MARKER).write_text("{")
    layout.write_tree(tmp_path, "cityscapes", "test", 2)
    assert image.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == [tree.name]


def test_a_killed_writer_leaves_no_tree_that_counts(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tasks.mini import data, layout\n"
        "draw = data.scene\n"
        "def scene(split, index, *a, **k):\n"
        "    if index == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return draw(split, index, *a, **k)\n"
        "data.scene = scene\n"
        "layout.write_tree(Path(sys.argv[1]), 'coco', 'test', 2)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "coco_test_2_96_0").exists()
    tree = layout.write_tree(tmp_path, "coco", "test", 2)
    assert (tree / "annotations" / "instances_test.json").is_file()


def test_other_constants_make_another_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = layout.write_tree(tmp_path, "cityscapes", "test", 1)
    before = next(tree.rglob("*_leftImg8bit.png")).read_bytes()
    monkeypatch.setattr(data, "SCENE_CONTRAST", 60)
    data.fingerprint.cache_clear()
    try:
        layout.write_tree(tmp_path, "cityscapes", "test", 1)
    finally:
        data.fingerprint.cache_clear()
    assert next(tree.rglob("*_leftImg8bit.png")).read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("coca", "test", 1), "unknown layout 'coca': did you mean 'coco'?"),
        (("coco", "tset", 1), "unknown split 'tset': did you mean 'test'?"),
        (("coco", "test", 0), "count: 0 scenes"),
    ],
)
def test_bad_arguments_get_one_line(tmp_path: Path, arguments: tuple[str, str, int], message: str) -> None:
    with pytest.raises(DataError) as error:
        layout.write_tree(tmp_path, *arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the coco tree"):
        layout.write_tree(tmp_path / "file", "coco", "test", 1)
