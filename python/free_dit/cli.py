"""Command line: ``python -m free_dit COMMAND``; ``--help`` lists train, sample, compare, scale-model and the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from tyro.conf import Positional, arg

from free_dit.analysis import Settings, Subject
from free_dit.analysis_figures import write_figures
from free_dit.bundled import bundled_names
from free_dit.card import EVALUATION_SEED, write_card
from free_dit.compare import compare as run_compare
from free_dit.compare import print_report
from free_dit.configuration import load_config
from free_dit.distributed import Place
from free_dit.drafter_loss import DTYPES
from free_dit.evaluation.command import evaluate
from free_dit.figures import sample_grids
from free_dit.flow import schedule_for
from free_dit.generation.command import generate
from free_dit.loading import load_target
from free_dit.scale_command import scale_model
from free_dit.study import render_study, run_study
from free_dit.sweep import preset as sweep_preset
from free_dit.sweep import read_sweep, run_sweep
from free_dit.sweep_report import write_report
from free_dit.train import TrainConfig
from free_dit.train import train as run_train
from free_dit.train_drafter import DrafterTrainConfig
from free_dit.train_drafter import train_drafter as run_train_drafter
from free_kernels import DDIMSchedule, FeatureDrafter, ancestral_sample
from free_kernels import sample as speculative_sample
from free_kernels.types import Drafter, Target
from free_kernels.validation import check_int, check_writable

CONFIGS = Path(__file__).parent / "configs"
# Choices of --drafter that are no files.
NAMED = ("bundled", "frozen", "none", "ddim")
app = tyro.extras.SubcommandApp()
app.command(generate)
app.command(scale_model)
app.command(evaluate)
console = Console()

Overrides = Annotated[tuple[str, ...], arg(name="set", metavar="KEY=VALUE ...")]


def _target(model: str) -> tuple[Target, Drafter | None]:
    """A bundled pair by name, or any target that :func:`load_target` reads."""
    return load_target(model)


def _drafter(choice: str, bundled: Drafter | None, target: Target) -> Drafter | str:
    if choice == "frozen":
        return "frozen"
    if choice == "bundled":
        if bundled is None:
            raise ValueError("--drafter must be 'frozen' or a drafter file for a model that is not bundled")
        return bundled
    return FeatureDrafter.load(choice, target)


def _title(model: str) -> str:
    """A short name: trained models lie in a folder of their own name."""
    return model if model in bundled_names() else Path(model).parent.name or Path(model).stem


def _labels(count: int, classes: tuple[int, ...], num_classes: int) -> torch.Tensor:
    check_int("free_dit", "num", count, 1)
    pool = torch.tensor(classes or tuple(range(num_classes)))
    return pool[torch.arange(count) % len(pool)]


@app.command
def train(out: Path, config: Path = CONFIGS / "digits.toml", set_: Overrides = ()) -> None:
    """Train a DiT; writes OUT/model.safetensors. Interrupt it at will: the same command goes on where it stopped.

    Args:
        out: folder of checkpoint, log and result.
        config: TOML file with the keys of TrainConfig.
        set_: overrides such as loop.iterations=2000 model.depth=4.
    """
    console.print(f"wrote {run_train(load_config(TrainConfig, config, set_), out)}")


@app.command
def train_drafter(
    out: Path,
    target: Annotated[str, arg(aliases=("--model",))] = "digits",
    config: Path = CONFIGS / "digits_drafter.toml",
    set_: Overrides = (),
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    num_heads: int | None = None,
) -> None:
    """Train a drafter on a DiT's own trajectories (no images needed); writes OUT/drafter.safetensors. Resumable.

    Under torchrun each process trains on a GPU of its own: torchrun --nproc-per-node 8 -m free_dit train-drafter ...

    Args:
        out: folder of checkpoint, log and result.
        target: a bundled model's name, a model.safetensors written by train, a DiT checkpoint in the original's format,
            or a folder of diffusers.
        config: TOML file with the keys of DrafterTrainConfig.
        set_: overrides such as loop.iterations=2000 drafter.width=64.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        dtype: of the frozen target; if not given, that of the file for the original's format, else float32.
        num_heads: attention heads, for checkpoints in the original's format whose width does not tell.
    """
    settings, place = load_config(DrafterTrainConfig, config, set_), Place.from_environment()
    loaded, _ = load_target(target, place.device(device), None if dtype is None else DTYPES[dtype], num_heads)
    path = run_train_drafter(loaded, settings, out, target, place)
    if place.is_first:
        console.print(f"wrote {path}")


@app.command
def sample(
    out: Path,
    model: str = "digits",
    drafter: str = "bundled",
    num: int = 64,
    classes: tuple[int, ...] = (),
    steps: int = 250,
    draft_length: int = 6,
    guidance: float = 1.0,
    seed: int = 0,
    max_slots: int | None = None,
) -> None:
    """Draw images; writes a PNG grid, or an NPZ as the ADM suite reads: arr_0 uint8 [N, H, W, C], arr_1 labels.

    Args:
        out: a .png or .npz file.
        model: a bundled model's name, a checkpoint, or a folder of diffusers.
        drafter: "bundled", "frozen", "none" (the ordinary sampler), "ddim" (a baseline that is no speculation: DDIM
            without noise), or a drafter.safetensors.
        num: images.
        classes: labels to cycle through; all if empty.
        steps: sampling steps K.
        draft_length: rows of a round for one image.
        guidance: classifier-free guidance scale; 1 is none.
        seed: an image depends on the seed and its place in the list of labels.
        max_slots: images in the making at a time.
    """
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"sample: out must end in .png or .npz, got {out}")
    check_writable("sample", "out", out)
    target, bundled = _target(model)
    labels = _labels(num, classes, target.num_classes)
    settings = {
        "schedule": schedule_for(target, steps),
        "guidance_scale": guidance,
        "seed": seed,
        "max_slots": max_slots,
    }
    if drafter == "ddim":
        settings["schedule"] = DDIMSchedule(steps)
    if drafter in ("none", "ddim"):
        result = ancestral_sample(target, labels, progress=True, **settings)
    else:
        chosen = _drafter(drafter, bundled, target)
        result = speculative_sample(
            target, labels, drafter=chosen, draft_length=draft_length, progress=True, **settings
        )
    if out.suffix == ".png":
        sample_grids(
            out, {f"{_title(model)}, {drafter if drafter in NAMED else _title(drafter)}": result.samples}, labels
        )
    else:
        pixels = ((result.samples.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        np.savez(out, arr_0=pixels.cpu().numpy(), arr_1=labels.numpy())
    stats = result.stats
    console.print(
        f"wrote {out}: {num} images, {stats.target_calls} target calls, call reduction {stats.call_reduction:.2f}, "
        f"{stats.elapsed_s:.1f} s"
    )


@app.command
def compare(
    out: Path,
    model: str = "digits",
    drafter: str = "bundled",
    num: int = 64,
    steps: int = 250,
    draft_length: int = 6,
    guidance: float = 1.0,
    seed: int = 0,
    timing_pairs: int = 5,
) -> None:
    """Ordinary, frozen-drafter and learned-drafter sampling side by side: a picture, a plot, a table, a JSON file.

    Args:
        out: folder of samples.png, acceptance.png and compare.json.
        model: a bundled model's name, a checkpoint, or a folder of diffusers.
        drafter: "bundled", "frozen", or a drafter.safetensors.
        num: images.
        steps: sampling steps K.
        draft_length: rows of a round for one image.
        guidance: classifier-free guidance scale; 1 is none.
        seed: seed of all noise.
        timing_pairs: interleaved pairs that the wall-clock ratio at batch 1 is measured on; 0 skips it.
    """
    check_writable("compare", "out", out / "compare.json")
    target, bundled = _target(model)
    chosen = _drafter(drafter, bundled, target)
    drafters: dict[str, Drafter | str] = {"frozen drafter": "frozen"}
    if chosen != "frozen":
        drafters["learned drafter"] = chosen
    labels = _labels(num, (), target.num_classes)
    report = run_compare(
        target,
        drafters,
        labels,
        out,
        num_steps=steps,
        draft_length=draft_length,
        guidance_scale=guidance,
        seed=seed,
        timing_pairs=timing_pairs,
    )
    print_report(report, console)
    console.print(f"wrote {out / 'samples.png'}, {out / 'acceptance.png'} and {out / 'compare.json'}")


@app.command
def figures(
    out: Path,
    model: tuple[str, ...] = ("digits",),
    drafter: tuple[str, ...] = (),
    num: int = Settings.num,
    steps: int = Settings.steps,
    draft_length: int = Settings.draft_length,
    guidance: tuple[float, ...] = Settings.guidance,
    seed: int = EVALUATION_SEED,
) -> None:
    """Analysis figures: temporal similarity, layer change, uncertainty, reflection coupling, timeline of rounds.

    Each is a PNG with its numbers as JSON beside it. All but the uncertainty is about the first model.

    Args:
        out: folder of the figures.
        model: bundled models' names, checkpoints, or folders of diffusers.
        drafter: for each model "bundled", "frozen", or a drafter.safetensors; none given takes the bundled ones.
        num: images of every run.
        steps: sampling steps K.
        draft_length: rows of a round for one image.
        guidance: classifier-free guidance scales of the uncertainty figure.
        seed: seed of all noise.
    """
    if drafter and len(drafter) != len(model):
        raise ValueError(f"figures: drafter must be one for each of {len(model)} models, got {len(drafter)}")
    subjects = []
    for number, name in enumerate(model):
        target, bundled = _target(name)
        choice = drafter[number] if drafter else "frozen" if bundled is None else "bundled"
        chosen = _drafter(choice, bundled, target)
        title = _title(name)
        taken = sum(one.name == title for one in subjects)
        learned = None if isinstance(chosen, str) else chosen
        subjects.append(Subject(f"{title} ({number + 1})" if taken else title, target, learned))
    paths = write_figures(out, subjects, Settings(num, steps, draft_length, guidance, seed))
    console.print("wrote " + ", ".join(map(str, paths)) + " and a JSON file beside each")


@app.command
def sweep(
    out: Path,
    preset: Literal["quick", "full"] = "full",
    num: int | None = None,
    seed: int = 0,
    render_only: bool = False,
) -> None:
    """Calls, wall-clock, bias and quality of the bundled digits pair over draft lengths, relaxation, steps, guidance.

    Interrupt it at will: every finished configuration is kept, and the same command goes on with the next.

    Args:
        out: folder of sweep.json, sweep.md, sweep.png and the finished configurations.
        preset: "quick" (7 configurations, 50 steps) or "full".
        num: images of a configuration whose quality is measured; the preset's own number if None.
        seed: seed of all noise and of the bootstrap.
        render_only: renew sweep.md and sweep.png from sweep.json, and measure nothing.
    """
    report = read_sweep(out) if render_only else run_sweep(out, *sweep_preset(preset, num, seed))
    table, picture = write_report(report, out)
    console.print(f"wrote {table} and {picture}" + ("" if render_only else f" from {out / 'sweep.json'}"))


@app.command
def study(
    out: Path,
    model: str = "digits",
    config: Path = CONFIGS / "study_drafter.toml",
    variants: tuple[str, ...] = (),
    images: int = 32,
    set_: Overrides = (),
) -> None:
    """Train variants of a drafter alike and put acceptance, call reduction and cost side by side. Resumable.

    Args:
        out: folder of the runs, study.json and study.md.
        model: a bundled model's name, a checkpoint, or a folder of diffusers.
        config: TOML file of the drafter under study.
        variants: names of the variants to run; all if empty.
        images: images of the evaluation.
        set_: overrides for every variant, such as loop.iterations=1000.
    """
    target, _ = _target(model)
    result = run_study(target, model, config, set_, out, variants, images)
    table = out / "study.md"
    table.write_text(render_study(json.loads(result.read_text())))
    console.print(f"wrote {result} and {table}")


@app.command
def info(model: Positional[str] = "digits") -> None:
    """Shapes and sizes of a model, and what this installation can do.

    Args:
        model: a bundled model's name, a checkpoint, or a folder of diffusers.
    """
    from free_kernels.extension import build_config, has_extension, why_no_extension

    target, drafter = _target(model)
    facts = {
        "bundled models": list(bundled_names()),
        "model": model,
        "latent_shape": target.latent_shape,
        "feature_shape": target.feature_shape,
        "num_classes": target.num_classes,
        "learns_variance": target.learns_variance,
        "parameters": sum(p.numel() for p in target.module.parameters()),  # type: ignore[attr-defined]
        "drafter_parameters": sum(p.numel() for p in drafter.parameters()) if drafter is not None else None,  # type: ignore[attr-defined]
        "torch": torch.__version__,
        "cuda": torch.cuda.is_available(),
        "extension": build_config() if has_extension() else why_no_extension(),
    }
    console.print_json(json.dumps(facts, default=str))


@app.command
def card(model: Positional[str] = "digits") -> None:
    """Measure a bundled pair again and renew the tables of its model card (some minutes; needs a source checkout).

    Args:
        model: a bundled model's name.
    """
    console.print(f"wrote {write_card(model)}")


def main() -> None:
    """Entry point; a user's mistake is one line on stderr and exit status 2, an interrupt is 130."""
    try:
        app.cli(prog="python -m free_dit", description=__doc__)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
