"""Runs of themes over the GPUs of a machine, several at a time on each, until all are done or the time is over.

At 16,384 tokens a step one process leaves a fast GPU waiting for the processor that launches its kernels; a few
processes side by side fill it. Every run is a process of its own; what it answers is written at once.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.data import CHOOSING, identity, part_folders
from benchmarks.quality.experiments import Run, Theme, check, read_theme, runs_of
from benchmarks.quality.results import Results, chosen_rates, worth_their_time
from benchmarks.quality.single_run import ANSWER, CHECKPOINTS, compact
from benchmarks.training import read_log
from linpass.errors import InputError

ROOT = Path(__file__).resolve().parent.parent.parent
ASSUMED = 1 / 150_000  # seconds a token, before any run has told
GRACE = 30.0  # seconds that a run has to write a checkpoint
STANDSTILL = 10.0  # seconds that no busy machine keeps the queue from looking


@dataclass(frozen=True)
class Settings:
    """What is the same for all runs.

    Args:
        seconds: nothing is begun that would end later, and what still runs then is stopped.
        processes: at a time on each GPU.
        gpus: their numbers, as CUDA_VISIBLE_DEVICES has them; without any the runs are on the processor.
        dtype: of the evaluation.
        loss: what computes the loss of the training, see ``loss_implementation``.
    """

    data: Path
    output: Path
    seconds: float
    processes: int = 1
    gpus: tuple[str, ...] = ()
    torch_compile: bool = False
    bf16: bool = False
    dtype: str = "float32"
    loss: str = ""
    smoke: bool = False
    scratch: Path = Path(tempfile.gettempdir()) / "linpass_quality"

    def described(self) -> dict[str, Any]:
        """What must not differ between the runs of a folder of results; and how many shared a GPU."""
        return {
            **{name: getattr(self, name) for name in ("torch_compile", "bf16", "dtype", "loss", "smoke")},
            "data": identity(self.data),
        }


@dataclass
class Child:
    """A run under way."""

    run: Run
    gpu: str | None
    folder: Path
    process: subprocess.Popen
    started: float
    stood_still: float = 0.0
    stopped: bool = False


class Schedule:
    """The queue: what is done, what runs, what is next."""

    def __init__(self, names: Sequence[str], settings: Settings) -> None:
        self.settings, self.results = settings, Results(settings.output)
        self.themes = [read_theme(name, settings.smoke) for name in names]
        self.ends = time.monotonic() + settings.seconds
        self.children: list[Child] = []
        self.begun: set[str] = set()
        for theme in self.themes:
            part_folders(settings.data, theme.parts)
        self._refuse_other_settings()

    def _refuse_other_settings(self) -> None:
        described = self.settings.described()
        for row in self.results.runs.values():
            other = {name: row["settings"][name] for name in described if row["settings"][name] != described[name]}
            if other:
                raise InputError(f"output={str(self.settings.output)!r} has runs with {other}; go on with the same")

    def planned(self) -> list[Run]:
        """The runs of all themes in order, as far as their rates are known and they are worth their time."""
        found = []
        for theme in self.themes:
            found += worth_their_time(theme, runs_of(theme, self._rates(theme)), self.results)
        return found

    def _rates(self, theme: Theme) -> dict[str, float]:
        if theme.rates_of is None:
            return {}
        sweep = read_theme(theme.rates_of, self.settings.smoke)
        return chosen_rates(sweep, runs_of(sweep, {}), self.results)

    def unfinished(self) -> list[Run]:
        """What is still to be done, in order, each once."""
        runs: dict[str, Run] = {}
        for run in self.planned():
            if not self.results.finished(run):
                runs.setdefault(run.key, run)
        return list(runs.values())

    def left(self) -> list[Run]:
        """What is neither finished nor tried in this session."""
        return [run for run in self.unfinished() if run.key not in self.begun]

    def fits(self, run: Run) -> bool:
        """Whether there is time for a run; one that can be resumed needs only enough to get somewhere."""
        room = self.ends - time.monotonic()
        return room > (2 * GRACE if run.theme.resumable else 1.2 * self.results.seconds(run, ASSUMED))

    def next_run(self, gpu: str | None) -> Run | None:
        """The first run there is time and room for on a GPU."""
        here = [child.run for child in self.children if child.gpu == gpu]
        for run in self.left():
            if self.fits(run):
                full = here if run.theme.alone else [other for other in here if other.theme.alone]
                return None if full else run
        return None

    def work(self) -> None:
        """All of it; returns when nothing runs and nothing more can be begun."""
        slots = [gpu for _process in range(self.settings.processes) for gpu in self.settings.gpus or (None,)]
        try:
            while True:
                for gpu in slots:
                    busy = sum(child.gpu == gpu for child in self.children)
                    if busy < self.settings.processes and (run := self.next_run(gpu)):
                        self.start(run, gpu)
                if not self.children:
                    return
                self.wait(0.2)
                self.collect()
        finally:
            self.stop(list(self.children))

    def wait(self, seconds: float) -> None:
        """Sleep. Much longer than asked: all was stopped, by SIGSTOP, for something else to be measured alone."""
        before = time.monotonic()
        time.sleep(seconds)
        over = time.monotonic() - before - seconds
        if over > STANDSTILL:
            for child in self.children:
                child.stood_still += over

    def start(self, run: Run, gpu: str | None) -> None:
        """Write the order and start the process that carries it out."""
        check(run)
        settings, folder = self.settings, self.settings.scratch / run.key
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ANSWER).unlink(missing_ok=True)
        speed = ["--bf16", str(settings.bf16), "--torch_compile", str(settings.torch_compile)]
        order = {
            "program": run.program,
            "variant": run.variant,
            "command": [*run.command(), *speed],
            "data": str(settings.data.resolve()),
        }
        order |= {"seq_length": run.flags["seq_length"], "dtype": settings.dtype, "flags": run.flags}
        switches = ("parts", "evaluate", "untouched", "sample", "left_to_right", "resumable")
        order |= {name: getattr(run.theme, name) for name in switches}
        (folder / "order.json").write_text(json.dumps(order, indent=1), encoding="utf-8")
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu or "", "HF_HUB_OFFLINE": "1"}
        shares = settings.processes * max(1, len(settings.gpus))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // shares)))
        command = [sys.executable, "-m", "benchmarks.quality.single_run", str((folder / "order.json").resolve())]
        with open(folder / "output.txt", "w", encoding="utf-8") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        self.begun.add(run.key)
        self.children.append(Child(run, gpu, folder, process, time.monotonic()))

    def collect(self) -> None:
        """Write down what has ended, and stop what is out of time."""
        for child in list(self.children):
            if child.process.poll() is not None:
                self.children.remove(child)
                self.write(child)
        late = [child for child in self.children if time.monotonic() > self.ends - GRACE * child.run.theme.resumable]
        self.stop(late)

    def stop(self, children: Sequence[Child]) -> None:
        """End runs; those that can be resumed are given time for a checkpoint."""
        for child in children:
            child.stopped = True
            child.process.send_signal(signal.SIGTERM if child.run.theme.resumable else signal.SIGKILL)
        for child in children:
            try:
                child.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            self.children.remove(child)
            self.write(child)

    def write(self, child: Child) -> None:
        """A run's answer, or why there is none, to the results and in a line to the screen."""
        run = child.run
        seconds = round(time.monotonic() - child.started, 1)
        shared = {"processes_per_gpu": 1 if run.theme.alone else self.settings.processes}
        row: dict[str, Any] = {"seconds": seconds, "settings": self.settings.described() | shared}
        if child.stood_still:
            row["stood_still"] = round(child.stood_still, 1)
        if (child.folder / ANSWER).is_file():
            answer = json.loads((child.folder / ANSWER).read_text(encoding="utf-8"))
            self.results.add(run, row, answer)
            found = answer.get("diverged", "done")[:100]
            found = f"loss {answer[CHOOSING]['loss']:.4f}" if CHOOSING in answer else found
            shutil.rmtree(child.folder)
        elif child.stopped and run.theme.resumable:
            found = "stopped; its checkpoint is kept"
            with suppress(FileNotFoundError):  # stopped before its first line
                self.results.add_unfinished(run, compact(read_log(child.folder / CHECKPOINTS)))
        elif child.stopped:
            found = "stopped: out of time"
        else:
            lines = (child.folder / "output.txt").read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "no output")
            found = f"failed, exit status {child.process.returncode}: {last[:300]}"
            self.results.add(run, row | {"failed": found}, {})
        rate, seed = run.flags["learning_rate"], run.flags["seed"]
        print(f"{run.theme.name}, {run.side}, rate {rate:g}, seed {seed}: {found} ({seconds:.0f} s)", flush=True)
