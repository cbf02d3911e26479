"""The slots of a speculative run: for each image in the making its state, its step and its parent's feature."""

from __future__ import annotations

import torch
from torch import Tensor

from free_kernels.ops.drafting import RenewArguments, renew_slots
from free_kernels.ops.packing import commit_drafts
from free_kernels.sampling.image_pool import ImagePool
from free_kernels.sampling.job import Job


class Slots:
    """S slots, each with an image at its own step. Rounds write all of these tensors in place.

    Args:
        job: the job.
        count: S.
        pool_rows: rows of the image pool; one for every image if None.
        length: L, the most rows of a round.
        backend: of packing.

    Attributes:
        pool: where images come from and go to.
        images: int64 ``[S]``, the row of the pool in each slot; negative where the slot is idle.
        indices: int64 ``[S]``, the image of the job in each slot, which keys its noise; any where the slot is idle.
        labels: int64 ``[S]``.
        steps: int64 ``[S]``, the next step of each image.
        lengths: int64 ``[S]``, rows of the round that is played; 0 where a slot takes no part.
        rounds: int64 ``[S]``, rounds of the image so far: part of the noise keys with block verification.
        numbers: int64 ``[S, L - 1]``, the slot's own number for every draft.
        state: ``[S, C, H, W]``, committed states.
        previous: ``[S, C, H, W]``, the states one step before.
        parent: ``[B, S, T, D]``, the target's features at ``previous``; None before the first round.
    """

    def __init__(self, job: Job, count: int, pool_rows: int | None, length: int, backend: str) -> None:
        self.job, self.backend = job, backend
        self.pool = ImagePool(job, count, pool_rows)
        self.images = torch.arange(count, device=job.labels.device)
        self.indices = self.images.clone()
        self.numbers = self.images.unsqueeze(1).repeat(1, length - 1)
        self.labels = self.pool.labels[:count].clone()
        self.steps = torch.zeros_like(self.images)
        self.lengths = torch.zeros_like(self.images)
        self.rounds = torch.zeros_like(self.images)
        self.state = self.pool.samples[:count].clone()
        self.previous = torch.zeros_like(self.state)
        self.parent: Tensor | None = None

    def __len__(self) -> int:
        return self.images.shape[0]

    def commit(self, committed: Tensor, after: Tensor, states: Tensor, features: Tensor, row_offsets: Tensor) -> Tensor:
        """Make steps final, as :func:`free_kernels.ops.commit_drafts` does, and begin the images that move in.

        Args:
            committed: int64 ``[S]``, steps that become final.
            after: ``[S, C, H, W]``, the states after them.
            states: ``[S, L, C, H, W]``, the drafts.
            features: ``[B R, T, D]`` of the packed rows.
            row_offsets: int64 ``[S + 1]``.

        Returns:
            bool ``[S]``, the slots whose image is at its first step.
        """
        commit_drafts(
            committed,
            after,
            states,
            features,
            row_offsets,
            state=self.state,
            previous=self.previous,
            parent=self._parent_for(features),
            steps=self.steps,
            images=self.images,
            labels=self.labels,
            samples=self.pool.samples,
            all_labels=self.pool.labels,
            queue=self.pool.queue,
            num_steps=len(self.job.timesteps),
            backend=self.backend,
        )
        now = self.steps, self.images, self.pool.indices, self.indices, self.rounds
        return renew_slots(RenewArguments(*now), self.job.options.backend)

    def tensors(self, features: Tensor) -> tuple[Tensor, ...]:
        """All that a commit of such features moves: ``state`` to ``rounds`` of ``decide_round``."""
        pool, parent = self.pool, self._parent_for(features)
        slots = self.state, self.previous, parent, self.steps, self.images, self.labels
        return *slots, pool.samples, pool.labels, pool.queue, pool.indices, self.indices, self.rounds

    def _parent_for(self, features: Tensor) -> Tensor:
        """The parents, with room for features like these."""
        if self.parent is None:
            self.parent = features.new_zeros(self.job.branches, len(self), *features.shape[1:])
        elif self.parent.dtype != features.dtype:
            self.parent = self.parent.to(features.dtype)
        return self.parent

    def set_first_parents(self, guess: Tensor) -> None:
        """Images at their first step get a parent: the feature ``guess [S, T, D]`` at their own state."""
        guess = guess.expand(self.job.branches, -1, -1, -1)
        fresh = (self.steps == 0).view(-1, 1, 1)
        if self.parent is None:
            # A copy: commits write to it, and what a drafter returns may be its own weight.
            self.parent = guess.clone(memory_format=torch.contiguous_format)
        else:
            self.parent.copy_(torch.where(fresh, guess, self.parent))
        self.previous.copy_(torch.where(fresh.unsqueeze(-1), self.state, self.previous))
