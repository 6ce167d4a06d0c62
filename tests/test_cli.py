"""The command line: what it prints, and how it refuses input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from linpass.cli import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs a command that must be refused in one line and leave no file behind; returns the line."""

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(list(arguments)) == 2
        output = capsys.readouterr()
        lines = output.err.strip().splitlines()
        assert len(lines) == 1, output.err
        assert lines[0].startswith("linpass: error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0]

    return run


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["generate", "--help"],
        ["compare", "--help"],
        ["train", "--method", "single-pass", "-h"],
    ],
)
def test_help_imports_no_torch(arguments):
    code = (
        f"import sys; sys.argv = ['linpass', *{arguments}]; from linpass.cli import main\n"
        f"try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "usage: linpass" in run.stdout


def test_train_help_names_every_preset_and_the_short_flags(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("base, debug, lumenspark, tiny", "--embed_dim", "--text_files", "--epochs", "--batch_size"):
        assert word in text


def test_help_all_lists_the_flags_of_the_trainer(capsys):
    assert main(["train", "--help_all"]) == 0
    text = capsys.readouterr().out
    assert "--gradient_accumulation_steps" in text
    assert "--embed_dim" in text


@pytest.mark.parametrize("command", ["train", "compare"])
def test_root_scripts_are_the_commands(command):
    run = subprocess.run(
        [sys.executable, f"{command}.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout.startswith(f"usage: linpass {command}")


def test_no_command(refused):
    assert "train,evaluate,generate,compare" in refused()


def test_unknown_flag_names_the_nearest(refused):
    assert "--embed_dims is no flag of linpass train; nearest: embed_dim" in refused("train", "--embed_dims", "64")


def test_value_of_wrong_type(refused):
    assert "--depth" in refused("train", "--depth", "two")
    assert "rank='much' must be a whole number or none" in refused("train", "--rank", "much")


def test_value_that_transformers_refuses(refused):
    assert "never" in refused("train", "--eval_strategy", "never")


def test_model_that_breaks_a_rule(refused):
    line = refused("train", "--preset", "debug", "--heads", "3")
    assert "heads=3 must divide embed_dim=32" in line


def test_objectives_and_architectures_that_do_not_fit(refused):
    assert "causal=False needs --objective masked" in refused("train", "--causal", "false")
    assert "packing=True needs objective causal" in refused("train", "--objective", "masked")  # the preset packs
    masked = ("train", "--preset", "debug", "--objective", "masked")
    assert "needs architecture linformer, not 'gpt2'" in refused(*masked, "--architecture", "gpt2")
    assert "packing=True needs architecture linformer" in refused("train", "--architecture", "llama")
    assert "architecture='bert' must be one of" in refused("train", "--architecture", "bert")
    assert "objective='other' must be one of causal, masked" in refused("train", "--objective", "other")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--deletion_probability", "1.2"], "deletion_probability=1.2 must be a probability, 0 to 1"),
        (["--swap_probability", "-0.1"], "swap_probability=-0.1 must be a probability, 0 to 1"),
        (["--chunks_per_document", "0"], "chunks_per_document=0 must be 1 or more, or none"),
        (["--noise_target", "x"], "noise_target='x' must be one of clean, noised"),
        (
            ["--mixing_weights", "1", "2"],
            "mixing_weights=[1.0, 2.0] must be finite numbers more than 0, as many as",
        ),
        (["--mixing_weights", "nan"], "mixing_weights=[nan] must be finite numbers more than 0"),
        (["--sample_prompts", " "], "sample_prompts=[' '] must be texts to continue"),
        (["--sample_prompts", "The", "--objective", "masked"], "sample_prompts needs objective causal"),
        (["--pad_token_id", "7"], "pad_token_id=7 must be 0, the id of the tokenizer"),
        (["--streaming", "True"], "streaming=True needs --datasets"),
        (["--token_folders", "nowhere"], "token_folders needs --tokenizer"),
        (["--token_folders", "nowhere", "--tokenizer", "x"], "token_folders='nowhere' must be a folder of token ids"),
        (["--validation_files", "nowhere.txt"], "'nowhere.txt' must be a file"),
        (["--plot_scale", "square"], "plot_scale='square' must be linear or log"),
        (["--label_smoothing_factor", "1"], "label_smoothing_factor=1.0 must be 0 or more and less than 1"),
        (["--cache_dir", "/dev/null/ids"], "cache_dir='/dev/null/ids' must be a folder that can be written to"),
        (["--resume", "True", "--resume_from_checkpoint", "x"], "resume and resume_from_checkpoint exclude each other"),
    ],
)
def test_how_documents_are_used_is_checked(flags, message, refused):
    assert message in refused("train", "--preset", "debug", *flags)


def test_data_sets_without_a_network(refused):
    pytest.importorskip("datasets")
    line = refused("train", "--preset", "debug", "--datasets", "openwebtext", "bookcorpus")
    assert "datasets='openwebtext' could not be reached, is there a network?" in line


def test_unknown_preset_names_those_there_are(refused):
    assert "preset='huge'" in refused("train", "--preset", "huge")
    assert "base, debug, lumenspark, tiny" in refused("train", "--preset", "huge")


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("none.txt", None, "must be a file"),
        ("empty.txt", b"", "the file is empty"),
        ("blank.txt", b" \n ", "there is only white space"),
        ("bytes.txt", b"\xff\xfe\xff", "must be UTF-8"),
        ("text.csv", b"text\nhello", "must end in one of .txt"),
        ("bad.jsonl", b'{"text": "a"}\nnot json\n', "line 2 must be JSON"),
        ("column.jsonl", b'{"content": "a"}\n', "must have the field text_column='text'; there is: content"),
        ("number.jsonl", b'{"text": 3}\n', "must be a string, is int"),
        ("bad.parquet", b"PAR1 and nothing", "could not be read as .parquet"),
        ("bad.txt.zst", b"no zstandard", "could not be read as .txt.zst"),
        ("short.txt", b"T", "must hold at least one document of two tokens"),
        ("nul.txt", b"text\0", "must be text: it holds a NUL character"),
    ],
)
def test_text_file_that_cannot_be_used(refused, tmp_path, name, content, rule):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    line = refused("train", "--preset", "debug", "--text_files", name)
    assert rule in line
    assert name in line or name == "short.txt"


