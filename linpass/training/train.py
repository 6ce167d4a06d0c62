"""One training run: from arguments to a saved model that has been compared with two baselines."""

import copy
import math
import os
import shutil
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer, set_seed

from linpass import LinformerConfig, LinformerForCausalLM
from linpass.errors import InputError
from linpass.training import data
from linpass.training.arguments import DataArguments, ModelArguments
from linpass.training.baselines import tuned_losses
from linpass.training.parser import TrainingArguments

PLOT_NAME = "training_loss_plot.png"
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass
class TrainingResult:
    """Perplexities on the same validation tokens, the tokens predicted, and a text that the model wrote."""

    perplexity: float
    unigram_perplexity: float
    bigram_perplexity: float
    validation_tokens: int
    sample: str


def train(
    model_arguments: ModelArguments, data_arguments: DataArguments, training_arguments: TrainingArguments
) -> TrainingResult:
    """Train a causal Linformer and save model, tokenizer and loss plot to ``training_arguments.output_dir``.

    Everything that can be refused is refused before the first step; the folder appears when it is complete.

    Raises:
        InputError: an argument, a file or a folder cannot be used.
    """
    if find_spec("matplotlib") is None:
        raise InputError("linpass train needs matplotlib: pip install 'linpass[train]'")
    from linpass.training.callbacks import LossPlot

    config = build_config(model_arguments)
    check_numbers(training_arguments)
    output = Path(training_arguments.output_dir).expanduser().resolve()
    check_output_folder(output)
    check_checkpoint_folder(Path(training_arguments.checkpoint_dir).expanduser().resolve())
    if data_arguments.text_files is not None:
        data.check_text_files(data_arguments.text_files)

    set_seed(training_arguments.seed)
    tokenizer, train_CN, validation_CN = prepare_data(config, data_arguments, training_arguments.seed)
    adopt_token_ids(config, tokenizer)
    model = LinformerForCausalLM(config)
    say(training_arguments, f"{model.num_parameters():,} parameters; {describe(train_CN, validation_CN)}")

    trainer_arguments = copy.copy(training_arguments)
    trainer_arguments.output_dir = training_arguments.checkpoint_dir  # output_dir is only for the finished model
    output.parent.mkdir(parents=True, exist_ok=True)
    plot = output.parent / PLOT_NAME
    trainer = Trainer(
        model=model,
        args=trainer_arguments,
        train_dataset=data.ChunkDataset(train_CN),
        eval_dataset=data.ChunkDataset(validation_CN),
        processing_class=tokenizer,
        callbacks=[LossPlot(plot)],
    )
    trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    loss = trainer.evaluate()["eval_loss"]
    save_finished_model(trainer, model, output, plot)
    unigram, bigram = tuned_losses(train_CN, validation_CN, len(tokenizer))
    result = TrainingResult(
        perplexity=math.exp(loss),
        unigram_perplexity=math.exp(unigram),
        bigram_perplexity=math.exp(bigram),
        validation_tokens=validation_CN[:, 1:].numel(),
        sample=write_sample(model, tokenizer, validation_CN[0]),
    )
    say(training_arguments, report(result, training_arguments.output_dir, plot))
    return result


def build_config(arguments: ModelArguments) -> LinformerConfig:
    """The configuration, or InputError with its message on one line."""
    if not arguments.causal:
        raise InputError("causal=False must be True: linpass train predicts the next token, an encoder would see it")
    try:
        values: dict[str, Any] = asdict(arguments) | special_ids(arguments)
        return LinformerConfig(**values)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    except Exception as error:
        # huggingface_hub wraps what a field's own check raises; the wrapper's class is no public name of every version
        if type(error).__module__.startswith("huggingface_hub."):
            raise InputError(str(error)) from error
        raise


def check_numbers(arguments: TrainingArguments) -> None:
    """Raise InputError for what the Trainer would stumble over only after the text has been read."""
    rules = {
        "learning_rate": (0 <= arguments.learning_rate < math.inf, "0 or more, and finite"),
        "per_device_train_batch_size": (arguments.per_device_train_batch_size >= 1, "1 or more"),
        "per_device_eval_batch_size": (arguments.per_device_eval_batch_size >= 1, "1 or more"),
        "gradient_accumulation_steps": (arguments.gradient_accumulation_steps >= 1, "1 or more"),
        "num_train_epochs": (arguments.max_steps > 0 or 0 < arguments.num_train_epochs < math.inf, "more than 0"),
        "seed": (0 <= arguments.seed < 2**32, "0 or more and less than 2**32"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise InputError(f"{name}={getattr(arguments, name)} must be {rule}")
    resume = arguments.resume_from_checkpoint
    if isinstance(resume, str) and not Path(resume).expanduser().is_dir():
        raise InputError(f"resume_from_checkpoint={resume!r} must be a folder with a checkpoint")


# What a saved model consists of: a folder that holds anything else is not replaced.
MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "*_linformer.py"),
    *(
        "tokenizer*.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "chat_template.jinja",
    ),
    *("README.md", PLOT_NAME),
)


