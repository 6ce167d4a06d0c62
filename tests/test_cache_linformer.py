"""One cache of constant size: prefill and decoding equal one full forward pass, whatever the split."""

import copy

import pytest
import torch
from tolerances import BF16_DECODE_MAX, BF16_DECODE_MEAN, CACHE
from transformers import AttentionInterface, DynamicCache

from linpass import LinformerCache, LinformerForCausalLM, LinformerForMaskedLM

SETTINGS = [
    (position, projection, sharing)
    for position in ("learned", "rotary")
    for projection in ("learned", "convolution", "pooling")
    for sharing in ("none", "layerwise")
]


def in_calls(model, ids, sizes, mask=None):
    """Logits of the row fed in calls of the given sizes, one cache through all."""
    past, logits, start = None, [], 0
    with torch.no_grad():
        for size in sizes:
            stop = start + size
            output = model(
                ids[:, start:stop],
                attention_mask=None if mask is None else mask[:, :stop],
                past_key_values=past,
                use_cache=True,
            )
            past, start = output.past_key_values, stop
            logits.append(output.logits)
    assert start == ids.shape[1]
    return torch.cat(logits, 1), past


def splits(tokens):
    """Every split in two, one by one, in equal calls of all sizes to 17, and a ragged one."""
    yield from ([cut, tokens - cut] for cut in range(1, tokens))
    yield [1] * tokens
    for size in range(2, 18):
        yield [size] * (tokens // size) + [tokens % size] * (tokens % size > 0)
    yield [3, 1, 1, 9, 2, tokens - 16]


@pytest.mark.parametrize(("position", "projection", "sharing"), SETTINGS)
def test_every_split_equals_one_forward_pass(position, projection, sharing, build, tiny_config):
    config = tiny_config(
        position_embedding=position,
        projection=projection,
        projection_sharing=sharing,
        k=8 if sharing == "layerwise" else [8, 0],
        num_key_value_heads=2,
    )
    model = build(LinformerForCausalLM, config)
    tokens = 29 if config.max_tokens else 51  # past seq_length = 32 where the model runs on
    ids = torch.randint(0, 50, (1, tokens))
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
    for sizes in splits(tokens):
        assert (in_calls(model, ids, sizes)[0] - full).abs().max() < CACHE, sizes


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("position", "projection"), [("learned", "learned"), ("rotary", "convolution"), ("rotary", "pooling")]
)
def test_splits_with_left_padding_and_gaps(position, projection, attn_implementation, build, tiny_config):
    config = tiny_config(position_embedding=position, projection=projection, projection_sharing="none")
    model = build(LinformerForCausalLM, config)
    model.set_attn_implementation(attn_implementation)
    tokens = 29 if config.max_tokens else 51
    ids = torch.randint(0, 50, (4, tokens))
    mask = torch.ones(4, tokens, dtype=torch.long)
    mask[0, :11] = 0
    mask[1, [0, 1, 9, 10, 11, 12, 13, 14, 15, 16, 17, 20]] = 0  # a gap of more than a block
    mask[2, -3:] = 0
    full = torch.zeros(4, tokens, 50, dtype=torch.float64)
    with torch.no_grad():
        for row in range(4):
            real = mask[row] == 1
            full[row, real] = model(ids[row : row + 1, real], use_cache=False).logits[0]
    for sizes in [[1] * tokens, [12, 1, 1, tokens - 14], [18, tokens - 18], [5] * (tokens // 5) + [tokens % 5]]:
        logits, past = in_calls(model, ids, sizes, mask)
        assert (logits - full)[mask == 1].abs().max() < CACHE, sizes
        assert logits.isfinite().all()
        assert past.layers[0].seen.tolist() == mask.sum(1).tolist()
        assert past.get_seq_length() == tokens


@pytest.mark.parametrize("tokens", [1, 5, 8, 23, 32])
def test_a_prompt_is_computed_as_without_a_cache(tokens, build, tiny_config):
    model = build(LinformerForCausalLM, tiny_config(projection="convolution", position_embedding="rotary"))
    ids = torch.randint(0, 50, (2, tokens))
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=True).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 8, 16, 21])
def test_no_memory_is_read_that_nobody_wrote(tokens, masked, build, tiny_config, poisoned_memory):
    """Of prompts shorter and longer than the window, with and without a block under way, rows equal and padded."""
    assert torch.empty(1).isnan().all()
    model = build(LinformerForCausalLM, tiny_config(position_embedding="rotary"))
    ids, mask = torch.randint(1, 50, (2, 30)), torch.ones(2, 30, dtype=torch.long)
    mask[1, : (tokens + 1) // 2] = 0
    mask = mask if masked else None
    _, cache = in_calls(model, ids[:, :tokens], [tokens], mask)
    logits, _ = in_calls(model, ids, [tokens, *[1] * (30 - tokens)], mask)
    assert all(getattr(layer, name).isfinite().all() for layer in cache.layers for name in layer._tensors)
    assert (logits if mask is None else logits[mask.bool()]).isfinite().all()


def test_rows_can_be_reordered_selected_repeated_and_copied(build, tiny_config):
    model = build(LinformerForCausalLM, tiny_config(k=[8, 0]))
    ids = torch.randint(0, 50, (3, 30))
    mask = torch.ones(3, 30, dtype=torch.long)
    mask[1, :5] = 0
    order = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        full = model(ids[order], attention_mask=mask[order]).logits
        for operation in ("reorder_cache", "batch_select_indices"):
            past = in_calls(model, ids[:, :13], [13], mask[:, :13])[1]
            prefix = copy.deepcopy(past)
            getattr(past, operation)(order)
            rest = model(ids[order, 13:], attention_mask=mask[order], past_key_values=past).logits
            assert (rest - full[:, 13:])[mask[order, 13:] == 1].abs().max() < CACHE
        prefix.batch_repeat_interleave(2)
        repeated = torch.tensor([0, 0, 1, 1, 2, 2])
        rest = model(ids[repeated, 13:], attention_mask=mask[repeated], past_key_values=prefix).logits
        full = model(ids[repeated], attention_mask=mask[repeated]).logits
        assert (rest - full[:, 13:]).abs().max() < CACHE


def test_a_masked_token_fits_into_a_full_row(build, tiny_config):
    model = build(LinformerForCausalLM, tiny_config())
    ids, mask = torch.randint(0, 50, (2, 33)), torch.ones(2, 33, dtype=torch.long)
    mask[1, :5], mask[0, 32] = 0, 0
    past = model(ids[:, :32], attention_mask=mask[:, :32], use_cache=True).past_key_values
    last = model(ids[:, 32:], attention_mask=mask, past_key_values=copy.deepcopy(past)).logits
    assert (last[1, 0] - model(ids[1:, 5:]).logits[0, -1]).abs().max() < CACHE
    with pytest.raises(ValueError, match="seq_length=32"):
        model(ids[:, 32:], past_key_values=past)


def test_a_copied_prefix_is_not_touched_by_its_copy(build, tiny_config):
    model = build(LinformerForCausalLM, tiny_config())
    ids = torch.randint(0, 50, (1, 30))
    prefix = in_calls(model, ids[:, :12], [12])[1]
    before = {name: getattr(prefix.layers[0], name).clone() for name in prefix.layers[0]._tensors}
    past = copy.deepcopy(prefix)
    with torch.no_grad():
        for t in range(12, 30):
            past = model(ids[:, t : t + 1], past_key_values=past).past_key_values
    assert all(torch.equal(before[name], getattr(prefix.layers[0], name)) for name in before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [4, 2])
def test_bytes_are_the_formula_and_do_not_grow(dtype, heads, build, tiny_config):
    config = tiny_config(
        position_embedding="rotary", projection="convolution", k=[8, 16], num_key_value_heads=heads, depth=2
    )
    model = build(LinformerForCausalLM, config, dtype=dtype)
    batch, dim, size = 3, config.head_dim, dtype.itemsize
    expected = 0
    for k, r in ((8, 2), (16, 4)):
        expected += 2 * batch * heads * (k + config.window_size) * dim * size  # slots and ring
        expected += 2 * batch * heads * r * dim * max(size, 4)  # the block under way
        expected += 8 * batch + 8 + 4 * batch * heads  # tokens seen, columns, programs of a kernel
    past, seen = None, []
    ids = torch.randint(0, 50, (batch, 45))
    with torch.no_grad():
        for t in range(45):
            past = model(ids[:, t : t + 1], past_key_values=past, use_cache=True).past_key_values
            seen.append(past.nbytes)
    assert set(seen) == {expected}


@pytest.mark.parametrize("tokens", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_bytes_do_not_grow_with_the_tokens_generated(tokens, tiny_config):
    config = tiny_config(position_embedding="rotary", projection="convolution", depth=1, embed_dim=16, heads=2)
    model = LinformerForCausalLM(config).eval()
    storages = {}
    past, token = None, torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        for position in range(tokens + 1):
            output = model(token, past_key_values=past, use_cache=True)
            past, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
            if position in (1_000, tokens):
                layer = past.layers[0]
                tensors = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
                storages[position] = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert past.get_seq_length() == tokens + 1
    assert storages[1_000] == storages[tokens] == past.nbytes


@pytest.mark.parametrize("tokens", [800, pytest.param(2_000, marks=pytest.mark.slow)])
def test_bfloat16_decoding_stays_with_prefill(tokens, tiny_config):
    config = tiny_config(
        position_embedding="rotary", projection="convolution", qk_norm=True, seq_length=512, k=64, window_size=32
    )
    torch.manual_seed(1)
    model = LinformerForCausalLM(config).to(torch.bfloat16).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(0, 50, (1, tokens))
    with torch.no_grad():
        prefill = model(ids, use_cache=False).logits.float()
    decoded = in_calls(model, ids, [1] * tokens)[0].float()
    difference = (decoded - prefill).abs() / prefill.std()
    assert difference.max() < BF16_DECODE_MAX
    assert difference.mean() < BF16_DECODE_MEAN
    assert difference[:, -200:].mean() < 1.5 * difference[:, :200].mean()  # no drift


def test_gradients_flow_through_the_cache(build, tiny_config):
    """Teacher forcing in two calls gives the gradients of one."""
    model = build(LinformerForCausalLM, tiny_config(projection_sharing="none"))
    ids = torch.randint(0, 50, (2, 27))
    gradients = []
    for sizes in ([27], [11, 16], [11, 1, 15], [10] + [1] * 17):
        model.zero_grad()
        past, start, loss = None, 0, 0.0
        for size in sizes:
            output = model(ids[:, start : start + size], past_key_values=past, use_cache=len(sizes) > 1)
            past, start = output.past_key_values, start + size
            loss = loss + (output.logits.sin()).sum()
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for other in gradients[1:]:
        for got, expected in zip(other, gradients[0], strict=True):
            assert (got - expected).abs().max() < CACHE * max(1, expected.abs().max().item())


@pytest.mark.filterwarnings("ignore:::torch", "ignore:.*should not be instantiated:DeprecationWarning")  # of torch
@pytest.mark.parametrize("tokens", [20, 24])  # of a window of 12
def test_a_compiled_prompt_fills_a_new_cache(tokens, build, tiny_config):
    """In one graph."""
    model = build(LinformerForCausalLM, tiny_config(position_embedding="rotary", projection="convolution"))
    ids = torch.randint(0, 50, (2, tokens))
    torch.compiler.reset()
    prompt = torch.compile(lambda past: model(ids, past_key_values=past).logits, backend="aot_eager", fullgraph=True)
    past, wanted = LinformerCache(model.config), LinformerCache(model.config)
    with torch.no_grad():
        assert torch.equal(prompt(past), model(ids, past_key_values=wanted).logits)
    for layer, expected in zip(past.layers, wanted.layers, strict=True):
        assert all(torch.equal(getattr(layer, name), getattr(expected, name)) for name in layer._tensors)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("position_embedding", ["rotary", "learned"])
@pytest.mark.parametrize("tokens", [12, 20, 24, 32])  # of a window of 12; 32 fill all slots
def test_a_cache_has_its_memory_to_itself(tokens, position_embedding, mode, build, tiny_config):
    """Nothing else lies in it, and no projection's output is written by later tokens."""
    model = build(LinformerForCausalLM, tiny_config(position_embedding=position_embedding, num_key_value_heads=1))
    outputs = []
    for layer in model.model.layers:
        for projection in (layer.attention.k_proj, layer.attention.v_proj):
            projection.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with mode():
        past = model(torch.randint(0, 50, (1, tokens)), use_cache=True).past_key_values
    memory = [getattr(layer, name) for layer in past.layers for name in layer._tensors]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in memory)
    owned = {tensor.untyped_storage().data_ptr() for tensor in memory if tensor.numel()}
    assert len(owned) == sum(tensor.numel() > 0 for tensor in memory)
    assert not owned & {output.untyped_storage().data_ptr() for output in outputs}


def test_later_tokens_change_nothing_that_attention_was_given(build, tiny_config):
    """Somebody's attention may keep its keys."""
    seen = []

    def keeps(module, query, key, value, *_arguments, **_names):
        seen.append((key, key.clone(), value, value.clone()))
        return query.transpose(1, 2), None

    AttentionInterface.register("keeps", keeps)
    config = tiny_config(k=0, window_size=12, num_key_value_heads=1, position_embedding="rotary")
    model = build(LinformerForCausalLM, config)
    model.set_attn_implementation("keeps")
    with torch.no_grad():
        past = model(torch.randint(0, 50, (1, 12)), use_cache=True).past_key_values
        model(torch.randint(0, 50, (1, 1)), past_key_values=past)
    assert seen
    assert all(torch.equal(key, was) and torch.equal(value, it) for key, was, value, it in seen)


@pytest.mark.parametrize("memory", ["none", "there already"])
@pytest.mark.parametrize("tokens", [12, 24, 64])  # of a window of 12, and of blocks of 8 tokens
def test_a_gradient_may_be_formed_after_the_cache_went_on(tokens, memory, build, tiny_config):
    """What it needs is not what later tokens are written to."""
    fields = {"position_embedding": "rotary", "projection": "convolution", "seq_length": 64}
    model = build(LinformerForCausalLM, tiny_config(**fields))
    ids = torch.randint(0, 50, (2, tokens + 9))
    past = LinformerCache(model.config)
    if memory == "there already":
        past.allocate(2, model.config.num_key_value_heads, model.config.head_dim, torch.float64, ids.device)
    logits = model(ids[:, :tokens], past_key_values=past).logits
    with torch.no_grad():
        further = [model(ids[:, t : t + 1], past_key_values=past).logits for t in range(tokens, tokens + 9)]
        whole = model(ids).logits
    assert (torch.cat((logits, *further), 1) - whole).abs().max() < CACHE
    gradient = torch.autograd.grad(logits.square().sum(), model.model.embed_tokens.weight)[0]
    alone = torch.autograd.grad(model(ids[:, :tokens]).logits.square().sum(), model.model.embed_tokens.weight)[0]
    assert (gradient - alone).abs().max() < CACHE * alone.abs().max()


def test_what_a_cache_cannot_do_is_said(build, tiny_config):
    model = build(LinformerForCausalLM, tiny_config())
    ids = torch.randint(0, 50, (1, 4))
    with pytest.raises(ValueError, match="DynamicCache.*LinformerCache"):
        model(ids, past_key_values=DynamicCache(config=model.config))
    past = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be cropped"):
        past.layers[0].crop(-1)
    with pytest.raises(ValueError, match="1 rows.*2"):
        model(torch.randint(0, 50, (2, 3)), past_key_values=past)
    with pytest.raises(ValueError, match="document_ids"):
        model(ids, past_key_values=past, document_ids=torch.zeros_like(ids))
    with pytest.raises(ValueError, match="another configuration"):
        model(ids, past_key_values=LinformerCache(tiny_config(k=16)))
    past.reset()
    assert past.get_seq_length() == 0
    assert past.nbytes == 0
    assert (model(ids, past_key_values=past).logits - model(ids).logits).abs().max() < CACHE

    encoder = build(LinformerForMaskedLM, tiny_config(causal=False))
    assert encoder.model(ids, use_cache=True).past_key_values is None


def test_a_sequence_beyond_the_configuration_is_refused(build, tiny_config):
    model = build(LinformerForCausalLM, tiny_config())
    with pytest.raises(ValueError, match="seq_length=32"):
        model(torch.randint(0, 50, (1, 33)))
    past = model(torch.randint(0, 50, (1, 32)), use_cache=True).past_key_values
    assert isinstance(past, LinformerCache)
    with pytest.raises(ValueError, match="seq_length=32"):
        model(torch.randint(0, 50, (1, 1)), past_key_values=past)
    # Padding takes no position: 40 columns with 32 real tokens are fine.
    ids, mask = torch.randint(0, 50, (1, 40)), torch.ones(1, 40, dtype=torch.long)
    mask[0, :8] = 0
    assert (model(ids, attention_mask=mask).logits[:, 8:] - model(ids[:, 8:]).logits).abs().max() < CACHE
    with pytest.raises(ValueError, match="seq_length=32"):
        build(LinformerForMaskedLM, tiny_config(causal=False, position_embedding="rotary"))(ids)