def test_parquet_without_the_column(refused, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "a.parquet")
    assert "text_column='text'; there is: content" in refused("train", "--preset", "debug", "--text_files", "a.parquet")


def test_folder_as_text_file(refused, tmp_path):
    (tmp_path / "folder.txt").mkdir()
    assert "it is a folder" in refused("train", "--preset", "debug", "--text_files", "folder.txt")


def test_share_of_validation(refused):
    assert "validation_fraction=1.0 must be more than 0" in refused("train", "--validation_fraction", "1")


def test_output_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "a file is in the way" in refused("train", "--preset", "debug", "--output_dir", "file")
    assert "is a file" in refused("train", "--preset", "debug", "--output_dir", "file/model")
    assert "is a file" in refused("train", "--preset", "debug", "--checkpoint_dir", "file/checkpoints")


def test_output_folder_with_other_files_is_not_replaced(refused, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.txt").write_text("years of work")
    assert "it holds chapter1.txt" in refused("train", "--preset", "debug", "--output_dir", "thesis")
    assert "current folder" in refused("train", "--preset", "debug", "--output_dir", ".")


def test_preset_file(refused, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"embed_dims": 64}))
    line = refused("train", "--preset", "mine.json")
    assert "mine.json sets 'embed_dims', which is no argument; nearest: embed_dim" in line
    (tmp_path / "mine.json").write_text("{")
    assert "must hold JSON" in refused("train", "--preset", "mine.json")
    (tmp_path / "mine.json").write_text("[]")
    assert "JSON object" in refused("train", "--preset", "mine.json")


def test_tokenizer_that_does_not_exist(refused):
    assert "tokenizer='nowhere'" in refused("train", "--preset", "debug", "--tokenizer", "./nowhere".removeprefix("./"))


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["model", ""], "prompt='' must hold text"),
        (["model", "  "], "must hold text"),
        (["nowhere", "Hello"], "model='nowhere' must be a folder"),
        (["model", "Hello", "--temperature", "0"], "'0' must be a number, more than 0"),
        (["model", "Hello", "--top_p", "1.5"], "at most 1"),
        (["model", "Hello", "--top_p", "nan"], "at most 1"),
        (["model", "Hello", "--top_k", "-1"], "must be a whole number, 0 or more"),
        (["model", "Hello", "--max_new_tokens", "0"], "must be a whole number, 1 or more"),
        (["model"], "prompt"),
    ],
)
def test_generate_refuses(refused, arguments, rule):
    assert rule in refused("generate", *arguments)


