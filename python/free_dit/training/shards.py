"""Trajectories on disk, in shards: written once, read a few rows at a time, and made again from seeds if lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from free_dit.files import write_files
from free_dit.training.identity import changed_settings
from free_dit.training.trajectories import Trajectories
from free_kernels.checkpoint import METADATA_KEY, CheckpointError, save_checkpoint
from free_kernels.protocols import Target
from free_kernels.validation import check_int

_SAMPLED_ELEMENTS = 1024
# The tensors of a file, images first, mapped into memory: an access to a row reads the pages of this row.
Shard = dict[str, Tensor]
_NAMES = ("states", "mean", "std", "features", "labels", "guidance")
# Pairs of neighbouring steps from which the scales of a drafter are computed.
_SCALE_PAIRS = 64


def target_fingerprint(target: Target) -> str:
    """Hexadecimal digest of a target's shapes and of evenly spaced elements of every one of its weights."""
    digest = hashlib.sha256(json.dumps([target.latent_shape, target.feature_shape, target.num_classes]).encode())
    module = getattr(target, "module", target)
    weights = module.state_dict() if isinstance(module, torch.nn.Module) else {}
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().flatten()
        sampled = flat[:: max(1, flat.numel() // _SAMPLED_ELEMENTS)].cpu().contiguous()
        digest.update(sampled.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class ShardStore:
    """The latest ``keep`` shards of one process, in a folder of its own.

    Shard n holds as many images as :class:`Trajectories` that ``make(n)`` returns, images first: ``states``, ``mean``
    and ``std`` ``[B, K, C, H, W]`` float32, ``features [B, K, 2, T, D]`` in the dtype given by ``make``, ``labels`` and
    ``guidance`` ``[B]``. ``manifest.json`` holds the settings, and each shard a digest of them. A shard is written
    under another name and renamed, so that it is complete or missing; complete ones are used again, missing or broken
    ones are made again. Disk holds at most ``keep`` shards.

    Args:
        folder: made if missing.
        settings: plain values that the shards depend on.
        make: makes the trajectories of a shard, the same for a number whenever it is called.
        keep: shards in use at a time.
        defaults: of the settings, for folders of versions that lacked them.

    Raises:
        CheckpointError: the folder holds shards of other settings.
        ValueError, TypeError: ``keep`` is below 1 or not an int.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        make: Callable[[int], Trajectories],
        keep: int,
        defaults: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.make, self.keep = Path(folder), make, check_int("train_drafter", "keep_shards", keep, 1)
        self._open: dict[int, Shard] = {}
        manifest = self.folder / "manifest.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        if manifest.exists():
            text = self._kept(manifest, settings, defaults or {})
        else:
            text = json.dumps(settings, sort_keys=True, indent=2)
            write_files({manifest: text.encode()})
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]

    def _kept(self, manifest: Path, settings: dict[str, Any], defaults: dict[str, Any]) -> str:
        """The text of a manifest of the same settings, which the digests of its shards are of."""
        text = manifest.read_bytes().decode(errors="replace")
        try:
            changed = changed_settings(json.loads(text), settings, defaults)
        except (ValueError, AttributeError, RecursionError) as error:
            changed = [str(error)]
        if changed:
            raise CheckpointError(
                f"train_drafter: {manifest} must be of the same target and settings, got another {', '.join(changed)}; "
                f"choose another --out or remove {self.folder}"
            )
        return text

    def path(self, number: int) -> Path:
        """File of a shard."""
        return self.folder / f"shard-{number:06d}.safetensors"

    def latest(self, number: int) -> ShardWindow:
        """Shards ``number - keep + 1`` (or 0) to ``number``; makes those that are missing and removes all others."""
        wanted = range(max(0, number - self.keep + 1), number + 1)
        self._open = {n: shard for n, shard in self._open.items() if n in wanted}
        # Removed before new ones are made, so that the disk never holds more than ``keep`` shards.
        needed = {self.path(n) for n in wanted}
        for path in self.folder.glob("*.safetensors*"):
            if path not in needed:
                path.unlink(missing_ok=True)
        for n in wanted:
            if n not in self._open:
                self._open[n] = self._read(n) or self._write(n)
        return ShardWindow([self._open[n] for n in wanted])

    def _load(self, number: int) -> Shard:
        path = self.path(number)
        with safe_open(path, framework="pt") as handle:
            metadata = json.loads((handle.metadata() or {}).get(METADATA_KEY, "{}"))
            if metadata.get("kind") != "trajectories" or metadata.get("digest") != self.digest:
                raise CheckpointError(f"train_drafter: {path} must be a shard of this run, got another")
            return {name: handle.get_tensor(name) for name in _NAMES}

    def _read(self, number: int) -> Shard | None:
        """The shard; None if its file is missing, broken or of other settings."""
        try:
            return self._load(number)
        except (OSError, SafetensorError, ValueError):
            return None

    def _write(self, number: int) -> Shard:
        made = self.make(number)
        tensors = {name: getattr(made, name).transpose(0, 1) for name in ("states", "mean", "std")}
        tensors["features"] = made.features.permute(2, 0, 1, 3, 4)
        tensors |= {"labels": made.labels, "guidance": made.guidance}
        metadata = {"kind": "trajectories", "number": number, "digest": self.digest}
        save_checkpoint(self.path(number), tensors, metadata)
        return self._load(number)


class ShardWindow:
    """Images of several shards one after the other, read like :class:`Trajectories`.

    Attributes:
        labels: int64 ``[B]``, of all shards.
        guidance: float32 ``[B]``.
        states: ``[K, B', C, H, W]``, of the first shard.
    """

    def __init__(self, shards: list[Shard]) -> None:
        self._shards = shards
        self.labels, self.guidance = (torch.cat([shard[name] for shard in shards]) for name in ("labels", "guidance"))
        self._first = torch.tensor([0] + [len(shard["labels"]) for shard in shards]).cumsum(0)

    @property
    def states(self) -> Tensor:
        """States of all images and steps of the first shard."""
        return self._shards[0]["states"].transpose(0, 1).contiguous()

    def at(self, name: str, step: Tensor, image: Tensor) -> Tensor:
        """As :meth:`Trajectories.at`; reads these rows only."""
        owner = torch.searchsorted(self._first, image, right=True) - 1
        inside = image - self._first[owner]
        places = zip(owner.tolist(), inside.tolist(), step.tolist(), strict=True)
        rows = torch.stack([self._shards[shard][name][number, k] for shard, number, k in places])
        return rows.transpose(0, 1).flatten(0, 1) if name == "features" else rows

    def scale_samples(self) -> tuple[Tensor, Tensor]:
        """Features ``[P, 2, T, D]`` and changes over a step of pairs of steps spread over the first shard."""
        features = self._shards[0]["features"]
        images, steps = len(features), features.shape[1] - 1
        chosen = torch.linspace(0, images * steps - 1, min(_SCALE_PAIRS, images * steps), dtype=torch.float64).long()
        pairs = torch.stack([features[n // steps, n % steps : n % steps + 2].float() for n in chosen.tolist()])
        return pairs[:, 0].contiguous(), pairs[:, 1] - pairs[:, 0]
