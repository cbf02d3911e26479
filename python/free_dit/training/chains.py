"""Where the trajectories of a drafter's training come from: made anew now and then, kept in memory or on disk."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from free_dit.data import DATASETS, ImageData
from free_dit.training.distributed import Place
from free_dit.training.drafter_config import DTYPES, DrafterTrainConfig
from free_dit.training.loop import iteration_seed, mixed_seed
from free_dit.training.shards import ShardStore, ShardWindow, target_fingerprint
from free_dit.training.trajectories import Storage, Trajectories, collect, make_schedule, noised_chains
from free_kernels.protocols import Target
from free_kernels.validation import fail


class ChainSource:
    """Sets of trajectories of one number of steps.

    Args:
        target: the frozen network.
        config: how many trajectories, of what kind, kept where.
        num_steps: K of the chains.
        place: each process has trajectories of its own.
        device: of ``timesteps`` and ``table``.
        folder: of the shards, for ``config.store == "shards"``.

    Attributes:
        schedule: of K steps.
        timesteps: int64 ``[K]``.
        table: ``[K, 8]``, its transition coefficients.
    """

    def __init__(
        self,
        target: Target,
        config: DrafterTrainConfig,
        num_steps: int,
        place: Place,
        device: torch.device,
        folder: Path | None = None,
    ) -> None:
        self.target, self.config, self.num_steps, self.place = target, config, num_steps, place
        self.schedule = make_schedule(config.schedule, target, num_steps)
        self.timesteps = self.schedule.timesteps.to(device)
        self.table = self.schedule.table(self.schedule.resolve_variance(target.learns_variance)).to(device)
        self._store: ShardStore | None = None
        if config.store == "shards":
            name = f"rank{place.rank}" if self._is_main else f"rank{place.rank}-{num_steps}-steps"
            folder = Path(folder or "trajectories") / name
            defaults = asdict(DrafterTrainConfig())
            self._store = ShardStore(folder, self._settings(), self.trajectories, config.keep_shards, defaults)
        self._images = _images_of(target, config.forward_dataset) if config.forward_dataset else None
        self._data: Trajectories | ShardWindow | None = None
        self._epoch = -1

    @property
    def _is_main(self) -> bool:
        return self.num_steps == self.config.num_steps

    def _settings(self) -> dict[str, object]:
        """All settings that the content of the shards depends on; ``max_rows`` only changes the rounding."""
        named = ("trajectories", "max_guidance", "feature_dtype", "forward_dataset")
        return {name: getattr(self.config, name) for name in named} | {
            "num_steps": self.num_steps,
            "target": target_fingerprint(self.target),
            "schedule": repr(self.schedule),
            "seed": self.config.loop.seed,
            "rank": self.place.rank,
        }

    def trajectories(self, number: int) -> Trajectories:
        """Set ``number``; every call with this number returns the same trajectories."""
        config, rank = self.config, self.place.rank
        count, seed = config.trajectories, config.loop.seed
        with iteration_seed(seed + 1, number, rank):
            labels = torch.randint(self.target.num_classes, (count,))
            guidance = torch.rand(count) * (config.max_guidance - 1) + 1
            picked = torch.rand(count)
        guidance[: count // 2] = 1.0
        noise_seed = (seed << 20) + number if rank == 0 else mixed_seed(seed, number, rank)
        if not self._is_main:
            noise_seed = mixed_seed(seed, number, rank, self.num_steps)
        given = None
        if self._images is not None:
            rows = (picked * len(self._images.labels)).long()
            labels = self._images.labels[rows]
            given = noised_chains(self.schedule, self._images.images[rows], mixed_seed(seed, number, rank))
        return collect(
            self.target,
            self.schedule,
            labels,
            guidance,
            noise_seed,
            progress=self.place.is_first,
            max_rows=config.max_rows or None,
            storage=Storage(DTYPES[config.feature_dtype], "cpu", images_first=self._store is not None),
            given=given,
        )

    def data(self, epoch: int) -> Trajectories | ShardWindow:
        """Training data of the iterations of ``epoch``; every call with this epoch returns the same."""
        if self._data is None or epoch != self._epoch:
            # The old set is freed first: memory holds one set at a time.
            self._data = None
            self._data = self.trajectories(epoch) if self._store is None else self._store.latest(epoch)
            self._epoch = epoch
        return self._data


def images_fit(target: Target, images: ImageData) -> bool:
    """Whether the images have the shape of the target's latents, and no more classes than it knows."""
    return images.images.shape[1:] == target.latent_shape and int(images.labels.max()) < target.num_classes


def _images_of(target: Target, name: str) -> ImageData:
    images = DATASETS[name]("train")
    if not images_fit(target, images):
        shape, classes = tuple(images.images.shape[1:]), int(images.labels.max()) + 1
        wanted = f"empty, or images of the target's shape {tuple(target.latent_shape)} and {target.num_classes} classes"
        fail("train_drafter", "forward_dataset", wanted, f"{name!r} of {shape} and {classes} classes")
    return images
