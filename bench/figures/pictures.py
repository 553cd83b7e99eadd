"""What cells look like: images clean, attacked and purified, with what the target says of each."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import pandas as pd
from pydantic import Field

from bench.errors import GridError
from bench.figures.base import FigureKind, Source, Where, attacked, labels
from bench.pictures import RIGHT, Column, Strip, picture, position, strips_of
from bench.plan import Cell, Plan, task_instance
from bench.registry import FIGURES
from bench.views import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@FIGURES.register_module(name="pictures")
class Pictures(FigureKind):
    """Images of cells with predictions, boxes, label maps or class activation maps.

    CAFD's Fig. 1 and 4 (Zhou et al. 2021), alignment's Fig. 4 and 7 to 9 (Xu et al. 2020), NRP's Fig. 6 to 8 (Naseer
    et al. 2020), HGD's Fig. 6 (Liao et al. 2018). A row is an image of a cell. Below each panel stands what the target
    says of it, and how right that is (`Task.verdict`).

    Args:
        where: which cells.
        images: that many of each role, the first ones that the bare target gets right (a score of at least 0.9; others
            only where there are too few), or positions in the data set.
        columns: what to show; `noise` and `left` are ten times what the attack added, and what the defense left of it.
        cam: also show class activation maps, each over its own range, with their correlation with the clean image's;
            classifiers alone.
    """

    def __init__(
        self,
        where: Where = {},  # noqa: B006
        images: Annotated[int, Field(ge=1)] | Annotated[list[int], Field(min_length=1)] = 3,
        columns: Annotated[list[Column], Field(min_length=1)] = ["clean", "attacked", "purified"],  # noqa: B006
        cam: bool = False,
    ) -> None:
        if cam and not set(columns) - {"truth", "noise", "left"}:
            raise GridError("cam: expected a column that is predicted, such as clean")
        self.where, self.images, self.columns, self.cam = where, images, columns, cam

    def check(self, plan: Plan) -> None:
        """See `FigureKind.check`; also refuses images that a cell does not have, and maps of other tasks."""
        for cell in attacked(plan, self.where):
            if self.cam and cell.target.task != "classification":
                raise GridError(
                    f"cam: cell '{cell.label}' is of task {cell.target.task}, expected cells of classification"
                )
            for place in self.images if isinstance(self.images, list) else ():
                position(cell, place)

    def compute(self, source: Source) -> pd.DataFrame:
        """A line for each panel: role, defense, attack, level_label, n, image, panel, truth, prediction.

        Of predictions also verdict and score; noise, its mean size of 255, and cam_like_clean, the correlation, where
        asked for. What `draw` shows goes with them, in `attrs["strips"]`.
        """
        rows = list(self._rows(source))
        lines = pd.DataFrame([line for cell, count, strip in rows for line in _lines(cell, count, strip)])
        unused = {"noise": {"noise", "left"}.isdisjoint(self.columns), "cam_like_clean": not self.cam}
        lines = lines.drop(columns=[column for column, drop in unused.items() if drop])
        varying = [c for c in ("role", "defense", "attack", "level_label") if lines[c].nunique() > 1]
        lines.attrs["strips"] = [
            replace(strip, title="\n".join(_broken([labels(cell)[c] for c in varying], strip.image)))
            for cell, _, strip in rows
        ]
        return lines

    def draw(self, lines: pd.DataFrame) -> Figure:
        """A row for each image of each cell."""
        return picture(lines.attrs["strips"], size=1.75)

    def _rows(self, source: Source) -> Iterator[tuple[Cell, int, Strip]]:
        """Cells and rows, role by role, the cells of one image together; with the number of images."""
        cells = source.applicable(attacked(source.plan, self.where))
        for role in dict.fromkeys(cell.target.role for cell in cells):
            own = [cell for cell in cells if cell.target.role == role]
            ids = self._chosen(source, own[0])
            found: list[list[Strip]] = []
            for cell in own:
                strips: list[Strip] = []

                def consume(view: View, strips: list[Strip] = strips) -> None:
                    strips.extend(strips_of(view, self.columns, self.cam))

                source.views(cell, consume, ids)
                found.append(strips)
            for same in zip(*found, strict=True):
                yield from ((cell, len(ids), strip) for cell, strip in zip(own, same, strict=True))

    def _chosen(self, source: Source, cell: Cell) -> list[str]:
        if isinstance(self.images, list):
            return [position(cell, place) for place in self.images]
        task, right = task_instance(cell.target.task), set[str]()

        def consume(view: View) -> None:
            said = view.model.predict(view.batch.images)
            for id, prediction, truth in zip(view.batch.ids, said, view.batch.targets, strict=True):
                if task.rows(prediction, truth)["score"] >= RIGHT:
                    right.add(id)

        source.views(cell, consume)
        ids = cell.target.ids
        return sorted(sorted(ids, key=lambda id: id not in right)[: self.images], key=ids.index)


def _broken(labels: Sequence[str], image: str) -> list[str]:
    """Lines that are not longer than a row is high."""
    return [textwrap.fill(label.replace("+", " + "), 30) for label in (*labels, f"image {image}")]


def _lines(cell: Cell, count: int, strip: Strip) -> Iterator[dict[str, Any]]:
    task = task_instance(strip.task)
    about = {**labels(cell), "n": count, "image": strip.image}
    truth = task.words(strip.truth, strip.classes)
    for panel in strip.panels:
        said = "" if panel.prediction is None else task.words(panel.prediction, strip.classes)
        yield {
            **about, "panel": " ".join(panel.heading.split()), "truth": truth, "prediction": said,
            "verdict": panel.verdict, "score": _round(panel.score), "noise": _round(panel.noise),
            "cam_like_clean": _round(panel.likeness),
        }  # fmt: skip


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
