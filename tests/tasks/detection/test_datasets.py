"""Detection data: the embedded scenes, COCO and VOC layouts, and files that are wrong."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import operator
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from bench.errors import DataError, PluginError
from bench.registry import DATASETS
from tasks.detection.datasets import Coco, MiniScenes, Voc, _runs
from tasks.mini import data
from tasks.mini.layout import write_tree
from tasks.mini.zoo_detection import CONTRAST
from tasks.mm import ops

ops.install()
from mmdet.datasets import CocoDataset, VOCDataset  # noqa: E402 - needs the operators

ROOT = Path(__file__).parents[3]


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


def test_coco_agrees_with_pycocotools(coco_tree: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        stock = COCO(str(coco_tree / "annotations" / "instances_test.json"))
    dataset = Coco(root=str(coco_tree), split="test")
    for sample, (number, image) in zip(dataset, stock.imgs.items(), strict=True):
        items = stock.imgToAnns[number]
        assert sample.id == Path(image["file_name"]).stem
        assert [dataset.classes[k] for k in sample.target.labels] == [
            stock.cats[item["category_id"]]["name"] for item in items
        ]
        assert sample.target.boxes.tolist() == [item["bbox"] for item in items]
        masks = sample.target.bitmaps(np.ones(len(items), dtype=bool))
        assert all(np.array_equal(m, stock.annToMask(item)) for m, item in zip(masks, items, strict=True))


def test_voc_layout_holds_the_scenes_and_what_its_files_say(voc_tree: Path) -> None:
    dataset = Voc(root=str(voc_tree), split="test", classes=list(data.CLASSES))
    scenes = MiniScenes(count=4, contrast=data.SCENE_CONTRAST)
    for sample, scene in zip(dataset, scenes, strict=True):
        assert torch.equal(sample.image, scene.image)
        assert np.array_equal(sample.target.boxes, scene.target.boxes)
        assert sample.target.masks is None
        text = (voc_tree / "Annotations" / f"{sample.id}.xml").read_text()
        edges = [
            [int(v) - 1 for v in re.findall(rf"<{k}>(\d+)<", text)] for k in ("xmin", "ymin", "xmax", "ymax")
        ]
        assert sample.target.corners().T.tolist() == edges
        assert [data.CLASSES[k] for k in sample.target.labels] == re.findall(r"<name>(\w+)<", text)


@pytest.mark.parametrize("layout", ["coco", "voc"])
def test_mmdets_class_lists_and_parses(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    layout: str,
) -> None:
    """What mmdet's class says is what is read, without its prints."""
    stock: Any = {"coco": CocoDataset, "voc": VOCDataset}[layout]
    parse, asked = stock.parse_data_info, []

    def reversed_labels(self: Any, *args: Any) -> Any:
        info = parse(self, *args)
        asked.append(Path(info["img_path"]).stem)
        for item in info["instances"]:
            item["bbox_label"] = len(data.CLASSES) - 1 - item["bbox_label"]
        return info

    root = str(request.getfixturevalue(f"{layout}_tree"))
    arguments = {"root": root, "split": "test"} | ({"classes": list(data.CLASSES)} if layout == "voc" else {})
    plain = [sample.target.labels for sample in DATASETS.create(layout, arguments)]
    monkeypatch.setattr(stock, "parse_data_info", reversed_labels)
    dataset = DATASETS.create(layout, arguments)
    for sample, labels in zip(dataset, plain, strict=True):
        assert sample.target.labels.tolist() == (len(data.CLASSES) - 1 - labels).tolist()
    assert asked == dataset.ids()
    assert capsys.readouterr() == ("", "")


