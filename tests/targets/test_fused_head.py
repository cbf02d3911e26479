"""Heads in one call: of every family what its module's own call gives, and only where all parts are plain."""

from __future__ import annotations

import pytest
import torch
from originals import OriginalDiT, random_inputs, randomised, relative_error
from random_networks import random_dit
from small_policies import small_policy
from test_targets_families import diffusers_dit
from torch import Tensor, nn

from free_dit import DiT, DiTConfig, load_bundled
from free_dit.networks.policy import PolicyConfig
from free_dit.networks.sit import SiT
from free_dit.policy.target import PolicyTarget
from free_kernels import DDPMSchedule, DiffusersDiTTarget, DiTTarget, SiTTarget, check_target, extension, sample
from free_kernels.targets import DiffusersFlowTarget, fused_head

pytestmark = pytest.mark.skipif(not extension.has_extension(), reason="needs the compiled extension")
SHAPE = {"input_size": 8, "in_channels": 4, "hidden_size": 48, "depth": 2, "num_heads": 4, "num_classes": 5}


class TimmPatches(nn.Module):
    """An embedder that names its grid, of patches with more columns than rows."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(4, 48, (2, 4), (2, 4))
        self.grid_size = (2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens, row by row."""
        return self.proj(x).flatten(2).mT


def oblong() -> OriginalDiT:
    """Latents of 4 by 8 in patches of 2 by 4."""
    module = OriginalDiT()
    module.x_embedder, module.pos_embed = TimmPatches(), nn.Parameter(torch.zeros(1, 4, 48))
    module.final_layer.linear = nn.Linear(48, 8 * 8)
    module.unpatchify = lambda tokens: (
        tokens.view(len(tokens), 2, 2, 2, 4, 8).permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), 8, 4, 8)
    )
    return module


def families():
    return {
        "own": lambda: DiTTarget(randomised(DiT(DiTConfig(**SHAPE)), scale=0.1)),
        "facebook": lambda: DiTTarget(randomised(OriginalDiT(), scale=0.1)),
        "oblong": lambda: DiTTarget(randomised(oblong(), scale=0.1)),
        "sit": lambda: SiTTarget(randomised(SiT(DiTConfig(**SHAPE)), scale=0.1)),
        "diffusers": lambda: DiffusersDiTTarget(randomised(diffusers_dit(), scale=0.1)),
        "diffusers flow": lambda: DiffusersFlowTarget(randomised(diffusers_dit(), scale=0.01)),
    }


@torch.no_grad()
@pytest.mark.parametrize("family", families())
def test_a_head_in_one_call_gives_the_modules_own_output(family):
    target = families()[family]()
    x, t, y = random_inputs(4, 8, 5)
    x = x[:, :, : target.latent_shape[1]].contiguous()
    hoisted = target.hoisted(t, y.unique())
    assert hoisted._fused_head is not None
    found, wanted = hoisted.head(hoisted.features(x, t, y), t, y), target.own(x, t, y)
    assert found.shape == wanted.shape
    assert relative_error(found, wanted) <= 2e-5
    # The control: rows of the wrong label.
    wrong = hoisted.head(hoisted.features(x, t, y), t, y.roll(1))
    assert relative_error(wrong, wanted) > 10 * 2e-5


def policy(horizon: int, token_actions: int, action_size: int) -> PolicyTarget:
    sizes = {"hidden_size": 16, "condition_size": 24, "depth": 2, "num_heads": 2}
    config = PolicyConfig(horizon=horizon, token_actions=token_actions, action_size=action_size, **sizes)
    return PolicyTarget(small_policy(config))


@torch.no_grad()
def test_policies_of_as_many_values_keep_their_own_shapes():
    """Eight tokens of four values both, by one method of one class."""
    for shape in ((16, 2, 2), (32, 4, 1)):
        target = policy(*shape)
        config = target.module.config
        observations = torch.randn(3, config.history, config.observation_size)
        known, t = target.conditioned(observations), torch.tensor([5, 90])
        hoisted, y = known.hoisted(t, torch.arange(3)), torch.tensor([0, 2])
        assert hoisted._fused_head is not None
        x = torch.randn(2, config.horizon, config.action_size)
        found = hoisted.head(hoisted.features(x, t, y), t, y)
        assert found.shape == x.shape
        assert relative_error(found, target.module(x, t, observations[y])) <= 2e-5


