"""Finding the head, reading what it is given, warnings of untrained layers, labels and features that cannot be used."""

import copy
import logging

import pytest
import torch
from test_singlepass_models import CONFIGS, SIZES, arguments, fit, make, pooled, rows
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertPreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from linpass.errors import InputError
from linpass.singlepass import SinglePassTrainer
from linpass.singlepass.features import captured_input, find_head, has_head, untrained_layers
from linpass.singlepass.tasks import IGNORED, Task, head_targets, task_of

KERNELS = ("linear", "relu", "nystrom", "rbf")


# --- The head ---------------------------------------------------------------------------------------------------------


class Bare(nn.Module):
    """A classifier that does not say which of its parts is the encoder."""

    def __init__(self):
        super().__init__()
        self.config = BertConfig(**SIZES, num_labels=3)
        self.first, self.second, self.other = nn.Linear(32, 3), nn.Linear(3, 3), nn.Linear(3, 4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", "classifier"),
        ("roberta", "classifier.out_proj"),
        ("distilbert", "classifier"),
        ("gpt2", "score"),
        ("llama", "score"),
        ("modernbert", "classifier"),
        ("linformer", "score"),
    ],
)
def test_the_head_is_the_last_layer_with_as_many_outputs_as_labels(name, expected):
    model = make(name, num_labels=32)
    path, head = find_head(model)
    assert path == expected
    assert head is model.get_submodule(expected)
    assert has_head(model)
    assert not has_head(make(name, AutoModel))


def test_a_model_that_does_not_name_its_encoder_is_searched_as_a_whole():
    assert find_head(Bare())[0] == "second"


def test_encoder_and_decoder_models_are_read_too(tmp_path):
    torch.manual_seed(1)
    sizes = {"vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 40}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    tokens = {"eos_token_id": 2, "pad_token_id": 1, "decoder_start_token_id": 2}
    model = BartForSequenceClassification(BartConfig(**sizes, **heads, **tokens, num_labels=3)).double()
    data = rows(padding="none")
    for row in data:
        row["input_ids"] = [3 if token == 2 else token for token in row["input_ids"][:-1]] + [2]
    fit(model, data, tmp_path)
    assert find_head(model)[0] == "classification_head.out_proj"


# --- What it is given -------------------------------------------------------------------------------------------------


class TokenScores(BertPreTrainedModel):
    """Scores every token, then makes one row of logits of them in a way of its own."""

    def __init__(self, config, choose):
        super().__init__(config)
        self.embed, self.score, self.choose = nn.Embedding(50, 32), nn.Linear(32, config.num_labels), choose

    def forward(self, input_ids, attention_mask=None):
        return SequenceClassifierOutput(logits=self.choose(self.score(self.embed(input_ids))))


@pytest.mark.parametrize("tokens", [1, 5, 25])
def test_the_token_that_a_row_is_classified_by_is_found(tokens):
    ids = torch.randint(0, 50, (4, tokens))
    place = torch.randint(0, tokens, (4,))
    model = TokenScores(BertConfig(num_labels=3), lambda scores: scores[torch.arange(4), place])
    with captured_input(model, model.score, every_token=False) as features_of:
        features = features_of({"input_ids": ids})
    assert torch.equal(features, model.embed(ids)[torch.arange(4), place])


@pytest.mark.parametrize("tokens", [3, 5, 25, 49])
def test_a_mixture_of_tokens_is_no_token(tokens):
    model = TokenScores(BertConfig(num_labels=3), lambda scores: scores.mean(1))
    with (
        captured_input(model, model.score, every_token=False) as features_of,
        pytest.raises(InputError, match="must take a row's logits from one of its tokens; it mixes several"),
    ):
        features_of({"input_ids": torch.zeros(2, tokens).long()})


def test_a_model_is_left_as_it_was_when_the_pass_fails():
    model = make("bert", num_labels=3).train()
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    with (
        pytest.raises(RuntimeError, match="no such batch"),
        captured_input(model, model.classifier, every_token=False),
    ):
        raise RuntimeError("no such batch")
    assert [module.training for module in model.modules()] == modes
    assert not model.classifier._forward_pre_hooks
    assert not model.classifier._forward_hooks


def test_a_head_that_is_never_called_is_refused():
    model = make("bert", num_labels=3)
    with (
        captured_input(model, nn.Linear(32, 3), every_token=False) as features_of,
        pytest.raises(InputError, match="must call its final layer"),
    ):
        features_of({"input_ids": torch.ones(2, 4).long()})


# --- Layers that were never trained -----------------------------------------------------------------------------------


def base_checkpoint(name, folder):
    """A trained encoder without a head; only a pooler of BERT's that was trained is in it."""
    make(name, AutoModel, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("bert", None),
        ("roberta", "classifier.dense"),
        ("distilbert", "pre_classifier"),
        ("modernbert", "head.norm"),
        ("gpt2", None),
        ("llama", None),
        ("linformer", None),
    ],
)
def test_random_layers_before_the_head_are_warned_of_and_trained_ones_are_not(name, layers, tmp_path, caplog):
    model = AutoModelForSequenceClassification.from_pretrained(base_checkpoint(name, tmp_path / "base"), num_labels=3)
    assert untrained_layers(model, find_head(model)[1]) == ([] if layers is None else [layers])
    caplog.clear()
    SinglePassTrainer(model, arguments(tmp_path))
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    if layers is None:
        assert not said
    else:
        assert len(said) == 1
        assert f"{layers} before the head has never been trained" in said[0]
        assert "pooling='mean' to leave it out" in said[0]
    # A trained one of the same kind, and the encoder alone, are quiet.
    caplog.clear()
    SinglePassTrainer(make(name, num_labels=3), arguments(tmp_path))
    SinglePassTrainer(model, arguments(tmp_path, pooling="mean"))
    assert not caplog.records


