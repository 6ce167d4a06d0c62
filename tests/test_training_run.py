"""Whole runs of `linpass train` and `linpass generate`."""

import json
import shutil
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

from linpass import LinformerForCausalLM
from linpass.cli import main
from linpass.errors import InputError
from linpass.training import data
from linpass.training.parser import TrainParser
from linpass.training.train import PLOT_NAME, train

PNG = b"\x89PNG\r\n\x1a\n"


def debug_run(folder, *flags):
    return train(*TrainParser().parse(["--preset", "debug", "--output_dir", str(folder / "final_model"), *flags]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder after `linpass train --preset debug`, and the result."""
    folder = tmp_path_factory.mktemp("run")
    return folder, debug_run(folder)


@pytest.fixture
def model_folder(finished):
    return str(finished[0] / "final_model")


def test_the_folder_holds_what_readers_need_and_nothing_else_is_left(finished):
    folder, _result = finished
    assert sorted(path.name for path in folder.iterdir()) == ["final_model", PLOT_NAME]
    names = {path.name for path in (folder / "final_model").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", PLOT_NAME}
    assert not [name for name in names if name.endswith((".bin", ".pt"))]
    assert (folder / PLOT_NAME).read_bytes().startswith(PNG)


def test_the_perplexity_is_of_the_saved_model_on_the_validation_text(finished, model_folder):
    model_arguments, data_arguments, training_arguments = TrainParser().parse(["--preset", "debug"])
    documents = data.load_documents(data_arguments)
    texts = data.split_documents(documents, data_arguments.validation_fraction, training_arguments.seed)[1]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    chunks = data.chunk_documents(texts, tokenizer, model_arguments.seq_length, "validation")
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    with torch.no_grad():
        log_probs = model(chunks).logits[:, :-1].log_softmax(-1)
    loss = -log_probs.gather(-1, chunks[:, 1:, None]).mean()
    assert finished[1].perplexity == pytest.approx(loss.exp().item(), rel=1e-4)
    assert finished[1].validation_tokens == chunks[:, 1:].numel()


def test_special_ids_are_the_tokenizers(model_folder):
    model = LinformerForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(model.config, name) == getattr(tokenizer, name) == 0
        assert getattr(model.generation_config, name) in (0, [0])  # transformers 5.17 stores eos_token_id as a list
    assert model.config.use_cache
    assert tokenizer.padding_side == "left"


def test_pipeline_on_a_padded_batch(model_folder):
    write = pipeline("text-generation", model=model_folder)
    alone = [write(text, max_new_tokens=5, do_sample=False)[0]["generated_text"] for text in ("The", "An object is")]
    batch = write(["The", "An object is"], batch_size=2, max_new_tokens=5, do_sample=False)
    assert [row[0]["generated_text"] for row in batch] == alone


def test_one_seed_gives_one_result_and_another_seed_another(finished, tmp_path):
    again = debug_run(tmp_path)
    assert again == finished[1]
    assert debug_run(tmp_path, "--seed", "7").perplexity != again.perplexity  # replaces the model of before


def test_own_text_and_own_tokenizer(tmp_path, model_folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"body": f"Line {n} of a small file about the number {n * n}. " * 8}) for n in range(60)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines), encoding="utf-8")
    flags = ["--preset", "debug", "--text_files", "own.jsonl", "--text_column", "body", "--tokenizer", model_folder]
    assert main(["train", *flags, "--epochs", "0.5"]) == 0
    assert "Validation perplexity" in capsys.readouterr().out
    assert (tmp_path / "final_model/config.json").is_file()
    assert (tmp_path / PLOT_NAME).is_file()


def test_a_tokenizer_too_large_is_refused_before_the_text_is_read(tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(data, "load_documents", lambda arguments: pytest.fail("read the text"))
    with pytest.raises(InputError, match="vocab_size=300 must be at least 384"):
        debug_run(tmp_path, "--tokenizer", model_folder, "--vocab_size", "300")
    assert not list(tmp_path.iterdir())


def test_checkpoints_stay_beside_and_a_run_resumes(tmp_path):
    flags = ["--save_strategy", "steps", "--save_steps", "20"]
    first = debug_run(tmp_path, *flags)
    checkpoint = tmp_path / "trainer_output/final_model/checkpoint-20"
    assert checkpoint.is_dir()
    resumed = debug_run(tmp_path, *flags, "--resume_from_checkpoint", str(checkpoint))
    assert resumed.perplexity == pytest.approx(first.perplexity, rel=1e-5)
    assert not list((tmp_path / "final_model").glob("checkpoint*"))


def test_a_run_that_stops_leaves_the_older_model(tmp_path, model_folder, monkeypatch):
    shutil.copytree(model_folder, tmp_path / "final_model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "final_model").iterdir()}

    def full_disk(self, folder):
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.Trainer.save_model", full_disk)
    with pytest.raises(OSError, match="No space left"):
        debug_run(tmp_path, "--epochs", "0.1", "--depth", "1")
    assert {path.name: path.read_bytes() for path in (tmp_path / "final_model").iterdir()} == before


def test_generate_streams_the_prompt_and_its_continuation(model_folder, capsys):
    flags = ["The object", "--max_new_tokens", "12", "--seed", "3"]
    assert main(["generate", model_folder, *flags]) == 0
    text = capsys.readouterr().out
    assert text.startswith("The object")
    assert len(text.rstrip("\n")) > len("The object")
    main(["generate", model_folder, *flags])
    assert capsys.readouterr().out == text
    main(["generate", model_folder, *flags[:-1], "4"])
    assert capsys.readouterr().out != text


def test_greedy_is_the_likeliest_token_each_time(model_folder, capsys):
    main(["generate", model_folder, "The object", "--max_new_tokens", "4", "--greedy"])
    model, tokenizer = LinformerForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer("The object", return_tensors="pt")["input_ids"]
    for _step in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert capsys.readouterr().out.strip("\n") == tokenizer.decode(ids[0]).strip("\n")


@pytest.fixture
def short_model(tmp_path, model_folder):
    """Another architecture, which holds 16 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=8, n_layer=1, n_head=1, **ids)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    return str(tmp_path / "short")


def test_generate_works_for_another_architecture_and_stops_when_it_is_full(short_model, capsys):
    assert main(["generate", short_model, "abc", "--max_new_tokens", "100"]) == 0
    assert capsys.readouterr().out.startswith("abc")


def test_generate_refuses_a_prompt_that_fills_the_model(short_model, capsys):
    assert main(["generate", short_model, "\x01" * 16]) == 2
    assert "prompt of 16 tokens must be less than 16 tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_the_default_run_beats_both_baselines_in_three_minutes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    assert main(["train"]) == 0
    seconds = time.monotonic() - start
    words = capsys.readouterr().out.split()
    unigram, bigram, linformer = (float(words[words.index(name) + 1]) for name in ("unigram", "bigram", "Linformer"))
    assert linformer < bigram < unigram
    assert seconds < 180
