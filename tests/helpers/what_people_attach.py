"""Cases of :mod:`what_people_do`: hooks, patches, forks, modes and caches."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from originals import ExtraBlock, OriginalDiT, randomised
from torch import nn
from what_people_do import attention_of, blocks_of, case, head_of

SPLIT = "own facebook sit"


def scaled(factor):
    return lambda module, inputs, output: output * factor


@case("nothing", "the network as it is")
def _(family, module):
    pass


@case("hook", "on every block")
def _(family, module):
    for block in blocks_of(module):
        block.register_forward_hook(scaled(0.9))


@case("hook", "on one block, for some of the states only")
def _(family, module):
    def hook(block, inputs, output):
        return torch.where(output.mean((1, 2), keepdim=True) > 0, output * 0.8, output)

    blocks_of(module)[1].register_forward_hook(hook)


@case("hook", "before every block")
def _(family, module):
    def hook(block, inputs, keywords):
        return (inputs[0] * 0.9, *inputs[1:]), keywords

    for block in blocks_of(module):
        block.register_forward_pre_hook(hook, with_kwargs=True)


@case("hook", "on an attention layer (steering)")
def _(family, module):
    attention_of(blocks_of(module)[1]).register_forward_hook(scaled(0.7))


@case("hook", "on the head")
def _(family, module):
    head_of(module).register_forward_hook(scaled(0.9))


@case("hook", "on the patch embedding's convolution")
def _(family, module):
    embedder = module.pos_embed if family == "diffusers" else module.x_embedder
    embedder.proj.register_forward_hook(scaled(0.9))


@case("hook", "on the embedder of timesteps")
def _(family, module):
    if family == "diffusers":
        for block in module.transformer_blocks:
            block.norm1.emb.timestep_embedder.register_forward_hook(scaled(0.9))
    else:
        module.t_embedder.register_forward_hook(scaled(0.9))


@case("hook", "on the modulation of a block")
def _(family, module):
    block = blocks_of(module)[0]
    part = block.norm1 if family == "diffusers" else block.adaLN_modulation

    def hook(norm, inputs, output):
        return (output[0] * 0.9, *output[1:]) if isinstance(output, tuple) else output * 0.9

    part.register_forward_hook(hook)


@case("hook", "on the whole network", "own facebook sit")
def _(family, module):
    module.register_forward_hook(scaled(0.9))


@case("hook", "added after the target was made")
def _(family, module):
    def late(network):
        for block in blocks_of(network):
            block.register_forward_hook(scaled(0.9))

    return late


@case("hook", "on all modules, for those of the blocks' class, added after the target was made")
def _(family, module):
    undo = module.undo

    def late(network):
        kind, scale = type(blocks_of(network)[0]), scaled(0.9)

        def hook(part, *given):
            return scale(part, *given) if type(part) is kind else None

        undo.append(nn.modules.module.register_module_forward_hook(hook).remove)

    return late


@case("patch", "forward of every block replaced")
def _(family, module):
    for block in blocks_of(module):
        own = block.forward
        block.forward = lambda h, *a, own=own, **k: own(h * 0.9, *a, **k)


@case("patch", "class of every block replaced (token merging)")
def _(family, module):
    kind = type(blocks_of(module)[0])

    def forward(self, h, *arguments, **keywords):
        # Pairs of neighbouring tokens share their mean.
        merged = h.unflatten(1, (-1, 2)).mean(2, keepdim=True).expand(-1, -1, 2, -1).flatten(1, 2)
        return kind.forward(self, 0.8 * h + 0.2 * merged, *arguments, **keywords)

    merging = type("Merging", (kind,), {"forward": forward, "__module__": __name__})
    for block in blocks_of(module):
        block.__class__ = merging


@case("patch", "forward of the blocks' class replaced, for all networks")
def _(family, module):
    kind = type(blocks_of(module)[0])
    own = kind.forward

    @functools.wraps(own, assigned=())
    def forward(self, h, *arguments, **keywords):
        return own(self, h * 0.9, *arguments, **keywords)

    kind.forward = forward
    module.undo.append(lambda: setattr(kind, "forward", own))


@case("patch", "forward of the blocks' class replaced, after the target was made")
def _(family, module):
    undo = module.undo

    def late(network):
        kind = type(blocks_of(network)[0])
        own = kind.forward

        # Also of the class's own module by name, as one that a notebook defines again.
        @functools.wraps(own)
        def forward(self, h, *arguments, **keywords):
            return own(self, h * 0.9, *arguments, **keywords)

        kind.forward = forward
        undo.append(lambda: setattr(kind, "forward", own))

    return late


@case("patch", "forward of an attention layer replaced")
def _(family, module):
    attention = attention_of(blocks_of(module)[1])
    own = attention.forward
    attention.forward = lambda h, *a, **k: own(h, *a, **k) * 0.5


@case("patch", "attention of another class", SPLIT)
def _(family, module):
    class Linear(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.mix = nn.Linear(width, width)

        def forward(self, h):
            return self.mix(h) + h.mean(1, keepdim=True)

    for block in module.blocks:
        block.attn = randomised(Linear(48))


@case("patch", "forward of the whole network replaced", SPLIT)
def _(family, module):
    own = module.forward
    module.forward = lambda x, t, y: own(0.9 * x, t, y)


class Rotary(OriginalDiT):
    """Blocks are handed positions."""

    class Block(ExtraBlock):
        def forward(self, x, c, angles=None):
            return super().forward(x * angles.cos() + x.roll(1, -1) * angles.sin(), c)

    def __init__(self):
        super().__init__(block=Rotary.Block)

    def forward(self, x, t, y):
        x, c = self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y, False)
        angles = torch.arange(x.shape[1])[:, None] * torch.linspace(0.01, 0.1, x.shape[2])
        for block in self.blocks:
            x = block(x, c, angles)
        return self.unpatchify(self.final_layer(x, c))


@case("fork", "rotary positions passed to the blocks", "facebook")
def _(family, module):
    return randomised(Rotary(), scale=0.1)


def forked(module, forward):
    module.__class__ = type("Fork", (type(module),), {"forward": forward, "__module__": __name__})


def embedded(self, x, t, y):
    return self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y, False)


def out(self, h, c):
    output = self.unpatchify(self.final_layer(h, c))
    return output[:, : self.in_channels] if getattr(self, "family", None) == "flow" else output


@case("fork", "a skip from the first block to the last", SPLIT)
def _(family, module):
    def forward(self, x, t, y):
        h, c = embedded(self, x, t, y)
        first = h = self.blocks[0](h, c)
        for block in self.blocks[1:]:
            h = block(h, c)
        return out(self, h + 0.3 * first, c)

    forked(module, forward)


@case("fork", "a norm after the embedding", SPLIT)
def _(family, module):
    def forward(self, x, t, y):
        h, c = embedded(self, x, t, y)
        h = F.layer_norm(h, h.shape[-1:])
        for block in self.blocks:
            h = block(h, c)
        return out(self, h, c)

    forked(module, forward)


@case("fork", "preconditioning of the input")
def _(family, module):
    kind = type(module)

    def forward(self, x, *arguments, **keywords):
        return kind.forward(self, 0.5 * x, *arguments, **keywords)

    forked(module, forward)


@case("fork", "its own forward only at late timesteps", SPLIT)
def _(family, module):
    kind, last = type(module), 0.5 if family == "sit" else 500

    def forward(self, x, t, y):
        return torch.where(
            (t > last)[:, None, None, None], kind.forward(self, x, t, y), kind.forward(self, x / 2, t, y)
        )

    forked(module, forward)


@case("fork", "register tokens beside the image's", SPLIT)
def _(family, module):
    def forward(self, x, t, y):
        h, c = embedded(self, x, t, y)
        h = torch.cat([h[:, :2] * 0 + 1, h], 1)
        for block in self.blocks:
            h = block(h, c)
        return out(self, h[:, 2:], c)

    forked(module, forward)


@case("fork", "one more layer in every block", "facebook")
def _(family, module):
    return randomised(OriginalDiT(block=ExtraBlock), scale=0.1)


@case("fork", "a tuple as output", SPLIT)
def _(family, module):
    kind = type(module)
    forked(module, lambda self, x, t, y: (kind.forward(self, x, t, y), None))


@case("fork", "feed-forward in chunks", "diffusers")
def _(family, module):
    for block in module.transformer_blocks:
        block.set_chunk_feed_forward(4, dim=1)


@case("fork", "noise within the network", SPLIT)
def _(family, module):
    kind = type(module)

    def forward(self, x, t, y):
        return kind.forward(self, x + 0.1 * torch.randn_like(x), t, y)

    forked(module, forward)


@case("mode", "one block in training mode")
def _(family, module):
    blocks_of(module)[1].train()


@case("mode", "the whole network in training mode")
def _(family, module):
    module.train()


@case("cache", "pyramid attention broadcast of diffusers", "diffusers")
def _(family, module):
    from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(module, config)


@case("cache", "every second output of an attention layer kept in a closure")
def _(family, module):
    attention, kept = attention_of(blocks_of(module)[1]), {"calls": 0}
    own = attention.forward

    def forward(h, *arguments, **keywords):
        kept["calls"] += 1
        if kept["calls"] % 2 or kept["output"].shape != h.shape:
            kept["output"] = own(h, *arguments, **keywords)
        return kept["output"]

    attention.forward = forward


@case("cache", "nine of ten outputs of a block kept by hooks")
def _(family, module):
    kept: list = []

    def hook(block, inputs, output):
        if len(kept) % 10 == 0:
            kept.append(output)
        elif kept[-1].shape == output.shape:
            kept.append(kept[-1])
        else:
            kept.clear()
            kept.append(output)
        return kept[-1]

    blocks_of(module)[0].register_forward_hook(hook)


@case("cache", "residuals reused in the network's forward (TeaCache)", SPLIT)
def _(family, module):
    def forward(self, x, t, y):
        h, c = embedded(self, x, t, y)
        before = h
        change = float((h - self.last).abs().mean() / self.last.abs().mean()) if self.last.shape == h.shape else 1.0
        self.last = h
        if change > 0.2:
            for block in self.blocks:
                h = block(h, c)
            self.residual = h - before
        return out(self, before + self.residual, c)

    module.last = torch.zeros(1)
    forked(module, forward)


@case("cache", "a step cache that swaps the blocks within the call (cache-dit, para_attn)")
def _(family, module):
    module._is_cached = True


@case("cache", "MagCache")
def _(family, module):
    module.mag_ratios = [1.0] * 10
