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

What starts them, an operator each, is in ``operators_linformer``.

Without Triton or CUDA, for float64, and for the rare calls named in :func:`_fits` the functions are those of
``attention_linformer``, which is also the oracle of the tests. Shape suffixes as there.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import attention_linformer as plain
from .attention_linformer import BlockLayout
from .launch_linformer import ROOMY, is_known, padded_dim, shared_memory, tile_of
from .operators_linformer import (
    NO_BLOCKS,
    attend_backward_op,
    attend_next_token_op,
    attend_op,
    attend_slots_backward_op,
    attend_slots_op,
    mix_and_attend_backward_op,
    mix_and_attend_op,
    mix_sequence_and_attend_backward_op,
    mix_sequence_and_attend_op,
    normalise_and_rotate_backward_op,
    normalise_and_rotate_op,
    project_and_attend_backward_op,
    project_and_attend_op,
    rotary_angles_op,
    slots_tile,
)
from .triton_linformer import triton

# Programs along the second and third dimension of a CUDA grid.
LARGEST_GRID = 65535
# Tensors on the CPU go through the kernels: for tests, which load these for Triton's interpreter.
INTERPRETED = False


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


def project_and_attend(
    hidden_BNE: Tensor,
    projections: tuple[Tensor, Tensor, Tensor],
    heads: int,
    dim: int,
    angles: tuple[Tensor, Tensor] | None,
    weights: tuple[Tensor, Tensor],
    layout: BlockLayout,
    slot_angles: tuple[Tensor, Tensor] | None = None,
    block_BC: Tensor | None = None,
    first_block_BC: Tensor | None = None,
) -> Tensor | None:
    """:func:`mix_and_attend` from hidden states, with the projections that make queries, keys and values of them.

    In one node of the graph the three lie side by side: queries are turned where they are, the kernels turn the
    gradients of queries and keys back, and write all three where one product for hidden states and one for the weights
    read them.

    Args:
        hidden_BNE: what the projections take, tokens in index order.
        projections: weights of queries, [H * D, E], of keys and of values, [G * D, E]; no bias, no norm of heads.
        heads, dim: H and D.
        angles: cos and sin of the tokens, [B or 1, 1, N, D], both halves of D the same; None: nothing is turned.
        weights, layout, slot_angles, block_BC, first_block_BC: as :func:`mix_and_attend` has them.

    Returns: output, [B, H, N, D]. None, and nothing is computed, where :func:`_fits_mixing` does not hold, where D is
        no power of two, and where hidden states and projections are of two dtypes that autocast does not make one.
    Raises:
        ValueError: fewer angles than tokens or slots.
    Cost: that of :func:`mix_and_attend` and O(B·N·E·(H + 2·G)·D).
    Invariants: those of :func:`mix_and_attend`.
    """
    inputs, dtypes = (hidden_BNE, *projections, *weights), {weight.dtype for weight in projections}
    one_dtype = torch.float64 not in dtypes if _autocast_dtype(hidden_BNE) else dtypes == {hidden_BNE.dtype}
    if padded_dim(dim) != dim or not one_dtype:
        return None
    hidden, *projections = _one_dtype(hidden_BNE, *projections)
    if not _fits_mixing((hidden,), layout, dim):
        return None
    pairs = [(None, None) if pair is None else pair for pair in (angles, slot_angles)]
    tensors = (*_once_each(hidden, *projections), *pairs[0], *_once_each(*weights), *pairs[1])
    arguments = (*tensors, block_BC, first_block_BC, heads, dim, list(layout))
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return _ProjectAndAttend.apply(*arguments) if recorded else project_and_attend_op(*arguments)[0]


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
    near = key_BGND if rotated_key_BGND is None else rotated_key_BGND
    given = (query_BHND, near, key_BGND, value_BGND, *weights)
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
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
    than Python and autograd can name single operators. torch.compile names them beforehand, and joins what turns the
    slots: to it they are operators of their own.

    Cost: that of :func:`attend_slots`, 2·B·G·K·D numbers for the slots, and B·N·K for the gradient of E or F.
    Invariants: those of :func:`attend_slots`.
    """
    query, key, value, *mixing = _one_dtype(query_BHND, key_BGND, value_BGND, *weights)
    if not _fits((query, key, value), NO_BLOCKS):
        return plain.mix_sequence_and_attend(query, key, value, mixing, slot_angles)
    if torch.compiler.is_compiling():
        return attend_slots(query, *plain.mix_sequences(key, value, mixing, slot_angles))
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
        index_B1: index of the token in its row; of a masked one any number from 0 on.
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
    if triton is None or not (INTERPRETED if position_BN.device.type == "cpu" else is_known(position_BN)):
        return plain.rotary_angles(position_BN, dim, base, dtype)
    return rotary_angles_op(position_BN, dim, base, dtype)


def normalise_and_rotate(
    query_BTHD: Tensor,
    key_BTGD: Tensor,
    eps: float | None,
    angles: tuple[Tensor, Tensor] | None,
    rotates_key: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`attention_linformer.normalise_and_rotate`, in one launch each way where :func:`_fits`.

    PyTorch's functions for the next token alone, whose time is the processor's: they are started in C++; and under
    torch.compile, which makes as few kernels of them, as fast as this one.

    Cost: every number read once, and once more from a cache, and written once; memory O(B·T·(H + G)·D).
    """
    states = query, key = query_BTHD.transpose(1, 2), key_BTGD.transpose(1, 2)
    tokens, nothing = query.shape[2], eps is None and angles is None
    known = query.dtype == key.dtype and (angles is None or angles[0].shape[-2] >= tokens)
    if nothing or tokens == 1 or torch.compiler.is_compiling() or not known or not _fits(states, NO_BLOCKS):
        return plain.normalise_and_rotate(query_BTHD, key_BTGD, eps, angles, rotates_key)
    rotates_key = rotates_key and angles is not None
    run = _NormaliseAndRotate.apply if torch.is_grad_enabled() else normalise_and_rotate_op
    query, normal, rotated = run(query, key, *(angles or (None, None)), eps, rotates_key)
    key = key if eps is None else normal
    return query, key, rotated if rotates_key else key