def test_mmdet_is_not_imported_before_data_are_read(tmp_path: Path) -> None:
    path = write_voc(tmp_path, objects="")
    code = (
        "import sys; from bench.registry import DATASETS; "
        f"d = DATASETS.create('voc', {{'root': {str(path.parents[1])!r}}}); DATASETS.create('coco', {{}}); "
        "d.fingerprint(); assert 'mmdet' not in sys.modules; "
        "d.ids(); assert 'mmdet' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


VOC_OBJECT = (
    "<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin>"
    "<xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox></object>"
)
VOC_SIZE = "<size><width>30</width><height>20</height></size>"


def voc_object(**values: object) -> str:
    """One object of VOC's annotations, where it is not said otherwise a dog of ten by ten pixels."""
    plain = {"name": "dog", "difficult": 0, "xmin": 1, "ymin": 2, "xmax": 11, "ymax": 12}
    return VOC_OBJECT.format(**plain | values)


def write_voc(
    root: Path,
    year: str = "2007",
    split: str = "test",
    name: str = "000001",
    objects: str = "",
    size: str = VOC_SIZE,
) -> Path:
    """One red picture of 30x20 pixels, as VOC lays it out; returns its annotations."""
    folder = root / "VOCdevkit" / f"VOC{year}"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{name}\n")
    Image.new("RGB", (30, 20), (255, 0, 0)).save(folder / "JPEGImages" / f"{name}.jpg", quality=100)
    path = folder / "Annotations" / f"{name}.xml"
    path.write_text(f"<annotation>{size}{objects}</annotation>")
    return path


def test_voc_difficult_objects_and_unreadable_files(tmp_path: Path) -> None:
    path = write_voc(tmp_path, objects=voc_object(difficult=1) + voc_object(name="cat"))
    sample = Voc(root=str(tmp_path))[0]
    assert sample.target.boxes.tolist() == [[0, 1, 10, 10]] * 2
    assert sample.target.skipped().tolist() == [True, False]
    assert sample.image[0].mean() > 0.9 and sample.image[2].mean() < 0.1  # red is the first channel
    first = Voc(root=str(tmp_path)).fingerprint()
    path.write_text("<annotation><size>")
    assert Voc(root=str(tmp_path)).fingerprint() != first
    with pytest.raises(DataError, match=r"000001\.xml cannot be read"):
        Voc(root=str(tmp_path))[0]
    path.unlink()
    with pytest.raises(DataError, match=r"000001\.xml"):
        Voc(root=str(tmp_path))[0]


BEYOND = "as counted from 0, expected rising values in"


@pytest.mark.parametrize(
    ("objects", "said"),
    [
        (voc_object(name="dgo"), "object[0].name: unknown class 'dgo': did you mean 'dog'"),
        (voc_object(xmin=20, xmax=10), f"object[0].bndbox: the box goes from x = 19 to 9 {BEYOND} 0..30"),
        (voc_object(ymax=900), f"object[0].bndbox: the box goes from y = 1 to 899 {BEYOND} 0..20"),
        (voc_object(xmin=-90), f"object[0].bndbox: the box goes from x = -91 to 10 {BEYOND} 0..30"),
        (voc_object() + voc_object(xmin=33, xmax=40),
         f"object[1].bndbox: the box goes from x = 32 to 39 {BEYOND} 0..30"),
        (voc_object(xmin="nan"), "object[0].bndbox.xmin: expected a finite number, not 'nan'"),
        (voc_object(ymax="inf"), "object[0].bndbox.ymax: expected a finite number, not 'inf'"),
        (voc_object(ymin="two"), "object[0].bndbox.ymin: expected a number"),
        (voc_object(difficult="maybe"), "object[0].difficult: expected a boolean"),
        (voc_object().replace("ymin>", "top>"), "object[0].bndbox.ymin: required, but missing"),
        (voc_object().replace("name>", "label>"), "object[0].name: required, but missing"),
        ("<object><name>dog</name></object>", "object[0].bndbox.xmin: required, but missing"),
    ],
)  # fmt: skip
def test_wrong_voc_objects(tmp_path: Path, objects: str, said: str) -> None:
    path = write_voc(tmp_path, objects=objects)
    with pytest.raises(DataError) as error:
        DATASETS.create("voc", {"root": str(tmp_path)}).ids()
    assert str(error.value).startswith(f"annotations {path}: {said}")


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("", "size.width: required, but missing"),
        (VOC_SIZE.replace("20", "0"), "size.height: expected a number greater than 0, not '0'"),
        (VOC_SIZE.replace("30", "wide"), "size.width: expected an integer"),
    ],
)
def test_wrong_voc_sizes(tmp_path: Path, size: str, said: str) -> None:
    path = write_voc(tmp_path, size=size)
    with pytest.raises(DataError) as error:
        DATASETS.create("voc", {"root": str(tmp_path)}).ids()
    assert str(error.value).startswith(f"annotations {path}: {said}")


