"""The run on a GPU machine without one: order, budgets, stops, what is written when it is cut; with stand-in stages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from free_kernels import extension

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="needs the source checkout")
CALLS = ("a", "b", "c")
FOREVER = "import time; print('figures: {\"kept\": 1}', flush=True); time.sleep(60)"


@pytest.fixture
def gpu() -> Any:
    """The modules of the run, importable for the test."""
    from benchmarks.gpu import gpu_runner, gpu_stages, gpu_tests, run_gpu

    class Modules:
        runner, stages, tests, command = gpu_runner, gpu_stages, gpu_tests, run_gpu

    return Modules


@pytest.fixture
def make(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runners and stages whose commands are Python code."""
    # Stages of these tests are short.
    monkeypatch.setattr(gpu.runner, "LEAST_S", 0.1)

    class Make:
        out = tmp_path / "out"

        def runner(self, call: str = "a", **settings: Any) -> Any:
            return gpu.runner.Runner(self.out, call, {"gpu": "none"}, self.out / "device", dict(os.environ), **settings)

        def stage(self, name: str, *codes: str, limit_s: float = 30, **needs: Any) -> Any:
            commands = tuple((sys.executable, "-c", code) for code in codes or ("",))
            return gpu.runner.Stage(name, limit_s, commands, **needs)

        def summary(self, call: str = "a") -> dict[str, Any]:
            return json.loads((self.out / f"summary_{call}.json").read_text())

        def statuses(self) -> dict[str, str]:
            return {stage["name"]: stage["status"] for stage in self.summary()["stages"]}

    return Make()


def names(plan: Any) -> list[str]:
    return [stage.name for group in plan for stage in group]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_stages_of_a_call_fit_into_it(gpu, tmp_path, device):
    for call in CALLS:
        plan = gpu.stages.Stages(tmp_path, device, tmp_path).plan(call)
        assert gpu.runner.seconds_of(plan) + gpu.stages.RESERVE_S <= gpu.stages.CALL_S == 540
        assert gpu.stages.RESERVE_S > gpu.runner.END_S
        assert len(set(names(plan))) == len(names(plan))
    grown = [*plan, [gpu.runner.Stage("one more", 60, ())]]
    assert gpu.runner.seconds_of(grown) + gpu.stages.RESERVE_S > gpu.stages.CALL_S


def test_what_matters_comes_first(gpu, tmp_path):
    plans = {call: gpu.stages.Stages(tmp_path, "cuda", tmp_path).plan(call) for call in CALLS}
    assert names(plans["a"]) == ["build", "check_kernels", "gpu_tests", "graphs", "sanitizer"]
    assert names(plans["b"]) == [
        "build",
        "bench_target",
        "bench_xl",
        "bench_coupling",
        "bench_packing",
        "bench_drafting",
        "bench_attention",
    ]
    assert names(plans["c"])[:3] == ["build", "ablations", "profile_xl"]
    # Rivals that have to be compiled are the last of all.
    assert names(plans["c"])[-2:] == ["bench_coupling_compiled", "bench_attention_flex"]
    for plan in plans.values():
        assert len(plan[0]) == 1
        assert [stage.name for group in plan for stage in group if stage.required] == ["build"]
        for stage in (stage for group in plan for stage in group):
            for command in stage.commands:
                scripts = [part for part in command if part.startswith(("benchmarks/", "tests/"))]
                assert scripts
                assert all((ROOT / script).exists() for script in scripts)


def test_every_gpu_test_is_run_once(gpu, tmp_path):
    plan = gpu.stages.Stages(tmp_path, "cuda", tmp_path).plan("a")
    run = [Path(part) for stage in plan[1] + plan[2] for part in stage.commands[0] if part.startswith("tests/")]
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "@pytest.mark.gpu" in path.read_text()]
    assert len(run) == len(set(run))
    assert {path.relative_to(ROOT) for path in marked} <= set(run)
    workers = plan[1][1].commands[0]
    assert workers[workers.index("--workers") + 1] == "12"


def test_a_dry_run_has_the_same_stages_and_no_gpu(gpu, tmp_path):
    for call in CALLS:
        real, dry = (gpu.stages.Stages(tmp_path, device, tmp_path).plan(call) for device in ("cuda", "cpu"))
        assert names(real) == names(dry)
        for stage in (stage for group in dry for stage in group):
            for command in stage.commands:
                assert "cuda" not in command
                assert "gpu" not in command


def test_files_that_come_back_are_few(gpu, tmp_path):
    for call in CALLS:
        plan = gpu.stages.Stages(tmp_path, "cuda", tmp_path).plan(call)
        stages = [stage for group in plan for stage in group]
        results = {stage.results for stage in stages if stage.results}
        parts = [part for stage in stages for command in stage.commands for part in command]
        others = {part for part in parts if part.startswith(str(tmp_path)) and part.endswith(".json")}
        assert len(results | others) + 2 <= 8


