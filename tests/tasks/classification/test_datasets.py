"""Classification datasets: tiny trees in the published layouts, and what a missing or broken one says."""

import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat

from bench.errors import DataError, PluginError
from bench.registry import DATASETS
from tests.tasks.classification.coco import GREY, write_coco_images
from tests.tasks.classification.fashion import write_fashion

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
    with pytest.raises(DataError, match=f"cifar10: {folder}/test_batch is not as published"):
        len(dataset)


def test_the_damaged_file_of_cifar_is_named(tmp_path, monkeypatch):
    names = list(DATASETS.create("cifar10").classes)
    folder, _ = write_cifar(
        tmp_path, monkeypatch, torchvision.datasets.CIFAR10, "labels", "label_names", names
    )

    def refused(message, split="test"):
        with pytest.raises(DataError, match=message):
            len(DATASETS.create("cifar10", {"root": str(tmp_path), "split": split}))

    # The reader wants the batches of both splits; those of the split come first.
    (folder / "batches.meta").write_bytes(b"")
    refused(f"cifar10: {folder}/batches.meta is not as published")
    (folder / "data_batch_3").write_bytes(b"")
    refused(f"cifar10: {folder}/data_batch_3 is not as published")
    (folder / "test_batch").write_bytes(b"")
    refused(f"cifar10: {folder}/test_batch is not as published")
    refused(f"cifar10: {folder}/data_batch_3 is not as published", "train")
    (folder / "data_batch_2").unlink()
    refused(f"{folder}/data_batch_2 does not exist; the extracted cifar-10", "train")


@pytest.mark.parametrize(
    ("name", "reader", "key", "meta_key", "high"),
    [
        ("cifar10", torchvision.datasets.CIFAR10, "labels", "label_names", 10),
        ("cifar100", torchvision.datasets.CIFAR100, "fine_labels", "fine_label_names", 100),
    ],
)
def test_wrong_cifar(tmp_path, monkeypatch, name, reader, key, meta_key, high):
    names = list(DATASETS.create(name).classes)
    folder, _ = write_cifar(tmp_path, monkeypatch, reader, key, meta_key, [*names, "another"])
    test = reader.test_list[0][0]
    content = pickle.dumps({"data": pixels(2, 3072), key: [0, high]}, protocol=2)
    (folder / test).write_bytes(content)
    monkeypatch.setattr(reader, "test_list", [[test, hashlib.md5(content).hexdigest()]])
    with pytest.raises(DataError, match=f"{folder}/{test} holds labels outside 0..{high - 1}"):
        len(DATASETS.create(name, {"root": str(tmp_path)}))
    (folder / test).unlink()
    with pytest.raises(DataError, match=f"{folder}/{test} does not exist"):
        len(DATASETS.create(name, {"root": str(tmp_path)}))


@pytest.mark.parametrize(
    "name",
    ["cifar10", "cifar100", "svhn", "fashion_mnist", "imagenet", "imagenet64", "tiny_imagenet", "nips2017"],
)
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
def write_svhn(path, monkeypatch, labels=(1, 10, 9, 10)):
    images = pixels(32, 32, 3, 4)
    savemat(path, {"X": images, "y": np.array(labels, dtype=np.uint8)[:, None]})
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


def test_wrong_svhn(tmp_path, monkeypatch):
    path = tmp_path / "test_32x32.mat"
    write_svhn(path, monkeypatch)
    with pytest.raises(DataError, match=f"{tmp_path}/train_32x32.mat does not exist"):
        len(DATASETS.create("svhn", {"root": str(tmp_path), "split": "train"}))
    write_svhn(path, monkeypatch, labels=(1, 11, 3, 4))
    with pytest.raises(DataError, match=f"{path} holds labels outside 0..9"):
        len(DATASETS.create("svhn", {"root": str(tmp_path)}))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"svhn: {path} is not as published"):
        len(DATASETS.create("svhn", {"root": str(tmp_path)}))


