"""Rounds of ``sample`` on fake CUDA tensors: ``python fake_round_worker.py`` prints a line of JSON for each case.

A run plays some rounds on the CPU, so that all of its buffers are there; then everything that it holds is moved, and
the round that a CUDA graph would capture is played once more.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from fake_cuda import Launches, Mover, allow_cuda_devices, new_mode, on_fake_gpu
from torch import Tensor

from free_dit import load_bundled
from free_kernels import DDPMSchedule, DrafterConfig, FeatureDrafter, FrozenDrafter, extension
from free_kernels import conditioning as hoisting
from free_kernels.sampling import drafting as drafting_module
from free_kernels.sampling import round as round_module
from free_kernels.sampling import slots as slots_module
from free_kernels.sampling.ancestral import _Batch
from free_kernels.sampling.draft_sources import Source
from free_kernels.sampling.job import Job, make_job
from free_kernels.sampling.options import Options
from free_kernels.sampling.round import Rounds
from free_kernels.sampling.run_stats import RunStats
from free_kernels.sampling.speculative import Speculation
from free_kernels.schedules import FlowSDESchedule
from free_kernels.steering.relaxation import Relaxation

LENGTH, STEPS = 6, 20
PARTS = {
    **dict.fromkeys(("couple", "couple_philox", "couple_block", "couple_block_philox"), "couple"),
    "pack_drafts": "pack",
    "commit_drafts": "commit",
}


class Fixed(FeatureDrafter):
    """What ``_modulations`` must not do: constants that come from the host in every call."""

    def _modulations(self, t: Tensor, y: Tensor) -> Tensor:
        rows = super()._modulations(t, y)
        return rows + torch.tensor([0.0] * rows.shape[1], device=t.device).view(1, -1, 1, 1)


class Peeking(FrozenDrafter):
    """Looks at a value."""

    repeats_feature = False

    def __call__(self, feature: Tensor, *rest: Tensor) -> Tensor:
        return feature * (1.0 if rest[1].sum().item() > 0 else 2.0)


class Fetching(FrozenDrafter):
    """Computes on the host."""

    repeats_feature = False

    def __call__(self, feature: Tensor, *rest: Tensor) -> Tensor:
        return feature + rest[1].cpu().numel()


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        model: bundled pair of networks.
        drafter: kind of the drafter.
        guidance: its scale.
        slots: S; two images for each.
        settings: more of the run's.
        tables: whether what depends on (t, y) is hoisted.
        whole: the round as it is called, not only what is captured.
        fewer: rows that the last slot has less than in the round before.
        rows: rows a slot of the round.
        blocks: of the target; few, as ours do not depend on them.
        share: of the chain that clean samples draft.
        sources: what drafts the round.
    """

    model: str = "digits"
    drafter: str = "learned"
    guidance: float = 1.0
    slots: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    tables: bool = True
    whole: bool = False
    fewer: int = 0
    rows: int = LENGTH
    blocks: int = 2
    share: float = 0.0
    sources: Source = Source.DRAFTER


CASES = {
    "learned": Case(blocks=16),
    "frozen": Case(drafter="frozen"),
    "guided": Case(guidance=2.0, slots=4),
    "scales of steps": Case(guidance=2.0, slots=4, settings={"guidance_interval": (100, 950)}),
    "frozen, scales of steps": Case(
        drafter="frozen", guidance=2.0, slots=4, settings={"guidance_interval": (100, 950)}
    ),
    "windowed": Case(drafter="windowed", slots=4),
    "block": Case(slots=4, settings={"verification": "block"}),
    "relaxed by deviation": Case(slots=4, settings={"relaxation": Relaxation(0.5)}),
    "relaxed by variance": Case(slots=4, settings={"relaxation": Relaxation(0.5, source="variance")}),
    "by the reference": Case(slots=4, settings={"backend": "reference"}),
    "without tables": Case(tables=False),
    "windowed without tables": Case(drafter="windowed", slots=4, guidance=2.0, tables=False),
    "flow": Case(model="digits_sit", slots=4),
    "flow without tables": Case(model="digits_sit", slots=4, guidance=2.0, tables=False),
    "without reuse": Case(settings={"reuse_refused": False}),
    "a row a slot": Case(rows=1, slots=4),
    "frozen share, early": Case(share=0.5, sources=Source.CLEAN),
    "frozen share, late": Case(share=0.5),
    "frozen share, both": Case(slots=4, share=0.5, sources=Source.CLEAN | Source.DRAFTER),
    "whole": Case(whole=True, slots=4),
    "whole, other lengths": Case(whole=True, slots=4, fewer=1),
    "control: copies": Case(drafter="fixed", tables=False),
    "control: looks": Case(drafter="peeking"),
    "control: fetches": Case(drafter="fetching"),
}


def drafter_of(case: Case, target: Any, bundled: FeatureDrafter) -> Any:
    plain = {"frozen": FrozenDrafter, "peeking": Peeking, "fetching": Fetching}
    if case.drafter in plain:
        return plain[case.drafter]()
    if case.drafter == "learned":
        bundled.frozen_share = case.share
        return bundled
    kind = Fixed if case.drafter == "fixed" else FeatureDrafter
    config = DrafterConfig(width=96, window=3 if case.drafter == "windowed" else 1)
    drafter = kind(target.latent_shape, target.feature_shape, target.num_classes, config)
    return drafter.eval().requires_grad_(False)