def test_groups_run_in_order_and_stages_of_one_side_by_side(make):
    waits = """
import pathlib, time
pathlib.Path({!r}).touch()
while not pathlib.Path({!r}).exists():
    time.sleep(0.05)
"""
    one, other = (str(make.out / name) for name in ("one", "other"))
    after = f"import os; assert os.path.exists({one!r})"
    side_by_side = [make.stage("left", waits.format(one, other)), make.stage("right", waits.format(other, one))]
    runner = make.runner()
    assert runner.run([side_by_side, [make.stage("after", after)]], 60) == 0
    assert list(make.statuses().items()) == [("left", "ok"), ("right", "ok"), ("after", "ok")]


def test_commands_of_a_stage_fail_together(make):
    runner = make.runner()
    assert runner.run([[make.stage("both", "print('fine')", "raise SystemExit(3)")]], 60) == 1
    (stage,) = make.summary()["stages"]
    assert (stage["status"], stage["why"]) == ("failed", "exit status 0, 3")
    assert "fine" in stage["tail"]


@pytest.mark.parametrize("required", [True, False])
def test_nothing_runs_after_a_build_that_failed(make, required):
    ran = make.out / "ran"
    build = make.stage("build", "raise SystemExit('no compiler')", required=required)
    later = [make.stage(name, f"open({str(ran)!r}, 'a').write('x')") for name in ("tests", "figures")]
    assert make.runner().run([[build], *([stage] for stage in later)], 60) == 1
    assert ran.exists() is not required
    if required:
        assert make.statuses() == {"build": "failed", "tests": "skipped", "figures": "skipped"}
        assert all("build failed: exit status 1" in stage["why"] for stage in make.summary()["stages"][1:])


@pytest.mark.parametrize("ending", ["cut", "skipped"])
def test_a_build_that_was_cut_or_skipped_has_failed_too(make, gpu, ending):
    needs = {"packages": ("no_such_package",)} if ending == "skipped" else {}
    build = make.stage("build", FOREVER, limit_s=1, required=True, **needs)
    make.runner().run([[build], [make.stage("tests")]], 31 + gpu.runner.END_S)
    assert make.statuses() == {"build": ending, "tests": "skipped"}
    assert make.summary()["stages"][1]["why"].startswith(f"build {ending}: ")


def test_a_stage_that_is_cut_keeps_what_it_wrote(make, gpu):
    file = make.out / "device/target.json"
    written = json.dumps({"machine": {}, "roofs": {}, "benchmarks": {"first row": {"median_s": 1.0}}})
    code = f"import pathlib; p = pathlib.Path({str(file)!r}); p.parent.mkdir(parents=True); p.write_text({written!r})"
    code += "; p.with_suffix('.tmp').write_text('half')"
    stage = make.stage("target", f"{code}\nprint('ok     one: fine')\n{FOREVER}", limit_s=3, results="target.json")
    began = time.monotonic()
    assert make.runner().run([[stage], [make.stage("next")]], 33 + gpu.runner.END_S) == 3
    assert time.monotonic() - began < 30
    cut, following = make.summary()["stages"]
    assert (cut["status"], following["status"]) == ("cut", "ok")
    assert "were over" in cut["why"]
    assert cut["figures"]["measured"] == ["first row"]
    assert cut["figures"]["kept"] == 1
    assert cut["figures"]["comparisons"] == {"ok": 1}
    assert json.loads(file.read_text())["benchmarks"]
    assert list(make.out.rglob("*.tmp")) == []


