"""stAdv: images whose pixels are moved instead of changed (Xiao et al., ICLR 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from attacks.iterative import Factor, Steps
from attacks.scores import Stop, Watched, as_labels, margin
from attacks.steps import finite
from bench.protocols import Attack, ImageRNG, Oracle
from bench.registry import ATTACKS


@ATTACKS.register_module(name=["stadv", "sta"])
class StAdv(Attack):
    """Spatially transformed adversarial examples (Xiao et al. 2018, eq. 1 to 4); `sta` in the table of CAFD.

    A flow moves every pixel: x'(p) = x(p + flow(p)), bilinear, with the border repeated outside. Per image the flow
    minimises max(z_y - max_{k != y} z_k, -kappa) + tau * L_flow, L_flow the sum over pixels and their four neighbours
    of the Euclidean difference of their flows. There is no bound on pixel values: rows report the distances that
    result. Logits of another scale want another tau, so images that are not fooled are tried again with tau / 10.

    The attack keeps the successful flow of least L_flow; images it does not fool come back clean. (advertorch, which
    CAFD used, returns those all black, which a victim then gets wrong as well; it also minimises the loss of the batch
    as one sum, so that images depend on each other.)

    Args:
        steps: iterations of the optimiser.
        tau: weight of L_flow; 0.05 in the paper. 0 = the margin alone: every search is then the same.
        kappa: margin at which an image counts as safely fooled.
        searches: values of tau to try: tau, tau / 10, ...; 1 is the paper.
        optimizer: `adam`, the whole batch at once, or `lbfgs`, the paper's: SciPy's L-BFGS-B, image by image, which the
            kinks of L_flow stop early.
        lr: Adam's learning rate, in pixels.
        target: rule for a wrong target to reach; None = untargeted.
        stop_when_fooled: an image leaves at its first success instead of smoothing its flow further.
    """

    tasks = frozenset({"classification"})
    needs = frozenset({"gradient", "logits"})
    monotone = False
    returns_clean = True
    norm = None

    def __init__(
        self,
        steps: Steps = 100,
        tau: Factor = 0.05,
        searches: Annotated[int, Field(ge=1)] = 3,
        kappa: Factor = 0.0,
        optimizer: Literal["adam", "lbfgs"] = "adam",
        lr: Annotated[float, Field(gt=0)] = 0.05,
        target: str | None = None,
        stop_when_fooled: Stop = False,
    ) -> None:
        self.steps, self.tau, self.searches, self.kappa = steps, tau, searches, kappa
        self.optimizer, self.lr, self.target = optimizer, lr, target
        self.stop_when_fooled = stop_when_fooled is True

    def passes(self) -> int:
        return self.searches * (self.steps + 1)

    def excess(self, clean: Tensor, adversarial: Tensor) -> Tensor:
        """How far a channel leaves the range of the clean one, (B,): pixels are only moved and mixed."""
        above = (adversarial.amax((2, 3)) - clean.amax((2, 3))).amax(1)
        below = (clean.amin((2, 3)) - adversarial.amin((2, 3))).amax(1)
        return torch.maximum(above, below)

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Moved images (B, 3, H, W) in [0,1]; the clean image where none fools the victim."""
        clean = images.detach()
        labels = as_labels(targets, clean.device)
        out, left = clean.clone(), torch.arange(len(clean))
        for turn in range(self.searches):
            parts = (left,) if self.optimizer == "adam" else [left[i : i + 1] for i in range(len(left))]
            still = [left[:0]]
            for part in parts:
                if len(part) == 0:
                    continue
                at = part.to(clean.device)
                search = _Search(self, self.tau / 10**turn, oracle.select(part), clean[at], labels[at])
                (self._adam if self.optimizer == "adam" else self._lbfgs)(search)
                out[at] = search.best
                still.append(part[~search.found.cpu()])
            left = torch.cat(still)
        return out

    def _adam(self, search: _Search) -> None:
        flow = search.clean.new_zeros(len(search.clean), 2, *search.clean.shape[2:])
        first, second = torch.zeros_like(flow), torch.zeros_like(flow)
        for step in range(self.steps + 1):
            _, grad = search.look(flow)
            if self.stop_when_fooled:
                kept = search.narrow()
                if len(kept) == 0:
                    return
                flow, grad, first, second = flow[kept], grad[kept], first[kept], second[kept]
            first = 0.9 * first + 0.1 * grad
            second = 0.999 * second + 0.001 * grad.square()
            scale = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            flow = flow - self.lr * first / (1 - 0.9 ** (step + 1)) / scale

    def _lbfgs(self, search: _Search) -> None:
        from scipy import optimize

        shape = (1, 2, *search.clean.shape[2:])

        def function(point: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
            flow = torch.from_numpy(point).view(shape).to(search.clean)
            value, grad = search.look(flow)
            if self.stop_when_fooled and bool(search.found[0]):
                raise _Found
            return float(value[0]), grad.double().cpu().numpy().ravel()

        try:
            optimize.minimize(
                function, np.zeros(int(np.prod(shape))), jac=True, method="L-BFGS-B",
                options={"maxcor": 20, "maxiter": self.steps, "maxfun": self.steps + 1, "ftol": 1e-12, "gtol": 1e-8},
            )  # fmt: skip
        except _Found:
            return


class _Found(Exception):
    """Ends SciPy's minimiser at the first success."""


class _Search:
    """The images of one optimisation, and the best successful one of each so far."""

    def __init__(self, attack: StAdv, tau: float, oracle: Oracle, clean: Tensor, labels: Tensor) -> None:
        self.tau, self.oracle, self.clean = tau, oracle, clean
        self.objective = _Hinge(labels, attack.target is not None, attack.kappa)
        self.best = clean.clone()
        self.least = clean.new_full((len(clean),), float("inf"))
        self.found = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
        self.at = torch.arange(len(clean), device=clean.device)

    def look(self, flow: Tensor) -> tuple[Tensor, Tensor]:
        """The loss to be minimised, (B,), and its gradient to the flow (B, 2, H, W)."""
        with torch.enable_grad():
            flow = flow.detach().requires_grad_()
            moved = warp(self.clean, flow)
            rough = roughness(flow)
            result = self.oracle.gradient(moved.detach(), self.objective)
            push = finite(result.grad.detach())
            (grad,) = torch.autograd.grad((self.tau * rough).sum() - (moved * push).sum(), flow)
        rough = rough.detach()
        hit = self.objective.hit()
        better = hit & (rough < self.least[self.at])
        chosen = self.at[better]
        self.best[chosen], self.least[chosen] = moved.detach().clamp(0, 1)[better], rough[better]
        self.found[chosen] = True
        return self.tau * rough - result.value, grad

    def narrow(self) -> Tensor:
        """Drop images that are found; returns which of the present ones stay."""
        kept = (~self.found[self.at]).nonzero()[:, 0]
        if len(kept) < len(self.at):
            self.at, self.clean, self.oracle = self.at[kept], self.clean[kept], self.oracle.select(kept)
            old = self.objective
            self.objective = _Hinge(old.labels[kept], old.targeted, old.kappa)
        return kept


class _Hinge(Watched):
    """min(max_{k != y} z_k - z_y, kappa), or min(z_t - max_{k != t} z_k, kappa) for a target t."""

    def __init__(self, labels: Tensor, targeted: bool, kappa: float) -> None:
        super().__init__(labels, targeted)
        self.kappa = kappa

    def value(self, logits: Tensor) -> Tensor:
        """Values (B,) to be increased."""
        gap = margin(logits, self.labels)
        return (-gap if self.targeted else gap).clamp(max=self.kappa)


def warp(images: Tensor, flow: Tensor) -> Tensor:
    """x'(p) = x(p + flow(p)), bilinear; images (B, C, H, W), flow (B, 2, H, W) in pixels, (down, right)."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=flow.device, dtype=flow.dtype).view(1, -1, 1) + flow[:, 0]
    columns = torch.arange(width, device=flow.device, dtype=flow.dtype).view(1, 1, -1) + flow[:, 1]
    grid = torch.stack([2 * columns / max(width - 1, 1) - 1, 2 * rows / max(height - 1, 1) - 1], -1)
    return F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=True)


def roughness(flow: Tensor) -> Tensor:
    """L_flow, (B,): over pixels and their four neighbours, the Euclidean difference of flows (Xiao et al., eq. 4)."""
    down, right = flow[:, :, 1:] - flow[:, :, :-1], flow[..., 1:] - flow[..., :-1]
    # 1e-8 keeps the gradient of the root finite where neighbours move alike, as at the start.
    lengths = [(part.square().sum(1) + 1e-8).sqrt().flatten(1).sum(1) for part in (down, right)]
    # Every pair is counted from both of its ends.
    return 2 * (lengths[0] + lengths[1])
