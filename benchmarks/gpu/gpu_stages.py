"""The stages of each call of ``run_gpu.py``: what matters first comes first, for what comes late is lost first.

A dry run has the same stages in the same order, each on a CPU and as short as can be.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.gpu.gpu_runner import ROOT, Plan, Stage

# A call ends within this, with something left of the ten minutes that a command may have where GPUs are lent.
CALL_S = 540
# For the facts at the start, the summary at the end and the ends of stages.
RESERVE_S = 30
TEST_WORKERS = 12
CALLS = {
    "a": "build, every kernel against its oracle, tests, CUDA graphs, memory checker",
    "b": "cost of a packed call, sample against ancestral_sample on DiT-XL/2's shape, ops",
    "c": "ablations, profiles, the bundled pair, compiled rivals",
}
SAMPLER_PACKAGES = ("triton", "safetensors", "tqdm")
BENCH_PACKAGES = ("pytest", "pytest_benchmark", "triton")
TEST_PACKAGES = ("pytest", "hypothesis", "triton", "safetensors", "tqdm")
# compute-sanitizer's words where it may not attach to the GPU, as in some sandboxes.
NO_SANITIZER = ("Device not supported", "not supported on this device")


def gpu_test_files() -> list[Path]:
    """Tests with something that needs a GPU."""
    return sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())


class Stages:
    """Makes stages.

    Args:
        out: folder of results.
        device: ``"cuda"``, or ``"cpu"`` in a dry run.
        scratch: folder for what is not a result.
    """

    def __init__(self, out: Path, device: str, scratch: Path) -> None:
        self.out, self.device, self.scratch, self.dry = out, device, scratch, device == "cpu"

    def python(self, script: str, *arguments: str) -> tuple[str, ...]:
        """Command of a script of the benchmarks."""
        return (sys.executable, str(next((ROOT / "benchmarks").glob(f"*/{script}.py")).relative_to(ROOT)), *arguments)

    def build(self) -> Stage:
        """The installation as the README gives it, and the ops that it must have."""
        command = self.python("gpu_build", "--device", self.device, "--scratch", str(self.scratch))
        return Stage("build", 150, (command,), packages=("setuptools", "pip"), tools=("c++",), required=True)

    def check_kernels(self, limit_s: float) -> Stage:
        """Kernels against oracles on fresh inputs, the check with the most compilations first."""
        names = ("random", "packing") if self.dry else ("couple", "attention", "random", "packing")
        commands = [self.python("check_kernels", "--device", self.device, "--only", name) for name in names]
        threads = {"OMP_NUM_THREADS": "1"}
        return Stage("check_kernels", limit_s, tuple(commands), ("triton",), environment=threads)

    def tests(self, name: str, limit_s: float, workers: int, files: list[Path]) -> Stage:
        """Tests marked ``gpu``; in a dry run some that need none."""
        options = ["--workers", str(workers), "--out", str(self.out / f"{name}.json")]
        if self.dry:
            options = ["--workers", "2", *options[2:], "--select", "not gpu and not slow"]
            files = [next((ROOT / "tests").rglob("test_schedule.py"))]
        # Several processes: each may compile little beside the others.
        few = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        paths = [str(path.relative_to(ROOT)) for path in files]
        return Stage(name, limit_s, (self.python("gpu_tests", *options, *paths),), TEST_PACKAGES, environment=few)

    def sanitizer(self, limit_s: float) -> Stage:
        """The CUDA kernels under the memory checker."""
        # Without the caching allocator a write past a tensor's end is a write past an allocation's end.
        check = self.python("check_kernels", "--device", self.device, "--only", "packing", "--seed", "1")
        command = ("compute-sanitizer", "--error-exitcode", "9", "--tool", "memcheck", *check)
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Stage(
            "sanitizer", limit_s, (command,), tools=("compute-sanitizer",), environment=uncached, excuses=NO_SANITIZER
        )

    def bench(self, stem: str, limit_s: float, rivals: str, suffix: str = "") -> Stage:
        """Rows of an op's benchmark, by an expression for their names."""
        marked = ["-m", "not gpu", "--quick"] if self.dry else ["-m", "gpu"]
        if self.dry:
            # What a CPU has, however the rows on a GPU are chosen.
            rivals = {
                "coupling": "digits-1 and plain",
                "attention": "digits-6",
                "packing": "digits-1",
                "drafting": "digits-1",
            }.get(stem, "L4")
        options = ["-q", "-p", "no:cacheprovider", "--benchmark-only", "--benchmark-columns=min,median,iqr"]
        command = (
            sys.executable,
            "-m",
            "pytest",
            str(next((ROOT / "benchmarks").glob(f"*/bench_{stem}.py")).relative_to(ROOT)),
            *options,
            *marked,
        )
        command += ("-k", rivals, "--results", str(self.out)) if rivals else ("--results", str(self.out))
        packages = (*BENCH_PACKAGES, *(("safetensors", "tqdm") if stem == "sampler" else ()))
        return Stage(f"bench_{stem}{suffix}", limit_s, (command,), packages, results=f"{stem}.json")

    def script(self, name: str, limit_s: float, results: str, *arguments: str, stage: str = "") -> Stage:
        """A benchmark that is a program, with its results."""
        command = self.python(name, "--device", self.device, "--results", str(self.out), *arguments)
        command += ("--quick",) if self.dry else ()
        return Stage(stage or name, limit_s, (command,), SAMPLER_PACKAGES, results=results)

    def plan(self, call: str) -> Plan:
        """The groups of a call."""
        return {"a": self._correctness, "b": self._speed, "c": self._ablations}[call]()

    def _correctness(self) -> Plan:
        files = gpu_test_files()
        graphs = [path for path in files if path.stem == "test_graphs"]
        rest = [path for path in files if path not in graphs]
        # Neither is timed, and both compile for most of their time: together they fill 16 cores.
        side_by_side = [self.check_kernels(210), self.tests("gpu_tests", 210, TEST_WORKERS, rest)]
        return [[self.build()], side_by_side, [self.tests("graphs", 50, 3, graphs)], [self.sanitizer(100)]]

    def _speed(self) -> Plan:
        return [
            [self.build()],
            [self.script("bench_target", 70, "target.json")],
            [self.script("bench_xl", 155, "xl.json")],
            [self.bench("coupling", 60, "not compiled")],
            [self.bench("packing", 20, "")],
            [self.bench("drafting", 20, "")],
            [self.bench("attention", 35, "not flex")],
        ]

    def _ablations(self) -> Plan:
        return [
            [self.build()],
            [self.script("bench_xl", 110, "ablations.json", "--ablations", stage="ablations")],
            [self.script("profile_xl", 50, "profile_xl.json")],
            [self._profile_sampler(40)],
            [self.bench("sampler", 60, "")],
            [self.bench("coupling", 60, "compiled", "_compiled")],
            [self.bench("attention", 40, "flex", "_flex")],
        ]

    def _profile_sampler(self, limit_s: float) -> Stage:
        out = str(self.out / "profile.json")
        command = self.python("profile_sampler", "--device", self.device, "--only-parts", "--out", out)
        command += ("--quick",) if self.dry else ()
        return Stage("profile_sampler", limit_s, (command,), SAMPLER_PACKAGES)
