"""The page of tables that measurements of whole models become, targets beside figures."""

from collections.abc import Callable

from benchmarks.models_gpu_cases import BOUND, FULL, OURS, UNEVEN
from benchmarks.report_file import machine, norm_of, table

RIVALS = {"training": ("GPT-2", "Llama"), "encoder": ("BERT",)}
SECTIONS = ("training", "prefill", "encoder")
# Training: tokens/s over the faster rival's by n, and over the bound's at every n.
RIVAL_TARGET, BOUND_TARGET = {1024: 1.0}, 0.8
# Compiled and eager steps start from the same weights and ids: their losses must stay this near.
SAME_LOSS = 0.05
# Of the longest kernels that a result lists.
SHOWN = 12
MODES = ("compiled", "eager")


def line(row: dict) -> str:
    """A row for the screen."""
    where = [f"{name}={row[name]}" for name in ("n", "batch", "mode") if name in row]
    words = [row["variant"], " ".join(where)]
    if "ms" in row:
        words.append(f"{row['tokens_per_s']:,.0f} tokens/s ({row['ms'][0]} ms), {row['peak_MiB']} MiB")
    if "loss" in row:
        words.append(f"loss {row['loss']}")
    return ", ".join([*words, *([f"failed: {row['failed']}"] if "failed" in row else [])])


def measured(result: dict, section: str) -> dict[tuple, dict]:
    """Rows of a training with times, by n, mode and variant."""
    rows = (row for row in result[section] if "ms" in row)
    return {(row["n"], row["mode"], row["variant"]): row for row in rows}


def best(rows: dict[tuple, dict], n: int, names: tuple[str, ...]) -> dict | None:
    """The fastest row at n of these variants, in any mode."""
    found = [row for (length, _, name), row in rows.items() if length == n and name in names]
    return max(found, key=lambda row: row["tokens_per_s"], default=None)


def ratio(ours: dict | None, theirs: dict | None) -> float | None:
    """Tokens a second of ours over theirs."""
    return round(ours["tokens_per_s"] / theirs["tokens_per_s"], 3) if ours and theirs else None


def comparisons(result: dict, section: str) -> dict[int, dict]:
    """By n: ours in its faster mode, over the fastest rival and over the bound, each in its own faster mode."""
    rows = measured(result, section)
    found = {}
    for n in sorted({key[0] for key in rows}):
        ours, rival, bound = (best(rows, n, names) for names in ((OURS,), RIVALS[section], (BOUND,)))
        over_rival, over_bound = ratio(ours, rival), ratio(ours, bound)
        target = RIVAL_TARGET.get(n) if section == "training" else None
        found[n] = {
            "ours": ours and ours["tokens_per_s"],
            "mode": ours and ours["mode"],
            "rival": rival and f"{rival['variant']}, {rival['mode']}",
            "over_rival": over_rival,
            "rival_target": target,
            "rival_met": None if target is None or over_rival is None else over_rival >= target,
            "over_bound": over_bound,
            "bound_met": None if over_bound is None else over_bound >= BOUND_TARGET,
            "over_full_attention": ratio(ours, best(rows, n, (FULL,))),
        }
    return found


def losses_apart(result: dict) -> list[list]:
    """Models whose compiled and eager losses are not the same, with both."""
    apart = []
    for section in ("training", "encoder"):
        rows = measured(result, section)
        for n, name in dict.fromkeys((n, name) for n, _, name in rows):
            pair = [rows[n, mode, name]["loss"] for mode in MODES if (n, mode, name) in rows]
            if len(pair) == 2 and abs(pair[0] - pair[1]) > SAME_LOSS:
                apart.append([section, n, name, *pair])
    return apart


def all_rows(result: dict) -> list[dict]:
    return [row for section in SECTIONS for row in result[section]]


def prefills(result: dict) -> dict[tuple, dict]:
    """Rows with times by mode, n, batch and variant."""
    rows = (row for row in result["prefill"] if "ms" in row)
    return {(row.get("mode", "eager"), row["n"], row["batch"], row["variant"]): row for row in rows}


