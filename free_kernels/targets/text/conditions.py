"""Texts of images as text-to-image transformers take them: checked, projected once for an image, stored once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from free_kernels.conditions import Condition, Conditions
from free_kernels.validation import fail

EMBEDS, MASK, POOLED = "prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds"
# What a text that is masked out counts less, as in diffusers: its weight is exp(-10000), which is 0.
_MASKED = -10000.0


class Form(NamedTuple):
    """One tensor of a dict of conditions.

    Attributes:
        shape: without the dimension of images; ``"T"`` is the number of text tokens.
        optional: whether it may be left out.
        mask: whether it holds zeros and ones, of any dtype, and not numbers of a network.
    """

    shape: tuple[int | str, ...]
    optional: bool = False
    mask: bool = False


def check_form(where: str, values: Condition, forms: Mapping[str, Form]) -> dict[str, Tensor]:
    """Conditions ``[N, ...]`` as a dict of the tensors that a network takes.

    Raises:
        TypeError: no dict.
        ValueError: a name that is missing or unknown, or a tensor of another shape or dtype.
    """
    needed = [repr(name) for name, form in forms.items() if not form.optional]
    others = [repr(name) for name, form in forms.items() if form.optional]
    wanted = "a dict with " + " and ".join(needed) + (f" and perhaps {', '.join(others)}" if others else "")
    if not isinstance(values, Mapping):
        fail(where, "conditions", wanted, values, TypeError)
    missing = [name for name, form in forms.items() if not form.optional and name not in values]
    if missing or not values.keys() <= forms.keys():
        fail(where, "conditions", wanted, f"one with {', '.join(map(repr, values)) or 'nothing'}")
    tokens: int | None = None
    for name, form in forms.items():
        if name not in values:
            continue
        value, argument = values[name], f"conditions[{name!r}]"
        sizes = ["T" if size == "T" and tokens is None else tokens if size == "T" else size for size in form.shape]
        layout = f"[{', '.join(map(str, ['N', *sizes]))}]"
        if not isinstance(value, Tensor):
            fail(where, argument, layout, "a dict", TypeError)
        fits = value.ndim == len(sizes) + 1 and value.shape.numel() > 0
        fits = fits and all(size in ("T", found) for size, found in zip(sizes, value.shape[1:], strict=True))
        if not fits:
            fail(where, argument, layout, value)
        if not form.mask and not value.is_floating_point():
            fail(where, argument, f"floating-point {layout}", value)
        if form.mask and not bool(((value == 0) | (value == 1)).all()):
            fail(where, argument, f"{layout} of ones (kept) and zeros (left out)", "other values")
        if "T" in form.shape:
            tokens = value.shape[1 + form.shape.index("T")]
    return dict(values)


class Texts(NamedTuple):
    """Texts of M images, the null condition's last if there is one.

    Attributes:
        embeds: ``[M, T, E]``, projected if that takes no more bytes than they did.
        is_projected: whether they are.
        bias: ``[M, T]``, added to attention scores; None without a mask.
        lengths: of each image, the tokens up to the last that its mask keeps; all where it keeps none, as attention is
            then the same for all.
        is_whole: of each image, whether these are kept one and all.
    """

    embeds: Tensor
    is_projected: bool
    bias: Tensor | None
    lengths: list[int]
    is_whole: list[bool]

    def mean(self, image: int, project: Callable[[Tensor], Tensor]) -> Tensor:
        """Mean of the projected tokens that the mask keeps, float32 ``[E]``; of all where it keeps none."""
        tokens = self.embeds[image : image + 1, : self.lengths[image]]
        tokens = (tokens if self.is_projected else project(tokens))[0].float()
        if self.is_whole[image] or self.bias is None:
            return tokens.mean(0)
        weights = torch.softmax(self.bias[image, : len(tokens)].float(), 0)
        return weights @ tokens


def store_texts(
    conditions: Conditions, project: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device
) -> Texts:
    """Texts of conditions that :func:`check_form` has seen, image by image, so that little is held besides them.

    Args:
        conditions: with ``prompt_embeds`` and perhaps ``prompt_attention_mask``.
        project: maps ``[1, T, W]`` of the network's dtype to ``[1, T, D]``.
        dtype: of the network.
        device: of the network.
    """
    given = conditions.values[EMBEDS]
    count = len(conditions) + (conditions.null is not None)
    first = project(given[:1].to(device, dtype))
    is_projected = first.shape[2] * first.element_size() <= given.shape[2] * given.element_size()
    if not is_projected and conditions.null is None:
        embeds = given.to(device, dtype)
    else:
        shape = count, given.shape[1], (first if is_projected else given).shape[2]
        embeds = torch.empty(shape, dtype=dtype, device=device)
        for image in range(count):
            text = conditions.at(image)[EMBEDS].unsqueeze(0).to(device, dtype)
            embeds[image] = (project(text) if is_projected else text)[0]
    mask = conditions.values.get(MASK)
    if mask is None:
        return Texts(embeds, is_projected, None, [embeds.shape[1]] * count, [True] * count)
    kept = mask if conditions.null is None else torch.cat([mask, conditions.null[MASK].unsqueeze(0)])
    kept = kept != 0
    bias = ((1 - kept.to(device, dtype)) * _MASKED).contiguous()
    place = torch.arange(1, kept.shape[1] + 1, device=kept.device)
    lengths = torch.where(kept, place, 0).amax(1).tolist()
    sums = kept.sum(1).tolist()
    lengths = [length or embeds.shape[1] for length in lengths]
    return Texts(embeds, is_projected, bias, lengths, [total == n for total, n in zip(sums, lengths, strict=True)])


class Group(NamedTuple):
    """Neighbouring rows of a call: ``rows`` of each of ``images``, from row ``first`` on."""

    first: int
    rows: int
    images: list[int]


def group_rows(places: list[int], merge: bool) -> list[Group]:
    """Rows of a call by image: neighbours of one image are a group, and with ``merge`` groups of equal size are one."""
    groups: list[Group] = []
    for row, place in enumerate(places):
        if groups and groups[-1].images == [place]:
            groups[-1] = groups[-1]._replace(rows=groups[-1].rows + 1)
        else:
            groups.append(Group(row, 1, [place]))
    if not merge:
        return groups
    merged: list[Group] = []
    for group in groups:
        if merged and merged[-1].rows == group.rows:
            merged[-1].images.extend(group.images)
        else:
            merged.append(group)
    return merged


class GroupText(NamedTuple):
    """What a group's rows attend to: ``embeds [G, T, D]`` and ``bias [G, 1, 1, T]``, or None where all is kept."""

    group: Group
    embeds: Tensor
    bias: Tensor | None


