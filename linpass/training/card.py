"""The model card, README.md of a finished model: the numbers of its run, how to load it, what it cannot do."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from linpass import __version__

MOST_ROWS = 20  # of the table of training data
CITATION = """@article{wang2020linformer,
  title   = {Linformer: Self-Attention with Linear Complexity},
  author  = {Wang, Sinong and Li, Belinda Z. and Khabsa, Madian and Fang, Han and Ma, Hao},
  journal = {arXiv preprint arXiv:2006.04768},
  year    = {2020}
}"""


@dataclass(kw_only=True)
class Corpus:
    """A source of training text; None is what was not counted."""

    name: str
    documents: int | None = None
    tokens: int | None = None
    on_hub: bool = False  # `name` is that of a data set on the Hub


@dataclass(kw_only=True)
class RunFacts:
    """What a card tells about a run.

    Losses are in nats per token, ``seconds`` the time of the training, ``tokens_seen`` counts a token once per epoch.
    ``baselines`` are perplexities by name on the same validation tokens. ``architecture`` and ``hyperparameters`` are
    rows of a table, see :func:`architecture_rows` and :func:`hyperparameter_rows`.
    """

    name: str
    repo_id: str | None = None  # OWNER/NAME on the Hub; None: the folder `name`
    revision: str | None = None
    model_type: str = "linformer"
    causal: bool = True
    parameters: int
    seq_length: int
    corpora: list[Corpus]
    tokens_seen: int
    validation_tokens: int
    validation_files: list[str] = field(default_factory=list)  # names; none: held out of the corpora
    train_loss: float
    validation_loss: float
    bits_per_byte: float | None = None
    baselines: dict[str, float] = field(default_factory=dict)
    steps: int
    epochs: float
    seconds: float
    tokens_per_second: float
    hardware: str
    hyperparameters: Mapping[str, Any]
    architecture: Mapping[str, Any]
    versions: Mapping[str, str]
    sample: str | None = None
    language: list[str] | None = None
    license: str | None = None

    @property
    def perplexity(self) -> float:
        """The exponential of the validation loss; infinite where that is no float."""
        return math.exp(self.validation_loss) if self.validation_loss < 700 else math.inf


def write_card(folder: str | Path, facts: RunFacts) -> Path:
    """Write ``README.md`` into the folder of a model; pictures and logs are shown when they lie there already.

    Raises:
        ValueError: a fact that the Hub's metadata cannot hold.
    """
    folder = Path(folder)
    sections = [
        f"# {one_line(facts.name)}",
        _what_it_is(facts),
        "## Load it\n\n" + _how_to_load(facts),
        "## Results\n\n" + _results(facts, folder),
        "## Training data\n\n" + _training_data(facts),
        "## Training\n\n" + table_of(_training_rows(facts)),
        "## Architecture\n\n" + table_of({"parameters": facts.parameters, **facts.architecture}),
        "## Limits\n\n" + _limits(facts),
    ]
    if facts.model_type == "linformer":
        sections.append(f"## Citation\n\nThe attention is that of\n\n```bibtex\n{CITATION}\n```")
    text = "\n\n".join(sections)
    path = folder / "README.md"
    ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{text}\n").save(path)
    return path


def architecture_rows(config: Any) -> dict[str, Any]:
    """The sizes in a configuration of transformers; of a Linformer, also what its attention is made of."""
    rows = {
        "type": config.model_type,
        "vocabulary": config.vocab_size,
        "width": config.hidden_size,
        "depth": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "key/value heads": getattr(config, "num_key_value_heads", None),
        "sequence length": config.max_position_embeddings,
        "tied embeddings": config.tie_word_embeddings,
    }
    if config.model_type == "linformer":
        rows |= {"slots per sequence (`k`)": config.k}
        if config.causal:
            rows |= {"tokens per block (`block_size`)": config.block_size}
            rows |= {"exact tokens (`window_size`)": config.window_size}
        rows |= {
            "projection": config.projection,
            "sharing of the projections": config.projection_sharing,
            "positions": config.position_embedding,
            "rank of the feed-forward layer": config.rank or "dense",
            "rank of the attention's matrices": config.attention_rank or "dense",
        }
    return rows


def hyperparameter_rows(arguments: Any) -> dict[str, Any]:
    """The settings in a ``transformers.TrainingArguments`` that a repetition of the run needs."""
    per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return {
        "learning rate (peak)": arguments.learning_rate,
        "schedule": getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type),
        "warm-up (steps, or share below 1)": arguments.warmup_steps,
        "optimizer": getattr(arguments.optim, "value", arguments.optim),
        "Adam betas": f"{arguments.adam_beta1:g}, {arguments.adam_beta2:g}",
        "weight decay": arguments.weight_decay,
        "largest gradient norm": arguments.max_grad_norm,
        "label smoothing": arguments.label_smoothing_factor,
        "sequences per step": per_step,
        "sequences per device": arguments.train_batch_size,
        "gradient accumulation": arguments.gradient_accumulation_steps,
        "processes": arguments.world_size,
        "precision": "bfloat16, mixed" if arguments.bf16 else "float16, mixed" if arguments.fp16 else "float32",
        "seed": str(arguments.seed),
    }


def package_versions() -> dict[str, str]:
    """The versions of what took part in a training, by name of the package; what is not installed is left out."""
    found = {"linpass": __version__}
    for name in ("torch", "transformers", "accelerate", "tokenizers", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _metadata(facts: RunFacts) -> ModelCardData:
    on_hub = [one_line(corpus.name) for corpus in facts.corpora if corpus.on_hub]
    task, task_name = ("text-generation", "Text Generation") if facts.causal else ("fill-mask", "Masked Language Model")
    measured = {"loss": ("Validation loss", facts.validation_loss), "perplexity": ("Perplexity", facts.perplexity)}
    if facts.bits_per_byte is not None:
        measured["bits_per_byte"] = ("Bits per byte", facts.bits_per_byte)
    results = [
        EvalResult(
            task_type=task,
            task_name=task_name,
            dataset_type=on_hub[0] if len(on_hub) == len(facts.corpora) == 1 else "text",
            dataset_name=one_line(_validation_text(facts)),
            metric_type=metric,
            metric_name=name,
            metric_value=value,
        )
        for metric, (name, value) in measured.items()
        if math.isfinite(value)
    ]
    return ModelCardData(
        language=facts.language,
        license=facts.license,
        library_name="transformers",
        pipeline_tag=task,
        tags=["linpass", facts.model_type],
        datasets=on_hub or None,
        model_name=one_line(facts.name),
        eval_results=results or None,
    )


def _what_it_is(facts: RunFacts) -> str:
    task = "continues text" if facts.causal else "fills the masked tokens of a text"
    first = (
        f"A language model of {facts.parameters:,} parameters that {task}, trained from random weights on "
        f"{facts.tokens_seen:,} tokens with linpass."
    )
    if facts.model_type != "linformer":
        return f"{first} Its architecture is transformers' own `{facts.model_type}`."
    attends = "to learned mixtures of all tokens"
    if facts.causal:
        attends = (
            "to the last tokens exactly and to all before them through a few mixtures per block, never to later ones"
        )
    return f"{first} It is a Linformer: a token attends {attends}, at a cost that grows linearly with the length."


def _how_to_load(facts: RunFacts) -> str:
    source = json.dumps(facts.repo_id or f"./{facts.name}")
    if facts.repo_id and facts.revision:
        source += f", revision={json.dumps(facts.revision)}"
    new_tokens = min(40, facts.seq_length // 2)  # a short model has no room for more
    if facts.causal:
        auto, task = "AutoModelForCausalLM", "text-generation"
        apply = f"print(tokenizer.decode(model.generate(**inputs, max_new_tokens={new_tokens})[0]))"
        run = f'print(run("The", max_new_tokens={new_tokens})[0]["generated_text"])'
    else:
        auto, task = "AutoModelForMaskedLM", "fill-mask"
        apply = "print(model(**inputs).logits.shape)"
        run = 'print(run(f"The {run.tokenizer.mask_token}")[0]["token_str"])'
    model = f"""from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained({source})