def check_output_folder(output: Path) -> None:
    """Raise InputError when the finished model could not be put at ``output``, or would destroy other files there."""
    if output.exists() and not output.is_dir():
        raise InputError(f"output_dir={str(output)!r} must be a folder; a file is in the way")
    if Path.cwd().is_relative_to(output):
        raise InputError(f"output_dir={str(output)!r} must not be the current folder or one above it")
    files = sorted(output.iterdir()) if output.is_dir() else []
    others = [file.name for file in files if not any(fnmatch(file.name, pattern) for pattern in MODEL_FILES)]
    if others or (files and not (output / "config.json").is_file()):
        held = others or [file.name for file in files]
        raise InputError(
            f"output_dir={str(output)!r} must be new, empty or a saved model to replace; it holds {', '.join(held[:3])}"
        )
    _check_writable("output_dir", output.parent)
    if (output.parent / PLOT_NAME).is_dir():
        raise InputError(f"output_dir={str(output)!r}: {PLOT_NAME} beside it must not be a folder")


def check_checkpoint_folder(folder: Path) -> None:
    """Raise InputError when the Trainer could not write checkpoints to ``folder``."""
    _check_writable("checkpoint_dir", folder)


def _check_writable(name: str, folder: Path) -> None:
    nearest = next(f for f in (folder, *folder.parents) if f.exists())
    if not nearest.is_dir():
        raise InputError(f"{name}: {str(folder)!r} must be a folder; {str(nearest)!r} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{name}: {str(nearest)!r} must be writable")


def prepare_data(
    config: LinformerConfig, arguments: DataArguments, seed: int
) -> tuple[PreTrainedTokenizerBase, torch.Tensor, torch.Tensor]:
    """The tokenizer, and the token ids of training and validation, [chunks, seq_length]."""
    tokenizer = None
    if arguments.tokenizer is not None:  # first, because it may be refused and reading the text may take long
        tokenizer = data.load_tokenizer(arguments.tokenizer, config.vocab_size)
    documents = data.load_documents(arguments)
    train_texts, validation_texts = data.split_documents(documents, arguments.validation_fraction, seed)
    if tokenizer is None:
        tokenizer = data.train_tokenizer(train_texts, config.vocab_size)
    tokenizer.model_max_length = config.seq_length
    train_CN = data.chunk_documents(train_texts, tokenizer, config.seq_length, "training")
    validation_CN = data.chunk_documents(validation_texts, tokenizer, config.seq_length, "validation")
    return tokenizer, train_CN, validation_CN


def special_ids(arguments: ModelArguments) -> dict[str, int | list[int] | None]:
    """The special ids that were asked for; None where the default, GPT-2's, stands: those will be the tokenizer's."""
    defaults = {f.name: f.default for f in fields(ModelArguments)}
    given = {name: getattr(arguments, name) for name in SPECIAL_IDS}
    return {name: None if value == defaults[name] else value for name, value in given.items()}


def adopt_token_ids(config: LinformerConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the configuration the tokenizer's special ids where none were asked for."""
    for name in SPECIAL_IDS:
        if getattr(config, name) is None:
            setattr(config, name, getattr(tokenizer, name))


def save_finished_model(trainer: Trainer, model: LinformerForCausalLM, output: Path, plot: Path) -> None:
    """Write model, tokenizer and plot to a sibling of ``output``, then put it in the place of an older model."""
    partial = output.with_name(f".{output.name}.incomplete")
    older = output.with_name(f".{output.name}.older")
    if trainer.is_world_process_zero():
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was stopped here
        shutil.rmtree(older, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    model.config.use_cache = True  # the Trainer switched it off for the training
    trainer.save_model(str(partial))
    if not trainer.is_world_process_zero():
        return
    (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle that no reader of the model needs
    shutil.copy(plot, partial / PLOT_NAME)
    if output.exists():
        output.rename(older)
    partial.rename(output)
    shutil.rmtree(older, ignore_errors=True)
    # Without checkpoints the Trainer leaves its folder empty.
    checkpoints = Path(str(trainer.args.output_dir))
    for folder in (checkpoints, checkpoints.parent):
        if checkpoints.parent.name == "trainer_output" and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def write_sample(model: Any, tokenizer: PreTrainedTokenizerBase, tokens_N: torch.Tensor) -> str:
    """The start of a validation chunk and the model's own continuation, with the border marked."""
    prompt = tokens_N[: len(tokens_N) // 8 or 1].to(model.device).unsqueeze(0)
    new_tokens = min(64, len(tokens_N) - prompt.shape[1])
    model.eval()
    # The seed is of the run: generate draws from torch's generator, which set_seed started.
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=0.8,
        top_k=50,
    )[0]
    split = prompt.shape[1]
    return f"{tokenizer.decode(output[:split])} >>> {tokenizer.decode(output[split:], skip_special_tokens=True)}"


def describe(train_CN: torch.Tensor, validation_CN: torch.Tensor) -> str:
    """The size of the data in words."""
    return f"{train_CN.numel():,} training tokens, {validation_CN.numel():,} validation tokens"


def report(result: TrainingResult, output_dir: str, plot: Path) -> str:
    """What the command prints at its end."""
    return "\n".join(
        [
            "",
            f"Validation perplexity on the same {result.validation_tokens:,} tokens:",
            f"  unigram    {result.unigram_perplexity:8.2f}",
            f"  bigram     {result.bigram_perplexity:8.2f}",
            f"  Linformer  {result.perplexity:8.2f}",
            "",
            f"A prompt from the validation text >>> what the model writes:\n{result.sample}",
            "",
            f"Model and tokenizer: {output_dir}    Losses: {plot}",
            f'Go on: linpass generate {output_dir} "The following example"',
        ]
    )


def say(arguments: TrainingArguments, text: str) -> None:
    """Print once, not once per process."""
    if arguments.process_index == 0:
        print(text, flush=True)
