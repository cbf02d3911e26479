"""``adaptive_norm`` in plain PyTorch; differentiable, so training takes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from free_kernels.ops.norms.arguments import NormArguments


def adaptive_norm(a: NormArguments) -> tuple[Tensor, Tensor]:
    """See ``free_kernels.ops.norms.api.adaptive_norm``."""
    rows = a.modulations.unsqueeze(2).unbind(1)
    if a.update is None:
        x = a.x.clone()
    elif a.gate_at < 0:
        x = a.x + a.update
    else:
        x = torch.addcmul(a.x, rows[a.gate_at], a.update)
    # A sum with another dtype has the wider one.
    x = x.to(a.x.dtype)
    y = torch.addcmul(rows[a.shift_at], F.layer_norm(x, x.shape[-1:], None, None, a.eps), rows[a.scale_at])
    if a.gain_at >= 0:
        y = torch.addcmul(y, a.skip, rows[a.gain_at])
    return x, y.to(a.x.dtype)