def test_a_pooler_that_the_base_checkpoint_lacked_is_warned_of(tmp_path, caplog):
    encoder = AutoModel.from_config(CONFIGS["bert"], add_pooling_layer=False)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    encoder.save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    caplog.clear()
    SinglePassTrainer(model, arguments(tmp_path))
    assert "bert.pooler.dense before the head has never been trained" in caplog.text


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_encoder_that_is_wholly_random_is_warned_of(name, auto, tmp_path, caplog):
    SinglePassTrainer(auto.from_config(copy.deepcopy(CONFIGS[name])), arguments(tmp_path))
    assert "its encoder has never been trained; the features are random" in caplog.text


# --- Labels -----------------------------------------------------------------------------------------------------------


def test_rows_without_a_label_are_left_out_with_their_weight_and_number():
    task = Task("single_label_classification", 3)
    features = torch.randn(4, 2)
    made = task.rows(features, torch.tensor([2, IGNORED, 0, 1]), torch.tensor([1.0, 2, 3, 4]), torch.arange(10, 14))
    assert torch.equal(made.features_ND, features[[0, 2, 3]])
    assert made.targets.tolist() == [2, 0, 1]
    assert made.weights_N.tolist() == [1, 3, 4]
    assert made.row_ids.tolist() == [10, 12, 13]


def test_the_target_of_a_token_is_the_next_one_of_its_own_row():
    task = Task("single_label_classification", 9, every_token=True, shifted=True)
    features = torch.arange(12.0).reshape(2, 3, 2)
    made = task.rows(features, torch.tensor([[1, 2, 3], [4, 5, IGNORED]]), None, torch.tensor([7, 8]))
    assert made.targets.tolist() == [2, 3, 5]
    assert made.features_ND.tolist() == [[0, 1], [2, 3], [6, 7]]
    assert made.row_ids.tolist() == [7, 7, 8]


@pytest.mark.parametrize(
    ("num_labels", "labels", "kind"),
    [
        (1, torch.zeros(4).long(), "regression"),
        (3, torch.zeros(4).int(), "single_label_classification"),
        (3, torch.zeros(4, 3), "multi_label_classification"),
    ],
)
def test_the_problem_is_guessed_as_transformers_does_and_nothing_is_written(num_labels, labels, kind):
    model = make("bert", num_labels=num_labels)
    assert task_of(model, num_labels, labels).kind == kind
    assert model.config.problem_type is None
    output = model(
        torch.ones(4, 3).long(),
        labels=labels.float()
        if num_labels == 1
        else labels.to(torch.float64 if labels.is_floating_point() else torch.long),
    )
    assert output.loss is not None
    assert model.config.problem_type == kind


def test_one_hot_rows_only_where_ids_are_given():
    assert head_targets(torch.tensor([1, 0]), 2).tolist() == [[0, 1], [1, 0]]
    numbers = torch.randn(2, 2)
    assert head_targets(numbers, 2) is numbers


# --- What cannot be used: an error, and the old head ------------------------------------------------------------------


def refused(model, data, tmp_path, match, **changes):
    """The pass fails and leaves model, configuration and disk as they were."""
    before = copy.deepcopy(model.state_dict())
    trainer = SinglePassTrainer(model, arguments(tmp_path, **changes), train_dataset=data)
    with pytest.raises(InputError, match=match) as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.config.problem_type is None
    assert trainer.solution is None
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("label", "shown"), [(3, "3"), (-1, "-1"), (-7, "-7")])
def test_a_label_out_of_range_is_named_with_its_row(kernel, label, shown, tmp_path):
    data = rows()
    data[23]["labels"] = label
    model = make("bert", num_labels=3)
    refused(model, data, tmp_path, rf"row 23: a label must be from 0 to 2, not {shown}", kernel=kernel, num_features=8)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_class_only_is_refused(kernel, tmp_path):
    model = make("bert", num_labels=3)
    refused(model, rows(classes=1), tmp_path, "all 40 rows have label 0", kernel=kernel, num_features=8)


