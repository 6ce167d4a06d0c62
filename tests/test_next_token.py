"""One more token per row: the fused kernel against loops in float64, and steps that compile once.

Without a CUDA device small cases run in Triton's interpreter, which has no bfloat16.
"""

from dataclasses import asdict, dataclass

import pytest
import torch
from tolerances import ORACLE, VALUE, relative_error
from torch import library
from transformers import CompileConfig, GenerationConfig

from linpass import LinformerCache, LinformerForCausalLM, layers_linformer
from linpass.attention_linformer import BlockLayout, rotary_angles, slot_centres

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MEMORY = ("keys", "values", "slot_keys", "slot_values", "block_keys", "block_values", "arrived")


@dataclass(frozen=True)
class Case:
    """Rows have seen so many tokens: the next one of 7, 31 and 39 completes a block; 39 and 100 are past the view."""

    seen: tuple[int, ...] = (0, 3, 7, 31, 39, 100)
    dtype: torch.dtype = torch.float32
    heads: int = 2
    groups: int = 2
    dim: int = 16
    block: int = 8
    window: int = 12
    slots: int = 2  # of a block; 0: none
    view: int = 4  # blocks
    stored: int = 1  # blocks that have weights of their own
    per_group: bool = False
    rotary: bool = True
    masked: tuple[int, ...] = ()  # rows whose token is padding


SMALL = [
    {},
    {"heads": 4, "dim": 20, "slots": 8, "view": 1, "seen": (7, 12), "masked": (1,)},
    {"heads": 3, "groups": 1, "slots": 1, "stored": 4, "rotary": False, "masked": (0, 2)},
    {"slots": 0, "seen": (0, 11, 12, 40)},
    {"slots": 4, "view": 40, "seen": (39, 319, 500, 5), "masked": (3,)},  # slots that several programs share
    {"per_group": True, "stored": 20, "window": 70, "seen": (15, 69), "dim": 33, "rotary": False},
]
REAL = Case(
    (0, 100, 127, 5000, 1023, 70000), torch.bfloat16, 8, 8, 64, 128, 128, 4, 128, stored=1, per_group=True, masked=(1,)
)
real = pytest.mark.gpu
CASES = [pytest.param(Case(**changes), id=str(changes)) for changes in SMALL] + [
    pytest.param(Case(**asdict(REAL) | changes), id=f"real-{changes}", marks=real)
    for changes in (
        {},
        {"dtype": torch.float16, "groups": 2, "dim": 128, "slots": 1, "view": 1024},
        {"dtype": torch.float32, "slots": 128, "view": 4, "rotary": False},
        {"slots": 0, "window": 1000},
        {"dim": 256, "groups": 1, "slots": 33, "view": 7, "block": 99, "stored": 50},
    )
]


