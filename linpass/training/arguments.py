"""What can be set about the model and the data, and the presets that set many things at once.

Standard library only, so that ``linpass train --help`` answers at once; the Trainer's own arguments, which need
transformers, are in ``parser.py``.
"""

import difflib
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from linpass.errors import InputError

# Installed, the presets lie inside the package; in a checkout they are the visible folder `presets/` at its root.
_PACKAGE = Path(__file__).resolve().parent.parent
PRESET_FOLDER = next(
    (f for f in (_PACKAGE / "presets", _PACKAGE.parent / "presets") if f.is_dir()), _PACKAGE / "presets"
)

ARCHITECTURES = ("linformer", "gpt2", "llama")
OBJECTIVES = ("causal", "masked")
NOISE_TARGETS = ("clean", "noised")


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
    causal: bool = _flag(True, "at its default: what the objective asks for")
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
    """What to train on: data sets of the Hub, files, ids computed elsewhere; without any, the text of Python itself.

    Raises:
        InputError: a value is out of its range, or two contradict each other.
    """

    preset: str = _flag("tiny", "a file of presets/ without .json, or a path to a JSON file; flags win over it")
    datasets: list[str] | None = _flag(None, "data sets of the Hub, NAME or NAME:CONFIGURATION: openwebtext bookcorpus")
    dataset_split: str = _flag("train", "split of the data sets")
    streaming: bool = _flag(False, "read data sets over the network once, store nothing but their token ids")
    text_files: list[str] | None = _flag(None, "your own .txt (a file is a document), .jsonl, .parquet, also .gz/.zst")
    text_column: str = _flag("text", "field of a .jsonl line, column of a .parquet file or data set with the text")
    token_folders: list[str] | None = _flag(None, "token ids that an earlier run computed: tokens-* of its cache_dir")
    mixing_weights: list[float] | None = _flag(None, "share of each corpus in the tokens of an epoch; none: as it is")
    max_documents: int | None = _flag(None, "use the first documents of each corpus only")
    validation_files: list[str] | None = _flag(None, "files to validate on; none: hold out documents of each corpus")
    validation_token_folders: list[str] | None = _flag(None, "the same as ids that an earlier run computed")
    validation_fraction: float = _flag(0.05, "share of the documents of each corpus kept for validation")
    tokenizer: str | None = _flag(None, "name or folder of a tokenizer; none: train a byte-level BPE on the text")
    cache_dir: str | None = _flag(None, "where token ids are kept; none: linpass in Hugging Face's cache folder")

    def __post_init__(self) -> None:
        # A preset's values come as JSON has them, unread by the command line.
        for name in ("datasets", "text_files", "token_folders", "validation_files", "validation_token_folders"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, str) for item in value or []):
                raise InputError(f"{name}={value!r} must be a list of names")
        if not isinstance(self.validation_fraction, float) or not 0 < self.validation_fraction < 1:
            raise InputError(f"validation_fraction={self.validation_fraction} must be more than 0 and less than 1")
        if self.max_documents is not None and self.max_documents < 1:
            raise InputError(f"max_documents={self.max_documents} must be 1 or more")
        if self.validation_files and self.validation_token_folders:
            raise InputError("validation_files and validation_token_folders exclude each other")
        if self.token_folders and self.tokenizer is None:
            raise InputError("token_folders needs --tokenizer, the one that computed the ids")
        if self.streaming and not self.datasets:
            raise InputError("streaming=True needs --datasets")
        if self.streaming and self.tokenizer is None:
            raise InputError("streaming=True needs --tokenizer: training one would read the stream twice")
        weights = self.mixing_weights
        if weights is not None and (len(weights) != self.corpora or not all(0 < w < math.inf for w in weights)):
            raise InputError(
                f"mixing_weights={weights} must be finite numbers more than 0, as many as corpora, {self.corpora}: one "
                "for each of --datasets, then one for --text_files, then one for each of --token_folders"
            )

    @property
    def corpora(self) -> int:
        """How many corpora are mixed."""
        named = len(self.datasets or []) + len(self.token_folders or [])
        return max(1, named + (1 if self.text_files else 0))


