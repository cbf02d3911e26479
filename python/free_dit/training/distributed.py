"""Data-parallel training: one process for each device, started by torchrun, gradients averaged over all of them."""

from __future__ import annotations

import gc
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from free_dit.devices import resolve_device
from free_kernels.validation import fail

Loss = Callable[[int], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Place:
    """Place of this process among those of the run.

    Attributes:
        rank: number of the process, in ``[0, world)``; the first one writes checkpoints and logs.
        world: processes in all.
        local_rank: number of the process on its machine, which is that of its GPU.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Place:
        """The place that torchrun gave this process; alone without torchrun.

        Raises:
            ValueError: the environment names some of the variables of torchrun and not the others.
        """
        if "WORLD_SIZE" not in os.environ:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        missing = [name for name in names if not os.environ.get(name, "").isdigit()]
        if missing:
            fail("Place.from_environment", ", ".join(missing), "set by torchrun", "none")
        return cls(*(int(os.environ[name]) for name in names))

    @property
    def is_first(self) -> bool:
        """Whether this process writes checkpoints, logs and the result."""
        return self.rank == 0

    def device(self, choice: str = "auto") -> torch.device:
        """``"auto"``: this process's GPU, or the CPU without one; ``"cuda"``: its GPU; otherwise the device named.

        Raises:
            ValueError: no such device.
        """
        accepted = "'auto', 'cpu' or 'cuda'"
        return resolve_device("train_drafter", choice, local_rank=self.local_rank, shared=False, accepted=accepted)

    @contextmanager
    def joined(self, device: torch.device, timeout_s: float) -> Iterator[None]:
        """The process group of the run: NCCL on GPUs, else Gloo. A process that runs alone needs none.

        Collectives raise after ``timeout_s`` seconds without the other processes. Under torchrun all processes end
        as soon as one of them dies, which is earlier.
        """
        if self.world == 1:
            yield
            return
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            rank=self.rank,
            world_size=self.world,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if on_gpu else None,
        )
        yield
        # Not after an error: other processes may have ended, and leaving the group would wait for them.
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()

    def parallel(self, module: nn.Module, loss_fn: Loss) -> Loss:
        """``loss_fn`` such that its backward pass averages the gradients of ``module`` over the processes.

        The first process's weights and buffers are given to all.
        """
        if self.world == 1:
            return loss_fn
        # Buffers do not change in training: they are sent once here, not in every pass. The option has two names.
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
        known = inspect.signature(DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return DistributedDataParallel(_LossModule(module, loss_fn), **{option: False})

    def unsynchronised(self, loss_fn: Loss, last: bool) -> AbstractContextManager[None]:
        """Leave gradients on their own process until the ``last`` backward pass of an iteration."""
        return nullcontext() if last or self.world == 1 else loss_fn.no_sync()  # type: ignore[attr-defined]

    def average(self, metrics: dict[str, float], device: torch.device) -> dict[str, float]:
        """Means over the processes, which must all call this with the same keys."""
        if self.world == 1:
            return metrics
        values = torch.tensor(list(metrics.values()), dtype=torch.float32, device=device)
        dist.all_reduce(values)
        return dict(zip(metrics, (values / self.world).tolist(), strict=True))

    def check_agreement(self, step: int, device: torch.device) -> None:
        """Raise ValueError if processes are at different iterations, because they see different folders."""
        if self.world == 1:
            return
        steps = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.world)]
        dist.all_gather(steps, torch.tensor([step], device=device))
        found = [int(one) for one in steps]
        if len(set(found)) > 1:
            fail("train", "out", "one folder that every process sees", f"checkpoints of iterations {found}")


class _LossModule(nn.Module):
    """A loss and the module that it trains, as one module: DistributedDataParallel then wraps a whole iteration."""

    def __init__(self, module: nn.Module, loss_fn: Loss) -> None:
        super().__init__()
        self.module = module
        # In a list, so that the parameters of a loss that is a module are not registered as weights to train.
        self._loss_fn = [loss_fn]

    def forward(self, step: int) -> tuple[Tensor, dict[str, float]]:
        return self._loss_fn[0](step)