def _fits(tensors: tuple[Tensor, ...], layout: BlockLayout, dim: int | None = None) -> bool:
    """Triton, an NVIDIA GPU with bfloat16 (Ampere, 2020, or later), 16 to 256 features in at most 32 bits.

    The first of ``tensors`` are queries, or, with ``dim``, hidden states that become heads of so many features.

    Up to 128 features where a program has less than 160 KiB of shared memory (GeForce, RTX, L4). Gradients through a
    cache (``past_tokens``) have no kernel: training does not form any.
    """
    query = tensors[0]
    dim = query.shape[-1] if dim is None else dim
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    if triton is None or query.dtype not in dtypes or not 16 <= dim <= 256:
        return False
    if query.numel() == 0 or query.shape[0] > LARGEST_GRID:
        return False
    past = layout.past_tokens or layout.past_blocks
    if past and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if query.device.type == "cpu":
        return INTERPRETED
    return is_known(query) and (dim <= 128 or shared_memory(query.device) >= ROOMY)


def _fits_mixing(tensors: tuple[Tensor, ...], layout: BlockLayout, dim: int | None = None) -> bool:
    """:func:`_fits`, and all slots that a tile of tokens enters are mixed in one product.

    That is some slots, up to 128, in some shared memory.
    """
    if not _fits(tensors, layout, dim):
        return False
    query = tensors[0]
    padded, r = padded_dim(query.shape[-1] if dim is None else dim), layout.slots_per_block
    tile = tile_of("token", padded, query.element_size())
    slots = slots_tile(tile.keys, layout.block_size, r) if r else 0
    room = 2**15 if query.device.type == "cpu" or shared_memory(query.device) >= ROOMY else 2**14
    return 0 < slots <= 128 and slots * padded * query.element_size() <= room


def _one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Autocast's dtype where it is on, else that of the first tensor."""
    dtype = _autocast_dtype(tensors[0]) or tensors[0].dtype
    return tuple([tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors])


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast makes of a tensor where there are kernels; None where it is off."""
    if not tensor.is_cuda or tensor.dtype == torch.float64 or not torch.is_autocast_enabled("cuda"):
        return None
    return torch.get_autocast_dtype("cuda")


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


class _ProjectAndAttend(torch.autograd.Function):
    """Keeps the inputs, queries, keys, keys turned and values, the slots, the output and one number a query.

    Hidden states are kept for nothing but the gradients of the projections; these are views of one tensor.
    """

    @staticmethod
    def forward(ctx: Any, *arguments):
        hidden, *tensors, heads, dim, layout = arguments
        results = project_and_attend_op(*arguments)
        kept = hidden if any(ctx.needs_input_grad[1:4]) else None
        ctx.save_for_backward(kept, *tensors, *results)
        ctx.sizes = heads, dim, layout
        return results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        saved = ctx.saved_tensors  # once: checkpointing computes them anew when they are asked for
        tensors, results = saved[:-6], saved[-6:]
        _, *projections, _, _, key_weight, _, _, _, number, _ = tensors
        hidden, *of_projections, _, _, of_key, of_value = ctx.needs_input_grad[:8]
        needs = [hidden, any(of_projections), of_key or of_value]
        grad_hidden, grad_projections, parts = project_and_attend_backward_op(
            grad, *tensors, *ctx.sizes, *results, needs
        )
        grads = [grad_hidden if hidden else None]
        grads += grad_projections.split([len(weight) for weight in projections]) if needs[1] else [None] * 3
        of_weights = _sum_parts(parts, key_weight, number).unbind() if needs[2] else (None, None)
        return *grads, None, None, *of_weights, *(None,) * 7


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


class _NormaliseAndRotate(torch.autograd.Function):
    """Keeps the angles, and for a norm the inputs."""

    @staticmethod
    def forward(ctx: Any, query, key, cos, sin, eps, rotates_key):
        states = (None, None) if eps is None else (query, key)
        ctx.save_for_backward(*states, cos, sin)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        results = normalise_and_rotate_op(query, key, cos, sin, eps, rotates_key)
        of_query, of_key = ctx.needs_input_grad[:2]
        ctx.mark_non_differentiable(*(() if of_query else results[:1]), *(() if of_key else results[1:]))
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        """Of queries, of keys and of rotated keys, None where nothing follows from them."""
        of_query, of_key = grads[0] is not None, grads[1] is not None or grads[2] is not None
        if not (of_query or of_key):
            return (None,) * 6
        grad_query, grad_key = normalise_and_rotate_backward_op(*grads, *ctx.saved_tensors, ctx.eps)
        return grad_query if of_query else None, grad_key if of_key else None, None, None, None, None