tokenizer = AutoTokenizer.from_pretrained({source})
inputs = tokenizer("The", return_tensors="pt")
{apply}"""
    trust = ", trust_remote_code=True" if facts.model_type == "linformer" else ""
    pipe = f"""from transformers import pipeline

run = pipeline("{task}", model={source}{trust})
{run}"""
    if facts.model_type != "linformer":
        return f"{python_block(model)}\n\nor\n\n{python_block(pipe)}"
    model = f"import linpass  # the Auto classes know the Linformer from here on\n{model}"
    return (
        f"With linpass installed:\n\n{python_block(model)}"
        "\n\nWithout linpass, by the code that lies beside the weights (read it before you trust it):\n\n"
        f"{python_block(pipe)}"
    )


def _validation_text(facts: RunFacts) -> str:
    names = facts.validation_files or [corpus.name for corpus in facts.corpora]
    return f"{'' if facts.validation_files else 'held out of '}{', '.join(names[:MOST_ROWS])}"


def _results(facts: RunFacts, folder: Path) -> str:
    rows = {
        "training loss, nats per token": f"{facts.train_loss:.4f}",
        "validation loss, nats per token": f"{facts.validation_loss:.4f}",
        "**validation perplexity**": f"**{facts.perplexity:,.2f}**",
    }
    if facts.bits_per_byte is not None:
        rows["validation, bits per byte"] = f"{facts.bits_per_byte:.4f}"
    rows |= {f"perplexity of a {name} model": f"{value:,.2f}" for name, value in facts.baselines.items()}
    rows["validation tokens"] = f"{facts.validation_tokens:,}, {one_line(_validation_text(facts))}"
    parts = [table_of(rows)]
    if (folder / "training_loss_plot.png").is_file():
        parts.append("![Training and validation loss by optimizer step](training_loss_plot.png)")
    if (folder / "training_log.jsonl").is_file():
        parts.append("Every logged step: [training_log.jsonl](training_log.jsonl).")
    if facts.sample is not None:
        indented = "\n".join(f"    {one_line(line)}" for line in facts.sample.splitlines())
        parts.append(f"Not selected: a prompt from the validation text `>>>` what the model writes.\n\n{indented}")
    return "\n\n".join(parts)


def _training_data(facts: RunFacts) -> str:
    lines = ["| corpus | documents | tokens |", "|---|---:|---:|"]
    for corpus in facts.corpora[:MOST_ROWS]:
        lines.append(f"| {_name(corpus.name)} | {_count(corpus.documents)} | {_count(corpus.tokens)} |")
    if len(facts.corpora) > MOST_ROWS:
        lines.append(f"| and {len(facts.corpora) - MOST_ROWS:,} more | | |")
    return "\n".join(lines) + f"\n\nTokens seen in training, every epoch counted: {facts.tokens_seen:,}."


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _training_rows(facts: RunFacts) -> dict[str, Any]:
    return {
        "optimizer steps": facts.steps,
        "epochs": facts.epochs,
        **facts.hyperparameters,
        "hardware": facts.hardware,
        "duration (h:min:s)": str(timedelta(seconds=round(facts.seconds))),
        "tokens per second": f"{facts.tokens_per_second:,.0f}",
        "versions": ", ".join(f"{name} {number}" for name, number in facts.versions.items()),
    }


def _limits(facts: RunFacts) -> str:
    limits = [
        "It knows only its training text, with that text's errors, prejudices and date, and may repeat parts of it.",
        "What it writes may read well and be invented; nothing of it is checked."
        if facts.causal
        else "What it fills in may read well and be wrong; nothing of it is checked.",
        "It follows no instructions, it is not aligned with anybody's wishes, and no filter is in it.",
        f"It was trained on sequences of {facts.seq_length:,} tokens; with longer ones it was not measured.",
        "Its perplexity counts the tokens of its own tokenizer: compare it with that of the same tokens only.",
    ]
    return "\n".join(f"- {limit}" for limit in limits)


def table_of(rows: Mapping[str, Any]) -> str:
    shown = [f"| {one_line(name)} | {_value(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *shown])


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return one_line(str(value)).replace("|", "\\|")


def one_line(text: str) -> str:
    """A name that others chose, on one line; a file name that is no UTF-8 must not stop the end of a run."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())


def _name(text: str) -> str:
    """As code: nothing in it is Markdown, and no pipe ends the cell of the table."""
    return f"`{one_line(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def python_block(text: str) -> str:
    return f"```python\n{text}\n```"
