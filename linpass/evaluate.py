"""``linpass evaluate``: how well a causal language model predicts text, a Linformer or any other of transformers."""

import json
import math
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import linpass
from linpass.errors import InputError
from linpass.generate import most_tokens
from linpass.scoring import Scores, encode_documents, position_ranges, range_loss, score_documents, summarise
from linpass.training.documents import check_text_files, file_documents
from linpass.training.result_folder import check_result_folder

PLOT_NAME, RESULT_NAME = "loss_by_position.png", "evaluation.json"
UNBOUNDED_WINDOW = 1024
NORMAL_95 = 1.96  # standard errors on either side


def evaluate(
    model: str,
    text_files: Sequence[str],
    *,
    text_column: str = "text",
    seq_length: int | None = None,
    batch_size: int = 8,
    max_documents: int | None = None,
    output_dir: str = "./evaluation",
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure a model on text, print a table, write evaluation.json and loss_by_position.png to ``output_dir``.

    Args:
        model: folder or Hub name of a causal language model and its tokenizer.
        seq_length: tokens of a window; None: what the model was made for, 1024 where it does not say.
        batch_size: windows at a time.

    Returns:
        what evaluation.json holds, see :func:`summarise`.

    Raises:
        InputError: files, model, tokenizer, device or folder cannot be used; before the model has read any text.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("linpass evaluate needs matplotlib: pip install 'linpass[train]'") from None
    check_text_files(text_files)
    folder = Path(output_dir).expanduser()
    check_result_folder(folder, (RESULT_NAME, PLOT_NAME))
    place = choose_device(device)
    texts = list(islice(file_documents(text_files, text_column), max_documents))
    language_model, tokenizer = load_model(model, dtype, place, trust_remote_code)
    seq_length = window_length(language_model, seq_length)
    documents = encode_documents(texts, tokenizer)
    scores = score_documents(language_model, documents, seq_length, batch_size)
    if not scores.document_nats.isfinite().all():
        raise InputError(f"model={model!r} gives losses that are not finite; its weights may be broken")
    result = {
        "model": model,
        "class": type(language_model).__name__,
        "parameters": language_model.num_parameters(),
        "text_files": list(text_files),
        "seq_length": seq_length,
        "dtype": dtype,
        "device": str(place),
        "versions": {m.__name__: m.__version__ for m in (linpass, torch, transformers)},
        **summarise(scores),
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / RESULT_NAME, lambda path: path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8"))
    _write(folder / PLOT_NAME, lambda path: plot_positions(result, scores, path))
    print(report(result))
    print(f"\nAll numbers: {folder / RESULT_NAME}    Picture: {folder / PLOT_NAME}")
    return result


def load_model(
    name: str, dtype: str, device: torch.device, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model, ready to predict, and its tokenizer.

    Raises:
        InputError: nothing of the kind there, weights missing, a tokenizer with more ids than the model, or a model
            that sees the token that it has to predict.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model, loaded = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            name, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model={name!r} must hold a causal language model and its tokenizer: {error}") from error
    if loaded["missing_keys"]:
        missing = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise InputError(f"model={name!r} must hold a whole causal language model; its weights lack {missing}")
    ids, room = 1 + max(tokenizer.get_vocab().values()), len(model.get_input_embeddings().weight)
    if ids > room:
        raise InputError(f"model={name!r}: its tokenizer has {ids} ids, the model only {room}")
    model.eval().to(device)
    if not is_causal(model):
        raise InputError(f"model={name!r} must be causal: its predictions change with the tokens that come after them")
    return model, tokenizer


@torch.no_grad()
def is_causal(model: PreTrainedModel) -> bool:
    """False where another last token changes what the model says before it."""
    embeddings: Any = model.get_input_embeddings()
    vocabulary, tokens = len(embeddings.weight), min(8, most_tokens(model.config) or 8)
    ids = torch.arange(tokens, device=model.device).repeat(2, 1)
    ids[1, -1] += 1
    ids %= vocabulary
    before_last = model(input_ids=ids, use_cache=False).logits[:, :-1]
    rounding = max(1e-5, 4 * torch.finfo(before_last.dtype).eps) * before_last.abs().max().item()
    return not (before_last[0] - before_last[1]).abs().max() > rounding  # nan is another matter


def window_length(model: PreTrainedModel, wanted: int | None) -> int:
    """Tokens of a window.

    Raises:
        InputError: ``wanted`` is more than the model can hold.
    """
    limit = most_tokens(model.config)
    if wanted is not None and limit is not None and wanted > limit:
        raise InputError(f"seq_length={wanted} must be at most {limit}, all that the model can hold")
    return wanted or getattr(model.config, "max_position_embeddings", None) or UNBOUNDED_WINDOW


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the accelerator where there is one.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise InputError(f"device={name!r} must be a device of this machine: {str(error).splitlines()[0]}") from None
    return device


def report(result: dict[str, Any]) -> str:
    """The table that the command prints."""

    def row(name: str, value: float, error: float | None, unit: str = "") -> str:
        return f"{name:<14} {value:10.4f}" + ("" if error is None else f" ± {error:.4f}") + unit

    lines = [
        f"{result['model']}: {result['class']}, {result['parameters']:,} parameters, {result['dtype']}",
        f"{result['documents']:,} documents, {result['tokens']:,} tokens, {result['bytes']:,} bytes, "
        f"windows of {result['seq_length']:,} tokens",
        "",
        row("perplexity", result["perplexity"], result["perplexity_standard_error"]),
        row("bits per byte", result["bits_per_byte"], result["bits_per_byte_standard_error"]),
        row("loss", result["loss"], result["loss_standard_error"], "  nats per token"),
        "",
        "context tokens       loss      tokens",
    ]
    losses, tokens = result["loss_by_position"], result["tokens_by_position"]
    for first, end in position_ranges(len(losses), per_doubling=1):
        count = sum(tokens[first:end])
        mean = sum(loss * number for loss, number in zip(losses[first:end], tokens[first:end], strict=True)) / count
        name = f"{first + 1}" if end == first + 1 else f"{first + 1}-{end}"
        lines.append(f"{name:<14} {mean:10.4f} {count:11,}")
    if result["documents"] > 1:
        lines.append("± is one standard error over documents")
    return "\n".join(lines)


def plot_positions(result: dict[str, Any], scores: Scores, path: Path) -> None:
    """Write a PNG: loss by the number of tokens that a prediction sees, with its 95 % band."""
    from matplotlib.figure import Figure

    ranges = position_ranges(len(scores.position_nats), per_doubling=4)
    middle = [math.sqrt((first + 1) * end) for first, end in ranges]
    means, errors = zip(*(range_loss(scores, first, end) for first, end in ranges), strict=True)
    low, high = ([m + side * NORMAL_95 * e for m, e in zip(means, errors, strict=True)] for side in (-1, 1))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(middle, means, color="tab:blue", marker="o", markersize=3, label="loss, 95 % band over tokens")
    axes.fill_between(middle, low, high, color="tab:blue", alpha=0.2, linewidth=0)
    axes.axhline(result["loss"], color="gray", linestyle="--", linewidth=1, label=f"all tokens: {result['loss']:.3f}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens of the window that the prediction sees")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(
        f"{Path(result['model']).name}: perplexity {result['perplexity']:.2f} on {result['tokens']:,} tokens"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150, format="png")


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write through a temporary sibling, so that no reader meets half a file."""
    partial = path.with_name(f".{path.name}.incomplete")
    write(partial)
    partial.replace(path)
