"""Bytes that a speculative run takes for each image in the making, beside what its two networks need."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from free_kernels.conditions import Condition
from free_kernels.drafters import as_drafter
from free_kernels.ops.triton_runtime import use_triton
from free_kernels.protocols import DrafterDefaults, NoiseDefaults, frozen_steps, new_memory
from free_kernels.sampling.draft_sources import rows_used
from free_kernels.sampling.job import make_job
from free_kernels.sampling.options import Options
from free_kernels.steering.length_policy import LONGEST
from free_kernels.validation import check_int, fail

_STATE_BYTES = 4  # float32


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes for each slot, that is for each image in the making; ``max_slots`` bounds how many there are.

    The activations of target and drafter within a call come on top, as do their weights and tables, and four bytes
    for each element of each image of :func:`free_kernels.sample`, or of three images a slot of
    :func:`free_kernels.sample_iter`. A CUDA graph keeps its own copy of what a
    round needs, ``drafts`` to ``verification``, for each captured shape; graphs share what they can.

    Attributes:
        states: the committed state and the one before.
        parent: features one step before the first row.
        refused_rows: states and features, or with ``drafter="frozen"`` clean samples, of rows that may draft their
            steps again; both for a drafter with a ``frozen_share``. No features with ``reuse_refused=False``.
        drafter_memory: what the drafter keeps from round to round.
        drafts: states, means and deviations of a round's drafts.
        noise: a round's numbers, those of the slack of learned variances among them; never those of the whole run.
        drafting: the most that is alive at once of features while drafts are made; freed before the target is called.
        verification: packed states, the target's output, features and next states.
    """

    states: int
    parent: int
    refused_rows: int
    drafter_memory: int
    drafts: int
    noise: int
    drafting: int
    verification: int

    @property
    def held(self) -> int:
        """Bytes between two rounds."""
        return self.states + self.parent + self.refused_rows + self.drafter_memory

    @property
    def peak(self) -> int:
        """Most bytes at once."""
        return self.held + self.drafts + self.noise + max(self.drafting, self.verification)

    def slots_within(self, num_bytes: int) -> int:
        """How many slots fit into so many bytes.

        Raises:
            ValueError: ``num_bytes`` is not a non-negative int.
        """
        return check_int("slots_within", "num_bytes", num_bytes, 0) // self.peak

    def as_dict(self) -> dict[str, int]:
        """All of these figures by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {
            "held": self.held,
            "peak": self.peak,
        }


@torch.no_grad()
def estimate_memory(
    target: object,
    conditions: Condition | None = None,
    *,
    class_labels: Tensor | None = None,
    null_condition: Condition | None = None,
    **settings: Any,
) -> MemoryEstimate:
    """Bytes that :func:`free_kernels.sample` would take for each slot; one row of the target is computed.

    Args:
        target: as for :func:`free_kernels.sample`.
        conditions: of an image or more, for a target that takes them. They are held by the caller and not counted.
        class_labels: of an image or more, which may be left out.
        null_condition: as in :func:`free_kernels.sample`.
        **settings: keywords of :func:`free_kernels.sample`; with ``draft_length="auto"`` those of the longest drafts.

    Raises:
        ValueError, TypeError: as :func:`free_kernels.sample`.
    """
    where = "estimate_memory"
    options = Options.of(where, settings)
    if not NoiseDefaults.read(options.noise, "philox") and options.noise is not None:
        fail(where, "noise", "None: numbers that are given are held by the caller", type(options.noise).__name__)
    scale = options.guidance_scale
    images = len(scale) if isinstance(scale, Tensor) and scale.ndim == 1 else 1
    labels = class_labels
    if conditions is None and labels is None:
        labels = torch.zeros(images, dtype=torch.int64, device="cpu")
    job = make_job(where, target, labels, options, conditions, null_condition)
    drafter = as_drafter(where, options.drafter, job.target)
    steps = len(job.timesteps)
    rows = min(LONGEST[-1], steps) if options.length == "auto" else int(options.length)
    drafts, branches = rows - 1, job.branches
    latent, device = job.state_shape, job.labels.device
    x = torch.zeros(1, *latent, dtype=torch.float32, device=device)
    feature = job.verify(x, job.timesteps[:1], job.labels[:1]).wait()
    state = _STATE_BYTES * prod(latent)
    output = state * (2 if job.target.learns_variance else 1)
    features = branches * feature.nbytes
    # Scales of steps and images are mixed in a copy.
    mixed = branches * output if job.scales is not None else 0
    memory = new_memory(drafter, 1, branches, drafts) if drafts else None
    repeats = DrafterDefaults.read(drafter, "repeats_feature")
    frozen = frozen_steps(where, drafter, steps, memory is not None)
    used, kept = rows_used(options, rows), 0
    held = 0
    if drafts and frozen:
        # States with clean samples, with the row before and one that is not kept; sums of single elements.
        held += (used + 2) * (state + output) + 2 * state
    if drafts and memory is None and not repeats and options.reuse_refused:
        # States with features.
        kept = used
        held += (kept + 1) * (state + features)
    # Kernels draw the coupling's numbers themselves; then only those of the drafts are there.
    in_kernel = use_triton("couple_block" if options.block else "couple", "coupling", device, options.backend)
    slack = job.learned and drafts > 0 and not in_kernel
    drafting = 0
    if drafts and not repeats:
        # What the drafter takes and gives. Its first call has a row for each refused one beside its own, which is
        # copied from the call's own rows: the state, and with guidance the state before.
        asked, copied = max(1, kept), (branches if kept else 0)
        drafting = 2 * asked * features + (2 * asked + copied) * branches * state
    return MemoryEstimate(
        states=2 * state,
        parent=features,
        refused_rows=held,
        drafter_memory=sum(part.nbytes for part in _tensors(memory)),
        drafts=(3 * rows - 2) * state,
        noise=(0 if in_kernel and not drafts else rows) * state * (2 if slack else 1),
        drafting=drafting,
        verification=rows * (branches * (state + output) + mixed + features) + state,
    )


def _tensors(holder: object) -> list[Tensor]:
    """Tensors among an object's attributes."""
    return [leaf for leaf in tree_leaves(vars(holder) if holder is not None else []) if isinstance(leaf, Tensor)]
