"""The two baselines that a language model has to beat: add-k unigram and bigram models of the same tokens."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

SMOOTHING = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass
class Text:
    """Rows of tokens, one after the other.

    Args:
        tokens_N: ids, int64.
        first_N: True where a row begins: such a token is predicted by nothing.
    """

    tokens_N: torch.Tensor
    first_N: torch.Tensor

    @classmethod
    def of(cls, rows: Iterable[NDArray], limit: int | None = None) -> "Text":
        """The rows, as many as have ``limit`` tokens together."""
        kept: list[NDArray] = []
        left = limit
        for row in rows:
            kept.append(row if left is None else row[:left])
            left = None if left is None else left - len(row)
            if left is not None and left <= 0:
                break
        lengths = torch.tensor([len(row) for row in kept])
        first_N = torch.zeros(int(lengths.sum()), dtype=torch.bool)
        first_N[torch.cumsum(lengths, 0)[:-1]] = True
        first_N[0] = True
        return cls(torch.from_numpy(np.concatenate(kept).astype(np.int64)), first_N)

    def split(self, place: int) -> tuple["Text", "Text"]:
        """What stands before token number ``place``, and the rest, which begins a row."""
        rest = self.first_N[place:].clone()
        rest[:1] = True
        return Text(self.tokens_N[:place], self.first_N[:place]), Text(self.tokens_N[place:], rest)

    @property
    def predicted(self) -> torch.Tensor:
        """The tokens that a causal model predicts: all but the first of each row."""
        return self.tokens_N[~self.first_N]

    def pairs(self, vocab_size: int) -> torch.Tensor:
        """Each predicted token y with the one before it, x, as the number x * V + y."""
        place = torch.arange(1, len(self.tokens_N))[~self.first_N[1:]]
        return self.tokens_N[place - 1] * vocab_size + self.tokens_N[place]


class Unigram:
    r""":math:`p(y) = (c(y) + k) / (n + kV)`, c counted on n tokens.

    Args:
        train: the rows that are counted.
        vocab_size: V.
    """

    def __init__(self, train: Text, vocab_size: int) -> None:
        self.counts = torch.bincount(train.tokens_N, minlength=vocab_size).double()

    def loss(self, target: Text, k: float) -> float:
        """Mean negative log-likelihood of the predicted tokens, nats, with k added to each count."""
        smoothed = self.counts + k
        return -torch.log(smoothed / smoothed.sum())[target.predicted].mean().item()


class Bigram:
    r""":math:`p(y \mid x) = (c(x, y) + k) / (c(x) + kV)`, x the token before y in its row.

    Arguments as of :class:`Unigram`.
    Cost: memory O(tokens), not O(V²).
    """

    def __init__(self, train: Text, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        seen = train.pairs(vocab_size)
        self.pairs, self.counts = torch.unique(seen, return_counts=True)
        self.context_counts = torch.bincount(seen // vocab_size, minlength=vocab_size).double()

    def loss(self, target: Text, k: float) -> float:
        """As :meth:`Unigram.loss`."""
        wanted = target.pairs(self.vocab_size)
        place = torch.searchsorted(self.pairs, wanted).clamp(max=len(self.pairs) - 1)
        counts = torch.where(self.pairs[place] == wanted, self.counts[place], 0).double()
        contexts = self.context_counts[wanted // self.vocab_size]
        return -torch.log((counts + k) / (contexts + k * self.vocab_size)).mean().item()


def tuned_losses(train: Text, target: Text, vocab_size: int) -> tuple[float, float]:
    """Unigram and bigram loss on the target, each with the k of SMOOTHING that is best on held-out training text.

    The last tenth of the training text is held out to choose k; then all of it is counted.
    """
    losses = []
    fit, tune = train.split(len(train.tokens_N) * 9 // 10)
    for model in (Unigram, Bigram):
        fitted = model(fit, vocab_size)
        k = min(SMOOTHING, key=lambda k: fitted.loss(tune, k))  # noqa: B023  used within the turn of the loop
        losses.append(model(train, vocab_size).loss(target, k))
    return losses[0], losses[1]
