"""Total-variation solvers on batches, differentiable: Chambolle's and two split-Bregman ones.

All minimise TV(u) + mu/2 |u - f|^2 per channel with isotropic TV and stop early by the rule of their reference, so
the result belongs to the iteration count as much as to the objective. Every image stops on its own.

The Bregman references update pixels one after the other in reading order (Gauss-Seidel), which an array program
cannot do directly. But pixel (r, c) of sweep k only needs its upper and left neighbours of sweep k and its lower and
right ones of sweep k - 1. Hence all pixels with r + c = t - 2k, for all k at once, can be updated together at time t,
and the result is that of the sequential loop. Images are stored by anti-diagonal d = r + c for this: `skewed[d, r]`
is pixel (r, d - r), its neighbours are [d + 1, r] (right), [d + 1, r + 1] (below), [d - 1, r] (left) and
[d - 1, r - 1] (above).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK = 8  # sweeps in flight between two looks at the stopping rule, and iterations between two saved states
TAU = 0.25  # step of Chambolle's dual variable, 1 / (2 dimensions)
SMALL = (
    1e-20  # divisor of a vector's direction where the vector is zero: far from overflow, and 0 / SMALL is 0
)


# -- Chambolle ----------------------------------------------------------------------------------------------------
def chambolle(images: Tensor, weight: float, tolerance: float, max_iter: int) -> Tensor:
    """Chambolle's projection algorithm as scikit-image runs it on each channel; weight = 1 / mu.

    Args:
        images: (B, C, H, W).
        weight: larger is smoother.
        tolerance: a channel stops when its cost changes by less than this fraction of the initial cost.
        max_iter: most iterations.
    """
    out: Tensor = _Chambolle.apply(  # type: ignore[no-untyped-call]  # torch does not annotate it
        images, weight, tolerance, max_iter
    )
    return out


class _Chambolle(torch.autograd.Function):
    """out = f + D^T p with forward differences D; p <- (p - tau D out) / (1 + tau / weight |D out|).

    The adjoint is that of the unrolled iterations, run again from a dual variable kept every few iterations.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: float, tolerance: float, max_iter: int) -> Tensor:
        planes = images.detach().flatten(0, 1)
        result = planes.clone()
        left = torch.arange(len(planes), device=planes.device)
        f, dual = planes, planes.new_zeros(2, *planes.shape)
        first = previous = planes.new_zeros(len(planes), dtype=torch.float64)
        saved: list[
            tuple[Tensor, Tensor, Tensor]
        ] = []  # planes, their dual variable, updates until the next entry
        for iteration in range(max_iter):
            change = _gather(dual)
            out = f + change
            gradient, norm = _slope(out)
            energy = change.square_().flatten(1).sum(1, dtype=torch.float64)
            energy = energy + weight * norm.flatten(1).sum(1, dtype=torch.float64)
            done = (previous - energy).abs() < tolerance * first
            if iteration == 0:
                first, done = energy, torch.zeros_like(done)
            if iteration == max_iter - 1:
                done = torch.ones_like(done)
            previous = energy
            if done.any():
                result[left[done]] = out[done]
                keep = ~done
                left, f, dual, first, previous = (
                    left[keep],
                    f[keep],
                    dual[:, keep],
                    first[keep],
                    previous[keep],
                )
                gradient, norm = gradient[:, keep], norm[keep]
                if len(left) == 0:
                    break
            if ctx.needs_input_grad[0]:
                if iteration % CHUNK == 0 or len(saved[-1][0]) != len(left):
                    saved.append((left, dual, torch.zeros((), dtype=torch.long)))
                saved[-1][2].add_(1)
            dual = dual - TAU * gradient
            dual /= norm.mul_(TAU / weight).add_(1)
        ctx.saved, ctx.weight, ctx.planes = saved, weight, planes
        return result.view_as(images)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        out = grad.flatten(0, 1)
        total = out.clone()
        adjoint = _scatter(out)  # of the dual variable each plane stopped with
        ratio = TAU / ctx.weight
        for left, dual, updates in reversed(ctx.saved):
            f, duals = ctx.planes[left], [dual]
            for _ in range(int(updates)):
                gradient, norm = _slope(f + _gather(duals[-1]))
                duals.append((duals[-1] - TAU * gradient) / (1 + ratio * norm))
            current, collected = adjoint[:, left], torch.zeros_like(f)
            for before, after in zip(reversed(duals[:-1]), reversed(duals[1:]), strict=True):
                gradient, norm = _slope(f + _gather(before))
                current = current / (1 + ratio * norm)
                bend = -ratio * (current * after).sum(0) / norm.clamp(min=SMALL)
                through = _gather(bend * gradient - TAU * current)
                collected += through
                current = current + _scatter(through)
            adjoint[:, left] = current
            total[left] += collected
        return total.view_as(grad), None, None, None


