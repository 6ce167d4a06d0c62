"""Where the time of a processor goes in a call of attention: ``python -m benchmarks.attention_host RESULT.json``.

Our kernels are named, with every argument that they take, but not started: what remains is Python, PyTorch's autograd
and its dispatcher, which a lone call of few tokens waits for (docs/speed.md). It needs Triton, and no GPU; with one,
what the kernels add when they are started is measured, too. Whole models, so narrow that little is computed, read a
prompt, compiled as well, and one more token beside Llama, without gradients; Llama forms no masks. Nothing else should
run beside it.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import attention_gpu_bidirectional as bidirectional
from benchmarks import attention_gpu_cases as cases
from benchmarks.decoding_gpu_cases import advance
from benchmarks.environment import describe
from benchmarks.models_gpu_cases import Size, config_for, without_masks
from benchmarks.race import compiled
from benchmarks.report_file import Report, command_line, machine, table
from linpass import kernels_linformer, launch_linformer, operators_linformer
from linpass.training.architectures import build_model

CALLS, BATCHES = 200, 15
MODEL_CALLS = 20
# One row of few tokens: what is computed by PyTorch's own operators takes as little as it can.
CAUSAL = cases.Shape(8, 64, 32, 8, 16)
BOTH_WAYS = cases.Shape(8, 64, 32, 8, 32, window=0)
COMPILER: dict[str, Any] = {}  # options of torch.compile
MODEL, PROMPT = Size(embed_dim=32, heads=2, vocab_size=384), 64


def microseconds(call: Callable[[], object], calls: int) -> list[float]:
    """Of one call: median, lower and upper quartile of the means of batches of so many."""
    for _ in range(calls):
        call()
    means = []
    for _ in range(BATCHES):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        means.append((time.perf_counter() - began) / calls * 1e6)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    low, middle, high = statistics.quantiles(means, n=4)
    return [round(value, 1) for value in (middle, low, high)]


@contextmanager
def recorded(names: Sequence[str]) -> Iterator[dict[str, tuple]]:
    """The arguments of the last call of each of these operators."""
    arguments: dict[str, tuple] = {}

    def recording(name: str, operator: Callable) -> Callable:
        def record(*given: Any) -> Any:
            arguments[name] = tuple([each.detach() if isinstance(each, Tensor) else each for each in given])
            return operator(*given)

        return record

    recorders = {name: recording(name, getattr(kernels_linformer, name)) for name in names}
    with mock.patch.multiple(kernels_linformer, **recorders):
        yield arguments


class Nothing(torch.autograd.Function):
    """As many arguments and saved tensors as ours; computes nothing."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.save_for_backward(*(argument for argument in arguments if isinstance(argument, Tensor)))
        return arguments[0].view_as(arguments[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved = iter(ctx.saved_tensors)
        return tuple([next(saved) if needed else None for needed in ctx.needs_input_grad])


def name_only(kernel: Any, grid: tuple, tile: Any, tensors: tuple, numbers: tuple) -> None:
    """:func:`launch_linformer.launch` up to where a compiled kernel is started."""
    device, together = tensors[0].device, 0
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    for address in addresses:
        if address is not None:
            together |= address
    dtypes = tuple([None if tensor is None else tensor.dtype for tensor in tensors])
    launch_linformer.STARTERS.get((id(kernel), device, grid, tile, dtypes, numbers))


def calls_of(
    device: torch.device, shape: cases.Shape, build: Callable, operators: tuple[str, str]
) -> dict[str, Callable[[], object]]:
    """What is timed, by name; ``operators`` are those of the forward and of the backward pass."""
    attention = build(shape, cases.make_inputs(shape, 1, device))
    leaves = [leaf.detach().requires_grad_() for leaf in attention.leaves]
    gradient = torch.randn_like(attention.leaves[0])

    def forward() -> Tensor:
        return attention.forward(*leaves)

    def both() -> object:
        return torch.autograd.grad(forward(), leaves, gradient)

    def nothing() -> object:
        return torch.autograd.grad(Nothing.apply(*leaves, None, None, None, None, None, None), leaves, gradient)

    with recorded(operators) as arguments:
        both()
    first, second = ((getattr(kernels_linformer, name), arguments[name]) for name in operators)
    output = forward()
    return {
        "both passes": both,
        "forward": forward,
        "forward: the operator": lambda: first[0](*first[1]),
        "backward": lambda: torch.autograd.grad(output, leaves, gradient, retain_graph=True),
        "backward: the operator": lambda: second[0](*second[1]),
        "a function that does nothing, both passes": nothing,
    }


def calls_of_models(device: torch.device) -> dict[str, Callable[[], object]]:
    """Whole models: a prompt that leaves a cache, compiled too, and the next token after it, again and again."""
    found = {}
    config = config_for(MODEL, PROMPT, 16, 16, window_size=32)
    for name, architecture in (("linpass", "linformer"), ("Llama", "llama")):
        model = build_model(architecture, config).to(device).eval().requires_grad_(False)
        ids = torch.randint(MODEL.vocab_size, (1, PROMPT), device=device)
        past = model(input_ids=ids, use_cache=True).past_key_values
        found[f"a prompt, {name}"] = partial(advance, model, ids, None)
        found[f"a prompt, compiled, {name}"] = partial(advance, compiled(model, COMPILER), ids, None)
        found[f"the next token, {name}"] = partial(advance, model, ids[:, :1], past)
    return found


def measure(report: Report, device: torch.device, started: bool) -> None:
    ways = {
        "causal": (CAUSAL, cases.OURS.build, ("mix_and_attend_op", "mix_and_attend_backward_op")),
        "bidirectional": (
            BOTH_WAYS,
            bidirectional.OURS.build,
            ("mix_sequence_and_attend_op", "mix_sequence_and_attend_backward_op"),
        ),
    }
    kernels = "started" if started else "named"
    for way, arguments in ways.items():
        for what, call in calls_of(device, *arguments).items():
            names = {"attention": way, "what": what, "kernels": kernels}
            report.add("host", names, lambda call=call: {"us": microseconds(call, CALLS)})
    with without_masks():
        for what, call in calls_of_models(device).items():
            names = {"attention": "whole model", "what": what, "kernels": kernels}
            report.add("host", names, lambda call=call: {"us": microseconds(call, MODEL_CALLS)})


def line(row: dict) -> str:
    return f"{row['attention']}, {row['what']}, kernels {row['kernels']}: {row.get('us', row.get('failed'))} µs"


def page(result: dict) -> str:
    where = result["environment"]
    body = [[r["attention"], r["what"], r["kernels"], r.get("us", [r.get("failed")])[0]] for r in result["host"]]
    text = [
        f"# What a call of attention costs the processor, {where['date']}",
        "",
        f"{machine(where)}; Python {where['python']}, torch {where['torch']}, linpass {where['linpass']} "
        f"({where['commit']}). Command: `{where['command']}`.",
        "",
        f"Microseconds of a call of one row of {CAUSAL.tokens} tokens, 8 heads of 64: median of {BATCHES} batches of "
        f"{CALLS}. Kernels are *named*, with all their arguments, and not started, or *started*; six products of "
        "matrices of the bidirectional call are PyTorch's, and computed. Whole models have "
        f"{MODEL.depth} layers, {MODEL.embed_dim} wide, no gradients, and a prompt of {PROMPT} tokens; what PyTorch "
        f"does is computed, and Llama forms no masks; batches of {MODEL_CALLS}.",
        *table(["attention", "what", "kernels", "µs"], body),
    ]
    return "\n".join(text) + "\n"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Where the processor's time goes in a call of attention.")
    parser.add_argument("result", type=Path, help="JSON file to write; the table goes beside it, with .md")
    arguments = parser.parse_args(words)
    if kernels_linformer.triton is None:
        parser.error("needs Triton: without it PyTorch's way would be measured under the kernels' name")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    environment = describe() | {"command": command_line("benchmarks.attention_host", words)}
    report = Report(arguments.result, 3600, "attention_host", environment, ("host",), line)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        measure(report, device, started=True)
    named = mock.patch.object(operators_linformer, "launch", name_only)
    with named, mock.patch.object(kernels_linformer, "INTERPRETED", True):
        measure(report, device, started=False)
    report.close(page)


if __name__ == "__main__":
    main()
