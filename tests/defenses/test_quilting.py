import networkx
import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from bench.chain import bpda
from bench.errors import DataError, NotApplicable, PluginError
from bench.protocols import Dataset, Sample
from bench.registry import DATASETS, DEFENSES
from defenses.quilting import _cut, _nearest, _starts, _waves

SMALL = {"patches": 500}


@pytest.fixture(scope="module")
def pictures(photos):
    """A dataset of photographs that the tests own, registered for their duration."""
    images = photos(20, 24, 24)

    @DATASETS.register_module(name="pictures_for_quilting", force=True)
    class Pictures(Dataset):
        task = "classification"
        classes = ("none",)

        def __init__(self, split: str = "test", side: int = 24) -> None:
            self.split, self.side = split, side

        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            return Sample(images[index][:, : self.side, : self.side], 0, str(index))

        def fingerprint(self):
            return f"pictures-{self.split}-{self.side}"

    yield images
    DATASETS.module_dict.pop("pictures_for_quilting")


def create(**params):
    return DEFENSES.create("quilting", {"dataset": "pictures_for_quilting", **SMALL, **params})


@pytest.mark.parametrize("seam", ["graph_cut", "overwrite"])
@pytest.mark.parametrize(("size", "overlap"), [(5, 2), (4, 1), (6, 4)])
def test_images_of_the_database_are_rebuilt_exactly(seam, size, overlap, pictures):
    """With every patch of an image in the database, each is its own nearest and the quilt is the image."""
    image = pictures[:2, :, :23, :22]
    defense = create(size=size, overlap=overlap, seam=seam)
    windows = image.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 1, 4, 5)
    defense.database = windows.flatten(0, 2).flatten(1)
    assert torch.equal(defense(image), image)


@pytest.mark.parametrize("length", [5, 6, 7, 8, 11, 31, 32])
def test_patches_cover_every_pixel(length):
    starts = _starts(length, 5, 2)
    covered = {p for s in starts for p in range(s, s + 5)}
    assert covered == set(range(length)) and starts == sorted(set(starts))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (31, 45), (29, 10), (6, 30), (30, 6)])
@pytest.mark.parametrize(("size", "overlap"), [(5, 2), (5, 4), (6, 1)])
def test_waves_keep_the_reading_order_of_patches_that_touch(height, width, size, overlap):
    rows, columns = _starts(height, size, overlap), _starts(width, size, overlap)
    when = {patch: time for time, group in enumerate(_waves(rows, columns, size)) for patch in group}
    assert len(when) == len(rows) * len(columns)
    for (i, j), time in when.items():
        for (k, m), other in when.items():
            touch = abs(rows[i] - rows[k]) < size and abs(columns[j] - columns[m]) < size
            if touch and (i, j) < (k, m):
                assert time < other


def test_search_equals_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    database, queries = torch.rand(700, 75, generator=generator), torch.rand(300, 75, generator=generator)
    expected = (
        NearestNeighbors(n_neighbors=4, algorithm="brute")
        .fit(database.numpy())
        .kneighbors(queries.numpy())[1]
    )
    assert np.array_equal(_nearest(queries, database, 4, budget=50_000).numpy(), expected)
    doubled = torch.cat([database, database])
    assert (_nearest(queries, doubled, 1) < 700).all()


