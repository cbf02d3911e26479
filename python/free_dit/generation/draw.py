"""Draws a sample set, split over ranks and resumable at any moment; the images do not depend on the split."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from free_dit.files import sha256_of_state
from free_dit.generation.sample_folder import NOT_DRAWN, SUMS, SampleFolder
from free_dit.generation.settings import WHERE, GenerateSettings, sampler_for
from free_dit.interrupts import deferred_interrupts
from free_dit.latents import LatentDecoder, draws_latents
from free_dit.networks.families import device_of
from free_kernels import PhiloxNoise, RoundInfo, SampleResult
from free_kernels.protocols import Drafter, Target
from free_kernels.results import SampleStats
from free_kernels.validation import check_int, check_writable, fail
from free_kernels.version import __version__

REFRESH_S = 1.0


def to_pixels(samples: Tensor) -> np.ndarray:
    """uint8 ``[N, H, W, C]`` of images ``[N, C, H, W]`` in ``[-1, 1]``, rounded to the nearest level."""
    return ((samples.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _state_hash(module: object) -> str | None:
    """SHA-256 of a module's weights: a set is only continued with the weights that began it."""
    state = getattr(getattr(module, "module", module), "state_dict", None)
    return None if state is None else sha256_of_state(state())


@dataclass(frozen=True)
class _Painter:
    """What draws the images of a set.

    Attributes:
        target: the target.
        drafter: a drafter, ``"frozen"``, or None for the ordinary sampler.
        decode: maps samples to images in ``[-1, 1]``; None where samples are images.
        settings: of the set.
    """

    target: Target
    drafter: str | Drafter | None
    decode: Callable[[Tensor], Tensor] | None
    settings: GenerateSettings

    def draw(self, images: range, labels: Tensor, callback: Callable[[RoundInfo], None]) -> SampleResult:
        """One shard; noise is keyed by the image's index in the whole set, so the shards are slices of one job."""
        settings = self.settings
        speculation = {"relaxation": settings.relaxation, "verification": settings.verification}
        draw = sampler_for(self.target, self.drafter, settings, **speculation)
        noise = PhiloxNoise(settings.seed, first_image=images.start)
        try:
            return draw(labels, noise=noise, max_slots=settings.max_slots, callback=callback)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} (counted from image {images.start} of the set)") from error

    def pixels(self, samples: Tensor) -> np.ndarray:
        """uint8 ``[N, H, W, C]`` of samples ``[N, C, H, W]``; the samples themselves where latents are asked for."""
        if self.settings.format == "npy":
            return samples.float().cpu().numpy()
        images = samples if self.decode is None else self.decode(samples)
        if images.ndim != 4 or len(images) != len(samples) or images.shape[1] not in (1, 3):
            fail(WHERE, "decode", f"a function to [{len(samples)}, 1 or 3, H, W]", images)
        if not bool(images.isfinite().all()):
            raise FloatingPointError(f"{WHERE}: decoded images must be finite, got a non-finite value")
        return to_pixels(images)


def _sampling_record(stats: SampleStats) -> dict[str, list[float]]:
    """Rounds and bias bound of each image, and counts of drafts and rows, as the record of a shard holds them."""
    rounds = np.asarray(stats.rounds_per_image)
    bias = stats.bias_bound_per_image if len(stats.bias_bound_per_image) else np.zeros(len(rounds))
    return {
        "rounds": rounds.tolist(),
        "bias": np.asarray(bias, np.float64).tolist(),
        "counts": [int(stats.tested_by_step.sum()), int(stats.accepted_by_step.sum()), stats.target_rows],
    }


