"""Where text comes from: Python's own, files, data sets of the Hugging Face Hub; each is a corpus of documents."""

import ast
import gzip
import hashlib
import io
import json
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from linpass.errors import InputError

SUFFIXES = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}


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
        empty = True
        try:
            for text in _read(path, text_column):
                if text.strip():
                    empty = False
                    yield text
        except (InputError, GeneratorExit):
            raise
        except UnicodeDecodeError as error:
            raise InputError(f"text_files={name!r} must be UTF-8: {error.reason} at byte {error.start}") from None
        except Exception as error:  # each reader raises its own kinds for a damaged file
            raise InputError(f"text_files={name!r} could not be read as {_suffix(path)}: {error}") from error
        if empty:
            raise InputError(f"text_files={name!r} must hold text; there is only white space")


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
            yield _checked(lines.read(), f"text_files={str(path)!r}")
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
    return _checked(record[text_column], where)


def _checked(text: str, where: str) -> str:
    if "\0" in text:
        raise InputError(f"{where} must be text: it holds a NUL character at {text.index(chr(0))}, as binary data does")
    return text


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


# The names that everybody uses, and where the Hub keeps them.
HUB_NAMES = {"openwebtext": "Skylion007/openwebtext", "bookcorpus": "bookcorpus/bookcorpus"}


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read again and again, always in the same order.

    Args:
        name: for people: a data set's name, "text files", "Python".
        max_documents: only the first ones; None: all.
    """

    name: str
    max_documents: int | None = None

    def __iter__(self) -> Iterator[str]:
        """The documents; blank ones are left out."""
        return islice((text for text in self._read() if text.strip()), self.max_documents)

    def count(self) -> int | None:
        """How many rows there are, for the progress bar; None where only reading would tell."""
        return None

    def fingerprint(self) -> str:
        """A short text that is another one as soon as the documents are others."""
        return f"{self._identity()} max_documents={self.max_documents}"

    def _read(self) -> Iterator[str]:
        raise NotImplementedError

    def _identity(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class PythonText(Corpus):
    """The English that every Python carries, see :func:`python_documents`."""

    name: str = "Python's documentation"

    def _read(self) -> Iterator[str]:
        return python_documents()

    def _identity(self) -> str:
        return f"python {platform.python_implementation()} {platform.python_version()} {sysconfig.get_path('stdlib')}"


@dataclass(frozen=True)
class TextFiles(Corpus):
    """Local files, see :func:`file_documents`."""

    name: str = "text files"
    paths: tuple[str, ...] = ()
    text_column: str = "text"

    def _read(self) -> Iterator[str]:
        return file_documents(self.paths, self.text_column)

    def _identity(self) -> str:
        # The content, not name and time: a copy is the same text, an edited file is another one.
        digest = hashlib.blake2b(digest_size=16)
        for name in self.paths:
            with open(name, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
            digest.update(f"|{_suffix(Path(name))}|".encode())
        return f"files {digest.hexdigest()} text_column={self.text_column}"


@dataclass(frozen=True)
class HubDataset(Corpus):
    """A data set of the Hub, or a local folder that ``datasets.load_dataset`` reads.

    A row is a document (in BookCorpus: a sentence). The short names of HUB_NAMES are known; ``NAME:CONFIGURATION``
    chooses a configuration. A data set whose repository holds a loading script is read from the Hub's own Parquet
    conversion of it.

    Args:
        rows: what ``datasets.load_dataset`` returned.
        version: another one when the rows are others.
    """

    rows: Any = None
    version: str = ""
    text_column: str = "text"

    def _read(self) -> Iterator[str]:
        for row in self.rows:
            text = row[self.text_column]
            if not isinstance(text, str):
                raise InputError(f"datasets={self.name!r}: {self.text_column!r} must hold strings, not {text!r}")
            yield text

    def count(self) -> int | None:
        try:
            total = len(self.rows)
        except TypeError:  # a stream
            return None
        return total if self.max_documents is None else min(total, self.max_documents)

    def _identity(self) -> str:
        return f"dataset {self.name} {self.version} text_column={self.text_column}"


def open_dataset(
    spec: str, split: str, text_column: str, streaming: bool = False, max_documents: int | None = None
) -> HubDataset:
    """A data set by name, with its column checked before anything long starts.

    Args:
        spec: ``NAME`` or ``NAME:CONFIGURATION``; a name of HUB_NAMES, any other of the Hub, or a local folder.
        streaming: read over the network while the ids are computed, and store nothing but these.

    Raises:
        InputError: ``datasets`` is missing, there is no such data set, configuration, split or column, or the Hub
            cannot be reached.
    """
    if find_spec("datasets") is None:
        raise InputError(f"datasets={spec!r} needs the package datasets: pip install 'linpass[train]'")
    name, _, configuration = spec.partition(":")
    path = HUB_NAMES.get(name, name)
    rows = _load_rows(spec, path, configuration or None, split, streaming)
    columns = rows.column_names or list(next(iter(rows), {}))
    if not columns:
        raise InputError(f"datasets={spec!r} must hold documents; there are no rows in split {split!r}")
    if text_column not in columns:
        there = ", ".join(columns)
        raise InputError(f"datasets={spec!r} must have the column text_column={text_column!r}; there is: {there}")
    version = f"{split} {_version(rows, path)}"
    return HubDataset(name=spec, rows=rows, version=version, text_column=text_column, max_documents=max_documents)


def _load_rows(spec: str, path: str, configuration: str | None, split: str, streaming: bool) -> Any:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    if Path(path).is_file():
        raise InputError(f"datasets={spec!r} is a file; use --text_files for files")
    revisions = (None,) if Path(path).is_dir() else (None, "refs/convert/parquet")
    for revision in revisions:
        try:
            return datasets.load_dataset(path, configuration, split=split, streaming=streaming, revision=revision)
        except DatasetNotFoundError as error:
            raise InputError(f"datasets={spec!r} is no data set that can be read on the Hub: {_line(error)}") from error
        except ConnectionError as error:
            raise InputError(f"datasets={spec!r} could not be reached, is there a network? {_line(error)}") from error
        except RuntimeError as error:
            # what datasets >= 4 says of a repository with a loading script
            if "script" not in str(error) or revision == revisions[-1]:
                raise InputError(f"datasets={spec!r} could not be loaded: {_line(error)}") from error
        except Exception as error:  # every file format has its own
            raise InputError(f"datasets={spec!r} could not be loaded: {_line(error)}") from error
    raise AssertionError("unreachable: the last revision returns or raises")


def _version(rows: Any, path: str) -> str:
    """What changes when the rows do: the fingerprint of stored rows, the revision of a stream."""
    if getattr(rows, "_fingerprint", None):
        return rows._fingerprint
    folder = Path(path)
    if folder.is_dir():
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        listing = [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.blake2b(repr(listing).encode(), digest_size=16).hexdigest()
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(path).sha)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
