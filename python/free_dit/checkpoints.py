"""Checkpoints of other projects: the original DiT's files, and weights to and from diffusers' layout."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from free_dit.networks.dit import DiT, DiTConfig, sincos_positions, standard_heads
from free_dit.networks.sit import SiT
from free_kernels.checkpoint import CheckpointError
from free_kernels.targets import is_diffusers_dit
from free_kernels.validation import check_choice, describe, fail

_LOG = logging.getLogger(__name__)

# Keys of the weights in a training checkpoint, averages first; a published file is the state dict itself.
_AVERAGES = ("ema", "model_ema", "ema_model", "ema_state_dict", "model_ema_state_dict", "state_dict_ema")
_NESTED = (*_AVERAGES, "model", "state_dict", "model_state_dict", "net", "network", "module")
# What wrappers put into names, in any order and depth: torch.compile, data parallel, checkpointing, FSDP; and what
# trainers put before them.
_WRAPPERS = {"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module"}
_TRAINERS = {"model", "net", "network", "ema", "ema_model", "model_ema", "dit", "sit", "denoiser"}
# How files begin that took the place of a checkpoint when it was fetched.
_NO_WEIGHTS = {
    b"<": "a page of HTML: the address it came from leads to a page, not to the file",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with `git lfs pull`",
}
# Tensors that training keeps beside the network: counters of averages, projections of REPA.
_BESIDE = ("n_averaged", "projectors.")
# In the metadata of safetensors.
FAMILY_KEY = "family"
# The network of each family that files in the original's layout hold.
NETWORKS: dict[str, type[DiT]] = {"dit": DiT, "sit": SiT}


def load_dit_checkpoint(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    num_heads: int | None = None,
    has_null_label: bool = True,
    family: str = "dit",
    key: str | None = None,
    prefix: str | None = None,
) -> DiT:
    """The DiT of a checkpoint in the original's format, such as the published ``DiT-XL-2-256x256.pt``.

    The file is a state dict, or a training checkpoint that holds one under a usual name, read without unpickling code;
    or a state dict in safetensors. Averages such as "ema" or "model_ema" are preferred to "model" and "state_dict", and
    a warning is logged where there are both. What wrappers and trainers put into names is taken off. The shape is
    inferred from the tensors; floating-point tensors of several dtypes are cast to the widest.

    Args:
        path: a ``.pt`` or ``.safetensors`` file.
        device: where the model goes.
        dtype: of the model; that of the file if None.
        num_heads: attention heads, which the tensors do not tell; None takes those of the standard size (S, B, L, XL)
            of this width and depth.
        has_null_label: False where the model was trained without label dropout, and every embedded label is a class.
        family: "dit", or "sit" for a velocity model, whose files have the same tensors.
        key: of the weights in a training checkpoint, dots between nested ones; None looks under the usual names.
        prefix: of the names of the weights to take, without which others are ignored; None takes off the usual ones.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, truncated, or of another architecture; the message says what does not fit.
        ValueError: ``num_heads`` is needed, or impossible.
    """
    where = "load_dit_checkpoint"
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{where}: path must be an existing file, got {path}")
    check_choice(where, "family", family, tuple(NETWORKS))
    state = _unwrapped(where, path, _read(where, path), key, prefix)
    try:
        config = infer_config(state, num_heads=num_heads, has_null_label=has_null_label)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {path} must hold an original-style DiT; {error}") from error
    with torch.device("meta"):
        model = NETWORKS[family](config)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{where}: {path} must hold an original-style DiT; {error}") from error
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def infer_config(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, has_null_label: bool = True
) -> DiTConfig:
    """The shape of an original-style DiT, from its state dict; arguments as in :func:`load_dit_checkpoint`.

    Raises:
        CheckpointError: a tensor is missing or its shape is impossible.
        ValueError: ``num_heads`` is needed, or impossible.
    """
    hidden, channels, patch, _ = _shape(state, "x_embedder.proj.weight", 4)
    _, tokens, _ = _shape(state, "pos_embed", 3)
    labels, _ = _shape(state, "y_embedder.embedding_table.weight", 2)
    # A table of one row has a class and no null label.
    has_null_label = has_null_label and labels > 1
    mlp_hidden, _ = _shape(state, "blocks.0.mlp.fc1.weight", 2)
    outputs, _ = _shape(state, "final_layer.linear.weight", 2)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    side = round(tokens**0.5)
    out_channels = outputs // patch**2
    hint = "(DiTTarget takes a module that has x_embedder.grid_size)"
    if side**2 != tokens:
        raise CheckpointError(f"pos_embed must be of a square number of tokens, got {tokens} {hint}")
    shown = _rectangle(state["pos_embed"])
    if shown is not None:
        raise CheckpointError(f"pos_embed must be of a square of tokens, got one of {shown[0]} x {shown[1]} {hint}")
    if out_channels not in (channels, 2 * channels):
        raise CheckpointError(f"final_layer must have {channels} or {2 * channels} channels, got {out_channels}")
    heads = standard_heads(hidden, depth) if num_heads is None else num_heads
    if heads is None:
        size = f"no standard size has width {hidden} and depth {depth}"
        fail("infer_config", "num_heads", "given, because the tensors do not tell and " + size, None)
    return DiTConfig(
        input_size=side * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=hidden,
        depth=depth,
        num_heads=heads,
        num_classes=labels - int(has_null_label),
        class_dropout_prob=0.1 if has_null_label else 0.0,
        learn_sigma=out_channels == 2 * channels,
        mlp_ratio=mlp_hidden / hidden,
    )


def _rectangle(positions: Tensor) -> tuple[int, int] | None:
    """Rows and columns of a sine-cosine table of a grid that is no square; None for a square's or a learned table."""
    _, tokens, width = positions.shape
    for rows in range(1, tokens + 1):
        if positions.is_meta or tokens % rows or rows**2 == tokens or width % 4:
            continue
        expected = sincos_positions(width, rows, tokens // rows).to(positions)
        # As coarsely as the file's dtype rounds numbers of size 1; tables of two grids differ by about 1.
        if bool(((positions[0] - expected).abs() < 0.02).all()):
            return rows, tokens // rows
    return None


def convert_diffusers_to_dit(state: Mapping[str, Tensor], input_size: int) -> dict[str, Tensor]:
    """State dict of a ``diffusers.DiTTransformer2DModel`` under the original's names.

    **The weights carry over, the arithmetic does not**: with the same weights diffusers' model gives slightly other
    outputs (timestep frequencies over ``half - 1`` instead of ``half``, epsilon 1e-5 instead of 1e-6 in each block's
    second normalisation). Published diffusers weights are the original's, so that a DiT with them is the model that was
    trained; :func:`use_original_arithmetic` makes diffusers' model compute the same.

    Args:
        state: the transformer's.
        input_size: side of its latent (``config.sample_size``), for the position table that is not part of it.

    Raises:
        CheckpointError: a name is missing or left over, or the blocks' embedders differ, which a DiT cannot express.
    """
    left = dict(state)
    depth = len({name.split(".")[1] for name in left if name.startswith("transformer_blocks.")})
    result: dict[str, Tensor] = {}
    for theirs, ours in _renamed(depth):
        result[ours] = _take(left, theirs)
    for index in range(depth):
        block = f"transformer_blocks.{index}."
        for name, ours in _EMBEDDERS.items():
            tensor = _take(left, f"{block}norm1.emb.{name}")
            if not torch.equal(result.setdefault(ours, tensor), tensor):
                raise CheckpointError(f"{block}norm1.emb.{name} must be as in block 0: a DiT has one embedder")
        for part in ("weight", "bias"):
            qkv = [_take(left, f"{block}attn1.to_{letter}.{part}") for letter in "qkv"]
            result[f"blocks.{index}.attn.qkv.{part}"] = torch.cat(qkv)
    if left:
        raise CheckpointError(f"the state dict must be a DiTTransformer2DModel's, got also {sorted(left)[0]}")
    hidden, _, patch, _ = result["x_embedder.proj.weight"].shape
    if input_size % patch:
        fail("convert_diffusers_to_dit", "input_size", f"a multiple of the patch size {patch}", input_size)
    positions = sincos_positions(hidden, input_size // patch).unsqueeze(0)
    result["pos_embed"] = positions.to(result["x_embedder.proj.weight"])
    return result


def convert_dit_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An original-style DiT's state dict under the names of ``diffusers.DiTTransformer2DModel``.

    **The weights carry over, the arithmetic does not**: see :func:`convert_diffusers_to_dit`. The position table is
    dropped: diffusers computes its own, which is the original's.

    Raises:
        CheckpointError: a name is missing or left over.
    """
    left = dict(state)
    depth = len({name.split(".")[1] for name in left if name.startswith("blocks.")})
    _take(left, "pos_embed")
    embedders = {theirs: _take(left, ours) for theirs, ours in _EMBEDDERS.items()}
    result = {theirs: _take(left, ours) for theirs, ours in _renamed(depth)}
    for index in range(depth):
        block = f"transformer_blocks.{index}."
        for name, tensor in embedders.items():
            result[f"{block}norm1.emb.{name}"] = tensor.clone()
        for part in ("weight", "bias"):
            qkv = _take(left, f"blocks.{index}.attn.qkv.{part}").chunk(3)
            for letter, tensor in zip("qkv", qkv, strict=True):
                result[f"{block}attn1.to_{letter}.{part}"] = tensor.clone()
    if left:
        raise CheckpointError(f"the state dict must be an original-style DiT's, got also {sorted(left)[0]}")
    return result


def diffusers_config(config: DiTConfig) -> dict[str, Any]:
    """Arguments of ``diffusers.DiTTransformer2DModel`` for a DiT's shape.

    Raises:
        ValueError: a shape that it cannot have.
    """
    if config.mlp_ratio != 4.0 or not config.class_dropout_prob > 0:
        shown = f"mlp_ratio {config.mlp_ratio:g} and class_dropout_prob {config.class_dropout_prob:g}"
        fail("diffusers_config", "config", "with mlp_ratio 4 and label dropout", shown)
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels * (2 if config.learn_sigma else 1),
        "num_layers": config.depth,
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
    }


def use_original_arithmetic(transformer: nn.Module) -> None:
    """Set the two values, in place, by which a diffusers DiT differs from the original with the same weights.

    They are the shift of the timestep frequencies and the epsilon of each block's second normalisation. They are not
    saved with the model: call it again after loading.

    Raises:
        TypeError: not a ``DiTTransformer2DModel``.
    """
    if not is_diffusers_dit(transformer):
        fail("use_original_arithmetic", "transformer", "a DiTTransformer2DModel", describe(transformer), TypeError)
    for block in transformer.transformer_blocks:  # type: ignore[union-attr]
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6


_OUTER = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_INNER = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_EMBEDDERS = {
    "timestep_embedder.linear_1.weight": "t_embedder.mlp.0.weight",
    "timestep_embedder.linear_1.bias": "t_embedder.mlp.0.bias",
    "timestep_embedder.linear_2.weight": "t_embedder.mlp.2.weight",
    "timestep_embedder.linear_2.bias": "t_embedder.mlp.2.bias",
    "class_embedder.embedding_table.weight": "y_embedder.embedding_table.weight",
}


def _renamed(depth: int) -> list[tuple[str, str]]:
    """Names in diffusers and in the original of all tensors that are the same in both."""
    layers = list(_OUTER.items())
    for index in range(depth):
        layers += [
            (f"transformer_blocks.{index}.{theirs}", f"blocks.{index}.{ours}") for theirs, ours in _INNER.items()
        ]
    return [(f"{theirs}.{part}", f"{ours}.{part}") for theirs, ours in layers for part in ("weight", "bias")]


def _take(state: dict[str, Tensor], name: str) -> Tensor:
    """Remove and return a tensor."""
    if name not in state:
        raise CheckpointError(f"the state dict must hold {name}")
    return state.pop(name)


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """A tensor's shape."""
    if name not in state:
        raise CheckpointError(f"{name} must be among its tensors")
    if state[name].ndim != dimensions:
        raise CheckpointError(f"{name} must have {dimensions} dimensions, got {describe(state[name])}")
    return tuple(state[name].shape)


def _read(where: str, path: Path) -> object:
    """The content of a file, on the CPU."""
    with path.open("rb") as handle:
        begin = handle.read(64).lstrip()
    for mark, found in _NO_WEIGHTS.items():
        if begin.lower().startswith(mark):
            raise CheckpointError(f"{where}: {path} must be a complete checkpoint of tensors, got {found}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The original's training checkpoints also hold the arguments of the command line, as plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|class|type) ([A-Za-z_][\w.]*\.\w+)", str(error))
        if refused is None:
            raise CheckpointError(
                f"{where}: {path} must be a complete checkpoint of tensors, got a torn file"
            ) from None
        # The reader's own words advise to read the file unsafely.
        raise CheckpointError(
            f"{where}: {path} must be a complete checkpoint of tensors and plain values, got a {refused.group(1)}; "
            "where it was written, save the weights alone: torch.save(checkpoint['ema'], path), or as safetensors"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{where}: {path} must be a complete checkpoint of tensors, got {reason}") from error


def _unwrapped(where: str, path: Path, held: object, key: str | None, prefix: str | None) -> dict[str, Tensor]:
    """The state dict in the content of a file, under the network's own names."""
    taken, others = [], ""
    for name in key.split(".") if key else ():
        if not isinstance(held, Mapping) or name not in held:
            found = ", ".join(map(str, held)) if isinstance(held, Mapping) else type(held).__name__
            raise CheckpointError(f"{where}: {path} must hold key {key!r}, got {found}")
        taken, held = [*taken, name], held[name]
    while key is None and isinstance(held, Mapping):
        name = next((name for name in _NESTED if isinstance(held.get(name), Mapping)), None)
        if name is None:
            break
        others = others or ", ".join(
            other for other in _NESTED if other != name and isinstance(held.get(other), Mapping)
        )
        taken, held = [*taken, name], held[name]
    if not isinstance(held, Mapping) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise CheckpointError(f"{where}: {path} must hold a state dict, or one under {', '.join(_NESTED)}")
    if prefix is not None:
        state = {str(name).removeprefix(prefix): value for name, value in held.items() if str(name).startswith(prefix)}
        if not state:
            raise CheckpointError(f"{where}: {path} must hold names that begin with {prefix!r}, got {next(iter(held))}")
    else:
        state = _own_names(held)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(_BESIDE)}
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if others:
        _LOG.warning("%s: of %s the weights under %s were taken, not %s", where, path, ".".join(taken), others)
    if len(dtypes) > 1:
        widest = functools.reduce(torch.promote_types, sorted(dtypes, key=str))
        _LOG.warning("%s: %s holds %s, all cast to %s", where, path, ", ".join(sorted(map(str, dtypes))), widest)
        state = {name: tensor.to(widest) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    return state


def _own_names(held: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    """Tensors without what wrappers put anywhere into their names, and trainers before all of them."""
    state = {
        ".".join(piece for piece in str(name).split(".") if piece not in _WRAPPERS): tensor
        for name, tensor in held.items()
    }
    while state:
        first = {name.partition(".")[0] for name in state if not name.startswith(_BESIDE)}
        if len(first) != 1 or not first <= _TRAINERS:
            return state
        state = {name.partition(".")[2] if name.partition(".")[0] in first else name: t for name, t in state.items()}
    return state


def save_dit_checkpoint(path: str | os.PathLike[str], module: nn.Module) -> None:
    """Write a DiT's state dict as the published ``.pt`` files are; or, to a ``.safetensors``, with its family.

    The published layout has no place for the family, so :func:`free_dit.loading.load_target` asks for that of a
    ``.pt``.

    Raises:
        OSError: the path cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    try:
        if path.suffix == ".safetensors":
            family = next((name for name, network in NETWORKS.items() if type(module) is network), None)
            save_file(state, temporary, None if family is None else {FAMILY_KEY: family})
        else:
            torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def recorded_family(path: Path) -> str | None:
    """The family that a file in the original's layout records; None where it records none.

    Raises:
        CheckpointError: it records another than we know.
    """
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as handle:
            family = (handle.metadata() or {}).get(FAMILY_KEY)
    except SafetensorError as error:
        raise CheckpointError(f"load_target: {path} must be a complete safetensors file, got {error}") from error
    if family not in (None, *NETWORKS):
        raise CheckpointError(f"load_target: {path} must record a family of {', '.join(NETWORKS)}, got {family!r}")
    return family


@torch.no_grad()
def told_family(model: DiT) -> str | None:
    """The family that a network's answer at pure noise tells; None where it tells nothing, as untrained weights do.

    There a noise prediction is the state itself, and a velocity towards the data the data's mean less the state.
    """
    config, weight = model.config, model.pos_embed
    generator = torch.Generator().manual_seed(0)
    shape = (2, config.in_channels, config.input_size, config.input_size)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(weight)
    t = torch.full((2,), 999, device=weight.device)
    output = DiT.forward(model, noise, t, torch.zeros_like(t))[:, : config.in_channels]
    cosine = torch.cosine_similarity(output.double().flatten(), noise.double().flatten(), dim=0)
    return "dit" if cosine > 0.5 else "sit" if cosine < -0.5 else None
