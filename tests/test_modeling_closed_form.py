"""Any encoder with pooling, a feature map and a linear layer: saving, loading without linpass, padding, losses."""

import copy
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hub_server import OWNER, Hub
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from test_saved_folder import run_without_linpass
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
    T5Config,
    T5EncoderModel,
    Trainer,
    TrainingArguments,
)
from versions import CHECKPOINTING

from linpass import ClosedFormConfig, ClosedFormForSequenceClassification, LinformerConfig
from linpass.singlepass.kernel_ridge import kernel_ridge, nystrom_conjugate_gradient

ROOT = Path(__file__).resolve().parent.parent
# Padding moves terms of sums, no more.
PADDING = 1e-12
# A dual solution through K^{-1/2} and back, in float64.
HEAD = 1e-8
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "bos_token_id": 0}
DISTIL = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "pad_token_id": 1}
LINFORMER = {"vocab_size": 50, "embed_dim": 32, "depth": 2, "heads": 4, "seq_length": 32, "k": 8, "block_size": 8}
LINFORMER |= {"window_size": 12, "rank": None, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
ENCODERS = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES),
    "distilbert": DistilBertConfig(**DISTIL, max_position_embeddings=40),
    "gpt2": GPT2Config(**GPT2, eos_token_id=0, pad_token_id=1),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "modernbert": ModernBertConfig(**SIZES, global_attn_every_n_layers=2, local_attention=8),
    "linformer": LinformerConfig(**LINFORMER),
    "linformer-encoder": LinformerConfig(**LINFORMER, causal=False),
}
MAPS = {
    None: {},
    "relu": {"num_features": 24},
    "rff": {"num_features": 24},
    "nystrom": {"num_features": 10, "kernel": "laplace"},
    "kernel": {"num_features": 10, "kernel": "deep", "depth": 3},
}


def make_encoder(name, dtype=torch.float32):
    """Random weights of a size that makes every part matter."""
    torch.manual_seed(1)
    encoder = AutoModel.from_config(copy.deepcopy(ENCODERS[name])).to(dtype).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.3)
    return encoder


def make(name="bert", dtype=torch.float32, **fields):
    """A classifier whose feature map is fitted and whose linear layer is random."""
    torch.manual_seed(2)
    if fields.get("feature_map") is not None:
        fields = MAPS[fields["feature_map"]] | fields
    model = ClosedFormForSequenceClassification.from_encoder(make_encoder(name, dtype), **{"num_labels": 3, **fields})
    if model.config.feature_map is not None:
        model.feature_map.fit(model.embed(torch.randint(2, 50, (40, 9))))
    torch.nn.init.normal_(model.classifier.weight)
    torch.nn.init.normal_(model.classifier.bias)
    return model


def ids(batch=3, tokens=11):
    return torch.randint(2, 50, (batch, tokens))


@pytest.mark.parametrize("name", ENCODERS)
def test_save_and_load_gives_the_same_logits_to_the_bit(name, tmp_path):
    model, x = make(name, pooling="last", normalize=True, feature_map="nystrom"), ids()
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is ClosedFormForSequenceClassification
    assert type(loaded.encoder) is type(model.encoder)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert model(x).logits.std() > 0.01


