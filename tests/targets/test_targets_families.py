"""Adapters of every family against the modules' own forwards: values, arithmetic work, compilation, errors."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from originals import ExtraBlock, OriginalDiT, TimestepEmbedder, random_inputs, randomised, relative_error
from torch.utils.flop_counter import FlopCounterMode

import free_kernels.conditioning
from free_kernels import DDPMSchedule, DiffusersDiTTarget, DiTTarget, HookTarget, ancestral_sample, sample
from free_kernels.targets import as_target

# Of the largest output. Half-precision modules and their adapters round at different places.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def diffusers_dit(num_classes=5, layers=3, out_channels=8, **settings):
    diffusers = pytest.importorskip("diffusers")
    shape = {"num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 4, "sample_size": 8, "patch_size": 2}
    module = diffusers.DiTTransformer2DModel(
        **{**shape, "num_layers": layers, "out_channels": out_channels, "num_embeds_ada_norm": num_classes, **settings}
    )
    return randomised(module)


def family(name: str):
    """Module, its forward as a function of (x, t, y), and its adapter class."""
    if name == "original":
        module = randomised(OriginalDiT())
        return module, module, DiTTarget
    module = diffusers_dit()
    return module, lambda x, t, y: module(x, timestep=t, class_labels=y).sample, DiffusersDiTTarget


FAMILIES = pytest.mark.parametrize("name", ["original", "diffusers"])


@pytest.fixture
def no_room(monkeypatch):
    """Tables of modulations never fit."""
    monkeypatch.setattr(free_kernels.conditioning, "MAX_TABLE_BYTES", 0)


def variants(target, t, y, monkeypatch):
    """The target as it is, with all modulations hoisted, and with the timesteps' embeddings only."""
    yield target
    yield target.hoisted(t, y)
    monkeypatch.setattr(free_kernels.conditioning, "MAX_TABLE_BYTES", 0)
    yield target.hoisted(t, y)
    monkeypatch.undo()


@FAMILIES
@DTYPES
def test_features_and_head_are_the_modules_forward(monkeypatch, name, dtype):
    module, forward, adapter = family(name)
    x, t, y = random_inputs(4, 8, 5)
    module.to(dtype)
    if name == "original":
        # The published embedder fails in half precision; this one casts its sinusoids, the adapter sees the other.
        forward = copy.deepcopy(module)
        forward.t_embedder.timestep_embedding = lambda *a: TimestepEmbedder.timestep_embedding(*a).to(dtype)
        if dtype != torch.float32:
            with pytest.raises(RuntimeError, match="same dtype"):
                module(x.to(dtype), t, y)
    expected = forward(x.to(dtype), t, y)
    target = as_target("test", module)
    assert type(target) is adapter
    assert (target.latent_shape, target.feature_shape) == ((4, 8, 8), (16, 48))
    assert (target.num_classes, target.has_null_label, target.learns_variance) == (5, True, True)
    assert target.guidance_channels == (3 if name == "original" else 4)
    for network in variants(target, t, y.unique(), monkeypatch):
        h = network.features(x, t, y)
        assert (h.shape, h.dtype) == ((6, 16, 48), dtype)
        assert relative_error(network.head(h, t, y), expected) <= TOLERANCE[dtype]


@FAMILIES
def test_a_hoisted_target_that_ignores_the_label_is_seen(name):
    """Negative control: rows of the wrong label differ by far more than the tolerance."""
    module, forward, _ = family(name)
    x, t, y = random_inputs(4, 8, 5)
    fast = as_target("test", module).hoisted(t, torch.arange(6))
    wrong = y.roll(1)
    assert relative_error(fast.head(fast.features(x, t, wrong), t, wrong), forward(x, t, y)) > 1e-2


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@FAMILIES
def test_features_and_head_cost_no_more_than_the_forward(monkeypatch, name):
    module, forward, _ = family(name)
    x, t, y = random_inputs(4, 8, 5)
    own = flops(lambda: forward(x, t, y))
    plain, hoisted, embedded = (
        flops(lambda n=network: n.head(n.features(x, t, y), t, y))
        for network in variants(as_target("test", module), t, y.unique(), monkeypatch)
    )
    width, rows, depth = 48, 6, 3
    embedding, modulation = 2 * rows * (256 * width + width * width), 2 * rows * width * (6 * depth + 2) * width
    # The original embeds a timestep once, diffusers once a block and once more for the head.
    calls = 1 if name == "original" else depth + 1
    assert hoisted == own - modulation - calls * embedding
    assert embedded == own - calls * embedding
    # A call that nothing is hoisted for embeds again for its head; diffusers' own forward does as well.
    assert plain == own + (embedding if name == "original" else 0)


