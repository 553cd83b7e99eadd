"""Classification datasets: tiny trees in the published layouts, and what a missing or broken one says."""

import hashlib
import pickle
import struct

import numpy as np
import pytest
import torchvision
from PIL import Image
from scipy.io import savemat

from bench.errors import DataError
from bench.registry import DATASETS

RNG = np.random.default_rng(0)


def pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


# -- CIFAR ----------------------------------------------------------------------------------------------------------
def write_cifar(tmp_path, monkeypatch, reader, key, meta_key, names):
    """Batches as published (one row of 3072 bytes an image), with their MD5 entered as the published ones."""
    folder = tmp_path / reader.base_folder
    folder.mkdir()
    truth = {}
    for listed in ("train_list", "test_list"):
        entries = []
        for name, _ in getattr(reader, listed):
            data, labels = pixels(3, 3072), [int(v) for v in RNG.integers(0, len(names), 3)]
            content = pickle.dumps({"data": data, key: labels, "batch_label": name}, protocol=2)
            (folder / name).write_bytes(content)
            entries.append([name, hashlib.md5(content).hexdigest()])
            truth[name] = (data, labels)
        monkeypatch.setattr(reader, listed, entries)
    content = pickle.dumps({meta_key: names}, protocol=2)
    (folder / reader.meta["filename"]).write_bytes(content)
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": hashlib.md5(content).hexdigest()})
    return folder, truth


@pytest.mark.parametrize(
    ("name", "reader", "key", "meta_key", "split", "batch"),
    [
        ("cifar10", torchvision.datasets.CIFAR10, "labels", "label_names", "test", "test_batch"),
        ("cifar10", torchvision.datasets.CIFAR10, "labels", "label_names", "train", "data_batch_1"),
        ("cifar100", torchvision.datasets.CIFAR100, "fine_labels", "fine_label_names", "test", "test"),
    ],
)
def test_cifar(tmp_path, monkeypatch, name, reader, key, meta_key, split, batch):
    names = list(DATASETS.create(name).classes)
    folder, truth = write_cifar(tmp_path, monkeypatch, reader, key, meta_key, names)
    dataset = DATASETS.create(name, {"root": str(tmp_path), "split": split})
    assert dataset.task == "classification"
    data, labels = truth[batch]
    assert len(dataset) == 3 * (5 if split == "train" else 1) and dataset.ids()[0] == "0"
    sample = dataset[1]
    assert sample.target == labels[1]
    assert (sample.image * 255).round().byte().flatten().tolist() == data[
        1
    ].tolist()  # red, green, blue planes
    before = dataset.fingerprint()
    # The folder itself may be named, and where it lies does not matter.
    elsewhere = tmp_path / "moved"
    elsewhere.mkdir()
    folder.rename(elsewhere / folder.name)
    for root in (elsewhere, elsewhere / folder.name):
        assert DATASETS.create(name, {"root": str(root), "split": split}).fingerprint() == before


def test_changed_cifar_is_refused_unopened(tmp_path, monkeypatch):
    names = list(DATASETS.create("cifar10").classes)
    folder, _ = write_cifar(
        tmp_path, monkeypatch, torchvision.datasets.CIFAR10, "labels", "label_names", names
    )
    # A pickle that would run code: the checksum must stop it before it is opened.
    (folder / "test_batch").write_bytes(b"cbuiltins\nexec\n(S'raise SystemExit'\ntR.")
    dataset = DATASETS.create("cifar10", {"root": str(tmp_path)})
    with pytest.raises(DataError, match="not as published") as error:
        len(dataset)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "fashion_mnist", "imagenet", "nips2017"])
def test_missing_root_is_one_line_with_the_path(tmp_path, name):
    dataset = DATASETS.create(name, {"root": str(tmp_path / "none")})
    for touch in (len, lambda d: d[0], lambda d: d.fingerprint()):
        with pytest.raises(DataError) as error:
            touch(dataset)
        assert str(tmp_path / "none") in str(error.value) and "\n" not in str(error.value)
        assert "mini" in str(error.value)