@pytest.mark.parametrize("changes", [{"kernel": name, "num_features": 8} for name in KERNELS] + [{"match": "sgd"}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_whose_features_are_not_finite_is_named(changes, value, tmp_path):
    data = [row | {"input_ids": [token if token != 49 else 48 for token in row["input_ids"]]} for row in rows()]
    data[17]["input_ids"][0] = 49
    model = make("bert", num_labels=3)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[49] = value
        model.bert.embeddings.LayerNorm.weight.fill_(0.5)
    before = copy.deepcopy(model.classifier.state_dict())
    trainer = SinglePassTrainer(model, arguments(tmp_path, **changes), train_dataset=data)
    with pytest.raises(InputError, match="row 17: the features must be finite, not NaN or infinite"):
        trainer.train()
    assert all(torch.equal(before[key], value) for key, value in model.classifier.state_dict().items())


@pytest.mark.parametrize("data", [[], None])
def test_without_rows_there_is_nothing_to_fit(data, tmp_path):
    refused(make("bert", num_labels=3), data, tmp_path, "train_dataset must .*")


def test_rows_of_which_none_has_a_label_are_no_rows(tmp_path):
    model = make("bert", AutoModelForTokenClassification, num_labels=3)
    data = rows(labels=[[IGNORED] * 12] * 40)
    refused(model, data, tmp_path, "train_dataset must hold at least one row with a label, got none")


def test_missing_labels_are_named(tmp_path):
    data = [{name: value for name, value in row.items() if name != "labels"} for row in rows()]
    refused(make("bert", num_labels=3), data, tmp_path, "train_dataset must have a column 'labels'")


@pytest.mark.parametrize(
    ("labels", "num_labels", "match"),
    [
        ([[0, 1]] * 40, 3, r"labels of shape \(7, 2\) must have shape \(7,\)"),
        ([[0.0, 1.0]] * 40, 3, r"labels of shape \(7, 2\) must have shape \(7, 3\)"),
        ([[0.0, 1.0]] * 40, 1, r"labels of shape \(7, 2\) must have shape \(7, 1\)"),
        ([[0.0, 1.0, 0.5]] * 40, 3, "row 0: labels must be 0 or 1 for problem_type='multi_label_classification'"),
        ([0.5] * 8 + [float("nan")] * 32, 1, "row 8: labels must be finite"),
    ],
)
def test_labels_that_do_not_fit_the_head_are_named(labels, num_labels, match, tmp_path):
    refused(make("bert", num_labels=num_labels), rows(labels=labels), tmp_path, match)


@pytest.mark.parametrize(
    ("kind", "labels", "match"),
    [
        ("multi_label_classification", [[0, 1, 1]] * 40, "labels of dtype torch.int64 must be floating point"),
        ("single_label_classification", [1.0] * 40, "labels of dtype torch.float32 must be whole numbers"),
    ],
)
def test_labels_must_be_of_the_dtype_that_evaluation_takes(kind, labels, match, tmp_path):
    model = make("bert", num_labels=3, problem_type=kind)
    trainer = SinglePassTrainer(model, arguments(tmp_path), train_dataset=rows(labels=labels))
    with pytest.raises(InputError, match=match):
        trainer.train()


def test_labels_of_tokens_must_be_one_per_token(tmp_path):
    model = make("bert", AutoModelForTokenClassification, num_labels=3)
    refused(model, rows(), tmp_path, r"labels of shape \(7,\) must have shape \(7, 12\)")


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "much"])
def test_a_regularization_that_is_no_number_from_zero_on_is_refused(value, tmp_path):
    with pytest.raises(InputError, match="regularization=.* must be a number, 0 or more"):
        arguments(tmp_path, regularization=value)


def test_a_second_pass_after_a_refused_one_is_as_if_it_were_the_first(tmp_path):
    model, data = make("bert", num_labels=3), rows()
    refused(model, rows(labels=[[0.0, 1.0]] * 40), tmp_path, "must have shape")
    fit(model, data, tmp_path)
    expected = make("bert", num_labels=3)
    fit(expected, data, tmp_path)
    assert torch.equal(model.classifier.weight, expected.classifier.weight)
    assert pooled("bert", model, data).isfinite().all()
