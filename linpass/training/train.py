"""One training run: from arguments to a saved model that has been compared with two baselines."""

import copy
import math
import platform
import shutil
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import TrainOutput

from linpass import LinformerConfig
from linpass.errors import InputError
from linpass.training.architectures import build_model
from linpass.training.arguments import ModelArguments
from linpass.training.baselines import Text, tuned_losses
from linpass.training.checkpoints import check_checkpoint, describe_run
from linpass.training.collators import DynamicChunkingCollator
from linpass.training.losses import restore_forward
from linpass.training.output_folder import (
    LOG_NAME,
    PLOT_NAME,
    SAMPLES_NAME,
    check_checkpoint_folder,
    check_output_folder,
    holds_model,
    save_finished_model,
)
from linpass.training.parser import Run, TrainingArguments
from linpass.training.preparation import PreparedData, check_data, prepare_data
from linpass.training.sampling import ChunkBorders, ChunkDataset
from linpass.training.trainer import LanguageModelTrainer

SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
BASELINE_TOKENS = 50_000_000  # enough for a bigram model; counting more pairs would take memory


@dataclass
class TrainingResult:
    """Perplexities on the same validation tokens, the tokens predicted, and a text that the model wrote.

    The baselines are of causal models; they and the sample are None with the masked objective.
    """

    perplexity: float
    unigram_perplexity: float | None
    bigram_perplexity: float | None
    validation_tokens: int
    sample: str | None


def train(run: Run) -> TrainingResult | None:
    """Train a model and save it with tokenizer, log, picture and card to ``run.training.output_dir``.

    Everything that can be refused is refused before the first step; the folder appears when it is complete.

    Returns:
        None when a signal stopped the run; it goes on from its checkpoint with ``--resume``.

    Raises:
        InputError: an argument, a file, a folder or a data set cannot be used.
        DivergedError: the loss is no number any more.
    """
    arguments = run.training
    output, checkpoints, repo_id = check_run(run)
    config = build_config(run)
    set_seed(arguments.seed)
    data = prepare_data(
        run.data,
        config.vocab_size,
        arguments.seed,
        mask=run.chunks.objective == "masked",
        first=lambda: arguments.main_process_first(desc="token ids"),
        quiet=arguments.disable_tqdm or arguments.process_index != 0,
    )
    adopt_tokenizer(config, data.tokenizer)
    model: Any = build_model(arguments.architecture, config, run.chunks.objective)
    trainer = build_trainer(run, model, data)
    say(arguments, f"{model.num_parameters():,} parameters; {describe(data)}")
    if arguments.world_size == 1 and torch.cuda.device_count() > 1:
        gpus = torch.cuda.device_count()
        say(arguments, f"One of {gpus} GPUs is used; all: torchrun --nproc_per_node {gpus} --no-python linpass train")

    add_callbacks(trainer, run, checkpoints)
    outcome = trainer.train(resume_from_checkpoint=where_to_start(run, trainer))
    if trainer.stopped:
        say(arguments, f"Stopped with {trainer.saved_checkpoint}; go on with the same command and --resume")
        return None
    metrics = last_evaluation(trainer) or trainer.evaluate()
    restore_forward(model)
    model.config.use_cache = True  # the Trainer switched it off for the training
    result = compare(run, trainer, data, metrics)
    files = [checkpoints / name for name in (LOG_NAME, PLOT_NAME, SAMPLES_NAME)]
    save_finished_model(
        trainer, output, files, lambda folder: write_run_card(folder, run, trainer, data, outcome, result, repo_id)
    )
    if trainer.is_world_process_zero():
        shutil.copy(checkpoints / PLOT_NAME, output.parent / PLOT_NAME)  # where people look first
    say(arguments, report(result, run, output.parent / PLOT_NAME))
    if repo_id is not None and trainer.is_world_process_zero():
        from linpass.training.hub import push_folder

        say(arguments, f"Pushed to {push_folder(output, repo_id, arguments.hub_token, arguments.hub_revision)}")
    return result


