"""Themes: JSON files that name the flags of ``linpass train`` for every run. A run is its flags and nothing else.

A theme holds

``question``        what it answers
``preset``          of every run
``tokens``          of a run; with the batch they give ``max_steps``
``parts``           of the data that it is trained on (default: 1)
``flags``           of every run
``sides``           {name: flags}, in order of importance
``learning_rates``  the sweep, or
``rates_of``        the theme whose sweep chose the rate of each side, on the choosing half
``seeds``           one run of every side each; all sides with the first seed come first
``reference``       the side that the others are compared with

and, where they hold, ``goal`` (a difference to the reference, nats, set beforehand), ``also_against`` (sides that the
others are compared with as well), ``least`` (a side that differs by less with the first seed has no other),
``untouched`` (score that half too), ``sample`` (let the models write), ``left_to_right`` (score some tokens from rows
that end before them, as those of a model that leaks must be), ``resumable`` (longer than one command),
``evaluations`` (along the way), ``alone`` (one process on a GPU, for speed), ``evaluate`` false (speed only). In a
side, ``learning_rates`` and ``seeds`` are its own, ``rate_of`` names the side of the sweep whose rate it takes, if not
its own, ``program`` another program than ``linpass train``, and ``variant`` a change of the model that the package has
no field for (``variants.py``).
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.quality.variants import VARIANTS, WHOLE_ROWS
from linpass.errors import InputError
from linpass.training.arguments import read_preset

FOLDER = Path(__file__).parent
KEYS = {"question", "preset", "tokens", "flags", "sides", "learning_rates", "rates_of", "rate_of", "seeds", "reference"}
KEYS |= {"goal", "also_against", "least", "untouched", "sample", "left_to_right"}
KEYS |= {"parts", "resumable", "evaluations", "alone", "evaluate"}
OF_SIDES = {"learning_rates", "seeds", "rate_of", "program", "variant"}  # what a side may set that is no flag
LINPASS, LEAKING = "linpass train", "leaking"
# A rehearsal on a processor: sizes at which every run of every theme takes seconds.
SMOKE = {"embed_dim": 32, "heads": 2, "depth": 2, "intermediate_size": 4096, "logging_steps": 1}
SMOKE |= {"per_device_train_batch_size": 1}
SMOKE_STEPS = 6


@dataclass(frozen=True)
class Theme:
    """A file of experiments, see the module."""

    name: str
    question: str
    preset: str
    tokens: int
    flags: dict[str, Any]
    sides: dict[str, dict[str, Any]]
    seeds: list[int]
    reference: str
    learning_rates: list[float] = field(default_factory=list)
    rates_of: str | None = None
    rate_of: str | None = None
    goal: float | None = None
    also_against: list[str] = field(default_factory=list)
    least: float = 0.0
    parts: int = 1
    untouched: bool = False
    sample: bool = False
    left_to_right: bool = False
    resumable: bool = False
    evaluations: int = 6
    alone: bool = False
    evaluate: bool = True

    def rates(self, side: str) -> list[float]:
        """The sweep of a side."""
        return self.sides[side].get("learning_rates", self.learning_rates)

    def is_ours(self, side: str) -> bool:
        """Of our own class: transformers' own models are far off."""
        return "architecture" not in self.sides[side]

    def planned(self) -> int:
        """How many runs there are when every side has a rate."""
        return sum(
            len(own.get("seeds", self.seeds)) * max(1, len(self.rates(side))) for side, own in self.sides.items()
        )