@pytest.mark.parametrize("feature_map", MAPS)
def test_every_feature_map_is_in_the_folder(feature_map, tmp_path):
    model, x = make(feature_map=feature_map), ids()
    assert model.classifier.in_features == model.config.head_width
    model.save_pretrained(tmp_path)
    loaded = ClosedFormForSequenceClassification.from_pretrained(tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert torch.equal(copy.deepcopy(model)(x).logits, model(x).logits)


def test_the_configuration_comes_back_as_it_was(tmp_path):
    for name, encoder_config in ENCODERS.items():
        fields = {"pooling": "first", "feature_map": "rff", "num_features": 6, "bandwidth": 2.5, "num_labels": 4}
        config = ClosedFormConfig(encoder_config=encoder_config, **fields)
        config.save_pretrained(tmp_path / name)
        loaded = AutoConfig.from_pretrained(tmp_path / name)
        assert type(loaded.encoder_config) is type(encoder_config)
        loaded.name_or_path = config.name_or_path
        assert loaded.to_dict() == config.to_dict()
        assert loaded.num_labels == 4
    stored = json.loads((tmp_path / "bert/config.json").read_text())
    assert stored["encoder_config"]["model_type"] == "bert"
    assert ClosedFormConfig.from_pretrained(tmp_path / "bert", pooling="last").pooling == "last"


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_padding_on_either_side_changes_nothing(name, pooling):
    model = make(name, dtype=torch.float64, pooling=pooling, feature_map="rff")
    rows = [ids(1, tokens) for tokens in (7, 11, 1)]
    alone = torch.cat([model(row).logits for row in rows])
    hidden = [model.encoder(row).last_hidden_state[0] for row in rows]
    expected = [{"mean": h.mean(0), "first": h[0], "last": h[-1]}[pooling] for h in hidden]
    torch.testing.assert_close(torch.cat([model.embed(row) for row in rows]), torch.stack(expected))

    pad = model.config.get_text_config().pad_token_id
    for left in (False, True):
        batch, mask = torch.full((3, 13), pad), torch.zeros(3, 13, dtype=torch.long)
        for i, row in enumerate(rows):
            columns = slice(13 - row.shape[1], 13) if left else slice(0, row.shape[1])
            batch[i, columns], mask[i, columns] = row[0], 1
        logits = model(batch, attention_mask=mask).logits
        torch.testing.assert_close(logits, alone, rtol=0, atol=PADDING)
        embedded = model.get_input_embeddings()(batch)
        logits = model(inputs_embeds=embedded, attention_mask=mask).logits
        if name != "roberta":  # without ids it cannot tell padding, and counts positions from the first column
            torch.testing.assert_close(logits, alone, rtol=0, atol=PADDING)
    assert (alone[0] - alone[1]).abs().max() > 1e-3


def test_token_types_and_positions_move_with_their_tokens():
    model = make(dtype=torch.float64)
    x, types, positions = ids(1, 5), torch.tensor([[0, 0, 1, 1, 1]]), torch.arange(5)[None] + 3
    alone = model(x, token_type_ids=types, position_ids=positions).logits
    assert not torch.allclose(alone, model(x).logits)
    pad = torch.zeros(1, 2, dtype=torch.long)
    mask = torch.cat((pad, torch.ones(1, 5)), 1)
    x, types, positions = (torch.cat((pad, part), 1) for part in (x, types, positions))
    padded = model(x, attention_mask=mask, token_type_ids=types, position_ids=positions).logits
    torch.testing.assert_close(padded, alone, rtol=0, atol=PADDING)


def test_normalised_rows_have_unit_norm():
    model, plain = (make(dtype=torch.float64, normalize=normalize) for normalize in (True, False))
    x = ids()
    torch.testing.assert_close(model.embed(x), F.normalize(plain.embed(x)))
    assert (plain.embed(x).norm(dim=1) - 1).abs().min() > 0.1
    torch.testing.assert_close(model(x).logits, model.classifier(model.embed(x)))


def test_an_encoder_is_used_as_it_is():
    encoder = make_encoder("bert")
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in encoder.state_dict().items()}
    model = ClosedFormForSequenceClassification.from_encoder(encoder, num_labels=5)
    assert model.encoder is encoder
    assert model.config.encoder_config is encoder.config
    assert not model.training
    for name, tensor in encoder.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
    # Also what was put in after loading, which transformers does not know as initialised.
    encoder.embeddings.word_embeddings = torch.nn.Embedding.from_pretrained(torch.full((50, 32), 7.0))
    again = ClosedFormForSequenceClassification.from_encoder(encoder)
    assert (again.get_input_embeddings().weight == 7).all()
    headed = BertForMaskedLM(ENCODERS["bert"])
    assert ClosedFormForSequenceClassification.from_encoder(headed).encoder is headed.bert


def test_an_encoder_that_automodel_would_not_build_is_refused():
    encoder = T5EncoderModel(T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4))
    with pytest.raises(ValueError, match=r"encoder is a T5\w+, but a saved folder would be opened as T5Model"):
        ClosedFormForSequenceClassification.from_encoder(encoder)


def test_opens_without_linpass(tmp_path):
    names = ("bert", "gpt2", "linformer", "linformer-encoder")
    models = [make(name, pooling="last", feature_map="nystrom") for name in names]
    for name, model in zip(names, models, strict=True):
        model.save_pretrained(tmp_path / "saved" / name)
    output = run_without_linpass(
        """
        import os
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True).eval()
            assert type(model).__module__.startswith("transformers_modules.")
            assert AutoConfig.from_pretrained(path, trust_remote_code=True).pooling == "last"
            model.save_pretrained("again")
            again = AutoModelForSequenceClassification.from_pretrained("again", trust_remote_code=True).eval()
            assert torch.equal(again(ids).logits, model(ids).logits)
            print(model(ids).logits.tolist())
        assert not any(name.startswith("linpass.") for name in sys.modules)
        """,
        tmp_path / "saved",
        tmp_path,
    )
    x = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    assert [json.loads(line) for line in output.strip().splitlines()] == [model(x).logits.tolist() for model in models]


