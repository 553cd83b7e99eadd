"""Where the target sees clean, attacked and purified images: t-SNE of its features."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Annotated

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from bench.errors import GridError
from bench.figures.base import FigureKind, Source, Where, attacked, labels, panels
from bench.plan import Cell, Plan
from bench.protocols import Batch
from bench.registry import FIGURES
from bench.rng import ImageRNG, derive_seed
from bench.views import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETS = ("clean", "attacked", "attacked, purified", "clean, purified")
NEIGHBOURS = 5
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghjkmnpqr"
"""Signs of classes; without those that look like others."""
AGREEMENT = f"agreement: mean share of a point's {NEIGHBOURS} nearest clean points (by features) that are of its class"


@FIGURES.register_module(name="tsne")
class TSNE(FigureKind):
    """t-SNE of the target's features, four panels a cell: alignment's Fig. 1 and 6 (Xu et al. 2020).

    A point is an image (classification), a pixel of the maps (segmentation) or a ground-truth box (detection), as the
    class-aware losses see them (`defenses.training.guide.Guide.aligned`); the same ones in every panel. One embedding
    for all four sets, so that positions can be compared. t-SNE keeps neighbourhoods and no distances: `agreement`, the
    mean share of a point's 5 nearest clean points (its own left out) that have its class, is taken among the features.

    Args:
        where: which cells; a row each.
        layer: of the features, a module of the target's network; None = the maps before the last linear map. Of
            detectors always those that boxes are cropped from.
        points: at most this many of each class.
        perplexity: of t-SNE; at most a third of the points.
    """

    def __init__(
        self,
        where: Where = {},  # noqa: B006
        layer: str | None = None,
        points: Annotated[int, Field(ge=2)] = 40,
        perplexity: Annotated[float, Field(gt=0)] = 30,
    ) -> None:
        self.where, self.layer, self.points, self.perplexity = where, layer, points, perplexity

    def check(self, plan: Plan) -> None:
        """See `FigureKind.check`."""
        attacked(plan, self.where)

    def compute(self, source: Source) -> pd.DataFrame:
        """Columns role, defense, attack, level_label, n, set, class, name, x, y, agreement (of the set)."""
        cells = source.applicable(attacked(source.plan, self.where))
        return pd.concat([self._cell(source, cell) for cell in cells], ignore_index=True)

    def _cell(self, source: Source, cell: Cell) -> pd.DataFrame:
        from sklearn import manifold

        found: list[list[Tensor]] = [[] for _ in SETS]
        classes: list[Tensor] = []

        def consume(view: View) -> None:
            parts, kinds = self._vectors(view)
            for known, part in zip(found, parts, strict=True):
                known.append(part)
            classes.append(kinds)

        source.views(cell, consume)
        kinds = torch.cat(classes)
        keep = first_of_each(kinds, self.points)
        if len(keep) < 4:
            raise GridError(
                f"cell '{cell.label}': {len(keep)} labelled points are too few for t-SNE, expected 4 or more"
            )
        kinds, sets = kinds[keep], [torch.cat(part)[keep] for part in found]
        every = torch.cat(sets).double().numpy()
        embedding = manifold.TSNE(
            perplexity=min(self.perplexity, (len(every) - 1) / 3), init="pca", learning_rate="auto",
            random_state=derive_seed(cell.key, "tsne") % 2**32,
        )  # fmt: skip
        places = embedding.fit_transform(every).reshape(len(SETS), len(keep), 2)
        names = cell.target.dataset.classes
        return pd.concat(
            [
                pd.DataFrame(
                    {
                        **labels(cell),
                        "n": len(cell.target.ids),
                        "set": name,
                        "class": kinds.numpy(),
                        "name": [names[k] for k in kinds.tolist()],
                        "x": place[:, 0],
                        "y": place[:, 1],
                        "agreement": agreement(vectors, sets[0], kinds),
                    }
                )
                for name, place, vectors in zip(SETS, places, sets, strict=True)
            ],
            ignore_index=True,
        )

    def _vectors(self, view: View) -> tuple[list[Tensor], Tensor]:
        """The vectors (N, C) of each set, and their classes (N,): some of every class in every image."""
        from defenses.training.guide import Guide

        clean, out = view.batch.images, [view.purify(x).images for x in (view.attacked, view.batch.images)]
        if out[0].shape != clean.shape:
            raise GridError(
                f"cell '{view.cell.label}': the defense resizes images: features cannot be compared"
            )
        guide = Guide(view.model)
        layer = None if guide.task == "detection" else guide.layer(self.layer, clean)
        # Dense maps of many images would not fit into memory; of an image one vector, so there they go together.
        size = len(clean) if guide.task == "classification" else 1
        parts: list[list[Tensor]] = [[] for _ in SETS]
        classes: list[Tensor] = []
        share = math.ceil(2 * self.points / len(view.cell.target.ids))
        for start in range(0, len(clean), size):
            some = slice(start, start + size)
            batch = Batch(clean[some], view.batch.targets[some], view.batch.ids[some])
            rng = ImageRNG.for_images(view.cell.key, batch.ids).fork("tsne")
            keep: Tensor | None = None
            for known, images in zip(parts, (clean, view.attacked, *out), strict=True):
                _, vectors, kinds = guide.aligned(images[some], batch.targets, layer)
                if keep is None:
                    keep = _chosen(kinds.cpu(), rng, share, whole=size > 1)
                    classes.append(kinds.cpu()[keep])
                known.append(vectors.cpu()[keep])
        return [torch.cat(part) for part in parts], torch.cat(classes)

    def draw(self, lines: pd.DataFrame) -> Figure:
        """A row for each cell, a panel for each set; a point's sign stands for its class (`signs_of`)."""
        rows = [part for _, part in lines.groupby(["role", "defense", "attack", "level_label"], sort=False)]
        figure, grid = panels(len(rows), len(SETS), (2.9, 2.9), sharex="row", sharey="row")
        signs, order = signs_of(lines), list(dict.fromkeys(map(str, _ordered(lines)["name"])))
        for axes_row, part in zip(grid, rows, strict=True):
            for axes, name in zip(axes_row, SETS, strict=True):
                points = part[part["set"] == name]
                for (kind, word), own in points.groupby(["class", "name"]):
                    sign = signs.get(str(word), str(kind))
                    axes.scatter(
                        own["x"], own["y"], s=34 if len(sign) < 3 else 10, linewidths=0.3,
                        marker=f"$\\mathrm{{{sign}}}$" if len(sign) < 3 else "o",
                        color=f"C{order.index(str(word)) % 10}",
                    )  # fmt: skip
                axes.set_title(f"{name}\nagreement {points['agreement'].iloc[0]:.0%}", fontsize=10)
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[["top", "right"]].set_visible(True)
            line = part.iloc[0]
            axes_row[0].set_ylabel(
                f"{line['role']}, {line['defense']}\n{line['attack']}, {line['level_label']}", fontsize=9
            )
        width = int(figure.get_figwidth() * 11.5)
        texts = [text for text in (legend_of(lines), AGREEMENT) if text]
        below = [line for text in texts for line in textwrap.wrap(text, width)]
        figure.supxlabel("\n".join(below), fontsize=9)
        return figure