def dispatched(function) -> int:
    count = 0

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal count
            count += 1
            return func(*args, **(kwargs or {}))

    with Counter():
        function()
    return count


@FAMILIES
def test_hoisting_launches_fewer_ops_than_the_forward(name):
    module, forward, _ = family(name)
    x, t, y = random_inputs(4, 8, 5)
    fast = as_target("test", module).hoisted(t, y.unique())
    assert dispatched(lambda: fast.head(fast.features(x, t, y), t, y)) < dispatched(lambda: forward(x, t, y))


def test_blocks_of_another_kind_run_as_they_are(monkeypatch):
    module = randomised(OriginalDiT(block=ExtraBlock))
    x, t, y = random_inputs(4, 8, 5)
    for network in variants(DiTTarget(module), t, y.unique(), monkeypatch):
        assert relative_error(network.head(network.features(x, t, y), t, y), module(x, t, y)) < 2e-5
    with pytest.raises(ValueError, match="^DiTTarget: compile must be False for blocks with parts of another kind"):
        DiTTarget(module, compile=True)


def test_chunked_feed_forward_runs_as_it_is(monkeypatch):
    module = diffusers_dit()
    for block in module.transformer_blocks:
        block.set_chunk_feed_forward(4, dim=1)
    x, t, y = random_inputs(4, 8, 5)
    for network in variants(DiffusersDiTTarget(module), t, y.unique(), monkeypatch):
        output = network.head(network.features(x, t, y), t, y)
        assert relative_error(output, module(x, timestep=t, class_labels=y).sample) < 2e-5


@FAMILIES
def test_sampling_does_not_need_room_for_tables(monkeypatch, name):
    module, _, _ = family(name)
    final = module.final_layer.linear if name == "original" else module.proj_out_2
    for parameter in final.parameters():
        parameter.mul_(0.05)
    labels, settings = torch.tensor([0, 4, 2]), {"schedule": DDPMSchedule(8), "guidance_scale": 2.0}
    expected = ancestral_sample(module, labels, **settings).samples
    monkeypatch.setattr(free_kernels.conditioning, "MAX_TABLE_BYTES", 0)
    torch.testing.assert_close(ancestral_sample(module, labels, **settings).samples, expected, rtol=1e-3, atol=1e-3)
    assert bool(sample(module, labels, draft_length=3, **settings).samples.isfinite().all())


