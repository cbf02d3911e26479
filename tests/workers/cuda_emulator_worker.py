"""Rounds of the packing kernels in the emulator against the reference: ``cuda_emulator_worker.py HEADER LIBRARY...``.

Each library runs in a child of this process, so that PyTorch is loaded once, and one that crashes is a finding. Prints
a line of JSON for each: its exit status, what it wrote to stderr, and what was compared or differed. ``HEADER`` is
packing_kernels.h, whose structs the libraries take.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import mmap
import os
import random
import re
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from free_kernels.ops.packing.arguments import CommitArguments, PackArguments
from free_kernels.ops.packing.reference import commit_drafts, pack_drafts

ROUNDS = 32
NUM_STEPS = 40
CPU_LIMIT_S = 120
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Far beyond every count, in both directions.
WILD = (-(2**60), -(2**40), -1, 10**6, 2**40, 2**60)
# Linux's; memory is taken page by page, as it is written to.
NO_RESERVE = 0x4000
Shape = tuple[int, ...]


class Difference(Exception):
    """The kernels and the reference disagree."""


def structs_of(header: str) -> dict[str, type[ctypes.Structure]]:
    """The header's structs by name, as ctypes takes them."""
    kinds = {"int64_t": ctypes.c_int64, "int": ctypes.c_int, "bool": ctypes.c_bool}
    found = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", header, re.DOTALL):
        fields = re.findall(r"^ +(?:const )?(\w+)(\*?) (\w+);", body, re.MULTILINE)
        assert len(fields) == body.count(";"), f"{name} has fields of an unknown form"
        members = [(field, ctypes.c_void_p if star else kinds[kind]) for kind, star, field in fields]
        found[name] = type(name, (ctypes.Structure,), {"_fields_": members})
    return found


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers: NaNs compare, too."""
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def poisoned(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Memory that no element was written to."""
    return torch.full(shape, -7, dtype=INTEGERS[dtype.itemsize]).view(dtype)


def moved_by_one(tensor: Tensor) -> Tensor:
    """An equal tensor that begins one element into its storage, where wide accesses are not allowed."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return storage[1:].view(tensor.shape).copy_(tensor)


def sparse(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written to."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags), dtype=dtype).view(shape)


def unit(row_bytes: int, *tensors: Tensor) -> int:
    """Bytes of an access, as csrc/cuda/packing.cpp chooses them."""
    aligned = row_bytes % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in tensors)
    return 16 if aligned else tensors[0].element_size()


def compare(name: str, got: Tensor, want: Tensor) -> None:
    if not torch.equal(bits(got), bits(want)):
        raise Difference(name)


class Kernels:
    """A compiled copy of the kernels."""

    def __init__(self, library: Path, header: str) -> None:
        self._library, self._structs = ctypes.CDLL(str(library)), structs_of(header)
        for name in ("PackLaunch", "CommitLaunch"):
            assert getattr(self._library, f"size_of_{name}")() == ctypes.sizeof(self._structs[name])

    def seed(self, seed: int) -> None:
        """Another order of threads and blocks."""
        self._library.seed_emulator(ctypes.c_uint64(2 * seed + 1))

    def pack(self, arguments: PackArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As the op."""
        states, lengths, steps, labels, timesteps, num_rows, null_label = arguments
        rows, row_bytes = num_rows * (1 if null_label is None else 2), states[0, 0].numel() * states.element_size()
        x = poisoned((rows, *states.shape[2:]), states.dtype)
        t, y = (poisoned((rows,), torch.int64) for _ in range(2))
        row_offsets = poisoned((len(states) + 1,), torch.int64)
        tensors = (states, lengths, steps, labels, timesteps, x, t, y, row_offsets)
        sizes = (len(states), states.shape[1], len(timesteps), num_rows, row_bytes, null_label or 0)
        launch = self._structs["PackLaunch"](
            *(tensor.data_ptr() for tensor in tensors), *sizes, null_label is not None, unit(row_bytes, states, x)
        )
        assert self._library.emulate_pack(ctypes.byref(launch)) == 0
        return x, t, y, row_offsets

    def commit(self, arguments: CommitArguments) -> None:
        """As the op, in place."""
        a, (*tensors, _) = arguments, arguments
        slots, length = a.draft_states.shape[:2]
        branches, plan = len(a.parent), poisoned((slots, 4), torch.int64)
        state_bytes = a.next_states[0].numel() * a.next_states.element_size()
        feature_bytes = a.features[0].numel() * a.features.element_size()
        sizes = (slots, length, branches, len(a.features) // branches, len(a.samples), a.num_steps)
        launch = self._structs["CommitLaunch"](
            *(tensor.data_ptr() for tensor in (*tensors, plan)),
            *sizes,
            state_bytes,
            feature_bytes,
            unit(state_bytes, a.next_states, a.draft_states, a.state, a.previous, a.samples),
            unit(feature_bytes, a.features, a.parent),
        )
        assert self._library.emulate_commit(ctypes.byref(launch)) == 0


def check_pack(kernels: Kernels, given: tuple, wild: bool) -> None:
    """One call; with wild values lengths and steps count as clamped."""
    arguments = PackArguments(*given)
    states, lengths, steps, labels, timesteps, num_rows, null_label = arguments
    got = kernels.pack(arguments)
    clamped = lengths.clamp(0, states.shape[1])
    if not wild:
        want = pack_drafts(arguments)
    else:
        slots, length = states.shape[:2]
        zeros, order = torch.zeros_like(steps), torch.arange(max(slots, length))
        in_order = PackArguments(states, clamped, zeros, order[:slots], order[:length], num_rows)
        x, position, slot, offsets = pack_drafts(in_order)
        used = torch.arange(num_rows) < offsets[-1]
        t = timesteps[torch.where(used, (steps[slot] + position).clamp(0, len(timesteps) - 1), len(timesteps) - 1)]
        y = torch.where(used, labels[slot], 0)
        if null_label is not None:
            x, t, y = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null_label)])
        want = x, t, y, offsets
    for name, one, other in zip(("x", "t", "y", "row_offsets"), got, want, strict=True):
        compare(f"pack_drafts: {name}", one, other)


