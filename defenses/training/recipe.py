"""What a checkpoint is: everything its training depends on, as data, and its key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from bench.errors import PluginError, unknown
from bench.keys import content_key
from bench.rng import derive_seed
from defenses.networks.apegan import APEDiscriminator
from defenses.networks.build import purifier
from defenses.networks.pix2pixhd import MultiscaleDiscriminator
from defenses.networks.vgg_discriminators import CAFDDiscriminator, NRPDiscriminator
from defenses.networks.wgan import WGANCritic, WGANGenerator

CRITICS: dict[str, type[nn.Module]] = {
    "apegan": APEDiscriminator,
    "cafd": CAFDDiscriminator,
    "nrp": NRPDiscriminator,
    "multiscale": MultiscaleDiscriminator,
    "wgan": WGANCritic,
}

VERSION = 1
"""Part of every key; raise it when the loop makes other weights of the same recipe."""


@dataclass(frozen=True)
class Recipe:
    """How a defense is trained.

    Attributes:
        defense: registered name of the defense the checkpoint is for.
        network, network_args: purifier (`defenses.networks.build.PURIFIERS`).
        space: value range the network works in.
        objective, objective_args: losses (`defenses.training.objectives.OBJECTIVES`).
        critic, critic_args: discriminator, or None; `size` and `inputs` are filled in from the data.
        attacks: adversaries, each `{"name": ..., "params": {...}, "weight": 1}`.
        static: each image is attacked once, before its first use.
        clean_share: part of the images of each batch that stay clean (0 in the papers).
        epochs, batch: length.
        lr, betas, weight_decay: Adam, for both networks.
        milestones, gamma: epochs after which the learning rate is multiplied by gamma.
        linear_decay: epochs at the end over which the learning rate falls to 0 in a line.
        reset_moments: Adam starts anew in every epoch, as CAFD's code makes it.
        flip: horizontal flips, half of the time (classification).
        clamp: losses see purified images as the target will, clamped to [0,1] (gradients pass straight through). Not in
            the papers. Without it nothing but pixel losses keeps a purifier in the range, and features that
            were right beyond it are lost when it is evaluated.
        tasks: tasks whose targets can guide it; None = all.
        seed: of initial weights, order, flips and attacks.
    """

    defense: str
    network: str
    objective: str
    network_args: Mapping[str, Any] = field(default_factory=dict)
    space: Literal["unit", "symmetric", "imagenet"] = "unit"
    objective_args: Mapping[str, Any] = field(default_factory=dict)
    critic: str | None = None
    critic_args: Mapping[str, Any] = field(default_factory=dict)
    attacks: tuple[Mapping[str, Any], ...] = ()
    static: bool = False
    clean_share: float = 0.0
    epochs: int = 20
    batch: int = 64
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    linear_decay: int = 0
    reset_moments: bool = False
    flip: bool = False
    clamp: bool = False
    tasks: tuple[str, ...] | None = None
    seed: int = 0

    def but(self, **changes: Any) -> Recipe:
        """A copy with some values replaced.

        Raises:
            PluginError: there is no such value.
        """
        for name in changes:
            if name not in self.__dataclass_fields__:
                raise PluginError(
                    f"recipe of {self.defense}: {unknown('value', name, self.__dataclass_fields__)}"
                )
        return replace(self, **changes)

    def payload(self, target: Any, data: Any, adversary: Any) -> dict[str, Any]:
        """Everything the weights are a function of.

        Args:
            target: identity of the guiding model; None when the recipe needs none.
            data: identity of the training images: dataset, fingerprint, number.
            adversary: its identity.
        """
        own = asdict(self)
        del own["attacks"], own["static"]  # `adversary` says the same with all defaults filled in
        del own["tasks"]
        if not self.clamp:
            del own["clamp"]  # as before it existed, so that those checkpoints stay valid
        return {
            "kind": "training", "version": VERSION, "recipe": own,
            "target": target, "data": data, "adversary": adversary,
        }  # fmt: skip

    def key(self, target: Any, data: Any, adversary: Any) -> str:
        """SHA-256 of the payload."""
        return content_key(self.payload(target, data, adversary))

    def learning_rate(self, epoch: int, part: float = 0.0) -> float:
        """Learning rate in `epoch` (from 0), `part` of it done."""
        rate = self.lr * self.gamma ** sum(epoch >= m for m in self.milestones)
        left = self.epochs - epoch - part
        return rate * min(1.0, left / self.linear_decay) if self.linear_decay else rate

    def build(self, size: tuple[int, int], num_classes: int) -> tuple[nn.Module, nn.Module | None]:
        """Network and discriminator with the initial weights of `seed`; the global generator is left alone.

        Args:
            size: (H, W) of the training images.
            num_classes: of the target, for discriminators that see the label.

        Raises:
            BenchError: unknown names or arguments.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("network", self.seed))
            network = purifier(self.network, self.network_args)
            if self.critic is None:
                return network, None
            if self.critic not in CRITICS:
                raise PluginError(
                    f"recipe of {self.defense}: {unknown('discriminator', self.critic, CRITICS)}"
                )
            args = dict(self.critic_args)
            if self.critic == "multiscale":
                conditioned = self.objective_args.get("conditioned", True)
                args.setdefault("inputs", 3 + (num_classes if conditioned else 0))
            else:
                # Of a generator it judges the images, which may have been asked for at another size.
                args.setdefault("size", network.size if isinstance(network, WGANGenerator) else size)
            torch.manual_seed(derive_seed("critic", self.seed))
            try:
                return network, CRITICS[self.critic](**args)
            except (TypeError, ValueError) as error:
                raise PluginError(
                    f"recipe of {self.defense}, discriminator '{self.critic}': {error}"
                ) from None


