"""The training loop that DiT and drafter share: an optimizer, warm-up and cosine, EMA, progress, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from free_dit.interrupts import deferred_interrupts
from free_dit.training.distributed import Loss, Place
from free_dit.training.identity import changed_settings
from free_dit.training.logs import LOGS, Log, open_log
from free_dit.training.optimizers import kept_shapes, make_optimizer
from free_kernels.checkpoint import CheckpointError, load_checkpoint, reading, save_checkpoint
from free_kernels.validation import check_choice, check_float, check_int, describe, fail

# File in the folder of a run, from which the run is resumed.
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train.

    Attributes:
        iterations: optimiser steps in all.
        learning_rate: peak learning rate of AdamW.
        optimizer: "adamw", or "muon" for the inner matrices of a drafter or a policy with AdamW for the rest;
            "muon_float32" is faster on a CPU.
        warmup: iterations of linear warm-up; a cosine to zero follows.
        weight_decay: decoupled weight decay.
        ema_decay: decay of the averaged weights, which are the ones exported.
        clip_norm: bound of the gradient norm.
        checkpoint_every: iterations between checkpoints.
        log_every: iterations between lines of the log.
        seed: seed of initialisation and of every iteration's randomness.
        accumulate: batches whose gradients an iteration averages, one after the other.
        log: "csv", or "tensorboard" where that is installed.
    """

    iterations: int = 8000
    learning_rate: float = 1e-3
    optimizer: str = "adamw"
    warmup: int = 200
    weight_decay: float = 0.0
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    checkpoint_every: int = 500
    log_every: int = 50
    seed: int = 0
    accumulate: int = 1
    log: str = "csv"

    def check(self, where: str) -> None:
        """Raise ValueError or TypeError where a setting is wrong; ``where`` is named."""
        for name in ("iterations", "checkpoint_every", "log_every", "accumulate"):
            check_int(where, name, getattr(self, name), 1)
        check_int(where, "warmup", self.warmup, 0)
        # The upper half of a generator's 64 bits; the iteration has the other one.
        check_int(where, "seed", self.seed, 0, 2**32 - 1)
        check_float(where, "learning_rate", self.learning_rate, 0.0)
        check_float(where, "weight_decay", self.weight_decay, 0.0)
        check_float(where, "ema_decay", self.ema_decay, 0.0, 1.0)
        if check_float(where, "clip_norm", self.clip_norm, 0.0) == 0.0:
            fail(where, "clip_norm", "above 0", self.clip_norm)
        check_choice(where, "log", self.log, LOGS)


def _learning_rate_factor(step: int, config: LoopConfig) -> float:
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / config.iterations)))


