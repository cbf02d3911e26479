"""Continuous batching against fixed batches, each of which waits for its slowest image.

Run ``OMP_NUM_THREADS=1 python -m benchmarks.scaling.bench_batching``; writes ``docs/scale/batching.json`` and renews
the table of ``docs/scale-model.md``. Both draw the same images and take turns, image by image, each on its own clock.
With ``--counts-only`` the continuous run alone: calls and fullness of both follow from its rounds per image. With
``--render-only`` the table alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from free_dit import load_bundled
from free_dit.experiments.scale.chain import CommitChain, acceptance_table
from free_dit.experiments.scale.measure import AcceptanceCounts
from free_dit.experiments.wall_clock import machine
from free_dit.markdown import fill_page, table
from free_kernels import DDPMSchedule, PhiloxNoise, RoundInfo, SampleIterator, sample_iter
from free_kernels.protocols import first_drafted_in_rounds

DOCS = Path(__file__).resolve().parents[2] / "docs"


class Side:
    """A run of N images, drawn one after the other, with a clock of its own.

    Args:
        images: N.
        size: images of a batch; all at once, in ``slots``, if None.
        slots: S.
        length: L.
        steps: K.
        seed: of the noise.
    """

    def __init__(self, images: int, size: int | None, slots: int, length: int, steps: int, seed: int) -> None:
        target, drafter = load_bundled("digits")
        self.counts = AcceptanceCounts(steps, length, first_drafted_in_rounds(drafter))
        self.samples = torch.empty(images, *target.latent_shape)
        self.rounds, self.calls, self.rows = np.zeros(images, np.int64), 0, 0
        self.seconds, self.costs = 0.0, []
        self._since, self._seen = 0.0, 0
        settings = {"drafter": drafter, "schedule": DDPMSchedule(steps), "draft_length": length}
        labels = torch.arange(images) % target.num_classes

        def drawn() -> Iterator[None]:
            for first in range(0, images, size or images):
                self._seen, part = 0, labels[first : first + (size or images)]
                noise = PhiloxNoise(seed, first)
                run = sample_iter(target, part, max_slots=slots, noise=noise, callback=self._round, **settings)
                self._run: SampleIterator = run
                for index, image in run:
                    self.samples[first + index] = image
                    yield
                stats = run.stats
                self.rounds[first : first + len(part)] = stats.rounds_per_image
                self.calls, self.rows = self.calls + stats.target_calls, self.rows + stats.target_rows

        self._drawn, self._whole = drawn(), size is None

    def _round(self, info: RoundInfo) -> None:
        """Rows and seconds of a round; batches after the first would mix up the images' steps."""
        now, rows = time.perf_counter(), self._run.stats.target_rows
        self.costs.append((rows - self._seen, now - self._since))
        self._since, self._seen = now, rows
        if self._whole:
            self.counts(info)

    def pull(self) -> bool:
        """Draw the next image; False when there is none."""
        self._since = began = time.perf_counter()
        more = next(self._drawn, self) is None
        self.seconds += time.perf_counter() - began
        return more


def round_cost(costs: list[tuple[int, float]]) -> tuple[float, float]:
    """Seconds of a round and of each of its rows: least squares of relative errors, then again without outliers."""
    rows, seconds = np.array(costs, float).T
    features = np.stack([np.ones_like(rows), rows], axis=1) / seconds[:, None]
    kept = np.ones(len(rows), bool)
    for _ in range(2):
        base, row = np.linalg.lstsq(features[kept], np.ones(kept.sum()), rcond=None)[0]
        kept = seconds < 2 * (base + row * rows)
    return float(base), float(row)


def figures(
    calls: int, rows: int, rounds: np.ndarray, slots: int, length: int, seconds: float | None
) -> dict[str, Any]:
    """How full a run's packed calls and slots were."""
    speed = None if seconds is None else len(rounds) / seconds
    full = {"rows_full": rows / (calls * slots * length), "slots_busy": float(rounds.sum() / (calls * slots))}
    return {"calls": calls, "rows": rows} | full | {"seconds": seconds, "images_per_s": speed}


