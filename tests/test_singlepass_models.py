"""SinglePassTrainer on every kind of model: the head is scikit-learn's Ridge on the features that go into it."""

import copy
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
)

from linpass import ClosedFormForSequenceClassification, LinformerConfig
from linpass.errors import InputError
from linpass.singlepass import SinglePassArguments, SinglePassTrainer

# Two solvers of one linear system of 33 unknowns in float64, alpha far above rounding.
SOLVER = {"rtol": 1e-8, "atol": 1e-9}
# Logits of a float32 folder in two processes.
RELOADED = {"rtol": 1e-6, "atol": 1e-6}

PAD, ALPHA, WIDTH, TOKENS = 1, 0.7, 32, 12
SIZES = {
    "vocab_size": 50,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
}
GPT2 = {"vocab_size": 50, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 40, "pad_token_id": PAD}
DISTIL = {"vocab_size": 50, "dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "pad_token_id": PAD}
LINFORMER = {"vocab_size": 50, "embed_dim": WIDTH, "depth": 2, "heads": 4, "seq_length": 32, "k": 8, "block_size": 8}
LINFORMER |= {"window_size": 12, "rank": None, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 0}
CONFIGS = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES),
    "distilbert": DistilBertConfig(**DISTIL, max_position_embeddings=40),
    "gpt2": GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "modernbert": ModernBertConfig(**SIZES, global_attn_every_n_layers=2, local_attention=8),
    "linformer": LinformerConfig(**LINFORMER),
    "linformer-encoder": LinformerConfig(**LINFORMER, causal=False),
}
STOCK = [name for name in CONFIGS if "linformer" not in name]
DECODERS = ("gpt2", "llama", "linformer")


def make(name, auto=AutoModelForSequenceClassification, dtype=torch.float64, **fields):
    """A model with random weights of a size that makes every part matter, none of which looks untrained."""
    torch.manual_seed(1)
    config = copy.deepcopy(CONFIGS[name])
    for field, value in fields.items():
        setattr(config, field, value)
    model = auto.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def rows(count=40, padding="right", labels=None, tokens=TOKENS, classes=3):
    """Data set rows of one width, with 3 to all real tokens; ``padding`` "none" has real ones only."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for number in range(count):
        real = tokens if padding == "none" else int(torch.randint(3, tokens + 1, (1,), generator=generator))
        ids = torch.randint(2, 50, (real,), generator=generator).tolist()
        filling = [PAD] * (tokens - real)
        ids, mask = (
            (filling + ids, [0] * len(filling) + [1] * real)
            if padding == "left"
            else (
                ids + filling,
                [1] * real + [0] * len(filling),
            )
        )
        row = {"input_ids": ids, "attention_mask": mask}
        made.append(row | {"labels": number % classes if labels is None else labels[number]})
    return made


def tensors(data):
    return {name: torch.tensor([row[name] for row in data]) for name in ("input_ids", "attention_mask")}


def arguments(tmp_path, **changes):
    fields = {"estimator": "ridge", "calibrate": False, "regularization": ALPHA, "precision": "float64"}
    fields |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    fields |= {"per_device_train_batch_size": 7, "per_device_eval_batch_size": 16}
    return SinglePassArguments(str(tmp_path / "out"), **(fields | changes))


def fit(model, data, tmp_path, **changes):
    trainer = SinglePassTrainer(model, arguments(tmp_path, **changes), train_dataset=data)
    trainer.train()
    return trainer


@torch.no_grad()
def pooled(name, model, data):
    """What the documented pooling of each architecture gives to its last layer, by hand."""
    model = copy.deepcopy(model).eval()
    batch = tensors(data)
    mask = batch["attention_mask"]
    states = model.base_model(**batch)[0]
    last = torch.tensor([max(i for i, m in enumerate(row["attention_mask"]) if m) for row in data])
    match name:
        case "bert":
            return torch.tanh(model.bert.pooler.dense(states[:, 0]))
        case "roberta":
            return torch.tanh(model.classifier.dense(states[:, 0]))
        case "distilbert":
            return torch.relu(model.pre_classifier(states[:, 0]))
        case "modernbert":
            return model.head(states[:, 0])
        case "linformer-encoder":
            return torch.stack([row[keep.bool()].mean(0) for row, keep in zip(states, mask, strict=True)])
    return states[torch.arange(len(data)), last]


def ridge(features, targets, intercept=True, alpha=ALPHA, weights=None):
    """scikit-learn's (weight [C, D], bias [C])."""
    targets = np.asarray(targets, dtype=np.float64)
    if targets.ndim == 1 and np.array_equal(targets, targets.astype(int)):
        targets = np.eye(int(targets.max()) + 1)[targets.astype(int)]
    targets = targets.reshape(len(targets), -1)
    found = Ridge(alpha=alpha, fit_intercept=intercept, solver="cholesky").fit(
        np.asarray(features.double()), targets, sample_weight=weights
    )
    return torch.tensor(found.coef_).reshape(targets.shape[1], -1), torch.tensor(found.intercept_)


