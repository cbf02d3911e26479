"""The loss of a learned drafter on its target's own trajectories, and its configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from free_dit.data import DATASETS, ImageData
from free_dit.training.distributed import Place
from free_dit.training.loop import LoopConfig, iteration_seed, mixed_seed
from free_dit.training.shards import ShardStore, ShardWindow, target_fingerprint
from free_dit.training.trajectories import (
    Storage,
    Trajectories,
    collect,
    guided_transition,
    make_schedule,
    noised_chains,
)
from free_kernels.drafters import DrafterConfig, FeatureDrafter
from free_kernels.drafters.memory import FeatureMemory
from free_kernels.protocols import Target, first_drafted_step, guided_channels, null_label
from free_kernels.validation import check_choice, check_int

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def rejection_loss(gap_sq: Tensor) -> Tensor:
    """``-log(2 Phi(-delta / 2))``, smoothed at 0 where its slope in ``delta^2`` is infinite."""
    return -torch.special.log_ndtr(-(gap_sq + 1e-6).sqrt() / 2) - math.log(2.0)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "rejection": rejection_loss,
    "log1p": torch.log1p,
    "none": torch.zeros_like,
}


@dataclass(frozen=True)
class DrafterTrainConfig:
    """Everything that defines a trained drafter.

    Attributes:
        drafter: shape of the drafter.
        loop: length and speed of training.
        num_steps: K of the chains it learns from.
        batch_size: windows per iteration.
        unroll: drafts in a row that the loss sees, each from the one before.
        trajectories: images drawn at a time.
        refresh_every: iterations between fresh trajectories.
        loss: "rejection", ``-log`` of the acceptance probability ``2 Phi(-delta / 2)``, which is what a chain of drafts
            multiplies; "log1p", ``log(1 + delta^2)``, less weight on large gaps; "none", to regress features alone.
        late: share of the windows that begin in the last fifth of the chain, beside those spread over all of it; the
            logarithm of the number of steps left is uniform there, as acceptance falls with every halving.
        first: share of the windows that begin at the first step, for a drafter that drafts it.
        max_guidance: guidance scales are drawn from [1, max_guidance] for half of the images and 1 for the rest.
        feature_weight: weight of the mean squared feature error, in units of the feature's change over a step.
        compile: train through torch.compile.
        calibration_images: fresh trajectories that acceptance is measured on at the end, for automatic draft lengths; 0
            leaves it out.
        forward_dataset: a data set, whose training images are noised step by step into the chains to learn from; empty
            learns from the target's own chains, which need no images.
        schedule: "auto" (that of the target's family) or "ddpm".
        precision: "float32", or "bfloat16" or "float16" for the drafter's own arithmetic under autocast; its weights,
            and delta, are float32 in any case, and the target keeps the dtype that it was loaded with.
        store: "memory" holds one set of trajectories at a time; "shards" writes each set to disk and draws windows
            from the latest ``keep_shards`` of them.
        keep_shards: shards that each process keeps on disk.
        feature_dtype: dtype of the features in memory or on disk.
        max_rows: bound of the network rows in a call that makes trajectories, two for each image; 0 sets none.
        process_timeout_s: seconds after which a process gives up waiting for the others.
    """

    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    num_steps: int = 250
    batch_size: int = 128
    unroll: int = 2
    trajectories: int = 64
    refresh_every: int = 250
    late: float = 0.0
    first: float = 0.02
    max_guidance: float = 4.0
    loss: str = "rejection"
    feature_weight: float = 0.0
    compile: bool = False
    calibration_images: int = 16
    forward_dataset: str = ""
    schedule: str = "auto"
    precision: str = "float32"
    store: str = "memory"
    keep_shards: int = 4
    feature_dtype: str = "float32"
    max_rows: int = 0
    process_timeout_s: int = 1800

    def check(self) -> None:
        """Raise ValueError or TypeError where a setting is wrong."""
        where = "train_drafter"
        check_int(where, "num_steps", self.num_steps, 3)
        check_int(where, "unroll", self.unroll, 1, self.num_steps - 2)
        check_int(where, "batch_size", self.batch_size, 1)
        check_int(where, "trajectories", self.trajectories, 2)
        check_int(where, "refresh_every", self.refresh_every, 1)
        check_choice(where, "loss", self.loss, tuple(LOSSES))
        if self.forward_dataset:
            check_choice(where, "forward_dataset", self.forward_dataset, tuple(DATASETS))
        check_choice(where, "precision", self.precision, tuple(DTYPES))
        check_choice(where, "store", self.store, ("memory", "shards"))
        check_int(where, "keep_shards", self.keep_shards, 1)
        check_choice(where, "feature_dtype", self.feature_dtype, tuple(DTYPES))
        if self.max_rows:
            check_int(where, "max_rows", self.max_rows, 2)
        check_int(where, "process_timeout_s", self.process_timeout_s, 1)


class DrafterLoss:
    """Loss on delta, the gap that decides acceptance, over windows of fresh trajectories.

    A drafter with a window first remembers drafts from exact features at the steps before; gradients reach them too.
    For a learned variance delta^2 adds the squared log-variance error, the cost of comparing half of the variance.

    Args:
        target: the frozen network.
        drafter: trained, on the target's device.
        config: what the loss is.
        place: each process has trajectories and windows of its own.
        folder: of the shards, for ``config.store == "shards"``.
    """

    def __init__(
        self,
        target: Target,
        drafter: FeatureDrafter,
        config: DrafterTrainConfig,
        place: Place = Place(),
        folder: Path | None = None,
    ) -> None:
        self.target, self.drafter, self.config, self.place = target, drafter, config, place
        self.device = drafter.positions.device
        self.network = torch.compile(drafter) if config.compile else drafter
        self.schedule = make_schedule(config.schedule, target, config.num_steps)
        self.timesteps = self.schedule.timesteps.to(self.device)
        self.table = self.schedule.table(self.schedule.resolve_variance(target.learns_variance)).to(self.device)
        self.guided = guided_channels(target)
        self.dtype = DTYPES[config.precision]
        self._store: ShardStore | None = None
        if config.store == "shards":
            folder = Path(folder or "trajectories") / f"rank{place.rank}"
            self._store = ShardStore(folder, self._settings(), self.trajectories, config.keep_shards)
        self._images: ImageData | None = None
        self._data: Trajectories | ShardWindow | None = None
        self._epoch = -1
        self._first = first_drafted_step(drafter)

    def _settings(self) -> dict[str, object]:
        """All settings that the content of the shards depends on; ``max_rows`` only changes the rounding."""
        named = ("num_steps", "trajectories", "max_guidance", "feature_dtype", "forward_dataset")
        return {name: getattr(self.config, name) for name in named} | {
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
        given = None
        if config.forward_dataset:
            self._images = self._images or DATASETS[config.forward_dataset]("train")
            rows = (picked * len(self._images.labels)).long()
            labels = self._images.labels[rows]
            given = noised_chains(self.schedule, self._images.images[rows], mixed_seed(seed, number, rank))
        return collect(
            self.target,
            self.schedule,
            labels,
            guidance,
            (seed << 20) + number if rank == 0 else mixed_seed(seed, number, rank),
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

    def fit_scales(self) -> None:
        """Give the drafter its scales, and its stand-in for a first parent, from the first trajectories."""
        first = self.data(0)
        self.drafter.set_feature_scale(*first.scale_samples())
        self.drafter.set_change_scale(self.schedule.timesteps, first.states)
        begin = torch.arange(first.states.shape[1])
        features = first.at("features", torch.zeros_like(begin), begin).float()
        self.drafter.set_first_feature(first.states[0].float().repeat(2, 1, 1, 1), features)

    def __call__(self, iteration: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of one batch of windows."""
        config, rows, unroll = self.config, self.config.batch_size, self.config.unroll
        data = self.data(iteration // config.refresh_every)
        image = torch.randint(len(data.labels), (rows,))
        last = config.num_steps - 2
        start = torch.randint(1, last + 1, (rows,))
        if config.late:
            left = torch.rand(rows).mul(math.log(max(2, config.num_steps // 5))).exp().long()
            start = torch.where(torch.rand(rows) < config.late, (last + 1 - left).clamp(min=1), start)
        if config.first and self._first == 0:
            start = start.masked_fill(torch.rand(rows) < config.first, 0)
        guidance = data.guidance[image]
        network = _NetworkRows(guidance, self.drafter.config.window > 1, self.device)
        y = data.labels[image]
        y = network.pick(torch.cat([y, torch.full_like(y, null_label(self.target))]).to(self.device))
        windows, guidance = _Windows(data, image, y, network), guidance.to(self.device)
        memory = self._past(windows, start)
        feature = self._parents(windows, start)
        loss, metrics = torch.zeros((), device=self.device), {}
        for ahead in range(unroll):
            # Windows end where the chain does, before its last step, which needs no draft.
            k, inside = (start + ahead).clamp(max=last), (start + ahead <= last).to(self.device)
            feature = self._draft(windows, feature, k, memory)
            here = k.to(self.device)
            output = network.spread(self.target.head(feature, network.both(self.timesteps[here]), y))
            state, exact_mean, exact_std = (windows.rows(name, k) for name in ("states", "mean", "std"))
            mean, std = guided_transition(state, output, self.table[here], guidance, self.guided)
            gap_sq = gap(mean, std, exact_mean, exact_std)
            loss = loss + torch.where(inside, LOSSES[config.loss](gap_sq), 0.0).mean() / unroll
            if config.feature_weight:
                exact = network.pick(windows.rows("features", k))
                error = ((feature - exact) / self.drafter.change_std).square().flatten(1).mean(1)
                error = torch.where(network.both(inside), error, 0.0).mean()
                loss = loss + config.feature_weight * error / unroll
            accept = 2 * torch.special.ndtr(-gap_sq.detach().sqrt() / 2)
            metrics[f"accept_{ahead + 1}"] = accept[inside].mean().item()
        return loss, metrics

    def _parents(self, windows: _Windows, step: Tensor) -> Tensor:
        """Exact features ``[R, T, D]`` before ``step [B]``; at step 0 the drafter's stand-in for one."""
        exact = windows.network.pick(windows.rows("features", (step - 1).clamp(min=0)))
        if self._first:
            return exact
        # Computed even if no window begins at step 0, so that every weight has a gradient in every iteration.
        guess = windows.network.both(self.drafter.initial_feature(windows.rows("states", step)))
        return torch.where(windows.network.both((step == 0).to(self.device)).view(-1, 1, 1), guess, exact)

    def _draft(self, windows: _Windows, feature: Tensor, step: Tensor, memory: FeatureMemory | None) -> Tensor:
        """Feature ``[R, T, D]`` drafted at ``step [B]`` from the one at the step before."""
        both = windows.network.both
        previous, state = (both(windows.rows("states", k)) for k in ((step - 1).clamp(min=0), step))
        remembered = {} if memory is None else {"memory": memory}
        t = both(self.timesteps[step.to(self.device)])
        mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if mixed else nullcontext():
            return self.network(feature, previous, state, t, windows.y, **remembered).float()

    def _past(self, windows: _Windows, start: Tensor) -> FeatureMemory | None:
        """Memory of drafts from exact features at the W - 1 steps before ``start [B]``; None without a window.

        Windows near the first drafted step have a shorter past. For a drafter of one block, this memory holds all that
        a draft of a long chain attends to; the keys of deeper blocks would depend on drafts of still earlier steps.
        """
        window = self.drafter.config.window
        # No draft is refused here: room for one draft besides the past is enough.
        memory = self.drafter.new_memory(len(start), 2, 1, self.dtype)
        for age in range(window - 1, 0, -1):
            step = (start - age).clamp(min=self._first)
            self._draft(windows, self._parents(windows, step), step, memory)
            memory.rewind(torch.where(start - age >= self._first, 0, window).to(self.device))
        return memory


class _NetworkRows:
    """The network rows of a batch of B windows: all conditional ones, then the unconditional ones of guided windows.

    Without guidance the unconditional branch does not enter the output.

    Args:
        guidance: float32 ``[B]``.
        whole: keep both branches of all.
        device: where rows are picked.
    """

    def __init__(self, guidance: Tensor, whole: bool, device: torch.device) -> None:
        count = len(guidance)
        guided = torch.arange(count) if whole else (guidance != 1.0).nonzero().view(-1)
        self._rows = torch.cat([torch.arange(count), guided + count]).to(device)
        branch = torch.arange(count).index_copy_(0, guided, count + torch.arange(len(guided)))
        self._spread = torch.cat([torch.arange(count), branch]).to(device)

    def pick(self, rows: Tensor) -> Tensor:
        """Those of rows ``[2 B, ...]`` of both branches."""
        return rows.index_select(0, self._rows)

    def both(self, rows: Tensor) -> Tensor:
        """Rows ``[B, ...]`` for each branch."""
        return rows.index_select(0, self._rows % len(rows))

    def spread(self, rows: Tensor) -> Tensor:
        """``[2 B, ...]``; conditional rows take the place of the unconditional ones that were left out."""
        return rows.index_select(0, self._spread)


@dataclass(frozen=True)
class _Windows:
    """A batch of B windows of trajectories.

    Attributes:
        data: the trajectories.
        image: int64 ``[B]``, the image of each window.
        y: labels ``[R]`` of the network rows, on the drafter's device.
        network: the network rows.
    """

    data: Trajectories | ShardWindow
    image: Tensor
    y: Tensor
    network: _NetworkRows

    def rows(self, name: str, step: Tensor) -> Tensor:
        """``data.at(name, step, image)`` at ``step [B]``, in float32 on the drafter's device."""
        return self.data.at(name, step, self.image).to(self.y.device).float()


def gap(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """delta^2 ``[R]`` of drafted against reference transitions: whitened means plus log-variance error."""
    whitened = ((mean_q - mean_p) / std_q).flatten(1).square().sum(1)
    return whitened + (2 * (std_q.log() - std_p.log())).flatten(1).square().sum(1)
