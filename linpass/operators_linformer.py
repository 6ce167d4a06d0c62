"""The operators of Linformer attention: each a function that starts kernels, and the shapes of what it returns.

To autograd, torch.compile and checkpointing an operator is one step. ``kernels_linformer`` joins them to functions with
gradients; ``triton_linformer`` holds what they start. Names of tensors as there; all may have any strides.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from . import attention_linformer as plain
from . import triton_linformer as kernels
from .attention_linformer import BlockLayout
from .launch_linformer import Tile, launch, padded_dim, power_of_two, precision_of, tile_of

# Programs that fill a large GPU a few times over: the slots of a few long rows are cut until there are so many.
ENOUGH_PROGRAMS = 1024
# Programs that the next token of a few rows is shared by: about as many as a large GPU has processors.
ENOUGH_SPLITS = 128
# Tokens that a program of the mixing reads at a time.
MIXED_TOKENS = 64
# Of attention to slots alone.
NO_BLOCKS = BlockLayout(block_size=1, window_size=0, slots_per_block=1, visible_blocks=0)


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


def _in_the_given_dtypes(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` without autocast: a backward pass may be inside one that its forward pass was not in."""

    def exactly(grad: Tensor, *rest: Any) -> Any:
        if not torch.is_autocast_enabled(grad.device.type):  # asked first: entering a context costs more than that
            return run(grad, *rest)
        with plain.exact(grad.device):
            return run(grad, *rest)

    return exactly