def measure(images: int, slots: int, length: int, steps: int, seed: int, counts_only: bool) -> dict[str, Any]:
    """Both sides, and what rounds per image and acceptance predict of them."""
    continuous = Side(images, None, slots, length, steps, seed)
    fixed = Side(images, slots, slots, length, steps, seed)
    # Warm, and the cost of a round, on other noise.
    trial = Side(min(images, 3 * slots), slots, slots, length, steps, seed + 1)
    while not counts_only and trial.pull():
        pass
    drawing = [continuous] if counts_only else [continuous, fixed]
    while drawing:
        drawing = [side for side in drawing if side.pull()]
    rounds = continuous.rounds
    slowest = sum(int(part.max()) for part in np.split(rounds, range(slots, images, slots)))
    chain = CommitChain(acceptance_table(continuous.counts.table(), steps), length, continuous.counts.first == 0)
    full, left = divmod(images, slots)
    expected = full * chain.rounds_of_slowest(slots) + (chain.rounds_of_slowest(left) if left else 0.0)
    found: dict[str, Any] = {
        "continuous": figures(
            continuous.calls, continuous.rows, rounds, slots, length, None if counts_only else continuous.seconds
        ),
        # An image takes the same rounds in any batch, up to near-ties that rounding decides.
        "fixed": figures(slowest, continuous.rows, rounds, slots, length, None if counts_only else fixed.seconds),
        "calls_ratio": slowest / continuous.calls,
        "chain_ratio": expected / (images * chain.rounds / slots),
        "wasted_rounds": 1 - float(rounds.sum()) / (slowest * slots),
        "rounds_per_image": {"mean": float(rounds.mean()), "low": int(rounds.min()), "high": int(rounds.max())},
        "predicted_ratio": None,
        "throughput_ratio": None,
    }
    if not counts_only:
        base, row = round_cost(trial.costs[1:])
        rest = row * continuous.rows
        found["fixed"]["calls_measured"] = fixed.calls
        found["round_cost_s"] = {"base": base, "row": row}
        found["predicted_ratio"] = (base * slowest + rest) / (base * continuous.calls + rest)
        found["throughput_ratio"] = fixed.seconds / continuous.seconds
        gap = (continuous.samples - fixed.samples).abs().flatten(1).amax(1)
        found["images"] = {"largest_difference": float(gap.max()), "differ_by_1e-3": int((gap > 1e-3).sum())}
    return found


def render(found: dict[str, Any]) -> str:
    """Continuous batching against fixed batches."""
    settings, continuous, fixed = found["settings"], found["continuous"], found["fixed"]
    lines = [
        f"{settings['images']} images, {settings['steps']} steps, {settings['slots']} slots, draft length "
        f"{settings['draft_length']}, bundled digits pair, {settings['cpu']}, {settings['threads']} thread; "
        f"`{settings['command']}`.",
        "",
    ]
    headers = ["", "packed calls", "rows over slots x L", "busy slots", "images/s"]
    rows = [
        [
            name,
            str(side["calls"]),
            f"{side['rows_full']:.1%}",
            f"{side['slots_busy']:.1%}",
            "not timed" if side["images_per_s"] is None else f"{side['images_per_s']:.2f}",
        ]
        for name, side in (("continuous", continuous), ("fixed batches, from rounds per image", fixed))
    ]
    lines += table(headers, rows)
    mean = found["rounds_per_image"]
    lines.append(
        f"An image takes {mean['mean']:.1f} rounds ({mean['low']} to {mean['high']}); in fixed batches "
        f"{found['wasted_rounds']:.1%} of the slots' rounds pass without an image."
    )
    lines.append("")
    headers = ["fixed over continuous", "ratio"]
    rows = [
        ["packed calls", f"{found['calls_ratio']:.3f}"],
        ["packed calls, predicted by the chain of rounds from this run's acceptance", f"{found['chain_ratio']:.3f}"],
    ]
    if found["throughput_ratio"] is not None:
        rows.append(["time, predicted from rounds per image and a round's cost", f"{found['predicted_ratio']:.3f}"])
        rows.append(["time, measured", f"{found['throughput_ratio']:.3f}"])
    return "\n".join([*lines, *table(headers, rows)])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of scale-model.md and scale/")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--counts-only", action="store_true", help="no clock: half the work, for a busy machine")
    parser.add_argument("--render-only", action="store_true", help="renew the table; nothing is measured")
    chosen = parser.parse_args()
    out = chosen.docs / "scale" / "batching.json"
    if chosen.render_only:
        fill_page(chosen.docs / "scale-model.md", "batching", render(json.loads(out.read_text())))
        return
    settings = {"images": chosen.images, "slots": chosen.slots, "draft_length": chosen.draft_length}
    settings |= {"steps": chosen.steps, "seed": chosen.seed}
    command = "python -m benchmarks.scaling.bench_batching" + " --counts-only" * chosen.counts_only
    found = measure(
        chosen.images, chosen.slots, chosen.draft_length, chosen.steps, chosen.seed, counts_only=chosen.counts_only
    )
    found = {"settings": settings | {"command": command} | machine()} | found
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    fill_page(chosen.docs / "scale-model.md", "batching", render(found))
    print(render(found), f"\nwrote {out}")


if __name__ == "__main__":
    main()
