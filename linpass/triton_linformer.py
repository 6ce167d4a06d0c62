"""The Triton kernels of Linformer attention; ``kernels_linformer`` tells what they compute together.

N tokens and S slots of a row. Constants: SHARED query heads a group, BLOCK tokens and SLOTS slots a block, DIM
features, PADDED to a power of two, QUERIES and KEYS rows of a tile. Strides are (batch, head, row); rows are
contiguous. A grid is (tiles, heads or groups, batch). Scores are kept in units of log 2: exp2 is an instruction.

CAUSAL: queries see slots of complete blocks and a window of tokens. Not CAUSAL: all queries see the slots of their row,
COUNTED, the first ``count`` of them, and no tokens. Not MASKED: what queries see fills whole tiles.
"""

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows, a CPU build of PyTorch
    triton = None

# Parameters of kernels stand in groups: tensors, strides, sizes, constants.
# fmt: off
if triton is not None:
    LOG2_E = tl.constexpr(1.4426950408889634)
    # A kernel is not compiled anew where one of these is 1 or a multiple of 16.
    kernel = triton.jit(do_not_specialize=[
        "S", "stored", "parts", "window", "view", "past_tokens", "past_blocks", "splits", "rows"])

    @triton.jit
    def _load_rows(
        base, start, stop, stride, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, TURN: tl.constexpr = 0
    ):
        """Rows start ... start + ROWS - 1 of a matrix [stop, DIM]; zeros outside of it. TURN rotates the columns."""
        row, column = tl.arange(0, ROWS), tl.arange(0, PADDED)
        inside = (start + row < stop)[:, None]
        if PADDED != DIM:
            inside = inside & (column < DIM)[None, :]
        if TURN:
            column = (column + TURN) % DIM
        corner = base + tl.cast(start, tl.int64) * stride
        return tl.load(corner + row[:, None] * stride + column[None, :], mask=inside, other=0.0)

    @triton.jit
    def _store_rows(base, start, stop, stride, values, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr):
        row, column = tl.arange(0, ROWS), tl.arange(0, PADDED)
        inside = (start + row < stop)[:, None]
        if PADDED != DIM:
            inside = inside & (column < DIM)[None, :]
        corner = base + tl.cast(start, tl.int64) * stride
        tl.store(corner + row[:, None] * stride + column[None, :], values.to(base.dtype.element_ty), mask=inside)

    @triton.jit
    def _angles(cos, sin, start, stop, stride, BACK: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
                PADDED: tl.constexpr):
        """What rows, and rows with swapped halves, are multiplied by to turn them, or, BACK, to turn them back."""
        left = (tl.arange(0, PADDED) < DIM // 2)[None, :]
        cosine = _load_rows(cos, start, stop, stride, ROWS, DIM, PADDED).to(tl.float32)
        if BACK:
            sine = _load_rows(sin, start, stop, stride, ROWS, DIM, PADDED, DIM // 2).to(tl.float32)
            return cosine, tl.where(left, sine, -sine)
        else:
            sine = _load_rows(sin, start, stop, stride, ROWS, DIM, PADDED).to(tl.float32)
            return cosine, tl.where(left, -sine, sine)

    @triton.jit
    def _turn(states, turned, start, stop, cos, sin, stride, BACK: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
              PADDED: tl.constexpr):
        """`rotate` of attention_linformer, or, BACK, its transpose; `turned` is `states` with its halves swapped."""
        cosine, sine = _angles(cos, sin, start, stop, stride, BACK, ROWS, DIM, PADDED)
        return states * cosine + turned * sine

    @triton.jit
    def _turned_back(states, start, stop, cos, sin, ROWS: tl.constexpr, DIM: tl.constexpr):
        """`_turn` BACK of rows in registers, with half the angles: both halves of the features have the same."""
        left, right = tl.split(tl.permute(tl.reshape(states, [ROWS, 2, DIM // 2]), (0, 2, 1)))
        cosine = _load_rows(cos, start, stop, DIM, ROWS, DIM // 2, DIM // 2).to(tl.float32)
        sine = _load_rows(sin, start, stop, DIM, ROWS, DIM // 2, DIM // 2).to(tl.float32)
        halves = tl.join(left * cosine + right * sine, right * cosine - left * sine)
        return tl.reshape(tl.permute(halves, (0, 2, 1)), [ROWS, DIM])

    @kernel
    def angles_kernel(
        position, cos, sin, rows, STEP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr
    ):
        """`rotary_angles` of attention_linformer; feature i turns by 2 ** (i * STEP) of the position, in float64."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, PADDED)
        # An argument, or a number in an expression, would be of 32 bits.
        rate = tl.exp2(column.to(tl.float64) * tl.full([1], STEP, tl.float64))
        at = tl.load(position + row, mask=row < rows, other=0).to(tl.float64)
        angle = at[:, None] * rate[None, :]
        out = tl.cast(row, tl.int64)[:, None] * DIM + column[None, :]
        inside = (row < rows)[:, None] & (column < DIM // 2)[None, :]
        cosine, sine = tl.cos(angle).to(cos.dtype.element_ty), tl.sin(angle).to(sin.dtype.element_ty)
        tl.store(cos + out, cosine, mask=inside)
        tl.store(cos + out + DIM // 2, cosine, mask=inside)
        tl.store(sin + out, sine, mask=inside)
        tl.store(sin + out + DIM // 2, sine, mask=inside)

    @triton.jit
    def _with_norm(states, eps, NORM: tl.constexpr, DIM: tl.constexpr):
        """Rows in float32, and one over the root of each row's mean square; 1 without NORM."""
        states = states.to(tl.float32)
        if NORM:
            return states, tl.rsqrt(tl.sum(states * states, 1) / DIM + eps)[:, None]
        else:
            return states, 1.0

    @kernel
    def normalise_and_rotate_kernel(
        query, key, cos, sin, query_out, key_out, rotated,
        query_strides, key_strides, query_out_strides, key_out_strides, angle_stride,
        N, heads, eps,
        NORM: tl.constexpr, TURN: tl.constexpr, TURN_KEY: tl.constexpr, IN_PLACE: tl.constexpr,
        DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr,
    ):
        """`normalise_and_rotate` of attention_linformer; a grid has EACH heads a program, of queries, then of keys.

        IN_PLACE: ``query_out`` is ``query``.
        """
        start = tl.program_id(0) * ROWS
        head, batch = tl.program_id(1).to(tl.int64) * EACH, tl.program_id(2).to(tl.int64)  # heads may lie far apart
        if TURN:
            cos += batch * angle_stride
            sin += batch * angle_stride
        if head < heads:
            query += batch * query_strides[0] + head * query_strides[1]
            query_out += batch * query_out_strides[0] + head * query_out_strides[1]
            _normalise_and_rotate_heads(
                query, query_strides, query_out, query_out, query_out_strides, cos, sin, start, N, eps,
                NORM, TURN, not TURN, IN_PLACE, DIM, PADDED, ROWS, EACH)
        else:
            key += batch * key_strides[0] + (head - heads) * key_strides[1]
            at = batch * key_out_strides[0] + (head - heads) * key_out_strides[1]
            _normalise_and_rotate_heads(
                key, key_strides, key_out + at if NORM else key, rotated + at if TURN_KEY else key,
                key_out_strides, cos, sin, start, N, eps,
                NORM, TURN_KEY, NORM, False, DIM, PADDED, ROWS, EACH)

    @triton.jit
    def _normalise_and_rotate_heads(
        states, strides, plain_out, turned_out, out_strides, cos, sin, start, N, eps,
        NORM: tl.constexpr, TURN: tl.constexpr, KEEP: tl.constexpr, IN_PLACE: tl.constexpr,
        DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr,
    ):
        """Rows of some heads, which share their angles; KEEP: also as they are before they are turned."""
        dtype: tl.constexpr = states.dtype.element_ty
        if TURN:
            cosine, sine = _angles(cos, sin, start, N, DIM, False, ROWS, DIM, PADDED)
        for _head in tl.static_range(EACH):
            rows, unit = _with_norm(_load_rows(states, start, N, strides[2], ROWS, DIM, PADDED), eps, NORM, DIM)
            rows = (rows * unit).to(dtype)
            if KEEP:
                _store_rows(plain_out, start, N, out_strides[2], rows, ROWS, DIM, PADDED)
            if TURN:
                swapped = _load_rows(states, start, N, strides[2], ROWS, DIM, PADDED, DIM // 2).to(tl.float32)
                swapped = (swapped * unit).to(dtype).to(tl.float32)
                rows = rows.to(tl.float32) * cosine + swapped * sine
                if IN_PLACE:
                    tl.debug_barrier()  # all threads have read the rows that some now overwrite
                _store_rows(turned_out, start, N, out_strides[2], rows, ROWS, DIM, PADDED)
            states += strides[1]
            plain_out += out_strides[1]
            turned_out += out_strides[1]

    @kernel
    def normalise_and_rotate_gradient_kernel(
        query, key, cos, sin, query_in, key_in, rotated_in, grad_query, grad_key,
        query_strides, key_strides, query_in_strides, key_in_strides, rotated_in_strides,
        grad_query_strides, grad_key_strides, angle_stride,
        N, heads, eps,
        NORM: tl.constexpr, TURN: tl.constexpr, HAS_KEY: tl.constexpr, HAS_ROTATED: tl.constexpr,
        DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr,
    ):
        """Gradients of queries and keys from those of what became of them: ``query_in``, ``key_in``, ``rotated_in``."""
        start = tl.program_id(0) * ROWS
        head, batch = tl.program_id(1).to(tl.int64) * EACH, tl.program_id(2).to(tl.int64)  # heads may lie far apart
        if TURN:
            cos += batch * angle_stride
            sin += batch * angle_stride
        if head < heads:
            query += batch * query_strides[0] + head * query_strides[1]
            query_in += batch * query_in_strides[0] + head * query_in_strides[1]
            grad_query += batch * grad_query_strides[0] + head * grad_query_strides[1]
            _gradient_of_heads(
                query, query_strides, query_in, query_in_strides, query_in, query_in_strides,
                grad_query, grad_query_strides, cos, sin, start, N, eps,
                NORM, not TURN, TURN, DIM, PADDED, ROWS, EACH)
        else:
            head -= heads
            key += batch * key_strides[0] + head * key_strides[1]
            grad_key += batch * grad_key_strides[0] + head * grad_key_strides[1]
            if HAS_KEY:
                key_in += batch * key_in_strides[0] + head * key_in_strides[1]
            if HAS_ROTATED:
                rotated_in += batch * rotated_in_strides[0] + head * rotated_in_strides[1]
            _gradient_of_heads(
                key, key_strides, key_in, key_in_strides, rotated_in, rotated_in_strides,
                grad_key, grad_key_strides, cos, sin, start, N, eps,
                NORM, HAS_KEY, HAS_ROTATED, DIM, PADDED, ROWS, EACH)

    @triton.jit
    def _gradient_of_heads(
        states, strides, plain_in, plain_strides, turned_in, turned_strides, grad, grad_strides,
        cos, sin, start, N, eps,
        NORM: tl.constexpr, HAS_PLAIN: tl.constexpr, HAS_TURNED: tl.constexpr,
        DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr,
    ):
        """Of some heads, from the gradients of their rows before they are turned and after."""
        if HAS_TURNED:
            cosine, sine = _angles(cos, sin, start, N, DIM, True, ROWS, DIM, PADDED)
        for _head in tl.static_range(EACH):
            flow = tl.zeros([ROWS, PADDED], tl.float32)
            if HAS_PLAIN:
                flow += _load_rows(plain_in, start, N, plain_strides[2], ROWS, DIM, PADDED).to(tl.float32)
                plain_in += plain_strides[1]
            if HAS_TURNED:
                rows = _load_rows(turned_in, start, N, turned_strides[2], ROWS, DIM, PADDED).to(tl.float32)
                swapped = _load_rows(turned_in, start, N, turned_strides[2], ROWS, DIM, PADDED, DIM // 2)
                flow += rows * cosine + swapped.to(tl.float32) * sine
                turned_in += turned_strides[1]
            if NORM:
                rows, unit = _with_norm(_load_rows(states, start, N, strides[2], ROWS, DIM, PADDED), eps, NORM, DIM)
                rows *= unit
                flow = (flow - rows * (tl.sum(rows * flow, 1) / DIM)[:, None]) * unit
                states += strides[1]
            _store_rows(grad, start, N, grad_strides[2], flow, ROWS, DIM, PADDED)
            grad += grad_strides[1]

    @triton.jit
    def _seen(
        column, first_block, S, window, view, past_tokens, past_blocks,
        CAUSAL: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, HAS_FIRST: tl.constexpr,
    ):
        """The slot rows and the token rows that the queries in these columns see, as [start, stop) each.

        All four never fall as the column grows, so the first and the last column of a tile bound it. Not CAUSAL: all
        slots, no token.
        """
        if CAUSAL:
            complete = past_blocks + (column + 1) // BLOCK
            slot_stop = tl.minimum(complete * SLOTS, S)
            slot_start = tl.maximum(complete - view, 0) * SLOTS
            token_stop = past_tokens + column + 1
            token_start = tl.maximum(token_stop - window, 0)
            if HAS_FIRST:
                first = tl.load(first_block + column // BLOCK).to(tl.int32)
                slot_start = tl.maximum(slot_start, (past_blocks + first) * SLOTS)
                token_start = tl.maximum(token_start, past_tokens + first * BLOCK)
            # Behind the last block that has slots the view may lie past them all.
            return tl.minimum(slot_start, slot_stop), slot_stop, token_start, token_stop
        else:
            none = column * 0
            return none, none + S, none, none

    @triton.jit
    def _seen_by_tile(
        start, first_block, N, S, window, view, past_tokens, past_blocks,
        CAUSAL: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, HAS_FIRST: tl.constexpr,
        QUERIES: tl.constexpr,
    ):
        """`_seen` of each query from ``start`` on, of the first and of the last one."""
        column = tl.minimum(start + tl.arange(0, QUERIES), N - 1)
        last_column = tl.minimum(start + QUERIES, N) - 1
        each = _seen(
            column, first_block, S, window, view, past_tokens, past_blocks, CAUSAL, BLOCK, SLOTS, HAS_FIRST)
        first = _seen(
            start, first_block, S, window, view, past_tokens, past_blocks, CAUSAL, BLOCK, SLOTS, HAS_FIRST)
        last = _seen(
            last_column, first_block, S, window, view, past_tokens, past_blocks, CAUSAL, BLOCK, SLOTS, HAS_FIRST)
        return each, first, last

    @triton.jit
    def _key_tiles(first, last, KEYS: tl.constexpr):
        """Tiles of slots, and of slots and tokens, that the queries of a tile see: ``first`` and ``last`` of them."""
        slot_tiles = tl.cdiv(tl.maximum(last[1] - first[0], 0), KEYS)
        return slot_tiles, slot_tiles + tl.cdiv(last[3] - first[2], KEYS)

    @triton.jit
    def _load_tile(
        tile, slot_tiles, first, last, key, value, slot_key, slot_value,
        key_stride, value_stride, slot_key_stride, slot_value_stride,
        KEYS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    ):
        """Whether a tile is one of slots, the row that it starts at, its keys and its values."""
        of_slots = tile < slot_tiles
        at = tl.where(of_slots, first[0] + tile * KEYS, first[2] + (tile - slot_tiles) * KEYS)
        until = tl.where(of_slots, last[1], last[3])
        keys = _load_rows(
            tl.where(of_slots, slot_key, key), at, until, tl.where(of_slots, slot_key_stride, key_stride),
            KEYS, DIM, PADDED)
        values = _load_rows(
            tl.where(of_slots, slot_value, value), at, until, tl.where(of_slots, slot_value_stride, value_stride),
            KEYS, DIM, PADDED)
        return of_slots, at, keys, values

    @triton.jit
    def _visible(of_slots, at, each, KEYS: tl.constexpr):
        """Which of the KEYS rows from ``at`` on each query sees: start <= row < stop as one unsigned comparison."""
        slot_start, slot_stop, token_start, token_stop = each
        ahead = (at + tl.arange(0, KEYS))[None, :] - tl.where(of_slots, slot_start, token_start)[:, None]
        many = tl.where(of_slots, slot_stop - slot_start, token_stop - token_start)[:, None]
        return ahead.to(tl.uint32) < many.to(tl.uint32)

    @triton.jit
    def _add_tile(highest, total, summed, scores, values, scale, PRECISION: tl.constexpr):
        """The running softmax of each query with a tile more: its highest score, denominator and weighted values."""
        higher = tl.maximum(highest, tl.max(scores, 1) * (scale * LOG2_E))
        reference = tl.where(higher == float("-inf"), 0.0, higher)  # a query may see nothing of a tile
        probabilities = tl.exp2(scores * (scale * LOG2_E) - reference[:, None])
        shrink = tl.exp2(highest - reference)
        total = total * shrink + tl.sum(probabilities, 1)
        summed = tl.dot(probabilities.to(values.dtype), values, summed * shrink[:, None], input_precision=PRECISION)
        return higher, total, summed

    @triton.jit
    def _held(count, S, batch, COUNTED: tl.constexpr):
        """Slots of a row that its queries see: COUNTED, the first ones alone."""
        if COUNTED:
            return tl.minimum(tl.load(count + batch).to(tl.int32), S)
        else:
            return S

    @kernel
    def forward_kernel(
        query, key, value, slot_key, slot_value, output, logsumexp, first_block, count,
        query_strides, key_strides, value_strides, slot_key_strides, slot_value_strides, output_strides, first_stride,
        N, S, window, view, past_tokens, past_blocks, scale,
        CAUSAL: tl.constexpr, COUNTED: tl.constexpr, MASKED: tl.constexpr,
        SHARED: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, HAS_FIRST: tl.constexpr,
        DIM: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    ):
        """Output and log2 of the softmax's denominator, for a tile of queries of one head."""
        start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES  # late queries see most slots: longest first
        # The kernels of a call go through the batch in turns up and down: the last rows of one are still in the cache.
        head = tl.num_programs(1) - 1 - tl.program_id(1)
        group = tl.cast(head // SHARED, tl.int64)  # offsets of heads first may not fit 32 bits
        head = tl.cast(head, tl.int64)
        batch = tl.cast(tl.num_programs(2) - 1 - tl.program_id(2), tl.int64)
        if HAS_FIRST:
            first_block += batch * first_stride
        key += batch * key_strides[0] + group * key_strides[1]
        value += batch * value_strides[0] + group * value_strides[1]
        slot_key += batch * slot_key_strides[0] + group * slot_key_strides[1]
        slot_value += batch * slot_value_strides[0] + group * slot_value_strides[1]
        each, first, last = _seen_by_tile(
            start, first_block, N, _held(count, S, batch, COUNTED), window, view, past_tokens, past_blocks,
            CAUSAL, BLOCK, SLOTS, HAS_FIRST, QUERIES)
        slot_tiles, tiles = _key_tiles(first, last, KEYS)

        query += batch * query_strides[0] + head * query_strides[1]
        queries = _load_rows(query, start, N, query_strides[2], QUERIES, DIM, PADDED)
        highest = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        summed = tl.zeros([QUERIES, PADDED], tl.float32)
        for tile in range(tiles):
            of_slots, at, keys, values = _load_tile(
                tile, slot_tiles, first, last, key, value, slot_key, slot_value,
                key_strides[2], value_strides[2], slot_key_strides[2], slot_value_strides[2], KEYS, DIM, PADDED)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            if MASKED:
                # What the first query sees ends first, what the last one sees starts last.
                partly = at < tl.where(of_slots, last[0], last[2])
                if partly | (at + KEYS > tl.where(of_slots, first[1], first[3])):
                    scores = tl.where(_visible(of_slots, at, each, KEYS), scores, float("-inf"))
            highest, total, summed = _add_tile(highest, total, summed, scores, values, scale, PRECISION)

        output += batch * output_strides[0] + head * output_strides[1]
        _store_rows(output, start, N, output_strides[2], summed * (1 / total)[:, None], QUERIES, DIM, PADDED)
        logsumexp += (batch * tl.num_programs(1) + head) * N
        column = start + tl.arange(0, QUERIES)
        tl.store(logsumexp + column, highest + tl.log2(total), mask=column < N)

    @kernel
    def query_gradient_kernel(
        query, key, value, slot_key, slot_value, output, logsumexp, first_block, count, cos, sin,
        grad, grad_query, delta,
        query_strides, key_strides, value_strides, slot_key_strides, slot_value_strides, output_strides, grad_strides,
        grad_query_strides, first_stride, angle_stride, N, S, window, view, scale,
        CAUSAL: tl.constexpr, COUNTED: tl.constexpr, MASKED: tl.constexpr, TURNED: tl.constexpr,
        SHARED: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, HAS_FIRST: tl.constexpr,
        DIM: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    ):
        """Gradient of a tile of queries of one head, and delta: the sums of output * gradient over the features.

        TURNED: of the queries as they were before they were turned.
        """
        start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
        group = tl.cast(tl.program_id(1) // SHARED, tl.int64)
        head = tl.cast(tl.program_id(1), tl.int64)
        batch = tl.cast(tl.program_id(2), tl.int64)
        if HAS_FIRST:
            first_block += batch * first_stride
        key += batch * key_strides[0] + group * key_strides[1]
        value += batch * value_strides[0] + group * value_strides[1]
        slot_key += batch * slot_key_strides[0] + group * slot_key_strides[1]
        slot_value += batch * slot_value_strides[0] + group * slot_value_strides[1]
        each, first, last = _seen_by_tile(
            start, first_block, N, _held(count, S, batch, COUNTED), window, view, 0, 0,
            CAUSAL, BLOCK, SLOTS, HAS_FIRST, QUERIES)
        slot_tiles, tiles = _key_tiles(first, last, KEYS)

        query += batch * query_strides[0] + head * query_strides[1]
        output += batch * output_strides[0] + head * output_strides[1]
        grad += batch * grad_strides[0] + head * grad_strides[1]
        grad_query += batch * grad_query_strides[0] + head * grad_query_strides[1]
        column = start + tl.arange(0, QUERIES)
        at_row = (batch * tl.num_programs(1) + head) * N + column
        queries = _load_rows(query, start, N, query_strides[2], QUERIES, DIM, PADDED)
        gradients = _load_rows(grad, start, N, grad_strides[2], QUERIES, DIM, PADDED)
        outputs = _load_rows(output, start, N, output_strides[2], QUERIES, DIM, PADDED)
        row_sums = tl.sum(outputs.to(tl.float32) * gradients.to(tl.float32), 1)
        tl.store(delta + at_row, row_sums, mask=column < N)
        log_total = tl.load(logsumexp + at_row, mask=column < N, other=0.0)
        summed = tl.zeros([QUERIES, PADDED], tl.float32)
        for tile in range(tiles):
            of_slots, at, keys, values = _load_tile(
                tile, slot_tiles, first, last, key, value, slot_key, slot_value,
                key_strides[2], value_strides[2], slot_key_strides[2], slot_value_strides[2], KEYS, DIM, PADDED)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            grad_probabilities = tl.dot(gradients, tl.trans(values), input_precision=PRECISION)
            probabilities = tl.exp2(scores * (scale * LOG2_E) - log_total[:, None])
            if MASKED:
                probabilities = tl.where(_visible(of_slots, at, each, KEYS), probabilities, 0.0)
            grad_scores = probabilities * (grad_probabilities - row_sums[:, None])
            summed = tl.dot(grad_scores.to(keys.dtype), keys, summed, input_precision=PRECISION)
        summed *= scale
        if TURNED:
            angles = batch * angle_stride
            summed = _turned_back(summed, start, N, cos + angles, sin + angles, QUERIES, DIM)
        _store_rows(grad_query, start, N, grad_query_strides[2], summed, QUERIES, DIM, PADDED)

    @triton.jit
    def _sum_over_queries(
        grad_key, grad_value, keys, values, seen_from, seen_until, at_first, at_stop,
        query, grad, logsumexp, delta, query_stride, grad_stride, N, scale,
        CAUSAL: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr,
    ):
        """Adds what the queries in columns [at_first, at_stop) of a head give to the gradients of keys and values.

        Key i is seen by the columns [seen_from[i], seen_until[i]), or, not CAUSAL, by all. ``at_first`` is a multiple
        of QUERIES. Columns from N on give nothing, without a mask: their gradients and row sums are zero.
        """
        for at in range(at_first, at_stop, QUERIES):
            queries = _load_rows(query, at, N, query_stride, QUERIES, DIM, PADDED)
            gradients = _load_rows(grad, at, N, grad_stride, QUERIES, DIM, PADDED)
            column = at + tl.arange(0, QUERIES)
            log_total = tl.load(logsumexp + column, mask=column < N, other=0.0)
            row_sums = tl.load(delta + column, mask=column < N, other=0.0)
            scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
            grad_probabilities = tl.dot(values, tl.trans(gradients), input_precision=PRECISION)
            probabilities = tl.exp2(scores * (scale * LOG2_E) - log_total[None, :])
            if CAUSAL:
                ahead = (column[None, :] - seen_from[:, None]).to(tl.uint32)
                visible = ahead < tl.maximum(seen_until - seen_from, 0).to(tl.uint32)[:, None]
                probabilities = tl.where(visible, probabilities, 0.0)
            grad_value = tl.dot(probabilities.to(gradients.dtype), gradients, grad_value, input_precision=PRECISION)
            grad_scores = probabilities * (grad_probabilities - row_sums[None, :])
            grad_key = tl.dot(grad_scores.to(queries.dtype), queries, grad_key, input_precision=PRECISION)
        return grad_key, grad_value

    @triton.jit
    def _slot_seen_by(
        row, end_block, N, S, view,
        CAUSAL: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, HAS_FIRST: tl.constexpr,
    ):
        """Columns [start, stop) of the queries that see slot rows; both never fall as the row grows."""
        if CAUSAL:
            number = tl.minimum(row, S - 1) // SLOTS
            start = (number + 1) * BLOCK - 1
            stop = tl.minimum((number + view + 1) * BLOCK - 1, N)
            if HAS_FIRST:
                stop = tl.minimum(stop, tl.load(end_block + number).to(tl.int32) * BLOCK)
            return start, stop
        else:
            return row * 0, row * 0 + N

    @triton.jit
    def _token_seen_by(row, end_block, N, window, BLOCK: tl.constexpr, HAS_FIRST: tl.constexpr):
        """Columns [start, stop) of the queries that see token rows; both never fall as the row grows."""
        start = tl.minimum(row, N - 1)
        stop = tl.minimum(start + window, N)
        if HAS_FIRST:
            stop = tl.minimum(stop, tl.load(end_block + start // BLOCK).to(tl.int32) * BLOCK)
        return start, stop

    @kernel
    def slot_gradient_kernel(
        query, slot_key, slot_value, logsumexp, delta, end_block, count, grad, grad_slots,
        query_strides, slot_key_strides, slot_value_strides, grad_strides, grad_slot_strides, end_stride,
        parts, N, S, view, scale,
        CAUSAL: tl.constexpr, COUNTED: tl.constexpr,
        SHARED: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, HAS_FIRST: tl.constexpr,
        DIM: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    ):
        """Gradients of a tile of slots by one part of the queries that see it; of all parts the sum is the gradient."""
        part = tl.program_id(0) % parts
        start = tl.program_id(0) // parts * KEYS
        group = tl.cast(tl.num_programs(1) - 1 - tl.program_id(1), tl.int64)
        batch = tl.cast(tl.num_programs(2) - 1 - tl.program_id(2), tl.int64)
        if HAS_FIRST:
            end_block += batch * end_stride
        held = _held(count, S, batch, COUNTED)
        last = tl.minimum(start + KEYS, S) - 1
        seen_from, seen_until = _slot_seen_by(
            start + tl.arange(0, KEYS), end_block, N, S, view, CAUSAL, BLOCK, SLOTS, HAS_FIRST)
        at_first, _ = _slot_seen_by(start, end_block, N, S, view, CAUSAL, BLOCK, SLOTS, HAS_FIRST)
        _, at_stop = _slot_seen_by(last, end_block, N, S, view, CAUSAL, BLOCK, SLOTS, HAS_FIRST)
        at_first = at_first // QUERIES * QUERIES
        if COUNTED:
            at_stop = tl.where(start < held, at_stop, 0)
        length = tl.cdiv(tl.cdiv(tl.maximum(at_stop - at_first, 0), QUERIES), parts) * QUERIES
        at_first += part * length
        at_stop = tl.minimum(at_first + length, at_stop)

        slot_key += batch * slot_key_strides[0] + group * slot_key_strides[1]
        slot_value += batch * slot_value_strides[0] + group * slot_value_strides[1]
        keys = _load_rows(slot_key, start, held, slot_key_strides[2], KEYS, DIM, PADDED)
        values = _load_rows(slot_value, start, held, slot_value_strides[2], KEYS, DIM, PADDED)
        grad_key = tl.zeros([KEYS, PADDED], tl.float32)
        grad_value = tl.zeros([KEYS, PADDED], tl.float32)
        for place in range(group * SHARED, group * SHARED + SHARED):
            head = tl.cast(place, tl.int64)
            row = (batch * (tl.num_programs(1) * SHARED) + head) * N
            grad_key, grad_value = _sum_over_queries(
                grad_key, grad_value, keys, values, seen_from, seen_until, at_first, at_stop,
                query + batch * query_strides[0] + head * query_strides[1],
                grad + batch * grad_strides[0] + head * grad_strides[1],
                logsumexp + row, delta + row, query_strides[2], grad_strides[2], N, scale,
                CAUSAL, DIM, PADDED, PRECISION, QUERIES)
        grad_slots += part * grad_slot_strides[0] + batch * grad_slot_strides[2] + group * grad_slot_strides[3]
        if COUNTED:  # nobody sees the slots behind
            seen = (start + tl.arange(0, KEYS) < held)[:, None]
            grad_key, grad_value = tl.where(seen, grad_key, 0.0), tl.where(seen, grad_value, 0.0)
        grad_slot_stride = DIM if CAUSAL else grad_slot_strides[4]
        _store_rows(
            grad_slots, start, S, grad_slot_stride, grad_key * scale, KEYS, DIM, PADDED)
        _store_rows(grad_slots + grad_slot_strides[1], start, S, grad_slot_stride, grad_value, KEYS, DIM, PADDED)

    @triton.jit
    def _load_weight(
        weight, strides, number, stored, token, slot, token_stop, slot_stop,
        BLOCK: tl.constexpr, SLOTS: tl.constexpr, SEVERAL: tl.constexpr, NUMBERED: tl.constexpr,
    ):
        """E as a matrix, [tokens, slots]: zero where token and slot are not of one block.

        SEVERAL: each of the ``stored`` blocks has weights of its own; NUMBERED: ``number`` says which one a block is.
        """
        of_token, of_slot = token // BLOCK, slot // SLOTS
        same = (of_token[:, None] == of_slot[None, :]) & (token < token_stop)[:, None] & (slot < slot_stop)[None, :]
        offset = (token - of_token * BLOCK)[:, None] * strides[2] + (slot - of_slot * SLOTS)[None, :] * strides[3]
        if SEVERAL:
            if NUMBERED:
                of_slot = tl.load(number + of_slot, mask=slot < slot_stop, other=0).to(tl.int32)
                of_slot = tl.minimum(tl.maximum(of_slot, 0), stored - 1)
            offset += of_slot[None, :] * strides[1]
        return tl.load(weight + offset, mask=same, other=0.0), same

    @kernel
    def mix_kernel(
        key, value, key_weight, value_weight, number, cos, sin, slot_key, slot_value,
        key_strides, value_strides, key_weight_strides, value_weight_strides, number_stride, angle_strides,
        stored, S,
        BLOCK: tl.constexpr, SLOTS: tl.constexpr, SEVERAL: tl.constexpr, NUMBERED: tl.constexpr,
        PER_GROUP: tl.constexpr, TURNED: tl.constexpr,
        BLOCKS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
        TOKENS: tl.constexpr, SLOT_TILE: tl.constexpr,
    ):
        """Slots of BLOCKS blocks, of keys (turned to their positions) and of values; weights are of their dtype."""
        start = tl.program_id(0) * (BLOCKS * SLOTS)
        stop = tl.minimum(start + BLOCKS * SLOTS, S)
        group = tl.cast(tl.program_id(1), tl.int64)
        batch = tl.cast(tl.program_id(2), tl.int64)
        if NUMBERED:
            number += batch * number_stride
        key += batch * key_strides[0] + group * key_strides[1]
        value += batch * value_strides[0] + group * value_strides[1]
        if PER_GROUP:
            key_weight += group * key_weight_strides[0]
            value_weight += group * value_weight_strides[0]
        out = (batch * tl.num_programs(1) + group) * S * DIM
        for at in range(start, stop, SLOT_TILE):
            slot = at + tl.arange(0, SLOT_TILE)
            mixed_key = tl.zeros([PADDED, SLOT_TILE], tl.float32)
            swapped_key = tl.zeros([PADDED, SLOT_TILE], tl.float32)
            mixed_value = tl.zeros([PADDED, SLOT_TILE], tl.float32)
            token_stop = (tl.minimum(at + SLOT_TILE, stop) - 1) // SLOTS * BLOCK + BLOCK
            for first in range(at // SLOTS * BLOCK, token_stop, TOKENS):
                token = first + tl.arange(0, TOKENS)
                keys = _load_rows(key, first, token_stop, key_strides[2], TOKENS, DIM, PADDED)
                weight, _ = _load_weight(
                    key_weight, key_weight_strides, number, stored, token, slot, token_stop, stop,
                    BLOCK, SLOTS, SEVERAL, NUMBERED)
                mixed_key = tl.dot(tl.trans(keys), weight, mixed_key, input_precision=PRECISION)
                if TURNED:
                    keys = _load_rows(key, first, token_stop, key_strides[2], TOKENS, DIM, PADDED, DIM // 2)
                    swapped_key = tl.dot(tl.trans(keys), weight, swapped_key, input_precision=PRECISION)
                values = _load_rows(value, first, token_stop, value_strides[2], TOKENS, DIM, PADDED)
                weight, _ = _load_weight(
                    value_weight, value_weight_strides, number, stored, token, slot, token_stop, stop,
                    BLOCK, SLOTS, SEVERAL, NUMBERED)
                mixed_value = tl.dot(tl.trans(values), weight, mixed_value, input_precision=PRECISION)
            mixed_key, mixed_value = tl.trans(mixed_key), tl.trans(mixed_value)
            if TURNED:
                angles = batch * angle_strides[0]
                mixed_key = _turn(
                    mixed_key, tl.trans(swapped_key), at, stop, cos + angles, sin + angles, angle_strides[1], False,
                    SLOT_TILE, DIM, PADDED)
            _store_rows(slot_key + out, at, stop, DIM, mixed_key, SLOT_TILE, DIM, PADDED)
            _store_rows(slot_value + out, at, stop, DIM, mixed_value, SLOT_TILE, DIM, PADDED)

    @kernel
    def token_gradient_kernel(
        query, key, value, mixed_key, logsumexp, delta, end_block, grad, grad_slots,
        key_weight, value_weight, number, cos, sin, token_cos, token_sin,
        grad_key, grad_value, grad_mixed_key, grad_weights,
        query_strides, key_strides, value_strides, mixed_key_strides, grad_strides, out_strides, grad_slot_strides,
        key_weight_strides, value_weight_strides, number_stride, angle_strides, token_angle_stride,
        grad_weight_strides, end_stride, stored, N, S, window, scale,
        SHARED: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
        MIXED: tl.constexpr, APART: tl.constexpr, TURNED: tl.constexpr, TURNED_BACK: tl.constexpr,
        NEEDS_WEIGHT: tl.constexpr,
        SEVERAL: tl.constexpr, NUMBERED: tl.constexpr, PER_GROUP: tl.constexpr, HAS_FIRST: tl.constexpr,
        DIM: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, SLOT_TILE: tl.constexpr,
    ):
        """Gradients of a tile of tokens of one group: MIXED, from their slots, and from the queries of their window.

        APART: the window sees other keys (rotated) than the mixing; these have a gradient of their own, or,
        TURNED_BACK, the gradient of the others is turned back and added to it, in the one place of both.
        """
        start = tl.program_id(0) * KEYS
        group = tl.cast(tl.program_id(1), tl.int64)
        batch = tl.cast(tl.program_id(2), tl.int64)
        token = start + tl.arange(0, KEYS)
        out = batch * out_strides[0] + group * out_strides[1]
        key_sum = tl.zeros([KEYS, PADDED], tl.float32)
        value_sum = tl.zeros([KEYS, PADDED], tl.float32)
        keys = _load_rows(
            key + batch * key_strides[0] + group * key_strides[1], start, N, key_strides[2], KEYS, DIM, PADDED)
        values = _load_rows(
            value + batch * value_strides[0] + group * value_strides[1], start, N, value_strides[2],
            KEYS, DIM, PADDED)
        if MIXED:
            token_stop = S // SLOTS * BLOCK
            slot_start = start // BLOCK * SLOTS
            slot_stop = tl.minimum((start + KEYS - 1) // BLOCK * SLOTS + SLOTS, S)
            slot = slot_start + tl.arange(0, SLOT_TILE)
            if NUMBERED:
                number += batch * number_stride
            if PER_GROUP:
                key_weight += group * key_weight_strides[0]
                value_weight += group * value_weight_strides[0]
            grad_slots += batch * grad_slot_strides[2] + group * grad_slot_strides[3]
            key_slots = _load_rows(grad_slots, slot_start, slot_stop, DIM, SLOT_TILE, DIM, PADDED)
            if TURNED:
                swapped = _load_rows(grad_slots, slot_start, slot_stop, DIM, SLOT_TILE, DIM, PADDED, DIM // 2)
                key_slots = _turn(
                    key_slots.to(tl.float32), swapped.to(tl.float32), slot_start, slot_stop,
                    cos + batch * angle_strides[0], sin + batch * angle_strides[0], angle_strides[1], True,
                    SLOT_TILE, DIM, PADDED)
            key_slots = key_slots.to(keys.dtype)
            value_slots = _load_rows(
                grad_slots + grad_slot_strides[1], slot_start, slot_stop, DIM, SLOT_TILE, DIM, PADDED)
            value_slots = value_slots.to(keys.dtype)
            key_mixing, same = _load_weight(
                key_weight, key_weight_strides, number, stored, token, slot, token_stop, slot_stop,
                BLOCK, SLOTS, SEVERAL, NUMBERED)
            value_mixing, same = _load_weight(
                value_weight, value_weight_strides, number, stored, token, slot, token_stop, slot_stop,
                BLOCK, SLOTS, SEVERAL, NUMBERED)
            key_sum = tl.dot(key_mixing.to(keys.dtype), key_slots, key_sum, input_precision=PRECISION)
            value_sum = tl.dot(value_mixing.to(keys.dtype), value_slots, value_sum, input_precision=PRECISION)
            mixed_keys = keys
            if APART:
                _store_rows(grad_mixed_key + out, start, N, out_strides[2], key_sum, KEYS, DIM, PADDED)
                key_sum = tl.zeros([KEYS, PADDED], tl.float32)
                mixed_keys = _load_rows(
                    mixed_key + batch * mixed_key_strides[0] + group * mixed_key_strides[1], start, N,
                    mixed_key_strides[2], KEYS, DIM, PADDED)
            else:
                key_sum *= 1 / scale
            if NEEDS_WEIGHT:
                grad_weights += batch * grad_weight_strides[1] + group * grad_weight_strides[2]
                offset = token[:, None] * SLOTS + (slot % SLOTS)[None, :]
                products = tl.dot(mixed_keys, tl.trans(key_slots), input_precision=PRECISION)
                tl.store(grad_weights + offset, products.to(grad_weights.dtype.element_ty), mask=same)
                products = tl.dot(values, tl.trans(value_slots), input_precision=PRECISION)
                grad_weights += grad_weight_strides[0]
                tl.store(grad_weights + offset, products.to(grad_weights.dtype.element_ty), mask=same)

        if HAS_FIRST:
            end_block += batch * end_stride
        last = tl.minimum(start + KEYS, N) - 1
        seen_from, seen_until = _token_seen_by(token, end_block, N, window, BLOCK, HAS_FIRST)
        at_first, first_until = _token_seen_by(start, end_block, N, window, BLOCK, HAS_FIRST)
        last_from, at_stop = _token_seen_by(last, end_block, N, window, BLOCK, HAS_FIRST)
        at_first = at_first // QUERIES * QUERIES
        for place in range(group * SHARED, group * SHARED + SHARED):
            head = tl.cast(place, tl.int64)
            row = (batch * (tl.num_programs(1) * SHARED) + head) * N
            key_sum, value_sum = _sum_over_queries(
                key_sum, value_sum, keys, values, seen_from, seen_until, at_first, at_stop,
                query + batch * query_strides[0] + head * query_strides[1],
                grad + batch * grad_strides[0] + head * grad_strides[1],
                logsumexp + row, delta + row, query_strides[2], grad_strides[2], N, scale,
                True, DIM, PADDED, PRECISION, QUERIES)
        key_sum *= scale
        if TURNED_BACK:
            angles = batch * token_angle_stride
            key_sum = _turned_back(key_sum, start, N, token_cos + angles, token_sin + angles, KEYS, DIM)
            if MIXED:
                tl.debug_barrier()  # all threads have stored what some now read
                key_sum += _load_rows(grad_key + out, start, N, out_strides[2], KEYS, DIM, PADDED).to(tl.float32)
                tl.debug_barrier()  # all threads have read what some now overwrite
        _store_rows(grad_key + out, start, N, out_strides[2], key_sum, KEYS, DIM, PADDED)
        _store_rows(grad_value + out, start, N, out_strides[2], value_sum, KEYS, DIM, PADDED)

    @triton.jit
    def _load_turned(base, rows, inside, stride, cosine, sine, TURNED: tl.constexpr, DIM: tl.constexpr,
                     PADDED: tl.constexpr):
        """Rows as float32, plain and turned to one position."""
        column = tl.arange(0, PADDED)
        inside = inside[:, None] & (column < DIM)[None, :]
        states = tl.load(base + rows[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if TURNED:
            swapped = rows[:, None] * stride + ((column + DIM // 2) % DIM)[None, :]
            swapped = tl.load(base + swapped, mask=inside, other=0.0).to(tl.float32)
            swapped = tl.where((column < DIM // 2)[None, :], -swapped, swapped)
            return states, states * cosine + swapped * sine
        else:
            return states, states

    @triton.jit
    def _add_rows(
        highest, total, summed, queries, key, value, start, stop, hidden, unhidden, scale,
        DIM: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr,
    ):
        """The running softmax of queries that see rows start ... stop - 1, but not hidden ... unhidden - 1."""
        for at in range(start, stop, KEYS):
            row = at + tl.arange(0, KEYS)
            keys = _load_rows(key, at, stop, DIM, KEYS, DIM, PADDED)
            values = _load_rows(value, at, stop, DIM, KEYS, DIM, PADDED)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            visible = (row < stop) & ((row < hidden) | (row >= unhidden))
            scores = tl.where(visible[None, :], scores, float("-inf"))
            highest, total, summed = _add_tile(highest, total, summed, scores, values, scale, PRECISION)
        return highest, total, summed

    @triton.jit
    def _add_to_block(
        highest, total, summed, queries, key, value, block_key, block_value, slot_key, slot_value,
        key_weight, value_weight, key_weight_stride, value_weight_stride, cos, sin, completes, kept, scale,
        TURNED: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
        SLOT_TILE: tl.constexpr,
    ):
        """Adds a token to the block under way; where that completes it, its slots are stored, and seen."""
        column, alone = tl.arange(0, PADDED), tl.zeros([1], tl.int32)
        new_value = _load_turned(value, alone, alone == 0, 0, None, None, False, DIM, PADDED)[0]
        for first in range(0, SLOTS, SLOT_TILE):
            slot = first + tl.arange(0, SLOT_TILE)
            inside = slot < SLOTS
            if TURNED:
                cosine = _load_rows(cos, first, SLOTS, DIM, SLOT_TILE, DIM, PADDED).to(tl.float32)
                sine = _load_rows(sin, first, SLOTS, DIM, SLOT_TILE, DIM, PADDED).to(tl.float32)
            else:
                cosine, sine = None, None
            # Turning is linear: the sum turned is the sum of what was begun, turned, and of the new key, turned.
            new_key, new_turned = _load_turned(key, alone, alone == 0, 0, cosine, sine, TURNED, DIM, PADDED)
            mixed_key, turned = _load_turned(block_key, slot, inside, DIM, cosine, sine, TURNED, DIM, PADDED)
            mixed_value = _load_turned(block_value, slot, inside, DIM, None, None, False, DIM, PADDED)[0]
            weight = tl.load(key_weight + slot * key_weight_stride, mask=inside, other=0.0).to(tl.float32)[:, None]
            mixed_key += weight * new_key
            turned += weight * new_turned
            weight = tl.load(value_weight + slot * value_weight_stride, mask=inside, other=0.0).to(tl.float32)[:, None]
            mixed_value += weight * new_value
            tl.debug_barrier()  # all threads have read the sums that some now overwrite
            at = slot[:, None] * DIM + column[None, :]
            written = inside[:, None] & (column < DIM * kept)[None, :]
            tl.store(block_key + at, tl.where(completes, 0.0, mixed_key), mask=written)
            tl.store(block_value + at, tl.where(completes, 0.0, mixed_value), mask=written)
            if completes:
                keys, values = turned.to(slot_key.dtype.element_ty), mixed_value.to(slot_value.dtype.element_ty)
                tl.store(slot_key + at, keys, mask=written)
                tl.store(slot_value + at, values, mask=written)
                scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
                scores = tl.where(inside[None, :], scores, float("-inf"))
                highest, total, summed = _add_tile(highest, total, summed, scores, values, scale, PRECISION)
        return highest, total, summed

    @kernel
    def next_token_kernel(
        query, key, value, ring_key, ring_value, slot_key, slot_value, block_key, block_value, arrived,
        index, keep, key_weight, value_weight, cos, sin, slot_cos, slot_sin, partial, output,
        query_strides, key_strides, value_strides, key_weight_strides, value_weight_strides,
        angle_stride, slot_angle_stride, stored, window, S, splits, rows, scale,
        SPLIT: tl.constexpr, MIXED: tl.constexpr, HAS_KEEP: tl.constexpr, TURNED: tl.constexpr, PER_GROUP: tl.constexpr,
        SHARED: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
        DIM: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, SLOT_TILE: tl.constexpr,
    ):
        """The next token of a row, one group: what it attends to, and what the cache remembers of it.

        SPLIT: ``splits`` programs share the slots, ``rows`` each; the first has the token itself and the ring beside,
        and the last to arrive adds up what all found, in their order. What the token changes, its row of the ring and
        the slots of the block that it completes, is attended to from registers and hidden where it lies in memory,
        which other threads may have written already or not yet.
        """
        groups, group, split = tl.num_programs(0), tl.program_id(0), tl.program_id(2)
        batch = tl.cast(tl.program_id(1), tl.int64)
        place = batch * groups + group
        position = tl.load(index + batch).to(tl.int32)
        kept = tl.load(keep + batch).to(tl.int32) if HAS_KEEP else 1
        column, head, alone = tl.arange(0, PADDED), tl.arange(0, QUERIES), tl.zeros([1], tl.int32)
        if TURNED:
            features = column < DIM
            cosine = tl.load(cos + batch * angle_stride + column, mask=features, other=0.0).to(tl.float32)[None, :]
            sine = tl.load(sin + batch * angle_stride + column, mask=features, other=0.0).to(tl.float32)[None, :]
        else:
            cosine, sine = None, None
        query += batch * query_strides[0] + group * SHARED * query_strides[1]
        queries = _load_turned(query, head, head < SHARED, query_strides[1], cosine, sine, TURNED, DIM, PADDED)[1]
        queries = queries.to(query.dtype.element_ty)

        number = position // BLOCK
        within = position - number * BLOCK
        completes = within == BLOCK - 1
        slot_key += place * S * DIM
        slot_value += place * S * DIM
        blocks = tl.maximum(S // SLOTS, 1)
        held = tl.minimum(number * SLOTS, S)
        at_slots = number % blocks * SLOTS  # of the block under way, in place of the one that then leaves the view

        highest = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        summed = tl.zeros([QUERIES, PADDED], tl.float32)
        if split == 0:
            key += batch * key_strides[0] + group * key_strides[1]
            value += batch * value_strides[0] + group * value_strides[1]
            ring_key += place * window * DIM
            ring_value += place * window * DIM
            at_ring = position % window
            new_key = _load_turned(key, alone, alone == 0, 0, cosine, sine, TURNED, DIM, PADDED)[1]
            new_key = new_key.to(ring_key.dtype.element_ty)
            new_value = _load_turned(value, alone, alone == 0, 0, None, None, False, DIM, PADDED)[0]
            written = (column < DIM * kept)[None, :]  # nothing of a masked token
            tl.store(ring_key + at_ring * DIM + column[None, :], new_key, mask=written)
            tl.store(
                ring_value + at_ring * DIM + column[None, :], new_value.to(ring_value.dtype.element_ty), mask=written)
            highest = tl.sum(queries.to(tl.float32) * new_key.to(tl.float32), 1) * (scale * LOG2_E)
            total += 1.0
            summed += new_value
            if MIXED:
                of_weight = tl.minimum(number, stored - 1)
                key_weight += of_weight * key_weight_strides[1] + within * key_weight_strides[2]
                value_weight += of_weight * value_weight_strides[1] + within * value_weight_strides[2]
                if PER_GROUP:
                    key_weight += group * key_weight_strides[0]
                    value_weight += group * value_weight_strides[0]
                if TURNED:
                    slot_cos += batch * slot_angle_stride
                    slot_sin += batch * slot_angle_stride
                highest, total, summed = _add_to_block(
                    highest, total, summed, queries, key, value,
                    block_key + place * SLOTS * DIM, block_value + place * SLOTS * DIM,
                    slot_key + at_slots * DIM, slot_value + at_slots * DIM, key_weight, value_weight,
                    key_weight_strides[3], value_weight_strides[3], slot_cos, slot_sin, completes, kept, scale,
                    TURNED, SLOTS, DIM, PADDED, PRECISION, SLOT_TILE)
            highest, total, summed = _add_rows(
                highest, total, summed, queries, ring_key, ring_value, 0, tl.minimum(position, window),
                at_ring, at_ring + 1, scale, DIM, PADDED, PRECISION, KEYS)
        if MIXED:
            hidden = tl.where(completes, at_slots, S)
            highest, total, summed = _add_rows(
                highest, total, summed, queries, slot_key, slot_value, split * rows,
                tl.minimum(held, split * rows + rows), hidden, hidden + SLOTS, scale, DIM, PADDED, PRECISION, KEYS)

        output += (place * SHARED + head[:, None]) * DIM + column[None, :]
        of_head = (head < SHARED)[:, None] & (column < DIM)[None, :]
        if not SPLIT:
            tl.store(output, (summed * (1 / total)[:, None]).to(output.dtype.element_ty), mask=of_head)
        else:
            # Of a program: highest scores, denominators, then weighted values.
            length: tl.constexpr = QUERIES * (PADDED + 2)
            matrix = 2 * QUERIES + head[:, None] * PADDED + column[None, :]
            partial += place * splits * length
            mine = partial + split * length
            tl.store(mine + head, highest)
            tl.store(mine + QUERIES + head, total)
            tl.store(mine + matrix, summed)
            tl.debug_barrier()  # all threads have stored before one of them says so
            if tl.atomic_add(arrived + place, 1, sem="acq_rel") == splits - 1:
                highest = tl.full([QUERIES], float("-inf"), tl.float32)
                total = tl.zeros([QUERIES], tl.float32)
                summed = tl.zeros([QUERIES, PADDED], tl.float32)
                for _ in range(splits):  # the first of them is finite
                    other_highest = tl.load(partial + head, cache_modifier=".cg")
                    higher = tl.maximum(highest, other_highest)
                    shrink, other = tl.exp2(highest - higher), tl.exp2(other_highest - higher)
                    total = total * shrink + tl.load(partial + QUERIES + head, cache_modifier=".cg") * other
                    found = tl.load(partial + matrix, cache_modifier=".cg")
                    summed = summed * shrink[:, None] + found * other[:, None]
                    highest = higher
                    partial += length
                tl.store(output, (summed * (1 / total)[:, None]).to(output.dtype.element_ty), mask=of_head)
                tl.store(arrived + place, 0)