@dataclass(frozen=True)
class Run:
    """One training: a side of a theme at one rate and seed, as flags of ``linpass train``."""

    theme: Theme
    side: str
    flags: dict[str, Any]
    program: str = LINPASS
    variant: str | None = None

    @property
    def key(self) -> str:
        """The same for two runs of the same flags, whatever theme asks for them."""
        text = json.dumps([self.program, self.variant, self.theme.preset, self.flags], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def tokens(self) -> int:
        """That are trained on."""
        return self.flags["max_steps"] * step_tokens(self.theme.preset, self.flags)

    def command(self) -> list[str]:
        """The flags as words of a command line."""
        words = ["--preset", self.theme.preset]
        for name, value in self.flags.items():
            words += [f"--{name}", "none" if value is None else str(value)]
        return words


def theme_names() -> list[str]:
    """The themes of this folder."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_theme(name: str, smoke: bool = False) -> Theme:
    """A theme of this folder, or of a path that ends in ``.json``; ``smoke`` makes it tiny.

    Raises:
        InputError: no such file, or not what the module describes.
    """
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        raise InputError(f"theme={name!r} must be a JSON file or one of: {', '.join(theme_names())}")
    values = json.loads(path.read_text(encoding="utf-8"))
    unknown = sorted(set(values) - KEYS)
    if unknown:
        raise InputError(f"theme={name!r} sets {', '.join(unknown)}; there are: {', '.join(sorted(KEYS))}")
    theme = Theme(name=path.stem, **values)
    if bool(theme.learning_rates) == bool(theme.rates_of):
        raise InputError(f"theme={name!r} must have either learning_rates or rates_of")
    if theme.reference not in theme.sides:
        raise InputError(f"theme={name!r}: reference={theme.reference!r} must be one of its sides")
    if not set(theme.also_against) <= set(theme.sides):
        raise InputError(f"theme={name!r}: also_against={theme.also_against!r} must be sides of it")
    if smoke:
        flags = theme.flags | SMOKE
        return replace(theme, flags=flags, tokens=SMOKE_STEPS * flags["seq_length"], parts=1)
    return theme


def runs_of(theme: Theme, rates: dict[str, float]) -> list[Run]:
    """The runs of a theme in their order: by seed, then by rate, then by side.

    Args:
        rates: the chosen rate of each side of the sweep ``rates_of``; sides without one are left out.
    """
    runs = []
    further = (seed for own in theme.sides.values() for seed in own.get("seeds", ()))
    for seed in dict.fromkeys([*theme.seeds, *further]):
        for place in range(max(1, *(len(theme.rates(side)) for side in theme.sides))):
            for side, values in theme.sides.items():
                if seed not in values.get("seeds", theme.seeds):
                    continue
                if theme.learning_rates:
                    rate = next(iter(theme.rates(side)[place : place + 1]), None)
                else:
                    rate = rates.get(values.get("rate_of", theme.rate_of or side))
                if rate is not None:
                    runs.append(make_run(theme, side, rate, seed))
    return runs


def make_run(theme: Theme, side: str, rate: float, seed: int) -> Run:
    """A run with all its flags."""
    own = {name: value for name, value in theme.sides[side].items() if name not in OF_SIDES}
    flags = theme.flags | own | {"learning_rate": rate, "seed": seed}
    steps = theme.tokens // step_tokens(theme.preset, flags)
    flags |= {"max_steps": steps, "eval_steps": max(1, -(-steps // theme.evaluations))}
    values = theme.sides[side]
    return Run(theme, side, flags, values.get("program", LINPASS), values.get("variant"))


def step_tokens(preset: str, flags: dict[str, Any]) -> int:
    """Tokens of an optimizer step on one device."""
    values = preset_values(preset) | flags
    rows = values["per_device_train_batch_size"] * values.get("gradient_accumulation_steps", 1)
    return rows * values["seq_length"]


@cache
def preset_values(preset: str) -> dict[str, Any]:
    """What a preset sets."""
    from linpass.training.parser import TrainParser

    return read_preset(preset, TrainParser().names)


def check(run: Run) -> None:
    """Raise InputError where ``linpass train`` would refuse the flags of a run, or its model cannot be made."""
    from linpass.training.parser import TrainParser
    from linpass.training.train import build_config, check_numbers

    if run.variant is not None and run.variant not in VARIANTS:
        raise InputError(f"variant={run.variant!r} must be one of: {', '.join(VARIANTS)}")
    if run.variant in WHOLE_ROWS and run.theme.sample:
        raise InputError(f"theme {run.theme.name}, side {run.side!r}: variant={run.variant!r} cannot write a sample")
    try:
        parsed = TrainParser().parse([*run.command(), "--output_dir", "nowhere"])
        build_config(parsed)
        check_numbers(parsed.training)
    except InputError as error:
        raise InputError(f"theme {run.theme.name}, side {run.side!r}: {error}") from error
