"""One warm call of attention alone, forward and backward, for Nsight Compute to look into::

    ncu --profile-from-start off --clock-control none --csv --section SpeedOfLight --section SchedulerStats \\
        --section ComputeWorkloadAnalysis python -m benchmarks.attention_gpu_profile --tokens 512 > PROFILE.csv
    python -m benchmarks.attention_gpu_profile --table PROFILE.csv

The second command makes a Markdown table of what the first found: for each kernel its time, and the shares of the
chip's rates at which it reads memory and issues instructions. Ours first, then cuDNN's.
"""

import argparse
import csv
from contextlib import nullcontext
from pathlib import Path

import torch

from benchmarks import attention_gpu_cases as cases
from benchmarks.attention_gpu_measure import both_passes
from benchmarks.report_file import table

# Columns, and the names that Nsight Compute has for them.
FIGURES = {
    "µs": "Duration",
    "DRAM, %": "DRAM Throughput",
    "L2, %": "L2 Cache Throughput",
    "issue slots busy, %": "Issue Slots Busy",
    "SM busy, %": "SM Busy",
    "eligible warps a cycle": "Eligible Warps Per Scheduler",
}
MICROSECONDS = {"ns": 1e-3, "us": 1.0, "usecond": 1.0, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3}


def call(tokens: int, device: torch.device) -> None:
    """Every kernel is compiled and has run when the profiler is switched on."""
    (shape,) = cases.shapes(8, 64, (tokens,))
    inputs = cases.make_inputs(shape, max(1, 65536 // tokens) if device.type == "cuda" else 1, device)
    calls = [both_passes(variant.build(shape, inputs)) for variant in (cases.OURS, cases.CUDNN)]
    for both in calls * 3:
        both()
    with torch.cuda.profiler.profile() if device.type == "cuda" else nullcontext():
        for both in calls:
            both()


def profile_table(lines: list[str]) -> str:
    """Of the CSV that Nsight Compute wrote, whatever stands before its head."""
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError('no line begins with "ID": is this what ncu --csv wrote?')
    kernels: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines[start:]):
        found = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"].split("(")[0][:60]})
        for column, name in FIGURES.items():
            if row["Metric Name"] == name:
                value = float(row["Metric Value"].replace(",", ""))
                found[column] = f"{value * MICROSECONDS.get(row['Metric Unit'], 1.0):.4g}"
    columns = ["kernel", *FIGURES]
    return "\n".join(table(columns, [[found.get(column) for column in columns] for found in kernels.values()]))


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="One call of attention for Nsight Compute, or a table of its answer.")
    parser.add_argument("--tokens", type=int, choices=sorted(cases.SLOTS_AND_BLOCK), default=512)
    parser.add_argument("--table", type=Path, help="print the table of this file instead")
    arguments = parser.parse_args(words)
    if arguments.table:
        print(profile_table(arguments.table.read_text(encoding="utf-8").splitlines()))
    else:
        call(arguments.tokens, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()
