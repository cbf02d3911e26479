"""A round: drafting, one packed target call, coupling and commit, on the slots of a speculative run."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from free_kernels.constants import Purpose
from free_kernels.extension import why_no_kernel
from free_kernels.ops.coupling import Coupling, couple, couple_block, couple_block_philox, couple_philox
from free_kernels.ops.packing import pack_drafts
from free_kernels.ops.random.api import signed_seed
from free_kernels.ops.rounds import DecideArguments, decide_round
from free_kernels.ops.triton_runtime import use_triton
from free_kernels.protocols import Drafter, DrafterDefaults, NoiseDefaults, TargetDefaults, frozen_steps, new_memory
from free_kernels.sampling.cuda_graphs import CapturedCalls, row_bucket
from free_kernels.sampling.draft_sources import Replayed, Source, clean_rows, draft_source, refused_rows
from free_kernels.sampling.drafting import DraftingPass, Drafts, NoiseKeys, Numbers
from free_kernels.sampling.job import Job, Network
from free_kernels.sampling.refused_rows import CleanRows, FeatureRows, KeptRound, RefusedRows
from free_kernels.sampling.run_stats import RunStats
from free_kernels.sampling.slots import Slots
from free_kernels.steering.length_policy import LONGEST
from free_kernels.steering.relaxation import Relaxation, RelaxationPolicy


class RoundReport(NamedTuple):
    """What the host learns of a round, in one read.

    Attributes:
        committed: steps that each slot committed.
        images: the pool's row in each slot after the round; negative where it is idle.
        steps: the step of each slot after the round.
        ahead: how many of the steps ahead of each slot have a refused row.
        finite: whether the target's output and the next states are finite.
    """

    committed: list[int]
    images: list[int]
    steps: list[int]
    ahead: list[int]
    finite: bool = True

    @staticmethod
    def pack(committed: Tensor, slots: Slots, ahead: Tensor, finite: Tensor) -> Tensor:
        """The report as one tensor, int64 ``[4 S + 1]``, still on the device."""
        return torch.cat([committed, slots.images, slots.steps, ahead, finite])

    @classmethod
    def read(cls, packed: Tensor) -> RoundReport:
        """A packed report; waits for the device."""
        said = packed.tolist()
        n = len(said) // 4
        return cls(said[:n], said[n : 2 * n], said[2 * n : 3 * n], said[3 * n : 4 * n], bool(said[-1]))


class Played(NamedTuple):
    """What a round leaves on the device.

    Attributes:
        drafts: of the drafting pass.
        output: ``[B R, C or 2C, H, W]``, the packed target call's.
        coupling: what was decided.
        report: a packed :class:`RoundReport`.
    """

    drafts: Drafts
    output: Tensor
    coupling: Coupling
    report: Tensor


def packed_values(values: Tensor, row_offsets: Tensor, rows: int) -> Tensor:
    """Of ``values [S, L]`` those of packed rows, ``[rows]``; of rows behind the last slot's any."""
    row = torch.arange(rows, device=values.device)
    slot = torch.searchsorted(row_offsets[1:-1], row, right=True)
    return values[slot, (row - row_offsets[slot]).clamp_(max=values.shape[1] - 1)]