def _scatter(planes: Tensor) -> Tensor:
    """D: forward differences down and right, (2, P, H, W), zero in the last row or column."""
    out = planes.new_zeros(2, *planes.shape)
    torch.sub(planes[:, 1:], planes[:, :-1], out=out[0, :, :-1])
    torch.sub(planes[:, :, 1:], planes[:, :, :-1], out=out[1, :, :, :-1])
    return out


def _gather(pair: Tensor) -> Tensor:
    """D^T: minus the divergence of (2, P, H, W), ignoring the first one's last row and the second's last column."""
    out = torch.zeros_like(pair[0])
    out[:, :-1] -= pair[0, :, :-1]
    out[:, 1:] += pair[0, :, :-1]
    out[:, :, :-1] -= pair[1, :, :, :-1]
    out[:, :, 1:] += pair[1, :, :, :-1]
    return out


def _slope(planes: Tensor) -> tuple[Tensor, Tensor]:
    """Forward differences of the planes and their norm at each pixel."""
    gradient = _scatter(planes)
    return gradient, (gradient[0] ** 2).addcmul_(gradient[1], gradient[1]).sqrt_()


# -- storage by anti-diagonals ------------------------------------------------------------------------------------
class _Skew:
    """Between planes (P, H, W) and (D, H, P) stored by anti-diagonal, D = H + W - 1."""

    def __init__(self, height: int, width: int, device: torch.device) -> None:
        self.height, self.width = height, width
        diagonal = torch.arange(height + width - 1, device=device)[:, None]
        row = torch.arange(height, device=device)[None]
        column = diagonal - row
        self.inside = (column >= 0) & (column < width)
        self._from = (row * width + column.clamp(0, width - 1)).flatten()
        rows = torch.arange(height, device=device)[:, None]
        self._back = ((rows + torch.arange(width, device=device)) * height + rows).flatten()

    def __call__(self, planes: Tensor) -> Tensor:
        flat = planes.flatten(1).t()[self._from]
        return flat.view(*self.inside.shape, len(planes)) * self.inside[..., None]

    def back(self, skewed: Tensor) -> Tensor:
        planes = skewed.shape[-1]
        return skewed.reshape(-1, planes)[self._back].t().reshape(planes, self.height, self.width)


@dataclass(frozen=True)
class _Front:
    """Pixels that can be updated together: slices of diagonals (own, before, after) and rows (here, above, below).

    The lowest diagonal of `own` is in sweep `most`, the highest in sweep `least`.
    """

    own: slice
    before: slice
    after: slice
    here: slice
    above: slice
    below: slice
    most: int
    least: int


def _fronts(height: int, width: int, sweeps: int) -> Iterator[_Front]:
    """The order of updates for `sweeps` sweeps over height x width pixels with a border of one pixel."""
    first, last = 2, height + width
    for time in range(first, last + 2 * sweeps - 1):
        low = max(time - 2 * (sweeps - 1), first + (time - first) % 2)
        high = time if time <= last else last - (time - last) % 2
        if low > high:
            continue
        top, bottom = max(1, low - width), min(height, high - 1)
        yield _Front(
            slice(low, high + 1, 2),
            slice(low - 1, high, 2),
            slice(low + 1, high + 2, 2),
            slice(top, bottom + 1),
            slice(top - 1, bottom),
            slice(top + 1, bottom + 2),
            (time - low) // 2,
            (time - high) // 2,
        )


