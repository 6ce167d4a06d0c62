"""On a CUDA device: the same mathematics at real sizes, linear memory, and a forward pass that never waits.

``attention_linformer`` is the PyTorch path; models take the kernels of ``kernels_linformer``: alone, compiled, under
autocast, recomputed, on several devices, and left out where Triton is missing.
"""

import copy
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import CACHE, GRADIENT, ORACLE, VALUE, relative_error
from torch import library

from linpass import (
    LinformerConfig,
    LinformerForCausalLM,
    LinformerForMaskedLM,
    attention_linformer,
    kernels_linformer,
    operators_linformer,
)
from linpass.attention_linformer import (
    BlockLayout,
    attend_blocks,
    attend_blocks_fused,
    attend_blocks_reference,
    mix_blocks,
)

pytestmark = pytest.mark.gpu

REAL = {
    "vocab_size": 1000,
    "embed_dim": 256,
    "depth": 2,
    "heads": 4,
    "seq_length": 1024,
    "k": 128,
    "block_size": 32,
    "window_size": 128,
    "position_embedding": "rotary",
    "projection": "convolution",
    "projection_sharing": "none",
    "qk_norm": True,
    "rank": None,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

# Losses are multiplied by it, as a GradScaler does: float16 has no numbers as small as some gradients of a mean.
SCALE = 1024
both_paths = pytest.mark.parametrize("path", [attention_linformer, kernels_linformer], ids=["pytorch", "fused"])
# Without the norm attention and its projections are one operator.
with_and_without_norm = pytest.mark.parametrize("qk_norm", [True, False], ids=["norm", "no norm"])
# What torch says of itself while it compiles (deprecated parts, no TF32, a split softmax), and of autograd.Function.
compiles = pytest.mark.filterwarnings("ignore:::torch", "ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture
def started(monkeypatch):
    """The dtype of every kernel call of the fused path; angles have no dtype of their own."""
    dtypes, launch = [], operators_linformer.launch

    def record(kernel, grid, tile, tensors, numbers):
        if kernel is not operators_linformer.kernels.angles_kernel:
            dtypes.append(tensors[0].dtype)
        return launch(kernel, grid, tile, tensors, numbers)

    monkeypatch.setattr(operators_linformer, "launch", record)
    return dtypes


def real_model(device, dtype=torch.float32, **changes):
    """Of the class that ``causal`` asks for."""
    torch.manual_seed(0)
    config = LinformerConfig(**REAL | changes)
    kind = LinformerForCausalLM if config.causal else LinformerForMaskedLM
    return kind(config).to(device, dtype)


def in_float64(model):
    """The same numbers on the PyTorch path: no kernel takes float64."""
    return copy.deepcopy(model).double()


def values_and_gradients(model, ids, autocast=None, **inputs):
    """Logits, loss and the gradient of every parameter, by name."""
    model.zero_grad()
    with torch.autocast(ids.device.type, autocast, enabled=autocast is not None):
        output = model(ids, labels=ids, use_cache=False, **inputs)
    (output.loss * SCALE).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"logits": output.logits.detach(), "loss": output.loss.detach()} | gradients


def assert_within_the_table(actual, expected, dtype, factor=1):
    """Errors of one call hold for two layers: here attention adds a small part to the residual stream."""
    for name in expected:
        limit = (VALUE if name in ("logits", "loss") else GRADIENT)[dtype]
        assert relative_error(actual[name], expected[name]) < factor * limit, name


def attention_call(tokens, dtype, device, block=64, window=128, slots_per_block=4, heads=8, dim=64):
    tensors = [torch.randn(2, heads, tokens, dim, device=device, dtype=torch.float64) for _ in range(3)]
    weight = torch.rand(heads, 1, block, slots_per_block, device=device, dtype=torch.float64) / block
    tensors += [mix_blocks(tensors[1], weight), mix_blocks(tensors[2], weight)]
    layout = BlockLayout(block, window, slots_per_block, tokens // block)
    return [tensor.to(dtype) for tensor in tensors], layout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [100, 1000, 2048])
def test_attention_is_within_the_table(tokens, dtype, device):
    torch.backends.cuda.matmul.allow_tf32 = False
    tensors, layout = attention_call(tokens, dtype, device)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    truths = [tensor.detach().double().requires_grad_() for tensor in tensors]
    output, truth = attend_blocks(*leaves, layout), attend_blocks_reference(*truths, layout)[0]
    weight = torch.randn_like(truth)
    output.backward(weight.to(dtype))
    truth.backward(weight.to(dtype).double())
    assert relative_error(output, truth) < VALUE[dtype]
    for name, leaf, expected in zip(("q", "k", "v", "slot k", "slot v"), leaves, truths, strict=True):
        assert relative_error(leaf.grad, expected.grad) < GRADIENT[dtype], name


@pytest.mark.parametrize("groups", [8, 2, 1])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [64, 333, 1000])
def test_packed_rows_and_shared_heads_are_within_the_table(tokens, packed, groups, device):
    (query, *tensors), layout = attention_call(tokens, torch.bfloat16, device)
    tensors = [query, *(tensor[:, :groups].contiguous() for tensor in tensors)]
    first_block = None
    if packed:
        block = torch.arange(-(-tokens // layout.block_size), device=device)
        first_block = torch.stack((block // 3 * 3, torch.zeros_like(block)))
    leaves = [tensor.requires_grad_() for tensor in tensors]
    truths = [tensor.detach().double().requires_grad_() for tensor in tensors]
    output = attend_blocks(*leaves, layout, first_block)
    truth = attend_blocks_reference(*truths, layout, first_block)[0]
    weight = torch.randn_like(truth).bfloat16()
    output.backward(weight)
    truth.backward(weight.double())
    assert relative_error(output, truth) < VALUE[torch.bfloat16]
    for name, leaf, expected in zip(("q", "k", "v", "slot k", "slot v"), leaves, truths, strict=True):
        assert relative_error(leaf.grad, expected.grad) < GRADIENT[torch.bfloat16], name


@both_paths
def test_very_negative_scores_are_numbers(path, device):
    """All scores near -120: where a kernel scores keys that are not there as 0, its exponentials overflow."""
    tensors, layout = attention_call(704, torch.float64, device)
    tensors = [tensor * 0.1 for tensor in tensors]
    tensors[0][..., 0] = 1
    for key in (tensors[1], tensors[3]):
        key[..., 0] = -120 * key.shape[-1] ** 0.5
    leaves = [tensor.bfloat16().requires_grad_() for tensor in tensors]
    output = path.attend_blocks(*leaves, layout)
    output.backward(torch.randn_like(output))
    for name, leaf in zip(("q", "k", "v", "slot k", "slot v"), leaves, strict=True):
        assert leaf.grad.isfinite().all(), name


@both_paths
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_gradient_by_a_later_token(dtype, path, device):
    tensors, layout = attention_call(700, dtype, device, block=32)
    states = torch.stack(tensors[:3]).requires_grad_()
    weight = torch.rand(1, 1, 32, 4, device=device, dtype=dtype) / 32
    query, key, value = states
    output = path.attend_blocks(query, key, value, mix_blocks(key, weight), mix_blocks(value, weight), layout)
    for t in (0, 30, 31, 32, 255, 256, 300, 511, 512, 698):
        (gradient,) = torch.autograd.grad(output[:, :, t].float().sum(), states, retain_graph=True)
        assert not gradient[:, :, :, t + 1 :].any()
        assert gradient[2, :, :, : t + 1].any()


def test_the_pytorch_path_gives_the_same_bits_where_asked(device):
    tensors, layout = attention_call(2048, torch.bfloat16, device)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            output = attend_blocks_fused(*leaves, layout)
            runs.append([output, *torch.autograd.grad(output, leaves, output.detach())])
    finally:
        torch.use_deterministic_algorithms(False)
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_the_kernels_always_give_the_same_bits(packed, device, started):
    tensors, layout = attention_call(2048, torch.bfloat16, device)
    first_block = torch.arange(2048 // 64, device=device)[None] // 5 * 5 if packed else None
    leaves = [tensor.requires_grad_() for tensor in tensors]
    runs = []
    for _ in range(3):
        output = kernels_linformer.attend_blocks(*leaves, layout, first_block)
        runs.append([output, *torch.autograd.grad(output, leaves, output.detach())])
    assert started
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@both_paths
def test_memory_is_linear(path, device):
    """With k = 1024 slots at both lengths."""
    peaks = []
    for tokens, slots_per_block in ((16384, 4), (32768, 2)):
        tensors, layout = attention_call(tokens, torch.bfloat16, device, slots_per_block=slots_per_block)
        leaves = [tensor.requires_grad_() for tensor in tensors]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        path.attend_blocks(*leaves, layout).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del tensors, leaves
    assert peaks[1] < 2.2 * peaks[0]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")  # torch, on switching it on
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("projection", ["learned", "convolution", "pooling"])
def test_forward_and_backward_never_wait(causal, projection, device, started):
    """With and without padding, packed, prefilled, continued and decoded: any synchronisation raises."""
    config = LinformerConfig(**REAL | {"causal": causal, "projection": projection})
    model = (LinformerForCausalLM if causal else LinformerForMaskedLM)(config).to(device, torch.bfloat16)
    ids = torch.randint(0, 1000, (2, 300), device=device)
    mask = torch.ones_like(ids)
    mask[0, :70] = 0
    documents = torch.zeros_like(ids)
    documents[:, 128:] = 1
    model(ids, attention_mask=mask, use_cache=False).logits.sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    started.clear()
    try:
        model(ids, use_cache=False).logits.sum().backward()
        output = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        output.logits.sum().backward()
        if causal:
            model(ids, document_ids=documents, attention_mask=torch.ones_like(mask)).logits.sum().backward()
            with torch.no_grad():
                past = model(ids, attention_mask=mask, use_cache=True).past_key_values
                past = model(ids[:, :50], past_key_values=past).past_key_values
                for _ in range(3):
                    past = model(ids[:, :1], past_key_values=past).past_key_values
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert started


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_float64_on_the_device_equals_the_cpu(attn_implementation, device):
    torch.manual_seed(0)
    model = LinformerForCausalLM(LinformerConfig(**REAL)).double().eval()
    model.set_attn_implementation(attn_implementation)
    on_device = copy.deepcopy(model).to(device)
    ids = torch.randint(0, 1000, (2, 300))
    mask = torch.ones_like(ids)
    mask[0, :70], mask[1, [3, 99, 100]] = 0, 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    actual = on_device(ids.to(device), attention_mask=mask.to(device), use_cache=False).logits.cpu()
    assert (actual - expected)[mask == 1].abs().max() < ORACLE


def test_no_leak(device):
    model = LinformerForCausalLM(LinformerConfig(**REAL)).to(device, torch.bfloat16).eval()
    ids = torch.randint(0, 1000, (2, 1500), device=device)
    with torch.no_grad():
        before = model(ids).logits
        for t in (31, 32, 511, 512, 1023, 1024, 1400):
            other = ids.clone()
            other[:, t] = (other[:, t] + 1) % 1000
            after = model(other).logits
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.equal(after[:, t:], before[:, t:])


def test_decoding_equals_prefill(device):
    model = LinformerForCausalLM(LinformerConfig(**REAL)).to(device, torch.float64).eval()
    ids = torch.randint(0, 1000, (2, 1200), device=device)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        past, logits, start = None, [], 0
        for size in (500, 1, 63, 1, 1, 400, *[1] * 234):
            output = model(ids[:, start : start + size], past_key_values=past, use_cache=True)
            past, start = output.past_key_values, start + size
            logits.append(output.logits)
    assert (torch.cat(logits, 1) - full).abs().max() < CACHE


def test_generate(device):
    model = LinformerForCausalLM(LinformerConfig(**REAL)).to(device, torch.float32).eval()
    ids = torch.randint(0, 1000, (3, 40), device=device)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    how = {"do_sample": False, "max_new_tokens": 60, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **how)
    assert together.shape == (3, 100)
    beams = model.generate(ids, attention_mask=mask, num_beams=3, **how)
    assert beams.shape == (3, 100)


@compiles
@pytest.mark.parametrize("precision", ["autocast", "weights"])
@pytest.mark.parametrize(
    ("position_embedding", "qk_norm"), [("rotary", True), ("learned", True), ("rotary", False), ("learned", False)]
)
@pytest.mark.parametrize("projection", ["learned", "convolution", "pooling"])
def test_the_model_compiles_into_one_graph(projection, position_embedding, qk_norm, precision, device, started):
    torch.compiler.reset()
    dtype = torch.float32 if precision == "autocast" else torch.bfloat16
    how = {"projection": projection, "position_embedding": position_embedding, "qk_norm": qk_norm, "depth": 1}
    model = real_model(device, dtype, **how)
    ids = torch.randint(0, 1000, (2, 300), device=device)
    autocast = torch.bfloat16 if precision == "autocast" else None
    eager = values_and_gradients(model, ids, autocast)
    truth = values_and_gradients(in_float64(model), ids)
    started.clear()
    compiled = torch.compile(model, fullgraph=True)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        output = compiled(ids, labels=ids, use_cache=False)
    model.zero_grad()
    (output.loss * SCALE).backward()
    actual = {"logits": output.logits.detach(), "loss": output.loss.detach()}
    actual |= {name: parameter.grad for name, parameter in model.named_parameters()}
    assert set(started) == {torch.bfloat16}
    assert_within_the_table(actual, truth, torch.bfloat16)
    assert_within_the_table(actual, eager, torch.bfloat16)


@compiles
@pytest.mark.parametrize("shared_weights", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_mixing_and_attention_compile_into_one_graph(dynamic, shared_weights, device):
    """dynamic: lengths share graphs."""
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(kernels_linformer.mix_and_attend, fullgraph=True, dynamic=dynamic, backend=count)
    for tokens in (300, 411, 1000):
        tensors, weights, layout = mixing_call(tokens, torch.bfloat16, device)
        weights = weights[:1] * 2 if shared_weights else weights
        leaves = [tensor.requires_grad_() for tensor in (*tensors, *weights[: 1 if shared_weights else 2])]
        runs = []
        for attend in (kernels_linformer.mix_and_attend, compiled):
            output = attend(*tensors, weights, layout)
            runs.append([output, *torch.autograd.grad(output, leaves, torch.ones_like(output))])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert len(graphs) < 3 if dynamic else len(graphs) == 3


@compiles
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_attention_over_slots_compiles_into_one_graph(counted, dynamic, device):
    torch.compiler.reset()
    compiled = torch.compile(kernels_linformer.attend_slots, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (300, 411, 1000):
        shapes = ((8, tokens), (2, 128), (2, 128))
        leaves = [torch.randn(2, *shape, 64, device=device).bfloat16().requires_grad_() for shape in shapes]
        count = torch.tensor([128, 7], device=device) if counted else None
        runs = []
        for attend in (kernels_linformer.attend_slots, compiled):
            output = attend(*leaves, count)
            runs.append([output, *torch.autograd.grad(output, leaves, torch.ones_like(output))])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@compiles
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("how", ["E is F", "rotary", "sets"])
def test_mixing_a_row_and_attention_compile_into_one_graph(how, dynamic, device):
    """Rows shorter and longer than the weights."""
    torch.compiler.reset()
    ours = kernels_linformer.mix_sequence_and_attend
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    size = (2 if how == "sets" else 1, 512, 128)
    weights = [(torch.randn(*size, device=device) / 16).bfloat16().requires_grad_() for _ in range(2)]
    weights = weights[:1] if how == "E is F" else weights
    angles = None
    if how == "rotary":
        position = attention_linformer.sequence_centres(512, 128, device)
        angles = attention_linformer.rotary_angles(position, 64, 1e4, torch.bfloat16)
    for tokens in (300, 411, 1000):
        states = [torch.randn(2, tokens, heads, 64, device=device).bfloat16().transpose(1, 2) for heads in (8, 2, 2)]
        leaves = [*(tensor.requires_grad_() for tensor in states), *weights]
        runs = []
        for attend in (ours, compiled):
            output = attend(*states, (weights[0], weights[-1]), angles)
            runs.append([output, *torch.autograd.grad(output, leaves, torch.ones_like(output))])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@compiles
@pytest.mark.parametrize("projection", ["learned", "pooling"])
def test_the_encoder_compiles_into_one_graph(projection, device):
    torch.compiler.reset()
    model = real_model(device, torch.bfloat16, causal=False, projection=projection).eval()
    ids = torch.randint(0, 1000, (2, 1000), device=device)
    mask = torch.ones_like(ids)
    mask[0, :300] = 0
    runs = []
    for call in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        logits = call(ids, attention_mask=mask).logits
        logits.float().square().mean().backward()
        runs.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for actual, expected in zip(*runs, strict=True):
        assert relative_error(actual, expected) < 2 * GRADIENT[torch.bfloat16]


def mixing_call(tokens, dtype, device, block=64, slots=4, heads=8, dim=64):
    """Queries, keys and values, the two mixing weights, and the layout: :func:`mix_and_attend` without positions."""
    tensors = [torch.randn(2, heads, tokens, dim, device=device).to(dtype) for _ in range(3)]
    weights = [(torch.rand(heads, 1, block, slots, device=device) / block).to(dtype) for _ in range(2)]
    return tensors, weights, BlockLayout(block, 128, slots, 32)


@pytest.mark.parametrize("how", ["plain", "padded", "packed"])
@pytest.mark.parametrize("position_embedding", ["rotary", "learned"])
def test_the_operators_keep_their_promises(position_embedding, how, device, monkeypatch):
    """Schema, and shapes, dtypes and strides that torch.compile is told, on the arguments of a training step."""
    names = {name for name in vars(kernels_linformer) if name.endswith("_op")}
    names -= {"attend_next_token_op", "rotary_angles_op"}  # no gradients; tested beside their values
    names -= {"normalise_and_rotate_op", "normalise_and_rotate_backward_op"}  # tested beside theirs
    calls = {}

    def recording(name, operator):
        def record(*arguments):
            calls[name] = (operator, [a.detach() if torch.is_tensor(a) else a for a in arguments])
            return operator(*arguments)

        return record

    for name in names:
        monkeypatch.setattr(kernels_linformer, name, recording(name, getattr(kernels_linformer, name)))
    ids = torch.randint(0, 1000, (2, 300), device=device)
    inputs = inputs_of(how, ids)
    for qk_norm in (True, False):
        model = real_model(device, torch.bfloat16, position_embedding=position_embedding, qk_norm=qk_norm)
        values_and_gradients(model, ids, **inputs)
    tensors, layout = attention_call(300, torch.bfloat16, device)
    kernels_linformer.attend_blocks(*(tensor.requires_grad_() for tensor in tensors), layout).sum().backward()
    query, *slots = (
        torch.randn(2, heads, rows, 64, device=device).bfloat16() for heads, rows in ((8, 300), (2, 100), (2, 100))
    )
    for count in (None, torch.tensor([100, 7], device=device)):
        leaves = [tensor.detach().requires_grad_() for tensor in (query, *slots)]
        kernels_linformer.attend_slots(*leaves, count).sum().backward()
    row = [torch.randn(2, 300, heads, 64, device=device).bfloat16().transpose(1, 2) for heads in (8, 2, 2)]
    weights = [(torch.rand(1, 512, 100, device=device) / 300).bfloat16() for _ in range(2)]
    leaves = [tensor.requires_grad_() for tensor in (*row, *weights)]
    kernels_linformer.mix_sequence_and_attend(*leaves[:3], leaves[3:]).sum().backward()
    assert len(names) == 10
    assert calls.keys() == names
    for operator, arguments in calls.values():
        library.opcheck(operator, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


def inputs_of(how, ids):
    """Nothing more; row 0 padded on the left; three documents in a row, which start at multiples of 32."""
    if how == "padded":
        mask = torch.ones_like(ids)
        mask[0, :70] = 0
        return {"attention_mask": mask}
    if how == "packed":
        column = torch.arange(ids.shape[1], device=ids.device)
        return {"document_ids": ((column >= 96).long() + (column >= 256)).expand_as(ids).contiguous()}
    return {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("projection", ["learned", "convolution", "pooling"])
@pytest.mark.parametrize(("causal", "qk_norm"), [(True, True), (True, False), (False, True)])
def test_autocast_takes_the_low_precision(causal, qk_norm, projection, dtype, device, started):
    model = real_model(device, causal=causal, qk_norm=qk_norm, projection=projection)
    ids = torch.randint(0, 1000, (2, 300), device=device)
    actual = values_and_gradients(model, ids, dtype)
    assert set(started) == {dtype}
    started.clear()
    truth = values_and_gradients(in_float64(model), ids)
    assert not started
    assert_within_the_table(actual, truth, dtype)
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("causal", "qk_norm", "projection"),
    [(True, True, "convolution"), (True, False, "convolution"), (False, True, "learned"), (False, True, "convolution")],
)
def test_activation_checkpointing_changes_no_bit(causal, qk_norm, projection, autocast, use_reentrant, device, started):
    model = real_model(device, causal=causal, qk_norm=qk_norm, projection=projection).train()
    ids = torch.randint(0, 1000, (2, 300), device=device)
    expected = values_and_gradients(model, ids, autocast)
    calls = len(started)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    actual = values_and_gradients(model, ids, autocast)
    assert len(started) > 2 * calls  # forward kernels ran again
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("how", ["plain", "padded", "packed"])
@pytest.mark.parametrize("projection", ["learned", "convolution", "pooling"])
@with_and_without_norm
def test_two_steps_of_training_give_the_same_bits(qk_norm, projection, how, device, started):
    runs = []
    for _ in range(2):
        model = real_model(device, projection=projection, qk_norm=qk_norm)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ids, seen = torch.randint(0, 1000, (2, 600), device=device), {}
        for step in range(2):
            found = values_and_gradients(model, ids, torch.bfloat16, **inputs_of(how, ids))
            seen |= {f"{name}, step {step}": value for name, value in found.items()}
            optimizer.step()
        runs.append(seen)
    assert started
    for name, value in runs[0].items():
        assert torch.equal(runs[1][name], value), name
    assert not torch.equal(runs[0]["loss, step 0"], runs[0]["loss, step 1"])


@pytest.mark.parametrize("how", ["plain", "padded", "packed"])
@with_and_without_norm
def test_without_triton_the_model_is_the_same(qk_norm, how, device, started, monkeypatch):
    model = real_model(device, torch.bfloat16, qk_norm=qk_norm)
    ids = torch.randint(0, 1000, (2, 300), device=device)
    inputs = inputs_of(how, ids)
    truth = values_and_gradients(in_float64(model), ids, **inputs)
    fused = values_and_gradients(model, ids, **inputs)
    assert started
    started.clear()
    monkeypatch.setattr(kernels_linformer, "triton", None)
    plain = values_and_gradients(model, ids, **inputs)
    assert not started
    for actual in (fused, plain):
        real = {"logits": actual["logits"] * kept(ids, inputs)}
        expected = {"logits": truth["logits"] * kept(ids, inputs)}
        assert_within_the_table(actual | real, truth | expected, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.step()
        after = values_and_gradients(model, ids, **inputs)
    assert not started
    assert after["loss"] < plain["loss"]


def kept(ids, inputs):
    """1 at real tokens, [B, T, 1]; what a model says at padding means nothing."""
    return inputs.get("attention_mask", torch.ones_like(ids))[..., None]


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["plain", "padded", "packed"])
@pytest.mark.parametrize("projection", ["learned", "convolution", "pooling"])
@with_and_without_norm
def test_bfloat16_on_the_device_equals_float64_on_the_cpu(
    qk_norm, projection, how, attn_implementation, device, started
):
    """Weights rounded to bfloat16 in both."""
    model = real_model(device, torch.bfloat16, projection=projection, qk_norm=qk_norm).eval()
    truth = in_float64(model).cpu()
    model.set_attn_implementation(attn_implementation)
    ids = torch.randint(0, 1000, (2, 300), device=device)
    inputs = inputs_of(how, ids)
    on_cpu = {name: value.cpu() for name, value in inputs.items()}
    with torch.no_grad():
        actual = model(ids, use_cache=False, **inputs).logits
        expected = truth(ids.cpu(), use_cache=False, **on_cpu).logits
    real = kept(ids, inputs).cpu()
    assert bool(started) is (attn_implementation == "sdpa")
    assert relative_error(actual.cpu() * real, expected * real) < VALUE[torch.bfloat16]


@pytest.mark.parametrize("padded", [False, True])
@with_and_without_norm
def test_bfloat16_decoding_equals_float64_on_the_cpu(qk_norm, padded, device, started):
    """Prefill, continuation over several blocks, single tokens."""
    model = real_model(device, torch.bfloat16, qk_norm=qk_norm).eval()
    ids = torch.randint(0, 1000, (2, 400), device=device)
    inputs = inputs_of("padded" if padded else "plain", ids)
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    past, logits, start = None, [], 0
    with torch.no_grad():
        for size in (200, 1, 150, *[1] * 49):
            now = {"attention_mask": mask[:, : start + size]} if padded else {}
            output = model(ids[:, start : start + size], past_key_values=past, use_cache=True, **now)
            past, start = output.past_key_values, start + size
            logits.append(output.logits.cpu())
            assert started  # single tokens too
            started.clear()
        expected = in_float64(model).cpu()(ids.cpu(), attention_mask=mask.cpu(), use_cache=False).logits
    real = mask.cpu()[..., None]
    assert relative_error(torch.cat(logits, 1) * real, expected * real) < VALUE[torch.bfloat16]


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_share_a_batch(processes, device, tmp_path):
    """DDP and FSDP 2 find the gradients of one process on the joined batch: torchrun, NCCL, a device each."""
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} CUDA devices")
    script, report = Path(__file__).with_name("kernels_distributed_run.py"), tmp_path / "report.json"
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        + [str(script), device.type, str(report)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(script.parent.parent), "OMP_NUM_THREADS": "1"},
        timeout=400,
    )
    assert run.returncode == 0, run.stdout
    cases = json.loads(report.read_text())
    wanted = itertools.product(("causal", "encoder"), ("ddp", "fsdp"), ("float32", "bfloat16"))
    assert cases.keys() == {" ".join(names) for names in wanted}
    for case, found in cases.items():
        assert found["processes"] == processes
        assert found["kernels"], case
        # float32: sums in another order. bfloat16: both runs round, each within the table of the truth.
        limit = GRADIENT[torch.bfloat16] if "bfloat16" in case else 10 * GRADIENT[torch.float32]
        for name, error in found["errors"].items():
            assert error < limit, (case, name)
