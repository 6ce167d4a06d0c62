"""The two baselines that a language model has to beat: add-k unigram and bigram models of the same tokens."""

import torch

SMOOTHING = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def unigram_loss(train_CN: torch.Tensor, target_CN: torch.Tensor, vocab_size: int, k: float) -> float:
    r"""Mean negative log-likelihood of the targets, nats per token, under :math:`p(y) = (c(y) + k) / (n + kV)`.

    Args:
        train_CN: token ids that are counted, C chunks of N tokens.
        target_CN: token ids that are scored, all but the first of each chunk: the ones a causal model predicts.
        vocab_size: V.
        k: added to each count.
    """
    counts = torch.bincount(train_CN.flatten(), minlength=vocab_size).double()
    log_probs = torch.log((counts + k) / (counts.sum() + k * vocab_size))
    return -log_probs[target_CN[:, 1:]].mean().item()


def bigram_loss(train_CN: torch.Tensor, target_CN: torch.Tensor, vocab_size: int, k: float) -> float:
    r"""As :func:`unigram_loss` under :math:`p(y \mid x) = (c(x, y) + k) / (c(x) + kV)`, x the token before y.

    Pairs are counted within chunks, as the model sees them. Cost: memory O(pairs that occur), not O(V²).
    """
    # The pair (x, y) is the number x * V + y.
    pairs, counts = torch.unique(_pairs(train_CN, vocab_size), return_counts=True)
    context_counts = torch.bincount(train_CN[:, :-1].flatten(), minlength=vocab_size).double()
    wanted = _pairs(target_CN, vocab_size)
    place = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
    pair_counts = torch.where(pairs[place] == wanted, counts[place], 0).double()
    return -torch.log((pair_counts + k) / (context_counts[wanted // vocab_size] + k * vocab_size)).mean().item()


def tuned_losses(train_CN: torch.Tensor, target_CN: torch.Tensor, vocab_size: int) -> tuple[float, float]:
    """Unigram and bigram loss on the targets, each with the k of SMOOTHING that is best on held-out training text.

    A tenth of the training chunks, at least one, is held out to choose k; then all of them are counted.
    """
    losses = []
    held_out = max(1, len(train_CN) // 10)
    for loss in (unigram_loss, bigram_loss):
        fit, tune = (train_CN[:-held_out], train_CN[-held_out:]) if len(train_CN) > 1 else (train_CN, train_CN)
        k = min(SMOOTHING, key=lambda k: loss(fit, tune, vocab_size, k))
        losses.append(loss(train_CN, target_CN, vocab_size, k))
    return losses[0], losses[1]


def _pairs(tokens_CN: torch.Tensor, vocab_size: int) -> torch.Tensor:
    return (tokens_CN[:, :-1] * vocab_size + tokens_CN[:, 1:]).flatten()
