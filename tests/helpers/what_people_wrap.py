"""Cases of :mod:`what_people_do`: wrappers, LoRA, offload, quantised and other weights, dtypes."""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.nn.utils.prune
from originals import randomised
from torch import nn
from what_people_do import attention_of, blocks_of, case

SPLIT = "own facebook sit"


@case("wrapper", "torch.compile")
def _(family, module):
    return torch.compile(module, backend="eager")


@case("wrapper", "every block compiled")
def _(family, module):
    for block in blocks_of(module):
        block.compile(backend="eager")


@case("wrapper", "every block in torch.compile")
def _(family, module):
    blocks = blocks_of(module)
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block, backend="eager").eval()


@case("wrapper", "DataParallel")
def _(family, module):
    return nn.DataParallel(module).eval()


def in_a_group(module):
    if not dist.is_initialized():
        store = Path(mkdtemp(), "store")
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        module.undo.append(dist.destroy_process_group)


@case("wrapper", "DistributedDataParallel")
def _(family, module):
    in_a_group(module)
    next(module.parameters()).requires_grad_(True)
    return nn.parallel.DistributedDataParallel(module).eval()


@case("wrapper", "FSDP2 (fully_shard)")
def _(family, module):
    from torch.distributed.fsdp import fully_shard

    in_a_group(module)
    mesh = dist.init_device_mesh("cpu", (1,))
    for block in blocks_of(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


@case("wrapper", "AveragedModel")
def _(family, module):
    return torch.optim.swa_utils.AveragedModel(module).eval()


class Ema(nn.Module):
    """A wrapper of somebody's own."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.decay = 0.999

    def forward(self, *arguments, **keywords):
        return self.module(*arguments, **keywords)


@case("wrapper", "one of somebody's own, with the network under `module`")
def _(family, module):
    return Ema(module).eval()


def adapted(module, layers):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
    torch.manual_seed(0)
    return small(peft.get_peft_model(module, config).eval())


def small(model):
    """Adapters that change the network without making it overflow."""
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.mul_(0.3)
    return model


@case("LoRA", "PeftModel on attention")
def _(family, module):
    return adapted(module, ["to_q", "to_v"] if family == "diffusers" else ["qkv"])


@case("LoRA", "PeftModel on the patch embedding's convolution")
def _(family, module):
    return adapted(module, ["pos_embed.proj"] if family == "diffusers" else ["x_embedder.proj"])


@case("LoRA", "PeftModel on modulations, embeddings and head", SPLIT)
def _(family, module):
    return adapted(module, ["adaLN_modulation.1", "mlp.0", "mlp.2", "embedding_table", "final_layer.linear"])


@case("LoRA", "PeftModel, merged")
def _(family, module):
    model = adapted(module, ["to_q", "to_v"] if family == "diffusers" else ["qkv"])
    model.merge_adapter()
    return model


@case("LoRA", "adapters injected into the network, without a wrapper")
def _(family, module):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    layers = ["to_q"] if family == "diffusers" else ["qkv"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False), module)
    small(module.eval())


@case("LoRA", "layers wrapped by hand", SPLIT)
def _(family, module):
    class Low(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
            self.up = nn.Linear(2, base.out_features, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    for block in module.blocks:
        block.attn.qkv = Low(block.attn.qkv)
        randomised(block.attn.qkv.down, 1)
        randomised(block.attn.qkv.up, 2)
    module.eval()


@case("offload", "sequential (accelerate's cpu_offload)")
def _(family, module):
    pytest.importorskip("accelerate").cpu_offload(module, execution_device="cpu")


@case("offload", "of the whole network (cpu_offload_with_hook)")
def _(family, module):
    pytest.importorskip("accelerate").cpu_offload_with_hook(module, execution_device="cpu")


@case("offload", "switched on after the target was made")
def _(family, module):
    return lambda network: pytest.importorskip("accelerate").cpu_offload(network, execution_device="cpu") and None


@case("offload", "by groups of blocks (diffusers)", "diffusers")
def _(family, module):
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    apply_group_offloading(module, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


@case("offload", "weights stored in float8 and cast in each layer (diffusers)", "diffusers")
def _(family, module):
    module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


@case("mixed precision", "forward wrapped in autocast (accelerate's prepare)")
def _(family, module):
    own = module.forward

    def forward(*arguments, **keywords):
        with torch.autocast("cpu", torch.bfloat16):
            return own(*arguments, **keywords)

    module.forward = forward


@case("quantised", "torch's dynamic int8, whose scale is the batch's")
def _(family, module):
    torch.backends.quantized.engine = "fbgemm"
    return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8).eval()


@case("quantised", "weights only, int8 layers of one's own", SPLIT)
def _(family, module):
    class Int8(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.in_features, self.out_features = layer.in_features, layer.out_features
            scale = layer.weight.abs().amax(1, keepdim=True) / 127
            self.register_buffer("scale", scale)
            self.register_buffer("weight", (layer.weight / scale).round().to(torch.int8))
            self.register_buffer("bias", layer.bias)

        def forward(self, x):
            return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)

    for part in list(module.modules()):
        for name, layer in list(part.named_children()):
            if type(layer) is nn.Linear:
                setattr(part, name, Int8(layer).eval())


@case("weights", "pruned (a mask in a hook before the layer)")
def _(family, module):
    for block in blocks_of(module):
        layer = attention_of(block).to_q if family == "diffusers" else block.attn.qkv
        torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.3)


@case("weights", "parametrised (weight norm)")
def _(family, module):
    for block in blocks_of(module):
        layer = attention_of(block).to_q if family == "diffusers" else block.attn.qkv
        layer.weight.requires_grad_(True)
        torch.nn.utils.parametrizations.weight_norm(layer)
    module.eval()


@case("weights", "others loaded after the target was made")
def _(family, module):
    def late(network):
        network.load_state_dict({name: value * 0.8 for name, value in network.state_dict().items()})

    return late


@case("dtype", "bfloat16", "own diffusers sit")
def _(family, module):
    module.to(torch.bfloat16)


@case("dtype", "float16", "own diffusers sit")
def _(family, module):
    module.to(torch.float16)


@case("dtype", "channels last")
def _(family, module):
    module.to(memory_format=torch.channels_last)


@case("dtype", "an integer step counter among the buffers")
def _(family, module):
    module.register_buffer("steps", torch.tensor(7))
