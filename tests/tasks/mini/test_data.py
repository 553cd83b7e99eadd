"""The embedded data: deterministic, splits disjoint, ground truth exact."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest

from tasks.mini import data

# Digest of a few items. It changes only when the data do: then raise data.VERSION and retrain the zoo.
GOLDEN = "96f64971a91462e8f8ff7047f88c430a44ea7213fbadfd1e01c2957483cd1307"


def digest() -> str:
    total = hashlib.sha256()
    for split in data.SPLITS:
        for index in (0, 7, 1234):
            image, label = data.sample(split, index)
            total.update(image.tobytes() + bytes([label]))
            scene = data.scene(split, index)
            for array in (
                scene.image,
                scene.label_map,
                scene.masks.astype(np.uint8),
                scene.boxes.astype("<f4"),
            ):
                total.update(np.ascontiguousarray(array).tobytes())
            total.update(scene.labels.astype("<i8").tobytes())
    return total.hexdigest()


def test_items_are_the_recorded_ones() -> None:
    assert digest() == GOLDEN


def test_sources_are_those_that_scikit_learn_loads() -> None:
    from sklearn.datasets import load_digits, load_sample_images

    scans, labels = data._scans()
    np.testing.assert_array_equal(scans, load_digits().images)
    np.testing.assert_array_equal(labels, load_digits().target)
    for own, theirs in zip(data._photos(), load_sample_images().images, strict=True):
        np.testing.assert_array_equal(own, theirs)


def test_items_do_not_depend_on_process_or_global_random_state() -> None:
    np.random.seed(1)  # noqa: NPY002
    before = data.sample("train", 5)[0]
    np.random.seed(2)  # noqa: NPY002
    np.testing.assert_array_equal(before, data.sample("train", 5)[0])
    code = (
        "from tasks.mini import data; import hashlib;"
        "print(hashlib.sha256(data.sample('train', 5)[0].tobytes() + data.scene('val', 3).image.tobytes()).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert other == hashlib.sha256(before.tobytes() + data.scene("val", 3).image.tobytes()).hexdigest()


def test_seed_and_index_change_the_item() -> None:
    first = data.sample("test", 0)[0]
    assert not np.array_equal(first, data.sample("test", 0, seed=1)[0])
    assert not np.array_equal(first, data.sample("test", data.SPLIT_SIZES["test"])[0])
    assert data.sample("test", 0)[1] == data.sample("test", data.SPLIT_SIZES["test"], seed=4)[1]
    assert not np.array_equal(data.scene("test", 0).image, data.scene("test", 0, seed=1).image)


def test_digits_of_the_splits_are_disjoint_complete_and_stratified() -> None:
    splits = data.split_digits()
    assert {name: len(ids) for name, ids in splits.items()} == data.SPLIT_SIZES
    everything = [i for ids in splits.values() for i in ids]
    assert sorted(everything) == list(range(1797))
    labels = data._scans()[1]
    for ids in splits.values():
        share = np.bincount(labels[list(ids)], minlength=10) / len(ids)
        np.testing.assert_allclose(share, np.bincount(labels) / len(labels), atol=0.02)


def test_no_two_splits_hold_the_same_scan() -> None:
    scans = data._scans()[0].reshape(1797, -1)
    owner: dict[bytes, str] = {}
    for name, ids in data.split_digits().items():
        for i in ids:
            assert owner.setdefault(scans[i].tobytes(), name) == name


def test_photo_regions_are_disjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    # Photographs whose pixels tell their column: every crop must stay inside its split's columns.
    columns = np.broadcast_to(np.arange(640)[None, :, None] * 255 // 639, (427, 640, 3)).astype(np.uint8)
    monkeypatch.setattr(data, "_photos", lambda: (columns, columns))
    monkeypatch.setattr(data, "PHOTO_CONTRAST", 100)
    reach: dict[str, tuple[int, int]] = {}
    for split in data.SPLITS:
        crops = [data._background(data.Stream("t", split, i), split, 64, 1, True) for i in range(200)]
        reach[split] = min(int(c.min()) for c in crops), max(int(c.max()) for c in crops)
        start, stop = data.PHOTO_COLUMNS[split]
        assert columns[0, start, 0] <= reach[split][0] and reach[split][1] <= columns[0, stop - 1, 0]
    bounds = sorted(data.PHOTO_COLUMNS.values())
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(bounds))


def test_samples_have_the_stated_form() -> None:
    images, labels = data.samples("test", range(20))
    assert images.shape == (20, 32, 32, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and set(labels.tolist()) <= set(range(10))
    assert data.sample("val", 0, size=64)[0].shape == (64, 64, 3)


def test_contrast_bounds_the_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(20):
        plain = data.sample("test", index, contrast=0)[0].astype(int)
        shown = data.sample("test", index, contrast=60)[0].astype(int)
        change = np.abs(shown - plain)
        assert 20 < change.max() <= 60


@pytest.mark.parametrize("split", data.SPLITS)
def test_scene_ground_truth_is_exact(split: str) -> None:
    counts = set()
    for index in range(30):
        scene = data.scene(split, index)
        counts.add(len(scene.labels))
        assert scene.image.shape == (96, 96, 3) and scene.image.dtype == np.uint8
        assert scene.masks.shape == (len(scene.labels), 96, 96) and scene.boxes.dtype == np.float32
        assert not (scene.masks.sum(axis=0) > 1).any()
        for box, mask in zip(scene.boxes.astype(int), scene.masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == tuple(box)
            assert mask.sum() > 150
    assert counts == {1, 2, 3}


@pytest.mark.parametrize("split", data.SPLITS)
def test_label_map_agrees_with_masks(split: str) -> None:
    for index in range(30):
        scene = data.scene(split, index)
        seen = np.zeros_like(scene.label_map, dtype=bool)
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            inside = scene.label_map[mask]
            assert set(np.unique(inside)) <= {1 + label, data.IGNORE_LABEL}
            assert (inside == 1 + label).mean() > 0.6
            seen |= mask
        digits = (scene.label_map > 0) & (scene.label_map != data.IGNORE_LABEL)
        assert (seen[digits]).all()
        assert not (seen & (scene.label_map == 0)).any()
        ignored = scene.label_map == data.IGNORE_LABEL
        assert 0 < ignored.mean() < 0.12
        # A thin band: every ignored pixel lies within three pixels of a digit or of its hole's background.
        grown = digits.copy()
        for _ in range(3):
            padded = np.pad(grown, 1)
            grown = (
                padded[1:-1, 1:-1]
                | padded[:-2, 1:-1]
                | padded[2:, 1:-1]
                | padded[1:-1, :-2]
                | padded[1:-1, 2:]
            )
        assert (ignored & ~grown).sum() <= 0.1 * ignored.sum()


@pytest.mark.parametrize("size", [64, 80, 112])
def test_scene_sizes(size: int) -> None:
    scene = data.scene("val", 1, size)
    assert scene.image.shape == (size, size, 3) and scene.label_map.shape == (size, size)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="'tets' is not one of train, val, test"):
        data.sample("tets", 0)
    with pytest.raises(ValueError, match="-1 is negative"):
        data.scene("test", -1)
    with pytest.raises(ValueError, match="size: 128 is not between 64 and 112"):
        data.scene("val", 0, 128)


def test_curriculum_falls_to_the_final_contrast() -> None:
    values = [data.curriculum_contrast(step, 100, 120, 0.4) for step in range(100)]
    assert values[0] == 240 and values[20] == 180 and set(values[40:]) == {120}
    assert values == sorted(values, reverse=True)
