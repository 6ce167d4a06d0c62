"""The loss of a causal language model on every token of a text, summed by document and by position in the window.

Shapes: B windows of a batch, T tokens of a window or document, D features, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linpass.errors import InputError
from linpass.training.losses import check_head, linear_cross_entropy


class Document(NamedTuple):
    """Token ids of a text, the first only as context, and the UTF-8 bytes that the others stand for."""

    ids_T: Tensor
    scored_bytes: int


class Window(NamedTuple):
    """A piece of a document: what the model is given, and the next token of each."""

    document: int
    inputs_T: Tensor
    targets_T: Tensor


class Scores(NamedTuple):
    """Sums of the losses in nats, float64: by document, and by position in the window, [seq_length] each."""

    document_nats: Tensor
    document_tokens: Tensor
    document_bytes: Tensor
    position_nats: Tensor
    position_squares: Tensor
    position_tokens: Tensor


def encode_documents(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """Token ids behind the tokenizer's beginning- or end-of-text token, so that every token of a text is predicted.

    A tokenizer that has neither leaves the first token of each text without a prediction; the characters before
    the second token do not count then.

    Raises:
        InputError: no text with a token to predict.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    documents = []
    for text in tqdm(texts, desc="tokenizing", unit=" documents", disable=None, leave=False):
        encoded = tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=start is None,
            verbose=False,
        )
        ids = encoded["input_ids"]
        if start is None:
            text = text[encoded["offset_mapping"][1][0] :] if len(ids) > 1 else ""
        ids_T = torch.tensor(ids if start is None else [start, *ids], dtype=torch.int32)
        if len(ids_T) > 1:
            documents.append(Document(ids_T, len(text.encode("utf-8"))))
    if not documents:
        raise InputError("text_files must hold a text of two tokens or more")
    return documents


def cut_windows(documents: Sequence[Document], seq_length: int) -> list[Window]:
    """Windows in which every token but the first of each document is a target exactly once, the longest first."""
    windows = [
        Window(index, inputs_T, targets_T)
        for index, (ids_T, _bytes) in enumerate(documents)
        for inputs_T, targets_T in zip(ids_T[:-1].split(seq_length), ids_T[1:].split(seq_length), strict=True)
    ]
    return sorted(windows, key=lambda window: -len(window.inputs_T))


def score_documents(
    model: PreTrainedModel, documents: Sequence[Document], seq_length: int, batch_size: int = 8
) -> Scores:
    """The model's loss on every token but the first of each document, summed by document and by position."""
    windows = cut_windows(documents, seq_length)
    length = len(windows[0].inputs_T)
    by_document = torch.zeros(2, len(documents), dtype=torch.float64)
    by_position = torch.zeros(3, length, dtype=torch.float64)
    predict = token_losses(model)
    total = sum(len(window.targets_T) for window in windows)
    with tqdm(total=total, desc="scoring", unit=" tokens", unit_scale=True, disable=None, leave=False) as bar:
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size]
            inputs_BT = pad_sequence([window.inputs_T for window in batch], batch_first=True).long()
            targets_BT = pad_sequence([w.targets_T for w in batch], batch_first=True, padding_value=-100).long()
            nats_BT = predict(inputs_BT.to(model.device), targets_BT.to(model.device)).double().cpu()
            counted_BT = (targets_BT != -100).double()
            owners = torch.tensor([window.document for window in batch])
            by_document.index_add_(1, owners, torch.stack([nats_BT.sum(1), counted_BT.sum(1)]))
            sums = torch.stack([nats_BT, nats_BT**2, counted_BT]).sum(1)
            by_position[:, : sums.shape[1]] += sums
            bar.update(int(counted_BT.sum()))
    document_bytes = torch.tensor([document.scored_bytes for document in documents], dtype=torch.float64)
    return Scores(by_document[0], by_document[1], document_bytes, by_position[0], by_position[1], by_position[2])


