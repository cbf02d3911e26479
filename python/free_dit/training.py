"""The training loop that the DiT and the drafter share: AdamW, warm-up and cosine, EMA, progress, checkpoints."""

from __future__ import annotations

import csv
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from free_kernels.checkpoint import CheckpointError, load_checkpoint, reading, save_checkpoint
from free_kernels.validation import check_int, describe


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train.

    Attributes:
        iterations: optimiser steps in all.
        learning_rate: peak learning rate of AdamW.
        warmup: iterations of linear warm-up; a cosine to zero follows.
        weight_decay: AdamW's weight decay.
        ema_decay: decay of the averaged weights, which are the ones exported.
        clip_norm: bound of the gradient norm.
        checkpoint_every: iterations between checkpoints.
        log_every: iterations between lines of the CSV log.
        seed: seed of initialisation and of every iteration's randomness.
    """

    iterations: int = 8000
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.0
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    checkpoint_every: int = 500
    log_every: int = 50
    seed: int = 0


def _learning_rate_factor(step: int, config: LoopConfig) -> float:
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / config.iterations)))


@contextmanager
def iteration_seed(seed: int, step: int) -> Iterator[None]:
    """Seed torch from (seed, step), so that a resumed run draws what an uninterrupted one would have drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed << 32) + step)
        yield


