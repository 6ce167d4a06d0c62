"""The page of tables that measurements of decoding become, targets beside figures."""

from benchmarks.decoding_gpu_cases import BEFORE, LOUDER
from benchmarks.models_gpu_report import profile_tables, spread
from benchmarks.report_file import machine, norm_of, table

# Latency of a token behind the longest context over that behind the shortest; tokens/s over Llama's at one situation.
FLAT, SHORTEST, LONGEST = 1.1, 512, 131072
FASTER, FASTER_AT = 5.0, (32768, 64)
BYTES = 2  # of a bfloat16
OURS, THEIRS = "linpass", "Llama"


def line(row: dict) -> str:
    """A row for the screen."""
    words = [row["variant"], f"context {row['context']} x {row['batch']}"]
    if "ms" in row:
        words.append(f"{row['ms'][0]} ms a token, {row['tokens_per_s']:,.0f} tokens/s, cache {row['cache_bytes']:,} B")
    return ", ".join([*words, *([f"failed: {row['failed']}"] if "failed" in row else [])])


def measured(result: dict) -> dict[tuple, dict]:
    """Rows with times by context, batch and variant."""
    rows = (row for row in result["decoding"] if "ms" in row)
    return {(row["context"], row["batch"], row["variant"]): row for row in rows}


def best(rows: dict[tuple, dict], context: int, batch: int, model: str) -> dict | None:
    """The fastest way of one model."""
    found = [row for key, row in rows.items() if key[:2] == (context, batch) and key[2].startswith(f"{model},")]
    return min(found, key=lambda row: row["ms"][0], default=None)


def slower(long: dict, short: dict) -> float:
    """Latency of one row over that of another."""
    return round(long["ms"][0] / short["ms"][0], 3)


def flatness(rows: dict[tuple, dict]) -> dict[str, float]:
    """Latency behind the longest context over that behind the shortest, by way and batch."""
    pairs = ((batch, name, rows.get((SHORTEST, batch, name))) for context, batch, name in rows if context == LONGEST)
    return {f"{name} x {batch}": slower(rows[LONGEST, batch, name], short) for batch, name, short in pairs if short}


def over_llama(rows: dict[tuple, dict]) -> dict[tuple[int, int], float]:
    """Tokens a second of our fastest way over those of Llama's, by context and batch."""
    found = {}
    for context, batch in sorted({key[:2] for key in rows}):
        ours, theirs = (best(rows, context, batch, model) for model in (OURS, THEIRS))
        if ours and theirs:
            found[context, batch] = round(ours["tokens_per_s"] / theirs["tokens_per_s"], 3)
    return found


