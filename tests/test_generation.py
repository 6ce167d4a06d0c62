"""``generate`` with the constant-size cache says what ``generate`` without any cache says."""

import pytest
import torch
from transformers import GenerationConfig, pipeline

from linpass import LinformerForCausalLM

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model(build, tiny_config):
    """Runs past seq_length = 32."""
    config = tiny_config(position_embedding="rotary", projection="convolution", projection_sharing="none")
    return build(LinformerForCausalLM, config)


def left_padded(lengths, width):
    ids, mask = torch.randint(1, 50, (len(lengths), width)), torch.ones(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : width - length] = 0
        ids[row, : width - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    "how",
    [
        GREEDY,
        GREEDY | {"num_beams": 3, "num_return_sequences": 2},
        GREEDY | {"do_sample": True, "top_k": 5, "temperature": 1.3},
        GREEDY | {"num_beams": 3, "do_sample": True},
        GREEDY | {"prefill_chunk_size": 5},
        GREEDY | {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
    ids=["greedy", "beam", "sample", "beam sample", "chunked prefill", "penalties"],
)
def test_with_cache_equals_without(how, model):
    inputs = left_padded([13, 4, 20], 20)
    torch.manual_seed(3)
    with_cache = model.generate(**inputs, **how, max_new_tokens=30, use_cache=True)
    torch.manual_seed(3)
    without = model.generate(
        **inputs, **{name: value for name, value in how.items() if name != "prefill_chunk_size"},
        max_new_tokens=30, use_cache=False,
    )  # fmt: skip
    assert with_cache.shape[1] == 50
    assert torch.equal(with_cache, without)


def test_a_left_padded_batch_generates_what_its_rows_generate_alone(model):
    lengths = [13, 4, 20, 1]
    inputs = left_padded(lengths, 20)
    together = model.generate(**inputs, **GREEDY, max_new_tokens=30)
    for row, length in enumerate(lengths):
        alone = model.generate(inputs["input_ids"][row : row + 1, 20 - length :], **GREEDY, max_new_tokens=30)
        assert torch.equal(together[row, 20 - length :], alone[0])


def test_continuing_from_the_cache_equals_starting_over(model):
    inputs = left_padded([13, 6], 13)
    first = model.generate(**inputs, **GREEDY, max_new_tokens=7, return_dict_in_generate=True)
    mask = torch.cat((inputs["attention_mask"], torch.ones(2, 7, dtype=torch.long)), 1)
    more = model.generate(
        first.sequences, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY, max_new_tokens=9
    )
    assert torch.equal(more, model.generate(**inputs, **GREEDY, max_new_tokens=16))


def test_a_second_batched_turn_with_gaps(model):
    """Two conversations: replies that end at different tokens, then questions of different lengths; one cache."""
    inputs = left_padded([9, 5], 9)
    free = model.generate(**inputs, **GREEDY, max_new_tokens=8)
    how = GREEDY | {"eos_token_id": int(free[0, 9 + 2])}  # row 0 ends at its third token at the latest
    first = model.generate(**inputs, **how, max_new_tokens=8, return_dict_in_generate=True)
    history = first.sequences
    reply = torch.ones_like(history[:, 9:])
    for row in range(2):
        ends = (history[row, 9:] == how["eos_token_id"]).nonzero()[:, 0].tolist()
        if ends:
            reply[row, ends[0] + 1 :] = 0  # what generate filled up
    assert reply.sum(1)[0] <= 3 < reply.shape[1]
    question, question_mask = torch.randint(1, 50, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    ids, mask = torch.cat((history, question), 1), torch.cat((inputs["attention_mask"], reply, question_mask), 1)
    together = model.generate(
        ids, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY, max_new_tokens=12
    )
    for row in range(2):
        alone = model.generate(ids[row : row + 1, mask[row] == 1], **GREEDY, max_new_tokens=12)
        assert torch.equal(together[row, -12:], alone[0, -12:])


def test_filling_enters_no_cache_of_several_samples(model):
    ids = torch.randint(1, 50, (1, 6))
    how = GREEDY | {"do_sample": True, "eos_token_id": list(range(1, 25)), "num_return_sequences": 4}
    output = model.generate(ids, **how, max_new_tokens=12, return_dict_in_generate=True)
    replies = output.sequences[:, 6:]
    real = [next((n + 1 for n, t in enumerate(row) if 1 <= t < 25), len(row)) for row in replies.tolist()]
    assert len(set(real)) > 1
    fed = replies.shape[1] - 1  # the last token of the longest row was not fed
    assert output.past_key_values.layers[0].seen.tolist() == [6 + min(count, fed) for count in real]


def test_filling_of_a_row_that_another_criterion_ended_enters_no_cache(model):
    """Its end is not an end-of-text: padding tells."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class FirstRowEndsEarly(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            done = torch.zeros(len(input_ids), dtype=torch.bool)
            done[0] = input_ids.shape[1] >= 6 + 3
            return done

    ids = torch.randint(1, 50, (2, 6))
    how = GREEDY | {"eos_token_id": 55, "pad_token_id": 0, "suppress_tokens": [0, 55]}
    output = model.generate(
        ids,
        **how,
        max_new_tokens=8,
        return_dict_in_generate=True,
        stopping_criteria=StoppingCriteriaList([FirstRowEndsEarly()]),
    )
    assert output.sequences[0, 9:].tolist() == [0] * 5
    assert output.past_key_values.layers[0].seen.tolist() == [9, 13]


def test_a_prompt_that_the_cache_holds_already_is_refused(model):
    ids = torch.randint(1, 50, (2, 12))

    def past():
        with torch.no_grad():
            return model(ids[:, :8], use_cache=True).past_key_values

    embeds = model.get_input_embeddings()(ids[:, :8])
    for prompt in ({"inputs": ids[:, :8]}, {"inputs": ids[:, :5]}, {"inputs_embeds": embeds}):
        with pytest.raises(ValueError, match=r"past_key_values holds 8 tokens, .* at least one more"):
            model.generate(**prompt, past_key_values=past(), **GREEDY, max_new_tokens=2)
    whole = model.generate(ids, **GREEDY, max_new_tokens=3)
    assert torch.equal(model.generate(ids, past_key_values=past(), **GREEDY, max_new_tokens=3), whole)
    mask = torch.ones_like(ids)  # of the cache and what is new
    later = model.generate(ids[:, 8:], attention_mask=mask, past_key_values=past(), **GREEDY, max_new_tokens=3)
    assert torch.equal(later[:, -3:], whole[:, -3:])


def test_a_mask_that_unsees_the_past_is_refused(model):
    ids = torch.randint(1, 50, (2, 12))
    past = model(ids[:, :8], use_cache=True).past_key_values
    mask = torch.ones_like(ids)
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="attention_mask masks other tokens of the past"):
        model(ids[:, 8:], attention_mask=mask, past_key_values=past)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="prompt holds no token"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), **GREEDY, max_new_tokens=3)
    with pytest.raises(ValueError, match="holds no token"):
        model(torch.zeros(1, 0, dtype=torch.long))


def test_prefix_embeddings(model):
    ids = torch.randint(1, 50, (2, 11))
    from_ids = model.generate(ids, **GREEDY, max_new_tokens=8)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY, max_new_tokens=8), from_ids[:, 11:])


@pytest.mark.parametrize("use_cache", [True, False])
def test_too_long_is_refused_before_the_first_token(use_cache, build, tiny_config):
    model = build(LinformerForCausalLM, tiny_config())
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.randint(1, 50, (1, 30))
    with pytest.raises(ValueError, match=r"33.*seq_length=32.*position_embedding='learned'"):
        model.generate(ids, **GREEDY, max_new_tokens=3, use_cache=use_cache)
    assert not calls
    assert model.generate(ids, **GREEDY, max_new_tokens=2, use_cache=use_cache).shape == (1, 32)
    # Padding takes no position; the longest row counts.
    inputs = left_padded([20, 28], 40)
    assert model.generate(**inputs, **GREEDY, max_new_tokens=4, use_cache=use_cache).shape == (2, 44)
    with pytest.raises(ValueError, match=r"33.*seq_length=32"):
        model.generate(**inputs, **GREEDY, max_new_tokens=5, use_cache=use_cache)


def test_a_continued_turn_that_grows_too_long_is_refused(build, tiny_config):
    model = build(LinformerForCausalLM, tiny_config())
    first = model.generate(
        torch.ones(1, 20, dtype=torch.long), **GREEDY, max_new_tokens=5, return_dict_in_generate=True
    )
    with pytest.raises(ValueError, match=r"35.*seq_length=32"):
        model.generate(first.sequences, past_key_values=first.past_key_values, **GREEDY, max_new_tokens=10)


def test_caches_of_another_kind_are_refused(model):
    from transformers import DynamicCache

    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="DynamicCache"):
        model.generate(ids, past_key_values=DynamicCache(config=model.config), **GREEDY, max_new_tokens=2)
    with pytest.raises(ValueError, match="cache_implementation='offloaded'"):
        model.generate(ids, cache_implementation="offloaded", **GREEDY, max_new_tokens=2)
    with pytest.raises(ValueError, match="[Aa]ssist|stateful"):
        model.generate(ids, prompt_lookup_num_tokens=2, **GREEDY, max_new_tokens=2)


def test_generation_reports_scores_and_hidden_states(model):
    output = model.generate(
        torch.randint(1, 50, (2, 9)),
        generation_config=GenerationConfig(**GREEDY, max_new_tokens=4),
        return_dict_in_generate=True,
        output_scores=True,
        output_hidden_states=True,
    )
    assert len(output.scores) == len(output.hidden_states) == 4
    assert [len(step) for step in output.hidden_states] == [3] * 4


def test_pipeline(model):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", *(f"w{number}" for number in range(1, 50))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["w3 w4 w5", "w7", "w9 w10 w11 w12 w13 w14 w15 w16 w17"]
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "return_full_text": False}
    together = generate(prompts, batch_size=3, **how)
    alone = [generate(prompt, **how) for prompt in prompts]
    assert [row[0]["generated_text"] for row in together] == [row[0]["generated_text"] for row in alone]
    assert len(alone[0][0]["generated_text"].split()) == 6


@pytest.mark.parametrize(
    "changes",
    [{"k": 4}, {"window_size": 16}, {"depth": 1}, {"heads": 1}, {"num_key_value_heads": 1}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_cache_of_another_configuration_is_refused(changes, model, build, tiny_config):
    fields = {"position_embedding": "rotary", "projection": "convolution", "projection_sharing": "none"}
    other = build(LinformerForCausalLM, tiny_config(**fields | changes))
    ids = torch.randint(1, 50, (2, 9))
    past = other(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="made for another configuration: depth, heads, k"):
        model(ids[:, :1], past_key_values=past)
