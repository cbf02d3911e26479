"""Targets and drafters by name: bundled ones, checkpoints of ours or of the original DiT, folders of diffusers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from free_dit.bundled import bundled_names, load_bundled
from free_dit.latents import pipeline_vae
from free_dit.networks.families import DRAWS, device_of, load_model
from free_kernels import FeatureDrafter
from free_kernels.checkpoint import METADATA_KEY, CheckpointError
from free_kernels.protocols import Drafter, Target
from free_kernels.targets import as_target
from free_kernels.validation import check_choice, fail

ACCEPTED = (
    "a bundled model's name ({names}), a model.safetensors written by train, a DiT checkpoint in the original's format "
    "(.pt or .safetensors), or a folder of diffusers (a DiTPipeline or a DiTTransformer2DModel)"
)
_TRANSFORMER = "DiTTransformer2DModel"
# Samplers without a drafter: the ordinary one, and DDIM without noise as a baseline.
UNDRAFTED = ("none", "ddim")


def load_target(
    spec: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    num_heads: int | None = None,
    family: str | None = None,
    has_null_label: bool = True,
    draws: str | None = None,
) -> tuple[Target, Drafter | None]:
    """A target and, where it is bundled, its drafter.

    Args:
        spec: a bundled model's name; a ``model.safetensors`` written by ``train``; a DiT checkpoint in the original's
            format (``.pt``, ``.pth``, ``.bin`` or ``.safetensors``); or a folder saved by diffusers, of a pipeline
            (with ``transformer/``) or of the transformer alone.
        device: where the weights go.
        dtype: of the target's weights and arithmetic; if None, that of the file for the original's format, else
            float32. A drafter stays float32.
        num_heads: attention heads, for checkpoints in the original's format whose width does not tell.

        family: "dit" (noise prediction) or "sit" (velocity), for checkpoints in the original's format, whose tensors
            are the same. Needed unless the file records it (:func:`free_dit.checkpoints.save_dit_checkpoint`); it is
            never guessed, and a trained network whose output at pure noise is of the other family is refused.
        has_null_label: False for a checkpoint in the original's format that was trained without label dropout: every
            row of its label table is then a class. Other formats say it themselves.
        draws: "pixels" or "latents", what its samples are; None takes what the file says, which for a pipeline is
            latents, and else tells it by the channels (:func:`free_dit.latents.draws_latents`). It is kept as
            ``target.draws``.

    Raises:
        FileNotFoundError: no such file or folder.
        CheckpointError: broken, or none of the formats above.
        ValueError: ``num_heads`` or ``family`` is needed, impossible, or given for a format that holds it.
        ImportError: a folder of diffusers without diffusers installed.
    """
    if draws is not None:
        check_choice("load_target", "draws", draws, DRAWS)
    module, drafter = _module(str(spec), dtype, num_heads, family, has_null_label)
    module.eval().requires_grad_(False)
    target = as_target("load_target", module.to(device))
    said = "latents" if pipeline_vae(spec) else getattr(module, "draws", None)
    if draws is not None and said not in (None, draws):
        raise ValueError(f"load_target: draws must be {said!r} for {spec}, which says it itself, got {draws!r}")
    target.draws = draws or said  # type: ignore[attr-defined]
    return target, drafter.to(device) if isinstance(drafter, torch.nn.Module) else drafter


@dataclass(frozen=True)
class TargetFacts:
    """What a target's file may not say of itself; None asks the file, or the drafter that was trained for it.

    Attributes:
        family: dit (noise prediction) or sit (velocity), for checkpoints in the original's format, which have the same
            tensors.
        null_label: whether such a checkpoint was trained with label dropout, so that its label table ends in the label
            of guidance.
        num_heads: attention heads, for checkpoints in the original's format whose width does not tell.
        draws: what samples are, where the number of channels does not tell: 1 or 3 are taken for pixels.
    """

    family: Literal["dit", "sit"] | None = None
    null_label: bool = True
    num_heads: int | None = None
    draws: Literal["pixels", "latents"] | None = None


def facts_of(target: Target) -> dict[str, Any]:
    """What is known of a target and may be missing in its file; a drafter's file keeps it."""
    from free_dit.checkpoints import NETWORKS

    facts: dict[str, Any] = {"draws": getattr(target, "draws", None)}
    module = getattr(target, "module", None)
    family = next((name for name, network in NETWORKS.items() if type(module) is network), None)
    if family is not None:
        facts |= {"num_heads": module.config.num_heads, "family": family}
        # As a file would be read by default, unless it says otherwise.
        facts |= {} if module.config.class_dropout_prob > 0 else {"has_null_label": False}
    return {name: value for name, value in facts.items() if value is not None}


def load_pair(
    model: str | Path,
    drafter: str | None = "bundled",
    facts: TargetFacts = TargetFacts(),
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Target, Drafter | str]:
    """A target, and a drafter by the name that :func:`load_drafter` takes, whose file may know what the target's not.

    Args:
        model: as ``spec`` of :func:`load_target`.
        drafter: as ``choice`` of :func:`load_drafter`; names of samplers without a drafter ("none", "ddim") are handed
            back, and None as "none".
        facts: what is told of the target; the drafter's file is asked for the rest.
        device: of both.
        dtype: of the target.

    Raises:
        ValueError, OSError, ImportError: as the two; the drafter was trained for a target of another number of heads,
            family or samples than ``facts`` say.
    """
    told: dict[str, Any] = {"num_heads": facts.num_heads, "family": facts.family, "draws": facts.draws}
    drafter = "none" if drafter is None else drafter
    by_name = drafter in ("bundled", "frozen", *UNDRAFTED)
    known = {} if by_name else FeatureDrafter.load(drafter).target_facts
    for name, value in known.items():
        if told.get(name) not in (None, value):
            fail("load_target", name, f"{value!r}, as drafter {drafter} was trained for", repr(told[name]))
    if is_original(model):
        told |= {name: known[name] for name in ("num_heads", "family") if name in known}
    told["has_null_label"] = facts.null_label and (known.get("has_null_label", True) or not is_original(model))
    target, bundled = load_target(model, device, dtype, **told)
    # What the target's own file says goes before what its drafter's says.
    if target.draws is None:  # type: ignore[attr-defined]
        target.draws = known.get("draws")  # type: ignore[attr-defined]
    return target, drafter if drafter in UNDRAFTED else load_drafter(drafter, target, bundled)