def check_run(run: Run) -> tuple[Path, Path, str | None]:
    """Refuse what can be refused before anything is read; the output folder, the checkpoint folder, the Hub's name.

    Raises:
        InputError: an argument, a file or a folder cannot be used.
    """
    arguments = run.training
    if find_spec("matplotlib") is None:
        raise InputError("linpass train needs matplotlib: pip install 'linpass[train]'")
    build_config(run)
    check_numbers(arguments)
    if run.chunks.packing and arguments.architecture != "linformer":
        raise InputError(f"packing=True needs architecture linformer, not {arguments.architecture!r}")
    if run.chunks.objective == "masked" and arguments.architecture != "linformer":
        raise InputError(f"objective='masked' needs architecture linformer, not {arguments.architecture!r}")
    if arguments.sample_prompts and run.chunks.objective == "masked":
        raise InputError("sample_prompts needs objective causal: an encoder does not continue texts")
    if not all(prompt.strip() for prompt in arguments.sample_prompts or ()):
        raise InputError(f"sample_prompts={arguments.sample_prompts} must be texts to continue")
    output = Path(arguments.output_dir).expanduser().resolve()
    checkpoints = Path(arguments.checkpoint_dir).expanduser().resolve()
    check_output_folder(output)
    check_checkpoint_folder(checkpoints)
    check_data(run.data)
    if isinstance(arguments.resume_from_checkpoint, str):
        check_checkpoint(Path(arguments.resume_from_checkpoint).expanduser())
    repo_id = None
    if arguments.push_to_hub and arguments.process_index == 0:
        from linpass.training.hub import check_hub

        repo_id = check_hub(
            arguments.hub_model_id, output, arguments.hub_token, arguments.hub_private_repo, arguments.hub_revision
        )
    return output, checkpoints, repo_id