def final_layer(model):
    """The last linear layer, by the name that each architecture gives it."""
    for path in ("classifier.out_proj", "classifier", "score", "lm_head"):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError(type(model))


def check_head(head, features, targets):
    weight, bias = ridge(features, targets, intercept=head.bias is not None)
    torch.testing.assert_close(head.weight.detach(), weight, **SOLVER)
    if head.bias is not None:
        torch.testing.assert_close(head.bias.detach(), bias, **SOLVER)


@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_head_is_scikit_learns_ridge_on_the_features_before_it(name, padding, tmp_path):
    model, data = make(name, num_labels=3), rows(padding=padding)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = fit(model, data, tmp_path)
    assert trainer.model is model
    head = final_layer(model)
    check_head(head, pooled(name, model, data), [row["labels"] for row in data])
    own = [key for key, value in before.items() if not torch.equal(value, model.state_dict()[key])]
    assert {model.get_submodule(key.rpartition(".")[0]) for key in own} == {head}


def test_dropout_is_off_in_the_pass_and_every_modules_mode_comes_back(tmp_path):
    dropouts = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "classifier_dropout": 0.5}
    model, data = make("bert", num_labels=3, **dropouts).train(), rows()
    model.bert.embeddings.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    fit(model, data, tmp_path)
    assert {name: module.training for name, module in model.named_modules()} == modes
    check_head(model.classifier, pooled("bert", model, data), [row["labels"] for row in data])


@pytest.mark.parametrize("name", ["roberta", "distilbert", "modernbert"])
def test_as_many_labels_as_features_do_not_confuse_the_head_with_the_layer_before(name, tmp_path):
    model, data = make(name, num_labels=WIDTH), rows(classes=WIDTH)
    fit(model, data, tmp_path)
    check_head(final_layer(model), pooled(name, model, data), [row["labels"] for row in data])


class BertWithDeepHead(BertForSequenceClassification):
    """A head of several layers, as people build it."""

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.classifier = nn.Sequential(nn.Linear(width, 3), nn.Tanh(), nn.Dropout(0.4), nn.Linear(3, 3))


def test_of_a_sequential_head_the_last_layer_is_solved_for(tmp_path):
    torch.manual_seed(1)
    model, data = BertWithDeepHead(BertConfig(**SIZES, num_labels=3)).double(), rows()
    fit(model, data, tmp_path)
    with torch.no_grad():
        features = torch.tanh(model.eval().classifier[0](model.bert(**tensors(data)).pooler_output))
    check_head(model.classifier[3], features, [row["labels"] for row in data])


# --- Encoders without a head, and heads of this package --------------------------------------------------------------


