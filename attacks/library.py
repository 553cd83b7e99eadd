"""Any attack of foolbox, torchattacks or ART, by the name of its class."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from attacks.iterative import Radius
from attacks.projections import check_radius, make_projection
from attacks.scores import as_labels, fooled
from attacks.wrapped import OracleModel, contained
from bench.errors import CheckError, PluginError, unknown
from bench.protocols import Attack, ImageRNG, Oracle
from bench.registry import ATTACKS
from bench.units import parse_fraction

NormName = Literal["linf", "l2"]

_COUNTS = re.compile(r"(^|_)(steps|iters?|iterations?|n_queries|max_queries)$")
"""How libraries call numbers of steps."""
_KURAKIN = ("BIM", "steps")
"""torchattacks reads 0 steps here as the rule of Kurakin et al. 2017, min(255 eps + 4, 1.25 * 255 eps)."""


class _Library(ABC):
    """One attack class of a library, checked but not yet bound to a victim."""

    package: ClassVar[str]
    module: ClassVar[str]
    install: ClassVar[str]
    #: Attacks that ask for scores or decisions alone; they run against pipelines without a gradient.
    gradient_free: ClassVar[frozenset[str]]

    def __init__(self, name: str, params: Mapping[str, Any], targeted: bool) -> None:
        if importlib.util.find_spec(self.package) is None:
            raise PluginError(f"library '{self.package}' is not installed: {self.install}")
        classes = self._classes(importlib.import_module(self.module))
        if name not in classes:
            raise PluginError(unknown(f"attack of {self.package}", name, classes))
        self.cls, self.targeted = classes[name], targeted
        self.accepted = _parameters(self.cls)
        for key in params:
            if key not in self.accepted:
                raise PluginError(unknown(f"parameter of {self.package}'s {name}", key, self.accepted))
        self.params = {key: _plain(value) for key, value in params.items()}
        for key, value in self.params.items():
            # The libraries run with none, and do nothing.
            if (
                _COUNTS.search(key)
                and isinstance(value, (int, float))
                and value < 1
                and (name, key) != _KURAKIN
            ):
                raise PluginError(
                    f"{self.package}'s {name}, params.{key}: expected at least 1, got {params[key]}"
                )

    @abstractmethod
    def _classes(self, module: Any) -> dict[str, type]:
        """Its attack classes by name."""

    @abstractmethod
    def norm(self, eps: float | None) -> NormName | None:
        """The norm of the attack's budget; None where it has none that the harness knows."""

    @abstractmethod
    def attack(
        self, model: nn.Module, image: Tensor, label: Tensor, num_classes: int, eps: float | None
    ) -> Tensor:
        """The adversarial image (1, 3, H, W) for `image` and its label (1,)."""


class _Foolbox(_Library):
    package, module = "foolbox", "foolbox.attacks"
    install = "pip install foolbox"
    gradient_free = frozenset(
        "BinarizationRefinementAttack BinarySearchContrastReductionAttack BoundaryAttack GaussianBlurAttack GenAttack "
        "HopSkipJumpAttack InversionAttack L2AdditiveGaussianNoiseAttack L2AdditiveUniformNoiseAttack "
        "L2ClippingAwareAdditiveGaussianNoiseAttack L2ClippingAwareAdditiveUniformNoiseAttack "
        "L2ClippingAwareRepeatedAdditiveGaussianNoiseAttack L2ClippingAwareRepeatedAdditiveUniformNoiseAttack "
        "L2ContrastReductionAttack L2RepeatedAdditiveGaussianNoiseAttack L2RepeatedAdditiveUniformNoiseAttack "
        "LinearSearchBlendedUniformNoiseAttack LinearSearchContrastReductionAttack LinfAdditiveUniformNoiseAttack "
        "LinfRepeatedAdditiveUniformNoiseAttack PointwiseAttack SaltAndPepperNoiseAttack SpatialAttack".split()
    )

    def __init__(self, name: str, params: Mapping[str, Any], targeted: bool) -> None:
        super().__init__(name, params, targeted)
        from foolbox import distances

        if "distance" in self.params:
            named = {"linf": distances.linf, "l2": distances.l2, "l1": distances.l1, "l0": distances.l0}
            wanted = str(self.params["distance"])
            if wanted not in named:
                raise PluginError(unknown(f"distance of foolbox's {name}", wanted, named))
            self.params["distance"] = named[wanted]
        if targeted and "DeepFool" in name:
            raise PluginError(f"foolbox's {name} ignores targets: it cannot be targeted")
        self.instance = self.cls(**self.params)

    def _classes(self, module: Any) -> dict[str, type]:
        base = module.base.Attack
        found = inspect.getmembers(module, lambda c: inspect.isclass(c) and issubclass(c, base))
        # DatasetAttack has to be fed with images of other classes first.
        return {name: cls for name, cls in found if cls is not base and name != "DatasetAttack"}

    def norm(self, eps: float | None) -> NormName | None:
        from foolbox.attacks.base import FixedEpsilonAttack
        from foolbox.distances import LpDistance

        if eps is None and isinstance(self.instance, FixedEpsilonAttack):
            raise PluginError(f"foolbox's {self.cls.__name__} needs an eps")
        try:
            distance = getattr(self.instance, "distance", None)
        except ValueError:
            raise PluginError(
                f"foolbox's {self.cls.__name__} needs params: {{distance: l2}} (or linf, l1, l0)"
            ) from None
        norms: dict[float, NormName] = {float("inf"): "linf", 2.0: "l2"}
        return norms.get(float(distance.p)) if isinstance(distance, LpDistance) else None

    def attack(
        self, model: nn.Module, image: Tensor, label: Tensor, num_classes: int, eps: float | None
    ) -> Tensor:
        from foolbox import criteria
        from foolbox.attacks.spatial_attack import SpatialAttack
        from foolbox.models.pytorch import PyTorchModel

        wrapped = PyTorchModel(model, bounds=(0, 1), device=image.device)
        goal = (
            criteria.TargetedMisclassification(label) if self.targeted else criteria.Misclassification(label)
        )
        try:
            extra = {} if isinstance(self.instance, SpatialAttack) else {"epsilons": eps}
            _, clipped, _ = self.instance(wrapped, image, goal, **extra)
        except ValueError as error:
            if "init_attack failed" not in str(error):
                raise
            # Its search found nothing to start from: the image is not fooled.
            return image
        out: Tensor = clipped
        return out


