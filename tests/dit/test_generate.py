"""Generation jobs: nothing lost, nothing twice, the same set whatever happens on the way."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from free_dit import cli, load_bundled
from free_dit import files as files_module
from free_dit.evaluation import open_images
from free_dit.evaluation.sets import PngSet
from free_dit.generation import GenerateSettings, SampleFolder, generate

TINY = GenerateSettings(num=10, steps=4, draft_length=3, shard=4, seed=5)
# Long enough to be caught in the act.
JOB = GenerateSettings(num=96, steps=10, draft_length=6, shard=8)
COMMAND = ("-n", JOB.num, "--steps", JOB.steps, "--shard", JOB.shard)


@pytest.fixture(scope="module")
def pair():
    return load_bundled("digits")


def draw(folder: Path, pair, settings: GenerateSettings = TINY, **rest):
    return generate(folder, *pair, settings, model="digits", **rest)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, pair):
    """JOB, drawn in one go, on as many threads as torchrun and the commands below have."""
    folder, threads = tmp_path_factory.mktemp("undisturbed"), torch.get_num_threads()
    torch.set_num_threads(1)
    draw(folder, pair, JOB)
    torch.set_num_threads(threads)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is not of this run alone."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels_of(folder: Path) -> np.ndarray:
    return np.concatenate(list(open_images(folder).batches(3)))


def start(folder: Path, *arguments: object, ranks: int | None = None) -> subprocess.Popen:
    launcher = [] if ranks is None else ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command = [sys.executable, "-m", *launcher, "free_dit", "generate", "--out", str(folder), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until_recorded(folder: Path, shards: int, process: subprocess.Popen) -> None:
    """Wait for so many shards on disk."""
    while len(list(folder.glob("shards/shard-*.json"))) < shards:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 130)], ids=["KILL", "TERM"])
def test_a_job_that_was_ended_goes_on_to_the_same_set(tmp_path, undisturbed, number, code):
    folder, moments, kept = tmp_path / "job", np.random.default_rng(2), {}
    for shards in (2, 6):
        process = start(folder, *COMMAND)
        until_recorded(folder, shards, process)
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(number)
        assert process.wait() == code
        # What is on disk is not drawn again.
        for name, when in kept.items():
            assert (folder / name).stat().st_mtime_ns == when
        kept = {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("shards/*")}
    assert 6 <= len(SampleFolder.open(folder).recorded()) < JOB.shards
    with pytest.raises(ValueError, match="must be complete, got"):
        open_images(folder)
    # The rest in this process: leftovers go, too.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    done, missing = draw(folder, load_bundled("digits"), JOB)
    torch.set_num_threads(threads)
    assert missing == []
    assert len(done) <= JOB.shards - 6
    assert contents(folder) == contents(undisturbed)


@pytest.mark.slow
def test_torchrun_draws_the_set_of_one_process_and_a_dead_rank_ends_it(tmp_path, undisturbed):
    folder = tmp_path / "job"
    process = start(folder, *COMMAND, ranks=2)
    until_recorded(folder, 2, process)
    victim = int(re.search(r"^(\d+)$", ranks_of(process.pid)[1]).group())
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - began < 60
    assert "SIGKILL" in stderr or "exitcode  : -9" in stderr
    assert SampleFolder.open(folder).recorded()
    process = start(folder, *COMMAND, ranks=2)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    # Rank 0 alone speaks, for all of them, when all is there.
    assert f"wrote {JOB.num} images" in stdout
    assert stdout.count("wrote") == 1
    assert f"{JOB.num}/{JOB.num}" in stderr
    assert "2 ranks" in stderr
    assert contents(folder) == contents(undisturbed)


def ranks_of(launcher: int) -> list[str]:
    """Process ids of torchrun's ranks, in the order of their start."""
    return Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()


