"""One run in a process of its own: ``linpass train``, then the losses on the validation documents, then a sample.

``python -m benchmarks.quality.single_run ORDER.json``; the order is written by ``schedule.py``, the answer goes to
``answer.json`` beside it. The model is deleted afterwards: it is too large to be kept for every run, so what is to be
known of it is measured here. Losses on the untouched half are measured in the same go; they go to a file of their own,
which nothing reads before ``report --untouched``.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.quality.data import CHOOSING, CURVE, TOKENIZER, UNTOUCHED, part_folders
from benchmarks.quality.experiments import LEAKING
from linpass.errors import InputError

ANSWER, MODEL, CHECKPOINTS = "answer.json", "model", "checkpoints"
# Of the samples, fixed before any run.
PROMPTS = ("The history of the city begins", "“I do not believe a word of it,” said the captain", "In mathematics, a")
SAMPLE_TOKENS, SAMPLE_SEED, TEMPERATURE, TOP_K = 120, 0, 0.8, 50
BATCH_TOKENS = 16384  # of an evaluation


def main(words: list[str] | None = None) -> None:
    (path,) = sys.argv[1:] if words is None else words
    order = json.loads(Path(path).read_text(encoding="utf-8"))
    answer = carry_out(order, Path(path).parent)
    if answer is not None:
        partial = Path(path).with_name(f".{ANSWER}")
        partial.write_text(json.dumps(answer), encoding="utf-8")
        partial.replace(Path(path).with_name(ANSWER))


def carry_out(order: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """Train, measure, sample; None where a signal stopped the training.

    Args:
        order: ``program``, ``variant``, ``command``, ``flags``, ``seq_length``, ``data``, ``parts``, ``dtype``,
            ``evaluate``, ``untouched``, ``sample``, ``resumable``.
        folder: for the model and checkpoints; both are deleted when all is measured.
    """
    from benchmarks.environment import describe
    from benchmarks.quality.variants import use_variant

    start = time.perf_counter()
    if order["program"] == LEAKING:
        from benchmarks.quality.leaking import train_leaking

        answer = train_leaking(order)
    else:
        use_variant(order["variant"])
        trained = train(order, folder)
        if trained is None:
            return None
        training_seconds = time.perf_counter() - start
        answer = trained | measure(order, folder / MODEL) | {"training_seconds": round(training_seconds, 1)}
        for name in (MODEL, CHECKPOINTS):
            shutil.rmtree(folder / name, ignore_errors=True)
    return answer | {"environment": describe()}


def train(order: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """``linpass train``; its log and what it says of speed. A loss that is no number any more is an answer too."""
    from benchmarks.training import read_log, summary
    from linpass.training import train as training
    from linpass.training.checkpoints import DivergedError
    from linpass.training.parser import TrainParser

    training.BASELINE_TOKENS = 100_000  # unigrams and bigrams are not what is measured here
    data = Path(order["data"])
    words = [*order["command"], "--output_dir", str(folder / MODEL), "--checkpoint_dir", str(folder / CHECKPOINTS)]
    words += [
        "--token_folders",
        *map(str, part_folders(data, order["parts"])),
        "--validation_token_folders",
        str(data / CURVE),
    ]
    words += ["--tokenizer", str(data / TOKENIZER), "--cache_dir", str(folder), "--disable_tqdm", "True"]
    words += ["--eval_strategy", "steps", "--save_strategy", "no", "--plot_steps", "1000000"]  # pictures take a second
    words += ["--resume"] if order["resumable"] else []
    try:
        # A run that was stopped while it was measured has its model.
        if not (folder / MODEL).is_dir() and training.train(TrainParser().parse(words)) is None:
            return None
    except DivergedError as error:
        return {"diverged": str(error), "log": compact(read_log(folder / CHECKPOINTS))}
    log = read_log(folder / MODEL)
    return {"log": compact(log), "speed": summary(log)}


def compact(log: list[dict[str, Any]]) -> list[list[Any]]:
    """[step, training loss or None, validation loss or None] of each line of a training log that has one."""
    rows = []
    for entry in log:
        losses = [entry.get("loss"), entry.get("eval_loss")]
        if any(loss is not None for loss in losses):
            rows.append([entry["step"], *(None if loss is None else round(loss, 4) for loss in losses)])
    return rows


def measure(order: dict[str, Any], model_folder: Path) -> dict[str, Any]:
    """Parameters, losses on the halves and a sample, by the functions of ``linpass evaluate``."""
    from benchmarks.quality.leaking import losses_with_and_without_future, validation_rows
    from linpass.evaluate import choose_device, load_model

    if not model_folder.is_dir():  # diverged
        return {}
    model, tokenizer = load_model(str(model_folder), order["dtype"], choose_device("auto"))
    answer: dict[str, Any] = {"parameters": model.num_parameters()}
    halves = [CHOOSING, UNTOUCHED] if order["untouched"] else [CHOOSING]
    for half in halves if order["evaluate"] else ():
        answer[half] = score(model, tokenizer, Path(order["data"]) / f"{half}.jsonl", order["seq_length"])
    if order["left_to_right"]:
        rows_BT = validation_rows(Path(order["data"]) / CURVE, order["seq_length"]).to(model.device)
        answer["honest"] = losses_with_and_without_future(
            lambda ids: model(input_ids=ids, use_cache=False).logits, rows_BT
        )
    if order["sample"]:
        answer["sample"] = write_sample(model, tokenizer)
    return answer


def score(model: Any, tokenizer: Any, path: Path, seq_length: int) -> dict[str, Any]:
    """The loss on the documents of a file, each alone, as ``linpass evaluate`` measures it.

    Returns:
        loss, standard_error (over documents) and bits_per_byte; nats and tokens of each document, for differences; and
        by_position, [end, loss] where each range of positions is as long as all before it.
    """
    from linpass.scoring import encode_documents, position_ranges, range_loss, score_documents, summarise
    from linpass.training.documents import file_documents

    documents = encode_documents(list(file_documents([str(path)], "text")), tokenizer)
    scores = score_documents(model, documents, seq_length, max(1, BATCH_TOKENS // seq_length))
    found = summarise(scores)
    if not scores.document_nats.isfinite().all():
        raise InputError(f"the losses on {path.name} are not finite; the weights may be broken")
    ranges = position_ranges(len(scores.position_nats), per_doubling=1)
    return {
        "loss": found["loss"],
        "standard_error": found["loss_standard_error"],
        "bits_per_byte": found["bits_per_byte"],
        "by_position": [[end, round(range_loss(scores, first, end)[0], 4)] for first, end in ranges],
        "document_nats": [round(nats, 2) for nats in scores.document_nats.tolist()],
        "document_tokens": [int(tokens) for tokens in scores.document_tokens.tolist()],
    }


def write_sample(model: Any, tokenizer: Any) -> list[dict[str, str]]:
    """What the model writes first behind each of PROMPTS, with one seed; nothing is drawn twice or left out."""
    from transformers import set_seed

    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        room = min(SAMPLE_TOKENS, model.config.max_position_embeddings - inputs["input_ids"].shape[1])
        set_seed(SAMPLE_SEED)
        output = model.generate(
            **inputs,
            max_new_tokens=room,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            pad_token_id=tokenizer.eos_token_id,
        )[0]
        written = tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        texts.append({"prompt": prompt, "text": written})
    return texts


if __name__ == "__main__":
    main()
