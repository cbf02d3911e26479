"""The speculative loop: which rows each round has, and what the host does between two rounds."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from free_kernels.conditioning import hoisted
from free_kernels.constants import Purpose
from free_kernels.drafters import as_drafter, own_drafter
from free_kernels.protocols import NoiseDefaults, first_drafted_in_rounds
from free_kernels.results import RoundInfo, SampleStats
from free_kernels.sampling.cuda_graphs import check_capturable, check_cuda_graphs
from free_kernels.sampling.job import NOISE_CHUNK_ELEMENTS, Job
from free_kernels.sampling.round import RoundReport, Rounds
from free_kernels.sampling.run_stats import RunStats
from free_kernels.sampling.slots import Slots
from free_kernels.sampling.target_call import TargetCall
from free_kernels.steering.length_policy import LONGEST, DraftLengthPolicy, knowledge_of
from free_kernels.steering.relaxation import as_relaxation
from free_kernels.steering.seen_steps import SeenSteps
from free_kernels.validation import fail


class Speculation:
    """A speculative run of a job.

    Args:
        job: all images, and how they are sampled.
        dense: rounds of fixed shapes, as for CUDA graphs, without them.
        bounded: hold the state of few images, not of all.

    Raises:
        ValueError, TypeError: an option is wrong, or does not fit the target; the message names it.
        RuntimeError: the backend cannot be used.
    """

    def __init__(self, job: Job, *, dense: bool = False, bounded: bool = False) -> None:
        options = job.options
        where, num_steps, count = job.where, len(job.timesteps), len(job.labels)
        slots = count if options.max_slots is None else min(count, int(options.max_slots))
        if options.block and NoiseDefaults.read(job.noise, "covers_steps"):
            # A decision that looks at all drafts needs new noise every round; a tensor has one of each step.
            fail(where, "noise", "initial states only with verification 'block'", "noise of every step")
        check_cuda_graphs(where, options.cuda_graphs, job.labels.device)
        check_capturable(where, options.cuda_graphs, job.target)
        drafter = as_drafter(where, options.drafter, job.target)
        relaxation = as_relaxation(where, options.relaxation, job.learned, options.verification)
        automatic = options.length == "auto"
        length = min(LONGEST[-1], num_steps) if automatic else int(options.length)
        self._room = job.room
        if length > 1 and max(self._room) == 1:
            fail(
                where, "schedule", "one whose steps add noise (draft_length=1 for the ordinary chain)", "steps without"
            )
        self.job, self.length = job.hoisted(), length
        self._first_drafted, self._drafter_is_hoisted = first_drafted_in_rounds(drafter), False
        self.slots = Slots(self.job, slots, 3 * slots if bounded else None, length, options.packing_backend)
        self.run_stats = RunStats(count, num_steps, job.labels.device)
        self.rounds = Rounds(
            self.job,
            self.slots,
            drafter,
            TargetCall(self.job),
            self.run_stats,
            length=length,
            relaxation=relaxation,
            dense=dense,
        )
        refused = self.rounds.refused
        self._seen = SeenSteps(slots, 0 if refused is None else refused.rows - 1)
        self.policy: DraftLengthPolicy | None = None
        if automatic:
            owner = getattr(job.target, "module", job.target)
            kind = options.block, options.backend, options.cuda_graphs, options.reuse_refused, relaxation
            kind += job.branches, job.guidance_level, job.learned, str(job.labels.device)
            own = own_drafter(where, options.drafter)
            known = knowledge_of(owner, drafter, kind, num_steps, slots, own)
            # With block verification a row drafts again only where the next round begins.
            reuses = self._seen.most > 1
            settings = {"reuses": reuses, "room": self._room, "free": self.rounds.frozen_steps}
            self.policy = DraftLengthPolicy(num_steps, length, known, self._first_drafted, **settings)

    @property
    def stats(self) -> SampleStats:
        """What the run did so far."""
        return self.run_stats.stats

    @property
    def samples(self) -> Tensor:
        """``[B, C, H, W]``, the pool's rows; all images in order where it has a row for each."""
        return self.slots.pool.samples

    @torch.no_grad()
    def run(self) -> None:
        """Rounds until every image is finished."""
        for _ in self._played():
            pass

    @torch.no_grad()
    def iterate(self) -> Iterator[list[tuple[int, Tensor]]]:
        """Rounds until every image is finished; after each, the images that it finished: index and ``[C, H, W]``.

        The tensors are the pool's own rows, which later rounds give to other images.
        """
        yield from self._played()

    def _played(self) -> Iterator[list[tuple[int, Tensor]]]:
        """As :meth:`iterate`, for a caller who has switched gradients off: doing so takes long in every round."""
        num_steps, count, pool = len(self.job.timesteps), len(self.job.labels), self.slots.pool
        callback, done, played = self.job.options.callback, 0, 0
        now = RoundReport([], self.slots.images.tolist(), self.slots.steps.tolist(), [])
        bar = tqdm(total=count * num_steps, desc="sample", unit="step", disable=not self.job.options.progress)
        try:
            while done < count:
                began = time.perf_counter()
                lengths = self._lengths(now)
                if max(lengths) > 1:
                    # Hoisting is done once for the run, so its time is not counted as the round's.
                    began += self._prepare_drafter(now)
                ordinary = self._ordinary_steps_ahead(lengths, now)
                after = self._ordinary_steps(now, ordinary) if ordinary else self.rounds.play(lengths, now)
                self._account(now, lengths, after, ordinary, time.perf_counter() - began)
                played += max(1, ordinary)
                reached = [
                    (row, step + committed)
                    for row, step, committed in zip(now.images, now.steps, after.committed, strict=True)
                    if row >= 0
                ]
                finished = [(pool.images[row], pool.samples[row]) for row, step in reached if step == num_steps]
                done += len(finished)
                bar.update(sum(after.committed))
                if callback is not None:
                    self.run_stats.sum_counts()
                    images = [pool.images[row] for row, _ in reached]
                    callback(RoundInfo(played, images, [step for _, step in reached], done, count))
                if finished:
                    self.run_stats.gather()
                yield finished
                moved = pool.advance(after.images)
                if moved is not None:
                    self.slots.images.copy_(torch.tensor(moved, device="cpu"))
                now = after if moved is None else after._replace(images=moved)
        finally:
            bar.close()
            self.run_stats.sum_counts()

    def _account(
        self, before: RoundReport, lengths: list[int], after: RoundReport, ordinary: int, seconds: float
    ) -> None:
        """Let the length policy and the stats learn from a round, or from so many ``ordinary`` steps."""
        images = [-1 if row < 0 else self.slots.pool.images[row] for row in before.images]
        if ordinary:
            self.run_stats.count_ordinary(images, ordinary)
        else:
            self.run_stats.count(images, before.steps, lengths, after.committed)
        if self.policy is not None and ordinary:
            self.policy.observe_ordinary(len(images), ordinary, seconds)
            self._seen.forget()
        elif self.policy is not None:
            live = [image >= 0 for image in images]
            self.policy.observe(live, before.steps, lengths, after.committed, seconds)
            self._seen.played(lengths, after.committed, after.steps)

    def _lengths(self, now: RoundReport) -> list[int]:
        """Rows of every slot in the next round."""
        if self.policy is not None:
            return self.policy.choose([row >= 0 for row in now.images], now.steps, self._seen.counts)
        return [
            0 if image < 0 else (1 if step < self._first_drafted else min(self.length, self._room[step]))
            for image, step in zip(now.images, now.steps, strict=True)
        ]

    def _prepare_drafter(self, now: RoundReport) -> float:
        """Make the drafter ready for a round with drafts; returns the seconds that it took once for the run."""
        rounds, job, seconds = self.rounds, self.job, 0.0
        if not self._drafter_is_hoisted:
            began = time.perf_counter()
            rounds.drafter = hoisted(rounds.drafter, job.timesteps, job.used_labels)
            self._drafter_is_hoisted, seconds = True, time.perf_counter() - began
        if self._first_drafted == 0 and 0 in now.steps and not rounds.frozen_steps:
            guess = rounds.drafter.initial_feature(job.shaped(self.slots.state))
            shape = len(self.slots), *job.feature_shape
            if not isinstance(guess, Tensor) or guess.shape != shape:
                fail(job.where, "drafter.initial_feature", f"[R, T, D] = {list(shape)}", guess)
            self.slots.set_first_parents(guess)
        return seconds

    def _ordinary_steps_ahead(self, lengths: list[int], now: RoundReport) -> int:
        """How many of the next rounds are ordinary steps of every slot, to be taken at once; 0 for a round."""
        if self.policy is None or self.job.options.cuda_graphs or max(lengths) > 1 or min(now.images) < 0:
            return 0
        # With a callback, one step at a time: it is called after every step.
        most = 1 if self.job.options.callback else max(1, NOISE_CHUNK_ELEMENTS // self.slots.state.numel())
        return min(self.policy.ordinary_ahead, len(self.job.timesteps) - max(now.steps), most)

    def _ordinary_steps(self, now: RoundReport, count: int) -> RoundReport:
        """``count`` steps of every slot, perhaps including its last, without drafts and packing."""
        job, slots = self.job, self.slots
        ahead = torch.arange(count, device=slots.state.device).unsqueeze(1)
        at, keys = slots.steps + ahead, slots.indices.repeat(count, 1)
        noise = job.draw(Purpose.STEP, keys, at, slots.rounds + ahead if self.job.options.block else None)
        t, columns, y = job.timesteps[at], job.table[at], job.branched(slots.labels)
        scales = [None] * count if job.scales is None else job.scales.at(at, keys)
        images = [slots.pool.images[row] for row in now.images]
        for i in range(count):
            given = slots.state, job.doubled(t[i]), y, columns[i], noise[i], scales[i]
            step = job.ordinary_step(self.rounds.network, *given)
            job.check_finite([k + i for k in now.steps], images, step.output, step.state)
            self.run_stats.called(len(slots))
            if i < count - 1:
                # There is no CUDA graph that reads these buffers, so the two can be exchanged instead of copied.
                slots.previous, slots.state = slots.state, step.state
        slots.steps += count - 1
        slots.rounds += count - 1
        self.rounds.commit_steps(step.state, step.output, step.features)
        return RoundReport([count] * len(slots), slots.images.tolist(), slots.steps.tolist(), [0] * len(slots))
