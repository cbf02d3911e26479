"""What defines a trained drafter: its shape, its loss and its training data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from free_dit.data import DATASETS
from free_dit.training.loop import LoopConfig
from free_kernels.drafters import DrafterConfig
from free_kernels.validation import check_choice, check_float, check_int, fail

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
        frozen_share: share of the chain, from its first step on, that clean samples draft, as for a frozen drafter, so
            that the drafter learns the steps behind it only: where it would gain nothing, or not what its calls cost.
        first: share of the windows that begin at the first step, for a drafter that drafts it.
        refused: share of the windows before which a round was refused, so that its rows correct their drafts as they
            do in ``sample``: there the drafter's change from one state of a step to another one counts. They take
            ``unroll`` target rows more each.
        redrawn: share of the windows whose noise is drawn anew, so that a set of trajectories is not learned by heart.
            They ask the target for ``unroll`` rows each, one after the other. Others than the refused ones.
        other_steps: K of further chains to learn from; 0 for none.
        other_share: share of the iterations that learn from those.
        start: a drafter to begin from, of the same configuration; empty begins with random weights. Its scales stay.
        max_guidance: guidance scales are drawn from [1, max_guidance] for half of the images and 1 for the rest; 1 for
            a target without a null label.
        feature_weight: weight of the mean squared feature error, in units of the feature's change over a step.
        compile: train through torch.compile.
        calibration_images: fresh trajectories that acceptance is measured on at the end, for automatic draft lengths; 0
            leaves it out.
        forward_dataset: a data set, whose training images are noised step by step into the chains to learn from; empty
            learns from the target's own chains, which need no images.
        schedule: "auto" (that of the target's family), "ddpm" or "policy".
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
    frozen_share: float = 0.0
    first: float = 0.02
    refused: float = 0.0
    redrawn: float = 0.0
    other_steps: int = 0
    other_share: float = 0.3
    start: str = ""
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

    def identity(self) -> dict[str, Any]:
        """The settings that training depends on, as plain values."""
        free = ("compile", "calibration_images", "max_rows", "process_timeout_s")
        return {name: value for name, value in asdict(self).items() if name not in free}

    def check(self) -> None:
        """Raise ValueError or TypeError where a setting is wrong."""
        where = "train_drafter"
        self.loop.check(where)
        check_int(where, "num_steps", self.num_steps, 3)
        check_int(where, "unroll", self.unroll, 1, self.num_steps - 2)
        check_int(where, "batch_size", self.batch_size, 1)
        check_int(where, "trajectories", self.trajectories, 2)
        check_int(where, "refresh_every", self.refresh_every, 1)
        check_float(where, "max_guidance", self.max_guidance, 1.0)
        for name in ("late", "first", "frozen_share", "refused", "redrawn", "other_share"):
            check_float(where, name, getattr(self, name), 0.0, 1.0)
        if self.frozen_share and self.drafter.window > 1:
            fail(
                where, "frozen_share", "0 for a drafter with a window, which is called at every step", self.frozen_share
            )
        if self.refused and self.drafter.window > 1:
            fail(where, "refused", "0 for a drafter with a window, whose drafts rows do not correct", str(self.refused))
        if self.refused + self.redrawn > 1.0:
            fail(where, "redrawn", f"at most 1 - refused, {1 - self.refused:g}", f"{self.redrawn:g}")
        if self.other_steps:
            check_int(where, "other_steps", self.other_steps, self.unroll + 2)
            if self.other_steps == self.num_steps:
                fail(where, "other_steps", f"another number than num_steps, {self.num_steps}", str(self.other_steps))
        check_choice(where, "loss", self.loss, tuple(LOSSES))
        if check_float(where, "feature_weight", self.feature_weight, 0.0) == 0.0 and self.loss == "none":
            fail(where, "feature_weight", "above 0 for loss 'none'", self.feature_weight)
        check_int(where, "calibration_images", self.calibration_images, 0)
        if self.forward_dataset:
            check_choice(where, "forward_dataset", self.forward_dataset, tuple(DATASETS))
        check_choice(where, "precision", self.precision, tuple(DTYPES))
        check_choice(where, "store", self.store, ("memory", "shards"))
        check_int(where, "keep_shards", self.keep_shards, 1)
        check_choice(where, "feature_dtype", self.feature_dtype, tuple(DTYPES))
        if self.max_rows:
            check_int(where, "max_rows", self.max_rows, 2)
        check_int(where, "process_timeout_s", self.process_timeout_s, 1)
