"""Which chunks make an epoch: borders, order, packing, mixing, filling."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from linpass.training.sampling import ChunkBorders, ChunkDataset, ChunkSampler, chunk_count, draw, pack

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


def dataset_of(lengths, seq_length=32, **options):
    documents = [np.arange(length) for length in lengths]
    random = options.pop("random", True)
    return ChunkDataset(documents, ChunkBorders(seq_length, **options), random=random)


def spans(borders, length, epoch, document=0):
    most = None if epoch is None else borders.chunks_per_document
    chunks = range(int(chunk_count(length, borders.seq_length, most)))
    return [tuple(int(x) for x in borders.span(length, epoch, document, chunk)) for chunk in chunks]


@given(st.integers(1, 500), st.integers(2, 64), st.integers(0, 5), st.integers(0, 9))
def test_a_document_yields_its_number_of_chunks_one_behind_the_other(length, n, epoch, document):
    pieces = spans(ChunkBorders(n, seed=3), length, epoch, document)
    assert len(pieces) == -(-length // n)
    assert all(0 <= start < end <= length and end - start <= n for start, end in pieces)
    assert all(before[1] == after[0] for before, after in zip(pieces, pieces[1:], strict=False))
    left_out = length - (pieces[-1][1] - pieces[0][0])
    assert left_out <= n / 2
    assert 0 in (pieces[0][0], length - pieces[-1][1])  # only one end is shortened


def test_borders_are_drawn_anew_each_epoch_and_lie_anywhere():
    borders = ChunkBorders(10)
    firsts = Counter(spans(borders, 100, epoch)[0][1] for epoch in range(2000))  # also where length is a multiple of n
    assert len({tuple(spans(borders, 95, epoch)) for epoch in range(200)}) == 10
    assert len(firsts) == 10
    assert spans(borders, 100, 7) == spans(ChunkBorders(10), 100, 7)
    assert spans(borders, 100, 7) != spans(ChunkBorders(10, seed=1), 100, 7)


def test_the_tokens_left_out_are_a_twelfth_of_a_chunk_on_average():
    n, lengths = 24, np.repeat(np.arange(100, 100 + 24), 200)
    left_out = []
    for document, length in enumerate(lengths):
        pieces = spans(ChunkBorders(n), int(length), 0, document)
        left_out.append(length - (pieces[-1][1] - pieces[0][0]))
    assert np.mean(left_out) == pytest.approx(n / 12, rel=0.1)


@given(st.integers(1, 500), st.integers(2, 64), st.integers(1, 4), st.integers(0, 5))
def test_chunks_per_document_are_windows_from_anywhere(length, n, most, epoch):
    pieces = spans(ChunkBorders(n, most), length, epoch)
    assert len(pieces) == min(most, -(-length // n))
    assert all(end - start == min(n, length) and start >= 0 and end <= length for start, end in pieces)


def test_one_chunk_per_document_reaches_every_place():
    starts = Counter(spans(ChunkBorders(10, 1), 14, epoch)[0][0] for epoch in range(500))
    assert sorted(starts) == [0, 1, 2, 3, 4]
    assert min(starts.values()) > 60


@given(st.integers(1, 500), st.integers(2, 64))
def test_validation_borders_are_fixed_and_complete(length, n):
    pieces = spans(ChunkBorders(n, 1), length, None)
    assert [token for start, end in pieces for token in range(start, end)] == list(range(length))
    assert all(start % n == 0 for start, _end in pieces)


def test_draws_are_spread_and_depend_on_every_part():
    numbers = draw(0, np.arange(100_000))
    assert len(set(numbers.tolist())) == 100_000
    assert (numbers / 2**64).mean() == pytest.approx(0.5, abs=0.005)
    assert len({int(draw(*parts)) for parts in ((0, 1, 2), (1, 0, 2), (0, 2, 1), (0, 1, 2, 0), (0, 1))}) == 5


@given(LENGTHS, st.integers(0, 3), st.integers(1, 7))
def test_every_chunk_once_an_epoch_and_the_last_step_is_filled(lengths, epoch, rows_per_step):
    dataset = dataset_of(lengths)
    sampler = ChunkSampler(dataset, rows_per_step, seed=5)
    sampler.set_epoch(epoch)
    rows = list(sampler)
    assert len(rows) == len(sampler) == -(-len(dataset) // rows_per_step) * rows_per_step
    assert sorted(row[0] for row in rows if row) == dataset.number(range(len(dataset)), epoch).tolist()
    assert all(not row for row in rows[len(dataset) :])  # padding stands in the last step
    epochs, documents, chunks = dataset.locate([row[0] for row in rows if row])
    assert set(epochs) == {epoch}
    counts = Counter(zip(documents.tolist(), chunks.tolist(), strict=True))
    assert counts == {(d, c): 1 for d, length in enumerate(lengths) for c in range(-(-length // 32))}


def test_each_epoch_has_an_order_of_its_own():
    sampler = ChunkSampler(dataset_of([100] * 50), 1, seed=0)
    orders = [[row[0] % len(sampler.dataset) for row in sampler.rows(epoch)] for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    in_order = [row[0] for row in ChunkSampler(sampler.dataset, shuffle=False).rows(0)]
    assert in_order == sampler.dataset.number(range(len(sampler.dataset)), 0).tolist()


@given(LENGTHS, st.sampled_from([1, 4, 8]), st.integers(1, 5))
def test_packed_rows_hold_every_chunk_and_fit(lengths, block, rows_per_step):
    dataset = dataset_of(lengths)
    sampler = ChunkSampler(dataset, rows_per_step, pack_block=block, epochs=3)
    for epoch in range(3):
        rows = sampler.rows(epoch)
        assert len(rows) == len(sampler)
        assert len(sampler) % rows_per_step == 0
        numbers = sorted(number for row in rows for number in row)
        assert numbers == dataset.number(range(len(dataset)), epoch).tolist()
        for row in rows:
            blocks = -(-dataset.chunk_lengths(list(row)) // block) if row else np.zeros(1)
            assert blocks.sum() * block <= 32


def test_packing_wastes_little():
    lengths = np.random.default_rng(0).integers(1, 64, 5000).tolist()
    rows = pack(range(5000), lengths, 64, 1)
    assert sum(lengths) / (64 * len(rows)) > 0.98


def test_weights_are_shares_of_the_tokens_and_every_document_comes_round():
    lengths = [20] * 300 + [30] * 100  # two corpora of 6000 and 3000 tokens
    dataset = dataset_of(lengths)
    corpus = np.array([0] * 300 + [1] * 100)
    sampler = ChunkSampler(dataset, 8, seed=1, corpus=corpus, weights=[1, 2], epochs=6)
    seen, draws = Counter(), set()
    for epoch in range(6):
        numbers = [number for row in sampler.rows(epoch) for number in row]
        turns, documents, _chunks = dataset.locate(numbers)
        tokens = [sum(lengths[d] for d in documents if corpus[d] == c) for c in (0, 1)]
        assert tokens[1] / sum(tokens) == pytest.approx(2 / 3, abs=0.01)
        assert sum(tokens) == pytest.approx(9000, rel=0.01)
        seen.update(documents.tolist())
        assert draws.isdisjoint(numbers)  # the same chunk never comes with the same borders
        draws.update(numbers)
    assert {seen[d] for d in range(300)} == {3}
    assert {seen[d] for d in range(300, 400)} == {12}


def test_weights_count_the_tokens_that_are_trained_on():
    lengths = [500] * 50 + [10] * 1000
    dataset = dataset_of(lengths, chunks_per_document=1)
    corpus = np.array([0] * 50 + [1] * 1000)
    sampler = ChunkSampler(dataset, corpus=corpus, weights=[1, 1], epochs=1)
    numbers = [number for row in sampler.rows(0) for number in row]
    tokens, owner = dataset.chunk_lengths(numbers), corpus[dataset.locate(numbers)[1]]
    assert tokens[owner == 0].sum() / tokens.sum() == pytest.approx(0.5, abs=0.01)


def test_padding_rows_of_a_shorter_epoch_do_not_make_a_step():
    lengths = np.random.default_rng(1).integers(1, 200, 300).tolist()
    sampler = ChunkSampler(dataset_of(lengths), 2, pack_block=4, epochs=20)
    for epoch in range(20):
        rows = sampler.rows(epoch)
        assert all(rows[step] or rows[step + 1] for step in range(0, len(rows), 2))


def test_a_number_is_a_chunk_and_a_sequence_ends():
    dataset = dataset_of([50, 10])
    items = list(dataset)
    assert len(items) == len(dataset) == 3
    dataset.set_epoch(2)
    assert dataset[0][0]["draw"] == dataset_of([50, 10])[0 + (2 + 1) * 3][0]["draw"] == (2, 0, 0)
    assert dataset[0 + (1 + 1) * 3][0]["draw"] == (1, 0, 0)  # a number that says its epoch is not given another one
    assert dataset[()] == []
    assert dataset_of([50, 10], random=False)[1][0]["span"] == (32, 50)
