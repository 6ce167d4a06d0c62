r"""Linformer attention as pure functions on tensors: the mathematics, readable, in any floating dtype.

Two forms of one idea (Wang et al. 2020, arXiv:2006.04768): attend to learned mixtures of the tokens, "slots", instead
of all tokens.

- bidirectional: k slots mix the whole row, :func:`mix_sequence`; every query sees all of them, :func:`attend_slots`.
- causal: every block of b tokens gives r slots, :func:`mix_blocks`; a query sees the slots of the blocks that are
  complete and the last w tokens exactly, in ONE softmax, :func:`attend_blocks`.

Both want the tokens of a row in index order, without gaps: :class:`TokenGrid` puts them there and back.

Shape suffixes: B batch, H query heads, G key/value heads (H is a multiple of G), T tokens of the call as given,
N grid columns (queries), M key columns, C blocks, S slot rows (block by block), K slots of a row, P tokens of a block,
R slots of a block, D features, X 1 or G sets of mixing weights.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Queries that `attend_blocks` handles at once. On a CPU the scores of a chunk should stay in the caches: 128 was the
# best of 32 to 256 at n = 4096 with 8 heads. A GPU wants much work per launch, but wastes what a chunk sees beyond
# the window: rows of the batch times the square of the chunk near 2^24 was the best from n = 512 to 65,536 on an H200.
CHUNK_CPU, CHUNK_GPU_LOG2_WORK = 128, 24

# Queries of a chunk of `attend_blocks_fused`, C: a query is compared with k + C + w keys, of which it sees k + w, and
# every key is copied (k + C + w) / C times. At k = 256, w = 128: 512 keys and 4 copies at 128, 640 and 2.5 at 256, 896
# and 1.75 at 512. Where k + w is more than four chunks, chunks grow with it: at most five copies.
CHUNK_FUSED, CHUNKS_IN_VIEW = 256, 4
# Keys of a fused call are a multiple of this: memory-efficient attention wants 8, its tiles are 128 wide, and cuDNN's
# gradient of the queries under a mask can be NaN when half a tile is left over (pytorch issue 196678).
KEY_TILE = 128
# Most slots and window tokens of a fused call: its mask then takes up to 10 KiB a token and layer, in half precision.
WIDEST_FUSED = 4096
# Characters of an assertion on an accelerator: CUDA refuses more.
LONGEST_ASSERTION = 254


class TokenGrid(NamedTuple):
    """Where the tokens of a batch stand: grid column x of a row holds the token of index ``start + x``.

    ``start`` is 0, or, when a cache continues, the border of the block under way, so that blocks stand at the same
    columns in every row, whatever the padding and however many tokens a row has seen.

    Attributes:
        columns: N, the number of grid columns.
        index_BT: index of each token in its row or document, in the order given; [1, T] where rows agree.
        source_BN: token (position in T) that stands in each column; None where the grid is the input.
        column_BT: column of each token; None where the grid is the input.
        keep_BN: True where a column holds a real new token; None when all do.
        keep_BT: the same for the tokens in the order given.
        start_B: index of the token in column 0; None for 0.
        total_B: tokens of the row once this call is over; None where all rows hold T.
        first_block_BC: first block (counted from column 0, may be negative) that each block may see; None for all.
    """

    columns: int
    index_BT: Tensor
    source_BN: Tensor | None = None
    column_BT: Tensor | None = None
    keep_BN: Tensor | None = None
    keep_BT: Tensor | None = None
    start_B: Tensor | None = None
    total_B: Tensor | None = None
    first_block_BC: Tensor | None = None

    def place(self, states_BTE: Tensor) -> Tensor:
        """[B, T, E] in the order given -> [B, N, E] in grid order; zero where a column holds no token."""
        states_BNE = states_BTE if self.source_BN is None else _gather(states_BTE, self.source_BN)
        return states_BNE if self.keep_BN is None else states_BNE.masked_fill(~self.keep_BN[..., None], 0)

    def restore(self, states_BNE: Tensor) -> Tensor:
        """[B, N, ...] in grid order -> [B, T, ...] in the order given; zero at masked tokens.

        Zero, because on the grid padding stands behind the row: what it attended to there is the future of its place.
        """
        states_BTE = states_BNE if self.column_BT is None else _gather(states_BNE, self.column_BT)
        if self.keep_BT is None:
            return states_BTE
        return states_BTE.masked_fill(~self.keep_BT.view(*self.keep_BT.shape, *[1] * (states_BTE.dim() - 2)), 0)

    def block_numbers(self, block_size: int) -> Tensor | None:
        """Number of each block in its row or document, [B, C]; None where block c of every row is number c."""
        if self.first_block_BC is None:
            return None
        number_C = torch.arange(self.first_block_BC.shape[1], device=self.first_block_BC.device)
        return number_C - self.first_block_BC

    def positions_BN(self) -> Tensor:
        """Index of the token in each column, [B or 1, N]."""
        return self.index_BT if self.source_BN is None else _gather(self.index_BT, self.source_BN)


def plain_grid(tokens: int, device: torch.device, keep_BT: Tensor | None = None) -> TokenGrid:
    """Rows that start here: real tokens first, in order; padding, wherever it stood, behind them."""
    if keep_BT is None:
        return TokenGrid(tokens, torch.arange(tokens, device=device)[None])
    source_BN = torch.argsort(~keep_BT, dim=-1, stable=True)
    column_BT = torch.argsort(source_BN, dim=-1)
    return TokenGrid(
        columns=tokens,
        index_BT=(keep_BT.cumsum(-1) - 1).clamp(min=0),
        source_BN=source_BN,
        column_BT=column_BT,
        keep_BN=keep_BT.gather(1, source_BN),
        keep_BT=keep_BT,
        total_B=keep_BT.sum(-1),
    )


def packed_grid(document_BT: Tensor, block_size: int, keep_BT: Tensor | None = None) -> TokenGrid:
    """Several documents in one row, each starting at a multiple of ``block_size``.

    Args:
        document_BT: integers; neighbouring documents differ. Padding may carry any number.
        keep_BT: True where a token is real; within a document only its end may be padding.

    Raises:
        ValueError: a document starts inside a block, or resumes after padding (checked on CPU; on an accelerator the
            same check is an asynchronous device assertion).
    """
    tokens = document_BT.shape[1]
    block_document_BC = document_BT[:, ::block_size]
    same_BC = torch.zeros_like(block_document_BC, dtype=torch.bool)  # block continues the document of the one before
    same_BC[:, 1:] = block_document_BC[:, 1:] == block_document_BC[:, :-1]

    column_T = torch.arange(tokens, device=document_BT.device)
    at_border_T = column_T % block_size == 0
    belongs_BT = document_BT == block_document_BC.repeat_interleave(block_size, 1)[:, :tokens]
    keep = torch.ones_like(belongs_BT) if keep_BT is None else keep_BT
    resumes_BT = torch.zeros_like(keep)
    resumes_BT[:, 1:] = keep[:, 1:] & ~keep[:, :-1]
    starts_anew_BT = at_border_T & ~same_BC.repeat_interleave(block_size, 1)[:, :tokens]
    require(
        ((~keep | belongs_BT) & (~resumes_BT | starts_anew_BT)).all(),
        f"document_ids: every document must start at a multiple of block_size={block_size} and hold padding only at "
        "its end",
    )

    number_C = torch.arange(block_document_BC.shape[1], device=document_BT.device)
    first_block_BC = torch.where(same_BC, 0, number_C).cummax(-1).values
    index_BT = column_T - first_block_BC.repeat_interleave(block_size, 1)[:, :tokens] * block_size
    return TokenGrid(tokens, index_BT, keep_BN=keep_BT, keep_BT=keep_BT, first_block_BC=first_block_BC)


def next_token_grid(seen_B: Tensor, keep_B1: Tensor | None = None) -> TokenGrid:
    """Rows that go on by one token after ``seen_B`` tokens."""
    index_B1 = seen_B[:, None]
    if keep_B1 is not None:  # a masked token takes no index of its own: its row may be full
        index_B1 = torch.where(keep_B1, index_B1, index_B1 - 1).clamp(min=0)
    return TokenGrid(1, index_B1, keep_BN=keep_B1, keep_BT=keep_B1)


def continued_grid(tokens: int, seen_B: Tensor, block_size: int, keep_BT: Tensor | None = None) -> TokenGrid:
    """Rows that go on after ``seen_B`` tokens, which may differ: column 0 is the border of the block under way."""
    if keep_BT is None:
        keep_BT = torch.ones(len(seen_B), tokens, dtype=torch.bool, device=seen_B.device)
    blocks = -(-(block_size - 1 + tokens) // block_size)
    offset_B1 = (seen_B % block_size)[:, None]
    start_B1 = seen_B[:, None] - offset_B1
    rank_BT = keep_BT.cumsum(-1) - 1
    count_B1 = keep_BT.sum(-1, keepdim=True)
    column_N = torch.arange(blocks * block_size, device=seen_B.device)
    order_BT = torch.argsort(~keep_BT, dim=-1, stable=True)
    return TokenGrid(
        columns=blocks * block_size,
        index_BT=(seen_B[:, None] + rank_BT).clamp(min=0),
        source_BN=order_BT.gather(1, (column_N - offset_B1).clamp(0, tokens - 1)),
        column_BT=(offset_B1 + rank_BT).clamp(min=0),
        keep_BN=(column_N >= offset_B1) & (column_N < offset_B1 + count_B1),
        keep_BT=keep_BT,
        start_B=start_B1[:, 0],
        total_B=seen_B + count_B1[:, 0],
        first_block_BC=(-start_B1 // block_size).expand(-1, blocks),
    )


def pooling_weight(tokens: int, slots: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Means of ``tokens / slots`` neighbours, [tokens, slots]: what learned mixing starts from."""
    slot_T = torch.arange(tokens, device=device) * slots // tokens
    weight_TK = torch.nn.functional.one_hot(slot_T, slots).to(dtype)
    return weight_TK / weight_TK.sum(0)


