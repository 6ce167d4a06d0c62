"""The presets, and flags over preset over defaults."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from linpass import LinformerConfig
from linpass.errors import InputError
from linpass.training.arguments import PRESET_FOLDER, ModelArguments, preset_names, read_preset
from linpass.training.parser import TrainParser
from linpass.training.train import build_config

RUNS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "quality" / "runs.jsonl"


def parse(*flags: str):
    return TrainParser().parse(list(flags))


def test_model_arguments_are_the_fields_of_the_configuration():
    ours = {f.name: f.default for f in dataclasses.fields(ModelArguments)}
    own_fields = [name for name in vars(LinformerConfig)["__annotations__"] if not name.startswith("_")]
    assert list(ours) == own_fields
    theirs = LinformerConfig.__dataclass_fields__
    assert ours == {name: theirs[name].default for name in own_fields}


def test_the_presets_there_are():
    assert preset_names() == ["base", "debug", "lumenspark", "tiny"]
    assert PRESET_FOLDER.is_dir()


@pytest.mark.parametrize("name", preset_names())
def test_each_preset_is_a_valid_model(name):
    run = parse("--preset", name)
    assert build_config(run).causal
    assert run.training.learning_rate == read_preset(name, TrainParser().names)["learning_rate"]


def test_lumenspark_is_all_model_defaults():
    run = parse("--preset", "lumenspark")
    training = run.training
    assert run.model == ModelArguments()
    assert training.per_device_train_batch_size == 48
    assert training.gradient_accumulation_steps == 10
    assert training.learning_rate == 1.25e-4
    assert training.weight_decay == 1e-2
    assert training.num_train_epochs == 4


def test_base_is_the_model_that_measures_best():
    model = parse("--preset", "base").model
    assert (model.k, model.seq_length, model.qk_norm) == (512, 1024, False)
    lines = RUNS.read_text(encoding="utf-8").splitlines()
    best = min((row for row in map(json.loads, lines) if "choosing" in row), key=lambda row: row["choosing"]["loss"])
    fields = {name: value for name, value in best["flags"].items() if hasattr(model, name)}
    assert {name: getattr(model, name) for name in fields} == fields
    assert parse("--preset", "base").training.learning_rate == best["flags"]["learning_rate"]


def test_without_flags_the_preset_is_tiny():
    assert parse() == parse("--preset", "tiny")
    assert parse().model.vocab_size == 1024


def test_flags_win_over_preset_in_any_order():
    groups = [["--preset", "debug"], ["--embed_dim", "48"], ["--epochs", "2"], ["--batch_size=3"]]
    for order in itertools.permutations(groups):
        run = parse(*itertools.chain(*order))
        model, training = run.model, run.training
        assert model.embed_dim == 48
        assert model.depth == 2  # the preset's
        assert model.norm_eps == 1e-6  # the default
        assert training.num_train_epochs == 2
        assert training.per_device_train_batch_size == 3


def test_a_flag_at_the_default_value_wins_too():
    assert parse("--preset", "debug", "--embed_dim", "512").model.embed_dim == 512


def test_none_and_lists_on_the_command_line():
    model = parse("--rank", "none", "--k", "16,32,32", "--num-key-value-heads", "1").model
    assert model.rank is None
    assert model.k == [16, 32, 32]
    assert model.num_key_value_heads == 1
    assert parse("--preset", "lumenspark", "--k", "64").model.k == 64


def test_checkpoints_do_not_go_to_the_finished_model():
    training = parse("--output_dir", "models/one").training
    assert training.output_dir == "models/one"
    assert training.checkpoint_dir == "models/trainer_output/one"


def test_a_preset_does_not_choose_a_preset(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"preset": "base"}')
    with pytest.raises(InputError, match="sets 'preset', which is no argument"):
        parse("--preset", str(path))


def test_hugging_face_names_are_flags():
    flags = ["--hidden_size", "64", "--num_hidden_layers", "3", "--num_attention_heads", "8"]
    model = parse(*flags, "--max_position_embeddings", "128").model
    assert (model.embed_dim, model.depth, model.heads, model.seq_length) == (64, 3, 8, 128)