def test_voc_boxes_that_published_data_have(tmp_path: Path) -> None:
    """VOC 2011 and later hold fractions; first and last pixels count; some annotations have no `difficult`."""
    edges = voc_object(xmin=1, ymin=1, xmax=30, ymax=20).replace("<difficult>0</difficult>", "")
    write_voc(tmp_path, objects=edges + voc_object(xmax="11.70000076293945") + voc_object(xmax=1))
    target = DATASETS.create("voc", {"root": str(tmp_path)})[0].target
    assert np.allclose(target.boxes, [[0, 0, 29, 19], [0, 1, 10.70000076293945, 10], [0, 1, 0, 10]])
    assert not target.skipped().any()


def test_voc_lists_and_names_as_tools_write_them(tmp_path: Path) -> None:
    """Lists of one class have a second column, lists end in blank lines, and XML may be laid out over lines."""
    part = "<part><name>head</name><bndbox><xmin>3</xmin></bndbox></part>"
    path = write_voc(
        tmp_path,
        objects=voc_object(name="\n  dog\n", difficult=" 1 ", xmin="1.25", xmax="11.7")
        + voc_object(name="cat").replace("<name>", f"{part}<name>"),
    )
    (path.parents[1] / "ImageSets" / "Main" / "test.txt").write_text("\n 000001  -1\n000001 1\n\n")
    dataset = Voc(root=str(tmp_path))
    assert dataset.ids() == ["000001"] * 2 and len(dataset) == 2
    for sample in dataset:
        assert sample.target.boxes.tolist() == [[0.25, 1, 11.7 - 1.25, 10], [0, 1, 10, 10]]
        assert [dataset.classes[k] for k in sample.target.labels] == ["dog", "cat"]
        assert sample.target.skipped().tolist() == [True, False]


@pytest.mark.parametrize(
    ("objects", "size", "value"),
    [(voc_object(difficult="yes"), VOC_SIZE, "yes"), ("", VOC_SIZE.replace("30", "30.0"), "30.0")],
)
def test_voc_numbers_that_mmdet_cannot_read(tmp_path: Path, objects: str, size: str, value: str) -> None:
    path = write_voc(tmp_path, objects=objects, size=size)
    with pytest.raises(DataError) as error:
        Voc(root=str(tmp_path)).ids()
    said = f"annotations {path} cannot be read: invalid literal for int() with base 10: '{value}'"
    assert str(error.value) == said


def coco_content() -> dict[str, Any]:
    """Two pictures of 30x20 pixels, the first with an object and a crowd."""
    return {
        "images": [
            {"id": i, "file_name": f"{n}.jpg", "height": 20, "width": 30} for i, n in ((7, "a"), (9, "b"))
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [2, 3, 10, 8], "area": 80, "iscrowd": 0,
             "segmentation": [[2, 3, 12, 3, 12, 11, 2, 11]]},
            {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 0, 30, 20], "area": 600, "iscrowd": 1,
             "segmentation": {"size": [20, 30], "counts": [0, 600]}},
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
    }  # fmt: skip


