"""Adapter for modules of SiT's shape: a DiT that predicts a velocity and is shown a time in [0, 1]."""

from __future__ import annotations

from torch import Tensor

from free_kernels.constants import TIME_TICKS
from free_kernels.targets.check import Rows, alignment
from free_kernels.targets.dit import DiTTarget
from free_kernels.validation import check_int, fail


class SiTTarget(DiTTarget):
    """An original-style SiT (Ma et al. 2024) as a :class:`free_kernels.protocols.Target` for a flow schedule.

    A SiT has the parts of a DiT, so that a module does not tell which of the two it is: wrap it. The module is shown
    ``t / num_train_steps``, a float32 time with 0 at noise and 1 at data, and predicts the velocity towards the data;
    or, with ``noise_time=1``, the time from 1 at noise to 0 at data, and predicts the velocity towards the noise. Where
    its head has 2C channels (``learn_sigma=True``) the second half is dropped, as in its own forward; of a tuple of
    outputs the first is taken.

    A trained network tells which of the two it is: near pure noise the velocity towards data is the data's mean less
    the noise. One whose answer there points along the noise is refused. (For data that is itself white noise of unit
    variance the two do not differ.)

    Args:
        module: the SiT, in evaluation mode.
        num_train_steps: ticks in the unit of time; the schedule's.
        compile: as in :class:`DiTTarget`.
        noise_time: 0, as in SiT, or 1, as in REPA and those that follow it.

    Raises:
        TypeError: the module lacks a part.
        ValueError: the module is in training mode, or its velocity runs the other way.
    """

    family = "flow"

    def __init__(
        self, module: object, num_train_steps: int = TIME_TICKS, compile: bool = False, noise_time: int = 0
    ) -> None:
        self.num_train_steps = check_int("SiTTarget", "num_train_steps", num_train_steps, 2)
        self.noise_time = check_int("SiTTarget", "noise_time", noise_time, 0, 1)
        super().__init__(module, compile)
        self.learns_variance = False

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity towards the data ``[R, C, H, W]``."""
        return self._towards_data(super().head(h, t, y))

    def own(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity of the module's own call, ``[R, C, H, W]``."""
        return self._towards_data(super().own(x, self._shown(t), y))

    def convention(self) -> tuple[int, ...]:
        """Ticks in the unit of time, and the time of noise."""
        return self.num_train_steps, self.noise_time

    def check_convention(self, where: str, rows: Rows, own: Tensor) -> None:
        """Raise ValueError where the velocity near pure noise points along the noise."""
        if alignment(own[1], rows.x[1]) > 0.5:
            other = 1 - self.noise_time
            fail(
                where,
                "noise_time",
                f"{other} for a velocity that runs the other way (or the module is a DiT, which predicts noise)",
                f"{self.noise_time}, and an output along the noise at pure noise",
            )

    def _embed_timesteps(self, t: Tensor) -> Tensor:
        return super()._embed_timesteps(self._shown(t))

    def _shown(self, t: Tensor) -> Tensor:
        time = t.float() / self.num_train_steps
        return 1 - time if self.noise_time else time

    def _towards_data(self, output: Tensor) -> Tensor:
        velocity = output[:, : self.latent_shape[0]]
        return -velocity if self.noise_time else velocity
