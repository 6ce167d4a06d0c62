"""What is measured: attention alone, and whole models, each beside its baselines; each with a check of its own.

A case is a function without arguments that does one forward and backward pass.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from linpass.attention_linformer import (
    BlockLayout,
    attend_blocks,
    attend_blocks_reference,
    attend_visible,
    mix_blocks,
    mix_sequence_and_attend,
)

HEADS, DIM = 8, 64
# Fixed k and w, as in the paper's claim: r falls as n grows, so that k slots stand for any n.
SLOTS, WINDOW, BLOCK = 128, 128, 128


class Attention(NamedTuple):
    """One attention call: its leaves, and a function from them to the output."""

    leaves: list[torch.Tensor]
    forward: Callable[..., torch.Tensor]

    def __call__(self) -> None:
        output = self.forward(*self.leaves)
        output.backward(self.leaves[0].detach())
        for leaf in self.leaves:
            leaf.grad = None


def layout_for(tokens: int) -> BlockLayout:
    """k = 128 slots over ``tokens`` tokens; below 128 blocks of 128 tokens the blocks give more than one slot each."""
    slots_per_block = max(1, SLOTS * BLOCK // tokens)
    return BlockLayout(BLOCK, WINDOW, slots_per_block, tokens // BLOCK)


def leaves(tokens: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(1, HEADS, tokens, DIM, generator=generator, dtype=dtype) for _ in range(3)]
    return [tensor.requires_grad_() for tensor in draw]


def linformer_attention(tokens: int, dtype: torch.dtype = torch.float32) -> Attention:
    """Mixing of keys and values with one set of weights per head, then window and slots in one softmax."""
    layout = layout_for(tokens)
    weight = torch.full((HEADS, 1, BLOCK, layout.slots_per_block), layout.slots_per_block / BLOCK, dtype=dtype)

    def forward(query, key, value, weight):
        return attend_blocks(query, key, value, mix_blocks(key, weight), mix_blocks(value, weight), layout)

    return Attention([*leaves(tokens, dtype), weight.requires_grad_()], forward)


def sdpa_attention(tokens: int, dtype: torch.dtype = torch.float32) -> Attention:
    """PyTorch's causal attention; on a CPU its flash kernel."""
    return Attention(leaves(tokens, dtype), lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))


def linformer_both_ways(tokens: int, dtype: torch.dtype = torch.float32) -> Attention:
    """The encoder's attention over k = 128 slots that mix the whole row, E and F shared by the heads."""
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(1, tokens, SLOTS, generator=generator, dtype=dtype) / tokens**0.5 for _ in range(2)]

    def forward(query, key, value, key_weight, value_weight):
        return mix_sequence_and_attend(query, key, value, (key_weight, value_weight))

    return Attention([*leaves(tokens, dtype), *(weight.requires_grad_() for weight in weights)], forward)


def sdpa_both_ways(tokens: int, dtype: torch.dtype = torch.float32) -> Attention:
    """PyTorch's full attention, bidirectional."""
    return Attention(leaves(tokens, dtype), F.scaled_dot_product_attention)


def check_attention(tokens: int) -> float:
    """The error of causal attention, see :func:`check`."""
    layout = layout_for(tokens)

    def truth(query, key, value, weight):
        slots = mix_blocks(key, weight), mix_blocks(value, weight)
        return attend_blocks_reference(query, key, value, *slots, layout)[0]

    return check(linformer_attention(tokens), truth)


def check_both_ways(tokens: int) -> float:
    """The error of bidirectional attention, see :func:`check`."""

    def truth(query, key, value, key_weight, value_weight):
        return attend_visible(query, key_weight.mT @ key, value_weight.mT @ value)[0]

    return check(linformer_both_ways(tokens), truth)


def check(fast: Attention, truth: Callable[..., torch.Tensor]) -> float:
    """Largest relative error of output and gradients in float32 against ``truth`` in float64; raises past 1e-5."""
    exact = [leaf.detach().double().requires_grad_() for leaf in fast.leaves]
    grad = torch.randn(fast.leaves[0].shape, generator=torch.Generator().manual_seed(1))
    output, expected = fast.forward(*fast.leaves), truth(*exact)
    output.backward(grad)
    expected.backward(grad.double())
    pairs = [(output, expected), *((a.grad, b.grad) for a, b in zip(fast.leaves, exact, strict=True))]
    error = max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)
    if not error < 1e-5:
        tokens = fast.leaves[0].shape[2]
        raise AssertionError(f"attention is wrong at n={tokens}: relative error {error:.1e}; nothing is measured")
    return error


def linformer_model(tokens: int, with_attention: bool = True):
    """A causal Linformer of 4 layers; without attention, only its projections stay: the bound by Amdahl's law."""
    from linpass import LinformerConfig, LinformerForCausalLM

    config = LinformerConfig(
        vocab_size=1024,
        embed_dim=256,
        depth=4,
        heads=4,
        seq_length=tokens,
        k=128,
        block_size=min(128, tokens // 4),
        window_size=128,
        position_embedding="rotary",
        projection="convolution",
        projection_sharing="none",
        qk_norm=True,
        rank=None,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LinformerForCausalLM(config)
    if not with_attention:
        for layer in model.model.layers:
            layer.attention.forward = without_mixing(layer.attention)
    return model


def without_mixing(attention):
    """The projections of an attention layer, and nothing between them."""

    def forward(hidden_states, **kwargs):
        query, key, value = (getattr(attention, name)(hidden_states) for name in ("q_proj", "k_proj", "v_proj"))
        return attention.o_proj(query + key + value), None

    return forward


def gpt2_model(tokens: int, parameters: int):
    """transformers' GPT-2 (SDPA) whose feed-forward width makes its parameters as many as ``parameters``."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def build(inner):
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=1024,
                n_positions=tokens,
                n_embd=256,
                n_layer=4,
                n_head=4,
                n_inner=inner,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                tie_word_embeddings=False,
                use_cache=False,
                bos_token_id=0,
                eos_token_id=0,
            )
        )

    count = sum(parameter.numel() for parameter in build(1024).parameters())
    per_unit = 4 * (2 * 256 + 1)
    return build(max(1, 1024 + round((parameters - count) / per_unit)))


def training_step(model, tokens: int, batch: int) -> Callable[[], None]:
    """Forward with loss, and backward, on random ids [batch, tokens]."""
    ids = torch.randint(0, 1024, (batch, tokens), generator=torch.Generator().manual_seed(0))
    model.train()

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    return step
