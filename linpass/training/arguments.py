"""What can be set about the model and the data, and the presets that set many things at once.

Standard library only, so that ``linpass train --help`` answers at once; the Trainer's own arguments, which need
transformers, are in ``parser.py``.
"""

import difflib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from linpass.errors import InputError

# Installed, the presets lie inside the package; in a checkout they are the visible folder `presets/` at its root.
_PACKAGE = Path(__file__).resolve().parent.parent
PRESET_FOLDER = next(
    (f for f in (_PACKAGE / "presets", _PACKAGE.parent / "presets") if f.is_dir()), _PACKAGE / "presets"
)


def _flag(default: Any, text: str, alias: str | None = None) -> Any:
    """A field with its help, and its Hugging Face name where it has one."""
    return field(default=default, metadata={"help": text} | ({"aliases": [f"--{alias}"]} if alias else {}))


@dataclass
class ModelArguments:
    """The fields of :class:`~linpass.LinformerConfig`, same names, same defaults.

    The types that hold ``str`` and ``None`` are read from text here, because a command line has no way to say None:
    ``--rank none``, ``--k 128``, ``--k 64,64,128,128`` (one per layer).

    Raises:
        InputError: text that is neither whole numbers nor ``none``.
    """

    vocab_size: int = _flag(50257, "token ids; also the size of the tokenizer that is trained when none is given")
    embed_dim: int = _flag(512, "width of the hidden states", "hidden_size")
    depth: int = _flag(6, "blocks", "num_hidden_layers")
    heads: int = _flag(4, "query heads; divides embed_dim", "num_attention_heads")
    num_key_value_heads: int | str | None = _flag(None, "key/value heads; divides heads; none: as many as heads")
    seq_length: int = _flag(512, "tokens of a full sequence and of a training chunk", "max_position_embeddings")
    k: int | str | list[int] | None = _flag(128, "slots for seq_length tokens; one number, or one per layer: 64,64,128")
    block_size: int = _flag(32, "tokens per block; divides seq_length")
    window_size: int = _flag(128, "exact tokens that a query sees; at least block_size")
    causal: bool = _flag(True, "this command trains causal models only")
    projection: str = _flag("learned", "learned, convolution or pooling")
    projection_sharing: str = _flag("key-value", "none, headwise, key-value or layerwise")
    position_embedding: str = _flag("learned", "learned or rotary")
    rotary_base: float = _flag(10000.0, "base of the rotary angles")
    qk_norm: bool = _flag(False, "RMS-normalise queries and keys per head")
    intermediate_size: int | str | None = _flag(None, "width of the feed-forward layer; none: 4 * embed_dim")
    rank: int | str | None = _flag(256, "rank of the feed-forward matrices; none: dense")
    attention_rank: int | str | None = _flag(None, "rank of the attention's projections; none: dense")
    dropout: float = _flag(0.1, "probability, 0 or more and less than 1")
    norm_eps: float = _flag(1e-6, "epsilon of the RMS norms")
    initializer_range: float = _flag(0.02, "standard deviation of the initial weights")
    tie_word_embeddings: bool = _flag(False, "one matrix for the token embedding and the head")
    pad_token_id: int | str | None = _flag(50256, "at its default: the tokenizer's")
    bos_token_id: int | str | None = _flag(50256, "at its default: the tokenizer's")
    eos_token_id: int | str | list[int] | None = _flag(50256, "at its default: the tokenizer's")
    # No flag: --use_cache is the Trainer's, which is about the time of training.
    use_cache: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        read = ("num_key_value_heads", "k", "intermediate_size", "rank", "attention_rank")
        for name in (*read, "pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(self, name, _whole_numbers(name, getattr(self, name)))


@dataclass
class DataArguments:
    """What to train on.

    Raises:
        InputError: a value is out of its range.
    """

    preset: str = _flag("tiny", "a file of presets/ without .json, or a path to a JSON file; flags win over it")
    text_files: list[str] | None = _flag(None, "your own .txt (a file is a document), .jsonl, .parquet, also .gz/.zst")
    text_column: str = _flag("text", "field of a .jsonl line or column of a .parquet file that holds the text")
    validation_fraction: float = _flag(0.05, "share of the documents kept for validation")
    max_documents: int | None = _flag(None, "use the first documents only")
    tokenizer: str | None = _flag(None, "name or folder of a tokenizer; none: train a byte-level BPE on the text")

    def __post_init__(self) -> None:
        # A preset's values come as JSON has them, unread by the command line.
        if isinstance(self.text_files, str) or not all(isinstance(name, str) for name in self.text_files or []):
            raise InputError(f"text_files={self.text_files!r} must be a list of file names")
        if not isinstance(self.validation_fraction, float) or not 0 < self.validation_fraction < 1:
            raise InputError(f"validation_fraction={self.validation_fraction} must be more than 0 and less than 1")
        if self.max_documents is not None and self.max_documents < 1:
            raise InputError(f"max_documents={self.max_documents} must be 1 or more")


def preset_names() -> list[str]:
    """The presets that ship with the package, in alphabetical order."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.json"))


def read_preset(name: str, valid_keys: list[str]) -> dict[str, Any]:
    """The arguments that a preset sets.

    Args:
        name: a shipped preset, or a path that ends in ``.json``.
        valid_keys: the arguments there are.

    Raises:
        InputError: no such preset, not a JSON object, or a key that is no argument.
    """
    path = Path(name) if name.endswith(".json") else PRESET_FOLDER / f"{name}.json"
    if not path.is_file():
        raise InputError(f"preset={name!r} must be a JSON file or one of: {', '.join(preset_names())}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"preset={name!r}: {path} must hold JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"preset={name!r}: {path} must hold a JSON object of argument names and values")
    for key in values:
        if key not in valid_keys or key == "preset":
            raise InputError(f"preset={name!r}: {path} sets {key!r}, which is no argument; {nearest(key, valid_keys)}")
    return values


def nearest(name: str, valid: list[str]) -> str:
    """``nearest: x``, the valid name that looks most like ``name``."""
    return f"nearest: {difflib.get_close_matches(name, valid, n=1, cutoff=0.0)[0]}"


def train_help() -> str:
    """The text of ``linpass train --help``."""
    lines = [
        "usage: linpass train [--preset NAME] [--text_files FILE ...] [any flag below, --flag value]",
        "",
        "Train a causal Linformer and save it with its tokenizer. Without flags: the preset tiny on the English text",
        "that every Python carries, minutes on two CPU cores. Flags win over the preset, the preset over defaults.",
        "",
        f"presets: {', '.join(preset_names())}",
    ]
    for title, arguments in (("data", DataArguments), ("model", ModelArguments)):
        lines += ["", f"{title}:"]
        lines += [_help_line(f.name, f.default, f.metadata["help"]) for f in fields(arguments) if f.init]
    lines += ["", "training (every flag of transformers.TrainingArguments; --help_all lists them), among them:"]
    lines += [
        _help_line("output_dir", "./final_model", "the finished model; complete or not there"),
        _help_line("checkpoint_dir", "trainer_output/NAME beside output_dir", "checkpoints"),
        _help_line("epochs", 3, "short for --num_train_epochs"),
        _help_line("batch_size", 8, "short for --per_device_train_batch_size, chunks"),
        _help_line("learning_rate", 5e-5, "peak of the schedule"),
        _help_line("seed", 42, "one seed on one machine gives one result"),
        _help_line("resume_from_checkpoint", None, "a folder under checkpoint_dir"),
    ]
    return "\n".join(lines)


def _help_line(name: str, default: Any, text: str) -> str:
    return f"  --{name:<22} {text} [{'none' if default is None else default}]"


def _whole_numbers(name: str, value: Any) -> Any:
    """An int, a list of ints or None from the text of a flag; other values, which a preset gave, unchanged."""
    if not isinstance(value, str):
        return value
    if value.lower() == "none":
        return None
    try:
        numbers = [int(part) for part in value.split(",")]
    except ValueError:
        raise InputError(f"{name}={value!r} must be a whole number or none") from None
    return numbers[0] if len(numbers) == 1 else numbers
