"""What an attention call must cost at least, and the page of tables that measurements on a GPU become."""

from typing import NamedTuple

from benchmarks.attention_gpu_cases import CUDNN, FLASH, LONGEST_DENSE_TRUTH, OURS, Shape
from benchmarks.attention_gpu_measure import ALL_HEADS_CHECKED_TO
from benchmarks.report_file import grouped, machine, table


class Theme(NamedTuple):
    """What a result is about: the names of its rivals, and ``targets``, how often as fast as cuDNN by n, 8 heads of 64.

    ``memory`` is the limit of our peak memory at n = 512 over that of flash attention.
    """

    title: str
    kind: str
    sizes: str
    cudnn: str
    flash: str
    targets: dict[int, float]
    memory: float | None


THEMES = {
    "attention_gpu": Theme(
        title="Causal attention",
        kind="full causal attention",
        sizes="w = 128, E and F learned, shared by the heads, with mixing and their gradients in the time",
        cudnn=CUDNN.name,
        flash=FLASH.name,
        targets={512: 1.0, 2048: 1.5, 8192: 4.0, 32768: 12.0, 65536: 25.0},
        memory=1.3,
    ),
    "attention_gpu_bidirectional": Theme(
        title="Bidirectional attention",
        kind="full bidirectional attention",
        sizes="E and F learned, [n, k], shared by the heads, with mixing and their gradients in the time",
        cudnn="cuDNN full",
        flash="flash full",
        targets={512: 1.3, 2048: 2.5, 8192: 8.0, 32768: 30.0, 65536: 35.0},
        memory=None,
    ),
}


