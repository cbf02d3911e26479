"""What ``sample`` and the ops hand to Triton's JIT for sm_90, without a GPU: ``python triton_worker_launches.py``.

CPU tensors go through the launch code as on a GPU; the driver launches nothing, and the reference gives the values.
Compilations are counted by their keys (types, constants and specialisations of the arguments, options); with
``--compile`` those of a run are carried out. Prints one line of JSON. Needs a process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from free_dit import load_bundled
from free_kernels import DDPMSchedule, DrafterConfig, FeatureDrafter, sample
from free_kernels.ops import declaration, triton_runtime
from free_kernels.ops.attention import api as attention
from free_kernels.ops.attention import feature_attention
from free_kernels.ops.attention import triton_launch as attention_kernels
from free_kernels.ops.coupling import dispatch
from free_kernels.ops.coupling import reference as coupling_reference
from free_kernels.ops.coupling import reference_block as block
from free_kernels.ops.coupling import triton_launch as coupling_kernels
from free_kernels.ops.declaration import Op
from free_kernels.ops.drafting import api as drafting
from free_kernels.ops.drafting import triton_clean as drafting_clean
from free_kernels.ops.drafting import triton_kernels as drafting_kernels
from free_kernels.ops.drafting import triton_rows as drafting_rows
from free_kernels.ops.norms import api as norms
from free_kernels.ops.norms import triton_kernels as norm_kernels
from free_kernels.ops.random import api as random
from free_kernels.ops.random import triton_launch as random_kernels
from free_kernels.ops.tables import api as tables
from free_kernels.ops.tables import triton_kernels as table_kernels
from free_kernels.ops.tokens import api as tokens
from free_kernels.ops.tokens import triton_kernels as token_kernels
from free_kernels.steering.relaxation import Relaxation
from free_kernels.targets.adaln import AdaLNTarget

KERNELS = (
    coupling_kernels.coupling_rows_kernel,
    coupling_kernels.coupling_commit_kernel,
    random_kernels.philox_kernel,
    attention_kernels.feature_attention_kernel,
    norm_kernels.norm_kernel,
    table_kernels.table_kernel,
    token_kernels.tokens_kernel,
    drafting_kernels.advance_kernel,
    drafting_clean.measure_kernel,
    drafting_clean.keep_clean_kernel,
    drafting_clean.replay_kernel,
    drafting_kernels.tally_kernel,
    drafting_kernels.open_kernel,
    drafting_kernels.renew_kernel,
    drafting_kernels.rows_kernel,
    drafting_rows.keep_kernel,
    drafting_rows.find_kernel,
    drafting_rows.correct_kernel,
    drafting_rows.join_kernel,
    drafting_rows.errors_kernel,
)


class Utilities:
    """Of an H100."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024


class Launcher:
    """Launches nothing."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class Driver:
    """A GPU of compute capability 9.0 that does nothing."""

    utils, launcher_cls = Utilities(), Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda


class Compiled:
    """A kernel that was not compiled."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        pass


class Recorder:
    """Counts compilations and launches by kernel; ``really`` compiles, too."""

    def __init__(self, really: bool) -> None:
        self.compilations: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        compile_kernel, run = JITFunction._do_compile, JITFunction.run

        def count(kernel, key, signature, device, constexprs, options, attrs, warmup):
            self.compilations[kernel.__name__] += 1
            # What the AOT tests compile must be what is launched: no argument of an unknown type.
            assert all(kind for kind in signature.values()), signature
            if really:
                return compile_kernel(kernel, key, signature, device, constexprs, options, attrs, warmup)
            compiled = Compiled()
            kernel.device_caches[device][0][key] = compiled
            return compiled

        def launch(kernel, *arguments, grid, warmup, **options):
            self.launches[kernel.__name__] += 1
            assert all(0 < size < 2**31 for size in grid), grid
            return run(kernel, *arguments, grid=grid, warmup=warmup, **options)

        self.patches = [
            mock.patch.object(JITFunction, "_do_compile", count),
            mock.patch.object(JITFunction, "run", launch),
        ]

    def of(self, call: Any) -> dict[str, dict[str, int]]:
        """New compilations and launches of a call."""
        before = self.compilations.copy(), self.launches.copy()
        call()
        return {
            "compilations": dict(self.compilations - before[0]),
            "launches": dict(self.launches - before[1]),
        }


def both(op: Op) -> Any:
    """The launch, then the reference's result."""
    launch = op.triton

    def run(arguments: Any) -> Any:
        launch(arguments)
        return op.reference(arguments)

    return run