# -- split Bregman, as in scikit-image ----------------------------------------------------------------------------
def bregman(images: Tensor, mu: float, tolerance: float, max_iter: int) -> Tensor:
    """Split Bregman with one Gauss-Seidel sweep per iteration, as `skimage.restoration.denoise_tv_bregman` runs it.

    The same sweeps, the same shrinkage (s lam / (s lam + 1) with lam = 2 mu), the same fixed border around the image
    (a mirrored row above and a mirrored column on the left, repeated ones below and on the right).

    Args:
        images: (B, C, H, W).
        mu: weight of the data term ("weight" in scikit-image); smaller is smoother.
        tolerance: an image stops when the root mean square of its change in a sweep, over all channels, is at most
            this.
        max_iter: most sweeps.
    """
    out: Tensor = _Bregman.apply(  # type: ignore[no-untyped-call]  # torch does not annotate it
        images, mu, tolerance, max_iter
    )
    return out


class _State:
    """The unknown u, and d - b and b of both directions, by anti-diagonal with a border of one pixel: (D, H + 2, P)."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.u, self.ex, self.ey, self.bx, self.by = tensors

    def tensors(self) -> list[Tensor]:
        return [self.u, self.ex, self.ey, self.bx, self.by]

    def clone(self) -> _State:
        return _State([t.clone() for t in self.tensors()])

    def select(self, planes: Tensor) -> _State:
        return _State([t[..., planes] for t in self.tensors()])


class _Bregman(torch.autograd.Function):
    """The adjoint is that of the unrolled iterations; each chunk of sweeps is run again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, mu: float, tolerance: float, max_iter: int) -> Tensor:
        batch, channels, height, width = images.shape
        planes = images.detach().flatten(0, 1)
        skew = _Skew(height + 2, width + 2, images.device)
        sweeper = _Sweeper(skew, mu)
        f = skew(torch.nn.functional.pad(planes, (1, 1, 1, 1)))
        u = skew(_bordered(planes))
        state = _State([u, *(torch.zeros_like(u) for _ in range(4))])
        result = torch.empty_like(planes)
        left = torch.arange(batch, device=images.device)
        saved: list[tuple[Tensor, Tensor, _State, int, Tensor]] = []
        done_sweeps = 0
        while len(left):
            sweeps = min(CHUNK, max_iter - done_sweeps)
            if ctx.needs_input_grad[0]:
                saved.append((left, f, state.clone(), sweeps, torch.full_like(left, -1)))
            history, squares = sweeper.run(state, f, sweeps)
            rms = (squares.view(sweeps, len(left), channels).sum(-1) / (channels * height * width)).sqrt()
            stopped = rms <= tolerance
            done_sweeps += sweeps
            if done_sweeps >= max_iter:
                stopped[-1] = True
            done = stopped.any(0)
            if done.any():
                at = stopped.int().argmax(0)
                per_plane = at.repeat_interleave(channels)
                final = history[
                    sweeps - 1 - per_plane, :, :, torch.arange(len(per_plane), device=images.device)
                ]
                final = skew.back(final.permute(1, 2, 0))[:, 1:-1, 1:-1]
                finished = done.repeat_interleave(channels)
                result.view(batch, channels, height, width)[left[done]] = final[finished].view(
                    -1, channels, height, width
                )
                if saved:
                    saved[-1][4][done] = at[done]
                keep = (~finished).nonzero()[:, 0]
                left, f, state = left[~done], f[..., keep], state.select(keep)
        ctx.saved, ctx.sweeper, ctx.shape = saved, sweeper, images.shape
        return result.view_as(images)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        batch, channels, height, width = ctx.shape
        sweeper: _Sweeper = ctx.sweeper
        out = torch.zeros_like(grad)
        adjoint: _State | None = None
        f_adjoint = grad.new_zeros(0)
        following = torch.empty(0, dtype=torch.long, device=grad.device)
        for left, f, state, sweeps, stop in reversed(ctx.saved):
            zeros = torch.zeros_like(f)
            current = _State([torch.zeros_like(f) for _ in range(5)])
            current_f = zeros.clone()
            if adjoint is not None and len(following):
                where = torch.searchsorted(left, following)
                planes = (where[:, None] * channels + torch.arange(channels, device=grad.device)).flatten()
                for target, source in zip(current.tensors(), adjoint.tensors(), strict=True):
                    target[..., planes] = source
                current_f[..., planes] = f_adjoint
            seed = sweeper.skew(torch.nn.functional.pad(grad[left].flatten(0, 1), (1, 1, 1, 1)))
            sweeper.run_back(
                state.clone(), f, sweeps, current, current_f, seed, stop.repeat_interleave(channels)
            )
            adjoint, f_adjoint, following = current, current_f, left
        assert adjoint is not None
        total = sweeper.skew.back(f_adjoint)[:, 1:-1, 1:-1] + _bordered_adjoint(sweeper.skew.back(adjoint.u))
        out += total.reshape(batch, channels, height, width)
        return out, None, None, None


