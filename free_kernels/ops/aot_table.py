"""Compiles every Triton kernel for GPUs that need not be there, and prints registers, shared memory and spills.

``python -m free_kernels.ops.aot_table > benchmarks/results/ahead_of_time.md`` writes Markdown with a row for each
kind of configuration, which ``benchmarks/report/report.py`` puts into ``docs/benchmarks.md``; ``make aot-matrix`` does
both. Exits with an error where a configuration spills or asks for more than a device has. Needs a process in which
Triton's interpreter was not asked for.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton

import free_kernels.ops
from free_kernels.ops.aot import DEVICES, AotConfiguration, AotReport, compile_configuration, why_unfit

HEADER = """## Triton kernels, compiled ahead of time

`python -m free_kernels.ops.aot_table > benchmarks/results/ahead_of_time.md`, Triton {version}; no GPU is needed, and
none ran them. Each cell: registers of a thread / KiB of shared memory of a program / bytes that a thread spills /
barriers in the code, each the largest of so many configurations.
"""


def modules() -> list[str]:
    """Names of the kernel modules that say how they are to be compiled."""
    folders = [Path(path) for path in free_kernels.ops.__path__]
    names = sorted(file.parent.name for folder in folders for file in folder.glob("*/triton_launch.py"))
    return [
        n
        for n in names
        if hasattr(importlib.import_module(f"free_kernels.ops.{n}.triton_launch"), "aot_configurations")
    ]


def configurations(module: str, device: str, largest: str | None = None) -> list[AotConfiguration]:
    """All of a module's on a device, or of each ``"kernel"`` or ``"group"`` what asks most of a program."""
    every = importlib.import_module(f"free_kernels.ops.{module}.triton_launch").aot_configurations(DEVICES[device])
    if largest is None:
        return every
    found: dict[object, AotConfiguration] = {}
    for configuration in sorted(every, key=lambda configuration: -configuration.size):
        found.setdefault(getattr(configuration, largest), configuration)
    return list(found.values())


def _report(task: tuple[str, str, str | None, int]) -> AotReport:
    module, device, largest, index = task
    return compile_configuration(configurations(module, device, largest)[index], DEVICES[device])


def reports(names: Sequence[str], devices: Sequence[str], largest: str | None, workers: int) -> list[AotReport]:
    """Reports of all configurations of some modules on some devices, compiled by so many processes."""
    tasks = [
        (module, device, largest, index)
        for module in names
        for device in devices
        for index in range(len(configurations(module, device, largest)))
    ]
    if workers == 1:
        return [_report(task) for task in tasks]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_report, tasks))


def markdown(found: Sequence[AotReport]) -> str:
    """A row for each group, a column for each device; the largest figures of the group's configurations."""
    devices = [name for name in DEVICES if any(report.device == name for report in found)]
    lines = [f"| kernel | configurations | {' | '.join(devices)} |", "|" + "---|" * (len(devices) + 2)]
    for group in dict.fromkeys(report.group for report in found):
        cells, counts = [], set()
        for device in devices:
            own = [report for report in found if (report.group, report.device) == (group, device)]
            counts.add(len(own))
            figures = [(r.registers, r.shared, max(r.spilled, r.stack), r.barriers) for r in own] or [(0, 0, 0, 0)]
            registers, shared, spilled, barriers = map(max, zip(*figures, strict=True))
            cells.append(f"{registers} / {shared / 1024:.1f} / {spilled} / {barriers}")
        lines.append(f"| {group} | {' to '.join(str(count) for count in sorted(counts))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", choices=modules(), help="one kernel module; all of them if left out")
    parser.add_argument("--device", choices=list(DEVICES), action="append", help="may be repeated; all if left out")
    parser.add_argument("--largest", choices=("kernel", "group"), help="of each only what asks most of a program")
    parser.add_argument("--workers", type=int, default=1, help="processes that compile")
    parser.add_argument("--json", action="store_true", help="a list of all reports instead of the table")
    parser.add_argument("--reports", type=Path, nargs="+", help="print these outputs of --json, and compile nothing")
    options = parser.parse_args()
    if options.reports:
        held = [report for path in options.reports for report in json.loads(path.read_text())]
        found = [AotReport(**{name: report[name] for name in AotReport._fields}) for report in held]
    else:
        names = [options.module] if options.module else modules()
        found = reports(names, options.device or list(DEVICES), options.largest, options.workers)
    if options.json:
        print(json.dumps([report._asdict() | {"unfit": why_unfit(report)} for report in found]))
        return
    print(HEADER.format(version=triton.__version__))
    print(markdown(found))
    unfit = [f"{report.device} {report.label}: {why_unfit(report)}" for report in found if why_unfit(report)]
    if unfit:
        sys.exit("\n".join(unfit))


if __name__ == "__main__":
    main()
