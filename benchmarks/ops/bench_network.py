"""Cost of ``drafter_network`` on the CPU: one call, the network in parts, and its plain reference.

FLOP: of the matrix products and attention. Run with ``pytest benchmarks/ops/bench_network.py --benchmark-only``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from free_kernels import extension
from free_kernels.ops.network import NetworkArguments, drafter_network, network_in_parts

pytestmark = pytest.mark.usefixtures("one_thread")
# Tokens, features, inputs, width, heads: the bundled digits drafter; and one of 64 tokens.
DIGITS, WIDE = (16, 64, 76, 96, 3), (64, 384, 432, 384, 6)
SIZES = [
    pytest.param(1, DIGITS, id="digits-1"),
    pytest.param(6, DIGITS, id="digits-6"),
    pytest.param(64, DIGITS, id="digits-64"),
    pytest.param(1, WIDE, id="wide-1"),
    pytest.param(8, WIDE, id="wide-8"),
]


def random_network(rows: int, shape: tuple[int, int, int, int, int]) -> NetworkArguments:
    """A network of one block, its matrices stored by column as a drafter keeps them."""
    tokens, features, inputs, width, heads = shape

    def layer(outputs: int, given: int) -> list[torch.Tensor]:
        return [torch.randn(given, outputs).mT / given**0.5, torch.randn(outputs)]

    weights = [layer(width, inputs)[0], torch.randn(1, tokens, width)]
    for outputs, given in (
        (3 * width, width),
        (width, width),
        (4 * width, width),
        (width, 4 * width),
        (features, width),
    ):
        weights += layer(outputs, given)
    parts = torch.randn(rows, tokens, features), torch.randn(rows, tokens, inputs), torch.ones(rows, 9, width)
    return NetworkArguments(*parts, weights, heads, 1e-6)


@pytest.mark.parametrize("rival", ["reference", "parts", "ours"])
@pytest.mark.parametrize(("rows", "shape"), SIZES)
def test_drafter_network(
    measure: Callable[..., None], rows: int, shape: tuple[int, int, int, int, int], rival: str
) -> None:
    """A call of a drafter's network; "parts" is what it is made of on other devices."""
    if rival == "ours" and not extension.has_extension():
        pytest.skip(extension.why_no_extension())
    tokens, features, inputs, width, _ = shape
    given = random_network(rows, shape)
    runs = {
        "reference": lambda: drafter_network(given, "reference"),
        "parts": lambda: network_in_parts(given),
        "ours": lambda: drafter_network(given, "extension"),
    }
    products = width * (inputs + 12 * width + features) + 2 * tokens * width
    moved = sum(part.nbytes for part in (*given[:3], *given.weights)) + given.feature.nbytes
    with torch.no_grad():
        measure(
            runs[rival],
            device="cpu",
            op="drafter_network",
            case=f"{rows} rows of {tokens} x {width}",
            backend={"ours": "extension"}.get(rival, rival),
            ours=rival == "ours",
            dtype=torch.float32,
            moved=moved,
            flops=2 * rows * tokens * products,
            iterations=1 if rows * tokens * width > 1 << 16 else 20,
            params={"rows": rows, "tokens": tokens, "width": width},
        )
