"""Verify parallel: the rows of each packed target call split over the processes of a group.

One process, the leader, drafts, couples and commits; the others hold the same target and answer for their share of
the rows. The leader needs the outputs first, to couple; features arrive meanwhile, for the commit.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from free_kernels.conditioning import hoisted
from free_kernels.protocols import Target

T = TypeVar("T")


class _Order(enum.IntEnum):
    STOP = 0
    CALL = 1
    HOIST = 2


def _reached(action: Callable[..., T], *arguments: object, **options: object) -> T:
    """A communication of the group, whose failure says that another process is gone."""
    try:
        return action(*arguments, **options)
    except RuntimeError as error:
        raise ConnectionError(
            f"sample: every process of the group must answer, got in rank {dist.get_rank()}: {error}"
        ) from error


class VerifyParallelTarget:
    """A target whose packed calls are shared by all processes of a group.

    Every process makes one around its own copy of the target. The leader, rank 0 of the group, gives it to ``sample``
    and calls :meth:`stop` in the end; the others call :meth:`serve`, which returns then. Calls of the head alone, for
    drafts, stay with the leader.

    Images are those of one process up to the network's rounding in batches of another size. Not for ``cuda_graphs``.

    Args:
        target: this process's copy; all with the same weights.
        group: the process group; the default one if None.
        device: where the target lives and messages are kept.
    """

    def __init__(self, target: Target, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.target, self._group, self.device = target, group, device
        self._size, self._rank = dist.get_world_size(group), dist.get_rank(group)
        self._told: list[tuple[dist.Work, Tensor, int]] = []
        self._outputs_due: list[dist.Work] = []
        self._features_due: list[dist.Work] = []
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def __getattr__(self, name: str) -> object:
        # All other members are the target's own. `copy` asks for names before `target` is set.
        if name.startswith("__") or name == "target":
            raise AttributeError(name)
        return getattr(self.target, name)

    def hoisted(self, timesteps: Tensor, labels: Tensor) -> VerifyParallelTarget:
        """The same on a target whose (t, y)-only work is done, in every process."""
        self._order(_Order.HOIST, len(timesteps), len(labels))
        for part in (timesteps, labels):
            _reached(dist.broadcast, part.to(self.device).contiguous(), group=self._group, group_src=0)
        clone = copy.copy(self)
        clone.target = hoisted(self.target, timesteps, labels)  # type: ignore[assignment]
        return clone

    def packed_call(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """Output ``[R, C or 2C, H, W]`` of all rows, and what waits for the features ``[R, T, D]`` on their way.

        Args:
            x: ``[R, C, H, W]``.
            t: int64 ``[R]``.
            y: int64 ``[R]``.
        """
        self._settle()
        shares = self._shares(len(x))
        self._order(_Order.CALL, len(x), 0)
        begin = shares[0]
        for peer, rows in enumerate(shares[1:], start=1):
            if rows:
                part = slice(begin, begin + rows)
                self._send(peer, x[part].float().contiguous())
                self._send(peer, torch.stack([t[part], y[part]]))
                begin += rows
        own = slice(shares[0])
        own_features = self.target.features(x[own], t[own], y[own])
        own_output = self.target.head(own_features, t[own], y[own])
        features = own_features.new_empty(len(x), *own_features.shape[1:])
        output = own_output.new_empty(len(x), *own_output.shape[1:])
        features[own], output[own] = own_features, own_output
        begin = shares[0]
        for peer, rows in enumerate(shares[1:], start=1):
            if rows:
                part, failed = slice(begin, begin + rows), torch.empty(1, dtype=torch.int64, device=self.device)
                self._told.append((self._receive(peer, failed), failed, peer))
                self._outputs_due.append(self._receive(peer, output[part]))
                self._features_due.append(self._receive(peer, features[part]))
                begin += rows
        self._wait_for_outputs()

        def wait() -> Tensor:
            self._settle()
            return features

        return output, wait

    def _settle(self) -> None:
        """Wait for all that is on its way."""
        self._wait_for_outputs()
        self._wait(self._features_due)
        for work, _ in self._sent:
            _reached(work.wait)
        self._sent.clear()

    def stop(self) -> None:
        """Let the other processes return from :meth:`serve`."""
        if not self._told:
            self._settle()
        self._order(_Order.STOP, 0, 0)

    @torch.no_grad()
    def serve(self) -> None:
        """Answer the leader's calls until it stops.

        Raises:
            ConnectionError: the leader is gone.
            Exception: whatever the target raised here, once the leader, who is told, has stopped.
        """
        target, failure = self.target, None
        while True:
            header = torch.empty(3, dtype=torch.int64, device=self.device)
            _reached(dist.broadcast, header, group=self._group, group_src=0)
            order, rows, labels = header.tolist()
            if order == _Order.STOP:
                if failure is not None:
                    raise failure
                return
            if order == _Order.HOIST:
                parts = [torch.empty(size, dtype=torch.int64, device=self.device) for size in (rows, labels)]
                for part in parts:
                    _reached(dist.broadcast, part, group=self._group, group_src=0)
                target = hoisted(self.target, *parts)  # type: ignore[assignment]
            elif self._shares(rows)[self._rank]:
                failure = self._answer(target, self._shares(rows)[self._rank])

    def _answer(self, target: Target, rows: int) -> Exception | None:
        """Compute a share of the rows and send it, or say that it failed."""
        x = torch.empty(rows, *target.latent_shape, dtype=torch.float32, device=self.device)
        conditions = torch.empty(2, rows, dtype=torch.int64, device=self.device)
        for part in (x, conditions):
            _reached(dist.recv, part, group=self._group, group_src=0)
        t, y = conditions.unbind(0)
        parts: tuple[Tensor, ...] = ()
        failure: Exception | None = None
        try:
            features = target.features(x, t, y)
            # In the order in which the leader waits for them.
            parts = target.head(features, t, y), features
        except Exception as error:
            failure = error
        told = torch.tensor([failure is not None], dtype=torch.int64, device=self.device)
        for part in (told, *parts):
            _reached(dist.send, part.contiguous(), group=self._group, group_dst=0)
        return failure

    def _shares(self, rows: int) -> list[int]:
        """Rows of each process, the leader's first; the leader has the draft to do besides, so it is not given more."""
        small, larger = divmod(rows, self._size)
        return [small + (self._size - rank <= larger) for rank in range(self._size)] if small else self._few(rows)

    def _few(self, rows: int) -> list[int]:
        """Fewer rows than processes: the first ones take one each, so that the leader knows shapes and dtypes."""
        return [int(rank < rows) for rank in range(self._size)]

    def _order(self, order: _Order, rows: int, labels: int) -> None:
        header = torch.tensor([order, rows, labels], device=self.device)
        _reached(dist.broadcast, header, group=self._group, group_src=0)

    def _send(self, peer: int, tensor: Tensor) -> None:
        self._sent.append((_reached(dist.isend, tensor, group=self._group, group_dst=peer), tensor))

    def _receive(self, peer: int, tensor: Tensor) -> dist.Work:
        return _reached(dist.irecv, tensor, group=self._group, group_src=peer)

    def _wait_for_outputs(self) -> None:
        for work, _, _ in self._told:
            _reached(work.wait)
        failed = [peer for _, told, peer in self._told if told.item()]
        if failed:
            # Their results will never arrive. `_told` keeps its entries, so that stop() does not wait for them.
            raise RuntimeError(f"sample: every process of the group must answer, got an error in number {failed[0]}")
        self._told.clear()
        self._wait(self._outputs_due)

    @staticmethod
    def _wait(due: list[dist.Work]) -> None:
        while due:
            _reached(due.pop(0).wait)
