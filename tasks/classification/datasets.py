"""Classification data in the layouts they are published in, read by torchvision's own classes.

Every dataset takes `root`, the folder its files lie in or under; without it the environment variable `BENCH_DATA`
says where data lie, else `./data`. Nothing is downloaded, and files are read on first use.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import importlib.util
import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from bench.errors import DataError
from bench.protocols import Dataset, Sample
from bench.registry import DATASETS
from bench.rng import derive_seed
from tasks.files import IMAGE_SUFFIXES, UNLABELLED, data_root, fingerprint_files, read_image, to_image

__all__ = [
    "Cifar10",
    "Cifar100",
    "FashionMnist",
    "ImageFolder",
    "ImageNet",
    "ImageNet20",
    "Nips2017",
    "Published",
    "Svhn",
    "TinyImageNet",
    "Unlabelled",
]


# -- published in a few files ------------------------------------------------------------------------------------
class Published(Dataset):
    """A dataset of a few files that are read into memory as a whole.

    Args:
        root: folder that the files lie in, or one above.
        split: part of the dataset.
    """

    task: ClassVar[str] = "classification"
    title: ClassVar[str]
    #: Sub-folders of the root that the files may lie under.
    folders: ClassVar[tuple[str, ...]] = (".",)

    def __init__(self, root: str | None = None, split: Literal["train", "test"] = "test") -> None:
        self.root = data_root(root)
        self.split = split

    @abstractmethod
    def _files(self) -> Sequence[str]:
        """Files that the split needs, relative to the folder."""

    @abstractmethod
    def _open(self, folder: Path) -> tuple[Sequence[np.ndarray] | np.ndarray, Sequence[int]]:
        """N images (H, W[, 3]) uint8 and labels, from `folder`."""

    def _damage(self, folder: Path) -> str:
        """What is not as published: the first such file, where that can be told."""
        path: Path | None = None
        with contextlib.suppress(OSError):
            path = self._damaged(folder)
        if path is not None and not path.is_file():
            return f"{path} does not exist; {self.title} has it"
        return f"{path or folder} is not as published (damaged, cut short or changed)"

    def _damaged(self, folder: Path) -> Path | None:
        """The first file whose checksum is not the published one, missing files included."""
        return None

    def _labels_file(self) -> str:
        """The file that the labels are in, "" where they are in several."""
        return self._files()[0] if len(self._files()) == 1 else ""

    def _folder(self) -> Path:
        for name in self.folders:
            folder = self.root / name
            if (folder / self._files()[0]).is_file():
                return folder
        wanted = self.root / self.folders[0] / self._files()[0]
        raise DataError(
            f"dataset {self._name()}: {wanted} does not exist; put {self.title} there, name its folder with root: or "
            "BENCH_DATA, or use the embedded data (profile mini)"
        )

    def _name(self) -> str:
        return getattr(self, "name", type(self).__name__.lower())

    @functools.cached_property
    def _content(self) -> tuple[Sequence[np.ndarray] | np.ndarray, list[int]]:
        folder = self._folder()
        for name in self._files():
            if not (folder / name).is_file():
                raise DataError(
                    f"dataset {self._name()}: {folder / name} does not exist; {self.title} has it"
                )
        try:
            images, labels = self._open(folder)
        except DataError:
            raise
        except Exception as error:
            # torchvision, scipy and pickle fail in many ways on a damaged file, all of which mean just that.
            what = self._damage(folder) if _is_integrity(error) else f"reading {folder} fails: {error}"
            raise DataError(f"dataset {self._name()}: {what}") from None
        if len(images) != len(labels):
            raise DataError(
                f"dataset {self._name()}: {folder} holds {len(images)} images but {len(labels)} labels"
            )
        if len(labels) and not 0 <= min(labels) <= max(labels) < len(self.classes):
            raise DataError(
                f"dataset {self._name()}: {folder / self._labels_file()} holds labels outside "
                f"0..{len(self.classes) - 1}"
            )
        return images, [int(label) for label in labels]

    def __len__(self) -> int:
        return len(self._content[1])

    def __getitem__(self, index: int) -> Sample:
        images, labels = self._content
        return Sample(to_image(images[index]), labels[index], str(index))

    def fingerprint(self) -> str:
        """Digest of the split's files."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        folder = self._folder()
        return fingerprint_files((name, folder / name) for name in self._files())