def prefill_ratios(result: dict) -> dict[str, float]:
    """Tokens a second over Llama's, by batch, n and mode."""
    rows, found = prefills(result), {}
    for (mode, n, batch, name), row in rows.items():
        over_llama = ratio(row, rows.get((mode, n, batch, "Llama")))
        if name == OURS and over_llama:
            found[f"{batch} x {n}" + (", compiled" if mode == "compiled" else "")] = over_llama
    return found


def summary(result: dict) -> dict:
    """The answers in short."""
    failed = [line(row).split(", failed")[0] for row in all_rows(result) if "failed" in row]
    return {
        **{section: comparisons(result, section) for section in ("training", "encoder")},
        "prefill_over_llama": prefill_ratios(result),
        "losses_apart": losses_apart(result),
        "failed": failed,
        "left_out": len(result["left_out"]),
    }


WITH_MASKS = (
    "**The compiled rivals of this run are slower than they need be**: compiled, transformers' models form a mask of n "
    "× n, which keeps PyTorch's attention from its causal kernels, and BERT's from all that are fused. *Full "
    "attention, same class* has none. Newer runs leave the masks out."
)


def page(result: dict) -> str:
    """All tables, as Markdown."""
    where = result["environment"]
    size = where["size"]
    lines = [
        f"# Whole models on one GPU, {where['date']}",
        "",
        f"{machine(where)}; torch {where['torch']}, transformers {where['transformers']}, linpass "
        f"{where['linpass']} ({where['commit'] or 'commit unknown'}). Command: `{where['command']}`.",
        "",
        f"{size['embed_dim']} wide, {size['depth']} layers, {size['heads']} heads, vocabulary {size['vocab_size']:,}; "
        "the Linformer is that of the preset `base` with the k and b of each n, "
        f"{norm_of(where)}; the others have its parameters within "
        "1 %, but for the table of positions of a GPT-2 of long rows. Random weights, random token ids. Models of one "
        f"length and mode are timed in turns; medians [quartiles] of {where['rounds']} × {where['calls']} calls, "
        f"prefill {where['prefill_calls']}; of five or more where they take more than 3 s together.",
    ]
    if not where.get("rivals_masks"):
        lines += ["", WITH_MASKS]
    for section, title in (("training", "Training"), ("encoder", "Training of the encoder")):
        lines += training_tables(result, section, title)
    lines += [*prefill_table(result), *profile_tables(all_rows(result), line), *notes(result)]
    return "\n".join(lines) + "\n"


def training_tables(result: dict, section: str, title: str) -> list[str]:
    rows, where = measured(result, section), result["environment"]
    if not rows:
        return []
    body = []
    for n, name in dict.fromkeys((n, name) for n, _, name in sorted(rows, key=lambda key: key[0])):
        pair = [rows.get((n, mode, name)) for mode in MODES]
        faster = best(rows, n, (name,)) or {}
        cells = [f"{row['tokens_per_s']:,.0f} ({spread(row)})" if row else None for row in pair]
        memory = [row["peak_MiB"] if row else None for row in pair]
        body.append([n, name, f"{faster['parameters']:,}", *cells, faster["mode"], *memory, faster["loss"]])
    head = ["n", "model", "parameters", *(f"{mode}: tokens/s (ms)" for mode in MODES), "faster"]
    head += [*(f"{mode}: peak MiB" for mode in MODES), "last loss"]
    text = (
        f"One optimizer step of {where['batch_tokens']:,} tokens (one row where that is longer): forward, loss, "
        "backward, AdamW (fused). Weights in float32, bfloat16 autocast, for all. The loss of all is "
        f"`linear_cross_entropy` (here: `{where['loss']}`), which never forms the logits. Compiled: `torch.compile`, "
        "default mode, everything but the loss and the optimizer. Bound: the same model, the sum of q, k and v in the "
        "place of normalisation, rotation, mixing and attention. Peak memory: model, optimizer and one step."
    )
    if any(name == UNEVEN for _n, _mode, name in rows):
        text += (
            f" *{UNEVEN.partition(', ')[2].capitalize()}*: from half of n to all of it, about three quarters on "
            "average, padded on the left; its tokens per second count the padding."
        )
    return ["", f"## {title}", "", text, *table(head, body), *comparison_table(result, section)]


