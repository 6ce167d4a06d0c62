"""The table and the picture of ``linpass compare``."""

from pathlib import Path
from typing import Any

MEGABYTE = 1e6
COLOURS = {"gradient descent": "tab:red", "scikit-learn": "tab:gray", "single pass": "tab:blue"}


def report(result: dict[str, Any]) -> str:
    """The table, at most 120 columns wide."""
    cost, classes = result["features_cost"], result["classes"]
    settings = result["settings"]
    header = (
        f"{'':<38} {'accuracy':>12} {'ECE':>6} {'log loss':>8} {'passes':>9} {'wall s':>8} {'CPU s':>8} {'total s':>8} "
        f"{'peak MB':>8}"
    )
    lines = [
        "",
        f"{_rows_in_words(result)}: {result['train_rows']:,} rows for training, {result['test_rows']:,} for testing,",
        f"{len(classes)} classes; always saying the most frequent one is {100 * result['majority']:.1f} % right.",
        f"Encoder: {result['encoder']}, {result['encoder_parameters']:,} parameters, {result['features']} features.",
        f"Gradient descent: {settings['epochs']} epochs for heads, {settings['scratch_epochs']} for the transformer, "
        f"batches of {settings['batch_size']}, learning rate {settings['learning_rate']:g}.",
        f"Machine: {result['hardware']}",
        "",
        header,
        f"{'features of all rows (encoder)':<38} {'':>12} {'':>6} {'':>8} {'1':>9} {_costs(cost, None)}",
    ]
    lines += [_line(entry) for entry in result["contestants"]]
    lines += [
        "",
        "accuracy: percent of the test rows ± one standard error. ECE: expected calibration error, 15 bins. log loss:",
        "nats. Single pass: probabilities by one temperature. wall, CPU: training and predicting the test rows, in a",
        "process of its own. total: with the features, where used. peak: most resident memory above what the process",
        "had with its rows loaded (ru_maxrss). passes: looks at the training rows; heads see stored features.",
    ]
    if result["encoder_seconds"] is not None:
        lines.append(
            f"The default encoder took {result['encoder_seconds']:.1f} s (trained, or found in the cache); in no total."
        )
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: total time, on a logarithmic axis, against accuracy with its standard error."""
    from matplotlib.figure import Figure

    entries = [entry for entry in result["contestants"] if "accuracy" in entry]
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    times, accuracies = figure.subplots(1, 2, sharey=True)
    places = range(len(entries), 0, -1)
    colours = [COLOURS[entry["group"]] for entry in entries]
    seconds = [entry["seconds"] for entry in entries]
    times.barh(places, seconds, color=colours, height=0.6)
    for place, entry in zip(places, entries, strict=True):
        plus = " *" if entry["on_features"] else ""
        label = f"{entry['seconds']:.2g} s{plus}"
        times.annotate(label, (entry["seconds"], place), xytext=(4, 0), textcoords="offset points", va="center")
    times.set_xscale("log")
    times.set_xlim(min(seconds) / 3, max(seconds) * 6)
    times.set_yticks(places, [entry["name"] for entry in entries])
    features = result["features_cost"]["seconds"]
    times.set_xlabel(
        f"seconds of training and prediction\n* on features of the encoder, computed once in {features:.2g} s"
    )
    for place, entry, colour in zip(places, entries, colours, strict=True):
        middle, error = 100 * entry["accuracy"], 100 * entry["accuracy_standard_error"]
        accuracies.errorbar(middle, place, xerr=error, color=colour, marker="o", capsize=3)
    accuracies.set_xlabel(f"accuracy on {result['test_rows']:,} rows, %\n± one standard error")
    for axes in (times, accuracies):
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
    for group, colour in COLOURS.items():
        if any(entry["group"] == group for entry in entries):
            accuracies.scatter([], [], color=colour, label=group)
    figure.legend(loc="outside upper center", ncols=len(COLOURS), frameon=False)
    figure.savefig(path, dpi=150, format="png")


def _line(entry: dict[str, Any]) -> str:
    if "said" in entry:
        return f"{entry['name']:<38} {entry['said']}"
    accuracy = f"{100 * entry['accuracy']:.2f} ± {100 * entry['accuracy_standard_error']:.2f}"
    return (
        f"{entry['name']:<38} {accuracy:>12} {entry['expected_calibration_error']:6.3f} {entry['log_loss']:8.4f} "
        f"{entry['passes']:>9} {_costs(entry, entry['total_seconds'])}"
    )


def _costs(cost: dict[str, Any], total: float | None) -> str:
    peak = "-" if cost["peak_bytes"] is None else f"{cost['peak_bytes'] / MEGABYTE:.0f}"
    return (
        f"{_seconds(cost['seconds']):>8} {_seconds(cost['cpu_seconds']):>8} "
        f"{'' if total is None else _seconds(total):>8} {peak:>8}"
    )


def _seconds(number: float) -> str:
    return f"{number:.3f}" if number < 1 else f"{number:.1f}"


def _rows_in_words(result: dict[str, Any]) -> str:
    rows = result["rows"]
    return rows if isinstance(rows, str) else ", ".join(Path(name).name for name in rows)