def test_a_pushed_model_opens_without_linpass(tmp_path):
    model = make("linformer-encoder", feature_map="relu")
    model.save_pretrained(tmp_path / "saved")
    push = """
        import sys
        from linpass import ClosedFormForSequenceClassification
        model = ClosedFormForSequenceClassification.from_pretrained(sys.argv[1])
        model.push_to_hub(sys.argv[2])
    """
    load = """
        import sys
        sys.modules["linpass"] = None
        import torch
        from transformers import AutoModelForSequenceClassification
        model = AutoModelForSequenceClassification.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
        print(model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])).logits.tolist())
    """
    with Hub() as hub:
        for body in (push, load):
            process = subprocess.run(
                [sys.executable, "-c", textwrap.dedent(body), str(tmp_path / "saved"), f"{OWNER}/closed"],
                capture_output=True,
                text=True,
                cwd=tmp_path,
                env=hub.environment(tmp_path, PYTHONPATH=str(ROOT)),
                timeout=300,
            )
            assert process.returncode == 0, process.stderr
    expected = model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])).logits.tolist()
    assert json.loads(process.stdout.splitlines()[-1]) == expected


def test_the_folder_holds_weights_configuration_and_code(tmp_path):
    make().save_pretrained(tmp_path)
    linformer = (
        "attention",
        "cache",
        "configuration",
        "kernels",
        "launch",
        "layers",
        "modeling",
        "operators",
        "triton",
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.safetensors",
        "config.json",
        "configuration_closed_form.py",
        "feature_maps_closed_form.py",
        "kernels_closed_form.py",
        "modeling_closed_form.py",
        *(f"{part}_linformer.py" for part in linformer),
    }
    assert set(json.loads((tmp_path / "config.json").read_text())["auto_map"]) == {
        "AutoConfig",
        "AutoModelForSequenceClassification",
    }


def test_losses_are_those_of_transformers():
    x = ids(4)
    model = make()
    labels = torch.tensor([0, 2, 1, 1])
    output = model(x, labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    assert model.config.problem_type == "single_label_classification"
    assert model(x, labels=labels, return_dict=False)[0] == output.loss

    model, labels = make(problem_type="multi_label_classification"), torch.randint(0, 2, (4, 3)).float()
    output = model(x, labels=labels)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, labels))

    model, labels = make(num_labels=1), torch.randn(4)
    output = model(x, labels=labels)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0], labels))
    assert model.config.problem_type == "regression"


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({}, torch.tensor([0, 2, 1, 1])),
        ({"problem_type": "multi_label_classification"}, torch.tensor([[0.0, 1, 1], [1, 0, 0], [1, 1, 1], [0, 0, 1]])),
        ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0, 0.0])),
    ],
)
def test_accumulated_batches_add_up_to_the_whole(fields, labels):
    model, x = make(**fields), ids(4)
    whole, items = model(x, labels=labels).loss, labels.numel()
    parts = [model(x[part], labels=labels[part], num_items_in_batch=items).loss for part in (slice(3), slice(3, 4))]
    torch.testing.assert_close(sum(parts), whole)


def test_the_head_keeps_its_precision(tmp_path):
    model, x = make(feature_map="nystrom"), ids()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = model.embed(x)
        logits = model(x).logits
    assert pooled.dtype == logits.dtype == torch.float32
    assert torch.equal(logits, model.classifier(model.feature_map(pooled)))  # this line is outside of autocast

    model.save_pretrained(tmp_path)
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.encoder.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    for name, tensor in model.feature_map.state_dict().items():
        assert torch.equal(half.feature_map.state_dict()[name], tensor)
    assert torch.equal(half.classifier.weight, model.classifier.weight)
    assert half(x).logits.dtype == torch.float32
    half.save_pretrained(tmp_path / "half")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(x).logits, half(x).logits)
    double = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert double.feature_map.whitening.dtype == double(x).logits.dtype == torch.float64


def test_missing_random_features_are_drawn_from_their_seed(tmp_path):
    model = make(feature_map="relu", feature_seed=5, bandwidth=3.0)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("feature_map.")}
    assert len(weights) - len(kept) == 3
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = ClosedFormForSequenceClassification.from_pretrained(tmp_path)
    for name, value in model.feature_map.state_dict().items():
        assert torch.equal(loaded.feature_map.state_dict()[name], value), name