@torch.no_grad()
def pool_by_hand(encoder, data, pooling):
    """Each row alone and without its padding."""
    encoder = copy.deepcopy(encoder).eval()
    found = []
    for row in data:
        ids = torch.tensor([[i for i, keep in zip(row["input_ids"], row["attention_mask"], strict=True) if keep]])
        states = encoder(ids)[0][0]
        found.append({"mean": states.mean(0), "first": states[0], "last": states[-1]}[pooling])
    return torch.stack(found)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "linformer-encoder"])
def test_a_bare_encoder_gets_a_head_on_its_pooled_hidden_states(name, pooling, tmp_path):
    encoder, data = make(name, AutoModel, num_labels=3), rows(padding="left")
    before = copy.deepcopy(encoder)
    trainer = fit(encoder, data, tmp_path, pooling=pooling)
    assert type(trainer.model) is ClosedFormForSequenceClassification
    assert trainer.model.encoder is encoder
    check_head(trainer.model.classifier, pool_by_hand(encoder, data, pooling), [row["labels"] for row in data])
    assert all(torch.equal(before.state_dict()[key], value) for key, value in encoder.state_dict().items())


def test_without_a_word_about_pooling_decoders_take_the_last_token_and_encoders_the_mean(tmp_path):
    for name in CONFIGS:
        model = SinglePassTrainer(make(name, AutoModel), arguments(tmp_path)).model
        assert model.config.pooling == ("last" if name in DECODERS else "mean"), name


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kernel", ["linear", "relu", "rff", "nystrom"])
def test_kernels_of_one_pass_are_ridge_on_their_features(kernel, normalize, tmp_path):
    encoder, data = make("bert", AutoModel, num_labels=3), rows()
    model = fit(encoder, data, tmp_path, kernel=kernel, normalize=normalize, num_features=16).model
    features = pool_by_hand(encoder, data, "mean")
    if normalize:
        features = features / features.norm(dim=1, keepdim=True)
    with torch.no_grad():
        check_head(model.classifier, model.feature_map(features), [row["labels"] for row in data])
    assert model.classifier.in_features == (WIDTH if kernel == "linear" else 16)


@pytest.mark.parametrize("kernel", ["rbf", "laplace", "polynomial", "arc_cosine", "deep"])
def test_kernels_of_all_rows_are_scikit_learns_kernel_ridge(kernel, tmp_path):
    encoder, data = make("bert", AutoModel, num_labels=3), rows()
    model = fit(encoder, data, tmp_path, kernel=kernel, normalize=True).model.eval()
    features = pool_by_hand(encoder, data, "mean")
    features = features / features.norm(dim=1, keepdim=True)
    gram = np.asarray(model.feature_map.kernel(features, features))
    targets = np.eye(3)[[row["labels"] for row in data]]
    # With an unpenalised intercept the Gram matrix and the targets are centred.
    centre = np.eye(len(data)) - 1 / len(data)
    dual = KernelRidge(alpha=ALPHA, kernel="precomputed").fit(centre @ gram @ centre, centre @ targets).dual_coef_
    expected = gram @ dual
    expected += (targets - expected).mean(0)
    with torch.no_grad():
        torch.testing.assert_close(model(**tensors(data)).logits, torch.tensor(expected), **SOLVER)
    assert model.feature_map.landmarks.shape == (len(data), WIDTH)


def test_another_kernel_takes_the_encoder_out_of_a_classifier(tmp_path):
    model = make("roberta", num_labels=3)
    head = {key: value.clone() for key, value in model.classifier.state_dict().items()}
    trainer = fit(model, rows(), tmp_path, kernel="relu", num_features=8)
    assert type(trainer.model) is ClosedFormForSequenceClassification
    assert trainer.model.encoder is model.roberta
    assert trainer.model.num_labels == 3
    assert all(torch.equal(head[key], value) for key, value in model.classifier.state_dict().items())


