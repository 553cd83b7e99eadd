"""What a defense is trained for: the papers' losses with their weights, and which ablation leaves out what.

An objective returns its terms apart and already weighted, so that a diverging one can be named and curves drawn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.errors import PluginError, unknown
from defenses.training import losses
from defenses.training.guide import Guide, label_planes, labels_of

Terms = dict[str, Tensor]


@dataclass
class Step:
    """One batch of training.

    Attributes:
        clean, adversarial: images (B, 3, H, W) in [0,1].
        targets: ground truth.
        purify: the defense under training, [0,1] to about [0,1].
        inner: [0,1] to the value range of the network, in which image losses are taken.
        guide: the target; None when the recipe needs none.
        critic: the discriminator; it sees images in the network's range.
        seed: for losses that sample.
        network: the network under training itself, for losses that do not purify an image with it.
    """

    clean: Tensor
    adversarial: Tensor
    targets: Sequence[Any]
    purify: Callable[[Tensor], Tensor]
    inner: Callable[[Tensor], Tensor]
    guide: Guide | None = None
    critic: nn.Module | None = None
    seed: int = 0
    network: nn.Module | None = None

    @property
    def target(self) -> Guide:
        """The guide, which must be there."""
        if self.guide is None:
            raise PluginError("this recipe needs a target model to guide it")
        return self.guide


class Objective(ABC):
    """Terms of the generator's and the discriminator's loss.

    Attributes:
        guided: it asks the target for something.
        labelled: it uses ground truth.
        attacked: it uses adversarial images.
        adversarial: it has a discriminator.
        generator_steps: updates of the defense per batch.
        generator_every: the defense is updated on every this many batches, the discriminator on each (WGAN: 5).
        critic_first: the discriminator is updated before the defense.
        average: decay of an exponential moving average of the weights, which is what gets written; 0 = none.
    """

    guided: bool = True
    labelled: bool = False
    attacked: bool = True
    adversarial: bool = False
    generator_steps: int = 1
    generator_every: int = 1
    critic_first: bool = False
    average: float = 0.0

    @abstractmethod
    def generator(self, step: Step) -> Terms:
        """Weighted terms whose sum the defense minimises."""

    def critic(self, step: Step, purified: Sequence[Tensor]) -> Terms:
        """Weighted terms whose sum the discriminator minimises; `purified` is what `fakes` returned, detached."""
        return {}

    def fakes(self, step: Step) -> tuple[Tensor, ...]:
        """Purified images the discriminator is shown, in [0,1]."""
        return (step.purify(step.adversarial),)

    def check(self, guide: Guide | None, images: Tensor) -> None:
        """Find what the losses need in the target, before anything is computed.

        Args:
            guide: the target.
            images: some training images.

        Raises:
            BenchError: it is not there.
        """
        return


class HGDObjective(Objective):
    """HGD (section 3.2): L1 between what the target makes of the denoised and of the clean image.

    Args:
        guide: `pixels` (PGD-denoiser), `features` (FGD: the topmost feature map), `logits` (LGD) or `labels` (CGD:
            cross-entropy).
        layer: the topmost feature map, for `features`; None = the maps pooled for the linear layer.
    """

    def __init__(
        self, guide: Literal["pixels", "features", "logits", "labels"] = "logits", layer: str | None = None
    ) -> None:
        _one_of("guide", guide, ("pixels", "features", "logits", "labels"))
        if layer is not None and guide not in ("features", "logits"):
            raise ValueError(f"layer belongs to guide 'features', not to '{guide}'")
        self.guide, self.layer = guide, layer
        self.guided, self.labelled = guide != "pixels", guide == "labels"

    def check(self, guide: Guide | None, images: Tensor) -> None:
        if self.guide == "features" and guide is not None:
            self.layer = guide.layer(self.layer, images)

    def generator(self, step: Step) -> Terms:
        purified = step.purify(step.adversarial)
        if self.guide == "pixels":
            return {"pixels": losses.l1(step.inner(purified), step.inner(step.clean))}
        if self.guide == "labels":
            return {"labels": step.target.task_loss(purified, step.targets, step.seed)}
        with torch.no_grad():
            wanted = step.target.outputs(step.clean, self.layer)
        return {self.guide: losses.l1(step.target.outputs(purified, self.layer), wanted)}


class CAFDObjective(Objective):
    """CAFD (section 3.3): class activation features of the target, and a relativistic discriminator.

    Args:
        equation: 7 (CAFD) or 6 (CAFD').
        form: `code` (means, maps enlarged to 32x32) or `paper` (Euclidean norms).
        caf: weight of the class activation term; 0 leaves it out. None = 1e3 (SVHN in the paper: 1e2).
        rows: weight of equation 7's distance of class weights, which has no gradient; None = 1e-3 in the code,
            `caf` in the paper.
        gan: weight of the adversarial term; 0 leaves it out.
        pixels: weight of the pixels' mean squared error: 1 with `caf: 0` is the ablation MSED.
        kind: `ragan` (code) or `relativistic` (paper).
        layer: the feature maps; None = those that are pooled for the linear layer (the paper's class activation maps),
            `convolution` = the last convolution's output, before norm and ReLU: the code's, for a VGG. In a residual
            network that is one branch of a sum, which says little.
    """

    def __init__(
        self,
        equation: Literal[6, 7] = 7,
        form: Literal["code", "paper"] = "code",
        caf: float = 1e3,
        rows: float | None = None,
        gan: float = 5e-3,
        pixels: float = 0.0,
        kind: Literal["ragan", "relativistic", "vanilla"] = "ragan",
        layer: str | None = None,
    ) -> None:
        _one_of("equation", equation, (6, 7))
        _one_of("form", form, ("code", "paper"))
        self.gan_d, self.gan_g = losses.GANS[_one_of("kind", kind, losses.GANS)]
        self.equation, self.form, self.layer = equation, form, layer
        self.caf, self.gan, self.pixels = caf, gan, pixels
        self.rows = rows if rows is not None else (1e-3 if form == "code" else caf)
        self.adversarial, self.guided = gan > 0, caf > 0

    def check(self, guide: Guide | None, images: Tensor) -> None:
        if guide is not None and self.guided:
            guide.linear()
            self.layer = guide.layer(self.layer, images)

    def generator(self, step: Step) -> Terms:
        purified = step.purify(step.adversarial)
        terms: Terms = {}
        if self.caf > 0:
            terms.update(self._caf(step, purified))
        if self.pixels > 0:
            terms["pixels"] = self.pixels * losses.mse(step.inner(purified), step.inner(step.clean))
        if self.critic_of(step) is not None:
            terms["gan"] = self.gan * _gan(self.gan_g, step, purified)
        return terms

    def _caf(self, step: Step, purified: Tensor) -> Terms:
        guide = step.target
        layer = guide.layer(self.layer, step.clean)
        weight = guide.linear().weight
        with torch.no_grad():
            clean = guide.features(step.clean, layer)
            clean_rows = losses.class_weights(weight, guide.logits(step.clean))
            rows = losses.class_weights(weight, guide.logits(purified))
        maps = guide.features(purified, layer)
        if self.equation == 6:
            return {"caf": self.caf * losses.caf_eq6(clean, maps, clean_rows, rows, self.form)}
        distance, row_distance = losses.caf_eq7(clean, maps, clean_rows, rows, self.form)
        return {"caf": self.caf * distance, "rows": self.rows * row_distance}

    def critic_of(self, step: Step) -> nn.Module | None:
        """The discriminator, if this objective has one."""
        return step.critic if self.gan > 0 else None

    def critic(self, step: Step, purified: Sequence[Tensor]) -> Terms:
        return {"critic": _critic(self.gan_d, step, purified[0])}


class NRPObjective(Objective):
    """NRP (section 3.2): features of one network, pixels and a relativistic average discriminator; no labels.

    Args:
        layer: the feature layer (conv3_3 of VGG16 in the paper: `features.15` in torchvision); None = the maps pooled
            for the linear layer.
        feat, img, gan: weights lambda, gamma and alpha; 0 leaves a term out.
        kind: `ragan`, `relativistic` (the formula as printed) or `vanilla` (ablation).
        image_distance: `norm` (||.||_2 of each image, as printed) or `mse`.
    """

    def __init__(
        self,
        layer: str | None = None,
        feat: float = 1.0,
        img: float = 1e-2,
        gan: float = 5e-3,
        kind: Literal["ragan", "relativistic", "vanilla"] = "ragan",
        image_distance: Literal["norm", "mse"] = "norm",
    ) -> None:
        self.gan_d, self.gan_g = losses.GANS[_one_of("kind", kind, losses.GANS)]
        self.layer, self.feat, self.img, self.gan = layer, feat, img, gan
        _one_of("image_distance", image_distance, ("norm", "mse"))
        self.image = losses.l2_norm if image_distance == "norm" else losses.mse
        self.guided, self.adversarial = feat > 0, gan > 0

    def check(self, guide: Guide | None, images: Tensor) -> None:
        if guide is not None and self.guided:
            self.layer = guide.layer(self.layer, images)

    def generator(self, step: Step) -> Terms:
        purified = step.purify(step.adversarial)
        terms: Terms = {}
        if self.feat > 0:
            layer = step.target.layer(self.layer, step.clean)
            with torch.no_grad():
                wanted = step.target.features(step.clean, layer)
            terms["features"] = self.feat * losses.l1(step.target.features(purified, layer), wanted)
        if self.img > 0:
            terms["image"] = self.img * self.image(purified, step.clean)
        if self.gan > 0:
            terms["gan"] = self.gan * _gan(self.gan_g, step, purified)
        return terms

    def critic(self, step: Step, purified: Sequence[Tensor]) -> Terms:
        return {"critic": _critic(self.gan_d, step, purified[0])}


class APEGANObjective(Objective):
    """APE-GAN: pixels and a vanilla discriminator, updated before two updates of the generator.

    Args:
        weights: `official`: 0.9 root mean square + 0.02 BCE; `paper`: 0.7 mean square + 0.3 BCE.
    """

    guided = False
    adversarial = True
    generator_steps = 2
    critic_first = True

    def __init__(self, weights: Literal["official", "paper"] = "official") -> None:
        _one_of("weights", weights, ("official", "paper"))
        official = weights == "official"
        self.image = losses.rmse if official else losses.mse
        self.img, self.gan = (0.9, 0.02) if official else (0.7, 0.3)

    def generator(self, step: Step) -> Terms:
        purified = step.purify(step.adversarial)
        return {
            "image": self.img * self.image(step.inner(purified), step.inner(step.clean)),
            "gan": self.gan * _gan(losses.vanilla_g, step, purified),
        }

    def critic(self, step: Step, purified: Sequence[Tensor]) -> Terms:
        return {"critic": _critic(losses.vanilla_d, step, purified[0])}


class AlignmentObjective(Objective):
    """The alignment generator: pixel level, feature level and class-aware terms, weights of the public code.

    With x the clean and a the adversarial image: new pairs are (G(x), x) and (G(a), G(x)), and G(x) is real for the
    discriminator; traditional pairs (LT) are (G(x), x) and (G(a), x), x is real and both G(x) and G(a) are fake.

    Args:
        pairs: `new` or `traditional`.
        image: pixel-level terms (L_r, L_p, GAN, feature matching).
        feature: feature-level terms (task loss, reconstruction of features).
        classes: class-aware terms (alignment, within and between classes).
        perceptual: layers of the target for L_p, each with its weight; the code uses five layers of VGG19, 1/32 to 1.
            None leaves L_p out.
        layer: features of the target; None = logits, as the code.
        conditioned: the discriminator also sees one plane per class (the code, for classification and segmentation).
        task_weight: 2 in the code, 1 for detection.
        class_scale: 1 in the code, 10 for detection.
        margin: distance between classes that is enough.

    Ablations: LI = image; LF (w/o c) = feature; LI+F (w/o c) = both; LT, LT+F = the same with traditional pairs; Full
    = all three with new pairs.
    """

    MATCHING: ClassVar[float] = 10.0

    def __init__(
        self,
        pairs: Literal["new", "traditional"] = "new",
        image: bool = True,
        feature: bool = True,
        classes: bool = True,
        perceptual: dict[str, float] | None = None,
        layer: str | None = None,
        conditioned: bool = True,
        task_weight: float = 2.0,
        class_scale: float = 1.0,
        margin: float = 5.0,
    ) -> None:
        _one_of("pairs", pairs, ("new", "traditional"))
        self.new, self.image, self.feature, self.classes = pairs == "new", image, feature, classes
        self.perceptual, self.layer, self.conditioned = dict(perceptual or {}), layer, conditioned
        self.task_weight, self.class_scale, self.margin = task_weight, class_scale, margin
        self.adversarial = image
        self.labelled = feature or classes or (image and conditioned)
        self.guided = feature or classes or bool(self.perceptual)

    def generator(self, step: Step) -> Terms:
        clean, adversarial = step.purify(step.clean), step.purify(step.adversarial)
        terms: Terms = {}
        if self.image:
            terms.update(self._image(step, clean, adversarial))
        if self.feature or self.classes:
            with torch.no_grad():
                wanted = step.target.outputs(step.clean, self.layer)
            restored = step.target.outputs(adversarial, self.layer)
            if self.feature:
                pair = losses.l1(step.target.outputs(clean, self.layer), wanted) + losses.l1(restored, wanted)
                terms["features"] = 4.0 * pair
                task = [step.target.task_loss(x, step.targets, step.seed) for x in (clean, adversarial)]
                terms["task"] = self.task_weight * (task[0] + task[1])
            if self.classes:
                terms.update(self._classes(step, wanted, restored))
        return terms

    def _image(self, step: Step, clean: Tensor, adversarial: Tensor) -> Terms:
        inner = step.inner
        partner = clean if self.new else step.clean
        terms = {
            "reconstruction": 50.0
            * (losses.l1(inner(clean), inner(step.clean)) + losses.l1(inner(adversarial), inner(partner)))
        }
        for layer, weight in self.perceptual.items():
            with torch.no_grad():
                original = step.target.features(step.clean, layer)
            first = step.target.features(clean, layer)
            second = step.target.features(adversarial, layer)
            wanted = first.detach() if self.new else original
            value = 10.0 * weight * (losses.l1(first, original) + losses.l1(second, wanted))
            terms["perceptual"] = terms["perceptual"] + value if "perceptual" in terms else value
        fakes = (adversarial,) if self.new else (clean, adversarial)
        real = clean.detach() if self.new else step.clean
        scores = self._scores(step, real)
        judged = [self._scores(step, fake) for fake in fakes]
        terms["gan"] = torch.stack([losses.lsgan(s, 1.0) for s in judged]).sum()
        terms["matching"] = (
            self.MATCHING * torch.stack([losses.feature_matching(scores, s) for s in judged]).sum()
        )
        return terms

    def _classes(self, step: Step, wanted: Tensor, restored: Tensor) -> Terms:
        labels = labels_of(step.targets, restored.device)
        if restored.ndim == 4 and labels.ndim == 3:
            # Per pixel, at the resolution of the scores.
            if labels.shape[1:] != restored.shape[2:]:
                small = F.interpolate(labels[:, None].float(), size=restored.shape[2:], mode="nearest-exact")
                labels = small[:, 0].long()
            wanted, restored = (z.permute(0, 2, 3, 1).flatten(0, 2) for z in (wanted, restored))
            labels = torch.where(labels < step.target.num_classes, labels, -1).flatten()
        else:
            wanted, restored = wanted.flatten(1), restored.flatten(1)
        scale = self.class_scale
        return {
            "align": scale * 0.1 * losses.class_align(wanted, restored, labels),
            "intra": scale * 1.0 * losses.class_intra(restored, labels),
            "inter": scale * 0.005 * losses.class_inter(restored, labels, self.margin),
        }

    def fakes(self, step: Step) -> tuple[Tensor, ...]:
        return (step.purify(step.adversarial), step.purify(step.clean))

    def critic(self, step: Step, purified: Sequence[Tensor]) -> Terms:
        adversarial, clean = purified
        real, fakes = (clean, [adversarial]) if self.new else (step.clean, [clean, adversarial])
        total = losses.lsgan(self._scores(step, real), 1.0)
        for fake in fakes:
            total = total + losses.lsgan(self._scores(step, fake), 0.0)
        return {"critic": 0.5 * total}

    def _scores(self, step: Step, images: Tensor) -> losses.Scores:
        assert step.critic is not None
        x = step.inner(images)
        if self.conditioned:
            size = (int(x.shape[-2]), int(x.shape[-1]))
            x = torch.cat([x, label_planes(step.targets, step.target.num_classes, size, x.device)], 1)
        return step.critic(x)


OBJECTIVES: dict[str, type[Objective]] = {
    "hgd": HGDObjective,
    "cafd": CAFDObjective,
    "nrp": NRPObjective,
    "apegan": APEGANObjective,
    "alignment": AlignmentObjective,
}


def objective(name: str, params: dict[str, Any]) -> Objective:
    """The objective `name`.

    Raises:
        PluginError: no such objective, or wrong parameters.
    """
    if name not in OBJECTIVES:
        raise PluginError(unknown("training objective", name, OBJECTIVES))
    try:
        return OBJECTIVES[name](**params)
    except (TypeError, ValueError) as error:
        raise PluginError(f"training objective '{name}': {error}") from None


def _gan(term: Callable[[Tensor, Tensor], Tensor], step: Step, purified: Tensor) -> Tensor:
    assert step.critic is not None
    with torch.no_grad():
        real = step.critic(step.inner(step.clean))
    return term(real, step.critic(step.inner(purified)))


def _critic(term: Callable[[Tensor, Tensor], Tensor], step: Step, purified: Tensor) -> Tensor:
    assert step.critic is not None
    return term(step.critic(step.inner(step.clean)), step.critic(step.inner(purified)))


def _one_of(name: str, value: Any, choices: Any) -> Any:
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(str, choices))}")
    return value
