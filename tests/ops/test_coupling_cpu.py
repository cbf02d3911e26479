"""``couple`` and ``couple_block`` in C++ against the reference: values, threads, layouts of memory, refusals."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import triton_worker_coupling as worker
from coupling_calls import call, needs_extension
from safetensors.torch import load_file, save_file
from torch import Tensor

from free_kernels import extension
from free_kernels.ops.coupling import Coupling, couple, couple_block, couple_philox

BOTH = {"tensors": couple, "block": couple_block}
both = pytest.mark.parametrize("variant", BOTH)
EVERYTHING = {"learned": True, "guidance": (4.0, 2), "clip": 1.0, "relaxed": True}


def run(made: worker.Round, variant: str, backend: str = "extension", **changes: Any) -> Coupling:
    return call(BOTH[variant], made.given, backend=backend, **changes)


def bits(outcome: Coupling) -> list[bytes]:
    return [part.numpy().tobytes() for part in outcome]


@needs_extension
@pytest.mark.parametrize("variant", worker.RUNS)
@pytest.mark.parametrize("name", worker.BY_NAME)
def test_agrees_with_the_reference(name, variant):
    made = worker.make(worker.BY_NAME[name])
    assert worker.compare(worker.RUNS[variant](made, "extension"), made, variant) == []


@needs_extension
@pytest.mark.parametrize(
    ("case", "variant"), [(case, variant) for variant, cases in worker.VARIANTS.items() for case in cases], ids=str
)
def test_error_is_at_most_twice_the_references(case, variant):
    """That of a sum of rounded terms; how the terms' own roundings compare is beside them in coupling_rows.cpp."""
    for output, quotients in worker.precision(case, variant, backend="extension").items():
        assert max(quotients) <= 2, output


@needs_extension
def test_products_that_overflow_are_refused_as_by_the_reference():
    assert worker.check_overflow(backend="extension") == []


@needs_extension
def test_the_comparison_finds_planted_faults():
    for name, found in worker.controls("extension").items():
        assert found, name


# Blocks of 256 elements are left unfilled, filled and overrun; lanes of 8 likewise.
SIDES = {1: (1, 1), 2: (16, 8), 3: (3, 5), 4: (9, 29)}


@needs_extension
@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("guided", [None, "some", "all"])
def test_every_combination(variant, dtype, learned, guided):
    """Slots, lengths (idle and ragged ones), channels, clipping and relaxation."""
    lengths = ((1,), (12,), (1, 0, 1), (12, 0, 5))
    for seed, (rows, channels, clip, relaxed) in enumerate(
        itertools.product(lengths, SIDES, (math.inf, 0.7), (False, True))
    ):
        channels_guided = channels if guided == "all" else channels // 2
        case = worker.Case(
            "",
            lengths=rows,
            latent=(channels, *SIDES[channels]),
            learned=learned,
            guidance=None if guided is None else (1.5, channels_guided),
            clip=clip,
            relaxed=relaxed,
            gap=0.4,
            output=dtype,
            seed=seed,
        )
        made = worker.make(case)
        assert worker.compare(run(made, variant), made, variant) == [], case


def scattered(value: object) -> object:
    """The same tensor with gaps between its elements and its dimensions in another order in memory."""
    if not isinstance(value, Tensor):
        return value
    wide = value.new_full((*value.shape[::-1], 2), 7)
    wide[..., 0] = value.permute(*range(value.ndim)[::-1])
    return wide[..., 0].permute(*range(value.ndim)[::-1])


@needs_extension
@both
def test_memory_in_any_order(variant):
    made = worker.make(worker.Case("", **EVERYTHING, seed=3))
    other = dataclasses.replace(made, given=type(made.given)(*map(scattered, made.given)))
    assert not other.given.noise.is_contiguous()
    assert not other.given.output.is_contiguous()
    assert bits(run(other, variant)) == bits(run(made, variant))


@needs_extension
def test_one_deviation_for_all_elements():
    """As a schedule's fixed variance has it: expanded, not stored."""
    made = worker.make(worker.Case("", seed=4))
    std = made.given.draft_std[:, :, :1, :1, :1].expand_as(made.given.draft_std)
    assert bits(run(made.changed(draft_std=std), "tensors")) == bits(
        run(made.changed(draft_std=std.contiguous()), "tensors")
    )


@needs_extension
@both
def test_a_wide_output(variant):
    """float64 is rounded to float32, as the reference does."""
    made = worker.make(worker.Case("", **EVERYTHING, seed=5))
    assert bits(run(made, variant, output=made.given.output.double())) == bits(run(made, variant))


