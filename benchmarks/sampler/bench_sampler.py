"""``sample`` against ``ancestral_sample`` on the bundled digits DiT: same target, dtype and machine.

The figure is the wall-clock ratio of interleaved pairs with its range, beside the call reduction; on a GPU with and
without CUDA graphs, on both sides. Run with ``pytest benchmarks/sampler/bench_sampler.py --benchmark-only``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.report import store
from free_dit import load_bundled
from free_dit.experiments.wall_clock import wall_clock_ratio
from free_kernels import SampleResult, ancestral_sample, sample

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# Device, CUDA graphs, batch, draft length, guidance.
CASES = [
    pytest.param("cpu", False, 1, 4, 1.0, id="batch1-L4"),
    pytest.param("cpu", False, 1, 6, 1.0, id="batch1-L6"),
    pytest.param("cpu", False, 1, 8, 1.0, id="batch1-L8"),
    pytest.param("cpu", False, 1, 6, 2.0, id="batch1-L6-guided"),
    pytest.param("cpu", False, 8, 6, 1.0, id="batch8-L6"),
    *(
        pytest.param("cuda", graphs, batch, length, guidance, id=name + ("-graphs" if graphs else ""), marks=on_gpu)
        for batch, length, guidance, name in (
            (1, 6, 1.0, "cuda-batch1-L6"),
            (1, 12, 1.0, "cuda-batch1-L12"),
            (1, 6, 2.0, "cuda-batch1-L6-guided"),
            (64, 6, 1.0, "cuda-batch64-L6"),
        )
        for graphs in (False, True)
    ),
]


@pytest.mark.parametrize(("device", "graphs", "batch", "draft_length", "guidance"), CASES)
def test_sample(
    benchmark: Any,
    keeper: store.Keeper,
    quick: bool,
    device: str,
    graphs: bool,
    batch: int,
    draft_length: int,
    guidance: float,
) -> None:
    keeper.path(device)
    target, drafter = load_bundled("digits")
    target.module.to(device)
    drafter = drafter.to(device)
    labels = (torch.arange(batch) % target.num_classes).to(device)
    settings: dict[str, Any] = {"guidance_scale": guidance, "cuda_graphs": graphs}

    def ordinary(seed: int) -> SampleResult:
        return ancestral_sample(target, labels, seed=seed, **settings)

    def speculative(seed: int) -> SampleResult:
        return sample(target, labels, drafter=drafter, draft_length=draft_length, seed=seed, **settings)

    ratio = wall_clock_ratio(ordinary, speculative, batch, pairs=1 if quick else 5)
    result = benchmark.pedantic(lambda: speculative(9), rounds=1)
    entry = {"op": "sample", "batch": batch, "draft_length": draft_length, "guidance": guidance, "cuda_graphs": graphs}
    entry |= {"dtype": "float32", "threads": torch.get_num_threads(), "pairs": ratio.pairs}
    entry |= {"ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high}
    entry |= {"ordinary_s": ratio.ordinary_s, "speculative_s": ratio.speculative_s}
    entry |= {"call_reduction": result.stats.call_reduction}
    benchmark.extra_info.update(entry)
    keeper.keep(device, entry)
