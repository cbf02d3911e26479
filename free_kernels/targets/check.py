"""Whether a target computes what its module's own call computes; compared once for a module and its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from free_kernels.protocols import Target, TargetDefaults
from free_kernels.targets.inspection import attributes, fingerprint, is_abstract, parts_of, suspicions, tensors_of
from free_kernels.targets.replay import Recording, Replayed, one_of_each_kind, recording
from free_kernels.validation import fail

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
# Roundings on the way through a block, one after another. The stream that blocks add to grows like their errors, so
# that the relative error does not grow with depth: root mean square sqrt(16) / sqrt(12) of a spacing, and sqrt(2) times
# that between two results, is 1.6 spacings.
_ROUNDINGS = 16
# What sharp attention makes of a rounding error before it is seen as a difference. Formats of 16 bits have no room for
# it: a network that amplifies their errors is run by its own blocks, in the same operations as its own call.
_GAIN, _GAIN_16_BITS = 640.0, 2.5
# How much further apart two calls of one network in batches of other sizes may be, before they count as no function:
# an answer out of a cache is another step's and differs by far more, and a refusal has no second way to fall back on.
_BATCH_SLACK = 10.0
_BATCH_SLACK_16_BITS = 4.0


class TargetCheck(NamedTuple):
    """What :func:`check_target` compared.

    Attributes:
        path: ``"hoisted"``: blocks by their parts, what depends on (t, y) only computed once; ``"blocks"``: blocks
            and head called as they are; ``"features"``: a target's own ``features`` and ``head``.
        difference: root mean square of the difference between ``head(features(x, t, y), t, y)`` and the module's own
            call, over that of the call. Where there is no call to compare with, between batches of two sizes. NaN where
            there are no numbers (fake tensors, weights on the meta device).
        tolerance: what rounding explains.
        network_rows: rows of the whole network that the comparison computed.
    """

    path: str
    difference: float
    tolerance: float
    network_rows: int


class Rows(NamedTuple):
    """Two rows to compare on: states ``x [2, C, H, W]``, timesteps ``t [2]``, labels ``y [2]``."""

    x: Tensor
    t: Tensor
    y: Tensor

    def take(self, *order: int) -> Rows:
        """Some of the rows."""
        index = torch.tensor(order, device=self.x.device)
        return Rows(*(part.index_select(0, index) for part in self))

    def moved(self) -> Rows:
        """The next step's rows: a little further on, as caches of steps expect them."""
        return Rows(self.x + 0.05 * self.x.roll(1, -1), (self.t - 1).clamp_min(0), self.y)


