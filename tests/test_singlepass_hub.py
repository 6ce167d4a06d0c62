"""The model card of a closed-form head, and pushing it to a Hub of the tests' own: its code runs as it is printed."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hub_server import OWNER, Hub
from huggingface_hub import ModelCard
from test_singlepass_models import arguments, make, rows, text_rows
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification

from linpass.singlepass import SinglePassTrainer
from linpass.singlepass.card import base_model_of, card_text, last_evaluation, write_card

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["good", "fine", "great", "bad", "poor", "awful"]

PUSH = """
import json, pathlib, re
import numpy as np
import torch
from datasets import load_dataset
from transformers import (
    AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, DataCollatorForLanguageModeling,
    GPT2Config, set_seed,
)
from linpass.singlepass import SinglePassArguments, SinglePassTrainer
from linpass.training.tokenization import train_tokenizer

set_seed(0)
reviews = load_dataset("somebody/reviews", split="train")
tokenizer = train_tokenizer(reviews["text"][:], 300)
reviews = reviews.map(lambda row: tokenizer(row["text"]))
sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
bert = BertConfig(**sizes, intermediate_size=64, id2label={0: "no", 1: "yes"}, pad_token_id=tokenizer.pad_token_id)
gpt2 = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2)


def accuracy(prediction):
    return {"accuracy": float((np.argmax(prediction.predictions, 1) == prediction.label_ids).mean())}


def push(name, model, columns, collator=None, compute_metrics=None, **changes):
    plain = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    args = SinglePassArguments(f"runs/{name}", hub_model_id=name, **plain, **changes)
    data = reviews.select_columns(columns)
    trainer = SinglePassTrainer(
        model, args, collator, data, data, processing_class=tokenizer, compute_metrics=compute_metrics
    )
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()
    trainer.model.eval()
    with torch.no_grad():
        return trainer.model(torch.tensor([[5, 6, 7, 8]])).logits.tolist()


labelled = ["input_ids", "attention_mask", "label"]
classifier = AutoModelForSequenceClassification.from_config(bert)
classifier.base_model.save_pretrained("encoder")
tokenizer.save_pretrained("encoder")
encoder = AutoModel.from_pretrained("encoder")
encoder.push_to_hub("encoder")
encoder = AutoModel.from_pretrained("somebody/encoder", num_labels=2)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
logits = {
    "stock": push("stock", classifier, labelled, compute_metrics=accuracy),
    "mapped": push("mapped", encoder, labelled, kernel="relu", num_features=16, compute_metrics=accuracy),
    "writer": push("writer", AutoModelForCausalLM.from_config(gpt2), ["input_ids"], collator),
}
for name in logits:  # as the card says, linpass being installed
    exec(re.search("```python\\n(.*?)```", pathlib.Path(f"runs/{name}/README.md").read_text(), re.S)[1], {})
print(json.dumps(logits))
"""

LOAD = """
import json, re, sys
sys.modules["linpass"] = None  # imports of it fail as if it were not installed
import torch, transformers
from huggingface_hub import hf_hub_download

logits = {}
for name, auto in (("stock", "SequenceClassification"), ("mapped", "SequenceClassification"), ("writer", "CausalLM")):
    card = open(hf_hub_download(f"somebody/{name}", "README.md")).read()
    for code in re.findall("```python\\n(.*?)```", card, re.S):
        if "import linpass" not in code:
            exec(code, {})  # as the card says, linpass not being installed
    kind = getattr(transformers, f"AutoModelFor{auto}")
    model = kind.from_pretrained(f"somebody/{name}", trust_remote_code=True if name == "mapped" else None).eval()
    logits[name] = model(torch.tensor([[5, 6, 7, 8]])).logits.tolist()
