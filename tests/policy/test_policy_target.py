"""A policy as a target: what its module computes, conditions by place, and the sampler around it."""

from __future__ import annotations

import pytest
import torch
from small_policies import SMALL, small_policy, small_target, some_observations

from free_dit.networks.policy import PolicyConfig, PolicyDiT, load_policy, policy_schedule, save_policy
from free_dit.policy.target import PolicyTarget
from free_kernels import PhiloxNoise, ancestral_sample, check_target, sample
from free_kernels.checkpoint import CheckpointError, save_checkpoint
from free_kernels.conditions import Conditions

TIMESTEPS = policy_schedule().timesteps


@pytest.fixture(scope="module")
def target():
    return small_target()


def rows(count: int = 7):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, SMALL.horizon, 2, generator=generator)
    return x, torch.randint(100, (count,), generator=generator), torch.randint(4, (count,), generator=generator)


def test_features_and_head_are_the_modules_call(target):
    observations, (x, t, y) = some_observations(4), rows()
    known = target.conditioned(observations)
    own = target.module(x, t, observations[y])
    for one in (known, known.hoisted(TIMESTEPS, torch.arange(4))):
        h = one.features(x, t, y)
        assert h.shape == (len(x), *target.feature_shape)
        torch.testing.assert_close(one.head(h, t, y), own, rtol=1e-4, atol=1e-5)
    # Negative control: another observation, another output.
    other = known.features(x, t, (y + 1) % 4)
    assert (known.head(other, t, (y + 1) % 4) - own).abs().max() > 1e-2


def test_it_is_compared_with_its_module(target):
    found = check_target(target)
    assert found.path == "hoisted"
    assert found.difference < found.tolerance


def test_observations_are_embedded_once(target, monkeypatch):
    """Once per observation and call of the sampler, however many rows its network calls have."""
    embedded = []
    plain = torch.nn.Flatten.forward

    def counting(self, x):
        embedded.append(len(x))
        return plain(self, x)

    # The first layer of the embedder, which no other part of a policy has.
    monkeypatch.setattr(torch.nn.Flatten, "forward", counting)
    settings = {"schedule": policy_schedule(12), "draft_length": 4}
    # The first run compares with the module's own call anew, which has another layer now.
    sample(target, some_observations(5), **settings)
    assert 5 in embedded
    embedded.clear()
    sample(target, some_observations(5), **settings)
    assert embedded == [5]
    assert target.conditioned(some_observations(5)).pooled.shape == (5, SMALL.condition_size)


def test_samples_depend_on_their_own_observation_only(target):
    observations = some_observations(6)
    settings = {"schedule": policy_schedule(12)}
    whole = ancestral_sample(target, observations, seed=3, **settings).samples
    assert whole.shape == (6, SMALL.horizon, 2)
    alone = ancestral_sample(target, observations[4:5], noise=PhiloxNoise(3, first_image=4), **settings).samples
    torch.testing.assert_close(alone[0], whole[4], rtol=1e-4, atol=1e-4)
    # The same noise under another observation gives another chunk.
    other = ancestral_sample(target, observations[3:4], noise=PhiloxNoise(3, first_image=4), **settings).samples
    assert (other[0] - whole[4]).abs().max() > 1e-3


class Knowing:
    """Says what the target itself says."""

    is_free = True

    def __init__(self, target):
        self.target = target

    def __call__(self, feature, previous, state, t, y):
        return self.target.features(state, t, y)


def test_a_perfect_drafter_returns_the_ordinary_chunks(target):
    observations = some_observations(5)
    schedule = policy_schedule(20)
    ordinary = ancestral_sample(target, observations, schedule=schedule, seed=2)
    knowing = Knowing(target.conditioned(observations))
    result = sample(target, observations, schedule=schedule, drafter=knowing, draft_length=6, seed=2)
    torch.testing.assert_close(result.samples, ordinary.samples, rtol=1e-4, atol=1e-4)
    assert result.stats.call_reduction >= 4
    frozen = sample(target, observations, schedule=schedule, draft_length=6, seed=2)
    assert frozen.stats.call_reduction < result.stats.call_reduction


def test_clean_actions_are_clipped(target):
    """The last step adds no noise: a chunk is the clean prediction, within [-1, 1]."""
    chunk = ancestral_sample(target, some_observations(8), schedule=policy_schedule()).samples
    assert chunk.abs().max() <= 1


@pytest.mark.parametrize(
    ("conditions", "error", "message"),
    [
        (torch.zeros(3, 2, 7), ValueError, r"conditions must be floating point \[N, 2, 6\]"),
        (torch.zeros(3, 2, 6, dtype=torch.int64), TypeError, r"conditions must be floating point \[N, 2, 6\]"),
        ({"seen": torch.zeros(3, 2, 6)}, TypeError, r"conditions must be floating point \[N, 2, 6\]"),
        (Conditions(torch.zeros(3, 2, 6), torch.zeros(2, 6)), ValueError, "null_condition must be None for a policy"),
    ],
)
def test_other_conditions_are_refused(target, conditions, error, message):
    with pytest.raises(error, match=f"^PolicyTarget: {message}"):
        target.conditioned(conditions)


def test_other_modules_and_labels_are_refused(target):
    with pytest.raises(TypeError, match="^PolicyTarget: module must be a PolicyDiT"):
        PolicyTarget(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="^PolicyTarget: module must be in evaluation mode"):
        PolicyTarget(PolicyDiT(SMALL).train())
    with pytest.raises(ValueError, match="^PolicyTarget: conditions must be given"):
        target.features(*rows())
    with pytest.raises(ValueError, match="^PolicyConfig: hidden_size must be a multiple of num_heads 5, got 96"):
        PolicyConfig(num_heads=5)
    with pytest.raises(ValueError, match="^PolicyConfig: token_actions must be a divisor of horizon 16, got 3"):
        PolicyConfig(token_actions=3)


def test_files(tmp_path, target):
    path = tmp_path / "model.safetensors"
    save_policy(path, target.module)
    read = load_policy(path)
    x, t, _ = rows()
    observations = some_observations(len(x))
    assert torch.equal(read(x, t, observations), target.module(x, t, observations))
    size = path.stat().st_size
    save_policy(path, target.module, dtype=torch.float16)
    narrow = load_policy(path)
    assert path.stat().st_size < 0.6 * size
    assert next(narrow.parameters()).dtype == torch.float32
    torch.testing.assert_close(narrow(x, t, observations), target.module(x, t, observations), rtol=0.02, atol=0.02)
    save_checkpoint(path, small_policy().state_dict(), {"kind": "policy", "config": {"depth": 3}})
    with pytest.raises(CheckpointError):
        load_policy(path)
    save_checkpoint(path, small_policy().state_dict(), {"kind": "dit", "config": {}})
    with pytest.raises(CheckpointError, match="kind 'policy'"):
        load_policy(path)
    with pytest.raises(FileNotFoundError):
        load_policy(tmp_path / "none.safetensors")
