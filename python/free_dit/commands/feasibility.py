"""The command ``feasibility``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes

from free_dit.commands.shared import console, title_of
from free_dit.devices import resolve_device
from free_dit.experiments.feasibility import denoiser, forecast_plot, forecast_table, gap_table, real_runs
from free_dit.experiments.wall_clock import machine
from free_dit.files import write_json
from free_dit.loading import TargetFacts, load_drafter, load_pair
from free_dit.networks.families import schedule_for
from free_kernels import feasibility as forecast
from free_kernels.protocols import Drafter
from free_kernels.validation import check_int, check_writable


def feasibility(
    out: Path,
    model: str = "digits",
    drafter: str = "frozen",
    steps: int = 250,
    guidance: float = 1.0,
    lengths: tuple[int, ...] = (2, 3, 4, 6, 8, 12, 16, 24, 32),
    images: int = 2,
    positions: int = 8,
    seed: int = 0,
    timing_repeats: int = 5,
    check: tuple[int, ...] = (),
    check_images: int = 16,
    facts: Annotated[TargetFacts, OmitArgPrefixes] = TargetFacts(),
    device: str = "auto",
) -> None:
    """Tell whether lossless speculation will pay for a model, from a few hundred rows and before anything is trained.

    Args:
        out: folder of feasibility.json and feasibility.png.
        model: a bundled model's name, a checkpoint, a folder of diffusers, or denoiser-SIZE, the exact denoiser of
            photograph crops of SIZE x SIZE pixels.
        drafter: forecast beside the frozen one: "bundled", or a drafter.safetensors; "frozen": none.
        steps: sampling steps K.
        guidance: classifier-free guidance scale; 1 is none.
        lengths: draft lengths of the forecast.
        images: images that are probed.
        positions: places of the chain that are probed.
        seed: of the probes; a run with this seed must not be steered by what they show.
        timing_repeats: repeats of every timing, at least 2.
        check: draft lengths that are really run too, with another seed, to compare.
        check_images: images of those runs.
        facts: what the model's file may not say of itself.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" ...; a denoiser runs on the CPU.
    """
    path = check_writable("feasibility", "out", out / "feasibility.json")
    for length in check:
        check_int("feasibility", "check", length, 2, steps)
    check_int("feasibility", "check_images", check_images, 1)
    place, target = resolve_device("feasibility", device), denoiser(model)
    if target is None:
        target, chosen = load_pair(model, drafter, facts, place)
    else:
        chosen = load_drafter(drafter, target)
    drafters: dict[str, Drafter | str] = {"frozen": "frozen"}
    if chosen != "frozen":
        drafters["learned"] = chosen
    schedule = schedule_for(target, steps)
    found = forecast(
        target,
        schedule,
        drafter=chosen,
        guidance_scale=guidance,
        draft_lengths=lengths,
        images=images,
        positions=positions,
        seed=seed,
        timing_repeats=timing_repeats,
        progress=True,
    )
    runs = real_runs(target, drafters, schedule, check, check_images, seed + 1, guidance) if check else []
    title = f"{title_of(model)}, {steps} steps, guidance {guidance:g}, {found.rows} rows of target calls"
    report = {
        "model": model,
        "drafter": drafter,
        "seed": seed,
        "machine": machine(place),
        **found.to_dict(),
        "runs": runs,
    }
    write_json(path, report)
    picture = path.with_name("feasibility.png")
    forecast_plot(found, picture, title, runs)
    console.print(gap_table(found))
    console.print(forecast_table(found, title, runs))
    console.print(found.verdict)
    console.print(f"wrote {path} and {picture}")