def test_what_a_stage_started_ends_with_it(make):
    pids = make.out / "pids"
    child = "import time; time.sleep(60)"
    starts = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}])"
    code = f"{starts}; open({str(pids)!r}, 'w').write(str(p.pid))"
    assert make.runner().run([[make.stage("leaves one behind", code)]], 60) == 0
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and alive(int(pids.read_text())):
        time.sleep(0.05)
    assert not alive(int(pids.read_text()))


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_time_that_is_left_goes_to_later_stages_and_never_beyond_the_budget(make, gpu):
    """By a clock of its own: each stage is given its end, and takes a stated part of it."""
    now = [0.0]
    given: dict[str, float] = {}
    takes: dict[str, float] = {}

    class Timed(gpu.runner.Runner):
        def run_stage(self, stage: Any, limit_s: float) -> Any:
            given[stage.name] = limit_s
            now[0] += min(limit_s, takes[stage.name])
            return gpu.runner.Outcome(stage.name, "ok" if takes[stage.name] <= limit_s else "cut")

    def plan() -> list[list[Any]]:
        return [[make.stage(name, limit_s=100)] for name in ("one", "two", "three")]

    for taken, want in (
        ({"one": 40, "two": 40, "three": 500}, {"one": 100, "two": 160, "three": 220}),
        ({"one": 500, "two": 500, "three": 500}, {"one": 100, "two": 100, "three": 100}),
    ):
        now[0] = 0.0
        given.clear()
        takes |= taken
        Timed(make.out, "a", {}, make.out, {}, lambda: now[0]).run(plan(), 300 + gpu.runner.END_S)
        assert given == want
        assert now[0] <= 300
    # With less for everything the first ones have theirs and the last are not begun.
    now[0] = 0.0
    given.clear()
    Timed(make.out, "a", {}, make.out, {}, lambda: now[0]).run(plan(), 150 + gpu.runner.END_S)
    assert given == {"one": 100, "two": 50}
    assert make.statuses() == {"one": "cut", "two": "cut", "three": "skipped"}
    assert make.summary()["stages"][2]["why"] == "no time is left"


def test_results_that_hold_nothing_new_are_a_failure(make):
    file = make.out / "device/target.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"machine": {}, "roofs": {}, "benchmarks": {"old": {"median_s": 1.0}}}))
    assert make.runner().run([[make.stage("target", "print('skipped all')", results="target.json")]], 60) == 1
    assert make.summary()["stages"][0]["why"] == "nothing was measured"


def test_what_a_machine_cannot_do_is_skipped_with_the_reason(make):
    says = "import sys; print('==== Device not supported'); sys.exit(9)"
    plan = [
        [make.stage("excused", says, excuses=("Device not supported",))],
        [make.stage("not excused", says)],
        [make.stage("lacking", packages=("json", "no_such_package"), tools=("no_such_program",))],
    ]
    assert make.runner().run(plan, 120) == 1
    reasons = [stage["why"] for stage in make.summary()["stages"]]
    lacks = "missing Python packages: no_such_package; missing programs: no_such_program"
    assert reasons == ["this machine cannot: Device not supported", "exit status 9", lacks]
    assert make.statuses() == {"excused": "skipped", "not excused": "failed", "lacking": "skipped"}
    assert make.runner().run(plan[:1], 120) == 1
    assert make.runner().run([[make.stage("fine")], *plan[2:]], 120) == 3


def test_a_program_that_cannot_be_run_is_no_traceback(make, gpu):
    stage = gpu.runner.Stage("gone", 30, (("/nonexistent/program",),))
    assert make.runner().run([[stage], [make.stage("next")]], 60 + 10) == 1
    assert make.statuses() == {"gone": "failed", "next": "ok"}


def test_the_log_stays_small(make, gpu):
    loud = f"print('first'); print('x' * {3 * gpu.runner.LOG_BYTES}); print('last')"
    make.runner().run([[make.stage("loud", loud)]], 60)
    log = (make.out / "log_a.txt").read_text()
    assert len(log) < 2 * gpu.runner.LOG_BYTES
    assert "first" in log
    assert log.rstrip().endswith("last")


RUN = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import signal
from benchmarks.gpu import gpu_runner
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
out = Path({out!r})
def stage(name, code):
    return gpu_runner.Stage(name, 30, ((sys.executable, "-c", code),))