def token_losses(model: PreTrainedModel) -> Callable[[Tensor, Tensor], Tensor]:
    """A function (ids, targets with -100 at padding; [B, T] on the model's device) -> losses in nats, [B, T].

    The logits are formed chunk by chunk where the model's head allows it, all at once where it does not.
    """
    try:
        check_head(model)
        chunked = True
    except ValueError:
        chunked = False

    @torch.no_grad()
    def predict(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        real_BT = targets_BT != -100
        mask = {} if real_BT.all() else {"attention_mask": real_BT.long()}
        if not chunked:
            logits_BTV = model(input_ids=inputs_BT, use_cache=False, **mask).logits
            rows = zip(logits_BTV, targets_BT, strict=True)
            return torch.stack([F.cross_entropy(_wide(row), target, reduction="none") for row, target in rows])
        hidden_BTD = model.base_model(input_ids=inputs_BT, use_cache=False, **mask).last_hidden_state
        head: Any = model.get_output_embeddings()
        # PyTorch's own chunked operation would round each loss to half precision.
        return linear_cross_entropy(
            hidden_BTD.flatten(0, 1), head.weight, targets_BT.flatten(), reduction="none", implementation="checkpoint"
        ).view_as(targets_BT)

    return predict


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def summarise(scores: Scores) -> dict[str, Any]:
    r"""Numbers of plain Python.

    ``loss`` is nats per token over all tokens, ``perplexity`` its exponential, ``bits_per_byte`` the same nats over
    :math:`\ln 2` and the bytes of the text that was predicted, if the tokenizer drops nothing of it. A
    ``standard_error`` is that of a ratio of sums over documents, None for a single one. ``loss_by_position`` starts
    with the tokens that have one token before them.
    """
    nats, tokens, count = scores.document_nats.sum(), scores.document_tokens.sum(), len(scores.document_nats)
    loss = (nats / tokens).item()
    bits = (nats / math.log(2) / scores.document_bytes.sum()).item()
    loss_error = ratio_error(scores.document_nats, scores.document_tokens)
    return {
        "documents": count,
        "tokens": int(tokens),
        "bytes": int(scores.document_bytes.sum()),
        "loss": loss,
        "loss_standard_error": loss_error,
        "perplexity": math.exp(loss),
        "perplexity_standard_error": None if loss_error is None else math.exp(loss) * loss_error,
        "bits_per_byte": bits,
        "bits_per_byte_standard_error": ratio_error(scores.document_nats / math.log(2), scores.document_bytes),
        "loss_by_position": (scores.position_nats / scores.position_tokens).tolist(),
        "tokens_by_position": [int(number) for number in scores.position_tokens],
    }


def ratio_error(numerators: Tensor, denominators: Tensor) -> float | None:
    r"""Standard error of :math:`R = \sum x / \sum y` over independent documents; None for one.

    .. math::  \sqrt{\tfrac{D}{D-1} \sum_d (x_d - R y_d)^2} \Big/ \sum_d y_d

    Source: Cochran 1977, Sampling Techniques, section 2.11.
    """
    documents = len(numerators)
    if documents < 2:
        return None
    residuals = numerators - numerators.sum() / denominators.sum() * denominators
    return (math.sqrt(documents / (documents - 1) * residuals.square().sum().item())) / denominators.sum().item()


def position_ranges(length: int, per_doubling: int) -> list[tuple[int, int]]:
    """Ranges [first, end) of positions that grow with the position: single ones first, then ``per_doubling``."""
    ends = sorted({math.ceil(2 ** (step / per_doubling)) for step in range(per_doubling * (length.bit_length() + 1))})
    ends = [end for end in ends if end < length] + [length]
    return list(zip([0, *ends], ends, strict=False))


def range_loss(scores: Scores, first: int, end: int) -> tuple[float, float]:
    """Loss at positions [first, end) and its standard error over tokens (0 for a single token)."""
    nats, squares, tokens = (part[first:end].sum().item() for part in scores[3:])
    mean = nats / tokens
    return mean, math.sqrt(max(0.0, squares / tokens - mean**2) / max(1.0, tokens - 1))
