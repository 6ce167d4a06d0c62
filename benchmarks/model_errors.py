"""Whole models against themselves in float64, and twice: ``python -m benchmarks.model_errors RESULT.json``, a minute.

A row says how far outputs and gradients of a Linformer of the preset ``base``, with random weights, are from those of
the same weights in float64, and whether a second run gives the same bits: with the fused kernels, and with PyTorch's
functions beside them, whose error is what the precision costs by itself. On a CPU (``--smoke``: tiny models) both are
PyTorch's.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import models_gpu_cases as cases
from benchmarks.attention_gpu_gate import tolerances
from benchmarks.environment import describe
from benchmarks.report_file import (
    Report,
    add_common_arguments,
    add_smoke,
    command_line,
    device_of,
    earlier_result,
    machine,
    norm_of,
    table,
)
from linpass import LinformerConfig

WAYS = {"kernels": "sdpa", "PyTorch": "eager"}  # attn_implementation


class Case(NamedTuple):
    """A computation: ``generated`` of the n tokens are given one by one, behind a prompt of the others."""

    name: str
    config: LinformerConfig
    precision: str
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    learns: bool = False
    generated: int = 0


class Sizes(NamedTuple):
    """Of the model; n, k and b of a causal row; n and k of an encoder's; n, k and b of a prompt; tokens behind it."""

    model: cases.Size = cases.Size()
    causal: tuple[int, int, int] = (1024, 128, 32)
    encoder: tuple[int, int] = (512, 128)
    prompt: tuple[int, int, int] = (8192, 256, 128)
    generated: int = 200
    rows: int = 2
    window: int = 128


SMOKE = Sizes(cases.Size(32, 2, 2, 384), (64, 16, 16), (64, 16), (64, 16, 16), generated=20, window=32)


def all_cases(sizes: Sizes) -> list[Case]:
    causal, prompt = (
        cases.config_for(sizes.model, *lengths, window_size=sizes.window) for lengths in (sizes.causal, sizes.prompt)
    )
    (n, k), learned = sizes.encoder, {"projection": "learned", "projection_sharing": "headwise"}
    encoder = cases.config_for(sizes.model, n, k, n, causal=False, **learned)
    return [
        *(Case("training", config, "float32", learns=True) for config in (causal, encoder)),
        *(Case("training", config, "bfloat16 autocast", autocast=True, learns=True) for config in (causal, encoder)),
        Case("prompt", prompt, "bfloat16", torch.bfloat16),
        Case(
            f"{sizes.generated} tokens behind a prompt", prompt, "bfloat16", torch.bfloat16, generated=sizes.generated
        ),
    ]


