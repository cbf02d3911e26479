"""``check_target`` and the comparison that every target goes through: its cost, its repetition, what it says."""

from __future__ import annotations

import math
import threading
from contextlib import nullcontext

import pytest
import torch
import what_people_attach  # noqa: F401
import what_people_wrap  # noqa: F401
from originals import OriginalDiT, random_inputs, randomised, relative_error
from test_targets_families import diffusers_dit, flops, hook_target
from torch import nn
from what_people_do import outcome

import free_kernels
from free_dit import DiT, DiTConfig
from free_dit.networks.sit import SiT
from free_kernels import DDPMSchedule, DiffusersDiTTarget, DiTTarget, SiTTarget, check_target
from free_kernels.targets import adaln, as_target
from free_kernels.targets.check import TargetCheck, probe_rows, rounding_tolerance
from free_kernels.targets.replay import one_of_each_kind

SHAPE = {"input_size": 8, "in_channels": 4, "hidden_size": 48, "depth": 3, "num_heads": 4, "num_classes": 5}


def networks():
    return {
        "own": (randomised(DiT(DiTConfig(**SHAPE)), scale=0.1), DiTTarget),
        "facebook": (randomised(OriginalDiT(), scale=0.1), DiTTarget),
        "sit": (randomised(SiT(DiTConfig(**SHAPE)), scale=0.1), SiTTarget),
        "diffusers": (randomised(diffusers_dit(), scale=0.1), DiffusersDiTTarget),
    }


FAMILIES = pytest.mark.parametrize("family", ["own", "facebook", "sit", "diffusers"])


def hooked(module):
    module.blocks[1].register_forward_hook(lambda block, inputs, output: output * 0.9)
    return module


@FAMILIES
def test_a_network_as_its_classes_define_it_is_hoisted(family):
    module, adapter = networks()[family]
    found = check_target(adapter(module))
    assert isinstance(found, TargetCheck)
    assert (found.path, found.network_rows) == ("hoisted", 2)
    assert 0 <= found.difference < found.tolerance < 1e-3


@FAMILIES
def test_the_comparison_costs_less_than_three_rows(family):
    """Two rows of the own call, one attention and MLP of the blocks' three, and what is done once."""
    module, adapter = networks()[family]
    one = probe_rows(adapter(module)).take(0)
    call = flops(lambda: adapter(module).own(*one))
    module.load_state_dict(module.state_dict())  # new versions of the weights: another network
    assert 2 * call < flops(lambda: adapter(module)) < 2.6 * call
    assert flops(lambda: adapter(module)) == 0, "once for a module and its weights"
    target, (_, t, y) = adapter(module), random_inputs(4, 8, 5)
    tables = flops(lambda: target.tabled(t, y.unique()))
    assert flops(lambda: target.hoisted(t, y.unique())) == tables


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.blocks[0].attn.qkv.weight.mul_(1.1),
        lambda module: setattr(module.blocks[0].attn.qkv.weight, "data", torch.zeros(144, 48)),
        lambda module: hooked(module),
        lambda module: setattr(module.blocks[0], "scale", 2.0),
        lambda module: setattr(module.blocks[0], "attn", randomised(type(module.blocks[0].attn)(48, 4))),
    ],
    ids=["in place", "data", "hook", "setting", "layer"],
)
def test_another_network_is_compared_again(change):
    module = randomised(OriginalDiT(), scale=0.1)
    DiTTarget(module)
    change(module)
    assert flops(lambda: DiTTarget(module)) > 0