class _Sweeper:
    """Gauss-Seidel sweeps of split Bregman, forward and adjoint, on (D, H + 2, P) in place."""

    def __init__(self, skew: _Skew, mu: float) -> None:
        self.skew = skew
        self.lam = 2 * mu
        self.share, self.data = self.lam / (mu + 4 * self.lam), mu / (mu + 4 * self.lam)
        self.height, self.width = skew.height - 2, skew.width - 2
        interior = torch.zeros(1, skew.height, skew.width, device=skew.inside.device)
        interior[:, 1:-1, 1:-1] = 1
        self.interior = skew(interior).bool()

    def _update(self, s: _State, f: Tensor, front: _Front) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Update the front; its new and old u, and the arguments of the shrinkage."""
        own, here, before, after = front.own, front.here, front.before, front.after
        valid = self.interior[own, here]
        old, right, down = s.u[own, here], s.u[after, here], s.u[after, front.below]
        total = down + s.u[before, front.above]
        total += right
        total += s.u[before, here]
        total -= s.ex[own, here]
        total += s.ex[before, here]
        total -= s.ey[own, here]
        total += s.ey[before, front.above]
        new = torch.add(f[own, here] * self.data, total, alpha=self.share)
        old = old.clone()
        new = torch.where(valid, new, old)
        tx, ty = (right - old).add_(s.bx[own, here]), (down - old).add_(s.by[own, here])
        s.u[own, here] = new
        q = _shrink(tx, ty, self.lam)
        torch.mul(tx, q, out=s.bx[own, here])
        torch.mul(ty, q, out=s.by[own, here])
        q.mul_(-2).add_(1).mul_(valid)  # zero on the border, where d - b stays zero
        torch.mul(tx, q, out=s.ex[own, here])
        torch.mul(ty, q, out=s.ey[own, here])
        return new, old, tx, ty

    def run(self, s: _State, f: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
        """Advance `s`; u after each sweep, last first, (sweeps, D, H + 2, P), and the squared changes (sweeps, P)."""
        history = s.u.expand(sweeps, *s.u.shape).clone()
        squares = torch.zeros(sweeps, f.shape[-1], dtype=torch.float64, device=f.device)
        for front in _fronts(self.height, self.width, sweeps):
            new, old, _, _ = self._update(s, f, front)
            squares[front.least : front.most + 1] += (new - old).square_().sum(1, dtype=torch.float64).flip(0)
            # As the diagonal rises by two the sweep falls by one: one view on the history from its last sweep.
            start = history[sweeps - 1 - front.most, front.own.start, front.here]
            strides = (history.stride(0) + 2 * history.stride(1), *start.stride())
            torch.as_strided(history, new.shape, strides, start.storage_offset()).copy_(new)
        return history, squares

    def run_back(
        self, s: _State, f: Tensor, sweeps: int, g: _State, gf: Tensor, seed: Tensor, stop: Tensor
    ) -> None:
        """The adjoint of `run`: g and gf, from after the sweeps to before them; overwrites s.

        `seed` is the gradient of the result, which plane p takes after its sweep `stop`[p] (-1: not in this chunk).
        """
        fronts = list(_fronts(self.height, self.width, sweeps))
        arguments = [self._update(s, f, front)[2:] for front in fronts]
        for front, (tx, ty) in zip(reversed(fronts), reversed(arguments), strict=True):
            own, here, before, after = front.own, front.here, front.before, front.after
            valid = self.interior[own, here]
            sweep = torch.arange(front.most, front.least - 1, -1, device=f.device)
            taken = (sweep[:, None] == stop)[:, None]
            gu = (g.u[own, here] + seed[own, here] * taken) * valid
            gex, gey = g.ex[own, here] * valid, g.ey[own, here] * valid
            hx, hy = g.bx[own, here] * valid - 2 * gex, g.by[own, here] * valid - 2 * gey
            # b = q t and d - b = t - 2 q t with q = 1 / (1 + lam |t|), whose derivative is -lam q^2 t / |t|.
            q = _shrink(tx, ty, self.lam)
            size = (tx * tx + ty * ty).sqrt().clamp(min=SMALL)
            bend = -self.lam * q * q * (hx * tx + hy * ty) / size
            gtx, gty = gex + q * hx + bend * tx, gey + q * hy + bend * ty
            through = self.share * gu
            gf[own, here] += self.data * gu
            g.u[own, here] = torch.where(valid, -(gtx + gty), g.u[own, here])
            g.bx[own, here], g.by[own, here] = gtx, gty
            g.ex[own, here], g.ey[own, here] = -through, -through
            g.u[after, here] += through + gtx
            g.u[after, front.below] += through + gty
            g.u[before, here] += through
            g.u[before, front.above] += through
            g.ex[before, here] += through
            g.ey[before, front.above] += through


def _shrink(tx: Tensor, ty: Tensor, lam: float) -> Tensor:
    """1 / (1 + lam |t|): scikit-image's smooth shrinkage keeps d = (1 - this) t, hence b = this t."""
    return (tx * tx).addcmul_(ty, ty).sqrt_().mul_(lam).add_(1).reciprocal_()


