"""The baselines against counting by hand."""

import math

import pytest
import torch

from linpass.training.baselines import SMOOTHING, bigram_loss, tuned_losses, unigram_loss

TRAIN = torch.tensor([[0, 1, 0, 1], [2, 1, 0, 0]])
TARGET = torch.tensor([[1, 0, 2], [0, 1, 1]])


def count(pairs, wanted):
    return sum(1 for pair in pairs if pair == wanted)


@pytest.mark.parametrize("k", SMOOTHING)
def test_unigram_by_hand(k):
    tokens, scored = TRAIN.flatten().tolist(), TARGET[:, 1:].flatten().tolist()
    expected = -sum(math.log((tokens.count(y) + k) / (len(tokens) + 4 * k)) for y in scored) / len(scored)
    assert unigram_loss(TRAIN, TARGET, 4, k) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k", SMOOTHING)
def test_bigram_by_hand(k):
    pairs = [pair for row in TRAIN.tolist() for pair in zip(row, row[1:], strict=False)]
    scored = [pair for row in TARGET.tolist() for pair in zip(row, row[1:], strict=False)]
    contexts = [x for x, _y in pairs]
    expected = -sum(math.log((count(pairs, p) + k) / (contexts.count(p[0]) + 4 * k)) for p in scored) / len(scored)
    assert bigram_loss(TRAIN, TARGET, 4, k) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", [unigram_loss, bigram_loss])
def test_probabilities_sum_to_one(loss):
    every_pair = [torch.tensor([[2, y]]) for y in range(4)]
    assert sum(math.exp(-loss(TRAIN, pair, 4, 0.3)) for pair in every_pair) == pytest.approx(1, rel=1e-12)


def test_k_is_chosen_on_training_text_only():
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(0, 5, (40, 16), generator=generator)
    target = torch.randint(0, 5, (4, 16), generator=generator)
    unigram, bigram = tuned_losses(train, target, 5)
    fit, held_out = train[:36], train[36:]
    best = min(SMOOTHING, key=lambda k: bigram_loss(fit, held_out, 5, k))
    assert bigram == bigram_loss(train, target, 5, best)
    assert unigram == pytest.approx(math.log(5), abs=0.05)