# -- Fashion-MNIST --------------------------------------------------------------------------------------------------
def test_fashion_mnist(tmp_path):
    images, labels = write_fashion(tmp_path)["t10k"]
    dataset = DATASETS.create("fashion_mnist", {"root": str(tmp_path)})
    assert len(dataset) == 5 and [dataset[i].target for i in range(5)] == labels.tolist()
    image = (dataset[3].image * 255).round().numpy()
    assert image.shape == (3, 28, 28) and all(np.array_equal(channel, images[3]) for channel in image)


def test_truncated_fashion_mnist(tmp_path):
    write_fashion(tmp_path)
    raw = tmp_path / "FashionMNIST" / "raw"
    file = raw / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"{file} is damaged: it holds 3836 bytes, its head says 3936"):
        len(DATASETS.create("fashion_mnist", {"root": str(tmp_path)}))
    (raw / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte does not exist"):
        len(DATASETS.create("fashion_mnist", {"root": str(tmp_path)}))


@pytest.mark.parametrize(
    ("name", "dimensions"),
    [("t10k-images-idx3-ubyte", "3 dimensions"), ("t10k-labels-idx1-ubyte", "1 dimension")],
)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty, expected an idx file"),
        (b"no idx file, whatever its name", "is no idx file of bytes in {}$"),
        (struct.pack(">II", 0x802, 5), "is no idx file of bytes in {}$"),
        (b"\0\0\x08", "is no idx file of bytes in {}$"),
    ],
)
def test_what_is_no_idx_file_is_named(tmp_path, name, dimensions, content, said):
    write_fashion(tmp_path)
    file = tmp_path / "FashionMNIST" / "raw" / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"fashion_mnist: {file} {said.format(dimensions)}"):
        len(DATASETS.create("fashion_mnist", {"root": str(tmp_path)}))


@pytest.mark.parametrize(
    ("name", "start"), [("t10k-images-idx3-ubyte", [0, 0, 8, 3]), ("t10k-labels-idx1-ubyte", [0, 0, 8, 1])]
)
@pytest.mark.parametrize("more", [b"", b"\0", b"\0\0\0\0", b"\xff" * 40])
def test_a_short_head_and_wrong_sizes_are_damage(tmp_path, name, start, more):
    write_fashion(tmp_path)
    file = tmp_path / "FashionMNIST" / "raw" / name
    file.write_bytes(bytes(start) + more)
    if (start[-1], more) == (1, b"\0\0\0\0"):
        said = f"{file} is an idx file of no items"
    else:
        said = f"{file} is damaged: it holds {4 + len(more)} bytes, its head says "
    with pytest.raises(DataError, match=said):
        len(DATASETS.create("fashion_mnist", {"root": str(tmp_path)}))


def test_wrong_label_of_fashion_mnist(tmp_path):
    _, labels = write_fashion(tmp_path)["t10k"]
    raw = tmp_path / "FashionMNIST" / "raw"
    (raw / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 5) + bytes([*labels[:4], 10]))
    with pytest.raises(DataError, match=f"{raw}/t10k-labels-idx1-ubyte holds labels outside 0..9"):
        len(DATASETS.create("fashion_mnist", {"root": str(tmp_path)}))
    with pytest.raises(DataError, match=f"{raw}/train-images-idx3-ubyte does not exist"):
        len(DATASETS.create("fashion_mnist", {"root": str(tmp_path), "split": "train"}))


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


