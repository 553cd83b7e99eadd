"""Square Attack: random search over square patches that sees scores alone (Andriushchenko et al., ECCV 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from attacks.iterative import Radius
from attacks.projections import check_radius, make_projection
from attacks.scores import Stop, as_labels, asked
from attacks.steps import norms
from bench.protocols import Attack, ImageRNG, Oracle
from bench.registry import ATTACKS

# Random numbers are drawn for this many queries at a time.
BLOCK = 64
# From which query of 10000 the share of changed pixels is p / 2, p / 4, ... (appendix B of the paper).
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@ATTACKS.register_module(name="square")
class Square(Attack):
    """Square Attack (Andriushchenko et al., ECCV 2020, algorithms 1 to 3): keeps a random square when the loss rises.

    Needs no gradient, so a defense that hides gradients gains nothing: it runs against any pipeline at level white_box.
    Linf starts from random vertical stripes of +-eps and moves squares by +-2 eps per channel; L2 starts from a grid
    of bumps and moves the mass of one square into another. With a stochastic defense every query is a mean over
    EOT draws.

    An image comes back as its first success, or, where that does not stop it, at its largest loss.

    Args:
        norm: linf or l2.
        eps: radius in [0,1] pixel units.
        queries: number of queries after the start.
        p: share of the pixels that the first squares cover: 0.8 in AutoAttack, 0.05 (linf) and 0.1 (l2) in the paper.
        rescale: shrink squares by the share of `queries` spent, as the paper; else by the count, for 10000 queries,
            as AutoAttack.
        loss: what is increased: `margin`, or `ce`.
        target: rule for a wrong target to reach; None = untargeted.
        stop_when_fooled: off = go on raising the loss, for images that another pipeline will see; None = off for those.
    """

    tasks = frozenset({"classification"})
    needs = frozenset({"logits"})
    stochastic = True

    def __init__(
        self,
        norm: Literal["linf", "l2"] = "linf",
        eps: Radius = Fraction(8, 255),
        queries: Annotated[int, Field(ge=1)] = 5000,
        p: Annotated[float, Field(gt=0, le=1)] = 0.8,
        rescale: bool = True,
        loss: Literal["margin", "ce"] = "margin",
        target: str | None = None,
        stop_when_fooled: Stop = None,
    ) -> None:
        check_radius(norm, eps)
        self.norm, self.eps, self.target = norm, eps, target
        self._l2, self._eps = norm == "l2", float(eps)
        self.queries, self.p, self.rescale = queries, p, rescale
        self.loss, self.stop_when_fooled = loss, stop_when_fooled is not False

    def passes(self) -> int:
        """In units of a forward and a backward pass; queries are forward passes."""
        return max(1, self.queries // 3)

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Adversarial images (B, 3, H, W) in [0,1] and inside the budget; no gradient is asked for."""
        with torch.no_grad():
            return self._search(oracle, images.detach(), as_labels(targets, images.device), rng)

    def _search(self, oracle: Oracle, clean: Tensor, labels: Tensor, rng: ImageRNG) -> Tensor:
        device, targeted = clean.device, self.target is not None
        project = make_projection("l2" if self._l2 else "linf", clean, self._eps)
        x = project(self._start(clean, rng))
        out = x.clone()
        at = torch.arange(len(clean), device=device)
        value, hit = asked(oracle, x, self.loss, labels, targeted)
        draws = torch.empty(len(clean), 0)
        for query in range(self.queries):
            kept = (~hit if self.stop_when_fooled else torch.ones_like(hit)).nonzero()[:, 0]
            if len(kept) == 0:
                break
            if len(kept) < len(at):
                out[at] = x
                at, clean, labels, x = at[kept], clean[kept], labels[kept], x[kept]
                value, hit, project = value[kept], hit[kept], project.select(kept)
                oracle, rng, draws = oracle.select(kept), rng.select(kept), draws[kept.cpu()]
            if query % BLOCK == 0:
                draws = rng.uniform((BLOCK, 5 + clean.shape[1]))
            propose = self._move_l2 if self._l2 else self._move_linf
            candidate = project(
                propose(clean, x, self._side(query, clean), draws[:, query % BLOCK].to(device))
            )
            new, reached = asked(oracle, candidate, self.loss, labels, targeted)
            # A success is never given up, whatever the loss says.
            better = ((new > value) & (reached | ~hit)) | (reached & ~hit)
            x = torch.where(better.view(-1, 1, 1, 1), candidate, x)
            value, hit = torch.where(better, new, value), torch.where(better, reached, hit)
        out[at] = x
        return out

    def _side(self, query: int, clean: Tensor) -> int:
        """Side of the square at a query."""
        spent = int(query / self.queries * 10000) if self.rescale else query
        share = self.p / 2 ** sum(spent > start for start in HALVINGS)
        height, width = clean.shape[-2:]
        side = max(round(math.sqrt(share * height * width)), 3 if self._l2 else 1)
        return min(side + (side % 2 == 0 if self._l2 else 0), height, width)

    def _start(self, clean: Tensor, rng: ImageRNG) -> Tensor:
        channels, height, width = clean.shape[1:]
        if not self._l2:
            return clean + self._eps * rng.signs((channels, 1, width), clean.device)
        side = max(height // 5, 1)
        rows, columns = height // side, width // side
        signs = rng.signs((channels, rows, columns), clean.device)
        turned = rng.uniform((rows, columns), device=clean.device) > 0.5
        bump = bumps(side, clean.device)
        cells = torch.where(turned[:, None, :, :, None, None], bump.T, bump) * signs[..., None, None]
        grid = cells.permute(0, 1, 2, 4, 3, 5).reshape(len(clean), channels, rows * side, columns * side)
        delta = torch.zeros_like(clean)
        delta[:, :, : rows * side, : columns * side] = grid
        return clean + self._eps * delta / norms(delta)

    def _move_linf(self, clean: Tensor, x: Tensor, side: int, u: Tensor) -> Tensor:
        inside = _window(clean, u[:, 0], u[:, 1], side)
        signs = 2.0 * (u[:, 5:] > 0.5) - 1
        return x + 2 * self._eps * signs[:, :, None, None] * inside

    def _move_l2(self, clean: Tensor, x: Tensor, side: int, u: Tensor) -> Tensor:
        """Empty one window, add a bump to another whose norm is what both windows held and the image lacks of eps."""
        delta = x - clean
        first, second = _window(clean, u[:, 0], u[:, 1], side), _window(clean, u[:, 2], u[:, 3], side)
        held = (delta * torch.maximum(first, second)).square().sum((2, 3), keepdim=True)
        lacking = (self._eps**2 - norms(delta).square()).clamp(min=0) / delta.shape[1]
        here = delta * first
        here = here / here.square().sum((2, 3), keepdim=True).sqrt().clamp(min=1e-12)
        bump = bumps(side, delta.device)
        bump = torch.where((u[:, 4] > 0.5)[:, None, None], bump.T, bump)[:, None]
        signs = (2.0 * (u[:, 5:] > 0.5) - 1)[:, :, None, None]
        fresh = here + signs * _placed(clean, u[:, 0], u[:, 1], bump)
        fresh = fresh / fresh.square().sum((2, 3), keepdim=True).sqrt().clamp(min=1e-12)
        delta = torch.where(second > 0, torch.zeros_like(delta), delta)
        delta = torch.where(first > 0, fresh * (held + lacking).sqrt(), delta)
        return clean + self._eps * delta / norms(delta).clamp(min=1e-12)


def bumps(side: int, device: torch.device) -> Tensor:
    """The paper's eta: two opposite bumps side by side, (side, side), L2 norm 1 (section 3.4 and figure 3)."""
    half = max(side // 2, 1)
    eta = torch.cat([_bump(half, side), -_bump(side - half, side)])
    return (eta / eta.square().sum().sqrt()).to(device)


def _bump(height: int, width: int) -> Tensor:
    """Nested rectangles around the centre, the k-th of weight 1 / k^2; L2 norm 1."""
    out = torch.zeros(height, width)
    if height == 0:
        return out
    top, left = height // 2, width // 2
    for k in range(max(height, width) // 2 + 1):
        rows = slice(max(top - k, 0), min(top + k + 1, height))
        columns = slice(max(left - k, 0), min(left + k + 1, width))
        out[rows, columns] += 1 / (k + 1) ** 2
    return out / out.square().sum().sqrt()


def _corner(clean: Tensor, v: Tensor, w: Tensor, side: int) -> tuple[Tensor, Tensor]:
    height, width = clean.shape[-2:]
    top = (v * (height - side + 1)).floor().clamp(max=height - side)
    left = (w * (width - side + 1)).floor().clamp(max=width - side)
    return top.long(), left.long()


def _window(clean: Tensor, v: Tensor, w: Tensor, side: int) -> Tensor:
    """1 inside the square that uniform numbers `v`, `w` (B,) pick, else 0; (B, 1, H, W)."""
    top, left = _corner(clean, v, w, side)
    rows = torch.arange(clean.shape[-2], device=clean.device)[None] - top[:, None]
    columns = torch.arange(clean.shape[-1], device=clean.device)[None] - left[:, None]
    inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None]
    return inside[:, None].to(clean.dtype)


def _placed(clean: Tensor, v: Tensor, w: Tensor, patch: Tensor) -> Tensor:
    """Patches (B, 1, s, s) where `_window` has its ones, zeros elsewhere; (B, 1, H, W)."""
    side = patch.shape[-1]
    top, left = _corner(clean, v, w, side)
    rows = torch.arange(clean.shape[-2], device=clean.device)[None] - top[:, None]
    columns = torch.arange(clean.shape[-1], device=clean.device)[None] - left[:, None]
    image = torch.arange(len(clean), device=clean.device)[:, None, None]
    picked = patch[image, 0, rows.clamp(0, side - 1)[:, :, None], columns.clamp(0, side - 1)[:, None]]
    return picked[:, None] * _window(clean, v, w, side)
