"""The parts of a Linformer that hold weights: linear maps, mixing weights, attention, feed-forward, block.

The mathematics is in ``attention_linformer``; shape suffixes as there.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_linformer import (
    BlockLayout,
    TokenGrid,
    attend_blocks_reference,
    attend_visible,
    exact,
    held_slots,
    mix_blocks,
    mix_keys_and_values,
    mix_sequence,
    mix_sequences,
    pooling_weight,
    rotate,
    sequence_centres,
    slot_centres,
)
from .attention_linformer import normalise_and_rotate as normalise_and_rotate_in_pytorch
from .cache_linformer import LinformerCache, LinformerCacheLayer
from .configuration_linformer import LinformerConfig
from .kernels_linformer import (
    attend_blocks,
    attend_next_token,
    attend_slots,
    mix_and_attend,
    mix_and_attend_with_slots,
    mix_sequence_and_attend,
    normalise_and_rotate,
    project_and_attend,
)


class LowRankLinear(nn.Module):
    r"""A linear map of rank ``rank``, :math:`W \approx U V^\top`: ``rank * (in + out)`` numbers, not ``in * out``.

    Args:
        in_features, out_features: widths.
        rank: inner width.
        bias: add a bias after U.
        init_std: standard deviation of the entries of the product at the start.

    Example:
        >>> sum(p.numel() for p in LowRankLinear(512, 2048, 256).parameters())
        655360
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False, init_std: float = 0.02):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.v = nn.Linear(in_features, rank, bias=False)
        self.u = nn.Linear(rank, out_features, bias=bias)
        # Entries of U Vᵀ are sums of rank products: with these factors their standard deviation is init_std.
        self.u.init_std = self.v.init_std = (init_std / rank**0.5) ** 0.5
        for factor in (self.u, self.v):
            nn.init.normal_(factor.weight, std=factor.init_std)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.u(self.v(hidden_states))


def _linear(in_features: int, out_features: int, rank: int | None, init_std: float) -> nn.Module:
    """Dense or low-rank, without bias. ``init_std`` is kept on the layer: transformers initialises leaf by leaf."""
    if rank is not None:
        return LowRankLinear(in_features, out_features, rank, init_std=init_std)
    linear = nn.Linear(in_features, out_features, bias=False)
    linear.init_std = init_std
    return linear


def _is_its_weight(module: nn.Module) -> bool:
    """Whether to call it is to multiply by ``module.weight``: no adapter, no quantised weight, nothing hooked to it.

    Hooks of all modules (``register_module_forward_hook``) are not asked.
    """
    if type(module) is not nn.Linear or module.bias is not None or "forward" in vars(module):
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module.weight) in (nn.Parameter, Tensor) and not any(hooks)


def _residual_std(config: LinformerConfig) -> float:
    """For what is added to the residual stream: it sums 2 * depth such terms and keeps the variance of one (GPT-2)."""
    return config.initializer_range / (2 * config.depth) ** 0.5


