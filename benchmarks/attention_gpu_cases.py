"""Ways to attend that are measured on a GPU, ours and others', on the same inputs, and the shapes they are measured at.

Queries, keys and values are as a model has them, bfloat16, [B, N, H, D] in memory; E and F are learned and shared by
the heads ("headwise"). A way that mixes has the mixing, and the gradients of its weights, in its time.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from linpass import attention_linformer, kernels_linformer
from linpass.attention_linformer import BlockLayout, attend_blocks_reference, mix_blocks

WINDOW = 128
SLOTS_AND_BLOCK = {  # n: k, b
    256: (64, 32),
    512: (128, 32),
    1024: (128, 32),
    2048: (256, 32),
    4096: (256, 64),
    8192: (256, 128),
    16384: (256, 128),
    32768: (512, 128),
    65536: (512, 128),
    131072: (1024, 128),
    262144: (2048, 128),
}
# Longest row whose scores, all of them in float64, are formed to check a result.
LONGEST_DENSE_TRUTH = 2048
GATED_SLOTS = 64


class Shape(NamedTuple):
    """H heads of D features over rows of n tokens, k slots in blocks of b tokens, a window of w."""

    heads: int
    dim: int
    tokens: int
    slots: int
    block: int
    window: int = WINDOW

    @property
    def layout(self) -> BlockLayout:
        blocks = self.tokens // self.block
        return BlockLayout(self.block, self.window, self.slots // blocks, blocks)

    @property
    def bidirectional(self) -> bool:
        """Without a window: one block of all tokens, whose slots every query sees."""
        return not self.window

    @property
    def has_target(self) -> bool:
        return (self.heads, self.dim) == (8, 64) and self.tokens in WITH_TARGET

    @property
    def pairs(self) -> int:
        """Pairs of a query and a slot or token that it sees."""
        if self.bidirectional:
            return self.tokens * self.slots
        b, w, r, view = self.layout[:4]
        return sum(min(t + 1, w) + r * min((t + 1) // b, view) for t in range(self.tokens))

    def named(self) -> dict:
        return {
            "heads": self.heads,
            "dim": self.dim,
            "n": self.tokens,
            "k": self.slots,
            "b": self.block,
            "r": self.layout.slots_per_block,
            "w": self.window,
        }


def shapes(heads: int, dim: int, lengths: tuple[int, ...]) -> list[Shape]:
    return [Shape(heads, dim, tokens, *SLOTS_AND_BLOCK[tokens]) for tokens in lengths]


# The lengths with a target come first: whatever a time limit cuts stands behind.
WITH_TARGET = (512, 65536, 2048, 8192, 32768)
WITHOUT_TARGET = (256, 1024, 4096, 16384, 131072, 262144)
SHAPES = shapes(8, 64, WITH_TARGET + WITHOUT_TARGET) + shapes(16, 128, WITH_TARGET + WITHOUT_TARGET)


class Attention(NamedTuple):
    """One way to attend at one shape.

    Attributes:
        forward: from the leaves to the output, [B, H, N, D].
        leaves: queries, keys and values, [B, H, N, D] each, then whatever else has a gradient.
        names: of the leaves.
        truth: the same function for leaves in float64; None where it would not fit.
    """

    forward: Callable[..., Tensor]
    leaves: list[Tensor]
    names: tuple[str, ...] = ("query", "key", "value")
    truth: Callable[..., Tensor] | None = None


class Variant(NamedTuple):
    """A way to attend: ``build(shape, inputs)`` with queries, keys, values, E and F."""

    name: str
    build: Callable[[Shape, list[Tensor]], Attention]


def make_inputs(shape: Shape, batch: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Queries, keys, values and mixing weights E and F, [1, blocks, b, r]; slots have variance one, as the keys."""
    size = (batch, shape.tokens, shape.heads, shape.dim)
    states = [torch.randn(size, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)]
    size = (1, shape.tokens // shape.block, shape.block, shape.layout.slots_per_block)
    return states + [torch.randn(size, device=device, dtype=dtype) / shape.block**0.5 for _ in range(2)]


def linformer_truth(layout: BlockLayout, tokens: int) -> Callable[..., Tensor]:
    """The formula with all scores in memory, or, for long rows, the loop over chunks that the tests compare with it."""

    def dense(query, key, value, key_weight, value_weight):
        slots = mix_blocks(key, key_weight), mix_blocks(value, value_weight)
        return attend_blocks_reference(query, key, value, *slots, layout)[0]

    def chunked(query, key, value, *weights):
        return attention_linformer.mix_and_attend(query, key, value, weights, layout)

    return dense if tokens <= LONGEST_DENSE_TRUTH else chunked


def causal_truth(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    return attention_linformer.attend_visible(query, key, value, visible)[0]


def full_truth(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention_linformer.attend_visible(query, key, value)[0]


MIXED = ("query", "key", "value", "E", "F")


def with_module(module) -> Callable[[Shape, list[Tensor]], Attention]:
    """Our attention: the kernels, or the PyTorch functions they replace."""

    def build(shape: Shape, inputs: list[Tensor]) -> Attention:
        def forward(query, key, value, *weights):
            return module.mix_and_attend(query, key, value, weights, shape.layout)

        return Attention(forward, inputs, MIXED, linformer_truth(shape.layout, shape.tokens))

    return build


def with_backend(backend: SDPBackend) -> Callable[[Shape, list[Tensor]], Attention]:
    """Full attention, causal where the shape is, by one of PyTorch's back ends; on a CPU by the one that it has."""

    def build(shape: Shape, inputs: list[Tensor]) -> Attention:
        def forward(query, key, value):
            with sdpa_kernel(backend) if query.is_cuda else nullcontext():
                return F.scaled_dot_product_attention(query, key, value, is_causal=not shape.bidirectional)

        truth = full_truth if shape.bidirectional else causal_truth
        return Attention(forward, inputs[:3], truth=truth if shape.tokens <= LONGEST_DENSE_TRUTH else None)

    return build


def flex_attention_over_slots(shape: Shape, inputs: list[Tensor]) -> Attention:
    """Mixing as products of matrices, then compiled FlexAttention over slots and tokens."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # or the number of compiled versions of one function reaches its limit
    mask = flex_mask(shape, inputs[0].device)
    attend = torch.compile(flex_attention, dynamic=False)

    def forward(query, key, value, key_weight, value_weight):
        keys = torch.cat((mix_blocks(key, key_weight), key), 2)
        values = torch.cat((mix_blocks(value, value_weight), value), 2)
        return attend(query.contiguous(), keys, values, block_mask=mask)

    return Attention(forward, inputs, MIXED, linformer_truth(shape.layout, shape.tokens))


def flex_mask(shape: Shape, device: torch.device, tile: int = 128):
    """FlexAttention's mask over slots, then tokens, from the ranges of keys that the queries of a tile see.

    ``create_block_mask`` forms it for every query and key first: from n = 131,072 on there is no room for that, and to
    compile it takes minutes.
    """
    from torch.nn.attention.flex_attention import BlockMask

    (b, w, r, blocks), n = shape.layout[:4], shape.tokens
    slots = blocks * r

    def sees(_batch, _head, query, key):
        token = key - slots
        in_window = (key >= slots) & (token <= query) & (token > query - w)
        return in_window | ((key < slots) & (key // r < (query + 1) // b))

    first = torch.arange(0, n, tile, device=device)[:, None]
    last = (first + tile).clamp(max=n) - 1
    start = torch.arange(0, slots + n, tile, device=device)[None]
    stop = (start + tile).clamp(max=slots + n)
    some = start < (last + 1) // b * r  # slots of blocks that the last query has behind it
    some = some | ((stop > slots + (first - w + 1).clamp(min=0)) & (start <= slots + last))
    every = stop <= (first + 1) // b * r
    every = every | ((start >= slots + (last - w + 1).clamp(min=0)) & (stop <= slots + first + 1))

    def listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
        """How many tiles of keys each tile of queries has, and their numbers, in front."""
        order = tiles.int().argsort(dim=1, descending=True, stable=True)
        return tiles.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(
        *listed(some & ~every), *listed(every), BLOCK_SIZE=tile, mask_mod=sees, seq_lengths=(n, slots + n)
    )


def gated_slot_attention(shape: Shape, inputs: list[Tensor]) -> Attention:
    """``chunk_gsa`` of flash-linear-attention with 64 slots, and gates as its layer makes them: another function."""
    from fla.ops.gsa import chunk_gsa

    query = inputs[0]
    size = (query.shape[0], shape.tokens, shape.heads, GATED_SLOTS)
    gate = F.logsigmoid(torch.randn(size, device=query.device)).div(8).to(query.dtype)
    write = (1 - gate.exp()).to(query.dtype)

    def forward(query, key, value, write, gate):
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        return chunk_gsa(query, key, value, write, gate)[0].transpose(1, 2)

    names, known = ("query", "key", "value", "write", "gate"), shape.tokens <= LONGEST_DENSE_TRUTH
    return Attention(forward, [*inputs[:3], write, gate], names, gated_slots_truth if known else None)


def gated_slots_truth(query: Tensor, key: Tensor, value: Tensor, write: Tensor, gate: Tensor) -> Tensor:
    r"""Gated slot attention token by token, of the last row of the batch (Zhang et al. 2024, arXiv:2409.07146).

    Every slot's key and value fade by the gate, :math:`e^{g_t}`, and take the token in by ``write``; a query attends
    to the slots as they then are.

    Args:
        query, key, value: [1, H, T, D]. write, gate: [B, T, H, M].
    """
    write, gate = (states[-1:].transpose(1, 2)[..., None] for states in (write, gate.exp()))  # [1, H, T, M, 1]
    slot_key = slot_value = query.new_zeros(*query.shape[:2], write.shape[3], query.shape[3])
    outputs = []
    for t in range(query.shape[2]):
        slot_key = gate[:, :, t] * slot_key + write[:, :, t] * key[:, :, t, None]
        slot_value = gate[:, :, t] * slot_value + write[:, :, t] * value[:, :, t, None]
        outputs.append(attention_linformer.attend_visible(query[:, :, t, None], slot_key, slot_value)[0])
    return torch.cat(outputs, 2)


class Held(nn.Module):
    """Stands for a projection whose result is there already."""

    states: Tensor

    def forward(self, _hidden_states: Tensor) -> Tensor:
        return self.states


def linformer_of_lucidrains(shape: Shape, inputs: list[Tensor]) -> Attention:
    """``LinformerSelfAttention`` between its projections: bidirectional, so in a language model the future leaks."""
    from linformer import LinformerSelfAttention

    width = shape.heads * shape.dim
    module = LinformerSelfAttention(width, shape.tokens, k=shape.slots, heads=shape.heads)
    module.to_q, module.to_out = nn.Identity(), nn.Identity()
    module.to_k, module.to_v = Held(), Held()
    del module.proj_k, module.proj_v  # parameters, which only parameters could replace

    def forward(query, key, value, key_weight, value_weight):
        query, module.to_k.states, module.to_v.states = (x.transpose(1, 2).flatten(2) for x in (query, key, value))
        module.proj_k, module.proj_v = key_weight, value_weight
        return module(query).unflatten(2, (shape.heads, shape.dim)).transpose(1, 2)

    def truth(query, key, value, key_weight, value_weight):
        slots = key_weight.T @ key, value_weight.T @ value
        return attention_linformer.attend_visible(query, *slots)[0]

    size, like = (shape.tokens, shape.slots), {"device": inputs[0].device, "dtype": inputs[0].dtype}
    weights = [torch.randn(size, **like) / shape.tokens**0.5 for _ in range(2)]
    known = shape.tokens <= LONGEST_DENSE_TRUTH
    return Attention(forward, [*inputs[:3], *weights], MIXED, truth if known else None)


OURS = Variant("linpass", with_module(kernels_linformer))
OURS_IN_PYTORCH = Variant("linpass, PyTorch", with_module(attention_linformer))
CUDNN = Variant("cuDNN causal", with_backend(SDPBackend.CUDNN_ATTENTION))
FLASH = Variant("flash causal", with_backend(SDPBackend.FLASH_ATTENTION))
# Measured side by side at every shape, then the rest one by one, those that need no compiler first.
CORE = (OURS, CUDNN, FLASH)
OTHERS = (
    OURS_IN_PYTORCH,
    Variant("linformer (lucidrains, leaks)", linformer_of_lucidrains),
    Variant("FlexAttention", flex_attention_over_slots),
    Variant("chunk_gsa, 64 slots", gated_slot_attention),
)
