"""The measurement against one token at a time in float64, and the command's output and refusals."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from linpass import LinformerForCausalLM, LinformerForMaskedLM, LinformerForSequenceClassification, LinformerModel
from linpass.cli import main
from linpass.evaluate import evaluate
from linpass.scoring import cut_windows, encode_documents, position_ranges, ratio_error, score_documents, summarise
from linpass.training.tokenization import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [
    "A window holds as many tokens as the model was made for; the next window starts where it ends.",
    "Zwölf größere Bäume säumen die Straße – 日本語 too.",
    "Short.",
    "Every token is scored once, and only once. " * 5,
]
VOCABULARY = 270
WINDOW = 16
SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, VOCABULARY)


@pytest.fixture(scope="module")
def without_start(tokenizer):
    """The same tokenizer without a token that could stand before a text."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)


def common(tokenizer):
    end = tokenizer.eos_token_id
    return {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}


def make(name, tokenizer, tiny_config):
    """A small model with random weights of a size that makes its predictions differ from each other."""
    torch.manual_seed(1)
    ids = common(tokenizer)
    llama = SIZES | {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 32}
    if name == "linformer":
        model = LinformerForCausalLM(tiny_config(**ids))
    elif name == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**ids, n_embd=32, n_layer=2, n_head=2, n_positions=32))
    elif name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**ids, **llama))
    else:  # caps its logits, so it cannot do without them
        model = Gemma2ForCausalLM(Gemma2Config(**ids, **llama, final_logit_softcapping=1.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def saved(tokenizer, tiny_config, tmp_path, monkeypatch):
    """A function (model or name) -> folder with it and the tokenizer; the current folder is empty, with text.txt."""
    monkeypatch.chdir(tmp_path)
    for number, text in enumerate(TEXTS):
        (tmp_path / f"text{number}.txt").write_text(text, encoding="utf-8")

    def save(model):
        model = make(model, tokenizer, tiny_config) if isinstance(model, str) else model
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return "model"

    return save


FILES = [f"text{number}.txt" for number in range(len(TEXTS))]


@torch.no_grad()
def one_by_one(model, ids, window):
    """Losses of ids[1:], each from the tokens of its window before it, one forward pass for each."""
    losses = []
    for index in range(1, len(ids)):
        start = (index - 1) // window * window
        logits = model(input_ids=torch.tensor([ids[start:index]])).logits[0, -1].double()
        losses.append((logits.logsumexp(0) - logits[ids[index]]).item())
    return losses


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("name", ["linformer", "gpt2", "llama", "gemma2"])
def test_every_token_against_a_pass_of_its_own(name, start, tokenizer, without_start, tiny_config):
    model = make(name, tokenizer, tiny_config).double()
    used = tokenizer if start else without_start
    expected, position_nats = [], torch.zeros(WINDOW, dtype=torch.float64)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        losses = one_by_one(model, [tokenizer.eos_token_id, *ids] if start else ids, WINDOW)
        expected.append(sum(losses))
        for index, loss in enumerate(losses):
            position_nats[index % WINDOW] += loss
    documents = encode_documents(TEXTS, used)
    for batch_size in (1, 3):
        scores = score_documents(model, documents, WINDOW, batch_size)
        # rotary angles and some norms of transformers are float32 whatever the weights are
        torch.testing.assert_close(scores.document_nats, torch.tensor(expected).double(), rtol=1e-6, atol=0)
        torch.testing.assert_close(scores.position_nats, position_nats, rtol=1e-6, atol=0)


def test_oracle_and_measurement_agree_to_rounding_in_float64(tokenizer, tiny_config):
    model = make("linformer", tokenizer, tiny_config).double()
    ids = [tokenizer.eos_token_id, *tokenizer(TEXTS[3])["input_ids"]]
    scores = score_documents(model, encode_documents(TEXTS[3:], tokenizer), WINDOW)
    assert scores.document_nats.item() == pytest.approx(sum(one_by_one(model, ids, WINDOW)), rel=1e-12)


@pytest.mark.parametrize("name", ["linformer", "gpt2"])
def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(name, tokenizer, tiny_config):
    model = make(name, tokenizer, tiny_config).double()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    found = summarise(score_documents(model, encode_documents(TEXTS, tokenizer), WINDOW))
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    bytes_ = sum(len(text.encode()) for text in TEXTS)
    assert found["perplexity"] == pytest.approx(len(tokenizer), rel=1e-12)
    assert found["bits_per_byte"] == pytest.approx(math.log2(len(tokenizer)) * tokens / bytes_, rel=1e-12)
    assert (found["tokens"], found["bytes"], found["documents"]) == (tokens, bytes_, len(TEXTS))
    assert found["loss_standard_error"] == pytest.approx(0, abs=1e-12)
    assert found["bits_per_byte_standard_error"] > 0


def test_the_bytes_are_those_of_the_predicted_text(tokenizer, without_start):
    texts = ["Every token is", "öl"]
    whole, rest = (encode_documents(texts, used) for used in (tokenizer, without_start))
    assert [document.scored_bytes for document in whole] == [14, 3]
    first = tokenizer.decode(tokenizer(texts[0])["input_ids"][:1])
    assert rest[0].scored_bytes == 14 - len(first) > 0
    assert len(rest[0].ids_T) == len(whole[0].ids_T) - 1


@pytest.mark.parametrize("seq_length", [1, 2, 7, 16, 1000])
def test_every_token_is_in_one_window(seq_length, tokenizer):
    documents = encode_documents(TEXTS, tokenizer)
    windows = cut_windows(documents, seq_length)
    lengths = [len(window.inputs_T) for window in windows]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) <= seq_length
    assert all(len(window.inputs_T) == len(window.targets_T) for window in windows)
    for index, document in enumerate(documents):
        own = [window for window in windows if window.document == index]
        seen = sorted(torch.cat([window.targets_T for window in own]).tolist())
        assert seen == sorted(document.ids_T[1:].tolist())


def test_standard_error_of_a_ratio():
    # Equal denominators: the standard error of a mean.
    values = torch.tensor([1.0, 2.0, 4.0, 9.0]).double()
    assert ratio_error(3 * values, torch.full((4,), 3.0).double()) == pytest.approx(values.std().item() / 2)
    assert ratio_error(values[:1], values[:1]) is None


@pytest.mark.parametrize("per_doubling", [1, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 64, 100, 1024])
def test_ranges_cover_the_positions(length, per_doubling):
    ranges = position_ranges(length, per_doubling)
    assert [position for first, end in ranges for position in range(first, end)] == list(range(length))


# The command.


@pytest.mark.parametrize("name", ["linformer", "gpt2", "llama", "gemma2"])
def test_command_writes_table_numbers_and_picture(name, saved, tokenizer, tmp_path, capsys):
    assert main(["evaluate", saved(name), "--text_files", *FILES, "--seq_length", "16", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    found = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    model = AutoModelForCausalLM.from_pretrained("model").double()
    expected = summarise(score_documents(model, encode_documents(TEXTS, tokenizer), 16))
    for key in ("loss", "perplexity", "bits_per_byte", "loss_standard_error"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4)
    assert found["documents"] == len(TEXTS)
    assert found["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert f"{found['perplexity']:.4f}" in output
    assert f"{found['bits_per_byte']:.4f}" in output
    assert "9-16" in output
    assert (tmp_path / "evaluation/loss_by_position.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in (tmp_path / "evaluation").iterdir()) == [
        "evaluation.json",
        "loss_by_position.png",
    ]


def test_defaults_and_limits(saved, tmp_path):
    folder = saved("linformer")
    found = evaluate(folder, FILES, device="cpu", max_documents=2, output_dir="here")
    assert found["seq_length"] == 32
    assert found["documents"] == 2
    assert evaluate(folder, FILES[2:3], device="cpu", dtype="bfloat16")["loss_standard_error"] is None


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs a command that must be refused in one line and write nothing; returns the line."""

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(["evaluate", *arguments, "--device", "cpu"]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert sorted(tmp_path.rglob("*")) == before
        return [line for line in lines if line.startswith("linpass: error: ")][0]

    return run


def test_refuses_arguments(saved, refused, tmp_path):
    folder = saved("gpt2")
    (tmp_path / "blank.txt").write_text("  ")
    (tmp_path / "empty.txt").write_text("")
    assert "text_files" in refused(folder)
    assert "must be a file; none there" in refused(folder, "--text_files", "nowhere.txt")
    assert "the file is empty" in refused(folder, "--text_files", "empty.txt")
    assert "only white space" in refused(folder, "--text_files", "blank.txt")
    assert "seq_length=33 must be at most 32" in refused(folder, "--text_files", *FILES, "--seq_length", "33")
    assert "'0' must be a whole number, 1 or more" in refused(folder, "--text_files", *FILES, "--seq_length", "0")
    assert "float16" in refused(folder, "--text_files", *FILES, "--dtype", "float16")
    assert "'text0.txt' is in the way" in refused(folder, "--text_files", *FILES, "--output_dir", "text0.txt")


def test_refuses_a_device_that_is_not_there(saved, capsys):
    folder = saved("gpt2")
    for device in ("abacus", "cuda:99"):
        assert main(["evaluate", folder, "--text_files", *FILES, "--device", device]) == 2
        assert f"device='{device}' must be a device of this machine" in capsys.readouterr().err


def test_refuses_models(saved, refused, tokenizer, tiny_config, tmp_path):
    ids = common(tokenizer)
    assert "model='nowhere' must hold a causal language model" in refused("nowhere", "--text_files", *FILES)
    encoder = LinformerForMaskedLM(tiny_config(**ids, causal=False))
    assert "must hold a causal language model" in refused(saved(encoder), "--text_files", *FILES)
    base = LinformerModel(tiny_config(**ids))
    assert "its weights lack lm_head.weight" in refused(saved(base), "--text_files", *FILES)
    classifier = LinformerForSequenceClassification(tiny_config(**ids))
    assert "its weights lack lm_head.weight" in refused(saved(classifier), "--text_files", *FILES)
    small = LinformerForCausalLM(tiny_config(**(ids | {"vocab_size": 100, "bos_token_id": 0, "eos_token_id": 0})))
    line = refused(saved(small), "--text_files", *FILES)
    assert f"its tokenizer has {len(tokenizer)} ids, the model only 100" in line
    bidirectional = BertLMHeadModel(BertConfig(**ids, **SIZES, max_position_embeddings=32))
    assert "must be causal: its predictions change" in refused(saved(bidirectional), "--text_files", *FILES)


def test_a_missing_matplotlib_is_told_before_the_model_is_read(refused, saved, monkeypatch):
    saved("gpt2")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "linpass evaluate needs matplotlib" in refused("nowhere", "--text_files", *FILES)


def test_help_imports_no_torch():
    code = (
        "import sys; sys.argv = ['linpass', 'evaluate', '--help']; from linpass.cli import main\n"
        "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "usage: linpass evaluate MODEL" in run.stdout


def test_refuses_broken_weights(saved, refused, tokenizer, tiny_config):
    model = make("gpt2", tokenizer, tiny_config)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    assert "losses that are not finite" in refused(saved(model), "--text_files", *FILES)
