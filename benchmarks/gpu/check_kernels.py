"""Every kernel against its oracle on fresh random inputs; prints the seed, and a line for each comparison.

The tests' inputs are fixed; these are new in every run. Run ``python -m benchmarks.gpu.check_kernels`` on a GPU. With
``--device cpu`` the kernels are those of the extension, and with ``TRITON_INTERPRET=1`` also Triton's. Kernels are
asked for by name: the oracle never takes the place of one that is missing, which counts as a failure and says why.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from free_kernels import extension
from free_kernels.ops.attention import feature_attention
from free_kernels.ops.coupling import couple, couple_block, couple_block_philox, couple_philox, gaussian_transition
from free_kernels.ops.packing import commit_drafts, pack_drafts
from free_kernels.ops.random import philox_normal, philox_uniform
from free_kernels.ops.triton_runtime import why_no_runtime

# What a comparison found: whether it passed, and a figure to print.
Found = tuple[bool, str]


def moved(value: Any, device: str) -> Any:
    """Tensors on a device; anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


def round_of_drafts(pick: random.Random) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Arguments of ``couple`` with ragged rounds and noise by its keys; options; the keys."""
    slots, length = pick.randint(1, 70), pick.randint(2, 8)
    latent = pick.choice([(1, 8, 8), (4, 32, 32), (3, 7, 9), (4, 64, 64)])
    guided, learned = pick.random() < 0.5, pick.random() < 0.5
    branches, channels, numel = 2 if guided else 1, latent[0], math.prod(latent)
    seed, images = pick.getrandbits(64), torch.randint(0, 2**31, (slots,))
    steps = torch.randint(0, 200, (slots, 1)) + torch.arange(length)
    rounds = torch.randint(0, 2**24, (slots,))
    keys = (seed, images.repeat_interleave(length), steps.flatten())
    wide = rounds.repeat_interleave(length)
    noise, slack_noise = (philox_normal(*keys, x, numel, wide).view(slots, length, *latent) for x in (1, 2))
    uniform = philox_uniform(*keys, 3, 1, wide).view(slots, length)
    columns = torch.zeros(slots, length, 8)
    columns[..., 0], columns[..., 1], columns[..., 2], columns[..., 3] = 1.0, -0.1, -3.0, 0.1 * learned
    states = torch.randn(slots, length, *latent)
    options = {"guidance_scale": 4.0 if guided else 1.0, "guidance_channels": pick.randint(1, channels)}
    dense = torch.randn(branches * slots * length, (2 if learned else 1) * channels, *latent[1:])
    dense = dense.to(pick.choice([torch.float32, torch.bfloat16, torch.float16]))
    mean, std = (
        x.view(slots, length, *latent)[:, :-1].clone()
        for x in gaussian_transition(states.flatten(0, 1), dense, columns.flatten(0, 1), **options)
    )
    mean += pick.uniform(0.1, 2.0) / math.sqrt(numel) * std * torch.randn_like(mean)
    if learned:
        std *= 1 + 0.003 * torch.randn_like(std)
    lengths = torch.randint(1, length + 1, (slots,))
    used = (torch.arange(length) < lengths[:, None]).flatten().nonzero().squeeze(1)
    arguments = {"draft_states": states, "draft_mean": mean, "draft_std": std, "noise": noise}
    arguments |= {"slack_noise": slack_noise if learned else None, "uniform": uniform}
    arguments |= {"output": dense.unflatten(0, (branches, -1))[:, used].flatten(0, 1)}
    arguments |= {"row_offsets": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), "columns": columns}
    return arguments, options, {"seed": seed, "images": images, "steps": steps, "rounds": rounds}


def check_couple(device: str, pick: random.Random, backend: str) -> Iterator[tuple[str, Found]]:
    """Decisions and states; a decision may differ where the test is a near-tie, in one slot of a hundred at most."""
    wrong = dict.fromkeys(("couple", "couple_philox", "couple_block", "couple_block_philox"), 0)
    worst, slots = dict.fromkeys(wrong, 0.0), 0
    for _ in range(20):
        arguments, options, keys = round_of_drafts(pick)
        here, there = ({n: moved(v, device) for n, v in x.items()} for x in (arguments, keys))
        keyed = {n: v for n, v in here.items() if n not in ("noise", "slack_noise", "uniform")} | there
        options_here = options | {"backend": backend}
        got = {
            "couple": couple(**here, **options_here),
            "couple_philox": couple_philox(**keyed, **options_here),
            "couple_block": couple_block(**here, **options_here),
            "couple_block_philox": couple_block_philox(**keyed, **options_here),
        }
        slots += len(keys["images"])
        token, block = (op(**arguments, **options, backend="reference") for op in (couple, couple_block))
        for name, outcome in got.items():
            want = block if "block" in name else token
            same = outcome.committed.cpu() == want.committed
            wrong[name] += int((~same).sum())
            gap = (outcome.next_states.cpu() - want.next_states)[same].abs()
            worst[name] = max(worst[name], float(gap.max()) if gap.numel() else 0.0)
    for name in wrong:
        fine = wrong[name] <= max(1, slots // 100) and worst[name] < 2e-3
        yield name, (fine, f"{wrong[name]} of {slots} decisions differ, states by {worst[name]:.1e} at most")


def check_random(device: str, pick: random.Random, backend: str) -> Iterator[tuple[str, Found]]:
    """Uniforms bit for bit, normals to 1e-5."""
    for _ in range(5):
        keys, numel = pick.randint(1, 300), pick.randint(1, 5000)
        index = [torch.randint(0, 2**31, (keys,)) for _ in range(2)]
        seed, purpose = pick.getrandbits(64), pick.randint(0, 255)
        for name, op, tolerance in (("philox_uniform", philox_uniform, 0.0), ("philox_normal", philox_normal, 1e-5)):
            want = op(seed, *index, purpose, numel, backend="reference")
            got = op(seed, *(x.to(device) for x in index), purpose, numel, backend=backend).cpu()
            gap = float((got - want).abs().max())
            yield f"{name} {keys} x {numel}", (gap <= tolerance, f"off by {gap:.1e} at most")


def check_attention(device: str, pick: random.Random, backend: str) -> Iterator[tuple[str, Found]]:
    """Error against float64, at most twice that of the reference in the same dtype."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for _ in range(4):
            rows, tokens, heads = pick.randint(1, 9), pick.choice([16, 40, 256]), pick.randint(1, 8)
            head_dim, capacity = pick.choice([32, 64, 72, 128]), pick.randint(1, 4)
            q, k, v = torch.randn(3, rows, tokens, heads, head_dim).to(dtype)
            ring = torch.randn(2, rows, capacity, tokens, heads, head_dim).to(dtype)
            counters = torch.randint(0, capacity + 1, (rows,)), torch.randint(0, capacity, (rows,))
            arguments = [q, k, v, *ring, *counters]
            wide = (x.double() if x.is_floating_point() else x for x in arguments)
            exact = feature_attention(*wide, backend="reference")
            here = [x.to(device) for x in arguments]
            eager = feature_attention(*here, backend="reference").cpu().double() - exact
            ours = feature_attention(*here, backend=backend).cpu().double() - exact
            quotient = float(ours.square().mean().sqrt() / eager.square().mean().sqrt().clamp(min=1e-12))
            name = f"feature_attention {list(q.shape)} ring {capacity} {str(dtype).removeprefix('torch.')}"
            yield name, (quotient <= 2, f"error {quotient:.2f} of eager's")