def slot_positions(config: LinformerConfig, k: int, grid: TokenGrid) -> Tensor:
    """Where the slots of a layer with ``k`` of them stand: the centres of the tokens that they average at the start.

    Causal: those of every block of the grid, complete or not, [B or 1, C * R]; of one token those of its block.
    """
    device = grid.index_BT.device
    if config.causal:
        b = config.block_size
        if grid.columns == 1:
            number = grid.index_BT // b
        else:
            number = grid.block_numbers(b)
            number = torch.arange(-(-grid.columns // b), device=device)[None] if number is None else number
        return slot_centres(number, b, k * b // config.seq_length)
    if config.projection == "learned":
        return sequence_centres(config.seq_length, k, device)
    stride = config.seq_length // k
    number = torch.arange(min(-(-grid.columns // stride), k), device=device)
    return slot_centres(number[None], stride, 1)


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
        self.qk_norm_eps = config.norm_eps if config.qk_norm else None
        self.k = config.layer_k(layer_idx)
        self.slots_per_block = config.slots_per_block(layer_idx) if config.causal else 0
        self.layout = BlockLayout(
            block_size=config.block_size,
            window_size=config.window_size,
            slots_per_block=self.slots_per_block,
            visible_blocks=self.k // self.slots_per_block if self.slots_per_block else 0,
        )
        rank, std = config.attention_rank, config.initializer_range
        self.q_proj = _linear(config.embed_dim, self.heads * self.head_dim, rank, std)
        self.k_proj = _linear(config.embed_dim, self.key_value_heads * self.head_dim, rank, std)
        self.v_proj = _linear(config.embed_dim, self.key_value_heads * self.head_dim, rank, std)
        self.o_proj = _linear(self.heads * self.head_dim, config.embed_dim, rank, _residual_std(config))
        own = self.k and config.projection_sharing != "layerwise"
        self.projection = SequenceProjection(config, layer_idx) if own else None

    def forward(
        self,
        hidden_states: Tensor,
        grid: TokenGrid,
        angles: tuple[Tensor, Tensor] | None,
        slot_angles: dict[int, tuple[Tensor, Tensor]],
        shared_weights: tuple[Tensor, Tensor] | None,
        past_key_values: LinformerCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_states: [B, T, E] in the order given.
            grid: where the tokens stand.
            angles: rotary cos and sin for the columns of the grid; None for learned positions.
            slot_angles: the same at :func:`slot_positions`, for every k that the model has.
            shared_weights: mixing weights of the model, where all layers share them.
        Returns: [B, T, E], and probabilities [B, H, T, k + T] from the eager implementation, but of a call that
            continues a cache, else None.
        """
        hidden_states = grid.place(hidden_states)
        weights = shared_weights if self.projection is None else self.projection(hidden_states)
        slot_angles = slot_angles.get(self.k)
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        output = probabilities = None
        if cache is None:
            output = self._project_and_attend(hidden_states, weights, grid, angles, slot_angles)
        if output is None:
            output, probabilities = self._step_by_step(hidden_states, weights, grid, angles, slot_angles, cache)
        return self.o_proj(grid.restore(output.transpose(1, 2).flatten(2))), probabilities

    def _step_by_step(self, hidden_states, weights, grid, angles, slot_angles, cache):
        """Projections, norm and rotation, attention: its output, [B, H, N, D], and probabilities or None."""
        query = self.q_proj(hidden_states).unflatten(-1, (self.heads, self.head_dim))
        key = self.k_proj(hidden_states).unflatten(-1, (self.key_value_heads, self.head_dim))
        value = self.v_proj(hidden_states).unflatten(-1, (self.key_value_heads, self.head_dim)).transpose(1, 2)
        one_token = cache is not None and cache.is_initialized and grid.columns == 1
        here = None if one_token else angles  # one token is turned in its kernel
        query, key, rotated = self._normalise_and_rotate(query, key, here)
        if one_token:
            return self._attend_one_token(query, key, value, weights, grid, angles, slot_angles, cache), None
        if not self.is_causal:
            return self._attend_both_ways(query, key, rotated, value, weights, grid, slot_angles)
        return self._attend_before(query, key, rotated, value, weights, grid, slot_angles, cache)

    def _project_and_attend(self, hidden_states, weights, grid, angles, slot_angles):
        """Causal attention with its projections; None, and nothing is done, where it is to go step by step."""
        if not (self.is_causal and self.k):
            return None
        projections = (self.q_proj, self.k_proj, self.v_proj)
        between = self.qk_norm_eps is not None or self.config._attn_implementation == "eager"
        if between or not all(map(_is_its_weight, projections)):
            return None
        matrices = tuple([projection.weight for projection in projections])
        blocks = grid.block_numbers(self.layout.block_size)
        return project_and_attend(
            hidden_states,
            matrices,
            self.heads,
            self.head_dim,
            angles,
            weights,
            self.layout,
            slot_angles,
            blocks,
            grid.first_block_BC,
        )

    def _normalise_and_rotate(self, query, key, angles):
        """Queries, keys as slots mix them, and keys as queries see them; of an encoder they see slots alone.

        Without slots attention may be anybody's, and takes gradients of gradients: so does what PyTorch does here.
        """
        ours = self.k and self.config._attn_implementation != "eager"
        function = normalise_and_rotate if ours else normalise_and_rotate_in_pytorch
        return function(query, key, self.qk_norm_eps, angles, rotates_key=self.is_causal or not self.k)

    def _attend_both_ways(self, query, key, rotated, value, weights, grid, slot_angles):
        """Section 4 of the paper: all queries, k slots that mix the whole row; k = 0 is full attention."""
        if not self.k:
            visible = None if grid.keep_BN is None else grid.keep_BN[:, None, None]
            if visible is not None:  # a row without tokens looks at column 0: its output is meaningless, not NaN
                visible = visible | (torch.arange(visible.shape[-1], device=visible.device) == 0)
            return self._through_interface(query, rotated, value, visible, grid, is_causal=False)
        if self.config.projection == "learned":
            weights = tuple([weight.squeeze(1) for weight in weights])
            if self.config._attn_implementation == "sdpa":
                return mix_sequence_and_attend(query, key, value, weights, slot_angles), None
            keys, values = mix_sequences(key, value, weights, slot_angles)
            return self._through_interface(query, keys, values, None, grid, is_causal=False)
        keys, values, count = self._mix_strides(key, value, weights, grid)
        keys = keys if slot_angles is None else rotate(keys, slot_angles)
        if self.config._attn_implementation == "sdpa":
            return attend_slots(query, keys, values, count), None
        visible = None if count is None else held_slots(count, keys.shape[2])
        return self._through_interface(query, keys, values, visible, grid, is_causal=False)

    @property
    def _stride(self) -> int:
        """Tokens per slot of a bidirectional convolution or pooling."""
        return self.config.seq_length // self.k

    def _mix_strides(self, key, value, weights, grid):
        """Bidirectional convolution or pooling: slot i mixes tokens i * stride to (i + 1) * stride - 1.

        Returns: slots of keys and of values, and how many of them hold a token in each row, None where all do; a row
        without tokens keeps slot 0: its output is meaningless, not NaN.
        """
        stride = self._stride
        slots = min(-(-grid.columns // stride), self.k)  # columns past seq_length hold padding only
        missing = (0, 0, 0, slots * stride - min(grid.columns, slots * stride))
        mixed = []
        for states, weight in zip((key, value), weights, strict=True):
            states = states[:, :, : slots * stride]
            states = F.pad(states, missing) if missing[-1] else states
            if len(weight) == 1:  # every stride is a row that is mixed into one slot: whole strides are not copied
                strides = states.unflatten(2, (slots, stride)).transpose(1, 2).flatten(0, 1)
                states = mix_sequence(strides, weight[:, 0]).unflatten(0, (-1, slots)).transpose(1, 2).squeeze(3)
            else:
                states = mix_blocks(states, weight)
            mixed.append(states)
        if grid.keep_BN is None and grid.columns == slots * stride:
            return *mixed, None
        first = torch.arange(slots, device=key.device) * stride
        total = grid.columns if grid.total_B is None else grid.total_B[:, None]
        held = (total - first).clamp(0, stride).expand(1 if grid.total_B is None else len(key), slots)
        if self.config.projection == "pooling":  # a slot that is partly filled is the mean of what it holds
            mixed = [states * (stride / held.clamp(min=1).to(states.dtype))[:, None, :, None] for states in mixed]
        return *mixed, None if grid.total_B is None else (held > 0).sum(-1).clamp(min=1)

    def _attend_before(self, query, key, rotated, value, weights, grid, slot_angles, cache):
        """Causal: tokens of this call, after those in the cache, if any."""
        layout, continues = self.layout, cache is not None and cache.is_initialized
        eager = self.config._attn_implementation == "eager"
        blocks = grid.block_numbers(layout.block_size)
        arguments = (query, key, value, weights, layout, None if rotated is key else rotated)
        arguments += (slot_angles, blocks, grid.first_block_BC)
        if self.k and cache is None and not eager:
            return mix_and_attend(*arguments), None
        if self.k and not continues and not eager:
            output, slot_key, slot_value = mix_and_attend_with_slots(*arguments)
            self._write_prompt(cache, grid, key, rotated, value, weights, slot_key, slot_value)
            return output, None
        slot_key, slot_value = key[:, :, :0], value[:, :, :0]
        block_key, block_value = slot_key, slot_value
        if self.k and not continues:
            slot_key, slot_value = mix_keys_and_values(key, value, weights, slot_angles, blocks)
        elif self.k:
            block_key, block_value = self._sum_blocks(key, value, weights, grid, blocks, cache)
            slot_key, slot_value = block_key, block_value.to(value.dtype)
            slot_key = slot_key if slot_angles is None else rotate(slot_key, slot_angles)
            slot_key = slot_key.to(key.dtype)

        plain = not continues and grid.first_block_BC is None
        if not self.k and plain and layout.window_size >= grid.columns:
            output, probabilities = self._through_interface(query, rotated, value, None, grid, is_causal=True)
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
            if eager:
                output, probabilities = attend_blocks_reference(*tensors, layout, grid.first_block_BC)
                probabilities = None if continues else self._in_given_order(probabilities, slot_key.shape[2], grid)
            else:
                output, probabilities = attend_blocks(*tensors, layout, grid.first_block_BC), None
        if continues:
            cache.write_grid(grid, rotated, value, block_key, block_value, slot_key)
        elif cache is not None:
            self._write_prompt(cache, grid, key, rotated, value, weights, slot_key, slot_value)
        return output, probabilities

    def _write_prompt(self, cache, grid, key, rotated, value, weights, slot_key, slot_value):
        """The first tokens of every row, and what there is of the blocks that they leave under way."""
        sums = [None, None]
        if self.k and (grid.total_B is not None or grid.columns % self.layout.block_size):
            with exact(key.device):
                sums = [self._sum_under_way(*pair, grid) for pair in zip((key, value), weights, strict=True)]
        cache.write_prompt(grid, rotated, value, slot_key, slot_value, *sums)

    def _sum_under_way(self, states: Tensor, weight_XCPR: Tensor, grid: TokenGrid) -> Tensor:
        """Mixture of the tokens behind each row's last complete block, [B, G, R, D], of rows that start here.

        In float32 at least: the sum goes on over many calls, and must not drift from one call over all.
        """
        b, stored = self.layout.block_size, weight_XCPR.shape[1]
        wide = torch.promote_types(states.dtype, torch.float32)
        if grid.total_B is None:
            number, tokens = divmod(grid.columns, b)
            weight = weight_XCPR[:, min(number, stored - 1), :tokens].to(wide)
            return mix_sequence(states[:, :, number * b :].to(wide), weight)
        number_B = grid.total_B // b
        column_BP = number_B[:, None] * b + torch.arange(b, device=states.device)
        index = column_BP.clamp(max=grid.columns - 1)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
        weight = weight_XCPR[:, number_B.clamp(max=stored - 1)].transpose(0, 1).to(wide)
        weight = weight.masked_fill((column_BP >= grid.total_B[:, None])[:, None, :, None], 0)
        return weight.transpose(2, 3) @ states.gather(2, index).to(wide)

    def _sum_blocks(self, key, value, weights, grid, blocks, cache):
        """Mixtures of all blocks of a grid that continues, the last ones incomplete, the first with what the cache has.

        In float32 at least, as :meth:`_sum_under_way`.
        """
        columns = -(-grid.columns // self.layout.block_size) * self.layout.block_size
        sums = []
        for states, weight in zip((key, value), weights, strict=True):
            states = states.to(torch.promote_types(states.dtype, torch.float32))
            states = F.pad(states, (0, 0, 0, columns - grid.columns))
            with exact(states.device):
                sums.append(mix_blocks(states, weight.to(states.dtype), blocks))
        begun = (cache.block_keys, cache.block_values)
        behind = (0, 0, 0, sums[0].shape[2] - self.layout.slots_per_block)
        return [blocks_sum + F.pad(under_way, behind) for blocks_sum, under_way in zip(sums, begun, strict=True)]

    def _attend_one_token(self, query, key, value, weights, grid, angles, slot_angles, cache: LinformerCacheLayer):
        """One token per row against slots and ring: at most k + w rows, at any position."""
        weights = weights if self.k else None
        if self.config._attn_implementation != "eager":
            places = (grid.index_BT, grid.keep_BN, angles, slot_angles)
            output = attend_next_token(query, key, value, cache.memory, weights, self.layout, *places)
            if output is not None:
                return output
        query, rotated = (states if angles is None else rotate(states, angles) for states in (query, key))
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
            slot_keys = block_keys if slot_angles is None else rotate(block_keys, slot_angles)
        cache.write_token(rotated, value, block_keys, block_values, slot_keys, grid.keep_BN)
        keys, values, visible = cache.everything(grid.keep_BN)
        return attend_visible(query, keys, values, visible)[0]

    def _through_interface(self, query, key, value, visible, grid, is_causal):
        """transformers' own attention implementations, where plain attention over ``key`` is all there is to do."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, probabilities = attend(
            self, query, key, value, visible, dropout=0.0, scaling=self.head_dim**-0.5, is_causal=is_causal
        )
        if probabilities is not None:
            probabilities = self._in_given_order(probabilities, key.shape[2] if self.k else 0, grid)
        return output.transpose(1, 2), probabilities

    def _in_given_order(self, probabilities: Tensor, slots: int, grid: TokenGrid) -> Tensor:
        """Probabilities over grid slots and columns -> [B, H, T, k + T]: k slots, then tokens as they were given."""
        over_slots, over_tokens = probabilities[..., :slots], probabilities[..., slots:]
        if self.is_causal and self.k:  # the block under way is seen by nobody
            over_slots = over_slots[..., : grid.columns // self.layout.block_size * self.slots_per_block]
        if self.k:  # past seq_length block c takes the place of the one that left the view, as in the cache
            over_slots = F.pad(over_slots, (0, -over_slots.shape[-1] % self.k))
            over_slots = over_slots.unflatten(-1, (-1, self.k)).sum(-2) if over_slots.shape[-1] else over_slots
            over_slots = F.pad(over_slots, (0, self.k - over_slots.shape[-1]))
        if not self.is_causal and self.k:
            over_tokens = over_slots[..., :0]
        elif grid.column_BT is not None:
            heads, columns = over_tokens.shape[1:3]
            over_tokens = over_tokens.gather(3, grid.column_BT[:, None, None].expand(-1, heads, columns, -1))
        in_order = torch.cat((over_slots, over_tokens), -1)
        return grid.restore(in_order.transpose(1, 2)).transpose(1, 2)


class LinformerMLP(nn.Module):
    """Feed-forward layer, W2 GELU(W1 x)."""

    def __init__(self, config: LinformerConfig):
        super().__init__()
        self.up_proj = _linear(config.embed_dim, config.intermediate_size, config.rank, config.initializer_range)
        self.down_proj = _linear(config.intermediate_size, config.embed_dim, config.rank, _residual_std(config))

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
