"""``linpass compare``: the same classifier by gradient descent and in a single pass, with what each takes and gives."""

import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

import linpass
from linpass.errors import InputError
from linpass.singlepass.classification import expected_calibration_error, log_loss
from linpass.singlepass.command_arguments import CompareArguments, SourceArguments
from linpass.singlepass.comparison_report import plot, report
from linpass.singlepass.contestants import Contestant, Settings, contestants
from linpass.singlepass.labelled_text import LabelledText
from linpass.singlepass.measurement import Cost, measured
from linpass.singlepass.sources import (
    DEFAULT_ROWS,
    check_sources,
    encode,
    find_encoder,
    load_encoder,
    mean_features,
    read_rows,
    row_length,
)
from linpass.training.result_folder import check_result_folder
from linpass.training.run_log import replacing

# The heads' are customary for them; fifty of the transformer from scratch take five minutes of one core.
HEAD_EPOCHS, SCRATCH_EPOCHS = 50, 10
RESULT_NAME, PLOT_NAME = "compare.json", "compare.png"


def compare(sources: SourceArguments, arguments: CompareArguments, quiet: bool = False) -> dict[str, Any]:
    """Run every contestant on the same rows, print a table, write compare.json and compare.png to ``output_dir``.

    Each works in a process of its own, see :mod:`linpass.singlepass.measurement`. Its time is that of training and of
    predicting the test rows; those that work on features get the time of the encoder on all rows added. What cannot
    run says why in its row.

    Returns:
        What compare.json holds.
    Raises:
        InputError: files, model or folder cannot be used; before any work.
    """
    if find_spec("matplotlib") is None:
        raise InputError("linpass compare needs matplotlib: pip install 'linpass[compare]'")
    folder = Path(arguments.output_dir).expanduser()
    check_result_folder(folder, (RESULT_NAME, PLOT_NAME))
    check_sources(sources)
    logging.disable_progress_bar()  # "Loading weights" would stand between the others
    train, test = read_rows(sources, arguments.seed, quiet)
    started = time.perf_counter()
    encoder = find_encoder(sources, train, quiet)
    encoder_seconds = time.perf_counter() - started
    model, tokenizer = load_encoder(encoder)
    facts = {
        "rows": DEFAULT_ROWS if not (sources.text_files or sources.dataset) else sources.dataset or sources.text_files,
        "train_rows": len(train),
        "test_rows": len(test),
        "classes": train.classes,
        "majority": _majority(train, test),
        "encoder": sources.model or "a small Linformer, trained on the spot by masked tokens",
        "encoder_parameters": model.num_parameters(),
        "encoder_seconds": None if sources.model else encoder_seconds,
    }
    settings = Settings(
        epochs=arguments.epochs or HEAD_EPOCHS,
        scratch_epochs=arguments.epochs or SCRATCH_EPOCHS,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        classes=len(train.classes),
        vocab_size=1 + max(tokenizer.get_vocab().values()),
        quiet=quiet,
    )
    with tempfile.TemporaryDirectory(prefix="linpass-compare-") as place:
        path = f"{place}/rows.safetensors"
        work = partial(write_tensors, train, test, row_length(model, sources.max_length), path, quiet)
        width, features_cost = measured(partial(_load, encoder), work)
        print(f"{len(train):,} rows for training, {len(test):,} for testing; {width} features each", flush=True)
        results = [run(contestant, path, settings, features_cost, test) for contestant in contestants()]
    result: dict[str, Any] = facts | {
        "features": width,
        "features_cost": asdict(features_cost),
        "settings": asdict(settings),
        "contestants": results,
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {m.__name__: m.__version__ for m in (linpass, torch, transformers)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / RESULT_NAME) as partial_file:
        partial_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    with replacing(folder / PLOT_NAME) as partial_file:
        plot(result, partial_file)
    print(report(result))
    print(f"\nAll numbers: {folder / RESULT_NAME}    Picture: {folder / PLOT_NAME}")
    return result


def run(
    contestant: Contestant, path: str, settings: Settings, features_cost: Cost, test: LabelledText
) -> dict[str, Any]:
    """What a contestant took and gave; where it could not run, "said" tells why and there are no numbers."""
    entry: dict[str, Any] = {"name": contestant.name, "group": contestant.group, "on_features": contestant.on_features}
    if contestant.missing:
        return entry | {"said": f"not run: {contestant.missing} is not installed: pip install 'linpass[compare]'"}
    print(f"  {contestant.name} ...", flush=True)
    names = (*contestant.inputs, "train_labels")
    try:
        (logits_NC, passes), cost = measured(
            partial(load_tensors, path, names, contestant.warm_up), partial(_fit, contestant.fit, settings)
        )
    except InputError as error:
        return entry | {"said": f"not run: {error}"}
    features_seconds = features_cost.seconds if contestant.on_features else 0.0
    return entry | {
        "passes": passes,
        **asdict(cost),
        "total_seconds": cost.seconds + features_seconds,
        **scores(logits_NC, torch.tensor(test.labels)),
    }


def scores(logits_NC: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Accuracy and its standard error, expected calibration error in 15 bins, log loss in nats."""
    accuracy = (logits_NC.argmax(1) == labels_N).double().mean().item()
    return {
        "accuracy": accuracy,
        "accuracy_standard_error": math.sqrt(accuracy * (1 - accuracy) / len(labels_N)),
        "expected_calibration_error": expected_calibration_error(logits_NC.double().softmax(1), labels_N, bins=15),
        "log_loss": log_loss(logits_NC, labels_N),
    }


def write_tensors(
    train: LabelledText, test: LabelledText, max_length: int, path: str, quiet: bool, loaded: tuple[Any, Any]
) -> int:
    """Write features, token ids and labels of all rows to a safetensors file; returns the number of features."""
    model, tokenizer = loaded
    tensors = {"train_labels": torch.tensor(train.labels)}
    for side, rows in (("train", train), ("test", test)):
        token_ids = encode(rows.texts, tokenizer, max_length)
        tensors[f"{side}_features"] = mean_features(model, token_ids, tokenizer.pad_token_id, quiet)
        tensors[f"{side}_lengths"] = torch.tensor([len(ids) for ids in token_ids])
        filled = [[*ids, *[0] * (max_length - len(ids))] for ids in token_ids]
        tensors[f"{side}_ids"] = torch.tensor(filled)
    save_file(tensors, path)
    return tensors["train_features"].shape[1]


def load_tensors(path: str, names: Sequence[str], warm_up: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of these names; the modules of ``warm_up`` are imported."""
    for name in warm_up:
        __import__(name)
    with safe_open(path, "pt") as file:
        # A copy: what is mapped into memory would be read from disk while the time runs.
        return {name: file.get_tensor(name).clone() for name in names}


def _load(encoder: str) -> tuple[Any, Any]:
    logging.disable_progress_bar()  # of this process
    return load_encoder(encoder)


def _fit(fit: Any, settings: Settings, rows: dict[str, Tensor]) -> tuple[Tensor, str]:
    return fit(rows, settings)


def _majority(train: LabelledText, test: LabelledText) -> float:
    """Accuracy of always saying the class that most training rows have."""
    most = max(range(len(train.classes)), key=train.labels.count)
    return test.labels.count(most) / len(test)