def in_a_process(action, last: int) -> int:
    """The exit status of a process that dies, as by kill -9, instead of making call number ``last`` of the system."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    calls = iter(range(1000))
    for name in ("replace", "fsync"):
        original = getattr(os, name)

        def call(*arguments, original=original):
            if next(calls) == last:
                os._exit(9)
            return original(*arguments)

        setattr(os, name, call)
    action()
    os._exit(0)


@pytest.mark.parametrize("form", ["npz", "png"])
def test_a_crash_at_any_point_of_a_commit(tmp_path, pair, form):
    """Every call of the system that a commit makes is the last one once; what is left is all or nothing."""
    settings = replace(TINY, format=form)
    draw(tmp_path / "whole", pair, settings)
    source, whole = SampleFolder.open(tmp_path / "whole"), contents(tmp_path / "whole")
    pixels, record = source.read(1), source.record(1)
    figures = {name: record[name] for name in ("rounds", "bias", "counts")}
    committed = []
    for last in range(1000):
        folder = tmp_path / "crashed"
        shutil.copytree(tmp_path / "whole", folder)
        crashed = SampleFolder.open(folder)
        for path in (crashed.record_path(1), *crashed.files_of(1)):
            path.unlink()
        (folder / ".rank-0").mkdir()
        ended = in_a_process(
            lambda crashed=crashed: crashed.commit(1, pixels, figures, crashed.folder / ".rank-0"), last
        )
        committed.append(crashed.problem(1) is None)
        # The record's own name is the commit.
        assert committed[-1] == (folder / "shards" / "shard-000001.json").exists()
        assert draw(folder, pair, settings) == ([] if committed[-1] else [1], [])
        assert contents(folder) == whole
        shutil.rmtree(folder)
        if ended == 0:
            break
    # Two calls for every file, one for every folder.
    assert len(committed) == (3 + 3 if form == "npz" else 9 + 3) + 1
    assert committed == sorted(committed)
    assert not committed[0]
    assert committed[-1]


def test_an_interrupt_between_rounds_keeps_whole_shards(tmp_path, pair, monkeypatch):
    whole = tmp_path / "whole"
    assert draw(whole, pair) == ([0, 1, 2], [])
    commit, parts = SampleFolder.commit, tmp_path / "parts"

    def interrupted(self, shard, *arguments):
        commit(self, shard, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SampleFolder, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(parts, pair)
    monkeypatch.undo()
    assert SampleFolder.open(parts).recorded() == [0]
    assert draw(parts, pair) == ([1, 2], [])
    assert contents(parts) == contents(whole)
    assert draw(parts, pair) == ([], [])


def damages(folder: Path) -> dict[str, tuple]:
    shards = folder / "shards"

    def edit(name, change):
        path = shards / name
        path.write_bytes(change(path.read_bytes()))

    def swap():
        one, other = (shards / f"shard-00000{n}.json" for n in (0, 1))
        kept = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(kept)

    def record(change):
        value = json.loads((shards / "shard-000001.json").read_text())
        change(value)
        (shards / "shard-000001.json").write_text(json.dumps(value))

    return {
        "cut": (lambda: edit("shard-000001.npz", lambda data: data[:-90]), [1], "npz is damaged"),
        "one bit": (
            lambda: edit("shard-000001.npz", lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:]),
            [1],
            "npz is damaged",
        ),
        "gone": (lambda: (shards / "shard-000001.npz").unlink(), [1], "npz is gone"),
        "no record": (lambda: (shards / "shard-000001.json").unlink(), [1], "it has no record"),
        "cut record": (lambda: edit("shard-000001.json", lambda data: data[:-9]), [1], "its record is damaged"),
        "empty record": (lambda: edit("shard-000001.json", lambda data: b""), [1], "its record is damaged"),
        "swapped records": (swap, [0, 1], "its record is damaged or of another set"),
        "other set": (lambda: record(lambda r: r.update(set="0" * 64)), [1], "of another set"),
        "other path": (lambda: record(lambda r: r.update(files={"/etc/passwd": "0" * 64})), [1], "its record"),
        "NaN": (lambda: record(lambda r: r["bias"].__setitem__(0, float("nan"))), [1], "its record is damaged"),
        "huge": (lambda: record(lambda r: r["rounds"].__setitem__(0, 10**400)), [1], "its record is damaged"),
        "deep": (lambda: edit("shard-000001.json", lambda data: b"[" * 100_000), [1], "its record is damaged"),
    }


def test_whatever_is_damaged_is_named_and_drawn_again(tmp_path, pair, capsys):
    draw(tmp_path / "set", pair)
    whole = contents(tmp_path / "set")
    for name, (damage, shards, message) in damages(tmp_path / "set").items():
        damage()
        with pytest.raises(ValueError, match=f"must be complete, got {len(shards)} of 3 shards missing"):
            open_images(tmp_path / "set")
        assert capsys.readouterr().err == ""
        assert draw(tmp_path / "set", pair) == (shards, []), name
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == len(shards)
        assert all(f"shard {shard} of" in line for shard, line in zip(shards, lines, strict=True)), name
        assert all("is drawn again: " in line and message in line for line in lines), name
        assert contents(tmp_path / "set") == whole, name
    # An undamaged set is left alone and nothing is said.
    assert draw(tmp_path / "set", pair) == ([], [])
    assert capsys.readouterr().err == ""


def test_a_shard_of_another_seed_does_not_slip_in(tmp_path, pair):
    """Its record and its hashes agree with one another, but not with the set."""
    draw(tmp_path / "a", pair)
    draw(tmp_path / "b", pair, replace(TINY, seed=6))
    for ending in ("json", "npz"):
        shutil.copy(tmp_path / "b" / "shards" / f"shard-000001.{ending}", tmp_path / "a" / "shards")
    assert draw(tmp_path / "a", pair) == ([1], [])


def test_ranks_share_the_shards_and_draw_the_same_images(tmp_path, pair, monkeypatch):
    draw(tmp_path / "one", pair)
    assert draw(tmp_path / "two", pair, rank=1, world_size=2) == ([1], [0, 2])
    assert not (tmp_path / "two" / "SHA256SUMS").exists()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert draw(tmp_path / "two", pair) == ([0, 2], [])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_images_do_not_depend_on_shards_or_form_but_on_the_seed(tmp_path, pair):
    others = {
        "same": {},
        "shards": {"shard": 7},
        "slots": {"max_slots": 2},
        "png": {"format": "png"},
        "seed": {"seed": 6},
    }
    for name, change in others.items():
        draw(tmp_path / name, pair, replace(TINY, **change))
    found = {name: pixels_of(tmp_path / name).astype(int) for name in others}
    # One level, where batches of another shape round differently.
    assert np.abs(found["same"] - found["shards"]).max() <= 1
    assert np.abs(found["same"] - found["slots"]).max() <= 1
    np.testing.assert_array_equal(found["same"], found["png"])
    same, png, seed = (SampleFolder.open(tmp_path / name).image_hashes() for name in ("same", "png", "seed"))
    assert same == png
    # Negative control.
    assert not set(same) & set(seed)
    assert len(set(same)) == TINY.num


def test_png_sets_are_folders_of_png(tmp_path, pair):
    draw(tmp_path, pair, replace(TINY, format="png"))
    plain, drawn = PngSet(tmp_path / "images"), open_images(tmp_path)
    np.testing.assert_array_equal(plain.labels, drawn.labels)
    np.testing.assert_array_equal(*(np.concatenate(list(one.batches(4))) for one in (plain, drawn)))
    assert Image.open(tmp_path / "images" / "00000009.png").size == (8, 8)
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=False)
    assert done.returncode == 0
    (tmp_path / "images" / "labels.txt").write_text("0\n")
    assert draw(tmp_path, pair, replace(TINY, format="png")) == ([], [])
    assert (tmp_path / "images" / "labels.txt").read_text().split() == list("0123456789")


def test_sets_of_other_settings_or_weights_are_not_mixed(tmp_path, pair):
    draw(tmp_path, pair)
    with pytest.raises(ValueError, match=r"must hold a sample set of the same settings, got seed 5 \(now 6\)"):
        draw(tmp_path, pair, replace(TINY, seed=6))
    with pytest.raises(ValueError, match="got format 'npz'"):
        draw(tmp_path, pair, replace(TINY, format="png"))
    other, drafter = load_bundled("digits")
    with torch.no_grad():
        next(other.module.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="got model_sha256"):
        draw(tmp_path, (other, drafter))
    whole = (tmp_path / "manifest.json").read_text()
    for text, message in (
        (whole[:-20], "must be JSON"),
        ("[]", "must be a JSON object, got list"),
        ('{"kind": "cat"}', "must be of kind 'free_dit sample set', got 'cat'"),
        (whole.replace('"seed"', '"sown"'), "must be whole, got one without seed"),
        (whole.replace('"num": 10', '"num": 0'), "num must be an int"),
        (whole.replace('"num": 10', '"num": "ten"'), "num must be an int"),
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises((ValueError, TypeError), match=message):
            open_images(tmp_path)


def full_after(calls: int, monkeypatch) -> None:
    """A disk that takes so many files."""
    fsync, left = os.fsync, iter(range(calls))

    def sync(handle):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(files_module.os, "fsync", sync)


@pytest.mark.parametrize("form", ["npz", "png"])
def test_a_disk_that_fills_loses_nothing(tmp_path, pair, monkeypatch, form):
    settings = replace(TINY, format=form)
    draw(tmp_path / "whole", pair, settings)
    whole, kept, messages = contents(tmp_path / "whole"), set(), []
    for calls in range(0, 40, 3):
        full_after(calls, monkeypatch)
        try:
            draw(tmp_path / "job", pair, settings)
        except OSError as error:
            messages.append(str(error))
        monkeypatch.undo()
        if (tmp_path / "job" / "manifest.json").exists():
            now = set(SampleFolder.open(tmp_path / "job").recorded())
            assert kept <= now
            kept = now
            assert not list((tmp_path / "job").glob(".rank*"))
            assert not list((tmp_path / "job").rglob("*.tmp"))
    assert kept == {0, 1, 2}
    assert contents(tmp_path / "job") == whole
    names = r"manifest.json|shards|images|labels.txt|shard-\d{6}.(npz|json)|\d{8}.png|SHA256SUMS|job"
    for message in messages:
        pattern = rf"generate: .*/({names}) must be writable, got No space left on device; \d of 3 shards are kept"
        assert re.match(pattern, message), message


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.fixture
def command(monkeypatch):
    """The command in this process."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["free_dit", "generate", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stopped:
            return stopped.code
        return 0

    return run


