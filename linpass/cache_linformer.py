"""The cache of a causal Linformer: the same bytes at position 100 and at position 1,000,000.

Shape suffixes as in ``attention_linformer``; W ring positions.
"""

import copy

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .attention_linformer import TokenGrid
from .configuration_linformer import LinformerConfig


def layer_sizes(config: LinformerConfig) -> list[tuple[int, int, int, int]]:
    """Of each layer's cache: slots, slots per block, tokens of a block and of the window."""
    block, window = config.block_size, config.window_size
    return [(*slots, block, window) for slots in zip(config.every_k, config.every_slots_per_block, strict=True)]


class LinformerCacheLayer(CacheLayerMixin):
    """What one layer remembers: the last w tokens exactly, complete blocks as slots, and the block under way.

    Bytes: ``2 * B * G * (k + w) * D * itemsize`` for ring and slots; ``2 * B * G * r * D * max(itemsize, 4)`` for the
    block under way, summed in float32 at least; counters.

    Tokens are written in place, unless a gradient is recorded through them: CUDA graphs and compiled steps write where
    the last step wrote. What chooses or moves rows makes new tensors.

    Args:
        sizes: this layer's of :func:`layer_sizes`.

    Attributes:
        keys, values: ring of the last w tokens, [B, G, W, D]; keys rotated; token i at ring position ``i % w``.
        slot_keys, slot_values: complete blocks, [B, G, K, D]; keys rotated; block c at row ``c % (k / r) * r``.
        block_keys, block_values: sums of the block under way, [B, G, R, D], not rotated, invisible.
        seen: tokens per row, [B]; masked tokens do not count.
        columns: tokens per row, masked ones included: what transformers calls the sequence length. A tensor, as
            whatever changes with every step of a compiled loop has to be.
        arrived: 0 between calls, [B, G]; the kernel of the next token counts its programs in it.
        is_compileable: ``generate`` compiles the steps that use this cache.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False
    _rows = ("keys", "values", "slot_keys", "slot_values", "block_keys", "block_values", "seen", "arrived")
    _tensors = (*_rows, "columns")

    def __init__(self, sizes: tuple[int, int, int, int], is_compileable: bool = False):
        super().__init__()
        self.is_compileable = is_compileable
        self.sizes = self.slots, self.slots_per_block, self.block_size, self.window_size = sizes
        self.visible_blocks = self.slots // self.slots_per_block if self.slots else 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory for batch, heads, dtype and device of ``key_states`` [B, G, *, D], unless it is there already."""
        if not self._has_memory_for(key_states):
            self._allocate_like(key_states)
        self.is_initialized = True

    def _has_memory_for(self, key_states: Tensor) -> bool:
        batch, heads, _, dim = key_states.shape
        wanted = (batch, heads, self.window_size, dim), key_states.dtype, key_states.device
        return self.keys is not None and (self.keys.shape, self.keys.dtype, self.keys.device) == wanted

    def _allocate_like(self, key_states: Tensor, **given: Tensor) -> None:
        batch, heads, _, dim = key_states.shape
        self.allocate(batch, heads, dim, key_states.dtype, key_states.device, **given)

    def allocate(
        self, batch: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device, **given: Tensor
    ) -> None:
        """Memory, before the first token: a compiled prompt finds tensors whose addresses are known.

        Ring and slots hold nothing yet, whatever was there before: a prompt writes the whole of them. Sums and counters
        are zero. ``given`` are tensors to keep for ring or slots, in place of memory for them.
        """
        self.dtype, self.device, self.is_initialized = dtype, device, False
        rows = {"keys": self.window_size, "values": self.window_size}
        for name, count in (rows | {"slot_keys": self.slots, "slot_values": self.slots}).items():
            kept = given.get(name)
            kept = torch.empty(batch, heads, count, dim, dtype=dtype, device=device) if kept is None else kept
            setattr(self, name, kept.to(dtype))
        sums_in = torch.promote_types(dtype, torch.float32)
        self.block_keys, self.block_values = (
            torch.zeros(batch, heads, self.slots_per_block, dim, dtype=sums_in, device=device) for _ in range(2)
        )
        self.seen = torch.zeros(batch, dtype=torch.long, device=device)
        self.columns = torch.zeros((), dtype=torch.long, device=device)
        self.arrived = torch.zeros(batch, heads, dtype=torch.int32, device=device)
        self._fix_addresses()

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """What ``attend_next_token`` writes."""
        return tuple(getattr(self, name) for name in self._rows if name != "seen")

    def make_writable(self) -> None:
        """What was made in inference mode cannot be written outside of it: continue on a copy."""
        if self.is_initialized and self.seen.is_inference() and not torch.is_inference_mode_enabled():
            self._map(torch.clone)

    def restart(self) -> None:
        """Forget everything, in place."""
        for name in self._tensors:
            getattr(self, name).zero_()
        self.is_initialized = False

    def _fix_addresses(self) -> None:
        """Tell torch.compile that the tensors stay where they are; else CUDA graphs refuse to write them."""
        if self.is_compileable and not torch.compiler.is_compiling():
            for name in self._tensors:
                # Without a guard: another cache is recorded anew, not compiled anew.
                torch._dynamo.mark_static_address(getattr(self, name), guard=False)

    def _write(self, **tensors: Tensor) -> None:
        """In place; anew where a gradient is recorded."""
        for name, new in tensors.items():
            old = getattr(self, name)
            if torch.is_grad_enabled() and (new.requires_grad or old.requires_grad):
                setattr(self, name, new)
            else:
                old.copy_(new)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        raise NotImplementedError(
            "LinformerCacheLayer keeps mixtures of tokens, which keys and values alone do not give: LinformerAttention "
            "writes it through write_token and write_grid"
        )

    def write_token(
        self,
        key_BG1D: Tensor,
        value_BG1D: Tensor,
        block_keys: Tensor,
        block_values: Tensor,
        slot_keys: Tensor,
        keep_B1: Tensor | None,
    ) -> None:
        """Add one token to every row that keeps it; :meth:`count` then counts it.

        Args:
            key_BG1D, value_BG1D: the token, key rotated.
            block_keys, block_values: sums of the block under way with this token in them, [B, G, R, D].
            slot_keys: ``block_keys`` rotated: the slots, should this token complete the block.
            keep_B1: rows whose token is real; None: all.
        """
        keep_B = torch.ones_like(self.seen, dtype=torch.bool) if keep_B1 is None else keep_B1[:, 0]
        at = (self.seen % self.window_size)[:, None]
        self.keys = _write_rows(self.keys, at, key_BG1D, keep_B)
        self.values = _write_rows(self.values, at, value_BG1D, keep_B)
        if self.slots:
            complete_B = keep_B & ((self.seen + 1) % self.block_size == 0)
            row = torch.arange(self.slots_per_block, device=self.device)
            at = (self.seen // self.block_size % self.visible_blocks * self.slots_per_block)[:, None] + row
            self.slot_keys = _write_rows(self.slot_keys, at, slot_keys.to(self.dtype), complete_B)
            self.slot_values = _write_rows(self.slot_values, at, block_values.to(self.dtype), complete_B)
            keep_1, complete_1 = keep_B[:, None, None, None], complete_B[:, None, None, None]
            self._write(
                block_keys=torch.where(keep_1, block_keys, self.block_keys).masked_fill(complete_1, 0),
                block_values=torch.where(keep_1, block_values, self.block_values).masked_fill(complete_1, 0),
            )

    def everything(self, keep_B1: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What a token that was just written sees.

        Returns: keys, values [B, G, K + W, D], slots first, and which of them hold something, [B, 1, 1, K + W].
        """
        seen = self.seen + (1 if keep_B1 is None else keep_B1[:, 0])
        slot_block = torch.arange(self.slots, device=self.device) // max(self.slots_per_block, 1)
        full_slots = slot_block < (seen // self.block_size)[:, None]
        full_ring = torch.arange(self.window_size, device=self.device) < seen[:, None]
        # A row that holds no token yet (all padding so far) looks at a zero: its output is meaningless, not NaN.
        full_ring = full_ring | (torch.arange(self.window_size, device=self.device) == 0)
        keys = torch.cat((self.slot_keys, self.keys), 2)
        values = torch.cat((self.slot_values, self.values), 2)
        return keys, values, torch.cat((full_slots, full_ring), -1)[:, None, None]

    def tokens_before(self, grid: TokenGrid, states: Tensor, ring: Tensor, past_tokens: int) -> Tensor:
        """Keys or values of the ring, then those of the grid, [B, G, past_tokens + N, D], each at its column."""
        column = torch.arange(-past_tokens, self.block_size, device=self.device)
        index = grid.start_B[:, None] + column
        remembered = _read_rows(ring, index % self.window_size)
        is_past = (index < self.seen[:, None])[:, None, past_tokens:, None]
        first_block = torch.where(is_past, remembered[:, :, past_tokens:], states[:, :, : self.block_size])
        return torch.cat((remembered[:, :, :past_tokens], first_block, states[:, :, self.block_size :]), 2)

    def slots_before(self, grid: TokenGrid, slots: Tensor) -> Tensor:
        """Slots of the blocks before the grid, oldest first, [B, G, K, D]."""
        block = (grid.start_B // self.block_size)[:, None] + torch.arange(-self.visible_blocks, 0, device=self.device)
        row = torch.arange(self.slots_per_block, device=self.device)
        return _read_rows(slots, (block[..., None] % self.visible_blocks * self.slots_per_block + row).flatten(1))

    def write_prompt(
        self,
        grid: TokenGrid,
        key_BGND: Tensor,
        value_BGND: Tensor,
        slot_keys: Tensor,
        slot_values: Tensor,
        block_keys: Tensor | None,
        block_values: Tensor | None,
    ) -> None:
        """The first tokens of every row: writes all of ring and slots; :meth:`count` then counts the tokens.

        Args:
            key_BGND, value_BGND: tokens at their columns, keys rotated.
            slot_keys, slot_values: of every complete block, [B, G, C * R, D], keys rotated.
            block_keys, block_values: sums of the block under way, [B, G, R, D]; None where no row has any.
        """
        slots_B = None if grid.total_B is None else grid.total_B // self.block_size * self.slots_per_block
        newest = {
            "keys": _ring_of(key_BGND, self.window_size, grid.total_B),
            "values": _ring_of(value_BGND, self.window_size, grid.total_B),
        }
        if self.slots:
            newest["slot_keys"] = _ring_of(slot_keys, self.slots, slots_B)
            newest["slot_values"] = _ring_of(slot_values, self.slots, slots_B)
        if self.is_compileable:
            self.lazy_initialization(key_BGND, value_BGND)
        has_memory = self._has_memory_for(key_BGND)
        if torch.is_grad_enabled() or not has_memory:
            given = {"keys": key_BGND, "values": value_BGND}
            newest = {name: _on_its_own(states, given.get(name)) for name, states in newest.items()}
        if has_memory:
            self._write(**newest)
        else:
            self._allocate_like(key_BGND, **newest)
        self.is_initialized = True
        if block_keys is not None and block_values is not None:
            self._write(block_keys=block_keys, block_values=block_values)

    def write_grid(
        self,
        grid: TokenGrid,
        key_BGND: Tensor,
        value_BGND: Tensor,
        block_keys: Tensor,
        block_values: Tensor,
        slot_keys: Tensor,
    ) -> None:
        """Add the tokens of a call that continues; :meth:`count` then counts them.

        Args:
            key_BGND, value_BGND: new tokens at their columns, keys rotated.
            block_keys, block_values: sums of every block of the grid, complete or not, [B, G, C * R, D].
            slot_keys: ``block_keys`` rotated.
        """
        start, total = grid.start_B, grid.total_B
        newest = _newest(total, self.window_size)
        is_new = (newest >= self.seen[:, None])[:, None, :, None]
        column = (newest - start[:, None]).clamp(0, grid.columns - 1)
        self._write(
            keys=torch.where(is_new, _read_rows(key_BGND, column), self.keys),
            values=torch.where(is_new, _read_rows(value_BGND, column), self.values),
        )

        if self.slots:
            complete, first = (total // self.block_size)[:, None], (start // self.block_size)[:, None]
            newest = _newest(complete[:, 0], self.visible_blocks)
            row = torch.arange(self.slots_per_block, device=self.device)
            is_new = (newest >= first).repeat_interleave(self.slots_per_block, 1)[:, None, :, None]
            at = ((newest - first).clamp(min=0)[..., None] * self.slots_per_block + row).flatten(1)
            at = at.clamp(max=slot_keys.shape[2] - 1)
            self._write(
                slot_keys=torch.where(is_new, _read_rows(slot_keys, at).to(self.dtype), self.slot_keys),
                slot_values=torch.where(is_new, _read_rows(block_values, at).to(self.dtype), self.slot_values),
            )
            # A row that ends on a border has no block under way: it reads the zeros behind the last block.
            under_way = (complete - first) * self.slots_per_block + row
            behind = (0, 0, 0, self.slots_per_block)
            self._write(
                block_keys=_read_rows(torch.nn.functional.pad(block_keys, behind), under_way),
                block_values=_read_rows(torch.nn.functional.pad(block_values, behind), under_way),
            )

    def count(self, grid: TokenGrid) -> None:
        """Count the tokens of a call, when no layer looks at its grid any more: that is made of the counts before."""
        tokens = grid.index_BT.shape[1]
        if grid.keep_BT is None:
            self.seen.add_(tokens)
        else:
            self.seen.add_(grid.keep_BT.sum(-1))
        self.columns.add_(tokens)

    def get_seq_length(self) -> int:
        """Tokens so far, masked ones included; on an accelerator this waits for it."""
        return int(self.columns) if self.is_initialized else 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Forget everything; the next call may have another batch size."""
        self.is_initialized = False
        for name in self._tensors:
            setattr(self, name, None)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in that order, repeats allowed."""
        self._map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)), self._rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, side by side."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0), self._rows)

    def crop(self, *args, **kwargs) -> None:
        raise ValueError(
            "a LinformerCache cannot be cropped: tokens are mixed into slots and cannot be taken out; copy the cache "
            "(copy.deepcopy) before the tokens that may have to go"
        )

    def offload(self) -> None:
        """Move to the CPU."""
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move back to the layer's device."""
        self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def __deepcopy__(self, memo) -> "LinformerCacheLayer":
        """A copy that shares no memory; unlike tensors' own deepcopy also while gradients are recorded."""
        duplicate = copy.copy(self)
        duplicate._map(torch.clone)
        return duplicate

    def _map(self, function, names: tuple[str, ...] = _tensors) -> None:
        if self.is_initialized:
            for name in names:
                setattr(self, name, function(getattr(self, name)))
            self._fix_addresses()


class LinformerCache(Cache):
    """One :class:`LinformerCacheLayer` per layer; pass it as ``past_key_values``.

    ``copy.deepcopy`` reuses a prefix, ``batch_select_indices`` picks rows of it.

    Args:
        is_compileable: ``generate`` on an accelerator compiles its steps, as it does for a static cache.

    Example:
        >>> from linpass import LinformerConfig
        >>> LinformerCache(LinformerConfig(depth=2)).get_seq_length()
        0
    """

    def __init__(self, config: LinformerConfig, is_compileable: bool = False):
        super().__init__(layers=[LinformerCacheLayer(sizes, is_compileable) for sizes in layer_sizes(config)])

    def fits(self, config: LinformerConfig) -> bool:
        """Whether layers, slots, blocks and window are those of ``config``, and heads, where there is memory."""
        if [layer.sizes for layer in self.layers] != layer_sizes(config):
            return False
        keys, heads = self.layers[0].keys, (config.num_key_value_heads, config.head_dim)
        return keys is None or (keys.shape[1], keys.shape[3]) == heads

    @property
    def has_tokens(self) -> bool:
        """Whether a token was written; unlike the sequence length known without waiting for an accelerator."""
        return all(layer.is_initialized for layer in self.layers)

    def make_writable(self) -> None:
        """What was made in inference mode cannot be written outside of it: continue on a copy."""
        for layer in self.layers:
            layer.make_writable()

    def allocate(self, batch: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make the tensors of all layers, or forget what is in them where they are there."""
        for layer in self.layers:
            is_there = layer.keys is not None and not layer.keys.is_inference()
            if is_there and (len(layer.keys), layer.dtype, layer.device) == (batch, dtype, device):
                layer.restart()
            else:
                layer.allocate(batch, heads, dim, dtype, device)

    def count(self, grid: TokenGrid) -> None:
        """Count the tokens of a call that all layers have written."""
        for layer in self.layers:
            layer.count(grid)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in that order, repeats allowed."""
        for layer in self.layers:
            layer.batch_select_indices(indices)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; 0 before the first token."""
        layers = [layer for layer in self.layers if layer.is_initialized]
        return sum(getattr(layer, name).nbytes for layer in layers for name in layer._tensors)


def _on_its_own(states: Tensor, given: Tensor | None = None) -> Tensor:
    """In memory that holds nothing else, that nobody else has, and that no gradient needs as it is.

    Others may have what was ``given``. Of a view nobody knows who else has what it views; in inference mode not even
    whether it is one.
    """
    is_free = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or states.is_inference())
    if is_free and states is not given and not states._is_view() and states.is_contiguous():
        return states
    return states.clone(memory_format=torch.contiguous_format)


def _ring_of(states_BGND: Tensor, size: int, count_B: Tensor | None) -> Tensor:
    """The last ``size`` rows, row i at place i % size, zeros where there is none; of ``count_B`` rows, None: of all."""
    rows = states_BGND.shape[2]
    if count_B is None or not rows:
        newest = states_BGND if rows <= size else states_BGND[:, :, rows - size :]
        if rows < size:
            return torch.nn.functional.pad(newest, (0, 0, 0, size - rows))
        return newest.roll(rows % size, 2) if rows % size else newest
    row_BS = _newest(count_B, size)
    held = _read_rows(states_BGND, row_BS.clamp(0, rows - 1))
    return held.masked_fill((row_BS < 0)[:, None, :, None], 0)


def _newest(count_B: Tensor, size: int) -> Tensor:
    """Of items 0 to count - 1, item i at place i % size: the last at each place, [B, size]; negative where none is."""
    last_B1 = count_B[:, None] - 1
    return last_B1 - (last_B1 - torch.arange(size, device=count_B.device)) % size


def _read_rows(states_BGMD: Tensor, row_BN: Tensor) -> Tensor:
    """Rows ``row_BN`` of dimension 2, other ones in each batch row."""
    batch, heads, _, dim = states_BGMD.shape
    return states_BGMD.gather(2, row_BN[:, None, :, None].expand(batch, heads, -1, dim))


def _write_rows(states_BGMD: Tensor, row_BN: Tensor, new_BGND: Tensor, where_B: Tensor) -> Tensor:
    """``states_BGMD`` with rows ``row_BN`` replaced where ``where_B``; in place unless a gradient is being recorded."""
    batch, heads, _, dim = states_BGMD.shape
    row = row_BN[:, None, :, None].expand(batch, heads, -1, dim)
    new = torch.where(where_B[:, None, None, None], new_BGND, states_BGMD.gather(2, row))
    if torch.is_grad_enabled() and (new.requires_grad or states_BGMD.requires_grad):
        return states_BGMD.scatter(2, row, new)
    return states_BGMD.scatter_(2, row, new)