def write_coco(root: Path, content: Any) -> Path:
    """`content` and the pictures of `coco_content`, as COCO lays them out; returns the annotations."""
    for folder in ("annotations", "val2017"):
        (root / folder).mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (30, 20)).save(root / "val2017" / f"{name}.jpg")
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(content))
    return path


def test_coco_polygons_crowds_and_empty_images(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_content())
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


GONE = object()
RUNS = ("annotations", 1, "segmentation")


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("images",), GONE, "images: required, but missing"),
        (("images",), [], "images: holds no images"),
        (("images", 1, "id"), 7, "images: the id 7 is there 2 times, expected once"),
        (("images", 0, "height"), 0, "images[0].height: expected a number greater than 0, not 0"),
        (("images", 1, "file_name"), GONE, "images[1].file_name: required, but missing"),
        (("categories",), [], "categories: holds no categories"),
        (("categories", 0, "id"), GONE, "categories[0].id: required, but missing"),
        (("categories", 1, "name"), GONE, "categories[1].name: required, but missing"),
        (("categories", 1, "id"), 90, "categories: the id 90 is there 2 times, expected once"),
        (("annotations",), None, "annotations: expected an array, not None"),
        (("annotations", 1), 3, "annotations[1]: expected a mapping, not 3"),
        (("annotations", 1, "image_id"), GONE, "annotations[1].image_id: required, but missing"),
        (("annotations", 1, "image_id"), 8, "annotations[1].image_id: 8 is the id of no image in the file"),
        (("annotations", 0, "category_id"), 5, "annotations[0].category_id: 5 is the id of no category in the file"),
        (("annotations", 0, "iscrowd"), 2, "annotations[0].iscrowd: expected a boolean, "
         "unable to interpret input, not 2"),
        (("annotations", 0, "bbox"), GONE, "annotations[0].bbox: required, but missing"),
        (("annotations", 0, "bbox"), [2, 3, 10], "annotations[0].bbox[3]: required, but missing"),
        (("annotations", 0, "bbox", 1), float("nan"),
         "annotations[0].bbox[1]: expected a finite number, not nan"),
        (("annotations", 0, "bbox", 2), -4, f"annotations[0].bbox: the box goes from x = 2 to -2 {BEYOND} 0..30"),
        (("annotations", 0, "bbox", 3), 9e9, f"annotations[0].bbox: the box goes from y = 3 to 9e+09 {BEYOND} 0..20"),
        (("annotations", 0, "segmentation"), [[1, 2]], "annotations[0].segmentation: no polygon has three points or "
         "more, expected [[x1, y1, x2, y2, x3, y3, ...], ...]"),
        (("annotations", 0, "segmentation", 0, 3), None,
         "annotations[0].segmentation.polygons[0][3]: expected a number, not None"),
        (("annotations", 0, "segmentation"), "zz",
         "annotations[0].segmentation.polygons: expected an array, not 'zz'"),
        ((*RUNS, "counts"), GONE, "annotations[1].segmentation.RLE.counts: required, but missing"),
        ((*RUNS, "counts"), "zz",
         "annotations[1].segmentation.RLE.counts: not run lengths as pycocotools writes them"),
        ((*RUNS, "counts"), "hb", "annotations[1].segmentation.RLE.counts: run lengths end within a number"),
        ((*RUNS, "counts"), "b0", "annotations[1].segmentation: counts cover 18 pixels, expected the image's 600"),
        ((*RUNS, "counts"), [0, 599], "annotations[1].segmentation: counts cover 599 pixels, expected the image's 600"),
        ((*RUNS, "counts"), [5, -5, 600],
         "annotations[1].segmentation.RLE.counts[1]: expected a number greater than or equal to 0, not -5"),
        ((*RUNS, "size"), [30, 20], "annotations[1].segmentation: size is [30, 20], expected the image's [20, 30]"),
    ],
)  # fmt: skip
def test_wrong_coco_entries(tmp_path: Path, place: tuple[Any, ...], value: Any, said: str) -> None:
    content: Any = coco_content()
    *way, last = place
    entry = functools.reduce(operator.getitem, way, content)
    if value is GONE:
        del entry[last]
    else:
        entry[last] = value
    path = write_coco(tmp_path, content)
    with pytest.raises(DataError) as error:
        DATASETS.create("coco", {"root": str(tmp_path)}).ids()
    assert str(error.value) == f"annotations {path}: {said}"


