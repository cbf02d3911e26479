"""What adapters of text-to-image transformers share: places of conditions, comparison with the module, time."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from free_kernels.conditioning import ShowsTimesteps, TimestepTable
from free_kernels.conditions import Condition, Conditions
from free_kernels.constants import TIME_TICKS
from free_kernels.protocols import TargetDefaults
from free_kernels.targets.text.compared import ComparedTarget, besides_text
from free_kernels.targets.text.conditions import Form, Texts, check_form, store_texts
from free_kernels.validation import check_int, fail
from free_kernels.wrappers import kind_of, see_through


def is_diffusers_class(module: object, name: str) -> bool:
    """Whether an object is of a class of diffusers; told by its class's name, so that nothing is imported."""
    bases = type(module).__mro__
    return any(base.__name__ == name and base.__module__.partition(".")[0] == "diffusers" for base in bases)


class TextTarget(ComparedTarget, ShowsTimesteps, TargetDefaults):
    """Base of the adapters; a :class:`free_kernels.protocols.Target` once a family fills it in.

    It has no labels of its own: :meth:`conditioned` makes the copy that is sampled, whose labels are places among
    conditions. The text of an image is projected there, once, and what is stored of it is the projection where that
    takes no more bytes than the text; a row of a call refers to it by its label.

    A family gives ``module_class`` and the members below that raise, and calls :meth:`recheck`
    at the end of its constructor.

    Args:
        module: the transformer, in evaluation mode.
        latent_shape: (C, H, W); None: the family's own.
        null_condition: the condition of guidance's unconditional branch, in the form of one image's, unless the sampler
            is given another.

    Raises:
        TypeError: a module of another class.
        ValueError: the module cannot be sampled (:func:`free_kernels.check_target` has the reasons), or a shape that it
            does not take.
    """

    # Must equal the schedule's `family`.
    family = "flow"
    module_class: ClassVar[str]
    num_classes = 0
    has_null_label = False
    learns_variance = False
    latent_shape: tuple[int, int, int]
    feature_shape: tuple[int, int]

    def __init__(
        self, module: Any, latent_shape: Sequence[int] | None = None, null_condition: Condition | None = None
    ) -> None:
        name = type(self).__name__
        seen = see_through(name, module)
        if not is_diffusers_class(seen.module, self.module_class):
            fail(name, "module", f"a diffusers {self.module_class}", kind_of(seen.module), TypeError)
        self.module: Any = seen.module
        self._whole, self._name, self._null = seen.whole, name, null_condition
        self._path, self._time_table = "blocks", None
        self._texts: Texts | None = None
        # Float ``[M, D]`` of every place, added to the timestep's embedding; None: nothing is.
        self._vectors: Tensor | None = None
        # The conditions themselves, kept for comparisons only.
        self._given: Conditions | None = None
        if self.family == "flow":
            self.num_train_steps = TIME_TICKS
        self.latent_shape = self._checked_shape(self._own_shape() if latent_shape is None else latent_shape)
        self.guidance_channels = self.latent_shape[0]
        self.feature_shape = (self._grid[0] * self._grid[1], int(self.module.proj_out.in_features))

    # What a family fills in.

    @property
    def _entering(self) -> Tensor:
        """The weight that meets the latent."""
        raise NotImplementedError

    @property
    def patch(self) -> int:
        """Elements of the latent along a side of a token."""
        return int(self.module.config.patch_size)

    @property
    def forms(self) -> Mapping[str, Form]:
        """The tensors of a dict of conditions, ``prompt_embeds`` first."""
        raise NotImplementedError

    def _own_shape(self) -> tuple[int, int, int]:
        config = self.module.config
        return config.in_channels, config.sample_size, config.sample_size

    def _channels(self) -> int:
        return int(self.module.config.in_channels)

    def _project(self, text: Tensor) -> Tensor:
        """Texts ``[M, T, W]`` as the blocks are given them, ``[M, T, D]``."""
        raise NotImplementedError

    def _time_embedder(self, shown: Tensor) -> Tensor:
        """Embedding ``[R, D]`` of what the network is shown of its timesteps."""
        raise NotImplementedError

    def _condition_vectors(self, values: Mapping[str, Tensor]) -> Tensor | None:
        """What conditions ``[M, ...]`` add to the timestep's embedding, ``[M, D]``."""
        return None

    def _pooled(self, conditions: Conditions) -> Tensor:
        """A vector for each place, float32 ``[M, P]``, for drafters."""
        raise NotImplementedError

    def _call(self, x: Tensor, t: Tensor, values: Mapping[str, Tensor]) -> object:
        """The module's own call on states, what it is shown of timesteps, and conditions of the rows."""
        raise NotImplementedError

    def features(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Tokens of the image ``[R, T, D]`` after the last block."""
        raise NotImplementedError

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Network output ``[R, C or 2C, H, W]``; of a flow model the velocity towards the data."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The module's dtype."""
        return self._entering.dtype

    @property
    def device(self) -> torch.device:
        """The module's device."""
        return self._entering.device

    # Conditions.

    def conditioned(self, conditions: Conditions) -> Self:
        """A copy whose labels are places among conditions, 0 ... N - 1, and N for the null condition.

        Raises:
            ValueError, TypeError: conditions of another form; the message names the tensor.
        """
        return self._bound(conditions.or_null(self._name, self._null))

    @torch.no_grad()
    def _bound(self, conditions: Conditions) -> Self:
        clone = copy.copy(self)
        values = check_form(self._name, conditions.values, self.forms)
        if conditions.null is not None:
            check_form(self._name, {name: leaf.unsqueeze(0) for name, leaf in conditions.null.items()}, self.forms)
        clone.num_classes, clone.has_null_label = len(conditions), conditions.null is not None
        clone._texts = store_texts(conditions, self._project, self.dtype, self.device)
        clone._vectors, clone._time_table = None, None
        if self._condition_vectors(besides_text(values, self)) is not None:
            clone._vectors = conditions.vectors(lambda given: self._condition_vectors(besides_text(given, self)))
        clone.pooled = clone._pooled(conditions)
        clone._prepare()
        return clone

    def _prepare(self) -> None:
        """Make what depends on the number of text tokens, of a copy with its texts."""

    @property
    def texts(self) -> Texts:
        """The stored texts.

        Raises:
            ValueError: there are none: the target has not been given conditions.
        """
        if self._texts is None:
            fail(self._name, "conditions", "given: target.conditioned(Conditions(...))", "labels only")
        return self._texts

    # Time.

    def _shown(self, t: Tensor) -> Tensor:
        """What the network is shown of timesteps ``[R]``: of a flow model's ticks 1000 at noise and 0 at data."""
        return (1 - t.float() / TIME_TICKS) * 1000 if self.family == "flow" else self._timestep(t)

    def _time_embedding(self, t: Tensor) -> Tensor:
        """``[R, D]`` of timesteps ``[R]``."""
        return self._time_embedder(self._shown(t)) if self._time_table is None else self._time_table(t)

    def _conditioning(self, t: Tensor, y: Tensor) -> Tensor:
        """Embedding of timestep and condition ``[R, D]``."""
        embedding = self._time_embedding(t)
        return embedding if self._vectors is None else embedding + self._vectors.index_select(0, y)

    def hoisted(self, timesteps: Tensor, labels: Tensor) -> Self:
        """A copy on which what depends on the timestep only is computed once.

        Raises:
            ValueError: the module has changed since it was compared, and can no longer be sampled.
        """
        self.recheck(self._name)
        return self._tabled(timesteps)

    @torch.no_grad()
    def _tabled(self, timesteps: Tensor) -> Self:
        clone = copy.copy(self)
        clone._time_table = TimestepTable(self._time_embedding, timesteps.to(self.device))
        return clone

    # Shapes.

    @property
    def _grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.latent_shape[1] // self.patch, self.latent_shape[2] // self.patch

    def _checked_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        channels, patch = self._channels(), self.patch
        if not isinstance(shape, tuple | list) or len(shape) != 3:
            fail(self._name, "latent_shape", f"({channels}, H, W)", repr(shape))
        for size in shape:
            check_int(self._name, "latent_shape", size, 1)
        if shape[0] != channels or shape[1] % patch or shape[2] % patch:
            fail(self._name, "latent_shape", f"({channels}, H, W) with multiples of {patch}", repr(tuple(shape)))
        return tuple(shape)

    def _unpatched(self, tokens: Tensor, channels: int) -> Tensor:
        """Tokens ``[R, T, patch^2 channels]``, channels last within a patch, as ``[R, channels, H, W]``."""
        patch, (rows, columns) = self.patch, self._grid
        patches = tokens.reshape(-1, rows, columns, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
        return patches.reshape(-1, channels, rows * patch, columns * patch)
