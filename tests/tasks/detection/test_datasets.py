"""Detection data: the embedded scenes, COCO and VOC layouts, and files that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.errors import DataError, PluginError
from bench.registry import DATASETS
from tasks.detection.datasets import Coco, MiniScenes, Voc
from tasks.mini import data
from tasks.mini.layout import write_tree
from tasks.mini.zoo_detection import CONTRAST
from tasks.mm import ops

ops.install()


def test_mini_scenes() -> None:
    dataset = DATASETS.create("mini_scenes_det", {"count": 3})
    assert len(dataset) == 3 and dataset.ids() == ["test_000000", "test_000001", "test_000002"]
    assert dataset.params == {"split": "test", "count": 3, "contrast": None}
    for index in range(3):
        sample = dataset[index]
        scene = data.scene("test", index, contrast=CONTRAST)
        assert sample.id == dataset.ids()[index]
        assert np.array_equal((sample.image * 255).round().byte().permute(1, 2, 0).numpy(), scene.image)
        assert np.array_equal(sample.target.corners(), scene.boxes)
        masks = sample.target.bitmaps(np.ones(len(sample.target), dtype=bool))
        assert np.array_equal(masks, scene.masks)
        for box, mask in zip(sample.target.corners(), masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    with pytest.raises(IndexError):
        dataset[3]


def test_fingerprint_tells_content_apart() -> None:
    base = MiniScenes()
    assert base.fingerprint() == MiniScenes().fingerprint() == MiniScenes(contrast=CONTRAST).fingerprint()
    assert (
        len(
            {
                base.fingerprint(),
                MiniScenes(split="val").fingerprint(),
                MiniScenes(contrast=120).fingerprint(),
            }
        )
        == 3
    )


def test_wrong_parameters() -> None:
    with pytest.raises(DataError, match="count is 0"):
        DATASETS.create("mini_scenes_det", {"count": 0})
    with pytest.raises(PluginError, match="split"):
        DATASETS.create("mini_scenes_det", {"split": "tset"})


@pytest.fixture(scope="module")
def coco_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("data"), "coco", "test", 4)


@pytest.fixture(scope="module")
def voc_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("data"), "voc", "test", 4)


def test_coco_layout_holds_the_scenes(coco_tree: Path) -> None:
    dataset = Coco(root=str(coco_tree), split="test")
    scenes = MiniScenes(count=4, contrast=data.SCENE_CONTRAST)
    assert len(dataset) == 4 and tuple(dataset.classes) == data.CLASSES
    for index in range(4):
        ours, theirs = dataset[index], scenes[index]
        assert ours.id == theirs.id
        assert torch.equal(ours.image, theirs.image)
        assert np.array_equal(ours.target.boxes, theirs.target.boxes)
        assert np.array_equal(ours.target.labels, theirs.target.labels)
        every = np.ones(len(ours.target), dtype=bool)
        assert np.array_equal(ours.target.bitmaps(every), theirs.target.bitmaps(every))


def test_coco_agrees_with_mmdets_reader(coco_tree: Path) -> None:
    from mmdet.datasets import CocoDataset

    stock = CocoDataset(
        data_root=str(coco_tree), ann_file="annotations/instances_test.json", data_prefix={"img": "images/test/"},
        metainfo={"classes": data.CLASSES}, pipeline=[], test_mode=True,
    )  # fmt: skip
    dataset = Coco(root=str(coco_tree), split="test")
    for index in range(4):
        info = stock.get_data_info(index)
        sample = dataset[index]
        assert [i["bbox_label"] for i in info["instances"]] == sample.target.labels.tolist()
        assert np.allclose([i["bbox"] for i in info["instances"]], sample.target.corners())
        assert Path(info["img_path"]).stem == sample.id


def test_voc_layout_and_mmdets_reader(voc_tree: Path) -> None:
    from mmdet.datasets import XMLDataset

    dataset = Voc(root=str(voc_tree), split="test", classes=list(data.CLASSES))
    stock = XMLDataset(
        data_root=str(voc_tree), ann_file="ImageSets/Main/test.txt", data_prefix={"sub_data_root": ""},
        metainfo={"classes": data.CLASSES}, pipeline=[], test_mode=True,
    )  # fmt: skip
    scenes = MiniScenes(count=4, contrast=data.SCENE_CONTRAST)
    for index in range(4):
        sample, info = dataset[index], stock.get_data_info(index)
        assert torch.equal(sample.image, scenes[index].image)
        assert np.array_equal(sample.target.boxes, scenes[index].target.boxes)
        assert sample.target.masks is None
        assert np.allclose([i["bbox"] for i in info["instances"]], sample.target.corners())
        assert [i["bbox_label"] for i in info["instances"]] == sample.target.labels.tolist()


def test_voc_difficult_and_unknown_classes(tmp_path: Path) -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / "VOCdevkit" / "VOC2007" / folder).mkdir(parents=True)
    root = tmp_path / "VOCdevkit" / "VOC2007"
    (root / "ImageSets" / "Main" / "test.txt").write_text("000001\n")
    Image.new("RGB", (30, 20), (255, 0, 0)).save(root / "JPEGImages" / "000001.jpg", quality=100)
    item = (
        "<object><name>{}</name><difficult>{}</difficult>"
        "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>11</xmax><ymax>12</ymax></bndbox></object>"
    )
    text = "<annotation><size><width>30</width><height>20</height></size>{}</annotation>"
    (root / "Annotations" / "000001.xml").write_text(
        text.format(item.format("dog", 1) + item.format("cat", 0))
    )
    sample = Voc(root=str(tmp_path))[0]
    assert sample.target.boxes.tolist() == [[0, 1, 10, 10]] * 2
    assert sample.target.skipped().tolist() == [True, False]
    assert sample.image[0].mean() > 0.9 and sample.image[2].mean() < 0.1  # red is the first channel
    first = Voc(root=str(tmp_path)).fingerprint()
    (root / "Annotations" / "000001.xml").write_text(text.format(item.format("dgo", 0)))
    assert Voc(root=str(tmp_path)).fingerprint() != first
    with pytest.raises(DataError, match="unknown class 'dgo': did you mean 'dog'"):
        Voc(root=str(tmp_path))[0]
    (root / "Annotations" / "000001.xml").write_text("<annotation><size>")
    with pytest.raises(DataError, match=r"000001\.xml cannot be read"):
        Voc(root=str(tmp_path))[0]
    (root / "Annotations" / "000001.xml").unlink()
    with pytest.raises(DataError, match=r"000001\.xml"):
        Voc(root=str(tmp_path))[0]


def test_coco_polygons_crowds_and_empty_images(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (30, 20)).save(tmp_path / "val2017" / f"{name}.jpg")
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 90, "bbox": [2, 3, 10, 8], "area": 80, "iscrowd": 0,
         "segmentation": [[2, 3, 12, 3, 12, 11, 2, 11]]},
        {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 0, 30, 20], "area": 600, "iscrowd": 1,
         "segmentation": {"size": [20, 30], "counts": [0, 600]}},
    ]  # fmt: skip
    content = {
        "images": [
            {"id": i, "file_name": f"{n}.jpg", "height": 20, "width": 30} for i, n in ((7, "a"), (9, "b"))
        ],
        "annotations": annotations,
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
    }
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(content))
    dataset = Coco(root=str(tmp_path))
    assert dataset.classes == ["person", "toothbrush"] and dataset.ids() == ["a", "b"]
    target = dataset[0].target
    assert target.labels.tolist() == [1, 0] and target.skipped().tolist() == [False, True]
    masks = target.bitmaps(np.array([True, True]))
    assert masks[0, 3:11, 2:12].all() and masks[0].sum() == 80 and masks[1].all()
    assert len(dataset[1].target) == 0
    (tmp_path / "val2017" / "b.jpg").write_bytes(b"\xff\xd8 not a picture")
    with pytest.raises(DataError, match=r"b\.jpg cannot be read"):
        dataset[1]
    (tmp_path / "val2017" / "b.jpg").unlink()
    with pytest.raises(DataError, match=r"b\.jpg does not exist"):
        dataset[1]
    Image.new("RGB", (31, 20)).save(tmp_path / "val2017" / "b.jpg")
    with pytest.raises(DataError, match="31x20 pixels, its annotation says 30x20"):
        dataset[1]
    for text, part in (
        ("{", "cannot be read"),
        ("{}", "lack images, annotations, categories"),
        ("[]", "lack images"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=part):
            Coco(root=str(tmp_path)).ids()
    content["annotations"][0]["category_id"] = 5  # type: ignore[index]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="damaged: KeyError 5"):
        Coco(root=str(tmp_path)).ids()


def test_missing_data_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_DATA", str(tmp_path))
    for dataset in (Coco(), Voc()):  # constructing touches no file
        with pytest.raises(DataError, match=r"not found .*BENCH_DATA.*mini_scenes_det") as error:
            dataset.fingerprint()
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def write_voc_year(root: Path, year: str, name: str, label: str) -> Path:
    folder = root / "VOCdevkit" / f"VOC{year}"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "trainval.txt").write_text(f"{name}\n")
    Image.new("RGB", (30, 20)).save(folder / "JPEGImages" / f"{name}.jpg")
    (folder / "Annotations" / f"{name}.xml").write_text(
        f"<annotation><size><width>30</width><height>20</height></size><object><name>{label}</name><difficult>0"
        "</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>11</xmax><ymax>12</ymax></bndbox></object></annotation>"
    )
    return folder


def test_voc_years_together(tmp_path: Path) -> None:
    write_voc_year(tmp_path, "2007", "000005", "dog")
    folder = write_voc_year(tmp_path, "2012", "2008_000008", "horse")
    both = Voc(root=str(tmp_path), split="trainval", year="2007+2012")
    assert both.ids() == ["000005", "2008_000008"]
    assert [both.classes[int(both[i].target.labels[0])] for i in range(2)] == ["dog", "horse"]
    single = [Voc(root=str(tmp_path), split="trainval", year=year) for year in ("2007", "2012")]
    assert [len(d) for d in single] == [1, 1]
    assert len({d.fingerprint() for d in (both, *single)}) == 3
    # One year's own folder is not taken for the other's.
    with pytest.raises(DataError, match="VOC2007 trainval not found"):
        Voc(root=str(folder), split="trainval", year="2007+2012").ids()


def test_wrong_voc_lists_and_images(tmp_path: Path) -> None:
    folder = write_voc_year(tmp_path, "2007", "000005", "dog")
    with pytest.raises(
        DataError, match=r"VOC2007 test not found .*VOCdevkit/VOC2007/ImageSets/Main/test\.txt"
    ):
        Voc(root=str(tmp_path)).ids()
    path = folder / "JPEGImages" / "000005.jpg"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match=f"image {path} cannot be read"):
        Voc(root=str(tmp_path), split="trainval")[0]
    path.unlink()
    with pytest.raises(DataError, match=f"image {path} does not exist"):
        Voc(root=str(tmp_path), split="trainval")[0]
    names = folder / "ImageSets" / "Main" / "trainval.txt"
    for content, said in ((b"\n", "names no images"), (b"\xff\xfe\x00", "cannot be read")):
        names.write_bytes(content)
        with pytest.raises(DataError, match=f"list {names} {said}"):
            Voc(root=str(tmp_path), split="trainval").ids()
