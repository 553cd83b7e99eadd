"""MI, DI, TI and their combinations: attacks made to transfer, with the settings of the authors' code.

FGSM_TI, MIFGSM_TI, DIM and DIM_TI are as in the code of Dong et al. 2019 (translation-invariant attacks), the setting
of NRP's table 1: eps 16/255, 10 steps of eps / 10, decay 1, diversity 0.7, a 15x15 kernel. They return the last
iterate; after all steps, but where a fooled image may leave (`attacks.scores.Stop`).
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, ClassVar

from pydantic import Field

from attacks.iterative import Factor, Iterative, KernelSize, Ratio, Steps
from attacks.scores import Stop
from attacks.transforms import Canvas, Interpolation, MomentumNorm
from bench.protocols import Pixels
from bench.registry import ATTACKS

EPS = Fraction(16, 255)
RATIO = Fraction(330, 299)
Chance = Annotated[float, Field(gt=0, le=1)]


@ATTACKS.register_module(name="mi_fgsm")
class MIFGSM(Iterative):
    """Momentum iterative FGSM (Dong et al. 2018, algorithm 1).

    Args:
        eps: radius in [0,1] pixel units.
        alpha: step size; None = eps / steps, as published.
        steps: number of steps.
        decay: decay factor mu.
        momentum_norm: divide by the `mean` of |grad| (the authors' code); `sign` accumulates signs instead, as foolbox
            does.
        loss: see `iterative`.
        target: rule for a wrong target; None = untargeted.
        stop_when_fooled: see `iterative`.
    """

    added: ClassVar[Mapping[str, Any]] = {"stop_when_fooled": False}

    def __init__(
        self,
        eps: Pixels = EPS,
        alpha: Pixels | None = None,
        steps: Steps = 10,
        decay: Factor = 1.0,
        momentum_norm: MomentumNorm = "mean",
        loss: str = "ce",
        target: str | None = None,
        stop_when_fooled: Stop = None,
    ) -> None:
        super().__init__(
            loss=loss,
            eps=eps,
            alpha=alpha,
            steps=steps,
            momentum=decay,
            momentum_norm=momentum_norm,
            target=target,
            stop_when_fooled=stop_when_fooled,
        )


@ATTACKS.register_module(name="di_fgsm")
class DIFGSM(Iterative):
    """Diverse inputs iterative FGSM, DI2-FGSM (Xie et al. 2019, eq. 4), with the settings of the authors' code.

    Args:
        eps: radius in [0,1] pixel units.
        alpha: step size.
        steps: number of steps; 20 is the authors' min(eps + 4, 1.25 eps) for eps 16.
        decay: decay factor mu; 1 gives M-DI2-FGSM, see `dim`.
        prob: chance that an image is resized and padded at a step.
        ratio: canvas size over image size; below 1 the image shrinks, to no less than that.
        canvas: `enlarged` or `native`, see `attacks.transforms.InputDiversity`.
        interpolation: `nearest` (published) or `bilinear`; with `ratio: 9/10` as torchattacks resizes.
        loss: see `iterative`.
        target: rule for a wrong target; None = untargeted.
        stop_when_fooled: see `iterative`.
    """

    added: ClassVar[Mapping[str, Any]] = {"interpolation": "nearest", "stop_when_fooled": False}

    def __init__(
        self,
        eps: Pixels = EPS,
        alpha: Pixels | None = Fraction(1, 255),
        steps: Steps = 20,
        decay: Factor = 0.0,
        prob: Chance = 0.5,
        ratio: Ratio = RATIO,
        canvas: Canvas = "enlarged",
        interpolation: Interpolation = "nearest",
        loss: str = "ce",
        target: str | None = None,
        stop_when_fooled: Stop = None,
    ) -> None:
        super().__init__(
            loss=loss,
            eps=eps,
            alpha=alpha,
            steps=steps,
            momentum=decay,
            di_prob=prob,
            di_ratio=ratio,
            di_canvas=canvas,
            di_interpolation=interpolation,
            target=target,
            stop_when_fooled=stop_when_fooled,
        )


@ATTACKS.register_module(name="ti_fgsm")
class TIFGSM(Iterative):
    """Translation-invariant I-FGSM: BIM with a smoothed gradient (Dong et al. 2019, eq. 7 inside eq. 2).

    Args:
        eps: radius in [0,1] pixel units.
        alpha: step size; None = eps / steps.
        steps: number of steps.
        kernel: odd size of the Gaussian: 15 as published (half of a 32-pixel image), or 3, 5, 7 for small images.
        sigmas: cut-off of the Gaussian in standard deviations, not its width.
        loss: see `iterative`.
        target: rule for a wrong target; None = untargeted.
        stop_when_fooled: see `iterative`.
    """

    added: ClassVar[Mapping[str, Any]] = {"stop_when_fooled": False}

    def __init__(
        self,
        eps: Pixels = EPS,
        alpha: Pixels | None = None,
        steps: Steps = 10,
        kernel: KernelSize = 15,
        sigmas: Annotated[float, Field(gt=0)] = 3.0,
        loss: str = "ce",
        target: str | None = None,
        stop_when_fooled: Stop = None,
    ) -> None:
        super().__init__(
            loss=loss,
            eps=eps,
            alpha=alpha,
            steps=steps,
            ti_kernel=kernel,
            ti_sigmas=sigmas,
            target=target,
            stop_when_fooled=stop_when_fooled,
        )


@ATTACKS.register_module(name="fgsm_ti")
class FGSMTI(Iterative):
    """FGSM with a smoothed gradient: x' = P(x + eps * sign(W * grad J)) (Dong et al. 2019, eq. 8).

    Args:
        eps: radius and step size in [0,1] pixel units.
        kernel: odd size of the Gaussian.
        sigmas: its cut-off in standard deviations.
        loss: see `iterative`.
        target: rule for a wrong target; None = untargeted.
    """

    def __init__(
        self,
        eps: Pixels = EPS,
        kernel: KernelSize = 15,
        sigmas: Annotated[float, Field(gt=0)] = 3.0,
        loss: str = "ce",
        target: str | None = None,
    ) -> None:
        super().__init__(
            loss=loss, eps=eps, alpha=eps, steps=1, ti_kernel=kernel, ti_sigmas=sigmas, target=target
        )


@ATTACKS.register_module(name="mi_fgsm_ti")
class MIFGSMTI(Iterative):
    """MI-FGSM whose gradient is smoothed before it is normalised (Dong et al. 2019, section 3.2).

    Args:
        eps: radius in [0,1] pixel units.
        alpha: step size; None = eps / steps.
        steps: number of steps.
        decay: decay factor mu.
        kernel: odd size of the Gaussian.
        sigmas: its cut-off in standard deviations.
        loss: see `iterative`.
        target: rule for a wrong target; None = untargeted.
        stop_when_fooled: see `iterative`.
    """

    added: ClassVar[Mapping[str, Any]] = {"stop_when_fooled": False}

    def __init__(
        self,
        eps: Pixels = EPS,
        alpha: Pixels | None = None,
        steps: Steps = 10,
        decay: Factor = 1.0,
        kernel: KernelSize = 15,
        sigmas: Annotated[float, Field(gt=0)] = 3.0,
        loss: str = "ce",
        target: str | None = None,
        stop_when_fooled: Stop = None,
    ) -> None:
        super().__init__(
            loss=loss,
            eps=eps,
            alpha=alpha,
            steps=steps,
            momentum=decay,
            ti_kernel=kernel,
            ti_sigmas=sigmas,
            target=target,
            stop_when_fooled=stop_when_fooled,
        )


@ATTACKS.register_module(name="dim")
class DIM(Iterative):
    """MI-FGSM on diverse inputs, M-DI2-FGSM (Xie et al. 2019, section 3.4), with the settings of Dong et al. 2019.

    Xie's own: prob 0.5, alpha 1/255, 20 steps.

    Args:
        eps: radius in [0,1] pixel units.
        alpha: step size; None = eps / steps.
        steps: number of steps.
        decay: decay factor mu.
        prob: chance that an image is resized and padded at a step.
        ratio: canvas size over image size; below 1 the image shrinks, to no less than that.
        canvas: `enlarged` or `native`, see `attacks.transforms.InputDiversity`.
        interpolation: `nearest` (published) or `bilinear`; with `ratio: 9/10` as torchattacks resizes.
        loss: see `iterative`.
        target: rule for a wrong target; None = untargeted.
        stop_when_fooled: see `iterative`.
    """

    added: ClassVar[Mapping[str, Any]] = {"interpolation": "nearest", "stop_when_fooled": False}

    def __init__(
        self,
        eps: Pixels = EPS,
        alpha: Pixels | None = None,
        steps: Steps = 10,
        decay: Factor = 1.0,
        prob: Chance = 0.7,
        ratio: Ratio = RATIO,
        canvas: Canvas = "enlarged",
        interpolation: Interpolation = "nearest",
        loss: str = "ce",
        target: str | None = None,
        stop_when_fooled: Stop = None,
    ) -> None:
        super().__init__(
            loss=loss,
            eps=eps,
            alpha=alpha,
            steps=steps,
            momentum=decay,
            di_prob=prob,
            di_ratio=ratio,
            di_canvas=canvas,
            di_interpolation=interpolation,
            target=target,
            stop_when_fooled=stop_when_fooled,
        )


@ATTACKS.register_module(name="dim_ti")
class DIMTI(Iterative):
    """DIM with a smoothed gradient, TI-DIM (Dong et al. 2019, section 3.2).

    Args:
        eps: radius in [0,1] pixel units.
        alpha: step size; None = eps / steps.
        steps: number of steps.
        decay: decay factor mu.
        prob: chance that an image is resized and padded at a step.
        ratio: canvas size over image size; below 1 the image shrinks, to no less than that.
        canvas: `enlarged` or `native`, see `attacks.transforms.InputDiversity`.
        interpolation: `nearest` (published) or `bilinear`; with `ratio: 9/10` as torchattacks resizes.
        kernel: odd size of the Gaussian.
        sigmas: its cut-off in standard deviations.
        loss: see `iterative`.
        target: rule for a wrong target; None = untargeted.
        stop_when_fooled: see `iterative`.
    """

    added: ClassVar[Mapping[str, Any]] = {"interpolation": "nearest", "stop_when_fooled": False}

    def __init__(
        self,
        eps: Pixels = EPS,
        alpha: Pixels | None = None,
        steps: Steps = 10,
        decay: Factor = 1.0,
        prob: Chance = 0.7,
        ratio: Ratio = RATIO,
        canvas: Canvas = "enlarged",
        interpolation: Interpolation = "nearest",
        kernel: KernelSize = 15,
        sigmas: Annotated[float, Field(gt=0)] = 3.0,
        loss: str = "ce",
        target: str | None = None,
        stop_when_fooled: Stop = None,
    ) -> None:
        super().__init__(
            loss=loss,
            eps=eps,
            alpha=alpha,
            steps=steps,
            momentum=decay,
            ti_kernel=kernel,
            ti_sigmas=sigmas,
            di_prob=prob,
            di_ratio=ratio,
            di_canvas=canvas,
            di_interpolation=interpolation,
            target=target,
            stop_when_fooled=stop_when_fooled,
        )
