"""The model card of a head in closed form, README.md: what was fitted and how, how to load it, what it cannot do."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from linpass.modeling_closed_form import ClosedFormForSequenceClassification
from linpass.singlepass.collection import estimator_for
from linpass.singlepass.features import find_head, is_language_model, is_token_classifier
from linpass.training.card import one_line, package_versions, python_block, table_of

if TYPE_CHECKING:
    from linpass.singlepass.trainer import SinglePassTrainer

TAGS = ["linpass", "single-pass"]
CRITERIA = {
    "auto": "generalised cross-validation",
    "gcv": "generalised cross-validation",
    "loo": "leave-one-out",
    "kfold": "cross-validation over folds",
}
NOT_RESULTS = ("runtime", "_per_second", "preparation_time")
SHOWN_LABELS = 20


def write_card(folder: str | Path, trainer: "SinglePassTrainer", **facts: Any) -> Path:
    """Write ``README.md``; see :func:`card_text`."""
    path = Path(folder) / "README.md"
    path.write_text(card_text(trainer, **facts), encoding="utf-8")
    return path


def card_text(
    trainer: "SinglePassTrainer",
    *,
    model_name: str | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    tasks: str | list[str] | None = None,
    finetuned_from: str | None = None,
    dataset: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
) -> str:
    """The card of the trainer's model as it is now.

    The arguments are those of ``Trainer.create_model_card``; what is not given is taken from the model and the data
    sets where they tell it. Results are those of the last ``evaluate`` of this very head; they become metadata where
    the name of the data set is known.

    Args:
        dataset: how the data sets are called; ``dataset_tags``: their names on the Hub; ``dataset_args``: their
            configurations.
    """
    name = one_line(model_name or Path(str(trainer.args.output_dir)).resolve().name)
    known, on_hub = _known_datasets(trainer)
    on_hub = _listed(dataset_tags) or on_hub
    data = _listed(dataset) or _listed(dataset_tags) or on_hub or known
    pipeline_tag = (_listed(tasks) or [_pipeline_tag(trainer.model)])[0]
    results = last_evaluation(trainer)
    metadata = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=TAGS + [tag for tag in _listed(tags) if tag not in TAGS],
        datasets=on_hub or None,
        base_model=finetuned_from or base_model_of(trainer.model),
        model_name=name,
        eval_results=_eval_results(pipeline_tag, results, data, on_hub, _listed(dataset_args)) or None,
    )
    sections = [f"# {name}", _what_it_is(trainer, data), "## Load it\n\n" + _how_to_load(trainer, name)]
    if results:
        shown = {one_line(metric): f"{value:.4f}" for metric, value in results.items()}
        sections.append("## Results\n\nOn the rows given to `evaluate`:\n\n" + table_of(shown))
    sections += ["## How it was fitted\n\n" + table_of(fit_rows(trainer)), "## Limits\n\n" + _limits(trainer)]
    text = "\n\n".join(sections)
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}\n"))


def last_evaluation(trainer: "SinglePassTrainer") -> dict[str, float]:
    """The metrics of the last ``evaluate``, unless the head is of another solve or of more rows since then."""
    for entry in reversed(trainer.state.log_history):
        if entry.get("step") != trainer.state.global_step:
            break
        if "train_loss" in entry and "train_runtime" not in entry:  # logged by update, forget and refit
            break
        found = {
            name.removeprefix("eval_"): float(value)
            for name, value in entry.items()
            if name.startswith("eval_") and isinstance(value, int | float) and not name.endswith(NOT_RESULTS)
        }
        if found:
            return found
    return {}


def base_model_of(model: Any) -> str | None:
    """The Hub's name of what the encoder was loaded from; None where it came from a folder or from nowhere."""
    for config in (model.base_model.config, model.config):
        name = getattr(config, "_name_or_path", None)
        if name and not Path(name).exists():
            try:
                validate_repo_id(name)
            except HFValidationError:
                continue
            return name
    return None


