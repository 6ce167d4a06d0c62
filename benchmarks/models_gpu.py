"""Whole models on one GPU beside transformers': ``python -m benchmarks.models_gpu RESULT.json``, many minutes.

``training``  tokens per second of an optimizer step of the causal model, beside GPT-2 and Llama of equal parameters,
              our class with full attention, and the bound: our model without attention; eager and compiled
``prefill``   a forward pass over prompts that leaves a cache, beside Llama
``encoder``   the same as training for the masked model, beside BERT

All models of one length and mode are timed in turns. Every row is written to RESULT.json as it comes; the tables stand
in RESULT.md in the end, and the last line printed is a summary in JSON. The rows with a target come first. ``--smoke``
shrinks everything to seconds on a CPU: it tests the program, its numbers mean nothing.
"""

import argparse
import json
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import models_gpu_cases as cases
from benchmarks.models_gpu_report import line, page, summary
from benchmarks.race import Rounds, race
from benchmarks.report_file import Report, add_common_arguments, add_smoke, command_line, device_of, earlier_result

PARTS = ("training", "prefill", "encoder")
MODES = ("compiled", "eager")
LONGEST_COMPILED_PROMPT = 8192


class Plan(NamedTuple):
    """What to measure.

    Attributes:
        training: k and b by n, most important first; so for ``prefill``.
        encoder: k by n.
        batches: rows of a prefill.
        batch_tokens: tokens of an optimizer step.
        compiler: options of torch.compile.
        names: models to measure; None: all.
    """

    parts: tuple[str, ...] = PARTS
    modes: tuple[str, ...] = MODES
    names: tuple[str, ...] | None = None
    size: cases.Size = cases.Size()
    training: dict[int, tuple[int, int]] = {1024: (128, 32), 32768: (512, 128), 8192: (256, 128)}
    prefill: dict[int, tuple[int, int]] = {
        1024: (128, 32),
        8192: (256, 128),
        32768: (512, 128),
        4096: (256, 64),
        131072: (1024, 128),
    }
    encoder: dict[int, int] = {512: 128, 2048: 256}
    batches: tuple[int, ...] = (1, 16)
    batch_tokens: int = 65536
    compiler: dict = {}
    rounds: Rounds = Rounds()
    prefill_rounds: Rounds = Rounds(rounds=20, calls=1)


SMOKE = Plan(
    size=cases.Size(32, 1, 2, 384),
    training={64: (16, 16)},
    prefill={64: (16, 16)},
    encoder={64: 16},
    batches=(2,),
    batch_tokens=128,
    compiler={"backend": "eager"},
    rounds=Rounds(2, 2),
    prefill_rounds=Rounds(4, 1),
)


def train_causal(report: Report, plan: Plan, device: torch.device) -> None:
    for n, (k, b) in plan.training.items():
        config = cases.config_for(plan.size, n, k, b, **narrow(plan))
        race_training(report, plan, "training", {"n": n, "k": k, "b": b}, cases.CAUSAL, config, device)


def train_encoder(report: Report, plan: Plan, device: torch.device) -> None:
    """E and F of the paper: learned for every position, shared by the heads of a layer."""
    for n, k in plan.encoder.items():
        config = cases.config_for(plan.size, n, k, n, causal=False, projection="learned", projection_sharing="headwise")
        race_training(report, plan, "encoder", {"n": n, "k": k}, cases.MASKED_LM, config, device)


def race_training(report, plan, section, names, models, config, device) -> None:
    if "compiled" in plan.modes and not report.is_over():
        cases.introduce(list(wanted(models, plan).values()), config)
    for mode in plan.modes:
        options = plan.compiler if mode == "compiled" else None
        builders = {
            name: partial(cases.training_step, build, config, plan.batch_tokens, device, options, name == cases.UNEVEN)
            for name, build in wanted(models, plan).items()
        }
        race(report, section, names | {"mode": mode}, builders, device, plan.rounds)