class _Torchattacks(_Library):
    package = module = "torchattacks"
    install = (
        "pip install --no-deps torchattacks==3.5.1, best into an environment of its own: the wheel overwrites the "
        "package robustbench"
    )
    gradient_free = frozenset({"GN", "OnePixel", "Pixle", "SPSA", "Square"})

    def _classes(self, module: Any) -> dict[str, type]:
        base = importlib.import_module("torchattacks.attack").Attack
        found = inspect.getmembers(module, lambda c: inspect.isclass(c) and issubclass(c, base))
        # These take other attacks, not a victim.
        return {name: cls for name, cls in found if cls is not base and name not in ("MultiAttack", "LGV")}

    def norm(self, eps: float | None) -> NormName | None:
        name = self.cls.__name__
        if eps is not None and "eps" not in self.accepted:
            raise PluginError(f"torchattacks' {name} has no eps")
        if "norm" in self.accepted:
            chosen = str(self.params.get("norm", self.accepted["norm"])).lower()
            return "linf" if chosen == "linf" else "l2" if chosen == "l2" else None
        return "l2" if name.endswith("L2") else "linf" if "eps" in self.accepted else None

    def attack(
        self, model: nn.Module, image: Tensor, label: Tensor, num_classes: int, eps: float | None
    ) -> Tensor:
        params = dict(self.params)
        if eps is not None:
            params["eps"] = eps
        if "n_classes" in self.accepted:
            params.setdefault("n_classes", num_classes)
        attack = self.cls(model, **params)
        if self.targeted:
            attack.set_mode_targeted_by_label(quiet=True)
        out: Tensor = attack(image, label)
        return out


class _ART(_Library):
    package, module = "art", "art.attacks.evasion"
    install = "pip install adversarial-robustness-toolbox"
    gradient_free = frozenset(
        "BoundaryAttack GeoDA HopSkipJump PixelAttack SignOPTAttack SimBA SpatialTransformation SquareAttack "
        "ThresholdAttack ZooAttack".split()
    )

    def _classes(self, module: Any) -> dict[str, type]:
        base = importlib.import_module("art.attacks.attack").EvasionAttack
        found = inspect.getmembers(module, lambda c: inspect.isclass(c) and issubclass(c, base))
        return {name: cls for name, cls in found if cls is not base}

    def norm(self, eps: float | None) -> NormName | None:
        if eps is not None and "eps" not in self.accepted:
            raise PluginError(f"ART's {self.cls.__name__} has no eps")
        if self.targeted and "targeted" not in self.accepted:
            raise PluginError(f"ART's {self.cls.__name__} cannot be targeted")
        chosen = str(self.params.get("norm", self.accepted.get("norm", "inf" if eps is not None else None)))
        return "linf" if chosen == "inf" else "l2" if chosen == "2" else None

    def attack(
        self, model: nn.Module, image: Tensor, label: Tensor, num_classes: int, eps: float | None
    ) -> Tensor:
        classification = importlib.import_module("art.estimators.classification")
        victim = classification.PyTorchClassifier(
            model=model, loss=nn.CrossEntropyLoss(), input_shape=tuple(image.shape[1:]), nb_classes=num_classes,
            clip_values=(0.0, 1.0), device_type="gpu" if image.device.type == "cuda" else "cpu",
        )  # fmt: skip
        params = dict(self.params)
        if params.get("norm") == "inf":
            params["norm"] = np.inf
        for key, value in (("eps", eps), ("verbose", False), ("batch_size", 1)):
            if key in self.accepted and value is not None:
                params.setdefault(key, value)
        if self.targeted:
            params["targeted"] = True
        made = self.cls(victim, **params).generate(x=image.cpu().numpy(), y=label.cpu().numpy())
        return torch.as_tensor(made).to(image)


