"""Text to chunks of token ids: documents, their split, the tokenizer, the chunks.

Each step is a function on plain values, so that another way of chunking can take the documents from here.
"""

import ast
import gzip
import io
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from linpass.errors import InputError
from linpass.training.arguments import DataArguments

END_OF_TEXT = "<|endoftext|>"
SUFFIXES = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}


class ChunkDataset(torch.utils.data.Dataset):
    """Rows of the same number of tokens, each its own label.

    Args:
        tokens_CN: token ids, C chunks of N tokens.
    """

    def __init__(self, tokens_CN: torch.Tensor) -> None:
        self.tokens_CN = tokens_CN

    def __len__(self) -> int:
        return len(self.tokens_CN)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens_CN[index], "labels": self.tokens_CN[index]}


def python_documents() -> Iterator[str]:
    """English text that every Python carries: its language reference by topic, its library's docstrings by module.

    Sources are parsed, not imported. The order is the same on every machine with the same Python.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]
    library = Path(sysconfig.get_path("stdlib"))
    # Without a key the order would hang on the path separator.
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).parts):
        if _NOT_LIBRARY.isdisjoint(path.relative_to(library).parts):
            docstrings = _docstrings(path)
            if docstrings:
                yield "\n\n".join(docstrings)


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # a few files of the library are broken on purpose
        return []
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners))
    return [docstring for docstring in found if docstring]


def check_text_files(paths: Sequence[str]) -> None:
    """Raise InputError, before anything is read, for a file that is missing, empty, unreadable or of unknown kind."""
    for name in paths:
        path = Path(name)
        if not path.is_file():
            raise InputError(
                f"text_files={name!r} must be a file; {'it is a folder' if path.is_dir() else 'none there'}"
            )
        suffix = _suffix(path)
        try:
            with path.open("rb") as file:
                empty = not file.read(1)
        except OSError as error:
            raise InputError(f"text_files={name!r} must be readable: {error.strerror}") from None
        if empty:
            raise InputError(f"text_files={name!r} must hold text; the file is empty")
        needed = {".zst": "zstandard", ".parquet": "pyarrow"}.get(path.suffix.lower())
        if needed and find_spec(needed) is None:
            raise InputError(f"text_files={name!r} ({suffix}) needs {needed}: pip install 'linpass[train]'")


def file_documents(paths: Sequence[str], text_column: str) -> Iterator[str]:
    """The documents of text files: a .txt file, a .jsonl line, a .parquet row is one each; blank ones drop out.

    Args:
        paths: files with one of SUFFIXES.
        text_column: field of a .jsonl line, column of a .parquet file.

    Raises:
        InputError: not UTF-8, not JSON, no such column, not a string, damaged, or no text in a file.
    """
    for name in paths:
        path = Path(name)
        try:
            documents = [text for text in _read(path, text_column) if text.strip()]
        except InputError:
            raise
        except UnicodeDecodeError as error:
            raise InputError(f"text_files={name!r} must be UTF-8: {error.reason} at byte {error.start}") from None
        except Exception as error:  # each reader raises its own kinds for a damaged file
            raise InputError(f"text_files={name!r} could not be read as {_suffix(path)}: {error}") from error
        if not documents:
            raise InputError(f"text_files={name!r} must hold text; there is only white space")
        yield from documents


def _suffix(path: Path) -> str:
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    raise InputError(f"text_files={str(path)!r} must end in one of {', '.join(SUFFIXES)}")


def _read(path: Path, text_column: str) -> Iterator[str]:
    suffix = _suffix(path)
    if suffix == ".parquet":
        yield from _read_parquet(path, text_column)
        return
    with _open_text(path) as lines:
        if suffix.startswith(".txt"):
            yield lines.read()
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_text(line, text_column, f"text_files={str(path)!r} line {number}")


def _open_text(path: Path) -> io.TextIOBase:
    if path.suffix.lower() == ".zst":
        import zstandard

        return zstandard.open(path, "rt", encoding="utf-8-sig")
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _json_text(line: str, text_column: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} must be JSON: {error}") from None
    if not isinstance(record, dict) or text_column not in record:
        there = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise InputError(f"{where} must have the field text_column={text_column!r}; there is: {there}")
    if not isinstance(record[text_column], str):
        raise InputError(f"{where}: {text_column!r} must be a string, is {type(record[text_column]).__name__}")
    try:
        record[text_column].encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800": JSON can spell half a character
        raise InputError(f"{where}: {text_column!r} must be text: {error.reason}") from None
    return record[text_column]


def _read_parquet(path: Path, text_column: str) -> Iterator[str]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        if text_column not in file.schema_arrow.names:
            there = ", ".join(file.schema_arrow.names)
            raise InputError(
                f"text_files={str(path)!r} must have the column text_column={text_column!r}; there is: {there}"
            )
        for batch in file.iter_batches(columns=[text_column]):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str):
                    raise InputError(f"text_files={str(path)!r}: {text_column!r} must hold strings, not {text!r}")
                yield text


def load_documents(arguments: DataArguments) -> list[str]:
    """The documents to train on and to validate with, in a fixed order."""
    if arguments.text_files is None:
        documents = python_documents()
    else:
        documents = file_documents(arguments.text_files, arguments.text_column)
    return list(islice(documents, arguments.max_documents))


def split_documents(documents: Sequence[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Documents for training and documents for validation; no document is in both.

    ``fraction`` of the documents, drawn with ``seed``, are for validation. Where that is less than one document, the
    last ``fraction`` of the characters of each document is held out instead.
    """
    held_out = round(fraction * len(documents))
    if held_out == 0 or held_out == len(documents):
        cuts = [round(len(document) * (1 - fraction)) for document in documents]
        train = [document[:cut] for document, cut in zip(documents, cuts, strict=True)]
        return train, [document[cut:] for document, cut in zip(documents, cuts, strict=True)]
    chosen = set(random.Random(seed).sample(range(len(documents)), held_out))
    train = [document for index, document in enumerate(documents) if index not in chosen]
    return train, [documents[index] for index in sorted(chosen)]


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with at most ``vocab_size`` ids, in which every text can be written.

    One special token, ``<|endoftext|>``, opens, ends and pads. Padding goes left, where generation needs it.

    Raises:
        InputError: ``vocab_size`` has no room for the 256 bytes and the special token.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise InputError(
            f"vocab_size={vocab_size} must be at least {len(alphabet) + 1} to train a byte-level tokenizer"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],  # the model takes no token_type_ids
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or the Hub that fits a model of ``vocab_size`` ids.

    Raises:
        InputError: it cannot be loaded, has no end-of-text token, or has more ids than the model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"tokenizer={name!r} could not be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer={name!r} must have an eos_token, which separates the documents")
    ids = 1 + max(tokenizer.get_vocab().values())
    if ids > vocab_size:
        raise InputError(f"vocab_size={vocab_size} must be at least {ids}, the ids of tokenizer={name!r}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def chunk_documents(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_length: int, part: str
) -> torch.Tensor:
    """Token ids [C, seq_length], int64: the documents one after the other, an end-of-text after each, cut in rows.

    The tokens after the last full row are left out.

    Args:
        part: "training" or "validation", for the message.

    Raises:
        InputError: less text than one row.
    """
    pieces = []
    for start in range(0, len(documents), 256):
        encoded = tokenizer(list(documents[start : start + 256]), add_special_tokens=False, verbose=False)
        pieces += [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in encoded["input_ids"]]
    tokens = torch.cat(pieces)
    if len(tokens) < seq_length:
        raise InputError(
            f"seq_length={seq_length} must be at most the {len(tokens)} tokens of the {part} text: give more text, "
            f"a smaller seq_length, or another validation_fraction"
        )
    rows = len(tokens) // seq_length
    return tokens[: rows * seq_length].view(rows, seq_length)
