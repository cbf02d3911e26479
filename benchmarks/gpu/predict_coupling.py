"""What the coupling would take on GPUs that are not there, from its machine code and its bytes: no timing.

``python -m benchmarks.gpu.predict_coupling > benchmarks/results/predicted_coupling.md`` compiles the kernels for each
GPU, disassembles them and counts the instructions that a warp issues; ``benchmarks/report/report.py`` puts the page
into ``docs/benchmarks.md``. Needs a process in which Triton's interpreter was not asked for.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ops.bench_coupling import make, needed_bytes, options_of
from free_kernels.ops.aot import DEVICES, AotConfiguration, compiled
from free_kernels.ops.coupling import reference
from free_kernels.ops.coupling.arguments import CouplingArguments
from free_kernels.ops.coupling.triton_launch import aot_pair, launch_shape

# Slots, rows of each and latent of the large problem and of the small one.
LARGE, SMALL = (64, 8, (4, 64, 64)), (1, 6, (4, 32, 32))
# Instructions that an SM issues in a clock: one of each of its four schedulers.
SCHEDULERS = 4

HEADER = """## Coupling on a GPU, predicted

**A prediction; nothing was run.** From `python -m benchmarks.gpu.predict_coupling`, Triton {version}: `couple` of
64 x 8 rows of 16,384 elements, guided, learned variance. *Instructions*: those that a warp of the row kernel and of the
commit kernel issues, from the code for that GPU, where no quotient or root takes its path for extreme operands.
*Issue*: those of all warps, at one a clock and scheduler, of which a multiprocessor has {schedulers}. *Memory*: the
bytes that have to move, at the memory's rated bandwidth; a copy reaches less. The time lies between the larger of both,
if they overlap wholly, and their sum, if they do not at all; *of bandwidth* is what that leaves of the rated one.
Figures of the GPUs are those of NVIDIA's data sheets, their multiprocessors of its white papers on A100 and Hopper; the
clock is what the rated float32 operations take, and a GPU under load may hold a lower one.
"""


class Gpu(NamedTuple):
    """A GPU's rated figures."""

    name: str
    device: str  # what is compiled for it
    multiprocessors: int
    lanes: int  # float32 products and sums of a multiprocessor in a clock
    float32: float  # operations a second, two of each product and sum
    bandwidth: float  # bytes a second

    @property
    def clock(self) -> float:
        """Hz, of the rated operations."""
        return self.float32 / (2 * self.multiprocessors * self.lanes)


GPUS = (
    Gpu("A100 SXM 80 GB", "sm_80", 108, 64, 19.5e12, 2.039e12),
    Gpu("H100 SXM", "sm_90", 132, 128, 67e12, 3.35e12),
    Gpu("H200 SXM", "sm_90", 132, 128, 67e12, 4.8e12),
)
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)(.*?);")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


class Instruction(NamedTuple):
    """One line of machine code."""

    predicate: str  # empty: always executed
    name: str  # with its modifiers
    target: int | None  # of a branch, the number of an instruction


def instructions_of(code: str) -> list[Instruction]:
    """The instructions of disassembled code, in order."""
    found: list[tuple[str, str, str]] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        label, instruction = _LABEL.match(line), _INSTRUCTION.match(line)
        if label:
            labels[label[1]] = len(found)
        elif instruction:
            found.append((instruction[1] or "", instruction[2], instruction[3]))
    targets = [_TARGET.search(operands) if name.startswith("BRA") else None for _, name, operands in found]
    return [
        Instruction(predicate, name, None if target is None else labels[target[1]])
        for (predicate, name, _), target in zip(found, targets, strict=True)
    ]


