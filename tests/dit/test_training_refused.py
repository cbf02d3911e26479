"""Drafters that learn from rows of refused rounds, from chains of two lengths, and from where another one stopped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interrupted_training import interrupted_at
from random_networks import learner, small_target
from safetensors.torch import load_file

from free_dit.train_drafter import DrafterLoss, DrafterTrainConfig, train_drafter
from free_dit.training.loop import LoopConfig
from free_dit.training.refused_rounds import RefusedRounds
from free_kernels import DiTTarget, DrafterConfig, FeatureDrafter

CONFIG = DrafterTrainConfig(
    drafter=DrafterConfig(width=32, head_dim=16),
    loop=LoopConfig(iterations=12, warmup=2, learning_rate=3e-3, ema_decay=0.9, checkpoint_every=4, log_every=1),
    num_steps=14,
    batch_size=16,
    trajectories=8,
    refresh_every=6,
    unroll=3,
    calibration_images=0,
    refused=0.5,
)


@pytest.fixture(scope="module")
def target() -> DiTTarget:
    return small_target()


@pytest.fixture
def rounds(target):
    """The loss, its windows of a batch, their first steps, guidance, and the rounds before them."""
    loss = DrafterLoss(target, learner(target, CONFIG.drafter), CONFIG)
    torch.manual_seed(5)
    windows, start, guidance = loss._windows(loss.main, 0)
    start[:3] = torch.tensor([0, 1, CONFIG.num_steps - 2])
    return loss, windows, start, guidance, RefusedRounds(loss, windows, start, guidance)


def test_reflecting_a_refused_draft_leads_to_where_the_window_begins(rounds):
    """``mu_q + s (z' - 2 e <e, z'>)`` of the draft ``mu_p + s z'``, with e along the gap, is the committed state."""
    loss, windows, start, guidance, made = rounds
    after = start >= 1
    parent = (start - 1).clamp(min=0)
    with torch.no_grad():
        feature = loss.draft(windows, loss.parents(windows, parent), parent, None)
        mean, std = loss.transition(windows, feature, windows.rows("states", parent), parent, guidance)
    refused = made._states[1]
    noise = ((refused - mean) / std).flatten(1)
    gap = (windows.rows("mean", parent) - mean) / std
    along = torch.nn.functional.normalize(gap.flatten(1), dim=1)
    back = (noise - 2 * along * (along * noise).sum(1, keepdim=True)).view_as(mean)
    committed = windows.rows("mean", parent) + windows.rows("std", parent) * back
    # The noise is divided out of float32 states and put back: thousands of ulps where a deviation is 1e-3 of a state.
    torch.testing.assert_close(committed[after], windows.rows("states", start)[after], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(refused[after], windows.rows("states", start)[after], atol=1e-2)


def test_an_error_is_what_the_drafter_lacks_at_the_rounds_row(rounds, target):
    """Drafts at the row plus the error are the target's features there; a window without a round before has none."""
    loss, windows, start, _, made = rounds
    y, both = windows.y, windows.network.both
    known = both(start > 0)
    with torch.no_grad():
        for ahead in range(CONFIG.unroll):
            step = (start + ahead).clamp(max=CONFIG.num_steps - 2)
            t, there, before = both(loss.main.timesteps[step]), made._states[ahead + 1], made._states[ahead]
            exact = target.features(both(there), t, y)
            parent = windows.network.pick(windows.rows("features", (start - 1).clamp(min=0)))
            if ahead:
                previous = (start + ahead - 1).clamp(max=CONFIG.num_steps - 2)
                parent = target.features(both(before), both(loss.main.timesteps[previous]), y)
            drafted = loss.drafter(parent, both(before), both(there), t, y)
            nearer = (windows.rows("states", step) - there).flatten(1).norm(dim=1) < (
                windows.rows("states", step) - windows.rows("states", (step - 1).clamp(min=0))
            ).flatten(1).norm(dim=1)
            serves, errors = known & both(nearer), made.errors(ahead)
            assert serves.any()
            torch.testing.assert_close((drafted + errors)[serves], exact[serves], rtol=1e-4, atol=1e-4)
            assert not errors[~serves].any()


def test_the_first_windows_are_corrected_and_the_others_are_not(target, monkeypatch):
    """Errors of any size move the drafts of the first half of the windows only, in both branches."""
    acceptance = []
    for size in (0.0, 1e3):
        loss = DrafterLoss(target, learner(target, CONFIG.drafter), CONFIG)
        monkeypatch.setattr(
            RefusedRounds, "errors", lambda made, _, size=size: size * torch.randn(made._features[0].shape)
        )
        torch.manual_seed(2)
        acceptance.append(loss(0)[1])
    plain, moved = acceptance
    for ahead in range(1, CONFIG.unroll + 1):
        assert moved[f"corrected_{ahead}"] < 0.5 * plain[f"corrected_{ahead}"]
        assert moved[f"accept_{ahead}"] == pytest.approx(plain[f"accept_{ahead}"], abs=1e-6)


@pytest.mark.parametrize("store", ["memory", "shards"])
def test_training_on_both_lengths_resumes_exactly(target, tmp_path, store):
    config = replace(CONFIG, other_steps=7, other_share=0.5, store=store, keep_shards=2)
    whole = load_file(train_drafter(target, config, tmp_path / "whole", "tiny"))
    with interrupted_at(9):
        train_drafter(target, config, tmp_path / "parts", "tiny")
    resumed = load_file(train_drafter(target, config, tmp_path / "parts", "tiny"))
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-5, atol=1e-6)
    alone = load_file(train_drafter(target, CONFIG, tmp_path / "alone", "tiny"))
    assert any(not torch.equal(alone[name], tensor) for name, tensor in whole.items())


