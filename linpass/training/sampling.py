r"""Which chunks of which documents make an epoch, and in which rows.

A document of L tokens has :math:`\lceil L / n \rceil` chunks of at most n = ``seq_length`` tokens. Where their borders
lie is drawn anew in each pass over the document; how many there are is not, so that the dataset has a length and any
sampler can draw from it. Every draw is a function of (seed, pass, document, chunk) alone: no generator has a state, so
workers, processes and resumed runs make the same batches.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Row = tuple[int, ...]  # chunks that share a row; the empty one is a row of padding
WINDOW = 1024  # rows that stay open for packing


def draw(seed: int, *parts: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits for each of the numbers ``parts``, broadcast against each other.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014, *Fast splittable pseudorandom number generators*,
    figure 19), applied after each part is added.
    """
    state = _mix(np.asarray(seed, dtype=np.uint64))
    for part in parts:
        state = _mix(state ^ np.asarray(part).astype(np.uint64))
    return state


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


def chunk_count(length: ArrayLike, seq_length: int, chunks_per_document: int | None = None) -> NDArray[np.int64]:
    """Chunks of documents of these lengths: ⌈length / seq_length⌉, at most ``chunks_per_document``."""
    count = -(-np.asarray(length, dtype=np.int64) // seq_length)
    return count if chunks_per_document is None else np.minimum(count, chunks_per_document)


@dataclass(frozen=True)
class ChunkBorders:
    r"""Where the chunks of a document lie.

    A document that fits into one chunk is that chunk. Of a longer one,

    - with ``chunks_per_document=None`` the first border is drawn from 1 … n and every n-th token after it is another
      one; where that makes a piece more than :math:`\lceil L / n \rceil`, the shorter of the two end pieces is left
      out, on average n/12 tokens of the document, others in each pass;
    - with ``chunks_per_document=m`` each chunk is n tokens from a place of its own, drawn from 0 … L - n.

    In validation (``epoch=None``) the borders are the multiples of n, and no token is left out.

    Args:
        seq_length: n, tokens.
        seed: of all draws.
    """

    seq_length: int
    chunks_per_document: int | None = None
    seed: int = 0

    def span(
        self, length: ArrayLike, epoch: ArrayLike | None, document: ArrayLike, chunk: ArrayLike
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First token and the one after the last, of chunks 0 … count - 1; all arguments broadcast."""
        length, chunk = np.asarray(length, dtype=np.int64), np.asarray(chunk, dtype=np.int64)
        n = self.seq_length
        if epoch is None:
            return chunk * n, np.minimum((chunk + 1) * n, length)
        if self.chunks_per_document is not None:
            room = np.maximum(length - n, 0)
            start = (draw(self.seed, epoch, document, chunk) % (room + 1).astype(np.uint64)).astype(np.int64)
            return start, np.minimum(start + n, length)
        head = 1 + (draw(self.seed, epoch, document) % np.uint64(n)).astype(np.int64)
        pieces = 1 + -(-(length - head) // n)
        tail = length - head - (pieces - 2) * n
        one_too_many = pieces > chunk_count(length, n)
        piece = np.where(one_too_many & (head <= tail), chunk + 1, chunk)
        start = np.where(piece == 0, 0, head + (piece - 1) * n)
        end = np.minimum(head + piece * n, length)
        whole = length <= n
        return np.where(whole, 0, start), np.where(whole, length, end)


class ChunkDataset(torch.utils.data.Dataset):
    """The chunks of documents, as rows that :class:`~linpass.training.collators.DynamicChunkingCollator` takes.

    It has a length and takes whole numbers, so that every sampler and every Trainer can use it; number i is one chunk.
    :class:`ChunkSampler` asks for more: a tuple is a row of several chunks (packing), the empty tuple a row of padding,
    and ``i + (epoch + 1) * len(dataset)`` is chunk i with the borders and the noise of that epoch.

    Args:
        documents: a sequence of sequences of token ids; not copied.
        borders: where the chunks lie.
        lengths: [D], where they are known; else they are asked of each document.
        random: False for validation: fixed borders, no noise.
    """

    def __init__(
        self,
        documents: Sequence[Any],
        borders: ChunkBorders,
        lengths: NDArray[np.int64] | None = None,
        random: bool = True,
    ) -> None:
        if lengths is None:
            lengths = np.array([len(document) for document in documents], dtype=np.int64)
        self.documents, self.borders, self.lengths, self.random = documents, borders, lengths, random
        self.counts = chunk_count(lengths, borders.seq_length, borders.chunks_per_document if random else None)
        self.first = np.concatenate(([0], np.cumsum(self.counts)))  # number of each document's first chunk
        self.epoch = 0

    def __len__(self) -> int:
        return int(self.first[-1])

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the numbers less than ``len(dataset)``, which do not say theirs."""
        self.epoch = epoch

    def locate(self, numbers: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Epoch, document and chunk within the document, of numbers as a sampler gives them."""
        turn, number = np.divmod(np.asarray(numbers, dtype=np.int64), len(self))
        document = np.searchsorted(self.first, number, side="right") - 1
        return np.where(turn == 0, self.epoch, turn - 1), document, number - self.first[document]

    def number(self, chunk: ArrayLike, epoch: int) -> NDArray[np.int64]:
        """The numbers of chunks in an epoch, see the class."""
        return np.asarray(chunk, dtype=np.int64) + (epoch + 1) * len(self)

    def chunk_lengths(self, numbers: ArrayLike) -> NDArray[np.int64]:
        """Tokens of these chunks before any noise."""
        epoch, document, chunk = self.locate(numbers)
        start, end = self.borders.span(self.lengths[document], epoch if self.random else None, document, chunk)
        return end - start

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, row: int | Row) -> list[dict[str, Any]]:
        chunks = []
        for number in (row,) if isinstance(row, (int, np.integer)) else row:
            epoch, document, chunk = (int(x) for x in self.locate(number))
            span = self.borders.span(self.lengths[document], epoch if self.random else None, document, chunk)
            chunks.append(
                {
                    "input_ids": self.documents[document],
                    "span": (int(span[0]), int(span[1])),
                    "draw": (epoch, document, chunk) if self.random else None,
                }
            )
        return chunks


class ChunkSampler(torch.utils.data.Sampler[Row]):
    """The rows of an epoch, in an order drawn for it; the last step is filled up with rows of padding.

    Without ``weights`` every chunk of every document is in an epoch exactly once. With them, corpus c has the share
    ``weights[c]`` of an epoch's tokens, an epoch having as many tokens as all corpora together: it runs through its
    documents as often as that takes, and goes on in the next epoch where it stopped.

    Packed or weighted, epochs differ by a few rows; all are made as long as the longest, with rows of padding spread
    over the shorter ones, because a Trainer counts the steps of an epoch once. To know the longest, all are planned at
    the start: about a second for a million chunks and epoch.

    Args:
        dataset: its chunks are drawn.
        rows_per_step: the length is a multiple of this; rows of all processes together.
        seed: of the order.
        pack_block: None: one chunk a row; else chunks share rows, each starting at a multiple of ``pack_block``.
        corpus: [D], the number of each document's corpus; with ``weights``.
        weights: [corpora], more than 0.
        epochs: how many epochs there will be, for the length of packed or weighted ones.
        shuffle: False: in the order of the documents (validation).
    """

    def __init__(
        self,
        dataset: ChunkDataset,
        rows_per_step: int = 1,
        seed: int = 0,
        *,
        pack_block: int | None = None,
        corpus: NDArray[np.integer] | None = None,
        weights: Sequence[float] | None = None,
        epochs: int = 1,
        shuffle: bool = True,
    ) -> None:
        self.dataset, self.rows_per_step, self.seed, self.shuffle = dataset, rows_per_step, seed, shuffle
        self.pack_block = pack_block
        self.corpora: list[NDArray[np.int64]] = []
        self.passes: list[float] = []
        if weights is not None and corpus is not None:
            self.corpora = [np.flatnonzero(corpus == number) for number in range(len(weights))]
            used = np.minimum(dataset.lengths, dataset.counts * dataset.borders.seq_length)  # of a document in an epoch
            tokens = np.array([used[documents].sum() for documents in self.corpora], dtype=float)
            self.passes = list(np.asarray(weights) / sum(weights) * tokens.sum() / tokens)
        self.epoch = 0
        varying = bool(self.passes) or pack_block is not None
        longest = max(len(self._real_rows(e)) for e in range(epochs if varying else 1))
        self._length = -(-longest // rows_per_step) * rows_per_step

    def __len__(self) -> int:
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next iteration; a Trainer calls this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows(self.epoch))

    def rows(self, epoch: int) -> list[Row]:
        """All rows of an epoch, those of padding included."""
        rows = self._real_rows(epoch)
        missing = self._length - len(rows)
        if missing < self.rows_per_step:
            return rows + [()] * missing
        # More than a step: spread, so that no step is without tokens.
        places = set(np.linspace(0, self._length - 1, missing).astype(int).tolist())
        real = iter(rows)
        return [() if place in places else next(real) for place in range(self._length)]

    def _real_rows(self, epoch: int) -> list[Row]:
        numbers = self._weighted(epoch) if self.passes else self.dataset.number(range(len(self.dataset)), epoch)
        if self.shuffle:
            numbers = np.random.default_rng((self.seed, epoch)).permutation(numbers)
        if self.pack_block is None:
            return [(number,) for number in numbers.tolist()]
        lengths = self.dataset.chunk_lengths(numbers)
        return pack(numbers.tolist(), lengths.tolist(), self.dataset.borders.seq_length, self.pack_block)

    def _weighted(self, epoch: int) -> NDArray[np.int64]:
        """The chunks of each corpus's documents number epoch * passes * D … (epoch + 1) * passes * D."""
        numbers = []
        for corpus, (documents, passes) in enumerate(zip(self.corpora, self.passes, strict=True)):
            size = len(documents)
            start, stop = (round(e * passes * size) for e in (epoch, epoch + 1))
            for turn in range(start // size, math.ceil(stop / size)):
                order = np.random.default_rng((self.seed, turn, corpus)).permutation(documents)
                chosen = order[max(start - turn * size, 0) : stop - turn * size]
                counts = self.dataset.counts[chosen]
                within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
                chunks = np.repeat(self.dataset.first[chosen], counts) + within
                numbers.append(self.dataset.number(chunks, turn))
        return np.concatenate(numbers)


def pack(numbers: Sequence[int], lengths: Sequence[int], seq_length: int, block_size: int) -> list[Row]:
    """Rows of chunks that together fit into ``seq_length`` tokens, each chunk starting at a multiple of ``block_size``.

    Best fit: a chunk goes to the fullest open row that has room for it. The last WINDOW rows are open, so that chunks
    which are far apart in a shuffled order stay far apart. Cost: O(chunks · seq_length / block_size).
    """
    capacity = seq_length // block_size
    rows: list[list[int]] = []
    free: list[list[int]] = [[] for _ in range(capacity + 1)]  # open rows, by their free blocks
    for number, length in zip(numbers, lengths, strict=True):
        blocks = -(-length // block_size)
        row = None
        for room in range(blocks, capacity):
            while free[room] and row is None:
                candidate = free[room].pop()
                row = candidate if candidate >= len(rows) - WINDOW else None
            if row is not None:
                break
        else:
            row, room = len(rows), capacity
            rows.append([])
        rows[row].append(number)
        if room > blocks:
            free[room - blocks].append(row)
    return [tuple(row) for row in rows]
