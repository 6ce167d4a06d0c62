"""Attention alone on one GPU beside its rivals: ``python -m benchmarks.attention_gpu RESULT.json``, some minutes.

Measures two ceilings of the device (``ceilings``), checks our attention against float64 (``gate``; a variant of ours
whose check is red is not timed), then times every variant at every shape with its peak memory and its error
(``timing``), the most important also replayed from a CUDA graph (``graphs``). ``--quick`` is for tuning: ours and cuDNN
at the five lengths that have a target. ``--bidirectional`` measures the encoder's attention over k slots instead of the
causal one. Every row is written to RESULT.json as it comes; the tables stand in RESULT.md in the end, and the last line
printed is a summary in JSON. A variant that cannot run has the reason in its row.
"""

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import attention_gpu_bidirectional as bidirectional
from benchmarks import attention_gpu_cases as cases
from benchmarks import attention_gpu_gate as gate
from benchmarks.attention_gpu_measure import (
    Repeats,
    measure,
    measure_ceilings,
    measure_errors,
    measure_graph,
)
from benchmarks.attention_gpu_report import floor, line, page, summary
from benchmarks.report_file import Report, add_common_arguments, command_line, earlier_result
from linpass import attention_linformer, kernels_linformer

PARTS = ("ceilings", "gate", "timing", "graphs")
# Our ways to attend, by the names of their variants: what the gate stands before.
GATED = {cases.OURS.name: kernels_linformer, cases.OURS_IN_PYTORCH.name: attention_linformer}
LONGEST_GRAPH = 65536
ROW_SECONDS = 300  # chunk_gsa, the last of the rivals, tries some hundred kernels before its first row
SECTIONS = ("gate", "timing", "graphs")
Group = Sequence[cases.Variant]


class Plan(NamedTuple):
    """What to measure; ``copied`` bytes and the order of a product ``matmul`` for the ceilings."""

    parts: tuple[str, ...] = PARTS
    shapes: tuple[cases.Shape, ...] = tuple(cases.SHAPES)
    variants: tuple[tuple[cases.Variant, ...], ...] = (cases.CORE, cases.OTHERS)
    checks: tuple[Any, ...] = gate.CASES
    theme: str = "attention_gpu"
    batch_tokens: int = 65536
    matmul: int = 8192
    copied: int = 2**32
    repeats: Repeats = Repeats()


QUICK = Plan(
    shapes=tuple(cases.shapes(8, 64, cases.WITH_TARGET)),
    variants=(cases.CORE[:2],),
    checks=gate.SHORT,
    repeats=Repeats(10, 0.1),
)
BIDIRECTIONAL = Plan(
    shapes=bidirectional.SHAPES,
    variants=(bidirectional.CORE, bidirectional.OTHERS),
    checks=bidirectional.CASES,
    theme="attention_gpu_bidirectional",
)
QUICK_BIDIRECTIONAL = BIDIRECTIONAL._replace(
    variants=(bidirectional.CORE[:2],), checks=bidirectional.CASES[:2], repeats=QUICK.repeats
)


def check_all(report: Report, plan: Plan, device: torch.device) -> set[str]:
    """Names of our variants whose checks are not all green; the slower PyTorch functions have two cases only."""
    compared = {variant.name for group in plan.variants for variant in group}
    red = set()
    for name, module in GATED.items():
        if name not in compared:
            continue
        checks = plan.checks if name == cases.OURS.name else plan.checks[:2]
        # PyTorch's own fused backward passes add in any order.
        same_bits = name == cases.OURS.name
        if plan.theme == "attention_gpu":
            calls = {case.name: partial(gate.check, module.mix_and_attend, case, device, same_bits) for case in checks}
            calls["causality"] = partial(gate.check_causality, module.mix_and_attend, device)
        else:
            calls = {case.name: partial(bidirectional.check, module, case, device, same_bits) for case in checks}
        for case, call in calls.items():
            row = report.add("gate", {"variant": name, "case": case}, call)
            if not row or not row.get("passed"):
                red.add(name)
    return red


def time_one(
    report: Report,
    plan: Plan,
    variant: cases.Variant,
    shape: cases.Shape,
    inputs: list[torch.Tensor],
) -> None:
    """A row of times, memory, errors, and for ours the floor; errors past the limits of the tests are not timed."""

    def compute() -> dict:
        attention = variant.build(shape, inputs)
        errors = measure_errors(attention, shape)
        if variant.name in GATED and not errors["passed"]:
            return errors | {"failed": "its errors are past the limits of the tests: not timed"}
        row = measure(attention, inputs[0].device, plan.repeats) | errors
        if variant.name == cases.OURS.name and (ceilings := report.result["ceilings"]):
            rates = 1e12 * ceilings["matmul_tflop_per_s"], 1e12 * ceilings["copy_tbyte_per_s"]
            row |= floor(shape, len(inputs[0]), *rates)
            row["over_floor"] = round(row["both_ms"][0] / row["floor_ms"], 2)
        return row

    report.add("timing", shape.named() | {"variant": variant.name}, compute)


