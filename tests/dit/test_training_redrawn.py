"""Drafters that learn from windows whose noise is drawn anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from analytic import GaussianTarget
from random_networks import learner, small_target

from free_dit.train_drafter import DrafterLoss, DrafterTrainConfig, train_drafter
from free_dit.training import redrawn as redrawn_module
from free_dit.training.loop import LoopConfig
from free_dit.training.redrawn import RedrawnWindows
from free_kernels import DiTTarget, DrafterConfig, FeatureDrafter

CONFIG = DrafterTrainConfig(
    drafter=DrafterConfig(width=32, head_dim=16),
    loop=LoopConfig(iterations=4, warmup=2, learning_rate=3e-3, ema_decay=0.9, checkpoint_every=2, log_every=1),
    num_steps=14,
    batch_size=16,
    trajectories=8,
    refresh_every=6,
    unroll=3,
    calibration_images=0,
    redrawn=1.0,
)


@pytest.fixture(scope="module")
def target() -> DiTTarget:
    return small_target()


def windows_of(loss: DrafterLoss, seed: int = 5):
    """A batch with windows at the chain's first step, behind it and at its last draft."""
    torch.manual_seed(seed)
    windows, start, guidance = loss._windows(loss.main, 0)
    start[:3] = torch.tensor([0, 1, CONFIG.num_steps - 2])
    return windows, start, guidance


def test_the_new_rows_are_the_targets(target):
    loss = DrafterLoss(target, learner(target, CONFIG.drafter), CONFIG)
    windows, start, guidance = windows_of(loss)
    made = RedrawnWindows(loss, windows, start, guidance)
    for ahead in range(3):
        inside = start + ahead <= CONFIG.num_steps - 2
        step = (start + ahead).clamp(max=CONFIG.num_steps - 2)
        t = windows.network.both(loss.main.timesteps[step])
        feature = target.features(windows.network.both(made.states[ahead]), t, windows.y)
        mean, std = loss.transition(windows, feature, made.states[ahead], step, guidance)
        for wanted, found in ((feature, made.features), (mean, made.means), (std, made.stds)):
            torch.testing.assert_close(found[ahead], wanted, rtol=1e-5, atol=1e-5)
        away = (made.states[ahead] - windows.rows("states", step)).flatten(1).abs().amax(1)
        # Only the window at the first step has a state of the chain.
        assert (away > 1e-3)[inside].tolist() == [bool(begin > 0 or ahead > 0) for begin in start[inside]]