def check_packing(device: str, pick: random.Random, backend: str) -> Iterator[tuple[str, Found]]:
    """Packing and committing, bit for bit."""
    for _ in range(10):
        slots, length, total = pick.randint(1, 80), pick.randint(1, 8), 40
        latent, feature = pick.choice([(1, 8, 8), (4, 32, 32), (3, 5, 7)]), pick.choice([(16, 64), (9, 33)])
        dtype = pick.choice([torch.float32, torch.float16, torch.bfloat16])
        states, lengths = torch.randn(slots, length, *latent).to(dtype), torch.randint(0, length + 1, (slots,))
        steps, labels = torch.randint(0, total - length + 1, (slots,)), torch.randint(0, 10, (slots,))
        rows = max(1, int(lengths.sum()) + pick.randint(0, 3))
        arguments = [states, lengths, steps, labels, torch.randperm(total), rows, pick.choice([None, 10])]
        want = pack_drafts(*arguments, backend="reference")
        got = pack_drafts(*(moved(x, device) for x in arguments), backend=backend)
        packed = all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))
        branches, count = pick.choice([1, 2]), slots + pick.randint(0, 9)
        written = {"state": torch.randn(slots, *latent).to(dtype), "previous": torch.randn(slots, *latent).to(dtype)}
        written |= {"parent": torch.randn(branches, slots, *feature), "steps": steps, "images": torch.arange(slots)}
        written |= {"labels": labels, "samples": torch.randn(count, *latent).to(dtype)}
        written |= {"all_labels": torch.randint(0, 10, (count,)), "queue": torch.tensor([slots])}
        committed = torch.minimum(torch.randint(0, length + 1, (slots,)), lengths)
        fixed = [committed, torch.randn(slots, *latent).to(dtype), states, torch.randn(branches * rows, *feature)]
        results = []
        for place, by in (("cpu", "reference"), (device, backend)):
            here = {name: value.clone().to(place) for name, value in written.items()}
            there = [x.to(place) for x in (*fixed, want[3])]
            commit_drafts(*there, **here, num_steps=total, backend=by)
            results.append(here)
        same = [name for name in written if torch.equal(results[0][name], results[1][name].cpu())]
        name = f"packing of {slots} slots, {list(latent)}, {str(dtype).removeprefix('torch.')}"
        differing = ", ".join(sorted(written.keys() - same)) or "nothing"
        yield name, (packed and len(same) == len(written), f"packed rows equal: {packed}; differs: {differing}")


