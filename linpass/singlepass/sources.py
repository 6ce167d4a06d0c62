"""The rows and the encoder of a command: given by flags, or the defaults; and the features of a text.

Shapes: B rows, T tokens, D features, N rows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from linpass.errors import InputError
from linpass.generate import most_tokens
from linpass.singlepass.command_arguments import SourceArguments
from linpass.singlepass.default_encoder import default_encoder
from linpass.singlepass.documentation import stored_documentation_rows
from linpass.singlepass.labelled_text import (
    LabelledText,
    check_labelled_files,
    read_labelled_dataset,
    read_labelled_files,
)
from linpass.training.arguments import DataArguments
from linpass.training.preparation import cache_folder, check_data

DEFAULT_ROWS = "Passages from the documentation of torch and of transformers"
FEATURE_ROWS = 64  # of a batch through the encoder


def check_sources(arguments: SourceArguments) -> None:
    """Raise InputError for what can be refused before anything is read."""
    check_data(DataArguments(cache_dir=arguments.cache_dir))
    for flag in ("text_files", "test_files"):
        check_labelled_files(getattr(arguments, flag) or (), flag)
    if arguments.model is not None:
        load_tokenizer(arguments.model)


def read_rows(arguments: SourceArguments, seed: int, quiet: bool = False) -> tuple[LabelledText, LabelledText]:
    """Rows to train on and rows to test on.

    Raises:
        InputError: they cannot be read, or hold one class only.
    """
    text, label = arguments.text_column, arguments.label_column
    if arguments.text_files:
        rows = read_labelled_files(arguments.text_files, text, label)
        if arguments.test_files:
            return rows, read_labelled_files(arguments.test_files, text, label, "test_files", rows.classes)
    elif arguments.dataset:
        rows = read_labelled_dataset(arguments.dataset, arguments.dataset_split, text, label)
        if arguments.test_split:
            return rows, read_labelled_dataset(arguments.dataset, arguments.test_split, text, label, rows.classes)
    else:
        return stored_documentation_rows(cache(arguments), quiet)
    return rows.split(arguments.test_fraction, seed)


def find_encoder(arguments: SourceArguments, train: LabelledText, quiet: bool = False) -> str:
    """Name or folder of the encoder: the one asked for, else the default, trained now if the cache lacks it."""
    return arguments.model or str(default_encoder(train.texts, cache(arguments), quiet))


def cache(arguments: SourceArguments) -> Path:
    """The folder where the defaults are kept, the same as that of ``linpass train``."""
    return cache_folder(DataArguments(cache_dir=arguments.cache_dir))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of an encoder.

    Raises:
        InputError: there is none, or it has no token to pad with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model={name!r} must hold an encoder and its tokenizer: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InputError(f"model={name!r}: its tokenizer must have a pad_token or an eos_token")
    return tokenizer


def load_encoder(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An encoder without head, in eval mode, and its tokenizer.

    Raises:
        InputError: no model or tokenizer there, weights missing, or a tokenizer with more ids than the model.
    """
    tokenizer = load_tokenizer(name)
    try:
        model, loaded = AutoModel.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model={name!r} must hold an encoder and its tokenizer: {error}") from error
    missing = sorted(key for key in loaded["missing_keys"] if "pooler" not in key)  # the mean of the tokens needs none
    if missing:
        raise InputError(f"model={name!r} must hold a whole encoder; its weights lack {', '.join(missing[:3])}")
    ids, room = 1 + max(tokenizer.get_vocab().values()), len(model.get_input_embeddings().weight)
    if ids > room:
        raise InputError(f"model={name!r}: its tokenizer has {ids} ids, the model only {room}")
    return model.eval(), tokenizer


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """The token ids of each text, with the special tokens that the encoder expects, at most ``max_length``."""
    pad: Any = tokenizer.pad_token_id
    encoded: Any = tokenizer(
        list(texts), truncation=True, max_length=max_length, return_attention_mask=False, split_special_tokens=True
    )["input_ids"]
    return [ids or [pad] for ids in encoded]  # a text without any token: features of one


def row_length(model: PreTrainedModel, max_length: int) -> int:
    """Tokens of a row: ``max_length``, or fewer where the model holds fewer."""
    return min(max_length, most_tokens(model.config) or max_length)


@torch.no_grad()
def mean_features(
    model: PreTrainedModel, token_ids: Sequence[Sequence[int]], pad_token_id: int, quiet: bool = False
) -> Tensor:
    """The mean of the last hidden states of each row's tokens, float32 [N, D]; padding counts nowhere."""
    order = sorted(range(len(token_ids)), key=lambda row: len(token_ids[row]))  # equal lengths need no padding
    rows_D: list[Tensor] = [torch.empty(0)] * len(order)
    for first in tqdm(range(0, len(order), FEATURE_ROWS), desc="features", unit=" batches", disable=quiet):
        chosen = order[first : first + FEATURE_ROWS]
        longest = len(token_ids[chosen[-1]])
        ids_BT = torch.tensor([[*token_ids[n], *[pad_token_id] * (longest - len(token_ids[n]))] for n in chosen])
        keep_BT = torch.arange(longest) < torch.tensor([[len(token_ids[n])] for n in chosen])
        hidden_BTD = model(input_ids=ids_BT, attention_mask=keep_BT.long()).last_hidden_state.float()
        mean_BD = (hidden_BTD * keep_BT.unsqueeze(-1)).sum(1) / keep_BT.sum(1, keepdim=True)
        for row, mean_D in zip(chosen, mean_BD, strict=True):
            rows_D[row] = mean_D
    return torch.stack(rows_D)
