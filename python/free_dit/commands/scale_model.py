"""The command ``scale-model``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes

from free_dit.commands.shared import console
from free_dit.devices import resolve_device
from free_dit.experiments.scale.measure import measure, measure_link
from free_dit.experiments.scale.prediction import read_inputs, write_inputs
from free_dit.loading import TargetFacts, facts_of, is_original, load_pair
from free_kernels.drafters import as_drafter
from free_kernels.validation import check_int, check_writable


def scale_model(
    out: Path,
    measurements: Path | None = None,
    model: str = "digits",
    drafter: str = "bundled",
    steps: int = 250,
    guidance: float = 1.0,
    max_gpus: int = 64,
    facts: Annotated[TargetFacts, OmitArgPrefixes] = TargetFacts(),
    device: str = "auto",
) -> None:
    """Predicted latency and throughput on many GPUs, and where speculation stops to pay; a table, figures, a picture.

    Args:
        out: folder of NAME.md, NAME-figures.json and NAME.png, named after the measurements.
        measurements: JSON or TOML file of what calls, drafts and messages cost; None measures this machine (a minute,
            two processes for the link) and writes OUT/measurements.json.
        model: a bundled model's name, a checkpoint, or a folder of diffusers, to be measured.
        drafter: "bundled", "frozen", or a drafter.safetensors, to be measured.
        steps: sampling steps K, to be measured.
        guidance: classifier-free guidance scale, to be measured.
        max_gpus: the largest number of GPUs; a power of two below it each.
        facts: what the model's file may not say of itself.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" ...
    """
    from free_dit.experiments.scale.page import build_report, write_report

    name = "scale" if measurements is None else measurements.stem
    check_writable("scale-model", "out", out / f"{name}.md")
    if measurements is None:
        measurements = out / "measurements.json"
        place = resolve_device("scale-model", device)
        target, named = load_pair(model, drafter, facts, place)
        chosen = as_drafter("scale_model", named, target)
        known = facts_of(target) if is_original(model) else {}
        link = measure_link(model, place, known)
        measured = measure(target, chosen, link, model=model, num_steps=steps, guidance=guidance)
        write_inputs(measurements, *measured)
    gpus = [2**i for i in range(check_int("scale-model", "max_gpus", max_gpus, 1).bit_length())]
    paths = write_report(build_report(*read_inputs(measurements), gpus), out, name)
    console.print(paths[0].read_text() + "wrote " + ", ".join(map(str, paths)))
