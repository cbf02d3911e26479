"""Training of a learned drafter on its target's own trajectories."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from free_dit.loading import facts_of
from free_dit.networks.families import device_of
from free_dit.training.acceptance import acceptance_by_lookahead
from free_dit.training.distributed import Place
from free_dit.training.drafter_config import DTYPES, DrafterTrainConfig
from free_dit.training.drafter_loss import DrafterLoss
from free_dit.training.loop import CHECKPOINT, TrainingLoop, iteration_seed
from free_dit.training.shards import target_fingerprint
from free_dit.training.trajectories import Storage, collect, image_chunks, make_schedule
from free_kernels.drafters import FeatureDrafter
from free_kernels.protocols import Target, TargetDefaults
from free_kernels.validation import check_writable, fail

__all__ = ["DrafterLoss", "DrafterTrainConfig", "calibrate", "train_drafter"]

# Parts of the chain and look-ahead of the calibration.
_PARTS, _LOOKAHEAD = 25, 8


def calibrate(target: Target, drafter: FeatureDrafter, config: DrafterTrainConfig) -> list[list[float]]:
    """Acceptance by part of the chain and look-ahead on fresh trajectories, half of them guided."""
    schedule, count = make_schedule(config.schedule, target, config.num_steps), config.calibration_images
    guidance = torch.linspace(1.0, config.max_guidance, count)
    guidance[: count // 2] = 1.0
    labels = torch.arange(count) % target.num_classes
    lookahead = min(_LOOKAHEAD, config.num_steps - 2)
    tables: list[Tensor] = []
    parts = list(image_chunks(count, config.max_rows or None))
    for part in parts:
        data = collect(
            target,
            schedule,
            labels[part],
            guidance[part],
            # A seed whose noise training never draws.
            2**63 + config.loop.seed,
            first_image=part.start,
            storage=Storage(DTYPES[config.feature_dtype]),
        )
        tables.append(acceptance_by_lookahead(target, drafter, schedule, data, lookahead))
        del data
    table = tables[0]
    if len(tables) > 1:
        table = sum(one * (part.stop - part.start) for one, part in zip(tables, parts, strict=True)) / count
    parts_of_chain = table.tensor_split(min(_PARTS, config.num_steps - 2), dim=1)
    known = torch.stack([part.nanmean(1) for part in parts_of_chain])
    known = known.nan_to_num(float(table.nanmean())).double()
    return [[round(value, 4) for value in row] for row in known.tolist()]


def _started(config: DrafterTrainConfig, target: Target) -> FeatureDrafter:
    """The drafter that training begins from.

    Raises:
        ValueError: it is of another configuration, or of a target of other shapes.
    """
    drafter = FeatureDrafter.load(config.start, target)
    if drafter.config != config.drafter:
        fail("train_drafter", "start", f"a drafter of the configuration {config.drafter}", f"one of {drafter.config}")
    return drafter


def train_drafter(
    target: Target, config: DrafterTrainConfig, out: Path, target_name: str, place: Place = Place()
) -> Path:
    """Train a drafter for ``target`` into the folder ``out``; exports ``out/drafter.safetensors``.

    Running it again in the same folder goes on from the last checkpoint. With several processes (torchrun) each calls
    this with its own place, and a target on its own device.

    Args:
        target: the frozen network, in any dtype.
        config: what is trained, and how.
        out: folder of checkpoint, log, shards and result.
        target_name: stored in the checkpoint; training resumes only with the same target.
        place: where this process stands among those of the run.

    Raises:
        ValueError, TypeError: the configuration is wrong, guides a target that has no null label, or the folder
            belongs to another one.
        OSError: the folder cannot be written.
        FloatingPointError: the loss or a gradient is not finite; the last good checkpoint stays.
        ConnectionError: another process of the run ended or fell silent.
    """
    config.check()
    if config.max_guidance != 1.0 and not TargetDefaults.read(target, "has_null_label"):
        wanted = "1 for a target trained without label dropout, which cannot be guided"
        fail("train_drafter", "max_guidance", wanted, f"{config.max_guidance:g}")
    # A flow model counts finer timesteps than the drafter: this many of them are one of the drafter's.
    schedule = make_schedule(config.schedule, target, config.num_steps)
    unit = max(1, schedule.num_train_steps // config.drafter.num_timesteps)
    latest = int(schedule.timesteps.max())
    if latest >= config.drafter.num_timesteps * unit:
        wanted = f"at least {latest // unit + 1}, for the schedule's timestep {latest}"
        fail("train_drafter", "num_timesteps", wanted, config.drafter.num_timesteps)
    config = replace(config, drafter=replace(config.drafter, time_unit=unit))
    out = Path(out)
    path = check_writable("train_drafter", "out", out / "drafter.safetensors")
    device = device_of(target)
    identity = config.identity()
    identity |= {"target": target_name, "target_fingerprint": target_fingerprint(target)}
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    with place.joined(device, config.process_timeout_s):
        with iteration_seed(config.loop.seed, -1):
            pooled = TargetDefaults.read(target, "pooled")
            shown = (target.num_classes, config.drafter) if pooled is None else (0, config.drafter, pooled.shape[1])
            drafter = FeatureDrafter(target.latent_shape, target.feature_shape, *shown)
        # A checkpoint holds all weights and scales.
        begins = not (out / CHECKPOINT).exists()
        if config.start and begins:
            drafter.load_state_dict(_started(config, target).state_dict())
        drafter.to(device)
        loss = DrafterLoss(target, drafter, config, place, out / "trajectories")
        # With several processes all take those of the first one.
        if begins and not config.start:
            loss.fit_scales()
        defaults = asdict(DrafterTrainConfig())
        loop = TrainingLoop(drafter.train(), loss, config.loop, out, identity, place, scaler, defaults)
        loop.run()
    if not place.is_first:
        return path
    drafter.load_state_dict(loop.averaged_weights())
    drafter.eval()
    drafter.target_facts, drafter.frozen_share = facts_of(target), config.frozen_share
    if config.calibration_images:
        drafter.calibration = calibrate(target, drafter, config)
    drafter.save(path)
    return path