def digits() -> DiTTarget:
    return DiTTarget(load_bundled("digits")[0].module)


def is_fused(target: DiTTarget) -> bool:
    """Whether a hoisted copy has its head in one call; a head that has not is still its module's."""
    t, y = torch.tensor([600, 20, 600]), torch.tensor([3, 7, 3])
    hoisted, x = target.hoisted(t.unique(), y.unique()), torch.randn(3, *target.latent_shape)
    found = hoisted.head(hoisted.features(x, t, y), t, y)
    torch.testing.assert_close(found, target.own(x, t, y), rtol=1e-4, atol=1e-4)
    return hoisted._fused_head is not None


class OtherLinear(nn.Linear):
    """A linear layer with a class of its own, as adapters of weights have."""


class Slotted:
    """A function that cannot be referred to weakly, nor hashed."""

    __slots__ = ("call",)
    __hash__ = None

    def __init__(self, call):
        self.call = call

    def __call__(self, tokens):
        return self.call(tokens)


@torch.no_grad()
@pytest.mark.parametrize(
    "how",
    [
        "hook",
        "class",
        "weights",
        "bias",
        "strided",
        "norm",
        "eps",
        "turned",
        "rectified",
        "dtype",
        "double",
        "parametrized",
    ],
)
def test_a_head_of_other_parts_calls_them(how):
    module = load_bundled("digits")[0].module
    final, own = module.final_layer, module.unpatchify
    if how == "hook":
        final.linear.register_forward_hook(lambda module, given, output: 2 * output)
    elif how == "class":
        final.linear.__class__ = OtherLinear
    elif how == "weights":
        final.norm_final = nn.LayerNorm(64, eps=1e-6, bias=False)
    elif how == "bias":
        final.norm_final.register_parameter("bias", nn.Parameter(torch.ones(64)))
    elif how == "strided":
        final.linear.bias = nn.Parameter(final.linear.bias.repeat_interleave(2)[::2])
    elif how == "norm":
        final.norm_final = nn.GroupNorm(16, 16, eps=1e-6, affine=False)
    elif how == "eps":
        final.norm_final.eps = 0.0
    elif how == "turned":
        module.unpatchify = lambda tokens: own(tokens).mT
    elif how == "rectified":
        module.unpatchify = lambda tokens: own(tokens).clamp(min=-0.1)
    elif how == "dtype":
        module.unpatchify = lambda tokens: own(tokens).double()
    elif how == "double":
        module.double()
    else:
        nn.utils.parametrizations.weight_norm(final.linear)
    assert not is_fused(DiTTarget(module.eval()))


@torch.no_grad()
def test_functions_of_any_kind_unpatchify():
    target = digits()
    target.module.unpatchify = Slotted(target.module.unpatchify)
    assert is_fused(DiTTarget(target.module))


@torch.no_grad()
def test_weights_that_are_parts_of_one_vector():
    target = digits()
    flat = nn.utils.parameters_to_vector(target.module.parameters())
    nn.utils.vector_to_parameters(flat, target.module.parameters())
    assert check_target(target.module).path == "hoisted"
    assert is_fused(DiTTarget(target.module))


@torch.no_grad()
def test_an_unpatchify_that_writes_to_its_input_does_so_for_itself():
    target = digits()
    own = target.module.unpatchify
    target.module.unpatchify = lambda tokens: own(tokens.clamp_(-1.5, 1.5))
    assert not is_fused(DiTTarget(target.module))
    assert is_fused(digits())


@torch.no_grad()
def test_tangents_go_through_the_parts():
    target, t, y = digits(), torch.tensor([600]), torch.tensor([3])
    hoisted, h = target.hoisted(t, y), torch.randn(1, *target.feature_shape)
    _, tangent = torch.func.jvp(lambda h: hoisted.head(h, t, y), (h,), (torch.randn_like(h),))
    assert tangent.abs().mean() > 0