CHECKS: dict[str, Callable[[str, random.Random, str], Iterator[tuple[str, Found]]]] = {
    "couple": check_couple,
    "random": check_random,
    "attention": check_attention,
    "packing": check_packing,
}
# The module of kernels behind a check in Triton, and the ops of one in the extension.
TRITON_STEMS = {"couple": "coupling", "random": "random", "attention": "attention"}
EXTENSION_OPS = {"random": ("philox_uniform", "philox_normal"), "packing": ("pack_drafts", "commit_drafts")}


def backend_of(stem: str, device: str) -> str:
    """The backend whose kernels a check is about."""
    in_extension = stem == "packing" or (stem == "random" and device == "cpu")
    return "extension" if in_extension else "triton"


def why_missing(stem: str, device: str) -> str | None:
    """Why a check's kernels cannot run on a device, or None if they can."""
    if backend_of(stem, device) == "triton":
        return why_no_runtime(TRITON_STEMS[stem], device, None)
    reasons = (extension.why_no_kernel(op, device) for op in EXTENSION_OPS[stem])
    return next((reason for reason in reasons if reason is not None), None)


def default_checks(device: str) -> list[str]:
    """Every check, but for those in Triton on a CPU without the interpreter."""
    return [s for s in CHECKS if device == "cuda" or backend_of(s, device) == "extension" or not why_missing(s, device)]


def main() -> int:
    """Make the comparisons; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)), help="to repeat a run")
    parser.add_argument("--only", nargs="*", choices=list(CHECKS), help="default: all that the device can have")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("check_kernels: needs a CUDA device")
        return 1
    print(f"seed {arguments.seed}")
    made = failed = missing = 0
    for stem in arguments.only or default_checks(arguments.device):
        backend, reason = backend_of(stem, arguments.device), why_missing(stem, arguments.device)
        if reason is not None:
            missing += 1
            print(f"MISSING {stem} by {backend}: {reason}", flush=True)
            continue
        torch.manual_seed(arguments.seed)
        with torch.inference_mode():
            for name, (fine, figure) in CHECKS[stem](arguments.device, random.Random(arguments.seed), backend):
                made += 1
                failed += not fine
                print(f"{'ok    ' if fine else 'WRONG '} {name} by {backend}: {figure}", flush=True)
    print(f"{failed} of {made} comparisons failed, kernels of {missing} checks are missing")
    return int(failed > 0 or missing > 0 or made == 0)


if __name__ == "__main__":
    sys.exit(main())