def _bordered(planes: Tensor) -> Tensor:
    """Planes (P, H, W) with scikit-image's border of one pixel."""
    rows, columns = _border_sources(planes)
    return planes[:, rows][:, :, columns]


def _bordered_adjoint(grad: Tensor) -> Tensor:
    rows, columns = _border_sources(grad[:, 1:-1, 1:-1])
    grad = grad.clone()
    grad[:, 0, 0] = grad[:, 0, -1] = grad[:, -1, 0] = grad[:, -1, -1] = 0  # the corners are never read
    out = torch.zeros_like(grad[:, :, 1:-1]).index_add_(2, columns, grad)
    return torch.zeros_like(grad[:, 1:-1, 1:-1]).index_add_(1, rows, out)


def _border_sources(planes: Tensor) -> tuple[Tensor, Tensor]:
    def index(length: int) -> Tensor:
        inside = torch.arange(length, device=planes.device)
        return torch.cat([inside[min(1, length - 1)].view(1), inside, inside[-1:]])

    return index(planes.shape[-2]), index(planes.shape[-1])


# -- split Bregman with missing pixels, as in Guo et al. ----------------------------------------------------------
def masked_bregman(
    images: Tensor,
    kept: Tensor,
    mu: float,
    tolerance: float,
    max_iter: int,
    sweeps: int = 10,
    quarter: bool = False,
) -> Tensor:
    """Split Bregman that fills in dropped values: the data term counts only where `kept`.

    As the patched scikit-image of Guo et al.: several Gauss-Seidel sweeps before each shrinkage, free borders.

    Args:
        images: (B, C, H, W), zero where dropped.
        kept: bool, same shape.
        mu: weight of the data term.
        tolerance: an image stops when the root mean square of its change, over all channels, is at most this.
        max_iter: most outer iterations.
        sweeps: Gauss-Seidel sweeps per iteration.
        quarter: divide the neighbours of a dropped pixel by 4 even at the border, where it has fewer, as their code
            does (darkens dropped border pixels).
    """
    batch, channels, height, width = images.shape
    skew = _Skew(height + 2, width + 2, images.device)

    def load(x: Tensor) -> Tensor:
        return skew(torch.nn.functional.pad(x.flatten(0, 1), (1, 1, 1, 1)))

    lam = 2 * mu
    ones = load(torch.ones_like(images))
    keep = load(kept.to(images.dtype))
    near = _shift(ones, 1, 0) + _shift(ones, 1, 1) + _shift(ones, -1, 0) + _shift(ones, -1, -1)
    fill = 1 / (torch.full_like(near, 4) if quarter else near.clamp(min=1))
    share = torch.where(keep > 0, lam / (mu + near * lam), fill) * ones
    has_right, has_below = ones * _shift(ones, 1, 0), ones * _shift(ones, 1, 1)
    f = load(images)
    given = keep * mu / (mu + near * lam) * f

    def iterate(
        data: Tensor, u: Tensor, ex: Tensor, ey: Tensor, bx: Tensor, by: Tensor
    ) -> tuple[Tensor, ...]:
        flow = -ex - ey + _shift(ex, -1, 0) + _shift(ey, -1, -1)
        u = _FillIn.apply(  # type: ignore[no-untyped-call]  # torch does not annotate it
            u, share, data + share * flow, sweeps
        )
        tx = (_shift(u, 1, 0) - u) * has_right + bx
        ty = (_shift(u, 1, 1) - u) * has_below + by
        q = 1 / (_safe_sqrt(tx * tx + ty * ty) * lam + 1)
        return u, tx * (1 - 2 * q), ty * (1 - 2 * q), tx * q, ty * q

    state: tuple[Tensor, ...] = (f, *(torch.zeros_like(f) for _ in range(4)))
    active = torch.ones(batch, dtype=torch.bool, device=images.device)
    for _ in range(max_iter):
        if torch.is_grad_enabled() and images.requires_grad:
            new = checkpoint(iterate, given, *state, use_reentrant=False, preserve_rng_state=False)
        else:
            new = iterate(given, *state)
        change = (
            ((new[0] - state[0]).detach() ** 2).sum((0, 1), dtype=torch.float64).view(batch, channels).sum(1)
        )
        going = active.repeat_interleave(channels)
        state = tuple(torch.where(going, a, b) for a, b in zip(new, state, strict=True))
        active = active & ((change / (channels * height * width)).sqrt() > tolerance)
        if not active.any():
            break
    return skew.back(state[0])[:, 1:-1, 1:-1].reshape(images.shape)


