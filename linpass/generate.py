"""Continuing a prompt with a saved causal language model, streamed to the terminal."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, TextStreamer, set_seed

import linpass  # noqa: F401  registers the Linformer with the Auto classes
from linpass.errors import InputError


def generate(
    folder: str,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 42,
    greedy: bool = False,
) -> str:
    """Print the prompt and its continuation token by token; returns the whole text.

    Args:
        folder: what ``save_pretrained`` wrote for any causal model and its tokenizer.
        max_new_tokens: most tokens to add; fewer when the model writes its end-of-text or is full.
        temperature, top_k, top_p: of the sampling, without meaning when ``greedy``.

    Raises:
        InputError: no causal model in the folder, an empty prompt, or one that leaves no room for a token.
    """
    if not prompt.strip():
        raise InputError(f"prompt={prompt!r} must hold text")
    if not Path(folder).is_dir():
        raise InputError(f"model={folder!r} must be a folder with a saved model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model={folder!r} must hold a causal language model and its tokenizer: {error}") from error
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    ids = 1 + max(tokenizer.get_vocab().values())
    if ids > model.config.vocab_size:
        raise InputError(f"the tokenizer in {folder!r} has {ids} ids, its model only {model.config.vocab_size}")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, verbose=False).to(model.device)
    length, limit = inputs["input_ids"].shape[1], most_tokens(model.config)
    if limit is not None and length >= limit:
        raise InputError(f"prompt of {length} tokens must be less than {limit} tokens, all that the model can hold")
    if limit is not None:
        max_new_tokens = min(max_new_tokens, limit - length)
    sampling = {} if greedy else {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    set_seed(seed)
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def most_tokens(config: PreTrainedConfig) -> int | None:
    """Tokens that a row may hold; None when there is no end."""
    if hasattr(config, "max_tokens"):
        return config.max_tokens
    return getattr(config, "max_position_embeddings", None)
