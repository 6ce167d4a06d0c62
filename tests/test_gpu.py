"""On a CUDA device: the same mathematics at real sizes, linear memory, and a forward pass that never waits."""

import copy

import pytest
import torch
from tolerances import CACHE, GRADIENT, ORACLE, VALUE, relative_error

from linpass import LinformerConfig, LinformerForCausalLM, LinformerForMaskedLM
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
}


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


def test_very_negative_scores_are_numbers(device):
    """All scores near -120: where a kernel scores keys that are not there as 0, its exponentials overflow."""
    tensors, layout = attention_call(704, torch.float64, device)
    tensors = [tensor * 0.1 for tensor in tensors]
    tensors[0][..., 0] = 1
    for key in (tensors[1], tensors[3]):
        key[..., 0] = -120 * key.shape[-1] ** 0.5
    leaves = [tensor.bfloat16().requires_grad_() for tensor in tensors]
    output = attend_blocks(*leaves, layout)
    output.backward(torch.randn_like(output))
    for name, leaf in zip(("q", "k", "v", "slot k", "slot v"), leaves, strict=True):
        assert leaf.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_gradient_by_a_later_token(dtype, device):
    tensors, layout = attention_call(700, dtype, device, block=32)
    states = torch.stack(tensors[:3]).requires_grad_()
    weight = torch.rand(1, 1, 32, 4, device=device, dtype=dtype) / 32
    query, key, value = states
    output = attend_blocks(query, key, value, mix_blocks(key, weight), mix_blocks(value, weight), layout)
    for t in (0, 30, 31, 32, 255, 256, 300, 511, 512, 698):
        (gradient,) = torch.autograd.grad(output[:, :, t].float().sum(), states, retain_graph=True)
        assert not gradient[:, :, :, t + 1 :].any()
        assert gradient[2, :, :, : t + 1].any()


def test_deterministic_algorithms_give_the_same_bits(device):
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


def test_memory_is_linear(device):
    """With k = 1024 slots at both lengths."""
    peaks = []
    for tokens, slots_per_block in ((16384, 4), (32768, 2)):
        tensors, layout = attention_call(tokens, torch.bfloat16, device, slots_per_block=slots_per_block)
        leaves = [tensor.requires_grad_() for tensor in tensors]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attend_blocks(*leaves, layout).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del tensors, leaves
    assert peaks[1] < 2.2 * peaks[0]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")  # torch, on switching it on
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("projection", ["learned", "convolution", "pooling"])
def test_forward_and_backward_never_wait(causal, projection, device):
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
