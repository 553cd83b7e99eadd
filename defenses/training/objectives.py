"""What a defense is trained for: the papers' losses with their weights, and which ablation leaves out what.

An objective returns its terms apart and already weighted, so that a diverging one can be named and curves drawn.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bench.errors import PluginError, unknown
from bench.weights import sha256_file
from defenses.training import losses
from defenses.training.guide import Guide, label_planes
from tasks.vgg import VGGFeatures, vgg_features

logger = logging.getLogger(__name__)

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
        vgg: weights of a VGG whose features the losses compare; None = there is none.
        chosen: what `check` chose where the recipe left it open (guide, layer).
    """

    guided: bool = True
    labelled: bool = False
    attacked: bool = True
    adversarial: bool = False
    generator_steps: int = 1
    generator_every: int = 1
    critic_first: bool = False
    average: float = 0.0
    vgg: Path | None = None
    chosen: Mapping[str, str] = MappingProxyType({})

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

    def files(self) -> dict[str, str]:
        """SHA-256 of the files the losses read, by parameter: the weights depend on them, not on their paths.

        Raises:
            WeightsError: a file cannot be read.
        """
        return {} if self.vgg is None else {"vgg": sha256_file(self.vgg)}

    def _judge(self, images: Tensor) -> VGGFeatures:
        """The VGG, where `images` are."""
        assert self.vgg is not None
        return vgg_features(self.vgg).to(images.device)