def slot_centres(blocks: Tensor, block_size: int, slots: int) -> Tensor:
    """Index at the centre of the tokens that each slot averages at the start, [..., blocks * slots], float64.

    Args:
        blocks: block numbers [..., C].
    """
    slot_R = torch.arange(slots, device=blocks.device, dtype=_widest(blocks.device))
    within_R = (slot_R + 0.5) * (block_size / slots) - 0.5
    return (blocks[..., None] * block_size + within_R).flatten(-2)


def sequence_centres(tokens: int, slots: int, device: torch.device) -> Tensor:
    """The same for slots that mix a whole sequence of ``tokens``, [1, slots]; they need not divide it."""
    index_T = torch.arange(tokens, dtype=_widest(device), device=device)
    return (index_T @ pooling_weight(tokens, slots, index_T.dtype, device))[None]


def rotary_angles(position_BN: Tensor, dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, [B or 1, 1, N, dim], of the angles of Su et al. 2021 (RoFormer), halves split as in Llama.

    Angles are formed in float64: in float32 they are wrong by 0.06 at a million tokens.
    """
    double = _widest(position_BN.device)
    inverse = base ** (-torch.arange(0, dim, 2, device=position_BN.device, dtype=double) / dim)
    angle_BND = (position_BN.to(double)[..., None] * inverse).repeat(1, 1, 2)[:, None]
    return angle_BND.cos().to(dtype), angle_BND.sin().to(dtype)


def rotate(states_BHND: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Queries, keys or slots turned to their positions, the first rows of ``angles``; the dtype stays."""
    cos, sin, tokens = *angles, states_BHND.shape[2]
    if cos.shape[-2] != tokens:
        cos, sin = cos[..., :tokens, :], sin[..., :tokens, :]
    left, right = states_BHND.chunk(2, -1)
    return (states_BHND * cos + torch.cat((-right, left), -1) * sin).to(states_BHND.dtype)


def normalise_and_rotate(
    query_BTHD: Tensor,
    key_BTGD: Tensor,
    eps: float | None,
    angles: tuple[Tensor, Tensor] | None,
    rotates_key: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Queries and keys as attention takes them: each head :math:`x / \sqrt{\mathrm{mean}(x^2) + \epsilon}`, turned.

    The norm, without weights, is after Henry et al. 2020 (arXiv:2010.04245).

    Args:
        query_BTHD, key_BTGD: as the projections give them.
        eps: of the norm; None: no norm.
        angles: of :func:`rotary_angles`; None: nothing is turned.
        rotates_key: whether rotated keys are wanted.

    Returns: queries, rotated, [B, H, T, D]; keys, [B, G, T, D]; and keys rotated, the same tensor where they are not.
    """
    if eps is not None:  # before heads and tokens change places: norms copy what is not contiguous
        query_BTHD, key_BTGD = (
            F.rms_norm(states, states.shape[-1:], eps=eps).to(states.dtype) for states in (query_BTHD, key_BTGD)
        )
    query, key = query_BTHD.transpose(1, 2), key_BTGD.transpose(1, 2)
    if angles is None:
        return query, key, key
    return rotate(query, angles), key, rotate(key, angles) if rotates_key else key


def mix_blocks(states_BGND: Tensor, weight_XCPR: Tensor, block_BC: Tensor | None = None) -> Tensor:
    r"""Slots of the complete blocks, :math:`\tilde K_c = E_c^\top K_c`, as [B, G, C * R, D].

    Args:
        states_BGND: keys (not rotated) or values; tokens behind the last complete block are left out.
        weight_XCPR: mixing weights; C is 1 where one set serves all blocks (convolution, pooling).
        block_BC: number of each block in its row, where rows or documents do not start at column 0.
    """
    stored_blocks, block_size, slots = weight_XCPR.shape[1:]
    batch, heads, tokens, dim = states_BGND.shape
    blocks = mixed_blocks(tokens, weight_XCPR, block_BC)
    states_BGCPD = states_BGND[:, :, : blocks * block_size].reshape(batch, heads, blocks, block_size, dim)
    if stored_blocks == 1:
        weight = weight_XCPR[None]
    elif block_BC is None:
        weight = weight_XCPR[None, :, :blocks]
    else:
        weight = weight_XCPR[:, block_BC[:, :blocks].clamp(0, stored_blocks - 1)].transpose(0, 1)
    return (weight.transpose(-1, -2) @ states_BGCPD).reshape(batch, heads, blocks * slots, dim)


def mixed_blocks(tokens: int, weight_XCPR: Tensor, block_BC: Tensor | None) -> int:
    """How many blocks of a row of ``tokens`` columns :func:`mix_blocks` makes slots of."""
    stored_blocks, block_size = weight_XCPR.shape[1:3]
    blocks = tokens // block_size
    if stored_blocks > 1 and block_BC is None:
        blocks = min(blocks, stored_blocks)  # columns past seq_length hold padding only
    return blocks


def mix_sequence(states_BGND: Tensor, weight_XNK: Tensor) -> Tensor:
    r"""K slots that mix a whole row, :math:`E^\top K` (paper, section 4), as [B, G, K, D]; padding is zero."""
    tokens = min(states_BGND.shape[2], weight_XNK.shape[1])  # columns past seq_length hold padding only
    sets = weight_XNK.shape[0]
    states = side_by_side(first_rows(states_BGND, tokens), sets)
    mixed = torch.bmm(first_rows(weight_XNK, tokens).mT.expand(states.shape[0], -1, -1), states)
    return heads_apart(mixed, states_BGND.shape, sets)


def first_rows(matrices: Tensor, rows: int) -> Tensor:
    """[..., rows or more, features] -> [..., rows, features]; a cut that cuts nothing off would still take its time."""
    return matrices if matrices.shape[-2] == rows else matrices[..., :rows, :]


def side_by_side(states_BGND: Tensor, sets: int) -> Tensor:
    """Matrices for products with ``sets`` of mixing weights, in which the weights are not copied.

    Returns: [B, N, G * D] for one set, a view of what a projection of hidden states gives; [G, N, B * D] for one set a
    group, a copy, unless B is one.
    """
    return (states_BGND.transpose(1, 2) if sets == 1 else states_BGND.permute(1, 2, 0, 3)).flatten(2)


def heads_apart(states: Tensor, shape: tuple[int, ...], sets: int) -> Tensor:
    """What :func:`side_by_side` took, a view [B, G, rows, D]; ``shape``: of [B, G, any, D]."""
    batch, groups, _, dim = shape
    if sets == 1:
        return states.unflatten(-1, (groups, dim)).transpose(1, 2)
    return states.unflatten(-1, (batch, dim)).permute(2, 0, 1, 3)


def mix_sequence_and_attend(
    query_BHND: Tensor,
    key_BGND: Tensor,
    value_BGND: Tensor,
    weights: tuple[Tensor, Tensor],
    slot_angles: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Bidirectional Linformer attention from keys, values and mixing weights: slots, then :func:`attend_slots`.

    Args:
        query_BHND: queries, rotated where positions are rotary.
        key_BGND: not rotated.
        weights: mixing weights of keys and of values, [X, N, K] each, as :func:`mix_sequence` takes them.
        slot_angles: cos and sin, [1, 1, K, D], that turn slot keys; None where positions are not rotary.
    Returns: [B, H, N, D] in the dtype of the queries.
    Cost: that of :func:`attend_slots` and O(B·G·N·K·D) for the mixing.
    """
    return attend_slots(query_BHND, *mix_sequences(key_BGND, value_BGND, weights, slot_angles))


def mix_sequences(
    key_BGND: Tensor,
    value_BGND: Tensor,
    weights: tuple[Tensor, Tensor],
    slot_angles: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Slots of keys, turned, and of values, [B, G, K, D]: arguments as :func:`mix_sequence_and_attend` has them."""
    slot_key, slot_value = (
        mix_sequence(states, weight.to(states.dtype))
        for states, weight in zip((key_BGND, value_BGND), weights, strict=True)
    )
    return slot_key if slot_angles is None else rotate(slot_key, slot_angles), slot_value


def attend_slots(
    query_BHND: Tensor, slot_key_BGKD: Tensor, slot_value_BGKD: Tensor, count_B: Tensor | None = None
) -> Tensor:
    r"""Bidirectional attention: all queries of a row see all its slots, :math:`\mathrm{softmax}(QK'^\top/\sqrt D)V'`.

    Source: Wang et al. 2020, section 4, after the mixing.

    Args:
        count_B: integers; row b sees its first ``count_B[b]`` slots, 1 to K. None: all.

    Returns: [B, H, N, D] in the dtype of the queries.
    Invariants: slots behind the count change nothing and have a gradient of zero.
    """
    per_group = query_BHND.shape[1] // slot_key_BGKD.shape[1]
    if per_group > 1:  # copies of k slots
        slot_key_BGKD = slot_key_BGKD.repeat_interleave(per_group, 1)
        slot_value_BGKD = slot_value_BGKD.repeat_interleave(per_group, 1)
    visible = None if count_B is None else held_slots(count_B, slot_key_BGKD.shape[2])
    return F.scaled_dot_product_attention(query_BHND, slot_key_BGKD, slot_value_BGKD, attn_mask=visible)


def held_slots(count_B: Tensor, slots: int) -> Tensor:
    """The mask of :func:`attend_slots`, [B, 1, 1, slots]."""
    return (torch.arange(slots, device=count_B.device) < count_B[:, None])[:, None, None]


def attend_visible(
    query_BHND: Tensor, key_BGMD: Tensor, value_BGMD: Tensor, visible: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    r"""Softmax attention over the visible keys, with all scores in memory: the readable reference, and one query's way.

    Args:
        visible: boolean, broadcast to [B, H, N, M]; every query must see something. None: all.
        scale: factor of the scores; None is 1/sqrt(D).

    Returns: output [B, H, N, D] and probabilities [B, H, N, M].
    """
    batch, heads, tokens, dim = query_BHND.shape
    groups = key_BGMD.shape[1]
    scale = dim**-0.5 if scale is None else scale
    # The query heads of a group are extra rows of it, so that keys need not be repeated.
    query = query_BHND.reshape(batch, groups, heads // groups * tokens, dim)
    scores = (query @ key_BGMD.transpose(-1, -2)).reshape(batch, heads, tokens, -1) * scale
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    probabilities = scores.softmax(-1, dtype=_accumulate_in(scores.dtype)).to(query_BHND.dtype)
    output = probabilities.reshape(batch, groups, heads // groups * tokens, -1) @ value_BGMD
    return output.reshape(batch, heads, tokens, -1), probabilities


def visible_slots(
    query_N: Tensor, slot_block_S: Tensor, block_size: int, visible_blocks: int, first_block: Tensor | None = None
) -> Tensor:
    """Which slots a query may see, [..., N, S]: those of complete blocks, the newest ``visible_blocks``.

    Args:
        query_N: columns of the queries, [..., N].
        slot_block_S: block of each slot, counted from column 0; negative before it.
        first_block: first block that each query may see, broadcast against ``query_N``.
    """
    complete_N1 = ((query_N + 1) // block_size)[..., None]
    visible = (slot_block_S < complete_N1) & (slot_block_S >= complete_N1 - visible_blocks)
    return visible if first_block is None else visible & (slot_block_S >= first_block[..., None])


def visible_tokens(
    query_N: Tensor, key_M: Tensor, block_size: int, window_size: int, first_block: Tensor | None = None
) -> Tensor:
    """Which tokens a query sees exactly, [..., N, M]: itself and the ``window_size`` - 1 before it.

    Args:
        key_M: columns of the keys, [M] or [..., 1, M].
        query_N, first_block: as in :func:`visible_slots`.
    """
    query_N1 = query_N[..., None]
    visible = (key_M <= query_N1) & (key_M > query_N1 - window_size)
    return visible if first_block is None else visible & (key_M >= first_block[..., None] * block_size)


class BlockLayout(NamedTuple):
    """How queries, keys and slots lie towards each other on the block grid.

    Attributes:
        block_size: b, tokens.
        window_size: w, tokens.
        slots_per_block: r; 0 is attention to the window alone.
        visible_blocks: complete blocks in view, the newest ones.
        past_tokens: key columns before the first query.
        past_blocks: blocks whose slots come before those of the first query's block.
    """

    block_size: int
    window_size: int
    slots_per_block: int
    visible_blocks: int
    past_tokens: int = 0
    past_blocks: int = 0


def attend_blocks_reference(
    query_BHND: Tensor,
    key_BGMD: Tensor,
    value_BGMD: Tensor,
    slot_key_BGSD: Tensor,
    slot_value_BGSD: Tensor,
    layout: BlockLayout,
    first_block_BC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`attend_blocks` computes, with every score in memory; also returns probabilities, slots first."""
    tokens, device = query_BHND.shape[2], query_BHND.device
    query_N = torch.arange(tokens, device=device)
    key_M = torch.arange(key_BGMD.shape[2], device=device) - layout.past_tokens
    slot_S = torch.arange(slot_key_BGSD.shape[2], device=device) // max(layout.slots_per_block, 1) - layout.past_blocks
    first = None if first_block_BC is None else first_block_BC[:, None, query_N // layout.block_size]
    visible = torch.cat(
        (
            visible_slots(query_N, slot_S, layout.block_size, layout.visible_blocks, first),
            visible_tokens(query_N, key_M, layout.block_size, layout.window_size, first),
        ),
        -1,
    )
    keys, values = torch.cat((slot_key_BGSD, key_BGMD), 2), torch.cat((slot_value_BGSD, value_BGMD), 2)
    return attend_visible(query_BHND, keys, values, visible)


def attend_blocks(
    query_BHND: Tensor,
    key_BGMD: Tensor,
    value_BGMD: Tensor,
    slot_key_BGSD: Tensor,
    slot_value_BGSD: Tensor,
    layout: BlockLayout,
    first_block_BC: Tensor | None = None,
) -> Tensor:
    r"""Causal Linformer attention: one softmax over the slots of complete blocks and the exact last tokens.

    .. math::  o_t = \mathrm{softmax}\big(q_t [\tilde K_{c:\, (c+1)b \le t+1};\ K_{t-w < j \le t}]^\top / \sqrt D\big)
               [\tilde V; V]

    Source: Wang et al. 2020, section 4, made causal by mixing inside complete blocks only; Transformer-LS (Zhu et al.
    2021) joins a window with a low-rank part in the same way, and normalises the two apart.

    Args:
        query_BHND: queries, rotated, not scaled; floating point.
        key_BGMD: rotated keys; column x of the queries is row ``layout.past_tokens + x``.
        slot_key_BGSD: rotated slots, r rows a block.
        first_block_BC: first block that the queries of each block may see (packed documents, short rows of a cache).
    Returns: [B, H, N, D] in the dtype of the queries.
    Cost: time O(B·H·N·(k + w)·D); memory O(B·H·N·D), forward and backward: scores are formed for a chunk of queries
        at a time and formed again in the backward pass. Half precision on a GPU: :func:`attend_blocks_fused`.
    Invariants: output t is a function of tokens up to t alone, to the bit; equals :func:`attend_blocks_reference`.
    """
    if _suits_fused(query_BHND, key_BGMD, slot_key_BGSD, layout):
        return attend_blocks_fused(
            query_BHND, key_BGMD, value_BGMD, slot_key_BGSD, slot_value_BGSD, layout, first_block_BC
        )
    for states in (query_BHND, key_BGMD, slot_key_BGSD):
        # The loop over chunks makes constants of lengths. torch.compile before 2.13 must know it before the function.
        range(states.shape[2])
    return _AttendBlocks.apply(query_BHND, key_BGMD, value_BGMD, slot_key_BGSD, slot_value_BGSD, layout, first_block_BC)


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
    attend: Callable[..., Tensor] = attend_blocks,
) -> Tensor:
    """Causal Linformer attention from keys, values and mixing weights: slots, then :func:`attend_blocks`.

    Args:
        query_BHND: queries, rotated where positions are rotary.
        key_BGND: keys that are mixed, not rotated.
        weights: mixing weights of keys and of values, [X, C, P, R] each, as :func:`mix_blocks` takes them.
        rotated_key_BGND: keys of the window; None where they are not rotated.
        slot_angles: cos and sin, [B or 1, 1, S, D], that turn the slots, S or more rows; None where positions are not
            rotary.
        block_BC, first_block_BC: as :func:`mix_blocks` and :func:`attend_blocks` take them.
        attend: a function like :func:`attend_blocks` to attend with.
    Returns: [B, H, N, D] in the dtype of the queries.
    Cost: that of :func:`attend_blocks` and O(B·G·N·r·D) for the mixing.
    Invariants: those of :func:`attend_blocks`.
    """
    slots = mix_keys_and_values(key_BGND, value_BGND, weights, slot_angles, block_BC)
    near = key_BGND if rotated_key_BGND is None else rotated_key_BGND
    return attend(query_BHND, near, value_BGND, *slots, layout, first_block_BC)


def mix_keys_and_values(
    key_BGND: Tensor,
    value_BGND: Tensor,
    weights: tuple[Tensor, Tensor],
    slot_angles: tuple[Tensor, Tensor] | None = None,
    block_BC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Slots of keys, turned where positions are rotary, and of values: arguments as :func:`mix_and_attend` has them."""
    slot_key, slot_value = (
        mix_blocks(states, weight.to(states.dtype), block_BC)
        for states, weight in zip((key_BGND, value_BGND), weights, strict=True)
    )
    return slot_key if slot_angles is None else rotate(slot_key, slot_angles), slot_value


def _suits_fused(query_BHND: Tensor, key_BGMD: Tensor, slot_key_BGSD: Tensor, layout: BlockLayout) -> bool:
    """Half precision on a GPU, where PyTorch has kernels that keep no scores, and a mask that is narrow and well used.

    The mask is as wide as all slots and a window: far past the view most slots are out of sight of most queries, and
    without slots a window over a long row would make it N by N.
    """
    half = query_BHND.dtype in (torch.bfloat16, torch.float16) and query_BHND.shape[-1] % 8 == 0
    slots, in_view = slot_key_BGSD.shape[2], layout.visible_blocks * layout.slots_per_block
    narrow = slots + min(layout.window_size, key_BGMD.shape[2]) <= WIDEST_FUSED
    return query_BHND.is_cuda and half and narrow and slots <= 2 * in_view


def attend_blocks_fused(
    query_BHND: Tensor,
    key_BGMD: Tensor,
    value_BGMD: Tensor,
    slot_key_BGSD: Tensor,
    slot_value_BGSD: Tensor,
    layout: BlockLayout,
    first_block_BC: Tensor | None = None,
) -> Tensor:
    """What :func:`attend_blocks` computes, as ONE call of PyTorch's fused attention whose batch is chunks of queries.

    For GPUs without the kernels of ``kernels_linformer``, and for gradients through a cache.

    The keys of a chunk are all slots, the tokens that its window reaches back to, and its own tokens; a mask, the same
    for all heads, and for all rows that are not packed, tells each query which of them it sees.

    Cost: time O(B·H·N·(S + C + w)·D) for chunks of C queries; memory O(B·G·N·D·(S + C + w) / C) for copies of keys and
        values and O(N·(S + C + w)) for the mask, kept for the backward pass.
    Invariants: those of :func:`attend_blocks`. A chunk's part of a gradient has the dtype of the call; parts are summed
        in float32 at least, or are two. On a GPU, gradients of two runs may differ in the last bits (PyTorch's fused
        backward passes add in any order) unless ``torch.use_deterministic_algorithms(True)`` is set.
    """
    batch, heads, tokens, _ = query_BHND.shape
    groups, slots = key_BGMD.shape[1], slot_key_BGSD.shape[2]
    fold = _fold(tokens, layout)
    size, count, reach = fold
    # Chunks times rows are the batch where rows have masks of their own; else rows count as heads, which share a mask.
    chunk_dim, merged = (0, (1, 2)) if first_block_BC is None else (1, (0, 1))

    query = F.pad(query_BHND, (0, 0, 0, count * size - tokens)) if count * size > tokens else query_BHND
    query = query.unflatten(2, (count, size)).unflatten(1, (groups, heads // groups)).movedim(3, chunk_dim)
    query = query.flatten(3, 4).flatten(*merged)  # the query heads of a group are more rows of it
    joined = []
    for slot_states, states in ((slot_key_BGSD, key_BGMD), (slot_value_BGSD, value_BGMD)):
        shared = slot_states[:, :, None].expand(-1, -1, count, -1, -1)
        filling = states.new_zeros(1).expand(*shared.shape[:3], -(slots + reach + size) % KEY_TILE, states.shape[-1])
        pieces = (shared, *_windows(states, layout.past_tokens, fold), filling)
        joined.append(torch.cat([piece.movedim(2, chunk_dim) for piece in pieces], 3).flatten(*merged))
    keys, values = joined
    visible = _visible_to_chunks(fold, slots, layout, first_block_BC, batch, query.device)
    visible = F.pad(visible, (0, keys.shape[2] - visible.shape[-1])).repeat(1, heads // groups, 1)[:, None]
    with exact(query.device):
        output = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible)

    output = output.unflatten(merged[0], (batch, groups) if chunk_dim == 0 else (batch, count)).movedim(chunk_dim, 1)
    output_BCPGJD = output.unflatten(3, (heads // groups, size)).permute(0, 1, 4, 2, 3, 5)
    return output_BCPGJD.reshape(batch, count * size, heads, -1)[:, :tokens].transpose(1, 2)


class _Fold(NamedTuple):
    """Queries of a chunk, whole blocks; number of chunks; tokens before a chunk that its queries reach back to."""

    size: int
    count: int
    reach: int


def _fold(tokens: int, layout: BlockLayout) -> _Fold:
    """How :func:`attend_blocks_fused` cuts a row."""
    b, seen = layout.block_size, layout.visible_blocks * layout.slots_per_block + layout.window_size
    size = -(-max(CHUNK_FUSED, seen // CHUNKS_IN_VIEW) // b) * b
    if tokens <= 2 * size:  # one chunk: nothing is copied
        size = -(-tokens // b) * b
    # Counted one by one, so that torch.compile takes the length for a constant: with symbols it works for minutes.
    count = len(list(range(0, tokens, size)))
    return _Fold(size, count, min(layout.window_size - 1, layout.past_tokens + (count - 1) * size))


def _windows(states_BGMD: Tensor, past: int, fold: _Fold) -> list[Tensor]:
    """For every chunk its own rows and the ``reach`` rows before them, in pieces [B, G, chunks, rows, D].

    Args:
        past: rows before the first chunk.
    """
    size, count, reach = fold
    behind, before = -(-past // size), -(-reach // size)  # chunks, the first of them in part
    dtype = states_BGMD.dtype
    if before > 1:  # a row stands in more than two chunks, whose gradients are summed in this dtype
        states_BGMD = states_BGMD.to(_accumulate_in(dtype))
    missing = (behind * size - past, count * size - (states_BGMD.shape[2] - past))
    rows = F.pad(states_BGMD, (0, 0, *missing)) if any(missing) else states_BGMD
    chunks = rows.unflatten(2, (behind + count, size))
    pieces = []
    for ago in range(before, 0, -1):
        seen = chunks[:, :, :, before * size - reach :] if ago == before else chunks
        pieces.append(F.pad(seen, (0, 0, 0, 0, ago - behind, -ago)))  # later by `ago` chunks; negative padding cuts
    return [piece.to(dtype) for piece in (*pieces, chunks[:, :, behind:])]


def _visible_to_chunks(
    fold: _Fold, slots: int, layout: BlockLayout, first_block_BC: Tensor | None, batch: int, device: torch.device
) -> Tensor:
    """Which keys each query of a chunk sees, [chunks, C, S + reach + C], or [B * chunks, ...] for packed rows.

    Every query sees something, itself, padding behind the row too: no softmax is over nothing.
    """
    b, r, w = layout.block_size, layout.slots_per_block, layout.window_size
    query = torch.arange(fold.count * fold.size, device=device).view(fold.count, fold.size)
    slot_block = torch.arange(slots, device=device) // max(r, 1) - layout.past_blocks
    token = query[:, None, :1] + torch.arange(-fold.reach, fold.size, device=device)
    first = None
    if first_block_BC is not None:
        block = (query // b).clamp(max=first_block_BC.shape[1] - 1)
        first = first_block_BC.expand(batch, -1)[:, block]
    slot_seen = visible_slots(query, slot_block, b, layout.visible_blocks, first)
    token_seen = visible_tokens(query, token, b, w, first) & (token >= -layout.past_tokens)
    visible = torch.cat((slot_seen, token_seen), -1)
    return visible if first is None else visible.flatten(0, 1)


class _AttendBlocks(torch.autograd.Function):
    """Forward and backward of :func:`attend_blocks`, chunk by chunk; keeps the inputs and nothing else.

    The backward pass forms the probabilities again with the fused softmax, and its fused derivative: on a CPU that is
    fewer passes over a chunk than exp(score - logsumexp) from a stored logsumexp.
    """

    @staticmethod
    def forward(ctx, query_BHND, key_BGMD, value_BGMD, slot_key_BGSD, slot_value_BGSD, layout, first_block_BC):
        batch, heads, tokens, dim = query_BHND.shape
        groups = key_BGMD.shape[1]
        query = query_BHND.reshape(batch * groups, heads // groups, tokens, dim)
        key, value = key_BGMD.flatten(0, 1), value_BGMD.flatten(0, 1)
        slot_key, slot_value = slot_key_BGSD.flatten(0, 1), slot_value_BGSD.flatten(0, 1)
        output = torch.empty_like(query)
        with exact(query.device):
            for chunk in _chunks(query, key, slot_key, layout, first_block_BC):
                keys, values = _join(slot_key, key, chunk), _join(slot_value, value, chunk)
                probabilities = _probabilities(query[:, :, chunk.queries], keys, chunk.bias)
                attended = probabilities.to(query.dtype) @ values
                output[:, :, chunk.queries] = attended.unflatten(1, (heads // groups, -1))
        ctx.save_for_backward(query, key, value, slot_key, slot_value, first_block_BC)
        ctx.layout, ctx.shapes = layout, (query_BHND.shape, key_BGMD.shape, slot_key_BGSD.shape)
        return output.view(query_BHND.shape)

    @staticmethod
    def backward(ctx, grad_BHND):
        query, key, value, slot_key, slot_value, first_block_BC = ctx.saved_tensors
        query_shape, key_shape, slot_shape = ctx.shapes
        grad, dtype, scale = grad_BHND.reshape(query.shape), query.dtype, query.shape[-1] ** -0.5
        grad_query = torch.empty_like(query)
        # Every chunk adds to the slots, several to a key: sums in float32 at least.
        inputs = (key, value, slot_key, slot_value)
        sums = [torch.zeros_like(states, dtype=_accumulate_in(dtype)) for states in inputs]
        grad_key, grad_value, grad_slot_key, grad_slot_value = sums
        with exact(query.device):
            for chunk in _chunks(query, key, slot_key, ctx.layout, first_block_BC):
                queries, slots, tokens, bias = chunk
                count = slots.stop - slots.start
                chunk_query, chunk_grad = query[:, :, queries].flatten(1, 2), grad[:, :, queries].flatten(1, 2)
                keys, values = _join(slot_key, key, chunk), _join(slot_value, value, chunk)
                probabilities = _probabilities(query[:, :, queries], keys, bias)
                grad_values = probabilities.to(dtype).transpose(1, 2) @ chunk_grad
                grad_slot_value[:, slots].add_(grad_values[:, :count])
                grad_value[:, tokens].add_(grad_values[:, count:])
                grad_probabilities = (chunk_grad @ values.transpose(1, 2)).to(probabilities.dtype)
                grad_scores = torch.ops.aten._softmax_backward_data(
                    grad_probabilities, probabilities, -1, probabilities.dtype
                ).to(dtype)
                grad_query[:, :, queries] = (grad_scores @ keys).unflatten(1, (query.shape[1], -1))
                grad_keys = grad_scores.transpose(1, 2) @ chunk_query
                grad_slot_key[:, slots].add_(grad_keys[:, :count])
                grad_key[:, tokens].add_(grad_keys[:, count:])
        for gradient in (grad_query, grad_key, grad_slot_key):
            gradient *= scale
        key_gradients = [gradient.to(dtype).view(key_shape) for gradient in (grad_key, grad_value)]
        slot_gradients = [gradient.to(dtype).view(slot_shape) for gradient in (grad_slot_key, grad_slot_value)]
        return grad_query.view(query_shape), *key_gradients, *slot_gradients, None, None


class _Chunk(NamedTuple):
    """Some neighbouring queries, all that any of them can see, and a bias of -inf where one of them must not look."""

    queries: slice
    slots: slice
    tokens: slice
    bias: Tensor


def _chunks(query: Tensor, key: Tensor, slot_key: Tensor, layout: BlockLayout, first_block_BC: Tensor | None):
    """Cut the queries at block borders; slots outside the view and tokens outside the window are never touched."""
    rows, tokens, device = query.shape[0] * query.shape[1], query.shape[2], query.device
    b, r, w = layout.block_size, layout.slots_per_block, layout.window_size
    size = CHUNK_CPU if device.type == "cpu" else 1 << (CHUNK_GPU_LOG2_WORK + 1 - rows.bit_length()) // 2
    size = max(1, size // b) * b
    # Seen from its first block every chunk looks alike: the bias is made once, chunks take the columns that they need.
    view = min(layout.visible_blocks, layout.past_blocks + -(-tokens // b)) if r else 0
    slot_block = torch.arange((view + size // b) * r, device=device) // max(r, 1) - view
    token = torch.arange(1 - w, size, device=device)
    query_N = torch.arange(size, device=device)
    visible_slot = visible_slots(query_N, slot_block, b, layout.visible_blocks)
    slot_bias = torch.zeros_like(visible_slot, dtype=query.dtype).masked_fill_(~visible_slot, float("-inf"))
    visible_token = visible_tokens(query_N, token, b, w)
    token_bias = torch.zeros_like(visible_token, dtype=query.dtype).masked_fill_(~visible_token, float("-inf"))
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        first_slot = (layout.past_blocks + start // b - view) * r  # the slot and the token that column 0 stands for
        first_token = layout.past_tokens + start + 1 - w
        complete = layout.past_blocks + (start + 1) // b
        highest = min((layout.past_blocks + stop // b) * r, slot_key.shape[1])
        slots = slice(min(max(0, complete - layout.visible_blocks) * r, highest), highest)
        near = slice(max(0, first_token), min(layout.past_tokens + stop, key.shape[1]))
        bias = torch.cat(
            (
                slot_bias[: stop - start, slots.start - first_slot : slots.stop - first_slot],
                token_bias[: stop - start, near.start - first_token : near.stop - first_token],
            ),
            1,
        )
        if first_block_BC is not None:
            slot_stands_at = slot_block[slots.start - first_slot : slots.stop - first_slot] * b
            token_stands_at = token[near.start - first_token : near.stop - first_token]
            stands_at = torch.cat((slot_stands_at, token_stands_at)) + start
            may_see_from = first_block_BC[:, torch.arange(start, stop, device=device) // b] * b
            bias = bias.masked_fill(stands_at < may_see_from[..., None], float("-inf"))
        yield _Chunk(slice(start, stop), slots, near, bias)


def _join(slots: Tensor, tokens: Tensor, chunk: _Chunk) -> Tensor:
    """What the chunk sees, slots first."""
    return torch.cat((slots[:, chunk.slots], tokens[:, chunk.tokens]), 1)


def _probabilities(query: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """Probabilities [B * G, H / G * n, slots + tokens] of a chunk, in float32 at least.

    Args:
        query: [B * G, H / G, n, D].
        bias: [n, slots + tokens] or one per row, [B, n, slots + tokens].
    """
    batch_groups, per_group = query.shape[:2]
    if per_group > 1:
        bias = bias.repeat(*[1] * (bias.dim() - 2), per_group, 1)
    bias = bias[None] if bias.dim() == 2 else bias.repeat_interleave(batch_groups // len(bias), 0)
    scores = torch.baddbmm(bias, query.flatten(1, 2), keys.transpose(1, 2), alpha=query.shape[-1] ** -0.5)
    return scores.softmax(-1, dtype=_accumulate_in(keys.dtype))


def exact(device: torch.device):
    """A context in which autocast leaves the dtypes as they are."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _accumulate_in(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _widest(device: torch.device) -> torch.dtype:
    """For positions: float64, which Apple's devices do not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def _gather(states: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [B, n] of ``states`` [B or 1, T, ...] along dimension 1."""
    states = states.expand(len(index), *states.shape[1:])
    return states.gather(1, index.view(*index.shape, *[1] * (states.dim() - 2)).expand(-1, -1, *states.shape[2:]))


def require(condition: Tensor, message: str) -> None:
    """ValueError unless the one-element ``condition`` holds; on an accelerator an assertion that does not wait."""
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not condition:
            raise ValueError(message)
    elif condition.device.type != "meta":
        torch._assert_async(condition, message[:LONGEST_ASSERTION])
