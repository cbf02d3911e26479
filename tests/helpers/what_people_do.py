"""What people do to a DiT before they sample it, and what comes of each.

``python tests/helpers/what_people_do.py [PART OF A NAME]`` shows it, and writes the page where no part is named.

Every case is applied to two equal networks. One is sampled as it is, its own call in every step; the other is handed to
the library. Equal images are "exact", an error is "refused", and anything else is silent, which no case may be.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import OriginalDiT, randomised
from torch import nn

import free_kernels
from free_dit import DiT, DiTConfig
from free_dit.networks.sit import SiT
from free_kernels import DDPMSchedule, FlowSDESchedule, SiTTarget
from free_kernels.wrappers import first_output

PAGE = Path(__file__).parents[2] / "docs" / "what-people-do-to-a-dit.md"
FAMILIES = {"own": "our DiT", "facebook": "facebook-style DiT", "diffusers": "diffusers DiT", "sit": "SiT"}
LABELS = torch.tensor([1, 4])
STEPS = 4


def new_network(family: str) -> nn.Module:
    """A small network of a family, the same for every call."""
    config = DiTConfig(input_size=8, in_channels=4, hidden_size=48, depth=3, num_heads=4, num_classes=5)
    if family == "diffusers":
        diffusers = pytest.importorskip("diffusers")
        shape = {"in_channels": 4, "out_channels": 8, "num_layers": 3, "sample_size": 8, "num_embeds_ada_norm": 5}
        return randomised(diffusers.DiTTransformer2DModel(4, 12, **shape), scale=0.1)
    kind = {"own": lambda: DiT(config), "sit": lambda: SiT(config), "facebook": OriginalDiT}[family]
    return randomised(kind(), scale=0.1)


def blocks_of(module: nn.Module) -> nn.ModuleList:
    return module.transformer_blocks if hasattr(module, "transformer_blocks") else module.blocks


def attention_of(block: nn.Module) -> nn.Module:
    return block.attn1 if hasattr(block, "attn1") else block.attn


def head_of(module: nn.Module) -> nn.Module:
    return module.proj_out_2 if hasattr(module, "proj_out_2") else module.final_layer


class Whole:
    """A target that calls the whole network in every step: the feature is its output."""

    def __init__(self, family: str, module: nn.Module, num_train_steps: int | None) -> None:
        self.family_name, self.module, self.num_train_steps = family, module, num_train_steps
        self.family = "flow" if family == "sit" else "diffusion"
        self.learns_variance, self.num_classes, self.latent_shape = family != "sit", 5, (4, 8, 8)
        self.guidance_channels = 4 if family == "diffusers" else 3
        self.feature_shape = (8, 8 * (4 if family == "sit" else 8))

    def features(self, x, t, y):
        weight = next(p for p in self.module.parameters() if p.is_floating_point())
        x = x.to(weight.dtype)
        if self.family_name == "sit":
            output = first_output(self.module(x, t.float() / self.num_train_steps, y))[:, :4]
        elif self.family_name == "diffusers":
            output = self.module(x, timestep=t, class_labels=y).sample
        else:
            output = first_output(self.module(x, t, y))
        return output.reshape(len(x), *self.feature_shape)

    def head(self, h, t, y):
        return h.reshape(len(h), -1, 8, 8)


CASES: dict[str, tuple[str, Callable[[str, nn.Module], Any], tuple[str, ...]]] = {}


def case(kind: str, name: str, families: str = "own facebook diffusers sit"):
    """Register what people do: ``function(family, module)`` returns what they pass, or None for the module."""

    def register(function):
        CASES[f"{kind}: {name}"] = (kind, function, tuple(families.split()))
        return function

    return register


def images(family: str, target: Any, guidance: float) -> torch.Tensor:
    schedule = FlowSDESchedule(STEPS) if family == "sit" else DDPMSchedule(STEPS)
    settings = {"schedule": schedule, "guidance_scale": guidance, "seed": 3}
    return free_kernels.ancestral_sample(target, LABELS, **settings).samples


def outcome(name: str, family: str) -> str:
    """``"exact"``, ``"refused: ..."``, or ``"SILENT ..."``."""
    _, apply, _ = CASES[name]
    undo: list[Callable[[], None]] = []

    def applied():
        module = new_network(family)
        module.undo = undo
        result = apply(family, module)
        del module.undo
        return module if result is None else result

    try:
        passed = applied()
        late = passed if isinstance(passed, types.FunctionType) else None
        network = new_network(family) if late else passed
        try:
            target = SiTTarget(network) if family == "sit" else network
            if late:
                target = free_kernels.targets.as_target("sample", target)
                late(network)
            found = images(family, target, 1.5)
        except (TypeError, ValueError) as error:
            return "refused: " + short(str(error))
        while undo:
            undo.pop()()
        other = applied()
        if late:
            other = new_network(family)
            late(other)
        steps = TIME_TICKS if family == "sit" else None
        expected = images(family, Whole(family, other, steps), 1.5)
    finally:
        while undo:
            undo.pop()()
    # Images are sums of 4 steps' outputs: a few times the tolerance of one call, by the narrowest dtype in use.
    dtypes = {p.dtype for p in new_parameters(network) if p.is_floating_point()}
    tolerance = 1e-3 if max(torch.finfo(d).eps for d in dtypes) < 1e-4 else 1e-1
    error = float((found - expected).float().square().mean().sqrt() / expected.float().square().mean().sqrt())
    return "exact" if error <= tolerance else f"SILENT {error:.2g}"


TIME_TICKS = SiTTarget(new_network("sit")).num_train_steps


def new_parameters(module: Any):
    return module.parameters() if isinstance(module, nn.Module) else []


def short(message: str) -> str:
    """What a message says was found, without figures."""
    found = message.partition(", got ")[2] or message
    found = re.sub(r"by [\d.e+-]+ of", "by ... of", found.partition(" (rounding")[0])
    return found if len(found) < 150 else found[:147] + "..."


def render(results: dict[str, dict[str, str]]) -> str:
    lines = [
        "# What people do to a DiT",
        "",
        "Every row was done to a small network of each family, which was then sampled: *exact* is the image that the",
        "same network's own call gives in an ordinary loop with the same noise, *refused* is an error that says what",
        "was found (figures left out). Nothing differs silently. Made by `python tests/helpers/what_people_do.py` and",
        "held by `tests/targets/test_what_people_do.py`. `free_kernels.check_target(module)` says the same of yours.",
        "",
        "| what is done | " + " | ".join(FAMILIES.values()) + " |",
        "|---" * (1 + len(FAMILIES)) + "|",
    ]
    for name, row in results.items():
        lines.append(f"| {name} | " + " | ".join(row.get(family, "-") for family in FAMILIES) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Do all of it and write the page; with part of a name only what has that, and no page."""
    # They fill the table of the module by this name, which is not the one that runs.
    import what_people_attach  # noqa: F401
    import what_people_wrap  # noqa: F401
    from what_people_do import CASES as cases
    from what_people_do import outcome as run

    torch.set_grad_enabled(False)
    results: dict[str, dict[str, str]] = {}
    wanted = "".join(sys.argv[1:2])
    for name, (_, _, families) in cases.items():
        if wanted not in name:
            continue
        results[name] = {family: run(name, family) for family in families}
        print(name, results[name], flush=True)
    if not wanted:
        PAGE.write_text(render(results))


if __name__ == "__main__":
    main()