def test_the_number_of_labels_is_that_of_from_pretrained(tmp_path):
    make("distilbert", AutoModel).save_pretrained(tmp_path / "base")
    names = {0: "low", 1: "middle", 2: "high"}
    encoder = AutoModel.from_pretrained(tmp_path / "base", num_labels=3, id2label=names)
    model = fit(encoder, rows(), tmp_path).model
    assert model.classifier.out_features == 3
    assert model.config.id2label == names


def test_a_saved_closed_form_model_is_fitted_again_as_it_is_configured(tmp_path):
    data = rows()
    first = fit(make("bert", AutoModel, num_labels=3), data, tmp_path, pooling="first", normalize=True)
    first.save_model(str(tmp_path / "saved"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert again.dtype == torch.float64
    solved = again.classifier.weight.detach().clone()
    torch.nn.init.zeros_(again.classifier.weight)
    assert fit(again, data, tmp_path).model is again
    torch.testing.assert_close(again.classifier.weight.detach(), solved, **SOLVER)
    with pytest.raises(InputError, match="kernel, pooling and normalize are those of its configuration"):
        SinglePassTrainer(again, arguments(tmp_path, pooling="mean"))


# --- Other labels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "linformer-encoder", "gpt2"])
def test_token_classification_is_ridge_on_the_labelled_tokens(name, tmp_path):
    data = rows()
    model = make(name, AutoModelForTokenClassification, num_labels=3)
    for row in data:
        row["labels"] = [
            i % 3 if keep else -100 for i, keep in zip(row["input_ids"], row["attention_mask"], strict=True)
        ]
        row["labels"][0] = -100
    trainer = fit(model, data, tmp_path)
    with torch.no_grad():
        states = copy.deepcopy(model).eval().base_model(**tensors(data))[0]
    labels = torch.tensor([row["labels"] for row in data])
    check_head(final_layer(model), states[labels != -100], labels[labels != -100].tolist())
    assert np.isfinite(trainer.evaluate(data)["eval_loss"])
    assert model.config.problem_type is None


@pytest.mark.parametrize("targets", [1, 3])
def test_regression_with_one_target_and_with_several(targets, tmp_path):
    torch.manual_seed(3)
    values = torch.randn(40, targets).tolist()
    data = rows(labels=[value[0] for value in values] if targets == 1 else values)
    model = make("bert", num_labels=targets, problem_type=None if targets == 1 else "regression")
    trainer = fit(model, data, tmp_path)
    check_head(model.classifier, pooled("bert", model, data), values)
    assert model.config.problem_type == "regression"
    predicted = torch.tensor(trainer.predict(data).predictions).reshape(40, targets)
    expected = (predicted.double() - torch.tensor(values)).square().mean().item()
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_of_several_labels_a_sigmoid_over_one_half_says_yes(tmp_path):
    data = rows(60)
    for row in data:  # three labels that a pooled row can tell
        row["labels"] = [
            float(7 in row["input_ids"]),
            float(sum(row["attention_mask"]) > 7),
            float(9 in row["input_ids"]),
        ]
    model = make("linformer-encoder", num_labels=3)
    trainer = fit(model, data, tmp_path, regularization=1e-6)
    assert model.config.problem_type == "multi_label_classification"
    labels = torch.tensor([row["labels"] for row in data])
    assert labels.mean(0).min() > 0.05
    features = pooled("linformer-encoder", model, data)
    weight, _ = ridge(features, 2 * labels - 1, intercept=False, alpha=1e-6)
    torch.testing.assert_close(model.score.weight.detach(), weight, rtol=1e-5, atol=1e-5)
    said = torch.sigmoid(torch.tensor(trainer.predict(data).predictions)) > 0.5
    assert (said == labels.bool()).double().mean() > 0.85
    assert np.isfinite(trainer.evaluate(data)["eval_loss"])


# --- Language models --------------------------------------------------------------------------------------------------


def text_rows(count=40, vocabulary=50):
    data = rows(count, "right")
    generator = torch.Generator().manual_seed(9)
    for row in data:
        row["input_ids"] = [
            int(torch.randint(2, vocabulary, (1,), generator=generator)) if keep else PAD
            for keep in row["attention_mask"]
        ]
        row["labels"] = [i if keep else -100 for i, keep in zip(row["input_ids"], row["attention_mask"], strict=True)]
    return data


@torch.no_grad()
def next_tokens(model, data):
    """Hidden states of the tokens that have a successor, and these, by a loop."""
    states = copy.deepcopy(model).eval().base_model(**tensors(data))[0]
    pairs = [
        (state[place], row["input_ids"][place + 1])
        for state, row in zip(states, data, strict=True)
        for place in range(sum(row["attention_mask"]) - 1)
    ]
    return torch.stack([state for state, _token in pairs]), [token for _state, token in pairs]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", DECODERS)
def test_a_language_models_head_is_ridge_on_one_hot_next_tokens(name, tied, tmp_path):
    model, data = make(name, AutoModelForCausalLM, tie_word_embeddings=tied), text_rows()
    embeddings = model.get_input_embeddings().weight
    assert (model.lm_head.weight is embeddings) == tied
    before = {key: value.clone() for key, value in model.base_model.state_dict().items()}
    trainer = fit(model, data, tmp_path)
    features, tokens = next_tokens(model, data)
    weight, _ = ridge(features, np.eye(50)[tokens], intercept=False)
    torch.testing.assert_close(model.lm_head.weight.detach(), weight, **SOLVER)
    assert all(torch.equal(before[key], value) for key, value in model.base_model.state_dict().items())
    assert model.get_input_embeddings().weight is embeddings
    assert model.config.tie_word_embeddings is False
    assert np.isfinite(trainer.evaluate(data)["eval_loss"])


def test_a_padded_vocabulary_has_a_row_for_every_output(tmp_path):
    model = make("llama", AutoModelForCausalLM)
    model.resize_token_embeddings(50, pad_to_multiple_of=64)
    model, data = model.double(), text_rows()
    fit(model, data, tmp_path)
    features, tokens = next_tokens(model, data)
    weight, _ = ridge(features, np.eye(64)[tokens], intercept=False)
    torch.testing.assert_close(model.lm_head.weight.detach(), weight, **SOLVER)
    assert not weight[50:].any()


class LargestTensor(TorchDispatchMode):
    """How many numbers the largest tensor held that any operation gave."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for value in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return output


@pytest.mark.parametrize("regularization", [ALPHA, "gcv"])
def test_no_tensor_of_rows_times_vocabulary_is_ever_made(regularization, tmp_path):
    vocabulary, data = 5000, text_rows(64, 5000)
    model = make("gpt2", AutoModelForCausalLM, dtype=torch.float32, vocab_size=vocabulary)
    trainer = SinglePassTrainer(model, arguments(tmp_path, regularization=regularization), train_dataset=data)
    with LargestTensor() as largest:
        trainer.train()
    learned = sum(sum(row["attention_mask"]) - 1 for row in data)
    assert largest.numbers <= 2 * vocabulary * WIDTH < learned * vocabulary / 4


# --- What is saved ----------------------------------------------------------------------------------------------------

LOADS = """
import json, sys
sys.modules["linpass"] = None  # imports of it fail as if it were not installed
import torch, transformers

answers = {}
for folder, auto, code in json.loads(sys.argv[1]):
    kind = getattr(transformers, auto)
    model, report = kind.from_pretrained(folder, trust_remote_code=code or None, output_loading_info=True)
    inputs, expected = torch.load(f"{folder}/expected.pt")
    error = (model.eval()(**inputs).logits - expected).abs().max().item()
    answers[folder] = [error, sorted(report["missing_keys"]), sorted(report["unexpected_keys"])]
print(json.dumps(answers))
"""


def test_saved_folders_open_with_plain_from_pretrained_where_linpass_is_not_installed(tmp_path):
    jobs = []

    def keep(trainer, auto, code, data):
        folder = str(tmp_path / f"{len(jobs)}")
        trainer.save_model(folder)
        inputs = tensors(data)
        with torch.no_grad():
            torch.save((inputs, trainer.model.eval()(**inputs).logits), f"{folder}/expected.pt")
        jobs.append((folder, auto, code))

    for name in CONFIGS:
        data = rows(padding="right")
        trainer = fit(make(name, dtype=torch.float32, num_labels=3), data, tmp_path)
        keep(trainer, "AutoModelForSequenceClassification", name not in STOCK, data)
    for name in DECODERS:
        data = text_rows()
        trainer = fit(make(name, AutoModelForCausalLM, torch.float32, tie_word_embeddings=True), data, tmp_path)
        keep(trainer, "AutoModelForCausalLM", name not in STOCK, data)
    trainer = fit(
        make("roberta", dtype=torch.float32, num_labels=3), rows(), tmp_path, kernel="nystrom", num_features=8
    )
    keep(trainer, "AutoModelForSequenceClassification", True, rows(padding="left"))
    process = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", textwrap.dedent(LOADS), json.dumps(jobs)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "1",
            "PATH": os.environ["PATH"],
            "OMP_NUM_THREADS": "1",
        },
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    answers = json.loads(process.stdout.splitlines()[-1])
    assert len(answers) == len(CONFIGS) + len(DECODERS) + 1
    for folder, auto, _code in jobs:
        error, missing, unexpected = answers[folder]
        assert error < RELOADED["atol"], (folder, auto)
        assert missing == [], (folder, auto)
        assert unexpected == [], (folder, auto)


# --- Models that a closed-form head does not fit ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForQuestionAnswering])
def test_other_tasks_are_refused_unless_their_encoder_is_asked_for(kind, tmp_path):
    model = kind(BertConfig(**SIZES))
    with pytest.raises(InputError, match=rf"model={kind.__name__} must classify .* pooling='mean' would take"):
        SinglePassTrainer(model, arguments(tmp_path))
    wrapped = SinglePassTrainer(model, arguments(tmp_path, pooling="mean")).model
    assert wrapped.encoder is model.bert


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForTokenClassification])
def test_a_label_per_token_allows_no_pooling(auto, tmp_path):
    with pytest.raises(InputError, match="needs kernel='linear', normalize=False and no pooling"):
        SinglePassTrainer(make("gpt2", auto), arguments(tmp_path, kernel="relu"))


def test_a_model_without_a_final_layer_is_refused(tmp_path):
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=3))
    model.classifier = nn.Identity()
    with pytest.raises(InputError, match="must have a final nn.Linear .* none with num_labels=3 outputs"):
        SinglePassTrainer(model, arguments(tmp_path))


class BertWithScaledLogits(BertForSequenceClassification):
    def forward(self, input_ids, attention_mask=None, labels=None):
        output = super().forward(input_ids, attention_mask)
        output.logits = 30 * torch.tanh(output.logits)
        return output


def test_logits_that_are_not_the_final_layers_are_refused(tmp_path):
    torch.manual_seed(1)
    model = BertWithScaledLogits(BertConfig(**SIZES, num_labels=3))
    before = copy.deepcopy(model.classifier.state_dict())
    with pytest.raises(InputError, match="model=BertWithScaledLogits must return what its final layer gives"):
        fit(model, rows(), tmp_path)
    assert all(torch.equal(before[key], value) for key, value in model.classifier.state_dict().items())


def test_an_encoder_of_bert_without_pooler_is_saved_whole(tmp_path):
    """The base of a RoBERTa classifier has no pooler, which AutoModel's has."""
    encoder = BertModel(BertConfig(**SIZES, num_labels=3), add_pooling_layer=False)
    trainer = fit(encoder, rows(), tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    _model, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"]
