"""Plug-ins register from a decorator, a file and an entry point; mistakes name the nearest valid name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.errors import PluginError
from bench.protocols import Attack, Defense, ImageRNG, Pixels
from bench.registry import ATTACKS, DEFENSES, PluginRegistry, jsonable, load_plugin

INVERT = '''
from bench.protocols import Defense
from bench.registry import DEFENSES

@DEFENSES.register_module(name="test_invert")
class Invert(Defense):
    """1 - x."""
    def forward(self, images): return 1 - images
'''


@pytest.fixture
def registry() -> PluginRegistry[Any]:
    return PluginRegistry("defense", (), "bench.protocols:Defense")


def test_a_users_file_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "my_defense.py"
    path.write_text(INVERT)
    load_plugin(path)
    load_plugin(path)
    assert "test_invert" in DEFENSES.names()
    images = torch.rand(2, 3, 5, 7)
    defense = DEFENSES.create("test_invert")
    assert torch.equal(defense.purify(images).images, 1 - images)
    assert defense.identity() == {"name": "test_invert", "params": {}, "version": 1}


def test_parameters_are_validated_and_recorded(registry: PluginRegistry[Any]) -> None:
    @registry.register_module(name="blur")
    class Blur(Defense):
        def __init__(self, eps: Pixels, size: int = 3) -> None:
            super().__init__()
            self.eps, self.size = eps, size

    assert registry.create("blur", {"eps": "8/255"}).params == {"eps": "8/255", "size": 3}
    assert [(p.name, p.required, p.default) for p in registry.parameters("blur")] == [
        ("eps", True, None),
        ("size", False, 3),
    ]
    for params, message in [
        ({"eps": 8}, "eps: 8 is outside (0, 1]: images are in [0,1], did you mean 8/255?"),
        ({"eps": "8/255", "sise": 3}, "unknown parameter 'sise': did you mean 'size'?"),
        ({"eps": "8/255", "size": "three"}, "size: expected an integer"),
        ({}, "eps: is required"),
        ({"eps": "x/255"}, "expected a fraction such as 8/255"),
        ({"eps": 0}, "expected a positive fraction"),
    ]:
        with pytest.raises(PluginError) as error:
            registry.create("blur", params, "grid.yaml, defenses.b")
        assert message in str(error.value) and str(error.value).startswith("grid.yaml, defenses.b")
        assert "\n" not in str(error.value)


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(PluginError, match="unknown defense 'jpg': did you mean 'jpeg'"):
        DEFENSES.create("jpg")


def test_two_classes_of_one_name_are_refused(registry: PluginRegistry[Any]) -> None:
    class One(Defense):
        pass

    class Two(Defense):
        pass

    registry.register_module(name="same", module=One)
    registry.register_module(name="same", module=One)
    with pytest.raises(PluginError, match=r"defined twice: .*One and .*Two"):
        registry.register_module(name="same", module=Two)


def test_a_class_of_another_kind_is_refused() -> None:
    class NotAnAttack(Defense):
        pass

    with pytest.raises(PluginError, match="must be a class derived from Attack"):
        ATTACKS.register_module(name="not-an-attack", module=NotAnAttack)


def test_parameters_without_annotation_are_refused(registry: PluginRegistry[Any]) -> None:
    @registry.register_module(name="untyped")
    class Untyped(Defense):
        def __init__(self, size=3) -> None:  # type: ignore[no-untyped-def]
            super().__init__()

    with pytest.raises(PluginError, match="parameter 'size' needs a type annotation"):
        registry.create("untyped")


def test_a_constructor_may_pass_the_rest_on(registry: PluginRegistry[Any]) -> None:
    class Shared(Defense):
        def __init__(self, size: int = 3, sigma: float = 1.0) -> None:
            super().__init__()
            self.size, self.sigma = size, sigma

    @registry.register_module(name="own")
    class Own(Shared):
        def __init__(self, sigma: float = 2.0, steps: int = 1, **rest: Any) -> None:
            super().__init__(sigma=sigma, **rest)
            self.steps = steps

    defense = registry.create("own", {"size": 5})
    assert (defense.size, defense.sigma, defense.steps) == (5, 2.0, 1)
    with pytest.raises(PluginError, match=r"'siz'.*'size'"):
        registry.create("own", {"siz": 5})


def test_a_rest_that_nobody_takes_is_refused(registry: PluginRegistry[Any]) -> None:
    @registry.register_module(name="loose")
    class Loose(Defense):
        def __init__(self, **rest: Any) -> None:
            super().__init__()

    with pytest.raises(PluginError, match="parameters must be named"):
        registry.create("loose")


@pytest.mark.parametrize(
    ("text", "message"),
    [("import nowhere_to_be_found", "failed to import: ModuleNotFoundError"), ("def (", "SyntaxError")],
)
def test_a_broken_plugin_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(PluginError, match=message) as error:
        load_plugin(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_plugin_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="does not exist"):
        load_plugin(tmp_path / "absent.py")


def test_builtin_plugins_can_all_be_listed() -> None:
    for registry in (DEFENSES, ATTACKS):
        assert registry.names()
        for name in registry.names():
            for parameter in registry.parameters(name):
                assert jsonable(parameter.default) == parameter.default
    assert issubclass(ATTACKS.resolve("pgd"), Attack)


def test_purify_checks_what_a_defense_returns() -> None:
    from bench.errors import CheckError

    class Shrinks(Defense):
        def forward(self, images: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return images[..., 1:]

    class Breaks(Defense):
        def forward(self, images: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return images / 0

    class Doubles(Defense):
        def forward(self, images: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return images * 2

    class Writes(Defense):
        def forward(self, images: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return images.mul_(0.5)

    images = torch.rand(2, 3, 4, 4)
    with pytest.raises(CheckError, match="writes into the images it is given"), torch.no_grad():
        Writes().purify(images)
    with pytest.raises(CheckError, match="must return Warped"):
        Shrinks().purify(images)
    with pytest.raises(CheckError, match="NaN or infinite"):
        Breaks().purify(images)
    # Clamped in the forward pass, straight-through in the backward pass.
    x = torch.full((1, 3, 2, 2), 0.9, requires_grad=True)
    out = Doubles().purify(x).images
    assert float(out.max()) == 1.0
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 2.0))


def test_stochastic_defense_gets_its_streams() -> None:
    class Noisy(Defense):
        stochastic = True

        def forward(self, images: torch.Tensor, rng: ImageRNG) -> torch.Tensor:  # type: ignore[override]
            return images + rng.uniform(tuple(images.shape[1:]), 0, 0.1)

    images = torch.rand(3, 3, 4, 4) * 0.5
    rng = ImageRNG.for_images("k", "abc")
    whole = Noisy().purify(images, rng.fork("x")).images
    part = Noisy().purify(images[[2]], ImageRNG.for_images("k", "c").fork("x")).images
    assert torch.equal(whole[[2]], part)
