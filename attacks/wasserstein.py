"""Frank-Wolfe attack in a Wasserstein ball: pixel mass is moved to nearby pixels (Wu et al., ICML 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from attacks.iterative import KernelSize, Steps
from attacks.scores import Scored, Stop, as_labels
from attacks.steps import finite
from bench.protocols import Attack, ImageRNG, Oracle
from bench.registry import ATTACKS


@ATTACKS.register_module(name="fwa")
class FWA(Attack):
    """Frank-Wolfe with the dual linear oracle (Wu, Wang and Yu 2020, sections 4.2 and 4.3), in plain torch.

    A plan pi >= 0 moves each pixel's value within a window of its own channel; x' are the sums that arrive. Rows of pi
    sum to the pixels of x, and the cost <C, pi>, C the Euclidean distance in pixels, is at most `radius` times the
    image's total value: no more than `radius` pixels on average. From the plan that moves nothing, each step goes
    2 / (t + 2) of the way to the plan that is best for the linearised loss; with entropy `gamma` that plan is
    x * softmin((lambda C - g) / gamma) for the smallest lambda >= 0 that meets the budget, found by bisection, g the
    gradient over its largest entry.

    The published attack lets pixels exceed 1 and repairs the images at the end. Victims here only see [0,1], so what
    does not fit into a pixel stays where it came from, in every plan: budget and row sums hold all the same.

    An image comes back as its best successful iterate, else at its largest loss; always within the budget. The harness
    reports the distances in Linf and L2 that result, and holds the image against bounds of the Wasserstein distance.

    Args:
        radius: budget; 0.005 in the paper's script for CIFAR-10.
        steps: number of steps.
        window: side of the window, odd.
        gamma: weight of the entropy.
        bisections: halvings of the interval for lambda.
        loss: `ce`, `margin` or `dlr`.
        target: rule for a wrong target to reach; None = untargeted.
        stop_when_fooled: a fooled image leaves at once; see `attacks.scores.Stop`.
    """

    tasks = frozenset({"classification"})
    needs = frozenset({"gradient", "logits"})
    monotone = False
    norm = None

    def __init__(
        self,
        radius: Annotated[float, Field(gt=0)] = 0.005,
        steps: Steps = 300,
        window: KernelSize = 5,
        gamma: Annotated[float, Field(gt=0)] = 1e-3,
        bisections: Annotated[int, Field(ge=1)] = 25,
        loss: Literal["ce", "margin", "dlr"] = "ce",
        target: str | None = None,
        stop_when_fooled: Stop = None,
    ) -> None:
        self.radius, self.steps, self.window = radius, steps, window
        self.gamma, self.bisections = gamma, bisections
        self.loss, self.target = loss, target
        self.stop_when_fooled = stop_when_fooled is True

    def passes(self) -> int:
        return self.steps + 1

    def excess(self, clean: Tensor, adversarial: Tensor) -> Tensor:
        """Share by which the image breaks its budget, (B,): by mass made or lost, or by what moving it costs at least.

        Summed over a channel's rows, or columns, mass moves on a line, where the least cost is the sum of the absolute
        cumulative difference; no plan in the plane is cheaper.
        """
        moved = (adversarial - clean).double()
        mass = clean.flatten(1).double().sum(1).clamp(min=1e-12)
        lost = moved.sum((2, 3)).abs().sum(1)
        costs = [moved.sum(axis).cumsum(-1).abs().sum((1, 2)) for axis in (2, 3)]
        return torch.stack([lost, *(cost - self.radius * mass for cost in costs)]).amax(0) / (
            self.radius * mass
        )

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Adversarial images (B, 3, H, W) in [0,1] with the total value of the clean ones."""
        clean = images.detach()
        labels = as_labels(targets, clean.device)
        transport = Transport(clean, self.window)
        plan, out = transport.still(), clean.clone()
        value = torch.full((len(clean),), float("-inf"), device=clean.device)
        fooled = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
        at = torch.arange(len(clean), device=clean.device)
        for step in range(self.steps + 1):
            x = transport.arrivals(plan).clamp(0, 1)
            objective = Scored(self.loss, labels[at], self.target is not None)
            result = oracle.gradient(x, objective)
            hit = objective.hit()
            better = (hit & ~fooled[at]) | ((hit == fooled[at]) & (result.value > value[at]))
            out[at[better]], value[at[better]] = x[better], result.value[better]
            fooled[at] |= hit
            if step == self.steps:
                break
            grad = finite(result.grad.detach())
            if self.stop_when_fooled and bool(hit.any()):
                kept = (~hit).nonzero()[:, 0]
                if len(kept) == 0:
                    break
                at, oracle, transport = at[kept], oracle.select(kept), transport.select(kept)
                plan, grad = plan[kept], grad[kept]
            goal = transport.best_plan(grad, self.radius, self.gamma, self.bisections)
            plan = plan + 2 / (step + 2) * (transport.fit(goal) - plan)
        return out