_PGD20 = {"name": "pgd", "params": {"eps": "8/255", "alpha": "2/255", "steps": 20}}
# As CAFD evaluates with it; its training settings are not given.
_CW = {
    "name": "cw_l2",
    "params": {"steps": 100, "binary_search_steps": 4, "initial_c": 1.0, "lr": 0.01, "kappa": 1.0},
}
_FGSM16 = {"name": "fgsm", "params": {"eps": "16/255"}}


def _bim(steps: int) -> dict[str, Any]:
    return {"name": "bim", "params": {"eps": "16/255", "steps": steps}}


_HGD = Recipe(
    "hgd", "dunet", "hgd", {}, "imagenet", {"guide": "logits"},
    # Seven sets on Inceptions and ResNets in the paper; one target, four kinds here.
    attacks=(_FGSM16, _bim(2), _bim(4), _bim(8), {"name": "none", "params": {}}),
    static=True, epochs=30, batch=60, lr=1e-3, milestones=(20,), gamma=0.1,
)  # fmt: skip
_CAFD = Recipe(
    "cafd", "dunet", "cafd", {"bias": True, "bn_momentum": 0.9}, "unit", {}, "cafd", {"width": 32},
    attacks=({"name": "cafa", "params": {"mode": "code"}},), static=True, epochs=70, batch=300, lr=1e-3,
    weight_decay=2e-4, milestones=(40, 50, 60), gamma=0.3, reset_moments=True, tasks=("classification", "segmentation"),
)  # fmt: skip
_NRP = Recipe(
    "nrp", "nrp", "nrp", {}, "unit", {}, "nrp", {"width": 64},
    attacks=({"name": "ssp", "params": {"mode": "paper"}},), epochs=20, batch=16, lr=1e-4,
)  # fmt: skip
_APE = Recipe(
    "apegan", "apegan", "apegan", {"variant": "official"}, "symmetric", {"weights": "official"}, "apegan", {},
    attacks=({"name": "fgsm", "params": {"eps": "0.01"}},), static=True, epochs=5, batch=64, lr=2e-4,
    betas=(0.5, 0.999),
)  # fmt: skip
_ALIGN = Recipe(
    "alignment", "global", "alignment", {"downsamplings": 2}, "symmetric", {}, "multiscale", {},
    attacks=({
        "name": "pgd",
        "params": {
            "eps": "0.031", "alpha": "0.0175", "steps": 4, "loss": "kl", "start": "normal",
        },
    },),
    epochs=100, batch=64, lr=2e-4, betas=(0.5, 0.999),
)  # fmt: skip
# CelebA: 200,000 updates of the generator, each after five batches of 50 of its 162,770 training images.
_DEFENSE_GAN = Recipe(
    "defense_gan", "wgan", "wgan_gp", {"size": (64, 64)}, "symmetric", {}, "wgan", {"width": 64},
    epochs=307, batch=50, lr=1e-4, betas=(0.5, 0.9),
)  # fmt: skip
# CIFAR-10: 40 epochs that go through the images 20 times each; the code's milestones lie beyond them.
_DISCO = Recipe(
    "disco", "disco", "disco", {}, "symmetric",
    attacks=({"name": "pgd", "params": {"eps": "8/255", "alpha": "2/255", "steps": 100}},), static=True,
    epochs=800, batch=128, lr=1e-4, flip=True,
)  # fmt: skip
# CIFAR-10 as DDPM: 800,000 updates of batches of 128, without its warm-up and its clipping of gradients.
_DIFFPURE = Recipe(
    "diffpure", "ddpm", "ddpm", {}, "symmetric", {"ema": 0.9999}, epochs=2051, batch=128, lr=2e-4, flip=True,
)  # fmt: skip

