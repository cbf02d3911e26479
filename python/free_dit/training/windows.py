"""Windows of trajectories that a drafter learns from, and the network rows that they take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from free_dit.training.chains import ChainSource
from free_dit.training.shards import ShardWindow
from free_dit.training.trajectories import Trajectories


class NetworkRows:
    """The network rows of a batch of B windows: all conditional ones, then the unconditional ones of guided windows.

    Without guidance the unconditional branch does not enter the output.

    Args:
        guidance: float32 ``[B]``.
        whole: keep both branches of all.
        device: where rows are picked.
    """

    def __init__(self, guidance: Tensor, whole: bool, device: torch.device) -> None:
        self._count = count = len(guidance)
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

    def of(self, part: slice) -> Tensor:
        """Where the network rows of a part of the windows are among these, int64 ``[R']``; in their own order."""
        windows = self._rows % self._count
        return ((windows >= part.start) & (windows < part.stop)).nonzero().view(-1)


@dataclass(frozen=True)
class Windows:
    """A batch of B windows of trajectories.

    Attributes:
        chain: where the trajectories come from.
        data: the trajectories.
        image: int64 ``[B]``, the image of each window.
        y: labels ``[R]`` of the network rows, on the drafter's device.
        network: the network rows.
    """

    chain: ChainSource
    data: Trajectories | ShardWindow
    image: Tensor
    y: Tensor
    network: NetworkRows

    def rows(self, name: str, step: Tensor) -> Tensor:
        """``data.at(name, step, image)`` at ``step [B]``, in float32 on the drafter's device."""
        return self.data.at(name, step, self.image).to(self.y.device).float()

    def part(self, part: slice, guidance: Tensor, whole: bool = False) -> Windows:
        """Some of the windows; ``guidance [B]`` and ``whole`` as of the network rows."""
        network = NetworkRows(guidance[part], whole, self.y.device)
        return Windows(self.chain, self.data, self.image[part], self.y[self.network.of(part)], network)