class SplitTarget(Protocol):
    """What the comparison asks of an adapter with several ways to run its module's blocks."""

    def own(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The module's own call, ``[R, C or 2C, H, W]``."""
        ...

    def paths(self) -> list[str]:
        """The ways, the preferred one first."""
        ...

    def check_convention(self, where: str, rows: Rows, own: Tensor) -> None:
        """Raise ValueError where the module's own output says that it is a network of another kind."""
        ...

    def on_path(self, path: str, t: Tensor, y: Tensor) -> Target:
        """The target taking one of the ways, hoisted for timesteps and labels, nothing compiled."""
        ...

    def heavy_parts(self) -> list[nn.Module]:
        """Attention and MLP of every block, in order, if the preferred way calls them in their blocks' place."""
        ...

    def with_heavy_parts(self, parts: Sequence[Call]) -> Target:
        """The target with other maps in their place, on its preferred way."""
        ...


# Of a module: by adapter, its fingerprint when it was compared, and what came of it.
_KNOWN: WeakKeyDictionary[nn.Module, dict[Any, tuple[Any, TargetCheck]]] = WeakKeyDictionary()


class Known(dict):
    """What came of comparisons, by key. A pickled or deeply copied target is another one, which is compared anew."""

    def __reduce__(self) -> tuple[type, tuple]:
        return Known, ()


def checked(
    key: Any,
    target: Any,
    module: nn.Module,
    parts: Sequence[nn.Module],
    compare: Callable[[], TargetCheck],
    known: dict[Any, tuple[Any, TargetCheck]] | None = None,
) -> TargetCheck:
    """What a comparison says of a network; asked where there are numbers to compare, and again of another network only.

    See :func:`fingerprint` for what makes it another one; ``parts`` are the module's as they are now. What is known is
    kept with the module, or in ``known`` where the key itself may hold the module.
    """
    weights = tensors_of(parts)
    if is_abstract(weights):
        return TargetCheck(target.paths()[0], math.nan, math.nan, 0)
    known = _KNOWN.setdefault(module, {}) if known is None else known
    mark = fingerprint(parts, weights)
    if key in known and known[key][0] == mark:
        return known[key][1]
    result = compare()
    # A network that says nothing yet, such as one whose output layer is still zero, is asked again.
    if math.isfinite(result.difference) and result.tolerance > 0:
        parts = parts_of(module)
        known[key] = fingerprint(parts, tensors_of(parts)), result
    return result


def probe_rows(target: Target, timesteps: Tensor | None = None, labels: Tensor | None = None) -> Rows:
    """Two rows that differ in everything: late and early, of another label each; random numbers of their own.

    Args:
        target: whose shapes they have.
        timesteps: int64 ``[K]`` to take the first and last of; of the usual range if None.
        labels: int64 ``[Y]``, likewise.
    """
    device = torch.device(TargetDefaults.read(target, "device") or "cpu")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *target.latent_shape, generator=generator, dtype=torch.float32, device="cpu").to(device)
    span = TargetDefaults.read(target, "num_train_steps") or 1000
    t = torch.tensor([span - span // 8, span // 8], device=device) if timesteps is None else timesteps[[0, -1]]
    null = target.num_classes if TargetDefaults.read(target, "has_null_label") else 0
    y = torch.tensor([target.num_classes // 2, null], device=device) if labels is None else labels[[0, -1]]
    return Rows(x, t.to(device), y.to(device))


def rounding_tolerance(module: nn.Module | None, device: torch.device) -> float:
    """How far two results of one network may be apart by rounding, root mean square over root mean square."""
    weights = [] if module is None else [p for p in module.parameters() if p.is_floating_point()]
    eps = max((torch.finfo(p.dtype).eps for p in weights), default=torch.finfo(torch.float32).eps)
    if torch.is_autocast_enabled(device.type):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(device.type)).eps)
    # Products of float32 matrices may be allowed a shorter format: TF32 has 10 bits of fraction, bfloat16 has 7.
    eps = max(eps, {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}[torch.get_float32_matmul_precision()])
    gain = _GAIN if eps < 2.0**-11 else _GAIN_16_BITS
    return gain * math.sqrt(2 * _ROUNDINGS / 12) * eps


def difference(found: Tensor, expected: Tensor) -> float:
    """Root mean square of ``found - expected`` over that of ``expected``; NaN unless both are finite."""
    if found.shape != expected.shape:
        return math.inf
    found, expected = found.detach().float(), expected.detach().float()
    error, size = float((found - expected).square().mean().sqrt()), float(expected.square().mean().sqrt())
    if not math.isfinite(error) or not math.isfinite(size):
        return math.nan
    return error / size if size else math.inf if error else 0.0


def alignment(output: Tensor, noise: Tensor) -> float:
    """Cosine between an output (its leading channels) and the state, which near pure noise is the noise itself."""
    output, noise = output[: len(noise)].float().flatten(), noise.float().flatten()
    return float(torch.nn.functional.cosine_similarity(output, noise, dim=0))


@torch.no_grad()
def compare_paths(where: str, name: str, target: SplitTarget | Target, module: nn.Module) -> TargetCheck:
    """The first way of a target that gives what its module's own call gives.

    A module as its classes define it costs two rows, of its own call, and what the target makes of their parts
    (:mod:`free_kernels.targets.replay`). Where something is attached to it, or that does not agree, the target is run
    itself, and further calls show whether the module is a function of its inputs at all.

    Raises:
        ValueError: no way does, or the call depends on earlier calls or on the batch.
    """
    rows = probe_rows(target)
    tolerance = rounding_tolerance(module, rows.x.device)
    last = rows.take(1)
    before = attributes(module)
    heavy = target.heavy_parts() if not suspicions(module) else []
    with recording(heavy, len(rows.x)) as record:
        own = target.own(*rows)
    computed = 2
    doubtful = suspicions(module) + _changed(before, attributes(module))
    size = float(own.detach().float().square().mean().sqrt())
    if not math.isfinite(size):
        # The samplers name the step and the image of a network that is not finite.
        return TargetCheck(target.paths()[-1], math.nan, tolerance, computed)
    if own.shape[2:] != rows.x.shape[2:]:
        found = f"{type(module).__name__}, which makes {list(own.shape[2:])} of these"
        sides = " x ".join(map(str, rows.x.shape[2:]))
        fail(where, name, f"a network of latents {sides}, as its tokens make a square", found)
    target.check_convention(where, rows, own)
    reasons, chosen = [], None
    if heavy and not doubtful:
        gap = _replayed_gap(target, record, last, own[1:])
        if gap <= tolerance:
            return TargetCheck(target.paths()[0], gap, tolerance if size else 0.0, computed)
    for path in target.paths():
        gap, reason = _gap(target, path, last, own[1:])
        computed += 1
        if gap <= tolerance:
            chosen = TargetCheck(path, gap, tolerance, computed)
            break
        reasons.append(reason)
    if doubtful or chosen is None:
        computed += _require_function(where, name, target.own, rows, own, tolerance, doubtful)
    if chosen is None:
        # The same operations in a batch of the same shape: without even the rounding of another shape.
        path = target.paths()[-1]
        gap, reason = _gap(target, path, rows, own)
        computed += 2
        if not gap <= tolerance:
            fail(
                where,
                name,
                "a network whose own call is its blocks one after another, then its head "
                "(HookTarget takes any other, with a head of yours)",
                f"{type(module).__name__}, where {reason} (rounding explains {tolerance:.1e})",
            )
        chosen = TargetCheck(path, gap, tolerance, computed)
    return chosen._replace(network_rows=computed, tolerance=tolerance if size else 0.0)


def _gap(target: SplitTarget, path: str, part: Rows, expected: Tensor) -> tuple[float, str]:
    """Difference of one way from the module's own call, and the same in words."""
    try:
        network = target.on_path(path, part.t.unique(), part.y.unique())
        output = network.head(network.features(*part), part.t, part.y)
    except (TypeError, ValueError, AttributeError, RuntimeError, LookupError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return math.inf, f"calling its {path} fails: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    gap = difference(output, expected)
    return gap, f"its own call differs from its {path} by {gap:.2g} of its size"


def _replayed_gap(target: SplitTarget, record: Recording, part: Rows, expected: Tensor) -> float:
    """Difference of the preferred way from the module's own call, with what its parts made there of the last row."""
    passed = record.last_row
    if passed is None:
        return math.inf
    replayed = [Replayed(one) for one in passed]
    try:
        network = target.on_path(target.paths()[0], part.t.unique(), part.y.unique())
        network = network.with_heavy_parts(replayed)  # type: ignore[attr-defined]
        output = network.head(network.features(*part), part.t, part.y)
        alone = [difference(record.parts[i](passed[i].given), passed[i].made) for i in one_of_each_kind(record.parts)]
    except (TypeError, ValueError, AttributeError, RuntimeError, LookupError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return math.inf
    if any(len(one.given) != 1 for one in replayed):
        return math.inf
    gaps = [difference(output, expected), *alone]
    gaps += [difference(one.given[0], one.passed.given) for one in replayed]
    # The largest of numbers of which one is none is none.
    return math.nan if any(map(math.isnan, gaps)) else max(gaps)


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of attributes that a call has changed."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _require_function(
    where: str, name: str, call: Call, rows: Rows, own: Tensor, tolerance: float, doubtful: list[str]
) -> int:
    """Raise ValueError unless repeated calls agree, in other batches and after other calls; rows computed.

    The calls imitate a sampler's: the next step is close to the last one, which is where a cache of steps takes effect,
    and comes again in another order, where it would give another answer.
    """
    moved = rows.moved()
    mixed = Rows(*(torch.cat([one, other]) for one, other in zip(moved.take(0), rows.take(1), strict=True)))
    try:
        first = call(*mixed)
        second = call(*mixed.take(1, 0))
        gaps = [
            difference(second.flip(0), first),
            difference(first[1:], own[1:]),
            difference(call(*rows.take(0)), own[:1]),
            difference(call(*mixed.take(0)), first[:1]),
        ]
    except (TypeError, ValueError, AttributeError, RuntimeError, LookupError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        gaps, reason = [math.inf], f"a later call fails: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    else:
        reason = f"calls on the same inputs that differ by {max(gaps):.2g} of their size"
    slack = _BATCH_SLACK if tolerance < 2.0**-11 else _BATCH_SLACK_16_BITS
    if not max(gaps) <= slack * tolerance:
        about = f" ({', '.join(doubtful[:3])})" if doubtful else ""
        fail(
            where, name, "the same function of its inputs in every call and every batch (no cache)", f"{reason}{about}"
        )
    return 6


@torch.no_grad()
def compare_batches(where: str, name: str, target: Target, module: nn.Module | None, rows: Rows) -> TargetCheck:
    """Whether ``head(features(...))`` of any target is one function of its inputs.

    Raises:
        ValueError: it depends on earlier calls or on the batch.
    """

    def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return target.head(target.features(x, t, y), t, y)

    tolerance = rounding_tolerance(module, rows.x.device)
    own = call(*rows)
    if not bool(own.isfinite().all()):
        return TargetCheck("features", math.nan, tolerance, 2)
    alone = call(*rows.take(1))
    gap, doubtful, computed = difference(alone, own[1:]), [] if module is None else suspicions(module), 3
    if doubtful or not gap <= tolerance:
        computed += _require_function(where, name, call, rows, own, tolerance, doubtful)
    return TargetCheck("features", gap, tolerance, computed)
