"""Documents from Python, files and data sets; the tokenizer; token ids on disk."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from linpass.errors import InputError
from linpass.training import documents as sources
from linpass.training import tokenization
from linpass.training.documents import PythonText, TextFiles, file_documents, open_dataset
from linpass.training.tokenization import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from linpass.training.tokens import FACTS, IDS, TokenDocuments, TokenStore, stored, validation_mask


@pytest.fixture(scope="module")
def texts():
    return list(PythonText(max_documents=30))


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, 400)


def files(folder, **contents):
    for name, lines in contents.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return tuple(str(folder / f"{name}.jsonl") for name in contents)


def test_python_documents_are_english_in_a_fixed_order(texts):
    assert texts == list(PythonText(max_documents=30))
    assert len(texts) == len(set(texts)) == 30
    assert sum(text.count(" the ") for text in texts) > 200


def test_docstrings_are_read_without_running_the_source(tmp_path):
    source = tmp_path / "module.py"
    source.write_text('"""Top."""\nraise RuntimeError\ndef f():\n    """Inner\n    text."""\n', encoding="utf-8")
    assert sources._docstrings(source) == ["Top.", "Inner\ntext."]
    source.write_text("def broken(:\n", encoding="utf-8")
    assert sources._docstrings(source) == []


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
        assert list(file_documents([str(tmp_path / name)], "body")) == texts, name

    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + texts[1].encode())  # a byte order mark is not text
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(texts[1].encode()))
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(texts[1].encode()))
    for name in ("a.txt", "a.txt.gz", "a.txt.zst"):
        assert list(file_documents([str(tmp_path / name)], "text")) == [texts[1]], name


def test_binary_files_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text\0more")
    with pytest.raises(InputError, match="a.txt' must be text: it holds a NUL character at 4"):
        list(file_documents([str(tmp_path / "a.txt")], "text"))
    (path,) = files(tmp_path, b=[{"text": "fine"}, {"text": "a\0b"}])
    with pytest.raises(InputError, match="line 2 must be text: it holds a NUL"):
        list(file_documents([path], "text"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_in_a_folder(tmp_path, streaming):
    pytest.importorskip("datasets")
    files(tmp_path, a=[{"body": "one"}, {"body": " "}, {"body": "two"}, {"body": "three"}])
    corpus = open_dataset(str(tmp_path), "train", "body", streaming)
    assert list(corpus) == list(corpus) == ["one", "two", "three"]
    assert corpus.count() == (None if streaming else 4)
    before = corpus.fingerprint()
    assert before == open_dataset(str(tmp_path), "train", "body", streaming).fingerprint()
    assert before != open_dataset(str(tmp_path), "train", "body", streaming, max_documents=1).fingerprint()
    files(tmp_path, a=[{"body": "other"}])
    assert before != open_dataset(str(tmp_path), "train", "body", streaming).fingerprint()


def test_data_sets_that_cannot_be_used(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    files(tmp_path, a=[{"body": "one"}])
    with pytest.raises(InputError, match="must have the column text_column='text'; there is: body"):
        open_dataset(str(tmp_path), "train", "text")
    with pytest.raises(InputError, match="could not be loaded: .*test"):
        open_dataset(str(tmp_path), "test", "body")
    with pytest.raises(InputError, match="is a file; use --text_files"):
        open_dataset(str(tmp_path / "a.jsonl"), "train", "body")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="datasets='openwebtext' could not be reached, is there a network?"):
        open_dataset("openwebtext", "train", "text")
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package datasets: pip install"):
        open_dataset(str(tmp_path), "train", "body")


def test_a_repository_with_a_loading_script_is_read_from_its_parquet_conversion(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, configuration, split, streaming, revision):
        asked.append((path, configuration, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found bookcorpus.py")
        return datasets.Dataset.from_dict({"text": ["A sentence."]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(open_dataset("bookcorpus:plain_text", "train", "text")) == ["A sentence."]
    assert asked == [("bookcorpus/bookcorpus", "plain_text", r) for r in (None, "refs/convert/parquet")]


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_tokenizer_writes_every_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_tokenizer_has_one_special_token_and_a_mask_where_asked(tokenizer, texts):
    assert len(tokenizer) == 400
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == tokenization.END_OF_TEXT
    assert tokenizer.mask_token is None
    assert set(tokenizer("The")) == {"input_ids", "attention_mask"}
    assert train_tokenizer(texts, 400, mask=True).mask_token_id == 1
    for mask, least in ((False, 257), (True, 258)):
        with pytest.raises(InputError, match=f"vocab_size={least - 1} must be at least {least}"):
            train_tokenizer(["text"], least - 1, mask)


def test_a_loaded_tokenizer_must_fit_and_gets_a_mask_token(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path), 400)) == 400
    with pytest.raises(InputError, match="vocab_size=399 must be at least 400, the ids of tokenizer="):
        load_tokenizer(str(tmp_path), 399)
    masked = load_tokenizer(str(tmp_path), 400, mask=True)
    assert masked.mask_token_id == 400  # a new model has room for it


def test_the_fingerprint_of_a_tokenizer_is_of_what_it_does(tokenizer, texts, tmp_path):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "b"], padding=True, truncation=True, max_length=3)
    tokenizer.save_pretrained(tmp_path)
    assert before == tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(load_tokenizer(str(tmp_path), 400))
    assert before != tokenizer_fingerprint(train_tokenizer(texts, 401))


def test_ids_on_disk_are_the_tokenizers_with_an_end_after_each_document(tokenizer, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("linpass.training.tokens.BATCH_DOCUMENTS", 7)
    store = stored(PythonText(max_documents=30), tokenizer, tmp_path, quiet=True)
    assert len(store) == 30
    for ids, text in zip(store, texts, strict=True):
        assert ids.tolist() == [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    assert store.facts["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert store.facts["tokens"] == sum(map(len, store))


def test_ids_are_computed_once_and_again_when_the_text_changes(tokenizer, tmp_path, monkeypatch):
    paths = files(tmp_path, a=[{"text": "one"}, {"text": "two"}])
    corpus = TextFiles(paths=paths)
    first = stored(corpus, tokenizer, tmp_path / "cache", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(TextFiles, "_read", lambda self: pytest.fail("read again"))
        assert stored(corpus, tokenizer, tmp_path / "cache", quiet=True).folder == first.folder
        other = train_tokenizer(["other text"], 300)
        with pytest.raises(pytest.fail.Exception):
            stored(corpus, other, tmp_path / "cache", quiet=True)
    files(tmp_path, a=[{"text": "one"}, {"text": "new"}])
    assert stored(corpus, tokenizer, tmp_path / "cache", quiet=True).folder != first.folder


def test_a_store_is_complete_or_not_there(tokenizer, tmp_path):
    def broken(self):
        yield "one"
        raise InputError("the file ends in the middle")

    corpus = type("Broken", (PythonText,), {"_read": broken})()
    with pytest.raises(InputError, match="ends in the middle"):
        stored(corpus, tokenizer, tmp_path, quiet=True)
    assert not list(tmp_path.iterdir())
    blank = type("Blank", (PythonText,), {"_read": lambda self: iter([" ", "\n"])})()
    with pytest.raises(InputError, match="every document is empty"):
        stored(blank, tokenizer, tmp_path, quiet=True)
    store = stored(PythonText(max_documents=3), tokenizer, tmp_path, quiet=True)
    with open(store.folder / IDS, "ab") as file:
        file.truncate(10)
    with pytest.raises(InputError, match="must be complete"):
        TokenStore(store.folder)
    (store.folder / FACTS).unlink()
    with pytest.raises(InputError, match="must be a folder of token ids"):
        TokenStore(store.folder)


def test_many_ids_need_four_bytes(tmp_path):
    class Big:
        eos_token_id = 99_999
        get_vocab = staticmethod(lambda: {"a": 99_999})

        def __len__(self):
            return 100_000

        def __call__(self, texts, **options):
            return {"input_ids": [[70_000] * len(text) for text in texts]}

    assert stored(PythonText(max_documents=1), Big(), tmp_path, quiet=True)[0][-2:].tolist() == [70_000, 99_999]


@given(st.integers(1, 40), st.floats(0.01, 0.99), st.integers(0, 5))
def test_split_loses_nothing_and_repeats_nothing(tokenizer, count, fraction, seed):
    store = MemoryStore([np.arange(100 * d, 100 * d + 5 + d) for d in range(count)])
    train, validation = TokenDocuments.of([store]).split(fraction, seed)
    mask = validation_mask(count, fraction, seed)
    parts = sorted([ids.tolist() for part in (train, validation) for ids in part])
    if mask is None:
        assert sum(parts, []) == sorted(token for ids in store for token in ids.tolist())
        assert int(validation.lengths.sum()) == sum(5 + d - round((5 + d) * (1 - fraction)) for d in range(count))
    else:
        assert parts == [ids.tolist() for ids in store]
        assert [ids[0] // 100 for ids in validation] == np.flatnonzero(mask).tolist()
        assert len(validation) == round(fraction * count)


def test_each_corpus_is_split_by_itself():
    stores = [MemoryStore([np.full(9, c)] * size) for c, size in ((1, 40), (2, 10))]
    train, validation = TokenDocuments.of(stores).split(0.1, 0)
    assert [sum(ids[0] == c for ids in validation) for c in (1, 2)] == [4, 1]
    assert [sum(ids[0] == c for ids in train) for c in (1, 2)] == [36, 9]


class MemoryStore(TokenStore):
    """A store without files."""

    def __init__(self, documents):
        self.ids, self.ends = np.concatenate(documents), np.cumsum([len(ids) for ids in documents])