# -- images without labels ------------------------------------------------------------------------------------------
def test_unlabelled_images_of_coco(tmp_path, monkeypatch):
    """All of each image at one size, whatever its shape and mode, from a folder below the data root."""
    names = write_coco_images(tmp_path)
    folder = tmp_path / "coco" / "train2017"
    (folder / "notes.txt").write_text("no image")
    write_image(folder / "inside" / "x.png")
    monkeypatch.setenv("BENCH_DATA", str(tmp_path))
    dataset = DATASETS.create("unlabelled", {"folder": "coco/train2017", "size": 24})
    assert not dataset.labelled and dataset.task == "classification" and len(dataset.classes) == 0
    assert sorted(dataset.ids()) == names
    for i, image_id in enumerate(dataset.ids()):
        sample = dataset[i]
        assert (sample.id, sample.target) == (image_id, -1) and sample.image.shape == (3, 24, 24)
        with Image.open(folder / image_id) as file:
            expected = np.asarray(file.convert("RGB").resize((24, 24), Image.Resampling.BILINEAR))
        assert np.array_equal((sample.image * 255).round().numpy().transpose(1, 2, 0), expected)
        assert torch.equal(sample.image[0], sample.image[1]) == (image_id == GREY)
    # As they are without a size; other roots hold the same images.
    for params in ({"root": str(tmp_path)}, {"folder": str(folder)}):
        whole = DATASETS.create("unlabelled", {"folder": "coco/train2017", **params})
        assert whole.ids() == dataset.ids() and whole.fingerprint() != dataset.fingerprint()
        assert whole[whole.ids().index("000000000030.jpg")].image.shape == (3, 64, 48)


def test_unlabelled_images_stand_in_an_order_of_their_own(tmp_path):
    """The first so many are drawn at random by the seed; one that goes leaves the others in place."""
    names = write_coco_images(tmp_path)

    def made(seed):
        return DATASETS.create(
            "unlabelled", {"folder": "coco/train2017", "root": str(tmp_path), "seed": seed}
        )

    orders = {tuple(made(seed).ids()) for seed in range(6)}
    assert len(orders) > 1 and tuple(names) not in orders
    assert made(1).ids() == made(1).ids() and made(1).fingerprint() == made(1).fingerprint()
    assert made(1).fingerprint() != made(2).fingerprint()
    before = list(made(1).ids())
    (tmp_path / "coco" / "train2017" / before.pop(2)).unlink()
    assert made(1).ids() == before


def test_unlabelled_images_that_are_not_there(tmp_path):
    def count(folder):
        return len(DATASETS.create("unlabelled", {"folder": folder, "root": str(tmp_path)}))

    missing = r"dataset unlabelled: .*/coco/train2017 does not exist; expected a folder of images; name it with root:"
    with pytest.raises(DataError, match=missing):
        count("coco/train2017")
    (tmp_path / "coco" / "train2017").mkdir(parents=True)
    (tmp_path / "coco" / "train2017.zip").write_text("")
    with pytest.raises(DataError, match=r"unlabelled: .*/coco/train2017 holds no images"):
        count("coco/train2017")
    with pytest.raises(DataError, match=r"train2017\.zip is not a folder; expected a folder of images"):
        count("coco/train2017.zip")
    (tmp_path / "coco" / "train2017" / "a.jpg").write_text("no image at all")
    with pytest.raises(DataError, match=r"image .*a\.jpg cannot be read"):
        DATASETS.create("unlabelled", {"folder": "coco/train2017", "root": str(tmp_path)})[0]
    with pytest.raises(PluginError, match="size: 0 is not 1 or more"):
        DATASETS.create("unlabelled", {"folder": "coco", "size": 0})


def test_imagenet_labels_do_not_depend_on_which_classes_are_there(tmp_path):
    write_image(tmp_path / "imagenet" / "val" / "n15075141" / "ILSVRC2012_val_00000001.JPEG")
    write_image(tmp_path / "imagenet" / "val" / "n01443537" / "ILSVRC2012_val_00000002.JPEG")
    dataset = DATASETS.create("imagenet", {"root": str(tmp_path)})
    assert [dataset[i].target for i in range(2)] == [1, 999]
    assert [dataset.classes[dataset[i].target] for i in range(2)] == ["goldfish", "toilet tissue"]
    (tmp_path / "imagenet" / "val" / "cats").mkdir()
    with pytest.raises(DataError, match="image_folder"):
        len(DATASETS.create("imagenet", {"root": str(tmp_path)}))


