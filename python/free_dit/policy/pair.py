"""The policy and drafter of a name or a path, and the bundled pair."""

from __future__ import annotations

from pathlib import Path

from free_dit.bundled import MODELS
from free_dit.files import sha256_of
from free_dit.networks.policy import load_policy
from free_dit.policy.target import PolicyTarget
from free_kernels import FeatureDrafter

# The pair that ships with the package.
BUNDLED = "reach"
FOLDER = MODELS / "policy"


def load_bundled_policy() -> tuple[PolicyTarget, FeatureDrafter]:
    """The shipped policy and its learned drafter.

    They are ready for ``sample(target, observations, schedule=policy_schedule(), drafter=drafter)`` with ``observations
    [N, 2, 6]`` (:func:`free_dit.policy.task.observe`).
    """
    target, drafter, _ = load_policy_pair()
    return target, drafter  # type: ignore[return-value]


def load_policy_pair(
    model: str | Path = BUNDLED, drafter: str | Path = BUNDLED
) -> tuple[PolicyTarget, FeatureDrafter | str, dict[str, str]]:
    """A policy, its drafter, and the SHA-256 of their files.

    Args:
        model: ``"reach"``, the bundled policy, or a ``model.safetensors`` written by ``policy train``.
        drafter: ``"reach"``, the bundled drafter; ``"frozen"``, which drafts from the policy's own clean
            samples; or a ``drafter.safetensors``.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: broken, or of another kind.
        ValueError: the drafter was made for a policy of other shapes.
    """
    path = FOLDER / "policy.safetensors" if str(model) == BUNDLED else Path(model)
    target, hashes = PolicyTarget(load_policy(path)), {"model": sha256_of(path)}
    if str(drafter) == "frozen":
        return target, "frozen", hashes | {"drafter": "frozen"}
    path = FOLDER / "drafter.safetensors" if str(drafter) == BUNDLED else Path(drafter)
    return target, FeatureDrafter.load(path, target), hashes | {"drafter": sha256_of(path)}
