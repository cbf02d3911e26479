"""The ordinary sampler: one target call a step for every image of a batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from free_kernels.constants import Purpose
from free_kernels.results import RoundInfo, SampleResult, SampleStats
from free_kernels.sampling.cuda_graphs import CapturedCalls
from free_kernels.sampling.job import NOISE_CHUNK_ELEMENTS, Job


class _Batch:
    """Images at the same step.

    Args:
        job: the job, hoisted.
        images: int64 ``[B]``.
        state: ``[B, C, H, W]``, their initial states; becomes the images.
    """

    def __init__(self, job: Job, images: Tensor, state: Tensor) -> None:
        self.job, self.images, self.state = job, images.clone(), state
        self.labels = job.branched(job.labels[images])
        self.step = torch.zeros(1, dtype=torch.int64, device=state.device)

    def load(self, images: Tensor, state: Tensor) -> None:
        """Take other images, as many, in place: a captured step stays valid."""
        self.images.copy_(images)
        self.state.copy_(state)
        self.labels.copy_(self.job.branched(self.job.labels[images]))
        self.step.zero_()

    def advance(self, noise: Tensor | None = None, guided: bool = True) -> Tensor:
        """One step, in place, with ``noise [B, C, H, W]`` (drawn here if None); returns the target's output.

        Without ``guided`` the scale of all images is 1 at this step, and the unconditional branch is left out.
        """
        job = self.job if guided else self.job.unguided()
        labels = self.labels if guided else self.labels[: len(self.images)]
        if noise is None:
            keys = self.images.unsqueeze(1)
            noise = job.draw(Purpose.STEP, keys, self.step.repeat(len(keys)).unsqueeze(1)).squeeze(1)
        t = job.timesteps.index_select(0, self.step).expand(len(labels))
        columns = job.table.index_select(0, self.step)
        scales = job.scales_at(self.step.expand(len(self.images)), self.images)
        step = job.ordinary_step(job.verify, self.state, t, labels, columns, noise, scales, out=self.state)
        self.step += 1
        return step.output


def run_ordinary(job: Job) -> SampleResult:
    """All images of a hoisted job, in batches of ``max_slots``."""
    options, callback = job.options, job.options.callback
    slots = int(options.max_slots or len(job.labels))
    count, num_steps = len(job.labels), len(job.timesteps)
    guided = [True] * num_steps if job.scales is None else job.scales.inside.tolist()
    stats = SampleStats(
        rounds_per_image=np.full(count, num_steps),
        tested_by_step=np.zeros(num_steps, np.int64),
        accepted_by_step=np.zeros(num_steps, np.int64),
        uncertainty_by_step=np.full(num_steps, np.nan),
        bias_bound_per_image=np.zeros(count),
    )
    samples = job.initial_states(torch.arange(count, device=job.labels.device))
    with tqdm(total=count * num_steps, desc="ancestral_sample", unit="step", disable=not options.progress) as bar:
        batch: _Batch | None = None
        for images in torch.arange(count, device=samples.device).split(slots):
            if batch is not None and len(images) == len(batch.images):
                batch.load(images, samples[images])
            else:
                batch, graph = _Batch(job, images, samples[images]), None
                if options.cuda_graphs:
                    preserved = [batch.state, batch.step]
                    graph = CapturedCalls(lambda _, one=batch: one.advance(), preserved, lambda: None, samples.device)
            chunk = max(1, NOISE_CHUNK_ELEMENTS // batch.state.numel())
            for step in range(num_steps):
                if graph is not None:
                    output = graph(0)
                else:
                    if step % chunk == 0:
                        ahead = torch.arange(step, min(step + chunk, num_steps), device=samples.device)
                        keys = images.unsqueeze(1).repeat(1, len(ahead))
                        draws = job.draw(Purpose.STEP, keys, ahead.repeat(len(images), 1))
                    output = batch.advance(draws[:, step % chunk], guided[step])
                job.check_finite(step, images, output, batch.state)
                stats.target_calls += 1
                stats.target_rows += len(images)
                bar.update(len(images))
                if callback is not None:
                    at = [step + 1] * len(images)
                    done = int(images[0]) + (len(images) if step + 1 == num_steps else 0)
                    callback(RoundInfo(stats.target_calls, images.tolist(), at, done, count))
            samples[images] = batch.state
    return SampleResult(job.shaped(samples), stats)
