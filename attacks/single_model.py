"""FGSM, R+FGSM, BIM and PGD: the loop with few parts, for one model and for every task."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field

from attacks.iterative import Iterative, Radius, Steps
from attacks.scores import Stop
from bench.protocols import Pixels
from bench.registry import ATTACKS

Norm = Literal["linf", "l2"]


@ATTACKS.register_module(name="fgsm")
class FGSM(Iterative):
    """Fast gradient sign method: x' = P(x + eps * sign grad J(x, y)) (Goodfellow et al. 2015, section 4).

    With `norm: l2` the step is eps * grad / ||grad||_2 (FGM). Targeted: the one step that decreases the loss of the
    target (Kurakin et al. 2017).

    Args:
        eps: radius and step size in [0,1] pixel units.
        loss: see `iterative`; `ce` for labels and label maps, `cls`, `loc`, `cls+loc` for detectors.
        norm: linf or l2.
        labels: `true`, or the victim's own prediction (`predicted`, HGD's code), which avoids label leaking.
        target: rule for a wrong target; None = untargeted.
    """

    def __init__(
        self,
        eps: Radius = Fraction(8, 255),
        loss: str = "ce",
        norm: Norm = "linf",
        labels: Literal["true", "predicted"] = "true",
        target: str | None = None,
    ) -> None:
        super().__init__(loss=loss, norm=norm, eps=eps, alpha=eps, steps=1, labels=labels, target=target)


@ATTACKS.register_module(name="r_fgsm")
class RFGSM(Iterative):
    """R+FGSM: x1 = x + b * sign(N(0, I)), x' = P(x1 + (eps - b) * sign grad J(x1, y)) (Tramer et al. 2018, eq. 7).

    Args:
        eps: radius in [0,1] pixel units.
        random_step: size b of the random step, below eps; None = eps / 2, the paper's choice.
        loss: see `iterative`.
        target: rule for a wrong target; None = untargeted.
    """

    def __init__(
        self,
        eps: Pixels = Fraction(16, 255),
        random_step: Pixels | None = None,
        loss: str = "ce",
        target: str | None = None,
    ) -> None:
        b = random_step if random_step is not None else eps / 2
        if b >= eps:
            raise ValueError(f"random_step: {b} must be smaller than eps = {eps}")
        super().__init__(
            loss=loss, eps=eps, alpha=eps - b, steps=1, start="sign", start_scale=b, target=target
        )


@ATTACKS.register_module(name=["bim", "i_fgsm"])
class BIM(Iterative):
    """Basic iterative method, I-FGSM: x_{t+1} = P(x_t + alpha * sign grad J(x_t, y)) from x (Kurakin et al. 2017).

    On label maps `loss: ce` is the mean over the pixels that are not ignored (Arnab et al. 2018); on detectors `cls`,
    `loc` and `cls+loc` ascend the losses of Zhang and Wang 2019 with ground truth as targets.

    Args:
        eps: radius in [0,1] pixel units.
        alpha: step size; None = eps / steps (HGD's code). Kurakin: 1/255.
        steps: number of steps. Kurakin: min(eps + 4, 1.25 eps) with eps in grey levels.
        loss: see `iterative`.
        kappa: confidence at which `margin` stops; None = never.
        norm: linf or l2.
        labels: `true`, or the victim's prediction at the clean image, kept for all steps.
        target: rule for a wrong target; None = untargeted.
        return_best: return the best iterate by loss instead of the last.
        stop_when_fooled: see `iterative`.
    """

    def __init__(
        self,
        eps: Radius = Fraction(8, 255),
        alpha: Radius | None = None,
        steps: Steps = 10,
        loss: str = "ce",
        kappa: float | None = None,
        norm: Norm = "linf",
        labels: Literal["true", "predicted"] = "true",
        target: str | None = None,
        return_best: bool = False,
        stop_when_fooled: Stop = None,
    ) -> None:
        super().__init__(
            loss=loss,
            kappa=kappa,
            norm=norm,
            eps=eps,
            alpha=alpha,
            steps=steps,
            labels=labels,
            target=target,
            return_best=return_best,
            stop_when_fooled=stop_when_fooled,
        )


@ATTACKS.register_module(name="pgd")
class PGD(Iterative):
    """Projected gradient descent from a random start in the ball (Madry et al. 2018, eq. 3).

    `loss: kl` with `start: normal` is the attack of TRADES (Zhang et al. 2019, algorithm 1); `loss: margin` is PGD on
    the loss of Carlini and Wagner, `loss: dlr` on that of Croce and Hein.

    Args:
        eps: radius in [0,1] pixel units.
        alpha: step size.
        steps: number of steps.
        loss: see `iterative`.
        kappa: confidence at which `margin` stops; None = never.
        norm: linf or l2.
        start: `uniform` in the ball, `radial` (l2: a random direction and a uniform length), `normal` noise of
            standard deviation 0.001, or `none`.
        restarts: random starts, of which the best is kept for each image.
        best_by: what is best: the larger `loss`, or `fooled` first (classification).
        target: rule for a wrong target; None = untargeted.
        return_best: return the best iterate instead of the last.
        stop_when_fooled: see `iterative`.
    """

    def __init__(
        self,
        eps: Radius = Fraction(8, 255),
        alpha: Radius | None = Fraction(2, 255),
        steps: Steps = 20,
        loss: str = "ce",
        kappa: float | None = None,
        norm: Norm = "linf",
        start: Literal["uniform", "radial", "normal", "none"] = "uniform",
        restarts: Annotated[int, Field(ge=1)] = 1,
        best_by: Literal["loss", "fooled"] = "loss",
        target: str | None = None,
        return_best: bool = False,
        stop_when_fooled: Stop = None,
    ) -> None:
        super().__init__(
            loss=loss,
            kappa=kappa,
            norm=norm,
            eps=eps,
            alpha=alpha,
            steps=steps,
            start=start,
            restarts=restarts,
            best_by=best_by,
            target=target,
            return_best=return_best,
            stop_when_fooled=stop_when_fooled,
        )


@ATTACKS.register_module(name="det_pgd")
class DetectionPGD(Iterative):
    """Ascent on a detector's classification loss, localisation loss or both (Zhang and Wang 2019, eq. 5 and 6).

    Targets are the ground truth. The papers that use it leave steps and step size open: the defaults are a choice.

    Args:
        loss: `cls`, `loc`, `cls+loc`, or another loss kind of the detector, such as `mask`.
        eps: radius in [0,1] pixel units.
        alpha: step size.
        steps: number of steps.
        start: `none` or `uniform` in the ball.
    """

    def __init__(
        self,
        loss: str = "cls",
        eps: Pixels = Fraction(8, 255),
        alpha: Pixels = Fraction(2, 255),
        steps: Steps = 20,
        start: Literal["none", "uniform"] = "none",
    ) -> None:
        super().__init__(loss=loss, eps=eps, alpha=alpha, steps=steps, start=start)
