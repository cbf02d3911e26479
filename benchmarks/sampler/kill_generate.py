"""Kill a generation job at random moments, again and again, and compare what it leaves with an undisturbed run.

    python -m benchmarks.sampler.kill_generate --out docs/reliability/kill.json

Each job is a process of its own, forked after the imports, which would take most of the time. Moments are random from
the first round on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from free_dit import cli
from free_dit.files import write_json
from free_dit.generation import SampleFolder


class Job:
    """The command in another process, from the first round on."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self._log, self.code = folder.with_suffix(".log"), None
        self._log.touch()
        self.pid = os.fork()
        if not self.pid:
            self._run(["free_dit", "generate", "--out", str(folder), *arguments])
        while "here:" not in self.log and self._ended(os.WNOHANG) is None:
            time.sleep(0.01)
        self.began = time.monotonic()

    def _run(self, arguments: list[str]) -> None:
        handle = os.open(self._log, os.O_WRONLY | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(handle, stream)
        sys.argv, code = arguments, 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def _ended(self, options: int = 0) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, options)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self) -> int:
        """The exit status; negative for a signal."""
        code = self._ended()
        assert code is not None
        return code

    def kill(self, number: int) -> None:
        if self._ended(os.WNOHANG) is None:
            os.kill(self.pid, number)


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
    figures = {"--num": options.num, "--steps": options.steps, "--shard": options.shard}
    arguments = [str(part) for item in figures.items() for part in item]
    # A process that is forked has no threads but one.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        whole, killed = Path(temporary) / "whole", Path(temporary) / "killed"
        job = Job(whole, arguments)
        assert job.wait() == 0, job.log
        drawing = time.monotonic() - job.began
        kills, rewritten, kept = [], 0, {}
        while len(kills) < options.kills:
            job = Job(killed, arguments)
            # Together most of the undisturbed run, as a kill also costs what was not on disk yet.
            moment = moments.uniform(0, 1.5 * drawing / options.kills)
            time.sleep(moment)
            job.kill(number)
            code = job.wait()
            if code == 0:
                break
            now = files_of(killed)
            rewritten += sum(now.get(name) != what for name, what in kept.items())
            kept, samples = now, SampleFolder.open(killed)
            images = sum(len(samples.images_of(shard)) for shard in samples.recorded())
            again = job.log.count("drawn again")
            kills.append(
                {"after_s": round(moment, 3), "exit": code, "images_on_disk": images, "shards_found_damaged": again}
            )
            print(kills[-1], flush=True)
        job = Job(killed, arguments)
        assert job.wait() == 0, job.log
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
