"""Adapter for modules of SiT's shape: a DiT that predicts a velocity and is shown a time in [0, 1]."""

from __future__ import annotations

from torch import Tensor, nn

from free_kernels.constants import TIME_TICKS
from free_kernels.targets.dit import DiTTarget
from free_kernels.validation import check_int


class SiTTarget(DiTTarget):
    """An original-style SiT (Ma et al. 2024) as a :class:`free_kernels.protocols.Target` for a flow schedule.

    A SiT has the parts of a DiT, so that a module does not tell which of the two it is: wrap it. The module is shown
    ``t / num_train_steps``, a float32 time with 0 at noise and 1 at data. Where its head has 2C channels
    (``learn_sigma=True``) the second half is dropped, as in its own forward.

    Args:
        module: the SiT, in evaluation mode.
        num_train_steps: ticks in the unit of time; the schedule's.
        compile: as in :class:`DiTTarget`.

    Raises:
        TypeError: the module lacks a part.
        ValueError: the module is in training mode.
    """

    family = "flow"

    def __init__(self, module: nn.Module, num_train_steps: int = TIME_TICKS, compile: bool = False) -> None:
        self.num_train_steps = check_int("SiTTarget", "num_train_steps", num_train_steps, 2)
        super().__init__(module, compile)
        self.learns_variance = False

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity ``[R, C, H, W]``."""
        return super().head(h, t, y)[:, : self.latent_shape[0]]

    def own(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity of the module's own call, ``[R, C, H, W]``."""
        return super().own(x, t.float() / self.num_train_steps, y)[:, : self.latent_shape[0]]

    def _embed_timesteps(self, t: Tensor) -> Tensor:
        return super()._embed_timesteps(t.float() / self.num_train_steps)
