"""Documents to batches: chunks, noise, padding or packing, and labels that are right under all of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, TrainerCallback

from linpass.errors import InputError
from linpass.training.arguments import NOISE_TARGETS, OBJECTIVES
from linpass.training.sampling import ChunkBorders, chunk_count, draw, pack

IGNORED = -100  # label of a place that is not scored
# Of the tokens chosen for the masked objective (Devlin et al. 2019, BERT, section 3.1): 80 % are masked, 10 % replaced.
MASKED, REPLACED = 0.8, 0.1


class DynamicChunkingCollator(TrainerCallback):
    r"""Cuts documents into chunks of at most ``seq_length`` tokens, adds noise, and makes a batch of them.

    It takes documents from any dataset (``{"input_ids": [...]}``, all chunks of each) or chunks from a
    :class:`~linpass.training.sampling.ChunkDataset` (one row an item, so that batches have a fixed number of rows).
    Borders and noise are drawn anew each epoch, as a function of (seed, epoch, document, chunk) alone; documents that
    come without a number are told apart by 64 of their tokens, so that two equal ones get equal draws. In a plain
    Trainer script pass it as ``data_collator`` and in ``callbacks`` too: that is how it learns the epoch (workers that
    persist do not learn it).

    *Noise.* Each token is deleted with ``deletion_probability``, then neighbours are swapped with
    ``swap_probability``. For :math:`x_p`, the token of the clean text at p that stands at t of the noised input, the
    label that a causal model is scored on at t is :math:`x_{p+1}` (``noise_target="clean"``: recover the text) or the
    next token of the noised input (``"noised"``: learn the noise). Of a swapped pair the second token's clean
    successor stands before it: clean targets teach to undo the order.

    *Masked objective.* Each token is chosen with ``mask_probability``; its label is itself, and it is replaced by the
    mask token (80 %), a random token (10 %) or nothing.

    *Padding* is on the right, has attention mask 0 and label -100, whatever its id. With ``packing`` chunks share rows,
    each starting at a multiple of ``block_size``, and ``document_ids`` tells the model which tokens belong together.

    Args:
        tokenizer: for its pad, mask and special ids; not kept.
        seq_length: most tokens of a row.
        chunks_per_document: None: ⌈length / seq_length⌉; m: at most m, each from a random place.
        packing: see above; for causal Linformers.
        block_size: of the model, tokens; with ``packing``.
        pad_to_multiple_of: rows are as long as the longest of the batch, rounded up to this, at most ``seq_length``.

    Returns (when called):
        ``input_ids``, ``attention_mask``, ``labels``, each int64 [rows, tokens], and ``document_ids`` when packed. The
        first label of each document is -100: nothing before it predicts it.

    Raises:
        InputError: a probability outside [0, 1], an unknown objective or target, a tokenizer without the token needed.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        seq_length: int,
        *,
        objective: str = "causal",
        chunks_per_document: int | None = None,
        packing: bool = False,
        block_size: int = 1,
        deletion_probability: float = 0.0,
        swap_probability: float = 0.0,
        noise_target: str = "clean",
        mask_probability: float = 0.15,
        pad_to_multiple_of: int = 64,
        seed: int = 0,
    ) -> None:
        probabilities = {
            "deletion_probability": deletion_probability,
            "swap_probability": swap_probability,
            "mask_probability": mask_probability,
        }
        for name, value in probabilities.items():
            if not 0 <= value <= 1:
                raise InputError(f"{name}={value} must be a probability, 0 to 1")
        if seq_length < 2:
            raise InputError(f"seq_length={seq_length} must be 2 or more: a token and the one that it predicts")
        if chunks_per_document is not None and chunks_per_document < 1:
            raise InputError(f"chunks_per_document={chunks_per_document} must be 1 or more, or none")
        if pad_to_multiple_of < 1:
            raise InputError(f"pad_to_multiple_of={pad_to_multiple_of} must be 1 or more")
        if packing and (block_size < 1 or seq_length % block_size):
            raise InputError(f"block_size={block_size} must divide seq_length={seq_length}")
        if objective not in OBJECTIVES:
            raise InputError(f"objective={objective!r} must be one of {', '.join(OBJECTIVES)}")
        if noise_target not in NOISE_TARGETS:
            raise InputError(f"noise_target={noise_target!r} must be one of {', '.join(NOISE_TARGETS)}")
        if objective == "masked" and tokenizer.mask_token_id is None:
            raise InputError("objective='masked' needs a tokenizer with a mask_token")
        if packing and objective == "masked":
            raise InputError("packing=True must be False with objective='masked': an encoder sees the whole row")
        pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise InputError("the tokenizer must have a pad_token or an eos_token")
        self.pad_token_id = int(pad)
        self.mask_token_id: Any = tokenizer.mask_token_id  # None only where nothing is masked
        self.special_ids = np.array(sorted(set(tokenizer.all_special_ids)))
        self.vocab_size = len(tokenizer)
        self.seq_length, self.objective, self.noise_target = seq_length, objective, noise_target
        self.packing, self.block_size = packing, block_size if packing else 1
        self.deletion_probability, self.swap_probability = deletion_probability, swap_probability
        self.mask_probability, self.pad_to_multiple_of, self.seed = mask_probability, pad_to_multiple_of, seed
        self.borders = ChunkBorders(seq_length, chunks_per_document, seed)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch of documents that do not carry theirs."""
        self.epoch = epoch

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.set_epoch(int(state.epoch or 0))

    def __call__(self, features: Sequence[Any]) -> dict[str, torch.Tensor]:
        rows = [[self._chunk(**chunk) for chunk in row] for row in self._rows(features)]
        longest = max(sum(self._padded(len(ids)) for ids, _labels in row) for row in rows)
        width = min(-(-max(longest, 1) // self.pad_to_multiple_of) * self.pad_to_multiple_of, self.seq_length)
        input_ids = np.full((len(rows), width), self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        labels = np.full_like(input_ids, IGNORED)
        document_ids = np.zeros_like(input_ids)
        for row, chunks in enumerate(rows):
            start = 0
            for number, (ids, targets) in enumerate(chunks):
                place = slice(start, start + len(ids))
                input_ids[row, place], attention_mask[row, place], labels[row, place] = ids, 1, targets
                document_ids[row, start:] = number
                start += self._padded(len(ids))
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if self.packing:
            batch["document_ids"] = document_ids
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _padded(self, length: int) -> int:
        return -(-length // self.block_size) * self.block_size

    def _rows(self, features: Sequence[Any]) -> list[list[dict[str, Any]]]:
        """Rows of chunks: those of a ChunkDataset as they are, documents cut into all their chunks."""
        rows, loose = [], []
        for feature in features:
            if not isinstance(feature, dict):
                rows.append(feature)
                continue
            ids = np.asarray(feature["input_ids"], dtype=np.int64)
            if not len(ids):
                raise ValueError("a document must hold at least one token")
            # Its tokens stand in for the number of a document: shuffling changes no draw.
            document = int(draw(len(ids), *ids[:: max(1, len(ids) // 64)])) >> 1
            for chunk in range(int(chunk_count(len(ids), self.seq_length, self.borders.chunks_per_document))):
                span = self.borders.span(len(ids), self.epoch, document, chunk)
                loose.append({"input_ids": ids, "span": span, "draw": (self.epoch, document, chunk)})
        if self.packing and loose:
            lengths = [int(chunk["span"][1] - chunk["span"][0]) for chunk in loose]
            packed = pack(range(len(loose)), lengths, self.seq_length, self.block_size)
            return rows + [[loose[number] for number in row] for row in packed]
        return rows + [[chunk] for chunk in loose]

    def _chunk(
        self, input_ids: Any, span: tuple[int, int], draw: tuple[int, int, int] | None
    ) -> tuple[NDArray, NDArray]:
        """Inputs and labels of a chunk, each [tokens]; ``draw`` is None where nothing is random (validation)."""
        start, end = span
        clean = noised = np.asarray(input_ids[start:end], dtype=np.int64)
        kept = np.arange(len(clean))
        noisy = draw is not None and (self.deletion_probability or self.swap_probability)
        if noisy or self.objective == "masked":
            generator = self._generator(draw or (0, start, end))
            if noisy:
                kept = self._survivors(len(clean), generator)
                noised = clean[kept]
            if self.objective == "masked":
                return self._mask(noised, generator)
        labels = np.full_like(noised, IGNORED)
        if self.noise_target == "clean":
            after = np.full(len(clean), IGNORED, dtype=np.int64)  # nothing comes after the document's last token
            following = input_ids[start + 1 : end + 1]
            after[: len(following)] = following
            labels[1:] = after[kept[:-1]]
        else:
            labels[1:] = noised[1:]
        return noised, labels

    def _generator(self, key: tuple[int, int, int]) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=int(draw(self.seed + 1, *key))))

    def _survivors(self, length: int, generator: np.random.Generator) -> NDArray:
        """Where the tokens of the noised chunk stand in the clean one; one is always left."""
        kept = np.arange(length)
        if self.deletion_probability:
            stays = generator.random(length) >= self.deletion_probability
            kept = kept[stays] if stays.any() else kept[:1]
        if self.swap_probability:
            swaps = generator.random(len(kept) - 1) < self.swap_probability
            last = -2
            for place in np.flatnonzero(swaps):
                if place > last + 1:  # a token is moved once
                    kept[[place, place + 1]] = kept[[place + 1, place]]
                    last = place
        return kept

    def _mask(self, tokens: NDArray, generator: np.random.Generator) -> tuple[NDArray, NDArray]:
        chosen = (generator.random(len(tokens)) < self.mask_probability) & ~np.isin(tokens, self.special_ids)
        fate, other = generator.random(len(tokens)), generator.integers(0, self.vocab_size, len(tokens))
        inputs = np.where(chosen & (fate < MASKED), self.mask_token_id, tokens)
        inputs = np.where(chosen & (fate >= MASKED) & (fate < MASKED + REPLACED), other, inputs)
        return inputs, np.where(chosen, tokens, IGNORED)
