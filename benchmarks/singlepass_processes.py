"""A pass on 1 … N GPUs of one machine: ``python -m benchmarks.singlepass_processes --gpus 1 2``.

A BERT of random weights (6 layers, 384 wide), rows of random tokens, a ridge head. Each number of GPUs is a run of
torchrun; the heads must agree. Writes ``--output``/singlepass_processes_<hardware>_<YYYYMM>.json.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOKENS, CLASSES = 64, 20
# Two heads in float64 from the same float32 features, whose sums were rounded in another order.
LARGEST_DIFFERENCE = 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--head", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.head:
        run_pass(arguments)
        return
    import torch

    from benchmarks.environment import describe

    rows, heads = [], []
    for gpus in arguments.gpus:
        with tempfile.TemporaryDirectory() as folder:
            head = Path(folder) / "head.pt"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
            command += ["-m", "benchmarks.singlepass_processes", "--head", str(head)]
            command += ["--rows", str(arguments.rows), "--batch_size", str(arguments.batch_size)]
            subprocess.run(command, check=True)
            saved = torch.load(head, weights_only=True)
        heads.append(saved["weight"])
        difference = (heads[-1] - heads[0]).abs().max().item() / heads[0].abs().max().item()
        rows.append({"gpus": gpus, "rows": saved["rows"], "seconds": saved["seconds"], "difference": difference})
        rows[-1]["rows_per_second"] = round(saved["rows"] / saved["seconds"])
        print(json.dumps(rows[-1]), flush=True)
        if not difference < LARGEST_DIFFERENCE:
            raise AssertionError(f"the heads of {arguments.gpus[0]} and {gpus} GPUs differ by {difference}")
    result = {"theme": "processes", "environment": describe(), "tokens_per_row": TOKENS, "rows": rows}
    hardware = torch.cuda.get_device_name().split()[-1].lower()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"singlepass_processes_{hardware}_{datetime.date.today():%Y%m}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def run_pass(arguments: argparse.Namespace) -> None:
    """One process of a pass; the first writes the head and the seconds of a second, warm pass."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from linpass.singlepass import SinglePassArguments, SinglePassTrainer

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=1536,
        num_labels=CLASSES,
    )
    model = BertForSequenceClassification(config)
    ids = torch.randint(1000, (arguments.rows, TOKENS))
    rows = [{"input_ids": row, "labels": int(row[0]) % CLASSES} for row in ids]
    settings = SinglePassArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=arguments.batch_size,
        estimator="ridge",
        calibrate=False,
        precision="float64",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    warm = SinglePassTrainer(model=model, args=settings, train_dataset=rows[: 4 * arguments.batch_size])
    warm.train()
    trainer = SinglePassTrainer(model=model, args=settings, train_dataset=rows)
    torch.cuda.synchronize()
    start = time.perf_counter()
    trainer.train()
    torch.cuda.synchronize()
    if int(os.environ.get("RANK", "0")) == 0:
        seconds = time.perf_counter() - start
        weight = trainer.solution.weight_CD.cpu()
        torch.save({"weight": weight, "seconds": seconds, "rows": trainer.collection.total().rows}, arguments.head)


if __name__ == "__main__":
    main()
