"""Whole runs of `linpass train` and `linpass generate`."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

from linpass import LinformerForCausalLM
from linpass.cli import main
from linpass.errors import InputError
from linpass.training import preparation
from linpass.training.documents import PythonText
from linpass.training.output_folder import LOG_NAME, PLOT_NAME
from linpass.training.parser import TrainParser
from linpass.training.tokens import validation_mask
from linpass.training.train import train

PNG = b"\x89PNG\r\n\x1a\n"


def debug_run(folder, *flags):
    return train(TrainParser().parse(["--preset", "debug", "--output_dir", str(folder / "final_model"), *flags]))


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
    assert sorted(path.name for path in folder.iterdir()) == ["final_model", "trainer_output", PLOT_NAME]
    assert sorted(path.name for path in (folder / "trainer_output/final_model").iterdir()) == [LOG_NAME, PLOT_NAME]
    names = {path.name for path in (folder / "final_model").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", PLOT_NAME}
    assert names >= {"README.md", LOG_NAME, "generation_config.json", "modeling_linformer.py"}
    assert not [name for name in names if name.endswith((".bin", ".pt"))]
    assert (folder / PLOT_NAME).read_bytes().startswith(PNG)


def test_the_perplexity_is_of_the_saved_model_on_the_validation_text(finished, model_folder):
    run = TrainParser().parse(["--preset", "debug"])
    texts = list(PythonText(max_documents=run.data.max_documents))
    chosen = validation_mask(len(texts), run.data.validation_fraction, run.training.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    total, tokens, n = 0.0, 0, run.model.seq_length
    for text, held_out in zip(texts, chosen, strict=True):
        ids = torch.tensor([*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id])
        for chunk in ids.split(n) if held_out else ():
            with torch.no_grad():
                log_probs = model(chunk[None]).logits[0, :-1].log_softmax(-1)
            total -= log_probs.gather(-1, chunk[1:, None]).sum().item()
            tokens += len(chunk) - 1
    assert finished[1].perplexity == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert finished[1].validation_tokens == tokens


def test_the_card_and_the_log_hold_the_numbers_of_the_run(finished, model_folder):
    entries = [json.loads(line) for line in (Path(model_folder) / LOG_NAME).read_text().splitlines()]
    card = (Path(model_folder) / "README.md").read_text(encoding="utf-8")
    (evaluation,) = {entry["eval_loss"] for entry in entries if "eval_loss" in entry}
    assert math.exp(evaluation) == pytest.approx(finished[1].perplexity)
    assert f"{finished[1].perplexity:.2f}" in card
    assert f"{finished[1].bigram_perplexity:.2f}" in card
    assert PLOT_NAME in card
    assert [entry["step"] for entry in entries if "loss" in entry] == [5, 10, 15, 20, 25, 30, 35]


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
    monkeypatch.setattr(preparation, "open_corpora", lambda arguments: pytest.fail("read the text"))
    with pytest.raises(InputError, match="vocab_size=300 must be at least 384"):
        debug_run(tmp_path, "--tokenizer", model_folder, "--vocab_size", "300")
    assert not list(tmp_path.iterdir())


def test_checkpoints_stay_beside_and_a_run_resumes(tmp_path):
    flags = ["--save_strategy", "steps", "--save_steps", "20"]
    first = debug_run(tmp_path, *flags)
    checkpoint = tmp_path / "trainer_output/final_model/checkpoint-20"
    assert checkpoint.is_dir()
    resumed = debug_run(tmp_path, *flags, "--resume_from_checkpoint", str(checkpoint))
    assert resumed == first
    assert not list((tmp_path / "final_model").glob("checkpoint*"))


def test_a_run_that_stops_leaves_the_older_model(tmp_path, model_folder, monkeypatch):
    shutil.copytree(model_folder, tmp_path / "final_model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "final_model").iterdir()}

    def full_disk(self, folder):
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.Trainer.save_model", full_disk)
    with pytest.raises(InputError, match="could not be written: No space left .* linpass train --resume"):
        debug_run(tmp_path, "--epochs", "0.1", "--depth", "1")
    assert {path.name: path.read_bytes() for path in (tmp_path / "final_model").iterdir()} == before


SAVING = ["--save_strategy", "steps", "--save_steps", "10", "--dropout", "0.1", "--deletion_probability", "0.1"]


def losses(folder):
    """(step, loss) of each line of the training log, in its order."""
    entries = (json.loads(line) for line in (folder / "final_model" / LOG_NAME).read_text().splitlines())
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in entries if "loss" in entry]


def command(folder, *flags):
    """The command in a process of its own."""
    line = [sys.executable, "-m", "linpass.cli", "train", "--preset", "debug", *SAVING]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [*line, "--output_dir", str(folder / "final_model"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )


def wait_for_log(folder, step):
    """Until the running command has logged this step."""
    log = folder / "trainer_output/final_model" / LOG_NAME
    deadline = time.monotonic() + 120
    while not (log.is_file() and f'"step": {step},' in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_stopped_goes_on_as_if_nothing_had_been(tmp_path, number):
    whole = debug_run(tmp_path / "whole", *SAVING)
    stopped = tmp_path / "stopped"
    process = command(stopped)
    wait_for_log(stopped, 15)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert not (stopped / "final_model").exists()
    if number == signal.SIGTERM:
        assert process.returncode == 0, output
        assert "go on with the same command and --resume" in output
        assert "Traceback" not in output
    else:
        assert process.returncode == -signal.SIGKILL
    with (
        pytest.warns(UserWarning, match="checkpoint-.* is skipped: it belongs to a run with other settings"),
        pytest.raises(InputError, match="learning_rate=0.01 must be 0.003, the value of checkpoint-"),
    ):
        debug_run(stopped, *SAVING, "--resume", "--learning_rate", "0.01")
    assert debug_run(stopped, *SAVING, "--resume") == whole
    assert losses(stopped) == losses(tmp_path / "whole")
    assert [step for step, _loss, _norm in losses(stopped)] == sorted({step for step, _loss, _norm in losses(stopped)})


def test_the_numbers_are_of_the_checkpoint_that_was_best(tmp_path):
    best = ["--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", "10", "--save_total_limit", "2"]
    result = debug_run(tmp_path, *SAVING[:4], *best, "--greater_is_better", "True")  # the worst, that is the first
    entries = (json.loads(line) for line in (tmp_path / "final_model" / LOG_NAME).read_text().splitlines())
    losses = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    assert math.log(result.perplexity) == pytest.approx(max(losses))
    assert max(losses) == losses[0] > losses[-2]


def test_resume_without_a_checkpoint_begins_at_the_beginning(tmp_path, finished, capsys):
    assert debug_run(tmp_path, "--resume") == finished[1]
    assert "this run begins at step 0" in capsys.readouterr().out


def test_resume_does_not_train_a_finished_model_anew(tmp_path):
    debug_run(tmp_path, "--max_steps", "3")
    before = (tmp_path / "final_model" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="resume: .* no complete checkpoint, and output_dir=.* a finished model"):
        debug_run(tmp_path, "--max_steps", "6", "--resume")
    assert (tmp_path / "final_model" / "model.safetensors").read_bytes() == before
    debug_run(tmp_path, "--max_steps", "3")


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_baselines_are_trained_by_the_same_command(tmp_path, architecture, finished, capsys):
    result = debug_run(tmp_path, "--architecture", architecture, "--epochs", "0.2")
    assert result.validation_tokens == finished[1].validation_tokens
    assert result.bigram_perplexity == finished[1].bigram_perplexity
    assert not list((tmp_path / "final_model").glob("*.py"))
    assert main(["generate", str(tmp_path / "final_model"), "The", "--max_new_tokens", "3"]) == 0


def test_an_encoder_learns_to_fill_masks(tmp_path, capsys):
    result = debug_run(tmp_path, "--objective", "masked", "--epochs", "0.2")
    assert result.sample is None
    assert result.bigram_perplexity is None
    fill = pipeline("fill-mask", model=str(tmp_path / "final_model"))
    assert len(fill(f"The {fill.tokenizer.mask_token} of an object")) == 5
    assert fill.model.config.causal is False


def test_data_sets_and_files_are_mixed_and_their_ids_reused(tmp_path, model_folder, monkeypatch, capsys):
    pytest.importorskip("datasets")
    for name, count in (("set", 30), ("files", 20)):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"text": f"{name} {n} holds a sentence or two about {n * n}. " * 5}) for n in range(count)]
        (tmp_path / name / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    flags = ["--datasets", str(tmp_path / "set"), "--text_files", str(tmp_path / "files/a.jsonl")]
    flags += ["--mixing_weights", "1", "2", "--packing", "--tokenizer", model_folder, "--cache_dir", str(tmp_path)]
    first = debug_run(tmp_path, *flags)
    stores = sorted(tmp_path.glob("tokens-*"))
    assert len(stores) == 2
    monkeypatch.setattr("linpass.training.tokens.write_store", lambda *a, **k: pytest.fail("computed again"))
    assert debug_run(tmp_path, *flags) == first
    folders = [str(store) for store in stores]
    moved = debug_run(tmp_path, "--token_folders", *folders, "--tokenizer", model_folder)
    assert moved.validation_tokens == first.validation_tokens
    card = (tmp_path / "final_model/README.md").read_text(encoding="utf-8")
    assert "text files" in card


def test_samples_and_pictures_along_the_way(tmp_path, capsys):
    flags = ["--sample_prompts", "The", "An object", "--sample_steps", "10", "--plot_steps", "10"]
    result = debug_run(tmp_path, *flags, "--plot_scale", "log")
    lines = (tmp_path / "final_model/training_samples.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    assert [(entry["step"], entry["prompt"]) for entry in entries] == [
        (step, prompt) for step in (10, 20, 30) for prompt in ("The", "An object")
    ]
    assert result == debug_run(tmp_path / "without")


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


def run_and_read(words, capsys):
    """Perplexities of the unigram, the bigram and the Linformer that ``linpass train`` prints."""
    assert main(["train", *words]) == 0
    printed = capsys.readouterr().out.split()
    return [float(printed[printed.index(name) + 1]) for name in ("unigram", "bigram", "Linformer")]


@pytest.mark.slow
def test_the_default_run_beats_both_baselines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    unigram, bigram, linformer = run_and_read([], capsys)
    assert linformer < bigram < unigram


def test_the_beginning_of_the_default_run_beats_a_unigram(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    unigram, bigram, linformer = run_and_read(["--max_steps", "50"], capsys)
    assert linformer < unigram
    assert bigram < unigram
