"""`linpass compare`: its rows, its encoder, its contestants, what it measures and what it prints."""

import gzip
import json
import math
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from linpass.cli import main
from linpass.errors import InputError
from linpass.singlepass import contestants as contest
from linpass.singlepass import documentation
from linpass.singlepass.compare import scores
from linpass.singlepass.contestants import Settings, contestants, matched, rbf_ridge
from linpass.singlepass.default_encoder import train_encoder
from linpass.singlepass.documentation import clean_passage, documentation_rows, stored_documentation_rows
from linpass.singlepass.labelled_text import LabelledText, read_labelled_files
from linpass.singlepass.measurement import measured
from linpass.singlepass.simple_transformer import SimpleTransformer, predict, train_simple_transformer
from linpass.singlepass.sources import encode, load_encoder, mean_features

# float64 sums of some hundred products, through one solve.
ORACLE = 1e-9
# float32 hidden states of order one: other shapes take other sums.
FLOAT32 = 1e-5

PNG = b"\x89PNG\r\n\x1a\n"
SETTINGS = Settings(3, 2, 32, 0.01, 42, classes=2, vocab_size=50, quiet=True)
ENCODER = {
    "vocab_size": 300,
    "embed_dim": 32,
    "depth": 1,
    "heads": 2,
    "seq_length": 64,
    "k": 8,
    "causal": False,
    "position_embedding": "rotary",
    "rank": None,
    "dropout": 0.0,
}


def sentence(number: int, topic: str) -> str:
    """A text of 14 words or more about a topic."""
    return f"The {topic} number {number} is what this function returns to {topic} users in the case {number * 7} of it."


@pytest.fixture
def rows():
    """A function (rows, features) -> the tensors of a contest: two classes, apart by two standard deviations."""

    def make(train=200, features=6):
        generator = torch.Generator().manual_seed(3)
        tensors = {}
        for side, count in (("train", train), ("test", 100)):
            labels_N = torch.arange(count) % 2
            centre_ND = torch.randn(count, features, generator=generator)
            centre_ND[:, 0] += 3.0 * labels_N
            ids_NT = torch.randint(25, (count, 9), generator=generator) + 25 * labels_N[:, None]
            tensors |= {f"{side}_features": centre_ND, f"{side}_labels": labels_N, f"{side}_ids": ids_NT}
            tensors[f"{side}_lengths"] = torch.randint(3, 10, (count,), generator=generator)
        return tensors

    return make


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages of 60 files whose import fails, on the path; their names."""
    for package, topic in (("alpha_docs", "tensor"), ("beta_docs", "token")):
        (tmp_path / package).mkdir()
        for number in range(60):
            text = f'"""{sentence(number, topic)}\n\n{sentence(number + 100, topic)}\n\nEvery file of the two packages '
            text += 'has this very sentence about nothing in particular."""\nraise RuntimeError("imported")\n'
            (tmp_path / package / f"module_{number}.py").write_text(text)
    (tmp_path / "alpha_docs/broken.py").write_text("def (")
    monkeypatch.syspath_prepend(str(tmp_path))
    return ("alpha_docs", "beta_docs")


def test_the_default_rows_are_balanced_and_no_passage_is_on_both_sides(packages):
    train, test = documentation_rows(packages, 80, 20, quiet=True)
    assert train.classes == test.classes == list(packages)
    assert [train.labels.count(0), train.labels.count(1), test.labels.count(0), test.labels.count(1)] == [
        40,
        40,
        10,
        10,
    ]
    assert not set(train.texts) & set(test.texts)
    assert len(set(train.texts)) == 80
    assert documentation_rows(packages, 80, 20, quiet=True) == (train, test)
    for text, label in zip(train.texts, train.labels, strict=True):
        assert "Every file" in text or ("tensor", "token")[label] in text


def test_no_file_is_on_both_sides(packages):
    train, test = documentation_rows(packages, 80, 20, quiet=True)

    def files(side):
        texts = [text for text in side.texts if "Every file" not in text]
        return {(text.split()[1], int(text.split()[3]) % 100) for text in texts}

    assert files(train)
    assert not files(train) & files(test)