def _safe_sqrt(square: Tensor) -> Tensor:
    """Square root with derivative 0, not infinity, at 0."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, torch.ones_like(square)).sqrt(), square)


def _shift(x: Tensor, diagonals: int, rows: int) -> Tensor:
    """The value at [d + diagonals, r + rows], zero outside."""
    pad_d = (-diagonals, 0) if diagonals < 0 else (0, diagonals)
    pad_r = (-rows, 0) if rows < 0 else (0, rows)
    padded = torch.nn.functional.pad(x, (0, 0, *pad_r, *pad_d))
    start_d, start_r = max(diagonals, 0), max(rows, 0)
    return padded[start_d : start_d + x.shape[0], start_r : start_r + x.shape[1]]


class _FillIn(torch.autograd.Function):
    """Gauss-Seidel sweeps of u = share * (sum of the four neighbours) + rest; linear, so its adjoint needs no state."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, share: Tensor, rest: Tensor, sweeps: int) -> Tensor:
        u, height = u.clone(), u.shape[1] - 2
        for front in _fronts(height, u.shape[0] - 3 - height, sweeps):
            own, here, before, after = front.own, front.here, front.before, front.after
            total = u[after, here] + u[after, front.below]
            total += u[before, here]
            total += u[before, front.above]
            u[own, here] = torch.addcmul(rest[own, here], share[own, here], total)
        ctx.save_for_backward(share)
        ctx.sweeps = sweeps
        return u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (share,) = ctx.saved_tensors
        g, g_rest, height = grad.clone(), torch.zeros_like(grad), grad.shape[1] - 2
        for front in reversed(list(_fronts(height, grad.shape[0] - 3 - height, ctx.sweeps))):
            own, here, before, after = front.own, front.here, front.before, front.after
            current = g[own, here].clone()
            g_rest[own, here] += current
            g[own, here] = 0
            spread = share[own, here] * current
            g[after, here] += spread
            g[after, front.below] += spread
            g[before, here] += spread
            g[before, front.above] += spread
        return g, None, g_rest, None
