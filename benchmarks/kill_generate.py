"""Kill a generation job at random moments, again and again, and compare what it leaves with an undisturbed run.

    python benchmarks/kill_generate.py --out docs/reliability/kill.json

Moments are uniform over the time that a process draws, its start (imports, weights) left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from free_dit.files import write_json
from free_dit.generation import SampleFolder


def start(folder: Path, arguments: list[str]) -> tuple[subprocess.Popen, Path]:
    """The job, once it draws."""
    log = folder.with_suffix(".log")
    with log.open("w") as handle:
        process = subprocess.Popen(
            [sys.executable, "-m", "free_dit", "generate", "--out", str(folder), *arguments],
            stdout=handle,
            stderr=handle,
        )
    while "img" not in log.read_text() and process.poll() is None:
        time.sleep(0.01)
    return process, log


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells whether a file was written again: its inode and time, by name; of committed shards only."""
    samples = SampleFolder.open(folder)
    paths = [path for shard in samples.recorded() for path in (samples.record_path(shard), *samples.files_of(shard))]
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file of a complete set, by name; computed, not believed."""
    samples = SampleFolder.open(folder)
    assert samples.missing() == []
    return dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shard", type=int, default=16)
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    moments, number = random.Random(options.seed), signal.Signals[f"SIG{options.signal}"]
    job = ["--num", options.num, "--steps", options.steps, "--shard", options.shard]
    arguments = [str(part) for part in job]
    with tempfile.TemporaryDirectory() as temporary:
        whole, killed = Path(temporary) / "whole", Path(temporary) / "killed"
        process, log = start(whole, arguments)
        began = time.monotonic()
        assert process.wait() == 0, log.read_text()
        drawing = time.monotonic() - began
        kills, rewritten, kept = [], 0, {}
        while len(kills) < options.kills:
            process, log = start(killed, arguments)
            # Together most of the undisturbed run, as a kill also costs what was not on disk yet.
            moment = moments.uniform(0, 1.5 * drawing / options.kills)
            time.sleep(moment)
            process.send_signal(number)
            code = process.wait()
            if code == 0:
                break
            now = files_of(killed)
            rewritten += sum(now.get(name) != what for name, what in kept.items())
            kept, samples = now, SampleFolder.open(killed)
            images = sum(len(samples.settings.images_of(shard)) for shard in samples.recorded())
            again = log.read_text().count("drawn again")
            kills.append(
                {"after_s": round(moment, 3), "exit": code, "images_on_disk": images, "shards_found_damaged": again}
            )
            print(kills[-1], flush=True)
        process, log = start(killed, arguments)
        assert process.wait() == 0, log.read_text()
        now = files_of(killed)
        rewritten += sum(now.get(name) != what for name, what in kept.items())
        hashes = [SampleFolder.open(folder).image_hashes() for folder in (whole, killed)]
        left = sorted(str(path.relative_to(killed)) for path in killed.rglob(".*"))
        report = {
            "command": "python -m free_dit generate " + " ".join(arguments),
            "signal": f"SIG{options.signal}",
            "kills": len(kills),
            "images": options.num,
            "files_equal": contents(whole) == contents(killed),
            "images_equal": hashes[0] == hashes[1],
            "committed_files_written_again": rewritten,
            "temporary_files_left": left,
            "drawing_s": round(drawing, 2),
            "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
            "moments": kills,
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, report)
    print(json.dumps({name: value for name, value in report.items() if name != "moments"}, indent=2))


if __name__ == "__main__":
    main()