def _require_angles(name: str, cos: Tensor | None, sin: Tensor | None, count: int, of: str) -> None:
    """Kernels read as many rows as they need: one that is not there would be read from other memory."""
    rows = count if cos is None else min(cos.shape[-2], sin.shape[-2])
    if rows < count:
        raise ValueError(f"{name} has {rows} rows; {count} {of} need one each")


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
    tile = tile_of("forward", padded_dim(dim), query.element_size())
    launch(
        kernels.forward_kernel, (-(-tokens // tile.queries), heads, batch), tile,
        (query, key, value, slot_key, slot_value, output, logsumexp, first_block, count),
        (
            *map(_strides, (query, key, value, slot_key, slot_value, output)), _strides(first_block)[0],
            tokens, slots, layout.window_size, layout.visible_blocks, layout.past_tokens,
            layout.past_blocks, dim**-0.5,
            causal, count is not None, causal or count is not None or slots % tile.keys != 0,
            heads // groups, layout.block_size, max(layout.slots_per_block, 1), first_block is not None,
            dim, padded_dim(dim), precision_of(query.dtype), tile.queries, tile.keys,
        ),
    )  # fmt: skip
    return output, logsumexp


def _forward_shapes(query, *rest):
    return _like_tokens(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _query_and_slot_gradients(
    grad, query, key, value, slot_key, slot_value, first_block, output, logsumexp, layout, count=None,
    cos=None, sin=None, grad_query=None,
):  # fmt: skip
    """Gradient of the queries, turned back by ``cos`` and ``sin``, delta, gradients of the slots, end_block.

    Those of slots are [2, B, G, S, D], without keys [2, B, S, G * D], as the mixing of whole rows wants them.
    """
    causal = key is not None
    key, value = (key, value) if causal else (slot_key, slot_value)  # of which no row is read
    batch, heads, tokens, dim = query.shape
    groups, slots = slot_key.shape[1:3]
    padded, precision = padded_dim(dim), precision_of(query.dtype)
    first_block = _every_row(first_block, batch)
    grad_query = _like_tokens(query) if grad_query is None else grad_query
    delta = torch.empty_like(logsumexp)
    tile = tile_of("query", padded, query.element_size())
    launch(
        kernels.query_gradient_kernel, (-(-tokens // tile.queries), heads, batch), tile,
        (
            query, key, value, slot_key, slot_value, output, logsumexp, first_block, count, cos, sin,
            grad, grad_query, delta,
        ),
        (
            *map(_strides, (query, key, value, slot_key, slot_value, output, grad, grad_query)),
            _strides(first_block)[0], _strides(cos)[0],
            tokens, slots, layout.window_size, layout.visible_blocks, dim**-0.5,
            causal, count is not None, causal or count is not None or slots % tile.keys != 0, cos is not None,
            heads // groups, layout.block_size, max(layout.slots_per_block, 1), first_block is not None,
            dim, padded, precision, tile.queries, tile.keys,
        ),
    )  # fmt: skip
    end_block = _end_block(first_block, -(-tokens // layout.block_size))
    if not slots:
        return grad_query, delta, query.new_empty(2, batch, groups, 0, dim), end_block
    tile = tile_of("slot", padded, query.element_size())
    tiles = -(-slots // tile.keys)
    parts = _fold_parts(tiles * batch * groups, tokens)
    shape = (2, batch, groups, slots, dim) if causal else (2, batch, slots, groups * dim)
    strides = (slots * dim, dim, 1) if causal else (dim, groups * dim, 1)
    row = groups * slots * dim
    grad_slots = query.new_empty(shape) if parts == 1 else query.new_empty(parts, *shape, dtype=torch.float32)
    launch(
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
    token_cos=None, token_sin=None, grad_key=None, grad_value=None,
):  # fmt: skip
    """Gradients of keys, values, mixed keys, and of the weights before they are summed: [2, B, G, C, P, R].

    With ``token_cos`` and ``token_sin`` keys are the mixed ones turned by them, and both have one gradient.
    """
    batch, heads, tokens, dim = query.shape
    groups, b, r = key.shape[1], layout.block_size, max(layout.slots_per_block, 1)
    slots = 0 if grad_slots is None else grad_slots.shape[3]
    mixed = slots > 0
    apart, turned_back = mixed_key is not None, token_cos is not None
    if grad_key is None:
        grad_key, grad_value = _like_tokens(key), _like_tokens(value)
    grad_mixed_key = grad_key if turned_back else None
    if apart and not turned_back:
        grad_mixed_key = _like_tokens(key) if mixed else torch.zeros_like(grad_key)
    grad_weights = _empty_parts(key, slots, layout) if needs_weight else None
    stored = 1 if key_weight is None else key_weight.shape[1]
    tile = tile_of("token", padded_dim(dim), query.element_size())
    launch(
        kernels.token_gradient_kernel, (-(-tokens // tile.keys), groups, batch), tile,
        (
            query, key, value, mixed_key, logsumexp, delta, end_block, grad, grad_slots,
            key_weight, value_weight, number, cos, sin, token_cos, token_sin,
            grad_key, grad_value, grad_mixed_key, grad_weights,
        ),
        (
            *map(_strides, (query, key, value, mixed_key, grad, grad_key)), (0, *_strides(grad_slots)),
            _strides(key_weight), _strides(value_weight), _strides(number)[0], _strides(cos), _strides(token_cos)[0],
            _strides(grad_weights), _strides(end_block)[0], stored, tokens, slots, layout.window_size, dim**-0.5,
            heads // groups, b, r, mixed, apart and mixed, cos is not None, turned_back, needs_weight,
            stored > 1, number is not None, key_weight is not None and key_weight.shape[0] > 1, end_block is not None,
            dim, padded_dim(dim), precision_of(query.dtype), tile.queries, tile.keys, slots_tile(tile.keys, b, r),
        ),
    )  # fmt: skip
    return grad_key, grad_value, grad_mixed_key, grad_weights


def slots_tile(tokens: int, block: int, slots: int) -> int:
    """Slots of the blocks that a tile of tokens may lie in, padded to a power of two."""
    aligned = block % tokens == 0 or tokens % block == 0
    blocks = max(1, tokens // block) + (0 if aligned else 1 if block > tokens else 2)
    return max(16, power_of_two(blocks * slots))


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


def _mix(key, value, key_weight, value_weight, cos, sin, number, layout):
    layout = BlockLayout(*layout)
    key, value = _unit_rows(key, value)
    batch, groups, _, dim = key.shape
    slot_key, slot_value = _mix_shapes(key, value, key_weight, value_weight, cos, sin, number, layout)
    b, r, slots = layout.block_size, layout.slots_per_block, slot_key.shape[2]
    if not slots:
        return slot_key, slot_value
    _require_angles("slot_angles", cos, sin, slots, "slots")
    number = _every_row(number, batch)
    cos, sin = _angle_rows(cos, batch), _angle_rows(sin, batch)
    # Not tile by tile in the kernel: under autocast, where weights are float32, that took 186 µs in place of 68.
    key_weight, value_weight = (weight.to(key.dtype) for weight in (key_weight, value_weight))
    blocks = max(1, MIXED_TOKENS // b)  # of a program
    tokens = min(MIXED_TOKENS if key.element_size() < 4 else 32, max(16, power_of_two(blocks * b)))
    launch(
        kernels.mix_kernel, (-(-slots // (blocks * r)), groups, batch), Tile(0, 0, 4, 2),
        (key, value, key_weight, value_weight, number, cos, sin, slot_key, slot_value),
        (
            _strides(key), _strides(value), _strides(key_weight), _strides(value_weight), _strides(number)[0],
            _strides(cos), key_weight.shape[1], slots,
            b, r, key_weight.shape[1] > 1, number is not None, key_weight.shape[0] > 1,
            cos is not None, blocks, dim, padded_dim(dim), precision_of(key.dtype), tokens,
            min(64, slots_tile(blocks * b, b, r)),
        ),
    )  # fmt: skip
    return slot_key, slot_value


def _mix_shapes(key, value, key_weight, value_weight, cos, sin, number, layout):
    batch, groups, tokens, dim = key.shape
    slots = plain.mixed_blocks(tokens, key_weight, number) * key_weight.shape[3]
    return tuple(key.new_empty(batch, groups, slots, dim) for _ in range(2))


def _angle_rows(angles: Tensor | None, batch: int) -> Tensor | None:
    """[B or 1, 1, S, D] as [B, S, D], rows next to each other; a batch that shares them has stride 0."""
    if angles is None:
        return None
    return angles[:, 0].contiguous().expand(batch, -1, -1)


def _mix_and_attend(query, key, value, mixed_key, key_weight, value_weight, cos, sin, number, first_block, layout):
    mixed_key = key if mixed_key is None else mixed_key
    slots = _mix(mixed_key, value, key_weight, value_weight, cos, sin, number, layout)
    return *_forward(query, key, value, *slots, first_block, layout), *slots


def _mix_and_attend_shapes(
    query, key, value, mixed_key, key_weight, value_weight, cos, sin, number, first_block, layout
):
    slots = _mix_shapes(key, value, key_weight, value_weight, cos, sin, number, layout)
    return *_forward_shapes(query), *slots


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


def _split_heads(states_BNX: Tensor, heads: int, dim: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, [B, H or G, N, D] each, of which a token's lie side by side in memory."""
    groups = (states_BNX.shape[2] // dim - heads) // 2
    return states_BNX.unflatten(2, (-1, dim)).transpose(1, 2).split((heads, groups, groups), 1)


def _project_and_attend(
    hidden, of_query, of_key, of_value, angle_cos, angle_sin,
    key_weight, value_weight, cos, sin, number, first_block, heads, dim, layout,
):  # fmt: skip
    """``states`` are the queries as they are turned, keys and values as they are; ``turned`` the keys turned."""
    _require_angles("angles", angle_cos, angle_sin, hidden.shape[1], "tokens")
    projections = (of_query, of_key, of_value)
    states = hidden.new_empty(*hidden.shape[:2], sum(map(len, projections)))
    rows, columns = hidden.flatten(0, 1), states.flatten(0, 1).split([len(weight) for weight in projections], 1)
    for weight, out in zip(projections, columns, strict=True):
        torch.mm(rows, weight.t(), out=out)
    query, key, value = _split_heads(states, heads, dim)
    near, turned = key, hidden.new_empty(0)
    if angle_cos is not None:
        near = turned = _like_tokens(key)
        _launch_norm_and_rotation(query, key, angle_cos, angle_sin, (query, near, turned), None, True)
    slots = _mix(key, value, key_weight, value_weight, cos, sin, number, layout)
    return *_forward(query, near, value, *slots, first_block, layout), *slots, states, turned


def _project_and_attend_shapes(
    hidden, of_query, of_key, of_value, angle_cos, angle_sin,
    key_weight, value_weight, cos, sin, number, first_block, heads, dim, layout,
):  # fmt: skip
    states = hidden.new_empty(*hidden.shape[:2], sum(map(len, (of_query, of_key, of_value))))
    query, key, value = _split_heads(states, heads, dim)
    slots = _mix_shapes(key, value, key_weight, value_weight, cos, sin, number, layout)
    turned = hidden.new_empty(0) if angle_cos is None else _like_tokens(key)
    return *_forward_shapes(query), *slots, states, turned


@_in_the_given_dtypes
def _project_and_attend_backward(
    grad, hidden, of_query, of_key, of_value, angle_cos, angle_sin, key_weight, value_weight, cos, sin, number,
    first_block, heads, dim, layout, output, logsumexp, slot_key, slot_value, states, turned, needs,
):  # fmt: skip
    """Gradients of hidden states, of the three projections and, before they are summed, of the weights of the mixing.

    Those of the projections lie below each other. ``needs`` says which of the three are wanted; others are empty, and
    hidden states are there if those of the projections are.
    """
    layout, batch = BlockLayout(*layout), len(states)
    (grad,) = _unit_rows(grad)
    query, key, value = _split_heads(states, heads, dim)
    near, mixed_key = (key, None) if angle_cos is None else (turned, key)
    angles = (_angle_rows(angle_cos, batch), _angle_rows(angle_sin, batch))
    grad_states = torch.empty_like(states)
    grad_query, grad_key, grad_value = _split_heads(grad_states, heads, dim)
    _, delta, grad_slots, end_block = _query_and_slot_gradients(
        grad, query, near, value, slot_key, slot_value, first_block, output, logsumexp, layout, None,
        *angles, grad_query,
    )  # fmt: skip
    *_, grad_mixing = _token_gradients(
        grad, query, near, value, logsumexp, delta, end_block, layout, grad_slots, mixed_key,
        key_weight, value_weight, _angle_rows(cos, batch), _angle_rows(sin, batch), _every_row(number, batch),
        needs[2], *angles, grad_key, grad_value,
    )  # fmt: skip
    grad_hidden = grad_states @ torch.cat((of_query, of_key, of_value)) if needs[0] else None
    grad_projections = grad_states.flatten(0, 1).t() @ hidden.flatten(0, 1) if needs[1] else None
    grads = (grad_hidden, grad_projections, grad_mixing)
    return tuple([states.new_empty(0) if grad is None else grad for grad in grads])


def _project_and_attend_backward_shapes(
    grad, hidden, of_query, of_key, of_value, angle_cos, angle_sin, key_weight, value_weight, cos, sin, number,
    first_block, heads, dim, layout, output, logsumexp, slot_key, slot_value, states, turned, needs,
):  # fmt: skip
    _, key, _ = _split_heads(states, heads, dim)
    width = of_query.shape[1]
    return (
        states.new_empty((*states.shape[:2], width) if needs[0] else 0),
        states.new_empty((states.shape[2], width) if needs[1] else 0),
        _empty_parts(key, slot_key.shape[2], BlockLayout(*layout)) if needs[2] else states.new_empty(0),
    )


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
    tile, queries = tile_of("next", padded_dim(dim), query.element_size()), max(16, power_of_two(shared))
    splits, rows = _split_slots(slots, tile.keys, batch * groups)
    output = query.new_empty(batch, heads, 1, dim)
    partial = query.new_empty(batch * groups * splits * queries * (padded_dim(dim) + 2), dtype=torch.float32)
    launch(
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
            shared, layout.block_size, r, dim, padded_dim(dim), precision_of(query.dtype),
            queries, tile.keys, min(32, max(16, power_of_two(r))),
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


def _rotary_angles(position, dim, base, dtype):
    position = position.contiguous()
    cos, sin = _rotary_angles_shapes(position, dim, base, dtype)
    padded, rows = power_of_two(dim // 2), position.numel()
    tile = max(1, 1024 // padded)
    launch(
        kernels.angles_kernel, (-(-rows // tile), 1, 1), Tile(0, 0, 4, 1), (position, cos, sin),
        (rows, -2 * math.log2(base) / dim, dim, padded, tile),
    )  # fmt: skip
    return cos, sin


def _rotary_angles_shapes(position, dim, base, dtype):
    return tuple(position.new_empty(len(position), 1, position.shape[1], dim, dtype=dtype) for _ in range(2))


def _normalise_and_rotate(query, key, cos, sin, eps, rotates_key):
    query, key = _unit_rows(query, key)
    results = _normalise_and_rotate_shapes(query, key, cos, sin, eps, rotates_key)
    _launch_norm_and_rotation(query, key, cos, sin, results, eps, rotates_key)
    return results


def _launch_norm_and_rotation(query, key, cos, sin, results, eps, rotates_key):
    """``results`` are as :func:`_normalise_and_rotate_shapes` has them; the first may be ``query``, the same object."""
    query_out, key_out, rotated = results
    has_norm, batch = eps is not None, query.shape[0]
    groups = key.shape[1] if has_norm or rotates_key else 0
    grid, sizes = _rows_and_heads(query, query.shape[1], groups)
    key_like = rotated if rotates_key else key_out if has_norm else key
    cos, sin = _angle_rows(cos, batch), _angle_rows(sin, batch)
    launch(
        kernels.normalise_and_rotate_kernel, grid, Tile(0, 0, 4, 1),
        (query, key, cos, sin, query_out, key_out, rotated),
        (
            *map(_strides, (query, key, query_out, key_like)), _strides(cos)[0], query.shape[2], query.shape[1],
            eps or 0.0, has_norm, cos is not None, rotates_key, query_out is query, *sizes,
        ),
    )  # fmt: skip


def _rows_and_heads(states: Tensor, heads: int, groups: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A grid of programs with 2048 numbers of each of up to four heads, which share angles; DIM, PADDED, ROWS and EACH.

    Args:
        states: [B, *, T, D].
    """
    batch, _, tokens, dim = states.shape
    padded, each = padded_dim(dim), math.gcd(heads, groups, 4)
    rows = max(1, 2048 // padded)
    return (-(-tokens // rows), (heads + groups) // each, batch), (dim, padded, rows, each)


def _normalise_and_rotate_shapes(query, key, cos, sin, eps, rotates_key):
    """Queries; keys, empty where they are what they were; rotated keys, empty where none are wanted."""
    key_out = query.new_empty(0) if eps is None else _like_tokens(key)
    return _like_tokens(query), key_out, _like_tokens(key) if rotates_key else query.new_empty(0)


def _normalise_and_rotate_backward(grad_query, grad_key, grad_rotated, query, key, cos, sin, eps):
    """Gradients of queries and of keys, empty where there is none of what became of them."""
    results = _normalise_and_rotate_backward_shapes(grad_query, grad_key, grad_rotated, query, key, cos, sin, eps)
    query_in, key_in, rotated_in, query, key = _unit_rows(grad_query, grad_key, grad_rotated, query, key)
    of_key = rotated_in if key_in is None else key_in
    some = of_key if query_in is None else query_in  # in the place of what is not read
    heads, groups = (0 if grad is None else grad.shape[1] for grad in (query_in, of_key))
    grid, sizes = _rows_and_heads(some, heads, groups)
    cos, sin = _angle_rows(cos, len(some)), _angle_rows(sin, len(some))
    query, key, query_in = (some if tensor is None else tensor for tensor in (query, key, query_in))
    grad_query, grad_key = (grad if count else some for grad, count in zip(results, (heads, groups), strict=True))
    launch(
        kernels.normalise_and_rotate_gradient_kernel, grid, Tile(0, 0, 4, 1),
        (query, key, cos, sin, query_in, key_in, rotated_in, grad_query, grad_key),
        (
            *map(_strides, (query, key, query_in, key_in, rotated_in, grad_query, grad_key)), _strides(cos)[0],
            some.shape[2], heads, eps or 0.0, eps is not None, cos is not None, key_in is not None,
            rotated_in is not None, *sizes,
        ),
    )  # fmt: skip
    return results


def _normalise_and_rotate_backward_shapes(grad_query, grad_key, grad_rotated, query, key, cos, sin, eps):
    of_key = grad_rotated if grad_key is None else grad_key
    nothing = (of_key if grad_query is None else grad_query).new_empty(0)
    return tuple([nothing if grad is None else _like_tokens(grad) for grad in (grad_query, of_key)])


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
_PROJECTED = (
    "Tensor of_query, Tensor of_key, Tensor of_value, Tensor? angle_cos, Tensor? angle_sin,"
    f" {_WEIGHTS}, Tensor? first_block, int heads, int dim, int[] layout"
)
(
    attend_op,
    attend_backward_op,
    mix_and_attend_op,
    mix_and_attend_backward_op,
    project_and_attend_op,
    project_and_attend_backward_op,
    attend_slots_op,
    attend_slots_backward_op,
    mix_sequence_and_attend_op,
    mix_sequence_and_attend_backward_op,
    attend_next_token_op,
    rotary_angles_op,
    normalise_and_rotate_op,
    normalise_and_rotate_backward_op,
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
    project_and_attend=(
        f"(Tensor hidden, {_PROJECTED}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _project_and_attend,
        _project_and_attend_shapes,
    ),
    project_and_attend_backward=(
        f"(Tensor grad, Tensor? hidden, {_PROJECTED}, Tensor output, Tensor logsumexp, Tensor slot_key,"
        " Tensor slot_value, Tensor states, Tensor turned, bool[] needs) -> (Tensor, Tensor, Tensor)",
        _project_and_attend_backward,
        _project_and_attend_backward_shapes,
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
    normalise_and_rotate=(
        "(Tensor query, Tensor key, Tensor? cos, Tensor? sin, float? eps, bool rotates_key)"
        " -> (Tensor, Tensor, Tensor)",
        _normalise_and_rotate,
        _normalise_and_rotate_shapes,
    ),
    normalise_and_rotate_backward=(
        "(Tensor? grad_query, Tensor? grad_key, Tensor? grad_rotated, Tensor? query, Tensor? key, Tensor? cos,"
        " Tensor? sin, float? eps) -> (Tensor, Tensor)",
        _normalise_and_rotate_backward,
        _normalise_and_rotate_backward_shapes,
    ),
)
