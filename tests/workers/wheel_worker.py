"""Run by the Python of another torch: the compiled CPU ops of a package against its reference.

Arguments: the folder that holds the package, and a safetensors file with the tensors of every case as ``NUMBER.NAME``.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

site, cases = sys.argv[1:]
sys.path.insert(0, site)

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402

from free_kernels import extension  # noqa: E402
from free_kernels.ops.coupling import couple, couple_block  # noqa: E402
from free_kernels.ops.packing import commit_drafts, pack_drafts  # noqa: E402
from free_kernels.ops.random import philox_normal, philox_uniform  # noqa: E402

BACKENDS = ("reference", "extension")


def read(path: str) -> list[dict[str, Any]]:
    """Every case's arguments; ints are tensors without dimensions."""
    read_cases: dict[str, dict[str, Any]] = defaultdict(dict)
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            number, _, name = key.partition(".")
            tensor = file.get_tensor(key)
            read_cases[number][name] = tensor if tensor.ndim else int(tensor)
    return list(read_cases.values())


def check_case(case: dict[str, Any]) -> None:
    """Copies must agree in every bit."""
    if "states" in case:
        for got, want in zip(*(pack_drafts(**case, backend=backend) for backend in BACKENDS), strict=True):
            assert torch.equal(got, want)
        return
    copies = [{name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in case.items()} for _ in BACKENDS]
    for backend, arguments in zip(BACKENDS, copies, strict=True):
        commit_drafts(**arguments, backend=backend)
    for name in copies[0]:
        if isinstance(copies[0][name], torch.Tensor):
            assert torch.equal(copies[0][name], copies[1][name]), name


def check_random() -> None:
    """Uniform numbers agree in every bit, normal ones to the rounding of logarithm and cosine."""
    images, steps = torch.arange(7) * 1000003, torch.arange(7) * 17
    for seed in (0, 2**32, 2**64 - 1):
        for rounds in (None, torch.arange(7) * 2**20):
            draws = [philox_uniform(seed, images, steps, 3, 1030, rounds, backend=backend) for backend in BACKENDS]
            assert torch.equal(*draws)
            draws = [philox_normal(seed, images, steps, 3, 1030, rounds, backend=backend) for backend in BACKENDS]
            torch.testing.assert_close(*draws, rtol=1e-6, atol=2e-6)


def check_coupling() -> None:
    """The same decisions, and states and gaps to the rounding of sums; the target's mean is its output."""
    g = torch.Generator().manual_seed(0)
    states, noise, slack = torch.randn(3, 40, 4, 2, 9, 9, generator=g)
    output, uniform = torch.randn(160, 4, 9, 9, generator=g), 1 - torch.rand(40, 4, generator=g)
    columns = torch.zeros(40, 4, 8)
    columns[..., 1], columns[..., 3] = 1.0, 0.01
    mean = output[:, :2].unflatten(0, (40, 4))[:, :3] + 0.05 * torch.randn(40, 3, 2, 9, 9, generator=g)
    for given, drawn in ((output, slack), (output[:, :2].bfloat16(), None)):
        arguments = (states, mean, torch.ones_like(mean), noise, drawn, uniform, given, torch.arange(41) * 4, columns)
        for op in (couple, couple_block):
            got, want = (op(*arguments, backend=backend) for backend in reversed(BACKENDS))
            assert torch.equal(got.committed, want.committed)
            assert int(got.committed.unique().numel()) > 1
            torch.testing.assert_close(got.next_states, want.next_states, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(got.gap_sq, want.gap_sq, rtol=1e-4, atol=1e-4)


def check_refusal() -> None:
    """The ops' own words pass torch's C interface."""
    one, two = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    message = "nothing was refused"
    try:
        torch.ops.free_kernels.philox_uniform(0, one, two, 0, 4, None)
    except RuntimeError as error:
        message = str(error)
    assert "philox_uniform: steps must be Long [1] on cpu, got Long [2] on cpu" in message, message


assert Path(extension.__file__).is_relative_to(site), extension.__file__
assert extension.why_no_extension() is None, extension.why_no_extension()
compared = read(cases)
for arguments in compared:
    check_case(arguments)
check_random()
check_coupling()
check_refusal()
config = extension.build_config()
print(
    json.dumps(
        {
            "torch": torch.__version__,
            "built": config["torch"],
            "cases": len(compared),
            "cuda": config["cuda"],
            "why_no_cuda": extension.why_no_kernel("pack_drafts", "cuda"),
        }
    )
)
