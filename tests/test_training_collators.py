"""Batches against a loop that noises and labels token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from linpass.errors import InputError
from linpass.training.collators import IGNORED, DynamicChunkingCollator
from linpass.training.sampling import ChunkBorders, ChunkDataset, ChunkSampler
from linpass.training.tokenization import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The text."], 300, mask=True)


def documents(seed=0, count=20, longest=200):
    generator = np.random.default_rng(seed)
    # every token of a document is another one, so that a token tells its place
    return [generator.permutation(np.arange(2, 298))[: generator.integers(2, longest)] for _ in range(count)]


def rows_of(batch):
    """Per row the real inputs and their labels; padding is checked on the way."""
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)  # padding on the right
        assert (labels[length:] == IGNORED).all()
        yield ids[:length].tolist(), labels[:length].tolist()


@given(st.integers(0, 50), st.integers(4, 64), st.sampled_from([1, 64]))
def test_without_noise_rows_are_the_document_and_labels_the_next_tokens(tokenizer, seed, seq_length, multiple):
    text = documents(seed, 3)
    collator = DynamicChunkingCollator(tokenizer, seq_length, seed=seed, pad_to_multiple_of=multiple)
    batch = collator([{"input_ids": ids.tolist()} for ids in text])
    assert batch["input_ids"].shape[1] <= seq_length
    rows = list(rows_of(batch))
    assert len(rows) == sum(-(-len(ids) // seq_length) for ids in text)
    whole = [ids.tolist() for ids in text]
    for ids, labels in rows:
        assert any(d[i : i + len(ids)] == ids for d in whole for i in range(len(d)))
        assert labels == [IGNORED, *ids[1:]]


def test_padding_is_told_by_the_mask_though_pad_is_eos(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    batch = DynamicChunkingCollator(tokenizer, 16)([{"input_ids": [5, 0, 6, 0]}, {"input_ids": [7, 0]}])
    assert batch["attention_mask"].sum(-1).tolist() == [4, 2]
    assert batch["labels"][0, :4].tolist() == [IGNORED, 0, 6, 0]
    assert batch["labels"][1].tolist() == [IGNORED, 0] + [IGNORED] * 14


@pytest.mark.parametrize("target", ["clean", "noised"])
@given(seed=st.integers(0, 200))
def test_labels_under_noise(tokenizer, target, seed):
    (text,) = documents(seed, 1, 60)
    options = {"deletion_probability": 0.3, "swap_probability": 0.3, "noise_target": target, "seed": seed}
    ((ids, labels),) = rows_of(DynamicChunkingCollator(tokenizer, 64, **options)([{"input_ids": text}]))
    clean = text.tolist()
    successor = dict(zip(clean, clean[1:], strict=False))
    assert set(ids) <= set(clean)
    assert len(set(ids)) == len(ids)
    for t in range(len(ids) - 1):
        expected = successor.get(ids[t], IGNORED) if target == "clean" else ids[t + 1]
        assert labels[t + 1] == expected  # a causal model's prediction at t is scored on the label at t + 1
    places = [clean.index(token) for token in ids]
    moved = [t for t in range(len(places) - 1) if places[t] > places[t + 1]]
    assert all(b - a > 1 for a, b in zip(moved, moved[1:], strict=False))  # a token is swapped once
    straight = sorted(places)
    assert all(abs(straight.index(place) - t) <= 1 for t, place in enumerate(places))


def test_noise_has_the_probabilities_asked_for(tokenizer):
    text = np.tile(np.arange(2, 258), 400)[None]
    for deletion in (0.0, 0.1, 1.0):
        collator = DynamicChunkingCollator(tokenizer, 200_000, deletion_probability=deletion)
        kept = int(collator([{"input_ids": text[0]}])["attention_mask"].sum())
        assert kept == pytest.approx(max(1, text.size * (1 - deletion)), rel=0.02)
    collator = DynamicChunkingCollator(tokenizer, 200_000, swap_probability=0.1)
    swapped = collator([{"input_ids": text[0]}])["input_ids"][0]
    backwards = (swapped[1:] - swapped[:-1] == -1).float().mean().item()
    assert backwards == pytest.approx(0.1 / 1.1, rel=0.05)  # a pair takes two places: swaps are a renewal process


def test_noise_is_drawn_anew_each_epoch_and_not_in_validation(tokenizer):
    text = documents(1, 5)
    options = {"deletion_probability": 0.2, "swap_probability": 0.2}
    collator = DynamicChunkingCollator(tokenizer, 300, **options)
    dataset = ChunkDataset(text, ChunkBorders(300))
    first, again, second = (collator([dataset[int(dataset.number(0, epoch))]])["input_ids"] for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert first.shape != second.shape or not torch.equal(first, second)
    fixed = ChunkDataset(text, ChunkBorders(300), random=False)
    assert collator([fixed[0]])["input_ids"][0, : len(text[0])].tolist() == text[0].tolist()


def test_a_plain_dataset_learns_its_epoch_from_the_callback(tokenizer):
    from transformers import TrainerControl, TrainerState, TrainingArguments

    collator = DynamicChunkingCollator(tokenizer, 16, chunks_per_document=1)
    features = [{"input_ids": ids} for ids in documents(0, 8)]
    first = collator(features)
    assert len(first["input_ids"]) == 8  # the seed's behaviour: one chunk a document
    arguments = TrainingArguments(output_dir="unused", use_cpu=True)
    collator.on_epoch_begin(arguments, TrainerState(epoch=1.0), TrainerControl())
    assert not torch.equal(first["input_ids"], collator(features)["input_ids"])
    collator.set_epoch(0)
    shuffled = collator(features[::-1])  # draws are of the document, not of its place
    assert torch.equal(first["input_ids"], shuffled["input_ids"].flip(0))


@given(st.integers(0, 30), st.sampled_from([4, 8]))
def test_packed_rows(tokenizer, seed, block):
    text = documents(seed, 12, 60)
    collator = DynamicChunkingCollator(tokenizer, 64, packing=True, block_size=block, seed=seed)
    batch = collator([{"input_ids": ids} for ids in text])
    found = []
    columns = (batch[name] for name in ("input_ids", "attention_mask", "labels", "document_ids"))
    for ids, mask, labels, owners in zip(*columns, strict=True):
        for owner in owners.unique().tolist():
            places = torch.nonzero((owners == owner) & (mask == 1)).flatten()
            assert int(places[0]) % block == 0
            assert places.tolist() == list(range(int(places[0]), int(places[-1]) + 1))
            assert labels[places].tolist() == [IGNORED, *ids[places[1:]].tolist()]
            found.append(tuple(ids[places].tolist()))
        assert (labels[mask == 0] == IGNORED).all()
    assert sorted(found) == sorted(tuple(ids.tolist()) for ids in text)


def test_a_row_of_padding(tokenizer):
    dataset = ChunkDataset(documents(), ChunkBorders(32))
    batch = DynamicChunkingCollator(tokenizer, 32)([dataset[0], dataset[()]])
    assert batch["attention_mask"][1].sum() == 0
    assert (batch["labels"][1] == IGNORED).all()


@pytest.mark.parametrize("packing", [False, True])
def test_the_same_batches_whatever_the_workers(tokenizer, packing):
    options = {"deletion_probability": 0.1, "swap_probability": 0.1, "packing": packing, "block_size": 4}
    dataset = ChunkDataset(documents(3), ChunkBorders(32, seed=7))
    runs = []
    for workers in (0, 2):
        sampler = ChunkSampler(dataset, 4, seed=7, pack_block=4 if packing else None)
        sampler.set_epoch(1)
        collator = DynamicChunkingCollator(tokenizer, 32, seed=7, **options)
        runs.append(list(DataLoader(dataset, 4, sampler=sampler, collate_fn=collator, num_workers=workers)))
    assert len(runs[0]) == len(runs[1]) > 3
    for one, other in zip(*runs, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_masked_objective(tokenizer):
    text = [np.concatenate((np.random.default_rng(d).integers(2, 298, 999), [0])) for d in range(200)]
    collator = DynamicChunkingCollator(tokenizer, 1000, objective="masked", mask_probability=0.2)
    batch = collator([{"input_ids": ids} for ids in text])
    clean = torch.from_numpy(np.stack(text))
    ids, labels = (batch[name][:, :1000] for name in ("input_ids", "labels"))
    scored = labels != IGNORED
    assert scored.float().mean().item() == pytest.approx(0.2, rel=0.02)
    assert torch.equal(labels[scored], clean[scored])
    assert torch.equal(ids[~scored], clean[~scored])
    assert not scored[:, -1].any()  # an end-of-text is no word to guess
    masked = (ids == tokenizer.mask_token_id)[scored].float().mean().item()
    same = (ids == clean)[scored].float().mean().item()
    assert masked == pytest.approx(0.8, rel=0.02)
    assert same == pytest.approx(0.1, rel=0.06)


def test_masks_of_validation_are_the_same_each_time(tokenizer):
    dataset = ChunkDataset(documents(), ChunkBorders(32), random=False)
    collator = DynamicChunkingCollator(tokenizer, 32, objective="masked")
    rows = [dataset[number] for number in range(len(dataset))]
    first, again = collator(rows), collator(rows)
    assert torch.equal(first["input_ids"], again["input_ids"])
    scored = (first["labels"] != IGNORED).float().sum() / first["attention_mask"].sum()
    assert 0.1 < scored < 0.2


def test_bad_input(tokenizer):
    for name in ("deletion_probability", "swap_probability", "mask_probability"):
        for value in (-0.1, 1.5):
            with pytest.raises(InputError, match=f"{name}={value} must be a probability"):
                DynamicChunkingCollator(tokenizer, 32, **{name: value})
    plain = train_tokenizer(["The text."], 300)
    assert isinstance(plain, PreTrainedTokenizerFast)
    for options, message in (
        ({"objective": "masked"}, "needs a tokenizer with a mask_token"),
        ({"objective": "other"}, "objective='other' must be one of causal, masked"),
        ({"noise_target": "other"}, "noise_target='other' must be one of clean, noised"),
        ({"chunks_per_document": 0}, "chunks_per_document=0 must be 1 or more"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0 must be 1 or more"),
        ({"packing": True, "block_size": 5}, "block_size=5 must divide seq_length=32"),
    ):
        with pytest.raises(InputError, match=message):
            DynamicChunkingCollator(plain, 32, **options)
    with pytest.raises(InputError, match="packing=True must be False with objective='masked'"):
        DynamicChunkingCollator(tokenizer, 32, objective="masked", packing=True)
    with pytest.raises(ValueError, match="at least one token"):
        DynamicChunkingCollator(plain, 32)([{"input_ids": []}])
