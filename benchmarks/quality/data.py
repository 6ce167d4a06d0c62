"""The data of the runs: training text as long streams of token ids, validation documents in two halves, archives.

A folder of data holds ``part_0``, ``part_1`` … (token stores), ``choosing.jsonl`` and ``untouched.jsonl`` (validation
documents, no document in both), ``curve`` (a token store: the start of the choosing half, for the
losses along the way),
``tokenizer`` and ``data.json``, which says how it was made.
"""

import hashlib
import json
import lzma
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import GPT2TokenizerFast, PreTrainedTokenizerBase

from linpass.errors import InputError
from linpass.training.documents import TextFiles, check_text_files, file_documents
from linpass.training.tokenization import load_tokenizer, tokenizer_fingerprint
from linpass.training.tokens import ENDS, FACTS, IDS, TokenStore, stored

CHOOSING, UNTOUCHED, CURVE, TOKENIZER, DATA_FACTS = "choosing", "untouched", "curve", "tokenizer", "data.json"
CURVE_TOKENS = 1 << 18  # enough for a curve, and soon evaluated
# Two bytes a token: contexts of the coder are even and odd places.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 2, "lp": 1, "pb": 1, "dict_size": 1 << 24}]
# Python before 3.10.12 and 3.11.4 has no filters; the archives are our own.
FILTER: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def prepare(
    train: Sequence[str], validation: Sequence[str], tokenizer: str, output: Path, tokens: int, parts: int, seed: int
) -> dict[str, Any]:
    """Write a folder of data, and what of it is to travel to ``output/packed``.

    The documents of each training file are put in an order drawn with ``seed`` and joined, an end-of-text between two.
    A part holds ``tokens`` tokens: of each file's stream the next piece, in the proportion of the files as a whole, so
    that all parts are the same mixture and no token is in two.

    Args:
        train, validation: files that ``linpass train --text_files`` takes.
        tokenizer: a name or folder; also a folder with GPT-2's two files, vocab.json and merges.txt.
        tokens: of a part; the last part may hold less, whatever is left.

    Returns:
        what data.json holds.

    Raises:
        InputError: a file or the tokenizer cannot be used, or there is no text left for a part.
    """
    check_text_files([*train, *validation])
    output.mkdir(parents=True, exist_ok=True)
    encoder = open_tokenizer(tokenizer, output / TOKENIZER)
    stores = [
        stored(TextFiles(name=Path(path).name, paths=(path,)), encoder, output / "whole", quiet=True) for path in train
    ]
    streams = [joined(store, seed) for store in stores]
    total = sum(map(len, streams))
    sizes = []
    for part in range(parts):
        edges = [[round(n * tokens * len(s) / total) for n in (part, part + 1)] for s in streams]
        pieces = [stream[first:end] for stream, (first, end) in zip(streams, edges, strict=True)]
        if not all(map(len, pieces)):
            raise InputError(f"parts={parts} of {tokens:,} tokens need more text: there are {total:,} tokens")
        sizes.append(write_streams(output / f"part_{part}", pieces, f"part {part}, seed {seed}", encoder))
    facts = {
        "seed": seed,
        "tokenizer": tokenizer_fingerprint(encoder),
        "train": [corpus_facts(store) for store in stores],
        "part_tokens": sizes,
        "validation": split_validation(validation, encoder, output, seed),
    }
    (output / DATA_FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    pack(output, parts)
    return facts


def open_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, saved to ``folder`` in the form that every version of transformers opens."""
    here = Path(name)
    if (here / "merges.txt").is_file() and not (here / "tokenizer.json").is_file():
        GPT2TokenizerFast.from_pretrained(name).save_pretrained(folder)
    else:
        load_tokenizer(name, 1 << 16).save_pretrained(folder)
    return load_tokenizer(str(folder), 1 << 16)


def corpus_facts(store: TokenStore) -> dict[str, Any]:
    return {name: store.facts[name] for name in ("corpus", "documents", "tokens", "source")}


def joined(store: TokenStore, seed: int) -> NDArray:
    """All documents of a store in an order drawn with ``seed``, one after the other; each ends with an end-of-text."""
    order = np.random.default_rng(seed).permutation(len(store))
    return np.concatenate([store[int(number)] for number in order])


def write_streams(folder: Path, streams: Sequence[NDArray], name: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """A token store with one long document for each stream; returns its tokens."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ids = np.concatenate(streams)
    ids.tofile(folder / IDS)
    np.save(folder / ENDS, np.cumsum([len(stream) for stream in streams], dtype=np.int64))
    facts = {
        "corpus": name,
        "documents": len(streams),
        "tokens": len(ids),
        "dtype": ids.dtype.str,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "source": f"benchmarks.quality prepare: {name}",
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return len(ids)


def split_validation(
    paths: Sequence[str], tokenizer: PreTrainedTokenizerBase, output: Path, seed: int
) -> dict[str, dict[str, Any]]:
    """Write both halves and the store of the curve; documents and bytes of each half."""
    halves: dict[str, list[str]] = {CHOOSING: [], UNTOUCHED: []}
    for path in paths:
        documents = list(file_documents([path], "text"))
        is_choosing = split_documents([len(text.encode()) for text in documents], seed)
        for text, chosen in zip(documents, is_choosing, strict=True):
            halves[CHOOSING if chosen else UNTOUCHED].append(text)
    for name, texts in halves.items():
        if not texts:
            raise InputError(f"validation={list(paths)} must hold two documents or more a file, for two halves")
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    store = stored(
        TextFiles(name=CHOOSING, paths=(str(output / f"{CHOOSING}.jsonl"),)), tokenizer, output / "whole", quiet=True
    )
    write_streams(output / CURVE, [joined(store, seed)[:CURVE_TOKENS]], "start of the choosing half", tokenizer)
    return {
        name: {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}
        for name, texts in halves.items()
    }


def split_documents(sizes: Sequence[int], seed: int) -> list[bool]:
    """For each document whether it is in the choosing half: drawn with ``seed``, the halves about equal in size.

    In an order drawn with the seed each document goes to the half that has less so far.
    """
    is_choosing = [False] * len(sizes)
    weights = [0, 0]
    for number in np.random.default_rng(seed).permutation(len(sizes)).tolist():
        half = int(weights[0] > weights[1])
        is_choosing[number] = half == 0
        weights[half] += sizes[number]
    return is_choosing


def pack(output: Path, parts: int) -> list[Path]:
    """The archives that travel: one with all that is not training text, and one for each part."""
    packed = output / "packed"
    packed.mkdir(exist_ok=True)
    contents = {"base": (f"{CHOOSING}.jsonl", f"{UNTOUCHED}.jsonl", CURVE, TOKENIZER, DATA_FACTS)}
    contents |= {f"part_{part}": (f"part_{part}",) for part in range(parts)}
    archives = []
    for name, members in contents.items():
        archives.append(packed / f"{name}.tar.xz")
        with lzma.open(archives[-1], "wb", filters=FILTERS) as file, tarfile.open(fileobj=file, mode="w|") as archive:
            for member in members:
                archive.add(output / member, arcname=member)
    return archives


def unpack(archives: Sequence[Path], folder: Path) -> None:
    """The archives of :func:`pack` back to a folder of data; ``tar -xJf`` does the same."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in archives:
        try:
            with tarfile.open(path, "r:xz") as archive:
                archive.extractall(folder, **FILTER)
        except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
            raise InputError(f"archives: {str(path)!r} must be what prepare packed: {error}") from error


def part_folders(folder: Path, parts: int) -> list[Path]:
    """The first ``parts`` parts of a folder of data.

    Raises:
        InputError: a part is missing, or something else.
    """
    folders = [folder / f"part_{part}" for part in range(parts)]
    needed = [*(folder / name for name in (f"{CHOOSING}.jsonl", f"{UNTOUCHED}.jsonl", CURVE, TOKENIZER, DATA_FACTS))]
    missing = [path.name for path in [*needed, *folders] if not path.exists()]
    if missing:
        raise InputError(f"data={str(folder)!r} must be a folder that prepare wrote; it lacks {', '.join(missing)}")
    return folders


def identity(folder: Path) -> str:
    """Another text when the data are others; which parts have been unpacked does not matter."""
    return hashlib.blake2b((folder / DATA_FACTS).read_bytes(), digest_size=8).hexdigest()