def test_sets_of_the_other_length_have_noise_of_their_own(target):
    loss = DrafterLoss(target, learner(target, CONFIG.drafter), replace(CONFIG, other_steps=7))
    main, other = loss.main.data(0), loss.others[0].data(0)
    assert (len(main.states), len(other.states)) == (14, 7)
    assert torch.equal(main.labels, other.labels)
    assert not torch.equal(main.states[0], other.states[0])


def test_a_training_that_has_begun_needs_its_start_no_more(target, tmp_path):
    first = train_drafter(target, CONFIG, tmp_path / "first", "tiny")
    config = replace(CONFIG, start=str(first))
    whole = load_file(train_drafter(target, config, tmp_path / "whole", "tiny"))
    with interrupted_at(5):
        train_drafter(target, config, tmp_path / "parts", "tiny")
    first.rename(tmp_path / "elsewhere.safetensors")
    resumed = load_file(train_drafter(target, config, tmp_path / "parts", "tiny"))
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-5, atol=1e-6)


def test_training_begins_from_a_drafter(target, tmp_path):
    """With a learning rate of zero the result is the drafter that it began from, scales included."""
    first = train_drafter(target, CONFIG, tmp_path / "first", "tiny")
    still = replace(CONFIG, start=str(first), loop=replace(CONFIG.loop, learning_rate=0.0, seed=4))
    wanted = load_file(first)
    for name, tensor in load_file(train_drafter(target, still, tmp_path / "second", "tiny")).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-7)
    other = replace(still, drafter=replace(CONFIG.drafter, width=48))
    with pytest.raises(ValueError, match="^train_drafter: start must be a drafter of the configuration"):
        train_drafter(target, other, tmp_path / "third", "tiny")
    with pytest.raises(FileNotFoundError):
        train_drafter(target, replace(still, start=str(tmp_path / "none")), tmp_path / "fourth", "tiny")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"refused": 1.5}, "refused must be a finite number in"),
        ({"other_steps": 3}, "other_steps must be an int in"),
        ({"other_steps": 14}, "other_steps must be another number than num_steps"),
        ({"other_share": -0.1}, "other_share must be a finite number in"),
        ({"drafter": DrafterConfig(width=32, head_dim=16, window=2)}, "refused must be 0 for a drafter with a window"),
    ],
)
def test_wrong_settings_are_named(target, tmp_path, changed, message):
    with pytest.raises(ValueError, match=f"^train_drafter: {message}"):
        train_drafter(target, replace(CONFIG, **changed), tmp_path, "tiny")


@pytest.mark.parametrize("late", [0.0, 0.5])
def test_windows_begin_behind_the_frozen_share(target, late):
    """On chains of both lengths; windows over the whole chain are the control."""
    first = []
    for share in (0.0, 0.6):
        config = replace(CONFIG, frozen_share=share, late=late, first=0.2, batch_size=256, other_steps=20)
        loss = DrafterLoss(target, learner(target, CONFIG.drafter), config)
        torch.manual_seed(5)
        first.append([int(loss._windows(chain, 0)[1].min()) for chain in (loss.main, loss.others[0])])
    # Of 14 and of 20 steps.
    assert first[1] == [9, 12]
    assert max(first[0]) < 9


def test_the_file_says_what_it_was_trained_for(target, tmp_path):
    path = train_drafter(target, replace(CONFIG, frozen_share=0.6), tmp_path, "random")
    assert FeatureDrafter.load(path, target).frozen_share == 0.6


@pytest.mark.parametrize(
    ("settings", "expectation"),
    [
        ({"frozen_share": 1.5}, r"frozen_share must be a finite number in \[0, 1\]"),
        (
            {"frozen_share": 0.5, "refused": 0.0, "drafter": DrafterConfig(width=32, head_dim=16, window=3)},
            "0 for a drafter",
        ),
    ],
)
def test_a_wrong_share_is_refused(settings, expectation):
    with pytest.raises(ValueError, match=expectation):
        replace(CONFIG, **settings).check()