def check_commit(kernels: Kernels, given: tuple, written: dict[str, Tensor], touched: Tensor | None = None) -> Counter:
    """One call; a slot with a value out of range is left alone. Only the ``touched`` images are compared, if given."""
    committed, _, drafts, features, row_offsets = given
    rows, num_images, images = len(features) // len(written["parent"]), len(written["samples"]), written["images"]
    row, step = row_offsets[:-1] + committed - 1, written["steps"] + committed
    valid = (images >= 0) & (images < num_images) & (committed >= 1) & (committed <= drafts.shape[1])
    valid &= (row >= 0) & (row < rows) & (written["steps"] >= 0) & (step <= NUM_STEPS)
    mine = written if touched is not None else {name: value.clone() for name, value in written.items()}
    theirs = {name: value.clone() for name, value in written.items() if name != "samples" or touched is None}
    if touched is not None:
        theirs["samples"] = sparse(tuple(written["samples"].shape), written["samples"].dtype)
        theirs["samples"][touched] = written["samples"][touched]
    before = int(written["queue"])
    theirs["images"] = torch.where(valid, images, -1)
    kept = images.clone()
    commit_drafts(CommitArguments(torch.where(valid, committed, 0), *given[1:], **theirs, num_steps=NUM_STEPS))
    theirs["images"] = torch.where(valid, theirs["images"], kept)
    kernels.commit(CommitArguments(*given, **mine, num_steps=NUM_STEPS))
    for name in mine:
        chosen = slice(None) if touched is None or name != "samples" else touched
        compare(f"commit_drafts: {name}", mine[name][chosen], theirs[name][chosen])
    return Counter(
        ended=int((valid & (step == NUM_STEPS)).sum()),
        entered=int(theirs["queue"]) - before,
        left_alone=int((~valid).sum()),
    )


