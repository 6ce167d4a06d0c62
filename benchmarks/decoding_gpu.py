"""Decoding on one GPU beside Llama: ``python -m benchmarks.decoding_gpu RESULT.json``, some minutes.

Latency of a token, tokens per second and bytes of the cache behind contexts of 512 to 131,072 tokens, one row and 64.
One Linformer, of k for the longest context, decodes behind all of them: token by token (eager), compiled in one graph,
from a CUDA graph, and by ``generate``; a Llama of equal parameters with a dynamic cache, with a static one compiled in
one graph, and by ``generate``. All ways of one context and batch are timed in turns.

Every row is written to RESULT.json as it comes; the tables stand in RESULT.md in the end, and the last line printed is
a summary in JSON. The rows with a target come first; what does not fit in memory says so in its row. ``--smoke``
shrinks everything to seconds on a CPU: it tests the program, its numbers mean nothing.
"""

import argparse
import json
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import decoding_gpu_cases as cases
from benchmarks.decoding_gpu_report import line, page, summary
from benchmarks.models_gpu_cases import Size
from benchmarks.race import Rounds, race
from benchmarks.report_file import Report, add_common_arguments, add_smoke, command_line, device_of, earlier_result

# What a result says of the Linformer.
LINFORMER = ("seq_length", "k", "block_size", "window_size", "qk_norm")


class Plan(NamedTuple):
    """What to measure.

    Attributes:
        situations: context and batch, most important first.
        names: ways to decode; None: all.
        seq_length, slots, block, window: of the Linformer; seq_length is the longest context.
        tokens: decoded in one timed call.
        compiler: options of torch.compile.
    """

    situations: tuple[tuple[int, int], ...] = (
        *((32768, 64), (512, 1), (131072, 1), (512, 64), (131072, 64)),
        *((32768, 1), (2048, 64), (2048, 1), (8192, 64), (8192, 1)),
    )
    names: tuple[str, ...] | None = None
    size: Size = Size()
    seq_length: int = 131072
    slots: int = 1024
    block: int = 128
    window: int = 128
    tokens: int = 32
    compiler: dict = {"mode": "reduce-overhead"}
    rounds: Rounds = Rounds(rounds=7, calls=1, versions=6)


SMOKE = Plan(
    situations=((64, 2), (128, 1)),
    size=Size(32, 2, 2, 384),
    seq_length=128,
    slots=16,
    block=16,
    window=16,
    tokens=4,
    compiler={"backend": "eager"},
    rounds=Rounds(rounds=2, calls=1, versions=6),
)


def describe(models: cases.Models, plan: Plan, command: str) -> dict:
    from benchmarks.environment import describe as describe_machine

    config = models.config
    return describe_machine() | {
        "device": models.device.type,
        "size": plan.size._asdict(),
        "linformer": {name: getattr(config, name) for name in LINFORMER},
        "parameters": models.parameters,
        "tokens": plan.tokens,
        "rounds": plan.rounds.rounds,
        "command": command,
    }


def run(
    path: Path, plan: Plan, device: torch.device, seconds: float, command: str = "", done: dict | None = None
) -> dict:
    """All situations of the plan; writes RESULT.json and RESULT.md, and returns the result."""
    models = cases.Models(plan.size, plan.seq_length, plan.slots, plan.block, plan.window, device)
    report = Report(path, seconds, "decoding_gpu", describe(models, plan, command), ("decoding",), line, done)
    for context, batch in plan.situations:
        situation = cases.Situation(models, context, batch, plan.tokens, plan.compiler)
        builders = {
            name: partial(way, situation)
            for name, way in cases.WAYS.items()
            if (plan.names is None or name in plan.names) and (batch > 1 or name != cases.UNEVEN)
        }
        race(report, "decoding", {"context": context, "batch": batch}, builders, device, plan.rounds)
        situation.__dict__.clear()  # its caches, before the next ones are made
    return report.close(page)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Decoding on one GPU: latency, tokens per second, bytes of the cache.")
    add_common_arguments(parser)
    add_smoke(parser)
    parser.add_argument("--contexts", help="some of the contexts, with commas between")
    parser.add_argument("--batches", help="some of the batches, with commas between")
    parser.add_argument("--ways", help=f"some of the ways, with semicolons between: {';'.join(cases.WAYS)}")
    parser.add_argument("--profile", action="store_true", help="list the longest kernels of every row, too")
    arguments = parser.parse_args(words)
    device = device_of(arguments, parser)
    plan = chosen(arguments, parser)
    warnings.simplefilter("ignore")  # of compilers about their own parts
    done = earlier_result(arguments.resume, "decoding_gpu", parser)
    command = command_line("benchmarks.decoding_gpu", words)
    result = run(arguments.result, plan, device, arguments.seconds, command, done)
    print(json.dumps(summary(result)))


def chosen(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> Plan:
    """The plan of the command line."""
    plan = SMOKE if arguments.smoke else Plan()
    for position, given in enumerate((arguments.contexts, arguments.batches)):
        if given:
            kept = {int(word) for word in given.split(",")}
            plan = plan._replace(situations=tuple(pair for pair in plan.situations if pair[position] in kept))
    if arguments.ways:
        plan = plan._replace(names=tuple(arguments.ways.split(";")))
        if not set(plan.names or ()) <= set(cases.WAYS):
            parser.error(f"--ways takes {';'.join(cases.WAYS)}, not {arguments.ways}")
    return plan._replace(rounds=plan.rounds._replace(profile=arguments.profile))


if __name__ == "__main__":
    main()
