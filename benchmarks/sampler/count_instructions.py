"""Instructions of a round outside of its networks: ``python -m benchmarks.sampler.count_instructions``.

Needs ``valgrind``, which counts instructions in place of time: counts repeat where times do not. Target and drafter
have the shapes of the bundled digits and compute nothing to speak of, so that what is counted is the sampler, its ops
and PyTorch's dispatch. A count is the difference of two processes that draw another number of images, over the
difference of their rounds; ``--path`` counts the build of another checkout.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS, IMAGES = 30, (1, 3)


def draw(drafter: str, length: int, images: int) -> None:
    """Draw images one after the other, and print how many rounds that took."""
    import torch

    from benchmarks.sampler.shapes import SHAPES, ShapedDrafter, ShapedTarget
    from free_kernels import DDPMSchedule, ancestral_sample, sample

    torch.set_num_threads(1)
    # One collection of all objects costs as much as tens of rounds, and falls where it will.
    gc.collect()
    gc.disable()
    target, labels = ShapedTarget(SHAPES[0]), torch.arange(images)
    settings = {"schedule": DDPMSchedule(STEPS)}
    if drafter == "ordinary":
        for label in labels:
            ancestral_sample(target, label[None], **settings)
        print(images * STEPS)
        return
    chosen = ShapedDrafter() if drafter == "learned" else "frozen"
    result = sample(target, labels, drafter=chosen, draft_length=length, max_slots=1, **settings)
    print(result.stats.target_calls)


def counted(path: Path, *arguments: str) -> tuple[int, int]:
    """Instructions and rounds of a process."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (path, path / "python", ROOT))),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.NamedTemporaryFile() as out:
        tool = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out.name}"]
        command = [*tool, sys.executable, str(Path(__file__)), "--draw", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    collected = re.search(r"Collected : (\d+)", done.stderr)
    return int(collected[1]), int(done.stdout.split()[-1])


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, default=ROOT, help="checkout whose build is counted")
    parser.add_argument("--length", type=int, default=6)
    parser.add_argument("--drafters", nargs="+", default=["learned", "frozen", "ordinary"])
    parser.add_argument("--draw", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.draw:
        drafter, length, images = arguments.draw
        draw(drafter, int(length), int(images))
        return
    for drafter in arguments.drafters:
        (few, few_rounds), (many, many_rounds) = (
            counted(arguments.path.resolve(), drafter, str(arguments.length), str(images)) for images in IMAGES
        )
        each = (many - few) / (many_rounds - few_rounds)
        print(f"{drafter}, L = {arguments.length}: {each / 1e6:.2f} million instructions a round", flush=True)


if __name__ == "__main__":
    main()