@pytest.mark.parametrize("text", [b"{", b"", b"[]", b"\xff"])
def test_coco_files_that_are_none(tmp_path: Path, text: bytes) -> None:
    path = write_coco(tmp_path, {})
    path.write_bytes(text)
    with pytest.raises(DataError) as error:
        DATASETS.create("coco", {"root": str(tmp_path)}).ids()
    assert str(error.value).startswith(f"annotations {path} cannot be read: ")


def test_coco_entries_that_published_data_have(tmp_path: Path) -> None:
    """A box of no area (as in train2017), edges a little outside, a polygon of two points among others, no mask."""
    content = coco_content()
    square = content["annotations"][0]["segmentation"][0]
    for number, image, box, segmentation in (
        (3, 7, [6.65, 8.33, 1.03, 0.0], [[6.65, 8.33, 6.65, 8.33, 7.68, 8.33, 7.68, 8.33]]),
        (4, 7, [-0.01, 12.5, 30.02, 7.51], [square]),
        (5, 7, [2, 3, 10, 8], [[4, 5, 6, 7], square]),
        (6, 9, [1, 1, 2, 2], []),
    ):
        content["annotations"].append(
            {"id": number, "image_id": image, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
             "segmentation": segmentation}
        )  # fmt: skip
    path = write_coco(tmp_path, content)
    first, second = (sample.target for sample in DATASETS.create("coco", {"root": str(tmp_path)}))
    assert first.boxes.tolist() == [item["bbox"] for item in content["annotations"][:5]]
    assert first.bitmaps(np.arange(5) != 1).sum(axis=(1, 2)).tolist() == [80, 0, 80, 80]
    assert len(second) == 1 and second.masks is None
    # mmdet drops what is thinner than a pixel on reading; here losses leave it out, and COCO's evaluation counts it.
    stock = CocoDataset(
        ann_file=str(path), data_prefix={"img": str(tmp_path)}, pipeline=[], test_mode=True,
        metainfo={"classes": ("person", "toothbrush")},
    ).get_data_info(0)["instances"]  # fmt: skip
    kept = first.boxes[:, 3] >= 1
    assert kept.tolist() == [True, True, False, True, True]
    assert np.allclose([item["bbox"] for item in stock], first.corners()[kept])
    assert [item["ignore_flag"] for item in stock] == first.skipped()[kept].tolist()


def test_coco_keeps_what_mmdet_leaves_out_or_cannot_read(tmp_path: Path) -> None:
    """Objects without area or marked `ignore`, which COCO's evaluation counts; no ids, or shared; numbers as text."""
    content = coco_content()
    content["images"][1]["id"] = "9"
    content["annotations"] += [
        {"image_id": 7, "category_id": 1, "bbox": [0.1, 0.2, 0.3, 0.7]},
        {"image_id": "9", "category_id": 90, "bbox": [30, 20, 0, 0], "id": 1, "area": 0, "iscrowd": "0"},
        {"image_id": 7, "category_id": "90", "bbox": ["1", 2, 3, 4], "id": 1, "area": 12, "ignore": 1},
    ]
    write_coco(tmp_path, content)
    first, second = (sample.target for sample in Coco(root=str(tmp_path)))
    assert first.boxes.tolist() == [[2, 3, 10, 8], [0, 0, 30, 20], [0.1, 0.2, 0.3, 0.7], [1, 2, 3, 4]]
    assert first.labels.tolist() == [1, 0, 0, 1] and first.skipped().tolist() == [False, True, False, False]
    assert second.boxes.tolist() == [[30, 20, 0, 0]] and second.labels.tolist() == [1]
    assert not second.skipped().any()


