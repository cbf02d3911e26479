"""Steps per call of text-to-image sizes, and bytes of texts: ``python -m benchmarks.sampler.bench_text_to_image``.

``--out docs/text-to-image`` writes ``figures.json`` and the table of the page beside it. Steps per call and bytes do
not depend on the machine but by rounding. Speeds do: one is measured here, of the transformer.

Two networks stand for trained ones, whose weights are not here: a closed form, the velocity of data that are 65,536
independent Gaussian numbers, and a small Stable Diffusion 3 transformer with random weights on latents of that size.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.sampler.live_bytes import LiveBytes
from free_dit.files import write_json
from free_dit.markdown import fill_page, table
from free_kernels import DDPMSchedule, FlowSDESchedule, PixArtTarget, RowCosts, SD3Target, feasibility, sample
from free_kernels.conditions import Conditions
from free_kernels.constants import TIME_TICKS

# Stable Diffusion 3 at 512 x 512.
LATENT = (16, 64, 64)
LENGTHS = (2, 3, 4, 6)
STEPS = (10, 28, 100, 1000)
# Times do not matter for steps per call: as if a call of any number of rows took as long as one of one row.
FREE_ROWS = RowCosts(target={1: 1.0, 32: 1.0})
IMAGES, TOKENS, WIDTH = 64, 300, 1152


class GaussianVelocity:
    """The velocity of data ``N(0, std^2)``, element by element, in closed form; the feature is the velocity itself."""

    family, num_train_steps, num_classes, learns_variance = "flow", TIME_TICKS, 1, False
    latent_shape, feature_shape = LATENT, (1024, 64)

    def __init__(self, std: float) -> None:
        self.variance = std**2

    def features(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """``E[data - noise | x]``, ``[R, T, D]``."""
        time = (t.double() / TIME_TICKS).view(-1, 1, 1, 1)
        slope = (time * self.variance - (1 - time)) / (time**2 * self.variance + (1 - time) ** 2)
        return (slope.float() * x).reshape(len(x), *self.feature_shape)

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """``[R, C, H, W]``."""
        return h.reshape(-1, *LATENT)


def random_sd3() -> tuple[SD3Target, dict[str, Tensor]]:
    """Four blocks of width 64 with random weights, and two texts."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    module = SD3Transformer2DModel(
        sample_size=64,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=32,
    )
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.1 if weight.ndim < 2 else weight[0].numel() ** -0.5)
    texts = {"prompt_embeds": torch.randn(2, 77, 128), "pooled_prompt_embeds": torch.randn(2, 64)}
    return SD3Target(module.eval().requires_grad_(False)), texts


def forecast(name: str, target: Any, steps: int, **conditions: Any) -> dict[str, Any]:
    """Steps per call that ``feasibility`` forecasts, and those of a run of the longest drafts."""
    schedule = schedule_of(steps)
    found = feasibility(
        target,
        schedule,
        draft_lengths=LENGTHS,
        probe_length=6,
        row_costs=FREE_ROWS,
        **conditions,
    )
    frozen = found.drafters["frozen"]
    labels = {} if conditions else {"class_labels": torch.zeros(2, dtype=torch.int64)}
    real = sample(target, schedule=schedule, draft_length=LENGTHS[-1], seed=1, **conditions, **labels).stats
    return {
        "network": name,
        "steps": steps,
        "steps_per_call": {one.draft_length: one.steps_per_call for one in frozen.lengths},
        "real": real.call_reduction,
        "gap": [[one.step, one.gap] for one in frozen.gaps if one.kind == "new"],
    }


def verdict(target: SD3Target, texts: dict[str, Tensor]) -> dict[str, Any]:
    """What ``feasibility`` says of ten steps of the transformer, with times measured here."""
    found = feasibility(target, schedule_of(10), conditions=texts, draft_lengths=LENGTHS, probe_length=6)
    return {"verdict": found.verdict, "pays": found.pays, "costs": found.costs.to_dict()}


def schedule_of(steps: int) -> FlowSDESchedule:
    """Flow-GRPO's steps with SD3's shift."""
    return FlowSDESchedule(steps, diffusion="grpo", diffusion_norm=0.7, shift=3.0)


def stored() -> dict[str, Any]:
    """Most bytes that a run at L = 6 made of 64 texts, stored once and copied for every row."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    module = PixArtTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=WIDTH // 16,
        num_layers=1,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=2,
        in_channels=4,
        out_channels=8,
    )
    target = PixArtTarget(module.eval().requires_grad_(False))
    found = {"images": IMAGES, "tokens": TOKENS, "width": WIDTH}
    for tokens, path in ((1, "hoisted"), (TOKENS, "hoisted"), (TOKENS, "blocks")):
        texts = {"prompt_embeds": torch.randn(IMAGES, tokens, WIDTH)}
        before = {one.untyped_storage()._cdata for one in (*module.parameters(), *module.buffers(), *texts.values())}
        network = target.conditioned(Conditions(texts))
        own = {network.texts.embeds.untyped_storage()._cdata}
        network._path, network.recheck = path, lambda where: None
        with _Made(before | own) as alive:
            sample(network, class_labels=torch.arange(IMAGES), schedule=DDPMSchedule(7), draft_length=6, seed=1)
        name = {"hoisted": "once", "blocks": "rows"}[path] if tokens > 1 else "one_token"
        found[name] = alive.peak + network.texts.embeds.nbytes
    found["texts"] = IMAGES * TOKENS * WIDTH * 4
    found["ratio"] = found["once"] / (found["one_token"] + found["texts"])
    found["ratio_of_rows"] = found["rows"] / (found["one_token"] + found["texts"])
    return found


class _Made(LiveBytes):
    """Bytes alive besides storages that were there before, of which operations return views."""

    def __init__(self, before: set[int]) -> None:
        super().__init__()
        self._before = before

    def _count(self, storage: Any) -> None:
        if storage._cdata not in self._before:
            super()._count(storage)


def forecasts_table(rows: list[dict[str, Any]]) -> str:
    """Steps per call by network, steps and length."""
    lines = []
    for row in rows:
        gaps = [gap for _, gap in row["gap"]]
        per_call = [f"{value:.2f}" for value in row["steps_per_call"].values()]
        name, steps, real = row["network"], str(row["steps"]), f"{row['real']:.2f}"
        lines.append([name, steps, *per_call, real, f"{min(gaps):.3g} to {max(gaps):.3g}"])
    lengths = [f"L = {length}" for length in rows[0]["steps_per_call"]]
    return "\n".join(table(["network", "K", *lengths, f"run, {lengths[-1]}", "gap delta"], lines))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of figures.json; the page is beside it")
    asked = parser.parse_args()
    target, texts = random_sd3()
    rows = []
    for steps in STEPS:
        cases = [("closed form, std 1", GaussianVelocity(1.0), {}), ("closed form, std 0.1", GaussianVelocity(0.1), {})]
        if steps <= 100:
            cases.append(("random SD3", target, {"conditions": texts}))
        for name, network, given in cases:
            rows.append(forecast(name, network, steps, **given))
            print({key: value for key, value in rows[-1].items() if key != "gap"}, flush=True)
    timed = verdict(target, texts)
    print(timed["verdict"], flush=True)
    memory = stored()
    print(memory, flush=True)
    report = {"torch": torch.__version__, "forecasts": rows, "ten_steps_timed": timed, "texts": memory}
    write_json(asked.out / "figures.json", report)
    page = asked.out.with_suffix(".md")
    if page.exists():
        fill_page(page, "forecasts", forecasts_table(rows))


if __name__ == "__main__":
    main()
