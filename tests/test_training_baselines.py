"""The baselines against counting by hand."""

import math

import numpy as np
import pytest
import torch

from linpass.training.baselines import SMOOTHING, Bigram, Text, Unigram, tuned_losses

TRAIN_ROWS = [[0, 1, 0, 1], [2, 1, 0, 0, 3], [1]]
TARGET_ROWS = [[1, 0, 2], [0, 1, 1]]
TRAIN, TARGET = (Text.of([np.array(row, dtype=np.uint16) for row in rows]) for rows in (TRAIN_ROWS, TARGET_ROWS))


def pairs(rows):
    return [pair for row in rows for pair in zip(row, row[1:], strict=False)]


@pytest.mark.parametrize("k", SMOOTHING)
def test_unigram_by_hand(k):
    tokens, scored = sum(TRAIN_ROWS, []), [y for row in TARGET_ROWS for y in row[1:]]
    expected = -sum(math.log((tokens.count(y) + k) / (len(tokens) + 4 * k)) for y in scored) / len(scored)
    assert Unigram(TRAIN, 4).loss(TARGET, k) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k", SMOOTHING)
def test_bigram_by_hand(k):
    seen, scored = pairs(TRAIN_ROWS), pairs(TARGET_ROWS)
    contexts = [x for x, _y in seen]
    expected = -sum(math.log((seen.count(p) + k) / (contexts.count(p[0]) + 4 * k)) for p in scored) / len(scored)
    assert Bigram(TRAIN, 4).loss(TARGET, k) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("model", [Unigram, Bigram])
def test_probabilities_sum_to_one(model):
    every_pair = [Text.of([np.array([2, y])]) for y in range(4)]
    assert sum(math.exp(-model(TRAIN, 4).loss(pair, 0.3)) for pair in every_pair) == pytest.approx(1, rel=1e-12)


def test_rows_up_to_a_limit_and_a_split_begin_rows():
    text = Text.of([np.arange(5), np.arange(5, 9), np.arange(9, 20)], limit=7)
    assert text.tokens_N.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert text.first_N.tolist() == [True, False, False, False, False, True, False]
    before, after = text.split(3)
    assert before.predicted.tolist() == [1, 2]
    assert after.predicted.tolist() == [4, 6]
    assert text.first_N.sum() == 2


def test_k_is_chosen_on_training_text_only():
    generator = np.random.default_rng(0)
    train = Text.of(generator.integers(0, 5, (40, 16)))
    target = Text.of(generator.integers(0, 5, (4, 16)))
    unigram, bigram = tuned_losses(train, target, 5)
    fit, held_out = train.split(40 * 16 * 9 // 10)
    best = min(SMOOTHING, key=lambda k: Bigram(fit, 5).loss(held_out, k))
    assert bigram == Bigram(train, 5).loss(target, best)
    assert unigram == pytest.approx(math.log(5), abs=0.05)
    assert torch.equal(train.first_N.nonzero().flatten(), torch.arange(40) * 16)
