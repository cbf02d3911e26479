"""``sample`` and ``ancestral_sample``: the speculative loop and the ordinary one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from free_kernels.drafters import as_drafter
from free_kernels.hoisting import hoisted
from free_kernels.noise import Purpose, as_noise_source
from free_kernels.ops.coupling import couple, gaussian_transition
from free_kernels.ops.packing import commit_drafts, pack_drafts
from free_kernels.policy import SlackPolicy
from free_kernels.reference.coupling import Coupling
from free_kernels.schedule import DDPMSchedule
from free_kernels.targets import as_target
from free_kernels.types import (
    Callback,
    Drafter,
    NoiseSource,
    RoundInfo,
    SampleResult,
    SampleStats,
    Target,
    device_of,
    null_label,
)
from free_kernels.validation import check_choice, check_float, check_int, check_labels, fail

# Noise of the ordinary sampler is drawn for several steps at once, up to this many elements.
NOISE_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class _Chain:
    """What both loops share: the target, its transitions and the noise, checked and on one device."""

    target: Target
    labels: Tensor
    noise: NoiseSource
    timesteps: Tensor
    table: Tensor
    learned: bool
    guidance_scale: float
    guidance_channels: int
    clip: float
    initial: Tensor

    @property
    def branches(self) -> int:
        """Network rows per row."""
        return 1 if self.guidance_scale == 1.0 else 2

    @property
    def null(self) -> int | None:
        """The null label, where guidance needs one."""
        return null_label(self.target) if self.branches == 2 else None

    @property
    def used_labels(self) -> Tensor:
        """Distinct labels that the network will see."""
        unique = self.labels.unique()
        return unique if self.null is None else torch.cat([unique, unique.new_tensor([self.null])])

    def branched(self, labels: Tensor) -> Tensor:
        """Labels of both guidance branches, conditional first."""
        return labels if self.null is None else torch.cat([labels, torch.full_like(labels, self.null)])

    def doubled(self, rows: Tensor) -> Tensor:
        """The same rows for each guidance branch."""
        return rows if self.branches == 1 else torch.cat([rows, rows])

    def draw(self, purpose: Purpose, images: Tensor, steps: Tensor) -> Tensor:
        """Normals ``[S, L, C, H, W]`` for images ``[S, L]`` at steps ``[S, L]``, both contiguous."""
        shape = tuple(self.target.latent_shape)
        return self.noise.normal(images.view(-1), steps.view(-1), purpose, shape).view(*steps.shape, *shape)

    def transition(self, state: Tensor, output: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the next state."""
        return gaussian_transition(
            state,
            output,
            columns,
            guidance_scale=self.guidance_scale,
            guidance_channels=self.guidance_channels,
            clip=self.clip,
        )


def _make_chain(
    where: str,
    target: object,
    class_labels: object,
    schedule: object,
    guidance_scale: object,
    guidance_channels: object,
    seed: int,
    noise: object,
) -> _Chain:
    adapted = as_target(where, target)
    labels = check_labels(where, class_labels, adapted.num_classes)
    if not (hasattr(schedule, "table") and hasattr(schedule, "timesteps") and hasattr(schedule, "resolve_variance")):
        fail(where, "schedule", "a schedule such as DDPMSchedule", schedule, TypeError)
    scale = check_float(where, "guidance_scale", guidance_scale, 0.0)
    if scale != 1.0 and not getattr(adapted, "has_null_label", True):
        fail(where, "guidance_scale", "1 for a target trained without label dropout", f"{scale:g}")
    channels = adapted.latent_shape[0]
    if guidance_channels is None:
        guidance_channels = getattr(adapted, "guidance_channels", channels)
    guided = check_int(where, "guidance_channels", guidance_channels, 1, channels)
    device = device_of(adapted)
    labels = labels.to(device)
    source = as_noise_source(where, noise, seed, tuple(adapted.latent_shape), len(labels), schedule.num_steps, device)
    variance = schedule.resolve_variance(adapted.learns_variance)
    images = torch.arange(len(labels), device=device)
    return _Chain(
        adapted,
        labels,
        source,
        schedule.timesteps.to(device),
        schedule.table(variance).to(device),
        variance == "learned_range",
        scale,
        guided,
        schedule.clip,
        source.normal(images, torch.zeros_like(images), Purpose.INITIAL, tuple(adapted.latent_shape)),
    )


def _raise_non_finite(where: str, culprit: str, step: int, image: int) -> None:
    raise FloatingPointError(
        f"{where}: {culprit} must be finite, got a non-finite value at step {step} of image {image}"
    )


