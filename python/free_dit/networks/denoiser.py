"""A target in closed form whose drafts are as hard as photographs are: the exact denoiser of crops of photographs.

Data is ``sum_i N(crop_i, width^2 I) / n``; its noise prediction is a softmax over crops. Nothing has to be trained.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from free_kernels import DDPMSchedule


def photograph_crops(size: int, count: int = 400, seed: int = 1) -> Tensor:
    """``[2 count, 3, size, size]`` in [-1, 1]: 64 x 64 crops of scikit-learn's two photographs, averaged down."""
    from sklearn.datasets import load_sample_images

    generator, crops = torch.Generator().manual_seed(seed), []
    for image in load_sample_images().images:
        pixels = torch.tensor(image, dtype=torch.float32).permute(2, 0, 1) / 127.5 - 1
        for _ in range(count):
            top, left = (int(torch.randint(0, side - 64, (1,), generator=generator)) for side in pixels.shape[1:])
            crop = pixels[None, :, top : top + 64, left : left + 64]
            crops.append(torch.nn.functional.interpolate(crop, size=(size, size), mode="area")[0])
    return torch.stack(crops)


class DenoiserTarget:
    """The exact noise predictor of crops blurred by Gaussian noise; satisfies ``free_kernels.Target``.

    A feature is the predicted noise itself, a token for each row of pixels.

    Args:
        crops: ``[n, C, H, W]``.
        width: standard deviation of the noise around each crop.
    """

    num_classes, learns_variance, has_null_label = 1, False, False

    def __init__(self, crops: Tensor, width: float = 0.05) -> None:
        self.latent_shape = tuple(crops.shape[1:])
        self.feature_shape = (self.latent_shape[1], math.prod(self.latent_shape) // self.latent_shape[1])
        self.width = width
        self._crops = crops.flatten(1)
        self._squares = self._crops.square().sum(1)
        self._alphas = torch.from_numpy(DDPMSchedule().train_alphas_cumprod).float()

    def features(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """``(x - sqrt(abar) E[x0 | x]) / sqrt(1 - abar)``, ``[R, T, D]``."""
        alpha, state = self._alphas[t].unsqueeze(1), x.flatten(1)
        variance = alpha * self.width**2 + 1 - alpha
        scores = (2 * alpha.sqrt() * (state @ self._crops.T) - alpha * self._squares) / (2 * variance)
        nearest = torch.softmax(scores, dim=1) @ self._crops
        clean = nearest + alpha.sqrt() * self.width**2 / variance * (state - alpha.sqrt() * nearest)
        return ((state - alpha.sqrt() * clean) / (1 - alpha).sqrt()).view(-1, *self.feature_shape)

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The feature, in the latent's shape."""
        return h.reshape(-1, *self.latent_shape)


class PullingDrafter:
    """Closes a share of the gap between the last feature and the target's own: ``share = 0.8`` is five times better.

    Args:
        target: whose features it knows.
        share: in [0, 1].
    """

    def __init__(self, target: DenoiserTarget, share: float) -> None:
        self.target, self.share = target, share

    def __call__(self, feature: Tensor, previous: Tensor, state: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Feature ``[R, T, D]``."""
        return torch.lerp(feature, self.target.features(state, t, y), self.share)
