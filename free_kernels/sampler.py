"""``sample`` and ``ancestral_sample``: the speculative loop and the ordinary one."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from free_kernels.chain import NOISE_CHUNK_ELEMENTS, Chain, make_chain
from free_kernels.drafters import as_drafter
from free_kernels.hoisting import hoisted
from free_kernels.noise import Purpose
from free_kernels.ops.coupling import BACKENDS, Coupling, couple
from free_kernels.ops.packing import commit_drafts, pack_drafts
from free_kernels.policy import SlackPolicy
from free_kernels.schedule import DDPMSchedule
from free_kernels.types import Callback, Drafter, RoundInfo, SampleResult, SampleStats
from free_kernels.validation import check_choice, check_float, check_int, fail


@torch.no_grad()
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
    chain = make_chain(where, target, class_labels, schedule, guidance_scale, guidance_channels, seed, noise)
    count, num_steps = len(chain.labels), len(chain.timesteps)
    slots = count if max_slots is None else check_int(where, "max_slots", max_slots, 1)
    chain = chain.hoisted()
    stats = SampleStats(
        rounds_per_image=np.full(count, num_steps),
        tested_by_step=np.zeros(num_steps, np.int64),
        accepted_by_step=np.zeros(num_steps, np.int64),
    )
    samples = chain.initial_states()
    with tqdm(total=count * num_steps, desc=where, unit="step", disable=not progress) as bar:
        for images in torch.arange(count, device=samples.device).split(slots):
            x, labels = samples[images], chain.branched(chain.labels[images])
            chunk = max(1, NOISE_CHUNK_ELEMENTS // x.numel())
            for step in range(num_steps):
                if step % chunk == 0:
                    ahead = torch.arange(step, min(step + chunk, num_steps), device=x.device)
                    keys = images.unsqueeze(1).repeat(1, len(ahead))
                    draws = chain.draw(Purpose.STEP, keys, ahead.repeat(len(images), 1))
                t = chain.timesteps[step].expand(len(labels))
                output = chain.head(chain.features(chain.doubled(x), t, labels), t, labels)
                if not bool(output.isfinite().all()):
                    bad = (~output.isfinite()).flatten(1).any(1).nonzero()[0, 0] % len(images)
                    chain.raise_non_finite("the target's output", step, int(images[bad]))
                mean, std = chain.transition(x, output, chain.table[step : step + 1])
                x = torch.addcmul(mean, std, draws[:, step % chunk])
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


def _other_backend(backend: str) -> str:
    """Packing and noise have no Triton kernels: their best implementation, unless the reference is asked for."""
    return "reference" if backend == "reference" else "auto"


@torch.no_grad()
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
        backend: of the coupling: ``"auto"`` (Triton on a GPU), ``"reference"`` (plain PyTorch for every op) or
            ``"triton"`` (an error where it cannot run).
        progress: show a progress bar.
        callback: called with a :class:`RoundInfo` after every round.

    Returns:
        ``samples`` float32 ``[N, C, H, W]`` and ``stats``.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        RuntimeError: ``backend="triton"`` cannot be used; the message says why.
        FloatingPointError: a network output is not finite; the message names step and image.
    """
    where = "sample"
    started = time.perf_counter()
    check_choice(where, "backend", backend, BACKENDS)
    chain = make_chain(
        where, target, class_labels, schedule, guidance_scale, guidance_channels, seed, noise, _other_backend(backend)
    )
    length = check_int(where, "draft_length", draft_length, 1, len(chain.timesteps))
    if check_float(where, "relaxation", relaxation, 0.0) != 0.0:
        fail(where, "relaxation", "0 (relaxed acceptance is not available in this version)", f"{relaxation:g}")
    check_choice(where, "verification", verification, ("token",))
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

    def __init__(self, chain: Chain, drafter: Drafter, length: int, slots: int, backend: str) -> None:
        self.chain, self.length, self.backend = chain.hoisted(), length, backend
        self.packing_backend = _other_backend(backend)
        device = chain.labels.device
        self.drafter: Drafter = hoisted(drafter, chain.timesteps, chain.used_labels)
        self.drafter_is_free = getattr(drafter, "is_free", False)
        # A waiting image's entry holds its initial noise until the image itself replaces it.
        self.samples = chain.initial_states()
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
            self.packing_backend,
        )
        features = chain.features(x, t, y)
        output = chain.head(features, t, y)
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
        if not bool(output.isfinite().all() & outcome.next_states.isfinite().all()):
            self._check_committed(outcome, drafts, output, lengths)
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
            backend=self.packing_backend,
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
            return _Drafts(torch.stack(states, dim=1), none, none)
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
            if drafted.shape != (len(t), *chain.target.feature_shape):
                fail("sample", "drafter's output", f"[R, T, D] = {[len(t), *chain.target.feature_shape]}", drafted)
            self.stats.drafter_calls += not self.drafter_is_free
            mean, std = chain.transition(state, chain.head(drafted, t, y), pick(columns[:, j]))
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

    def _check_committed(self, outcome: Coupling, drafts: _Drafts, output: Tensor, lengths: list[int]) -> None:
        """Raise if a row that was decided holds a NaN or an infinity; discarded rows may hold anything."""
        first = 0
        for slot, length in enumerate(lengths):
            for j in range(int(outcome.committed[slot])):
                row = output.unflatten(0, (self.chain.branches, -1))[:, first + j]
                drafted = (drafts.mean[slot, j], drafts.std[slot, j]) if j < length - 1 else ()
                for culprit, parts in (
                    ("the output drafted by drafter and head", drafted),
                    ("the target's output", (row,)),
                    ("the next state", (outcome.next_states[slot],) if j == outcome.committed[slot] - 1 else ()),
                ):
                    if not all(bool(part.isfinite().all()) for part in parts):
                        self.chain.raise_non_finite(culprit, int(self.steps[slot]) + j, int(self.images[slot]))
            first += length