@FAMILIES
def test_compiled_targets_agree(monkeypatch, name):
    """Traced and run without code generation: what is traced, and that it is traced once, are ours."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    module, forward, adapter = family(name)
    x, t, y = random_inputs(4, 8, 5)
    target = adapter(module, compile=True)
    expected = forward(x, t, y)
    torch._dynamo.reset()
    for network in (target, target.hoisted(t, y.unique())):
        assert relative_error(network.head(network.features(x, t, y), t, y), expected) < 2e-5
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"]
    again = target.hoisted(t, y.unique())
    again.head(again.features(x, t, y), t, y)
    assert counters["stats"]["unique_graphs"] == before, "another hoisted copy uses what was compiled"


@FAMILIES
def test_training_mode_is_refused(name):
    module, _, adapter = family(name)
    with pytest.raises(ValueError, match=f"^{adapter.__name__}: module must be in evaluation mode"):
        adapter(module.train())


def test_other_modules_are_refused():
    with pytest.raises(
        TypeError, match="^DiffusersDiTTarget: module must be a diffusers DiTTransformer2DModel, got Ori"
    ):
        DiffusersDiTTarget(OriginalDiT())
    with pytest.raises(TypeError, match=r"^sample: target must be a Target \(HookTarget makes one of any module\)"):
        sample(torch.nn.Linear(2, 2), torch.tensor([0]))
    with pytest.raises(ValueError, match="^DiffusersDiTTarget: module must be one with 4 or 8 output channels, got 5"):
        DiffusersDiTTarget(diffusers_dit(out_channels=5))


def hook_target(module, **changes):
    def head(h, t, y):
        c = module.t_embedder(t) + module.y_embedder(y, False)
        return module.unpatchify(module.final_layer(h, c))

    settings = {"latent_shape": (4, 8, 8), "feature_shape": (16, 48), "num_classes": 5, "learns_variance": True}
    arguments = {"feature_layer": "blocks.2", "head": head, **settings, **changes}
    return HookTarget(module, arguments.pop("feature_layer"), arguments.pop("head"), **arguments)


def test_a_hook_stops_the_forward_at_its_layer():
    module = randomised(OriginalDiT())
    target, x = hook_target(module), random_inputs(4, 8, 5)
    assert relative_error(target.head(target.features(*x), *x[1:]), module(*x)) < 1e-6
    whole, upto = flops(lambda: module(*x)), flops(lambda: target.features(*x))
    assert whole - upto == 2 * 6 * (48 * 96 + 16 * 48 * 32), "the final layer's two matrix products are not run"
    assert not module.blocks[2]._forward_hooks, "no hook is left behind"
    torch.testing.assert_close(target.features(*x), DiTTarget(module).features(*x), rtol=1e-5, atol=1e-5)


@DTYPES
def test_a_hook_agrees_in_every_dtype_with_a_call_of_ones_own(dtype):
    module = diffusers_dit().to(dtype)
    own, (x, t, y) = DiffusersDiTTarget(module), random_inputs(4, 8, 5)
    target = hook_target(
        module,
        feature_layer="transformer_blocks.2",
        head=own.head,
        call=lambda m, x, t, y: m(x, timestep=t, class_labels=y),
    )
    expected = module(x.to(dtype), timestep=t, class_labels=y).sample
    assert relative_error(target.head(target.features(x, t, y), t, y), expected) <= TOLERANCE[dtype]


def test_a_hook_target_samples_as_the_adapter_does():
    module = randomised(OriginalDiT())
    for parameter in module.final_layer.linear.parameters():
        parameter.mul_(0.05)
    settings = {"schedule": DDPMSchedule(10), "draft_length": 3, "guidance_scale": 1.5, "guidance_channels": 3}
    ours, hooked = (sample(target, torch.tensor([1, 4]), **settings) for target in (module, hook_target(module)))
    torch.testing.assert_close(hooked.samples, ours.samples, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="guidance_scale must be 1 for a target trained without label dropout"):
        sample(hook_target(module, has_null_label=False), torch.tensor([1]), guidance_scale=2.0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"feature_layer": "blocks.9"}, ValueError, "feature_layer must be the name of a sub-module of OriginalDiT"),
        ({"feature_layer": 3}, ValueError, "feature_layer must be the name of a sub-module"),
        ({"head": None}, TypeError, "head must be callable"),
        ({"call": 3}, TypeError, "call must be callable"),
        ({"latent_shape": ()}, ValueError, "latent_shape must be some positive ints"),
        ({"latent_shape": (8, -8)}, ValueError, "latent_shape must be an int in"),
        ({"feature_shape": (16, 0)}, ValueError, "feature_shape must be an int in"),
        ({"num_classes": 0}, ValueError, "num_classes must be an int in"),
        ({"guidance_channels": 5}, ValueError, "guidance_channels must be an int in"),
    ],
)
def test_wrong_hook_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=f"^HookTarget: {message}"):
        hook_target(randomised(OriginalDiT()), **changes)


def test_a_hook_layer_must_be_run_and_give_tokens():
    module = randomised(OriginalDiT())
    x = random_inputs(4, 8, 5)
    module.unused = torch.nn.Identity().eval()
    with pytest.raises(RuntimeError, match="^HookTarget: feature_layer must be run by the module's forward"):
        hook_target(module, feature_layer="unused").features(*x)
    with pytest.raises(ValueError, match=r"^HookTarget: the output of 't_embedder' must be a tensor \[6, 16, 48\]"):
        hook_target(module, feature_layer="t_embedder").features(*x)
    with pytest.raises(TypeError, match="^HookTarget: module must be an nn.Module"):
        HookTarget(3, "x", len, latent_shape=(1, 1, 1), feature_shape=(1, 1), num_classes=1, learns_variance=False)
