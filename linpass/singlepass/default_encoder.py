"""The default encoder of single-pass training: a small bidirectional Linformer, trained on the spot by masked tokens.

It reads the texts of the training rows, not their labels, takes under a minute on two cores, and is kept in the cache
folder under everything that it was made from. It makes the commands run without a download; for accuracy give
``--model`` an encoder that was trained on more text than that.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from linpass import LinformerConfig, LinformerForMaskedLM
from linpass.training.collators import IGNORED, DynamicChunkingCollator
from linpass.training.tokenization import train_tokenizer

# Chosen by a ridge head on held-out training rows of the default text, for under a minute of two cores. With so few
# steps a wide embedding of few tokens tells more than deep layers, and Python's own text besides tells less.
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 1024,
    "embed_dim": 512,
    "depth": 1,
    "heads": 4,
    "seq_length": 128,
    "k": 32,
    "causal": False,
    "position_embedding": "rotary",
    "intermediate_size": 128,
    "rank": None,
    "attention_rank": 32,
    "dropout": 0.0,
    "tie_word_embeddings": True,
}
STEPS, ROWS, PEAK_LEARNING_RATE, WARMUP, SEED = 300, 16, 2e-3, 0.1, 42


def default_encoder(texts: Sequence[str], cache: Path, quiet: bool = False) -> Path:
    """The folder of an encoder and its tokenizer that has read ``texts``: from ``cache`` if it is there, else trained.

    Args:
        texts: of the training rows only; what is measured on must not have been read.
        quiet: no progress bar.
    """
    digest = hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=12)
    versions = [(name, version(name)) for name in ("torch", "transformers", "tokenizers")]
    own_source = hashlib.blake2b(Path(__file__).read_bytes()).hexdigest()
    digest.update(json.dumps([versions, ARCHITECTURE, STEPS, own_source]).encode())
    folder = cache / f"encoder-{digest.hexdigest()}"
    if not (folder / "config.json").is_file():
        model, tokenizer = train_encoder(texts, ARCHITECTURE, STEPS, quiet)
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=cache))
        try:
            model.model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            with suppress(OSError):  # another run was faster
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def train_encoder(
    documents: Sequence[str],
    architecture: dict[str, Any],
    steps: int,
    quiet: bool = False,
) -> tuple[LinformerForMaskedLM, PreTrainedTokenizerBase]:
    """A bidirectional Linformer trained on the masked tokens of ``documents``, and its tokenizer.

    The documents are one stream of tokens, cut in rows of ``seq_length`` whose order is drawn anew in each pass. AdamW,
    one cycle of the learning rate; the generator of torch is left as it was. One seed gives one result on one machine.
    """
    tokenizer = train_tokenizer(documents, architecture["vocab_size"], mask=True)
    special: Any = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = LinformerConfig(**architecture | special)
    tokenizer.model_max_length = config.seq_length
    rows_NT = _token_rows(documents, tokenizer, config.seq_length)
    collator = DynamicChunkingCollator(tokenizer, config.seq_length, objective="masked", seed=SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LinformerForMaskedLM(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, PEAK_LEARNING_RATE, total_steps=steps, pct_start=WARMUP, cycle_momentum=False
        )
        order = np.random.default_rng(SEED)
        waiting = np.empty(0, dtype=np.int64)
        for step in tqdm(range(steps), desc="training the default encoder", unit=" steps", disable=quiet):
            if len(waiting) < ROWS:
                waiting = order.permutation(len(rows_NT))
                collator.set_epoch(step)  # other tokens are masked in each pass
            chosen, waiting = waiting[:ROWS], waiting[ROWS:]
            batch = collator([{"input_ids": rows_NT[number]} for number in chosen])
            _masked_loss(model, **batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval(), tokenizer


def _masked_loss(model: LinformerForMaskedLM, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """The model's own loss; logits of the masked tokens only, which are few."""
    hidden = model.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    chosen = labels != IGNORED
    return F.cross_entropy(model.lm_head(hidden[chosen]), labels[chosen])


def _token_rows(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_length: int) -> NDArray[np.int64]:
    encoded = tokenizer(
        list(documents),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    stream = np.fromiter((token for ids in encoded for token in (*ids, tokenizer.eos_token_id)), dtype=np.int64)
    rows = max(1, len(stream) // seq_length)
    return np.resize(stream, (rows, seq_length))  # a text shorter than a row is repeated
