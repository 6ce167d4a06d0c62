r"""Linformer attention as fused Triton kernels: functions of ``attention_linformer``, same names and signatures.

Every query sees a range of slot rows and a range of token rows, and both ranges move on with the query; so one loop
over tiles, first of slots, then of tokens, with one running softmax (Milakov and Gimelshein 2018; Dao 2023,
FlashAttention-2) does all, and tiles outside the two ranges are never read. In the backward pass every gradient row is
summed by one program in a fixed order: no atomics, two runs give the same bits. That takes three launches

1. gradient of the queries, and the row sums of output * gradient,
2. gradient of the slots, over the queries after their block (split in parts where there are few slots),
3. gradient of the tokens: their window, and what flows back through the mixing, with the gradients of E and F,

and 7 products of matrices where FlashAttention-2, which adds the gradients of queries with atomics, needs 5.

Bidirectional attention is the same kernels with the range of slots alone, which is that of all queries.

Without Triton or CUDA, for float64, and for the rare calls named in :func:`_fits` the functions are those of
``attention_linformer``, which is also the oracle of the tests. Shape suffixes as there.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from . import attention_linformer as plain
from . import triton_linformer as kernels
from .attention_linformer import BlockLayout
from .triton_linformer import triton  # by name: so transformers copies the file into saved folders

# Programs that fill a large GPU a few times over: the slots of a few long rows are cut until there are so many.
ENOUGH_PROGRAMS = 1024
# Programs that the next token of a few rows is shared by: about as many as a large GPU has processors.
ENOUGH_SPLITS = 128
# Tokens that a program of the mixing reads at a time.
MIXED_TOKENS = 64
# Programs along the second and third dimension of a CUDA grid.
LARGEST_GRID = 65535
# Bytes of shared memory: data-centre GPUs have more, others less.
ROOMY = 160 * 1024
# Tensors on the CPU go through the kernels: for tests, which load these for Triton's interpreter.
INTERPRETED = False
# Of attention to slots alone.
NO_BLOCKS = BlockLayout(block_size=1, window_size=0, slots_per_block=1, visible_blocks=0)


class Tile(NamedTuple):
    """Rows of queries and of keys that a program holds at a time; warps; pipeline stages; most registers a thread."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def attend_blocks(
    query_BHND: Tensor,
    key_BGMD: Tensor,
    value_BGMD: Tensor,
    slot_key_BGSD: Tensor,
    slot_value_BGSD: Tensor,
    layout: BlockLayout,
    first_block_BC: Tensor | None = None,
) -> Tensor:
    """:func:`attention_linformer.attend_blocks`, fused where :func:`_fits`.

    Cost: time O(B·H·N·(k + w)·D); memory O(B·H·N·D), nothing of it for scores or copies of keys.
    Invariants: as there; two runs give the same bits, forward and backward.
    """
    tensors = _one_dtype(query_BHND, key_BGMD, value_BGMD, slot_key_BGSD, slot_value_BGSD)
    if not _fits(tensors, layout):
        return plain.attend_blocks(*tensors, layout, first_block_BC)
    return _Attend.apply(*_once_each(*tensors), first_block_BC, list(layout))


def mix_and_attend(
    query_BHND: Tensor,
    key_BGND: Tensor,
    value_BGND: Tensor,
    weights: tuple[Tensor, Tensor],
    layout: BlockLayout,
    rotated_key_BGND: Tensor | None = None,
    slot_angles: tuple[Tensor, Tensor] | None = None,
    block_BC: Tensor | None = None,
    first_block_BC: Tensor | None = None,
) -> Tensor:
    """:func:`attention_linformer.mix_and_attend`, fused where :func:`_fits`.

    The mixing is one pass over keys and values; its backward pass is part of the gradient of the tokens.

    Cost, invariants: those of :func:`attend_blocks`, and 2·B·G·N·r numbers for the gradients of E and F.
    """
    near = key_BGND if rotated_key_BGND is None else rotated_key_BGND
    query, near, value, key = states = _one_dtype(query_BHND, near, value_BGND, key_BGND)
    if not _fits_mixing(states, layout):
        return plain.mix_and_attend(
            query, key, value, weights, layout, near, slot_angles, block_BC, first_block_BC, attend=attend_blocks
        )
    mixed = None if rotated_key_BGND is None else key
    tensors = _once_each(query, near, value, mixed, *weights)
    return _MixAndAttend.apply(*tensors, *(slot_angles or (None, None)), block_BC, first_block_BC, list(layout))


