"""A large sample set, drawn in shards: resumable, split over ranks, the same images whatever the split."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from free_dit.evaluation.files import read_arrays, read_json, write_arrays, write_json
from free_kernels import DDPMSchedule, PhiloxNoise, SampleResult, ancestral_sample, sample
from free_kernels.types import Drafter, Target
from free_kernels.validation import check_float, check_int, check_writable, fail
from free_kernels.version import __version__

WHERE = "evaluate"
KIND = "free_dit sample set"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class GenerateSettings:
    """What a sample set is drawn with.

    Attributes:
        num: images; image i has label i modulo the number of classes.
        drafter: ``None`` for the ordinary sampler, else a name for the manifest.
        steps: sampling steps K.
        draft_length: rows of a round for one image; 1 for the ordinary sampler.
        relaxation: strength; 0 is lossless.
        verification: ``"token"`` or ``"block"``.
        guidance: guidance scale.
        seed: key of all noise.
        shard: images of a shard, the unit that is kept or drawn again after an interrupt.
    """

    num: int = 50_000
    drafter: str | None = "bundled"
    steps: int = 250
    draft_length: int = 6
    relaxation: float = 0.0
    verification: str = "token"
    guidance: float = 1.0
    seed: int = 0
    shard: int = 500

    def __post_init__(self) -> None:
        for name in ("num", "steps", "draft_length", "shard"):
            check_int(WHERE, name, getattr(self, name), 1)
        check_int(WHERE, "seed", self.seed, 0, 2**64 - 1)
        check_float(WHERE, "relaxation", self.relaxation, 0.0)

    @property
    def shards(self) -> int:
        """Number of shards; the last may be smaller."""
        return -(-self.num // self.shard)

    def images_of(self, shard: int) -> range:
        """Indices of the images of a shard."""
        return range(shard * self.shard, min(self.num, (shard + 1) * self.shard))


def shard_path(folder: Path, shard: int) -> Path:
    """Where a shard lies."""
    return folder / "shards" / f"shard-{shard:06d}.npz"


def to_pixels(samples: Tensor) -> np.ndarray:
    """uint8 ``[N, H, W, C]`` of images ``[N, C, H, W]`` in ``[-1, 1]``, rounded to the nearest level."""
    return ((samples.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _state_hash(module: object) -> str | None:
    """SHA-256 of a module's weights, so that a set is never continued with others."""
    state = getattr(getattr(module, "module", module), "state_dict", None)
    if state is None:
        return None
    digest = hashlib.sha256()
    for name, value in sorted(state().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _draw(target: Target, drafter: str | Drafter | None, settings: GenerateSettings, images: range, **rest: Any):
    """One shard; noise is keyed by the image's index in the whole set, so the shards are slices of one job."""
    count = target.num_classes
    labels = torch.tensor([index % count for index in images], device=rest.pop("device"))
    common: dict[str, Any] = {
        "schedule": DDPMSchedule(settings.steps),
        "guidance_scale": settings.guidance,
        "noise": PhiloxNoise(settings.seed, first_image=images.start),
        **rest,
    }
    if drafter is None:
        return labels, ancestral_sample(target, labels, **common)
    return labels, sample(
        target,
        labels,
        drafter=drafter,
        draft_length=settings.draft_length,
        relaxation=settings.relaxation,
        verification=settings.verification,
        **common,
    )


def _whole(arrays: dict[str, np.ndarray] | None, settings: GenerateSettings, shard: int) -> bool:
    """Whether the arrays are those of the shard."""
    if arrays is None or not {"arr_0", "arr_1", "rounds", "bias", "counts"} <= arrays.keys():
        return False
    number = len(settings.images_of(shard))
    pixels = arrays["arr_0"]
    return (
        pixels.dtype == np.uint8
        and pixels.ndim == 4
        and all(len(arrays[name]) == number for name in ("arr_0", "arr_1", "rounds", "bias"))
    )


def _shard_arrays(labels: Tensor, pixels: np.ndarray, result: SampleResult) -> dict[str, np.ndarray]:
    """``counts`` are drafts tested, drafts accepted, target rows."""
    stats = result.stats
    bias = stats.bias_bound_per_image if len(stats.bias_bound_per_image) else np.zeros(len(labels))
    counts = [int(stats.tested_by_step.sum()), int(stats.accepted_by_step.sum()), stats.target_rows]
    return {
        "arr_0": pixels,
        "arr_1": labels.cpu().numpy(),
        "rounds": np.asarray(stats.rounds_per_image),
        "bias": np.asarray(bias, np.float64),
        "counts": np.array(counts, np.int64),
    }


def _check_manifest(folder: Path, identity: dict[str, Any]) -> None:
    path = folder / MANIFEST
    if not path.exists():
        write_json(path, identity)
        return
    kept = read_json(WHERE, path)
    changed = sorted(name for name in identity.keys() | kept.keys() if identity.get(name) != kept.get(name))
    if changed:
        shown = ", ".join(f"{name} {kept.get(name)!r} (now {identity.get(name)!r})" for name in changed)
        raise ValueError(
            f"{WHERE}: {folder} must hold a sample set of the same settings, got {shown}; choose another or remove it"
        )


def missing_shards(folder: Path, settings: GenerateSettings, shards: range | None = None) -> list[int]:
    """Shards that are not there or damaged."""
    wanted = range(settings.shards) if shards is None else shards
    return [shard for shard in wanted if not _whole(read_arrays(shard_path(folder, shard)), settings, shard)]


def generate(
    folder: Path,
    target: Target,
    drafter: str | Drafter | None,
    settings: GenerateSettings,
    *,
    model: str = "",
    rank: int | None = None,
    world_size: int | None = None,
    max_slots: int | None = None,
    device: torch.device | str = "cpu",
    decode: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
) -> tuple[list[int], list[int]]:
    """Draw the shards that ``folder`` lacks; shard s belongs to rank s modulo ``world_size``.

    Ranks share nothing but the folder. An image depends on its seed and index only, so a set is the same whatever the
    number of ranks and however often it was interrupted, up to rounding in batches of another shape.

    Args:
        folder: holds ``manifest.json`` and ``shards/shard-*.npz`` (ADM's ``arr_0``, ``arr_1``, and counts).
        target: the target, on ``device``.
        drafter: a drafter, ``"frozen"``, or None for the ordinary sampler.
        settings: what to draw.
        model: the target's name, for the manifest.
        rank: this process; the environment's ``RANK`` (0 without one) if None.
        world_size: number of processes; the environment's ``WORLD_SIZE`` (1 without one) if None.
        max_slots: images in the making at a time; a whole shard if None.
        device: of the labels.
        decode: maps samples ``[N, C, H, W]`` to images ``[N, 1 or 3, H', W']`` in ``[-1, 1]``, such as a VAE's decoder.
        progress: show a bar.

    Returns:
        Shards drawn by this call, and shards that are still missing; the rank that draws the last one finds none.

    Raises:
        ValueError: the folder holds a set of other settings; the target draws latents and ``decode`` is None.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    check_int(WHERE, "world_size", world_size, 1)
    check_int(WHERE, "rank", rank, 0, world_size - 1)
    if decode is None and target.latent_shape[0] not in (1, 3):
        fail(WHERE, "decode", f"given for a target of {target.latent_shape[0]} latent channels", "None")
    check_writable(WHERE, "folder", folder / "shards" / "shard.npz")
    identity = {
        "kind": KIND,
        "model": model,
        "model_sha256": _state_hash(target),
        "drafter_sha256": None if drafter is None or isinstance(drafter, str) else _state_hash(drafter),
        "version": __version__,
        **asdict(settings),
    }
    _check_manifest(folder, identity)
    mine = missing_shards(folder, settings, range(rank, settings.shards, world_size))
    for shard in tqdm(mine, desc=f"{folder.name}, rank {rank}", unit="shard", disable=not progress):
        images = settings.images_of(shard)
        labels, result = _draw(target, drafter, settings, images, device=device, max_slots=max_slots)
        samples = result.samples if decode is None else decode(result.samples)
        write_arrays(shard_path(folder, shard), _shard_arrays(labels, to_pixels(samples), result))
    return mine, missing_shards(folder, settings) if world_size > 1 else []


def settings_of(folder: Path) -> GenerateSettings:
    """Settings of the set in a folder.

    Raises:
        ValueError: the manifest is of another kind.
    """
    manifest = read_json(WHERE, folder / MANIFEST)
    if manifest.get("kind") != KIND:
        fail(WHERE, str(folder / MANIFEST), f"of kind {KIND!r}", repr(manifest.get("kind")))
    return GenerateSettings(**{name: manifest[name] for name in GenerateSettings.__dataclass_fields__})


def sampling_figures(folder: Path) -> dict[str, Any]:
    """Calls, acceptance and bias bound of a complete set."""
    settings = settings_of(folder)
    parts = [read_arrays(shard_path(folder, shard)) or {} for shard in range(settings.shards)]
    rounds, bias = (np.concatenate([part[name] for part in parts]) for name in ("rounds", "bias"))
    tested, accepted, rows = np.sum([part["counts"] for part in parts], 0).tolist()
    return {
        "call_reduction": settings.steps * settings.num / float(rounds.sum()),
        "acceptance": accepted / tested if tested else None,
        "rows_per_step": rows / (settings.steps * settings.num),
        "bias_bound": float(bias.mean()),
    }