forever = "import os, time; open({pid!r}, 'w').write(str(os.getpid())); time.sleep(60)"
plan = [[stage("done", "print('figures: {{}}')")], [stage("forever", forever)], [stage("later", "")]]
gpu_runner.Runner(out, "a", {{}}, out, dict(os.environ)).run(plan, 120)
"""


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_leaves_a_whole_summary(make, tmp_path, end):
    pid = tmp_path / "pid"
    code = RUN.format(root=str(ROOT), out=str(make.out), pid=str(pid))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (pid.exists() and pid.read_text()):
        time.sleep(0.05)
    stage = int(pid.read_text())
    process.send_signal(end)
    process.wait(timeout=30)
    try:
        assert make.statuses() == {"done": "ok", "forever": "cut", "later": "skipped"}
        assert make.summary()["stages"][1]["why"] == "the run ended while it ran"
        assert "not reached" in make.summary()["stages"][2]["why"]
        if end == signal.SIGTERM:
            assert process.returncode == 143
            assert not alive(stage)
    finally:
        if alive(stage):
            os.kill(stage, signal.SIGKILL)


@pytest.mark.parametrize("call", CALLS)
def test_without_a_gpu_it_says_so(tmp_path, call):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    command = [BENCHMARKS / "run_gpu.sh", call, tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert "nothing was run: no CUDA device" in result.stdout
    record = json.loads((tmp_path / f"out/summary_{call}.json").read_text())
    assert {stage["status"] for stage in record["stages"]} == {"skipped"}
    assert all("no CUDA device" in stage["why"] for stage in record["stages"])


def test_switches_of_the_library_do_not_reach_the_stages(gpu, tmp_path, monkeypatch):
    for name in ("FREE_KERNELS_NO_EXT", "FREE_KERNELS_NO_CUDA", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "1")
    made = gpu.command.stage_environment(tmp_path, {"capability": "9.0"})
    assert not [name for name in made if name.startswith("FREE_KERNELS_") or name == "TRITON_INTERPRET"]
    assert made["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert Path(made["TRITON_CACHE_DIR"]).parent == tmp_path


def run_tests(gpu: Any, tmp_path: Path, workers: int, **files: str) -> tuple[dict[str, Any], list[str]]:
    """Tests in files of their own by ``gpu_tests``: what became of them, and what keeps it from being a success."""
    paths = []
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: none\n")
    for name, text in files.items():
        path = tmp_path / f"test_{name}.py"
        path.write_text(f"import os, time, pytest\npytestmark = pytest.mark.gpu\n{text}")
        paths.append(str(path))
    claims, out = tmp_path / "claims", tmp_path / "out.json"
    claims.mkdir()
    found = gpu.tests.run(paths, "gpu", workers, out, claims)
    short = {name.rpartition("::")[2]: test for name, test in found["tests"].items()}
    assert json.loads(out.read_text())["tests"].keys() <= found["tests"].keys()
    return found | {"tests": short}, gpu.tests.verdict(found, [path.rpartition("/")[2] for path in paths])


def test_each_test_runs_once_in_one_of_the_processes(gpu, tmp_path):
    text = f"""
@pytest.mark.parametrize("n", range(20))
def test_one(n):
    open({str(tmp_path / "ran")!r}, "a").write(f"{{n}} {{os.getpid()}}\\n")
    time.sleep(0.1)
"""
    found, problems = run_tests(gpu, tmp_path, 3, many=text)
    lines = [line.split() for line in (tmp_path / "ran").read_text().splitlines()]
    assert sorted(int(number) for number, _ in lines) == list(range(20))
    assert len({process for _, process in lines}) > 1
    assert {test["outcome"] for test in found["tests"].values()} == {"passed"}
    assert len(found["tests"]) == 20
    assert problems == []


def test_a_test_that_takes_its_process_with_it_is_a_failure_and_the_others_run(gpu, tmp_path):
    text = """
def test_fine(): pass
def test_dies(): os._exit(139)
def test_poisons(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_after(): pass
def test_wrong(): assert 1 == 2
def test_left_out(): pytest.skip("needs two")
"""
    found, problems = run_tests(gpu, tmp_path, 1, faults=text, broken="import no_such_module")
    outcomes = {name: test["outcome"] for name, test in found["tests"].items()}
    assert outcomes == {
        "test_fine": "passed",
        "test_dies": "crashed",
        "test_poisons": "failed",
        "test_after": "passed",
        "test_wrong": "failed",
        "test_left_out": "skipped",
    }
    assert found["not reached"] == []
    assert problems[:2] == ["2 failed", "1 crashed"]
    assert problems[2].startswith("cannot be collected: ")
    assert problems[3:] == ["nothing passed in test_broken.py"]
    assert "1 == 2" in found["tests"]["test_wrong"]["text"]


def test_a_file_whose_tests_are_all_skipped_is_no_success(gpu, tmp_path):
    _, problems = run_tests(gpu, tmp_path, 2, some="def test_one(): pass", none="def test_one(): pytest.skip('no GPU')")
    assert problems == ["nothing passed in test_none.py"]


def test_the_build_sees_other_packages_and_neither_this_checkout_nor_a_switch(gpu, tmp_path, monkeypatch):
    from benchmarks.gpu import gpu_build

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "python"), str(tmp_path)]))
    monkeypatch.setenv("FREE_KERNELS_NO_CUDA", "1")
    made = gpu_build.environment()
    assert made["PYTHONPATH"] == str(tmp_path)
    assert "FREE_KERNELS_NO_CUDA" not in made


def test_a_package_without_compiled_ops_is_not_a_build(gpu, tmp_path):
    """As an installation is that left the CUDA ops out: its ops of the device are not registered."""
    from benchmarks.gpu import gpu_build

    (tmp_path / "free_kernels").mkdir()
    for path in (ROOT / "free_kernels").rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    assert not gpu_build.check(tmp_path, "cpu", quiet=True)
    if extension.has_extension():
        built = Path(extension.__file__).parents[1]
        assert gpu_build.check(built, "cpu", quiet=True)