def fit_rows(trainer: "SinglePassTrainer") -> dict[str, Any]:
    """Rows of a table: what a repetition needs."""
    model, arguments, head = trainer.model, trainer.args, find_head(trainer.model)[1]
    encoder: Any = model.base_model
    own = isinstance(model, ClosedFormForSequenceClassification)
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    rows: dict[str, Any] = {
        "encoder, frozen": f"{encoder.config.model_type}, {parameters:,} parameters, {encoder.dtype}",
        "pooling": model.config.pooling if own else "of the model",
        "features scaled to norm one": model.config.normalize if own else None,
        "kernel": arguments.kernel,
        "features": head.in_features,
        "outputs": head.out_features,
        "rows": trainer.rows,
        "fitted by": _method(trainer),
        "regularization": _regularization(trainer),
        "class weights": arguments.class_weight,
        "temperature": trainer.temperature or "none: the logits are as fitted",
        "precision of the sums": arguments.precision if arguments.streamed else "float64",
        "seed": str(arguments.seed),
        "versions": ", ".join(f"{package} {number}" for package, number in package_versions().items()),
    }
    return rows


def _method(trainer: "SinglePassTrainer") -> str:
    arguments, task = trainer.args, trainer.task
    if arguments.match == "ridge":
        estimator = "ridge" if task is None else estimator_for(arguments, task)
        names = {"ridge": "ridge regression", "discriminant": "the linear discriminant"}
        return names.get(estimator, "logistic regression") + ", one pass of the encoder over the rows"
    steps = f"{arguments.num_train_epochs:g} {'steps' if arguments.match == 'gd' else 'epochs'}"
    return f"match={arguments.match}, {steps} with learning rate {arguments.learning_rate:g}, in one pass"


def _regularization(trainer: "SinglePassTrainer") -> str | None:
    value = getattr(trainer.solution, "regularization", None)
    if value is None or trainer.args.match in ("gd", "sgd"):
        return None
    if isinstance(value, torch.Tensor):
        number = f"{value.min().item():g} to {value.max().item():g}, one per output"
    else:
        number = f"{value:g}"
    chosen = trainer.args.regularization
    if not isinstance(chosen, str):
        return f"{number}, given"
    if trainer.solution.method == "logistic":
        few = trainer.solution.criterion is None
        return f"{number}, {'the default for few rows' if few else 'chosen by the loss of held-out rows'}"
    return f"{number}, chosen by {CRITERIA[chosen]}"


def _pipeline_tag(model: Any) -> str:
    if is_language_model(model):
        return "text-generation"
    return "token-classification" if is_token_classifier(model) else "text-classification"


def _eval_results(
    task: str, results: dict[str, float], data: Sequence[str], on_hub: Sequence[str], configurations: Sequence[str]
) -> list[EvalResult]:
    if not data:
        return []
    return [
        EvalResult(
            task_type=task,
            dataset_type=on_hub[0] if on_hub else "text",
            dataset_name=one_line(data[0]),
            dataset_config=configurations[0] if configurations else None,
            metric_type=one_line(metric),
            metric_value=value,
        )
        for metric, value in results.items()
        if math.isfinite(value)
    ]


def _what_it_is(trainer: "SinglePassTrainer", data: Sequence[str]) -> str:
    model: Any = trainer.model
    tag, base = _pipeline_tag(model), base_model_of(model)
    if tag == "text-generation":
        does = "A language model"
    else:
        names = [one_line(str(name)) for name in model.config.id2label.values()]
        labels = ", ".join(names[:SHOWN_LABELS]) + (", ..." if len(names) > SHOWN_LABELS else "")
        regression = tag == "text-classification" and model.config.problem_type == "regression"
        each = "each token" if tag == "token-classification" else "a text"
        does = f"Predicts numbers for a text ({labels})" if regression else f"Classifies {each}: {labels}"
    encoder = f"`{one_line(base)}`" if base else f"a {model.base_model.config.model_type} encoder"
    rows = f"{trainer.rows:,} rows" + (f" of {', '.join(map(one_line, data))}" if data else "")
    join = "with" if tag == "text-generation" else "by"
    return (
        f"{does}, {join} a closed-form head on {encoder}, which stayed frozen: its last linear layer was solved for "
        f"from one pass over {rows}, with linpass."
    )


def _how_to_load(trainer: "SinglePassTrainer", name: str) -> str:
    model, with_tokenizer = trainer.model, trainer.processing_class is not None
    repo = getattr(trainer, "hub_model_id", None)
    source = json.dumps(repo or f"./{name}")
    if repo and trainer.args.hub_revision:
        source += f", revision={json.dumps(trainer.args.hub_revision)}"
    if type(model).__module__.startswith("linpass."):
        plain = "import linpass  # the Auto classes know the model from here on\n"
        parts = ["With linpass installed:", python_block(plain + _load_code(model, source, with_tokenizer))]
        parts.append("Without linpass, by the code that lies beside the weights (read it before you trust it):")
        source += ", trust_remote_code=True"
    elif getattr(type(model), "_auto_class", None) is not None:
        parts, source = ["By the code beside the weights (read it first):"], source + ", trust_remote_code=True"
    else:
        parts = ["An ordinary checkpoint; linpass is not needed:"]
        if with_tokenizer:
            parts += [python_block(_load_code(model, source, True)), "or"]
    parts.append(python_block(_pipeline_code(model, source) if with_tokenizer else _load_code(model, source, False)))
    return "\n\n".join(parts)