def _not_idx(path: Path, dimensions: int) -> str:
    """What is wrong with an idx file of bytes (its head: 0, 0, 8, the number of dimensions, each of them), or ""."""
    with path.open("rb") as file:
        head = file.read(4 + 4 * dimensions)
    if not head:
        return "is empty, expected an idx file"
    if not head.startswith(bytes([0, 0, 8, dimensions])):
        return f"is no idx file of bytes in {dimensions} dimension{'s' if dimensions > 1 else ''}"
    # A head that is itself cut short reads as sizes that are too small, and is too short all the same.
    sizes = [int.from_bytes(head[i : i + 4].ljust(4, b"\0"), "big") for i in range(4, 4 + 4 * dimensions, 4)]
    wanted, held = 4 + 4 * dimensions + math.prod(sizes), path.stat().st_size
    if held != wanted:
        return f"is damaged: it holds {held} bytes, its head says {wanted}"
    return "" if math.prod(sizes) else "is an idx file of no items"


def _is_integrity(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "corrupted" in str(error)


@DATASETS.register_module(name="cifar10")
class Cifar10(Published):
    """CIFAR-10 (Krizhevsky 2009), "python version": `cifar-10-batches-py/` with its batches.

    The batches are pickles; they are opened only if their MD5 is the published one.
    """

    title = "the extracted cifar-10-python.tar.gz"
    folders = ("cifar-10-batches-py", "cifar10/cifar-10-batches-py", ".")
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def _reader(self) -> Any:
        from torchvision.datasets import CIFAR10

        return CIFAR10

    def _files(self) -> Sequence[str]:
        reader = self._reader()
        listed = reader.train_list if self.split == "train" else reader.test_list
        return [name for name, _ in listed]

    def _damaged(self, folder: Path) -> Path | None:
        from torchvision.datasets.utils import check_integrity

        reader = self._reader()
        meta = (reader.meta["filename"], reader.meta["md5"])
        # The reader wants those of both splits; ours first.
        listed = sorted(
            [*reader.train_list, *reader.test_list], key=lambda entry: entry[0] not in self._files()
        )
        return next(
            (folder / name for name, md5 in [*listed, meta] if not check_integrity(folder / name, md5)), None
        )

    def _open(self, folder: Path) -> tuple[np.ndarray, Sequence[int]]:
        reader = self._reader()
        if folder.resolve().name != reader.base_folder:
            raise DataError(
                f"dataset {self._name()}: the folder {folder} must be called {reader.base_folder}"
            )
        content = reader(folder.resolve().parent, train=self.split == "train")
        return content.data, content.targets


@DATASETS.register_module(name="cifar100")
class Cifar100(Cifar10):
    """CIFAR-100 (Krizhevsky 2009), fine labels, "python version": `cifar-100-python/`."""

    title = "the extracted cifar-100-python.tar.gz"
    folders = ("cifar-100-python", "cifar100/cifar-100-python", ".")

    @functools.cached_property
    def classes(self) -> Sequence[str]:  # type: ignore[override]
        """The hundred fine labels, in alphabetical order, which is the order of the label numbers."""
        return _CIFAR100.split()

    def _reader(self) -> Any:
        from torchvision.datasets import CIFAR100

        return CIFAR100


@DATASETS.register_module(name="svhn")
class Svhn(Published):
    """Street View House Numbers (Netzer et al. 2011), cropped digits: `test_32x32.mat`; label 0 is the digit 0."""

    title = "test_32x32.mat / train_32x32.mat of SVHN format 2"
    folders = (".", "svhn", "SVHN")
    classes = tuple("0123456789")

    def _files(self) -> Sequence[str]:
        return [f"{self.split}_32x32.mat"]

    def _damaged(self, folder: Path) -> Path | None:
        from torchvision.datasets import SVHN
        from torchvision.datasets.utils import check_integrity

        path = folder / self._files()[0]
        return None if check_integrity(path, SVHN.split_list[self.split][2]) else path

    def _open(self, folder: Path) -> tuple[np.ndarray, Sequence[int]]:
        from torchvision.datasets import SVHN

        content = SVHN(folder, split=self.split)
        return content.data.transpose(0, 2, 3, 1), content.labels.tolist()


@DATASETS.register_module(name="fashion_mnist")
class FashionMnist(Published):
    """Fashion-MNIST (Xiao et al. 2017), 28x28, grey repeated to RGB: `FashionMNIST/raw/*-ubyte`, unpacked."""

    title = "the four unpacked idx files of Fashion-MNIST"
    folders = ("FashionMNIST/raw",)
    classes = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip

    def _files(self) -> Sequence[str]:
        prefix = "train" if self.split == "train" else "t10k"
        return [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]

    def _labels_file(self) -> str:
        return self._files()[1]

    def _open(self, folder: Path) -> tuple[np.ndarray, Sequence[int]]:
        from torchvision.datasets import FashionMNIST

        for name, dimensions in zip(self._files(), (3, 1), strict=True):
            if wrong := _not_idx(folder / name, dimensions):
                raise DataError(f"dataset {self._name()}: {folder / name} {wrong}")

        class Split(FashionMNIST):  # type: ignore[misc]  # torchvision has no types
            """Asks for the files of the wanted split only."""

            def _check_exists(self) -> bool:
                return True

            @property
            def raw_folder(self) -> str:
                return str(folder)

        content = Split(folder, train=self.split == "train")
        return content.data.numpy(), content.targets.tolist()


# -- published as files -------------------------------------------------------------------------------------------
class _Files(Dataset):
    """A dataset of one image file per item."""

    task: ClassVar[str] = "classification"
    root: Path
    size: int | None = None

    @abstractmethod
    def _list(self) -> list[tuple[str, Path, int]]:
        """(id, file, label) of every item, in order."""

    def _name(self) -> str:
        return getattr(self, "name", type(self).__name__.lower())

    @functools.cached_property
    def _items(self) -> list[tuple[str, Path, int]]:
        items = self._list()
        if not items:
            raise DataError(f"dataset {self._name()}: {self.root} holds no images")
        return items

    def __len__(self) -> int:
        return len(self._items)

    def ids(self) -> Sequence[str]:
        """Paths below the root, or the ids that the dataset's own list gives."""
        return [item[0] for item in self._items]

    def __getitem__(self, index: int) -> Sample:
        image_id, path, label = self._items[index]
        image = read_image(path)
        if self.size is not None:
            image = _small(image, self.size)
        return Sample(to_image(image), label, image_id)

    def fingerprint(self) -> str:
        """Digest of the list (ids and labels) and of the files, by content or, for large trees, by size."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        listed = hashlib.sha256(
            "\n".join(f"{i}\t{label}" for i, _, label in self._items).encode()
        ).hexdigest()
        files = fingerprint_files((image_id, path) for image_id, path, _ in self._items)
        return hashlib.sha256(f"{listed} {files} {self.size}".encode()).hexdigest()


def _small(image: Image.Image, size: int) -> Image.Image:
    """The central square at `size` x `size`, averaged over boxes (Chrabaszcz et al. 2017 reduce the whole image so)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.BOX, (left, top, left + side, top + side))


