"""The Linformer as transformers models: base, causal LM, masked LM, sequence and token classification.

The mathematics is in ``attention_linformer``, what decoding remembers in ``cache_linformer``. Saved folders carry these
files, so that they load with ``trust_remote_code=True`` where linpass is not installed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_linformer import (
    BlockLayout,
    TokenGrid,
    attend_blocks,
    attend_blocks_reference,
    attend_visible,
    continued_grid,
    mix_blocks,
    mix_sequence,
    packed_grid,
    plain_grid,
    pooling_weight,
    require,
    rotary_angles,
    rotate,
    slot_centres,
)
from .cache_linformer import LinformerCache, LinformerCacheLayer
from .configuration_linformer import LinformerConfig

logger = logging.get_logger(__name__)


class LowRankLinear(nn.Module):
    r"""A linear map of rank ``rank``, :math:`W \approx U V^\top`: ``rank * (in + out)`` numbers instead of ``in * out``.

    Args:
        in_features, out_features: widths.
        rank: inner width.
        bias: add a bias after U.

    Example:
        >>> sum(p.numel() for p in LowRankLinear(512, 2048, 256).parameters())
        655360
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.v = nn.Linear(in_features, rank, bias=False)
        self.u = nn.Linear(rank, out_features, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.u(self.v(hidden_states))


def _linear(in_features: int, out_features: int, rank: int | None) -> nn.Module:
    if rank is None:
        return nn.Linear(in_features, out_features, bias=False)
    return LowRankLinear(in_features, out_features, rank)


def _init_linear(linear: nn.Module, std: float) -> None:
    """Entries of the matrix, or of the product of its two factors, with standard deviation ``std``."""
    if isinstance(linear, LowRankLinear):
        factor_std = (std / linear.rank**0.5) ** 0.5
        init.normal_(linear.v.weight, std=factor_std)
        init.normal_(linear.u.weight, std=factor_std)
    else:
        init.normal_(linear.weight, std=std)


class SequenceProjection(nn.Module):
    """The weights E and F that mix tokens into slots, for one layer or for the whole model.

    Stored [X, tokens, slots], X the number of key/value heads or 1. ``learned``: a row per position of the sequence;
    ``convolution``: a row per position of a block; ``pooling``: nothing stored.
    """

    def __init__(self, config: LinformerConfig, layer_idx: int):
        super().__init__()
        k = config.layer_k(layer_idx)
        self.causal, self.kind = config.causal, config.projection
        self.seq_length = config.seq_length
        if config.causal:
            self.block_size, self.slots = config.block_size, config.slots_per_block(layer_idx)
        elif config.projection == "learned":
            self.block_size, self.slots = config.seq_length, k
        else:
            self.block_size, self.slots = config.seq_length // k, 1
        # At the start every position mixes as pooling does; in an encoder with a little noise, to part equal slots.
        self.noise_std = config.initializer_range * k / config.seq_length if not config.causal else 0.0
        if config.projection == "pooling":
            self.key = self.value = None
            return
        sets = config.num_key_value_heads if config.projection_sharing == "none" else 1
        rows = config.seq_length if config.projection == "learned" else self.block_size
        self.key = nn.Parameter(torch.empty(sets, rows, self.slots))
        apart = config.projection_sharing in ("none", "headwise")
        self.value = nn.Parameter(torch.empty(sets, rows, self.slots)) if apart else None

    @torch.no_grad()
    def reset(self) -> None:
        """Initial weights: means of neighbouring tokens."""
        for weight in (self.key, self.value):
            if weight is None:
                continue
            start = torch.empty_like(weight)
            block = pooling_weight(self.block_size, self.slots, torch.float32, weight.device)
            start.copy_(block.repeat(weight.shape[1] // self.block_size, 1))
            if self.noise_std and self.kind == "learned":
                start += torch.randn_like(start) * self.noise_std
            init.copy_(weight, start)

    def forward(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weights for keys and values, [X, C, P, R]: C blocks of P tokens, R slots each."""
        if self.key is None:
            key = pooling_weight(self.block_size, self.slots, like.dtype, like.device)[None]
        else:
            key = self.key
        key = key.unflatten(1, (-1, self.block_size))
        return key, key if self.value is None else self.value.unflatten(1, (-1, self.block_size))


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' attention interface over :func:`attend_visible`; ``attention_mask`` is boolean."""
    if is_causal:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    output, probabilities = attend_visible(query, key, value, attention_mask, scaling)
    return output.transpose(1, 2), probabilities


class LinformerAttention(nn.Module):
    """Projections, rotation and the three ways to attend: bidirectional, causal, one token at a time."""

    def __init__(self, config: LinformerConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads, self.key_value_heads, self.head_dim = config.heads, config.num_key_value_heads, config.head_dim
        self.num_key_value_groups = self.heads // self.key_value_heads
        self.is_causal = config.causal
        self.k = config.layer_k(layer_idx)
        self.slots_per_block = config.slots_per_block(layer_idx) if config.causal else 0
        self.layout = BlockLayout(
            block_size=config.block_size,
            window_size=config.window_size,
            slots_per_block=self.slots_per_block,
            visible_blocks=self.k // self.slots_per_block if self.slots_per_block else 0,
        )
        rank = config.attention_rank
        self.q_proj = _linear(config.embed_dim, self.heads * self.head_dim, rank)
        self.k_proj = _linear(config.embed_dim, self.key_value_heads * self.head_dim, rank)
        self.v_proj = _linear(config.embed_dim, self.key_value_heads * self.head_dim, rank)
        self.o_proj = _linear(self.heads * self.head_dim, config.embed_dim, rank)
        own = self.k and config.projection_sharing != "layerwise"
        self.projection = SequenceProjection(config, layer_idx) if own else None

    def forward(
        self,
        hidden_states: Tensor,
        grid: TokenGrid,
        angles: tuple[Tensor, Tensor] | None,
        shared_weights: tuple[Tensor, Tensor] | None,
        past_key_values: LinformerCache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_states: [B, T, E] in the order given.
            grid: where the tokens stand.
            angles: rotary cos and sin for the columns of the grid; None for learned positions.
            shared_weights: mixing weights of the model, where all layers share them.
        Returns: [B, T, E], and probabilities [B, H, T, k + T] from the eager implementation, else None.
        """
        hidden_states = grid.place(hidden_states)
        query = self.q_proj(hidden_states).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        key = self.k_proj(hidden_states).unflatten(-1, (self.key_value_heads, self.head_dim)).transpose(1, 2)
        value = self.v_proj(hidden_states).unflatten(-1, (self.key_value_heads, self.head_dim)).transpose(1, 2)
        if self.config.qk_norm:
            query = F.rms_norm(query, (self.head_dim,), eps=self.config.norm_eps).to(value.dtype)
            key = F.rms_norm(key, (self.head_dim,), eps=self.config.norm_eps).to(value.dtype)
        weights = shared_weights if self.projection is None else self.projection(hidden_states)
        query = query if angles is None else rotate(query, angles)

        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        if not self.is_causal:
            output, probabilities = self._attend_both_ways(query, key, value, weights, grid, angles, **kwargs)
        elif cache is not None and cache.columns and grid.columns == 1:
            output, probabilities = self._attend_one_token(query, key, value, weights, grid, angles, cache), None
        else:
            output, probabilities = self._attend_before(query, key, value, weights, grid, angles, cache, **kwargs)
        return self.o_proj(grid.restore(output.transpose(1, 2).flatten(2))), probabilities

    def _attend_both_ways(self, query, key, value, weights, grid, angles, **kwargs):
        """Section 4 of the paper: all queries, k slots that mix the whole row; k = 0 is full attention."""
        if not self.k:
            keys, values = key if angles is None else rotate(key, angles), value
            visible = None if grid.keep_BN is None else grid.keep_BN[:, None, None]
        elif self.config.projection == "learned":
            key_weight, value_weight = weights
            keys = mix_sequence(key, key_weight[:, 0], grid.keep_BN)
            values = mix_sequence(value, value_weight[:, 0], grid.keep_BN)
            visible = None
            if angles is not None:
                keys = self._rotate_slots(keys, self._sequence_centres(key.device))
        else:
            keys, values, visible = self._mix_strides(key, value, weights, grid)
            if angles is not None:
                keys = self._rotate_slots(keys, slot_centres(self._blocks(keys.shape[2], key.device), self._stride, 1))
        if visible is not None:  # a row without tokens looks at slot 0: its output is meaningless, not NaN
            visible = visible | (torch.arange(visible.shape[-1], device=visible.device) == 0)
        return self._through_interface(query, keys, values, visible, grid, is_causal=False, **kwargs)

    @property
    def _stride(self) -> int:
        """Tokens per slot of a bidirectional convolution or pooling."""
        return self.config.seq_length // self.k

    def _mix_strides(self, key, value, weights, grid):
        """Bidirectional convolution or pooling: slot i mixes tokens i * stride to (i + 1) * stride - 1."""
        stride = self._stride
        slots = min(-(-grid.columns // stride), self.k)  # columns past seq_length hold padding only
        missing = (0, 0, 0, slots * stride - min(grid.columns, slots * stride))
        mixed = []
        for states, weight in zip((key, value), weights, strict=True):
            if grid.keep_BN is not None:
                states = states.masked_fill(~grid.keep_BN[:, None, :, None], 0)
            mixed.append(mix_blocks(F.pad(states[:, :, : slots * stride], missing), weight))
        if grid.keep_BN is None and grid.columns == slots * stride:
            return *mixed, None
        first = self._blocks(slots, key.device) * stride
        total = grid.columns if grid.total_B is None else grid.total_B[:, None]
        held = (total - first).clamp(0, stride).expand(1 if grid.total_B is None else len(key), slots)
        if self.config.projection == "pooling":  # a slot that is partly filled is the mean of what it holds
            mixed = [states * (stride / held.clamp(min=1)).to(states.dtype)[:, None, :, None] for states in mixed]
        return *mixed, (held > 0)[:, None, None]

    def _attend_before(self, query, key, value, weights, grid, angles, cache, **kwargs):
        """Causal: tokens of this call, after those in the cache, if any."""
        layout, continues = self.layout, cache is not None and cache.columns > 0
        slot_key, slot_value = key[:, :, :0], value[:, :, :0]
        block_key, block_value = slot_key, slot_value
        blocks = grid.block_numbers(layout.block_size)
        rotated = key if angles is None else rotate(key, angles)
        if self.k and cache is None:
            slot_key, slot_value = mix_blocks(key, weights[0], blocks), mix_blocks(value, weights[1], blocks)
        elif self.k:
            block_key, block_value = self._sum_blocks(key, value, weights, grid, blocks, cache)
            slot_key, slot_value = block_key, block_value.to(value.dtype)
        if self.k and angles is not None:
            count = slot_key.shape[2] // layout.slots_per_block
            numbers = self._blocks(count, key.device)[None] if blocks is None else blocks[:, :count]
            centres = slot_centres(numbers, layout.block_size, layout.slots_per_block)
            slot_key = self._rotate_slots(slot_key, centres)
        slot_key = slot_key.to(key.dtype)

        plain = not continues and grid.first_block_BC is None
        if not self.k and plain and layout.window_size >= grid.columns:
            output, probabilities = self._through_interface(query, rotated, value, None, grid, is_causal=True, **kwargs)
        else:
            tensors = (query, rotated, value, slot_key, slot_value)
            if continues:
                tensors = (
                    query,
                    cache.tokens_before(grid, rotated, cache.keys, layout.window_size),
                    cache.tokens_before(grid, value, cache.values, layout.window_size),
                    torch.cat((cache.slots_before(grid, cache.slot_keys), slot_key), 2),
                    torch.cat((cache.slots_before(grid, cache.slot_values), slot_value), 2),
                )
                layout = layout._replace(past_tokens=layout.window_size, past_blocks=layout.visible_blocks)
            if self.config._attn_implementation == "eager":
                output, probabilities = attend_blocks_reference(*tensors, layout, grid.first_block_BC)
                probabilities = None if continues else self._in_given_order(probabilities, slot_key.shape[2], grid)
            else:
                output, probabilities = attend_blocks(*tensors, layout, grid.first_block_BC), None
        if cache is not None:
            if not cache.is_initialized:
                cache.lazy_initialization(key, value)
            cache.write_grid(grid, rotated, value, block_key, block_value, slot_key, kwargs["tokens"])
        return output, probabilities

    def _sum_blocks(self, key, value, weights, grid, blocks, cache):
        """Mixtures of all blocks of the grid, the last ones incomplete, the first with what the cache holds of it.

        In float32 at least: a block under way is a sum over many calls, and must not drift from one call over all.
        """
        columns = -(-grid.columns // self.layout.block_size) * self.layout.block_size
        sums = []
        for states, weight in zip((key, value), weights, strict=True):
            states = states.to(torch.promote_types(states.dtype, torch.float32))
            if grid.keep_BN is not None:
                states = states.masked_fill(~grid.keep_BN[:, None, :, None], 0)
            states = F.pad(states, (0, 0, 0, columns - grid.columns))
            with torch.autocast(states.device.type, enabled=False):
                sums.append(mix_blocks(states, weight.to(states.dtype), blocks))
        if cache.columns:
            begun = (cache.block_keys, cache.block_values)
            behind = (0, 0, 0, sums[0].shape[2] - self.layout.slots_per_block)
            sums = [blocks_sum + F.pad(under_way, behind) for blocks_sum, under_way in zip(sums, begun, strict=True)]
        return sums

    def _attend_one_token(self, query, key, value, weights, grid, angles, cache: LinformerCacheLayer):
        """One token per row against slots and ring; the same cost at any position."""
        rotated = key if angles is None else rotate(key, angles)
        block_keys, block_values = cache.block_keys, cache.block_values
        slot_keys = block_keys
        if self.k:
            block, within = cache.seen // self.layout.block_size, cache.seen % self.layout.block_size
            # Row of the mixing weights of every row's token, [B, X, R, 1].
            key_weight, value_weight = (
                weight[:, block.clamp(max=weight.shape[1] - 1), within].transpose(0, 1)[..., None].to(block_keys.dtype)
                for weight in weights
            )
            block_keys = block_keys + key_weight * key
            block_values = block_values + value_weight * value
            slot_keys = block_keys
            if angles is not None:
                centres = slot_centres(block[:, None], self.layout.block_size, self.layout.slots_per_block)
                slot_keys = self._rotate_slots(slot_keys, centres)
        cache.write_token(rotated, value, block_keys, block_values, slot_keys, grid.keep_BN)
        keys, values, visible = cache.everything()
        return attend_visible(query, keys, values, visible)[0]

    def _through_interface(self, query, key, value, visible, grid, is_causal, **kwargs):
        """transformers' own attention implementations, where plain attention over ``key`` is all there is to do."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, probabilities = attend(
            self, query, key, value, visible, dropout=0.0, scaling=self.head_dim**-0.5, is_causal=is_causal
        )
        if probabilities is not None:
            probabilities = self._in_given_order(probabilities, key.shape[2] if self.k else 0, grid)
        return output.transpose(1, 2), probabilities

    def _in_given_order(self, probabilities: Tensor, slots: int, grid: TokenGrid) -> Tensor:
        """Probabilities over grid slots and columns -> [B, H, T, k + T]: k slots first, then tokens as they were given."""
        over_slots, over_tokens = probabilities[..., :slots], probabilities[..., slots:]
        over_slots = F.pad(over_slots, (0, max(self.k - slots, 0)))
        if not self.is_causal and self.k:
            over_tokens = over_slots[..., :0]
        elif grid.column_BT is not None:
            heads, columns = over_tokens.shape[1:3]
            over_tokens = over_tokens.gather(3, grid.column_BT[:, None, None].expand(-1, heads, columns, -1))
        in_order = torch.cat((over_slots, over_tokens), -1)
        return grid.restore(in_order.transpose(1, 2)).transpose(1, 2)

    def _rotate_slots(self, slot_keys: Tensor, centres: Tensor) -> Tensor:
        return rotate(slot_keys, rotary_angles(centres, self.head_dim, self.config.rotary_base, slot_keys.dtype))

    def _sequence_centres(self, device: torch.device) -> Tensor:
        """Centres of the tokens that each of k slots averages at initialisation, [1, K]; k need not divide seq_length."""
        weight = pooling_weight(self.config.seq_length, self.k, torch.float64 if device.type != "mps" else torch.float32)
        return (torch.arange(self.config.seq_length, dtype=weight.dtype) @ weight)[None].to(device)

    @staticmethod
    def _blocks(count: int, device: torch.device) -> Tensor:
        return torch.arange(count, device=device)


class LinformerMLP(nn.Module):
    """Feed-forward layer, W2 GELU(W1 x)."""

    def __init__(self, config: LinformerConfig):
        super().__init__()
        self.up_proj = _linear(config.embed_dim, config.intermediate_size, config.rank)
        self.down_proj = _linear(config.intermediate_size, config.embed_dim, config.rank)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(hidden_states)))


class LinformerBlock(GradientCheckpointingLayer):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(self, config: LinformerConfig, layer_idx: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.attention = LinformerAttention(config, layer_idx)
        self.mlp_norm = nn.RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = LinformerMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.attention(self.attention_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class LinformerPreTrainedModel(PreTrainedModel):
    """Capabilities, initial weights, and saved folders that carry their code."""

    config_class = LinformerConfig
    config: LinformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LinformerBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _is_stateful = True  # the cache cannot be rolled back: no assisted generation
    _can_compile_fullgraph = False
    _can_record_outputs = {"hidden_states": LinformerBlock, "attentions": LinformerAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, LowRankLinear):
            _init_linear(module, std)
        elif isinstance(module, SequenceProjection):
            module.reset()
        elif isinstance(module, LinformerBlock):
            # As GPT-2: the residual stream sums 2 * depth of these, and keeps the variance of one.
            for linear in (module.attention.o_proj, module.mlp.down_proj):
                _init_linear(linear, std / (2 * self.config.depth) ** 0.5)

    def save_pretrained(self, save_directory, *args: Any, **kwargs: Any):
        """Save weights, configuration and code; every Auto class opens the folder, with linpass installed or not."""
        # save_pretrained enters only the class that is saved; an encoder or a classifier opens from the same folder.
        self.config.auto_map = {
            "AutoConfig": "configuration_linformer.LinformerConfig",
            "AutoModel": "modeling_linformer.LinformerModel",
            "AutoModelForCausalLM": "modeling_linformer.LinformerForCausalLM",
            "AutoModelForMaskedLM": "modeling_linformer.LinformerForMaskedLM",
            "AutoModelForSequenceClassification": "modeling_linformer.LinformerForSequenceClassification",
            "AutoModelForTokenClassification": "modeling_linformer.LinformerForTokenClassification",
        }
        return super().save_pretrained(save_directory, *args, **kwargs)


class LinformerModel(LinformerPreTrainedModel):
    """Embeddings, blocks and a final norm; hidden states out."""

    def __init__(self, config: LinformerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embed_dim)
        learned = config.position_embedding == "learned"
        self.embed_positions = nn.Embedding(config.seq_length, config.embed_dim) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        # Owned once, here, and passed to the layers: a parameter that is registered twice cannot be saved.
        shared = config.projection_sharing == "layerwise" and config.layer_k(0)
        self.projection = SequenceProjection(config, 0) if shared else None
        self.layers = nn.ModuleList([LinformerBlock(config, layer_idx) for layer_idx in range(config.depth)])
        self.norm = nn.RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LinformerCache | None = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: [B, T]; or inputs_embeds [B, T, E].
            attention_mask: [B, T], or longer where it also covers the cache; 0 is padding, wherever it stands.
            position_ids: not needed; a token's index follows from the mask and the cache. Checked against it.
            past_key_values: a :class:`LinformerCache`.
            document_ids: [B, T]; packed documents, each starting at a multiple of block_size. Causal, without a cache.
        Raises:
            ValueError: inputs that contradict each other or go past what the configuration can hold.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        tokens, device = inputs_embeds.shape[1], inputs_embeds.device
        if past_key_values is not None and not isinstance(past_key_values, LinformerCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; a Linformer keeps mixtures of tokens and needs "
                "a LinformerCache"
            )
        use_cache = bool(use_cache) and self.config.causal and document_ids is None
        if past_key_values is None and use_cache:
            past_key_values = LinformerCache(self.config)
        keep = self._real_tokens(attention_mask, inputs_embeds.shape[:2])
        grid = self._token_grid(tokens, device, keep, document_ids, past_key_values)
        self._check_length(grid, tokens, past_key_values)
        if position_ids is not None:
            same = position_ids[..., -tokens:].to(device) == grid.index_BT
            require(
                (same if keep is None else same | ~keep).all(),
                "position_ids must be what attention_mask and cache say, cumsum(mask) - 1 at every real token: a "
                "Linformer mixes tokens by that index. Leave position_ids out, or use document_ids for packed rows",
            )

        hidden_states = inputs_embeds
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(grid.index_BT)
            angles = None
        else:
            positions = grid.positions_BN()
            angles = rotary_angles(positions, self.config.head_dim, self.config.rotary_base, hidden_states.dtype)
        hidden_states = self.dropout(hidden_states)
        shared_weights = None if self.projection is None else self.projection(hidden_states)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                grid=grid,
                angles=angles,
                shared_weights=shared_weights,
                past_key_values=past_key_values,
                tokens=tokens,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _real_tokens(self, attention_mask: Tensor | None, shape: torch.Size) -> Tensor | None:
        """True where a token of this call is real, [B, T]; None where no mask was given."""
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2 or len(attention_mask) != shape[0] or attention_mask.shape[1] < shape[1]:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}; a Linformer takes [batch, tokens], one number "
                f"per token of this call and, before them, of the cache: {list(shape)} or longer"
            )
        return attention_mask[:, attention_mask.shape[1] - shape[1] :] != 0

    def _token_grid(self, tokens, device, keep, document_ids, past_key_values) -> TokenGrid:
        if document_ids is not None:
            if not self.config.causal or (past_key_values is not None):
                raise ValueError(
                    "document_ids packs several documents in a row: this is for causal models, without past_key_values"
                )
            return packed_grid(document_ids.to(device), self.config.block_size, keep)
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            return plain_grid(tokens, device, keep)
        if not self.config.causal:
            raise ValueError("past_key_values: an encoder (causal=False) has no cache")
        seen = past_key_values.layers[0].seen
        if len(seen) not in (1, len(keep) if keep is not None else len(seen)):
            raise ValueError(f"past_key_values holds {len(seen)} rows, the batch has {len(keep)}")
        if tokens == 1:
            return TokenGrid(1, seen[:, None], keep_BN=keep)
        return continued_grid(tokens, seen, self.config.block_size, keep)

    def _check_length(self, grid: TokenGrid, tokens: int, past_key_values: LinformerCache | None) -> None:
        limit = self.config.max_tokens
        if limit is None:
            return
        columns = tokens + (past_key_values.get_seq_length() if past_key_values is not None else 0)
        if columns > limit:  # more columns than positions: fine as long as the rest is padding
            self._require_positions(grid, columns, limit)

    def _require_positions(self, grid: TokenGrid, columns: int, limit: int) -> None:
        require(
            grid.index_BT.max() < limit,
            f"a row holds up to {columns} tokens, more than seq_length={limit}: this configuration "
            f"(position_embedding={self.config.position_embedding!r}, projection={self.config.projection!r}, "
            f"causal={self.config.causal}) has weights for {limit} positions; rotary positions with projection "
            "'convolution' or 'pooling' run past seq_length",
        )


class LinformerForCausalLM(LinformerPreTrainedModel, GenerationMixin):
    """Next-token prediction that cannot see the future; ``generate`` with a cache of constant size."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LinformerConfig):
        if not config.causal:
            raise ValueError(
                "LinformerForCausalLM needs causal=True: with causal=False a position sees the tokens that it has to "
                "predict; use LinformerForMaskedLM"
            )
        super().__init__(config)
        self.model = LinformerModel(config)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args: Any
    ):
        """The cache that ``generate`` fills, refused before the first token where it could not hold them all."""
        past = model_kwargs.get("past_key_values")
        if past is not None and not isinstance(past, LinformerCache):
            raise ValueError(f"past_key_values is a {type(past).__name__}; generate needs a LinformerCache here")
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: a Linformer has one cache, of "
                "constant size; leave cache_implementation out"
            )
        self._refuse_too_many_tokens(generation_config, model_kwargs.get("attention_mask"), max_cache_length + 1)
        if past is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = LinformerCache(self.config)
            return
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args
        )

    def _refuse_too_many_tokens(self, generation_config, attention_mask: Tensor | None, total: int) -> None:
        limit = self.config.max_tokens
        if limit is None:
            return
        if attention_mask is not None:
            # Only the tokens that the mask keeps take up positions; it also covers what the cache holds.
            columns = attention_mask.shape[1]
            new = generation_config.max_new_tokens
            total = columns + new if new is not None else total
            total -= columns - int((attention_mask != 0).sum(-1).max())
        if total > limit:
            raise ValueError(
                f"prompt and new tokens come to {total}, more than seq_length={limit} which this configuration can "
                f"hold (position_embedding={self.config.position_embedding!r}, projection="
                f"{self.config.projection!r}): shorten the prompt or max_new_tokens"
            )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """See :meth:`LinformerModel.forward`; ``labels`` are the inputs, shifted inside, -100 is ignored.

        In packed rows set the first label of every document to -100: its prediction comes from another document.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            document_ids=document_ids,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(_keep_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class LinformerForMaskedLM(LinformerPreTrainedModel):
    """Prediction of masked tokens; meant for ``causal=False``."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LinformerConfig):
        super().__init__(config)
        if config.causal:
            logger.warning_once(
                "LinformerForMaskedLM with causal=True stays causal: a masked token is predicted from the left alone. "
                "Set causal=False for the bidirectional encoder."
            )
        self.model = LinformerModel(config)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """See :meth:`LinformerModel.forward`; ``labels`` [B, T] stand where their tokens do, -100 is ignored."""
        kwargs.pop("use_cache", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LinformerForSequenceClassification(LinformerPreTrainedModel):
    """One label per row, from the last real token (causal) or the mean of the real tokens (encoder)."""

    def __init__(self, config: LinformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LinformerModel(config)
        self.score = nn.Linear(config.embed_dim, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """See :meth:`LinformerModel.forward`; ``labels`` [B], or [B, num_labels] for regression and multi-label."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(self._pool(outputs.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs
            )
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _pool(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """[B, T, E] -> [B, E]. Without a mask every token is real, whatever its id."""
        batch, tokens = hidden_states.shape[:2]
        if attention_mask is None:
            return hidden_states[:, -1] if self.config.causal else hidden_states.mean(1)
        keep = attention_mask[:, attention_mask.shape[1] - tokens :] != 0
        if self.config.causal:
            last = (keep * torch.arange(tokens, device=keep.device)).argmax(-1)
            return hidden_states[torch.arange(batch, device=keep.device), last]
        total = hidden_states.masked_fill(~keep[..., None], 0).sum(1)
        return total / keep.sum(1, keepdim=True).clamp(min=1).to(total.dtype)


class LinformerForTokenClassification(LinformerPreTrainedModel):
    """One label per token."""

    def __init__(self, config: LinformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LinformerModel(config)
        self.score = nn.Linear(config.embed_dim, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """See :meth:`LinformerModel.forward`; ``labels`` [B, T], -100 is ignored."""
        kwargs.pop("use_cache", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, config=self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def _keep_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The hidden states whose logits are wanted: the last n (0: all), positions [n] or [B, n], or a boolean [B, T]."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.dim() == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.gather(1, logits_to_keep[..., None].expand(-1, -1, hidden_states.shape[-1]))


LinformerConfig.register_for_auto_class()
LinformerModel.register_for_auto_class("AutoModel")
LinformerForCausalLM.register_for_auto_class("AutoModelForCausalLM")
LinformerForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
LinformerForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
LinformerForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
