"""Measure ``linpass train`` on GPUs: ``python -m benchmarks.training THEME --tokens FOLDER ... --tokenizer FOLDER``.

``speed``    tokens per second, utilisation and peak memory of the Linformer, GPT-2 and Llama of one preset and size,
             with and without torch.compile, one after the other in one process, same loss path, same data
``memory``   peak memory of one training step with the loss without logits, and with the logits
``run``      a whole training, its curve and its perplexity
``scaling``  tokens per second on 1 … N GPUs of one machine

The folders hold token ids (``linpass train`` leaves them in its ``--cache_dir``). Results go to ``--output``. Further
flags are those of ``linpass train``.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

WARMUP_LOGS = 1  # caches, compilation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("theme", choices=list(THEMES))
    parser.add_argument("--tokens", nargs="+", required=True, help="folders of token ids to train on")
    parser.add_argument("--validation", nargs="+", required=True, help="folders of token ids to validate on")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--preset", default="lumenspark")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/linpass_training"))
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of a speed run")
    parser.add_argument("--cases", nargs="+", default=["linformer", "gpt2", "llama"])
    parser.add_argument("--compile", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--label", default="", help="end of the result's name, for further flags")
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2])
    arguments, arguments.rest = parser.parse_known_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    from benchmarks.environment import describe

    result = {"theme": arguments.theme, "preset": arguments.preset, "environment": describe()}
    result |= THEMES[arguments.theme](arguments)
    path = arguments.output / f"training_{arguments.theme}{arguments.label}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def flags(arguments: argparse.Namespace, output: Path, *more: str) -> list[str]:
    """The command line of a run, without the program's name."""
    return [
        *("--preset", arguments.preset, "--token_folders", *arguments.tokens),
        *("--validation_token_folders", *arguments.validation, "--tokenizer", arguments.tokenizer),
        *("--output_dir", str(output), "--bf16", "--disable_tqdm", "True", *arguments.rest, *more),
    ]


def short(arguments: argparse.Namespace) -> list[str]:
    """Flags of a run that is only timed."""
    steps = str(arguments.steps)
    return ["--max_steps", steps, "--logging_steps", "2", "--eval_strategy", "no", "--save_strategy", "no"]


def speed(arguments: argparse.Namespace) -> dict:
    """Tokens per second of each architecture, eager and compiled."""
    rows = []
    for compiled in arguments.compile:
        for architecture in arguments.cases:
            more = ["--architecture", architecture] + (["--torch_compile", "True"] if compiled else [])
            row = {"architecture": architecture, "compiled": bool(compiled)}
            try:
                row |= timed_run(arguments, flags(arguments, scratch(arguments), *short(arguments), *more))
            except Exception as error:  # a result too
                row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            rows.append(row)
            print(json.dumps(row), flush=True)
    return {"rows": rows}


def timed_run(arguments: argparse.Namespace, command: list[str]) -> dict:
    """One run in this process; medians of what it logged."""
    import gc

    import torch

    from linpass.training import train
    from linpass.training.parser import TrainParser

    train.BASELINE_TOKENS = 100_000  # not what is measured here
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    start = time.perf_counter()
    result = train.train(TrainParser().parse(command))
    entries = read_log(scratch(arguments))
    return summary(entries) | {
        "seconds": round(time.perf_counter() - start, 1),
        "perplexity": result.perplexity if result else None,
    }


def read_log(output: Path) -> list[dict]:
    """The log of a finished run."""
    lines = (output / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def summary(entries: list[dict]) -> dict:
    """Medians over the logged intervals, the first ones left out."""
    timed = [entry for entry in entries if "loss" in entry and "tokens_per_second" in entry][WARMUP_LOGS:]
    names = ("tokens_per_second", "model_flops_utilisation", "data_wait_share")
    medians = {name: statistics.median(e[name] for e in timed) for name in names if timed and name in timed[0]}
    peak = max((entry.get("peak_memory_gib", 0) for entry in entries), default=0)
    return medians | {"peak_memory_gib": peak, "last_loss": timed[-1]["loss"] if timed else None}


def memory(arguments: argparse.Namespace) -> dict:
    """Bytes that one training step allocates at its peak, with and without the logits, beyond model and optimizer."""
    import torch

    from linpass.training.architectures import build_model
    from linpass.training.losses import restore_forward, use_linear_cross_entropy
    from linpass.training.parser import TrainParser
    from linpass.training.train import build_config

    run = TrainParser().parse(flags(arguments, scratch(arguments)))
    batch, tokens = run.training.per_device_train_batch_size, run.model.seq_length
    config = build_config(run)
    rows = []
    for architecture in arguments.cases:
        model = build_model(architecture, config).cuda()
        ids = torch.randint(config.vocab_size, (batch, tokens), device="cuda")
        for loss in ("logits", "without logits"):
            if loss == "without logits":
                use_linear_cross_entropy(model)
            for _turn in range(2):  # the first makes the gradients, which stay
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                with torch.autocast("cuda", torch.bfloat16):
                    value = model(input_ids=ids, labels=ids).loss
                value.backward()
                torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            rows.append(
                {
                    "architecture": architecture,
                    "batch": batch,
                    "tokens": tokens,
                    "loss": loss,
                    "value": value.item(),
                    "peak_gb": round(peak / 1e9, 3),
                    "peak_beyond_model_gb": round((peak - before) / 1e9, 3),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
        restore_forward(model)
        del model, value
        torch.cuda.empty_cache()
    return {"rows": rows}


def run(arguments: argparse.Namespace) -> dict:
    """A whole training; its log, picture, card and the numbers of the end are kept."""
    from linpass.training.parser import TrainParser
    from linpass.training.train import train

    output = scratch(arguments)
    start = time.perf_counter()
    result = train(TrainParser().parse(flags(arguments, output)))
    if result is None:
        raise SystemExit("the run was stopped")
    seconds = time.perf_counter() - start
    entries = read_log(output)
    for name in ("training_log.jsonl", "training_loss_plot.png", "README.md"):
        shutil.copy(output / name, arguments.output / f"training_run_{name}")
    return {"seconds": round(seconds, 1), **summary(entries), **vars(result)}


def scaling(arguments: argparse.Namespace) -> dict:
    """Tokens per second with 1 … N processes, the batch of each device the same."""
    rows = []
    for gpus in arguments.gpus:
        command = flags(arguments, scratch(arguments), *short(arguments))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        subprocess.run([*launcher, "-m", "linpass.cli", "train", *command], check=True)
        rows.append({"gpus": gpus, **summary(read_log(scratch(arguments)))})
        rows[-1]["efficiency"] = rows[-1]["tokens_per_second"] / gpus / rows[0]["tokens_per_second"] * rows[0]["gpus"]
        print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows}


def scratch(arguments: argparse.Namespace) -> Path:
    return arguments.scratch / "model"


THEMES = {"speed": speed, "memory": memory, "run": run, "scaling": scaling}


if __name__ == "__main__":
    main()