@pytest.mark.parametrize("layout", ["coco", "voc"])
def test_command_stops_with_one_line(
    tmp_path: Path, bench: Callable[..., tuple[int, str, str]], layout: str
) -> None:
    if layout == "coco":
        path = write_coco(tmp_path, coco_content() | {"annotations": [{"image_id": 8}]})
    else:
        path = write_voc(tmp_path, objects=voc_object(xmin=20, xmax=10))
    role = {"dataset": {"name": layout, "root": str(tmp_path)}, "model": "mini_ssd"}
    profile, grid = tmp_path / "profile.yaml", tmp_path / "grid.yaml"
    profile.write_text(json.dumps({"name": "bad", "roles": {"ssd": role}}))
    block = {"roles": ["ssd"], "defenses": ["none"], "attacks": ["none"], "threats": ["oblivious"]}
    table = {"name": "main", "rows": ["defense"], "columns": ["attack"], "metric": "box_map50"}
    grid.write_text(
        json.dumps({"name": "bad", "profile": str(profile), "blocks": [block], "tables": [table]})
    )
    code, _, err = bench(
        "run", "--grid", str(grid), "--store", str(tmp_path / "store"), "--out", str(tmp_path / "out")
    )
    assert code == 2
    assert err.count("\n") == 1 and "Traceback" not in err and f"annotations {path}: " in err


@given(
    st.integers(1, 12).flatmap(lambda side: st.lists(st.booleans(), min_size=40 * side, max_size=40 * side))
)
def test_compressed_run_lengths_are_pycocotools_own(pixels: list[bool]) -> None:
    bitmap = np.asfortranarray(np.array(pixels, dtype=np.uint8).reshape(-1, 40))
    encoded = coco_mask.encode(bitmap)
    runs = _runs(encoded["counts"].decode())
    assert coco_mask.frPyObjects({"size": encoded["size"], "counts": runs}, *bitmap.shape) == encoded
    assert np.array_equal(np.repeat(np.arange(len(runs)) % 2, runs), bitmap.ravel(order="F"))


def test_missing_data_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_DATA", str(tmp_path))
    for dataset in (Coco(), Voc()):  # constructing touches no file
        with pytest.raises(DataError, match=r"not found .*BENCH_DATA.*mini_scenes_det") as error:
            dataset.fingerprint()
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_voc_years_together(tmp_path: Path) -> None:
    write_voc(tmp_path, "2007", "trainval", "000005", voc_object())
    path = write_voc(tmp_path, "2012", "trainval", "2008_000008", voc_object(name="horse"))
    both = Voc(root=str(tmp_path), split="trainval", year="2007+2012")
    assert both.ids() == ["000005", "2008_000008"]
    assert [both.classes[int(both[i].target.labels[0])] for i in range(2)] == ["dog", "horse"]
    single = [Voc(root=str(tmp_path), split="trainval", year=year) for year in ("2007", "2012")]
    assert [len(d) for d in single] == [1, 1]
    assert len({d.fingerprint() for d in (both, *single)}) == 3
    # One year's own folder is not taken for the other's.
    with pytest.raises(DataError, match="VOC2007 trainval not found"):
        Voc(root=str(path.parents[1]), split="trainval", year="2007+2012").ids()


def test_a_voc_year_may_be_a_number() -> None:
    text, number = (DATASETS.create("voc", {"year": year}) for year in ("2007", 2007))
    assert number.params == text.params == DATASETS.create("voc").params
    assert number.year == "2007" and number.params["year"] == "2007"
    for wrong in (True, 2007.0, [2007]):
        with pytest.raises(PluginError, match="year: expected a string"):
            DATASETS.create("voc", {"year": wrong})


def test_wrong_voc_lists_and_images(tmp_path: Path) -> None:
    folder = write_voc(tmp_path, "2007", "trainval", "000005").parents[1]
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
