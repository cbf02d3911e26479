"""Cost of ``final_layer`` on the CPU: a DiT's head in one call, and made of its parts.

FLOP: of the matrix product. Run with ``pytest benchmarks/ops/bench_final_layer.py --benchmark-only``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from free_kernels import extension
from free_kernels.ops.final_layer import FinalLayerArguments, final_layer

pytestmark = pytest.mark.usefixtures("one_thread")
# Side of the grid, width, values of a token in patches of 2 by 2: the bundled digits, DiT-XL/2 at 256 pixels.
DIGITS, XL = (4, 64, 8), (16, 1152, 32)
SIZES = [
    pytest.param(1, DIGITS, id="digits-1"),
    pytest.param(6, DIGITS, id="digits-6"),
    pytest.param(64, DIGITS, id="digits-64"),
    pytest.param(6, XL, id="xl-6"),
]


@pytest.mark.parametrize("rival", ["reference", "ours"])
@pytest.mark.parametrize(("rows", "shape"), SIZES)
def test_final_layer(measure: Callable[..., None], rows: int, shape: tuple[int, int, int], rival: str) -> None:
    """A head; the reference calls its parts, as targets do on other devices."""
    if rival == "ours" and not extension.has_extension():
        pytest.skip(extension.why_no_extension())
    side, width, values = shape
    table = torch.randn(250, 2, 1, width), torch.arange(250), torch.zeros(10, dtype=torch.int64)
    pairs = torch.arange(rows) % 250, torch.arange(rows) % 10
    layer = torch.randn(values, width), torch.randn(values)
    given = FinalLayerArguments(torch.randn(rows, side**2, width), *table, *pairs, *layer, 1e-6, side, 2, 2)
    backend = "extension" if rival == "ours" else rival
    products = rows * side**2 * values
    with torch.no_grad():
        measure(
            lambda: final_layer(given, backend),
            device="cpu",
            op="final_layer",
            case=f"{rows} rows of {side**2} x {width}",
            backend=backend,
            ours=rival == "ours",
            dtype=torch.float32,
            moved=given.h.nbytes + 4 * products + sum(part.nbytes for part in layer),
            flops=2 * products * width,
            iterations=1 if rows * width > 1 << 12 else 20,
            params={"rows": rows, "tokens": side**2, "width": width, "values": values},
        )