@contextmanager
def deferred_interrupts() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the list that is yielded instead of interrupting half an update.

    A second signal interrupts at once. Outside the main thread, where handlers cannot be set, the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def remember(number: int, _: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _naming_the_checkpoint(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """Whatever goes wrong in reading a checkpoint names its file."""

    @functools.wraps(load)
    def named(loop: TrainingLoop) -> None:
        with reading("train", loop.checkpoint_path, "a whole training checkpoint"):
            load(loop)

    return named


class TrainingLoop:
    """Runs ``loss_fn(step)`` for the configured iterations; resumes from ``out/checkpoint.safetensors`` if present.

    Args:
        module: trained in place.
        loss_fn: maps an iteration to (loss, figures to log).
        config: length and speed.
        out: folder of checkpoint and log; made if missing.
        identity: plain values that must not change between a run and its resumption.

    Raises:
        CheckpointError: the folder holds a checkpoint of another configuration.
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: Callable[[int], tuple[Tensor, dict[str, float]]],
        config: LoopConfig,
        out: Path,
        identity: dict[str, Any],
    ) -> None:
        self.module, self.loss_fn, self.config, self.out = module, loss_fn, config, Path(out)
        self.identity = identity
        self.ema = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99)
        )
        self.step = 0
        self._updating = False
        self.out.mkdir(parents=True, exist_ok=True)
        if self.checkpoint_path.exists():
            self._load()

    @property
    def checkpoint_path(self) -> Path:
        """Where the loop keeps everything that it needs to go on."""
        return self.out / "checkpoint.safetensors"

    def averaged_weights(self) -> dict[str, Tensor]:
        """State dict of the EMA weights, under the module's own names."""
        return {name: tensor.detach().clone() for name, tensor in self.ema.module.state_dict().items()}

    def run(self) -> None:
        """Train to the end.

        An interrupt (SIGINT or SIGTERM) ends the iteration in progress, writes a checkpoint and raises
        KeyboardInterrupt. A non-finite loss or gradient stops the run before it reaches the
        weights, and what was learned until then is kept.
        """
        log_path = self.out / "log.csv"
        self._trim_log(log_path)
        started, interrupted_at = time.monotonic(), self.step
        bar = tqdm(total=self.config.iterations, initial=self.step, desc=f"train {self.out.name}", unit="it")
        try:
            with log_path.open("a", newline="") as handle, deferred_interrupts() as interrupted:
                while self.step < self.config.iterations:
                    if interrupted:
                        raise KeyboardInterrupt
                    figures = self._iterate()
                    if self.step % self.config.log_every == 0:
                        row = {"step": self.step, **{k: f"{v:.6g}" for k, v in figures.items()}}
                        writer = csv.DictWriter(handle, row.keys())
                        if handle.tell() == 0:
                            writer.writeheader()
                        writer.writerow(row)
                        handle.flush()
                        bar.set_postfix({k: v for k, v in row.items() if k != "step"})
                    if self.step % self.config.checkpoint_every == 0:
                        self._save()
                    bar.update()
        finally:
            bar.close()
            # An update cut in half by a second signal is not saved over the last whole one.
            if self.step > interrupted_at and not self._updating:
                self._save()
        rate = (self.step - interrupted_at) / max(time.monotonic() - started, 1e-9)
        tqdm.write(f"{self.out}: {self.step} iterations, {rate:.1f} it/s")

    def _iterate(self) -> dict[str, float]:
        lr = self.config.learning_rate * _learning_rate_factor(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with iteration_seed(self.config.seed, self.step):
            loss, figures = self.loss_fn(self.step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"train: loss must be finite, got {loss.item()} at iteration {self.step}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"train: gradient must be finite, got {norm.item()} at iteration {self.step}")
        self._updating = True
        self.optimizer.step()
        self.ema.update_parameters(self.module)
        self.step += 1
        self._updating = False
        return {"loss": loss.item(), **figures, "grad_norm": norm.item(), "lr": lr}

    def _save(self) -> None:
        tensors = {f"model.{k}": v for k, v in self.module.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
        metadata = {"kind": "training", "step": self.step, "identity": self.identity}
        save_checkpoint(self.checkpoint_path, tensors, metadata)

    @_naming_the_checkpoint
    def _load(self) -> None:
        tensors, metadata = load_checkpoint(self.checkpoint_path, "training")
        if metadata["identity"] != self.identity:
            changed = sorted(
                k
                for k in self.identity.keys() | metadata["identity"].keys()
                if self.identity.get(k) != metadata["identity"].get(k)
            )
            raise CheckpointError(
                f"train: {self.checkpoint_path} must be of the same configuration, got another {', '.join(changed)}; "
                "choose another --out or remove it"
            )
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "adam": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.module.load_state_dict(parts["model"])
        self.ema.load_state_dict(parts["ema"])
        self._check_whole(parts, metadata["step"])
        state = self.optimizer.state_dict()
        for name, tensor in parts["adam"].items():
            index, _, key = name.partition(".")
            state["state"].setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(state)
        self.step = int(metadata["step"])

    def _check_whole(self, parts: dict[str, dict[str, Tensor]], step: object) -> None:
        """Raise unless a checkpoint holds everything as it is here: what is missing would start anew unnoticed."""
        check_int("train", "step", step, 0, self.config.iterations)
        for part, module in (("model", self.module), ("ema", self.ema)):
            for name, value in module.state_dict().items():
                found = parts[part][name]
                if (found.dtype, found.shape) != (value.dtype, value.shape):
                    raise ValueError(f"{part}.{name} {describe(found)} instead of {describe(value)}")
        kept = {name: value.shape for name, value in parts["adam"].items() if value.is_floating_point()}
        trained = [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]
        for index, (name, parameter) in enumerate(zip(trained, self.parameters, strict=True)):
            shapes = [kept.pop(f"{index}.{part}", None) for part in ("step", "exp_avg", "exp_avg_sq")]
            # What never had a gradient has no moments, and its average never moved.
            untouched = torch.equal(parts["model"][name], parts["ema"][f"module.{name}"])
            if shapes != [(), parameter.shape, parameter.shape] and not (untouched and shapes == [None] * 3):
                raise ValueError(f"{shapes} as shapes of adam.{index}, the moments of {name}")
        if kept or len(parts["adam"]) % 3:
            raise ValueError(f"adam of {len(parts['adam'])} tensors")

    def _trim_log(self, path: Path) -> None:
        """Drop the log lines of iterations that ran after the checkpoint and will run again."""
        if not path.exists():
            return
        with path.open(newline="") as handle:
            rows = list(csv.DictReader(handle))
        kept = [row for row in rows if int(row["step"]) <= self.step]
        if len(kept) < len(rows):
            with path.open("w", newline="") as handle:
                writer = csv.DictWriter(handle, rows[0].keys())
                writer.writeheader()
                writer.writerows(kept)