@pytest.mark.parametrize(
    ("change", "followed"),
    [
        (lambda patch, module: patch.setattr(type(module.blocks[0]), "forward", lambda self, x, c: x), True),
        (
            lambda patch, module: patch.setattr(type(module.final_layer), "forward", lambda self, x, c: self.linear(x)),
            True,
        ),
        (
            lambda patch, module: patch.setattr(type(module), "forward", lambda self, *given: self.whole(*given) / 2),
            False,
        ),
        (lambda patch, module: module.left_out.append(1), False),
    ],
    ids=["blocks' class", "head's class", "own class", "list of layers"],
)
def test_what_a_change_of_a_class_or_of_a_list_does_is_never_lost(monkeypatch, change, followed):
    """A network that was sampled before: its images follow the change, or it is refused."""

    class Block(type(OriginalDiT().blocks[0])):
        pass

    class Final(type(OriginalDiT().final_layer)):
        pass

    class Fork(OriginalDiT):
        """Leaves blocks out by a list."""

        def __init__(self):
            super().__init__()
            self.left_out = []
            for block in self.blocks:
                block.__class__ = Block
            self.final_layer.__class__ = Final

        def whole(self, x, t, y):
            left = [block for index, block in enumerate(self.blocks) if index not in self.left_out]
            c = self.t_embedder(t) + self.y_embedder(y, False)
            h = self.x_embedder(x) + self.pos_embed
            for block in left:
                h = block(h, c)
            return self.unpatchify(self.final_layer(h, c))

        forward = whole

    module = randomised(Fork(), scale=0.1)
    target, (x, t, y) = DiTTarget(module), random_inputs(4, 8, 5)
    labels = y.unique()
    assert target.hoisted(t, labels).blocks is not None
    before = module(x, t, y)
    change(monkeypatch, module)
    wanted = module(x, t, y)
    assert relative_error(wanted, before) > 0.01
    with nullcontext() if followed else pytest.raises(ValueError, match="whose own call is its blocks one after"):
        network = target.hoisted(t, labels)
        assert relative_error(network.head(network.features(x, t, y), t, y), wanted) < 2e-5


def test_a_hook_on_all_modules_is_seen():
    module = randomised(OriginalDiT(), scale=0.1)
    target, (x, t, y) = DiTTarget(module), random_inputs(4, 8, 5)
    kind = type(module.blocks[0])
    handle = nn.modules.module.register_module_forward_hook(
        lambda part, inputs, output: 0.9 * output if isinstance(part, kind) else None
    )
    try:
        network = target.hoisted(t, y.unique())
        assert network.blocks is None
        assert relative_error(network.head(network.features(x, t, y), t, y), module(x, t, y)) < 2e-5
    finally:
        handle.remove()
    assert target.hoisted(t, y.unique()).blocks is not None


def test_a_network_that_says_nothing_yet_is_compared_again():
    module = DiT(DiTConfig(**SHAPE)).eval().requires_grad_(False)
    assert float(module(*random_inputs(4, 8, 5)).abs().max()) == 0, "adaLN-Zero"
    DiTTarget(module)
    assert flops(lambda: DiTTarget(module)) > 0


def test_hooks_take_the_way_through_the_blocks(monkeypatch):
    module = hooked(randomised(OriginalDiT(), scale=0.1))
    x, t, y = random_inputs(4, 8, 5)
    target = DiTTarget(module)
    assert check_target(module).path == "blocks"
    for network in (target, target.hoisted(t, y.unique())):
        assert relative_error(network.head(network.features(x, t, y), t, y), module(x, t, y)) < 2e-5
    # A target that was made before the hook takes it too, and the fast way again without it.
    module.blocks[1]._forward_hooks.clear()
    assert target.hoisted(t, y.unique()).blocks is not None
    hooked(module)
    assert target.hoisted(t, y.unique()).blocks is None


def test_without_the_comparison_the_hook_would_be_lost(monkeypatch):
    """Negative control of the table of what people do: a split that is not compared differs silently, and is seen."""
    monkeypatch.setattr(adaln.AdaLNTarget, "recheck", lambda self, where: None)
    assert outcome("hook: on every block", "own").startswith("SILENT")
    assert outcome("fork: preconditioning of the input", "facebook").startswith("SILENT")


def test_a_sub_module_in_training_mode_is_named():
    module = randomised(OriginalDiT())
    module.blocks[2].attn.train()
    with pytest.raises(ValueError, match=r"^DiTTarget: module must be in evaluation mode .* got blocks.2.attn \(Atten"):
        DiTTarget(module)
    target = DiTTarget(module.eval())
    module.blocks[2].attn.train()
    labels, settings = torch.tensor([1]), {"schedule": DDPMSchedule(4)}
    with pytest.raises(ValueError, match=r"^sample: module must be in evaluation mode"):
        free_kernels.sample(target, labels, draft_length=2, **settings)
    with pytest.raises(ValueError, match=r"^ancestral_sample: module must be in evaluation mode"):
        free_kernels.ancestral_sample(target, labels, **settings)