class Transport:
    """Plans that move pixel values within windows of `side` pixels, for images (B, C, H, W) in [0,1].

    A plan is (B, C, side^2, H, W): what pixel (y, x) sends to each place of the window around it.
    """

    def __init__(self, clean: Tensor, side: int) -> None:
        self.clean, self.side = clean, side
        reach = torch.arange(side, device=clean.device, dtype=clean.dtype) - side // 2
        self.cost = torch.sqrt(reach[:, None] ** 2 + reach[None] ** 2).view(1, 1, -1, 1, 1)
        # Places outside the image take nothing.
        self.inside = self._around(torch.ones_like(clean[:1, :1])) > 0

    def select(self, index: Tensor) -> Transport:
        """The transport of some of the images."""
        return Transport(self.clean[index], self.side)

    def still(self) -> Tensor:
        """The plan that moves nothing."""
        plan = self.clean.new_zeros(*self.clean.shape[:2], self.side**2, *self.clean.shape[2:])
        plan[:, :, self.side**2 // 2] = self.clean
        return plan

    def arrivals(self, plan: Tensor) -> Tensor:
        """The image a plan makes: at each pixel the sum of what is sent there, (B, C, H, W)."""
        height, width = self.clean.shape[-2:]
        half, total = self.side // 2, torch.zeros_like(self.clean)
        padded = F.pad(plan, (half, half, half, half))
        for place in range(self.side**2):
            dy, dx = place // self.side - half, place % self.side - half
            total += padded[:, :, place, half - dy : half - dy + height, half - dx : half - dx + width]
        return total

    def spent(self, plan: Tensor) -> Tensor:
        """<C, plan> of each image, (B,), in double precision."""
        return (plan * self.cost).flatten(1).double().sum(1)

    def best_plan(self, grad: Tensor, radius: float, gamma: float, bisections: int) -> Tensor:
        """The plan within the budget that increases <grad, x'> most, up to the entropy."""
        scale = grad.abs().amax((1, 2, 3), keepdim=True)
        gain = self._around(grad / scale.masked_fill(scale == 0, 1.0)).masked_fill(
            ~self.inside, float("-inf")
        )
        budget = radius * self.clean.flatten(1).double().sum(1)

        def plan(price: Tensor) -> Tensor:
            shares = ((gain - price.view(-1, 1, 1, 1, 1) * self.cost) / gamma).softmax(2)
            return shares * self.clean[:, :, None]

        low = torch.zeros(len(grad), device=grad.device, dtype=grad.dtype)
        # Gains differ by at most 2 and the nearest place costs 1: beyond this price nothing moves but the entropy's
        # share, exp(-(price - 2) / gamma), which is doubled away.
        high = torch.full_like(low, 2 + 20 * gamma)
        for _ in range(60):
            over = self.spent(plan(high)) > budget
            if not over.any():
                break
            high = torch.where(over, 2 * high, high)
        free = self.spent(plan(low)) <= budget
        for _ in range(bisections):
            middle = (low + high) / 2
            over = self.spent(plan(middle)) > budget
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        # The upper end is the one that meets the budget.
        return plan(torch.where(free, torch.zeros_like(high), high))

    def fit(self, plan: Tensor, rounds: int = 200) -> Tensor:
        """`plan`, with what does not fit below 1 staying where it comes from: row sums as before, cost not above.

        Mass that stays may in turn fill its own pixel, so rounds repeat until nothing overflows; each only shortens
        what is sent, and the plan that moves nothing fits.
        """
        centre = self.side**2 // 2
        plan = plan.clone()
        for _ in range(rounds):
            arrived = self.arrivals(plan)
            # Judged by image: no image's rounds depend on another's.
            full = (arrived > 1 + 1e-6).flatten(1).any(1)
            if not full.any():
                break
            sent = arrived - plan[:, :, centre]
            room = (1 - plan[:, :, centre]).clamp(min=0)
            share = torch.where(arrived > 1, room / sent.clamp(min=1e-12), torch.ones_like(sent)).clamp(max=1)
            kept = plan * self._around(share)
            kept[:, :, centre] = 0
            kept[:, :, centre] = self.clean - kept.sum(2)
            plan = torch.where(full.view(-1, 1, 1, 1, 1), kept, plan)
        return plan

    def _around(self, images: Tensor) -> Tensor:
        """Each pixel's window, (B, C, side^2, H, W), zeros outside the image."""
        count, channels, height, width = images.shape
        windows = F.unfold(images.reshape(-1, 1, height, width), self.side, padding=self.side // 2)
        return windows.view(count, channels, self.side**2, height, width)
