"""Whether an adapter of a text-to-image transformer computes what its module's own call computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from free_kernels.conditions import Conditions
from free_kernels.protocols import TargetDefaults
from free_kernels.targets.check import Rows, TargetCheck, alignment, checked, compare_paths, difference
from free_kernels.targets.inspection import is_replaced, refuse_outer_patches, refuse_unsafe
from free_kernels.targets.text.conditions import EMBEDS, MASK, probe_values
from free_kernels.validation import fail
from free_kernels.wrappers import first_output

if TYPE_CHECKING:
    from free_kernels.targets.text.base import TextTarget

# Text tokens of the conditions that a module is compared on.
_PROBE_TOKENS = 5


def cast(values: Mapping[str, Tensor], target: TextTarget) -> dict[str, Tensor]:
    """Conditions on the network's device and, where they are numbers of it, in its dtype."""
    forms = target.forms
    return {
        name: leaf.to(target.device) if forms[name].mask else leaf.to(target.device, target.dtype)
        for name, leaf in values.items()
    }


def besides_text(values: Mapping[str, Tensor], target: TextTarget) -> dict[str, Tensor]:
    """Conditions without the texts and their mask, cast."""
    return cast({name: leaf for name, leaf in values.items() if name not in (EMBEDS, MASK)}, target)


class ComparedTarget:
    """What :class:`TextTarget` is compared by, and what the comparison asks of it."""

    def recheck(self, where: str) -> TargetCheck:
        """Compare with the module's own call unless that has been done of this very network, and take what agrees.

        Raises:
            ValueError: as :func:`free_kernels.check_target`.
        """
        walked = refuse_unsafe(where, self._whole)
        refuse_outer_patches(where, self._whole, self.module)
        # What may be bypassed is asked anew: an attention's processor is no part of a module's fingerprint.
        key = type(self), self.latent_shape, *self.convention(), *self.paths()
        found = checked(key, self, self._whole, walked, lambda: self.compare(where))
        self._path = found.path
        return found

    def convention(self) -> tuple[Any, ...]:
        """What the module is shown besides (x, t, y), as far as a caller chooses it."""
        return ()

    @torch.no_grad()
    def compare(self, where: str) -> TargetCheck:
        """The comparison itself, made anew, on random conditions with ragged masks.

        First row by row, then in one call whose rows share and change images.
        """
        values = probe_values(self.forms, _PROBE_TOKENS)
        null = {name: leaf[-1] for name, leaf in values.items()}
        whole = copy.copy(self)
        whole._shown_table = None
        conditions = Conditions({name: leaf[:-1] for name, leaf in values.items()}, null, self.device)
        probe = whole._bound(conditions)
        probe._given = conditions
        found = compare_paths(where, "module", probe, self._whole)
        return found if found.difference != found.difference else probe._compare_packed(where, found)

    def _compare_packed(self, where: str, found: TargetCheck) -> TargetCheck:
        """The same of a call with two rows of one image beside rows of others."""
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(4, *self.latent_shape, generator=generator, dtype=torch.float32, device="cpu").to(self.device)
        span = TargetDefaults.read(self, "num_train_steps") or 1000
        t = torch.tensor([span // 2, span // 3, span // 8, span - span // 8], device=self.device)
        y = torch.tensor([1, 1, 2, 0], device=self.device)
        target = self.on_path(found.path, t, y)
        gap = difference(target.head(target.features(x, t, y), t, y), self.own(x, t, y))
        if not gap <= found.tolerance:
            wanted = "a network whose rows are the same beside rows of other images"
            fail(where, "module", wanted, f"a difference of {gap:.2g} of its size (rounding: {found.tolerance:.1e})")
        return found._replace(difference=max(gap, found.difference), network_rows=found.network_rows + 8)

    def own(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Output of the module's own call, as ``head`` gives it, with a copy of its text for every row.

        Raises:
            ValueError: the target does not hold conditions, which only a comparison keeps.
        """
        if self._given is None:
            fail(self._name, "conditions", "those of a comparison", "others, of which the projection is kept only")
        output = first_output(self._call(x.to(self.dtype), self._shown(t), cast(self._given.rows(y), self)))
        return self._as_output(output)

    def _as_output(self, output: Tensor) -> Tensor:
        """What the module predicts in this library's terms: the velocity towards the data."""
        return -output[:, : self.latent_shape[0]] if self.family == "flow" else output

    def check_convention(self, where: str, rows: Rows, own: Tensor) -> None:
        """Raise ValueError where the output near pure noise points the other way."""
        if self.family == "flow" and alignment(own[1], rows.x[1]) > 0.5:
            wanted = "a network that predicts noise minus data, as diffusers' flow schedulers take it"
            fail(where, "module", wanted, f"{type(self.module).__name__}, whose output at pure noise is against it")
        if self.family == "diffusion" and alignment(own[0], rows.x[0]) < -0.5:
            wanted = "a network that predicts noise"
            fail(where, "module", wanted, f"{type(self.module).__name__}, whose output at pure noise is against it")

    def paths(self) -> list[str]:
        """Ways to run the blocks, the preferred one first."""
        parts = self._left_out()
        return ["blocks"] if parts is None or any(is_replaced(part) for part in parts) else ["hoisted", "blocks"]

    def _left_out(self) -> list[nn.Module] | None:
        """Modules that running the blocks by their parts does not call; None where they are called as they are."""
        return None

    def on_path(self, path: str, t: Tensor, y: Tensor) -> Self:
        """A copy hoisted for timesteps that takes one of the ways."""
        clone = self._tabled(t.unique())
        clone._path = path
        return clone

    def heavy_parts(self) -> list[nn.Module]:
        """None: the target is run itself."""
        return []

    def with_heavy_parts(self, parts: Sequence[Callable[[Tensor], Tensor]]) -> Self:
        """Itself: there are none."""
        return self