def test_generate_from_a_folder_without_a_model(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "must hold a causal language model" in refused("generate", "empty", "Hello")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate", "nan"], "learning_rate=nan must be 0 or more, and finite"),
        (["--batch_size", "0"], "per_device_train_batch_size=0 must be 1 or more"),
        (["--epochs", "-1"], "num_train_epochs=-1.0 must be more than 0"),
        (["--seed", "-1"], "seed=-1 must be 0 or more"),
        (["--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint='nowhere' must be a folder"),
    ],
)
def test_numbers_are_checked_before_the_text_is_read(flags, message, refused):
    assert message in refused("train", "--preset", "debug", *flags)


def test_a_folder_with_files_of_ones_own_is_not_replaced(refused, tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "config.json").write_text('{"name": "my web app"}')
    (folder / "thesis.tex").write_text("years of work")
    assert "it holds thesis.tex" in refused("train", "--preset", "debug", "--output_dir", str(folder))
    assert (folder / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_files": "a.txt"}, "text_files='a.txt' must be a list of names"),
        ({"validation_fraction": None}, "validation_fraction=None must be more than 0"),
    ],
)
def test_values_of_a_preset_are_checked(values, message, refused, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(values))
    assert message in refused("train", "--preset", "mine.json")


def test_half_a_character_is_refused(refused, tmp_path):
    (tmp_path / "half.jsonl").write_text('{"text": "a\\ud800"}\n')
    assert "half.jsonl' line 1: 'text' must be text" in refused(
        "train", "--preset", "debug", "--text_files", "half.jsonl"
    )


@pytest.mark.parametrize("command", [["compare"], ["train", "--method", "single-pass"]])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rates", "1"], "--learning_rates is no flag of linpass {command}; nearest: learning_rate"),
        (["--text_files", "none.jsonl"], "text_files='none.jsonl' must be a file; none there"),
        (["--text_files", "rows.txt"], "text_files='rows.txt' must end in one of .jsonl"),
        (["--text_files", "rows.jsonl"], "row 1 must have the column label_column='label'; there is: text"),
        (["--text_files", "one.jsonl"], "must hold rows of two classes or more; the labels are: 7"),
        (["--text_files", "one.jsonl", "--dataset", "x"], "text_files and dataset exclude each other"),
        (["--test_files", "one.jsonl"], "test_files needs --text_files"),
        (["--test_split", "test"], "test_split needs --dataset"),
        (["--test_fraction", "1"], "test_fraction=1.0 must be more than 0 and less than 1"),
        (["--max_length", "0"], "max_length=0 must be 1 or more"),
        (["--model", "nowhere"], "model='nowhere' must hold an encoder and its tokenizer"),
        (["--cache_dir", "/dev/null/rows"], "cache_dir='/dev/null/rows' must be a folder that can be written to"),
    ],
)
def test_rows_and_encoders_that_cannot_be_used(command, flags, message, refused, tmp_path):
    (tmp_path / "rows.txt").write_text("text")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a"}))
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "a", "label": 7}))
    assert message.format(command=" ".join(command)) in refused(*command, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "epochs=0 must be 1 or more"),
        (["--batch_size", "0"], "batch_size=0 must be 1 or more"),
        (["--learning_rate", "nan"], "learning_rate=nan must be more than 0, and finite"),
        (["--seed", "-1"], "seed=-1 must be 0 or more"),
        (["--output_dir", "file"], "output_dir='file' must be a folder"),
    ],
)
def test_settings_of_compare(flags, message, refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert message in refused("compare", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kernel", "quadratic"], "kernel='quadratic' must be one of linear"),
        (["--match", "adam"], "match='adam' must be one of ridge, gd, sgd, batch_aware"),
        (["--regularization", "-1"], "regularization='-1' must be a number, 0 or more"),
        (["--output_dir", "thesis"], "it holds chapter1.txt"),
        (["--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint='nowhere' must be a folder"),
        (["--eval_strategy", "never"], "never"),
    ],
)
def test_settings_of_single_pass_training(flags, message, refused, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.txt").write_text("years of work")
    assert message in refused("train", "--method", "single-pass", *flags)


def test_methods_of_training(refused):
    assert "--method" in refused("train", "--method", "double-pass")
    assert "--embed_dims is no flag of linpass train" in refused("train", "--method", "gradient", "--embed_dims", "64")
