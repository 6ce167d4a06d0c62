"""The default rows of single-pass training: whose documentation does a passage come from, torch's or transformers'?

Both packages are required, so every installation has this English text, without a network. A passage is a paragraph of
a docstring, 12 to 60 words of prose. Docstrings are parsed from the installed source files; nothing is imported. A
file's passages are all for training or all for testing, and no passage is on both sides or in both classes.

What would give the answer away is taken out: the packages' own names become "Library", and markup, which the two
projects write differently, is removed. What is left has to be told by what it speaks of: tensors, kernels and graphs,
or models, tokens and configurations. Logistic regression on weighted word counts gets some 84 % of the balanced rows
right: neither trivial nor noise. The rows depend on the installed versions of the two packages and on nothing else.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from tqdm.auto import tqdm

from linpass.errors import InputError
from linpass.singlepass.labelled_text import LabelledText
from linpass.training.run_log import replacing

PACKAGES = ("torch", "transformers")
TRAIN_ROWS, TEST_ROWS = 3200, 1000
WORDS = range(12, 61)
PROSE = 0.7  # least share of plain words; the rest is formulas and identifiers
MOST_BYTES = 50_000  # of a source file: parsing takes time, and large files are mostly code

_NAMES = re.compile(r"\b(?:the )?(?:py ?torch|torch|transformers|hugging ?face|hf|aten)\b(?:'s)?", re.IGNORECASE)
_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")
_ROLE = re.compile(r":(?:\w+:)?\w+:`~?([^`<]*)[^`]*`")
_ADDRESS = re.compile(r"https?://\S+")
_MARKUP = re.compile(r"[^\w\s.,;:?!'()-]|\*|_")
_CODE = (">>>", "```", "::", ".. ")
_PLAIN = re.compile(r"\(?[A-Za-z]+(?:[-'][A-Za-z]+)*\)?[.,;:?!]*")


def documentation_rows(
    packages: Sequence[str] = PACKAGES, train_rows: int = TRAIN_ROWS, test_rows: int = TEST_ROWS, quiet: bool = False
) -> tuple[LabelledText, LabelledText]:
    """Rows for training and for testing, as many of each class; a class is a package.

    Args:
        packages: installed packages with source files, two or more.
        train_rows, test_rows: of all classes together; rounded down to a multiple of their number.
        quiet: no progress bar.

    Raises:
        InputError: a package is missing, or its source files do not hold so many passages.
    Cost: time to parse about a thousand files of each package.
    Invariants: no file and no passage on both sides; the same rows on every machine with the same versions.
    """
    wanted = {"train": train_rows // len(packages), "test": test_rows // len(packages)}
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    seen: set[str] = set()
    with tqdm(total=sum(wanted.values()) * len(packages), desc="documentation", unit=" rows", disable=quiet) as bar:
        for label, package in enumerate(packages):
            left = dict(wanted)
            for side, path in _source_files(package, test_rows / (train_rows + test_rows)):
                for passage in _passages(path) if left[side] else ():
                    if left[side] and passage not in seen:
                        seen.add(passage)
                        rows[side].append((passage, label))
                        left[side] -= 1
                        bar.update()
                if not any(left.values()):
                    break
            if any(left.values()):
                held = sum(wanted.values()) - sum(left.values())
                raise InputError(
                    f"the default text needs {sum(wanted.values())} passages in the source files of {package}, there "
                    f"are {held}; an installation without .py files has none: give --text_files or --dataset"
                )
    train, test = (_shuffled(rows[side], list(packages)) for side in ("train", "test"))
    return train, test


def stored_documentation_rows(cache: Path, quiet: bool = False) -> tuple[LabelledText, LabelledText]:
    """:func:`documentation_rows` with their default numbers, read from the folder ``cache`` where it holds them.

    Raises:
        InputError: as documentation_rows.
    """
    made_from = [*((package, version(package)) for package in PACKAGES), TRAIN_ROWS, TEST_ROWS, _own_source()]
    digest = hashlib.blake2b(repr(made_from).encode(), digest_size=12).hexdigest()
    path = cache / f"documentation-{digest}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # none there, or damaged: made again
        kept = json.loads(path.read_text(encoding="utf-8"))
        return LabelledText(**kept["train"]), LabelledText(**kept["test"])
    train, test = documentation_rows(quiet=quiet)
    cache.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps({"train": vars(train), "test": vars(test)}), encoding="utf-8")
    return train, test


def clean_passage(paragraph: str) -> str | None:
    """The words of a paragraph without markup and without the packages' names; None where it is not prose.

    Example:
        >>> clean_passage("Returns a :class:`~torch.Tensor` which **PyTorch** keeps on its device until it is freed.")
        'Returns a the library.Tensor which the library keeps on its device until it is freed.'
    """
    if any(code in paragraph for code in _CODE):
        return None
    text = _ADDRESS.sub("", _ROLE.sub(r"\1", _LINK.sub(r"\1", paragraph)))
    text = " ".join(_MARKUP.sub(" ", _NAMES.sub("Library", text)).split())
    words = text.split()
    plain = sum(1 for word in words if _PLAIN.fullmatch(word))
    is_prose = plain >= PROSE * len(words) and text[:1].isupper() and text.endswith(".")
    return text if len(words) in WORDS and is_prose else None


def _shuffled(rows: list[tuple[str, int]], classes: list[str]) -> LabelledText:
    """The rows in an order that their texts decide; gradient descent in the order of the data must not meet one class
    after the other."""
    rows = sorted(rows, key=lambda row: hashlib.blake2b(row[0].encode("utf-8", "replace"), digest_size=8).digest())
    return LabelledText([text for text, _label in rows], [label for _text, label in rows], classes)


def _source_files(package: str, test_share: float) -> Iterator[tuple[str, Path]]:
    """(side, path) of a package's source files, in an order that only their names decide."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the default text is in the package {package}, which is not installed; give --text_files")
    root = Path(spec.submodule_search_locations[0])
    drawn = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
        drawn.append((number, name, path))
    for number, _name, path in sorted(drawn):
        if path.stat().st_size <= MOST_BYTES:
            # Other bits than those that the order goes by.
            yield "test" if number % 2**20 < test_share * 2**20 else "train", path


def _passages(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # templates that are no Python
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                passage = clean_passage(paragraph)
                if passage:
                    yield passage


def _own_source() -> str:
    """Another text when the rules of this file are others."""
    return hashlib.blake2b(Path(__file__).read_bytes(), digest_size=12).hexdigest()
