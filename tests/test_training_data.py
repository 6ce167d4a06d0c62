"""Documents, their split, the tokenizer and the chunks."""

import gzip
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linpass.errors import InputError
from linpass.training import data
from linpass.training.arguments import DataArguments


@pytest.fixture(scope="module")
def documents():
    return data.load_documents(DataArguments(max_documents=30))


@pytest.fixture(scope="module")
def tokenizer(documents):
    return data.train_tokenizer(documents, 400)


def test_python_documents_are_english_in_a_fixed_order(documents):
    assert documents == data.load_documents(DataArguments(max_documents=30))
    assert len(documents) == len(set(documents)) == 30
    assert sum(document.count(" the ") for document in documents) > 200


def test_docstrings_are_read_without_running_the_source(tmp_path):
    source = tmp_path / "module.py"
    source.write_text('"""Top."""\nraise RuntimeError\ndef f():\n    """Inner\n    text."""\n', encoding="utf-8")
    assert data._docstrings(source) == ["Top.", "Inner\ntext."]
    source.write_text("def broken(:\n", encoding="utf-8")
    assert data._docstrings(source) == []


@given(st.lists(st.text(min_size=1), min_size=1, max_size=60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_split_loses_nothing_and_repeats_nothing(documents, fraction, seed):
    train, validation = data.split_documents(documents, fraction, seed)
    assert (train, validation) == data.split_documents(documents, fraction, seed)
    if len(train) == len(validation) == len(documents) and round(fraction * len(documents)) in (0, len(documents)):
        assert [a + b for a, b in zip(train, validation, strict=True)] == documents
    else:
        assert sorted(train + validation) == sorted(documents)
        assert len(validation) == round(fraction * len(documents))


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    texts = ["Wörld one.", "Second\ndocument."]
    lines = "".join(json.dumps({"body": text}) + "\n" for text in [texts[0], "", texts[1]]).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    parquet.write_table(pyarrow.table({"body": texts, "n": [1, 2]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        assert list(data.file_documents([str(tmp_path / name)], "body")) == texts, name

    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + texts[1].encode())  # a byte order mark is not text
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(texts[1].encode()))
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(texts[1].encode()))
    for name in ("a.txt", "a.txt.gz", "a.txt.zst"):
        assert list(data.file_documents([str(tmp_path / name)], "text")) == [texts[1]], name


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_tokenizer_writes_every_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_tokenizer_has_one_special_token(tokenizer):
    assert len(tokenizer) == 400
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == data.END_OF_TEXT
    assert set(tokenizer("The")) == {"input_ids", "attention_mask"}
    with pytest.raises(InputError, match="vocab_size=256 must be at least 257"):
        data.train_tokenizer(["text"], 256)


def test_tokenizer_with_more_ids_than_the_model(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert len(data.load_tokenizer(str(tmp_path), 400)) == 400
    with pytest.raises(InputError, match="vocab_size=399 must be at least 400, the ids of tokenizer="):
        data.load_tokenizer(str(tmp_path), 399)


def test_chunks_are_the_documents_with_ends_between(tokenizer):
    texts = ["One document.", "Another one, longer than the first.", "Third."]
    chunks = data.chunk_documents(texts, tokenizer, 8, "training")
    whole = data.END_OF_TEXT.join([*texts, ""])
    tokens = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert chunks.flatten().tolist() == tokens[: len(tokens) // 8 * 8]
    item = data.ChunkDataset(chunks)[1]
    assert torch.equal(item["input_ids"], chunks[1])
    assert torch.equal(item["labels"], chunks[1])


def test_too_little_text(tokenizer):
    with pytest.raises(InputError, match="seq_length=100 must be at most the 4 tokens of the validation text"):
        data.chunk_documents(["abc"], data.train_tokenizer(["xyz"], 257), 100, "validation")