def networks(model: str, blocks: int) -> tuple[Any, FeatureDrafter]:
    """A bundled pair, the target with its first blocks only."""
    target, drafter = load_bundled(model)
    assert blocks <= len(target.module.blocks)
    target.module.blocks = target.module.blocks[:blocks]
    return type(target)(target.module), drafter


def make_run(case: Case) -> Speculation:
    """A run after three rounds on the CPU."""
    target, bundled = networks(case.model, case.blocks)
    schedule = FlowSDESchedule(STEPS) if case.model.endswith("sit") else DDPMSchedule(STEPS)
    labels = torch.arange(2 * case.slots) % 10
    options = Options(
        schedule=schedule,
        drafter=drafter_of(case, target, bundled),
        guidance_scale=case.guidance,
        draft_length=LENGTH,
        max_slots=case.slots,
        **case.settings,
    )
    run = Speculation(make_job("sample", target, labels, options), dense=True)
    for _ in zip(range(3), run.iterate(), strict=False):
        pass
    return run


@contextlib.contextmanager
def counted_parts(run: Speculation, launches: Launches) -> Iterator[None]:
    """Launches count for the parts of the round that cause them."""
    rounds, wrap = run.rounds, launches.wrap
    target, drafter = run.job.target, rounds.drafter
    target.features, target.head = wrap("target", target.features), wrap("target", target.head)

    class Drafter:
        __call__ = staticmethod(wrap("drafter", drafter))

        def __getattr__(self, name: str) -> Any:
            return getattr(drafter, name)

    rounds.drafter = Drafter()
    with contextlib.ExitStack() as stack:

        def patch(owner: object, name: str, part: str) -> None:
            stack.enter_context(mock.patch.object(owner, name, wrap(part, getattr(owner, name))))

        for name, part in PARTS.items():
            patch(round_module if hasattr(round_module, name) else slots_module, name, part)
        patch(drafting_module, "ADVANCE", "drafts")
        patch(drafting_module, "open_round", "opening")
        patch(slots_module, "renew_slots", "renewal")
        patch(Job, "draw", "noise")
        patch(RunStats, "tally", "tally")
        patch(Rounds, "_learn", "relaxation")
        for memory in rounds._kept:
            for name in ("keep", "begin"):
                patch(memory, name, "refused rows")
        yield


def play(case: Case) -> dict[str, Any]:
    """A round on fake tensors: launches by part, copies, reads, or the error that it raises."""
    with mock.patch.object(hoisting, "MAX_TABLE_BYTES", hoisting.MAX_TABLE_BYTES if case.tables else 0):
        run = make_run(case)
    mode, launches = new_mode(), Launches()
    # As on a GPU, where a head is made of its parts, and the coupling draws its numbers itself.
    run.job.target._fused_head = None
    Mover(mode)(run)
    run.rounds.kernel_noise = None if case.settings.get("backend") == "reference" else run.job.noise
    rows, lengths = case.rows * case.slots, [case.rows] * case.slots
    lengths[-1] -= case.fewer
    with on_fake_gpu(mode, launches), counted_parts(run, launches):
        return outcome(
            launches,
            lambda: (
                run.rounds.start(lengths, [0] * case.slots)
                if case.whole
                else run.rounds.play_on_device(case.rows, rows, case.sources)
            ),
        )


def outcome(launches: Launches, call: Callable[[], Any]) -> dict[str, Any]:
    """What a call did."""
    error = None
    try:
        result = call()
        device = str(getattr(result, "report", result).device)
    except Exception as caught:
        error, device = f"{type(caught).__name__}: {caught}", ""
    found = {"parts": launches.by_part, "ops": launches.by_op, "copies": launches.copies, "reads": launches.reads}
    return found | {"error": error, "device": device}


def ordinary_step(guidance: float, slots: int) -> dict[str, Any]:
    """The step that ``ancestral_sample`` captures."""
    target, _ = networks("digits", 2)
    images = torch.arange(slots)
    options = Options(schedule=DDPMSchedule(STEPS), guidance_scale=guidance)
    job = make_job("ancestral_sample", target, images % 10, options).hoisted()
    batch = _Batch(job, images, job.initial_states(images))
    mode, launches = new_mode(), Launches()
    batch.job.target._fused_head = None
    Mover(mode)(batch)
    target = batch.job.target
    target.features, target.head = (launches.wrap("target", call) for call in (target.features, target.head))
    with on_fake_gpu(mode, launches):
        return outcome(launches, batch.advance)


def main() -> None:
    torch.set_num_threads(1)
    try:
        allow_cuda_devices()
    except RuntimeError as error:
        sys.exit(f"skip: {error}")
    compiled = extension.has_extension()
    if compiled:
        # The CUDA kernels' fakes are those of the CPU's; a CPU build of the extension has the ops.
        extension._kernels |= {(op, "cuda"): None for op in ("pack_drafts", "commit_drafts")}
    for name, case in CASES.items():
        print(json.dumps({"case": name, "compiled": compiled} | play(case)), flush=True)
    for guidance, slots in ((1.0, 1), (2.0, 4)):
        step = ordinary_step(guidance, slots)
        print(json.dumps({"case": f"ordinary {guidance:g}", "compiled": compiled} | step), flush=True)


if __name__ == "__main__":
    main()
