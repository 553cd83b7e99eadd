"""Pictures of cells: the images that were evaluated, and what the model said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure

from bench.cli import main
from bench.errors import GridError, StoreError
from bench.frame import load_rows
from bench.pictures import Panel, Strip, enlarged, likeness, picture, save, strip
from bench.plan import Options, make_plan, task_instance
from bench.runner import cell_record
from bench.store import Store
from tasks.detection.objects import Detections, Objects
from tests.bench.test_run import GRID

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Options, Store]:
    folder = tmp_path_factory.mktemp("pictures")
    block = {
        "roles": ["classification"],
        "defenses": ["random", "jpeg", "random_resize_pad"],
        "attacks": ["pgd"],
        "threats": ["oblivious"],
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump({**GRID, "blocks": [block], "evaluate": {"repeats": 1}}))
    main(
        [
            "run",
            "--grid",
            str(folder / "toy.yaml"),
            "--store",
            str(folder / "s"),
            "--out",
            str(folder / "o"),
            "-q",
        ]
    )
    return Options(folder / "toy.yaml"), Store(folder / "s")


@pytest.mark.parametrize("defense", ["random", "jpeg", "random_resize_pad"])
def test_a_strip_shows_what_was_evaluated(ran: tuple[Options, Store], defense: str) -> None:
    options, store = ran
    plan = make_plan(options)
    cell = plan.cell(f"classification / {defense} / pgd / oblivious")
    clean = plan.cell(f"classification / {defense} / clean")
    for place in (0, 5):
        row = strip(cell, store, place, CPU)
        panels = {panel.heading: panel for panel in row.panels}
        assert list(panels) == [
            "ground truth", "clean", "attacked", "noise x10", "attacked, purified", "clean, purified"
        ]  # fmt: skip
        assert row.image == cell.target.ids[place] and panels["ground truth"].prediction == row.truth
        rows = load_rows(cell_record(store, cell), cell.target.ids)
        purified = panels["attacked, purified"]
        assert int(purified.prediction == row.truth) == rows[place]["score"] == purified.score
        noise = panels["attacked"].image - panels["clean"].image
        assert 0 < float(noise.abs().max()) <= 16 / 255 + 1e-6
        assert torch.allclose(panels["noise x10"].image, (10 * noise + 0.5).clamp(0, 1))
        assert panels["noise x10"].noise == pytest.approx(255 * float(noise.abs().mean()), rel=1e-5)
    assert clean.craft is None
    with pytest.raises(GridError, match="has no adversarial images"):
        strip(clean, store, 0, CPU)


def test_the_command_writes_a_file(ran: tuple[Options, Store], tmp_path: Path) -> None:
    options, store = ran
    cells = [f"classification / {d} / pgd / oblivious" for d in ("random", "jpeg")]
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        out = tmp_path / f"p{suffix}"
        main(["picture", *cells, "--grid", str(options.grid), "--store", str(store.root), "-o", str(out)])
        assert out.read_bytes().startswith(magic)


def test_the_command_names_targets_without_class_activation_maps(
    ran: tuple[Options, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, store = ran
    cell = "classification / jpeg / pgd / oblivious"
    with pytest.raises(SystemExit, match="2"):
        main(
            [
                "picture",
                cell,
                "--cam",
                "-g",
                str(options.grid),
                "--store",
                str(store.root),
                "-o",
                str(tmp_path / "p.png"),
            ]
        )
    err = capsys.readouterr().err
    assert f"cell '{cell}': class activation features need a target that ends in a linear layer" in err
    assert err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_mistakes(ran: tuple[Options, Store], tmp_path: Path) -> None:
    options, store = ran
    cell = make_plan(options).cell("classification / jpeg / pgd / oblivious")
    with pytest.raises(GridError, match="has images 0 to 11"):
        strip(cell, store, 12, CPU)
    with pytest.raises(GridError, match=r"unknown image of cell .*toy-1"):
        strip(cell, store, "toy-111", CPU)
    resizing = make_plan(options).cell("classification / random_resize_pad / pgd / oblivious")
    with pytest.raises(GridError, match="the defense resizes images: noise cannot be compared"):
        strip(resizing, store, 0, CPU, ["left"])
    with pytest.raises(StoreError, match="run the grid first"):
        strip(cell, Store(tmp_path / "empty"), 0, CPU)
    with pytest.raises(GridError, match=r"expected a \.png or \.svg"):
        save(picture([strip(cell, store, 0, CPU)]), tmp_path / "p.gif")


def test_likeness_and_range_of_maps() -> None:
    cam = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    assert likeness(cam, 3 * cam + 7) == pytest.approx(1) and likeness(cam, -cam) == pytest.approx(-1)
    assert likeness(cam, torch.tensor([[1.0, 0.0], [0.0, 4.0]])) == pytest.approx(
        np.corrcoef([0, 1, 2, 5], [1, 0, 0, 4])[0, 1]
    )
    assert likeness(cam, torch.zeros(2, 2)) is None and likeness(cam, torch.zeros(3, 3)) is None
    assert torch.allclose(enlarged(cam - 9, (2, 2)), cam / 5)
    # Half a pixel of the map is its border's: 0, then a quarter and three quarters of the way, then 1.
    assert enlarged(torch.tensor([[-2.0, 2.0]]), (1, 4)).tolist()[0] == pytest.approx([0, 0.25, 0.75, 1])
    assert enlarged(torch.full((2, 2), 3.0), (4, 4)).abs().max() == 0


def test_what_a_picture_shows() -> None:
    image, cam = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.eye(2)
    found = Detections(torch.tensor([[1.0, 2, 5, 8]]), torch.tensor([0.9]), torch.tensor([1]))
    labels = torch.zeros(8, 8, dtype=torch.long)
    rows = [
        Strip("one", "classification", ("a", "b"), "0", (
            Panel("clean", image, 1, 1.0, "✓"), Panel("attacked", image, 0, 0.0, "✗"),
            Panel("map", image, cam=cam, likeness=0.256), Panel("noise", image, noise=12.34),
        ), 1),
        Strip("two", "detection", ("a", "b"), "0", (
            Panel("clean", image, found, 0.5, "0 of 2 right, 1 false"), *[Panel("attacked", image)] * 3
        ), None),
        Strip("three", "segmentation", ("a", "b"), "0", (
            Panel("clean", image, labels + 1, 1.0, "100% of pixels right"), *[Panel("attacked", image)] * 3
        ), None),
    ]  # fmt: skip
    figure = picture(rows)
    shown = np.array(figure.axes).reshape(3, 4)
    assert [axes.get_title() for axes in shown[0]] == ["clean", "attacked", "map", "noise"]
    assert not any(axes.get_title() for axes in shown[1:].flat)
    assert [axes.get_xlabel() for axes in shown[0]] == [
        "b ✓", "a ✗", "like clean's: 0.26", "mean 12.3 of 255"
    ]  # fmt: skip
    assert [row[0].get_xlabel() for row in shown[1:]] == [
        "1 found\n0 of 2 right, 1 false",
        "b\n100% of pixels right",
    ]
    assert [row[0].get_ylabel() for row in shown] == ["one", "two", "three"]
    assert len(shown[1, 0].patches) == 1 and len(shown[2, 0].images) == 2
    overlay = np.asarray(shown[0, 2].images[1].get_array())
    assert np.allclose(overlay, enlarged(cam, (8, 8))) and shown[0, 2].collections


def axes() -> Any:
    return Figure().subplots()


def test_what_tasks_draw() -> None:
    labels = np.array([[0, 1], [2, 255]])
    plot = axes()
    caption = task_instance("segmentation").draw(plot, labels, ("sky", "zero", "one"))
    assert caption == "zero, one"
    assert task_instance("segmentation").words(np.arange(7), tuple("abcdefg")) == "b, c, d, e, f, g"
    shown = np.asarray(plot.images[0].get_array())
    assert shown[0, 0, 3] == 0 and shown[0, 1, 3] > 0 and not np.array_equal(shown[0, 1], shown[1, 0])
    assert np.allclose(shown[1, 1, :3], 0.5)

    detection = task_instance("detection")
    found = Detections(
        torch.tensor([[1.0, 2, 5, 8], [0, 0, 9, 9]]), torch.tensor([0.9, 0.2]), torch.tensor([1, 0])
    )
    plot = axes()
    assert detection.draw(plot, found, ("a", "b")) == "1 found"
    assert detection.words(found, ("a", "b")) == "b 0.9"
    (box,) = plot.patches
    assert box.get_bbox().bounds == (1, 2, 4, 6) and plot.texts[0].get_text() == "b 0.9"
    truth = Objects(np.array([[1.0, 2, 4, 6]]), np.array([1]), (10, 10), 2, scale=(2.0, 2.0))
    plot = axes()
    assert detection.draw(plot, truth, ("a", "b")) == "" and detection.words(truth, ("a", "b")) == "b"
    assert plot.patches[0].get_bbox().bounds == (2, 4, 8, 12) and plot.texts[0].get_text() == "b"


def test_verdicts() -> None:
    assert [task_instance("classification").verdict(said, 1) for said in (1, 0)] == ["✓", "✗"]
    truth = torch.tensor([[0, 1], [2, 255]])
    said = torch.tensor([[0, 2], [2, 2]])
    assert task_instance("segmentation").verdict(said, truth) == "67% of pixels right"
    objects = Objects(np.array([[0.0, 0, 4, 4], [6, 6, 4, 4]]), np.array([0, 1]), (10, 10), 2)
    # The first is right, the second on the same object, the third of another class, the fourth is not shown.
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 3], [6, 6, 10, 10], [6, 6, 10, 10]])
    found = Detections(boxes, torch.tensor([0.9, 0.8, 0.7, 0.2]), torch.tensor([0, 0, 0, 1]))
    assert task_instance("detection").verdict(found, objects) == "1 of 2 right, 2 false"


def test_labels_of_boxes_hide_no_other_and_stay_in_the_image() -> None:
    plot = axes()
    plot.imshow(np.zeros((100, 100, 3)))
    corners = [[10, 30, 60, 80], [11, 31, 61, 81], [12, 30, 60, 80], [90, 1, 99, 50], [10, 30, 60, 80.0]]
    found = Detections(torch.tensor(corners), torch.full((5,), 0.9), torch.tensor([0, 1, 0, 1, 1]))
    task_instance("detection").draw(plot, found, ("three", "four"))
    figure = plot.figure
    figure.set_size_inches(2.0, 2.0)
    plot.set_position([0, 0, 1, 1])
    figure.canvas.draw()
    frame, extents = plot.get_window_extent(), [text.get_window_extent() for text in plot.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(extents) for b in extents[:i])
    assert all(
        frame.x0 <= e.x0 and e.x1 <= frame.x1 and frame.y0 <= e.y0 and e.y1 <= frame.y1 for e in extents
    )
