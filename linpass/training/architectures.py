"""The models that a run can train: a Linformer, or transformers' GPT-2 or Llama of the same size to measure it by."""

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from linpass import LinformerConfig, LinformerForCausalLM, LinformerForMaskedLM
from linpass.errors import InputError
from linpass.training.arguments import ARCHITECTURES, OBJECTIVES

SAME_SIZE = 0.01  # of the parameters


def build_model(architecture: str, config: LinformerConfig, objective: str = "causal") -> PreTrainedModel:
    """A model with random weights, on the default device.

    Args:
        architecture: "linformer", or a baseline: "gpt2" or "llama" with the Linformer's vocabulary, width, depth,
            heads, positions, special ids, initial standard deviation and tied or untied head; ``config.dropout``
            wherever the architecture drops out; and the feed-forward width that brings its parameters closest to the
            Linformer's.
        objective: "causal" or "masked"; baselines are causal.

    Raises:
        InputError: an unknown architecture or objective, a baseline of an encoder, an objective that does not fit
            ``config.causal``, or a Linformer too small for a baseline within 1 % of its parameters.
    """
    if architecture not in ARCHITECTURES:
        raise InputError(f"architecture={architecture!r} must be one of {', '.join(ARCHITECTURES)}")
    if objective not in OBJECTIVES:
        raise InputError(f"objective={objective!r} must be one of {', '.join(OBJECTIVES)}")
    if objective == "masked" and architecture != "linformer":
        raise InputError(f"objective='masked' needs architecture='linformer'; {architecture} is causal")
    if config.causal != (objective == "causal"):
        raise InputError(f"objective={objective!r} needs causal={objective == 'causal'}; it is {config.causal}")
    if architecture == "linformer":
        return LinformerForCausalLM(config) if objective == "causal" else LinformerForMaskedLM(config)
    model = _baseline(architecture, config, feed_forward_width(architecture, config))
    model.loss_type = "ForCausalLM"  # transformers infers it from the class name, which GPT-2's does not tell
    return model


def feed_forward_width(architecture: str, config: LinformerConfig) -> int:
    """The feed-forward width at which a baseline has as many parameters as the Linformer of ``config``.

    A multiple of 8, which matrix units want, where that stays within 1 %. Costs no memory: models on the meta device.

    Raises:
        InputError: no width comes within 1 %.
    """
    with torch.device("meta"):
        target = LinformerForCausalLM(config).num_parameters()
        at_8, at_16 = (_baseline(architecture, config, width).num_parameters() for width in (8, 16))
    per_unit = (at_16 - at_8) // 8  # the count is linear in the width
    exact = 8 + (target - at_8) / per_unit
    for width in (8 * round(exact / 8), round(exact)):
        if width >= 1 and abs(at_8 + per_unit * (width - 8) - target) <= SAME_SIZE * target:
            return width
    raise InputError(
        f"architecture={architecture!r} cannot have the {target:,} parameters of this Linformer within 1 %: it has "
        f"{at_8 - 7 * per_unit:,} with a feed-forward layer of width 1, and {per_unit:,} more for every unit"
    )


def _baseline(architecture: str, config: LinformerConfig, width: int) -> GPT2LMHeadModel | LlamaForCausalLM:
    same: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "use_cache": config.use_cache,
    }
    if architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_positions=config.seq_length,
                n_embd=config.embed_dim,
                n_layer=config.depth,
                n_head=config.heads,
                n_inner=width,
                embd_pdrop=config.dropout,
                resid_pdrop=config.dropout,
                attn_pdrop=config.dropout,
                **same,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            max_position_embeddings=config.seq_length,
            hidden_size=config.embed_dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            num_key_value_heads=config.num_key_value_heads,
            intermediate_size=width,
            attention_dropout=config.dropout,
            **same,
        )
    )