class Tokens(GaussianTarget):
    """A Gaussian target with fewer, wider tokens than elements."""

    def __init__(self, latent_shape: tuple[int, ...], tokens: int) -> None:
        super().__init__(latent_shape)
        self.elements, self.feature_shape = self.feature_shape[0], (tokens, 2 * self.feature_shape[0] // tokens)

    def features(self, x, t, y):
        return super().features(x, t, y).view(len(x), *self.feature_shape)

    def head(self, h, t, y):
        return super().head(h.view(len(h), self.elements, 2), t, y)


@pytest.mark.parametrize(("shape", "tokens"), [((8, 2), 8), ((6, 2, 4, 4), 8)], ids=["lines", "frames"])
def test_states_of_any_shape(shape, tokens):
    """As many windows as channels, so that a mask along another dimension would fit, too."""
    target = Tokens(shape, tokens)
    config = replace(CONFIG, batch_size=6, drafter=DrafterConfig(width=32, head_dim=16))
    drafter = FeatureDrafter(target.latent_shape, target.feature_shape, target.num_classes, config.drafter)
    loss = DrafterLoss(target, drafter, config)
    torch.manual_seed(5)
    windows, start, guidance = loss._windows(loss.main, 0)
    start[:2] = torch.tensor([0, 3])
    made = RedrawnWindows(loss, windows, start, guidance)
    assert made.states[0].shape == (6, *shape)
    first, chain = made.states[0], windows.rows("states", start)
    assert torch.equal(first[start == 0], chain[start == 0])
    assert (first - chain).flatten(1).abs().amax(1)[start > 0].min() > 1e-3
    assert torch.isfinite(loss(0)[0])


def test_new_noise_is_standard_normal_and_new_every_time(target, monkeypatch):
    """400 windows of one chain step: mean and variance of 25,600 normals, within 5 standard errors."""
    loss = DrafterLoss(target, learner(target, CONFIG.drafter), replace(CONFIG, batch_size=400))
    torch.manual_seed(5)
    windows, start, guidance = loss._windows(loss.main, 0)
    start.fill_(6)
    mean, std = (windows.rows(name, start - 1) for name in ("mean", "std"))

    def errors(made: RedrawnWindows) -> list[list[float]]:
        """Of mean and variance of the noise of the first two steps, in standard errors."""
        steps = (made.states[0] - mean) / std, (made.states[1] - made.means[0]) / made.stds[0]
        return [
            [abs(z.mean().item()) * z.numel() ** 0.5, abs(z.var().item() - 1) * (z.numel() / 2) ** 0.5] for z in steps
        ]

    first, second = (RedrawnWindows(loss, windows, start, guidance) for _ in range(2))
    assert max(max(one) for one in errors(first)) < 5
    # Controls: noise a tenth too wide, and a tenth of a deviation off.
    draw = redrawn_module._draw
    for which, wrong in enumerate((lambda m, s: draw(m + 0.1 * s, s), lambda m, s: draw(m, 1.1 * s))):
        with monkeypatch.context() as patched:
            patched.setattr(redrawn_module, "_draw", wrong)
            assert all(one[which] > 5 for one in errors(RedrawnWindows(loss, windows, start, guidance)))
    assert (first.states[0] - second.states[0]).flatten(1).abs().amax(1).min() > 0


@pytest.mark.parametrize(("share", "window", "refused"), [(0.5, 1, 0.0), (1.0, 1, 0.0), (0.5, 1, 0.5), (0.5, 2, 0.0)])
def test_with_the_chains_own_noise_the_loss_is_that_of_the_chains(target, monkeypatch, share, window, refused):
    """The same windows drawn "anew" with the noise that the chain had; a new draw is the control."""
    drafter = replace(CONFIG.drafter, window=window)
    plain = replace(CONFIG, redrawn=0.0, refused=refused, feature_weight=0.5, drafter=drafter)
    config = replace(plain, redrawn=share)
    first = DrafterLoss(target, learner(target, plain.drafter), plain)
    second = DrafterLoss(target, learner(target, config.drafter), config)
    found = []
    chains: list[torch.Tensor] = []

    def same(loss, windows, start, guidance, part):
        some = windows.part(part, guidance, window > 1)
        last = CONFIG.num_steps - 2
        steps = [(start[part] + ahead).clamp(max=last) for ahead in range(config.unroll + 1)]
        chains[:] = [some.rows("states", step) for step in steps]
        return RedrawnWindows(loss, some, start[part], guidance[part])

    for loss in (first, second):
        torch.manual_seed(9)
        found.append(loss(0))
    torch.manual_seed(9)
    with monkeypatch.context() as patched:
        patched.setattr(DrafterLoss, "_redrawn", same)
        patched.setattr(redrawn_module, "_draw", lambda *_: chains.pop(0))
        again = second(0)
    torch.testing.assert_close(again[0], found[0][0], rtol=1e-4, atol=1e-5)
    assert again[1] == pytest.approx(found[0][1], rel=1e-4)
    assert (found[1][0] - found[0][0]).abs().item() > 1e-3


def test_no_window_is_both_corrected_and_new(target, monkeypatch):
    """Half of 15 is 8 of each, rounded; and a share that rounds to none asks for none."""
    parts = []

    def noted(loss, windows, start, guidance, part):
        parts.append((part.start, part.stop))
        return RedrawnWindows(loss, windows.part(part, guidance), start[part], guidance[part])

    monkeypatch.setattr(DrafterLoss, "_redrawn", noted)
    for redrawn in (0.5, 0.01):
        config = replace(CONFIG, batch_size=15, refused=0.5, redrawn=redrawn)
        torch.manual_seed(9)
        DrafterLoss(target, learner(target, config.drafter), config)(0)
    assert parts == [(8, 15)]


def test_a_run_repeats(target, tmp_path):
    whole = train_drafter(target, CONFIG, tmp_path / "whole", "random")
    again = train_drafter(target, CONFIG, tmp_path / "again", "random")
    assert whole.read_bytes() == again.read_bytes()
    other = train_drafter(target, replace(CONFIG, redrawn=0.0), tmp_path / "other", "random")
    assert whole.read_bytes() != other.read_bytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"redrawn": 1.5}, r"redrawn must be a finite number in \[0, 1\]"),
        ({"redrawn": 0.75, "refused": 0.5}, "redrawn must be at most 1 - refused, 0.5, got 0.75"),
    ],
)
def test_wrong_settings_are_named(changed, message):
    with pytest.raises(ValueError, match=f"^train_drafter: {message}"):
        replace(CONFIG, **changed).check()
