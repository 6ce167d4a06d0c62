"""A Linformer that sees the future, trained as the others are: what its loss says, and what it can do left to right.

lucidrains' ``LinformerLM`` mixes the keys and values of the whole row into slots, so the token that is to be predicted
is among what predicts it. Its loss on whole rows is therefore no measure of prediction. The honest one gives it only
the tokens before: of rows cut off at t, the loss of the token at t, which is what the model has when it writes. Needs
the package ``linformer``; for reference only.
"""

import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.data import CURVE, TOKENIZER, part_folders
from linpass.errors import InputError
from linpass.training.collators import DynamicChunkingCollator
from linpass.training.sampling import ChunkBorders, ChunkDataset, ChunkSampler
from linpass.training.tokenization import load_tokenizer
from linpass.training.tokens import TokenDocuments, TokenStore

PREFIXES, PREFIX_ROWS = 32, 64  # places of a row, and rows, that the honest loss is measured at
ROWS_AT_ONCE = 8


def train_leaking(order: dict[str, Any]) -> dict[str, Any]:
    """Train on the rows that ``linpass train`` would take, in their order; both losses on validation rows.

    Raises:
        InputError: the package is not installed.
    """
    try:
        from linformer import LinformerLM
    except ImportError:
        raise InputError("program 'leaking' needs the package linformer: pip install linformer==0.2.3") from None
    flags, data = order["flags"], Path(order["data"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(str(data / TOKENIZER), 1 << 16)
    torch.manual_seed(flags["seed"])
    model = LinformerLM(
        num_tokens=len(tokenizer),
        dim=flags["embed_dim"],
        seq_len=flags["seq_length"],
        depth=flags["depth"],
        heads=flags["heads"],
        k=flags["k"],
    ).to(device)
    start = time.perf_counter()
    log = fit(model, flags, part_folders(data, order["parts"]), tokenizer, device)
    seconds = time.perf_counter() - start
    leaking = {"training": log[-1][1]} | losses_with_and_without_future(
        model.eval(), validation_rows(data / CURVE, flags["seq_length"]).to(device)
    )
    tokens = flags["max_steps"] * flags["per_device_train_batch_size"] * flags["seq_length"]
    parameters = sum(weight.numel() for weight in model.parameters())
    speed = {"tokens_per_second": tokens / seconds}
    return {"log": log, "speed": speed, "parameters": parameters, "leaking": leaking}


def fit(model: nn.Module, flags: dict[str, Any], parts: Sequence[Path], tokenizer: Any, device: torch.device) -> list:
    """Optimizer, schedule, clipping, rows and precision of the theme; [step, mean training loss, None] now and then."""
    from transformers import get_cosine_schedule_with_warmup

    n, rows, steps, seed = (flags[k] for k in ("seq_length", "per_device_train_batch_size", "max_steps", "seed"))
    documents = TokenDocuments.of([TokenStore(part) for part in parts])
    dataset = ChunkDataset(documents, ChunkBorders(n, None, seed), documents.lengths)
    sampler = ChunkSampler(dataset, rows, seed)
    collate = DynamicChunkingCollator(tokenizer, n, pad_to_multiple_of=n, seed=seed)
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": flags["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=flags["learning_rate"], betas=(0.9, flags["adam_beta2"]))
    schedule = get_cosine_schedule_with_warmup(optimizer, round(flags["warmup_steps"] * steps), steps)
    log, recent, order = [], [], iter(sampler)
    for step in range(1, steps + 1):
        batch = collate([dataset[row] for row in islice(order, rows)])
        ids_BT, labels_BT = batch["input_ids"].to(device), batch["labels"].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits_BTV = model(ids_BT)
        loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), flags["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.detach())
        if step % flags["logging_steps"] == 0 or step == steps:
            log.append([step, round(torch.stack(recent).mean().item(), 4), None])
            recent = []
    return log


def validation_rows(folder: Path, seq_length: int) -> Tensor:
    """[rows, seq_length] of the start of the validation text."""
    ids = TokenStore(folder).ids
    rows = min(PREFIX_ROWS, len(ids) // seq_length)
    if not rows:
        raise InputError(f"the validation text must have a row of {seq_length} tokens")
    return torch.from_numpy(ids[: rows * seq_length].astype("int64")).view(rows, seq_length)


@torch.no_grad()
def losses_with_and_without_future(predict: Callable[[Tensor], Tensor], rows_BT: Tensor) -> dict[str, Any]:
    """Losses at the same places of whole rows and of rows that end before them: equal, unless the model leaks.

    Args:
        predict: logits [B, T, V] of ids [B, T].
    """
    lengths = prefix_lengths(rows_BT.shape[1])
    return {
        "whole_rows": whole_row_loss(predict, rows_BT, lengths),
        "left_to_right": left_to_right_loss(predict, rows_BT, lengths),
        "places": len(lengths) * len(rows_BT),
    }


def prefix_lengths(seq_length: int) -> list[int]:
    """Evenly over the row, the longest one token short of it."""
    return sorted({max(1, round(part * (seq_length - 1) / PREFIXES)) for part in range(1, PREFIXES + 1)})


def left_to_right_loss(predict: Callable[[Tensor], Tensor], rows_BT: Tensor, lengths: Sequence[int]) -> float:
    """Mean loss, nats, of the token at t from a row that ends before it, for every t of ``lengths``."""
    losses = [
        F.cross_entropy(predict(some_BT[:, :t])[:, -1].float(), some_BT[:, t], reduction="none")
        for t in lengths
        for some_BT in rows_BT.split(ROWS_AT_ONCE)
    ]
    return torch.cat(losses).mean().item()


def whole_row_loss(predict: Callable[[Tensor], Tensor], rows_BT: Tensor, lengths: Sequence[int]) -> float:
    """Mean loss of the same tokens as a training measures it: from one pass over whole rows."""
    places = torch.tensor(lengths, device=rows_BT.device)
    logits = torch.cat([predict(some_BT)[:, places - 1] for some_BT in rows_BT.split(ROWS_AT_ONCE)])
    return F.cross_entropy(logits.flatten(0, 1).float(), rows_BT[:, places].flatten()).item()
