"""A policy as a target of the sampler: a DiT whose conditions are observations."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from free_dit.networks.policy import PolicyDiT
from free_kernels.conditions import Conditions
from free_kernels.targets.adaln import BLOCK_CHUNKS, HEAD_CHUNKS, AdaLNTarget, BlockParts
from free_kernels.targets.check import TargetCheck, compare_paths
from free_kernels.targets.fused_head import HeadParts
from free_kernels.validation import describe, fail
from free_kernels.wrappers import see_through


class PolicyTarget(AdaLNTarget):
    """A :class:`PolicyDiT` as a :class:`free_kernels.protocols.Target`; conditions are observation histories.

    ``sample(target, observations, ...)`` draws a chunk of actions ``[horizon, A]`` for each row of ``observations
    [N, history, O]``. Observations are embedded once per call, and modulations made once per (timestep, row). It has
    no null condition.

    Args:
        module: the policy, in evaluation mode.
        compile: run blocks and head through ``torch.compile``.

    Raises:
        TypeError: not a policy.
        ValueError: the module is in training mode.
    """

    learns_variance, has_null_label = False, False

    def __init__(self, module: PolicyDiT, compile: bool = False) -> None:
        where = type(self).__name__
        seen = see_through(where, module)
        if not isinstance(seen.module, PolicyDiT):
            fail(where, "module", "a PolicyDiT", type(seen.module).__name__, TypeError)
        parts = [BlockParts(block.norm1, block.attn, block.norm2, block.mlp) for block in seen.module.blocks]
        super().__init__(where, seen, parts, compile)
        config = self.module.config
        self.latent_shape = (config.horizon, config.action_size)
        self.feature_shape = (config.tokens, config.hidden_size)
        self.guidance_channels = config.horizon
        # Of a target without conditions no label is valid.
        self.num_classes = 0
        self._observations: Tensor | None = None
        # Embedded observations [N, P], which drafters are shown as well.
        self.pooled: Tensor | None = None
        self.recheck(where)

    def conditioned(self, conditions: Conditions | Tensor) -> PolicyTarget:
        """A copy whose label n stands for the observations ``conditions[n]``, floating point ``[N, history, O]``.

        Raises:
            ValueError, TypeError: conditions of another shape or kind, or a null condition, which policies have not.
        """
        where, config = type(self).__name__, self.module.config
        known = conditions if isinstance(conditions, Conditions) else Conditions(conditions, where=where)
        values, shape = known.values, (config.history, config.observation_size)
        wanted = f"floating point [N, {shape[0]}, {shape[1]}]"
        if not isinstance(values, Tensor) or not values.is_floating_point():
            fail(where, "conditions", wanted, describe(values), TypeError)
        if tuple(values.shape[1:]) != shape:
            fail(where, "conditions", wanted, describe(values))
        if known.null is not None:
            fail(where, "null_condition", "None for a policy, which is not guided", describe(known.null))
        clone = copy.copy(self)
        clone._observations = values.to(self.device, self.dtype)
        clone.pooled = self.module.o_embedder(clone._observations)
        clone._block_table = clone._final_table = clone._time_tables = None
        clone.num_classes = len(known)
        return clone

    def compare(self, where: str) -> TargetCheck:
        """The comparison with the module's own call, at two observations of no meaning."""
        config = self.module.config
        generator = torch.Generator().manual_seed(0)
        shape = 2, config.history, config.observation_size
        probes = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return compare_paths(where, "module", self.conditioned(probes), self._whole)

    @property
    def dtype(self) -> torch.dtype:
        """The module's dtype."""
        return self.module.x_embedder.weight.dtype

    @property
    def device(self) -> torch.device:
        """The module's device."""
        return self.module.x_embedder.weight.device

    def own(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Output of the module's own call, ``[R, horizon, A]``."""
        return self._whole(x.to(self.dtype), t, self._observations.index_select(0, y))

    def _embed(self, x: Tensor) -> Tensor:
        return self.module.x_embedder(x) + self.module.pos_embed

    def _block_inputs(self, t: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (self._conditioning(t, y),)

    def _plain_blocks(self, h: Tensor, *inputs: Tensor) -> Tensor:
        for block in self.module.blocks:
            h = block(h, *inputs)
        return h

    def _plain_head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self._as_chunks(self.module.final_layer(h, self._conditioning(t, y)))

    def _left_out(self) -> list[torch.nn.Module]:
        return [*self.module.blocks, self.module.final_layer]

    def _modulated_head(self, h: Tensor, modulations: Tensor) -> Tensor:
        final = self.module.final_layer
        shift, scale = modulations.unbind(1)
        return self._as_chunks(final.linear(torch.addcmul(shift, final.norm_final(h), scale)))

    def _head_parts(self) -> HeadParts:
        final, tokens = self.module.final_layer, self.feature_shape[0]
        # A token's values follow one another: a column of patches of one row each.
        return HeadParts(
            final.norm_final, final.linear, self._as_chunks, tokens, tokens, (1, final.linear.out_features)
        )

    def _as_chunks(self, tokens: Tensor) -> Tensor:
        return tokens.reshape(len(tokens), *self.latent_shape)

    def _conditioning(self, t: Tensor, y: Tensor) -> Tensor:
        if self.pooled is None:
            fail(type(self).__name__, "conditions", "given, as sample(target, observations) does", "none")
        return self._time_embedding(0, t) + self.pooled.index_select(0, y)

    def _time_embedders(self) -> list[Callable[[Tensor], Tensor]]:
        return [self.module.t_embedder]

    def _block_modulations(self, t: Tensor, y: Tensor) -> Tensor:
        # One product for all blocks: every decision has an observation of its own, and makes these anew.
        layers = [block.adaLN_modulation[1] for block in self.module.blocks]
        weight, bias = torch.cat([layer.weight for layer in layers]), torch.stack([layer.bias for layer in layers])
        # Scales are used with 1 added.
        bias = bias.unflatten(1, (BLOCK_CHUNKS, -1))
        bias[:, 1] += 1
        bias[:, 4] += 1
        rows = F.linear(F.silu(self._conditioning(t, y)), weight, bias.flatten())
        return rows.view(len(t), BLOCK_CHUNKS * len(layers), 1, -1)

    def _final_modulations(self, t: Tensor, y: Tensor) -> Tensor:
        rows = self.module.final_layer.adaLN_modulation(self._conditioning(t, y)).unflatten(1, (HEAD_CHUNKS, 1, -1))
        rows[:, 1] += 1
        return rows
