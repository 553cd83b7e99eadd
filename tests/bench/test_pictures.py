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
from bench.pictures import picture, save, strip
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
        "defenses": ["random", "jpeg"],
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


@pytest.mark.parametrize("defense", ["random", "jpeg"])
def test_a_strip_shows_what_was_evaluated(ran: tuple[Options, Store], defense: str) -> None:
    options, store = ran
    plan = make_plan(options)
    cell = plan.cell(f"classification / {defense} / pgd / oblivious")
    clean = plan.cell(f"classification / {defense} / clean")
    for place in (0, 5):
        row = strip(cell, store, place, CPU)
        headings = [heading for heading, _, _ in row.panels]
        assert headings == ["clean", "attacked", "noise x10", "attacked, purified", "clean, purified"]
        said = {heading: prediction for heading, _, prediction in row.panels}
        rows = load_rows(cell_record(store, cell), cell.target.ids)
        assert int(said["attacked, purified"] == row.truth) == rows[place]["score"]
        images = {heading: image for heading, image, _ in row.panels}
        noise = images["attacked"] - images["clean"]
        assert 0 < float(noise.abs().max()) <= 16 / 255 + 1e-6
        assert torch.allclose(images["noise x10"], (10 * noise + 0.5).clamp(0, 1))
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


def test_mistakes(ran: tuple[Options, Store], tmp_path: Path) -> None:
    options, store = ran
    cell = make_plan(options).cell("classification / jpeg / pgd / oblivious")
    with pytest.raises(GridError, match="has images 0 to 11"):
        strip(cell, store, 12, CPU)
    with pytest.raises(GridError, match=r"unknown image of cell .*toy-1"):
        strip(cell, store, "toy-111", CPU)
    with pytest.raises(StoreError, match="run the grid first"):
        strip(cell, Store(tmp_path / "empty"), 0, CPU)
    with pytest.raises(GridError, match=r"expected a \.png or \.svg"):
        save(picture([strip(cell, store, 0, CPU)]), tmp_path / "p.gif")


def axes() -> Any:
    return Figure().subplots()


def test_what_tasks_draw() -> None:
    labels = np.array([[0, 1], [2, 255]])
    plot = axes()
    caption = task_instance("segmentation").draw(plot, labels, ("sky", "zero", "one"))
    assert caption == "zero, one"
    shown = np.asarray(plot.images[0].get_array())
    assert shown[0, 0, 3] == 0 and shown[0, 1, 3] > 0 and not np.array_equal(shown[0, 1], shown[1, 0])
    assert np.allclose(shown[1, 1, :3], 0.5)

    detection = task_instance("detection")
    found = Detections(
        torch.tensor([[1.0, 2, 5, 8], [0, 0, 9, 9]]), torch.tensor([0.9, 0.2]), torch.tensor([1, 0])
    )
    plot = axes()
    assert detection.draw(plot, found, ("a", "b")) == "1 found"
    (box,) = plot.patches
    assert box.get_bbox().bounds == (1, 2, 4, 6) and plot.texts[0].get_text() == "b 0.9"
    truth = Objects(np.array([[1.0, 2, 4, 6]]), np.array([1]), (10, 10), 2, scale=(2.0, 2.0))
    plot = axes()
    assert detection.draw(plot, truth, ("a", "b")) == ""
    assert plot.patches[0].get_bbox().bounds == (2, 4, 8, 12) and plot.texts[0].get_text() == "b"
