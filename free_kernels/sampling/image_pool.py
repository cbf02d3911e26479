"""Images that wait, and those that are finished: a window over the job that moves on, so memory follows the slots."""

from __future__ import annotations

import torch

from free_kernels.sampling.job import Job


class ImagePool:
    """Rows for B of a job's N images: those in slots, those finished lately, and those that wait.

    The row of a waiting image holds its initial noise until the image itself replaces it. When too few wait to fill
    every slot at once, rows of finished images are given to the next ones.

    Args:
        job: all images.
        slots: S; its first images take the slots at once.
        rows: B, at least 2 S; all of the images if None.

    Attributes:
        samples: ``[B, C, H, W]`` float32.
        labels: int64 ``[B]``.
        indices: int64 ``[B]``, the image of the job that each row holds.
        queue: int64 ``[1]``, the row of the image that enters next.
    """

    def __init__(self, job: Job, slots: int, rows: int | None = None) -> None:
        self._job, self._slots = job, slots
        count, device = len(job.labels), job.labels.device
        held = count if rows is None else min(rows, count)
        self.indices = torch.arange(held, device=device)
        self.labels = job.labels[:held].clone()
        self.samples = job.initial_states(self.indices)
        self.queue = torch.tensor([slots], device=device)
        self._count, self._loaded, self._entered = count, held, slots
        self.images = list(range(held))

    @property
    def rows(self) -> int:
        """B."""
        return len(self.labels)

    def advance(self, slots: list[int]) -> list[int] | None:
        """Make room for images that have no row yet, if few wait; to be called between rounds.

        Args:
            slots: the row in each slot, negative where it is idle.

        Returns:
            The rows that the images in the slots have moved to, or None if all are where they were.
        """
        left = self._count - self._loaded
        if not left:
            return None
        self._entered = max(self._entered, max(slots) + 1)
        if self.rows - self._entered >= self._slots:
            return None
        # Every slot holds an image here, because more images waited than there are slots.
        kept = slots + list(range(self._entered, self.rows))
        fresh = min(self.rows - len(kept), left)
        # They go to the end of the buffers, whose last row holds the last image to enter.
        first = self.rows - len(kept) - fresh
        between, device = first + len(kept), self.labels.device
        order = torch.tensor(kept, device=device)
        for buffer in (self.samples, self.labels, self.indices):
            buffer[first:between] = buffer[order]
        new = torch.arange(self._loaded, self._loaded + fresh, device=device)
        self.indices[between:], self.labels[between:] = new, self._job.labels[new]
        self.samples[between:] = self._job.initial_states(new)
        self.images[first:between] = [self.images[row] for row in kept]
        self.images[between:] = range(self._loaded, self._loaded + fresh)
        self._loaded += fresh
        self._entered = first + self._slots
        self.queue.fill_(self._entered)
        return list(range(first, self._entered))
