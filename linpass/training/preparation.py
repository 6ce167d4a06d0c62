"""From arguments to a tokenizer and the documents of a run: everything about the data that can be refused, is here."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedTokenizerBase

from linpass.errors import InputError
from linpass.training.arguments import DataArguments
from linpass.training.documents import Corpus, PythonText, TextFiles, check_text_files, open_dataset
from linpass.training.tokenization import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from linpass.training.tokens import TokenDocuments, TokenStore, stored, validation_mask

# A byte-level BPE does not change much after this much text, and training it takes memory.
TOKENIZER_CHARACTERS = 200_000_000


@dataclass
class PreparedData:
    """What a run trains on.

    Args:
        corpora: of each corpus its name, documents, tokens and bytes of text, held-out documents included.
        validation_files: names of what is validated on; empty where documents of the corpora are held out.
    """

    tokenizer: PreTrainedTokenizerBase
    train: TokenDocuments
    validation: TokenDocuments
    corpora: list[dict[str, Any]]
    validation_files: list[str]

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run has to find again."""
        return {
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "corpora": [(corpus["source"], corpus["documents"], corpus["tokens"]) for corpus in self.corpora],
            "train_tokens": int(self.train.lengths.sum()),
            "validation_tokens": int(self.validation.lengths.sum()),
        }


def check_data(arguments: DataArguments) -> None:
    """Raise InputError for a file or folder that cannot be used, before anything is read."""
    cache = cache_folder(arguments)
    there = next(f for f in (cache, *cache.parents) if f.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"cache_dir={str(cache)!r} must be a folder that can be written to")
    for paths in (arguments.text_files, arguments.validation_files):
        if paths is not None:
            check_text_files(paths)
    for folder in (*(arguments.token_folders or ()), *(arguments.validation_token_folders or ())):
        TokenStore(folder)


def cache_folder(arguments: DataArguments) -> Path:
    """Where the token ids of all runs are kept."""
    return Path(arguments.cache_dir or Path(HF_HOME) / "linpass").expanduser()


def open_corpora(arguments: DataArguments) -> list[Corpus]:
    """The corpora that are still text, in the order of the mixing weights."""
    corpora: list[Corpus] = [
        open_dataset(name, arguments.dataset_split, arguments.text_column, arguments.streaming, arguments.max_documents)
        for name in arguments.datasets or ()
    ]
    if arguments.text_files:
        corpora.append(_files(arguments.text_files, arguments))
    if not corpora and not arguments.token_folders:
        corpora.append(PythonText(max_documents=arguments.max_documents))
    return corpora


def prepare_data(
    arguments: DataArguments,
    vocab_size: int,
    seed: int,
    *,
    mask: bool = False,
    first: Callable[[], AbstractContextManager] | None = None,
    quiet: bool = False,
) -> PreparedData:
    """The tokenizer, and the documents for training and for validation as token ids.

    Args:
        vocab_size: ids of the model.
        mask: the objective needs a mask token.
        first: a context in which the main process works while the others wait for what it leaves in the cache.
        quiet: no progress bars.

    Raises:
        InputError: a corpus, a tokenizer, or the two together cannot be used.
    """
    if arguments.tokenizer is not None:  # first, because it may be refused and reading the text may take long
        tokenizer = load_tokenizer(arguments.tokenizer, vocab_size, mask)
    cache = cache_folder(arguments)
    with first() if first else nullcontext():
        corpora = open_corpora(arguments)
        if arguments.tokenizer is None:
            tokenizer = trained_tokenizer(corpora, arguments, vocab_size, seed, mask)
        stores = [stored(corpus, tokenizer, cache, quiet) for corpus in corpora]
        stores += [_opened(folder, tokenizer) for folder in arguments.token_folders or ()]
        held_out = [_opened(folder, tokenizer) for folder in arguments.validation_token_folders or ()]
        if arguments.validation_files:
            held_out.append(stored(_files(arguments.validation_files, arguments), tokenizer, cache, quiet))
    facts = [store.facts for store in stores]
    if held_out:
        names = [Path(name).name for name in arguments.validation_files or arguments.validation_token_folders or ()]
        return PreparedData(tokenizer, TokenDocuments.of(stores), TokenDocuments.of(held_out), facts, names)
    return PreparedData(tokenizer, *TokenDocuments.of(stores).split(arguments.validation_fraction, seed), facts, [])


def trained_tokenizer(
    corpora: Sequence[Corpus], arguments: DataArguments, vocab_size: int, seed: int, mask: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer of the training text: from the cache where it was trained before, else trained now."""
    separate = bool(arguments.validation_files or arguments.validation_token_folders)
    fraction = 0.0 if separate else arguments.validation_fraction
    key = repr(([corpus.fingerprint() for corpus in corpora], vocab_size, fraction, seed, mask, TOKENIZER_CHARACTERS))
    name = f"tokenizer-{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}"
    folder = cache_folder(arguments) / name
    if not folder.is_dir():
        tokenizer = train_tokenizer(tokenizer_texts(corpora, fraction, seed), vocab_size, mask)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder.parent) as partial:
            tokenizer.save_pretrained(f"{partial}/whole")
            with suppress(OSError):  # another run was faster
                Path(partial, "whole").rename(folder)
    return load_tokenizer(str(folder), vocab_size, mask)


def tokenizer_texts(corpora: Sequence[Corpus], fraction: float, seed: int) -> Iterator[str]:
    """The training text, up to TOKENIZER_CHARACTERS: a tokenizer must not have seen what it is measured on."""
    for corpus in corpora:
        left = TOKENIZER_CHARACTERS // len(corpora)
        mask = validation_mask(sum(1 for _text in corpus), fraction, seed)
        for number, text in enumerate(corpus):
            if left <= 0:
                break
            if mask is None:
                text = text[: round(len(text) * (1 - fraction))]
            elif mask[number]:
                continue
            left -= len(text)
            yield text


def _files(paths: list[str], arguments: DataArguments) -> TextFiles:
    return TextFiles(paths=tuple(paths), text_column=arguments.text_column, max_documents=arguments.max_documents)


def _opened(folder: str, tokenizer: PreTrainedTokenizerBase) -> TokenStore:
    store = TokenStore(folder)
    if store.facts["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise InputError(f"token_folders={folder!r} must hold ids of tokenizer={tokenizer.name_or_path!r}, not others")
    return store