@torch.inference_mode()
def ancestral_sample(
    target: object,
    class_labels: Tensor,
    *,
    schedule: DDPMSchedule = DDPMSchedule(),
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    seed: int = 0,
    noise: object = None,
    max_slots: int | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> SampleResult:
    """The ordinary sampler: one target call a step. Shares noise keys, arithmetic and hoisting with :func:`sample`.

    Args: as in :func:`sample`; images are drawn in batches of ``max_slots`` (all at once if None).

    Returns:
        The same :class:`SampleResult`, with ``call_reduction`` 1.

    Raises:
        ValueError, TypeError, FloatingPointError: as :func:`sample`.
    """
    where = "ancestral_sample"
    started = time.perf_counter()
    chain = _make_chain(where, target, class_labels, schedule, guidance_scale, guidance_channels, seed, noise)
    count, num_steps = len(chain.labels), len(chain.timesteps)
    slots = count if max_slots is None else check_int(where, "max_slots", max_slots, 1)
    network: Target = hoisted(chain.target, chain.timesteps, chain.used_labels)  # type: ignore[assignment]
    stats = SampleStats(
        rounds_per_image=np.full(count, num_steps),
        tested_by_step=np.zeros(num_steps, np.int64),
        accepted_by_step=np.zeros(num_steps, np.int64),
    )
    samples = torch.empty_like(chain.initial)
    with tqdm(total=count * num_steps, desc=where, unit="step", disable=not progress) as bar:
        for images in torch.arange(count, device=samples.device).split(slots):
            x, labels = chain.initial[images], chain.branched(chain.labels[images])
            chunk = max(1, NOISE_CHUNK_ELEMENTS // x.numel())
            for step in range(num_steps):
                if step % chunk == 0:
                    ahead = torch.arange(step, min(step + chunk, num_steps), device=x.device)
                    keys = images.unsqueeze(1).repeat(1, len(ahead))
                    draws = chain.draw(Purpose.STEP, keys, ahead.repeat(len(images), 1))
                t = chain.timesteps[step].expand(len(labels))
                h = network.features(chain.doubled(x), t, labels)
                mean, std = chain.transition(x, network.head(h, t, labels), chain.table[step : step + 1])
                x = torch.addcmul(mean, std, draws[:, step % chunk])
                if not bool(x.isfinite().all()):
                    bad = (~x.isfinite()).flatten(1).any(1).nonzero()[0, 0]
                    _raise_non_finite(where, "the target's output", step, int(images[bad]))
                stats.target_calls += 1
                stats.target_rows += len(images)
                bar.update(len(images))
                if callback is not None:
                    at = [step + 1] * len(images)
                    done = int(images[0]) + (len(images) if step + 1 == num_steps else 0)
                    callback(RoundInfo(stats.target_calls, images.tolist(), at, done, count))
            samples[images] = x
    stats.elapsed_s = time.perf_counter() - started
    return SampleResult(samples, stats)


@torch.inference_mode()
def sample(
    target: object,
    class_labels: Tensor,
    *,
    schedule: DDPMSchedule = DDPMSchedule(num_steps=250),
    drafter: str | Drafter = "frozen",
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    draft_length: int = 6,
    relaxation: float = 0.0,
    verification: str = "token",
    seed: int = 0,
    noise: object = None,
    max_slots: int | None = None,
    backend: str = "auto",
    progress: bool = False,
    callback: Callback | None = None,
) -> SampleResult:
    """Draw images by speculative sampling; their law is exactly that of :func:`ancestral_sample`.

    Args:
        target: a :class:`Target`, or a DiT module that an adapter recognises.
        class_labels: int64 ``[N]`` in ``[0, num_classes)``.
        schedule: the Gaussian transitions.
        drafter: ``"frozen"`` (repeat the last exact feature), or a drafter such as a trained :class:`FeatureDrafter`.
        guidance_scale: w in ``e_u + w (e_c - e_u)``; 1 is no guidance and one network row per row instead of two.
        guidance_channels: leading channels that guidance mixes; None takes the target's own (the original DiT: 3 of 4).
        draft_length: L, rows of a round for one image, in ``[1, num_steps]``; 1 is the ordinary chain.
        relaxation: 0, which is lossless.
        verification: ``"token"``: rows are decided one by one.
        seed: key of all noise, in ``[0, 2**64)``. An image depends on seed and index, not on the batch around it.
        noise: None, initial states ``[N, C, H, W]``, initial states and step noise ``[N, K, C, H, W]``, or a source.
        max_slots: images in the making at a time; all of them if None. A finished one makes room for a waiting one.
        backend: ``"auto"`` or ``"reference"``.
        progress: show a progress bar.
        callback: called with a :class:`RoundInfo` after every round.

    Returns:
        ``samples`` float32 ``[N, C, H, W]`` and ``stats``.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        FloatingPointError: a network output is not finite; the message names step and image.
    """
    where = "sample"
    started = time.perf_counter()
    chain = _make_chain(where, target, class_labels, schedule, guidance_scale, guidance_channels, seed, noise)
    length = check_int(where, "draft_length", draft_length, 1, len(chain.timesteps))
    if check_float(where, "relaxation", relaxation, 0.0) != 0.0:
        fail(where, "relaxation", "0 (relaxed acceptance is not available in this version)", f"{relaxation:g}")
    check_choice(where, "verification", verification, ("token",))
    check_choice(where, "backend", backend, ("auto", "reference"))
    slots = len(chain.labels)
    if max_slots is not None:
        slots = min(slots, check_int(where, "max_slots", max_slots, 1))
    speculation = _Speculation(chain, as_drafter(where, drafter, chain.target), length, slots, backend)
    speculation.run(progress, callback)
    speculation.stats.elapsed_s = time.perf_counter() - started
    return SampleResult(speculation.samples, speculation.stats)


class _Drafts(NamedTuple):
    """What the drafting pass of a round leaves: ``states [S, L, ...]``, ``mean`` and ``std [S, L - 1, ...]``."""

    states: Tensor
    mean: Tensor
    std: Tensor


class _Speculation:
    """The state of a speculative run: S slots, each with an image at its own step."""

    def __init__(self, chain: _Chain, drafter: Drafter, length: int, slots: int, backend: str) -> None:
        self.chain, self.length, self.backend = chain, length, backend
        device = chain.labels.device
        self.network: Target = hoisted(chain.target, chain.timesteps, chain.used_labels)  # type: ignore[assignment]
        self.drafter: Drafter = hoisted(drafter, chain.timesteps, chain.used_labels)  # type: ignore[assignment]
        self.drafter_is_free = getattr(drafter, "is_free", False)
        # A waiting image's entry holds its initial noise until the image itself replaces it.
        self.samples = chain.initial.clone()
        self.images = torch.arange(slots, device=device)
        self.labels = chain.labels[:slots].clone()
        self.steps = torch.zeros_like(self.images)
        self.queue = torch.tensor([slots], device=device)
        self.state = self.samples[:slots].clone()
        self.previous = torch.zeros_like(self.state)
        # Allocated once the first features tell their dtype; step 0 has no parent.
        self.parent: Tensor | None = None
        self.slack = SlackPolicy(slots, device) if chain.learned else None
        self.stats = SampleStats(
            rounds_per_image=np.zeros(len(chain.labels), np.int64),
            tested_by_step=np.zeros(len(chain.timesteps), np.int64),
            accepted_by_step=np.zeros(len(chain.timesteps), np.int64),
        )

    def run(self, progress: bool, callback: Callback | None) -> None:
        """Rounds until every image is finished."""
        num_steps, count = len(self.chain.timesteps), len(self.chain.labels)
        images, steps, done, rounds = self.images.tolist(), self.steps.tolist(), 0, 0
        with tqdm(total=count * num_steps, desc="sample", unit="step", disable=not progress) as bar:
            while done < count:
                lengths = [
                    0 if image < 0 else (1 if step == 0 else min(self.length, num_steps - step))
                    for image, step in zip(images, steps, strict=True)
                ]
                committed = self._round(lengths)
                rounds += 1
                now = [(image, step + c) for image, step, c in zip(images, steps, committed, strict=True) if image >= 0]
                done += sum(step == num_steps for _, step in now)
                self._count(images, steps, lengths, committed)
                bar.update(sum(committed))
                if callback is not None:
                    callback(RoundInfo(rounds, [i for i, _ in now], [s for _, s in now], done, count))
                images, steps = self.images.tolist(), self.steps.tolist()

    def _round(self, lengths: list[int]) -> list[int]:
        """Draft, verify, couple and commit one round; returns the steps committed by each slot."""
        chain, longest = self.chain, max(lengths)
        num_steps = len(chain.timesteps)
        device = self.state.device
        lengths_tensor = torch.tensor(lengths, device=device)
        steps = (self.steps.unsqueeze(1) + torch.arange(longest, device=device)).clamp_(max=num_steps - 1)
        columns = chain.table[steps]
        keys = self.images.clamp(min=0).unsqueeze(1).repeat(1, longest)
        noise = chain.draw(Purpose.STEP, keys, steps)
        slack = slack_noise = None
        if self.slack is not None and longest > 1:
            slack = self.slack.share(longest)
            slack_noise = chain.draw(Purpose.SLACK, keys, steps)
        uniform = chain.noise.uniform(keys.view(-1), steps.view(-1), Purpose.ACCEPT).view_as(steps)

        drafts = self._draft(lengths, steps, columns, noise)
        x, t, y, row_offsets = pack_drafts(
            drafts.states,
            lengths_tensor,
            self.steps,
            self.labels,
            chain.timesteps,
            sum(lengths),
            chain.null,
            self.backend,
        )
        features = self.network.features(x, t, y)
        output = self.network.head(features, t, y)
        self.stats.target_calls += 1
        self.stats.target_rows += sum(lengths)
        outcome = couple(
            drafts.states,
            drafts.mean,
            drafts.std,
            noise,
            slack_noise,
            uniform,
            output,
            row_offsets,
            columns,
            slack=slack,
            guidance_scale=chain.guidance_scale,
            guidance_channels=chain.guidance_channels,
            clip=chain.clip,
            backend=self.backend,
        )
        if not bool(outcome.next_states.isfinite().all()):
            self._explain_non_finite(outcome, drafts, lengths)
        if slack is not None:
            self.slack.update(outcome, lengths_tensor)
        if self.parent is None:
            slots, shape = len(lengths), features.shape[1:]
            self.parent = features.new_zeros(chain.branches, slots, *shape)
        commit_drafts(
            outcome.committed,
            outcome.next_states,
            drafts.states,
            features,
            row_offsets,
            state=self.state,
            previous=self.previous,
            parent=self.parent,
            steps=self.steps,
            images=self.images,
            labels=self.labels,
            samples=self.samples,
            all_labels=chain.labels,
            queue=self.queue,
            num_steps=num_steps,
            backend=self.backend,
        )
        if self.slack is not None:
            self.slack.reset(self.steps == 0)
        return outcome.committed.tolist()

    def _draft(self, lengths: list[int], steps: Tensor, columns: Tensor, noise: Tensor) -> _Drafts:
        """The drafting pass: the drafter's features through the target's frozen head, one step after the other."""
        chain, slots, longest = self.chain, len(lengths), max(lengths)
        states, means, stds = [self.state], [], []
        if longest == 1:
            none = self.state.new_zeros(slots, 0, *self.state.shape[1:])
            return _Drafts(self.state.unsqueeze(1), none, none)
        timesteps, labels = chain.timesteps[steps], self.labels
        active: Tensor | None = None
        feature, previous, state = self.parent, self.previous, self.state
        for j in range(longest - 1):
            drafting = [slot for slot, length in enumerate(lengths) if length > j + 1]
            if len(drafting) < (slots if active is None else len(active)):
                now = torch.tensor(drafting, device=steps.device)
                within = now if active is None else torch.searchsorted(active, now)
                feature, previous, state, labels = feature[:, within], previous[within], state[within], labels[within]
                active = now
            pick = (lambda rows: rows) if active is None else (lambda rows, chosen=active: rows[chosen])
            t, y = chain.doubled(pick(timesteps[:, j])), chain.branched(labels)
            drafted = self.drafter(feature.flatten(0, 1), chain.doubled(previous), chain.doubled(state), t, y)
            self.stats.drafter_calls += not self.drafter_is_free
            mean, std = chain.transition(state, self.network.head(drafted, t, y), pick(columns[:, j]))
            previous, state = state, torch.addcmul(mean, std, pick(noise[:, j]))
            feature = drafted.unflatten(0, (chain.branches, -1))
            for column, rows in ((states, state), (means, mean), (stds, std)):
                full = rows if active is None else rows.new_zeros(slots, *rows.shape[1:]).index_copy_(0, active, rows)
                column.append(full)
        return _Drafts(*(torch.stack(column, dim=1) for column in (states, means, stds)))

    def _count(self, images: list[int], steps: list[int], lengths: list[int], committed: list[int]) -> None:
        for image, step, length, count in zip(images, steps, lengths, committed, strict=True):
            if image < 0:
                continue
            self.stats.rounds_per_image[image] += 1
            self.stats.tested_by_step[step : step + min(count, length - 1)] += 1
            self.stats.accepted_by_step[step : step + count - 1] += 1

    def _explain_non_finite(self, outcome: Coupling, drafts: _Drafts, lengths: list[int]) -> None:
        """Raise for the first live slot whose committed state is not finite; idle slots hold nothing of meaning."""
        for slot, length in enumerate(lengths):
            if length == 0 or bool(outcome.next_states[slot].isfinite().all()):
                continue
            row = int(outcome.committed[slot]) - 1
            drafted = drafts.states[slot, : row + 2], drafts.mean[slot, : row + 1], drafts.std[slot, : row + 1]
            own = all(bool(part.isfinite().all()) for part in drafted)
            culprit = "the target's output" if own else "the output drafted by drafter and head"
            _raise_non_finite("sample", culprit, int(self.steps[slot]) + row, int(self.images[slot]))