LIBRARIES: dict[str, type[_Library]] = {"foolbox": _Foolbox, "torchattacks": _Torchattacks, "art": _ART}


@ATTACKS.register_module(name="library")
class LibraryAttack(Attack):
    """An attack class of foolbox, torchattacks or ART (adversarial-robustness-toolbox) on our victim.

    `{name: library, library: foolbox, attack: L2DeepFoolAttack, params: {steps: 50}}`

    The library sees the oracle as a network that returns logits for images in [0,1], so every level works, with these
    limits: the threat model's `eot` does not carry over (each call of the network is one draw of a stochastic
    defense; use attacks that average themselves), gradients are not watched for zeros, backward passes are not
    counted, and input diversity or other parts of our loop cannot be combined with it. Results are projected onto the
    budget, where there is one. Attacks run on one image at a time under its own seed, since libraries draw from global
    generators: slower than a batch, but no image's result depends on another.

    Where libraries go wrong: torchattacks' CW freezes pixels that are 0 or 1 and has no binary search, its DIFGSM and
    TIFGSM need `decay` and `diversity_prob` set, its RFGSM takes 10 steps; ART's AutoAttack is not AutoAttack.

    In a grid `{library: foolbox, attack: L2DeepFoolAttack}` is enough: `name: library` may be left out.

    Args:
        library: `foolbox`, `torchattacks` or `art`.
        attack: name of the attack's class there.
        eps: radius in [0,1] pixel units, in the attack's own norm; None for attacks that minimise the perturbation.
            L1 and L0 radii reach the library but are not verified by the harness.
        params: further arguments of the class, fractions such as `2/255` included. The norm of foolbox attacks that
            leave it open is `distance: l2`.
        target: rule for a wrong target to reach; None = untargeted.
        failed: an image that was not fooled is `kept` as the library left it or comes back `clean`; None = `kept`
            with an eps, `clean` without.
    """

    tasks = frozenset({"classification"})
    stochastic = True
    monotone = False

    def __init__(
        self,
        library: Literal["foolbox", "torchattacks", "art"],
        attack: str,
        eps: Radius | None = None,
        params: dict[str, Any] | None = None,
        target: str | None = None,
        failed: Literal["kept", "clean"] | None = None,
    ) -> None:
        self._eps = None if eps is None else float(eps)
        self._attack = LIBRARIES[library](attack, params or {}, target is not None)
        self._label = f"{library}'s {attack}"
        self.norm = self._attack.norm(self._eps)
        check_radius(self.norm, eps)
        self.eps: Fraction | None = eps if self.norm is not None else None
        self.target = target
        self.needs = (
            frozenset({"logits"})
            if attack in self._attack.gradient_free
            else frozenset({"gradient", "logits"})
        )
        self.failed = failed or ("clean" if eps is None else "kept")
        self.returns_clean = self.failed == "clean"

    def identity(self) -> dict[str, Any]:
        names = {"art": "adversarial-robustness-toolbox"}
        distribution = names.get(self._attack.package, self._attack.package)
        return {**super().identity(), "library": f"{distribution} {importlib.metadata.version(distribution)}"}

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Adversarial images (B, 3, H, W) in [0,1].

        Raises:
            CheckError: the library refused the image, the labels or the parameters; its own words are quoted.
        """
        clean = images.detach()
        labels = as_labels(targets, clean.device)
        outs = [
            self._one(oracle.select([i]), clean[i : i + 1], labels[i : i + 1], rng.seeds[i])
            for i in range(len(clean))
        ]
        return torch.cat(outs) if outs else clean.clone()

    def _one(self, oracle: Oracle, image: Tensor, label: Tensor, seed: int) -> Tensor:
        model = OracleModel(oracle, image)
        try:
            with contained(seed, image.device):
                made = self._attack.attack(model, image.clone(), label, oracle.num_classes, self._eps)
        except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
            raise CheckError(f"{self._label}: {type(error).__name__}: {error}") from error
        if not torch.isfinite(made).all():
            return image.clone()
        budget = self.norm if self.eps is not None else None
        out = make_projection(budget or "none", image, self._eps)(made.detach().to(image.dtype))
        if self.failed == "clean":
            with torch.no_grad():
                hit = fooled(model(out), label, self.target is not None)
            return out if bool(hit[0]) else image.clone()
        return out


def _parameters(cls: type) -> dict[str, Any]:
    """Names and defaults of what a class is constructed from, without the victim."""
    found = {}
    for name, parameter in list(inspect.signature(cls).parameters.items()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name not in ("model", "estimator", "classifier"):
            found[name] = parameter.default
    return found


def _plain(value: Any) -> Any:
    """`2/255` as a number; everything else as it is."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(parse_fraction(value))
        except ValueError:
            return value
    return value
