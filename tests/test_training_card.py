"""The model card: every number of the run, metadata that the Hub accepts, code that runs as it is printed."""

import json
import re

import pytest
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, TrainingArguments

from linpass import LinformerConfig, LinformerForCausalLM, LinformerForMaskedLM
from linpass.training.card import (
    Corpus,
    RunFacts,
    architecture_rows,
    hyperparameter_rows,
    package_versions,
    write_card,
)
from linpass.training.tokenization import train_tokenizer


def facts(**changes):
    """The facts of a run in which no two numbers are alike."""
    values = {
        "name": "final_model",
        "parameters": 1_234_567,
        "seq_length": 640,
        "corpora": [
            Corpus(name="openwebtext", documents=8_013, tokens=9_000_001, on_hub=True),
            Corpus(name="book.txt", documents=1, tokens=77_003),
        ],
        "tokens_seen": 27_231_012,
        "validation_tokens": 51_113,
        "train_loss": 3.2109,
        "validation_loss": 3.5417,
        "bits_per_byte": 1.2345,
        "baselines": {"unigram": 388.61, "bigram": 59.62},
        "steps": 14_015,
        "epochs": 2.5,
        "seconds": 4_000.0,
        "tokens_per_second": 6_807.9,
        "hardware": "1 × NVIDIA H200",
        "hyperparameters": {"learning rate (peak)": 3.1e-4, "seed": "20261"},
        "architecture": {"depth": 19, "slots per sequence (`k`)": [64, 96], "tied embeddings": True},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    }
    return RunFacts(**{**values, **changes})


def read(folder, **changes):
    path = write_card(folder, facts(**changes))
    return path.read_text(encoding="utf-8"), ModelCard.load(path)


def test_every_number_of_the_run_is_in_the_card(tmp_path):
    text = read(tmp_path)[1].text
    data_numbers = ("8,013", "9,000,001", "77,003", "27,231,012", "51,113")
    results = ("3.2109", "3.5417", "34.53", "1.2345", "388.61", "59.62")
    training = ("14,015", "2.5", "1:06:40", "6,808", "1 × NVIDIA H200", "0.00031", "20261", "torch 2.13.0")
    for number in (*data_numbers, *results, *training, "1,234,567", "| depth | 19 |", "64, 96", "640"):
        assert number in text, number
    for name in ("openwebtext", "book.txt", "arXiv:2006.04768"):
        assert name in text


def test_metadata_says_what_the_hub_asks_for(tmp_path):
    card = read(tmp_path)[1].data
    assert card.to_dict()["library_name"] == "transformers"
    assert card.pipeline_tag == "text-generation"
    assert card.tags == ["linpass", "linformer"]
    assert card.datasets == ["openwebtext"]  # the file is no data set of the Hub
    assert card.license is None
    assert card.language is None
    assert card.model_name == "final_model"
    measured = {result.metric_type: result.metric_value for result in card.eval_results}
    assert measured == {"loss": 3.5417, "perplexity": pytest.approx(34.5255, rel=1e-5), "bits_per_byte": 1.2345}
    assert {result.task_type for result in card.eval_results} == {"text-generation"}


def test_what_is_known_of_language_licence_and_data_set_is_said(tmp_path):
    corpora = [Corpus(name="roneneldan/TinyStories", on_hub=True)]
    card = read(tmp_path, language=["en"], license="mit", corpora=corpora, bits_per_byte=None, baselines={})[1]
    assert (card.data.language, card.data.license) == (["en"], "mit")
    assert {result.dataset_type for result in card.data.eval_results} == {"roneneldan/TinyStories"}
    assert "bits per byte" not in card.text
    assert "bigram" not in card.text


def test_a_loss_without_a_finite_perplexity_is_still_a_card(tmp_path):
    card = read(tmp_path, validation_loss=1e4)[1]
    assert [result.metric_type for result in card.data.eval_results] == ["loss", "bits_per_byte"]
    assert "| inf" in card.text.replace("*", "")


def test_pictures_and_logs_are_shown_when_they_are_there(tmp_path):
    assert "training_log.jsonl" not in read(tmp_path)[0]
    assert "training_loss_plot.png" not in read(tmp_path)[0]
    (tmp_path / "training_log.jsonl").touch()
    (tmp_path / "training_loss_plot.png").touch()
    text = read(tmp_path)[0]
    assert re.search(r"!\[[^]]+\]\(training_loss_plot\.png\)", text)
    assert "(training_log.jsonl)" in text


@pytest.fixture(scope="module")
def any_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cards")


