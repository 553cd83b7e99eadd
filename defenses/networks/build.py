"""Networks by name, and the network that fits a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bench.errors import WeightsError, unknown
from bench.weights import Weights, apply_state
from defenses.networks.apegan import APEGenerator
from defenses.networks.diffusion import DDPMUNet
from defenses.networks.disco import DISCONet
from defenses.networks.pix2pixhd import GlobalGenerator
from defenses.networks.rrdb import ResG, RRDBPurifier
from defenses.networks.unet import DAE, DUNET, UNet
from defenses.networks.wgan import WGANGenerator

PURIFIERS: dict[str, type[nn.Module]] = {
    "dunet": DUNET,
    "dae": DAE,
    "unet": UNet,
    "nrp": RRDBPurifier,
    "nrp_resg": ResG,
    "global": GlobalGenerator,
    "apegan": APEGenerator,
    "wgan": WGANGenerator,
    "disco": DISCONet,
    "ddpm": DDPMUNet,
}


def purifier(name: str, args: Mapping[str, Any]) -> nn.Module:
    """The network `name`, newly initialised from the global generator.

    Raises:
        WeightsError: no such network, or it does not take these arguments.
    """
    if name not in PURIFIERS:
        raise WeightsError(unknown("purifier network", name, PURIFIERS))
    try:
        return PURIFIERS[name](**args)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"purifier network '{name}' does not take {dict(args)}: {error}") from None


def fitting(loaded: Weights, path: Path, accepted: Sequence[str], defense: str) -> nn.Module:
    """The network a checkpoint holds, with its weights, frozen and in evaluation mode.

    What the checkpoint says about itself (`network` in its metadata) decides; the published layouts of NRP and
    pix2pixHD, which say nothing, are recognised by their names and shapes.

    Args:
        loaded: the checkpoint.
        path: where it lies, for messages.
        accepted: names of the networks the defense can run.
        defense: its name, for messages.

    Raises:
        WeightsError: another network, or weights that do not fit it.
    """
    spec = loaded.meta.get("network")
    if not isinstance(spec, Mapping):
        spec = _recognise(loaded.state)
    name, args = (spec or {}).get("name"), (spec or {}).get("args", {})
    if name not in accepted or not isinstance(args, Mapping):
        held = f"network '{name}'" if name else "an unknown network"
        raise WeightsError(
            f"weights file {path} holds {held}, defense '{defense}' needs {' or '.join(accepted)}"
        )
    network = purifier(str(name), args)
    apply_state(network, loaded.state, what=f"network '{name}' from {path}")
    return network.eval().requires_grad_(False)


def _recognise(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Name and arguments of a published layout, or None."""

    def count(prefix: str) -> int:
        inside = (name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix))
        return 1 + max((int(index) for index in inside if index.isdigit()), default=-1)

    def out(name: str) -> int:
        return len(state[name]) if name in state and state[name].ndim == 4 else 0

    if width := out("conv_first.weight"):
        if growth := out("RRDB_trunk.0.RDB1.conv1.weight"):
            args = {"width": width, "blocks": count("RRDB_trunk."), "growth": growth}
            return {"name": "nrp", "args": args}
        return {"name": "nrp_resg", "args": {"width": width, "blocks": count("recon_trunk.")}}
    if width := out("model.1.weight"):
        blocks = {name.split(".")[1] for name in state if ".conv_block." in name}
        if blocks:
            downsamplings = (min(map(int, blocks)) - 4) // 3
            return {
                "name": "global",
                "args": {"width": width, "downsamplings": downsamplings, "blocks": len(blocks)},
            }
    return None
