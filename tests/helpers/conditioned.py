"""A Gaussian target whose condition is a dict of tensors, with a law that is known in closed form."""

from __future__ import annotations

import copy

import torch
from analytic import GaussianTarget


class ConditionedGaussian(GaussianTarget):
    """As :class:`GaussianTarget`; mean, deviation and tilt of an image are its condition, ragged by a mask.

    ``conditions["data"]["mean"]`` and ``["std"]`` are ``[N, W, elements]`` for W words; the mean of an image is the sum
    over the words that ``conditions["mask"]``, bool ``[N, W]``, keeps.
    """

    def __init__(self, latent_shape=(4, 2), learns_variance=False):
        super().__init__(tuple(latent_shape), 1, learns_variance)
        self.num_classes = 0

    def conditioned(self, conditions):
        clone = copy.copy(self)
        clone.num_classes, clone.has_null_label = len(conditions), conditions.null is not None
        words = conditions.vectors(
            lambda given: torch.stack([_kept(given, name) for name in ("mean", "std", "tilt")], 1)
        )
        clone.means, clone.stds, clone.tilt = words.unbind(1)
        clone.pooled = torch.cat([clone.means, clone.stds], 1)
        return clone


def _words(given):
    return torch.stack([_kept(given, name) for name in ("mean", "std", "tilt")], 1)


def _kept(given, name):
    return (given["data"][name] * given["mask"].unsqueeze(-1)).sum(1)


def some_conditions(count: int, elements: int, seed: int = 0, words: int = 3):
    """Conditions of ``count`` images; words that the mask leaves out hold NaN-free rubbish."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(words) < torch.randint(1, words + 1, (count, 1), generator=generator)
    share = mask.unsqueeze(-1) / mask.sum(1).view(-1, 1, 1)
    rubbish = 50.0 * ~mask.unsqueeze(-1)
    mean = torch.randn(count, words, elements, generator=generator) * 0.7
    std = (torch.rand(count, 1, elements, generator=generator) * 0.6 + 0.3) * share
    tilt = torch.randn(count, 1, elements, generator=generator) * share
    data = {"mean": mean + rubbish, "std": std + rubbish, "tilt": tilt + rubbish}
    return {"data": data, "mask": mask}


def null_of(conditions):
    """The first of some conditions, as one condition."""
    return {"data": {name: value[0] for name, value in conditions["data"].items()}, "mask": conditions["mask"][0]}
