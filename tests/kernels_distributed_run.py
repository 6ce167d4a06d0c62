"""What several processes do in test_gpu.py: one training step by DDP and FSDP 2, against one process on all the rows.

A causal model, and an encoder.

Arguments: "cuda" (NCCL) or "cpu" (gloo), and the file that the first process writes what it found to.
"""

import itertools
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from tolerances import relative_error
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from linpass import LinformerConfig, LinformerForCausalLM, LinformerForMaskedLM, operators_linformer

SIZES = {
    "vocab_size": 500,
    "embed_dim": 128,
    "depth": 2,
    "heads": 2,
    "seq_length": 512,
    "k": 64,
    "block_size": 32,
    "window_size": 64,
    "projection": "convolution",
    "projection_sharing": "none",
    "position_embedding": "rotary",
    "rank": None,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ROWS, TOKENS = 4, 300


KINDS = {
    "causal": (LinformerForCausalLM, {}),
    "encoder": (LinformerForMaskedLM, {"causal": False, "projection": "learned", "projection_sharing": "headwise"}),
}


def make_model(kind, device):
    torch.manual_seed(0)
    model_class, changes = KINDS[kind]
    return model_class(LinformerConfig(**SIZES | changes)).to(device)


def gradients_of(model, named, rows, precision):
    """Gradient of the mean loss over ``rows``, by name, whole on every process."""
    with precision:
        loss = model(rows, labels=rows, use_cache=False).loss
    loss.backward()
    whole = {}
    for name, parameter in named.named_parameters():
        grad = parameter.grad
        whole[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return whole


def shard(model, dtype):
    """FSDP 2: each block and the rest; bfloat16 weights and float32 sums where ``dtype`` is bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def compare(kind, wrapper, dtype, device, rows):
    """Relative error of every gradient, and the number of kernel calls of the wrapped model."""
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    alone = make_model(kind, device)
    expected = gradients_of(alone, alone, rows, autocast)
    model = make_model(kind, device)
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    else:
        wrapped, autocast = shard(model, dtype), nullcontext()
    calls, launch = [], operators_linformer.launch

    def count(kernel, *rest):
        if kernel is not operators_linformer.kernels.angles_kernel:  # which runs wherever attention does
            calls.append(kernel)
        return launch(kernel, *rest)

    operators_linformer.launch = count
    own = rows[dist.get_rank() :: dist.get_world_size()].contiguous()
    actual = gradients_of(wrapped, model, own, autocast)
    operators_linformer.launch = launch
    return {
        "processes": dist.get_world_size(),
        "kernels": len(calls),
        "errors": {name: relative_error(actual[name], expected[name]) for name in expected},
    }


def main(where, report):
    device = torch.device(where, int(os.environ["LOCAL_RANK"]) if where == "cuda" else None)
    if where == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    torch.manual_seed(1)
    rows = torch.randint(0, SIZES["vocab_size"], (ROWS, TOKENS)).to(device)
    cases = {}
    for kind, wrapper, dtype in itertools.product(KINDS, ("ddp", "fsdp"), (torch.float32, torch.bfloat16)):
        name = f"{kind} {wrapper} {str(dtype).removeprefix('torch.')}"
        cases[name] = compare(kind, wrapper, dtype, device, rows)
    if dist.get_rank() == 0:
        Path(report).write_text(json.dumps(cases), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
