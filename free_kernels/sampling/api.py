"""``sample``, ``sample_iter`` and ``ancestral_sample``: the public samplers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from free_kernels.conditions import Condition
from free_kernels.protocols import Drafter, Schedule
from free_kernels.results import Callback, SampleResult
from free_kernels.sampling.ancestral import run_ordinary
from free_kernels.sampling.cuda_graphs import check_capturable, check_cuda_graphs
from free_kernels.sampling.guidance import GuidanceScale
from free_kernels.sampling.job import make_job
from free_kernels.sampling.options import Options
from free_kernels.sampling.speculative import Speculation
from free_kernels.schedules import DDPMSchedule
from free_kernels.steering.relaxation import Relaxation


@torch.no_grad()
def ancestral_sample(
    target: object,
    conditions: Condition | None = None,
    *,
    class_labels: Tensor | None = None,
    null_condition: Condition | None = None,
    schedule: Schedule = DDPMSchedule(),
    guidance_scale: GuidanceScale = 1.0,
    guidance_channels: int | None = None,
    guidance_interval: tuple[float, float] | None = None,
    seed: int = 0,
    noise: object = None,
    max_slots: int | None = None,
    cuda_graphs: bool = False,
    progress: bool = False,
    callback: Callback | None = None,
) -> SampleResult:
    """The ordinary sampler: one target call a step. Shares noise keys, arithmetic and hoisting with :func:`sample`.

    Args: as in :func:`sample`; images are drawn in batches of ``max_slots`` (all at once if None), and with
        ``cuda_graphs`` a step is one graph.

    Returns:
        The same :class:`SampleResult`, with ``call_reduction`` 1.

    Raises:
        ValueError, TypeError, FloatingPointError: as :func:`sample`.
    """
    where = "ancestral_sample"
    started = time.perf_counter()
    options = Options(
        schedule=schedule,
        guidance_scale=guidance_scale,
        guidance_channels=guidance_channels,
        guidance_interval=guidance_interval,
        draft_length=1,
        seed=seed,
        noise=noise,
        max_slots=max_slots,
        cuda_graphs=cuda_graphs,
        progress=progress,
        callback=callback,
    )
    job = make_job(where, target, class_labels, options, conditions, null_condition)
    check_cuda_graphs(where, cuda_graphs, job.labels.device)
    check_capturable(where, cuda_graphs, job.target)
    result = run_ordinary(job.hoisted())
    result.stats.elapsed_s = time.perf_counter() - started
    return result


@torch.no_grad()
def sample(
    target: object,
    conditions: Condition | None = None,
    *,
    class_labels: Tensor | None = None,
    null_condition: Condition | None = None,
    schedule: Schedule = DDPMSchedule(num_steps=250),
    drafter: str | Drafter = "frozen",
    guidance_scale: GuidanceScale = 1.0,
    guidance_channels: int | None = None,
    guidance_interval: tuple[float, float] | None = None,
    draft_length: int | str | None = None,
    relaxation: float | Relaxation = 0.0,
    verification: str = "token",
    seed: int = 0,
    noise: object = None,
    max_slots: int | None = None,
    backend: str = "auto",
    cuda_graphs: bool = False,
    reuse_refused: bool = True,
    progress: bool = False,
    callback: Callback | None = None,
) -> SampleResult:
    """Draw images by speculative sampling; without relaxation their law is exactly that of :func:`ancestral_sample`.

    Args:
        target: a :class:`Target`, or a DiT module that an adapter recognises.
        conditions: what each of N images is conditioned on: a tensor ``[N, ...]``, or a nested dict of them (masks of
            ragged texts among them), for a target that takes conditions; each is stored once, however many rows a call
            has. For a target with class labels these, int64 ``[N]`` in ``[0, num_classes)``.
        class_labels: the same labels by name, instead of ``conditions``.
        null_condition: the condition of guidance's unconditional branch, in the form of one image's (``[...]``); None:
            the target's own.
        schedule: the Gaussian transitions.
        drafter: ``"frozen"`` (carry on what the target said last, without a network), or a drafter such as a trained
            :class:`FeatureDrafter`.
        guidance_scale: w in ``e_u + w (e_c - e_u)``; 1 is no guidance and one network row per row instead of two. A
            number, a tensor ``[N]`` with one for each image, or a callable of the step k = 0 (pure noise) ... K - 1
            that gives a number or such a tensor; it is called once for every guided step, before the first one.
            ``schedule.timesteps[k]`` is the step's timestep.
        guidance_channels: leading channels that guidance mixes; None takes the target's own (the original DiT: 3 of 4).
        guidance_interval: None, or ``(low, high)``: steps whose time is not in ``[low, high]`` have scale 1. Times are
            the schedule's own: timesteps 0 (data) to 999 (noise) of a diffusion model, ``schedule.times`` from 0
            (noise) to 1 (data) of a :class:`FlowSDESchedule`. Source: Kynkaanniemi et al. 2024, arXiv 2404.07724.
        draft_length: L, rows of a round for one image, in ``[1, num_steps]``; 1 is the ordinary chain. None: 6, or the
            number of steps where that is smaller. ``"auto"`` chooses it round by round for the most steps per second,
            from acceptance and measured times, and falls back to ordinary steps where speculation does not pay. It goes
            on from what earlier runs with the same target and drafter saw, so within a process give each run a seed of
            its own: what a run has seen of a seed's noise may not choose how the same noise is tested.
        relaxation: 0 is lossless; a strength above 0, or a :class:`Relaxation`, accepts more drafts at late, uncertain
            steps, and ``stats.bias_bound`` bounds the total variation that this costs.
        verification: ``"token"``: rows are decided one by one. ``"block"``: a round's drafts are decided together,
            which commits more of them and is as exact.
        seed: key of all noise, in ``[0, 2**64)``. An image depends on seed and index, not on the batch around it; with
            ``"auto"`` only its law does not.
        noise: None, initial states ``[N, *shape]``, initial states and step noise ``[N, K, *shape]``, or a source.
        max_slots: images in the making at a time; all of them if None. A finished one makes room for a waiting one.
        backend: of drafting and coupling: ``"auto"`` (Triton on a GPU, C++ on a CPU), ``"reference"`` (plain PyTorch,
            also for packing and noise), ``"extension"`` or ``"triton"`` (an error where it cannot run).
        cuda_graphs: replay every round as a CUDA graph: worth it where a round's kernels are shorter than their
            launches. The first rounds capture; target, drafter and noise source must not wait for the device.
        reuse_refused: what the target said at rows that a round refused drafts the same steps of the next ones, as
            exactly. Block verification draws new noise every round, so there it is the refused draft's own row only;
            drafters with a memory go without.
        progress: show a progress bar.
        callback: called with a :class:`RoundInfo` after every round.

    Returns:
        ``samples`` float32 ``[N, *target.latent_shape]`` and ``stats``.

    Example:
        Two digits of the bundled model, in the latent space of which they are 8 x 8 pictures::

            from free_dit import load_bundled
            from free_kernels import DDPMSchedule, ancestral_sample, sample

            target, drafter = load_bundled("digits")
            result = sample(target, torch.tensor([3, 7]), drafter=drafter, draft_length=12, seed=1)
            result.samples.shape  # torch.Size([2, 1, 8, 8])
            result.stats.call_reduction  # steps that a target call committed, on average
            ancestral_sample(target, torch.tensor([3, 7]), schedule=DDPMSchedule(250), seed=1)  # the same law

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        RuntimeError: ``backend="triton"`` cannot be used; the message says why.
        FloatingPointError: a network output is not finite; the message names step and image.
    """
    started = time.perf_counter()
    options = Options(
        schedule,
        drafter,
        guidance_scale,
        guidance_channels,
        guidance_interval,
        draft_length,
        relaxation,
        verification,
        seed,
        noise,
        max_slots,
        backend,
        cuda_graphs,
        reuse_refused,
        progress,
        callback,
    )
    speculation = Speculation(make_job("sample", target, class_labels, options, conditions, null_condition))
    speculation.run()
    speculation.stats.elapsed_s = time.perf_counter() - started
    return SampleResult(speculation.job.shaped(speculation.samples), speculation.stats)


class FinishedImage(NamedTuple):
    """An image that :func:`sample_iter` yields.

    Attributes:
        index: its place in the conditions.
        sample: float32, of the target's ``latent_shape``.
    """

    index: int
    sample: Tensor


class SampleIterator(Iterator[FinishedImage]):
    """Images in the order in which they finish.

    It may be moved on within ``torch.inference_mode`` and outside of it. An error ends it: whoever goes on gets a
    RuntimeError, not the end of the images.

    Attributes:
        stats: of the rounds so far; whole once the iterator is exhausted.
    """

    def __init__(self, speculation: Speculation) -> None:
        self.stats = speculation.stats
        self._speculation = speculation
        self._started = time.perf_counter()
        self._rounds = speculation.iterate()
        self._ready: deque[FinishedImage] = deque()
        self._ended_by = ""

    def __next__(self) -> FinishedImage:
        """The next finished image, after as many rounds as it takes."""
        while not self._ready:
            self._play()
        self.stats.elapsed_s = time.perf_counter() - self._started
        return self._ready.popleft()

    # The slots outlive the mode that a caller iterates in: tensors of inference mode cannot be written outside of it.
    @torch.inference_mode(False)
    def _play(self) -> None:
        """A round; the images that it finishes are ready."""
        if self._ended_by:
            raise RuntimeError(f"sample_iter: the run ended with {self._ended_by}; the images left need another one")
        shape = self._speculation.job.target.latent_shape
        try:
            finished = next(self._rounds)
            self._ready.extend([FinishedImage(index, image.view(shape).clone()) for index, image in finished])
        except StopIteration:
            raise
        except BaseException as error:
            self._ended_by = f"{type(error).__name__}: {error}"
            raise

    def close(self) -> None:
        """Give up on the images that are not finished."""
        self._rounds.close()
        self._ready.clear()


@torch.no_grad()
def sample_iter(
    target: object,
    conditions: Condition | None = None,
    *,
    class_labels: Tensor | None = None,
    null_condition: Condition | None = None,
    max_slots: int = 64,
    **settings: Any,
) -> SampleIterator:
    """:func:`sample`, image by image as they finish, in memory that follows ``max_slots`` and not N.

    An image is the one that :func:`sample` draws for the same seed and index.

    Args:
        target: as in :func:`sample`.
        conditions: as in :func:`sample`. They are read while iterating, as tensors of ``noise`` are, and must stay as
            they are.
        class_labels: as in :func:`sample`.
        null_condition: as in :func:`sample`.
        max_slots: images in the making at a time; of three times as many the state is held.
        settings: ``schedule``, ``drafter``, ``progress`` and the other arguments of :func:`sample`.

    Returns:
        An iterator over :class:`FinishedImage`, each once, with the run's ``stats``.

    Raises:
        ValueError, TypeError, RuntimeError: at once, as :func:`sample`.
        FloatingPointError: while iterating.
        RuntimeError: of an iterator that goes on after an error.
    """
    where = "sample_iter"
    options = Options.of(where, {**settings, "max_slots": max_slots})
    with torch.inference_mode(False):
        job = make_job(where, target, class_labels, options, conditions, null_condition)
        return SampleIterator(Speculation(job, bounded=True))
