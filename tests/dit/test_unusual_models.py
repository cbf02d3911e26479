"""Models without a null label, with one class, a fixed variance, on rectangles: from the file to a drafter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from random_networks import randomised
from torch import nn

from free_dit.checkpoints import infer_config, save_dit_checkpoint
from free_dit.loading import load_target
from free_dit.networks.dit import DiT, DiTConfig, sincos_positions
from free_dit.training.drafter_config import DrafterTrainConfig
from free_dit.training.loop import LoopConfig
from free_dit.training.train_drafter import train_drafter
from free_kernels import DDPMSchedule, DiTTarget, DrafterConfig, FeatureDrafter, ancestral_sample, sample
from free_kernels.checkpoint import CheckpointError
from free_kernels.constants import TransitionColumn
from free_kernels.ops.coupling import gaussian_transition

SMALL = DiTConfig(8, 2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=5)
TRAINING = DrafterTrainConfig(
    DrafterConfig(width=32, depth=1, head_dim=16),
    LoopConfig(iterations=2),
    num_steps=8,
    batch_size=2,
    trajectories=2,
    refused=0.5,
    calibration_images=2,
    max_guidance=1.0,
)
SHAPES = {
    "no null label": {"class_dropout_prob": 0.0},
    "one class": {"num_classes": 1},
    "one class, no null label": {"num_classes": 1, "class_dropout_prob": 0.0},
    "fixed variance": {"learn_sigma": False},
    "all of these": {"num_classes": 1, "class_dropout_prob": 0.0, "learn_sigma": False},
}
STEPS = DDPMSchedule(8)


def dit(**changes) -> DiT:
    return randomised(DiT(dataclasses.replace(SMALL, **changes)))


class Wide(DiT):
    """A DiT on a grid of rows and columns of tokens, as forks for pictures that are no squares are."""

    def __init__(self, rows: int, columns: int, named: bool = True) -> None:
        super().__init__(SMALL)
        self.grid = rows, columns
        if named:
            self.x_embedder.grid_size = self.grid
        positions = sincos_positions(SMALL.hidden_size, rows, columns)
        self.pos_embed = nn.Parameter(positions.unsqueeze(0), requires_grad=False)

    def unpatchify(self, x):
        (rows, columns), p = self.grid, self.patch_size
        x = x.view(len(x), rows, columns, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(x), self.out_channels, rows * p, columns * p)


def through_a_drafter(target, folder) -> None:
    """Sampling with the frozen and with a trained drafter, lossless as far as a few images tell: they are finite."""
    labels = torch.arange(4) % target.num_classes
    path = train_drafter(target, TRAINING, folder / "drafter", "unusual")
    drafter = FeatureDrafter.load(path, target)
    for chosen in ("frozen", drafter):
        result = sample(target, labels, schedule=STEPS, drafter=chosen, draft_length=3, seed=2)
        assert result.samples.shape == (4, *target.latent_shape)
        assert result.samples.isfinite().all()


@pytest.mark.parametrize("name", SHAPES)
def test_from_the_file_to_the_drafter(name, tmp_path):
    shape = SHAPES[name]
    model, has_null = dit(**shape), "null" not in name and "all" not in name
    save_dit_checkpoint(tmp_path / "model.pt", model)
    target, _ = load_target(tmp_path / "model.pt", num_heads=2, family="dit", has_null_label=has_null)
    assert target.module.config == model.config
    assert (target.num_classes, target.has_null_label) == (model.config.num_classes, has_null)
    assert target.learns_variance == model.config.learn_sigma
    labels = torch.arange(4) % target.num_classes
    noise = torch.randn(4, 8, *target.latent_shape, generator=torch.Generator().manual_seed(0))
    got = ancestral_sample(target, labels, schedule=STEPS, noise=noise).samples
    # The module's own call, step by step.
    x, table = noise[:, 0], STEPS.table("learned_range" if target.learns_variance else "fixed_small")
    for k, t in enumerate(STEPS.timesteps):
        with torch.no_grad():
            mean, std = gaussian_transition(x, model(x, t.expand(4), labels), table[k : k + 1])
        x = mean + (std * noise[:, k + 1] if k < 7 else 0)
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))
    through_a_drafter(target, tmp_path)
    if not has_null:
        with pytest.raises(ValueError, match="^sample: guidance_scale must be 1 for a target trained without label"):
            sample(target, labels, schedule=STEPS, guidance_scale=2.0)
        with pytest.raises(ValueError, match="^train_drafter: max_guidance must be 1 for a target trained without"):
            train_drafter(target, dataclasses.replace(TRAINING, max_guidance=4.0), tmp_path / "guided", "unusual")


def test_a_table_of_one_row_is_one_class():
    """A null label alone would leave no class."""
    config = infer_config(dit(num_classes=1, class_dropout_prob=0.0).state_dict(), num_heads=2)
    assert (config.num_classes, config.class_dropout_prob) == (1, 0.0)


def test_other_formats_say_themselves_whether_there_is_a_null_label():
    with pytest.raises(ValueError, match="^load_target: has_null_label must be True for digits, which says it itself"):
        load_target("digits", has_null_label=False)


def test_the_variance_of_the_original_can_be_asked_for():
    """FIXED_LARGE there: beta, and at the first training step the posterior variance of the second one."""
    schedule = DDPMSchedule(1000, variance="fixed_large")
    variance = (2 * schedule.table("fixed_large")[:, TransitionColumn.LOG_STD].double()).exp().flip(0)
    betas = torch.from_numpy(schedule.train_betas)
    torch.testing.assert_close(variance[1:], betas[1:], rtol=1e-5, atol=0)
    assert variance[0] == 0, "the last step adds no noise in either"
    assert DDPMSchedule(8).resolve_variance(False) == "fixed_small"


@pytest.mark.parametrize("grid", [(2, 6), (6, 2), (2, 8), (8, 2), (4, 4)])
def test_rectangles_that_name_their_grid_are_sampled(grid, tmp_path):
    """Also 2 x 8, whose 16 tokens would make a square."""
    model = randomised(Wide(*grid))
    target = DiTTarget(model)
    assert target.latent_shape == (1, 2 * grid[0], 2 * grid[1])
    x, t, y = torch.randn(3, *target.latent_shape), torch.tensor([900, 500, 3]), torch.tensor([0, 4, 5])
    with torch.no_grad():
        torch.testing.assert_close(target.head(target.features(x, t, y), t, y), model(x, t, y), rtol=1e-4, atol=1e-4)
    through_a_drafter(target, tmp_path)


def test_rectangles_that_do_not_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^DiTTarget: module must be of a square grid of tokens, .* got Wide with 12"):
        DiTTarget(randomised(Wide(2, 6, named=False)))
    # Sixteen tokens look like a square's: its own call has another shape than its square's, and says so.
    with pytest.raises(ValueError, match=r"^DiTTarget: module must be a network of latents 8 x 8, .* makes \[4, 16\]"):
        DiTTarget(randomised(Wide(2, 8, named=False)))
    with pytest.raises(TypeError, match=r"^DiTConfig: input_size must be an int, of a square, got \(8, 16\)"):
        DiTConfig(input_size=(8, 16))
    with pytest.raises(ValueError, match="^DiTConfig: num_classes must be at least 1, got 0"):
        DiTConfig(num_classes=0)


@pytest.mark.parametrize("grid", [(2, 8), (8, 2), (1, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_of_rectangles_are_refused_by_name(grid, dtype):
    state = Wide(*grid).to(dtype).state_dict()
    said = f"{grid[0]} x {grid[1]}"
    with pytest.raises(CheckpointError, match=f"pos_embed must be of a square of tokens, got one of {said} "):
        infer_config(state, num_heads=2)
    with pytest.raises(CheckpointError, match="pos_embed must be of a square number of tokens, got 12 "):
        infer_config(Wide(2, 6).state_dict(), num_heads=2)
    # A table that was learned tells nothing, and one of a square is taken.
    for table in (torch.randn(1, 16, 32), Wide(4, 4).pos_embed):
        assert infer_config(state | {"pos_embed": table}, num_heads=2).input_size == 8
