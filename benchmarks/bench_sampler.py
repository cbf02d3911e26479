"""``sample`` against ``ancestral_sample`` on the bundled digits DiT: same target, dtype and machine.

The benchmark times one call of ``sample``; ``extra_info`` holds the wall-clock ratio of interleaved pairs with its
range, and the call reduction. Run with ``pytest benchmarks/bench_sampler.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from free_dit import load_bundled
from free_dit.compare import machine, wall_clock_ratio
from free_kernels import SampleResult, ancestral_sample, sample

CASES = [
    pytest.param(1, 4, 1.0, id="batch1-L4"),
    pytest.param(1, 6, 1.0, id="batch1-L6"),
    pytest.param(1, 8, 1.0, id="batch1-L8"),
    pytest.param(1, 6, 2.0, id="batch1-L6-guided"),
    pytest.param(8, 6, 1.0, id="batch8-L6"),
]


@pytest.mark.parametrize(("batch", "draft_length", "guidance"), CASES)
def test_sample(benchmark: Any, batch: int, draft_length: int, guidance: float) -> None:
    target, drafter = load_bundled("digits")
    labels = torch.arange(batch) % target.num_classes

    def ordinary(seed: int) -> SampleResult:
        return ancestral_sample(target, labels, guidance_scale=guidance, seed=seed)

    def speculative(seed: int) -> SampleResult:
        return sample(target, labels, drafter=drafter, draft_length=draft_length, guidance_scale=guidance, seed=seed)

    ratio = wall_clock_ratio(ordinary, speculative, batch, pairs=5)
    result = benchmark.pedantic(lambda: speculative(9), rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(
        {
            "ratio": round(ratio.median, 3),
            "ratio_range": [round(ratio.low, 3), round(ratio.high, 3)],
            "call_reduction": round(result.stats.call_reduction, 3),
            **machine(),
        }
    )