def test_it_is_built_and_run_on_the_meta_device():
    config = ClosedFormConfig(encoder_config=ENCODERS["bert"], feature_map="nystrom", num_features=10)
    with torch.device("meta"):
        model = ClosedFormForSequenceClassification(config)
        assert model(torch.zeros(2, 5, dtype=torch.long)).logits.shape == (2, 2)
    assert model.feature_map.landmarks.is_meta


def test_resized_embeddings_survive_saving(tmp_path):
    model = make()
    model.resize_token_embeddings(60)
    assert model.config.encoder_config.vocab_size == 60
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().num_embeddings == 60
    assert loaded.get_input_embeddings() is loaded.encoder.get_input_embeddings()


def test_checkpointed_gradients_are_those_without(tmp_path):
    model, x = make().train(), ids()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            getattr(model, f"{CHECKPOINTING}_enable")()
        model.zero_grad()
        model(x, labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    torch.testing.assert_close(*gradients)


def test_trainer_trains_and_evaluates_it(tmp_path):
    model = make(feature_map="relu")
    rows = [{"input_ids": ids(1)[0], "labels": i % 3, "token_type_ids": torch.zeros(11).long()} for i in range(8)]
    before = model.classifier.weight.clone()
    arguments = TrainingArguments(tmp_path, max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert not torch.equal(model.classifier.weight, before)
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(rows).predictions.shape == (8, 3)


def test_hidden_states_and_attentions_come_where_asked_for():
    model, x = make(), ids()
    model.set_attn_implementation("eager")
    output = model(x, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert len(output.attentions) == 2
    assert model(x).hidden_states is None


@pytest.mark.parametrize("name", ["bert", "linformer"])
def test_a_dual_solution_is_its_logits(name):
    """Exact kernel ridge regression and Nystroem with conjugate gradient, put into the model."""
    x, y = ids(40), torch.randn(40, 3, dtype=torch.float64)
    at = ids(5)
    exact = make(name, torch.float64, feature_map="kernel", kernel="rbf", num_features=40)
    rows = exact.embed(x).detach()
    solution = kernel_ridge(exact.feature_map.fit(rows).kernel, rows, y, 0.1)
    fast = make(name, torch.float64, feature_map="nystrom", kernel="rbf", num_features=12)
    landmarks = fast.feature_map.fit(rows).landmarks
    iterated = nystrom_conjugate_gradient(fast.feature_map.kernel, rows, y, landmarks, 0.1, tolerance=1e-12)
    with torch.no_grad():
        for model, found in ((exact, solution), (fast, iterated)):
            model.classifier.weight.copy_(model.feature_map.weight_from_dual(found.dual_NC))
            model.classifier.bias.copy_(found.intercept_C)
            new = model.embed(at)
            expected = found.predict(model.feature_map.kernel(new, model.feature_map.landmarks))
            torch.testing.assert_close(model(at).logits, expected, rtol=HEAD, atol=HEAD)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"encoder_config": None}, "encoder_config=None"),
        ({"encoder_config": {"hidden_size": 3}}, "no model_type"),
        ({"pooling": "max"}, "pooling='max' must be one of mean, first, last"),
        ({"feature_map": "fourier"}, "feature_map='fourier' must be one of"),
        ({"kernel": "gauss"}, "kernel='gauss' must be one of"),
        ({"order": 2}, "order=2 must be one of 0, 1"),
        ({"feature_map": "relu"}, "num_features=None must be a positive"),
        ({"feature_map": "rff", "num_features": 7}, "num_features=7 must be even"),
        ({"depth": 0}, "depth=0 must be a positive"),
        ({"bandwidth": 0.0}, "bandwidth=0.0 must be a positive"),
        ({"offset": -1.0}, "offset=-1.0 must be 0 or more"),
        ({"scale": 0}, "scale=0 must be a positive"),
    ],
)
def test_a_broken_configuration_is_named(fields, words):
    with pytest.raises(ValueError, match=words):
        ClosedFormConfig(**{"encoder_config": ENCODERS["bert"], **fields})


def test_a_wrong_type_is_refused():
    with pytest.raises(StrictDataclassError):
        ClosedFormConfig(encoder_config=ENCODERS["bert"], num_features="many")


def test_a_broken_configuration_writes_nothing(tmp_path):
    model = make()
    model.config.pooling = "max"
    with pytest.raises(ValueError, match="pooling='max'"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.ones(2, 5).long(), "attention_mask": torch.ones(2, 6)}, r"attention_mask .* \[2, 6\]"),
        ({"input_ids": torch.ones(2, 5).long(), "inputs_embeds": torch.ones(2, 5, 32)}, "exactly one"),
    ],
)
def test_inputs_that_contradict_each_other_are_refused(inputs, words):
    with pytest.raises(ValueError, match=words):
        make()(**inputs)