@needs_extension
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_rows_behind_a_refusal_do_not_matter(learned, value):
    made = worker.make(worker.Case("", lengths=(4, 4, 3), learned=learned, seed=6))
    # The second row of each slot is refused, whatever the uniform of the first says.
    offsets = made.given.row_offsets[:-1]
    made.given.draft_mean[:, 1] += 50 * made.given.draft_std[:, 1]
    before = run(made, "tensors")
    assert bool((before.committed <= 2).all())
    for slot in range(3):
        made.given.output[offsets[slot] + 2] = value
        made.given.draft_mean[slot, 2:] = value
        made.given.noise[slot, 2:] = value
    after = run(made, "tensors")
    assert bits(after)[:2] == bits(before)[:2]
    assert torch.equal(after.gap_sq[:, :2], before.gap_sq[:, :2])


@needs_extension
@both
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("field", ["output", "draft_mean", "draft_std"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, 1e20])
def test_values_that_are_not_numbers_are_met_as_by_the_reference(variant, learned, field, value):
    """In one element of a row: the same decision, and a state that shows it where the target's has it."""
    made = worker.make(worker.Case("", lengths=(5, 5), learned=learned, gap=0.1, seed=7))
    spoilt = getattr(made.given, field).clone()
    if field == "output":
        spoilt[made.given.row_offsets[:2] + 1, 0, 0, 0] = value
    else:
        spoilt[:, 1, 0, 0, 0] = value
    got, want = (run(made, variant, backend, **{field: spoilt}) for backend in ("extension", "reference"))
    assert torch.equal(got.committed, want.committed)
    # Without learned variances a draft of infinite deviation has no gap in its units.
    assert bool((got.committed <= 2).all()) or (field == "draft_std" and not learned)
    assert torch.equal(got.next_states.isfinite(), want.next_states.isfinite())


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_extension
@both
@pytest.mark.parametrize(
    ("lengths", "latent"),
    [((6,), (4, 64, 64)), ((6, 0, 3), (4, 51, 47)), ((6, 5, 4, 3) * 16, (4, 16, 16)), ((6,) * 7, (3, 65, 65))],
)
def test_threads_do_not_matter(variant, lengths, latent, threads):
    """Rows are cut where their size says, not where the number of threads does."""
    made = worker.make(worker.Case("", lengths=lengths, latent=latent, **EVERYTHING, gap=0.3, spread=1e-3, seed=8))
    outcomes = []
    for count in (1, 2, 3):
        threads(count)
        outcomes.append(bits(run(made, variant)))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert worker.compare(run(made, variant), made, variant) == []


@needs_extension
@both
def test_calls_at_once(variant):
    """Python threads that call with their own arguments get what each would alone."""
    rounds = [
        worker.make(worker.Case("", lengths=lengths, latent=latent, **EVERYTHING, gap=0.3, spread=1e-3, seed=seed))
        for seed, (lengths, latent) in enumerate(
            itertools.product(((6,), (3, 0, 6, 1)), ((2, 8, 8), (4, 40, 40), (4, 64, 64)))
        )
    ]
    alone = [bits(run(made, variant)) for made in rounds]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            assert list(pool.map(lambda made: bits(run(made, variant)), rounds)) == alone


ANSWER = """
import sys
from safetensors.torch import load_file, save_file
from free_kernels import ops
held, answers = load_file(sys.argv[1]), {}
for name in ("couple", "couple_block"):
    settings = {"guidance_scale": 4.0, "guidance_channels": 2, "clip": 1.0, "backend": "extension"}
    for part, value in getattr(ops, name)(**held, **settings)._asdict().items():
        answers[f"{name} {part}"] = value
save_file(answers, sys.argv[2])
"""


@needs_extension
def test_a_cpu_without_avx2_decides_the_same(tmp_path):
    """PyTorch's own switch also keeps the ops to the vectors that every CPU of a kind has."""
    case = worker.Case("", lengths=(6, 0, 4), latent=(4, 21, 17), **EVERYTHING | {"relaxed": False}, gap=0.3, seed=14)
    made = worker.make(case)
    paths = [str(tmp_path / name) for name in ("given", "answers")]
    given = {name: value for name, value in made.given._asdict().items() if isinstance(value, Tensor)}
    save_file({name: value.contiguous() for name, value in given.items()}, paths[0])
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", ANSWER, *paths], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    answers = load_file(paths[1])
    for variant, op in BOTH.items():
        parts = [answers[f"{op.__name__} {part}"] for part in run(made, variant)._fields]
        assert worker.compare(Coupling(*parts), made, variant) == []