def random_round(kernels: Kernels, seed: int) -> Counter:
    """Pack, commit, then both with values out of range."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    kernels.seed(seed)
    slots, length = pick.choice([1, 2, 5, 31, 32, 33, 64, 70]), pick.randint(1, 6)
    latent = pick.choice([(1, 1, 1), (1, 3, 5), (4, 4, 4), (1, 8, 8), (3, 5, 7), (4, 40, 40)])
    if latent == (4, 40, 40):
        # A row of more than one block.
        slots, length = min(slots, 3), min(length, 3)
    feature = pick.choice([(4, 8), (9, 33), (16, 64)])
    dtype, feature_dtype, place = pick.choice(DTYPES), pick.choice(DTYPES), pick.choice([torch.clone, moved_by_one])
    null_label = pick.choice([None, 10])

    def latents(*shape: int) -> Tensor:
        return place(torch.randn(*shape, *latent).to(dtype))

    def wild(values: Tensor) -> Tensor:
        chosen = torch.tensor(WILD)[torch.randint(0, len(WILD), values.shape)]
        return torch.where(torch.rand(values.shape) < 0.3, chosen, values)

    states, lengths = latents(slots, length), torch.randint(0, length + 1, (slots,))
    if seed % 7 == 0:
        lengths.zero_()
    steps = torch.where(
        torch.rand(slots) < 0.5, NUM_STEPS - lengths, torch.randint(0, NUM_STEPS - length + 1, (slots,))
    )
    labels, timesteps = torch.randint(0, 10, (slots,)), torch.randperm(NUM_STEPS)
    rows = int(lengths.sum()) + pick.randint(0, 3)
    check_pack(kernels, (states, lengths, steps, labels, timesteps, rows, null_label), wild=False)
    fewer = pick.randint(0, rows + 2)
    check_pack(kernels, (states, wild(lengths), wild(steps), wild(labels), timesteps, fewer, null_label), wild=True)

    branches, num_images, rows = pick.choice([1, 2]), slots + pick.randint(0, 9), max(rows, 1)
    written = {"state": latents(slots), "previous": latents(slots)}
    written |= {"parent": place(torch.randn(branches, slots, *feature).to(feature_dtype)), "steps": steps}
    written |= {"images": torch.where(torch.rand(slots) < 0.15, -1, torch.arange(slots)), "labels": labels}
    written |= {"samples": latents(num_images), "all_labels": torch.randint(0, 10, (num_images,))}
    written |= {"queue": torch.tensor([slots])}
    committed = torch.minimum(torch.randint(0, length + 1, (slots,)), lengths) if seed % 3 else lengths
    row_offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    features = place(torch.randn(branches * rows, *feature).to(feature_dtype))
    found = check_commit(kernels, (committed, latents(slots), states, features, row_offsets), written)
    written |= {"images": wild(written["images"]), "steps": wild(steps)}
    written |= {"queue": torch.tensor([pick.choice([slots, 2**40])])}
    given = (wild(committed), latents(slots), states, features, wild(row_offsets))
    found += Counter({f"{name}_wild": count for name, count in check_commit(kernels, given, written).items()})
    return found + Counter({"unaligned" if place is moved_by_one else "aligned": 1, str(dtype): 1})


def far_round(kernels: Kernels) -> Counter:
    """Offsets beyond 32 bits: sparse tensors of more than 4 GiB each."""
    slots, length, num_images, rows, latent = 3, 150_000, 300_000, 150_000, (4, 32, 32)
    kernels.seed(1)
    states, features = sparse((slots, length, *latent), torch.float32), sparse((2 * rows, 64, 64), torch.float32)
    samples = sparse((num_images, *latent), torch.float32)
    lengths, steps = torch.tensor([2, 0, 3]), torch.tensor([NUM_STEPS - 2, 0, NUM_STEPS - 3])
    for slot, count in enumerate(lengths.tolist()):
        states[slot, :count] = torch.randn(count, *latent)
    labels, timesteps = torch.tensor([1, 2, 3]), torch.randperm(NUM_STEPS)
    check_pack(kernels, (states, lengths, steps, labels, timesteps, 6, 10), wild=False)
    touched = torch.tensor([7, num_images - 4, num_images - 3, num_images - 2, num_images - 1])
    samples[touched] = torch.randn(len(touched), *latent)
    row_offsets = torch.tensor([rows - 5, rows - 3, rows - 3, rows])
    for branch in range(2):
        features[(branch + 1) * rows - 5 : (branch + 1) * rows] = torch.randn(5, 64, 64)
    written = {"state": torch.randn(slots, *latent), "previous": torch.randn(slots, *latent)}
    written |= {"parent": torch.randn(2, slots, 64, 64), "steps": steps, "labels": labels}
    written |= {"images": torch.tensor([num_images - 4, 7, num_images - 3]), "samples": samples}
    written |= {"all_labels": torch.randint(0, 10, (num_images,)), "queue": torch.tensor([num_images - 2])}
    given = (lengths, torch.randn(slots, *latent), states, features, row_offsets)
    check_commit(kernels, given, written, touched)
    return Counter(far=1)


def run_all(library: Path, header: str) -> Counter:
    """Every round of a library; Difference at the first that differs."""
    kernels, found = Kernels(library, header), Counter()
    with contextlib.suppress(OSError):
        # Without so many addresses the count stays 0.
        found += far_round(kernels)
    for seed in range(ROUNDS):
        found += random_round(kernels, seed)
    return found


def in_child(library: Path, header: str) -> dict[str, object]:
    """``run_all`` in a child, however it ends."""
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as result:
        child = os.fork()
        if child == 0:
            # Of the processor's time: a machine may be busy with other things.
            signal.setitimer(signal.ITIMER_VIRTUAL, CPU_LIMIT_S)
            os.dup2(said.fileno(), 2)
            status = 1
            try:
                json.dump(run_all(library, header), result)
                result.flush()
                status = 0
            except Difference as difference:
                print(f"differs: {difference}", file=sys.stderr, flush=True)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        result.seek(0)
        found = json.loads(result.read() or "{}")
        return {"library": library.stem, "status": status, "said": said.read()[-6000:], "found": found}


def main() -> None:
    torch.set_num_threads(1)
    header, *libraries = sys.argv[1:]
    for library in libraries:
        print(json.dumps(in_child(Path(library), Path(header).read_text())), flush=True)


if __name__ == "__main__":
    main()