def text_of_group(texts: Texts, group: Group, project: Callable[[Tensor], Tensor]) -> GroupText:
    """A group's text, projected: a view where one image, or neighbours, are stored so, else a copy for each image."""
    images = group.images
    length = max(texts.lengths[image] for image in images)
    if images == list(range(images[0], images[0] + len(images))):
        where: slice | Tensor = slice(images[0], images[0] + len(images))
    else:
        where = torch.tensor(images, device=texts.embeds.device)
    embeds = texts.embeds[where, :length]
    bias = None
    if not all(texts.is_whole[image] and texts.lengths[image] == length for image in images):
        bias = texts.bias[where, :length].unsqueeze(1).unsqueeze(1)
    return GroupText(group, embeds if texts.is_projected else project(embeds), bias)


def probe_values(forms: Mapping[str, Form], tokens: int, images: int = 2) -> dict[str, Tensor]:
    """Random conditions of ``images`` images and, last, of the null condition, with ragged masks; float32, on the CPU.

    They are for comparisons: every image is unlike the others, and its masked tokens unlike zero.
    """
    generator = torch.Generator().manual_seed(1)
    values = {}
    for name, form in forms.items():
        shape = [images + 1, *(tokens if size == "T" else int(size) for size in form.shape)]
        if form.mask:
            kept = torch.tensor([max(1, tokens - image) for image in range(images + 1)])
            values[name] = (torch.arange(tokens) < kept.unsqueeze(1)).to(torch.int64)
        else:
            values[name] = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return values