def test_the_order_of_the_rows_mixes_the_classes(packages):
    train, _test = documentation_rows(packages, 80, 20, quiet=True)
    runs = 1 + sum(one != other for one, other in zip(train.labels, train.labels[1:], strict=False))
    assert runs > 25  # 41 on average


def test_a_package_without_sources_is_a_clear_error(packages):
    with pytest.raises(InputError, match="500 passages in the source files of alpha_docs, there are .*--text_files"):
        documentation_rows(packages, 800, 200, quiet=True)
    with pytest.raises(InputError, match="the package no_such_package, which is not installed"):
        documentation_rows(("no_such_package", "beta_docs"), 80, 20, quiet=True)


def test_the_default_rows_are_kept_and_made_again_when_damaged(packages, tmp_path, monkeypatch):
    calls = []

    def counted(quiet):
        calls.append(1)
        return documentation_rows(packages, 40, 10, quiet=quiet)

    monkeypatch.setattr(documentation, "documentation_rows", counted)
    first = stored_documentation_rows(tmp_path / "cache", quiet=True)
    assert stored_documentation_rows(tmp_path / "cache", quiet=True) == first
    assert len(calls) == 1
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text("{")
    assert stored_documentation_rows(tmp_path / "cache", quiet=True) == first
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("paragraph", "passage"),
    [
        ("Too short to be of use.", None),
        (">>> x = 1 " + "word " * 20 + ".", None),
        ("x = y + z ** 2, a_b[c] == d_e(f) and g.h >= i.j or k % l != m.", None),
        (
            "Returns what :class:`~torch.nn.Module` computes of **all** the inputs that PyTorch was given in one call.",
            "Returns what Library.nn.Module computes of all the inputs that Library was given in one call.",
        ),
        (
            "See the [guide](https://a.b/c) of Transformers for what `this` does to each token that it is given.",
            "See the guide of Library for what this does to each token that it is given.",
        ),
    ],
)
def test_what_gives_the_answer_away_is_taken_out(paragraph, passage):
    assert clean_passage(paragraph) == passage


def test_labelled_files_of_every_kind_hold_the_same_rows(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    records = [{"body": f"text {n}, of two parts", "kind": ("10", "9")[n % 2]} for n in range(4)]
    lines = "\n".join(json.dumps(record | {"kind": int(record["kind"])}) for record in records)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.csv").write_text("kind,body\n" + "".join(f'{r["kind"]},"{r["body"]}"\n' for r in records))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"):
        found = read_labelled_files([str(tmp_path / name)], "body", "kind")
        assert found == LabelledText([r["body"] for r in records], [1, 0, 1, 0], ["9", "10"]), name


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a"}', "row 1 must have the column label_column='label'; there is: text"),
        ('{"text": "a", "label": 1}', "must hold rows of two classes or more; the labels are: 1"),
        ('{"text": 3, "label": 1}', "row 1: 'text' must hold text, not 3"),
        ('{"text": "a", "label": 0.5}', "row 1: 'label' must hold a class, text or a whole number, not 0.5"),
        ('{"text": "a", "label": 1}\n{', "could not be read"),
    ],
)
def test_labelled_files_that_cannot_be_used(tmp_path, lines, message):
    (tmp_path / "a.jsonl").write_text(lines)
    with pytest.raises(InputError, match="text_files") as error:
        read_labelled_files([str(tmp_path / "a.jsonl")], "text", "label")
    assert message in str(error.value)