def mix_and_attend_with_slots(
    query_BHND: Tensor,
    key_BGND: Tensor,
    value_BGND: Tensor,
    weights: tuple[Tensor, Tensor],
    layout: BlockLayout,
    rotated_key_BGND: Tensor | None = None,
    slot_angles: tuple[Tensor, Tensor] | None = None,
    block_BC: Tensor | None = None,
    first_block_BC: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mix_and_attend`, and the slots of keys (turned) and of values, [B, G, C * R, D], which a cache keeps.

    Where a gradient is recorded the mixing is PyTorch's: the fused backward pass takes none for the slots.
    """
    given = (query_BHND, key_BGND, value_BGND, *weights)
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    near = key_BGND if rotated_key_BGND is None else rotated_key_BGND
    query, near, value, key = states = _one_dtype(query_BHND, near, value_BGND, key_BGND)
    if recorded or not _fits_mixing(states, layout):
        slots = plain.mix_keys_and_values(key, value, weights, slot_angles, block_BC)
        return attend_blocks(query, near, value, *slots, layout, first_block_BC), *slots
    mixed = None if rotated_key_BGND is None else key
    angles = slot_angles or (None, None)
    output, _, *slots = mix_and_attend_op(
        query, near, value, mixed, *weights, *angles, block_BC, first_block_BC, list(layout)
    )
    return output, *slots


def attend_slots(
    query_BHND: Tensor, slot_key_BGKD: Tensor, slot_value_BGKD: Tensor, count_B: Tensor | None = None
) -> Tensor:
    """:func:`attention_linformer.attend_slots`, fused where :func:`_fits`.

    Cost: time O(B·H·N·K·D); memory O(B·H·N·D), nothing of it for scores.
    Invariants: as there; two runs give the same bits, forward and backward.
    """
    tensors = _one_dtype(query_BHND, slot_key_BGKD, slot_value_BGKD)
    if not _fits(tensors, NO_BLOCKS) or not slot_key_BGKD.shape[2]:
        return plain.attend_slots(*tensors, count_B)
    return _AttendSlots.apply(*_once_each(*tensors), count_B)


def mix_sequence_and_attend(
    query_BHND: Tensor,
    key_BGND: Tensor,
    value_BGND: Tensor,
    weights: tuple[Tensor, Tensor],
    slot_angles: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """:func:`attention_linformer.mix_sequence_and_attend`, fused where :func:`_fits`.

    The mixing is products of matrices, in one node of the graph with attention: of short rows a GPU computes faster
    than Python and autograd can name single operators.

    Cost: that of :func:`attend_slots`, 2·B·G·K·D numbers for the slots, and B·N·K for the gradient of E or F.
    Invariants: those of :func:`attend_slots`.
    """
    query, key, value, *mixing = _one_dtype(query_BHND, key_BGND, value_BGND, *weights)
    if not _fits((query, key, value), NO_BLOCKS):
        return plain.mix_sequence_and_attend(query, key, value, mixing, slot_angles)
    tensors = _once_each(query, key, value, *mixing)
    return _MixSequenceAndAttend.apply(*tensors, *(slot_angles or (None, None)))


def attend_next_token(
    query_BH1D: Tensor,
    key_BG1D: Tensor,
    value_BG1D: Tensor,
    memory: tuple[Tensor, ...],
    weights: tuple[Tensor, Tensor] | None,
    layout: BlockLayout,
    index_B1: Tensor,
    keep_B1: Tensor | None = None,
    angles: tuple[Tensor, Tensor] | None = None,
    slot_angles: tuple[Tensor, Tensor] | None = None,
) -> Tensor | None:
    """Causal attention of one more token per row, in one launch, which also writes it to the cache.

    It does not count the token: what counts is read by all layers, and a compiler may read it late.

    Args:
        query_BH1D, key_BG1D, value_BG1D: not rotated.
        memory: tensors of a ``LinformerCacheLayer``: ``keys, values, slot_keys, slot_values, block_keys, block_values,
            arrived``, changed in place.
        weights: mixing weights of keys and of values, [X, C, P, R]; None without slots.
        index_B1: index of the token in its row; of a masked one any number.
        keep_B1: rows whose token is real; others change nothing and get what has no meaning. None: all.
        angles, slot_angles: cos and sin of the token, [B or 1, 1, 1, D], and of the slots of its block, [B or 1, 1, R,
            D]; None where positions are not rotary.

    Returns: [B, H, 1, D]; None, and nothing is written, where :func:`_fits` does not hold or a gradient is recorded.
    Cost: at most O(B·H·(K + W)·D), at any position.
    Invariants: two runs give the same bits; a batch of another size may add in another order.
    """
    tensors, weights = (query_BH1D, key_BG1D, value_BG1D), weights or (None, None)
    recorded = any(tensor.requires_grad for tensor in memory)
    if torch.is_grad_enabled():
        recorded |= any(tensor is not None and tensor.requires_grad for tensor in (*tensors, *weights))
    elsewhere = memory[0].dtype != query_BH1D.dtype or memory[0].device != query_BH1D.device
    if recorded or elsewhere or not _fits(tensors, NO_BLOCKS):
        return None
    pairs = [(None, None) if pair is None else pair for pair in (angles, slot_angles)]
    return attend_next_token_op(*tensors, *memory, index_B1, keep_B1, *weights, *pairs[0], *pairs[1], list(layout))


def rotary_angles(position_BN: Tensor, dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`attention_linformer.rotary_angles`, in one launch on an NVIDIA GPU.

    An operator, so that torch.compile forms cosines in float64 once, not wherever a layer turns something by them.
    """
    if triton is None or not (INTERPRETED if position_BN.device.type == "cpu" else _is_known(position_BN)):
        return plain.rotary_angles(position_BN, dim, base, dtype)
    return rotary_angles_op(position_BN, dim, base, dtype)


def _fits(tensors: tuple[Tensor, ...], layout: BlockLayout) -> bool:
    """Triton, an NVIDIA GPU with bfloat16 (Ampere, 2020, or later), 16 to 256 features in at most 32 bits.

    Up to 128 features where a program has less than 160 KiB of shared memory (GeForce, RTX, L4). Gradients through a
    cache (``past_tokens``) have no kernel: training does not form any.
    """
    query = tensors[0]
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    if triton is None or query.dtype not in dtypes or not 16 <= query.shape[-1] <= 256:
        return False
    if query.numel() == 0 or query.shape[0] > LARGEST_GRID:
        return False
    past = layout.past_tokens or layout.past_blocks
    if past and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if query.device.type == "cpu":
        return INTERPRETED
    return _is_known(query) and (query.shape[-1] <= 128 or _shared_memory(query.device) >= ROOMY)


def _fits_mixing(tensors: tuple[Tensor, ...], layout: BlockLayout) -> bool:
    """:func:`_fits`, and all slots that a tile of tokens enters are mixed in one product.

    That is some slots, up to 128, in some shared memory.
    """
    if not _fits(tensors, layout):
        return False
    query = tensors[0]
    padded, r = _padded(query.shape[-1]), layout.slots_per_block
    tile = _tile("token", padded, query.element_size())
    slots = _slots_tile(tile.keys, layout.block_size, r) if r else 0
    room = 2**15 if query.device.type == "cpu" or _shared_memory(query.device) >= ROOMY else 2**14
    return 0 < slots <= 128 and slots * padded * query.element_size() <= room


def _is_known(tensor: Tensor) -> bool:
    return tensor.is_cuda and _shared_memory(tensor.device) > 0


SHARED_MEMORY: dict[torch.device, int] = {}


@torch.compiler.assume_constant_result
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; 0 where no kernel has been tried (AMD) or the device is older than bfloat16."""
    if device not in SHARED_MEMORY:
        properties = torch.cuda.get_device_properties(device)
        known = torch.version.hip is None and properties.major >= 8
        SHARED_MEMORY[device] = properties.shared_memory_per_block_optin if known else 0
    return SHARED_MEMORY[device]


def _one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Autocast's dtype where it is on, else that of the first tensor."""
    device = tensors[0].device.type
    automatic = device == "cuda" and torch.is_autocast_enabled(device) and tensors[0].dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if automatic else tensors[0].dtype
    return tuple([tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors])


def _once_each(*tensors: Tensor | None) -> tuple[Any, ...]:
    """A view in place of a tensor that came before: torch.compile wants every input of a function once."""
    found = []
    for tensor in tensors:
        for earlier in found:
            if tensor is earlier and tensor is not None:
                tensor = tensor.view_as(tensor)
                break
        found.append(tensor)
    return tuple(found)


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


def _tile(kernel: str, padded: int, itemsize: int) -> Tile:
    if itemsize == 4:  # products on the ordinary units, operands twice as large
        return Tile(32, 32, 4, 1) if padded <= 128 else Tile(16, 32, 4, 1)
    return TILES[kernel, max(64, padded)]


def _precision(dtype: torch.dtype) -> str:
    """Of float32 products: what PyTorch's own matrix products are set to."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _power_of_two(number: int) -> int:
    """The first one that is not smaller; Triton's own function takes microseconds."""
    return 1 << (number - 1).bit_length()


def _padded(dim: int) -> int:
    return max(16, _power_of_two(dim))


def _unit_rows(*tensors: Tensor | None) -> tuple[Any, ...]:
    """With features next to each other in memory; every other stride is free."""
    return tuple([t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors])


def _every_row(numbers: Tensor | None, batch: int) -> Any:
    """[1 or B, ...] as [B, ...], rows next to each other."""
    return None if numbers is None else numbers.expand(batch, *numbers.shape[1:]).contiguous()


def _like_tokens(states_BHND: Tensor) -> Tensor:
    """Uninitialised, same shape, [B, N, H, D] in memory: what the projections before and after want."""
    batch, heads, tokens, dim = states_BHND.shape
    return states_BHND.new_empty_strided(states_BHND.shape, (tokens * heads * dim, dim, heads * dim, 1))


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if tensor is None else tensor.stride()


def _end_block(first_block_BC: Tensor | None, blocks: int) -> Tensor | None:
    """Number of the block after the last one whose queries may see each block; ``first_block_BC`` never falls."""
    if first_block_BC is None:
        return None
    first = first_block_BC.contiguous()
    number = torch.arange(blocks, device=first.device, dtype=first.dtype).expand(len(first), -1).contiguous()
    return torch.searchsorted(first, number, right=True)


def _empty_parts(key: Tensor, slots: int, layout: BlockLayout) -> Tensor:
    """For the gradients of the mixing weights by every row, group and block: [2, B, G, C, P, R].

    Their sums are formed in float32. float16 would overflow where bfloat16 does not.
    """
    b, r = layout.block_size, layout.slots_per_block
    dtype = key.dtype if key.dtype == torch.bfloat16 else torch.float32
    return key.new_empty(2, *key.shape[:2], slots // max(r, 1), b, r, dtype=dtype)


def _fold_parts(tiles: int, tokens: int) -> int:
    """Parts that the queries of a slot are cut in, so that the programs fill a GPU; a function of the shapes alone."""
    return max(1, min(-(-ENOUGH_PROGRAMS // max(tiles, 1)), tokens // 1024))


STARTERS: dict[tuple, Callable[..., None]] = {}


def _launch(kernel: Any, grid: tuple[int, int, int], tile: Tile, tensors: tuple, numbers: tuple) -> None:
    """Starts a kernel on the arguments ``(*tensors, *numbers)``.

    Triton's own launch looks at every argument anew, 0.1 ms a call, more than the kernels take for few tokens. It
    chooses the compiled kernel by dtypes, by the numbers and by whether pointers are multiples of 16: so does the key,
    for pointers that are.
    """
    device, together = tensors[0].device, 0
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _launch(kernel, grid, tile, tensors, numbers)
    # Odd, and so no multiple of 16, where a tensor was left on the CPU: Triton's own launch says so.
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
    try:
        hooks = triton.knobs.runtime
        entered, left = hooks.launch_enter_hook.calls, hooks.launch_exit_hook.calls
        stream_of = triton.runtime.driver.active.get_current_stream
        run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    except AttributeError:  # Triton before 3.5
        return compiled[grid]

    def start(*arguments: Any) -> None:
        if entered or left:
            compiled[grid](*arguments)
        else:
            run(*grid, stream_of(device), function, packed, None, None, None, *arguments)

    return start


class _Attend(torch.autograd.Function):
    """Keeps the inputs, the output and one number a query."""

    @staticmethod
    def forward(ctx: Any, query, key, value, slot_key, slot_value, first_block, layout):
        output, logsumexp = attend_op(query, key, value, slot_key, slot_value, first_block, layout)
        ctx.save_for_backward(query, key, value, slot_key, slot_value, first_block, output, logsumexp)
        ctx.layout = layout
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        return *attend_backward_op(grad, *ctx.saved_tensors, ctx.layout), None, None


class _MixAndAttend(torch.autograd.Function):
    """Keeps the inputs, the slots, the output and one number a query."""

    @staticmethod
    def forward(
        ctx: Any, query, key, value, mixed_key, key_weight, value_weight, cos, sin, number, first_block, layout
    ):
        output, logsumexp, slot_key, slot_value = mix_and_attend_op(
            query, key, value, mixed_key, key_weight, value_weight, cos, sin, number, first_block, layout
        )
        ctx.save_for_backward(
            query, key, value, slot_key, slot_value, first_block, output, logsumexp,
            mixed_key, key_weight, value_weight, cos, sin, number,
        )  # fmt: skip
        ctx.layout = layout
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        saved = ctx.saved_tensors  # once: checkpointing computes them anew when they are asked for
        mixed_key, key_weight, value_weight, _, _, number = saved[8:]
        needs_weight = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        *states, grad_mixed_key, parts = mix_and_attend_backward_op(grad, *saved, ctx.layout, needs_weight)
        grad_mixed_key = None if mixed_key is None else grad_mixed_key
        grad_weights = _sum_parts(parts, key_weight, number).unbind() if needs_weight else (None, None)
        return *states, grad_mixed_key, *grad_weights, None, None, None, None, None


def _sum_parts(part_2BGCPR: Tensor, weight_XCPR: Tensor, number_BC: Tensor | None) -> Tensor:
    """Gradients of the two mixing weights, [2, X, C, P, R], from those of every row of the batch, group and block."""
    sets, stored, block, slots = weight_XCPR.shape
    batch, blocks = part_2BGCPR.shape[1], part_2BGCPR.shape[3]
    # PyTorch adds numbers of 16 bits in float32 and rounds the sum: one operator where both are of one dtype.
    dtype = weight_XCPR.dtype if weight_XCPR.dtype == part_2BGCPR.dtype else torch.float32
    if stored == 1:
        grad = part_2BGCPR.sum((1, 2, 3) if sets == 1 else (1, 3), dtype=dtype)
    elif number_BC is None:
        grad = part_2BGCPR.sum((1, 2) if sets == 1 else 1, dtype=dtype)
        if stored > blocks:
            grad = torch.nn.functional.pad(grad.unflatten(0, (2, -1)), (0, 0, 0, 0, 0, stored - blocks))
    else:
        part_2BGCPR = part_2BGCPR.sum(2, keepdim=True, dtype=torch.float32) if sets == 1 else part_2BGCPR.float()
        # Accumulating by index sorts the indices first: the order of the sums, and so the result, is fixed.
        number = number_BC[:, :blocks].expand(batch, -1).clamp(0, stored - 1).reshape(-1)
        grad = part_2BGCPR.new_zeros(stored, 2, sets, block, slots)
        grad = grad.index_put((number,), part_2BGCPR.permute(1, 3, 0, 2, 4, 5).flatten(0, 1), True).movedim(0, 2)
    return grad.reshape(2, *weight_XCPR.shape).to(weight_XCPR.dtype)


class _AttendSlots(torch.autograd.Function):
    """Keeps the inputs, the output and one number a query."""

    @staticmethod
    def forward(ctx: Any, query, slot_key, slot_value, count):
        output, logsumexp = attend_slots_op(query, slot_key, slot_value, count)
        ctx.save_for_backward(query, slot_key, slot_value, count, output, logsumexp)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        grad_query, grad_slots = attend_slots_backward_op(grad, *ctx.saved_tensors)
        return grad_query, *grad_slots.transpose(2, 3).unbind(), None


class _MixSequenceAndAttend(torch.autograd.Function):
    """Keeps the inputs, the slots, the output and one number a query."""

    @staticmethod
    def forward(ctx: Any, query, key, value, key_weight, value_weight, cos, sin):
        results = mix_sequence_and_attend_op(query, key, value, key_weight, value_weight, cos, sin)
        ctx.save_for_backward(query, key, value, key_weight, value_weight, cos, sin, *results)
        return results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        needs_weight = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        *states, grad_key_weight, grad_value_weight = mix_sequence_and_attend_backward_op(
            grad, *ctx.saved_tensors, needs_weight
        )
        grad_weights = (grad_key_weight, grad_value_weight) if needs_weight else (None, None)
        return *states, *grad_weights, None, None


def _forward(query, key, value, slot_key, slot_value, first_block, layout, count=None):
    """Output and log2 of the softmax's denominators; without keys for queries that see all slots, or ``count``."""
    layout, causal = BlockLayout(*layout), key is not None
    key, value = (key, value) if causal else (slot_key, slot_value)  # of which no row is read
    query, key, value, slot_key, slot_value = _unit_rows(query, key, value, slot_key, slot_value)
    batch, heads, tokens, dim = query.shape
    groups, slots = slot_key.shape[1:3]
    first_block = _every_row(first_block, batch)
    output = _like_tokens(query)
    logsumexp = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    tile = _tile("forward", _padded(dim), query.element_size())
    _launch(
        kernels.forward_kernel, (-(-tokens // tile.queries), heads, batch), tile,
        (query, key, value, slot_key, slot_value, output, logsumexp, first_block, count),
        (
            *map(_strides, (query, key, value, slot_key, slot_value, output)), _strides(first_block)[0],
            tokens, slots, layout.window_size, layout.visible_blocks, layout.past_tokens,
            layout.past_blocks, dim**-0.5,
            causal, count is not None, causal or count is not None or slots % tile.keys != 0,
            heads // groups, layout.block_size, max(layout.slots_per_block, 1), first_block is not None,
            dim, _padded(dim), _precision(query.dtype), tile.queries, tile.keys,
        ),
    )  # fmt: skip
    return output, logsumexp


def _forward_shapes(query, *rest):
    return _like_tokens(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _query_and_slot_gradients(
    grad, query, key, value, slot_key, slot_value, first_block, output, logsumexp, layout, count=None
):
    """Gradient of the queries, delta, gradients of the slots, end_block.

    Those of slots are [2, B, G, S, D], without keys [2, B, S, G * D], as the mixing of whole rows wants them.
    """
    causal = key is not None
    key, value = (key, value) if causal else (slot_key, slot_value)  # of which no row is read
    batch, heads, tokens, dim = query.shape
    groups, slots = slot_key.shape[1:3]
    padded, precision = _padded(dim), _precision(query.dtype)
    first_block = _every_row(first_block, batch)
    grad_query, delta = _like_tokens(query), torch.empty_like(logsumexp)
    tile = _tile("query", padded, query.element_size())
    _launch(
        kernels.query_gradient_kernel, (-(-tokens // tile.queries), heads, batch), tile,
        (query, key, value, slot_key, slot_value, output, logsumexp, first_block, count, grad, grad_query, delta),
        (
            *map(_strides, (query, key, value, slot_key, slot_value, output, grad)), _strides(first_block)[0],
            tokens, slots, layout.window_size, layout.visible_blocks, dim**-0.5,
            causal, count is not None, causal or count is not None or slots % tile.keys != 0,
            heads // groups, layout.block_size, max(layout.slots_per_block, 1), first_block is not None,
            dim, padded, precision, tile.queries, tile.keys,
        ),
    )  # fmt: skip
    end_block = _end_block(first_block, -(-tokens // layout.block_size))
    if not slots:
        return grad_query, delta, query.new_empty(2, batch, groups, 0, dim), end_block
    tile = _tile("slot", padded, query.element_size())
    tiles = -(-slots // tile.keys)
    parts = _fold_parts(tiles * batch * groups, tokens)
    shape = (2, batch, groups, slots, dim) if causal else (2, batch, slots, groups * dim)
    strides = (slots * dim, dim, 1) if causal else (dim, groups * dim, 1)
    row = groups * slots * dim
    grad_slots = query.new_empty(shape) if parts == 1 else query.new_empty(parts, *shape, dtype=torch.float32)
    _launch(
        kernels.slot_gradient_kernel, (parts * tiles, groups, batch), tile,
        (query, slot_key, slot_value, logsumexp, delta, end_block, count, grad, grad_slots),
        (
            *map(_strides, (query, slot_key, slot_value, grad)),
            (2 * batch * row, batch * row, row, *strides), _strides(end_block)[0],
            parts, tokens, slots, layout.visible_blocks, dim**-0.5, causal, count is not None,
            heads // groups, layout.block_size, layout.slots_per_block, end_block is not None,
            dim, padded, precision, tile.queries, tile.keys,
        ),
    )  # fmt: skip
    return grad_query, delta, grad_slots if parts == 1 else grad_slots.sum(0), end_block


def _token_gradients(
    grad, query, key, value, logsumexp, delta, end_block, layout, grad_slots=None, mixed_key=None,
    key_weight=None, value_weight=None, cos=None, sin=None, number=None, needs_weight=False,
):  # fmt: skip
    """Gradients of keys, values, mixed keys, and of the weights before they are summed: [2, B, G, C, P, R]."""
    batch, heads, tokens, dim = query.shape
    groups, b, r = key.shape[1], layout.block_size, max(layout.slots_per_block, 1)
    slots = 0 if grad_slots is None else grad_slots.shape[3]
    mixed = slots > 0
    apart = mixed_key is not None
    grad_key, grad_value = _like_tokens(key), _like_tokens(value)
    grad_mixed_key = None
    if apart:
        grad_mixed_key = _like_tokens(key) if mixed else torch.zeros_like(grad_key)
    grad_weights = _empty_parts(key, slots, layout) if needs_weight else None
    stored = 1 if key_weight is None else key_weight.shape[1]
    tile = _tile("token", _padded(dim), query.element_size())
    _launch(
        kernels.token_gradient_kernel, (-(-tokens // tile.keys), groups, batch), tile,
        (
            query, key, value, mixed_key, logsumexp, delta, end_block, grad, grad_slots,
            key_weight, value_weight, number, cos, sin, grad_key, grad_value, grad_mixed_key, grad_weights,
        ),
        (
            *map(_strides, (query, key, value, mixed_key, grad, grad_key)), (0, *_strides(grad_slots)),
            _strides(key_weight), _strides(value_weight), _strides(number)[0], _strides(cos),
            _strides(grad_weights), _strides(end_block)[0], stored, tokens, slots, layout.window_size, dim**-0.5,
            heads // groups, b, r, mixed, apart and mixed, cos is not None, needs_weight,
            stored > 1, number is not None, key_weight is not None and key_weight.shape[0] > 1, end_block is not None,
            dim, _padded(dim), _precision(query.dtype), tile.queries, tile.keys, _slots_tile(tile.keys, b, r),
        ),
    )  # fmt: skip
    return grad_key, grad_value, grad_mixed_key, grad_weights


def _slots_tile(tokens: int, block: int, slots: int) -> int:
    """Slots of the blocks that a tile of tokens may lie in, padded to a power of two."""
    aligned = block % tokens == 0 or tokens % block == 0
    blocks = max(1, tokens // block) + (0 if aligned else 1 if block > tokens else 2)
    return max(16, _power_of_two(blocks * slots))


def _backward(grad, query, key, value, slot_key, slot_value, first_block, output, logsumexp, layout):
    layout = BlockLayout(*layout)
    grad, *states = _unit_rows(grad, query, key, value, slot_key, slot_value)
    grad_query, delta, grad_slots, end_block = _query_and_slot_gradients(
        grad, *states, first_block, output, logsumexp, layout
    )
    query, key, value, _, _ = states
    grad_key, grad_value, _, _ = _token_gradients(grad, query, key, value, logsumexp, delta, end_block, layout)
    grad_slot_key, grad_slot_value = (part.to(query.dtype, copy=True) for part in grad_slots)
    return grad_query, grad_key, grad_value, grad_slot_key, grad_slot_value


def _backward_shapes(grad, query, key, value, slot_key, slot_value, first_block, output, logsumexp, layout):
    slots = [torch.empty_like(states, memory_format=torch.contiguous_format) for states in (slot_key, slot_value)]
    return *(_like_tokens(states) for states in (query, key, value)), *slots


def _slots_forward(query, slot_key, slot_value, count):
    count = _every_row(count, len(query))
    return _forward(query, None, None, slot_key, slot_value, None, NO_BLOCKS, count)


def _slots_backward(grad, query, slot_key, slot_value, count, output, logsumexp):
    """Gradients of the queries, and of slot keys and values as [2, B, K, G, D]."""
    count = _every_row(count, len(query))
    grad, query, slot_key, slot_value = _unit_rows(grad, query, slot_key, slot_value)
    grad_query, _, grad_slots, _ = _query_and_slot_gradients(
        grad, query, None, None, slot_key, slot_value, None, output, logsumexp, NO_BLOCKS, count
    )
    return grad_query, grad_slots.to(query.dtype).unflatten(-1, (slot_key.shape[1], -1))


def _slots_backward_shapes(grad, query, slot_key, slot_value, count, output, logsumexp):
    batch, groups, slots, dim = slot_key.shape
    return _like_tokens(query), query.new_empty(2, batch, slots, groups, dim)


def _sequence_slots(key, value, key_weight, value_weight, cos, sin):
    """What :func:`attention_linformer.mix_sequences` gives.

    torch.compile runs it on tensors without data, to learn shapes and strides of the slots.
    """
    slot_key, slot_value = _mix_sequence(key, key_weight), _mix_sequence(value, value_weight)
    return slot_key if cos is None else plain.rotate(slot_key, (cos, sin)), slot_value


def _mix_sequence(states: Tensor, weight: Tensor) -> Tensor:
    sets, stored, slots = weight.shape
    if sets > 1:
        return plain.mix_sequence(states, weight)
    rows = min(stored, states.shape[2])
    weight = weight.as_strided((len(states), slots, rows), (0, weight.stride(2), weight.stride(1)))
    return _heads_apart(torch.bmm(weight, _side_by_side(states, rows)), states.shape[1])


# Views that take PyTorch two or three operators, each of which costs a short row more than its share of the product.
def _side_by_side(states_BGND: Tensor, rows: int) -> Tensor:
    """The first rows as [B, rows, G * D]: a view where heads lie next to each other in memory."""
    batch, groups, _, dim = states_BGND.shape
    batch_stride, group_stride, row_stride, unit = states_BGND.stride()
    if (group_stride != dim and groups > 1) or unit != 1:
        return plain.side_by_side(plain.first_rows(states_BGND, rows), sets=1)
    return states_BGND.as_strided((batch, rows, groups * dim), (batch_stride, row_stride, 1))


def _heads_apart(states_BNX: Tensor, groups: int) -> Tensor:
    """[B, N, G * D], a tensor without gaps, as [B, G, N, D]."""
    batch, rows, features = states_BNX.shape
    dim = features // groups
    return states_BNX.as_strided((batch, groups, rows, dim), (rows * features, dim, features, 1))


def _mix_sequence_and_attend(query, *mixed):
    slots = _sequence_slots(*mixed)
    return *_forward(query, None, None, *slots, None, NO_BLOCKS), *slots


def _mix_sequence_and_attend_shapes(query, *mixed):
    return *_forward_shapes(query), *_sequence_slots(*mixed)


def _in_the_given_dtypes(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` without autocast: a backward pass may be inside one that its forward pass was not in."""

    def exactly(grad: Tensor, *rest: Any) -> Any:
        if not torch.is_autocast_enabled(grad.device.type):  # asked first: entering a context costs more than that
            return run(grad, *rest)
        with plain.exact(grad.device):
            return run(grad, *rest)

    return exactly


@_in_the_given_dtypes
def _mix_sequence_and_attend_backward(
    grad, query, key, value, key_weight, value_weight, cos, sin, output, logsumexp, slot_key, slot_value, needs_weight
):
    grad, query, slot_key, slot_value = _unit_rows(grad, query, slot_key, slot_value)
    grad_query, _, grad_slots, _ = _query_and_slot_gradients(
        grad, query, None, None, slot_key, slot_value, None, output, logsumexp, NO_BLOCKS
    )
    grad_slot_key, grad_slot_value = grad_slots.unbind(0)
    if cos is not None:  # turned back: both halves of the features have the same angles
        turned = plain.rotate(_heads_apart(grad_slot_key, key.shape[1]), (cos, -sin))
        grad_slot_key = plain.side_by_side(turned, sets=1)
    grad_key, grad_key_weight = _sequence_gradients(grad_slot_key, key, key_weight, needs_weight)
    grad_value, grad_value_weight = _sequence_gradients(grad_slot_value, value, value_weight, needs_weight)
    return grad_query, grad_key, grad_value, grad_key_weight, grad_value_weight


def _sequence_gradients(grad_BKX: Tensor, states: Tensor, weight: Tensor, needs_weight: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens and of the weights of ``mix_sequence``; zero where one has no row of the other.

    Args:
        grad_BKX: of the slots, [B, K, G * D].
    """
    (sets, stored, slots), (batch, groups, tokens, _) = weight.shape, states.shape
    both = min(stored, tokens)
    grad = grad_BKX if grad_BKX.dtype == states.dtype else grad_BKX.to(states.dtype)
    if sets == 1:
        rows = _side_by_side(states, both)
        weights = weight.as_strided((batch, both, slots), (0, weight.stride(1), weight.stride(2)))
        grad_states = _heads_apart(_with_rows(torch.bmm(weights, grad), tokens), groups)
    else:
        rows = plain.side_by_side(plain.first_rows(states, both), sets)
        grad = plain.side_by_side(_heads_apart(grad, groups), sets)
        product = _with_rows(torch.bmm(plain.first_rows(weight, both), grad), tokens)
        grad_states = _like_tokens(states).copy_(plain.heads_apart(product, states.shape, sets))
    if not needs_weight:
        return grad_states, weight.new_empty(0)
    grad_weight = torch.bmm(rows, grad.mT)
    if grad_weight.shape[0] > sets:  # one for every row of the batch, rounded; their sum is in float32
        grad_weight = grad_weight.sum(0, keepdim=True)
    return grad_states, _with_rows(grad_weight, stored)


def _with_rows(matrices: Tensor, rows: int) -> Tensor:
    """Zeros below, up to so many rows."""
    missing = rows - matrices.shape[1]
    return torch.nn.functional.pad(matrices, (0, 0, 0, missing)) if missing else matrices


def _mix_sequence_and_attend_backward_shapes(
    grad, query, key, value, key_weight, value_weight, cos, sin, output, logsumexp, slot_key, slot_value, needs_weight
):
    weights = (w.new_empty(w.shape if needs_weight else 0) for w in (key_weight, value_weight))
    return *(_like_tokens(states) for states in (query, key, value)), *weights


def _attend_next_token(
    query, key, value, ring_key, ring_value, slot_key, slot_value, block_key, block_value, arrived,
    index, keep, key_weight, value_weight, cos, sin, slot_cos, slot_sin, layout,
):  # fmt: skip
    layout = BlockLayout(*layout)
    query, key, value = _unit_rows(query, key, value)
    batch, heads, _, dim = query.shape
    groups, slots = key.shape[1], slot_key.shape[2]
    shared, r = heads // groups, max(layout.slots_per_block, 1)
    cos, sin, slot_cos, slot_sin = (_angle_rows(angles, batch) for angles in (cos, sin, slot_cos, slot_sin))
    index, keep = _every_row(index, batch), None if keep is None else _every_row(keep, batch).view(torch.uint8)
    tile, queries = _tile("next", _padded(dim), query.element_size()), max(16, _power_of_two(shared))
    splits, rows = _split_slots(slots, tile.keys, batch * groups)
    output = query.new_empty(batch, heads, 1, dim)
    partial = query.new_empty(batch * groups * splits * queries * (_padded(dim) + 2), dtype=torch.float32)
    _launch(
        kernels.next_token_kernel, (groups, batch, splits), tile,
        (
            query, key, value, ring_key, ring_value, slot_key, slot_value, block_key, block_value,
            arrived, index, keep, key_weight, value_weight, cos, sin, slot_cos, slot_sin, partial, output,
        ),
        (
            *map(_strides, (query, key, value, key_weight, value_weight)), _strides(cos)[0], _strides(slot_cos)[0],
            1 if key_weight is None else key_weight.shape[1], ring_key.shape[2], slots, splits, rows, dim**-0.5,
            splits > 1, slots > 0, keep is not None, cos is not None,
            key_weight is not None and key_weight.shape[0] > 1,
            shared, layout.block_size, r, dim, _padded(dim), _precision(query.dtype),
            queries, tile.keys, min(32, max(16, _power_of_two(r))),
        ),
    )  # fmt: skip
    return output


def _split_slots(slots: int, keys: int, groups: int) -> tuple[int, int]:
    """Programs that share the slots of a group, and rows of each, so that few rows of a batch still fill a GPU."""
    tiles = max(1, -(-slots // keys))
    rows = -(-tiles // max(1, ENOUGH_SPLITS // groups)) * keys
    return max(1, -(-slots // rows)), rows


def _attend_next_token_shapes(query, *rest):
    return query.new_empty(query.shape)


def _mix(key, value, key_weight, value_weight, cos, sin, number, layout):
    layout = BlockLayout(*layout)
    key, value = _unit_rows(key, value)
    batch, groups, _, dim = key.shape
    slot_key, slot_value = _mix_shapes(key, value, key_weight, value_weight, cos, sin, number, layout)
    b, r, slots = layout.block_size, layout.slots_per_block, slot_key.shape[2]
    if not slots:
        return slot_key, slot_value
    if cos is not None and min(cos.shape[-2], sin.shape[-2]) < slots:
        raise ValueError(f"slot_angles has {cos.shape[-2]} rows; {slots} slots need one each")
    number = _every_row(number, batch)
    cos, sin = _angle_rows(cos, batch), _angle_rows(sin, batch)
    blocks = max(1, MIXED_TOKENS // b)  # of a program
    tokens = min(MIXED_TOKENS if key.element_size() < 4 else 32, max(16, _power_of_two(blocks * b)))
    _launch(
        kernels.mix_kernel, (-(-slots // (blocks * r)), groups, batch), Tile(0, 0, 4, 2),
        (key, value, key_weight, value_weight, number, cos, sin, slot_key, slot_value),
        (
            _strides(key), _strides(value), _strides(key_weight), _strides(value_weight), _strides(number)[0],
            _strides(cos), key_weight.shape[1], slots,
            b, r, key_weight.shape[1] > 1, number is not None, key_weight.shape[0] > 1,
            cos is not None, blocks, dim, _padded(dim), _precision(key.dtype), tokens,
            min(64, _slots_tile(blocks * b, b, r)),
        ),
    )  # fmt: skip
    return slot_key, slot_value


def _mix_shapes(key, value, key_weight, value_weight, cos, sin, number, layout):
    batch, groups, tokens, dim = key.shape
    slots = plain.mixed_blocks(tokens, key_weight, number) * key_weight.shape[3]
    return tuple(key.new_empty(batch, groups, slots, dim) for _ in range(2))


def _mix_and_attend(query, key, value, mixed_key, key_weight, value_weight, cos, sin, number, first_block, layout):
    mixed_key = key if mixed_key is None else mixed_key
    slots = _mix(mixed_key, value, key_weight, value_weight, cos, sin, number, layout)
    return *_forward(query, key, value, *slots, first_block, layout), *slots


def _mix_and_attend_shapes(
    query, key, value, mixed_key, key_weight, value_weight, cos, sin, number, first_block, layout
):
    slots = _mix_shapes(key, value, key_weight, value_weight, cos, sin, number, layout)
    return *_forward_shapes(query), *slots


def _rotary_angles(position, dim, base, dtype):
    position = position.contiguous()
    cos, sin = _rotary_angles_shapes(position, dim, base, dtype)
    padded, rows = _power_of_two(dim // 2), position.numel()
    tile = max(1, 1024 // padded)
    _launch(
        kernels.angles_kernel, (-(-rows // tile), 1, 1), Tile(0, 0, 4, 1), (position, cos, sin),
        (rows, -2 * math.log2(base) / dim, dim, padded, tile),
    )  # fmt: skip
    return cos, sin


def _rotary_angles_shapes(position, dim, base, dtype):
    return tuple(position.new_empty(len(position), 1, position.shape[1], dim, dtype=dtype) for _ in range(2))


def _angle_rows(angles: Tensor | None, batch: int) -> Tensor | None:
    """[B or 1, 1, S, D] as [B, S, D], rows next to each other; a batch that shares them has stride 0."""
    if angles is None:
        return None
    return angles[:, 0].contiguous().expand(batch, -1, -1)


def _mixed_backward(
    grad, query, key, value, slot_key, slot_value, first_block, output, logsumexp,
    mixed_key, key_weight, value_weight, cos, sin, number, layout, needs_weight,
):  # fmt: skip
    layout, batch = BlockLayout(*layout), query.shape[0]
    grad, *states = _unit_rows(grad, query, key, value, slot_key, slot_value)
    grad_query, delta, grad_slots, end_block = _query_and_slot_gradients(
        grad, *states, first_block, output, logsumexp, layout
    )
    query, key, value, _, _ = states
    if mixed_key is not None:
        (mixed_key,) = _unit_rows(mixed_key)
    number = _every_row(number, batch)
    grad_key, grad_value, grad_mixed_key, grad_weights = _token_gradients(
        grad, query, key, value, logsumexp, delta, end_block, layout, grad_slots, mixed_key,
        key_weight, value_weight, _angle_rows(cos, batch), _angle_rows(sin, batch), number, needs_weight,
    )  # fmt: skip
    rest = (query.new_empty(0) if grad is None else grad for grad in (grad_mixed_key, grad_weights))
    return grad_query, grad_key, grad_value, *rest


def _mixed_backward_shapes(
    grad, query, key, value, slot_key, slot_value, first_block, output, logsumexp,
    mixed_key, key_weight, value_weight, cos, sin, number, layout, needs_weight,
):  # fmt: skip
    layout = BlockLayout(*layout)
    return (
        *(_like_tokens(states) for states in (query, key, value)),
        query.new_empty(0) if mixed_key is None else _like_tokens(key),
        _empty_parts(key, slot_key.shape[2], layout) if needs_weight else query.new_empty(0),
    )


def _operators(**operators: tuple[str, Any, Any]) -> list[Any]:
    """Operators that torch.compile takes as they are, from schema, function and shapes of the outputs.

    PyTorch's ``custom_op`` would do the same and cost a tenth of a millisecond a call. A copy of this file in a
    saved folder, or the same file loaded again, has a namespace of its own.
    """
    namespace = re.sub(r"\W", "_", __name__, flags=re.ASCII)  # folders may be called anything
    while any(hasattr(getattr(torch.ops, namespace), name) for name in operators):
        namespace += "_"
    for name, (schema, run, shapes) in operators.items():
        library.define(f"{namespace}::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
        library.impl(f"{namespace}::{name}", "default", run)
        library.register_fake(f"{namespace}::{name}", shapes)
    return [getattr(getattr(torch.ops, namespace), name).default for name in operators]


_SEEN = "Tensor query, Tensor key, Tensor value, Tensor slot_key, Tensor slot_value, Tensor? first_block"
_MIXED_SEQUENCE = "Tensor key, Tensor value, Tensor key_weight, Tensor value_weight, Tensor? cos, Tensor? sin"
_WEIGHTS = "Tensor key_weight, Tensor value_weight, Tensor? cos, Tensor? sin, Tensor? number"
(
    attend_op,
    attend_backward_op,
    mix_and_attend_op,
    mix_and_attend_backward_op,
    attend_slots_op,
    attend_slots_backward_op,
    mix_sequence_and_attend_op,
    mix_sequence_and_attend_backward_op,
    attend_next_token_op,
    rotary_angles_op,
) = _operators(
    attend=(f"({_SEEN}, int[] layout) -> (Tensor, Tensor)", _forward, _forward_shapes),
    attend_backward=(
        f"(Tensor grad, {_SEEN}, Tensor output, Tensor logsumexp, int[] layout)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _backward,
        _backward_shapes,
    ),
    mix_and_attend=(
        f"(Tensor query, Tensor key, Tensor value, Tensor? mixed_key, {_WEIGHTS}, Tensor? first_block, int[] layout)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _mix_and_attend,
        _mix_and_attend_shapes,
    ),
    mix_and_attend_backward=(
        f"(Tensor grad, {_SEEN}, Tensor output, Tensor logsumexp, Tensor? mixed_key, {_WEIGHTS}, int[] layout,"
        " bool needs_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _mixed_backward,
        _mixed_backward_shapes,
    ),
    attend_slots=(
        "(Tensor query, Tensor slot_key, Tensor slot_value, Tensor? count) -> (Tensor, Tensor)",
        _slots_forward,
        _forward_shapes,
    ),
    attend_slots_backward=(
        "(Tensor grad, Tensor query, Tensor slot_key, Tensor slot_value, Tensor? count, Tensor output,"
        " Tensor logsumexp) -> (Tensor, Tensor)",
        _slots_backward,
        _slots_backward_shapes,
    ),
    mix_sequence_and_attend=(
        f"(Tensor query, {_MIXED_SEQUENCE}) -> (Tensor, Tensor, Tensor, Tensor)",
        _mix_sequence_and_attend,
        _mix_sequence_and_attend_shapes,
    ),
    mix_sequence_and_attend_backward=(
        f"(Tensor grad, Tensor query, {_MIXED_SEQUENCE}, Tensor output, Tensor logsumexp, Tensor slot_key,"
        " Tensor slot_value, bool needs_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _mix_sequence_and_attend_backward,
        _mix_sequence_and_attend_backward_shapes,
    ),
    attend_next_token=(
        "(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) slot_keys,"
        " Tensor(d!) slot_values, Tensor(e!) block_keys, Tensor(f!) block_values, Tensor(g!) arrived,"
        " Tensor index, Tensor? keep, Tensor? key_weight, Tensor? value_weight, Tensor? cos,"
        " Tensor? sin, Tensor? slot_cos, Tensor? slot_sin, int[] layout) -> Tensor",
        _attend_next_token,
        _attend_next_token_shapes,
    ),
    rotary_angles=(
        "(Tensor position, int dim, float base, ScalarType dtype) -> (Tensor, Tensor)",
        _rotary_angles,
        _rotary_angles_shapes,
    ),
)