def time_all(report: Report, plan: Plan, red: set[str], device: torch.device) -> None:
    """For each width ours and the full attentions, next to each other in time, and their graphs; then rival by rival.

    So a rival whose compiler takes minutes keeps none from its turn that came before it; and the rivals' first turn is
    the rows with a target.
    """
    compared, *others = plan.variants
    others = [variant for group in others for variant in group]
    for width in dict.fromkeys((shape.heads, shape.dim) for shape in plan.shapes):
        shapes = [shape for shape in plan.shapes if (shape.heads, shape.dim) == width]
        time_group(report, plan, compared, shapes, red, device)
        plain = [variant for variant in others if variant.name in GATED]
        replay_group(report, plan, (*compared[:2], *plain), shapes, red, device)
    for has_target in (True, False):
        shapes = [shape for shape in plan.shapes if shape.has_target == has_target]
        for variant in others:
            time_group(report, plan, (variant,), shapes, red, device)
            if has_target and variant.name not in GATED:
                replay_group(report, plan, (variant,), shapes, red, device)


def time_group(
    report: Report, plan: Plan, group: Group, shapes: Sequence[cases.Shape], red: set[str], device: torch.device
) -> None:
    """With the time to launch."""
    if "timing" in plan.parts:
        for variant, shape, inputs in in_turns(report, plan, group, shapes, red, device):
            time_one(report, plan, variant, shape, inputs)


def replay_group(
    report: Report, plan: Plan, group: Group, shapes: Sequence[cases.Shape], red: set[str], device: torch.device
) -> None:
    """Without it, up to LONGEST_GRAPH tokens."""
    if "graphs" not in plan.parts or device.type != "cuda":
        return
    short = [shape for shape in shapes if shape.tokens <= LONGEST_GRAPH]
    for variant, shape, inputs in in_turns(report, plan, group, short, red, device):

        def compute(build=variant.build, shape=shape, inputs=inputs) -> dict:
            return measure_graph(build(shape, inputs), device, plan.repeats)

        report.add("graphs", shape.named() | {"variant": variant.name}, compute)


def in_turns(
    report: Report, plan: Plan, group: Group, shapes: Sequence[cases.Shape], red: set[str], device: torch.device
) -> Iterator[tuple[cases.Variant, cases.Shape, list[torch.Tensor]]]:
    """Shape by shape, all of the group that are not red, on the same tensors; none are made when the time is over."""
    variants = [variant for variant in group if variant.name not in red]
    for shape in shapes if variants else ():
        inputs = [] if report.is_over() else inputs_for(shape, plan, device)
        for variant in variants:
            yield variant, shape, inputs


def inputs_for(shape: cases.Shape, plan: Plan, device: torch.device) -> list[torch.Tensor]:
    return cases.make_inputs(shape, max(1, plan.batch_tokens // shape.tokens), device)


def describe(device: torch.device, plan: Plan, command: str) -> dict:
    from benchmarks.environment import describe as describe_machine

    triton, cudnn = kernels_linformer.triton, torch.backends.cudnn.version()
    return describe_machine() | {
        "device": device.type,
        "triton": triton.__version__ if triton else None,
        "cudnn": f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}" if cudnn else None,
        "batch_tokens": plan.batch_tokens,
        "repeats": plan.repeats.least,
        "command": command,
    }


def run(
    path: Path, plan: Plan, device: torch.device, seconds: float, command: str = "", done: dict | None = None
) -> dict:
    """All parts of the plan; writes RESULT.json and RESULT.md, and returns the result."""
    torch.manual_seed(0)
    report = Report(path, seconds, plan.theme, describe(device, plan, command), SECTIONS, line, done, ROW_SECONDS)
    report.result["ceilings"] = None
    if done and done["ceilings"]:
        report.result["ceilings"] = done["ceilings"]
    elif "ceilings" in plan.parts:
        ceilings = measure_ceilings(device, plan.repeats, plan.matmul, plan.copied)
        report.result["ceilings"] = ceilings
        print(ceilings, flush=True)
    if "gate" not in plan.parts:  # nothing is timed without a check
        plan = plan._replace(checks=plan.checks[:2])
    if set(plan.parts) != {"ceilings"}:
        time_all(report, plan, check_all(report, plan, device), device)
    return report.close(page)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Attention alone on one GPU, bfloat16: errors, times, memory, floors.")
    add_common_arguments(parser)
    parser.add_argument("--only", help=f"some of the parts, with commas between: {','.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="for tuning: ours and cuDNN at the lengths with a target")
    parser.add_argument("--bidirectional", action="store_true", help="the encoder's attention over k slots")
    arguments = parser.parse_args(words)
    if arguments.bidirectional:
        plan = QUICK_BIDIRECTIONAL if arguments.quick else BIDIRECTIONAL
    else:
        plan = QUICK if arguments.quick else Plan()
    if arguments.only:
        plan = plan._replace(parts=tuple(arguments.only.split(",")))
        if not set(plan.parts) <= set(PARTS):
            parser.error(f"--only takes {','.join(PARTS)}, not {arguments.only}")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    if kernels_linformer.triton is None:
        parser.error("needs Triton: without it PyTorch's way would be measured under the kernels' name")
    warnings.simplefilter("ignore")  # a back end that is asked for and refuses says why in warnings, row by row
    done = earlier_result(arguments.resume, plan.theme, parser)
    command = command_line("benchmarks.attention_gpu", words)
    result = run(arguments.result, plan, torch.device("cuda"), arguments.seconds, command, done)
    print(json.dumps(summary(result)))


if __name__ == "__main__":
    main()