class Rounds:
    """Plays rounds on the slots of a run.

    Args:
        job: the job, hoisted.
        slots: written by every round.
        drafter: drafts features.
        network: the target's packed call.
        stats: of the run; every round adds to them.
        length: L, the most rows of a round for one image.
        relaxation: loosens acceptance; None is lossless.
        dense: every slot drafts in every pass, whether its drafts are used or not, and row counts come in few sizes,
            so that all shapes are fixed: what a CUDA graph and a drafter with a memory need anyway.
    """

    def __init__(
        self,
        job: Job,
        slots: Slots,
        drafter: Drafter,
        network: Network,
        stats: RunStats,
        *,
        length: int,
        relaxation: Relaxation | None,
        dense: bool,
    ) -> None:
        self.job, self.slots, self.drafter, self.network = job, slots, drafter, network
        self.stats, self.options, self.length = stats, job.options, length
        self.backend = job.options.backend
        self._drafter_is_free = DrafterDefaults.read(drafter, "is_free")
        # A kernel that draws its noise itself saves two tensors of the size of all drafts.
        op, device = "couple_block" if job.options.block else "couple", slots.state.device
        in_kernel = use_triton(op, "coupling", device, job.options.backend)
        self.philox = NoiseDefaults.read(job.noise, "philox")
        self.kernel_noise = self.philox if in_kernel else None
        self.relaxation = None if relaxation is None else RelaxationPolicy(relaxation, len(slots), device)
        self.memory = new_memory(drafter, len(slots), job.branches, length - 1) if length > 1 else None
        self.refused = refused_rows(job, drafter, len(slots), length, memory=self.memory, backend=self.backend)
        self.frozen_steps = frozen_steps(job.where, drafter, len(job.timesteps), self.memory is not None)
        # Of the rounds before that step; a drafter that repeats its feature has them in all.
        self.clean: CleanRows | None = None
        if length > 1 and self.frozen_steps and not isinstance(self.refused, CleanRows):
            self.clean = clean_rows(job, len(slots), length, self.backend)
        self._kept: list[RefusedRows] = [rows for rows in (self.refused, self.clean) if rows is not None]
        self._feature_rows = next((rows for rows in self._kept if isinstance(rows, FeatureRows)), None)
        self._clean_rows = next((rows for rows in self._kept if isinstance(rows, CleanRows)), None)
        # Ops that follow one another are one call each for CPU tensors, where calls take longer than what they do.
        compiled = self.options.takes_compiled and why_no_kernel("decide_round_cpu", "cpu") is None
        self._at_once = compiled and not in_kernel
        # Features that arrive later than the output are not waited for before the coupling.
        self._decides_at_once = TargetDefaults.read(job.target, "packed_call") is None
        draws = self.philox is not None and self.philox.draws_rounds and self.philox.backend in ("auto", "extension")
        self._seed = signed_seed("sample", self.philox.seed) if draws else None
        self._no_rows = torch.zeros_like(slots.steps)
        self._coupling_settings: dict[str, Any] = {
            "guidance_scale": job.guidance_scale,
            "guidance_channels": job.guidance_channels,
            "clip": job.clip,
            "backend": job.options.backend,
        }
        # What `slots.lengths` holds, which most rounds have alike.
        self._sent: list[int] = []
        self.dense = dense or job.options.cuda_graphs or self.memory is not None
        self.graphs = self._captured() if job.options.cuda_graphs else None

    def play(self, lengths: list[int], before: RoundReport) -> RoundReport:
        """A round of so many rows of each slot.

        Args:
            lengths: rows of each slot.
            before: the last round's report, for error messages.

        Raises:
            FloatingPointError: a row that was decided holds a NaN or an infinity.
        """
        return self.read(self.start(lengths, before.steps), lengths, before)

    def read(self, played: Played, lengths: list[int], before: RoundReport) -> RoundReport:
        """The host's part of a round that :meth:`start` has begun; waits for it, and raises as :meth:`play`."""
        report = RoundReport.read(played.report)
        if not report.finite:
            self._check_committed(played, lengths, report.committed, before)
        if self.refused is not None:
            self.refused.counts = report.ahead
        return report

    def start(self, lengths: list[int], steps: list[int]) -> Played:
        """The device's part of a round of so many rows of each slot; only the lengths are sent there.

        Args:
            lengths: rows of each slot.
            steps: step of each slot, which the device knows.
        """
        longest, rows = max(lengths), sum(lengths)
        if lengths != self._sent:
            self.slots.lengths.copy_(torch.tensor(lengths, device="cpu"))
            self._sent = list(lengths)
        calls, sources = longest - 1, Source.DRAFTER
        late: list[int] | None = None
        if self.clean is not None:
            # Rows of each slot in the drafter's pass.
            late = [min(n, 1) if k < self.frozen_steps else n for n, k in zip(lengths, steps, strict=True)]
            sources, calls = self._sources(lengths, late), max(late) - 1
        if not self.dense:
            played = self.play_on_device(longest, rows, sources, lengths, late)
        else:
            longest = self._bucket_length(longest)
            rows, calls = row_bucket(rows, longest * len(lengths)), longest - 1 if calls > 0 else 0
            key = longest, rows, sources
            played = self.play_on_device(*key) if self.graphs is None else self.graphs(key)
        self.stats.called(sum(lengths), 0 if self._drafter_is_free else max(calls, 0))
        return played

    @staticmethod
    def _sources(lengths: list[int], late: list[int]) -> Source:
        """What drafts a round of so many rows of each slot, of which ``late`` are in the drafter's pass."""
        if max(late) <= 1:
            return Source.CLEAN
        return Source.DRAFTER if late == lengths else Source.CLEAN | Source.DRAFTER

    def play_on_device(
        self,
        longest: int,
        rows: int,
        sources: Source = Source.DRAFTER,
        lengths: list[int] | None = None,
        late: list[int] | None = None,
    ) -> Played:
        """A round of at most ``longest`` rows a slot and ``rows`` in all; without ``lengths`` shapes are fixed.

        Nothing here waits for the device, and with fixed shapes nothing comes from the host. With both sources,
        ``late`` are the rows of each slot in the drafter's pass.
        """
        job, slots = self.job, self.slots
        at_once = self._at_once and slots.state.is_cpu
        keys = self._noise_keys(longest) if at_once and self._seed is not None else None
        drafting = DraftingPass(job, slots, longest, lengths, keys)
        steps, columns, numbers = drafting.steps, drafting.columns, drafting.numbers
        if numbers is None and self.kernel_noise is None:
            numbers = self._numbers(steps)
        if numbers is not None:
            drafting.noise = numbers.noise
        elif longest > 1:
            drafting.noise = self._draw(Purpose.STEP, steps)
        if longest > 1:
            self._draft(drafting, sources, late)
        drafts = drafting.drafts
        x, t, y, row_offsets = pack_drafts(
            drafts.states, slots.lengths, slots.steps, slots.labels, job.timesteps, rows, job.null, slots.backend
        )
        output, wait = self.network(x, t, y)
        if drafting.scales is not None:
            output = job.mixed(output, packed_values(drafting.scales, row_offsets, rows))
        weights = None
        if self.relaxation is not None and longest > 1:
            weights = self.relaxation.weights(drafts.std, columns)
        if at_once and self._decides_at_once:
            coupling, report, fresh = self._decide_at_once(
                drafts, numbers, columns, output, wait(), row_offsets, weights
            )
        else:
            coupling = self._couple(drafts, numbers, steps, output, row_offsets, columns, weights)
            if weights is not None:
                self._learn(coupling, weights, slots.indices)
            report, fresh = self._close(drafts, output, wait(), coupling, row_offsets)
        self._forget_past(fresh, coupling.committed, longest - 1)
        return Played(drafts, output, coupling, report)

    def _decide_at_once(
        self,
        drafts: Drafts,
        numbers: Numbers,
        columns: Tensor,
        output: Tensor,
        features: Tensor,
        row_offsets: Tensor,
        weights: Tensor | None,
    ) -> tuple[Coupling, Tensor, Tensor]:
        """What :meth:`_couple`, :meth:`_learn` and :meth:`_close` do."""
        job, slots = self.job, self.slots
        settings = job.guidance_scale, job.guidance_channels, job.clip, self.options.block
        coupled = *drafts, *numbers, output, row_offsets, columns, weights, *settings
        moved = *slots.tensors(features), self.stats.deviation, job.table
        rows = (None,) * 6 if self._feature_rows is None else self._feature_rows.tensors(drafts.states, features)
        clean = (None,) * 8 if self._clean_rows is None else self._clean_rows.tensors
        # After the round a slot may hold another image.
        images = None if weights is None else slots.indices.clone()
        given = *coupled, slots.lengths, features, *moved, *rows, *clean
        *decided, report, fresh = decide_round(DecideArguments(*given))
        coupling = Coupling(*decided)
        if weights is not None:
            self._learn(coupling, weights, images)
        return coupling, report, fresh

    def _close(
        self, drafts: Drafts, output: Tensor, features: Tensor, coupling: Coupling, row_offsets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Count, keep and commit what was decided; the packed report, and bool ``[S]``, slots at their first step."""
        slots, committed = self.slots, coupling.committed
        decided = committed, slots.lengths, slots.steps
        finite = self.stats.tally(output, coupling, *decided, self.backend)
        kept = KeptRound(drafts.states, features, output, row_offsets, *decided)
        for memory in self._kept:
            memory.keep(kept)
        fresh = slots.commit(committed, coupling.next_states, drafts.states, features, row_offsets)
        self._find_kept()
        ahead = self._no_rows if self.refused is None else self.refused.ahead
        return RoundReport.pack(committed, slots, ahead, finite), fresh

    def _draft(self, ahead: DraftingPass, sources: Source, late: list[int] | None) -> None:
        """Make the round's drafts; see :meth:`play_on_device`."""
        if Source.CLEAN in sources:
            Replayed(self.job, self.clean).draft(ahead)
        if Source.DRAFTER in sources:
            if Source.CLEAN in sources:
                ahead = ahead.behind(self.frozen_steps, None if ahead.lengths is None else late)
            draft_source(self.job, self.drafter, memory=self.memory, refused=self.refused).draft(ahead)

    def _couple(
        self,
        drafts: Drafts,
        numbers: Numbers | None,
        steps: Tensor,
        output: Tensor,
        row_offsets: Tensor,
        columns: Tensor,
        weights: Tensor | None,
    ) -> Coupling:
        """Decide the round's rows, with numbers that were drawn or with a kernel that draws them itself."""
        slots, block, settings = self.slots, self.options.block, self._coupling_settings
        if numbers is None:
            source = self.kernel_noise
            given = (*drafts, source.seed, source.keys(slots.indices), steps, output, row_offsets, columns)
            if block:
                return couple_block_philox(*given, rounds=slots.rounds, **settings)
            return couple_philox(*given, relaxation=weights, **settings)
        given = (*drafts, *numbers, output, row_offsets, columns)
        return couple_block(*given, **settings) if block else couple(*given, relaxation=weights, **settings)

    def _learn(self, coupling: Coupling, weights: Tensor, images: Tensor) -> None:
        """Let relaxation learn from the tested rows of ``images [S]``: up to and with a slot's first refused one."""
        drafts = coupling.gap_sq.shape[1]
        count = torch.minimum(coupling.committed, self.slots.lengths - 1)
        tested = torch.arange(drafts, device=count.device) < count.unsqueeze(1)
        self.relaxation.update(coupling, tested)
        self.stats.gather_bias(images, coupling.gap_sq, tested, weights[:, :drafts])

    def commit_steps(self, after: Tensor, output: Tensor, features: Tensor) -> None:
        """Commit an ordinary step of every slot, after ``after [S, C, H, W]``, with what the network gave for it."""
        slots = self.slots
        self._keep_only(slots.state, output, features, slots.steps)
        rows = torch.arange(len(slots) + 1, device=after.device)
        committed = torch.ones_like(slots.steps)
        fresh = slots.commit(committed, after, slots.state.unsqueeze(1), features, rows)
        self._find_kept()
        self._forget_past(fresh, committed, 0)

    def begin_behind(self, output: Tensor, features: Tensor) -> None:
        """Rounds go on from the slots as they were put, with what the network gave for the states before."""
        slots = self.slots
        self._keep_only(slots.previous, output, features, slots.steps - 1)
        self._find_kept()

    def _find_kept(self) -> None:
        """After the slots have moved, find what is kept of the steps ahead."""
        for memory in self._kept:
            memory.begin(self.slots.steps)

    def _keep_only(self, states: Tensor, output: Tensor, features: Tensor, steps: Tensor) -> None:
        """Keep one row of every slot, of ``states [S, C, H, W]`` at ``steps [S]``, and no other."""
        if not self._kept:
            return
        rows, one = torch.arange(len(steps) + 1, device=steps.device), torch.ones_like(steps)
        kept = KeptRound(states.unsqueeze(1), features, output, rows, one, one, steps)
        for memory in self._kept:
            memory.forget()
            memory.keep(kept)

    def _forget_past(self, fresh: Tensor, committed: Tensor, drafts: int) -> None:
        """After a commit, forget what belongs to finished images, and the drafter's calls at refused drafts."""
        if self.relaxation is not None:
            self.relaxation.reset(fresh)
        if self.memory is not None:
            # Call j saw the state of row j, which is final if that row was committed; a new image has no past at all.
            kept = torch.minimum(committed, self.slots.lengths - 1).clamp_(0, drafts)
            self.memory.rewind(drafts - kept.masked_fill_(fresh, -len(self.job.timesteps)))

    def _keys(self, steps: Tensor) -> tuple[Tensor, Tensor | None]:
        """Image of each row, and with block verification its round; both ``[S, L]`` like ``steps``."""
        width = steps.shape[1]
        images = self.slots.indices.unsqueeze(1).expand(-1, width).contiguous()
        return images, self.slots.rounds.unsqueeze(1).expand(-1, width).contiguous() if self.options.block else None

    def _noise_keys(self, longest: int) -> NoiseKeys:
        """Of a round of at most ``longest`` rows a slot, whose numbers are Philox's."""
        slots, slack = self.slots, self.job.learned and longest > 1
        return NoiseKeys(
            self._seed, self.philox.keys(slots.indices), slack, slots.rounds if self.options.block else None
        )

    def _numbers(self, steps: Tensor) -> Numbers:
        """All random numbers of the rows at ``steps [S, L]``."""
        job, slots = self.job, self.slots
        slack, rounds = job.learned and steps.shape[1] > 1, slots.rounds if self.options.block else None
        if self.philox is not None:
            shape = job.state_shape
            return Numbers(*self.philox.of_round(slots.indices, steps, shape, slack, rounds))
        keys, rounds = self._keys(steps)
        flat = None if rounds is None else rounds.view(-1)
        uniform = job.noise.uniform(keys.view(-1), steps.view(-1), Purpose.ACCEPT, flat)
        uniform = job.checked_numbers("uniform", uniform, steps.numel()).view_as(steps)
        return Numbers(self._draw(Purpose.STEP, steps), self._draw(Purpose.SLACK, steps) if slack else None, uniform)

    def _draw(self, purpose: Purpose, steps: Tensor) -> Tensor:
        """Standard normals ``[S, L, C, H, W]`` of rows at ``steps [S, L]``."""
        images, rounds = self._keys(steps)
        return self.job.draw(purpose, images, steps, rounds)

    def _bucket_length(self, longest: int) -> int:
        """Drafts come in few lengths where shapes are fixed."""
        if longest == 1 or self.options.length != "auto":
            return 1 if longest == 1 else self.length
        return next((length for length in LONGEST if length >= longest), self.length)

    def _captured(self) -> CapturedCalls[Played]:
        """Rounds as graphs, by (longest, rows, sources); with no rows in use a round commits nothing."""
        slots = self.slots
        preserved = [slots.lengths, slots.rounds]
        if self.relaxation is not None:
            preserved.append(self.relaxation.running)
        return CapturedCalls(lambda key: self.play_on_device(*key), preserved, slots.lengths.zero_, slots.state.device)

    def _check_committed(self, played: Played, lengths: list[int], committed: list[int], before: RoundReport) -> None:
        """Raise if a row that was decided holds a NaN or an infinity; discarded rows may hold anything."""
        drafts, next_states, first = played.drafts, played.coupling.next_states, 0
        for slot, length in enumerate(lengths):
            for j in range(committed[slot]):
                row = played.output.unflatten(0, (self.job.branches, -1))[:, first + j]
                drafted = (drafts.mean[slot, j], drafts.std[slot, j]) if j < length - 1 else ()
                for culprit, parts in (
                    ("the output drafted by drafter and head", drafted),
                    ("the target's output", (row,)),
                    ("the next state", (next_states[slot],) if j == committed[slot] - 1 else ()),
                ):
                    if not all(bool(part.isfinite().all()) for part in parts):
                        image = self.slots.pool.images[before.images[slot]]
                        self.job.raise_non_finite(culprit, before.steps[slot] + j, image)
            first += length
