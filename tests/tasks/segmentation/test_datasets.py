"""CamVid, Cityscapes and VOC: tiny trees in the published layouts, and what a missing or broken one says."""

import numpy as np
import pytest
from PIL import Image

from bench.errors import DataError
from bench.registry import DATASETS

RNG = np.random.default_rng(0)


def save(path, array, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette:
        image = image.convert("P") if array.ndim == 3 else Image.fromarray(array, mode="P")
        image.putpalette([v for k in range(256) for v in (k * 7 % 256, k * 13 % 256, k * 29 % 256)])
    image.save(path)


def cityscapes(root, suffix="labelTrainIds", high=19):
    truth = {}
    for city, name in (("bonn", "bonn_000001_000019"), ("aachen", "aachen_000000_000019")):
        pixels = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        labels = RNG.integers(0, high, (6, 8)).astype(np.uint8)
        labels[0, 0] = 255 if suffix == "labelTrainIds" else 0
        save(root / "leftImg8bit" / "val" / city / f"{name}_leftImg8bit.png", pixels)
        save(root / "gtFine" / "val" / city / f"{name}_gtFine_{suffix}.png", labels)
        truth[f"{name}_leftImg8bit"] = (pixels, labels)
    return truth


def test_cityscapes(tmp_path):
    truth = cityscapes(tmp_path / "cityscapes")
    dataset = DATASETS.create("cityscapes", {"root": str(tmp_path)})
    assert dataset.task == "segmentation" and len(dataset) == 2 and sorted(dataset.ids()) == sorted(truth)
    assert len(dataset.classes) == 19 and dataset.classes[0] == "road"
    for i, image_id in enumerate(dataset.ids()):
        sample = dataset[i]
        pixels, labels = truth[image_id]
        assert np.array_equal((sample.image * 255).round().numpy().transpose(1, 2, 0), pixels)
        assert np.array_equal(sample.target.numpy(), labels) and sample.target.dtype.is_signed
    before = dataset.fingerprint()
    (tmp_path / "cityscapes").rename(tmp_path / "moved")
    again = DATASETS.create("cityscapes", {"root": str(tmp_path / "moved")})
    assert again.fingerprint() == before
    cityscapes(tmp_path / "moved")
    assert DATASETS.create("cityscapes", {"root": str(tmp_path / "moved")}).fingerprint() != before


def test_cityscapes_as_published_is_translated(tmp_path):
    truth = cityscapes(tmp_path, "labelIds", 34)
    dataset = DATASETS.create("cityscapes", {"root": str(tmp_path)})
    sample = dataset[0]
    ids = truth[sample.id][1]
    # The evaluated classes among the 34 ids, by Cityscapes' own table.
    table = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
             27: 14, 28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip
    assert np.array_equal(sample.target.numpy(), np.vectorize(lambda k: table.get(k, 255))(ids))


def voc(root, names=("2007_000033", "2007_000042"), size=(5, 7)):
    folder = root / "VOCdevkit" / "VOC2012"
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("\n".join(names) + "\n")
    truth = {}
    for name in names:
        labels = RNG.choice([0, 1, 20, 255], size).astype(np.uint8)
        save(folder / "JPEGImages" / f"{name}.jpg", RNG.integers(0, 256, (*size, 3), dtype=np.uint8))
        save(folder / "SegmentationClass" / f"{name}.png", labels, palette=True)
        truth[name] = labels
    return folder, truth


def test_voc2012(tmp_path):
    _, truth = voc(tmp_path)
    dataset = DATASETS.create("voc2012", {"root": str(tmp_path)})
    assert list(dataset.ids()) == list(truth) and len(dataset.classes) == 21
    for i, name in enumerate(truth):
        sample = dataset[i]
        assert np.array_equal(sample.target.numpy(), truth[name])  # palette indices, not colours
        assert sample.image.shape == (3, 5, 7)


@pytest.mark.parametrize("name", ["camvid", "cityscapes", "voc2012"])
def test_missing_root_is_one_line_with_the_path(tmp_path, name):
    dataset = DATASETS.create(name, {"root": str(tmp_path / "none")})
    for touch in (len, lambda d: d[0], lambda d: d.fingerprint(), lambda d: d.ids()):
        with pytest.raises(DataError) as error:
            touch(dataset)
        assert str(tmp_path / "none") in str(error.value) and "\n" not in str(error.value)
        assert "mini_scenes_seg" in str(error.value)


def test_missing_parts(tmp_path):
    folder, _ = voc(tmp_path)
    (folder / "SegmentationClass" / "2007_000033.png").unlink()
    with pytest.raises(DataError, match=r"label map .*2007_000033\.png does not exist"):
        DATASETS.create("voc2012", {"root": str(tmp_path)})[0]
    with pytest.raises(DataError, match=r"Segmentation/test\.txt does not exist"):
        len(DATASETS.create("voc2012", {"root": str(tmp_path), "split": "test"}))
    cityscapes(tmp_path / "c")
    (tmp_path / "c" / "gtFine").rename(tmp_path / "c" / "gtCoarse")
    with pytest.raises(DataError, match="gtFine/val does not exist"):
        len(DATASETS.create("cityscapes", {"root": str(tmp_path / "c")}))


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_broken_label_map(tmp_path, content):
    folder, _ = voc(tmp_path)
    (folder / "SegmentationClass" / "2007_000033.png").write_bytes(content)
    with pytest.raises(DataError, match=r"label map .*2007_000033\.png cannot be read"):
        DATASETS.create("voc2012", {"root": str(tmp_path)})[0]


def test_label_map_of_another_kind_or_size(tmp_path):
    folder, _ = voc(tmp_path)
    path = folder / "SegmentationClass" / "2007_000033.png"
    save(path, RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    with pytest.raises(DataError, match="mode RGB"):
        DATASETS.create("voc2012", {"root": str(tmp_path)})[0]
    save(path, np.zeros((5, 8), dtype=np.uint8))
    with pytest.raises(DataError, match="8x5 pixels, its image 7x5"):
        DATASETS.create("voc2012", {"root": str(tmp_path)})[0]


def camvid(root, names=("0001TP_006690", "0001TP_006720"), split="test"):
    truth = {}
    for name in names:
        pixels = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        labels = RNG.permutation(np.arange(48) % 12).reshape(6, 8).astype(np.uint8)
        save(root / "CamVid" / split / f"{name}.png", pixels)
        save(root / "CamVid" / f"{split}annot" / f"{name}.png", labels)
        truth[name] = (pixels, labels)
    return truth


@pytest.mark.parametrize("split", ["test", "val", "train"])
def test_camvid(tmp_path, split):
    truth = camvid(tmp_path, split=split)
    for root in (tmp_path, tmp_path / "CamVid"):
        dataset = DATASETS.create("camvid", {"root": str(root), "split": split})
        assert list(dataset.ids()) == list(truth) and len(dataset.classes) == 11
        for i, (pixels, labels) in enumerate(truth.values()):
            sample = dataset[i]
            assert np.array_equal((sample.image * 255).round().numpy().transpose(1, 2, 0), pixels)
            assert np.array_equal(sample.target.numpy(), np.where(labels == 11, 255, labels))  # void


def test_wrong_camvid(tmp_path):
    camvid(tmp_path)
    folder = tmp_path / "CamVid"
    with pytest.raises(DataError, match=f"{folder}/val does not exist|{tmp_path}/val does not exist"):
        len(DATASETS.create("camvid", {"root": str(tmp_path), "split": "val"}))
    path = folder / "testannot" / "0001TP_006690.png"
    save(path, np.full((6, 8), 12, dtype=np.uint8))
    with pytest.raises(DataError, match=f"{path} holds label 12, expected 0 to 10, or 255"):
        DATASETS.create("camvid", {"root": str(tmp_path)})[0]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=f"label map {path} cannot be read"):
        DATASETS.create("camvid", {"root": str(tmp_path)})[0]
    path.unlink()
    with pytest.raises(DataError, match=f"label map {path} does not exist"):
        DATASETS.create("camvid", {"root": str(tmp_path)})[0]
    (folder / "test" / "0001TP_006720.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"image .*0001TP_006720\.png cannot be read"):
        DATASETS.create("camvid", {"root": str(tmp_path)})[1]
    (folder / "testannot").rename(folder / "annotations")
    with pytest.raises(DataError, match=f"{folder}/testannot does not exist"):
        len(DATASETS.create("camvid", {"root": str(tmp_path)}))


def test_wrong_labels_name_the_file(tmp_path):
    folder, _ = voc(tmp_path)
    path = folder / "SegmentationClass" / "2007_000033.png"
    save(path, np.full((5, 7), 21, dtype=np.uint8), palette=True)
    with pytest.raises(DataError, match=f"{path} holds label 21, expected 0 to 20, or 255 where ignored"):
        DATASETS.create("voc2012", {"root": str(tmp_path)})[0]
    cityscapes(tmp_path / "c")
    path = next((tmp_path / "c" / "gtFine").rglob("aachen*labelTrainIds.png"))
    save(path, np.full((6, 8), 19, dtype=np.uint8))
    with pytest.raises(DataError, match=f"{path} holds label 19"):
        DATASETS.create("cityscapes", {"root": str(tmp_path / "c")})[0]