def test_a_full_disk_on_the_command_line(small_disk, command, capsys):
    """A file system that is full in earnest."""
    job = ("--num", 30, "--steps", 3, "--draft-length", 3, "--shard", 4, "--out", small_disk / "set")
    (small_disk / "other").write_bytes(bytes(32 * 1024))
    assert command(*job) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: generate: .*/shards/shard-.* must be writable, got No space left on device; \d of 8", last)
    kept = SampleFolder.open(small_disk / "set").recorded()
    assert kept
    assert [SampleFolder.open(small_disk / "set").problem(shard) for shard in kept] == [None] * len(kept)
    (small_disk / "other").unlink()
    if command(*job):
        # The set itself may be too large for the disk; then more of it is kept.
        assert len(SampleFolder.open(small_disk / "set").recorded()) > len(kept)
    else:
        assert f"{8 - len(kept)} of 8 shards now" in capsys.readouterr().out


def test_a_folder_that_may_not_be_written(tmp_path, pair, monkeypatch, command, capsys):
    def refused(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a temporary name")

    draw(tmp_path / "set", pair, replace(TINY, num=8))
    draw(tmp_path / "set2", pair)
    (tmp_path / "set2" / "shards" / "shard-000002.json").unlink()
    before = contents(tmp_path / "set2")
    monkeypatch.setattr(files_module.os, "replace", refused)
    with pytest.raises(
        PermissionError, match=r"shard-000002.npz must be writable, got Permission denied; 2 of 3 shard"
    ):
        draw(tmp_path / "set2", pair)
    monkeypatch.undo()
    before.pop("SHA256SUMS")
    assert contents(tmp_path / "set2") == before
    assert command("--num", 4, "--steps", 6, "--out", "/proc/none/x") == 2
    assert "error: generate: folder must be a writable file path, got /proc/none/x" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert command("--num", 4, "--steps", 6, "--out", tmp_path / "file") == 2


def test_two_jobs_do_not_draw_into_one_folder(tmp_path, pair):
    import fcntl

    draw(tmp_path, pair)
    (tmp_path / ".rank-0").mkdir()
    with (tmp_path / ".rank-0" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="must be drawn by one job at a time"):
            draw(tmp_path, pair)
        (tmp_path / ".rank-0" / "shard-000000.npz").touch()
        # A job on fewer ranks than one that was killed tidies up after the ranks that are not there any more.
        (tmp_path / ".rank-3").mkdir()
        (tmp_path / ".rank-3" / "shard-000003.npz").touch()
        assert draw(tmp_path, pair, rank=1, world_size=2) == ([], [])
        assert [path.name for path in tmp_path.glob(".rank*")] == [".rank-0"]
    assert draw(tmp_path, pair) == ([], [])
    assert not list(tmp_path.glob(".rank*"))


def test_what_a_set_says_of_its_sampling(tmp_path, pair):
    draw(tmp_path / "speculative", pair)
    target, _ = pair
    generate(tmp_path / "ordinary", target, None, replace(TINY, drafter=None))
    found = SampleFolder.open(tmp_path / "ordinary").sampling_statistics()
    assert found == {"call_reduction": 1.0, "acceptance": None, "rows_per_step": 1.0, "bias_bound": 0.0}
    found = SampleFolder.open(tmp_path / "speculative").sampling_statistics()
    assert 1 <= found["call_reduction"] <= 3
    assert 0 <= found["acceptance"] <= 1


@pytest.mark.parametrize("form", ["npz", "png"])
def test_a_set_grows_and_keeps_what_it_has(tmp_path, pair, form):
    # Without drafts no image hangs on an acceptance in a near-tie, so that sets cut elsewhere can be compared.
    small, pair = replace(TINY, format=form, drafter=None, draft_length=1), (pair[0], None)
    draw(tmp_path / "set", pair, small)
    files = [path for path in (tmp_path / "set").rglob("*") if path.suffix in (".npz", ".png")]
    before = {path: path.stat().st_mtime_ns for path in files}
    held, pixels = {path: path.read_bytes() for path in before}, pixels_of(tmp_path / "set")
    assert len(before) == (10 if form == "png" else 3)
    for num, shards in ((17, 5), (18, 6)):
        done, missing = draw(tmp_path / "set", pair, replace(small, num=num))
        assert (missing, len(done)) == ([], shards - len(range(0, 10, 4)) - (num == 18) * 2)
        # The same files, not only the same pixels.
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert {path: path.read_bytes() for path in before} == held
        samples = SampleFolder.open(tmp_path / "set")
        starts = [samples.images_of(shard).start for shard in range(samples.shards)]
        assert starts == [0, 4, 8, 10, 14, 17][:shards]
        assert len(samples.image_hashes()) == num
        grown = pixels_of(tmp_path / "set")
        assert np.array_equal(grown[:10], pixels)
        assert open_images(tmp_path / "set").labels.tolist() == [i % 10 for i in range(num)]
        sums = (tmp_path / "set" / "SHA256SUMS").read_text().splitlines()
        assert len(sums) == (num if form == "png" else shards)
    # New images are those that a set of this size would have; its shards are cut elsewhere: they may round otherwise.
    draw(tmp_path / "whole", pair, replace(small, num=18))
    assert np.abs(grown.astype(int) - pixels_of(tmp_path / "whole")).max() <= 1
    # Asked for once more there is nothing to do.
    assert draw(tmp_path / "set", pair, replace(small, num=18)) == ([], [])
    if form == "png":
        assert (tmp_path / "set" / "images" / "labels.txt").read_text().split() == [str(i % 10) for i in range(18)]


def test_a_grown_set_is_mended_and_goes_on_as_any_other(tmp_path, pair):
    draw(tmp_path / "set", pair)
    larger = replace(TINY, num=17)
    assert draw(tmp_path / "set", pair, larger, rank=0, world_size=2) == ([4], [3])
    # Not complete: there are no sums, and nothing reads it.
    assert not (tmp_path / "set" / "SHA256SUMS").exists()
    with pytest.raises(ValueError, match="must be complete, got 1 of 5 shards missing"):
        open_images(tmp_path / "set")
    assert draw(tmp_path / "set", pair, larger) == ([3], [])
    whole = contents(tmp_path / "set")
    (tmp_path / "set" / "shards" / "shard-000002.npz").write_bytes(b"x")
    assert draw(tmp_path / "set", pair, larger) == ([2], [])
    assert contents(tmp_path / "set") == whole


def test_what_a_set_cannot_grow_to(tmp_path, pair):
    draw(tmp_path / "set", pair)
    whole = contents(tmp_path / "set")
    with pytest.raises(ValueError, match="same settings, got num 10 .now 9."):
        draw(tmp_path / "set", pair, replace(TINY, num=9))
    with pytest.raises(ValueError, match="same settings, got num 10 .now 12., seed 5 .now 6."):
        draw(tmp_path / "set", pair, replace(TINY, num=12, seed=6))
    assert contents(tmp_path / "set") == whole
    manifest = tmp_path / "set" / "manifest.json"
    for ends in ([10], [0], [-1], ["5"], [6, 5], [11]):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"grown_from": ends}))
        with pytest.raises((ValueError, TypeError), match="grown_from must be an int in"):
            open_images(tmp_path / "set")


