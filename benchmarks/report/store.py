"""Results as short JSON, one file for each benchmark file and device: ``results/<device>/<name>.json``.

A file holds the machine's facts, the roofs measured on it, and one line for each benchmark. Runs are merged by name, so
a partial run replaces what it measured and keeps the rest; figures of another machine are refused.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
STEMS = ("coupling", "attention", "packing", "drafting", "sampler", "modes", "target", "xl", "ablations")


class MixedMachinesError(ValueError):
    """A file holds figures of another machine."""


def device_slug(device: str) -> str:
    """Folder of a device's results: ``cpu``, or the GPU's name in lower case."""
    if device == "cpu":
        return device
    import torch

    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def cpu_name() -> str:
    """The processor as its machine calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def machine_facts(device: str) -> dict[str, Any]:
    """What a timing needs beside it; two results belong together exactly if these are equal."""
    # Not at the top: the report imports this module and has no use for torch.
    import torch

    facts: dict[str, Any] = {} if device == "cpu" else {"gpu": torch.cuda.get_device_name()}
    facts |= {"cpu": cpu_name(), "cores": os.cpu_count(), "torch": torch.__version__, "os": platform.system()}
    try:
        facts["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        facts["triton"] = None
    return facts


def rounded(value: Any) -> Any:
    """The same with four significant digits in every float, however deep."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.4g}")
    return value


def load(path: Path) -> dict[str, Any]:
    """A results file, empty if it does not exist."""
    if not path.exists():
        return {"machine": None, "roofs": {}, "benchmarks": {}}
    return json.loads(path.read_text())


def check_machine(path: Path, machine: dict[str, Any]) -> None:
    """Raise MixedMachinesError if the file holds figures of another machine."""
    held = load(path)["machine"]
    if held is not None and held != machine:
        differing = ", ".join(
            f"{key} {held.get(key)!r} there and {machine.get(key)!r} here"
            for key in sorted(held.keys() | machine.keys())
            if held.get(key) != machine.get(key)
        )
        raise MixedMachinesError(f"{path} holds figures of another machine ({differing}); delete it to start anew")


def merge(
    path: Path, machine: dict[str, Any], benchmarks: dict[str, dict[str, Any]], roofs: dict[str, Any] | None = None
) -> None:
    """Write benchmarks into a file; others of the same machine stay.

    Raises:
        MixedMachinesError: the file holds figures of another machine; it is left alone.
    """
    check_machine(path, machine)
    held = load(path)
    found = {**held["benchmarks"], **rounded(benchmarks)}
    head = {"machine": machine, "roofs": held["roofs"] | rounded(roofs or {})}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    entries = ",\n".join(f"  {json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Replaced as a whole: a run that is killed leaves a file that can be read.
    draft = path.with_suffix(".tmp")
    draft.write_text("\n".join(["{", *lines, ' "benchmarks": {', entries, " }", "}"]) + "\n")
    draft.replace(path)


@dataclass(frozen=True)
class Keeper:
    """Where the figures of one benchmark go."""

    folder: Path | None
    stem: str
    name: str

    def path(self, device: str) -> Path | None:
        """The device's file; raises MixedMachinesError if it is another machine's."""
        if self.folder is None:
            return None
        path = self.folder / device_slug(device) / f"{self.stem}.json"
        check_machine(path, machine_facts(device))
        return path

    def keep(self, device: str, entry: dict[str, Any], roofs: dict[str, Any] | None = None) -> None:
        """Merge the benchmark's entry."""
        path = self.path(device)
        if path is not None:
            merge(path, machine_facts(device), {self.name: entry}, roofs)