class HGDObjective(Objective):
    """HGD (section 3.2): L1 between what the target makes of the denoised and of the clean image.

    A detector has no logits of the image: there `logits` becomes `features`, which the log and the name of the loss
    term say.

    Args:
        guide: `pixels` (PGD-denoiser), `features` (FGD: the topmost feature map), `logits` (LGD) or `labels` (CGD:
            the loss the target was trained with).
        layer: the topmost feature map, for `features`; None = the maps before the last linear map, of a detector all
            maps of its neck.
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
        if guide is None:
            return
        if self.guide == "logits" and self.layer is None and not guide.has_logits:
            self.guide = "features"
            logger.info(
                "hgd: the %s target has no logits, its features guide the denoiser instead", guide.task
            )
        if self.guide == "features":
            self.layer = guide.layer(self.layer, images)
        self.chosen = {"guide": self.guide} | ({} if self.layer is None else {"layer": self.layer})

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

    Behind a segmenter, whose last linear map is a 1x1 convolution, every pixel of the maps has the class its logits
    there are largest for, and its class activation feature is made with that class's weights (this project's form:
    the paper has classifiers alone). Detectors have no such map and are refused.

    Args:
        equation: 7 (CAFD) or 6 (CAFD').
        form: `code` (means, maps smaller than 32x32 enlarged to it) or `paper` (Euclidean norms).
        caf: weight of the class activation term; 0 leaves it out. None = 1e3 (SVHN in the paper: 1e2).
        rows: weight of equation 7's distance of class weights, which has no gradient; None = 1e-3 in the code,
            `caf` in the paper.
        gan: weight of the adversarial term; 0 leaves it out.
        pixels: weight of the pixels' mean squared error: 1 with `caf: 0` is the ablation MSED.
        kind: `ragan` (code) or `relativistic` (paper).
        layer: the feature maps; None = those before the linear map and its pooling (the paper's class activation maps),
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
            self.chosen = {"layer": self.layer}

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
        with torch.no_grad():
            clean = guide.features(step.clean, layer)
            clean_rows = guide.class_rows(step.clean, clean)
        maps = guide.features(purified, layer)
        rows = guide.class_rows(purified, maps)
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
        layer: the feature layer. With `vgg` one of its activations; None = `relu3_3` (the paper's, of VGG16). Without,
            a layer of the target; None = the maps pooled for a classifier's linear layer, otherwise the backbone's.
        vgg: weights of an ImageNet VGG16 in torchvision's layout: the paper's feature network, which makes the training
            independent of any target. None = the target's own features.
        feat, img, gan: weights lambda, gamma and alpha; 0 leaves a term out.
        kind: `ragan`, `relativistic` (the formula as printed) or `vanilla` (ablation).
        image_distance: `norm` (||.||_2 of each image, as printed) or `mse`.
    """

    def __init__(
        self,
        layer: str | None = None,
        vgg: Path | str | None = None,
        feat: float = 1.0,
        img: float = 1e-2,
        gan: float = 5e-3,
        kind: Literal["ragan", "relativistic", "vanilla"] = "ragan",
        image_distance: Literal["norm", "mse"] = "norm",
    ) -> None:
        self.gan_d, self.gan_g = losses.GANS[_one_of("kind", kind, losses.GANS)]
        self.layer, self.feat, self.img, self.gan = layer, feat, img, gan
        self.vgg = None if vgg is None or feat == 0 else Path(vgg).expanduser()
        if self.vgg is not None:
            self.layer = layer or "relu3_3"
        _one_of("image_distance", image_distance, ("norm", "mse"))
        self.image = losses.l2_norm if image_distance == "norm" else losses.mse
        self.guided, self.adversarial = feat > 0 and self.vgg is None, gan > 0

    def check(self, guide: Guide | None, images: Tensor) -> None:
        if self.vgg is not None:
            self._features(None, images)
        elif guide is not None and self.guided:
            self.layer = guide.layer(self.layer or "features", images)
        self.chosen = {} if self.layer is None else {"layer": self.layer}

    def generator(self, step: Step) -> Terms:
        purified = step.purify(step.adversarial)
        terms: Terms = {}
        if self.feat > 0:
            with torch.no_grad():
                wanted = self._features(step.guide, step.clean)
            terms["features"] = self.feat * losses.l1(self._features(step.guide, purified), wanted)
        if self.img > 0:
            terms["image"] = self.img * self.image(purified, step.clean)
        if self.gan > 0:
            terms["gan"] = self.gan * _gan(self.gan_g, step, purified)
        return terms

    def _features(self, guide: Guide | None, images: Tensor) -> Tensor:
        if self.vgg is not None:
            found: Tensor = self._judge(images)(images, [str(self.layer)])[0]
            return found
        assert guide is not None
        return guide.features(images, guide.layer(self.layer or "features", images))

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
        perceptual: layers for L_p, each with its weight: of `vgg` where that is given, else of the target, where None
            leaves L_p out. None with `vgg`: of a VGG19 relu1_1, 2_1, 3_1, 4_1 and 5_1 with 1/32, 1/16, 1/8, 1/4 and 1
            (code); of a VGG16 relu1_2, 2_2, 3_3, 4_3 and 5_3 with 1 (paper).
        vgg: weights of an ImageNet VGG19 or VGG16 in torchvision's layout. It sees images in the network's range
            [-1,1], as in the code.
        layer: features of the target. None = those of the code: logits, of a detector the maps its class features are
            cropped from (`class_features`: the backbone's last map of SSD, the RoI features of Mask R-CNN). `maps` =
            those before the last linear map (the paper's for classification and segmentation).
        conditioned: the discriminator also sees one plane per class. The code does so for classification and
            segmentation; for detection it does not (set false), and planes hold the boxes (this project's form).
        task_weight: None = the code's: 2, for detection 1.
        class_scale: None = the code's: 1, for detection 10.
        intra: weight of the distances within classes; None = the code's: 1, for detection 0 (there it has none).
        margin: distance between classes that is enough.

    Ablations: LI = image; LF (w/o c) = feature; LI+F (w/o c) = both; LT, LT+F = the same with traditional pairs; Full
    = all three with new pairs.
    """

    MATCHING: ClassVar[float] = 10.0
    PERCEPTUAL: ClassVar[dict[int, dict[str, float]]] = {
        16: {"relu1_2": 1.0, "relu2_2": 1.0, "relu3_3": 1.0, "relu4_3": 1.0, "relu5_3": 1.0},
        19: {"relu1_1": 1 / 32, "relu2_1": 1 / 16, "relu3_1": 1 / 8, "relu4_1": 1 / 4, "relu5_1": 1.0},
    }

    def __init__(
        self,
        pairs: Literal["new", "traditional"] = "new",
        image: bool = True,
        feature: bool = True,
        classes: bool = True,
        perceptual: dict[str, float] | None = None,
        vgg: Path | str | None = None,
        layer: str | None = None,
        conditioned: bool = True,
        task_weight: float | None = None,
        class_scale: float | None = None,
        intra: float | None = None,
        margin: float = 5.0,
    ) -> None:
        _one_of("pairs", pairs, ("new", "traditional"))
        self.new, self.image, self.feature, self.classes = pairs == "new", image, feature, classes
        self.perceptual, self.layer, self.conditioned = dict(perceptual or {}), layer, conditioned
        self.vgg = None if vgg is None or not image else Path(vgg).expanduser()
        self.task_weight, self.class_scale, self.intra, self.margin = task_weight, class_scale, intra, margin
        self.adversarial = image
        self.labelled = feature or classes or (image and conditioned)
        self.guided = (
            feature or classes or (image and (conditioned or (bool(self.perceptual) and vgg is None)))
        )

    def check(self, guide: Guide | None, images: Tensor) -> None:
        if guide is not None and (self.feature or self.classes) and self.layer is not None:
            self.layer = guide.layer(self.layer, images)
            self.chosen = {"layer": self.layer}
        if self.image:
            self._perceived(guide, images, images)

    def generator(self, step: Step) -> Terms:
        clean, adversarial = step.purify(step.clean), step.purify(step.adversarial)
        terms: Terms = {}
        if self.image:
            terms.update(self._image(step, clean, adversarial))
        if not (self.feature or self.classes):
            return terms
        guide, detects = step.target, step.target.task == "detection"
        with torch.no_grad():
            wanted, wanted_vectors, labels = guide.aligned(step.clean, step.targets, self.layer)
        restored, vectors, _ = guide.aligned(adversarial, step.targets, self.layer)
        if self.feature:
            own = guide.aligned(clean, step.targets, self.layer)[0]
            terms["features"] = 4.0 * (losses.l1(own, wanted) + losses.l1(restored, wanted))
            if self.layer is None and not detects:
                task = [guide.task_loss_from(z, step.targets) for z in (own, restored)]
            else:
                task = [guide.task_loss(x, step.targets, step.seed) for x in (clean, adversarial)]
            terms["task"] = _or(self.task_weight, 1.0 if detects else 2.0) * (task[0] + task[1])
        if self.classes:
            scale = _or(self.class_scale, 10.0 if detects else 1.0)
            intra = scale * _or(self.intra, 0.0 if detects else 1.0)
            terms["align"] = scale * 0.1 * losses.class_align(wanted_vectors, vectors, labels)
            if intra > 0:
                terms["intra"] = intra * losses.class_intra(vectors, labels)
            terms["inter"] = scale * 0.005 * losses.class_inter(vectors, labels, self.margin)
        return terms

    def _image(self, step: Step, clean: Tensor, adversarial: Tensor) -> Terms:
        inner = step.inner
        partner = clean if self.new else step.clean
        terms = {
            "reconstruction": 50.0
            * (losses.l1(inner(clean), inner(step.clean)) + losses.l1(inner(adversarial), inner(partner)))
        }
        with torch.no_grad():
            original = self._perceived(step.guide, step.clean, inner(step.clean))
        first = self._perceived(step.guide, clean, inner(clean))
        second = self._perceived(step.guide, adversarial, inner(adversarial))
        values = [
            weight * (losses.l1(a, x) + losses.l1(b, a.detach() if self.new else x))
            for (weight, x), (_, a), (_, b) in zip(original, first, second, strict=True)
        ]
        if values:
            terms["perceptual"] = 10.0 * torch.stack(values).sum()
        fakes = (adversarial,) if self.new else (clean, adversarial)
        real = clean.detach() if self.new else step.clean
        scores = self._scores(step, real)
        judged = [self._scores(step, fake) for fake in fakes]
        terms["gan"] = torch.stack([losses.lsgan(s, 1.0) for s in judged]).sum()
        terms["matching"] = (
            self.MATCHING * torch.stack([losses.feature_matching(scores, s) for s in judged]).sum()
        )
        return terms

    def _perceived(self, guide: Guide | None, images: Tensor, inner: Tensor) -> list[tuple[float, Tensor]]:
        """Weight and activations of every perceptual layer, for images in [0,1] and the same in the network's range."""
        if self.vgg is not None:
            judge = self._judge(images)
            layers = self.perceptual or self.PERCEPTUAL[judge.depth]
            return list(zip(layers.values(), judge(inner, layers, normalise=False), strict=True))
        if not self.perceptual:
            return []
        if guide is None:
            raise PluginError(
                "perceptual layers are layers of the target or of a VGG ('vgg'); there is neither"
            )
        return [(weight, guide.features(images, layer)) for layer, weight in self.perceptual.items()]

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
        scores: losses.Scores = step.critic(x)
        return scores


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


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _one_of(name: str, value: Any, choices: Any) -> Any:
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(str, choices))}")
    return value