def issued(code: str) -> int:
    """Instructions that a warp issues from the first one to the last exit.

    A branch is taken where it leads around a call: those are the paths of quotients and roots for operands that are
    subnormal, infinite or nearly so. Other branches under a condition are not taken, so that both sides count where one
    may be left out.

    Raises:
        ValueError: the code has a loop, whose passes it does not say, or does not end.
    """
    instructions = instructions_of(code)
    at, count = 0, 0
    while at < len(instructions):
        count += 1
        predicate, name, target = instructions[at]
        if name == "EXIT" and not predicate:
            return count
        if target is not None and target <= at:
            raise ValueError(f"predict_coupling: a loop from instruction {at} back to {target}")
        calls = target is not None and any(one.name.startswith("CALL") for one in instructions[at:target])
        at = target if target is not None and (calls or not predicate) else at + 1
    raise ValueError("predict_coupling: code that does not end")


def disassembled(configuration: AotConfiguration, device: str) -> str:
    """The machine code of a configuration as text, by the disassembler that Triton brings."""
    kernel, _ = compiled(configuration, DEVICES[device])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


class Prediction(NamedTuple):
    """Seconds of a call, and the instructions of a warp of each kernel."""

    instructions: tuple[int, int]
    issue: float
    memory: float

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the most that it takes."""
        return max(self.issue, self.memory), self.issue + self.memory


def predict(gpu: Gpu, dtype: torch.dtype, philox: bool) -> Prediction:
    """The large problem on a GPU."""
    slots, length, latent = LARGE
    numel = math.prod(latent)
    flags = {"guided", "learned", *(["philox"] if philox else [])}
    pair = aot_pair(DEVICES[gpu.device], (slots, length, numel), dtype, flags)
    shape = launch_shape(slots, length, numel)
    programs = slots * (length - 1) * shape.num_splits, slots * triton.cdiv(numel, shape.commit_block)
    counts = tuple(issued(disassembled(kernel, gpu.device)) for kernel in pair)
    warps = sum(many * kernel.num_warps * count for many, kernel, count in zip(programs, pair, counts, strict=True))
    moved = needed_bytes(slots, length, latent, True, dtype, philox)
    return Prediction(counts, warps / (gpu.multiprocessors * SCHEDULERS * gpu.clock), moved / gpu.bandwidth)


class Launches(TorchDispatchMode):
    """Counts operations that are more than another view of a tensor's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """Count one operation."""
        result = operation(*args, **(kwargs or {}))
        self.count += not any(
            out.alias_info is not None and not out.alias_info.is_write for out in operation._schema.returns
        )
        return result


def eager_launches() -> int:
    """Operations of the reference at the small problem."""
    drafts, drawn, rest = make(*SMALL, True, torch.float32, "cpu")
    with Launches() as launches:
        reference.couple(CouplingArguments(*drafts, *drawn, *rest, relaxation=None, **options_of(SMALL[2], True)))
    return launches.count


def page(gpus: Sequence[Gpu] = GPUS) -> str:
    """Markdown."""
    lines = [HEADER.format(version=triton.__version__, schedulers=SCHEDULERS)]
    lines += [
        "| GPU | output | noise | instructions | issue, us | memory, us | time, us | of bandwidth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gpu in gpus:
        for dtype in (torch.float32, torch.bfloat16):
            for philox in (False, True):
                found = predict(gpu, dtype, philox)
                least, most = found.bounds
                cells = [
                    gpu.name,
                    str(dtype).removeprefix("torch."),
                    "made in place" if philox else "read",
                    " + ".join(map(str, found.instructions)),
                    f"{1e6 * found.issue:.0f}",
                    f"{1e6 * found.memory:.0f}",
                    f"{1e6 * least:.0f} to {1e6 * most:.0f}",
                    f"{found.memory / most:.0%} to {found.memory / least:.0%}",
                ]
                lines.append(f"| {' | '.join(cells)} |")
    eager = eager_launches()
    lines += [
        "",
        f"Of 6 rows of 4,096 elements the eager reference makes {eager} operations, each a launch or more, and the",
        "kernels are two. At this size a launch takes longer than what it does, so the reference is to take some",
        f"{eager / 2:.0f} times as long.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(page())


if __name__ == "__main__":
    main()