def test_latents_need_a_decoder(tmp_path, pair):
    target = types.SimpleNamespace(latent_shape=(4, 8, 8), num_classes=10)
    with pytest.raises(ValueError, match="decode must be given for a target of 4 latent channels"):
        generate(tmp_path, target, None, TINY)
    generate(tmp_path, *pair, TINY, decode=lambda samples: samples.repeat(1, 3, 2, 2))
    assert pixels_of(tmp_path).shape == (10, 16, 16, 3)
    with pytest.raises(ValueError, match=r"decode must be a function to \[4, 1 or 3, H, W\]"):
        generate(tmp_path / "a", *pair, TINY, decode=lambda samples: samples[:, 0])
    with pytest.raises(FloatingPointError, match="decoded images must be finite"):
        generate(tmp_path / "b", *pair, TINY, decode=lambda samples: samples * float("nan"))
    assert SampleFolder.open(tmp_path / "b").recorded() == []


def test_a_shard_with_a_nan_is_not_kept(tmp_path, pair):
    target, drafter = load_bundled("digits")
    features, calls = target.features, []

    def spoiled(x, t, y):
        calls.append(1)
        return features(x, t, y) * (float("nan") if len(calls) > 6 else 1)

    facade = types.SimpleNamespace(
        **{name: getattr(target, name) for name in ("latent_shape", "feature_shape", "num_classes", "learns_variance")},
        features=spoiled,
        head=target.head,
        device=torch.device("cpu"),
    )
    with pytest.raises(FloatingPointError, match=r"at step \d of image \d \(counted from image [48] of the set\)"):
        generate(tmp_path, facade, drafter, TINY)
    assert 1 <= len(SampleFolder.open(tmp_path).recorded()) < 3


def test_the_command(tmp_path, command, capsys):
    assert command("--num", 9, "--steps", 4, "--draft-length", 2, "--shard", 4, "--out", tmp_path) == 0
    out, err = capsys.readouterr()
    assert re.search(r"wrote 9 images, 3 of 3 shards now and here, .*call reduction \d", out)
    assert "9/9" in err
    assert "img" in err
    for wrong, message in (
        (("--num", 0), "generate: num must be an int in [1, inf), got 0"),
        (("--device", "abacus"), "generate: device must be 'auto' or a torch device, got 'abacus'"),
        (("--num", 3, "--model", "none"), "path must be an existing file"),
        (("--num", 9, "--steps", 4, "--draft-length", 2, "--seed", 1), "must hold a sample set of the same settings"),
    ):
        assert command("--out", tmp_path, *wrong) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
