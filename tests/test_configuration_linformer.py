"""The configuration: every field with its Hugging Face name, and errors that name field, value, rule and a way out."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from linpass import LinformerConfig

DEFAULTS = {
    "vocab_size": 50257,
    "embed_dim": 512,
    "depth": 6,
    "heads": 4,
    "num_key_value_heads": 4,
    "seq_length": 512,
    "k": 128,
    "block_size": 32,
    "window_size": 128,
    "causal": True,
    "projection": "learned",
    "projection_sharing": "key-value",
    "position_embedding": "learned",
    "rotary_base": 10000,
    "qk_norm": False,
    "intermediate_size": 2048,
    "rank": 256,
    "attention_rank": None,
    "dropout": 0.1,
    "norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "pad_token_id": 50256,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "use_cache": True,
}
# Hugging Face name: (stored name, a valid value other than the default)
ALIASES = {
    "hidden_size": ("embed_dim", 1024),
    "num_hidden_layers": ("depth", 3),
    "num_attention_heads": ("heads", 8),
    "max_position_embeddings": ("seq_length", 4096),
}


def test_defaults():
    config = LinformerConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.model_type == "linformer"
    assert config.slots_per_block(0) == 8


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_read_write_and_load(alias, tmp_path):
    field, value = ALIASES[alias]
    config = LinformerConfig(k=0, **{alias: value})
    assert getattr(config, field) == getattr(config, alias) == value
    setattr(config, alias, 2 * value)
    assert getattr(config, field) == 2 * value
    LinformerConfig(k=0).save_pretrained(tmp_path)
    assert getattr(LinformerConfig.from_pretrained(tmp_path, **{alias: value}), field) == value


def test_json_round_trip(tmp_path):
    config = LinformerConfig(depth=2, k=[128, 0], num_key_value_heads=2, rank=None, causal=True, qk_norm=True)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_json_string() == config.to_json_string()


RULES = [
    ({"heads": 3}, "heads=3 must divide embed_dim=512; nearest: 2 or 4"),
    ({"num_attention_heads": 5}, "heads=5 must divide embed_dim=512; nearest: 4 or 8"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide heads=4; nearest: 2 or 4"),
    ({"k": 100}, "k=100 .* block_size=32 .* nearest k: 64 or 128"),
    ({"k": 1000}, "k=1000 .* nearest k: 512"),
    ({"k": [128, 0]}, r"k=\[128, 0\] .* one value per layer; depth=6"),
    ({"k": -1}, "k=-1 must be a whole number, 0 or more"),
    ({"block_size": 33}, "block_size=33 must divide seq_length=512; nearest: 32 or 64"),
    ({"seq_length": 500}, "block_size=32 must divide seq_length=500; nearest: 25 or 50"),
    ({"window_size": 31}, "window_size=31 must be at least block_size=32"),
    ({"causal": False, "projection": "pooling", "k": 100}, "k=100 must divide seq_length=512 .* nearest: 64 or 128"),
    ({"causal": False, "k": 513}, "k=513 must not be more than seq_length=512"),
    ({"k": [128] * 5 + [64], "projection_sharing": "layerwise"}, "layerwise.*k="),
    ({"projection": "dense"}, "projection='dense' must be one of 'learned', 'convolution', 'pooling'"),
    ({"projection_sharing": "all"}, "projection_sharing='all' must be one of"),
    ({"position_embedding": "alibi"}, "position_embedding='alibi' must be one of"),
    ({"position_embedding": "rotary", "embed_dim": 12}, "even embed_dim / heads; 12 / 4 is 3"),
    ({"dropout": 1.0}, "dropout=1.0 must be a probability"),
    ({"norm_eps": 0.0}, "norm_eps=0.0 must be more than 0"),
    ({"embed_dim": 0}, "embed_dim=0 must be a positive whole number"),
    ({"rank": 0}, "rank=0 must be a positive whole number"),
    ({"embed_dim": 256, "hidden_size": 128}, "embed_dim=256 and hidden_size=128 name the same field"),
]


@pytest.mark.parametrize(("fields", "message"), RULES, ids=lambda value: str(value)[:40])
def test_a_broken_rule_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LinformerConfig(**fields)


@pytest.mark.parametrize("fields", [{"heads": "4"}, {"num_attention_heads": "4"}, {"k": 1.5}, {"causal": "yes"}])
def test_a_wrong_type_is_named(fields):
    (name,) = fields
    with pytest.raises((StrictDataclassError, ValueError), match=ALIASES.get(name, (name,))[0]):
        LinformerConfig(**fields)


def test_the_nearest_values_that_an_error_names_are_valid():
    for k in (64, 128):
        assert LinformerConfig(k=k).k == k
    for block_size in (25, 50):
        LinformerConfig(seq_length=500, block_size=block_size, k=20)


def test_a_broken_configuration_is_not_saved(tmp_path):
    config = LinformerConfig()
    config.heads = 3
    with pytest.raises((StrictDataclassError, ValueError), match="heads=3"):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_rules_of_blocks_do_not_bind_what_has_no_slots():
    LinformerConfig(k=0, seq_length=1000, window_size=1000)
    LinformerConfig(causal=False, seq_length=1000, k=100, block_size=33, window_size=1)
    LinformerConfig(causal=False, seq_length=1000, k=99)


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, 512),
        ({"position_embedding": "rotary"}, 512),
        ({"projection": "convolution"}, 512),
        ({"position_embedding": "rotary", "projection": "convolution"}, None),
        ({"position_embedding": "rotary", "projection": "pooling"}, None),
        ({"position_embedding": "rotary", "k": 0}, None),
        ({"position_embedding": "rotary", "projection": "pooling", "causal": False}, 512),
    ],
    ids=str,
)
def test_what_a_row_can_hold(fields, limit):
    assert LinformerConfig(**fields).max_tokens == limit


def test_overrides_are_checked_together_when_loading(tmp_path):
    LinformerConfig(position_embedding="rotary", projection="convolution").save_pretrained(tmp_path)
    longer = LinformerConfig.from_pretrained(tmp_path, seq_length=16384, k=4096)
    assert (longer.seq_length, longer.k, longer.slots_per_block(0)) == (16384, 4096, 8)
    with pytest.raises(ValueError, match="8 per block of 32; at seq_length=16384 it needs k=4096"):
        LinformerConfig.from_pretrained(tmp_path, seq_length=16384, k=2048)
    with pytest.raises(ValueError, match="needs k=4096"):
        AutoConfig.from_pretrained(tmp_path, max_position_embeddings=16384)
    with pytest.raises(ValueError, match="heads=3 must divide"):
        LinformerConfig.from_pretrained(tmp_path, heads=3)
    assert LinformerConfig.from_pretrained(tmp_path, heads=2).num_key_value_heads == 2
    narrower, unused = LinformerConfig.from_pretrained(tmp_path, hidden_size=64, return_unused_kwargs=True, foo=1)
    assert narrower.intermediate_size == 256
    assert unused == {"foo": 1}
