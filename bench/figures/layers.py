"""How a perturbation grows from layer to layer of the target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from bench.errors import GridError
from bench.figures.base import FigureKind, Source, Where, labels, legend, mean_line, panels, select
from bench.plan import Cell, Plan
from bench.plotting import stroke
from bench.protocols import TargetModel
from bench.registry import FIGURES
from bench.views import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PIXELS = "pixels"


@FIGURES.register_module(name="layers")
class Layers(FigureKind):
    """Perturbation of the target's layers, relative to the clean image: HGD's Fig. 5 (Liao et al. 2018, equation 6).

    E_l(x_p, x) = ||f_l(x_p) - f_l(x)|| / ||f_l(x)||, mean over images, where x_p is what comes out of the defense. The
    paper does not say which norm; its losses are L1.

    Args:
        series: name -> the cell it is of, as in `where`.
        where: what all of these cells have.
        layers: modules of the target's network; None = its blocks (`blocks`). The pixels come first either way.
        norm: 1 or 2.
    """

    def __init__(
        self,
        series: dict[str, Where],
        where: Where = {},  # noqa: B006
        layers: list[str] | None = None,
        norm: Literal[1, 2] = 1,
    ) -> None:
        if not series:
            raise GridError("series: expected at least one")
        self.series, self.where, self.layers, self.norm = series, where, layers, norm

    def check(self, plan: Plan) -> None:
        """See `FigureKind.check`; also refuses series of several cells, or of several roles."""
        self._cells(plan)

    def _cells(self, plan: Plan) -> dict[str, Cell]:
        found = {}
        for name, where in self.series.items():
            at = f"series.{name}"
            cells = select(plan, {**self.where, **where}, at)
            if len(cells) > 1:
                raise GridError(f"{at}: expected one cell, got '{cells[0].label}' and '{cells[1].label}'")
            found[name] = cells[0]
        roles = sorted({cell.target.role for cell in found.values()})
        if len(roles) > 1:
            raise GridError(
                f"series: expected cells of one role, whose layers are compared, got {', '.join(roles)}"
            )
        return found

    def compute(self, source: Source) -> pd.DataFrame:
        """Columns series, role, defense, attack, level_label, index and layer, value, low, high, n."""
        cells = self._cells(source.plan)
        kept = source.applicable(list(cells.values()))
        lines = []
        chosen: list[str] = list(self.layers or ())
        for name, cell in ((n, c) for n, c in cells.items() if c in kept):
            seen: dict[str, list[float]] = {}

            def consume(view: View, cell: Cell = cell, seen: dict[str, list[float]] = seen) -> None:
                clean, out = view.batch.images, view.purify(view.attacked).images
                if out.shape != clean.shape:
                    raise GridError(
                        f"cell '{cell.label}': the defense resizes images: layers cannot be compared"
                    )
                chosen[:] = chosen or blocks(view.model, clean[:1])
                found = {PIXELS: relative(out, clean, self.norm)}
                for layer in chosen:
                    found[layer] = relative(
                        view.model.features(out, layer), view.model.features(clean, layer), self.norm
                    )
                for layer, values in found.items():
                    seen.setdefault(layer, []).extend(values.tolist())

            source.views(cell, consume)
            lines += [
                {"series": name, **labels(cell), "index": index, "layer": layer, **mean_line(values)}
                for index, (layer, values) in enumerate(seen.items())
            ]
        return pd.DataFrame(lines)

    def draw(self, lines: pd.DataFrame) -> Figure:
        """One panel, layers from the pixels to the top along the axis; bands are 95 % intervals."""
        layers = list(dict.fromkeys(lines["layer"]))
        figure, ((axes,),) = panels(1, 1, (max(5.5, 1.2 + 0.42 * len(layers)), 4.0))
        for place, name in enumerate(dict.fromkeys(lines["series"])):
            points = lines[lines["series"] == name]
            look = stroke(place)
            axes.fill_between(
                points["index"], points["low"], points["high"], color=look["color"], alpha=0.1, linewidth=0
            )
            axes.plot(points["index"], points["value"], label=name, **look)
        axes.set_xticks(range(len(layers)), layers, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer of the target, from the pixels to the top")
        axes.set_ylabel(f"relative perturbation (L{self.norm})")
        legend(figure, axes)
        return figure


def relative(perturbed: Tensor, clean: Tensor, norm: int) -> Tensor:
    """||perturbed - clean|| / ||clean|| of each row, (B,); 0 / 0 is 0."""
    size = clean.flatten(1).double().norm(norm, dim=1)
    gap = (perturbed.flatten(1).double() - clean.flatten(1).double()).norm(norm, dim=1)
    return torch.where(gap > 0, gap / size, torch.zeros_like(gap))


def blocks(model: TargetModel, images: Tensor) -> list[str]:
    """The network's blocks with weights, in the order they run: the entries of its sequences, and its other modules.

    Modules that do not return one tensor with a row per image (backbones that return several maps) are taken apart.

    Args:
        model: any target.
        images: one image, (1, 3, H, W).

    Raises:
        GridError: it has none.
    """
    network: nn.Module = getattr(model, "network", model)
    ran: dict[str, bool] = {}

    def watch(name: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, out: Any) -> None:
            ran.setdefault(name, isinstance(out, Tensor) and out.ndim >= 2)

        return look

    hooks = [m.register_forward_hook(watch(name)) for name, m in network.named_modules() if name]
    try:
        model.predict(images)
    finally:
        for hook in hooks:
            hook.remove()
    names = list(ran)
    found = sorted(_blocks(network, "", ran), key=names.index)
    kept = [name for name in found if _has_features(model, images, name)]
    if not kept:
        raise GridError(f"layers: {type(network).__name__} has no modules with features: name some")
    return kept


def _blocks(module: nn.Module, prefix: str, ran: dict[str, bool]) -> Iterator[str]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        # Norms have vectors alone; convolutions, linear layers and all blocks have matrices.
        if not any(p.ndim > 1 for p in child.parameters()):
            continue
        if isinstance(child, nn.Sequential | nn.ModuleList) or ran.get(path) is False:
            yield from _blocks(child, f"{path}.", ran)
        elif path in ran:
            yield path


def _has_features(model: TargetModel, images: Tensor, layer: str) -> bool:
    try:
        return len(model.features(images, layer)) == len(images)
    except GridError:
        # Of a detector, the layers behind the neck.
        return False