@contextmanager
def _workspace(folder: Path, rank: int, world_size: int) -> Iterator[Path]:
    """A folder of this rank for files that are being written, locked so that no second job draws into the set.

    Files that killed ranks left behind are removed, also those of ranks that only a larger, earlier job had.

    Raises:
        BlockingIOError: another process draws as this rank.
    """
    path = folder / f".rank-{rank}"
    path.mkdir(exist_ok=True)
    with (path / "lock").open("w") as lock:
        if not _locked(lock):
            fail(WHERE, str(folder), f"drawn by one job at a time, which holds {path / 'lock'}", "two", BlockingIOError)
        for left in folder.glob(".rank-*"):
            number = left.name.removeprefix(".rank-")
            if not number.isdecimal() or int(number) % world_size != rank:
                continue
            with contextlib.suppress(FileNotFoundError), (left / "lock").open("a") as other:
                if left != path and not _locked(other):
                    continue
                for file in left.iterdir():
                    if file.name != "lock":
                        file.unlink()
                if left != path:
                    shutil.rmtree(left)
        try:
            yield path
        finally:
            with contextlib.suppress(OSError):
                shutil.rmtree(path)


def _locked(handle) -> bool:
    """Take a lock that the system releases when the process ends; True also where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # Some network file systems have no locks. The lock only guards against two jobs started by mistake.
        return True
    return True


class _Progress:
    """A bar over the images that all ranks have on disk, with their rate and the time left."""

    def __init__(self, samples: SampleFolder, shown: bool, world_size: int) -> None:
        self._samples, self._due = samples, 0.0
        name = samples.folder.name + (f", {world_size} ranks" if world_size > 1 else "")
        total = samples.settings.num
        # A whole shard of images appears at once: the rate is the mean since the start, not that of the last interval.
        self._bar = tqdm(total=total, initial=self._count(), desc=name, unit="img", smoothing=0, disable=not shown)

    def _count(self) -> int:
        return sum(len(self._samples.images_of(shard)) for shard in self._samples.recorded())

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._due = 0.0
        self.update("")
        self._bar.close()

    def drawing(self, place: int, count: int, share: float) -> None:
        """This rank has done a share of the shard that is the ``place``-th of ``count``."""
        self.update(f"shard {place} of {count} here: {share:.0%}")

    def update(self, here: str) -> None:
        """Show the number of images on disk, and ``here``, what this rank does."""
        if self._bar.disable or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + REFRESH_S
        self._bar.n = self._count()
        self._bar.set_postfix_str(here)


def generate(
    folder: Path,
    target: Target,
    drafter: str | Drafter | None,
    settings: GenerateSettings,
    *,
    model: str = "",
    facts: Mapping[str, Any] = MappingProxyType({}),
    rank: int | None = None,
    world_size: int | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
    wait: bool = False,
) -> tuple[list[int], list[int]]:
    """Draw the shards that ``folder`` lacks; shard s belongs to rank s modulo ``world_size``.

    Ranks share only the folder. One call draws a shard; its images, and after them its record, are renamed into place
    when they are complete. So the set does not depend on the number of ranks or on interrupts: on machines of one kind
    it is the same bit for bit. Files on disk are compared with their hashes first; damaged shards are named and drawn
    again.

    Args:
        folder: of the set; see :class:`SampleFolder`.
        target: the target.
        drafter: a drafter, ``"frozen"``, or None for the ordinary sampler.
        settings: what to draw; with a larger ``num`` than the folder's set, and all else alike, that set grows: what
            it has stays, and the rest is drawn in shards after it.
        model: the target's name, for the manifest.
        facts: plain values for the manifest that the target's weights do not hold, such as its number of heads.
        rank: this process; the environment's ``RANK`` (0 without one) if None.
        world_size: number of processes; the environment's ``WORLD_SIZE`` (1 without one) if None.
        decode: maps samples ``[N, C, H, W]`` to images ``[N, 1 or 3, H', W']`` in ``[-1, 1]``, such as a
            :class:`free_dit.latents.LatentDecoder`, whose hash is then part of the manifest.
        progress: show a bar over the images of all ranks.
        wait: return only when the other ranks' shards are on disk too; the caller must end this process if a rank dies.

    Returns:
        Shards drawn by this call, and shards that are still missing; the rank that draws the last one finds none.

    Raises:
        ValueError: the folder holds a set of other settings, or a larger one; the target draws latents, ``decode`` is
            None and the format is not "npy".
        FloatingPointError: an image is not finite; its shard is not kept.
        OSError: the folder cannot be written. Whole shards are kept.
        KeyboardInterrupt: after SIGINT or SIGTERM, at the end of a round. Whole shards are kept.
    """
    folder = Path(folder)
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    check_int(WHERE, "world_size", world_size, 1)
    check_int(WHERE, "rank", rank, 0, world_size - 1)
    if settings.format == "npy" and decode is not None:
        fail(WHERE, "decode", "None for latents, which are kept as they are (format 'npy')", "given")
    if decode is None and draws_latents(target) and settings.format != "npy":
        fail(WHERE, "decode", f"given for a target of {target.latent_shape[0]} latent channels", "None")
    check_writable(WHERE, "folder", folder / "shards" / "shard.npz")
    painter = _Painter(target, drafter, decode, settings)
    identity = {
        **facts,
        "model": model,
        "model_sha256": _state_hash(target),
        "drafter_sha256": None if drafter is None or isinstance(drafter, str) else _state_hash(drafter),
        "version": __version__,
    }
    if isinstance(decode, LatentDecoder):
        identity |= decode.facts()
    shards = settings.shards
    try:
        with _workspace(folder, rank, world_size) as workspace, deferred_interrupts() as interrupted:
            samples = SampleFolder.begin(folder, settings, target.num_classes, identity)
            shards = samples.shards
            mine = _lacking(samples, range(rank, shards, world_size), interrupted)
            with _Progress(samples, progress, world_size) as bar:
                for place, shard in enumerate(mine, start=1):
                    show = partial(bar.drawing, place, len(mine))
                    _draw_shard(samples, shard, painter, workspace, interrupted, show)
                while wait and len(samples.recorded()) < shards:
                    _raise_if(interrupted)
                    bar.update("waiting for the other ranks")
                    time.sleep(0.2)
        missing = sorted(set(range(shards)) - set(samples.recorded()))
        if not missing:
            samples.write_sums()
    except OSError as error:
        _name(error, folder, shards)
    return mine, missing


def _lacking(samples: SampleFolder, shards: range, interrupted: list[int]) -> list[int]:
    """Shards to draw; the reason is printed for shards that had been drawn before."""
    problems = {}
    for shard in shards:
        _raise_if(interrupted)
        problem = problems[shard] = samples.problem(shard)
        if problem not in (None, NOT_DRAWN):
            print(f"{WHERE}: shard {shard} of {samples.folder} is drawn again: {problem}", file=sys.stderr)
            # Without this record and the sums no rank counts the set as complete.
            samples.record_path(shard).unlink(missing_ok=True)
            (samples.folder / SUMS).unlink(missing_ok=True)
    return [shard for shard, problem in problems.items() if problem is not None]


def _draw_shard(
    samples: SampleFolder,
    shard: int,
    painter: _Painter,
    workspace: Path,
    interrupted: list[int],
    show: Callable[[float], None],
) -> None:
    settings, images = samples.settings, samples.images_of(shard)

    def after_round(info: RoundInfo) -> None:
        _raise_if(interrupted)
        # An image that finished in this round is counted in ``images_done`` and listed in ``steps``.
        steps = info.images_done * settings.steps + sum(step for step in info.steps if step < settings.steps)
        show(steps / (info.num_images * settings.steps))

    labels = torch.from_numpy(samples.labels[images.start : images.stop]).to(device_of(painter.target))
    result = painter.draw(images, labels, after_round)
    samples.commit(shard, painter.pixels(result.samples), _sampling_record(result.stats), workspace)
    _raise_if(interrupted)


def _raise_if(interrupted: list[int]) -> None:
    if interrupted:
        raise KeyboardInterrupt


def _name(error: OSError, folder: Path, shards: int) -> NoReturn:
    """Raise the error again with the file that could not be written and the number of shards that are kept."""
    if error.strerror is None:
        raise error
    kept = len(list((folder / "shards").glob("shard-*.json")))
    found = f"{error.strerror}; {kept} of {shards} shards are kept, and the same command goes on from there"
    raise type(error)(f"{WHERE}: {error.filename or folder} must be writable, got {found}") from error
