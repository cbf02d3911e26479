"""The loss of a learned drafter on its target's own trajectories."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from free_dit.training.acceptance import shown_conditions
from free_dit.training.chains import ChainSource
from free_dit.training.distributed import Place
from free_dit.training.drafter_config import DTYPES, LOSSES, DrafterTrainConfig
from free_dit.training.redrawn import RedrawnWindows
from free_dit.training.refused_rounds import RefusedRounds
from free_dit.training.trajectories import guided_transition
from free_dit.training.windows import NetworkRows, Windows
from free_kernels.drafters import FeatureDrafter
from free_kernels.drafters.memory import FeatureMemory
from free_kernels.protocols import Target, first_drafted_step, guided_channels, steps_of_share, unconditional_labels


class DrafterLoss:
    """Loss on delta, the gap that decides acceptance, over windows of fresh trajectories.

    A drafter with a window first remembers drafts from exact features at the steps before; gradients reach them too.
    For a learned variance delta^2 adds the squared log-variance error, the cost of comparing half of the variance.

    Args:
        target: the frozen network.
        drafter: trained, on the target's device.
        config: what the loss is.
        place: each process has trajectories and windows of its own.
        folder: of the shards, for ``config.store == "shards"``.
    """

    def __init__(
        self,
        target: Target,
        drafter: FeatureDrafter,
        config: DrafterTrainConfig,
        place: Place = Place(),
        folder: Path | None = None,
    ) -> None:
        # A copy for the target's conditions shares the weights.
        drafter = shown_conditions(drafter, target)
        self.target, self.drafter, self.config, self.place = target, drafter, config, place
        self.device = drafter.positions.device
        self.network = torch.compile(drafter) if config.compile else drafter
        counts = (config.num_steps, config.other_steps) if config.other_steps else (config.num_steps,)
        self.main, *self.others = (ChainSource(target, config, k, place, self.device, folder) for k in counts)
        self.guided = guided_channels(target)
        self.dtype = DTYPES[config.precision]
        self.first_step = first_drafted_step(drafter)

    def fit_scales(self) -> None:
        """Give the drafter its scales, and its stand-in for a first parent, from the first trajectories."""
        first = self.main.data(0)
        self.drafter.set_feature_scale(*first.scale_samples())
        self.drafter.set_change_scale(self.main.schedule.timesteps, first.states)
        begin = torch.arange(first.states.shape[1])
        features = first.at("features", torch.zeros_like(begin), begin).float()
        states = first.states[0].float()
        self.drafter.set_first_feature(torch.cat([states, states]), features)

    def _windows(self, chain: ChainSource, epoch: int) -> tuple[Windows, Tensor, Tensor]:
        """A batch of B windows, their first steps and their guidance scales ``[B]``."""
        config, rows, last = self.config, self.config.batch_size, chain.num_steps - 2
        data = chain.data(epoch)
        image = torch.randint(len(data.labels), (rows,))
        # Rounds that begin before are not the drafter's.
        earliest = min(last, max(1, steps_of_share(config.frozen_share, chain.num_steps)))
        start = torch.randint(earliest, last + 1, (rows,))
        if config.late:
            left = torch.rand(rows).mul(math.log(max(2, chain.num_steps // 5))).exp().long()
            start = torch.where(torch.rand(rows) < config.late, (last + 1 - left).clamp(min=earliest), start)
        if config.first and self.first_step == 0 and not config.frozen_share:
            start = start.masked_fill(torch.rand(rows) < config.first, 0)
        guidance = data.guidance[image]
        network = NetworkRows(guidance, self.drafter.config.window > 1, self.device)
        y = data.labels[image]
        y = network.pick(torch.cat([y, unconditional_labels(self.target, y)]).to(self.device))
        return Windows(chain, data, image, y, network), start, guidance

    def __call__(self, iteration: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of one batch of windows."""
        config, unroll, chain = self.config, self.config.unroll, self.main
        if self.others and float(torch.rand(())) < config.other_share:
            chain = self.others[0]
        windows, start, guidance = self._windows(chain, iteration // config.refresh_every)
        last, network = chain.num_steps - 2, windows.network
        memory = self._past(windows, start)
        feature = self.parents(windows, start)
        # Windows are in no order, so the first and the last ones are as good as any.
        count = round(config.refused * len(start))
        corrected = slice(0, count)
        rounds = self._refused(windows, start, guidance, corrected) if count else None
        # Both numbers may be rounded up.
        anew = slice(max(count, len(start) - round(config.redrawn * len(start))), len(start))
        redrawn = self._redrawn(windows, start, guidance, anew) if anew.start < anew.stop else None
        guidance = guidance.to(self.device)
        loss, metrics = torch.zeros((), device=self.device), {}
        previous = windows.rows("states", (start - 1).clamp(min=0))
        for ahead in range(unroll):
            # Windows end where the chain does, before its last step, which needs no draft.
            k, inside = (start + ahead).clamp(max=last), (start + ahead <= last).to(self.device)
            state, exact_mean, exact_std = (windows.rows(name, k) for name in ("states", "mean", "std"))
            if redrawn is not None:
                new = redrawn.states[ahead], redrawn.means[ahead], redrawn.stds[ahead]
                for rows, others in zip((state, exact_mean, exact_std), new, strict=True):
                    rows[anew] = others
            feature = self.draft_at(windows, feature, previous, state, k, memory)
            if rounds is not None:
                feature = feature.index_add(0, network.of(corrected), rounds.errors(ahead))
            mean, std = self.transition(windows, feature, state, k, guidance)
            gap_sq = gap(mean, std, exact_mean, exact_std)
            previous = state
            loss = loss + torch.where(inside, LOSSES[config.loss](gap_sq), 0.0).mean() / unroll
            if config.feature_weight:
                exact = network.pick(windows.rows("features", k))
                if redrawn is not None:
                    exact[network.of(anew)] = redrawn.features[ahead]
                error = ((feature - exact) / self.drafter.change_std).square().flatten(1).mean(1)
                error = torch.where(network.both(inside), error, 0.0).mean()
                loss = loss + config.feature_weight * error / unroll
            accept = 2 * torch.special.ndtr(-gap_sq.detach().sqrt() / 2)
            if count < len(start):
                metrics[f"accept_{ahead + 1}"] = accept[count:][inside[count:]].mean().item()
            if count:
                metrics[f"corrected_{ahead + 1}"] = accept[:count][inside[:count]].mean().item()
        return loss, metrics

    def _refused(self, windows: Windows, start: Tensor, guidance: Tensor, part: slice) -> RefusedRounds:
        """The refused rounds before a part of the windows."""
        return RefusedRounds(self, windows.part(part, guidance), start[part], guidance[part])

    def _redrawn(self, windows: Windows, start: Tensor, guidance: Tensor, part: slice) -> RedrawnWindows:
        """A part of the windows with new noise."""
        some = windows.part(part, guidance, self.drafter.config.window > 1)
        return RedrawnWindows(self, some, start[part], guidance[part])

    def transition(
        self, windows: Windows, feature: Tensor, state: Tensor, step: Tensor, guidance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and deviation ``[B, C, H, W]`` of ``step [B]`` from ``state`` with features ``[R, T, D]``."""
        chain, network, here = windows.chain, windows.network, step.to(self.device)
        output = network.spread(self.target.head(feature, network.both(chain.timesteps[here]), windows.y))
        return guided_transition(state, output, chain.table[here], guidance, self.guided, chain.schedule.clip)

    def parents(self, windows: Windows, step: Tensor) -> Tensor:
        """Exact features ``[R, T, D]`` before ``step [B]``; at step 0 the drafter's stand-in for one."""
        exact = windows.network.pick(windows.rows("features", (step - 1).clamp(min=0)))
        if self.first_step:
            return exact
        # Computed even if no window begins at step 0, so that every weight has a gradient in every iteration.
        guess = windows.network.both(self.drafter.initial_feature(windows.rows("states", step)))
        return torch.where(windows.network.both((step == 0).to(self.device)).view(-1, 1, 1), guess, exact)

    def draft(self, windows: Windows, feature: Tensor, step: Tensor, memory: FeatureMemory | None) -> Tensor:
        """Feature ``[R, T, D]`` drafted at the windows' states of ``step [B]`` from the one at the step before."""
        previous, state = (windows.rows("states", k) for k in ((step - 1).clamp(min=0), step))
        return self.draft_at(windows, feature, previous, state, step, memory)

    def draft_at(
        self,
        windows: Windows,
        feature: Tensor,
        previous: Tensor,
        state: Tensor,
        step: Tensor,
        memory: FeatureMemory | None = None,
    ) -> Tensor:
        """Feature ``[R, T, D]`` drafted at states ``[B, C, H, W]`` of ``step [B]``, one step after ``previous``."""
        both = windows.network.both
        remembered = {} if memory is None else {"memory": memory}
        t = both(windows.chain.timesteps[step.to(self.device)])
        mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if mixed else nullcontext():
            return self.network(feature, both(previous), both(state), t, windows.y, **remembered).float()

    def _past(self, windows: Windows, start: Tensor) -> FeatureMemory | None:
        """Memory of drafts from exact features at the W - 1 steps before ``start [B]``; None without a window.

        Windows near the first drafted step have a shorter past. For a drafter of one block, this memory holds all that
        a draft of a long chain attends to; the keys of deeper blocks would depend on drafts of still earlier steps.
        """
        window = self.drafter.config.window
        # No draft is refused here: room for one draft besides the past is enough.
        memory = self.drafter.new_memory(len(start), 2, 1, self.dtype)
        for age in range(window - 1, 0, -1):
            step = (start - age).clamp(min=self.first_step)
            self.draft(windows, self.parents(windows, step), step, memory)
            memory.rewind(torch.where(start - age >= self.first_step, 0, window).to(self.device))
        return memory


def gap(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """delta^2 ``[R]`` of drafted against reference transitions: whitened means plus log-variance error."""
    whitened = ((mean_q - mean_p) / std_q).flatten(1).square().sum(1)
    return whitened + (2 * (std_q.log() - std_p.log())).flatten(1).square().sum(1)
