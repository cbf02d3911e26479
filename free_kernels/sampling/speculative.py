"""The speculative loop: rounds of drafting, one packed target call, coupling and committing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from free_kernels.conditioning import hoisted
from free_kernels.ops.coupling import Coupling, couple, couple_block, couple_block_philox, couple_philox
from free_kernels.ops.packing import commit_drafts, pack_drafts
from free_kernels.ops.triton_runtime import use_triton
from free_kernels.protocols import Drafter, first_drafted_step, new_memory
from free_kernels.results import Callback, RoundInfo, SampleStats
from free_kernels.sampling.cuda_graphs import CapturedCalls, row_bucket
from free_kernels.sampling.drafting import Drafts, RefusedDrafts, draft_states
from free_kernels.sampling.image_pool import ImagePool
from free_kernels.sampling.job import NOISE_CHUNK_ELEMENTS, Chain
from free_kernels.sampling.noise import PhiloxNoise, Purpose
from free_kernels.sampling.run_stats import RunFigures
from free_kernels.sampling.target_call import PackedCall
from free_kernels.steering.length_policy import LONGEST, DraftLengthPolicy
from free_kernels.steering.relaxation import Relaxation, RelaxationPolicy
from free_kernels.validation import fail


def packing_backend(backend: str) -> str:
    """Packing has no Triton kernels, noise more than one kernel: the best one, unless the reference is asked for."""
    return "reference" if backend == "reference" else "auto"


@dataclass(frozen=True)
class Settings:
    """How a run speculates.

    Attributes:
        length: L, rows of a round for one image; the most of them with ``draft_length``.
        draft_length: chooses the rows of each round; always L if None.
        relaxation: loosens acceptance; None is lossless.
        block: verify a round's drafts as a whole instead of one by one.
        backend: of the coupling.
        dense: every slot drafts in every pass, whether its drafts are used or not, and row counts come in few sizes,
            so that all shapes are fixed: what a CUDA graph and a drafter with a memory need.
        cuda_graphs: replay a round as a CUDA graph.
        pool_rows: rows of the image pool; one for every image if None.
    """

    length: int
    draft_length: DraftLengthPolicy | None = None
    relaxation: Relaxation | None = None
    block: bool = False
    backend: str = "auto"
    dense: bool = False
    cuda_graphs: bool = False
    pool_rows: int | None = None


class Round(NamedTuple):
    """What a round leaves.

    Attributes:
        drafts: of the drafting pass.
        output: ``[B R, C or 2C, H, W]``, the packed target call's.
        outcome: what was committed.
        report: int64 ``[3 S + 1]``: committed steps, then images and steps of every slot after the round, then whether
            everything is finite. The one thing that the host waits for.
    """

    drafts: Drafts
    output: Tensor
    outcome: Coupling
    report: Tensor


class Speculation:
    """The state of a speculative run: S slots, each with an image at its own step.

    Args:
        chain: the job.
        drafter: drafts features.
        slots: S.
        settings: how it speculates.
    """

    def __init__(self, chain: Chain, drafter: Drafter, slots: int, settings: Settings) -> None:
        self.chain, self.settings = chain.hoisted(), settings
        self.packing_backend = packing_backend(settings.backend)
        device, images, num_steps = chain.labels.device, len(chain.labels), len(chain.timesteps)
        # A kernel that makes its noise itself spares two tensors of the size of all drafts.
        op = "couple_block" if settings.block else "couple"
        in_triton = use_triton(op, "coupling", device, settings.backend)
        self.makes_noise = type(chain.noise) is PhiloxNoise and in_triton
        self.drafter, self._hoisted = drafter, False
        self.drafter_is_free = getattr(drafter, "is_free", False)
        self.first_drafted = first_drafted_step(drafter)
        self.pool = ImagePool(chain, slots, settings.pool_rows)
        # Rows of the pool.
        self.images = torch.arange(slots, device=device)
        self.labels = self.pool.labels[:slots].clone()
        self.steps = torch.zeros_like(self.images)
        self.lengths = torch.zeros_like(self.images)
        self.state = self.pool.samples[:slots].clone()
        self.previous = torch.zeros_like(self.state)
        # Allocated with the first parents or the first features; step 0 has no exact one.
        self.parent: Tensor | None = None
        relaxation = settings.relaxation
        self.relaxation = None if relaxation is None else RelaxationPolicy(relaxation, slots, device)
        drafts = settings.length - 1
        self.memory = new_memory(drafter, slots, chain.branches, drafts) if drafts else None
        # A memory holds one call a step.
        self.refused = RefusedDrafts(self.state, chain.branches) if drafts and self.memory is None else None
        self.dense = settings.dense or settings.cuda_graphs or self.memory is not None
        # Rounds of the image in each slot so far: part of the noise keys where a decision looks at all drafts.
        self.rounds = torch.zeros_like(self.images)
        self.network = PackedCall(self.chain)
        self.graphs = self._captured_rounds() if settings.cuda_graphs else None
        self.figures = RunFigures(images, num_steps, device)

    @property
    def stats(self) -> SampleStats:
        """What the run did so far."""
        return self.figures.stats

    @property
    def samples(self) -> Tensor:
        """``[B, C, H, W]``, the pool's rows; all images in order where it has a row for each."""
        return self.pool.samples

    def run(self, progress: bool, callback: Callback | None) -> None:
        """Rounds until every image is finished."""
        for _ in self.iterate(progress, callback):
            pass

    @torch.no_grad()
    def iterate(self, progress: bool, callback: Callback | None) -> Iterator[list[tuple[int, Tensor]]]:
        """Rounds until every image is finished; after each, the images that it finished: index and ``[C, H, W]``.

        The tensors are the pool's own rows, which later rounds give to other images.
        """
        num_steps, count, slots = len(self.chain.timesteps), len(self.chain.labels), len(self.images)
        images, steps, done, rounds = self.images.tolist(), self.steps.tolist(), 0, 0
        with tqdm(total=count * num_steps, desc="sample", unit="step", disable=not progress) as bar:
            while done < count:
                began = time.perf_counter()
                lengths = self._lengths(images, steps)
                if not self._hoisted and max(lengths) > 1:
                    # The run's, not the round's.
                    began += self._hoist_drafter()
                if self.first_drafted == 0 and 0 in steps and max(lengths) > 1:
                    self._set_first_parents()
                ordinary = self._ordinary_steps_ahead(lengths, images, steps, singly=callback is not None)
                if ordinary:
                    report = self._ordinary_steps(images, steps, ordinary)
                else:
                    report = self._checked_round(lengths, images, steps)
                committed = report[:slots]
                policy, taken = self.settings.draft_length, time.perf_counter() - began
                if policy is not None and ordinary:
                    policy.observe_ordinary(slots, ordinary, taken)
                elif policy is not None:
                    policy.observe(np.asarray(images) >= 0, *map(np.asarray, (steps, lengths, committed)), taken)
                rounds += max(1, ordinary)
                names = self.pool.images
                now = [(row, step + c) for row, step, c in zip(images, steps, committed, strict=True) if row >= 0]
                finished = [(names[row], self.pool.samples[row]) for row, step in now if step == num_steps]
                done += len(finished)
                held = [-1 if row < 0 else names[row] for row in images]
                if ordinary:
                    self.figures.count_ordinary(held, ordinary)
                else:
                    self.figures.count(held, steps, lengths, committed)
                bar.update(sum(committed))
                if callback is not None:
                    callback(RoundInfo(rounds, [names[row] for row, _ in now], [s for _, s in now], done, count))
                yield finished
                images, steps = report[slots : 2 * slots], report[2 * slots :]
                moved = self.pool.advance(images)
                if moved is not None:
                    images = moved
                    self.images.copy_(torch.tensor(moved))
        self.figures.finish()

    def _hoist_drafter(self) -> float:
        """Before its first drafts, which automatic lengths may never make; returns the seconds that it took."""
        began = time.perf_counter()
        chain, self._hoisted = self.chain, True
        self.drafter = hoisted(self.drafter, chain.timesteps, chain.used_labels)  # type: ignore[assignment]
        return time.perf_counter() - began

    def _set_first_parents(self) -> None:
        """Give images at their first step what the drafter takes for a parent there."""
        guess = self.drafter.initial_feature(self.state)  # type: ignore[attr-defined]
        shape = len(self.state), *self.chain.target.feature_shape
        if not isinstance(guess, Tensor) or guess.shape != shape:
            fail(self.chain.where, "drafter.initial_feature", f"[R, T, D] = {list(shape)}", guess)
        guess = guess.expand(self.chain.branches, -1, -1, -1)
        fresh = (self.steps == 0).view(-1, 1, 1)
        if self.parent is None:
            self.parent = guess.contiguous()
        else:
            self.parent.copy_(torch.where(fresh, guess, self.parent))
        self.previous.copy_(torch.where(fresh.unsqueeze(-1), self.state, self.previous))

    def _keep_parents_like(self, features: Tensor) -> Tensor:
        """The parents' buffer ``[B, S, T, D]``, of the dtype of the target's features."""
        if self.parent is None:
            self.parent = features.new_zeros(self.chain.branches, len(self.images), *features.shape[1:])
        elif self.parent.dtype != features.dtype:
            self.parent = self.parent.to(features.dtype)
        return self.parent

    def _lengths(self, images: list[int], steps: list[int]) -> list[int]:
        """Rows of every slot in the next round."""
        if self.settings.draft_length is not None:
            return self.settings.draft_length.choose(np.asarray(images) >= 0, np.asarray(steps)).tolist()
        length, num_steps = self.settings.length, len(self.chain.timesteps)
        return [
            0 if image < 0 else (1 if step < self.first_drafted else min(length, num_steps - step))
            for image, step in zip(images, steps, strict=True)
        ]

    def _ordinary_steps_ahead(self, lengths: list[int], images: list[int], steps: list[int], singly: bool) -> int:
        """Rounds from here on that are ordinary steps of every slot; ``singly``: one at most."""
        policy = self.settings.draft_length
        if policy is None or self.graphs is not None or max(lengths) > 1 or min(images) < 0:
            return 0
        fitting = max(1, NOISE_CHUNK_ELEMENTS // self.state.numel())
        return min(policy.ordinary_ahead, len(self.chain.timesteps) - max(steps), 1 if singly else fitting)

    def _checked_round(self, lengths: list[int], images: list[int], steps: list[int]) -> list[int]:
        """A round; returns committed steps, then images and steps of every slot after it."""
        outcome = self._round(lengths)
        *report, finite = outcome.report.tolist()
        committed = report[: len(images)]
        if not finite:
            self._check_committed(outcome, lengths, committed, steps, images)
        if self.refused is not None:
            self.refused.slots = [i for i, (c, length) in enumerate(zip(committed, lengths, strict=True)) if c < length]
        return report

    def _ordinary_steps(self, images: list[int], steps: list[int], count: int) -> list[int]:
        """``count`` steps of every slot, perhaps including its last, without drafts and packing; returns as a round."""
        chain, slots = self.chain, len(images)
        ahead = torch.arange(count, device=self.state.device).unsqueeze(1)
        at, keys = self.steps + ahead, self._keys().repeat(count, 1)
        noise = chain.draw(Purpose.STEP, keys, at, self.rounds + ahead if self.settings.block else None)
        t, columns, y = chain.timesteps[at], chain.table[at], chain.branched(self.labels)
        names = [self.pool.images[row] for row in images]
        for i in range(count):
            now = chain.doubled(t[i])
            features, output = self.network(chain.doubled(self.state), now, y)
            mean, std = chain.transition(self.state, output, columns[i])
            chain.check_output(output, [step + i for step in steps], names)
            after = torch.addcmul(mean, std, noise[i])
            self.network.settle()
            self.figures.called(slots)
            if i < count - 1:
                # No graph holds on to these buffers here, so they change places instead of contents.
                self.previous, self.state = self.state, after
        if self.refused is not None:
            self.refused.forget()
        self.steps += count - 1
        self.rounds += count - 1
        rows = torch.arange(slots + 1, device=self.state.device)
        self._commit(torch.ones_like(self.steps), after, self.state.unsqueeze(1), features, rows)
        return [count] * slots + torch.cat([self.images, self.steps]).tolist()

    def _round(self, lengths: list[int]) -> Round:
        """Draft, verify, couple and commit one round of ``lengths`` rows."""
        longest, rows = max(lengths), sum(lengths)
        self.lengths.copy_(torch.tensor(lengths))
        if not self.dense:
            result = self._play(longest, rows, lengths)
        else:
            longest = self._graph_length(longest)
            rows = row_bucket(rows, longest * len(lengths))
            result = self._play(longest, rows) if self.graphs is None else self.graphs((longest, rows))
        self.figures.called(sum(lengths), 0 if self.drafter_is_free else longest - 1)
        return result

    def _graph_length(self, longest: int) -> int:
        """Drafts come in few lengths where shapes are fixed."""
        if longest == 1 or self.settings.draft_length is None:
            return 1 if longest == 1 else self.settings.length
        return next((length for length in LONGEST if length >= longest), self.settings.length)

    def _play(self, longest: int, rows: int, lengths: list[int] | None = None) -> Round:
        """A round of at most ``longest`` rows a slot and ``rows`` in all; without ``lengths`` shapes are fixed."""
        chain, device = self.chain, self.state.device
        num_steps = len(chain.timesteps)
        steps = (self.steps.unsqueeze(1) + torch.arange(longest, device=device)).clamp_(max=num_steps - 1)
        columns = chain.table[steps]
        keys = self._keys().unsqueeze(1).repeat(1, longest)
        rounds = self.rounds.unsqueeze(1).repeat(1, longest) if self.settings.block else None
        noise = None if self.makes_noise else chain.draw(Purpose.STEP, keys, steps, rounds)

        drawn = self._step_noise if noise is None else lambda steps, j: noise[:, j]
        drafts = draft_states(
            chain,
            self.drafter,
            self.state,
            self.previous,
            self.parent,
            self.labels,
            steps,
            columns,
            lengths,
            drawn,
            self.memory,
            self.refused,
        )
        x, t, y, row_offsets = pack_drafts(
            drafts.states,
            self.lengths,
            self.steps,
            self.labels,
            chain.timesteps,
            rows,
            chain.null,
            self.packing_backend,
        )
        features, output = self.network(x, t, y)
        weights = None
        if self.relaxation is not None and longest > 1:
            weights = self.relaxation.weights(drafts.std, columns)
        options: dict[str, Any] = {
            "guidance_scale": chain.guidance_scale,
            "guidance_channels": chain.guidance_channels,
            "clip": chain.clip,
            "backend": self.settings.backend,
        }
        if noise is None:
            images = self._keys() + chain.noise.first_image
            keyed = (*drafts, chain.noise.seed, images, steps, output, row_offsets, columns)
            if self.settings.block:
                outcome = couple_block_philox(*keyed, rounds=self.rounds, **options)
            else:
                outcome = couple_philox(*keyed, relaxation=weights, **options)
        else:
            slack_noise = chain.draw(Purpose.SLACK, keys, steps, rounds) if chain.learned and longest > 1 else None
            flat = None if rounds is None else rounds.view(-1)
            uniform = chain.noise.uniform(keys.view(-1), steps.view(-1), Purpose.ACCEPT, flat).view_as(steps)
            given = (*drafts, noise, slack_noise, uniform, output, row_offsets, columns)
            if self.settings.block:
                outcome = couple_block(*given, **options)
            else:
                outcome = couple(*given, relaxation=weights, **options)
        finite = output.isfinite().all() & outcome.next_states.isfinite().all()
        if longest > 1:
            self._learn(outcome, steps, weights)
        self.network.settle()
        if self.refused is not None:
            kept = (drafts.states, features, row_offsets, outcome.committed, self.lengths, outcome.next_states)
            self.refused.keep(*kept)
        self._commit(outcome.committed, outcome.next_states, drafts.states, features, row_offsets)
        report = torch.cat([outcome.committed, self.images, self.steps, finite.to(torch.int64).view(1)])
        return Round(drafts, output, outcome, report)

    def _commit(self, committed: Tensor, after: Tensor, states: Tensor, features: Tensor, row_offsets: Tensor) -> None:
        """Make steps final, as :func:`commit_drafts` does, and begin the images that move in."""
        num_steps = len(self.chain.timesteps)
        commit_drafts(
            committed,
            after,
            states,
            features,
            row_offsets,
            state=self.state,
            previous=self.previous,
            parent=self._keep_parents_like(features),
            steps=self.steps,
            images=self.images,
            labels=self.labels,
            samples=self.pool.samples,
            all_labels=self.pool.labels,
            queue=self.pool.queue,
            num_steps=num_steps,
            backend=self.packing_backend,
        )
        fresh = self.steps == 0
        self.rounds.add_(1).masked_fill_(fresh, 0)
        if self.relaxation is not None:
            self.relaxation.reset(fresh)
        if self.memory is not None:
            # Call j saw the state of row j, which holds if that row was committed; a new image has no past at all.
            calls = states.shape[1] - 1
            kept = torch.minimum(committed, self.lengths - 1).clamp_(0, calls).masked_fill_(fresh, -num_steps)
            self.memory.rewind(calls - kept)

    def _learn(self, outcome: Coupling, steps: Tensor, weights: Tensor | None) -> None:
        """Whatever is learned from tested rows: those up to and including a slot's first refused one."""
        drafts = outcome.gap_sq.shape[1]
        count = torch.minimum(outcome.committed, self.lengths - 1)
        tested = torch.arange(drafts, device=count.device) < count.unsqueeze(1)
        if weights is not None:
            self.relaxation.update(outcome, tested)
            weights = weights[:, :drafts]
        self.figures.gather(self._keys(), steps[:, :drafts], outcome.gap_sq, tested, weights)

    def _keys(self) -> Tensor:
        """The job's image in each slot ``[S]``; any of them where a slot is idle."""
        return self.pool.indices[self.images.clamp(min=0)]

    def _step_noise(self, steps: Tensor, j: int) -> Tensor:
        """Noise ``[S, C, H, W]`` of draft ``j`` of every slot, whose rows are at ``steps [S, L]``."""
        rounds = self.rounds.unsqueeze(1) if self.settings.block else None
        keys = self._keys().unsqueeze(1), steps[:, j : j + 1].contiguous()
        return self.chain.draw(Purpose.STEP, *keys, rounds).squeeze(1)

    def _captured_rounds(self) -> CapturedCalls[Round]:
        """Rounds as graphs, by (longest, rows); with no rows in use a round commits nothing."""
        preserved = [self.lengths, self.rounds]
        if self.relaxation is not None:
            preserved.append(self.relaxation.running)
        return CapturedCalls(lambda key: self._play(*key), preserved, self.lengths.zero_, self.state.device)

    def _check_committed(
        self, outcome: Round, lengths: list[int], committed: list[int], steps: list[int], images: list[int]
    ) -> None:
        """Raise if a row that was decided holds a NaN or an infinity; discarded rows may hold anything."""
        drafts, first = outcome.drafts, 0
        for slot, length in enumerate(lengths):
            for j in range(committed[slot]):
                row = outcome.output.unflatten(0, (self.chain.branches, -1))[:, first + j]
                drafted = (drafts.mean[slot, j], drafts.std[slot, j]) if j < length - 1 else ()
                for culprit, parts in (
                    ("the output drafted by drafter and head", drafted),
                    ("the target's output", (row,)),
                    ("the next state", (outcome.outcome.next_states[slot],) if j == committed[slot] - 1 else ()),
                ):
                    if not all(bool(part.isfinite().all()) for part in parts):
                        self.chain.raise_non_finite(culprit, steps[slot] + j, self.pool.images[images[slot]])
            first += length