print(json.dumps(logits))
"""


def run(code, home, hub, **variables):
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=home,
        env=hub.environment(home, **variables),
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    """The logits of three models that one process pushed."""
    lines = [
        json.dumps({"text": f"The {WORDS[n % 6]} film number {n} was {WORDS[n % 6]}.", "label": int(n % 6 < 3)})
        for n in range(60)
    ]
    hub.add(f"{OWNER}/reviews", {"train.jsonl": "\n".join(lines).encode()}, kind="datasets")
    return run(PUSH, tmp_path_factory.mktemp("pusher"), hub, PYTHONPATH=str(ROOT))


def card(hub, name):
    return ModelCard(hub.files(f"{OWNER}/{name}")["README.md"].decode())


def test_a_stock_model_is_pushed_without_code_and_another_with_it(hub, pushed):
    assert "modeling_closed_form.py" in hub.files(f"{OWNER}/mapped")
    for name in ("stock", "writer"):
        files = hub.files(f"{OWNER}/{name}")
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files.keys()
        assert not [path for path in files if path.endswith(".py")]


def test_pushed_models_and_the_code_of_their_cards_run_where_linpass_is_not_installed(hub, pushed, tmp_path):
    loaded = run(LOAD, tmp_path, hub, token=None)
    assert loaded.keys() == pushed.keys()
    for name, logits in pushed.items():  # of two processes, whose memory may be aligned otherwise
        torch.testing.assert_close(torch.tensor(loaded[name]), torch.tensor(logits), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "tag"),
    [("stock", "text-classification"), ("mapped", "text-classification"), ("writer", "text-generation")],
)
def test_the_card_on_the_hub_is_of_this_pass(hub, pushed, name, tag):
    found = card(hub, name)
    assert "generated_from_trainer" not in found.content
    assert "Epoch" not in found.content
    assert found.data.to_dict()["library_name"] == "transformers"
    assert found.data.pipeline_tag == tag
    assert {"linpass", "single-pass"} <= set(found.data.tags)
    assert found.data.datasets == [f"{OWNER}/reviews"]
    assert found.data.base_model == (f"{OWNER}/encoder" if name == "mapped" else None)
    assert f'"{OWNER}/{name}"' in found.text
    assert "| rows | 60 |" in found.text


def test_measured_numbers_are_metadata(hub, pushed):
    results = {result.metric_type: result for result in card(hub, "stock").data.eval_results}
    assert results.keys() == {"loss", "accuracy"}
    assert results["accuracy"].dataset_type == f"{OWNER}/reviews"
    assert results["accuracy"].task_type == "text-classification"
    assert f"| accuracy | {results['accuracy'].metric_value:.4f} |" in card(hub, "stock").text


# --- The text, without a Hub ------------------------------------------------------------------------------------------


def trained(model, data, tmp_path, **changes):
    trainer = SinglePassTrainer(model, arguments(tmp_path, **changes), train_dataset=data, eval_dataset=data)
    trainer.train()
    return trainer


def test_every_choice_of_the_fit_is_in_the_card(tmp_path):
    trainer = trained(
        make("bert", AutoModel, num_labels=3), rows(), tmp_path, kernel="rff", num_features=18, seed=77, normalize=True
    )
    text = card_text(trainer)
    for line in (
        "| kernel | rff |",
        "| features | 18 |",
        "| pooling | mean |",
        "| features scaled to norm one | yes |",
        "| outputs | 3 |",
        "| rows | 40 |",
        "| fitted by | ridge regression, one pass of the encoder over the rows |",
        "| regularization | 0.7, given |",
        "| precision of the sums | float64 |",
        "| seed | 77 |",
    ):
        assert line in text, line
    assert "| encoder, frozen | bert, " in text
    assert "Its logits are not calibrated" in text
    assert "## Results" not in text


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"regularization": "gcv", "calibrate": True}, ["chosen by generalised cross-validation |", "were calibrated"]),
        ({"regularization": "kfold"}, ["chosen by cross-validation over folds |"]),
        ({"regularization": "loo"}, ["chosen by leave-one-out |"]),
        ({"estimator": "logistic"}, ["logistic regression, one pass", "| 0.7, given |", "not calibrated"]),
        (
            {"estimator": "logistic", "regularization": "auto"},
            ["| regularization | 0.", ", the default for few rows |"],
        ),
        ({"estimator": "discriminant"}, ["| fitted by | the linear discriminant"]),
        ({"match": "gd", "num_train_epochs": 9}, ["match=gd, 9 steps with learning rate 5e-05"]),
        ({"match": "sgd", "learning_rate": 0.01}, ["match=sgd, 3 epochs with learning rate 0.01"]),
        ({"kernel": "rbf"}, ["| kernel | rbf |"]),
        ({"class_weight": "balanced"}, ["| class weights | balanced |"]),
    ],
)
def test_how_the_head_was_chosen_is_said(changes, lines, tmp_path):
    text = card_text(trained(make("bert", num_labels=3), rows(), tmp_path, **changes))
    for line in lines:
        assert line in text, text
    if changes.get("match"):
        assert "| regularization |" not in text


def test_only_results_of_this_very_head_are_told(tmp_path):
    trainer = trained(make("bert", num_labels=3), rows(), tmp_path)
    assert last_evaluation(trainer) == {}
    measured = trainer.evaluate()
    assert last_evaluation(trainer) == {"loss": measured["eval_loss"]}
    assert f"| loss | {measured['eval_loss']:.4f} |" in card_text(trainer)
    assert ModelCard(card_text(trainer)).data.eval_results is None  # of no data set that has a name
    trainer.refit(regularization=9.0)
    assert last_evaluation(trainer) == {}
    trainer.evaluate()
    assert last_evaluation(trainer) != {"loss": measured["eval_loss"]}


def test_what_the_user_says_of_the_card_is_in_it(tmp_path):
    trainer = trained(make("bert", num_labels=3), rows(), tmp_path)
    trainer.evaluate()
    facts = {"language": "en", "license": "mit", "tags": ["mine", "linpass"], "model_name": "A name"}
    facts |= {"dataset": "My | reviews", "dataset_args": "plain", "finetuned_from": "some/base"}
    trainer.create_model_card(**facts)
    found = ModelCard.load(tmp_path / "out/README.md")
    assert found.data.language == "en"
    assert found.data.license == "mit"
    assert found.data.tags == ["linpass", "single-pass", "mine"]
    assert found.data.base_model == "some/base"
    assert found.data.datasets is None
    assert found.data.eval_results[0].dataset_name == "My | reviews"
    assert found.data.eval_results[0].dataset_config == "plain"
    assert found.text.strip().startswith("# A name")


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("linformer", AutoModelForCausalLM),
        ("gpt2", AutoModelForCausalLM),
        ("linformer", AutoModelForTokenClassification),
        ("bert", AutoModelForTokenClassification),
    ],
)
def test_cards_of_tokens(name, auto, tmp_path):
    data = text_rows()
    if auto is AutoModelForTokenClassification:
        data = [row | {"labels": [i % 3 if i >= 0 else i for i in row["labels"]]} for row in data]
    trainer = trained(make(name, auto, num_labels=3), data, tmp_path)
    found = ModelCard.load(write_card(tmp_path, trainer))
    assert found.data.pipeline_tag == ("text-generation" if auto is AutoModelForCausalLM else "token-classification")
    assert ("trust_remote_code=True" in found.text) == ("import linpass" in found.text) == (name == "linformer")
    assert f"{auto.__name__}.from_pretrained" in found.text
    assert ("invented" in found.text) == (auto is AutoModelForCausalLM)


def test_the_printed_code_runs_for_every_kind_of_label(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kinds = {
        "regression": ("bert", 1, [0.1 * n for n in range(40)]),
        "several": ("distilbert", 2, [[float(n % 2), float(n % 3 == 0)] for n in range(40)]),
        "one": ("llama", 3, None),
    }
    for name, (architecture, num_labels, labels) in kinds.items():
        trainer = trained(make(architecture, num_labels=num_labels), rows(labels=labels), tmp_path)
        trainer.save_model(f"./{name}")
        code = card_text(trainer, model_name=name).split("```python\n")[1].split("```")[0]
        exec(code, {})
        assert capsys.readouterr().out.strip()


def test_the_base_model_is_one_of_the_hub_and_no_folder(tmp_path):
    model = make("bert", AutoModel, num_labels=3)
    assert base_model_of(model) is None
    for name, expected in (("owner/name", "owner/name"), (str(tmp_path), None), ("/gone/away", None), ("bert", "bert")):
        model.config._name_or_path = name
        assert base_model_of(SinglePassTrainer(model, arguments(tmp_path)).model) == expected
