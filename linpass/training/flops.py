"""Floating-point operations of a training step, counted from the model, and what known devices can do at most.

Model FLOPs are what the mathematics needs: nothing is added for activations that are computed again, for scores that
are computed and masked out, or for padding. So they serve to compare programs that train the same model.
"""

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

# Dense bfloat16 (float16 where the device has no bfloat16) with float32 accumulation, FLOP/s, from the makers' data
# sheets, which often print twice as much: with sparsity. The first name that occurs as a word decides.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
    "MI300X": 1307e12,
}


def peak_flops(device_name: str) -> float | None:
    """Most FLOP/s of a device in dense bfloat16 matrix products; None when it is not in the table.

    Args:
        device_name: as ``torch.cuda.get_device_name()`` has it. A part of a device (MIG) is unknown.

    Example:
        >>> peak_flops("NVIDIA H100 80GB HBM3") / 1e12
        989.0
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    names = (name for name in PEAK_FLOPS if re.search(rf"\b{name}\b", device_name, re.IGNORECASE))
    return next((PEAK_FLOPS[name] for name in names), None)


def flops_per_token(model: nn.Module, seq_length: int) -> float:
    r"""Model FLOPs of one training token: forward, and twice as much for the gradients of inputs and weights.

    .. math::  6 W + 12 \sum_{layers} H D \bar m + \text{mixing}

    W are the entries of all matrices that tokens are multiplied with, :math:`\bar m` the keys that a token attends to
    on average: :math:`(n + 1) / 2` in full causal attention, n in full bidirectional attention; in a causal Linformer
    the visible slots and window tokens, in a bidirectional one its slots. A Linformer also mixes every key and value
    into slots.

    Source: Kaplan et al. 2020, section 2.1, and Chowdhery et al. 2022 (PaLM), appendix B. Unlike there a causal model
    is not charged for the scores above the diagonal, nor any model for embedding look-ups.

    Args:
        model: transformers' decoder or encoder; for another module without ``config``, attention counts as nothing.
        seq_length: n, tokens of a row, none of them padding.

    What is not counted: norms, activations, softmax, rotations, the loss. What is counted too high: experts that a
    token does not visit, sliding windows of other architectures, frozen weights.
    """
    if seq_length < 1:
        raise ValueError(f"seq_length={seq_length} must be 1 or more")
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) == "linformer":
        attention = sum(_linformer_flops(config, layer, seq_length) for layer in range(config.depth))
    else:
        attention = _full_attention_flops(model, config, seq_length)
    return 6 * matrix_entries(model) + attention


def matrix_entries(model: nn.Module) -> int:
    """Entries of the matrices that every token is multiplied with; a head tied to the embedding counts as a head."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)))


def _full_attention_flops(model: nn.Module, config: PreTrainedConfig | None, seq_length: int) -> float:
    """Scores and weighted values, 4 * H * D FLOPs per key and query forward, three times that with gradients."""
    layers, heads = getattr(config, "num_hidden_layers", 0), getattr(config, "num_attention_heads", 0)
    if config is None or not layers or not heads:
        return 0.0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    is_causal = any(getattr(module, "is_causal", False) for module in model.modules())
    keys = (seq_length + 1) / 2 if is_causal else seq_length
    return 12.0 * layers * heads * head_dim * keys


def _linformer_flops(config: PreTrainedConfig, layer: int, seq_length: int) -> float:
    """Attention over slots and window, and the mixing, 4 * G * D FLOPs forward for each slot that a token enters.

    Pooling has no weights, hence no gradient of weights: two parts instead of three.
    """
    k = config.layer_k(layer)
    if config.causal:
        keys = _keys_in_view(config, layer, seq_length)
        whole = seq_length // config.block_size * config.block_size / seq_length  # share of tokens in complete blocks
        entered = config.slots_per_block(layer) * whole
    elif not k:
        keys, entered = seq_length, 0
    elif config.projection == "learned":
        keys = entered = k
    else:
        keys, entered = -(-seq_length * k // config.seq_length), 1
    parts = 2 if config.projection == "pooling" else 3
    mixing = parts * 4 * config.num_key_value_heads * config.head_dim * entered
    return 12.0 * config.heads * config.head_dim * keys + mixing


def _keys_in_view(config: PreTrainedConfig, layer: int, seq_length: int) -> float:
    """Slots and exact tokens that a token of a causal Linformer sees, on average over a row."""
    seen = torch.arange(1, seq_length + 1)
    slots = seen // config.block_size * config.slots_per_block(layer)
    in_view = slots.clamp(max=config.layer_k(layer)) + seen.clamp(max=config.window_size)
    return in_view.double().mean().item()