@needs_extension
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("op", ["couple_cpu", "couple_block_cpu"])
def test_the_ops_pass_opcheck(op, learned):
    made = worker.make(worker.Case("", learned=learned, guidance=(2.0, 2), seed=9))
    torch.library.opcheck(getattr(torch.ops.free_kernels, op).default, made.given)


def wrong(made: worker.Round) -> list[dict[str, Any]]:
    """Changes of a learned and guided round that every backend refuses."""
    given = made.given
    return [
        {"draft_states": given.draft_states[0]},
        {"draft_states": None},
        {"draft_states": given.draft_states[:, :0]},
        {"draft_mean": given.draft_mean[:, 1:]},
        {"draft_std": None},
        {"noise": given.noise.double()},
        {"noise": given.noise.to("meta")},
        {"slack_noise": None},
        {"slack_noise": given.slack_noise[..., 1:]},
        {"uniform": given.uniform[:1]},
        {"uniform": [1.0]},
        {"output": given.output[:, :5]},
        {"output": given.output[1:]},
        {"output": given.output[..., 1:]},
        {"output": given.output[0]},
        {"row_offsets": given.row_offsets.int()},
        {"row_offsets": given.row_offsets[1:]},
        {"columns": given.columns[..., 1:]},
        {"relaxation": given.uniform.half()},
        {"relaxation": given.uniform[1:]},
        {"guidance_channels": 4},
        {"guidance_channels": -1},
    ]


CHANGES = len(wrong(worker.make(worker.Case("", **EVERYTHING))))


@needs_extension
@pytest.mark.parametrize("number", range(CHANGES))
def test_wrong_arguments_are_named_as_by_the_reference(number):
    made = worker.make(worker.Case("", **EVERYTHING))
    change, errors = wrong(made)[number], []
    for backend in ("reference", "extension", "auto"):
        with pytest.raises((TypeError, ValueError), match=r"^couple: \w+ must be .*, got ") as raised:
            run(made, "tensors", backend, **change)
        errors.append((raised.type, str(raised.value)))
    assert errors[0] == errors[1] == errors[2]
    assert errors[0][1].startswith(f"couple: {next(iter(change))} ")


@needs_extension
@both
@pytest.mark.parametrize("offsets", [(0, 3, 6, 12), (-1, 2, 4, 6), (5, 2**62, 3, 6), (-(2**63), 2**62, 3, 6)])
def test_rows_outside_of_the_output_are_not_read(variant, offsets):
    made = worker.make(worker.Case("", lengths=(3, 3, 3), seed=10))
    output = made.given.output[:6]
    with pytest.raises(ValueError, match=r"must give slot \d some of the 6 rows, got \["):
        run(made, variant, output=output, row_offsets=torch.tensor(offsets))


@needs_extension
@both
def test_an_output_of_integers_is_refused(variant):
    made = worker.make(worker.Case("", seed=10))
    with pytest.raises(TypeError, match="output must be floating point .*, got int32"):
        run(made, variant, output=made.given.output.int())


def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {(f"{op}_cpu", "cpu"): "it was not built" for op in ("couple", "couple_block")}
    monkeypatch.setattr(extension, "_kernels", known)


@pytest.mark.parametrize("op", [couple, couple_block, couple_philox])
def test_the_extension_by_name_never_falls_back(op: Callable[..., Coupling], monkeypatch: pytest.MonkeyPatch):
    without_extension(monkeypatch)
    made = worker.make(worker.Case("", seed=11))
    given = made.by_keys() if op is couple_philox else made.given
    with pytest.raises(RuntimeError, match=f"^{op.__name__}: backend 'extension' cannot be used: it was not built"):
        call(op, given, backend="extension")


@needs_extension
def test_auto_takes_the_extension_if_it_is_there(monkeypatch: pytest.MonkeyPatch):
    made = worker.make(worker.Case("", **EVERYTHING, seed=12))
    by_name = {backend: bits(run(made, "tensors", backend)) for backend in ("extension", "reference")}
    assert by_name["extension"] != by_name["reference"], "sums are added in another order"
    assert bits(run(made, "tensors", "auto")) == by_name["extension"]
    without_extension(monkeypatch)
    assert bits(run(made, "tensors", "auto")) == by_name["reference"]


@needs_extension
@both
def test_compiles_without_a_graph_break(variant):
    made = worker.make(worker.Case("", **EVERYTHING, seed=13))

    def step(given: Any) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(call(BOTH[variant], given, backend="extension"))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(made.given), step(made.given), strict=True):
        assert got.numpy().tobytes() == want.numpy().tobytes()