def as_on_a_gpu(stack: ExitStack) -> None:
    """``auto`` means Triton, whose launches leave no values: the reference's take their place."""
    patch = stack.enter_context
    patch(mock.patch.object(triton_runtime, "why_no_runtime", return_value=None))

    def chosen(op: str, stem: str, device: torch.device, backend: str) -> bool:
        return backend in ("auto", "triton")

    for module in (triton_runtime, declaration, random):
        patch(mock.patch.object(module, "use_triton", chosen))
    patch(mock.patch("free_kernels.sampling.round.use_triton", chosen))
    patch(mock.patch.object(attention, "_use_triton", return_value=True))
    patch(mock.patch.object(dispatch, "_runs_compiled", return_value=False))
    patch(mock.patch.object(AdaLNTarget, "drafting_head", return_value=None))
    # The references of these draw from the random ops, which are not to launch once more.
    for op, decide in (("couple_philox", coupling_reference.couple), ("couple_block_philox", block.couple_block)):
        by_reference = lambda keyed, decide=decide: decide(dispatch.draw_noise(keyed, "reference"))  # noqa: E731
        patch(mock.patch.object(dispatch.OPS[op], "reference", by_reference))
    kernels = (op.triton for op in (*drafting.OPS, norms.OP, tables.OP, tokens.OP))
    for op in (*dispatch.OPS.values(), random.FILL, attention.OP, *kernels):
        patch(mock.patch.object(op, "triton", both(op)))


def run_of(images: int, slots: int, drafter: Any = None, **settings: Any) -> None:
    """A sampling run of the bundled digits."""
    target, bundled = load_bundled("digits")
    chosen = {"schedule": DDPMSchedule(12), "draft_length": 4, "max_slots": slots, "seed": images} | settings
    sample(target, torch.arange(images) % 10, drafter=drafter or bundled, **chosen)


def windowed() -> FeatureDrafter:
    target, _ = load_bundled("digits")
    config = DrafterConfig(width=96, window=3)
    drafter = FeatureDrafter(target.latent_shape, target.feature_shape, target.num_classes, config)
    return drafter.eval().requires_grad_(False)


def attention_of(rows: int, tokens: int, capacity: int) -> None:
    q, k, v = torch.randn(rows, tokens, 3, 3, 32).unbind(2)
    ring = torch.zeros(2, rows, capacity, tokens, 3, 32)
    feature_attention(q, k, v, *ring, *(torch.zeros(rows, dtype=torch.int64) for _ in range(2)))


def random_of(keys: int, numel: int, seed: int) -> None:
    index = torch.arange(keys)
    random.philox_normal(seed, index, index, 1, numel)


RUNS = {
    "learned": lambda: [run_of(images, slots) for images, slots in ((5, 3), (9, 5), (2, 1))],
    "other sizes": lambda: [run_of(images, slots, seed=seed) for images, slots, seed in ((7, 2, 2**40), (11, 4, 3))],
    "frozen": lambda: run_of(9, 5, drafter="frozen"),
    "frozen, other sizes": lambda: [run_of(images, slots, drafter="frozen") for images, slots in ((7, 2), (5, 3))],
    "automatic lengths": lambda: run_of(6, 3, draft_length="auto"),
    "guided": lambda: run_of(4, 2, guidance_scale=2.0),
    "block": lambda: run_of(4, 2, verification="block"),
    "relaxed": lambda: run_of(4, 2, relaxation=Relaxation(0.5)),
    "own noise": lambda: run_of(4, 2, noise=torch.randn(4, 1, 8, 8)),
    "windowed": lambda: run_of(4, 2, drafter=windowed()),
    "attention": lambda: attention_of(2, 16, 2),
    "attention of other sizes": lambda: [attention_of(*sizes) for sizes in ((3, 16, 2), (5, 16, 2), (17, 16, 2))],
    "numbers": lambda: random_of(6, 4096, 1),
    "numbers of other keys": lambda: [random_of(*sizes) for sizes in ((7, 4096, 2**63), (16, 4096, 0), (1, 4096, 5))],
}


def specialised() -> None:
    """What ``do_not_specialize`` prevents: every size a compilation."""
    for kernel in KERNELS:
        for parameter in kernel.params:
            if not parameter.is_constexpr:
                parameter.do_not_specialize = False
        kernel.device_caches.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", nargs="*", default=[], help="runs whose kernels are compiled")
    options = parser.parse_args()
    torch.set_num_threads(1)
    driver.set_active(Driver())
    found = {}
    for name, call in RUNS.items():
        recorder = Recorder(name in options.compile)
        with ExitStack() as stack:
            for patch in recorder.patches:
                stack.enter_context(patch)
            as_on_a_gpu(stack)
            found[name] = recorder.of(call)
    specialised()
    recorder = Recorder(False)
    with ExitStack() as stack:
        for patch in recorder.patches:
            stack.enter_context(patch)
        as_on_a_gpu(stack)
        RUNS["learned"]()
        found["control: other sizes"] = recorder.of(RUNS["other sizes"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