@settings(deadline=None, max_examples=40)
@given(name=st.text(st.characters(), min_size=1), on_hub=st.booleans())
@example(name="a|b`c\n---\n[d](e): <f> # \udcff", on_hub=False)  # \udcff: a byte of a file name that is no UTF-8
def test_no_name_breaks_the_card(any_folder, name, on_hub):
    corpora = [Corpus(name=f"of {name}", documents=5, tokens=6, on_hub=on_hub)]
    card = read(any_folder, name=f"of {name}", corpora=corpora, sample=name)[1]
    kept = " ".join(f"of {name}".encode("utf-8", "replace").decode().split())
    assert card.data.model_name == kept
    assert card.data.datasets == ([kept] if on_hub else None)
    row = next(line for line in card.text.split("\n") if line.endswith("| 5 | 6 |"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 4


def test_many_corpora_are_counted_not_listed(tmp_path):
    text = read(tmp_path, corpora=[Corpus(name=f"part-{n}.txt") for n in range(1_500)])[0]
    assert "`part-19.txt`" in text
    assert "`part-20.txt`" not in text
    assert "and 1,480 more" in text


def test_the_configurations_sizes_are_rows():
    causal = architecture_rows(LinformerConfig(embed_dim=96, depth=3, heads=6, seq_length=256, k=64, rank=None))
    assert (causal["width"], causal["depth"], causal["heads"], causal["sequence length"]) == (96, 3, 6, 256)
    assert causal["slots per sequence (`k`)"] == 64
    assert causal["exact tokens (`window_size`)"] == 128
    assert causal["rank of the feed-forward layer"] == "dense"
    assert "exact tokens (`window_size`)" not in architecture_rows(LinformerConfig(causal=False))
    for config in (GPT2Config(n_embd=96, n_layer=3, n_head=6), LlamaConfig(hidden_size=96, num_hidden_layers=3)):
        rows = architecture_rows(config)
        assert (rows["type"], rows["width"], rows["depth"]) == (config.model_type, 96, 3)
        assert not [name for name in rows if "slots" in name or "projection" in name]


def test_the_trainers_settings_are_rows():
    arguments = TrainingArguments(
        learning_rate=2e-4, per_device_train_batch_size=6, gradient_accumulation_steps=4, seed=12345, use_cpu=True
    )
    rows = hyperparameter_rows(arguments)
    assert rows["learning rate (peak)"] == 2e-4
    assert rows["sequences per step"] == 24
    assert rows["schedule"] == "linear"
    assert rows["precision"] == "float32"
    assert rows["seed"] == "12345"
    assert package_versions().keys() >= {"linpass", "torch", "transformers"}


def code_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_code_of_a_causal_card_runs(build, tiny_config, tmp_path, monkeypatch, capsys):
    tokenizer = train_tokenizer(["The object is. " * 20], 300)
    build(LinformerForCausalLM, tiny_config(vocab_size=300)).save_pretrained(tmp_path / "final_model")
    tokenizer.save_pretrained(tmp_path / "final_model")
    text = read(tmp_path / "final_model", seq_length=32)[0]
    monkeypatch.chdir(tmp_path)
    blocks = code_blocks(text)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
        assert capsys.readouterr().out.startswith("The")
    assert "trust_remote_code=True" in blocks[1]


def test_the_code_of_an_encoders_card_runs(build, tiny_config, tmp_path, monkeypatch, capsys):
    tokenizer = train_tokenizer(["The object is. " * 20], 299)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    model = build(LinformerForMaskedLM, tiny_config(vocab_size=300, causal=False))
    model.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    text, card = read(tmp_path / "encoder", name="encoder", seq_length=32, causal=False)
    assert card.data.pipeline_tag == "fill-mask"
    monkeypatch.chdir(tmp_path)
    for block in code_blocks(text):
        exec(block, {})
    assert "300])" in capsys.readouterr().out


def test_another_architecture_needs_no_linpass_to_load(tmp_path, monkeypatch, capsys):
    tokenizer = train_tokenizer(["The object is. " * 20], 300)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=8, n_layer=1, n_head=1, **ids))
    model.save_pretrained(tmp_path / "gpt")
    tokenizer.save_pretrained(tmp_path / "gpt")
    rows = architecture_rows(model.config)
    text, card = read(tmp_path / "gpt", name="gpt", model_type="gpt2", seq_length=32, architecture=rows)
    assert card.data.tags == ["linpass", "gpt2"]
    assert "linformer" not in card.text.lower()
    assert "trust_remote_code" not in text
    assert "import linpass" not in text
    monkeypatch.chdir(tmp_path)
    for block in code_blocks(text):
        exec(block, {})
        assert capsys.readouterr().out.startswith("The")


def test_a_pushed_model_is_loaded_from_its_name_and_branch(tmp_path):
    text = read(tmp_path, repo_id="somebody/tiny", revision="trial")[0]
    calls = re.findall(r'(?:from_pretrained\(|model=)"([^"]+)", revision="([^"]+)"', text)
    assert calls == [("somebody/tiny", "trial")] * 3
    assert json.dumps("./final_model") not in text