def test_a_fork_is_refused_with_its_difference():
    class Fork(OriginalDiT):
        def forward(self, x, t, y):
            return super().forward(0.5 * x, t, y)

    with pytest.raises(ValueError, match=r"HookTarget takes any other.* got Fork, where its own call differs from its"):
        DiTTarget(randomised(Fork(), scale=0.1))


def test_a_compiled_module_keeps_its_backend():
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    torch._dynamo.reset()
    module = randomised(OriginalDiT(), scale=0.1)
    target = as_target("test", torch.compile(module, backend=backend))
    assert target.module is module
    x, t, y = random_inputs(4, 8, 5)
    hoisted = target.hoisted(t, y.unique())
    assert not calls, "the comparison compiles nothing"
    output = hoisted.head(hoisted.features(x, t, y), t, y)
    assert len(calls) == 2, "blocks and head"
    assert relative_error(output, module(x, t, y)) < 2e-5


def test_random_numbers_are_left_alone():
    module = randomised(OriginalDiT(), scale=0.1)
    state = torch.get_rng_state()
    check_target(module)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_hook_target_is_compared_with_its_modules_call():
    module = randomised(OriginalDiT(), scale=0.1)
    target = hook_target(module)
    found = check_target(target)
    assert (found.path, found.difference <= found.tolerance) == ("features", True)
    wrong = hook_target(module, head=lambda h, t, y: 0.9 * target.head(h, t, y))
    with pytest.raises(ValueError, match=r"^check_target: target must be one whose head\(features\(x, t, y\)"):
        check_target(wrong)
    assert check_target(wrong, expected=lambda x, t, y: 0.9 * module(x, t, y)).difference < 1e-5


def test_a_hook_target_leaves_other_threads_alone():
    """Its hook is there while it runs: another thread calls the same module to its end, and sees it as it was."""
    module, inputs = randomised(OriginalDiT(), scale=0.1), random_inputs(4, 8, 5)
    wanted, feature, found = module(*inputs), hook_target(module).features(*inputs), []

    def elsewhere():
        assert module.blocks[2]._forward_hooks
        found.extend((module(*inputs), check_target(DiTTarget(module)).path))

    def call(network, *given):
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
        return network(*given)

    torch.testing.assert_close(hook_target(module, call=call).features(*inputs), feature)
    torch.testing.assert_close(found[0], wanted)
    assert found[1] == "hoisted"


def test_a_hook_target_with_a_cache_is_refused():
    module, kept = randomised(OriginalDiT(), scale=0.1), []

    def hook(block, inputs, output):
        kept.append(output)
        return kept[0][: len(output)]

    module.blocks[1].register_forward_hook(hook)
    with pytest.raises(ValueError, match=r"^HookTarget: module must be the same function of its inputs in every call"):
        free_kernels.ancestral_sample(hook_target(module), torch.tensor([1]), schedule=DDPMSchedule(4))


class OwnTarget:
    """A target without a module, whose rows may depend on one another."""

    latent_shape, feature_shape, num_classes, learns_variance = (4, 8, 8), (4, 64), 3, False

    def __init__(self, mixes):
        self.mixes = mixes

    def features(self, x, t, y):
        return (x - x.mean(0) if self.mixes else x).reshape(len(x), 4, 64)

    def head(self, h, t, y):
        return h.reshape(len(h), 4, 8, 8)


def test_a_target_of_ones_own_is_one_function():
    assert check_target(OwnTarget(False)) == TargetCheck(
        "features", 0.0, rounding_tolerance(None, torch.device("cpu")), 3
    )
    with pytest.raises(ValueError, match="^check_target: target must be the same function of its inputs in every call"):
        check_target(OwnTarget(True))
    with pytest.raises(ValueError, match="^check_target: target must be one whose head"):
        check_target(OwnTarget(False), expected=lambda x, t, y: 2 * x)
    with pytest.raises(TypeError, match="^check_target: target must be a Target"):
        check_target(nn.Linear(2, 2))


