"""Super-resolution as a defense: wavelet denoising, then EDSR."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.errors import WeightsError
from bench.protocols import Defense, Geometry, Warped
from bench.registry import DEFENSES
from bench.weights import Weights, apply_state, load_state
from defenses import _jpeg, _wavelet
from defenses.networks.edsr import EDSR

HINT = "EDSR-PyTorch publishes edsr_baseline_x2-1bc95232.pt; put it there, or give its path as `weights`"


@DEFENSES.register_module(name="sr")
class SuperResolution(Defense):
    """Smooths with wavelets and enlarges twofold with EDSR, back onto the manifold of natural images.

    Source: Mustafa, Khan, Hayat, Shen, Shao, IEEE TIP 2019, and their code: BayesShrink in YCbCr, then EDSR-baseline
    x2 (Lim et al., CVPRW 2017; 16 residual blocks of 64 channels, 1,369,859 parameters, range 0..255). Training-free:
    the weights are those of EDSR, given by path, in the layout of EDSR-PyTorch; width and depth are read from them.

    What differs: the paper's classifier sees the enlarged image, which is `output: x2` (`Warped`; the target must
    accept the size). The default `same` averages 2x2 pixels back to the original size. The code stores the smoothed
    image as JPEG (quality 75, 4:2:0, values cut off to 8 bits), a second lossy step that the paper does not mention:
    `between: jpeg`. The code's sigma is 0.01 or 0.04, depending on its version.

    Differentiable, unless `between` is `jpeg`, whose surrogate then is a differentiable JPEG. Otherwise the surrogate
    is the defense itself.

    Limitations: no gradient is masked, so a white-box attack through the network applies.

    Args:
        weights: EDSR x2 checkpoint.
        sigma: standard deviation of the noise that the wavelets assume; 0 leaves them out.
        sigma_units: `channel` as the scikit-image of the paper's time, or `image` as today's.
        output: `same` or `x2`.
        between: what lies between smoothing and enlarging: nothing (`float`) or the code's `jpeg`.
        res_scale: factor of EDSR's residual blocks: 1 for the baseline, 0.1 for the large model.

    Raises:
        WeightsError: the checkpoint is missing, unreadable or of another network.
        ValueError: sigma is negative.
    """

    trained = True

    def __init__(
        self,
        weights: Path,
        sigma: float = 0.01,
        sigma_units: _wavelet.SigmaUnits = "channel",
        output: Literal["same", "x2"] = "same",
        between: Literal["float", "jpeg"] = "float",
        res_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if sigma < 0:
            raise ValueError(f"sigma must not be negative, got {sigma}")
        self.sigma = sigma
        self.sigma_units: _wavelet.SigmaUnits = sigma_units
        self.output = output
        self.between = between
        self.differentiable = between == "float"
        loaded = load_state(weights.expanduser(), hint=HINT)
        self.sha256 = loaded.sha256
        self.network = _edsr(loaded, weights, res_scale)

    def forward(self, images: Tensor) -> Tensor | Warped:
        """Purified images: (B, 3, H, W), or (B, 3, 2 H, 2 W) as `Warped`."""
        return self._purify(images, exact=True)

    def surrogate(self, images: Tensor) -> Tensor | Warped:
        """The same, with a differentiable JPEG in between where there is one."""
        return self._purify(images, exact=False)

    def identity(self) -> dict[str, Any]:
        """Name and parameters, with the digest of the weights in place of their path."""
        params = {key: value for key, value in self.params.items() if key != "weights"}
        return {"name": self.name, "params": params, "version": self.version, "weights": self.sha256}

    def _purify(self, images: Tensor, exact: bool) -> Tensor | Warped:
        x = images
        if self.sigma > 0:
            x = _wavelet.denoise(x, self.sigma, self.sigma_units)
            x = _jpeg.straight_through(x, lambda y: y.clamp(0, 1))
        if self.between == "jpeg" and exact:
            x = _jpeg.codec(x, 75, "4:2:0", torch.floor)
        elif self.between == "jpeg":
            levels = _jpeg.straight_through(x * 255, torch.floor)
            x = _jpeg.differentiable_jpeg(levels, 75, "4:2:0", _jpeg.cubic_round) / 255
        x = self.network(x)
        if self.output == "same":
            return F.avg_pool2d(x, 2)
        height, width = int(images.shape[-2]), int(images.shape[-1])
        batch = len(images)
        geometry = Geometry(
            torch.full((batch, 2), 2.0), torch.zeros(batch, 2), (height, width), (2 * height, 2 * width)
        )
        return Warped(x, geometry)


def _edsr(loaded: Weights, path: Path, res_scale: float) -> EDSR:
    """The network that fits a checkpoint, frozen."""
    state = loaded.state
    if "head.0.weight" not in state or state["head.0.weight"].ndim != 4:
        raise WeightsError(
            f"weights file {path} is of another network: expected EDSR x2 (head.0.weight, ...)"
        )
    blocks = [
        int(name.split(".")[1]) for name in state if name.startswith("body.") and name.split(".")[1].isdigit()
    ]
    network = EDSR(len(state["head.0.weight"]), max(blocks, default=0), res_scale)
    apply_state(network, state, what=f"EDSR x2 from {path}", ignore=("sub_mean.", "add_mean."))
    return network.eval().requires_grad_(False)