def bytes_read(environment: dict, context: int, batch: int) -> int:
    """The least that a step of ours reads: weights, but for the table of embeddings, and what rows see of the cache."""
    size, model = environment["size"], environment["linformer"]
    blocks = model["seq_length"] // model["block_size"]
    slots = min(context // model["block_size"], blocks) * (model["k"] // blocks)
    weights = environment["parameters"][OURS] - size["vocab_size"] * size["embed_dim"]
    states = 2 * size["depth"] * size["embed_dim"] * (slots + min(context, model["window_size"]))  # keys and values
    return BYTES * (weights + batch * states)


def targets(result: dict) -> list[list]:
    """What was to be reached, the figure, the target, and whether it is met; without the figures that are missing."""
    rows, found = measured(result), []
    for batch in sorted({key[1] for key in rows}):
        short, long = (best(rows, context, batch, OURS) for context in (SHORTEST, LONGEST))
        if short and long:
            ratio, ways = slower(long, short), f"{long['variant']}, over {short['variant']}"
            text = f"latency at {LONGEST:,} over that at {SHORTEST}, batch {batch}, each in its fastest way ({ways})"
            found.append([text, ratio, f"≤ {FLAT}", ratio <= FLAT])
    ratio = over_llama(rows).get(FASTER_AT)
    if ratio is not None:
        text = f"tokens/s over Llama's at {FASTER_AT[0]:,}, batch {FASTER_AT[1]}, each in its fastest way"
        found.append([text, ratio, f"≥ {FASTER}", ratio >= FASTER])
    return found


def summary(result: dict) -> dict:
    """The answers in short."""
    rows = measured(result)
    return {
        "targets": targets(result),
        "over_llama": {f"{context} x {batch}": ratio for (context, batch), ratio in over_llama(rows).items()},
        "flatness": flatness(rows),
        "failed": [[row["variant"], row["context"], row["batch"]] for row in result["decoding"] if "failed" in row],
        "left_out": len(result["left_out"]),
    }


def page(result: dict) -> str:
    """All tables, as Markdown."""
    where = result["environment"]
    size, ours, count = where["size"], where["linformer"], where["parameters"]
    lines = [
        f"# Decoding on one GPU, {where['date']}",
        "",
        f"{machine(where)}; torch {where['torch']}, transformers {where['transformers']}, linpass "
        f"{where['linpass']} ({where['commit'] or 'commit unknown'}). Command: `{where['command']}`.",
        "",
        f"{size['embed_dim']} wide, {size['depth']} layers, {size['heads']} heads, vocabulary {size['vocab_size']:,}; "
        f"linpass {count['linpass']:,} parameters, Llama {count['Llama']:,}; bfloat16, random weights. One Linformer "
        f"behind all contexts: seq_length = {ours['seq_length']:,}, k = {ours['k']}, b = {ours['block_size']}, "
        f"w = {ours['window_size']}, {norm_of(ours)}. "
        "Its contexts are real prefills of random ids; Llama's are random numbers written "
        f"into its caches, in the shapes of a real context; all end {BEFORE} tokens early. The weights that "
        f"make values and outputs are {LOUDER:g} times as large as fresh ones, with which attention would hardly show "
        "in the logits. Ways of one context and batch are timed in turns, "
        f"{where['rounds']} × {where['tokens']} tokens; medians [quartiles] of the milliseconds of a token. Every way "
        "but `generate` gives the logits of its model's eager way for the same tokens, or it is not timed. Compiled: "
        '`torch.compile(mode="reduce-overhead", fullgraph=True)`. Llama attends through sdpa. Rows of different '
        "lengths hold from half of the context to all of it, and are given a mask, as `generate` gives one.",
    ]
    rows = measured(result)
    for batch in sorted({key[1] for key in rows}):
        lines += batch_table({key: row for key, row in rows.items() if key[1] == batch}, batch, where)
    body = [[text, figure, target, "yes" if met else "no"] for text, figure, target, met in targets(result)]
    lines += ["", "## Targets", *table(["", "figure", "target", "met"], body)] if body else []
    ways = [[name, ratio] for name, ratio in flatness(rows).items()]
    head = ["way x batch", f"latency at {LONGEST:,} over that at {SHORTEST}"]
    lines += ["", "Each way by itself:", *table(head, ways)] if ways else []
    lines += [*profile_tables(result["decoding"], line), *notes(result)]
    return "\n".join(lines) + "\n"


def batch_table(rows: dict[tuple, dict], batch: int, environment: dict) -> list[str]:
    contexts = sorted({key[0] for key in rows})
    names = dict.fromkeys(key[2] for key in rows)
    found = {(context, name): row for (context, _, name), row in rows.items()}
    head = ["way", *(f"{context:,}" for context in contexts)]

    def cells(cell) -> list[list]:
        return [[name, *(cell(found[c, name]) if (c, name) in found else None for c in contexts)] for name in names]

    speed_up = over_llama(rows)
    ratios = [["fastest linpass × fastest Llama", *(speed_up.get((context, batch)) for context in contexts)]]
    return [
        *("", f"## Batch {batch}", "", "Milliseconds of a token [quartiles], by context:", *table(head, cells(spread))),
        *("", "Tokens per second:", *table(head, cells(lambda row: f"{row['tokens_per_s']:,.0f}") + ratios)),
        *("", "Bytes of the cache:", *table(head, cells(lambda row: f"{row['cache_bytes']:,}"))),
        *("", "Bytes that a step reads at least, all weights but embeddings and what is visible of the cache:"),
        *table(head, [["linpass", *(f"{bytes_read(environment, context, batch):,}" for context in contexts)]]),
    ]


def notes(result: dict) -> list[str]:
    failed = [f"- {line(row)}" for row in result["decoding"] if "failed" in row]
    left = [f"- {line(names)}" for names in result["left_out"]]
    lines = ["", "Failed, or too large for the memory:", "", *failed] if failed else []
    return lines + (["", "Left out for want of time:", "", *left] if left else [])