def random_call(case):
    """Arguments of attend_next_token; what no row has written yet is NaN in memory."""
    rows, r = len(case.seen), case.slots

    def normal(*shape, dtype=case.dtype):
        return torch.randn(*shape, device=DEVICE).to(dtype)

    seen = torch.tensor(case.seen, device=DEVICE)
    ring = [normal(rows, case.groups, case.window, case.dim) for _ in range(2)]
    slots = [normal(rows, case.groups, r * case.view if r else 0, case.dim) for _ in range(2)]
    for row, count in enumerate(case.seen):
        for states in ring:
            states[row, :, count + 1 :] = float("nan")
        for states in slots if r else ():
            states[row, :, (count + 1) // case.block * r :] = float("nan")
    begun = (seen % case.block > 0)[:, None, None, None]
    sums = [normal(rows, case.groups, r, case.dim, dtype=torch.float32) * begun for _ in range(2)]
    arrived = torch.zeros(rows, case.groups, dtype=torch.int32, device=DEVICE)
    memory = (*ring, *slots, *sums, arrived)
    shape = (case.groups if case.per_group else 1, case.stored, case.block, r)
    weights = tuple(normal(*shape) for _ in range(2)) if r else None
    keep = torch.tensor([row not in case.masked for row in range(rows)], device=DEVICE)[:, None]
    angles = slot_angles = None
    if case.rotary:
        angles = rotary_angles(seen[:, None], case.dim, 1e4, case.dtype)
        if r:
            centres = slot_centres(seen[:, None] // case.block, case.block, r)
            slot_angles = rotary_angles(centres, case.dim, 1e4, torch.float32)
    return {
        "query_BH1D": normal(rows, 1, case.heads, case.dim).transpose(1, 2),
        "key_BG1D": normal(rows, 1, case.groups, case.dim).transpose(1, 2),
        "value_BG1D": normal(rows, 1, case.groups, case.dim).transpose(1, 2),
        "memory": memory,
        "weights": weights,
        "layout": BlockLayout(case.block, case.window, r, case.view if r else 0),
        "index_B1": seen[:, None].clone(),
        "keep_B1": keep if case.masked else None,
        "angles": angles,
        "slot_angles": slot_angles,
    }


def turn(row, angles, batch, at):
    if angles is None:
        return row
    cos, sin = (part[batch if len(part) > 1 else 0, 0, at].double() for part in angles)
    half = len(row) // 2
    return row * cos + torch.cat((-row[half:], row[:half])) * sin


def in_loops(case, call):
    """Output and memory, row by row and head by head."""
    query, key, value = (call[name].double() for name in ("query_BH1D", "key_BG1D", "value_BG1D"))
    memory = [tensor.double() if tensor.is_floating_point() else tensor.clone() for tensor in call["memory"]]
    keys, values, slot_keys, slot_values, block_keys, block_values, _ = memory
    output = torch.zeros_like(query)
    for row, count in enumerate(case.seen):
        if row in case.masked:
            continue
        number, within = divmod(count, case.block)
        completes = within == case.block - 1
        for group in range(case.groups):
            keys[row, group, count % case.window] = turn(key[row, group, 0], call["angles"], row, 0)
            values[row, group, count % case.window] = value[row, group, 0]
            for slot in range(case.slots):
                weights = []
                for weight in call["weights"]:
                    weight = weight.double()[group if case.per_group else 0]
                    weights.append(weight[min(number, case.stored - 1), within, slot])
                block_keys[row, group, slot] += weights[0] * key[row, group, 0]
                block_values[row, group, slot] += weights[1] * value[row, group, 0]
                if completes:
                    at = number % case.view * case.slots + slot
                    slot_keys[row, group, at] = turn(block_keys[row, group, slot], call["slot_angles"], row, slot)
                    slot_values[row, group, at] = block_values[row, group, slot]
                    block_keys[row, group, slot] = block_values[row, group, slot] = 0
            full = min((count + 1) // case.block, case.view) * case.slots
            near = min(count + 1, case.window)
            all_keys = torch.cat((slot_keys[row, group, :full], keys[row, group, :near]))
            all_values = torch.cat((slot_values[row, group, :full], values[row, group, :near]))
            for head in range(group * case.heads // case.groups, (group + 1) * case.heads // case.groups):
                turned = turn(query[row, head, 0], call["angles"], row, 0)
                output[row, head, 0] = (all_keys @ turned / case.dim**0.5).softmax(0) @ all_values
    return output, memory


@pytest.mark.parametrize("case", CASES)
def test_one_more_token_is_within_the_table(case, kernels):
    call = random_call(case)
    expected, remembered = in_loops(case, call)
    output = kernels.attend_next_token(**call)
    kept = torch.tensor([row not in case.masked for row in range(len(case.seen))], device=DEVICE)
    assert relative_error(output[kept], expected[kept]) < VALUE[case.dtype]
    for name, got, wanted in zip(MEMORY, call["memory"], remembered, strict=True):
        if not got.is_floating_point():
            assert torch.equal(got, wanted), name
        elif got.numel():
            assert torch.equal(got.isnan(), wanted.isnan()), name
            assert relative_error(got.nan_to_num(), wanted.nan_to_num()) < VALUE[case.dtype], name


@pytest.mark.parametrize("case", [CASES[4], CASES[len(SMALL)]])
def test_two_calls_give_the_same_bits(case, kernels):
    call = random_call(case)
    results = []
    for _ in range(2):
        memory = tuple(tensor.clone() for tensor in call["memory"])
        results.append((kernels.attend_next_token(**call | {"memory": memory}), *memory))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.nan_to_num(), second.nan_to_num())


@pytest.mark.parametrize("of", ["query", "weights", "memory"])
def test_a_gradient_takes_the_pytorch_path(of, kernels):
    call = random_call(Case())
    {"query": call["query_BH1D"], "weights": call["weights"][1], "memory": call["memory"][4]}[of].requires_grad_()
    before = [tensor.clone() for tensor in call["memory"]]
    assert kernels.attend_next_token(**call) is None
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, call["memory"], strict=True))


@pytest.mark.parametrize("case", [Case((7, 100)), pytest.param(REAL, marks=pytest.mark.gpu)], ids=["small", "real"])
def test_the_operator_keeps_its_promises(case, kernels):
    call = random_call(case)
    memory = [tensor.nan_to_num() for tensor in call["memory"]]
    library.opcheck(
        kernels.attend_next_token_op,
        (
            call["query_BH1D"],
            call["key_BG1D"],
            call["value_BG1D"],
            *memory,
            call["index_B1"],
            call["keep_B1"],
            *call["weights"],
            *call["angles"],
            *call["slot_angles"],
            list(call["layout"]),
        ),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


CONFIG = {
    "heads": 2,
    "num_key_value_heads": 1,
    "window_size": 8,
    "position_embedding": "rotary",
    "projection": "convolution",
}


def steps(model, ids, mask, step, prompt=5):
    """Logits of a prompt and of every later token, in a fresh cache."""
    cache, logits = LinformerCache(model.config, is_compileable=True), []
    with torch.no_grad():
        for start, stop in ((0, prompt), *((t, t + 1) for t in range(prompt, ids.shape[1]))):
            call = model if start == 0 else step
            output = call(ids[:, start:stop], mask[:, start:stop], past_key_values=cache, use_cache=True)
            logits.append(output.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_models_take_the_kernel(masked, kernels, monkeypatch, recorded_launches, build, tiny_config):
    model = build(LinformerForCausalLM, tiny_config(**CONFIG), dtype=torch.float32).to(DEVICE)
    ids = torch.randint(1, 50, (2, 10), device=DEVICE)
    mask = torch.ones_like(ids)
    if masked:
        mask[0, :3] = mask[1, 6] = 0
    calls, fused = [], kernels.attend_next_token

    def counted(*args):
        calls.append(fused(*args))
        return calls[-1]

    monkeypatch.setattr(layers_linformer, "attend_next_token", counted)
    launches = recorded_launches(lambda kernel, _tensors: kernel.__name__)
    logits, cache = steps(model, ids, mask, model)
    assert len(calls) == 10  # 5 tokens, 2 layers
    assert None not in calls
    assert launches.count("next_token_kernel") == 10  # one launch a layer and token
    monkeypatch.setattr(layers_linformer, "attend_next_token", lambda *args: None)
    expected, remembered = steps(model.double(), ids, mask, model)
    assert relative_error(logits[mask > 0], expected[mask > 0]) < 1e-5
    for layer, other in zip(cache.layers, remembered.layers, strict=True):
        for name in layer._tensors:
            assert relative_error(getattr(layer, name), getattr(other, name)) < 1e-5, name


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("projection", "position_embedding"), [("convolution", "rotary"), ("learned", "learned")])
def test_steps_compile_once_into_one_graph(projection, position_embedding, attn_implementation, build, tiny_config):
    """No matter how many tokens a row has seen, and for the next cache too."""
    changes = {"projection": projection, "position_embedding": position_embedding}
    config = tiny_config(**CONFIG | changes, attn_implementation=attn_implementation)
    model = build(LinformerForCausalLM, config)
    ids = torch.randint(1, 50, (3, 20))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 7:9] = 0
    expected, _ = steps(model, ids, mask, model)
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="eager")
    steps(model, ids[:, :6], mask[:, :6], step)
    with torch._dynamo.config.patch(error_on_recompile=True):
        logits, cache = steps(model, ids, mask, step)
    assert (logits - expected).abs().max() < ORACLE
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("depth", [pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.gpu)])
@pytest.mark.filterwarnings("ignore:::torch", "ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_steps_through_the_kernel_equal_eager_ones(depth, kernels, build, tiny_config):
    """Inductor may compute anew, late, what it can: nothing that a step reads may be written by then."""
    model = build(LinformerForCausalLM, tiny_config(**CONFIG | {"depth": depth}), dtype=torch.float32).to(DEVICE)
    ids = torch.randint(1, 50, (2, 10), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[1, 6] = 0
    expected, cache = steps(model, ids, mask, model)
    torch._dynamo.reset()
    logits, compiled = steps(model, ids, mask, torch.compile(model, fullgraph=True))
    assert relative_error(logits[mask > 0], expected[mask > 0]) < 1e-5
    for layer, other in zip(cache.layers, compiled.layers, strict=True):
        for name in layer._tensors:
            assert relative_error(getattr(other, name), getattr(layer, name)) < 1e-5, name


def test_a_prefix_of_inference_mode_can_be_continued(build, tiny_config):
    model = build(LinformerForCausalLM, tiny_config(**CONFIG))
    ids = torch.randint(1, 50, (2, 20))
    with torch.inference_mode():
        cache = model(ids[:, :9], use_cache=True).past_key_values
    with torch.no_grad():
        step = model(ids[:, 9:10], past_key_values=cache).logits
        rest = model(ids[:, 10:], past_key_values=cache).logits
        expected = model(ids).logits[:, 9:]
    assert (torch.cat((step, rest), 1) - expected).abs().max() < ORACLE


def test_a_cache_stays_where_it_is(build, tiny_config):
    model = build(LinformerForCausalLM, tiny_config(**CONFIG))
    ids = torch.randint(1, 50, (2, 40))
    addresses = []
    cache = LinformerCache(model.config)
    with torch.no_grad():
        for start, stop in ((0, 5), (5, 6), (6, 25), (25, 26), (26, 40)):
            model(ids[:, start:stop], past_key_values=cache)
            addresses.append([getattr(layer, name).data_ptr() for layer in cache.layers for name in layer._tensors])
    assert all(those == addresses[0] for those in addresses)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch, of autograd.Function
@pytest.mark.parametrize(("rows", "chunk"), [(1, None), (3, None), pytest.param(3, 4, marks=pytest.mark.slow)])
def test_generate_compiles_its_steps_where_asked(rows, chunk, build, monkeypatch, tiny_config):
    """As for a static cache; rows that end early are filled up by ``generate`` and compile nothing anew."""
    model = build(LinformerForCausalLM, tiny_config(**CONFIG | {"eos_token_id": 7}))
    ids = torch.randint(8, 50, (rows, 6))
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=20, eos_token_id=7, pad_token_id=0, prefill_chunk_size=chunk
    )
    expected = model.generate(ids, generation_config=greedy)
    everywhere = CompileConfig(backend="eager", mode=None, fullgraph=True)
    everywhere._compile_all_devices = True  # generate compiles on accelerators alone
    torch._dynamo.reset()
    compiled, get_compiled_call = [], model.get_compiled_call
    monkeypatch.setattr(model, "get_compiled_call", lambda config: compiled.append(config) or get_compiled_call(config))
    model.generate(ids, generation_config=greedy, cache_implementation="static", compile_config=everywhere)
    kept = model._kept_cache.layers[0].keys
    assert hasattr(kept, "_dynamo_static_input_type")  # CUDA graphs may write it
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = model.generate(ids, generation_config=greedy, cache_implementation="static", compile_config=everywhere)
    assert len(compiled) >= 2
    assert torch.equal(again, expected)
    assert model._kept_cache.layers[0].keys is kept


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch, of autograd.Function
def test_rows_of_different_lengths_generate_in_one_compiled_step(build, tiny_config):
    """Padded on the left, as a tokenizer does it for prompts: each row is as it is alone."""
    model = build(LinformerForCausalLM, tiny_config(**CONFIG | {"eos_token_id": None}))
    ids, mask = torch.randint(1, 50, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    for row, padding in enumerate((9, 3, 0)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    greedy = GenerationConfig(do_sample=False, max_new_tokens=20, pad_token_id=0)
    everywhere = CompileConfig(backend="eager", mode=None, fullgraph=True)
    everywhere._compile_all_devices = True
    options = {"generation_config": greedy, "cache_implementation": "static", "compile_config": everywhere}
    torch._dynamo.reset()
    model.generate(ids, attention_mask=mask, **options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        together = model.generate(ids, attention_mask=mask, **options)[:, 12:]
    for row in range(3):
        alone = model.generate(ids[row : row + 1, mask[row] > 0], generation_config=greedy)
        assert torch.equal(together[row], alone[0, -20:])


@pytest.mark.parametrize("poisoned", [False, True])
def test_a_kept_cache_forgets_what_had_another_size(poisoned, build, tiny_config, request):
    """Other rows, other beams, another dtype: memory that is made anew holds no token yet."""
    if poisoned:
        request.getfixturevalue("poisoned_memory")
    model = build(LinformerForCausalLM, tiny_config(**CONFIG | {"eos_token_id": None}))
    ids = torch.randint(1, 50, (4, 12))
    calls = ((1, 1, None), (2, 1, None), (1, 1, None), (4, 1, None), (2, 2, None), (2, 1, torch.float32))
    for rows, beams, dtype in calls:
        model = model if dtype is None else model.to(dtype)
        greedy = GenerationConfig(do_sample=False, num_beams=beams, max_new_tokens=10, pad_token_id=0)
        expected = model.generate(ids[:rows], generation_config=greedy)
        kept = model.generate(ids[:rows], generation_config=greedy, cache_implementation="static")
        assert torch.equal(kept, expected), (rows, beams, dtype)


def test_a_compiled_cache_that_is_handed_out_is_not_used_again(build, tiny_config):
    model = build(LinformerForCausalLM, tiny_config(**CONFIG))
    options = {"do_sample": False, "max_new_tokens": 3, "cache_implementation": "static"}  # compiled on accelerators
    ids = torch.randint(8, 50, (2, 6))
    first = model.generate(ids, **options, return_dict_in_generate=True).past_key_values
    before = first.layers[0].keys.clone()
    model.generate(ids + 1, **options)
    model.generate(ids + 1, **options)
    assert first.get_seq_length() == 8
    assert torch.equal(first.layers[0].keys, before)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:::torch", "ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (5, 0, 8, 3)])
def test_generate_in_cuda_graphs(padding, build, tiny_config):
    """Also of rows of different lengths, padded on the left, each as it is alone."""
    config = tiny_config(
        **CONFIG | {"embed_dim": 128, "vocab_size": 1000, "num_key_value_heads": 2, "eos_token_id": None}
    )
    model = build(LinformerForCausalLM, config, dtype=torch.float32).to(DEVICE)
    ids = torch.randint(1, 1000, (4, 9), device=DEVICE)
    mask = (torch.arange(9) >= torch.tensor(padding)[:, None]).long().to(DEVICE)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=100, pad_token_id=0)
    rows = [row[None, kept > 0] for row, kept in zip(ids, mask, strict=True)]
    expected = torch.cat([model.generate(row, generation_config=greedy)[:, -100:] for row in rows])
    static = {"generation_config": greedy, "cache_implementation": "static"}
    for _ in range(2):
        compiled = model.generate(ids, attention_mask=mask, **static)[:, 9:]
        assert (compiled == expected).float().mean() > 0.9  # a near tie may fall the other way, and change what follows
