"""The command ``linpass``: train, evaluate, generate, compare.

Only the standard library is imported before a command is known to run, so that help and wrong flags answer at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from linpass.errors import InputError

METHODS = ("gradient", "single-pass")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def make_parser() -> Parser:
    """The commands; ``train`` and ``compare`` have parsers of their own, in ``training`` and ``singlepass``."""
    parser = Parser(prog="linpass", description="Linformer language models at linear cost.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,evaluate,generate,compare}")
    commands.add_parser("train", help="train a causal Linformer, or a classifier in one pass", add_help=False)
    commands.add_parser("compare", help="a classifier by gradient descent and in a single pass", add_help=False)
    generate = commands.add_parser("generate", help="continue a prompt", description="Continue a prompt.")
    generate.add_argument("model", help="folder with a causal model and its tokenizer, such as ./final_model")
    generate.add_argument("prompt", help="text to continue")
    generate.add_argument("--max_new_tokens", type=_whole(1), default=128, help="most tokens to add [%(default)s]")
    generate.add_argument("--temperature", type=_positive, default=0.8, help="more than 0 [%(default)s]")
    generate.add_argument(
        "--top_k", type=_whole(0), default=50, help="likeliest tokens to draw from, 0: all [%(default)s]"
    )
    generate.add_argument("--top_p", type=_share, default=1.0, help="probability to draw from [%(default)s]")
    generate.add_argument("--seed", type=_whole(0), default=42, help="of the draws [%(default)s]")
    generate.add_argument("--greedy", action="store_true", help="always the likeliest token, no draws")
    _add_evaluate(commands)
    return parser


def _add_evaluate(commands) -> None:
    usage = "linpass evaluate MODEL --text_files FILE [FILE ...] [flags below]"
    text = "Perplexity, bits per byte and loss by position of any causal language model of transformers."
    evaluate = commands.add_parser("evaluate", usage=usage, help="measure a model on text", description=text)
    evaluate.add_argument("model", help="folder or Hub name of a causal model and its tokenizer, such as ./final_model")
    evaluate.add_argument(
        "--text_files",
        nargs="+",
        required=True,
        metavar="FILE",
        help=".txt (a file is a document), .jsonl, .parquet, also .gz/.zst",
    )
    evaluate.add_argument("--text_column", default="text", help="field or column that holds the text [%(default)s]")
    evaluate.add_argument("--seq_length", type=_whole(1), help="tokens of a window [as many as the model is made for]")
    evaluate.add_argument("--batch_size", type=_whole(1), default=8, help="windows at a time [%(default)s]")
    evaluate.add_argument("--max_documents", type=_whole(1), help="use the first documents only [all]")
    evaluate.add_argument(
        "--output_dir", default="./evaluation", help="for evaluation.json, loss_by_position.png [%(default)s]"
    )
    evaluate.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="[%(default)s]")
    evaluate.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: the accelerator if there is one")
    evaluate.add_argument("--trust_remote_code", action="store_true", help="run the code that the model brings")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status, 2 for input that cannot be used."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["train"]:
            run_train(arguments[1:])
            return 0
        if arguments[:1] == ["compare"]:
            run_compare(arguments[1:])
            return 0
        options = vars(make_parser().parse_args(arguments))
        if options.pop("command") == "evaluate":
            run_evaluate(options.pop("model"), options.pop("text_files"), **options)
        else:
            run_generate(options.pop("model"), options.pop("prompt"), **options)
        return 0
    except InputError as error:
        print(f"linpass: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run_train(flags: list[str]) -> None:
    """``linpass train``."""
    method, flags = _take_method(flags)
    if method == "single-pass":
        run_single_pass(flags)
        return
    if "-h" in flags or "--help" in flags:
        from linpass.training.arguments import train_help

        print(train_help())
        return
    from linpass.training.parser import TrainParser

    parser = TrainParser()
    if "--help_all" in flags:
        parser.print_help()
        return
    run = parser.parse(flags)
    from linpass.training.train import train

    train(run)


def run_single_pass(flags: list[str]) -> None:
    """``linpass train --method single-pass``."""
    if "-h" in flags or "--help" in flags:
        from linpass.singlepass.command_arguments import single_pass_help

        print(single_pass_help())
        return
    from linpass.singlepass.command_parser import single_pass_parser

    parser = single_pass_parser()
    if "--help_all" in flags:
        parser.print_help()
        return
    sources, arguments = parser.parse(flags)
    from linpass.singlepass.run import train_single_pass

    train_single_pass(sources, arguments)


def run_compare(flags: list[str]) -> None:
    """``linpass compare``."""
    if "-h" in flags or "--help" in flags:
        from linpass.singlepass.command_arguments import compare_help

        print(compare_help())
        return
    from linpass.singlepass.command_parser import compare_parser

    sources, arguments = compare_parser().parse(flags)
    from linpass.singlepass.compare import compare

    compare(sources, arguments)


def run_evaluate(model: str, text_files: list[str], **options) -> None:
    """``linpass evaluate``."""
    from transformers.utils import logging

    from linpass.evaluate import evaluate

    logging.disable_progress_bar()  # "Loading weights" would stand before the table
    evaluate(model, text_files, **options)


def run_generate(model: str, prompt: str, **options) -> None:
    """``linpass generate``."""
    if not prompt.strip():
        raise InputError(f"prompt={prompt!r} must hold text")
    from transformers.utils import logging

    from linpass.generate import generate

    logging.disable_progress_bar()  # "Loading weights" would stand before the text
    generate(model, prompt, **options)


def _take_method(flags: list[str]) -> tuple[str, list[str]]:
    """The value of ``--method``, and the other flags."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", choices=METHODS, default=METHODS[0])
    options, others = parser.parse_known_args(flags)
    return options.method, others


def _whole(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, {least} or more")
        return int(text)

    return whole_number


def _positive(text: str) -> float:
    return _number(text, lambda number: 0 < number < float("inf"), "more than 0")


def _share(text: str) -> float:
    return _number(text, lambda number: 0 < number <= 1, "more than 0 and at most 1")


def _number(text: str, valid: Callable[[float], bool], rule: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not valid(number):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number, {rule}")
    return number


if __name__ == "__main__":
    sys.exit(main())