def _load_code(model: Any, source: str, with_tokenizer: bool) -> str:
    tag, kind = _pipeline_tag(model), model.config.problem_type
    auto = {"text-generation": "CausalLM", "token-classification": "TokenClassification"}
    auto_class = f"AutoModelFor{auto.get(tag, 'SequenceClassification')}"
    if with_tokenizer:
        names = sorted([auto_class, "AutoTokenizer"])
        lines = [f"from transformers import {', '.join(names)}", ""]
        given = [f"tokenizer = AutoTokenizer.from_pretrained({source})"]
        given.append('inputs = tokenizer("What a day!", return_tensors="pt")')
    else:
        lines = ["import torch", f"from transformers import {auto_class}", ""]
        given = ['inputs = {"input_ids": torch.tensor([[2, 3, 4]])}  # of the tokenizer of the encoder']
    lines += [f"model = {auto_class}.from_pretrained({source}).eval()", *given]
    if tag == "text-generation":
        text = "model.generate(**inputs, max_new_tokens=20)[0]"
        return "\n".join([*lines, f"print(tokenizer.decode({text}))" if with_tokenizer else f"print({text})"])
    lines.append("logits = model(**inputs).logits[0]")
    if tag == "token-classification":
        lines.append("print([model.config.id2label[label] for label in logits.argmax(-1).tolist()])")
    elif kind == "regression":
        lines.append("print(logits.tolist())")
    elif kind == "multi_label_classification":
        lines.append("print([model.config.id2label[label] for label, z in enumerate(logits.tolist()) if z > 0])")
    else:
        lines.append("print(model.config.id2label[logits.argmax().item()], logits.softmax(-1).max().item())")
    return "\n".join(lines)


def _pipeline_code(model: Any, source: str) -> str:
    tag = _pipeline_tag(model)
    more = {"text-generation": ", max_new_tokens=20"}.get(tag, "")
    if tag == "text-classification" and model.config.problem_type == "multi_label_classification":
        more = ", top_k=None"
    return f"""from transformers import pipeline

run = pipeline("{tag}", model={source})
print(run("What a day!"{more}))"""


def _limits(trainer: "SinglePassTrainer") -> str:
    task, tag = trainer.task, _pipeline_tag(trainer.model)
    limits = ["Nothing before the head was trained for this task: what the encoder does not tell apart, it cannot."]
    limits.append("It knows the rows that it was fitted to, with their errors and prejudices.")
    if tag == "text-generation":
        limits.append("What it writes may read well and be invented; nothing of it is checked.")
    elif task is not None and task.kind != "regression":
        chosen = getattr(trainer.solution, "method", "") == "logistic" and trainer.solution.criterion is not None
        calibrated = trainer.temperature is not None or (chosen and trainer.args.calibrate)
        limits.append(
            "Its probabilities were calibrated on rows of the training set; on texts of another kind they may be wrong."
            if calibrated
            else "Its logits are not calibrated: order them, but do not read their softmax as probabilities."
        )
    return "\n".join(f"- {limit}" for limit in limits)


def _known_datasets(trainer: "SinglePassTrainer") -> tuple[list[str], list[str]]:
    """Names of the data sets that the trainer was given, and their names on the Hub where they came from there.

    A ``datasets.Dataset`` remembers its name, and not its owner; the folder it is cached in is called OWNER___NAME.
    """
    names, on_hub = [], []
    for rows in (trainer.train_dataset, trainer.eval_dataset):
        info: Any = getattr(rows, "info", None)
        name = getattr(info, "dataset_name", None)
        if name is None or name == info.builder_name:  # the name of a file format
            continue
        names.append(name)
        folders = {part for file in getattr(rows, "cache_files", ()) for part in Path(file["filename"]).parts}
        owners = [folder.removesuffix(f"___{name}") for folder in folders if folder.endswith(f"___{name}")]
        on_hub += [f"{owner}/{name}" for owner in owners]
    return list(dict.fromkeys(names)), list(dict.fromkeys(on_hub))


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