def test_root_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_DATA", str(tmp_path))
    (tmp_path / "svhn").mkdir()
    write_svhn(tmp_path / "svhn" / "test_32x32.mat", monkeypatch)
    assert len(DATASETS.create("svhn")) == 4


# -- SVHN -----------------------------------------------------------------------------------------------------------
def write_svhn(path, monkeypatch):
    images, labels = pixels(32, 32, 3, 4), np.array([[1], [10], [9], [10]], dtype=np.uint8)
    savemat(path, {"X": images, "y": labels})
    split = path.name.removesuffix("_32x32.mat")
    listed = {**torchvision.datasets.SVHN.split_list}
    listed[split] = [*listed[split][:2], hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", listed)
    return images


def test_svhn(tmp_path, monkeypatch):
    images = write_svhn(tmp_path / "test_32x32.mat", monkeypatch)
    dataset = DATASETS.create("svhn", {"root": str(tmp_path)})
    assert [dataset[i].target for i in range(4)] == [1, 0, 9, 0]  # 10 stands for the digit 0
    assert np.array_equal((dataset[2].image * 255).round().numpy(), images[..., 2].transpose(2, 0, 1))


# -- Fashion-MNIST --------------------------------------------------------------------------------------------------
def write_fashion(root, count=5):
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = pixels(count, 28, 28), RNG.integers(0, 10, count).astype(np.uint8)
    (raw / "t10k-images-idx3-ubyte").write_bytes(
        struct.pack(">IIII", 0x803, count, 28, 28) + images.tobytes()
    )
    (raw / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())
    return raw, images, labels


def test_fashion_mnist(tmp_path):
    _, images, labels = write_fashion(tmp_path)
    dataset = DATASETS.create("fashion_mnist", {"root": str(tmp_path)})
    assert len(dataset) == 5 and [dataset[i].target for i in range(5)] == labels.tolist()
    image = (dataset[3].image * 255).round().numpy()
    assert image.shape == (3, 28, 28) and all(np.array_equal(channel, images[3]) for channel in image)


def test_truncated_fashion_mnist(tmp_path):
    raw, _, _ = write_fashion(tmp_path)
    file = raw / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=str(raw)):
        len(DATASETS.create("fashion_mnist", {"root": str(tmp_path)}))
    (raw / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte does not exist"):
        len(DATASETS.create("fashion_mnist", {"root": str(tmp_path)}))


# -- folders --------------------------------------------------------------------------------------------------------
def write_image(path, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = pixels(size[1], size[0], 3)
    Image.fromarray(array).save(path)
    return array


def test_image_folder(tmp_path):
    truth = {name: write_image(tmp_path / name) for name in ("cat/2.png", "cat/10.png", "ant/x.png")}
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    dataset = DATASETS.create("image_folder", {"root": str(tmp_path)})
    assert list(dataset.classes) == ["ant", "cat"]
    assert list(dataset.ids()) == ["ant/x.png", "cat/10.png", "cat/2.png"]
    for i, image_id in enumerate(dataset.ids()):
        sample = dataset[i]
        assert sample.id == image_id and sample.target == (0 if image_id.startswith("ant") else 1)
        assert np.array_equal((sample.image * 255).round().numpy().transpose(1, 2, 0), truth[image_id])


def test_image_folder_fingerprint_follows_content(tmp_path):
    write_image(tmp_path / "a" / "cat" / "1.png")
    first = DATASETS.create("image_folder", {"root": str(tmp_path / "a")}).fingerprint()
    (tmp_path / "a").rename(tmp_path / "b")
    assert DATASETS.create("image_folder", {"root": str(tmp_path / "b")}).fingerprint() == first
    assert DATASETS.create("image_folder", {"root": str(tmp_path / "b"), "size": 4}).fingerprint() != first
    write_image(tmp_path / "b" / "cat" / "1.png")
    assert DATASETS.create("image_folder", {"root": str(tmp_path / "b")}).fingerprint() != first


def test_image_folder_size_averages_the_central_square(tmp_path):
    array = write_image(tmp_path / "cat" / "1.png", (8, 4))
    image = DATASETS.create("image_folder", {"root": str(tmp_path), "size": 2})[0].image
    expected = array[:, 2:6].reshape(2, 2, 2, 2, 3).astype(float).mean((1, 3))
    assert (
        np.abs(image.numpy().transpose(1, 2, 0) * 255 - expected).max() <= 1
    )  # Pillow rounds after each direction


@pytest.mark.parametrize("content", [b"no image at all", b""])
def test_unreadable_image(tmp_path, content):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(content)
    dataset = DATASETS.create("image_folder", {"root": str(tmp_path)})
    with pytest.raises(DataError, match=r"image .*1\.png cannot be read"):
        dataset[0]


def test_truncated_image(tmp_path):
    write_image(tmp_path / "cat" / "1.png", (40, 40))
    path = tmp_path / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        DATASETS.create("image_folder", {"root": str(tmp_path)})[0]


def test_empty_folders(tmp_path):
    with pytest.raises(DataError, match="no class folders"):
        len(DATASETS.create("image_folder", {"root": str(tmp_path)}))
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="no images"):
        len(DATASETS.create("image_folder", {"root": str(tmp_path)}))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is not a folder"):
        len(DATASETS.create("image_folder", {"root": str(tmp_path / "file")}))


def test_imagenet_labels_do_not_depend_on_which_classes_are_there(tmp_path):
    write_image(tmp_path / "imagenet" / "val" / "n15075141" / "ILSVRC2012_val_00000001.JPEG")
    write_image(tmp_path / "imagenet" / "val" / "n01443537" / "ILSVRC2012_val_00000002.JPEG")
    dataset = DATASETS.create("imagenet", {"root": str(tmp_path)})
    assert [dataset[i].target for i in range(2)] == [1, 999]
    assert [dataset.classes[dataset[i].target] for i in range(2)] == ["goldfish", "toilet tissue"]
    (tmp_path / "imagenet" / "val" / "cats").mkdir()
    with pytest.raises(DataError, match="image_folder"):
        len(DATASETS.create("imagenet", {"root": str(tmp_path)}))


def test_nips2017(tmp_path):
    array = write_image(tmp_path / "images" / "0c7ac4a8c9dfa802.png", (299, 299))
    write_image(tmp_path / "images" / "f43fbfe8a9ea876c.png", (299, 299))
    table = tmp_path / "images.csv"
    table.write_text("ImageId,URL,TrueLabel,TargetClass\n0c7ac4a8c9dfa802,,306,779\nf43fbfe8a9ea876c,,1,79\n")
    dataset = DATASETS.create("nips2017", {"root": str(tmp_path)})
    assert list(dataset.ids()) == ["0c7ac4a8c9dfa802", "f43fbfe8a9ea876c"]
    assert [dataset[i].target for i in range(2)] == [305, 0]
    assert np.array_equal((dataset[0].image * 255).round().numpy().transpose(1, 2, 0), array)
    table.write_text("ImageId,TrueLabel\n0c7ac4a8c9dfa802,1001\n")
    with pytest.raises(DataError, match=r"images\.csv, line 2: TrueLabel is '1001'"):
        len(DATASETS.create("nips2017", {"root": str(tmp_path)}))
    table.write_text("id,label\n")
    with pytest.raises(DataError, match="no column"):
        len(DATASETS.create("nips2017", {"root": str(tmp_path)}))
    table.write_text("ImageId,TrueLabel\nmissing,5\n")
    with pytest.raises(DataError, match=r"missing\.png"):
        DATASETS.create("nips2017", {"root": str(tmp_path)})[0]
