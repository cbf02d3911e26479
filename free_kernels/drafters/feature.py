"""The learned drafter: a shallow transformer over (parent feature, latent, latent difference, timestep, label)."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from free_kernels.checkpoint import check_depth, load_checkpoint, load_module, reading, save_checkpoint
from free_kernels.conditioning import ConditioningTable, table_fits
from free_kernels.drafters.dense import DENSE_BLOCK_ROWS, DENSE_LAST_ROWS, DenseBlock, DenseFolded
from free_kernels.drafters.memory import FeatureMemory, check_memory
from free_kernels.ops.network import NetworkArguments, drafter_network, network_in_parts
from free_kernels.ops.network.arguments import BLOCK_ROWS, LAST_ROWS
from free_kernels.ops.norms.reference import adaptive_norm as reference_norm
from free_kernels.ops.tokens import TokenArguments, drafter_tokens
from free_kernels.ops.tokens.reference import drafter_tokens as reference_tokens
from free_kernels.ops.tokens.reference import tiles
from free_kernels.protocols import DrafterDefaults, Target, TargetDefaults
from free_kernels.validation import check_choice, check_float, check_int, check_sizes, fail


@dataclass(frozen=True)
class DrafterConfig:
    """Shape of a learned drafter.

    Attributes:
        width: token width; the target's feature width if None.
        depth: number of blocks.
        head_dim: width of an attention head; divides ``width``.
        mlp_ratio: width of the MLP over ``width``; with dense mixing over that of all tokens side by side.
        window: W, steps whose tokens a query sees, its own included; with 1 the drafter remembers nothing.
        inputs: what the tokens hold beside the parent feature, joined by "+": "state", "unit_change" (its change over
            the last step, scaled to unit size), "scaled_change" (the same over its typical size at that timestep).
        skip: whether the embedding also reaches the output past the blocks, through a gain that depends on (t, y).
        first_step: whether an image's first step is drafted too, from a learned stand-in for the feature that it lacks.
        num_timesteps: T, training timesteps of the target.
        time_unit: ticks of the schedule's timesteps to one of these T: 1, but for flow models, whose time is finer.
        mixing: what a block is: ``"attention"`` and an MLP on each token, or ``"dense"``, one MLP over all tokens side
            by side, fewer operations, none of which normalises: for a few tokens on a CPU, where operations cost more
            than arithmetic. It needs ``window`` 1, and has its linear path whatever ``skip`` says.
    """

    width: int | None = None
    depth: int = 1
    head_dim: int = 32
    mlp_ratio: float = 4.0
    window: int = 1
    inputs: str = "state+unit_change+scaled_change"
    skip: bool = True
    first_step: bool = True
    num_timesteps: int = 1000
    time_unit: int = 1
    mixing: str = "attention"


MIXINGS = ("attention", "dense")
INPUTS = ("state", "unit_change", "scaled_change")


class _Block(nn.Module):
    """Weights of one transformer block of :func:`~free_kernels.ops.network.drafter_network`."""

    def __init__(self, width: int, mlp_ratio: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, int(width * mlp_ratio))
        self.fc2 = nn.Linear(int(width * mlp_ratio), width)

    def weights(self) -> tuple[Tensor, ...]:
        """Weight and bias of each layer in order."""
        return tuple(part for layer in (self.qkv, self.proj, self.fc1, self.fc2) for part in (layer.weight, layer.bias))


class _Folded(NamedTuple):
    """A drafter's weights with scales folded in, as plain tensors: no module call is left on the drafting path.

    Attributes:
        weights: as :class:`~free_kernels.ops.network.NetworkArguments` has them.
        heads: attention heads.
    """

    weights: list[Tensor]
    heads: int

    def laid_out(self) -> _Folded:
        """The same values, matrices stored column by column, which products with few rows read in order."""
        return self._replace(weights=[w.mT.contiguous().mT if w.ndim == 2 else w.contiguous() for w in self.weights])

    def __call__(
        self, feature: Tensor, tokens: Tensor, modulations: Tensor, memory: FeatureMemory | None = None
    ) -> Tensor:
        """Feature ``[R, T, D]`` from the parent feature, this beside patches, modulations ``[R, K, 1, width]``."""
        given = NetworkArguments(feature, tokens, modulations.squeeze(2), self.weights, self.heads, 1e-6)
        parts = {} if memory is None else {"attend": memory.attend}
        # The kernels have no gradient, and compute in float32.
        if torch.is_grad_enabled() or feature.dtype == torch.float64:
            parts["normalize"] = reference_norm
        return network_in_parts(given, **parts) if parts else drafter_network(given)


def _run(
    folded: _Folded | DenseFolded, feature: Tensor, tokens: Tensor, modulations: Tensor, memory: FeatureMemory | None
) -> Tensor:
    """A call of the network, which :meth:`FeatureDrafter.compile` compiles."""
    return folded(feature, tokens, modulations, memory)


def _checked_calibration(table: object) -> list[list[float]] | None:
    """The table itself where it is None or rows of equally many probabilities; else TypeError."""
    if table is None:
        return None
    rows = table if isinstance(table, list) and table and all(isinstance(row, list) and row for row in table) else [[]]
    values = [value for row in rows for value in row]
    fits = len({len(row) for row in rows}) == 1 and all(isinstance(v, float) and 0.0 <= v <= 1.0 for v in values)
    if not values or not fits:
        raise TypeError("a calibration that is no table of probabilities")
    return rows


def _checked_share(share: object) -> float:
    """A number in [0, 1], as JSON has it; else TypeError."""
    if type(share) not in (int, float) or not 0.0 <= share <= 1.0:
        raise TypeError(f"a share {share!r}")
    return float(share)


def _checked_facts(facts: object) -> dict[str, str | int | bool]:
    """Names with strings, ints or truths, as a file has them, or {} for None; else TypeError."""
    facts = {} if facts is None else facts
    if not isinstance(facts, dict) or not all(type(value) in (str, int, bool) for value in facts.values()):
        raise TypeError("facts of a target that are no names with strings, ints or truths")
    return facts


def _checked_shape(value: object, count: int | None) -> tuple[int, ...]:
    """``count`` positive ints, or any number from one on, as JSON has them; else TypeError."""
    sizes = value if isinstance(value, list) and value else [0]
    if len(sizes) != (count or len(sizes)) or not all(type(v) is int and v > 0 for v in sizes):
        raise TypeError(f"a shape {value!r}")
    return tuple(value)


def _check_types(config: DrafterConfig) -> None:
    """TypeError unless every value has the type of its default; a width may be None."""
    for field in fields(config):
        value = getattr(config, field.name)
        wanted = int if field.name == "width" else type(field.default)
        allowed = (int, float) if wanted is float else (wanted,)
        if type(value) not in allowed and not (field.name == "width" and value is None):
            raise TypeError(f"a config with {field.name} {value!r}")


def _tiling(latent: tuple[int, ...], feature: tuple[int, int]) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """The shape ``[C, H, W]`` in which T patches tile a latent, and the lines and columns of a patch."""
    tokens = feature[0]
    if len(latent) == 2 and tokens >= 1 and latent[0] % tokens == 0:
        return (1, *latent), (latent[0] // tokens, latent[1])
    if len(latent) not in (2, 3, 4):
        fail("FeatureDrafter", "latent_shape", "(C, H, W), (C, F, H, W) or (A, B)", repr(latent))
    if len(latent) > 2:
        # Frames stand one below the other, and a patch lies within one.
        channels, frames, (height, width) = latent[0], math.prod(latent[1:-2]), latent[-2:]
        patch = math.isqrt(frames * height * width // tokens)
        if patch >= 1 and tokens * patch**2 == frames * height * width and not (height % patch or width % patch):
            return (channels, frames * height, width), (patch, patch)
    wanted = {2: "whole lines", 3: "square patches", 4: "square patches of frames"}[len(latent)]
    fail("FeatureDrafter", "feature_shape", f"T {wanted} tiling {' x '.join(map(str, latent[-2:]))}", str(feature))


class FeatureDrafter(nn.Module, DrafterDefaults):
    """Predicts the target's top-block feature at a state from the feature one step before.

    Needs the target's shapes and nothing of its insides. Untrained, it returns the parent feature, as the frozen
    drafter does. Source: FREE's feature-level autoregression (arXiv 2511.20390); the network is our own.

    With a window W > 1 its tokens also attend to those of up to W - 1 earlier calls, which :meth:`new_memory` keeps.
    Keys carry the timestep of their own call through its modulation, which tells a query how old they are.

    Args:
        latent_shape: of the target: (C, H, W), (C, F, H, W) of F frames, or (A, B), whose lines are shared out.
        feature_shape: (T, D) of the target; T patches must tile the latent: square ones of an image or of frames, whole
            lines of (A, B).
        num_classes: labels of the target; label ``num_classes`` is the null label. 0 with ``condition_width``.
        config: width, depth, heads and window.
        condition_width: P of a target's ``pooled`` vectors, which the drafter is shown in the place of labels; None for
            a target of class labels.

    Raises:
        ValueError, TypeError: the shapes do not fit one another, or the window is below 1 or not an int.
    """

    def __init__(
        self,
        latent_shape: tuple[int, ...],
        feature_shape: tuple[int, int],
        num_classes: int,
        config: DrafterConfig = DrafterConfig(),
        condition_width: int | None = None,
    ) -> None:
        super().__init__()
        self.latent_shape = check_sizes("FeatureDrafter", "latent_shape", latent_shape)
        self.feature_shape = check_sizes("FeatureDrafter", "feature_shape", feature_shape, "(T, D)")
        if condition_width is None:
            self.num_classes = check_int("FeatureDrafter", "num_classes", num_classes, 1)
        else:
            self.num_classes = check_int("FeatureDrafter", "num_classes", num_classes, 0, 0)
            check_int("FeatureDrafter", "condition_width", condition_width, 1)
        self.condition_width = condition_width
        self.config = config
        check_int("FeatureDrafter", "window", config.window, 1)
        check_int("FeatureDrafter", "time_unit", config.time_unit, 1)
        if check_choice("FeatureDrafter", "mixing", config.mixing, MIXINGS) == "dense":
            check_int("FeatureDrafter", "window", config.window, 1, 1)
        tokens, features = self.feature_shape
        self._grid, self.patch = _tiling(self.latent_shape, self.feature_shape)
        channels, patch_numel = self._grid[0], math.prod(self.patch)
        inner = features if config.width is None else check_int("FeatureDrafter", "width", config.width, 1)
        for name in ("depth", "head_dim", "num_timesteps"):
            check_int("FeatureDrafter", name, getattr(config, name), 1)
        if inner % config.head_dim:
            fail("FeatureDrafter", "width", f"a multiple of head_dim {config.head_dim}", inner)
        # A hidden layer has one element at least.
        check_float("FeatureDrafter", "mlp_ratio", config.mlp_ratio, 1 / inner)
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_std", torch.ones(features))
        self.register_buffer("change_std", torch.ones(features))
        self.from_feature = nn.Linear(features, inner)
        self.inputs = tuple(config.inputs.split("+"))
        if not set(self.inputs) <= set(INPUTS) or len(set(self.inputs)) < len(self.inputs):
            fail("FeatureDrafter", "inputs", f"some of {', '.join(INPUTS)} joined by '+'", repr(config.inputs))
        if "scaled_change" in self.inputs:
            self.register_buffer("change_rms", torch.ones(config.num_timesteps))
        self.from_patches = nn.Linear(len(self.inputs) * channels * patch_numel, inner, bias=False)
        self.positions = nn.Parameter(nn.init.normal_(torch.empty(1, tokens, inner), std=0.02))
        self.timestep_mlp = nn.Sequential(nn.Linear(128, inner), nn.SiLU(), nn.Linear(inner, inner))
        if condition_width is None:
            self.label_table = nn.Embedding(num_classes + 1, inner)
        else:
            self.condition_mlp = nn.Sequential(nn.Linear(condition_width, inner), nn.SiLU(), nn.Linear(inner, inner))
        block = _Block if config.mixing == "attention" else partial(DenseBlock, tokens)
        self.blocks = nn.ModuleList([block(inner, config.mlp_ratio) for _ in range(config.depth)])
        self.modulation = nn.Linear(inner, self._modulation_rows * inner)
        # What is added to each row of modulations. A buffer, because a captured round must not copy from the host.
        around = ([0.0, 1.0, 1.0] * (2 * config.depth + 1))[: self._modulation_rows]
        self.register_buffer("_modulation_offsets", torch.tensor(around).view(1, -1, 1, 1), persistent=False)
        self.to_feature = nn.Linear(inner, features)
        if config.first_step:
            self.first_feature = nn.Linear(channels * patch_numel, features, bias=False)
            self.first_bias = nn.Parameter(torch.zeros(tokens, features))
            nn.init.zeros_(self.first_feature.weight)
        if condition_width is None:
            nn.init.normal_(self.label_table.weight, std=0.02)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        nn.init.zeros_(self.to_feature.weight)
        nn.init.zeros_(self.to_feature.bias)
        # Acceptance probabilities [parts of the chain, look-ahead] that training measured; see draft_length="auto".
        self.calibration: list[list[float]] | None = None
        # Share of the chain that is left to clean samples, for which it was trained; 0 for one with a memory.
        self.frozen_share = 0.0
        # What is known of the target that it was trained for and a file of that may not say, such as "num_heads".
        self.target_facts: dict[str, str | int | bool] = {}
        # Condition vectors [M, P] that labels are rows of.
        self._pooled: Tensor | None = None
        self._table: ConditioningTable | None = None
        self._kept: _Folded | DenseFolded | None = None
        self._run: Callable[..., Tensor] = _run

    def compile(self, *arguments: Any, **settings: Any) -> None:
        """Run the network through ``torch.compile``, with its arguments; hoisted copies share what was compiled."""
        self.compile_with(lambda function: torch.compile(function, *arguments, **settings))

    def compile_with(self, compiler: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Run the network through a function's compiled form."""
        self._run = compiler(_run)

    def set_feature_scale(self, features: Tensor, changes: Tensor) -> None:
        """Take the scale of features ``[..., D]`` and of their change over one step from samples of both."""
        self.feature_mean.copy_(features.flatten(0, -2).mean(0))
        self.feature_std.copy_(features.flatten(0, -2).std(0).clamp(min=1e-4))
        self.change_std.copy_(changes.flatten(0, -2).square().mean(0).sqrt().clamp(min=1e-6))

    def set_first_feature(self, states: Tensor, features: Tensor) -> None:
        """Fit the stand-in of :meth:`initial_feature` to features ``[R, T, D]`` at first states ``[R, C, H, W]``."""
        if self.drafts_first_step:
            tiles = self._tiles(states)
            mean, wanted = tiles.mean(0), features.mean(0)
            centred = (tiles - mean).flatten(0, 1)
            ridge = (
                1e-3
                * len(centred)
                * centred.square().mean()
                * torch.eye(centred.shape[1], dtype=centred.dtype, device=centred.device)
            )
            both = centred.T @ (features - wanted).flatten(0, 1)
            weights = torch.linalg.solve(centred.T @ centred + ridge, both)
            self.first_feature.weight.data.copy_(weights.T)
            self.first_bias.data.copy_(wanted - mean @ weights)

    @property
    def drafts_first_step(self) -> bool:
        """Whether :meth:`initial_feature` stands in for an image's parent feature at its first step."""
        return self.config.first_step

    def initial_feature(self, state: Tensor) -> Tensor:
        """What takes the place of the parent feature at the first states ``[R, C, H, W]`` of images: ``[R, T, D]``.

        Linear in a token's patch. It goes into a draft of the first step with the state itself as the one before.
        """
        return self.first_feature(self._tiles(state.to(self.first_bias.dtype))) + self.first_bias

    def set_change_scale(self, timesteps: Tensor, states: Tensor) -> None:
        """Take the size of a state's change at every timestep from chains ``states [K, ..., C, H, W]`` at ``[K]``.

        Entry k of ``timesteps`` is that of ``states[k]``, in either direction; between them sizes are interpolated.
        """
        if "scaled_change" in self.inputs:
            rms = states.diff(dim=0).flatten(1).square().mean(1).sqrt().clamp(min=1e-8)
            order = timesteps[1:].argsort()
            known = (timesteps[1:][order] / self.config.time_unit).cpu().numpy()
            sizes = rms[order].log().cpu().numpy()
            wanted = np.arange(self.config.num_timesteps)
            self.change_rms.copy_(torch.from_numpy(np.exp(np.interp(wanted, known, sizes))))

    @property
    def _modulation_rows(self) -> int:
        if self.config.mixing == "dense":
            return DENSE_BLOCK_ROWS * self.config.depth + DENSE_LAST_ROWS
        return BLOCK_ROWS * self.config.depth + LAST_ROWS + self.config.skip

    def forward(
        self,
        feature: Tensor,
        previous: Tensor,
        state: Tensor,
        t: Tensor,
        y: Tensor,
        memory: FeatureMemory | None = None,
    ) -> Tensor:
        """Feature ``[R, T, D]`` at ``state``; arguments as in :class:`free_kernels.protocols.Drafter`.

        With a memory, of :meth:`new_memory` for these R rows, the call sees up to W - 1 calls before it and is
        remembered itself; without one it has no past, as the first call for an image.

        Raises:
            ValueError: a memory of other rows or of another drafter's shape.
            TypeError: a memory of another kind.
        """
        if memory is not None:
            check_memory(memory, len(feature), self.config.window, self.config.depth, self._step_shape)
        dtype = self.positions.dtype
        table = self._table or self._modulations
        folded = self._kept or self._fold()
        feature = feature.to(dtype)
        tokens, modulations = self._tokens(feature, previous, state, t), table(t, y)
        return self._run(folded, feature, tokens, modulations, memory)

    def new_memory(
        self, slots: int, branches: int, drafts: int, dtype: torch.dtype | None = None
    ) -> FeatureMemory | None:
        """An empty memory for ``branches * slots`` rows, conditional ones first; None for window 1.

        Args:
            slots: S, trajectories.
            branches: guidance branches, 1 or 2.
            drafts: the largest number of calls between two rewinds; so many may be forgotten with W - 1 left.
            dtype: of keys and values, for calls under autocast; the weights' own if None.

        Raises:
            ValueError, TypeError: a count below 1 or not an int.
        """
        if self.config.window == 1:
            return None
        shape = self.config.window, self.config.depth, self._step_shape
        return FeatureMemory(slots, branches, drafts, *shape, like=self.positions.to(dtype or self.positions.dtype))

    @property
    def _step_shape(self) -> tuple[int, int, int]:
        """(T, H, Dh) of a call's keys."""
        tokens, width = self.positions.shape[1:]
        return tokens, width // self.config.head_dim, self.config.head_dim

    def hoisted(self, timesteps: Tensor, labels: Tensor) -> FeatureDrafter:
        """A copy with modulations tabled and scales folded into the weights; itself if there are too many pairs.

        Raises:
            ValueError: timesteps beyond those that the drafter was made for.
        """
        latest, limit = int(timesteps.max()), self.config.num_timesteps * self.config.time_unit
        if latest >= limit:
            fail("FeatureDrafter", "timesteps", f"below the {limit} that the drafter was made for", str(latest))
        inner = self.positions.shape[-1]
        if not table_fits(timesteps, labels, self._modulation_rows * inner * self.positions.element_size()):
            return self
        clone = copy.copy(self)
        clone._table = ConditioningTable(self._modulations, timesteps, labels)
        folded = self._fold()
        clone._kept = folded.laid_out() if isinstance(folded, _Folded) else folded
        return clone

    def hidden_layers(self) -> tuple[nn.Module, ...]:
        """The layers whose weight matrices lead from width to width: all but those that meet features and patches."""
        return *self.blocks, self.timestep_mlp, self.modulation

    def conditioned(self, pooled: Tensor) -> FeatureDrafter:
        """A copy whose labels are rows of ``pooled [M, P]``; itself for a drafter of class labels."""
        if self.condition_width is None:
            return self
        clone = copy.copy(self)
        clone._pooled, clone._table, clone._kept = pooled.to(self.positions), None, None
        return clone

    def check_target(self, target: Target, where: str = "FeatureDrafter") -> None:
        """Raise ValueError unless the target has this drafter's shapes and device, TypeError unless it is one."""
        if not hasattr(target, "feature_shape"):
            fail(where, "target", "a target such as DiTTarget(module)", type(target).__name__, TypeError)
        pooled = TargetDefaults.read(target, "pooled")
        shown = None if pooled is None else pooled.shape[1]
        if shown != self.condition_width and (shown is not None or target.num_classes):
            wanted = "for class labels" if shown is None else f"with condition_width {shown}"
            mine = self.condition_width
            fail(where, "drafter", f"one made {wanted}", "one for class labels" if mine is None else f"one with {mine}")
        names = ("latent_shape", "feature_shape", *(["num_classes"] if self.condition_width is None else []))
        for name in names:
            mine, theirs = getattr(self, name), getattr(target, name)
            if mine != (tuple(theirs) if isinstance(mine, tuple) else theirs):
                fail(where, "drafter", f"one made for a target with {name} {theirs}", f"one made for {mine}")
        device = TargetDefaults.read(target, "device")
        if where != "FeatureDrafter.load" and device is not None:
            here, there = self.positions.device, torch.device(device)
            # A device without a number is whichever is current.
            same_number = None in (here.index, there.index) or here.index == there.index
            if here.type != there.type or not same_number:
                fail(where, "drafter", f"on {there} like the target", f"one on {here}")

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write weights, shapes and config to a safetensors file; ``dtype`` narrows the stored weights."""
        metadata = {
            "kind": "feature_drafter",
            "latent_shape": self.latent_shape,
            "feature_shape": self.feature_shape,
            "num_classes": self.num_classes,
            "config": asdict(self.config),
            "calibration": self.calibration,
        }
        if len(self.latent_shape) != 3:
            # A second word on the shape: without one of its dimensions an image's would pass for another state's.
            metadata["patch"] = self.patch
        if self.condition_width is not None:
            metadata["condition_width"] = self.condition_width
        if self.frozen_share:
            metadata["frozen_share"] = self.frozen_share
        if self.target_facts:
            metadata["target"] = self.target_facts
        weights = {name: value.to(dtype or value.dtype) for name, value in self.state_dict().items()}
        save_checkpoint(path, weights, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], target: Target | None = None) -> FeatureDrafter:
        """Read a drafter in evaluation mode; with ``target``, check that it was made for one of its shapes.

        Raises:
            FileNotFoundError: no such file.
            CheckpointError: broken, truncated, or not a drafter.
            ValueError: made for a target of other shapes.
            TypeError: ``target`` is none, as a network itself is none.
        """
        weights, metadata = load_checkpoint(path, "feature_drafter")
        with reading("FeatureDrafter.load", path, "a drafter's shapes"):
            shapes = [
                _checked_shape(metadata[name], count) for name, count in (("latent_shape", None), ("feature_shape", 2))
            ]
            if len(shapes[0]) != 3 and tuple(metadata["patch"]) != _tiling(*shapes)[1]:
                raise TypeError(f"patches {metadata['patch']!r}")
            config = DrafterConfig(**metadata["config"])
            _check_types(config)
            check_depth(config.depth, weights)
            calibration = _checked_calibration(metadata.get("calibration"))
            facts = _checked_facts(metadata.get("target"))
            share = _checked_share(metadata.get("frozen_share", 0.0))
            if share and config.window > 1:
                raise TypeError(f"a share {share:g} for a drafter with a window")
            drafter = load_module(
                lambda: cls(*shapes, metadata["num_classes"], config, metadata.get("condition_width")), weights, path
            )
        drafter.calibration, drafter.target_facts, drafter.frozen_share = calibration, facts, share
        if target is not None:
            drafter.check_target(target, "FeatureDrafter.load")
            drafter.to(TargetDefaults.read(target, "device") or "cpu")
        return drafter.eval().requires_grad_(False)

    def _fold(self) -> _Folded | DenseFolded:
        """Weights with the feature scales folded in; differentiable, so training takes the same path."""
        scaled = self.from_feature.weight / self.feature_std
        enter = torch.cat([scaled, self.from_patches.weight], dim=1)
        enter_bias = self.positions + self.from_feature.bias - scaled @ self.feature_mean
        blocks = tuple(block.weights() for block in self.blocks)
        leave, leave_bias = self.to_feature.weight * self.change_std[:, None], self.to_feature.bias * self.change_std
        if self.config.mixing == "dense":
            return DenseFolded(enter, enter_bias, blocks, leave, leave_bias)
        weights = [enter, enter_bias, *(part for block in blocks for part in block), leave, leave_bias]
        return _Folded(weights, self.positions.shape[-1] // self.config.head_dim)

    def _tokens(self, feature: Tensor, previous: Tensor, state: Tensor, t: Tensor) -> Tensor:
        """The parent feature and patches of the inputs side by side, ``[R, T, D + I C p p]``."""
        rms = self.change_rms if "scaled_change" in self.inputs else None
        places = (self.inputs.index(name) if name in self.inputs else -1 for name in INPUTS)
        states = (self._as_images(part) for part in (previous, state))
        rows = (part.contiguous() for part in (feature, *states, t))
        given = TokenArguments(*rows, rms, self.config.time_unit, *self.patch, *places)
        # The kernels have no gradient, and take states and scales in float32.
        dtypes = {part.dtype for part in (previous, state, rms) if part is not None}
        if torch.is_grad_enabled() or dtypes != {torch.float32}:
            return reference_tokens(given)
        return drafter_tokens(given)

    def _tiles(self, images: Tensor) -> Tensor:
        """Patches of images ``[R, C, H, W]``, ``[R, T, C p p]``."""
        return tiles(self._as_images(images), self.patch)

    def _as_images(self, states: Tensor) -> Tensor:
        """States ``[R, *latent_shape]`` as ``[R, C, H, W]``, which patches tile."""
        return states if len(self.latent_shape) == 3 else states.reshape(len(states), *self._grid)

    def _label(self, y: Tensor) -> Tensor:
        """What is added to a timestep's embedding for labels ``[R]``, ``[R, width]``."""
        if self.condition_width is None:
            return self.label_table(y)
        if self._pooled is None:
            fail("FeatureDrafter", "conditions", "given, as a target's pooled vectors (conditioned)", "labels only")
        return self.condition_mlp(self._pooled.index_select(0, y))

    def _modulations(self, t: Tensor, y: Tensor) -> Tensor:
        """``[R, 6 depth + 2, 1, width]``: (shift, 1 + scale, 1 + gate) of each half block, then (shift, 1 + scale).

        With a skip there is one row more, its 1 + gain; with dense mixing blocks are not halved, and have 3 rows.
        """
        exponents = torch.arange(64, dtype=torch.float32, device=t.device) / 64
        angles = (t.float() / self.config.time_unit).unsqueeze(-1) * torch.exp(-math.log(10000.0) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        c = self.timestep_mlp(waves.to(self.positions.dtype)) + self._label(y)
        rows = self.modulation(F.silu(c)).unflatten(1, (self._modulation_rows, 1, -1))
        return rows + self._modulation_offsets.to(rows.dtype)
