"""Betas of training, and which of its timesteps a sampler visits."""

from __future__ import annotations

import numpy as np

SPACINGS = ("improved_ddpm", "linspace", "leading", "trailing")


def linear_betas(num_train_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """The linear beta schedule of Ho et al. 2020, scaled to any length as in improved DDPM; float64 ``[T]``."""
    scale = 1000 / num_train_steps
    return np.linspace(scale * beta_start, scale * beta_end, num_train_steps, dtype=np.float64)


def respaced_timesteps(num_train_steps: int, num_steps: int) -> list[int]:
    """The ``num_steps`` training timesteps kept by improved DDPM's even respacing, ascending.

    The first and the last training step are always kept (one step keeps only the first); the points between are
    accumulated strides rounded half to even, as in Nichol & Dhariwal 2021.
    """
    if num_steps == 1:
        return [0]
    stride = (num_train_steps - 1) / (num_steps - 1)
    position, kept = 0.0, []
    for _ in range(num_steps):
        kept.append(round(position))
        position += stride
    return kept


def spaced_timesteps(num_train_steps: int, num_steps: int, spacing: str, steps_offset: int = 0) -> list[int]:
    """The ``num_steps`` training timesteps of a spacing rule, ascending.

    ``"linspace"``, ``"leading"`` and ``"trailing"`` are those of diffusers (Lin et al. 2023, table 2). ``"linspace"``
    is ``"improved_ddpm"`` but for points halfway between two timesteps, where the latter has accumulated rounding;
    they occur for odd ``num_steps``.
    """
    if spacing == "improved_ddpm":
        return respaced_timesteps(num_train_steps, num_steps)
    if spacing == "linspace":
        return np.linspace(0, num_train_steps - 1, num_steps).round().astype(int).tolist()
    if spacing == "leading":
        return [step * (num_train_steps // num_steps) + steps_offset for step in range(num_steps)]
    # The rounding of the stride can give diffusers' grid one more point, -1, which is not a timestep.
    grid = np.arange(num_train_steps, 0, -num_train_steps / num_steps)[:num_steps]
    return (grid.round().astype(int) - 1)[::-1].tolist()
