"""The random ops in Triton against the reference: in the interpreter here, and on a GPU where there is one."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import triton_worker_random as worker

from free_kernels.ops.random import philox_normal, philox_uniform
from free_kernels.ops.random.reference import philox

OP = torch.ops.free_kernels.philox_fill
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") != "0", reason="TRITON_INTERPRET keeps kernels off it"),
]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """All cases in one process, to pay for its start once; the extension may not be needed."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "FREE_KERNELS_NO_EXT": "1"}
    command = [sys.executable, worker.__file__]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_interpreted_numbers_are_the_references(interpreted):
    assert interpreted["wrong"] == []


def test_interpreted_error_is_at_most_twice_eagers(interpreted):
    print(interpreted["precision"])
    assert max(interpreted["precision"]) <= 2


def test_the_comparison_finds_planted_faults(interpreted):
    assert interpreted["controls"] == {"purpose": True, "rounding": True}


@pytest.mark.parametrize("op", [philox_uniform, philox_normal])
def test_refuses_tensors_that_triton_cannot_take(op):
    keys = torch.arange(2)
    reason = "(it needs CUDA tensors|importing Triton failed)"
    with pytest.raises(RuntimeError, match=f"^{op.__name__}: backend 'triton' cannot be used: {reason}"):
        op(0, keys, keys, 0, 4, backend="triton")
    with pytest.raises(ValueError, match=f"^{op.__name__}: backend must be one of 'auto', .*'triton', got 'cuda'"):
        op(0, keys, keys, 0, 4, backend="cuda")


@pytest.mark.parametrize("normal", [False, True])
@pytest.mark.parametrize("rounds", [None, torch.arange(6)])
def test_the_op_passes_opcheck(rounds, normal):
    torch.library.opcheck(OP.default, (-5, torch.arange(6), torch.arange(6), 3, 10, rounds, normal))


def test_the_op_compiles_without_a_graph_break():
    keys = torch.arange(6)
    compiled = torch.compile(lambda images: OP(1, images, keys, 3, 10, None, True) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(keys), philox_normal(1, keys, keys, 3, 10, backend="reference") + 1)


def test_the_op_needs_no_extension():
    code = (
        "import torch, free_kernels; k = torch.arange(2); assert not free_kernels.extension.has_extension(); "
        "print(torch.ops.free_kernels.philox_fill(0, k, k, 0, 3, None, False).shape)"
    )
    environment = {**os.environ, "FREE_KERNELS_NO_EXT": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "torch.Size([2, 3])", result.stderr


@pytest.mark.parametrize(("rows", "numel"), [(1, 1), (6, 1), (512, 2), (3, 315), (6, 4096), (512, 16384), (1, 2**34)])
def test_launch_shape_fills_whole_warps(rows, numel):
    keys, blocks = pytest.importorskip("free_kernels.ops.random.triton_launch").launch_shape(rows, numel)
    assert keys * blocks in (32, 128)
    assert keys & (keys - 1) == blocks & (blocks - 1) == 0


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("numel", [*worker.NUMELS, 16384])
    def test_numbers_are_the_references(self, numel):
        for seed, with_rounds in itertools.product(worker.SEEDS, (False, True)):
            assert worker.compare(seed, numel, with_rounds, "cuda") == []

    def test_numbers_depend_on_their_key_alone(self):
        assert worker.single_keys("cuda") == []

    def test_error_is_at_most_twice_eagers(self):
        assert max(worker.precision("cuda")) <= 2

    def test_offsets_beyond_32_bits(self):
        keys = torch.tensor([3, 4], device="cuda")
        whole = philox_uniform(1, keys, keys, 2, 2**30 + 5, backend="triton")
        assert torch.equal(whole[1, :100], philox_uniform(1, keys[1:], keys[1:], 2, 100, backend="reference")[0])
        block = torch.full_like(keys[1:], 2**28)
        word = philox((block, keys[1:], keys[1:], torch.full_like(block, 2)), 1)[0]
        assert float(whole[1, 2**30]) == pytest.approx((int(word) + 0.5) / 2**32, rel=2**-23)

    def test_graph_capture_and_compilation_follow_their_inputs(self):
        keys = torch.arange(12, device="cuda")

        def draw(images: torch.Tensor) -> torch.Tensor:
            return philox_normal(2**63 + 1, images, keys, 1, 65, backend="triton")

        compiled = torch.compile(draw, fullgraph=True)
        held = keys.clone()
        draw(held)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = draw(held)
        held.copy_(keys + 2**33)
        graph.replay()
        assert torch.equal(captured, draw(keys + 2**33))
        assert torch.equal(compiled(held), captured)
        torch.library.opcheck(OP.default, (-5, keys, keys, 3, 10, None, True))
