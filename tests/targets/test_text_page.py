"""The examples of docs/text-to-image.md run as they stand, and its figures are the measured ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.sampler.bench_text_to_image import forecasts_table
from free_dit.markdown import filled

PAGE = Path(__file__).resolve().parents[2] / "docs" / "text-to-image.md"

pytest.importorskip("diffusers")
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs the source checkout")


def test_figures_are_the_measured_ones():
    page, figures = PAGE.read_text(), json.loads((PAGE.with_suffix("") / "figures.json").read_text())
    assert filled(page, "forecasts", forecasts_table(figures["forecasts"])) == page
    assert f"```\n{figures['ten_steps_timed']['verdict']}\n```" in page
    times = figures["ten_steps_timed"]["costs"]["target"]
    assert f"A call of six rows took {times['6'] / times['1']:.1f} times as long" in page
    texts = figures["texts"]
    for name in ("one_token", "texts", "once", "rows"):
        assert f"| {texts[name] / 1e6:,.1f} |" in page
    assert f"| {texts['ratio']:.3f} |" in page
    assert f"| {texts['ratio_of_rows']:.1f} |" in page
    (ten,) = (row for row in figures["forecasts"] if (row["network"], row["steps"]) == ("random SD3", 10))
    assert f"of the random transformer at K = 10 delta is\n{min(gap for _, gap in ten['gap']):.0f} or more" in page


def test_examples_run():
    """In one namespace, in order; each ends with images of its family."""
    torch.manual_seed(0)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    shapes = []
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
        shapes.append(tuple(names["result"].samples.shape))
        assert bool(names["result"].samples.isfinite().all())
    assert shapes[:4] == [(3, 4, 8, 8), (2, 4, 8, 8), (2, 4, 8, 12), (2, 4, 8, 8)]
    assert names["mix_grpo"].window == (2, 6)
    assert names["found"].num_steps == 10
