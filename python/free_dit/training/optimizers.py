"""Optimizers of the training loop: AdamW, or Muon for the inner weight matrices with AdamW for the rest."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from free_kernels.validation import check_choice, fail

OPTIMIZERS = ("adamw", "muon", "muon_float32")
# Learning rate of Muon over that of AdamW.
MUON_RATE = 5.0


class Together:
    """Several optimizers as one: their parameter groups, and their states under one numbering.

    A group's ``rate`` is what the loop's learning rate is multiplied by for it.

    Args:
        optimizers: over different parameters.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        counts = (sum(len(group["params"]) for group in one.param_groups) for one in optimizers)
        # Of each optimizer the number of its first parameter, and the end.
        self._first = [0, *accumulate(counts)]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, in order; their entries may be set."""
        return [group for one in self.optimizers for group in one.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        for one in self.optimizers:
            one.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """Update every parameter once."""
        for one in self.optimizers:
            one.step()

    def state_dict(self) -> dict[str, Any]:
        """``{"state": {parameter number: its state}}``."""
        states: dict[int, Any] = {}
        for one, first in zip(self.optimizers, self._first, strict=False):
            states |= {first + index: state for index, state in one.state_dict()["state"].items()}
        return {"state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state of :meth:`state_dict`."""
        states = state_dict["state"]
        for one, (first, end) in zip(self.optimizers, pairwise(self._first), strict=True):
            own = {index - first: states[index] for index in states if first <= index < end}
            one.load_state_dict(one.state_dict() | {"state": own})


class Float32Muon(torch.optim.Muon):
    """Muon that orthogonalises in float32, all matrices of one shape at once.

    For many small matrices on a CPU, where products in bfloat16, torch's choice, are slow.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter once."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"])
                shapes.setdefault(parameter.shape, []).append((parameter, update))
            for (rows, columns), pairs in shapes.items():
                updates = orthogonalised(torch.stack([update for _, update in pairs]))
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


def orthogonalised(matrices: Tensor) -> Tensor:
    """``[M, A, B]`` with singular values near 1: five Newton-Schulz steps with Muon's coefficients, in float32."""
    x = matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def hidden_matrices(module: nn.Module) -> set[nn.Parameter]:
    """Weights of the linear layers between the first and the last ones of a network, which map width to width.

    Only modules with a method ``hidden_layers()``, an iterable of their inner modules, have any.
    """
    layers = getattr(module, "hidden_layers", None)
    if layers is None:
        return set()
    return {
        part.weight
        for layer in layers()
        for part in layer.modules()
        if isinstance(part, nn.Linear) and part.weight.requires_grad
    }


def make_optimizer(
    name: str, module: nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer | Together:
    """The optimizer of a run; ``param_groups`` with another learning rate have a ``rate``.

    Args:
        name: ``"adamw"`` or ``"muon"``, which orthogonalises the updates of the module's inner matrices
            (Jordan et al. 2024, kellerjordan.github.io/posts/muon; torch.optim.Muon), or ``"muon_float32"``, the same
            in another precision (:class:`Float32Muon`).
        module: what is trained.
        learning_rate: peak learning rate of AdamW.
        weight_decay: of both.

    Raises:
        ValueError: another name, or Muon for a module without ``hidden_layers``.
    """
    check_choice("train", "optimizer", name, OPTIMIZERS)
    parameters = [p for p in module.parameters() if p.requires_grad]
    adamw = {"lr": learning_rate, "weight_decay": weight_decay, "betas": (0.9, 0.99)}
    if name == "adamw":
        return torch.optim.AdamW(parameters, **adamw)
    hidden = hidden_matrices(module)
    if not hidden:
        fail("train", "optimizer", f"'adamw' for a {type(module).__name__}", repr(name))
    kind = torch.optim.Muon if name == "muon" else Float32Muon
    muon = kind(
        [{"params": [p for p in parameters if p in hidden], "rate": MUON_RATE}],
        lr=learning_rate * MUON_RATE,
        weight_decay=weight_decay,
        momentum=0.95,
    )
    return Together(torch.optim.AdamW([p for p in parameters if p not in hidden], **adamw), muon)


def kept_shapes(
    optimizer: torch.optim.Optimizer | Together,
) -> list[tuple[nn.Parameter, dict[str, torch.Size]]]:
    """Parameters in the order of their numbers in the state, and the shapes of the state of each after an update."""
    shapes = []
    for one in optimizer.optimizers if isinstance(optimizer, Together) else (optimizer,):
        for parameter in (p for group in one.param_groups for p in group["params"]):
            if isinstance(one, torch.optim.Muon):
                shapes.append((parameter, {"momentum_buffer": parameter.shape}))
            else:
                moments = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
                shapes.append((parameter, moments))
    return shapes
