"""The DiT and its adapter: shapes, state-dict names, features + head against the module's own forward."""

from __future__ import annotations

import pytest
import torch
from random_networks import CONFIG, random_dit

from free_dit import DiT, DiTConfig, dit_config
from free_kernels import DDPMSchedule, DiTTarget, ancestral_sample, sample


def inputs(rows: int = 6, config: DiTConfig = CONFIG):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, config.in_channels, config.input_size, config.input_size, generator=generator)
    return x, torch.arange(rows) * 150 + 3, torch.arange(rows) % (config.num_classes + 1)


TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_features_and_head_are_the_modules_forward(dtype, learn_sigma):
    module = random_dit(DiTConfig(**{**CONFIG.to_dict(), "learn_sigma": learn_sigma})).to(dtype)
    target = DiTTarget(module)
    assert target.learns_variance == learn_sigma
    assert target.feature_shape == (16, 48)
    assert target.guidance_channels == 3
    x, t, y = inputs()
    expected = module(x.to(dtype), t, y)
    for network in (target, target.hoisted(t, y)):
        h = network.features(x, t, y)
        assert h.shape == (6, 16, 48)
        output = network.head(h, t, y)
        assert output.shape == expected.shape == (6, 8 if learn_sigma else 4, 8, 8)
        scale = float(expected.float().abs().max())
        assert float((output - expected).float().abs().max()) <= TOLERANCE[dtype] * scale


def test_state_dict_names_are_the_published_ones():
    names = set(DiT(CONFIG).state_dict())
    expected = {
        "pos_embed",
        "x_embedder.proj.weight",
        "x_embedder.proj.bias",
        "t_embedder.mlp.0.weight",
        "t_embedder.mlp.0.bias",
        "t_embedder.mlp.2.weight",
        "t_embedder.mlp.2.bias",
        "y_embedder.embedding_table.weight",
        "final_layer.linear.weight",
        "final_layer.linear.bias",
        "final_layer.adaLN_modulation.1.weight",
        "final_layer.adaLN_modulation.1.bias",
    }
    for block in range(3):
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):
            expected |= {f"blocks.{block}.{layer}.{part}" for part in ("weight", "bias")}
    assert names == expected


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("DiT-S/2", 33e6), ("DiT-B/4", 130e6), ("DiT-L/2", 458e6), ("DiT-XL/2", 675e6), ("XL/8", 675e6)],
)
def test_standard_sizes_have_the_published_parameter_counts(name, parameters):
    """Peebles & Xie 2022, table 1 (to the million)."""
    with torch.device("meta"):
        module = DiT(dit_config(name))
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(parameters, rel=0.02)


@pytest.mark.parametrize("name", ["DiT-H/2", "DiT-XL/3", "", "DiT-XL"])
def test_unknown_sizes_are_refused(name):
    with pytest.raises(ValueError, match="^dit_config: name must be"):
        dit_config(name)


@pytest.mark.parametrize(
    "change", [{"patch_size": 3}, {"num_heads": 5}, {"hidden_size": 50, "num_heads": 5}, {"patch_size": 0}]
)
def test_impossible_shapes_are_refused(change):
    with pytest.raises(ValueError, match="^DiTConfig: "):
        DiTConfig(**{**CONFIG.to_dict(), **change})


def test_patch_embedding_is_the_convolution():
    module = random_dit()
    x, _, _ = inputs()
    proj = module.x_embedder.proj
    convolved = torch.nn.functional.conv2d(x, proj.weight, proj.bias, stride=2)
    torch.testing.assert_close(proj(x), convolved, rtol=1e-5, atol=1e-5)
    expected = module.x_embedder.proj(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(module.x_embedder(x), expected, rtol=1e-5, atol=1e-5)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"^DiTTarget: module must be in evaluation mode"):
        DiTTarget(DiT(CONFIG).train())


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_module_samples_as_its_adapter_does(guidance):
    """A bare module is recognised; hoisting changes rounding only; few slots change nothing."""
    module = random_dit()
    for parameter in module.final_layer.linear.parameters():
        parameter.mul_(0.05)
    labels = torch.tensor([0, 4, 2])
    settings = {"schedule": DDPMSchedule(12), "guidance_scale": guidance}
    expected = ancestral_sample(module, labels, **settings).samples

    class Plain(DiTTarget):
        def hoisted(self, timesteps, labels):
            return self

    torch.testing.assert_close(
        ancestral_sample(Plain(module), labels, **settings).samples, expected, rtol=1e-4, atol=1e-4
    )
    whole = sample(module, labels, draft_length=3, **settings)
    few = sample(module, labels, draft_length=3, max_slots=2, **settings)
    torch.testing.assert_close(few.samples, whole.samples, rtol=1e-4, atol=1e-4)
    assert 0 < whole.stats.acceptance < 1


def test_guidance_needs_a_null_label():
    module = random_dit(DiTConfig(**{**CONFIG.to_dict(), "class_dropout_prob": 0.0}))
    with pytest.raises(ValueError, match="^sample: guidance_scale must be 1 for a target trained without label"):
        sample(module, torch.tensor([0]), guidance_scale=2.0, schedule=DDPMSchedule(4), draft_length=2)