def prefill(report: Report, plan: Plan, device: torch.device) -> None:
    """Not compiled, as a prompt has another length every time; one short row compiled too: what Python costs it."""
    for mode in ("eager", "compiled"):
        options = plan.compiler if mode == "compiled" else None
        for n, (k, b) in plan.prefill.items():
            config = cases.config_for(plan.size, n, k, b, **narrow(plan))
            for batch in plan.batches if mode == "eager" else plan.batches[:1]:
                if mode == "compiled" and (mode not in plan.modes or n > LONGEST_COMPILED_PROMPT):
                    continue
                builders = {
                    name: partial(cases.prefill, build, config, batch, device, options)
                    for name, build in wanted(cases.PREFILL, plan).items()
                }
                names = {"n": n, "k": k, "b": b, "batch": batch} | ({"mode": mode} if mode == "compiled" else {})
                race(report, "prefill", names, builders, device, plan.prefill_rounds)


def wanted(models: dict[str, cases.Build], plan: Plan) -> dict[str, cases.Build]:
    return {name: build for name, build in models.items() if plan.names is None or name in plan.names}


def narrow(plan: Plan) -> dict:
    """Rows of a smoke test are shorter than the preset's window."""
    return {"window_size": 32} if plan.size == SMOKE.size else {}


def describe(device: torch.device, plan: Plan, command: str) -> dict:
    from benchmarks.environment import describe as describe_machine
    from benchmarks.environment import loss_implementation

    return describe_machine() | {
        "device": device.type,
        "size": plan.size._asdict(),
        "loss": loss_implementation(device.type),
        "batch_tokens": plan.batch_tokens,
        "rounds": plan.rounds.rounds,
        "calls": plan.rounds.calls,
        "prefill_calls": plan.prefill_rounds.rounds * plan.prefill_rounds.calls,
        "rivals_masks": "none",
        "qk_norm": cases.preset()["qk_norm"],
        "command": command,
    }


def run(
    path: Path, plan: Plan, device: torch.device, seconds: float, command: str = "", done: dict | None = None
) -> dict:
    """All parts of the plan; writes RESULT.json and RESULT.md, and returns the result."""
    report = Report(path, seconds, "models_gpu", describe(device, plan, command), PARTS, line, done)
    measure = {"training": train_causal, "prefill": prefill, "encoder": train_encoder}
    with cases.without_masks():
        for part in (part for part in PARTS if part in plan.parts):
            measure[part](report, plan, device)
    return report.close(page)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Whole models on one GPU: training, prefill, encoder.")
    add_common_arguments(parser)
    add_smoke(parser)
    parser.add_argument("--only", help=f"some of the parts, with commas between: {','.join(PARTS)}")
    parser.add_argument("--modes", help=f"some of the modes of training: {','.join(MODES)}")
    parser.add_argument("--models", help=f"some of the models, with semicolons between: {';'.join(cases.CAUSAL)};BERT")
    parser.add_argument("--lengths", help="some of the lengths n, with commas between")
    parser.add_argument("--profile", action="store_true", help="list the longest kernels of every row, too")
    arguments = parser.parse_args(words)
    device = device_of(arguments, parser)
    plan = chosen(arguments, parser)
    warnings.simplefilter("ignore")  # of compilers about their own parts
    done = earlier_result(arguments.resume, "models_gpu", parser)
    command = command_line("benchmarks.models_gpu", words)
    result = run(arguments.result, plan, device, arguments.seconds, command, done)
    print(json.dumps(summary(result)))


def chosen(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> Plan:
    """The plan of the command line."""
    plan = SMOKE if arguments.smoke else Plan()
    for field, given, known in (("parts", arguments.only, PARTS), ("modes", arguments.modes, MODES)):
        if given:
            plan = plan._replace(**{field: tuple(given.split(","))})
            if not set(given.split(",")) <= set(known):
                parser.error(f"takes {','.join(known)}, not {given}")
    if arguments.models:
        plan = plan._replace(names=tuple(arguments.models.split(";")))
        known = {*cases.CAUSAL, *cases.MASKED_LM}
        if not set(plan.names or ()) <= known:
            parser.error(f"--models takes {';'.join(known)}, not {arguments.models}")
    if arguments.lengths:
        lengths = {int(word) for word in arguments.lengths.split(",")}
        kept = {
            field: {n: sizes for n, sizes in getattr(plan, field).items() if n in lengths}
            for field in ("training", "prefill", "encoder")
        }
        plan = plan._replace(**kept)
    rounds, prefill_rounds = (kept._replace(profile=arguments.profile) for kept in (plan.rounds, plan.prefill_rounds))
    return plan._replace(rounds=rounds, prefill_rounds=prefill_rounds)


if __name__ == "__main__":
    main()