def test_tolerances_follow_the_format():
    narrow = [nn.Linear(2, 2).to(dtype) for dtype in (torch.bfloat16, torch.float16)]
    cpu = torch.device("cpu")
    assert [rounding_tolerance(module, cpu) for module in narrow] == pytest.approx([0.0319, 0.00399], rel=0.01)
    mixed = nn.Sequential(nn.Linear(2, 2), narrow[0])
    assert rounding_tolerance(mixed, cpu) == rounding_tolerance(narrow[0], cpu)
    with torch.autocast("cpu", torch.bfloat16):
        assert rounding_tolerance(nn.Linear(2, 2), cpu) == rounding_tolerance(narrow[0], cpu)


def test_weights_without_numbers_are_not_compared():
    with torch.device("meta"):
        module = DiT(DiTConfig(**SHAPE)).eval()
    assert math.isnan(DiTTarget(module).recheck("test").difference)


class Mixing(nn.Module):
    """An attention that lets the rows of a batch see one another, and is the plain one for a single row."""

    def __init__(self, inner: nn.Module, strength: float) -> None:
        super().__init__()
        self.inner, self.strength = inner, strength

    def forward(self, x):
        made = self.inner(x)
        return made + self.strength * (made.mean(0, keepdim=True) - made)


class Between(DiT):
    """A fork that mixes the rows of a batch between blocks."""

    def forward(self, x, t, y):
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        h = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            h = block(h + 0.2 * (h.mean(0, keepdim=True) - h), c)
        return self.unpatchify(self.final_layer(h, c))


class Scaled(type(DiT(DiTConfig(**SHAPE)).blocks[0])):
    """A block with a scale of its own in its forward."""

    def forward(self, x, c):
        return x + getattr(self, "own_scale", 1.0) * (super().forward(x, c) - x)


def scaled_block(module):
    for block in module.blocks:
        block.__class__ = Scaled
    module.blocks[2].own_scale = 0.7


def mixing(places, strengths):
    def change(module):
        for place, strength in zip(places, strengths, strict=True):
            module.blocks[place].attn = Mixing(module.blocks[place].attn, strength)

    return change


@pytest.mark.parametrize(
    "change",
    [
        mixing(range(3), [0.3, 0.3, 0.3]),
        mixing([2], [0.3]),
        # Of one kind but for a setting, and only the last does anything.
        mixing(range(3), [0.0, 0.0, 0.3]),
        lambda module: setattr(module, "__class__", Between),
    ],
    ids=["all", "one", "by a setting", "between blocks"],
)
def test_rows_that_see_one_another_are_refused(change):
    """Each is the plain network for a batch of one row."""
    module = randomised(DiT(DiTConfig(**SHAPE)), scale=0.1)
    change(module)
    module.eval()
    with pytest.raises(ValueError, match="the same function of its inputs in every call and every batch"):
        DiTTarget(module)


def test_one_block_of_another_forward_is_called_as_it_is():
    """Its parts are of one kind with the others: what goes into them tells that they are put together otherwise."""
    module = randomised(DiT(DiTConfig(**SHAPE)), scale=0.1)
    scaled_block(module)
    assert check_target(module).path == "blocks"
    x, t, y = random_inputs(4, 8, 5)
    target = DiTTarget(module).hoisted(t, y.unique())
    assert relative_error(target.head(target.features(x, t, y), t, y), module(x, t, y)) < 2e-5


def test_parts_are_of_one_kind_by_code_and_settings():
    one, other = nn.Dropout(0.1), nn.Dropout(0.1)
    assert one_of_each_kind([one, other, nn.Dropout(0.2), nn.ReLU()]) == [0, 2, 3]
    other.table = [1]
    one.table = one_table = [1]
    assert one_of_each_kind([one, other]) == [0, 1], "what may hold anything is like no other"
    other.table = one_table
    assert one_of_each_kind([one, other]) == [0]
    layers = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 4)
    assert one_of_each_kind(layers) == [0, 2], "weights differ, code does not"


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_a_part_that_is_called_otherwise_is_not_taken_from_the_recording(part):
    """Twice, or with more than the tokens: the target is then run itself."""

    class Twice(type(DiT(DiTConfig(**SHAPE)).blocks[0])):
        def forward(self, x, c):
            getattr(self, part)(x)
            return super().forward(x, c)

    module = randomised(DiT(DiTConfig(**SHAPE)), scale=0.1)
    for block in module.blocks:
        block.__class__ = Twice
    found = check_target(module)
    assert (found.path, found.network_rows) == ("hoisted", 3)