def comparison_table(result: dict, section: str) -> list[str]:
    body = []
    for n, found in comparisons(result, section).items():
        share = None if found["over_bound"] is None else f"{100 * found['over_bound']:.1f} %"
        marks = ["yes" if met else "no" if met is False else None for met in (found["rival_met"], found["bound_met"])]
        rival = [found["rival"], found["over_rival"], found["rival_target"], marks[0]]
        body.append([n, found["mode"], *rival, share, f"{100 * BOUND_TARGET:.0f} %", marks[1]])
        body[-1].append(found["over_full_attention"])
    head = ["n", "mode", "fastest rival", "× rival", "target", "met", "of the bound", "target", "met"]
    modes = sorted({mode for _n, mode, _variant in measured(result, section)})
    kind = f"all {modes[0]}" if len(modes) == 1 else "each in its faster mode"
    text = f"linpass over the others, {kind}:"
    return ["", text, *table([*head, "× full attention, same class"], body)]


def spread(row: dict) -> str:
    return f"{row['ms'][0]} [{row['ms'][1]}, {row['ms'][2]}]"


def prefill_table(result: dict) -> list[str]:
    rows = prefills(result)
    if not rows:
        return []
    body = []
    for mode, n, batch in sorted({key[:3] for key in rows}, key=lambda key: (key[0] == "compiled", *key[1:])):
        ours, theirs, bound = (rows.get((mode, n, batch, name)) for name in (OURS, "Llama", BOUND))
        cells = [f"{row['tokens_per_s']:,.0f} ({spread(row)})" if row else None for row in (ours, theirs)]
        share = ratio(ours, bound)
        memory = [row[key] if row else None for key in ("peak_MiB", "cache_MiB") for row in (ours, theirs)]
        compiled, part = "yes" if mode == "compiled" else "", f"{100 * share:.1f} %" if share else None
        body.append([n, batch, compiled, *cells, ratio(ours, theirs), part, *memory])
    head = ["n", "batch", "compiled", "linpass: tokens/s (ms)", "Llama: tokens/s (ms)", "×", "of the bound"]
    head += ["linpass: peak MiB", "Llama: peak MiB", "linpass: cache MiB", "Llama: cache MiB"]
    text = (
        "A forward pass over prompts of n tokens that leaves a cache, logits of the last position; bfloat16 weights. "
        "Llama with sdpa and a dynamic cache. Bound: the same model without attention and without a cache."
    )
    return ["", "## Prefill", "", text, *table(head, body)]


def profile_tables(rows: list[dict], line: Callable[[dict], str]) -> list[str]:
    """The longest kernels of each row that has them."""
    lines = []
    for row in (row for row in rows if "profile" in row and row["variant"].startswith(("linpass", "bound"))):
        found = row["profile"]
        lines += ["", f"{line(row)}: {100 * found['outside_kernels']:.1f} % of the time outside of kernels."]
        longest = found["top"][:SHOWN]
        share = [[f"`{name}`", count, ms, f"{100 * ms / found['call_ms']:.1f} %"] for name, count, ms in longest]
        lines += table(["kernel", "launches", "ms", "of the call"], share)
    head = [
        "",
        "## Where the time goes",
        "",
        "The longest kernels of our own rows; those of the others are in the JSON file.",
    ]
    return [*head, *lines] if lines else []


def notes(result: dict) -> list[str]:
    rows = [row for row in all_rows(result) if "failed" in row]
    lines = ["", "Failed:", "", *(f"- {line(row)}" for row in rows)] if rows else []
    apart = [f"- {section}, n = {n}, {name}: {a} and {b}" for section, n, name, a, b in losses_apart(result)]
    lines += ["", "Losses of compiled and eager steps that differ:", "", *apart] if apart else []
    left = [f"- {names['section']}: {line(names)}" for names in result["left_out"]]
    return lines + (["", "Left out for want of time:", "", *left] if left else [])
