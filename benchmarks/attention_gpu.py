"""Causal attention on one GPU beside its rivals: ``python -m benchmarks.attention_gpu RESULT.json``, some minutes.

Measures two ceilings of the device (``ceilings``), checks our attention against float64 (``gate``; a variant of ours
whose check is red is not timed), then times every variant at every shape with its peak memory and its error
(``timing``), at short rows also replayed from a CUDA graph (``graphs``). ``--quick`` is for tuning: ours and cuDNN at
the five lengths that have a target. Every row is written to RESULT.json as it comes; the tables stand in RESULT.md in
the end, and the last line printed is a summary in JSON. A variant that cannot run has the reason in its row.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import attention_gpu_cases as cases
from benchmarks import attention_gpu_gate as gate
from benchmarks.attention_gpu_measure import (
    Repeats,
    measure,
    measure_ceilings,
    measure_errors,
    measure_graph,
    synchronize,
)
from benchmarks.attention_gpu_report import floor, line, page, summary
from linpass import attention_linformer, kernels_linformer

PARTS = ("ceilings", "gate", "timing", "graphs")
# Our ways to attend, by the names of their variants: what the gate stands before.
GATED = {cases.OURS.name: kernels_linformer, cases.OURS_IN_PYTORCH.name: attention_linformer}
LONGEST_GRAPH = 8192


class Plan(NamedTuple):
    """What to measure; ``copied`` bytes and the order of a product ``matmul`` for the ceilings."""

    parts: tuple[str, ...] = PARTS
    shapes: tuple[cases.Shape, ...] = tuple(cases.SHAPES)
    variants: tuple[tuple[cases.Variant, ...], ...] = (cases.CORE, cases.OTHERS)
    checks: tuple[gate.Case, ...] = gate.CASES
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


class Report:
    """Rows as they come, on the screen and in the file; no row is begun when the time is over.

    Rows that ``done``, an earlier result, holds are not measured again.
    """

    def __init__(self, path: Path, seconds: float, environment: dict, device: torch.device, done: dict | None = None):
        self.path, self.device, self.ends = path, device, time.perf_counter() + seconds
        sections = {"gate": [], "timing": [], "graphs": [], "left_out": []}
        self.result = {"theme": "attention_gpu", "environment": environment, "ceilings": None, **sections}
        self.done = done or sections

    def add(self, section: str, names: dict, compute: Callable[[], dict]) -> dict | None:
        for row in self.done[section]:
            if "failed" not in row and names.items() <= row.items():
                self.result[section].append(row)
                return row
        if time.perf_counter() > self.ends:
            self.result["left_out"].append({"section": section} | names)
            return None
        try:
            row = names | compute()
            synchronize(self.device)
        except Exception as error:  # one variant that this version or device cannot run must not end the others
            row = names | {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        self.result[section].append(row)
        self.write()
        print(line(row), flush=True)
        return row

    def write(self) -> None:
        self.path.write_text(json.dumps(self.result, indent=1) + "\n")


def check_all(report: Report, plan: Plan) -> set[str]:
    """Names of our variants whose checks are not all green; the slower PyTorch functions have two cases only."""
    compared = {variant.name for group in plan.variants for variant in group}
    red = set()
    for name, module in GATED.items():
        if name not in compared:
            continue
        checks = plan.checks if name == cases.OURS.name else plan.checks[:2]
        # PyTorch's own fused backward passes add in any order.
        same_bits = name == cases.OURS.name
        calls = {case.name: (gate.check, module.mix_and_attend, case, report.device, same_bits) for case in checks}
        calls["causality"] = (gate.check_causality, module.mix_and_attend, report.device)
        for case, (function, *arguments) in calls.items():
            row = report.add("gate", {"variant": name, "case": case}, partial(function, *arguments))
            if not row or not row.get("passed"):
                red.add(name)
    return red


def time_one(
    report: Report, plan: Plan, variant: cases.Variant, shape: cases.Shape, inputs: list[torch.Tensor]
) -> None:
    """A row of times, memory, errors, and for ours the floor; errors past the limits of the tests are not timed."""

    def compute() -> dict:
        attention = variant.build(shape, inputs)
        errors = measure_errors(attention, shape)
        if variant.name in GATED and not errors["passed"]:
            return errors | {"failed": "its errors are past the limits of the tests: not timed"}
        row = measure(attention, report.device, plan.repeats) | errors
        if variant is cases.OURS and (ceilings := report.result["ceilings"]):
            rates = 1e12 * ceilings["matmul_tflop_per_s"], 1e12 * ceilings["copy_tbyte_per_s"]
            row |= floor(shape, len(inputs[0]), *rates)
            row["over_floor"] = round(row["both_ms"][0] / row["floor_ms"], 2)
        return row

    report.add("timing", shape.named() | {"variant": variant.name}, compute)


def time_all(report: Report, plan: Plan, red: set[str]) -> None:
    """For each width of heads: ours and the full attentions next to each other in time; then graphs; then the rest."""
    for width in dict.fromkeys((shape.heads, shape.dim) for shape in plan.shapes):
        shapes = [shape for shape in plan.shapes if (shape.heads, shape.dim) == width]
        for number, group in enumerate(plan.variants):
            for shape in shapes if "timing" in plan.parts else ():
                variants = [variant for variant in group if variant.measured_at(shape) and variant.name not in red]
                inputs = inputs_for(shape, plan, report.device) if variants else []
                for variant in variants:
                    time_one(report, plan, variant, shape, inputs)
            if number == 0 and "graphs" in plan.parts and report.device.type == "cuda":
                replay_all(report, plan, shapes, red)


def replay_all(report: Report, plan: Plan, shapes: list[cases.Shape], red: set[str]) -> None:
    """Ours and cuDNN without the time to launch, at short rows."""
    for shape in (shape for shape in shapes if shape.tokens <= LONGEST_GRAPH):
        inputs = inputs_for(shape, plan, report.device)
        for variant in (variant for variant in (cases.OURS, cases.CUDNN) if variant.name not in red):

            def compute(build=variant.build, shape=shape, inputs=inputs) -> dict:
                return measure_graph(build(shape, inputs), report.device, plan.repeats)

            report.add("graphs", shape.named() | {"variant": variant.name}, compute)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    report = Report(path, seconds, describe(device, plan, command), device, done)
    if done and done["ceilings"]:
        report.result["ceilings"] = done["ceilings"]
    elif "ceilings" in plan.parts:
        ceilings = measure_ceilings(device, plan.repeats, plan.matmul, plan.copied)
        report.result["ceilings"] = ceilings
        print(ceilings, flush=True)
    if "gate" not in plan.parts:  # nothing is timed without a check
        plan = plan._replace(checks=plan.checks[:2])
    if set(plan.parts) != {"ceilings"}:
        time_all(report, plan, check_all(report, plan))
    report.write()
    path.with_suffix(".md").write_text(page(report.result))
    return report.result


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Causal attention on one GPU, bfloat16: errors, times, memory, floors."
    )
    parser.add_argument("result", type=Path, help="JSON file to write; the tables go beside it, with .md")
    parser.add_argument("--seconds", type=float, default=540, help="begin nothing after so long (default: 540)")
    parser.add_argument("--only", help=f"some of the parts, with commas between: {','.join(PARTS)}")
    parser.add_argument(
        "--resume", type=Path, help="an earlier RESULT.json of the same version and device: its rows are kept"
    )
    parser.add_argument("--quick", action="store_true", help="for tuning: ours and cuDNN at the lengths with a target")
    arguments = parser.parse_args(words)
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
    done = json.loads(arguments.resume.read_text()) if arguments.resume else None
    words = [Path(word).name if word.endswith(".json") else word for word in (sys.argv[1:] if words is None else words)]
    command = " ".join(["python -m benchmarks.attention_gpu", *words])
    result = run(arguments.result, plan, torch.device("cuda"), arguments.seconds, command, done)
    print(json.dumps(summary(result)))


if __name__ == "__main__":
    main()