def compute(case: Case, model: Any, ids: Tensor, autocast: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of their cross-entropy with the next token (an encoder's: with the token itself)."""
    if not case.learns:
        return read(model, ids, case.generated), {}
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids, use_cache=False).logits
    targets = ids[:, 1:] if case.config.causal else ids
    kept = logits[:, : targets.shape[1]].flatten(0, 1)
    F.cross_entropy(kept.to(torch.promote_types(kept.dtype, torch.float32)), targets.flatten()).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return logits.detach(), gradients


@torch.no_grad()
def read(model: Any, ids: Tensor, generated: int) -> Tensor:
    """Logits behind a prompt and behind each of the tokens after it."""
    prompt, rest = ids.split([ids.shape[1] - generated, generated], 1)
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    logits = [output.logits]
    for token in rest.split(1, 1) if generated else ():
        logits.append(model(input_ids=token, past_key_values=output.past_key_values, use_cache=True).logits)
    return torch.cat(logits, 1)


def compare(case: Case, way: str, rows: int, device: torch.device) -> dict:
    """A row: relative errors against float64 on the same weights, and whether two runs are equal to the bit."""
    torch.manual_seed(0)
    with device:
        model = cases.linformer(case.config).to(case.dtype).eval()
        truth = cases.linformer(case.config).double().eval()
        ids = torch.randint(case.config.vocab_size, (rows, case.config.seq_length))
    truth.load_state_dict(model.state_dict())
    truth.set_attn_implementation(WAYS["PyTorch"])
    model.set_attn_implementation(WAYS[way])
    true_logits, true_gradients = compute(case, truth, ids, autocast=False)
    (logits, gradients), (logits_again, again) = (compute(case, model, ids, case.autocast) for _ in range(2))
    row = {"outputs": tolerances.relative_error(logits, true_logits)}
    if case.learns:
        errors = {name: tolerances.relative_error(gradients[name], true) for name, true in true_gradients.items()}
        flat = [torch.cat([each[name].double().flatten() for name in errors]) for each in (gradients, true_gradients)]
        worst = max(errors, key=lambda name: errors[name])
        row |= {"gradients": tolerances.relative_error(*flat), "worst": errors[worst], "worst_parameter": worst}
    equal = all(torch.equal(gradients[name], again[name]) for name in gradients)
    return row | {"same_bits": equal and torch.equal(logits, logits_again)}


def line(row: dict) -> str:
    """A row for the screen."""
    return ", ".join(
        f"{name} {value:.2g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
    )


def page(result: dict) -> str:
    where = result["environment"]
    body = []
    for row in result["errors"]:
        if "failed" in row:
            body.append([row["case"], row["model"], row["n"], row["precision"], row["attention"], row["failed"]])
            continue
        numbers = [f"{row[name]:.2g}" if name in row else None for name in ("outputs", "gradients", "worst")]
        names = [row[name] for name in ("case", "model", "n", "precision", "attention")]
        worst = row.get("worst_parameter")
        body.append([*names, *numbers, worst and f"`{worst}`", "yes" if row["same_bits"] else "no"])
    head = [
        "computation",
        "model",
        "n",
        "precision",
        "attention",
        "outputs",
        "all gradients",
        "worst",
        "of",
        "same bits",
    ]
    lines = [
        f"# Whole models against float64, {where['date']}",
        "",
        f"{machine(where)}; torch {where['torch']}, transformers {where['transformers']}, linpass {where['linpass']}"
        f" ({where['commit']}). Command: `{where['command']}`.",
        "",
        "Errors relative in the Frobenius norm, against the same weights in float64 by PyTorch's functions: of the "
        "logits, of the gradients of all parameters together, and of the one parameter that is off the most. *Same "
        f"bits*: of two runs, outputs and every gradient. Models {norm_of(where)}.",
        *table(head, body),
    ]
    return "\n".join(lines) + "\n"


def run(
    path: Path, sizes: Sizes, device: torch.device, seconds: float, command: str = "", done: dict | None = None
) -> dict:
    """Every case in both ways; writes RESULT.json and RESULT.md, and returns the result."""
    environment = describe() | {"device": device.type, "command": command, "qk_norm": cases.preset()["qk_norm"]}
    report = Report(path, seconds, "model_errors", environment, ("errors",), line, done)
    for case in all_cases(sizes):
        model = "causal" if case.config.causal else "encoder"
        names = {"case": case.name, "model": model, "n": case.config.seq_length, "precision": case.precision}
        for way in WAYS:
            report.add("errors", names | {"attention": way}, partial(compare, case, way, sizes.rows, device))
    return report.close(page)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Errors of whole models against float64, and equal bits of two runs.")
    add_common_arguments(parser)
    add_smoke(parser)
    arguments = parser.parse_args(words)
    device = device_of(arguments, parser)
    done = earlier_result(arguments.resume, "model_errors", parser)
    sizes = SMOKE if arguments.smoke else Sizes()
    command = command_line("benchmarks.model_errors", words)
    result = run(arguments.result, sizes, device, arguments.seconds, command, done)
    print(json.dumps({"rows": len(result["errors"]), "failed": sum("failed" in row for row in result["errors"])}))


if __name__ == "__main__":
    main()
