"""How the kernels of ``triton_linformer`` are started: on which devices, in which tiles, and with little of Python."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .triton_linformer import triton  # by name: so transformers copies the file into saved folders

# Bytes of shared memory: data-centre GPUs have more, others less.
ROOMY = 160 * 1024
# Versions whose compiled kernels are started with one order of arguments.
KNOWN_TRITON = ("3.6", "3.7", "3.8", "3.9")


class Tile(NamedTuple):
    """Rows of queries and of keys that a program holds at a time; warps; pipeline stages; most registers a thread."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


# Tiles by kernel and padded head dimension, in half precision: to 128 those that were the fastest for causal attention
# on an H200 (docs/speed.md), beyond those that fit into its registers.
TILES = {
    ("forward", 64): Tile(64, 64, 4, 3, 128),
    ("query", 64): Tile(64, 32, 4, 3, 96),
    ("slot", 64): Tile(32, 64, 4, 3),
    ("token", 64): Tile(32, 64, 4, 3, 128),
    ("forward", 128): Tile(64, 32, 4, 2, 128),
    ("query", 128): Tile(64, 32, 4, 2, 168),
    ("slot", 128): Tile(32, 64, 4, 3),
    ("token", 128): Tile(32, 64, 4, 3),
    ("forward", 256): Tile(64, 32, 4, 2),
    ("query", 256): Tile(32, 32, 4, 2),
    ("slot", 256): Tile(32, 32, 4, 2),
    ("token", 256): Tile(32, 32, 4, 2),
    ("next", 64): Tile(16, 64, 4, 3),
    ("next", 128): Tile(16, 64, 8, 3),
    ("next", 256): Tile(16, 32, 4, 2),
}


def tile_of(kernel: str, padded: int, itemsize: int) -> Tile:
    """Of a kernel (the first word of ``TILES``), for padded features of so many bytes each."""
    if itemsize == 4:  # products on the ordinary units, operands twice as large
        # 255: left to itself ptxas takes 32 for the gradient of the queries, and keeps the rest in memory.
        return Tile(32, 32, 4, 1, 255) if padded <= 128 else Tile(16, 32, 4, 1, 255)
    return TILES[kernel, max(64, padded)]


def padded_dim(dim: int) -> int:
    """Features of a head as a tile holds them: a power of two, 16 at least."""
    return max(16, power_of_two(dim))


def power_of_two(number: int) -> int:
    """The first one that is not smaller; Triton's own function takes microseconds."""
    return 1 << (number - 1).bit_length()


def precision_of(dtype: torch.dtype) -> str:
    """Of float32 products: what PyTorch's own matrix products are set to."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def is_known(tensor: Tensor) -> bool:
    """Whether it is on a device that kernels have been tried on."""
    return tensor.is_cuda and shared_memory(tensor.device) > 0


SHARED_MEMORY: dict[torch.device, int] = {}


@torch.compiler.assume_constant_result
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; 0 where no kernel has been tried (AMD) or the device is older than bfloat16."""
    if device not in SHARED_MEMORY:
        properties = torch.cuda.get_device_properties(device)
        known = torch.version.hip is None and properties.major >= 8
        SHARED_MEMORY[device] = properties.shared_memory_per_block_optin if known else 0
    return SHARED_MEMORY[device]


STARTERS: dict[tuple, Callable[..., None]] = {}


def launch(kernel: Any, grid: tuple[int, int, int], tile: Tile, tensors: tuple, numbers: tuple) -> None:
    """Starts a kernel on the arguments ``(*tensors, *numbers)``.

    Triton's own launch looks at every argument anew, 0.1 ms a call, more than the kernels take for few tokens. It
    chooses the compiled kernel by dtypes, by the numbers and by whether pointers are multiples of 16: so does the key,
    for pointers that are.
    """
    device, together = tensors[0].device, 0
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, tile, tensors, numbers)
    # Odd, and so no multiple of 16, where a tensor was left on the CPU: Triton's own launch says that it cannot be.
    addresses = [None if tensor is None else tensor.data_ptr() | tensor.is_cpu for tensor in tensors]
    for address in addresses:
        if address is not None:
            together |= address
    dtypes = tuple([None if tensor is None else tensor.dtype for tensor in tensors])
    key = (id(kernel), device, grid, tile, dtypes, numbers)
    start = STARTERS.get(key) if together % 16 == 0 else None
    if start is not None:
        start(*addresses, *numbers)
        return None
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers}
    compiled = kernel[grid](*tensors, *numbers, **options)
    if compiled is not None and together % 16 == 0:  # the interpreter returns nothing
        if len(STARTERS) >= 4096:  # of calls whose lengths never repeat
            STARTERS.clear()
        STARTERS[key] = _starter(compiled, grid, device.index)
    return None


def _starter(compiled: Any, grid: tuple[int, int, int], device: int) -> Callable[..., None]:
    """``compiled[grid]`` without what that prepares in every call for Triton's profiler, unless one listens."""
    if triton.__version__.rpartition(".")[0] not in KNOWN_TRITON:
        return compiled[grid]
    stream_of, runtime = triton.runtime.driver.active.get_current_stream, triton.knobs.runtime
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata

    def start(*arguments: Any) -> None:
        entered, left = runtime.launch_enter_hook, runtime.launch_exit_hook  # a profiler joins a chain or replaces it
        if getattr(entered, "calls", True) or getattr(left, "calls", True):
            compiled[grid](*arguments)
        else:
            run(*grid, stream_of(device), function, packed, None, None, None, *arguments)

    return start