@dataclass
class ChunkArguments:
    """How documents become rows, see :class:`~linpass.training.collators.DynamicChunkingCollator`.

    Raises:
        InputError: a value is out of its range, or two contradict each other.
    """

    objective: str = _flag("causal", "causal: predict the next token; masked: an encoder, predict masked tokens")
    packing: bool = _flag(False, "several documents share a row, each at a block border, none sees another")
    chunks_per_document: int | str | None = _flag(None, "chunks of a document in an epoch; none: as many as it fills")
    deletion_probability: float = _flag(0.0, "noise: tokens deleted from the input")
    swap_probability: float = _flag(0.0, "noise: neighbours swapped in the input")
    noise_target: str = _flag("clean", "clean: predict the text before the noise; noised: the text after it")
    mask_probability: float = _flag(0.15, "tokens to predict, with objective masked")

    def __post_init__(self) -> None:
        self.chunks_per_document = _whole_numbers("chunks_per_document", self.chunks_per_document)
        for name in ("deletion_probability", "swap_probability", "mask_probability"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise InputError(f"{name}={value} must be a probability, 0 to 1")
        if self.chunks_per_document is not None and (
            not isinstance(self.chunks_per_document, int) or self.chunks_per_document < 1
        ):
            raise InputError(f"chunks_per_document={self.chunks_per_document} must be 1 or more, or none")
        if self.objective not in OBJECTIVES:
            raise InputError(f"objective={self.objective!r} must be one of {', '.join(OBJECTIVES)}")
        if self.noise_target not in NOISE_TARGETS:
            raise InputError(f"noise_target={self.noise_target!r} must be one of {', '.join(NOISE_TARGETS)}")
        if self.packing and self.objective == "masked":
            raise InputError(
                "packing=True needs objective causal, an encoder sees the whole row; the preset may have set it: add "
                "--packing False"
            )
        if self.objective == "masked" and self.mask_probability == 0:
            raise InputError("mask_probability=0.0 must be more than 0 with objective masked")


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
        "usage: linpass train [--preset NAME] [--datasets NAME ...] [--text_files FILE ...] [any flag, --flag value]",
        "",
        "Train a Linformer, or a GPT-2 or Llama of its size, and save it with its tokenizer. Without flags: the preset",
        "tiny on the English text that every Python carries, minutes on two CPU cores. Flags win over the preset, the",
        "preset over defaults.",
        "",
        f"presets: {', '.join(preset_names())}",
    ]
    groups = (("data", DataArguments), ("chunks", ChunkArguments), ("model", ModelArguments))
    for title, arguments in groups:
        lines += ["", f"{title}:"]
        lines += [_help_line(f.name, f.default, f.metadata["help"]) for f in fields(arguments) if f.init]
    lines += ["", "training (every flag of transformers.TrainingArguments; --help_all lists them), among them:"]
    lines += [
        _help_line("architecture", "linformer", "linformer, or a baseline of equal size: gpt2, llama"),
        _help_line("output_dir", "./final_model", "the finished model; complete or not there"),
        _help_line("checkpoint_dir", "trainer_output/NAME beside output_dir", "checkpoints and the training log"),
        _help_line("resume", False, "go on from the last complete checkpoint in checkpoint_dir"),
        _help_line("sample_prompts", None, "texts to continue every --sample_steps steps"),
        _help_line("epochs", 3, "short for --num_train_epochs"),
        _help_line("batch_size", 8, "short for --per_device_train_batch_size, chunks"),
        _help_line("learning_rate", 5e-5, "peak of the schedule"),
        _help_line("seed", 42, "one seed on one machine gives one result"),
        _help_line("bf16", False, "bfloat16 where it is safe; for GPUs"),
        _help_line("push_to_hub", False, "share the finished model, as --hub_model_id"),
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