def test_a_split_keeps_equal_texts_together_and_every_class_on_both_sides():
    texts = [f"text {n % 40}" for n in range(80)] + ["rare one", "rare two"]
    whole = LabelledText(texts, [n % 2 for n in range(80)] + [2, 2], ["a", "b", "c"])
    train, test = whole.split(0.25, seed=1)
    assert not set(train.texts) & set(test.texts)
    assert sorted(train.texts + test.texts) == sorted(texts)
    assert set(train.labels) == set(test.labels) == {0, 1, 2}
    assert [test.labels.count(label) for label in (0, 1, 2)] == [10, 10, 1]
    assert whole.split(0.25, seed=1) == (train, test)
    with pytest.raises(InputError, match="class 'c' must have at least two different texts"):
        LabelledText([*texts[:-1], "rare one"], whole.labels, whole.classes).split(0.25, seed=1)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A folder with a small trained encoder."""
    texts = [sentence(number, topic) for number in range(60) for topic in ("tensor", "token")]
    model, tokenizer = train_encoder(texts, ENCODER, 3, quiet=True)
    folder = tmp_path_factory.mktemp("encoder")
    model.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_one_seed_trains_one_encoder_and_leaves_the_generator_alone():
    texts = [sentence(number, "tensor") for number in range(60)]
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    (one, _), (two, _) = (train_encoder(texts, ENCODER, 3, quiet=True) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    for (name, first), second in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(first, second), name


def test_masked_training_lowers_the_loss():
    texts = [sentence(number, "tensor") for number in range(60)]
    losses = []
    for steps in (1, 60):
        model, tokenizer = train_encoder(texts, ENCODER, steps, quiet=True)
        ids = torch.tensor([tokenizer(texts[7])["input_ids"]])
        hidden = ids.clone()
        hidden[:, 3::5] = tokenizer.mask_token_id
        with torch.no_grad():
            losses.append(F.cross_entropy(model(input_ids=hidden).logits[0, 3::5], ids[0, 3::5]).item())
    assert losses[1] < losses[0] - 1


def test_features_are_the_mean_of_the_real_tokens(encoder_folder):
    model, tokenizer = load_encoder(encoder_folder)
    texts = [" ".join(sentence(number, "token").split()[: 3 + number % 12]) for number in range(70)]
    token_ids = encode(texts, tokenizer, 16)
    features_ND = mean_features(model, token_ids, tokenizer.pad_token_id, quiet=True)
    for ids, row_D in zip(token_ids, features_ND, strict=True):
        assert len(ids) <= 16
        with torch.no_grad():
            alone_D = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(row_D, alone_D, atol=FLOAT32, rtol=0)


def test_padding_changes_nothing_in_the_simple_transformer():
    model = SimpleTransformer(50, 3, 12).eval()
    ids_NT, lengths_N = torch.randint(50, (6, 12)), torch.tensor([3, 12, 1, 7, 5, 9])
    together_NC = predict(model, ids_NT, lengths_N)
    other_NT = torch.where(torch.arange(12) < lengths_N[:, None], ids_NT, 49)
    torch.testing.assert_close(predict(model, other_NT, lengths_N), together_NC, atol=FLOAT32, rtol=0)
    for row in range(6):
        alone_NC = predict(model, ids_NT[row : row + 1], lengths_N[row : row + 1])
        torch.testing.assert_close(alone_NC[0], together_NC[row], atol=FLOAT32, rtol=0)


def test_the_simple_transformer_learns(rows):
    tensors = rows()
    model = SimpleTransformer(50, 2, 9)
    ids_NT, lengths_N, labels_N = (tensors[f"train_{name}"] for name in ("ids", "lengths", "labels"))
    options = {"epochs": 5, "batch_size": 32, "learning_rate": 3e-3, "quiet": True}
    train_simple_transformer(model, ids_NT, lengths_N, labels_N, **options)
    right_N = predict(model, tensors["test_ids"], tensors["test_lengths"]).argmax(1) == tensors["test_labels"]
    assert right_N.double().mean() > 0.95


def test_an_epoch_of_the_simple_transformer_visits_every_row_once(rows, monkeypatch):
    seen = []
    original = contest.simple_transformer.__globals__["train_simple_transformer"].__globals__["batch"]

    def counted(ids_BT, lengths_B):
        seen.append(ids_BT[:, 0])
        return original(ids_BT, lengths_B)

    monkeypatch.setattr("linpass.singlepass.simple_transformer.batch", counted)
    ids_NT = torch.arange(70)[:, None].expand(70, 4)
    lengths_N, labels_N = torch.randint(1, 5, (70,)), torch.zeros(70, dtype=torch.int64)
    model = SimpleTransformer(70, 2, 4)
    train_simple_transformer(model, ids_NT, lengths_N, labels_N, epochs=1, batch_size=8, learning_rate=1e-3, quiet=True)
    assert sorted(torch.cat(seen).tolist()) == list(range(70))
    assert max(map(len, seen)) == 8


@pytest.mark.parametrize("contestant", contestants(), ids=lambda contestant: contestant.name)
def test_every_contestant_learns_what_can_be_learned(contestant, rows):
    tensors = rows()
    given = {name: tensors[name] for name in (*contestant.inputs, "train_labels")}
    settings = Settings(100, 5, 32, 0.01, 42, classes=2, vocab_size=50, quiet=True)
    logits_NC, passes = contestant.fit(given, settings)
    assert logits_NC.shape == (100, 2)
    result = scores(logits_NC, tensors["test_labels"])
    assert result["accuracy"] > 0.85  # the best possible is 0.93
    assert passes
    assert result["log_loss"] < 0.6  # a coin: 0.69


def test_match_sgd_is_what_sgd_gives(rows):
    tensors = rows()
    head = nn.Linear(6, 2).double()
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=SETTINGS.learning_rate)
    features_ND, targets_NC = tensors["train_features"].double(), F.one_hot(tensors["train_labels"], 2).double()
    for _epoch in range(SETTINGS.epochs):
        for x_BD, y_BC in zip(features_ND.split(32), targets_NC.split(32), strict=True):
            optimizer.zero_grad()
            (0.5 * (head(x_BD) - y_BC).square().sum(1).mean()).backward()
            optimizer.step()
    expected_NC = head(tensors["test_features"].double())
    logits_NC, _passes = matched("sgd", tensors, SETTINGS)
    temperature = (expected_NC / logits_NC).flatten()
    torch.testing.assert_close(temperature, temperature[:1].expand(200), atol=ORACLE, rtol=ORACLE)


def test_the_temperature_of_kernel_ridge_is_from_rows_left_out(rows, monkeypatch):
    tensors = rows(train=30)
    seen = []
    monkeypatch.setattr(contest, "fit_temperature", lambda outputs_NC, labels_N: seen.append(outputs_NC) or 1.0)
    found = []
    solve = contest.kernel_ridge
    monkeypatch.setattr(contest, "kernel_ridge", lambda *a, **k: found.append((solve(*a, **k), a)) or found[-1][0])
    rbf_ridge(tensors, SETTINGS)
    ((solution, (kernel, features_ND, targets_NC)),) = found
    for row in (0, 17, 29):
        others = torch.arange(30) != row
        alone = solve(kernel, features_ND[others], targets_NC[others], solution.regularization)
        kernel_1N = kernel(features_ND[row : row + 1].double(), features_ND[others].double())
        torch.testing.assert_close(seen[0][row], alone.predict(kernel_1N)[0], atol=1e-6, rtol=0)  # a float32 kernel


def test_scores_by_hand():
    logits_NC = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]).double().log()
    result = scores(logits_NC, torch.tensor([0, 1, 1, 0]))
    assert result["accuracy"] == 0.75
    assert result["accuracy_standard_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert result["expected_calibration_error"] == pytest.approx((0.1 + 0.8 + 0.3 + 0.4) / 4)
    assert result["log_loss"] == pytest.approx(-(math.log(0.9) + math.log(0.2) + math.log(0.7) + math.log(0.6)) / 4)


def load_nothing(size):
    return torch.zeros(size)


def hold(megabytes, _loaded):
    return torch.ones(megabytes * 10**6 // 4).sum().item()


def sleep_and_count(seconds, _loaded):
    time.sleep(seconds)
    return 7


def refuse(_loaded):
    raise InputError("rows=0 must be more")


def fail(_loaded):
    raise KeyError("a bug")


def test_memory_is_what_the_work_takes_and_not_what_was_loaded():
    result, cost = measured(partial(load_nothing, 50_000_000), partial(hold, 120))
    assert result == 30_000_000
    assert cost.peak_bytes is not None
    assert 115e6 < cost.peak_bytes < 150e6  # 120 MB and the first use of threads


def test_waiting_takes_time_and_no_processor():
    result, cost = measured(partial(load_nothing, 1), partial(sleep_and_count, 0.3))
    assert result == 7
    assert 0.3 <= cost.seconds < 3
    assert cost.cpu_seconds < 0.2


def test_what_goes_wrong_in_the_measured_process_is_told():
    with pytest.raises(InputError, match="rows=0 must be more"):
        measured(partial(load_nothing, 1), refuse)
    with pytest.raises(RuntimeError, match="a bug"):
        measured(partial(load_nothing, 1), fail)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, encoder_folder):
    """A folder after `linpass compare` on two files of one's own, and what it printed."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("compare")
    for name, numbers in (("train", range(60)), ("test", range(60, 90))):
        lines = [{"text": sentence(n, topic), "label": topic} for n in numbers for topic in ("tensor", "token")]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ["--text_files", str(folder / "train.jsonl"), "--test_files", str(folder / "test.jsonl")]
    flags += ["--model", encoder_folder, "--epochs", "2", "--output_dir", str(folder / "out")]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["compare", *flags]) == 0
    return folder, printed.getvalue()