def test_a_part_of_imagenet_beside_the_whole(tmp_path, monkeypatch):
    for place in ("imagenet", "imagenet250"):
        write_image(tmp_path / place / "val" / "n15075141" / f"{place}.JPEG")
    monkeypatch.setenv("BENCH_DATA", str(tmp_path))
    assert DATASETS.create("imagenet", {})[0].id == "n15075141/imagenet.JPEG"
    assert DATASETS.create("imagenet", {"folder": "imagenet250"})[0].id == "n15075141/imagenet250.JPEG"
    with pytest.raises(DataError, match="imagenet750"):
        len(DATASETS.create("imagenet", {"folder": "imagenet750"}))


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


# -- batches of downsampled ImageNet --------------------------------------------------------------------------------
def test_imagenet_takes_so_many_of_each_class(tmp_path):
    for folder in ("n15075141", "n01443537"):
        for number in (3, 1, 2):
            write_image(tmp_path / "train" / folder / f"{folder}_{number}.JPEG")
    some = DATASETS.create("imagenet", {"root": str(tmp_path), "split": "train", "per_class": 2})
    assert [sample.id for sample in some] == [
        f"{folder}/{folder}_{number}.JPEG" for folder in ("n01443537", "n15075141") for number in (1, 2)
    ]
    assert [sample.target for sample in some] == [1, 1, 999, 999]
    assert len(DATASETS.create("imagenet", {"root": str(tmp_path), "split": "train"})) == 6
    with pytest.raises(PluginError, match="per_class: 0 is not 1 or more"):
        DATASETS.create("imagenet", {"root": str(tmp_path), "per_class": 0})


def write_imagenet64(path, labels, form="pickle", protocol=3, **changes):
    """As published: rows of 64x64 red, green and blue values, labels from 1; training batches hold a mean too."""
    content = {
        "data": pixels(len(labels), 3 * 64 * 64),
        "labels": labels,
        "mean": np.zeros(3 * 64 * 64),
    } | changes
    if form == "npz":
        np.savez(path.with_name(f"{path.name}.npz"), **content)
    else:
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    return content["data"]


@pytest.mark.parametrize(
    ("form", "protocol"), [("npz", 0), ("pickle", 2), ("pickle", 3), ("pickle", 4), ("pickle", 5)]
)
def test_imagenet64(tmp_path, form, protocol):
    data = write_imagenet64(tmp_path / "val_data", [490, 1, 1000], form, protocol)
    dataset = DATASETS.create("imagenet64", {"root": str(tmp_path)})
    assert dataset.task == "classification" and len(dataset) == 3 and list(dataset.ids()) == ["0", "1", "2"]
    # The first three classes of validation images are known; the files number them as ILSVRC's development kit does.
    assert [dataset.classes[dataset[i].target] for i in range(3)] == ["sea snake", "kit fox", "dumbbell"]
    assert (dataset[1].image * 255).round().byte().flatten().tolist() == data[1].tolist()
    assert dataset[1].image.shape == (3, 64, 64)
    before = dataset.fingerprint()
    write_imagenet64(tmp_path / "val_data", [490, 1, 1000], form, protocol)
    assert DATASETS.create("imagenet64", {"root": str(tmp_path)}).fingerprint() != before


def test_imagenet64_labels_are_those_of_the_folders(tmp_path):
    write_imagenet64(tmp_path / "val_data", list(range(1, 1001)), "npz")
    dataset = DATASETS.create("imagenet64", {"root": str(tmp_path)})
    assert sorted(dataset[i].target for i in range(1000)) == list(range(1000))
    # From the development kit: id 450 is n01443537, id 889 n15075141.
    write_image(tmp_path / "val" / "n01443537" / "a.JPEG")
    write_image(tmp_path / "val" / "n15075141" / "b.JPEG")
    folders = DATASETS.create("imagenet", {"root": str(tmp_path)})
    assert [dataset[449].target, dataset[888].target] == [folders[0].target, folders[1].target]


