"""Training of a learned drafter on its target's own trajectories."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from free_dit.acceptance import acceptance_by_lookahead
from free_dit.flow import schedule_for
from free_dit.training import LoopConfig, TrainingLoop, iteration_seed
from free_dit.trajectories import Trajectories, collect, guided_transition
from free_kernels.drafters import DrafterConfig, FeatureDrafter
from free_kernels.drafters.memory import FeatureMemory
from free_kernels.types import Target, guided_channels, null_label
from free_kernels.validation import check_choice, check_int, check_writable


@dataclass(frozen=True)
class DrafterTrainConfig:
    """Everything that defines a trained drafter.

    Attributes:
        drafter: shape of the drafter.
        loop: length and speed of training.
        num_steps: K of the chains it learns from.
        batch_size: windows per iteration.
        unroll: drafts in a row that the loss sees, each from the one before.
        trajectories: images drawn at a time.
        refresh_every: iterations between fresh trajectories.
        loss: "rejection", ``-log`` of the acceptance probability ``2 Phi(-delta / 2)``, which is what a chain of drafts
            multiplies; "log1p", ``log(1 + delta^2)``, which forgives large gaps; or "none", to regress features alone.
        late: share of the windows that begin in the last fifth of the chain, beside those spread over all of it.
        max_guidance: guidance scales are drawn from [1, max_guidance] for half of the images and 1 for the rest.
        feature_weight: weight of the mean squared feature error, in units of the feature's change over a step.
        compile: train through torch.compile.
        calibration_images: fresh trajectories that acceptance is measured on at the end, for automatic draft lengths; 0
            leaves it out.
    """

    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    num_steps: int = 250
    batch_size: int = 128
    unroll: int = 2
    trajectories: int = 64
    refresh_every: int = 250
    late: float = 0.0
    max_guidance: float = 4.0
    loss: str = "rejection"
    feature_weight: float = 0.0
    compile: bool = False
    calibration_images: int = 16


# Parts of the chain and look-ahead of the calibration.
_PARTS, _LOOKAHEAD = 25, 8


def calibrate(target: Target, drafter: FeatureDrafter, config: DrafterTrainConfig) -> list[list[float]]:
    """Acceptance by part of the chain and look-ahead on fresh trajectories, half of them guided."""
    schedule, count = schedule_for(target, config.num_steps), config.calibration_images
    guidance = torch.linspace(1.0, config.max_guidance, count)
    guidance[: count // 2] = 1.0
    # Noise that training never draws.
    data = collect(target, schedule, torch.arange(count) % target.num_classes, guidance, 2**63 + config.loop.seed)
    lookahead = min(_LOOKAHEAD, config.num_steps - 2)
    table = acceptance_by_lookahead(target, drafter, schedule, data, lookahead)
    parts = torch.stack([part.nanmean(1) for part in table.tensor_split(min(_PARTS, config.num_steps - 2), dim=1)])
    known = parts.nan_to_num(float(table.nanmean())).double()
    return [[round(value, 4) for value in row] for row in known.tolist()]


class DrafterLoss:
    """Loss on delta, the gap that decides acceptance, over windows of fresh trajectories.

    A drafter with a window first remembers drafts from exact features at the steps before; gradients reach them too.
    For a learned variance delta^2 adds the squared log-variance error, the cost of sharing slack at lambda = 1/2.
    """

    def __init__(self, target: Target, drafter: FeatureDrafter, config: DrafterTrainConfig) -> None:
        self.target, self.drafter, self.config = target, drafter, config
        self.network = torch.compile(drafter) if config.compile else drafter
        self.schedule = schedule_for(target, config.num_steps)
        self.table = self.schedule.table(self.schedule.resolve_variance(target.learns_variance))
        self.guided = guided_channels(target)
        self._data: Trajectories | None = None
        self._epoch = -1

    def data(self, epoch: int) -> Trajectories:
        """Trajectories number ``epoch``; the same ones whenever they are asked for."""
        if self._data is None or epoch != self._epoch:
            count = self.config.trajectories
            with iteration_seed(self.config.loop.seed + 1, epoch):
                labels = torch.randint(self.target.num_classes, (count,))
                guidance = torch.rand(count) * (self.config.max_guidance - 1) + 1
            guidance[: count // 2] = 1.0
            seed = (self.config.loop.seed << 20) + epoch
            self._data = collect(self.target, self.schedule, labels, guidance, seed, progress=True)
            self._epoch = epoch
        return self._data

    def __call__(self, iteration: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of one batch of windows."""
        data, rows, unroll = (
            self.data(iteration // self.config.refresh_every),
            self.config.batch_size,
            self.config.unroll,
        )
        image = torch.randint(len(data.labels), (rows,))
        start = torch.randint(1, self.config.num_steps - unroll, (rows,))
        if self.config.late:
            late = torch.randint(self.config.num_steps * 4 // 5, self.config.num_steps - unroll, (rows,))
            start = torch.where(torch.rand(rows) < self.config.late, late, start)
        y = data.labels[image]
        y = torch.cat([y, torch.full_like(y, null_label(self.target))])
        memory = self._past(data, image, start, y)
        feature = _exact_feature(data, image, start - 1)
        loss, figures = torch.zeros(()), {}
        for ahead in range(unroll):
            k = start + ahead
            feature = self._draft(feature, data, image, k, y, memory)
            output = self.target.head(feature, self.schedule.timesteps[k].repeat(2), y)
            mean, std = guided_transition(
                data.states[k, image], output, self.table[k], data.guidance[image], self.guided
            )
            gap_sq = gap(mean, std, data.mean[k, image], data.std[k, image])
            loss = loss + LOSSES[self.config.loss](gap_sq).mean() / unroll
            if self.config.feature_weight:
                error = ((feature - _exact_feature(data, image, k)) / self.drafter.change_std).square().mean()
                loss = loss + self.config.feature_weight * error / unroll
            accept = 2 * torch.special.ndtr(-gap_sq.detach().sqrt() / 2)
            figures[f"accept_{ahead + 1}"] = accept.mean().item()
        return loss, figures

    def _draft(
        self, feature: Tensor, data: Trajectories, image: Tensor, step: Tensor, y: Tensor, memory: FeatureMemory | None
    ) -> Tensor:
        """Feature ``[2 B, T, D]`` drafted at ``step [B]`` of ``image [B]`` from the one at the step before."""
        previous, state = (data.states[k, image].repeat(2, 1, 1, 1) for k in (step - 1, step))
        remembered = {} if memory is None else {"memory": memory}
        return self.network(feature, previous, state, self.schedule.timesteps[step].repeat(2), y, **remembered)

    def _past(self, data: Trajectories, image: Tensor, start: Tensor, y: Tensor) -> FeatureMemory | None:
        """Memory of drafts from exact features at the W - 1 steps before ``start [B]``; None without a window.

        The first step has no feature before it to draft from, so windows near it have a shorter past. In a drafter of
        one block this is all that a draft of a long chain sees; deeper blocks' keys would go further back there.
        """
        window = self.drafter.config.window
        # No call is refused here, so one slot besides those of the past is enough.
        memory = self.drafter.new_memory(len(image), 2, 1)
        for age in range(window - 1, 0, -1):
            step = (start - age).clamp(min=1)
            self._draft(_exact_feature(data, image, step - 1), data, image, step, y, memory)
            memory.rewind(torch.where(start > age, 0, window))
        return memory


def _exact_feature(data: Trajectories, image: Tensor, step: Tensor) -> Tensor:
    """The target's features ``[2 B, T, D]`` at ``step [B]`` of ``image [B]``, conditional rows first."""
    return data.features[step, :, image].transpose(0, 1).flatten(0, 1)


def rejection_loss(gap_sq: Tensor) -> Tensor:
    """``-log(2 Phi(-delta / 2))``, smoothed at 0 where its slope in ``delta^2`` is infinite."""
    return -torch.special.log_ndtr(-(gap_sq + 1e-6).sqrt() / 2) - math.log(2.0)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "rejection": rejection_loss,
    "log1p": torch.log1p,
    "none": torch.zeros_like,
}


def gap(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """delta^2 ``[R]`` of drafted against reference transitions: whitened means plus log-variance error."""
    whitened = ((mean_q - mean_p) / std_q).flatten(1).square().sum(1)
    return whitened + (2 * (std_q.log() - std_p.log())).flatten(1).square().sum(1)


def train_drafter(target: Target, config: DrafterTrainConfig, out: Path, target_name: str) -> Path:
    """Train a drafter for ``target`` into the folder ``out``; exports ``out/drafter.safetensors``.

    Running it again in the same folder goes on from the last checkpoint.

    Raises:
        ValueError, TypeError: the configuration is wrong, or the folder belongs to another one.
        OSError: the folder cannot be written.
        FloatingPointError: the loss or a gradient is not finite; the last good checkpoint stays.
    """
    check_int("train_drafter", "unroll", config.unroll, 1, config.num_steps - 2)
    check_int("train_drafter", "trajectories", config.trajectories, 2)
    check_choice("train_drafter", "loss", config.loss, tuple(LOSSES))
    path = check_writable("train_drafter", "out", Path(out) / "drafter.safetensors")
    # A flow model's timesteps are ticks of a finer time.
    unit = max(1, schedule_for(target, config.num_steps).num_train_steps // config.drafter.num_timesteps)
    config = replace(config, drafter=replace(config.drafter, time_unit=unit))
    with iteration_seed(config.loop.seed, -1):
        drafter = FeatureDrafter(target.latent_shape, target.feature_shape, target.num_classes, config.drafter)
    loss = DrafterLoss(target, drafter, config)
    first = loss.data(0)
    drafter.set_feature_scale(first.features, first.features.diff(dim=0))
    drafter.set_change_scale(loss.schedule.timesteps, first.states)
    changes_nothing = ("compile", "calibration_images")
    identity = {k: v for k, v in asdict(config).items() if k not in changes_nothing} | {"target": target_name}
    loop = TrainingLoop(drafter.train(), loss, config.loop, Path(out), identity)
    loop.run()
    drafter.load_state_dict(loop.averaged_weights())
    drafter.eval()
    if config.calibration_images:
        drafter.calibration = calibrate(target, drafter, config)
    drafter.save(path)
    return path