def _check_folder(root: Path, name: str, wanted: str) -> None:
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise DataError(
            f"dataset {name}: {root} {what}; expected {wanted}; name it with root: or BENCH_DATA, or use the "
            "embedded data (profile mini)"
        )


@DATASETS.register_module(name="image_folder")
class ImageFolder(_Files):
    """Images sorted into one folder per class (`root/cat/1.png`); labels follow the alphabetical order of folders.

    Args:
        root: folder of the class folders.
        size: crop the central square and reduce it to this many pixels a side; None keeps the original.
    """

    def __init__(self, root: str, size: int | None = None) -> None:
        self.root = Path(root).expanduser()
        self.size = _check_size(size)

    @functools.cached_property
    def classes(self) -> Sequence[str]:  # type: ignore[override]
        """Names of the class folders."""
        _check_folder(self.root, self._name(), "a folder with one folder of images per class")
        found = sorted(p.name for p in self.root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not found:
            raise DataError(f"dataset {self._name()}: {self.root} holds no class folders")
        return found

    def _list(self) -> list[tuple[str, Path, int]]:
        return _walk(self.root, {name: label for label, name in enumerate(self.classes)})


@DATASETS.register_module(name="unlabelled")
class Unlabelled(_Files):
    """Images of one folder whose labels are not asked for (each says -1), such as COCO's `train2017`.

    They stand in an order drawn by `seed`: the first N of a training are N drawn at random.

    Args:
        folder: the folder of the images, below the root; folders inside it are not looked into.
        root: folder that `folder` lies in; by default the data root.
        size: resize to a square of this many pixels a side, whatever the shape (bilinear); None keeps the original.
        seed: of the order.
    """

    labelled: ClassVar[bool] = False
    classes = ()

    def __init__(
        self,
        folder: str,
        root: str | None = None,
        size: int | None = None,
        seed: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        self.root = data_root(root) / folder
        self.size, self.seed = _check_size(size), seed

    def _list(self) -> list[tuple[str, Path, int]]:
        _check_folder(self.root, self._name(), "a folder of images")
        found = (p for p in self.root.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        # By a number of each name's own: files that come or go leave the others in their order.
        paths = sorted(found, key=lambda path: (derive_seed("unlabelled", self.seed, path.name), path.name))
        return [(path.name, path, UNLABELLED) for path in paths]

    def __getitem__(self, index: int) -> Sample:
        image_id, path, label = self._items[index]
        image = read_image(path)
        if self.size is not None:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return Sample(to_image(image), label, image_id)


@DATASETS.register_module(name="imagenet")
class ImageNet(_Files):
    """ImageNet-1k (Russakovsky et al. 2015): `val/n01440764/*.JPEG` under the root; some of the classes are enough.

    Args:
        root: folder that holds `val` (or `imagenet/val`).
        split: `val` or `train`.
        size: crop the central square and reduce it to this many pixels a side (64 in some papers).
        per_class: take the first so many images of each class, by file name; None = all.
        folder: folder below the root that holds `val`, for a part of ImageNet beside the whole.
    """

    def __init__(
        self,
        root: str | None = None,
        split: Literal["val", "train"] = "val",
        size: int | None = None,
        per_class: int | None = None,
        folder: str | None = None,
    ) -> None:
        if per_class is not None and per_class < 1:
            raise ValueError(f"per_class: {per_class} is not 1 or more")
        self.per_class = per_class
        given = data_root(root)
        self.split = split
        self.size = _check_size(size)
        places = [given / split, given / "imagenet" / split] if folder is None else [given / folder / split]
        self.root = next((p for p in places if p.is_dir()), places[0])

    @functools.cached_property
    def classes(self) -> Sequence[str]:  # type: ignore[override]
        """The thousand class names in label order."""
        return _imagenet_names()

    def _list(self) -> list[tuple[str, Path, int]]:
        from timm.data import ImageNetInfo

        _check_folder(self.root, self._name(), f"ImageNet's {self.split} images in one folder per WordNet id")
        labels = {str(synset): label for label, synset in enumerate(ImageNetInfo().label_names())}
        folders = sorted(p.name for p in self.root.iterdir() if p.is_dir() and not p.name.startswith("."))
        strange = [name for name in folders if name not in labels]
        if strange:
            raise DataError(
                f"dataset {self._name()}: {self.root / strange[0]} is not one of ImageNet's thousand WordNet ids "
                "(n01440764, ...); for other classes use dataset image_folder"
            )
        return _walk(self.root, {name: labels[name] for name in folders}, self.per_class)


def _imagenet_names() -> list[str]:
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    return list(_IMAGENET_CATEGORIES)


def _walk(root: Path, labels: dict[str, int], most: int | None = None) -> list[tuple[str, Path, int]]:
    """Identifier, path and label of the images in each folder, at most so many of one."""
    items = []
    for folder, label in labels.items():
        paths = sorted(
            p for p in (root / folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()
        )
        items += [(p.relative_to(root).as_posix(), p, label) for p in paths[:most]]
    return items


@DATASETS.register_module(name="tiny_imagenet")
class TinyImageNet(_Files):
    """Tiny ImageNet (Le and Yang 2015), 200 classes at 64x64, as published: `tiny-imagenet-200/`.

    Training images are in `train/n01443537/images`, validation images in `val/images` with `val/val_annotations.txt`;
    the test images have no public labels. Labels follow the alphabetical order of the WordNet ids in `wnids.txt`.

    Args:
        root: folder `tiny-imagenet-200`, or the one above.
        split: `val` or `train`.
    """

    def __init__(self, root: str | None = None, split: Literal["val", "train"] = "val") -> None:
        given = data_root(root)
        self.split = split
        self.root = given if (given / "wnids.txt").is_file() else given / "tiny-imagenet-200"

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        """WordNet id -> label."""
        _check_folder(self.root, self._name(), "the extracted tiny-imagenet-200.zip")
        return {
            name: label for label, name in enumerate(sorted(line[0] for line in self._table("wnids.txt", 1)))
        }

    @functools.cached_property
    def classes(self) -> Sequence[str]:  # type: ignore[override]
        """The first name that `words.txt` gives each class."""
        names = dict(self._table("words.txt", 2))
        return [names.get(name, name).split(",")[0] for name in self._ids]

    def _list(self) -> list[tuple[str, Path, int]]:
        labels = self._ids
        folder = self.root / self.split
        _check_folder(folder, self._name(), f"the {self.split} images of tiny-imagenet-200.zip")
        if self.split == "train":
            found = {p.name for p in folder.iterdir() if p.is_dir()}
            if wrong := sorted(found.symmetric_difference(labels)):
                what = "is not in wnids.txt" if wrong[0] in found else "does not exist, but is in wnids.txt"
                raise DataError(f"dataset {self._name()}: {folder / wrong[0]} {what}")
            return _walk(folder, labels)
        items = []
        for line, (name, label, *_) in enumerate(self._table("val/val_annotations.txt", 6), start=1):
            if label not in labels:
                raise DataError(
                    f"dataset {self._name()}: {folder / 'val_annotations.txt'}, line {line}: class {label!r} is not in "
                    "wnids.txt"
                )
            items.append((name, folder / "images" / name, labels[label]))
        return items

    def _table(self, name: str, columns: int) -> list[list[str]]:
        """The lines of a file, split at tabs."""
        path = self.root / name
        try:
            rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
            raise DataError(f"dataset {self._name()}: {path} {reason}") from None
        for line, row in enumerate(rows, start=1):
            if len(row) != columns or not all(row):
                raise DataError(
                    f"dataset {self._name()}: {path}, line {line}: expected {columns} entries with tabs between them"
                )
        return rows


@DATASETS.register_module(name="nips2017")
class Nips2017(_Files):
    """The thousand development images of the NIPS 2017 adversarial contest (Kurakin et al. 2018), 299x299.

    `images/*.png` beside a table with the columns ImageId and TrueLabel (`images.csv`, `dev_dataset.csv` or
    `dev.csv`). Labels in the table count from 1; ours from 0.

    Args:
        root: folder that holds the table, or whose `nips2017` does.
    """

    tables: ClassVar[tuple[str, ...]] = ("images.csv", "dev_dataset.csv", "dev.csv")

    def __init__(self, root: str | None = None) -> None:
        given = data_root(root)
        candidates = [folder / name for folder in (given, given / "nips2017") for name in self.tables]
        self.table = next((p for p in candidates if p.is_file()), candidates[0])
        self.root = self.table.parent

    @functools.cached_property
    def classes(self) -> Sequence[str]:  # type: ignore[override]
        """ImageNet's thousand class names."""
        return _imagenet_names()

    def _list(self) -> list[tuple[str, Path, int]]:
        _check_folder(self.root, self._name(), "the contest's images.csv and its folder images/")
        if not self.table.is_file():
            raise DataError(
                f"dataset {self._name()}: {self.root} holds none of {', '.join(self.tables)}, the table of labels"
            )
        rows: list[tuple[str, int]] = []
        try:
            with self.table.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                columns = {str(c).strip().lower(): c for c in reader.fieldnames or ()}
                missing = [c for c in ("imageid", "truelabel") if c not in columns]
                if missing:
                    raise DataError(
                        f"dataset {self._name()}: {self.table} has no column ImageId or TrueLabel"
                    )
                for line, row in enumerate(reader, start=2):
                    number = str(row[columns["truelabel"]]).strip()
                    if not number.isdecimal() or not 1 <= int(number) <= 1000:
                        raise DataError(
                            f"dataset {self._name()}: {self.table}, line {line}: TrueLabel is {number!r}, "
                            "expected 1 to 1000"
                        )
                    rows.append((str(row[columns["imageid"]]).strip(), int(number)))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"dataset {self._name()}: {self.table} cannot be read: {error}") from None
        return [(name, self._image(name), label - 1) for name, label in rows]

    def _image(self, name: str) -> Path:
        file = name if name.endswith(".png") else f"{name}.png"
        inside = self.root / "images" / file
        return inside if inside.is_file() or not (self.root / file).is_file() else self.root / file


@DATASETS.register_module(name="imagenet20")
class ImageNet20(_Files):
    """The twenty labelled ImageNet images that foolbox (Rauber et al. 2017) ships, most of them 512x512.

    Args:
        size: crop the central square and reduce it to this many pixels a side; None keeps the original.
    """

    def __init__(self, size: int | None = None) -> None:
        self.size = _check_size(size)

    @functools.cached_property
    def root(self) -> Path:  # type: ignore[override]
        """The folder of images in foolbox; found without importing it, which takes seconds."""
        found = importlib.util.find_spec("foolbox")
        if found is None or found.origin is None:
            raise DataError(
                f"dataset {self._name()}: the package foolbox, which holds its images, is not installed; "
                "pip install -e '.[imagenet20]' in the project's folder, or use the embedded data (profile mini)"
            )
        return Path(found.origin).parent / "data"

    @functools.cached_property
    def classes(self) -> Sequence[str]:  # type: ignore[override]
        """ImageNet's thousand class names."""
        return _imagenet_names()

    def _list(self) -> list[tuple[str, Path, int]]:
        """Labels are the last number of each file name."""
        paths = sorted(self.root.glob("imagenet_*_*.jpg"))
        return [(path.stem, path, int(path.stem.rsplit("_", 1)[1])) for path in paths]


def _check_size(size: int | None) -> int | None:
    if size is not None and size < 1:
        raise ValueError(f"size: {size} is not 1 or more")
    return size


_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