def build_config(run: Run) -> LinformerConfig:
    """The configuration of the Linformer, or of the one whose size the baseline has; InputError where it is refused."""
    causal = run.chunks.objective == "causal"
    if causal and not run.model.causal:
        raise InputError("causal=False needs --objective masked: an encoder sees the token that it would predict")
    try:
        values: dict[str, Any] = asdict(run.model) | special_ids(run.model) | {"causal": causal}
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
        "label_smoothing_factor": (0 <= arguments.label_smoothing_factor < 1, "0 or more and less than 1"),
        "sample_steps": (arguments.sample_steps >= 1, "1 or more"),
        "plot_steps": (arguments.plot_steps is None or arguments.plot_steps >= 1, "1 or more, or none"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise InputError(f"{name}={getattr(arguments, name)} must be {rule}")


def special_ids(arguments: ModelArguments) -> dict[str, int | list[int] | None]:
    """The special ids that were asked for; None where the default, GPT-2's, stands: those will be the tokenizer's."""
    defaults = {f.name: f.default for f in fields(ModelArguments)}
    given = {name: getattr(arguments, name) for name in SPECIAL_IDS}
    return {name: None if value == defaults[name] else value for name, value in given.items()}


def adopt_tokenizer(config: LinformerConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the configuration the tokenizer's special ids, and room for its mask token.

    Raises:
        InputError: another id was asked for: the Trainer would put the tokenizer's in its place.
    """
    for name in SPECIAL_IDS:
        asked, there = getattr(config, name), getattr(tokenizer, name)
        if asked is not None and asked != there:
            raise InputError(f"{name}={asked} must be {there}, the id of the tokenizer; leave the flag away")
        setattr(config, name, there)
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    tokenizer.model_max_length = config.seq_length


def build_trainer(run: Run, model: Any, data: PreparedData) -> LanguageModelTrainer:
    """The Trainer of a run, its data sets and collator; no callbacks yet."""
    arguments, chunks = copy.copy(run.training), run.chunks
    arguments.output_dir = run.training.checkpoint_dir  # output_dir is only for the finished model
    arguments.push_to_hub = False  # so is the Hub
    seq_length = run.model.seq_length
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    collator = DynamicChunkingCollator(
        data.tokenizer,
        seq_length,
        objective=chunks.objective,
        packing=chunks.packing,
        block_size=run.model.block_size,
        deletion_probability=chunks.deletion_probability,
        swap_probability=chunks.swap_probability,
        noise_target=chunks.noise_target,
        mask_probability=chunks.mask_probability,
        pad_to_multiple_of=seq_length if arguments.torch_compile else 64,  # one shape compiles once
        seed=seed,
    )
    most: Any = chunks.chunks_per_document  # a number or None once it has been read
    borders = ChunkBorders(seq_length, most, seed)
    train_set = ChunkDataset(data.train, borders, data.train.lengths)
    validation_set = ChunkDataset(data.validation, borders, data.validation.lengths, random=False)
    for part, dataset in (("training", train_set), ("validation", validation_set)):
        if not (dataset.lengths > 1).any():
            raise InputError(f"the {part} text must hold at least one document of two tokens; give more text")
    identity = describe_run(
        model.config,
        arguments,
        {"data": data.fingerprint(), "chunks": asdict(chunks), "mixing_weights": run.data.mixing_weights},
        data.tokenizer,
    )
    return LanguageModelTrainer(
        model=model,
        args=arguments,
        run_identity=identity,
        train_dataset=train_set,
        eval_dataset=validation_set,
        data_collator=collator,
        processing_class=data.tokenizer,
        pack_block=run.model.block_size if chunks.packing else None,
        corpus=data.train.store,
        mixing_weights=run.data.mixing_weights,
    )


def add_callbacks(trainer: LanguageModelTrainer, run: Run, checkpoints: Path) -> None:
    """Log, picture, speed and samples."""
    from linpass.training.callbacks import LossLoggerCallback, SampleTextCallback, ThroughputCallback
    from linpass.training.flops import flops_per_token

    arguments = trainer.args
    throughput = ThroughputCallback(tokens_per_step(trainer), flops_per_token(trainer.model, run.model.seq_length))
    throughput.add_to(trainer)
    trainer.add_callback(
        LossLoggerCallback(
            checkpoints / LOG_NAME, checkpoints / PLOT_NAME, run.training.plot_steps, run.training.plot_scale
        )
    )
    if run.training.sample_prompts:
        trainer.add_callback(
            SampleTextCallback(
                trainer.processing_class,
                run.training.sample_prompts,
                run.training.sample_steps,
                seed=arguments.seed,
                output_path=checkpoints / SAMPLES_NAME,
            )
        )


def tokens_per_step(trainer: LanguageModelTrainer) -> int:
    """Real tokens of an optimizer step, all processes together: the mean over an epoch, padding not counted."""
    sampler: Any = trainer._get_train_sampler()
    dataset: Any = trainer.train_dataset
    epoch_tokens = dataset.chunk_lengths(range(min(len(dataset), 100_000))).mean() * len(dataset)
    rows = trainer._train_batch_size * trainer.args.world_size * trainer.args.gradient_accumulation_steps
    return max(1, round(epoch_tokens / len(sampler) * rows))


def where_to_start(run: Run, trainer: LanguageModelTrainer) -> str | Path | None:
    """The checkpoint to go on from, None for the beginning.

    Raises:
        InputError: nothing to go on from, and a model that the beginning would end up replacing: a completed run has no
            checkpoints any more.
    """
    arguments = run.training
    if not arguments.resume:
        return arguments.resume_from_checkpoint
    found = trainer.find_checkpoint()
    if found is None and holds_model(Path(arguments.output_dir).expanduser()):
        raise InputError(
            f"resume: {arguments.checkpoint_dir!r} holds no complete checkpoint, and output_dir="
            f"{arguments.output_dir!r} a finished model; leave --resume out to train it anew"
        )
    if found is None:
        say(arguments, f"resume: no complete checkpoint in {arguments.checkpoint_dir}; this run begins at step 0")
    return found


def last_evaluation(trainer: LanguageModelTrainer) -> dict[str, float] | None:
    """What was measured after the last step, if it was, and if the model is still the one of that step."""
    if trainer.args.load_best_model_at_end:
        return None
    step = trainer.state.global_step
    return next((e for e in reversed(trainer.state.log_history) if "eval_loss" in e and e["step"] == step), None)


def compare(run: Run, trainer: LanguageModelTrainer, data: PreparedData, metrics: dict[str, float]) -> TrainingResult:
    """The perplexities, the baselines' on the same tokens, and a sample of what the model writes."""
    unigram = bigram = sample = None
    if run.chunks.objective == "causal":
        dataset: Any = trainer.eval_dataset
        spans = (chunk for row in dataset for chunk in row)
        validation = Text.of(chunk["input_ids"][slice(*chunk["span"])] for chunk in spans)
        losses = tuned_losses(Text.of(data.train, BASELINE_TOKENS), validation, len(data.tokenizer))
        unigram, bigram = (math.exp(loss) for loss in losses)
        longest = max(range(min(len(dataset), 100)), key=lambda number: int(dataset.chunk_lengths(number)))
        (chunk,) = dataset[longest]
        sample = write_sample(trainer, data.tokenizer, chunk["input_ids"][slice(*chunk["span"])])
    return TrainingResult(
        perplexity=metrics["eval_perplexity"],
        unigram_perplexity=unigram,
        bigram_perplexity=bigram,
        validation_tokens=int(metrics["eval_tokens"]),
        sample=sample,
    )


def write_sample(trainer: LanguageModelTrainer, tokenizer: PreTrainedTokenizerBase, tokens_N: Any) -> str | None:
    """The start of a validation chunk and the model's own continuation, with the border marked.

    None where the weights are spread over processes.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    model: Any = trainer.model
    prompt = torch.from_numpy(tokens_N[: len(tokens_N) // 8 or 1].astype("int64")).to(model.device).unsqueeze(0)
    new_tokens = max(1, min(64, len(tokens_N) - prompt.shape[1]))
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


def write_run_card(
    folder: Path,
    run: Run,
    trainer: LanguageModelTrainer,
    data: PreparedData,
    outcome: TrainOutput,
    result: TrainingResult,
    repo_id: str | None,
) -> None:
    """The model card, from what was measured in this run."""
    from linpass.training import card

    names = {"unigram": result.unigram_perplexity, "bigram": result.bigram_perplexity}
    seconds = outcome.metrics["train_runtime"]
    steps = trainer.state.global_step
    tokens_seen = tokens_per_step(trainer) * steps
    model: Any = trainer.model
    facts = card.RunFacts(
        name=Path(run.training.output_dir).expanduser().resolve().name,
        repo_id=repo_id,
        revision=run.training.hub_revision,
        model_type=model.config.model_type,
        causal=run.chunks.objective == "causal",
        parameters=model.num_parameters(),
        seq_length=run.model.seq_length,
        corpora=[
            card.Corpus(
                name=corpus["corpus"],
                documents=corpus["documents"],
                tokens=corpus["tokens"],
                on_hub=corpus["corpus"] in (run.data.datasets or ()) and not Path(corpus["corpus"]).exists(),
            )
            for corpus in data.corpora
        ],
        tokens_seen=tokens_seen,
        validation_tokens=result.validation_tokens,
        validation_files=data.validation_files,
        train_loss=outcome.training_loss,
        validation_loss=math.log(result.perplexity),
        baselines={name: value for name, value in names.items() if value is not None},
        steps=steps,
        epochs=trainer.state.epoch or 0.0,
        seconds=seconds,
        tokens_per_second=tokens_seen / seconds,
        hardware=hardware(trainer),
        hyperparameters=card.hyperparameter_rows(trainer.args),
        architecture=card.architecture_rows(model.config),
        versions=card.package_versions(),
        sample=result.sample,
    )
    card.write_card(folder, facts)


def hardware(trainer: LanguageModelTrainer) -> str:
    """The devices of the run in words."""
    if trainer.args.device.type == "cuda":
        return f"{trainer.args.world_size} × {torch.cuda.get_device_name()}"
    return f"{trainer.args.world_size} × CPU, {torch.get_num_threads()} threads ({platform.machine()})"


def describe(data: PreparedData) -> str:
    """The size of the data in words."""
    return (
        f"{len(data.train):,} documents of {int(data.train.lengths.sum()):,} tokens for training, "
        f"{len(data.validation):,} of {int(data.validation.lengths.sum()):,} for validation"
    )


def report(result: TrainingResult, run: Run, plot: Path) -> str:
    """What the command prints at its end."""
    output_dir, name = run.training.output_dir, run.training.architecture
    perplexities = {
        "unigram": result.unigram_perplexity,
        "bigram": result.bigram_perplexity,
        {"linformer": "Linformer", "gpt2": "GPT-2", "llama": "Llama"}[name]: result.perplexity,
    }
    lines = ["", f"Validation perplexity on the same {result.validation_tokens:,} tokens:"]
    lines += [f"  {name:<10} {value:8.2f}" for name, value in perplexities.items() if value is not None]
    if result.sample is not None:
        lines += ["", f"A prompt from the validation text >>> what the model writes:\n{result.sample}"]
    lines += ["", f"Model, tokenizer, log and card: {output_dir}    Losses: {plot}"]
    if run.chunks.objective == "causal":
        lines.append(f'Go on: linpass generate {output_dir} "The following example"')
    return "\n".join(lines)


def say(arguments: TrainingArguments, text: str) -> None:
    """Print once, not once per process."""
    if arguments.process_index == 0:
        print(text, flush=True)
