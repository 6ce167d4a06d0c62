"""Whole runs of `linpass train --method single-pass`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_singlepass_compare import ENCODER, sentence
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from linpass.cli import main
from linpass.errors import InputError
from linpass.singlepass.command_parser import single_pass_parser
from linpass.singlepass.default_encoder import train_encoder
from linpass.singlepass.run import train_single_pass

# float32 logits of order ten from rows that were padded to other lengths.
LOGITS = 1e-4


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Flags: rows of two topics in two files, a small encoder."""
    folder = tmp_path_factory.mktemp("sources")
    for name, numbers in (("train", range(60)), ("test", range(60, 80))):
        lines = [{"text": sentence(n, topic), "label": topic} for n in numbers for topic in ("tensor", "token")]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    model, tokenizer = train_encoder([sentence(n, "tensor") for n in range(60)], ENCODER, 2, quiet=True)
    model.model.save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    files = ["--text_files", str(folder / "train.jsonl"), "--test_files", str(folder / "test.jsonl")]
    return [*files, "--model", str(folder / "encoder"), "--disable_tqdm", "True", "--use_cpu", "True"]


def run(folder, sources, *flags):
    output = ["--output_dir", str(folder / "final_model")]
    return train_single_pass(*single_pass_parser().parse([*sources, *output, *flags]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, sources):
    """A folder after a run, and the result."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run(folder, sources)


def test_only_the_model_is_left(finished):
    folder, _result = finished
    assert [path.name for path in folder.iterdir()] == ["final_model"]
    names = {path.name for path in (folder / "final_model").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert not [name for name in names if name.endswith((".bin", ".pt"))]


def test_the_numbers_are_of_the_saved_model_on_the_test_rows(finished, sources):
    folder, result = finished
    records = [json.loads(line) for line in Path(sources[3]).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder / "final_model")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "final_model").eval()
    assert model.config.id2label == {0: "tensor", 1: "token"}
    right, loss = 0, 0.0
    for record in records:
        with torch.no_grad():
            logits_C = model(**tokenizer(record["text"], return_tensors="pt")).logits[0]
        label = model.config.label2id[record["label"]]
        right += int(logits_C.argmax()) == label
        loss -= logits_C.log_softmax(0)[label].item()
    assert result.test_rows == len(records) == 40
    assert result.train_rows == 120
    assert result.accuracy == right / 40
    assert result.loss == pytest.approx(loss / 40, abs=LOGITS)
    assert result.accuracy_standard_error == pytest.approx((result.accuracy * (1 - result.accuracy) / 40) ** 0.5)
    assert result.accuracy > 0.9


def test_a_pipeline_names_the_classes(finished):
    classify = pipeline("text-classification", model=str(finished[0] / "final_model"))
    assert [row["label"] for row in classify([sentence(5, "tensor"), sentence(5, "token")])] == ["tensor", "token"]


def test_the_card_holds_the_numbers_of_the_run(finished):
    folder, result = finished
    card = (folder / "final_model/README.md").read_text(encoding="utf-8")
    assert f"{result.accuracy:.4f}" in card
    assert "train.jsonl" in card
    assert "# final_model" in card


def test_the_command_says_what_epochs_mean(sources, tmp_path, capsys):
    flags = ["--epochs", "50", "--batch_size", "32", "--learning_rate", "1e-3", "--output_dir", str(tmp_path / "model")]
    assert main(["train", "--method", "single-pass", *sources, *flags]) == 0
    printed = capsys.readouterr().out
    assert (
        "epochs=50 and learning_rate=0.001 have no part in the result; --match gd, sgd, batch_aware use them" in printed
    )
    assert "of 40 test rows are right" in printed
    assert "One pass over 120 rows took" in printed
    assert str(tmp_path / "model") in printed


def test_epochs_change_the_result_of_match_sgd_and_not_of_ridge(sources, tmp_path, capsys):
    weights = {}
    for match in ("ridge", "sgd"):
        for epochs in ("1", "50"):
            flags = ["--match", match, "--epochs", epochs, "--learning_rate", "1e-3"]
            run(tmp_path / match / epochs, sources, *flags)
            model = AutoModelForSequenceClassification.from_pretrained(tmp_path / match / epochs / "final_model")
            weights[match, epochs] = model.classifier.weight
    assert torch.equal(weights["ridge", "1"], weights["ridge", "50"])
    assert not torch.allclose(weights["sgd", "1"], weights["sgd", "50"], rtol=0.1)
    assert "the result is that of 50 epochs with learning rate 0.001 in batches of 32" in capsys.readouterr().out


def test_a_kernel_of_another_kind_is_saved_whole(sources, tmp_path):
    result = run(tmp_path, sources, "--kernel", "relu", "--num_features", "64")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final_model")
    assert model.classifier.in_features == 64
    assert result.accuracy > 0.9


def test_texts_have_no_weights(sources, tmp_path):
    with pytest.raises(InputError, match="sample_weight_column='w'.*SinglePassTrainer"):
        run(tmp_path, sources, "--sample_weight_column", "w")
    assert not list(tmp_path.iterdir())


def test_a_pass_that_was_cut_says_how_many_rows_it_had(sources, tmp_path):
    assert run(tmp_path, sources, "--max_steps", "3", "--batch_size", "8").train_rows == 24


def test_a_second_run_takes_the_place_of_the_first(sources, tmp_path):
    for kernel in ("relu", "linear"):
        run(tmp_path, sources, "--kernel", kernel, "--num_features", "16", "--normalize")
    assert json.loads((tmp_path / "final_model" / "config.json").read_text())["feature_map"] is None


def test_rows_without_test_files_are_split(sources, tmp_path):
    flags = [flag for flag in sources if flag not in ("--test_files", sources[3])]
    result = run(tmp_path, flags, "--test_fraction", "0.25")
    assert (result.train_rows, result.test_rows) == (90, 30)


def test_a_run_that_fails_leaves_the_older_model(finished, sources, tmp_path, monkeypatch):
    older = [path for path in (finished[0] / "final_model").iterdir() if not path.name.endswith(".py")]
    (tmp_path / "final_model").mkdir()
    for path in older:
        shutil.copy(path, tmp_path / "final_model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "final_model").iterdir()}

    def full_disk(self, folder):
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.Trainer.save_model", full_disk)
    with pytest.raises(InputError, match="could not be written: No space left"):
        run(tmp_path, sources)
    assert {path.name: path.read_bytes() for path in (tmp_path / "final_model").iterdir()} == before


def test_the_default_encoder_reads_the_training_rows_and_is_kept(sources, tmp_path, monkeypatch):
    from linpass.singlepass import default_encoder

    texts = []

    def trained(documents, architecture, steps, quiet):
        texts.append(list(documents))
        return train_encoder(documents, ENCODER, 2, quiet=True)

    monkeypatch.setattr(default_encoder, "train_encoder", trained)
    flags = [*sources[:4], *sources[6:], "--cache_dir", str(tmp_path / "cache")]
    first = run(tmp_path / "one", flags)
    second = run(tmp_path / "two", flags)
    assert texts == [[json.loads(line)["text"] for line in Path(sources[1]).read_text().splitlines()]]
    assert first.loss == second.loss
    assert [path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()] == ["encoder"]
