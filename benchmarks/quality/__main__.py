"""The commands, see the package."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import benchmarks.quality
from linpass.errors import InputError

RESULTS = Path("benchmarks/results/quality")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=benchmarks.quality.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="text files to a folder of data and archives that travel")
    prepare.add_argument("--train", nargs="+", required=True, metavar="FILE", help=".jsonl.zst and the like")
    prepare.add_argument("--validation", nargs="+", required=True, metavar="FILE")
    prepare.add_argument("--tokenizer", required=True, help="name or folder")
    prepare.add_argument("--output", type=Path, required=True)
    prepare.add_argument("--tokens", type=int, default=30_000_000, help="of a part [%(default)s]")
    prepare.add_argument("--parts", type=int, default=1, help="[%(default)s]")
    prepare.add_argument("--seed", type=int, default=0, help="of the documents' order and halves [%(default)s]")
    unpack = commands.add_parser("unpack", help="the archives back to a folder of data")
    unpack.add_argument("archives", nargs="+", type=Path)
    unpack.add_argument("--output", type=Path, required=True)
    run = commands.add_parser("run", help="the runs of themes; finished ones are skipped")
    run.add_argument("themes", nargs="+", help="files of benchmarks/quality without .json, or paths; in order")
    run.add_argument("--data", type=Path, required=True, help="a folder that prepare or unpack wrote")
    run.add_argument("--output", type=Path, default=RESULTS, help="results, also those of earlier days [%(default)s]")
    run.add_argument("--seconds", type=float, default=540, help="end by then [%(default)s]")
    run.add_argument("--workers_per_gpu", type=int, default=1, help="runs at a time on each GPU [%(default)s]")
    run.add_argument("--torch_compile", action="store_true", help="for all runs")
    run.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the evaluation")
    run.add_argument("--smoke", action="store_true", help="rehearse: tiny models, six steps")
    run.add_argument("--scratch", type=Path, help="for models and checkpoints of runs under way [in the system's own]")
    merge = commands.add_parser("merge", help="add the results of other folders, each run once")
    merge.add_argument("folders", nargs="+", type=Path)
    merge.add_argument("--into", type=Path, default=RESULTS, help="[%(default)s]")
    report = commands.add_parser("report", help="tables and pictures of what is finished")
    report.add_argument("--results", type=Path, default=RESULTS, help="[%(default)s]")
    report.add_argument("--untouched", action="store_true", help="with the untouched half: once, when all is chosen")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Carry out a command; the exit status, 2 for input that cannot be used."""
    options = make_parser().parse_args(words)
    try:
        if options.command == "prepare":
            from benchmarks.quality.data import prepare

            files = (options.train, options.validation, options.tokenizer, options.output)
            print(json.dumps(prepare(*files, options.tokens, options.parts, options.seed), indent=1))
        elif options.command == "unpack":
            from benchmarks.quality.data import unpack

            unpack(options.archives, options.output)
        elif options.command == "run":
            run(options)
        elif options.command == "merge":
            from benchmarks.quality.results import merge

            print(json.dumps(merge(options.folders, options.into)))
        else:
            from benchmarks.quality.report import write_report

            print(write_report(options.results, options.untouched))
    except InputError as error:
        print(f"benchmarks.quality: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """The queue, on every GPU that torch sees; without one on the processor."""
    import torch

    from benchmarks.environment import loss_implementation
    from benchmarks.quality.schedule import Schedule, Settings

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the queue's end, which stops its processes
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = range(torch.cuda.device_count())
    gpus = tuple(visible.split(",")[number] if visible else str(number) for number in numbers)
    settings = Settings(
        data=options.data,
        output=options.output,
        seconds=options.seconds,
        processes=options.workers_per_gpu,
        gpus=gpus,
        torch_compile=options.torch_compile,
        bf16=bool(gpus),
        dtype=options.dtype,
        loss=loss_implementation("cuda" if gpus else "cpu"),
        smoke=options.smoke,
        **({"scratch": options.scratch} if options.scratch else {}),
    )
    schedule = Schedule(options.themes, settings)
    schedule.work()
    print(f"{len(schedule.results.runs)} runs in {options.output}; {len(schedule.unfinished())} of these themes to do")


if __name__ == "__main__":
    sys.exit(main())