def test_imagenet64_training_batches(tmp_path):
    (tmp_path / "imagenet64").mkdir()
    data = [
        write_imagenet64(tmp_path / "imagenet64" / f"train_data_batch_{k}", [k, 278]) for k in range(1, 11)
    ]
    dataset = DATASETS.create("imagenet64", {"root": str(tmp_path), "split": "train"})
    assert len(dataset) == 20
    assert (dataset[19].image * 255).round().byte().flatten().tolist() == data[9][1].tolist()
    fewer = DATASETS.create("imagenet64", {"root": str(tmp_path), "split": "train", "batches": 2})
    assert len(fewer) == 4 and fewer[3].target == dataset[3].target
    (tmp_path / "imagenet64" / "train_data_batch_7").unlink()
    with pytest.raises(DataError, match=r"imagenet64/train_data_batch_7 does not exist"):
        len(DATASETS.create("imagenet64", {"root": str(tmp_path), "split": "train"}))
    with pytest.raises(PluginError, match="batches: 11 is not 1 to 10"):
        DATASETS.create("imagenet64", {"split": "train", "batches": 11})


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


@pytest.mark.parametrize("protocol", [2, 5])
def test_imagenet64_runs_no_code(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    write_imagenet64(tmp_path / "val_data", [1], protocol=protocol, mean=Payload())
    with pytest.raises(DataError, match=r"/val_data is refused: its pickle asks for .*(getattr|pathlib)"):
        len(DATASETS.create("imagenet64", {"root": str(tmp_path)}))
    assert not (tmp_path / "touched").exists()
    np.savez(tmp_path / "val_data.npz", data=pixels(1, 12288), labels=np.array([Payload()], dtype=object))
    with pytest.raises(DataError, match=r"/val_data\.npz cannot be read"):
        len(DATASETS.create("imagenet64", {"root": str(tmp_path)}))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("form", ["pickle", "npz"])
@pytest.mark.parametrize(
    ("labels", "changes", "said"),
    [
        ([1, 0], {}, "holds label 0, expected 1 to 1000"),
        ([1, 1001], {}, "holds label 1001"),
        ([1], {"data": pixels(2, 12288)}, "holds 2 images, expected as many"),
        (["a", "b"], {}, "expected as many whole numbers"),
        ([1, 2], {"data": pixels(2, 3072)}, r"holds data \(2, 3072\) uint8, expected \(N, 12288\) uint8"),
        ([1, 2], {"data": np.zeros((2, 12288))}, "float64, expected"),
    ],
)
def test_wrong_imagenet64(tmp_path, form, labels, changes, said):
    write_imagenet64(tmp_path / "val_data", labels, form, **changes)
    with pytest.raises(DataError, match=f"{tmp_path}/val_data.*{said}") as error:
        len(DATASETS.create("imagenet64", {"root": str(tmp_path)}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["pickle", "npz"])
@pytest.mark.parametrize("keep", [0, 100, -30])
def test_broken_imagenet64(tmp_path, form, keep):
    write_imagenet64(tmp_path / "val_data", [1, 2], form)
    path = tmp_path / ("val_data.npz" if form == "npz" else "val_data")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"{path} cannot be read") as error:
        len(DATASETS.create("imagenet64", {"root": str(tmp_path)}))
    assert "\n" not in str(error.value)


def test_imagenet64_pickle_of_something_else(tmp_path):
    for content, said in (([1, 2], "holds a list"), ({"labels": [1]}, "'data'")):
        (tmp_path / "val_data").write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match=f"/val_data cannot be read: .*{said}"):
            len(DATASETS.create("imagenet64", {"root": str(tmp_path)}))


