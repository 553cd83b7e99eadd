"""Attacks on features: CAFA (class activation features) and SSP (self-supervised perturbation).

Both increase a distance to the clean image's own features and use no labels. That distance has its minimum, with a zero
gradient, at the clean image: the loop as the papers print it never moves, so both start at random and refuse not to.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from attacks.activations import victim_of
from attacks.iterative import Climb, Iterative, Steps
from attacks.objectives import BoundLoss, Loss
from bench.errors import NotApplicable
from bench.protocols import Oracle, Pixels, Warped
from bench.registry import ATTACKS
from bench.weights import sha256_file
from tasks.heads import class_rows, final_linear, last_convolution, last_maps, named_layer
from tasks.vgg import vgg_features


class FeatureDistance(Loss):
    """Distance of the activations of one layer from those of the clean image, (B,).

    Args:
        layer: module of the victim's network, or `stage:K`; None = what stands for what it sees
            (`tasks.heads.named_layer`).
        distance: `mse` or `mae`, means over an image's activations.
    """

    name = "feature distance"
    needs = frozenset({"features"})
    targeted = False
    flat_at_clean = True

    def __init__(self, layer: str | None, distance: Literal["mse", "mae"]) -> None:
        self.layer, self.distance = layer, distance

    def bind(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], targeted: bool) -> BoundLoss:
        """The objective, with its layer found in the victim."""
        named = FeatureDistance(named_layer(victim_of(oracle).models[0], images, self.layer), self.distance)
        return Loss.bind(named, oracle, images, targets, False)

    def reference(self, oracle: Oracle, images: Tensor) -> Tensor:
        """Activations at the clean images."""
        with torch.no_grad():
            return self.activations(oracle, images)

    def activations(self, oracle: Oracle, images: Tensor) -> Tensor:
        """What is compared, (B, ...)."""
        assert self.layer is not None
        return oracle.features(images, self.layer)

    def __call__(
        self, oracle: Oracle, images: Tensor | Warped, targets: Sequence[Any], reference: Tensor | None
    ) -> Tensor:
        """Distances (B,)."""
        assert reference is not None and isinstance(images, Tensor)
        gap = (self.activations(oracle, images) - reference).flatten(1)
        return gap.square().mean(1) if self.distance == "mse" else gap.abs().mean(1)


class VGGDistance(FeatureDistance):
    """The same on a VGG of the attacker's own: the victim is not asked.

    Args:
        vgg: weights in torchvision's layout.
        layer: one of its activations, such as `relu3_3`.
        distance: `mse` or `mae`.
    """

    name = "VGG feature distance"
    needs = frozenset()
    compares = False

    def __init__(self, vgg: Path, layer: str, distance: Literal["mse", "mae"]) -> None:
        super().__init__(layer, distance)
        self.vgg = vgg

    def bind(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], targeted: bool) -> BoundLoss:
        """The objective; its layer is named."""
        return Loss.bind(self, oracle, images, targets, False)

    def activations(self, oracle: Oracle, images: Tensor) -> Tensor:
        """What is compared, (B, C, H, W)."""
        found: Tensor = vgg_features(self.vgg).to(images.device)(images, [str(self.layer)])[0]
        return found


class ClassActivationDistance(Loss):
    """Distance of class activation features Phi = F * w_c from those of the clean image, (B,).

    F are the victim's last feature maps, w_c the row of the last linear layer for the class the victim predicts,
    for clean and current image separately. Of a segmenter, whose last linear map is a 1x1 convolution, every pixel of
    the maps has a class, and w_c, of its own (this project's form; see `tasks.heads`).

    Args:
        mode: `paper`: Euclidean norm. `code`: ReLU, minus minimum, over maximum, bilinear to 32x32 where maps are
            smaller, mean square; the code takes minimum and maximum over the batch, here they are each image's own
            (the same for a batch of one), since no image may depend on its company.
        layer: the maps; None = those that are pooled for the linear layer (the paper's class activation maps),
            `convolution` = the last convolution's output, before norm and ReLU (the code's, for a VGG).
    """

    name = "class activation distance"
    needs = frozenset({"features", "logits"})
    tasks = frozenset({"classification", "segmentation"})
    targeted = False
    flat_at_clean = True

    def __init__(self, mode: Literal["paper", "code"], layer: str | None) -> None:
        self.mode, self.layer = mode, layer

    def bind(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], targeted: bool) -> BoundLoss:
        """The objective, with its layer found in the victim."""
        model = victim_of(oracle).models[0]
        found = self.layer
        if found is None:
            found = last_maps(model, images)
        elif found == "convolution":
            found = last_convolution(model)
        named = ClassActivationDistance(self.mode, found)
        return Loss.bind(named, oracle, images, targets, False)

    def reference(self, oracle: Oracle, images: Tensor) -> Tensor:
        """Class activation features of the clean images."""
        with torch.no_grad():
            return self._phi(oracle, images)

    def __call__(
        self, oracle: Oracle, images: Tensor | Warped, targets: Sequence[Any], reference: Tensor | None
    ) -> Tensor:
        """Distances (B,)."""
        assert reference is not None and isinstance(images, Tensor)
        gap = (self._phi(oracle, images) - reference).flatten(1)
        return gap.square().mean(1) if self.mode == "code" else (gap.square().sum(1) + 1e-12).sqrt()

    def _phi(self, oracle: Oracle, images: Tensor) -> Tensor:
        linear, layer = final_linear(victim_of(oracle).models[0]), self.layer
        assert layer is not None
        maps = oracle.features(images, layer)
        if maps.ndim != 4 or maps.shape[1] != linear.weight.shape[1]:
            raise NotApplicable(
                f"class activation features need maps with the {linear.weight.shape[1]} channels that the last linear "
                f"layer takes; layer '{layer}' returns {tuple(maps.shape[1:])}"
            )
        phi = maps * class_rows(linear, maps, lambda: oracle.logits(images))
        if self.mode == "paper":
            return phi
        phi = F.relu(phi)
        phi = phi - phi.amin((1, 2, 3), keepdim=True)
        phi = phi / phi.amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
        size = (max(32, int(phi.shape[-2])), max(32, int(phi.shape[-1])))
        return F.interpolate(phi, size=size, mode="bilinear", align_corners=False)


class _Feature(Iterative):
    """The loop with a distance of features in place of a loss."""

    def __init__(
        self,
        loss: Loss,
        eps: Fraction,
        alpha: Fraction,
        steps: int,
        start: Literal["uniform", "normal", "sign"],
    ) -> None:
        if start not in ("uniform", "normal", "sign"):
            raise ValueError(
                f"start: '{start}' would never move: the gradient at the clean image is zero; "
                "expected uniform, normal or sign"
            )
        # At 0.001, the default of `normal`, the gradient would be lost in rounding.
        scale = eps if start == "normal" else None
        super().__init__(eps=eps, alpha=alpha, steps=steps, start=start, start_scale=scale)
        self.loss, self.labelled = loss, False
        self.needs = frozenset({"gradient", *loss.needs})
        self.tasks = loss.tasks


@ATTACKS.register_module(name="cafa")
class CAFA(_Feature):
    """Class activation feature attack, the training adversary of CAFD (Zhou et al., ICCV 2021, section 3.2).

    x' = P(x' + alpha * sign grad D(Phi_x, Phi_x')), Phi the class activation features. As printed the attack starts at
    x, where D and its gradient are zero, and never moves; the code starts uniformly in the ball, as here. Steps and
    step size are the code's; the main text gives none. A segmenter is attacked per pixel (`ClassActivationDistance`).

    Limitations: on the embedded classifiers it leaves 63 to 84 % accuracy at 8/255 where PGD leaves none, and neither
    300 steps (68 %), a smaller step (73 %), another start (65 %) nor another layer (73 to 97 %) changes that; its
    gradient agrees with finite differences to eight digits. With w_c held fixed it comes within 10 % of the distance
    PGD reaches, but more of the same class is distance too, and half of PGD's distance is the jump of w_c where the
    class changes, which has no gradient: the same features unweighted (`ssp`) leave 17 to 40 %.

    Args:
        mode: `code` or `paper`: how the distance D is taken (`ClassActivationDistance`).
        eps: radius in [0,1] pixel units.
        alpha: step size.
        steps: number of steps.
        start: `uniform` in the ball, `normal` noise of standard deviation eps, or `sign` noise of eps / 2.
        layer: feature maps of the victim; None = those that are pooled for its linear layer, `convolution` = its last
            convolution before norm and ReLU, as the code has it for a VGG.
    """

    def __init__(
        self,
        mode: Literal["code", "paper"] = "code",
        eps: Pixels = Fraction(8, 255),
        alpha: Pixels = Fraction(1, 100),
        steps: Steps = 100,
        start: str = "uniform",
        layer: str | None = None,
    ) -> None:
        super().__init__(ClassActivationDistance(mode, layer), eps, alpha, steps, start)  # type: ignore[arg-type]


@ATTACKS.register_module(name="ssp")
class SSP(_Feature):
    """Self-supervised perturbation, the training adversary of NRP (Naseer et al., CVPR 2020, algorithm 1).

    x' = P(x' + alpha * sign grad D(F(x), F(x'))), F the features of one layer. The paper's are conv3_3 of an ImageNet
    VGG16 with its ReLU, and no feature of the model that is attacked in the end: give its weights as `vgg`. Without
    them the features are the victim's own. `paper`: mean absolute differences from x plus noise. `code`: mean squares,
    from a picture of pure N(0, 1) noise that the first projection turns into a random corner of the ball. Unlike
    algorithm 1, images stay in [0,1].

    Args:
        layer: of the victim's network, None = the maps pooled for a classifier's linear layer, otherwise everything
            its backbone returns, `stage:K` = the last at the K-th size of its maps (of a VGG the end of block K); with
            `vgg` one of its activations, None = `relu3_3`.
        vgg: weights of a VGG in torchvision's layout. The attack then asks the victim for nothing, whatever defense
            stands in front of it.
        mode: `code` or `paper`.
        eps: radius in [0,1] pixel units.
        alpha: step size (the code's; the paper gives none).
        steps: number of steps (the code's).
        start: noise added in mode `paper`: `uniform` in the ball, `normal` with standard deviation eps, `sign`.
    """

    def __init__(
        self,
        layer: str | None = None,
        vgg: Path | None = None,
        mode: Literal["code", "paper"] = "code",
        eps: Pixels = Fraction(16, 255),
        alpha: Pixels = Fraction(1, 100),
        steps: Steps = 100,
        start: str = "uniform",
    ) -> None:
        kind: Literal["mse", "mae"] = "mse" if mode == "code" else "mae"
        own = None if vgg is None else vgg.expanduser()
        distance = FeatureDistance(layer, kind) if own is None else VGGDistance(own, layer or "relu3_3", kind)
        super().__init__(distance, eps, alpha, steps, start)  # type: ignore[arg-type]
        self.mode, self.vgg = mode, own

    def identity(self) -> dict[str, Any]:
        """Name and parameters, with the digest of the VGG's weights in place of their path."""
        identity = super().identity()
        if self.vgg is not None:
            identity["params"]["vgg"] = sha256_file(self.vgg)
        return identity

    def _begin(self, climb: Climb) -> Tensor:
        if self.mode == "paper":
            return super()._begin(climb)
        return climb.rng.normal(climb.clean.shape[1:], climb.clean.device)