@torch.no_grad()
def test_an_unpatchify_that_changes_later_is_seen():
    target = digits()
    assert is_fused(target)
    own, turn = target.module.unpatchify, []
    target.module.unpatchify = lambda tokens: own(tokens).mT if turn else own(tokens)
    assert is_fused(DiTTarget(target.module))
    turn.append(True)
    assert not is_fused(target)


@torch.no_grad()
def test_hooks_on_all_modules_are_called():
    target, seen = digits(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, output: seen.append(module))
    try:
        assert not is_fused(target)
    finally:
        handle.remove()
    assert target.module.final_layer.linear in seen


@torch.no_grad()
def test_without_the_extension_a_head_is_its_parts(monkeypatch):
    monkeypatch.setattr(fused_head, "why_no_kernel", lambda op, device: "there is none")
    assert not is_fused(digits())


@torch.no_grad()
def test_a_compiled_target_compiles_its_head():
    target = DiTTarget(load_bundled("digits")[0].module, compile=True)
    assert target.hoisted(torch.tensor([600]), torch.tensor([3]))._fused_head is None


@torch.no_grad()
def test_tables_of_another_dtype():
    """Hoisted under autocast, called outside of it."""
    target, t, y = digits(), torch.tensor([600]), torch.tensor([3])
    h = torch.randn(1, *target.feature_shape)
    wanted = target.hoisted(t, y).head(h, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        hoisted = target.hoisted(t, y)
        within = hoisted.head(h, t, y)
    for found in (within, hoisted.head(h, t, y)):
        # Eight bits of fraction, of modulations and products.
        assert relative_error(found.float(), wanted) < 8 * 2.0**-8


def test_gradients_go_through_the_parts():
    target = digits()
    hoisted = target.hoisted(torch.tensor([600]), torch.tensor([3]))
    h = torch.randn(1, *target.feature_shape, requires_grad=True)
    hoisted.head(h, torch.tensor([600]), torch.tensor([3])).sum().backward()
    assert h.grad.isfinite().all()
    assert h.grad.abs().sum() > 0


@torch.no_grad()
def test_weights_set_after_hoisting_are_used():
    target = digits()
    t, y = torch.tensor([600]), torch.tensor([3])
    hoisted, h = target.hoisted(t, y), torch.randn(1, *target.feature_shape)
    before = hoisted.head(h, t, y)
    linear = target.module.final_layer.linear
    linear.weight, linear.bias = nn.Parameter(2 * linear.weight), nn.Parameter(2 * linear.bias)
    assert torch.allclose(hoisted.head(h, t, y), 2 * before, rtol=1e-5, atol=0)


@torch.no_grad()
def test_images_are_the_same_but_for_rounding(monkeypatch):
    """Of one draft length and seed; a chain of ten steps multiplies a rounding of an output some tens of times."""
    settings = {"schedule": DDPMSchedule(10), "drafter": "frozen", "draft_length": 4, "seed": 5}
    target, labels = digits(), torch.arange(3)
    fused = sample(target, labels, **settings)
    assert is_fused(target)
    monkeypatch.setattr(fused_head, "why_no_kernel", lambda op, device: "there is none")
    assert not is_fused(target)
    parts = sample(target, labels, **settings)
    assert (fused.stats.rounds_per_image == parts.stats.rounds_per_image).all()
    difference = float((fused.samples - parts.samples).square().mean().sqrt())
    assert difference < 1e4 * torch.finfo(torch.float32).eps


def test_a_head_without_its_width_is_named():
    module = random_dit()

    class Wrapped(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.inner = linear

        def forward(self, x):
            return self.inner(x)

    module.final_layer.linear = Wrapped(module.final_layer.linear)
    with pytest.raises(
        TypeError, match=r"DiTTarget: module.final_layer.linear must be a linear layer, .* got .*Wrapped"
    ):
        DiTTarget(module.eval())