# -- Tiny ImageNet --------------------------------------------------------------------------------------------------
def write_tiny(root):
    """Three classes in the published layout; ids are not sorted in wnids.txt."""
    folder = root / "tiny-imagenet-200"
    folder.mkdir()
    ids = ["n02124075", "n01443537", "n04067472"]
    (folder / "wnids.txt").write_text("\n".join(ids) + "\n")
    names = [
        "n00001740\tentity",
        "n01443537\tgoldfish, Carassius auratus",
        "n02124075\tEgyptian cat",
        "n04067472\treel",
    ]
    (folder / "words.txt").write_text("\n".join(names) + "\n")
    truth = {}
    for name in ids:
        for k in range(2):
            path = folder / "train" / name / "images" / f"{name}_{k}.JPEG"
            write_image(path, (64, 64))
            truth[f"{name}/images/{path.name}"] = sorted(ids).index(name)
        (folder / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t10\t63\t58\n")
    lines = []
    for k, name in enumerate(["n04067472", "n01443537"]):
        write_image(folder / "val" / "images" / f"val_{k}.JPEG", (64, 64))
        lines.append(f"val_{k}.JPEG\t{name}\t0\t32\t44\t62")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    # Some of the published images are grey.
    Image.fromarray(pixels(64, 64)).save(folder / "val" / "images" / "val_0.JPEG")
    (folder / "test" / "images").mkdir(parents=True)
    return folder, truth


def test_tiny_imagenet(tmp_path):
    folder, truth = write_tiny(tmp_path)
    for root in (tmp_path, folder):
        val = DATASETS.create("tiny_imagenet", {"root": str(root)})
        assert list(val.ids()) == ["val_0.JPEG", "val_1.JPEG"] and [val[i].target for i in range(2)] == [2, 0]
        assert list(val.classes) == ["goldfish", "Egyptian cat", "reel"]
        assert val[0].image.shape == (3, 64, 64) and (val[0].image[0] == val[0].image[2]).all()
        train = DATASETS.create("tiny_imagenet", {"root": str(root), "split": "train"})
        assert {train[i].id: train[i].target for i in range(len(train))} == truth
    with Image.open(folder / "val" / "images" / "val_1.JPEG") as file:
        assert np.array_equal((val[1].image * 255).round().numpy().transpose(1, 2, 0), np.array(file))
    before = val.fingerprint()
    write_image(folder / "val" / "images" / "val_1.JPEG", (64, 64))
    assert DATASETS.create("tiny_imagenet", {"root": str(tmp_path)}).fingerprint() != before


def test_wrong_tiny_imagenet(tmp_path):
    def said(split="val"):
        with pytest.raises(DataError) as error:
            dataset = DATASETS.create("tiny_imagenet", {"root": str(tmp_path), "split": split})
            [dataset[i] for i in range(len(dataset))]
        assert "\n" not in str(error.value)
        return str(error.value)

    folder, _ = write_tiny(tmp_path)
    table = folder / "val" / "val_annotations.txt"
    (folder / "val" / "images" / "val_1.JPEG").write_bytes(b"\xff\xd8 no picture")
    assert f"{folder}/val/images/val_1.JPEG cannot be read" in said()
    (folder / "val" / "images" / "val_1.JPEG").unlink()
    assert f"{folder}/val/images/val_1.JPEG does not exist" in said()
    table.write_text("val_0.JPEG\tn04067472\t0\t32\t44\t62\nval_1.JPEG\tn00000001\t0\t32\t44\t62\n")
    assert f"{table}, line 2: class 'n00000001' is not in wnids.txt" in said()
    table.write_text("val_0.JPEG n04067472\n")
    assert f"{table}, line 1: expected 6 entries" in said()
    table.unlink()
    assert f"{table} does not exist" in said()
    (folder / "train" / "n01443537").rename(folder / "train" / "n01443538")
    assert f"{folder}/train/n01443537 does not exist, but is in wnids.txt" in said("train")
    write_image(folder / "train" / "n01443537" / "images" / "a.JPEG")
    assert f"{folder}/train/n01443538 is not in wnids.txt" in said("train")
    (folder / "val").rename(folder / "validation")
    assert f"{folder}/val does not exist" in said()
    (folder / "wnids.txt").unlink()
    assert f"{folder}/wnids.txt does not exist" in said()