def floor(shape: Shape, batch: int, flop_per_s: float, bytes_per_s: float) -> dict:
    """Least milliseconds of the two passes: per pass the larger of operations and bytes, at the measured ceilings.

    Operations: 4·D forward and 10·D backward for every pair of a query and a slot or token that it sees, no more; and
    the mixing, 2·b·r·D a block for keys and for values, twice that backward. Bytes: inputs (queries, keys, values, E,
    F; backward also the gradient of the output) read once, outputs (backward: five gradients) written once.
    """
    b, r, pairs = shape.block, shape.layout.slots_per_block, shape.pairs
    mixing = 4 * (shape.tokens // b) * b * r * shape.dim
    rows = batch * shape.heads
    states, weights = 2 * rows * shape.tokens * shape.dim, 2 * (shape.tokens // b) * b * r
    passes = {
        "forward": (rows * (4 * shape.dim * pairs + mixing), 4 * states + 2 * weights),
        "backward": (rows * (10 * shape.dim * pairs + 2 * mixing), 7 * states + 4 * weights),
    }
    bounds = {n: (1e3 * flop / flop_per_s, 1e3 * size / bytes_per_s) for n, (flop, size) in passes.items()}
    return {
        "gflop": round(sum(flop for flop, _ in passes.values()) / 1e9, 1),
        "gbyte": round(sum(size for _, size in passes.values()) / 1e9, 2),
        "forward_floor_ms": round(max(bounds["forward"]), 4),
        "floor_ms": round(sum(max(times) for times in bounds.values()), 4),
        "bound_by": {name: "operations" if flop > size else "bytes" for name, (flop, size) in bounds.items()},
    }


def line(row: dict) -> str:
    """A row for the screen."""
    names = f"{row['heads']}x{row['dim']} n={row['n']}" if "n" in row else row["case"]
    words = [row["variant"], names]
    if "graph_ms" in row:
        words.append(f"{row['graph_ms'][0]} ms from a graph")
    if "both_ms" in row:
        words.append(f"{row['both_ms'][0]} ms (forward {row['forward_ms'][0]})")
        words += [f"{row['host_ms']} to enqueue"] if row["host_ms"] else []
        words.append(f"{row['peak_MiB']} MiB")
    if "over_floor" in row:
        words.append(f"{row['over_floor']} x the floor of {row['floor_ms']}")
    if row.get("errors"):
        words.append(f"error {max(row['errors'].values())}")
    if row.get("passed") is False:
        words.append(f"RED: {row}")
    return ", ".join([*words, *([f"failed: {row['failed']}"] if "failed" in row else [])])


def timed(result: dict) -> dict[tuple, dict]:
    """Rows with times by heads, features of a head, n and variant."""
    rows = (row for row in result["timing"] if "both_ms" in row)
    return {(row["heads"], row["dim"], row["n"], row["variant"]): row for row in rows}


def speed_up(rows: dict[tuple, dict], theme: Theme, heads: int, dim: int, n: int) -> float | None:
    """Forward and backward of cuDNN's full attention over ours."""
    ours, theirs = rows.get((heads, dim, n, OURS.name)), rows.get((heads, dim, n, theme.cudnn))
    return round(theirs["both_ms"][0] / ours["both_ms"][0], 3) if ours and theirs else None


def memory_ratio(rows: dict[tuple, dict], theme: Theme, n: int = 512) -> float | None:
    """Peak memory of ours over flash attention's, 8 heads of 64."""
    ours, theirs = rows.get((8, 64, n, OURS.name)), rows.get((8, 64, n, theme.flash))
    return round(ours["peak_MiB"] / theirs["peak_MiB"], 3) if ours and theirs and theirs["peak_MiB"] else None


def summary(result: dict) -> dict:
    """The answers in short: speed-ups and whether they meet their targets, distance from the floor, what failed."""
    rows, theme = timed(result), THEMES[result["theme"]]
    found = {n: speed_up(rows, theme, 8, 64, n) for n in theme.targets}
    checked = [row for row in result["gate"] if "passed" in row]
    return {
        "over_cudnn": {n: ratio for n, ratio in found.items() if ratio},
        "met": {n: ratio >= theme.targets[n] for n, ratio in found.items() if ratio},
        "over_floor": {f"{h}x{d} {n}": row["over_floor"] for (h, d, n, _), row in rows.items() if "over_floor" in row},
        "memory_over_flash_at_512": memory_ratio(rows, theme),
        "red": [[row["variant"], row["case"]] for row in checked if not row["passed"]],
        "failed": [[row["variant"], row.get("n") or row.get("case")] for row in all_rows(result) if "failed" in row],
        "left_out": len(result["left_out"]),
    }


def all_rows(result: dict) -> list[dict]:
    return [row for section in ("gate", "timing", "graphs") for row in result[section]]


def page(result: dict) -> str:
    """All tables, as Markdown."""
    where, ceilings, theme = result["environment"], result["ceilings"], THEMES[result["theme"]]
    lines = [
        f"# {theme.title} on one GPU, {where['date']}",
        "",
        f"{machine(where)}; torch {where['torch']}, Triton {where['triton']}, cuDNN {where['cudnn']}, linpass "
        f"{where['linpass']} ({where['commit'] or 'commit unknown'}). Command: `{where['command']}`.",
        "",
        f"bfloat16, {where['batch_tokens']:,} tokens a batch (one row beyond that), attention alone; {theme.sizes}. "
        f"Medians of at least {where['repeats']} repeats, of 5 where one takes more than 0.1 s.",
    ]
    if ceilings:
        lines += [
            "",
            f"Measured ceilings: {ceilings['matmul_tflop_per_s']} TFLOP/s (product of two 8192 × 8192 bfloat16 "
            f"matrices, random numbers), {ceilings['copy_tbyte_per_s']} TB/s (copy on the device, read and written).",
        ]
    rows = timed(result)
    for heads, dim in dict.fromkeys(key[:2] for key in rows):
        here = {key: row for key, row in rows.items() if key[:2] == (heads, dim)}
        lines += [*times_table(here, f"## {heads} heads of {dim}"), *ours_table(here, theme)]
        lines += memory_table(here, theme)
    lines += [*graphs_table(result, theme), *gate_table(result), *notes(result)]
    return "\n".join(lines) + "\n"


def by_length(rows: dict[tuple, dict], cell) -> list[str]:
    """A line for each variant, a column for each n."""
    lengths = sorted({key[2] for key in rows})
    variants = dict.fromkeys(key[3] for key in rows)
    found = {key[2:]: row for key, row in rows.items()}
    body = [[name, *(cell(found[n, name]) if (n, name) in found else None for n in lengths)] for name in variants]
    return table(["variant", *(f"n = {n}" for n in lengths)], body)


def times_table(rows: dict[tuple, dict], title: str) -> list[str]:
    cells = by_length(rows, lambda row: f"{row['both_ms'][0]} ({row['forward_ms'][0]})")
    return ["", title, "", "Milliseconds, forward and backward (forward):", *cells]


def ours_table(rows: dict[tuple, dict], theme: Theme) -> list[str]:
    """Speed-up with target, and the distance from the floor."""
    body = []
    for heads, dim, n, variant in sorted(rows):
        row, target = rows[heads, dim, n, variant], theme.targets.get(n) if (heads, dim) == (8, 64) else None
        if variant != OURS.name:
            continue
        ratio = speed_up(rows, theme, heads, dim, n)
        met = None if target is None or ratio is None else "yes" if ratio >= target else "no"
        sizes, bound = f"{row['k']}, {row['b']}, {row['r']}", row.get("bound_by", {})
        quartiles = f"{row['both_ms'][0]} [{row['both_ms'][1]}, {row['both_ms'][2]}]"
        limits = f"{bound.get('forward', '')}, {bound.get('backward', '')}" if bound else None
        distance = [row.get("floor_ms"), row.get("over_floor"), limits]
        body.append([n, sizes, quartiles, row["host_ms"], ratio, target, met, *distance])
    if not body:
        return []
    head = ["n", "k, b, r", "ms [quartiles]", "ms to enqueue", "× cuDNN", "target", "met"]
    head += ["floor ms", "× floor", "floor is (forward, backward)"]
    text = f"linpass, forward and backward, against cuDNN's {theme.kind}, and against the least that any way can take:"
    return ["", text, *table(head, body)]


def memory_table(rows: dict[tuple, dict], theme: Theme) -> list[str]:
    lines = [
        "",
        "Peak memory beyond inputs and their gradients, MiB (equal numbers are linear in n):",
        *by_length(rows, lambda row: row["peak_MiB"]),
    ]
    worst = {key: row for key, row in rows.items() if row.get("errors")}
    if worst:
        measured = {key[3] for key in worst}
        without = [name for name in dict.fromkeys(key[3] for key in rows) if name not in measured]
        lines += [
            "",
            "Largest relative error of output and gradients against float64, of the last row of the batch (of two of "
            f"its heads beyond {ALL_HEADS_CHECKED_TO:,} tokens). Beyond n = {LONGEST_DENSE_TRUTH} rivals of other "
            "functions have none: their truth has no room, or takes a step for every token."
            + (f" Not measured: {', '.join(without)}." if without else ""),
        ]
        lines += by_length(worst, lambda row: max(row["errors"].values()))
    ratio, target = memory_ratio(rows, theme), f" (target: {theme.memory})" if theme.memory else ""
    if ratio:
        lines += ["", f"At n = 512 linpass takes {ratio} × the memory of flash attention{target}."]
    return lines


def graphs_table(result: dict, theme: Theme) -> list[str]:
    found = {(r["heads"], r["dim"], r["n"], r["variant"]): r.get("graph_ms", [None])[0] for r in result["graphs"]}
    others = [name for name in dict.fromkeys(key[3] for key in found) if name not in (OURS.name, theme.cudnn)]
    body = []
    for heads, dim, n in sorted({key[:3] for key in found}):
        ours, theirs, *rest = (found.get((heads, dim, n, name)) for name in (OURS.name, theme.cudnn, *others))
        ratio = round(theirs / ours, 3) if ours and theirs else None
        target = theme.targets.get(n) if (heads, dim) == (8, 64) else None
        body.append([heads, dim, n, ours, theirs, ratio, target, *rest])
    if not body:
        return []
    text = "Forward and backward replayed from a CUDA graph, so without the time that Python needs to launch them:"
    head = ["heads", "of", "n", f"{OURS.name} ms", f"{theme.cudnn} ms", "× cuDNN", "target"]
    return ["", "## Without launch times", "", text, *table(head + [f"{name} ms" for name in others], body)]


def gate_table(result: dict) -> list[str]:
    body = []
    for row in result["gate"]:
        state = "failed" if "failed" in row else "passed" if row["passed"] else "RED"
        errors = {name: error for name, error in row.get("errors", {}).items() if name not in row.get("not_judged", ())}
        detail = row.get("failed") or (max(errors.values()) if errors else None)
        same = {None: None, True: "yes", False: "no"}[row.get("runs_agree")]
        body.append([row["variant"], row["case"], state, detail, same])
    text = (
        "Against float64 on the same inputs, each case with NaN in memory that nobody wrote to, numbers that are not "
        "finite refused. *Same bits*: of three runs, which the kernels promise and PyTorch's functions do not."
    )
    if any("not_judged" in row for row in result["gate"]):
        text += " With scores near -120 the gradient of the queries, a difference of large numbers, is not judged."
    return ["", "## Correctness", "", text, *table(["variant", "case", "result", "largest error", "same bits"], body)]


def notes(result: dict) -> list[str]:
    failed = [
        f"- {r['variant']}, {r['heads']} heads, n = {r['n']}: {r['failed']}" for r in result["timing"] if "failed" in r
    ]
    lines = ["", "Failed:", "", *failed] if failed else []
    left_out = [f"- {who}: {', '.join(what)}" for who, what in grouped(result["left_out"]).items()]
    return lines + (["", "Left out for want of time:", "", *left_out] if left_out else [])