def signs_of(lines: pd.DataFrame) -> dict[str, str]:
    """What stands for each class name: the name where all are one character, else a letter; of too many, nothing."""
    names = list(dict.fromkeys(map(str, _ordered(lines)["name"])))
    if len(names) > len(LETTERS):
        return {}
    return dict(zip(names, names if all(len(name) == 1 for name in names) else LETTERS, strict=False))


def legend_of(lines: pd.DataFrame) -> str:
    """The signs in words; "" where they are the names."""
    signs = signs_of(lines)
    if not signs:
        return "signs: class numbers"
    return ", ".join(f"{sign} = {name}" for name, sign in signs.items() if sign != name)


def _ordered(lines: pd.DataFrame) -> pd.DataFrame:
    """The classes that occur, role by role, by number."""
    first = lines.drop_duplicates(["role", "class"])
    return pd.concat([part.sort_values("class") for _, part in first.groupby("role", sort=False)])


def _chosen(kinds: Tensor, rng: ImageRNG, share: int, whole: bool) -> Tensor:
    """Indices of the things to keep of an image, `share` of each class, drawn at random; `whole`: all of them."""
    order = torch.arange(len(kinds)) if whole else rng.permutation(len(kinds))[0]
    order = order[kinds[order] >= 0]
    return order if whole else order[first_of_each(kinds[order], share)]


def first_of_each(kinds: Tensor, count: int) -> Tensor:
    """Indices (M,) of the first `count` entries of each class, in order.

    Args:
        kinds: (N,) integers.
        count: at least 1.
    """
    seen: dict[int, int] = {}
    kept = []
    for index, kind in enumerate(kinds.tolist()):
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= count:
            kept.append(index)
    return torch.tensor(kept, dtype=torch.long)


def agreement(vectors: Tensor, clean: Tensor, kinds: Tensor) -> float:
    """Mean share of the nearest clean vectors, a thing's own left out, that are of its class.

    Args:
        vectors: (N, C) features of N things.
        clean: (N, C) clean features of the same things.
        kinds: (N,) their classes.
    """
    far = torch.cdist(vectors.double(), clean.double())
    far.fill_diagonal_(float("inf"))
    nearest = far.topk(min(NEIGHBOURS, len(clean) - 1), largest=False).indices
    return float(np.mean((kinds[nearest] == kinds[:, None]).double().numpy()))
