"""What a number was measured on."""

import datetime
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path

# The tree, but for what benchmarks write into it.
SOURCES = (":(top)", ":(top,exclude)benchmarks/results")


def describe() -> dict:
    """Hardware, versions, commit and day; LINPASS_COMMIT names the commit of a copy that came without its history."""
    import torch
    import transformers

    import linpass

    commit = os.environ.get("LINPASS_COMMIT", "")
    if not commit:
        with suppress(FileNotFoundError):
            asked = ["git", "describe", "--always"], ["git", "diff", "--name-only", "HEAD", "--", *SOURCES]
            commit, changed = (subprocess.run(words, capture_output=True, text=True).stdout.strip() for words in asked)
            commit += "-dirty" if changed else ""
    return {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "linpass": linpass.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def loss_implementation(device: str) -> str:
    """What computes the loss of a training in bfloat16: which libraries there are decides, and the speed with them."""
    import torch

    from linpass.training.losses import choose_implementation

    return choose_implementation("auto", torch.empty(0, 1, device=device, dtype=torch.bfloat16))


def processor() -> str:
    return f"{cpu_name()}, {os.cpu_count()} cores"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