def is_original(model: str | Path) -> bool:
    """Whether a model is a file in the original's format, which does not say all of what :class:`TargetFacts` holds."""
    return str(model) not in bundled_names() and _kind(Path(model)) == "original"


def load_drafter(choice: str, target: Target, bundled: Drafter | None = None) -> Drafter | str:
    """``"frozen"`` itself, the ``bundled`` drafter for ``"bundled"``, or one from a file, on the target's device.

    Raises:
        FileNotFoundError, CheckpointError: no such file, or not a drafter of this target.
        ValueError: ``"bundled"`` for a target that has no bundled drafter.
    """
    if choice == "frozen":
        return "frozen"
    if choice == "bundled":
        if bundled is None:
            raise ValueError("--drafter must be 'frozen' or a drafter file for a model that is not bundled")
        return bundled
    return FeatureDrafter.load(choice, target).to(device_of(target))


def _module(
    spec: str, dtype: torch.dtype | None, num_heads: int | None, family: str | None, has_null_label: bool
) -> tuple[Any, Drafter | None]:
    """The module on the CPU, and a bundled drafter."""
    accepted, path = ACCEPTED.format(names=", ".join(bundled_names())), Path(spec)
    kind = None if spec in bundled_names() else _kind(path)
    says_itself = spec in bundled_names() or kind not in ("original", None)
    if num_heads is not None and says_itself:
        raise ValueError(f"load_target: num_heads must be None for {spec}, which says it itself, got {num_heads}")
    if family is not None and says_itself:
        raise ValueError(f"load_target: family must be None for {spec}, which says it itself, got {family!r}")
    if not has_null_label and says_itself:
        raise ValueError(f"load_target: has_null_label must be True for {spec}, which says it itself, got False")
    if spec in bundled_names():
        target, drafter = load_bundled(spec)
        return target.module.to(dtype), drafter
    if kind == "ours":
        return load_model(path).to(dtype), None
    if kind == "original":
        from free_dit.checkpoints import load_dit_checkpoint, recorded_family, told_family

        told = {"num_heads": num_heads, "has_null_label": has_null_label}
        recorded = recorded_family(path)
        if recorded is not None and family not in (None, recorded):
            raise ValueError(
                f"load_target: family must be {recorded!r} for {spec}, which says it itself, got {family!r}"
            )
        family = family or recorded
        if family is None:
            # The file is read all the same: what is wrong with it goes first, and its answer is a help, not a proof.
            seems = told_family(load_dit_checkpoint(path, dtype=dtype, **told))
            hint = "" if seems is None else f"; at pure noise it answers as a {seems} does"
            wanted = (
                f"'dit' (noise prediction) or 'sit' (velocity), by family= or --family: both have its tensors{hint}"
            )
            raise ValueError(f"load_target: family of {spec} must be {wanted}, got None")
        return load_dit_checkpoint(path, dtype=dtype, family=family, **told), None
    if kind in ("pipeline", "transformer"):
        return _from_diffusers(path, kind == "pipeline", dtype), None
    if not path.exists():
        raise FileNotFoundError(
            f"load_target: path must be an existing file or folder, got {spec}; it may be {accepted}"
        )
    raise CheckpointError(f"load_target: {spec} must be {accepted}")


def _kind(path: Path) -> str | None:
    """The kind of checkpoint at a path, by names and headers; None if it is not a known one."""
    if path.is_dir():
        if (path / "model_index.json").is_file() and (path / "transformer" / "config.json").is_file():
            return "pipeline"
        return "transformer" if _class_name(path / "config.json") == _TRANSFORMER else None
    if not path.is_file():
        return None
    if path.suffix in (".pt", ".pth", ".bin"):
        return "original"
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = json.loads((handle.metadata() or {}).get(METADATA_KEY, "null"))
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"load_target: {path} must be a complete safetensors file, got {error}") from error
    if metadata is None:
        return "original"
    found = metadata.get("kind") if isinstance(metadata, dict) else None
    if found != "dit":
        raise CheckpointError(f"load_target: {path} must hold a target, got {found!r}")
    return "ours"


def _class_name(config: Path) -> str | None:
    try:
        return json.loads(config.read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None


def _from_diffusers(path: Path, is_pipeline: bool, dtype: torch.dtype | None) -> torch.nn.Module:
    folder = path / "transformer" if is_pipeline else path
    found = _class_name(folder / "config.json")
    if found != _TRANSFORMER:
        raise CheckpointError(f"load_target: {folder} must hold a {_TRANSFORMER}, got {found!r}")
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError as error:
        raise ImportError(f"load_target: diffusers must be installed to read {path}, got {error}") from error
    try:
        return DiTTransformer2DModel.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"load_target: {folder} must be a complete folder of diffusers, got {error}") from error