_LF = {"image": False, "classes": False}

RECIPES: dict[str, Recipe] = {
    "hgd": _HGD,
    "hgd_pixels": _HGD.but(objective_args={"guide": "pixels"}),
    "hgd_dae": _HGD.but(network="dae", objective_args={"guide": "pixels"}),
    "hgd_features": _HGD.but(objective_args={"guide": "features"}),
    "hgd_labels": _HGD.but(objective_args={"guide": "labels"}),
    # Primes: PGD-20 adversaries, in [0,1], as CAFD retrained them.
    "hgd_prime": _HGD.but(space="unit", attacks=(_PGD20,), epochs=70, batch=300),
    # CAFD's baselines: the same two on non-targeted L2 C&W adversaries.
    "hgd_cw": _HGD.but(space="unit", attacks=(_CW,), epochs=70, batch=300),
    "apegan": _APE,
    "apegan_paper": _APE.but(objective_args={"weights": "paper"}),
    "apegan_port": _APE.but(
        network_args={"variant": "port"}, critic_args={"variant": "port"}, space="unit", epochs=30, batch=128,
        objective_args={"weights": "paper"},
    ),
    "apegan_prime": _APE.but(attacks=(_PGD20,)),
    "apegan_cw": _APE.but(attacks=(_CW,)),
    "nrp": _NRP,
    "nrp_resg": _NRP.but(network="nrp_resg"),
    "nrp_unet": _NRP.but(network="unet"),
    "nrp_gnp": _NRP.but(attacks=({"name": "gaussian_noise", "params": {}},)),
    "nrp_fgsp": _NRP.but(attacks=(_FGSM16,)),
    "nrp_without_feat": _NRP.but(objective_args={"feat": 0.0}),
    "nrp_without_img": _NRP.but(objective_args={"img": 0.0}),
    "nrp_vanilla": _NRP.but(objective_args={"kind": "vanilla"}),
    "cafd": _CAFD,
    "cafd_prime": _CAFD.but(objective_args={"equation": 6}),
    "cafd_msed": _CAFD.but(objective_args={"caf": 0.0, "pixels": 1.0}),
    "cafd_without_adv": _CAFD.but(objective_args={"gan": 0.0}, critic=None),
    "cafd_without_caf": _CAFD.but(objective_args={"caf": 0.0}),
    "alignment": _ALIGN,
    "alignment_li": _ALIGN.but(objective_args={"feature": False, "classes": False}),
    "alignment_lf": _ALIGN.but(objective_args=_LF, critic=None),
    "alignment_lif": _ALIGN.but(objective_args={"classes": False}),
    "alignment_lt": _ALIGN.but(objective_args={"pairs": "traditional", "feature": False, "classes": False}),
    "alignment_ltf": _ALIGN.but(objective_args={"pairs": "traditional", "classes": False}),
    "defense_gan": _DEFENSE_GAN,
    "disco": _DISCO,
    "diffpure": _DIFFPURE,
}  # fmt: skip
"""Recipes at paper size by name. The mini ones replace widths, epochs and batches (`Recipe.but`)."""


def recipe(name: str) -> Recipe:
    """The recipe `name`.

    Raises:
        PluginError: no such recipe.
    """
    if name not in RECIPES:
        raise PluginError(unknown("recipe", name, RECIPES))
    return RECIPES[name]