@contextmanager
def iteration_seed(seed: int, step: int, stream: int = 0) -> Iterator[None]:
    """Seed torch from (seed, step, stream), so that a resumed run draws the numbers of an uninterrupted one.

    Streams keep processes, and batches of one iteration, apart.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed << 32) + step if stream == 0 else mixed_seed(seed, step, stream))
        yield


def mixed_seed(*parts: int) -> int:
    """64 bits that depend on all of the parts, negative ones included."""
    words = [part % 2**64 for part in parts]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


class TrainingLoop:
    """Runs ``loss_fn(step)`` for the configured iterations; resumes from ``out/checkpoint.safetensors`` if present.

    With several processes each computes its own loss, gradients are averaged, and the first one writes the files.

    Args:
        module: trained in place.
        loss_fn: maps an iteration to (loss, metrics to log).
        config: length and speed.
        out: folder of checkpoint and log; made if missing. All processes see the same one.
        identity: plain values that must not change between a run and its resumption.
        place: where this process stands among those of the run.
        scaler: scales the loss against underflow of float16 gradients; one that is not enabled changes nothing.
        defaults: of the identity's values, for checkpoints of versions that lacked them.

    Raises:
        ValueError: a wrong setting of the loop.
        CheckpointError: the folder holds a checkpoint of another configuration.
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: Loss,
        config: LoopConfig,
        out: Path,
        identity: dict[str, Any],
        place: Place = Place(),
        scaler: torch.amp.GradScaler = torch.amp.GradScaler("cpu", enabled=False),
        defaults: dict[str, Any] | None = None,
    ) -> None:
        config.check("train")
        self.module, self.config, self.out, self.place = module, config, Path(out), place
        self.identity = identity | {"processes": place.world}
        self._defaults = {"processes": 1} | (defaults or {})
        self.scaler = scaler
        self.ema = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.optimizer = make_optimizer(config.optimizer, module, config.learning_rate, config.weight_decay)
        self.step = 0
        self._updating = False
        self.out.mkdir(parents=True, exist_ok=True)
        if place.is_first:
            # Left by a process that was killed while it wrote.
            for path in self.out.glob(f".{CHECKPOINT}.*.tmp"):
                path.unlink(missing_ok=True)
        if self.checkpoint_path.exists():
            with reading("train", self.checkpoint_path, "a whole training checkpoint"):
                self._load()
        place.check_agreement(self.step, self.device)
        self._own_loss, self.loss_fn = loss_fn, place.parallel(module, loss_fn)

    @property
    def checkpoint_path(self) -> Path:
        """The file from which a run is resumed."""
        return self.out / CHECKPOINT

    def averaged_weights(self) -> dict[str, Tensor]:
        """State dict of the EMA weights, under the module's own names."""
        return {name: tensor.detach().clone() for name, tensor in self.ema.module.state_dict().items()}

    # Whatever the mode of the caller: an interrupt within `torch.no_grad` may have left gradients off in this process.
    @torch.enable_grad()
    def run(self) -> None:
        """Train to the end.

        An interrupt (SIGINT or SIGTERM) ends the iteration in progress, writes a checkpoint and raises
        KeyboardInterrupt. A non-finite loss or gradient stops the run before the weights are updated, and the
        weights until then are kept.

        Raises:
            FloatingPointError: the loss or a gradient is not finite.
            ConnectionError: another process of the run ended or fell silent.
        """
        started, interrupted_at, first = time.monotonic(), self.step, self.place.is_first
        log: Log | None = open_log(self.config.log, self.out, self.step) if first else None
        title = f"train {self.out.name}"
        bar = tqdm(total=self.config.iterations, initial=self.step, desc=title, unit="it", disable=not first)
        try:
            with deferred_interrupts() as interrupted:
                while self.step < self.config.iterations:
                    if interrupted:
                        raise KeyboardInterrupt
                    self._advance(log, bar)
                # What follows a whole training is not for this command any more.
                if interrupted:
                    raise KeyboardInterrupt
        finally:
            # The wrapper has to be freed before its process group: otherwise its destructor waits for a thread that
            # itself waits for the interpreter.
            self.loss_fn = self._own_loss
            bar.close()
            if log is not None:
                log.close()
            # If a second signal interrupted an update, the last complete checkpoint is kept.
            if self.step > interrupted_at and not self._updating:
                self._save()
        if first:
            rate = (self.step - interrupted_at) / max(time.monotonic() - started, 1e-9)
            tqdm.write(f"{self.out}: {self.step} iterations, {rate:.1f} it/s")

    def _advance(self, log: Log | None, bar: tqdm) -> None:
        """One iteration, and the log line and checkpoint that are due after it."""
        try:
            metrics = self._iterate()
            if self.step % self.config.log_every == 0:
                metrics = self.place.average(metrics, self.device)
                if log is not None:
                    log.write(self.step, metrics)
                bar.set_postfix({name: f"{value:.6g}" for name, value in metrics.items()})
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.place.world == 1:
                raise
            where = f"process {self.place.rank} of {self.place.world}"
            raise ConnectionError(
                f"train: every process must finish iteration {self.step}, got in {where}: {error}; see the first "
                "error of the other processes, and run the same command again to go on from the last checkpoint"
            ) from error
        if self.step % self.config.checkpoint_every == 0:
            self._save()
        bar.update()

    def _iterate(self) -> dict[str, float]:
        lr = self.config.learning_rate * _learning_rate_factor(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("rate", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        batches = [self._backward(number) for number in range(self.config.accumulate)]
        metrics = {name: sum(one[name] for one in batches) / len(batches) for name in batches[0]}
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        finite = bool(torch.isfinite(norm))
        # The loss scale starts too high: the first steps overflow; they are skipped, and the scale is lowered.
        if not finite and self.scaler.get_scale() <= 1.0:
            raise FloatingPointError(f"train: gradient must be finite, got {norm.item()} at iteration {self.step}")
        self._updating = True
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if finite:
            self.ema.update_parameters(self.module)
        self.step += 1
        self._updating = False
        return {**metrics, "grad_norm": norm.item(), "lr": lr}

    def _backward(self, number: int) -> dict[str, float]:
        """Gradients of one batch of the iteration, added to those of the batches before."""
        batches = self.config.accumulate
        with (
            self.place.unsynchronised(self.loss_fn, number == batches - 1),
            iteration_seed(self.config.seed, self.step, self.place.rank * batches + number),
        ):
            loss, metrics = self.loss_fn(self.step)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"train: loss must be finite, got {loss.item()} at iteration {self.step}")
            share = loss if batches == 1 else loss / batches
            self.scaler.scale(share).backward()
        return {"loss": loss.item(), **metrics}

    def _save(self) -> None:
        if not self.place.is_first:
            return
        tensors = {f"model.{k}": v for k, v in self.module.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
        metadata = {"kind": "training", "step": self.step, "identity": self.identity}
        if self.scaler.is_enabled():
            metadata["scaler"] = self.scaler.state_dict()
        save_checkpoint(self.checkpoint_path, tensors, metadata)

    def _load(self) -> None:
        tensors, metadata = load_checkpoint(self.checkpoint_path, "training")
        changed = changed_settings(metadata["identity"], self.identity, self._defaults)
        if changed:
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
        if metadata.get("scaler"):
            self.scaler.load_state_dict(metadata["scaler"])
        self.step = int(metadata["step"])

    def _check_whole(self, parts: dict[str, dict[str, Tensor]], step: object) -> None:
        """Raise unless a checkpoint holds every tensor in its shape: a missing state would silently start from zero."""
        check_int("train", "step", step, 0, self.config.iterations)
        for part, module in (("model", self.module), ("ema", self.ema)):
            for name, value in module.state_dict().items():
                found = parts[part][name]
                if (found.dtype, found.shape) != (value.dtype, value.shape):
                    raise ValueError(f"{part}.{name} {describe(found)} instead of {describe(value)}")
        kept = {name: value.shape for name, value in parts["adam"].items() if value.is_floating_point()}
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        for number, (parameter, wanted) in enumerate(kept_shapes(self.optimizer)):
            name = names[parameter]
            found = {part: kept.pop(f"{number}.{part}", None) for part in wanted}
            # A parameter that never had a gradient has no moments, and its average equals its value.
            untouched = torch.equal(parts["model"][name], parts["ema"][f"module.{name}"])
            if found != wanted and not (untouched and set(found.values()) == {None}):
                raise ValueError(f"{found} as shapes of adam.{number}, the moments of {name}")
        if kept or not all(value.is_floating_point() for value in parts["adam"].values()):
            raise ValueError(f"adam of {len(parts['adam'])} tensors")