@pytest.mark.parametrize(("down", "right"), [(2, 2), (0, 2), (2, 0), (3, 3), (4, 2), (1, 1)])
def test_seam_is_the_minimum_cut(down, right):
    generator = torch.Generator().manual_seed(down * 10 + right)
    old, new = (torch.rand(6, 1, 3, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    taken = _cut(old, new, [down], [right])[:, 0]
    difference = (old - new).abs().sum(2)[:, 0]
    for d, label in zip(difference.tolist(), taken.tolist(), strict=True):
        graph = networkx.Graph()
        for y in range(5):
            for x in range(5):
                if (y == 0 and down) or (x == 0 and right):
                    graph.add_edge("old", (y, x))  # no capacity: infinite
                    assert not label[y][x]
                elif y >= down and x >= right:
                    graph.add_edge("new", (y, x))
                    assert label[y][x]
                for dy, dx in ((0, 1), (1, 0)):
                    if y + dy < 5 and x + dx < 5:
                        graph.add_edge((y, x), (y + dy, x + dx), capacity=d[y][x] + d[y + dy][x + dx])
        cut = sum(
            e["capacity"]
            for (a, b, e) in graph.edges(data=True)
            if "capacity" in e and label[a[0]][a[1]] != label[b[0]][b[1]]
        )
        assert cut == pytest.approx(networkx.minimum_cut_value(graph, "old", "new"))


def test_seams_are_less_visible_than_overwriting(pictures, photos):
    images = photos(4, 32, 32)
    cut, over = (create(seam=seam)(images) for seam in ("graph_cut", "overwrite"))
    assert not torch.equal(cut, over)
    assert (cut - images).abs().mean() < 0.3

    def steps(x):
        return (x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()).item()

    assert steps(cut) < steps(over)


def test_all_values_come_from_the_database(pictures, photos):
    images = photos(2, 20, 17)
    defense = create()
    out = defense(images)
    assert torch.isin(out, defense.database).all() and out.shape == images.shape


def test_drawing_among_neighbors_is_random_per_image(pictures, photos, streams):
    images = photos(1, 20, 20).repeat(3, 1, 1, 1)
    defense = create(neighbors=10)
    assert defense.stochastic and not create().stochastic
    out = defense.purify(images, streams(3)).images
    assert not torch.equal(out[0], out[1])
    assert torch.equal(defense.purify(images[1:], streams(3).select([1, 2])).images, out[1:])


def test_database_depends_on_its_seed_alone(pictures):
    first, again, other = create(), create(), create(seed=1)
    images = pictures[:1]
    for defense in (first, again, other):
        defense(images)
    assert first.database.shape == (500, 75)
    assert torch.equal(first.database, again.database) and not torch.equal(first.database, other.database)


def test_identity_holds_the_digest_of_the_dataset(pictures):
    identity = create().identity()
    assert identity["patches_from"] == "pictures-train-24" and "dataset_params" not in identity["params"]
    other = create(dataset_params={"split": "test"}).identity()
    assert other["patches_from"] != identity["patches_from"]


def test_bpda_searches_once_for_value_and_gradient_and_anew_for_other_images_or_patches(
    monkeypatch, pictures
):
    searches = []
    monkeypatch.setattr(
        "defenses.quilting._nearest", lambda *args: searches.append(len(args[0])) or _nearest(*args)
    )
    defense = create()
    bpda(defense, pictures[:2].clone().requires_grad_())
    assert len(searches) == 1
    first = defense(pictures[2:4])
    assert len(searches) == 2
    assert torch.equal(first, create()(pictures[2:4]))
    defense.database = defense.database.flip(0) / 2
    assert not torch.equal(defense(pictures[2:4]), first)


def test_default_database_is_the_embedded_training_split():
    defense = DEFENSES.create("quilting", SMALL)
    assert defense.source.name == "mini_digits" and defense.source.params["split"] == "train"
    assert defense(torch.rand(1, 3, 12, 12)).shape == (1, 3, 12, 12)


def test_surrogate_of_one_patch_is_a_weighted_mean_and_moves_along_the_patches_it_averages():
    """Its derivative is 2 / scale times the weighted covariance of the patches."""
    defense = DEFENSES.create("quilting", {"patches": 16})
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(16, 75, generator=generator, dtype=torch.float64)
    defense.database = patches
    x = torch.rand(1, 3, 5, 5, generator=generator, dtype=torch.float64).requires_grad_()
    cotangent = torch.randn(75, generator=generator, dtype=torch.float64)
    out = defense.surrogate(x)
    (grad,) = torch.autograd.grad(out, x, cotangent.view(1, 3, 5, 5))
    distance = ((x.detach().flatten() - patches) ** 2).sum(1)
    scale = 0.1 * distance.mean()
    weight = torch.exp(-(distance - distance.min()) / scale)
    weight /= weight.sum()
    mean = weight @ patches
    covariance = (patches - mean).T @ ((patches - mean) * weight[:, None])
    assert torch.allclose(out.flatten(), mean)
    assert torch.allclose(grad.flatten(), 2 / scale * covariance @ cotangent)


def test_surrogate_is_near_the_quilt(pictures, photos):
    images = photos(2, 20, 17)
    defense = create()
    quilt = defense(images)
    assert (defense.surrogate(images) - quilt).abs().mean() < 0.5 * (quilt - images).abs().mean() + 0.02
    x = images.clone().requires_grad_()
    (grad,) = torch.autograd.grad(defense.surrogate(x).square().sum(), x)
    assert torch.isfinite(grad).all() and (grad != 0).float().mean() > 0.9
    plain = create(gradient="identity")
    assert torch.equal(plain.surrogate(images), images)


def test_bad_input_is_one_line(pictures):
    for params, message in (
        ({"size": 1}, "size must be in 2..10"),
        ({"overlap": 5}, "overlap must be in 1..4"),
        ({"neighbors": 0}, "neighbors must be in 1..500"),
        ({"dataset": "mini_digit"}, "did you mean 'mini_digits'"),
        ({"dataset_params": {"splitt": "train"}}, "did you mean 'split'"),
    ):
        with pytest.raises(PluginError, match=message):
            create(**params)
    with pytest.raises(NotApplicable, match="4x9 pixels are smaller than a patch"):
        create().check_input((4, 9))
    with pytest.raises(DataError, match="only 0 patches of 5x5"):
        create(dataset_params={"side": 4})(torch.rand(1, 3, 9, 9))
