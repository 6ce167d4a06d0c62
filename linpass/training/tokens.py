"""Token ids on disk: every document's, one after the other in one file, computed once and mapped into memory.

A corpus of nine billion tokens takes eighteen gigabytes of disk and none of memory; a chunk of any document is a slice.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from linpass.errors import InputError
from linpass.training.documents import Corpus
from linpass.training.tokenization import tokenizer_fingerprint

IDS, ENDS, FACTS = "ids.bin", "ends.npy", "facts.json"
# A batch for the tokenizer, which spreads its documents over the processor's cores.
BATCH_CHARACTERS, BATCH_DOCUMENTS = 1 << 23, 4096


class TokenStore(Sequence[NDArray]):
    """The documents of one corpus as token ids; ``store[i]`` is document i, an array that lies on disk.

    Args:
        folder: what :func:`write_store` made.

    Raises:
        InputError: the folder is no store, or a file in it has not the length that the others tell.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.facts: dict[str, Any] = json.loads((self.folder / FACTS).read_text(encoding="utf-8"))
            self.ends: NDArray[np.int64] = np.load(self.folder / ENDS)
            self.ids: NDArray = np.memmap(self.folder / IDS, dtype=self.facts["dtype"], mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"token_folders={str(folder)!r} must be a folder of token ids: {error}") from None
        if len(self.ends) != self.facts["documents"] or not len(self.ends) or self.ends[-1] != len(self.ids):
            raise InputError(f"token_folders={str(folder)!r} must be complete; its files are of different length")

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> NDArray:
        start = int(self.ends[index - 1]) if index else 0
        return self.ids[start : int(self.ends[index])]


class TokenDocuments(Sequence[NDArray]):
    """Parts of stored documents, in an order of their own: those for training, those for validation.

    Args:
        stores: where the ids are.
        store: [D], for each of the D parts the number of its store.
        start, end: [D], the part is ``stores[store].ids[start:end]``.
    """

    def __init__(self, stores: Sequence[TokenStore], store: NDArray, start: NDArray, end: NDArray) -> None:
        self.stores, self.store, self.start, self.end = stores, store, start, end

    @classmethod
    def of(cls, stores: Sequence[TokenStore]) -> "TokenDocuments":
        """All documents of all stores."""
        store = np.concatenate([np.full(len(s), number, dtype=np.int16) for number, s in enumerate(stores)])
        start = np.concatenate([np.concatenate(([0], s.ends[:-1])) for s in stores])
        return cls(stores, store, start, np.concatenate([s.ends for s in stores]))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[D], tokens of each document."""
        return self.end - self.start

    def __len__(self) -> int:
        return len(self.end)

    def __getitem__(self, index: Any) -> NDArray:
        return self.stores[int(self.store[index])].ids[int(self.start[index]) : int(self.end[index])]

    def select(self, chosen: NDArray) -> "TokenDocuments":
        """The documents with these numbers, or where a mask [D] is True."""
        return TokenDocuments(self.stores, self.store[chosen], self.start[chosen], self.end[chosen])

    def split(self, fraction: float, seed: int) -> tuple["TokenDocuments", "TokenDocuments"]:
        """Documents for training and documents for validation; no document is in both.

        Of each store, ``fraction`` of its documents, drawn with ``seed``, are for validation. Where that is less than
        one document (or all), the last ``fraction`` of the tokens of each document is held out instead.
        """
        train, held_out = [], []
        for number, _store in enumerate(self.stores):
            part = self.select(np.flatnonzero(self.store == number))
            chosen = validation_mask(len(part), fraction, seed)
            if chosen is not None:
                train.append(part.select(~chosen))
                held_out.append(part.select(chosen))
            else:
                cut = part.start + np.round(part.lengths * (1 - fraction)).astype(np.int64)
                train.append(TokenDocuments(self.stores, part.store, part.start, cut))
                held_out.append(TokenDocuments(self.stores, part.store, cut, part.end))
        return _joined(train), _joined(held_out)


def validation_mask(documents: int, fraction: float, seed: int) -> NDArray[np.bool_] | None:
    """[documents], True for those drawn for validation; None where ``fraction`` of them is none, or all."""
    size = round(fraction * documents)
    if not 0 < size < documents:
        return None
    chosen = np.zeros(documents, dtype=bool)
    chosen[np.random.default_rng(seed).choice(documents, size, replace=False)] = True
    return chosen


def _joined(parts: Sequence[TokenDocuments]) -> TokenDocuments:
    columns = ((p.store, p.start, p.end) for p in parts)
    store, start, end = (np.concatenate(column) for column in zip(*columns, strict=True))
    used = end > start  # of a document of few tokens nothing may be left
    return TokenDocuments(parts[0].stores, store[used], start[used], end[used])


def stored(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, cache_folder: Path, quiet: bool = False) -> TokenStore:
    """The corpus as token ids: from ``cache_folder`` where they were computed before, else computed now.

    Raises:
        InputError: the corpus holds no text, or cannot be read.
    """
    key = f"{corpus.fingerprint()} | {tokenizer_fingerprint(tokenizer)}"
    folder = cache_folder / f"tokens-{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}"
    if not (folder / FACTS).is_file():
        write_store(corpus, tokenizer, folder, quiet)
    return TokenStore(folder)


def write_store(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, folder: Path, quiet: bool = False) -> None:
    """Compute the token ids of a corpus, an end-of-text after each document, and put them into ``folder``.

    The folder appears when it is complete: a run that is stopped leaves none. The tokenizer works on several documents
    at once, on all cores.
    """
    dtype = np.dtype("<u2") if len(tokenizer) <= 1 << 16 else np.dtype("<u4")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        lengths: list[int] = []
        text_bytes = 0
        bar = tqdm(desc=f"token ids of {corpus.name}", total=corpus.count(), unit=" documents", disable=quiet or None)
        with open(partial / IDS, "wb") as file, bar:
            for texts in _batches(corpus):
                # A text that spells a special token is text: it must not end a document or mask a token.
                encoded = tokenizer(
                    texts,
                    add_special_tokens=False,
                    split_special_tokens=True,
                    return_attention_mask=False,
                    verbose=False,
                )
                for ids in encoded["input_ids"]:
                    file.write(np.array([*ids, tokenizer.eos_token_id], dtype=dtype).tobytes())
                    lengths.append(len(ids) + 1)
                text_bytes += sum(len(text.encode("utf-8")) for text in texts)
                bar.update(len(texts))
            file.flush()
            os.fsync(file.fileno())
        if not lengths:
            raise InputError(f"{corpus.name}: there must be text; every document is empty")
        np.save(partial / ENDS, np.cumsum(lengths, dtype=np.int64))
        facts = {
            "corpus": corpus.name,
            "documents": len(lengths),
            "tokens": sum(lengths),
            "text_bytes": text_bytes,
            "dtype": dtype.str,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "source": corpus.fingerprint(),
        }
        (partial / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        try:
            partial.rename(folder)
        except OSError:  # another run was faster
            if not (folder / FACTS).is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _batches(corpus: Corpus) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in corpus:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
