"""Measure on a CPU: ``python -m benchmarks.run attention``, ``... both_ways``, ``... model``, or all without a word.

Writes ``benchmarks/results/<theme>_cpu_<YYYYMM>.json`` and a table of the same name with ``.md``. A case whose check
fails is not measured. Times are medians (and quartiles) of at least 20 repeats after a warm-up, all cases of a theme in
one run; peak memory is what a process of its own needs beyond what it held before the case.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ATTENTION_TOKENS = (512, 1024, 2048, 4096, 8192)
SHORTER_TOKENS = (128, 256)  # where attention to slots that mix the whole row meets full attention
CHECKED_TO = 2048  # tokens: beyond, all scores in float64 are gigabytes
MODEL_TOKENS = (512, 1024, 4096)
TOKENS_PER_STEP = 4096


def measure_together(cases: dict, repeats: int, budget_s: float) -> dict:
    """Seconds of each case, {name: [median, lower, upper quartile]}; the cases take turns, so that drift hits all."""
    for case in cases.values():
        case()
    seconds = {name: [] for name in cases}
    began = time.perf_counter()
    for done in range(repeats):
        if done >= 20 and time.perf_counter() - began > budget_s:
            break
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - start)
    return {name: quartiles(values) for name, values in seconds.items()}


def quartiles(values: list[float]) -> list[float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return [middle, low, high]


def peak_memory(case: str, tokens: int) -> int:
    """Bytes that one forward and backward pass needs at its peak, inputs included, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.run", "--memory-of", case, "--tokens", str(tokens)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak_memory(case: str, tokens: int) -> None:
    """Peak resident bytes of the case beyond those before it (a small case first loads libraries and threads)."""
    from benchmarks import cases

    build = getattr(cases, case)
    build(256)()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status_bytes("VmRSS")
    build(tokens)()
    print(status_bytes("VmHWM") - before)


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def attention() -> dict:
    """Causal attention alone, forward and backward, float32, beside SDPA."""
    from benchmarks import cases

    def sizes(tokens: int) -> dict:
        layout = cases.layout_for(tokens)
        b, r = layout.block_size, layout.slots_per_block
        return {"k": r * tokens // b, "b": b, "r": r, "w": layout.window_size}

    return beside_sdpa("linformer_attention", "sdpa_attention", cases.check_attention, sizes, ATTENTION_TOKENS)


def both_ways() -> dict:
    """Bidirectional attention alone, the same."""
    from benchmarks import cases

    lengths = SHORTER_TOKENS + ATTENTION_TOKENS
    slots = {"k": cases.SLOTS}
    return beside_sdpa("linformer_both_ways", "sdpa_both_ways", cases.check_both_ways, lambda _: slots, lengths)


def beside_sdpa(
    ours: str, theirs: str, check: Callable[[int], float], sizes: Callable[[int], dict], lengths: tuple[int, ...]
) -> dict:
    """A row for each n of two cases by name, and how time and memory grow from the last but one to the last."""
    from benchmarks import cases

    rows = []
    for tokens in lengths:
        error = float(f"{check(tokens):.1e}") if tokens <= CHECKED_TO else None
        pair = {"linformer": getattr(cases, ours)(tokens), "sdpa": getattr(cases, theirs)(tokens)}
        seconds = measure_together(pair, repeats=50, budget_s=20)
        rows.append(
            {
                "n": tokens,
                **sizes(tokens),
                "linformer_ms": [round(1e3 * value, 2) for value in seconds["linformer"]],
                "sdpa_ms": [round(1e3 * value, 2) for value in seconds["sdpa"]],
                "speedup": round(seconds["sdpa"][0] / seconds["linformer"][0], 2),
                "linformer_MiB": round(peak_memory(ours, tokens) / 2**20, 1),
                "sdpa_MiB": round(peak_memory(theirs, tokens) / 2**20, 1),
                "relative_error": error,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    growth = {
        "time_4096_to_8192": round(rows[-1]["linformer_ms"][0] / rows[-2]["linformer_ms"][0], 2),
        "memory_4096_to_8192": round(rows[-1]["linformer_MiB"] / rows[-2]["linformer_MiB"], 2),
    }
    return {"rows": rows, "growth": growth}


def model() -> dict:
    """Training steps of whole models: Linformer, GPT-2 of equal size, Linformer without attention."""
    from benchmarks import cases

    cases.check_attention(512)
    rows = []
    for tokens in MODEL_TOKENS:
        batch = TOKENS_PER_STEP // tokens
        linformer = cases.linformer_model(tokens)
        parameters = sum(parameter.numel() for parameter in linformer.parameters())
        gpt2 = cases.gpt2_model(tokens, parameters)
        models = {"linformer": linformer, "gpt2": gpt2, "bound": cases.linformer_model(tokens, with_attention=False)}
        steps = {name: cases.training_step(net, tokens, batch) for name, net in models.items()}
        seconds = measure_together(steps, repeats=20, budget_s=0)
        rates = {name: round(TOKENS_PER_STEP / value[0]) for name, value in seconds.items()}
        rows.append(
            {
                "n": tokens,
                "batch": batch,
                "parameters": {name: sum(p.numel() for p in net.parameters()) for name, net in models.items()},
                "tokens_per_s": rates,
                "quartiles_s": {name: [round(v, 3) for v in value] for name, value in seconds.items()},
                "linformer_over_gpt2": round(rates["linformer"] / rates["gpt2"], 2),
                "linformer_over_bound": round(rates["linformer"] / rates["bound"], 2),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows}


def table(theme: str, result: dict) -> str:
    """The result as a page of Markdown."""
    where = result["environment"]
    lines = [
        f"# {TITLES[theme]} on a CPU, {where['date']}",
        "",
        f"{where['hardware']}, {where['threads']} threads; torch {where['torch']}, transformers "
        f"{where['transformers']}, linpass {where['linpass']} ({where['commit']}). "
        f"Command: `python -m benchmarks.run {theme}`.",
        "",
    ]
    if theme in ("attention", "both_ways"):
        names = [name for name in ("k", "b", "r", "w") if name in result["rows"][0]]
        kind, rival = ("Attention", "SDPA causal") if theme == "attention" else ("Bidirectional attention", "SDPA")
        lines += [
            f"{kind} alone, forward + backward, float32, batch 1, 8 heads of 64; medians in ms, quartiles in "
            "brackets; peak memory in MiB beyond the process before the call, inputs and gradients included; the "
            f"largest relative error against float64, checked up to n = {CHECKED_TO}.",
            "",
            f"| n | {', '.join(names)} | linpass ms | {rival} ms | speedup | linpass MiB | SDPA MiB | error |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in result["rows"]:
            ours, theirs = row["linformer_ms"], row["sdpa_ms"]
            lines.append(
                f"| {row['n']} | {', '.join(str(row[name]) for name in names)} | {ours[0]} [{ours[1]}, {ours[2]}] "
                f"| {theirs[0]} [{theirs[1]}, {theirs[2]}] | {row['speedup']} × | {row['linformer_MiB']} "
                f"| {row['sdpa_MiB']} | {row['relative_error'] or ''} |"
            )
        time_growth, memory_growth = result["growth"].values()
        lines += ["", f"From n = 4096 to 8192: time × {time_growth}, peak memory × {memory_growth}."]
    else:
        lines += [
            "Training step (forward, loss, backward) of 4-layer models of equal size, 256 wide, 4 heads, vocabulary "
            f"1,024, float32, {TOKENS_PER_STEP} tokens a step; tokens per second from median times. The bound is the "
            "same Linformer with nothing between its attention projections: what attention free of cost would give.",
            "",
            "| n | linpass | GPT-2 (SDPA) | bound | linpass / GPT-2 | linpass / bound | parameters linpass, GPT-2 |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in result["rows"]:
            rate, size = row["tokens_per_s"], row["parameters"]
            lines.append(
                f"| {row['n']} | {rate['linformer']:,} | {rate['gpt2']:,} | {rate['bound']:,} "
                f"| {row['linformer_over_gpt2']} × | {row['linformer_over_bound']} "
                f"| {size['linformer']:,}, {size['gpt2']:,} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("theme", nargs="?", choices=list(THEMES))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the result files")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_peak_memory(arguments.memory_of, arguments.tokens)
        return
    for theme in [arguments.theme] if arguments.theme else THEMES:
        write_results(theme, arguments.output)


def write_results(theme: str, folder: Path) -> None:
    """Measure, then write the JSON file and the page, and print both; the last line is the JSON."""
    from benchmarks.environment import describe

    result = {"theme": theme, "environment": describe(), **THEMES[theme]()}
    name = f"{theme}_cpu_{datetime.date.today():%Y%m}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    page = table(theme, result)
    (folder / f"{name}.md").write_text(page)
    print(page)
    print(json.dumps(result))


THEMES = {"attention": attention, "both_ways": both_ways, "model": model}
TITLES = {"attention": "Causal attention", "both_ways": "Bidirectional attention", "model": "Whole models"}


if __name__ == "__main__":
    main()
