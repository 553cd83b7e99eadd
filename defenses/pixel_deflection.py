"""Pixel deflection."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.protocols import Defense
from bench.registry import DEFENSES
from bench.rng import ImageRNG
from defenses import _wavelet


@DEFENSES.register_module(name="pixel_deflection")
class PixelDeflection(Defense):
    """Overwrites a few random values with random neighbours, then smooths with wavelets.

    Source: Prakash, Moran, Garber, DiLillo, Storer, CVPR 2018, and their code: 200 deflections on 224x224 pixels,
    window 10, BayesShrink in YCbCr with sigma 0.04. Each colour channel draws its own place and neighbour and counts
    as one deflection; they come in threes, one after the other, so a value can travel. As in the code, row and column
    0 are never copied from.

    What differs: no R-CAM map, which needs the classifier (the code's `-disable_map`); other image sizes get
    deflections in proportion to their area unless `deflections` says otherwise (4 on 32x32).

    Differentiable: values are copied and then smoothed, and autograd follows both. The surrogate is the identity.

    Limitations: broken by BPDA with the identity (Athalye and Carlini 2018, "On the robustness of the CVPR 2018
    white-box adversarial example defenses").

    Args:
        deflections: how many values are overwritten (rounded up to threes); None for 200 per 224x224 pixels.
        window: neighbours are at most this many rows and columns away.
        sigma: standard deviation of the noise that the wavelets assume; 0 leaves the smoothing out.
        sigma_units: `channel` as the scikit-image of the paper's time, or `image` as today's: see
            `denoise_wavelet(rescale_sigma=...)`; in [0,1] units of each scaled YCbCr channel, or of the image.

    Raises:
        ValueError: a number is negative, or window is 0.
    """

    stochastic = True

    def __init__(
        self,
        deflections: int | None = None,
        window: int = 10,
        sigma: float = 0.04,
        sigma_units: _wavelet.SigmaUnits = "channel",
    ) -> None:
        super().__init__()
        if deflections is not None and deflections < 0:
            raise ValueError(f"deflections must not be negative, got {deflections}")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if sigma < 0:
            raise ValueError(f"sigma must not be negative, got {sigma}")
        self.deflections = deflections
        self.window = window
        self.sigma = sigma
        self.sigma_units: _wavelet.SigmaUnits = sigma_units

    def forward(self, images: Tensor, rng: ImageRNG) -> Tensor:
        """Deflected and smoothed images, same shape."""
        height, width = images.shape[-2:]
        count = self.deflections
        if count is None:
            count = max(1, round(200 * height * width / 224**2))
        deflected = images.flatten(2).gather(
            2, self._sources(-(-count // 3), height, width, rng).to(images.device)
        )
        deflected = deflected.view_as(images)
        if self.sigma == 0:
            return deflected
        return _wavelet.denoise(deflected, self.sigma, self.sigma_units)

    def surrogate(self, images: Tensor, rng: ImageRNG) -> Tensor:
        """The identity."""
        return images

    def _sources(self, rounds: int, height: int, width: int, rng: ImageRNG) -> Tensor:
        """Where each value comes from: (B, 3, H W) indices into a flattened channel, after `rounds` deflections."""
        sources = torch.arange(height * width).expand(len(rng), 3, -1).clone()
        draws = rng.uniform((rounds, 3, 4)).double()
        row = (draws[..., 0] * height).long()
        column = (draws[..., 1] * width).long()
        target = row * width + column
        origin = self._neighbour(row, draws[..., 2], height) * width
        origin = origin + self._neighbour(column, draws[..., 3], width)
        for step in range(rounds):
            value = sources.gather(2, origin[:, step, :, None])
            sources.scatter_(2, target[:, step, :, None], value)
        return sources

    def _neighbour(self, position: Tensor, draw: Tensor, length: int) -> Tensor:
        """A uniform position in 1..length-1 at most `window` away; the same one where there is none."""
        low = (position - self.window).clamp(min=1)
        high = (position + self.window).clamp(max=length - 1)
        chosen = low + (draw * (high - low + 1)).long()
        return torch.where(high >= low, chosen, position)