def test_the_files_and_the_table_tell_the_same(finished):
    folder, printed = finished
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["compare.json", "compare.png"]
    assert (folder / "out/compare.png").read_bytes().startswith(PNG)
    result = json.loads((folder / "out/compare.json").read_text())
    assert (result["train_rows"], result["test_rows"], result["classes"]) == (120, 60, ["tensor", "token"])
    assert result["majority"] == 0.5
    assert [entry["name"] for entry in result["contestants"]] == [contestant.name for contestant in contestants()]
    lines = printed.splitlines()
    table = lines[lines.index("") : -1]
    assert max(map(len, table)) <= 120
    for entry in result["contestants"]:
        assert "said" not in entry, entry
        (line,) = [line for line in table if line.startswith(entry["name"] + " ")]
        assert f"{100 * entry['accuracy']:.2f} ± {100 * entry['accuracy_standard_error']:.2f}" in line
        features = result["features_cost"]["seconds"] if entry["on_features"] else 0
        assert entry["total_seconds"] == pytest.approx(entry["seconds"] + features)
        assert entry["cpu_seconds"] > 0
        assert entry["peak_bytes"] >= 0
    assert not result["contestants"][0]["on_features"]


def test_what_is_not_installed_or_refused_has_a_row_that_says_so(monkeypatch):
    from linpass.singlepass import compare as command
    from linpass.singlepass.measurement import Cost

    found = contest.find_spec
    monkeypatch.setattr(contest, "find_spec", lambda name: None if name == "sklearn" else found(name))
    (logistic,) = [contestant for contestant in contestants() if contestant.group == "scikit-learn"]
    test = LabelledText(["a", "b"], [0, 1], ["x", "y"])
    entry = command.run(logistic, "nowhere", SETTINGS, Cost(1.0, 1.0, None), test)
    assert entry["said"] == "not run: sklearn is not installed: pip install 'linpass[compare]'"

    def refused(load, work):
        raise InputError("learning_rate=9.0 diverges")

    monkeypatch.setattr(command, "measured", refused)
    entry = command.run(contestants()[1], "nowhere", SETTINGS, Cost(1.0, 1.0, None), test)
    assert entry["said"] == "not run: learning_rate=9.0 diverges"


def test_a_picture_and_a_table_are_made_without_the_rows_that_could_not_run(finished, tmp_path):
    from linpass.singlepass.comparison_report import plot, report

    result = json.loads((finished[0] / "out/compare.json").read_text())
    result["contestants"][2] = {"name": "one", "group": "scikit-learn", "on_features": True, "said": "not run: why"}
    result["features_cost"]["peak_bytes"] = None
    plot(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    assert "not run: why" in report(result)
