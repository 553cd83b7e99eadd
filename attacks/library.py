"""Any attack of foolbox, torchattacks or ART, by the name of its class."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import operator
import re
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from attacks.iterative import Radius
from attacks.projections import check_radius, make_projection
from attacks.scores import as_labels, fooled
from attacks.wrapped import OracleModel, contained
from bench.errors import CheckError, GridError, PluginError, reason, unknown
from bench.protocols import Attack, ImageRNG, Oracle
from bench.registry import ATTACKS
from bench.units import parse_fraction

NormName = Literal["linf", "l2"]
T = TypeVar("T")

_COUNTS = re.compile(r"(^|_)(steps|iters?|iterations?|n_queries|max_queries)$")
"""How libraries call numbers of steps."""
_KURAKIN = ("BIM", "steps")
"""torchattacks reads 0 steps here as the rule of Kurakin et al. 2017, min(255 eps + 4, 1.25 * 255 eps)."""
_CLASSES = ("candidates", "n_classes", "nb_grads")
"""How foolbox, torchattacks and ART call numbers of classes; foolbox and ART cut what is too large, silently."""
_PACKAGES = ("art", "foolbox", "torchattacks")
_BESIDE = (
    "; or bash tools/libraries.sh, then PYTHONPATH=.libraries before the command (robustbench there then hides the "
    "installed one)"
)


class _Library(ABC):
    """One attack class of a library, checked but not yet bound to a victim."""

    package: ClassVar[str]
    module: ClassVar[str]
    install: ClassVar[str]
    #: Attacks that ask for scores or decisions alone; they run against pipelines without a gradient.
    gradient_free: ClassVar[frozenset[str]]
    #: Attacks that cannot run here, and why.
    refused: ClassVar[Mapping[str, str]] = {}

    def __init__(self, name: str, params: Mapping[str, Any], targeted: bool) -> None:
        if importlib.util.find_spec(self.package) is None:
            raise PluginError(f"library '{self.package}' is not installed: {self.install}")
        module = _with_packages(f"library '{self.package}'", lambda: importlib.import_module(self.module))
        classes = self._classes(module)
        if name in self.refused:
            raise PluginError(f"{self.package}'s {name} {self.refused[name]}")
        if name not in classes:
            raise PluginError(unknown(f"attack of {self.package}", name, classes))
        self.cls, self.targeted = classes[name], targeted
        self.accepted = _parameters(self.cls)
        for key in params:
            if key not in self.accepted:
                raise PluginError(unknown(f"parameter of {self.package}'s {name}", key, self.accepted))
        self.params = {key: _plain(value) for key, value in params.items()}
        annotations = _annotations(self.cls)
        for key, value in self.params.items():
            # A class may have None as its own default where the annotation forgets it; distances go by name.
            if (
                key in annotations
                and key != "distance"
                and not (value is None and self.accepted[key] is None)
            ):
                try:
                    self.params[key] = _checked(annotations[key], value, params[key])
                except ValueError as error:
                    raise PluginError(f"{self.package}'s {name}, params.{key}: {error}") from None
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
    refused: ClassVar[Mapping[str, str]] = {
        "BinarizationRefinementAttack": "refines the images of another attack (starting_points): it gets none here",
        "DatasetAttack": "has to be fed with images of other classes first: it gets none here",
    }
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
        if name == "GenAttack" and not targeted:
            raise PluginError("foolbox's GenAttack needs a target, such as target: next")
        from foolbox import distances

        if "distance" in self.params:
            named = {"linf": distances.linf, "l2": distances.l2, "l1": distances.l1, "l0": distances.l0}
            wanted = str(self.params["distance"])
            if wanted not in named:
                raise PluginError(unknown(f"distance of foolbox's {name}", wanted, named))
            self.params["distance"] = named[wanted]
        if targeted and "DeepFool" in name:
            raise PluginError(f"foolbox's {name} ignores targets: it cannot be targeted")
        self.instance = _with_packages(f"foolbox's {name}", lambda: self.cls(**self.params))

    def _classes(self, module: Any) -> dict[str, type]:
        base = module.base.Attack
        found = inspect.getmembers(module, lambda c: inspect.isclass(c) and issubclass(c, base))
        return {name: cls for name, cls in found if cls is not base and name not in self.refused}

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
            made, clipped, _ = self.instance(wrapped, image, goal, **extra)
        except ValueError as error:
            if "init_attack failed" not in str(error):
                raise
            # Its search found nothing to start from: the image is not fooled.
            return image
        # These two collect successes in an array that starts as `zeros_like(image)` (`best_advs`): all zeros, before
        # they are clipped to eps, mean that there was none.
        if self.cls.__name__ in ("EADAttack", "L2CarliniWagnerAttack") and not made.any():
            return image
        out: Tensor = clipped
        return out


class _Torchattacks(_Library):
    package = module = "torchattacks"
    install = (
        "pip install --no-deps torchattacks==3.5.1, best into an environment of its own: the wheel overwrites the "
        "package robustbench" + _BESIDE
    )
    refused: ClassVar[Mapping[str, str]] = {
        "LGV": "trains models first, on data it gets none of here",
        "MultiAttack": "takes other attacks, not a victim",
    }
    gradient_free = frozenset({"GN", "OnePixel", "Pixle", "SPSA", "Square"})

    def _classes(self, module: Any) -> dict[str, type]:
        base = importlib.import_module("torchattacks.attack").Attack
        found = inspect.getmembers(module, lambda c: inspect.isclass(c) and issubclass(c, base))
        return {name: cls for name, cls in found if cls is not base and name not in self.refused}

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
    install = "pip install adversarial-robustness-toolbox" + _BESIDE
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
    counted (rows say 0), and input diversity or other parts of our loop cannot be combined with it. Results are
    projected onto the budget, where there is one. Attacks run on one image at a time under its own seed, since
    libraries draw from global generators: slower than a batch, but no image's result depends on another.

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
            with an eps, `clean` without. It is clean in any case where the library has none to give: foolbox's C&W
            and EAD return zeros then.
    """

    tasks = frozenset({"classification"})
    stochastic = True
    monotone = False
    counts_backwards = False

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
        # Attacks that look for the nearest adversarial image find it where they stand.
        self.spares = True

    def identity(self) -> dict[str, Any]:
        names = {"art": "adversarial-robustness-toolbox"}
        distribution = names.get(self._attack.package, self._attack.package)
        return {**super().identity(), "library": f"{distribution} {importlib.metadata.version(distribution)}"}

    def check_classes(self, num_classes: int) -> None:
        for key in _CLASSES:
            given = self._attack.params.get(key)
            if isinstance(given, int) and given > max(2, num_classes):
                raise GridError(
                    f"{self._label}, params.{key}: {given} is more than the {num_classes} classes of the model"
                )

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Adversarial images (B, 3, H, W) in [0,1].

        Raises:
            CheckError: the library refused the image, the labels or the parameters; its own words are quoted.
            GridError: more classes asked for than the victim has.
            PluginError: the library lacks a package.
        """
        self.check_classes(oracle.num_classes)
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
                made = _with_packages(
                    self._label,
                    lambda: self._attack.attack(model, image.clone(), label, oracle.num_classes, self._eps),
                )
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


def _with_packages(what: str, call: Callable[[], T]) -> T:
    """`call()`: what only some attacks of a library need is imported when these are made or run.

    Raises:
        PluginError: a package is missing.
    """
    try:
        return call()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise PluginError(
            f"{what} needs the package '{package}', which is not installed: pip install {package}"
            if package
            else f"{what} cannot be imported: {error}"
        ) from error
    except ImportError as error:
        raise PluginError(f"{what} cannot be imported: {error}") from error


def _annotations(cls: type) -> dict[str, Any]:
    """Annotations of a constructor, without those whose names its module imports for type checkers alone."""
    found: dict[str, Any] = {}
    scope = getattr(inspect.getattr_static(cls, "__init__"), "__globals__", {})
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.annotation is not parameter.empty:
            one = types.SimpleNamespace(__annotations__={name: parameter.annotation})
            with contextlib.suppress(NameError, TypeError):
                found |= typing.get_type_hints(one, scope)
    return found


def _checked(annotation: Any, value: Any, given: Any) -> Any:
    """`value` as the annotation wants it; as it is where the annotation asks for what no grid can write.

    Args:
        annotation: the parameter's.
        value: of the parameter.
        given: `value` as the grid has it.

    Raises:
        ValueError: it does not fit; what was expected.
    """
    # Where an array will do, a number will do as well.
    parts = [part for part in _parts(annotation) if part is not np.ndarray]
    choices = [choice for part in parts if _is_literal(part) for choice in typing.get_args(part)]
    kinds = [part for part in parts if not _is_literal(part)]
    objects = [kind for kind in kinds if str(getattr(kind, "__module__", "")).partition(".")[0] in _PACKAGES]
    if objects and set(kinds) - {type(None)} == set(objects):
        raise ValueError(f"expected a {objects[0].__name__}, which no grid can write")
    if not parts or not {bool, float, int, str, type(None)}.issuperset(kinds):
        return value
    # The message names the first member alone of what is left.
    kinds = [part for part in kinds if not (part is int and float in kinds)]
    kinds += [Literal[tuple(choices)]] if choices else []
    try:
        fitting = TypeAdapter(functools.reduce(operator.or_, kinds)).validate_python(value)
    except ValidationError as error:
        raise ValueError(reason({**error.errors()[0], "input": given})) from None
    return value if isinstance(value, int) else fitting


def _parts(annotation: Any) -> list[Any]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [part for choice in typing.get_args(annotation) for part in _parts(choice)]
    return [annotation]


def _is_literal(part: Any) -> bool:
    return typing.get_origin(part) is Literal


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
