"""Sampling on several processes, launched by torchrun: images split over them, rows of every round, or both."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from free_kernels.conditions import Condition, bind
from free_kernels.distributed.verify_parallel import VerifyParallelTarget
from free_kernels.protocols import TargetDefaults
from free_kernels.results import SampleResult, SampleStats
from free_kernels.sampling.api import sample as sample_here
from free_kernels.sampling.guidance import scale_of_images
from free_kernels.sampling.noise import PhiloxNoise, TensorNoise
from free_kernels.targets import as_target
from free_kernels.validation import check_int, fail

DATA, VERIFY = "data", "verify"


def sample_mesh(verify: int = 1, device_type: str = "cpu") -> DeviceMesh:
    """All processes as a mesh ``[data, verify]``: groups that share rows, side by side.

    Args:
        verify: processes that share the rows of each round; divides the number of processes. Those of one group have
            neighbouring ranks.
        device_type: ``"cpu"`` (gloo) or ``"cuda"`` (NCCL).

    Raises:
        ValueError, TypeError: ``verify`` does not divide the number of processes.
        RuntimeError: no process group (``torch.distributed.init_process_group`` comes first).
    """
    if not dist.is_initialized():
        raise RuntimeError("sample_mesh: torch.distributed must be initialised, got no process group")
    world = dist.get_world_size()
    if world % check_int("sample_mesh", "verify", verify, 1, world):
        fail("sample_mesh", "verify", f"a divisor of the {world} processes", verify)
    return init_device_mesh(device_type, (world // verify, verify), mesh_dim_names=(DATA, VERIFY))


@torch.no_grad()
def sample(
    target: object,
    conditions: Condition | None = None,
    *,
    class_labels: Tensor | None = None,
    null_condition: Condition | None = None,
    mesh: DeviceMesh | None = None,
    seed: int = 0,
    **settings: Any,
) -> SampleResult:
    """:func:`free_kernels.sample` on all processes of a mesh; every one of them calls it with the same arguments.

    Images are split over the mesh's ``data`` dimension, the rows of each round over ``verify``. They are those of one
    process, whatever the mesh, up to the network's rounding in batches of another size.

    Args:
        target: this process's copy, as in :func:`free_kernels.sample`.
        conditions: as in :func:`free_kernels.sample`, the same in all processes, each of which holds them all.
        class_labels: likewise.
        null_condition: likewise.
        mesh: of :func:`sample_mesh`; all processes as ``data`` if None.
        seed: as in :func:`free_kernels.sample`.
        settings: the other arguments of :func:`free_kernels.sample`; ``noise`` must be None or a tensor, and with
            several processes for the rows of a round ``cuda_graphs`` must be False.

    Returns:
        In every process all images, in the order of the labels; counts are sums, ``elapsed_s`` is the slowest's.

    Raises:
        ValueError, TypeError, FloatingPointError: as :func:`free_kernels.sample`.
        RuntimeError: another process failed; the message says which, and with what.
        ConnectionError: another process is gone or fell silent for longer than the process group's timeout.
    """
    where = "distributed.sample"
    adapted, labels = bind(where, as_target(where, target), conditions, class_labels, null_condition)
    device = torch.device(TargetDefaults.read(adapted, "device") or labels.device)
    mesh = sample_mesh(device_type=device.type) if mesh is None else mesh
    if mesh.mesh_dim_names != (DATA, VERIFY):
        fail(where, "mesh", f"one with dimensions {(DATA, VERIFY)}, of sample_mesh", str(mesh.mesh_dim_names))
    if mesh[VERIFY].size() > 1 and settings.get("cuda_graphs"):
        fail(where, "cuda_graphs", "False where the rows of a round are shared", True)
    noise = settings.pop("noise", None)
    if noise is not None and not isinstance(noise, Tensor):
        fail(where, "noise", "None or a tensor", type(noise).__name__, TypeError)
    blocks = torch.arange(len(labels), device="cpu").tensor_split(mesh[DATA].size())
    mine = blocks[mesh[DATA].get_local_rank()]
    settings["progress"] = settings.get("progress", False) and dist.get_rank() == 0
    result, error = None, None
    try:
        if len(mine):
            first = int(mine[0])
            held = None if noise is None else noise.to(device)[mine.to(device)]
            if "guidance_scale" in settings:
                settings["guidance_scale"] = scale_of_images(settings["guidance_scale"], mine, len(labels))
            own: PhiloxNoise | TensorNoise = PhiloxNoise(seed, first)
            if held is not None:
                covers_steps = held.ndim > 1 + len(adapted.latent_shape)
                own = TensorNoise(held, seed, first_image=first, covers_steps=covers_steps)
            result = _sample_block(adapted, labels[mine], mesh, device, seed=seed, noise=own, **settings)
    except Exception as caught:
        error = caught
    _raise_together(error)
    return _gather(result, [len(block) for block in blocks], adapted.latent_shape, mesh, device)


def _sample_block(
    target: Any, labels: Tensor, mesh: DeviceMesh, device: torch.device, **settings: Any
) -> SampleResult | None:
    """The images of one group, in its leader; None in the processes that only answer."""
    if mesh[VERIFY].size() == 1:
        return sample_here(target, class_labels=labels, **settings)
    shared = VerifyParallelTarget(target, mesh[VERIFY].get_group(), device)
    if mesh[VERIFY].get_local_rank():
        shared.serve()
        return None
    try:
        return sample_here(shared, class_labels=labels, **settings)
    finally:
        shared.stop()


def _raise_together(error: Exception | None) -> None:
    """Raise in every process if one of them failed: its own error, or one that names it."""
    if isinstance(error, ConnectionError):
        # The other processes cannot be reached any more.
        raise error
    told: list[str | None] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(told, None if error is None else f"{type(error).__name__}: {error}")
    except RuntimeError as lost:
        raise ConnectionError(
            f"distributed.sample: every process must answer, got in rank {dist.get_rank()}: {lost}"
        ) from (error or lost)
    if error is not None:
        raise error
    failed = [(rank, message) for rank, message in enumerate(told) if message is not None]
    if failed:
        raise RuntimeError(
            f"distributed.sample: every process must finish, got from rank {failed[0][0]}: {failed[0][1]}"
        )


def _gather(
    result: SampleResult | None, sizes: list[int], latent: tuple[int, ...], mesh: DeviceMesh, device: torch.device
) -> SampleResult:
    """Images and figures of all groups, in every process."""
    samples = torch.empty(sum(sizes), *latent, dtype=torch.float32, device=device)
    parts: list[SampleStats | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, None if result is None else result.stats)
    for leader, part in zip(mesh.mesh[:, 0].tolist(), samples.split(sizes), strict=True):
        if len(part):
            if dist.get_rank() == leader:
                part.copy_(result.samples)
            dist.broadcast(part, src=leader)
    return SampleResult(samples, merged_stats([part for part in parts if part is not None]))


def merged_stats(parts: list[SampleStats]) -> SampleStats:
    """The figures of a job from those of its parts, which ran side by side, in the order of their images."""
    tested = sum(part.tested_by_step for part in parts)
    deviation = sum(np.nan_to_num(part.uncertainty_by_step * part.tested_by_step) for part in parts)
    bias = np.concatenate([part.bias_bound_per_image for part in parts])
    with np.errstate(invalid="ignore"):
        uncertainty = np.where(tested > 0, deviation / tested, np.nan)
    return SampleStats(
        target_calls=sum(part.target_calls for part in parts),
        target_rows=sum(part.target_rows for part in parts),
        drafter_calls=sum(part.drafter_calls for part in parts),
        rounds_per_image=np.concatenate([part.rounds_per_image for part in parts]),
        tested_by_step=tested,
        accepted_by_step=sum(part.accepted_by_step for part in parts),
        uncertainty_by_step=uncertainty,
        bias_bound=float(bias.mean()),
        bias_bound_per_image=bias,
        elapsed_s=max(part.elapsed_s for part in parts),
    )
