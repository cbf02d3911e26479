"""How much of the chain to leave to clean samples: ``python -m benchmarks.sampler.bench_frozen_share --out OUT``.

A learned drafter may leave the first share of the chain to clean samples (``drafter.frozen_share``), which call no
network. For each share, one image at a time and interleaved: steps a target call, calls of the drafter an image, and
the time over that of the share 0. Steps and calls do not depend on the machine but for rounding.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.report.store import machine_facts
from free_dit.files import write_json
from free_dit.loading import load_target
from free_dit.markdown import fill_page, table
from free_dit.networks.families import schedule_for
from free_dit.networks.policy import policy_schedule
from free_dit.policy.pair import load_bundled_policy
from free_dit.policy.task import first_observations
from free_dit.policy.world import random_scenes
from free_kernels import FeatureDrafter, sample

SHARES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
# Steps and draft lengths of image models and of the policy, and the seed of the scenes at whose start it decides.
CASES, POLICY_CASES, SCENES = ((250, 6), (250, 12), (50, 6), (50, 12)), ((100, 16), (100, 32)), 1 << 23


def measure(
    target: Any, drafter: FeatureDrafter, schedule: Any, length: int, conditions: Tensor
) -> list[dict[str, Any]]:
    """Figures of each share, over images of these labels or conditions."""
    images = len(conditions)
    runs: dict[float, list[Any]] = {share: [] for share in SHARES}
    for image in range(-1, images):
        for share in SHARES:
            drafter.frozen_share = share
            given, settings = conditions[image][None], {"draft_length": length, "seed": 700 + image}
            stats = sample(target, given, schedule=schedule, drafter=drafter, **settings).stats
            # The first image warms up.
            if image >= 0:
                runs[share].append(stats)
    whole = runs[0.0]
    found = []
    for share, stats in runs.items():
        over = [one.elapsed_s / base.elapsed_s for one, base in zip(stats, whole, strict=True)]
        found.append(
            {
                "steps": schedule.num_steps,
                "draft_length": length,
                "share": share,
                "images": images,
                "steps_per_call": images * schedule.num_steps / sum(one.target_calls for one in stats),
                "drafter_calls": sum(one.drafter_calls for one in stats) / images,
                "time": statistics.median(over),
                "time_quartiles": np.quantile(over, (0.25, 0.75), method="weibull").tolist(),
            }
        )
    return found


def page(cases: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    header = ["steps", "L", *(f"{share:g}" for share in SHARES)]
    lines = []
    for key in dict.fromkeys((case["steps"], case["draft_length"]) for case in cases):
        ours = [case for case in cases if (case["steps"], case["draft_length"]) == key]
        cells = (f"{c['steps_per_call']:.2f}, {c['drafter_calls']:.0f}, {c['time']:.2f}" for c in ours)
        lines.append([*map(str, key), *cells])
    return "\n".join(table(header, lines))


def main() -> None:
    """Measure, and write the JSON and the table of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    parser.add_argument("--page", type=Path, help="whose table is renewed")
    parser.add_argument(
        "--model", default="digits", help='a bundled target, "policy", or a file or folder of a trained one'
    )
    parser.add_argument("--drafter", type=Path, help="of that target; the bundled one if left out")
    parser.add_argument("--images", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.model == "policy":
        target, drafter = load_bundled_policy()
        conditions, wanted = first_observations(random_scenes(arguments.images, SCENES)), POLICY_CASES
        schedules = {steps: policy_schedule(steps) for steps, _ in wanted}
    else:
        target, drafter = load_target(arguments.model)
        conditions, wanted = torch.arange(arguments.images) % target.num_classes, CASES
        schedules = {steps: schedule_for(target, steps) for steps, _ in wanted}
    if arguments.drafter is not None:
        drafter = FeatureDrafter.load(arguments.drafter, target)
    elif drafter is None:
        parser.error(f"--drafter must be given, as {arguments.model} is no bundled target")
    # A trained model is called as its folder is.
    path = Path(arguments.model)
    folder = path.parent if path.is_file() else path
    model = folder.resolve().name if path.exists() else arguments.model
    cases = []
    for steps, length in tqdm(wanted, desc="shares", unit="case"):
        cases += measure(target, drafter, schedules[steps], length, conditions)
    write_json(arguments.out, {"machine": machine_facts("cpu"), "model": model, "cases": cases})
    if arguments.page is not None:
        fill_page(arguments.page, f"shares of {model}", page(cases))
    print(page(cases))


if __name__ == "__main__":
    main()
