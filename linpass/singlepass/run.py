"""``linpass train --method single-pass``: rows and an encoder to a saved classifier, in one pass."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from linpass.errors import InputError
from linpass.singlepass.card import write_card
from linpass.singlepass.command_arguments import SourceArguments
from linpass.singlepass.command_parser import SinglePassRunArguments
from linpass.singlepass.labelled_text import LabelledText
from linpass.singlepass.sources import (
    DEFAULT_ROWS,
    check_sources,
    encode,
    find_encoder,
    load_encoder,
    read_rows,
    row_length,
)
from linpass.singlepass.trainer import SinglePassTrainer
from linpass.training.output_folder import check_checkpoint_folder, check_output_folder, save_finished_model

MATCHES_OF_EPOCHS = ("gd", "sgd", "batch_aware")


@dataclass(frozen=True)
class RunResult:
    """What a run measured: on the test rows accuracy, its standard error and the mean loss; seconds of the pass."""

    accuracy: float
    accuracy_standard_error: float
    loss: float
    seconds: float
    train_rows: int
    test_rows: int


def train_single_pass(sources: SourceArguments, arguments: SinglePassRunArguments) -> RunResult | None:
    """Fit a head to a frozen encoder, measure it, and save it with its tokenizer and card to ``output_dir``.

    Everything that can be refused is refused before the pass; the folder appears when it is complete.

    Returns:
        None when a signal stopped the pass; it goes on from its checkpoint with ``--resume_from_checkpoint``.
    Raises:
        InputError: an argument, a file, a folder or a data set cannot be used.
    """
    output = Path(arguments.output_dir).expanduser().resolve()
    checkpoints = Path(arguments.checkpoint_dir).expanduser().resolve()
    check_output_folder(output)
    check_checkpoint_folder(checkpoints)
    check_sources(sources)
    if arguments.sample_weight_column is not None:
        raise InputError(
            f"sample_weight_column={arguments.sample_weight_column!r}: the rows of this command are texts and labels; "
            "weights are for SinglePassTrainer in Python"
        )
    repo_id = _checked_repo(arguments, output)
    say(arguments, settings_without_meaning(arguments))
    quiet = arguments.disable_tqdm or arguments.process_index != 0
    set_seed(arguments.seed)
    logging.disable_progress_bar()  # "Loading weights" would stand between the others
    with arguments.main_process_first(desc="rows and encoder"):
        train, test = read_rows(sources, arguments.seed, quiet)
        encoder = find_encoder(sources, train, quiet)
    model, tokenizer = load_encoder(encoder)
    model.config.id2label = dict(enumerate(train.classes))
    model.config.label2id = {name: number for number, name in enumerate(train.classes)}
    length = row_length(model, sources.max_length)
    tokenizer.model_max_length = length
    trainer_arguments = copy.copy(arguments)
    trainer_arguments.output_dir = str(checkpoints)  # output_dir is only for the finished model
    trainer_arguments.push_to_hub = False  # so is the Hub
    trainer = SinglePassTrainer(
        model=model,
        args=trainer_arguments,
        train_dataset=token_rows(train, tokenizer, length),
        eval_dataset=token_rows(test, tokenizer, length),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    outcome = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    if trainer.solution is None:
        last = checkpoints / f"checkpoint-{trainer.state.global_step}"
        say(arguments, f"Stopped; go on with the same command and --resume_from_checkpoint {last}")
        return None
    metrics = trainer.evaluate()
    share = metrics["eval_accuracy"]
    result = RunResult(
        accuracy=share,
        accuracy_standard_error=(share * (1 - share) / len(test)) ** 0.5,
        loss=metrics["eval_loss"],
        seconds=outcome.metrics["train_runtime"],
        train_rows=trainer.rows,
        test_rows=len(test),
    )
    if repo_id is not None:
        trainer.hub_model_id = repo_id  # the card says how to load it from there
    facts = {"model_name": output.name, "dataset": data_name(sources)}
    save_finished_model(trainer, output, [], lambda folder: write_card(folder, trainer, **facts))
    if checkpoints.is_dir() and not any(checkpoints.iterdir()) and trainer.is_world_process_zero():
        checkpoints.rmdir()  # the Trainer made it and had nothing to put there
        if not any(checkpoints.parent.iterdir()):
            checkpoints.parent.rmdir()
    say(arguments, report(result, arguments.output_dir, test))
    if repo_id is not None and trainer.is_world_process_zero():
        from linpass.training.hub import push_folder

        say(arguments, f"Pushed to {push_folder(output, repo_id, arguments.hub_token, arguments.hub_revision)}")
    return result


def settings_without_meaning(arguments: SinglePassRunArguments) -> str:
    """Which of the settings change the result, in a sentence."""
    epochs, rate = arguments.num_train_epochs, arguments.learning_rate
    if arguments.match in MATCHES_OF_EPOCHS:
        return (
            f"match={arguments.match}: one pass; the result is that of {epochs:g} epochs with learning rate {rate:g}"
            f"{'' if arguments.match == 'gd' else f' in batches of {arguments.train_batch_size}'}."
        )
    return (
        f"match={arguments.match}: one pass and one solve. epochs={epochs:g} and learning_rate={rate:g} have no part "
        f"in the result; --match {', '.join(MATCHES_OF_EPOCHS)} use them."
    )


def token_rows(rows: LabelledText, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    """What the Trainer takes: token ids, an attention mask and a label per row."""
    return [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label}
        for ids, label in zip(encode(rows.texts, tokenizer, max_length), rows.labels, strict=True)
    ]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the rows whose highest logit is that of their class."""
    logits: Any = prediction.predictions
    return {"accuracy": float((np.argmax(logits, axis=1) == prediction.label_ids).mean())}


def data_name(sources: SourceArguments) -> str:
    """What the rows are called."""
    return sources.dataset or ", ".join(Path(name).name for name in sources.text_files or ()) or DEFAULT_ROWS


def report(result: RunResult, output_dir: str, test: LabelledText) -> str:
    """What the command prints at its end."""
    most = max(test.labels.count(label) for label in range(len(test.classes))) / len(test)
    return "\n".join(
        [
            "",
            f"{100 * result.accuracy:.2f} ± {100 * result.accuracy_standard_error:.2f} % of {result.test_rows:,} test "
            f"rows are right (one standard error; the most frequent class alone: {100 * most:.1f} %).",
            f"One pass over {result.train_rows:,} rows took {result.seconds:.1f} s. All files: {output_dir}",
            "",
            "Use it:",
            *(f"  {line}" for line in _usage(output_dir)),
        ]
    )


def say(arguments: SinglePassRunArguments, text: str) -> None:
    """Print once, not once per process."""
    if arguments.process_index == 0:
        print(text, flush=True)


def _usage(model: str) -> list[str]:
    return [
        "from transformers import pipeline",
        f'classify = pipeline("text-classification", model="{model}", trust_remote_code=True)',
        'classify("Computes the gradient of the current tensor.")',
    ]


def _checked_repo(arguments: SinglePassRunArguments, output: Path) -> str | None:
    if arguments.resume_from_checkpoint and not Path(arguments.resume_from_checkpoint).is_dir():
        raise InputError(f"resume_from_checkpoint={arguments.resume_from_checkpoint!r} must be a folder")
    if not arguments.push_to_hub or arguments.process_index != 0:
        return None
    from linpass.training.hub import check_hub

    return check_hub(
        arguments.hub_model_id, output, arguments.hub_token, arguments.hub_private_repo, arguments.hub_revision
    )
