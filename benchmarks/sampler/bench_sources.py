"""Sources of drafts, against one another: ``python -m benchmarks.sampler.bench_sources --out OUT``.

A learned drafter drafts alone (fresh), or with its error at the old row of a step that an earlier round asked the
target about (corrected). Clean samples of the target's own rows draft without it (replayed, ``drafter="frozen"``).
Counted, one image at a time: steps a target call, calls of the drafter a target call, and the rows of these. Counts do
not depend on the machine but for rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from free_dit import load_bundled
from free_dit.files import write_json
from free_dit.markdown import fill_page, table
from free_kernels import DDPMSchedule, FlowSDESchedule, sample
from free_kernels.sampling import round as round_module
from free_kernels.sampling.draft_sources import Fresh
from free_kernels.sampling.refused_rows import RefusedRows

SOURCES = ("fresh", "replayed", "corrected")


@contextmanager
def source(name: str) -> Iterator[None]:
    """Rounds take their drafts from a source."""

    def fresh(job: Any, drafter: Any, *, memory: Any, refused: RefusedRows | None) -> Fresh:
        return Fresh(job, drafter, memory)

    with mock.patch.object(round_module, "draft_source", fresh) if name == "fresh" else nullcontext():
        yield


class Counted:
    """A drafter whose calls and rows are counted."""

    def __init__(self, drafter: Any) -> None:
        self._drafter, self.calls, self.rows = drafter, 0, 0

    def __call__(self, feature: Tensor, *rest: Tensor) -> Tensor:
        """As the drafter."""
        self.calls += 1
        self.rows += len(feature)
        return self._drafter(feature, *rest)


def measure(model: str, steps: int, length: int, blend: float, images: int) -> Iterator[dict[str, Any]]:
    """Counts of each source."""
    target, learned = load_bundled(model)
    schedule = FlowSDESchedule(steps) if model.endswith("sit") else DDPMSchedule(steps)
    for name in SOURCES:
        drafter = Counted(learned if blend == 1.0 else partial(_blended, learned, blend))
        reductions = []
        with source(name):
            for image in range(images):
                labels = torch.tensor([image % target.num_classes])
                used = "frozen" if name == "replayed" else drafter
                settings = {"schedule": schedule, "drafter": used, "draft_length": length, "seed": 700 + image}
                reductions.append(sample(target, labels, **settings).stats.call_reduction)
        calls = images * steps * float(np.mean(1 / np.array(reductions)))
        each = steps / np.array(reductions)
        yield {
            "model": model,
            "steps": steps,
            "draft_length": length,
            "drafter": "learned" if blend == 1.0 else f"{blend:g} of its change",
            "source": name,
            "images": images,
            "steps_per_call": images * steps / calls,
            "relative_error": float(each.std(ddof=1) / each.mean() / np.sqrt(images)),
            "drafter_calls_per_call": drafter.calls / calls,
            "drafter_rows_per_call": drafter.rows / calls,
        }


def _blended(learned: Callable[..., Tensor], share: float, feature: Tensor, *rest: Tensor) -> Tensor:
    """A drafter that is worse: it makes a share of the change that the learned one makes."""
    return feature + share * (learned(feature, *rest) - feature)


def page(cases: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for case in cases:
        rows.setdefault((case["model"], case["drafter"], case["steps"], case["draft_length"]), []).append(case)
    header = ["target", "drafter", "steps", "L", *SOURCES, "drafter rows a call (calls): " + ", ".join(SOURCES)]
    lines = []
    for key, sources in rows.items():
        costs = ", ".join(f"{c['drafter_rows_per_call']:.1f} ({c['drafter_calls_per_call']:.1f})" for c in sources)
        lines.append([*map(str, key), *(f"{c['steps_per_call']:.2f}" for c in sources), costs])
    return "\n".join(table(header, lines))


def main() -> None:
    """Measure, and write the JSON and the table of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    parser.add_argument("--page", type=Path, help="whose table is renewed")
    parser.add_argument("--images", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    grid = [
        (model, steps, length, blend)
        for model in ("digits", "digits_sit")
        for blend in (1.0, 0.5)
        for steps in (250, 50)
        for length in (6, 12)
    ]
    cases = []
    for entry in tqdm(grid, desc="sources", unit="case"):
        cases += measure(*entry, arguments.images)
    write_json(arguments.out, {"cases": cases})
    if arguments.page is not None:
        fill_page(arguments.page, "sources", page(cases))
    print(page(cases))


if __name__ == "__main__":
    main()
