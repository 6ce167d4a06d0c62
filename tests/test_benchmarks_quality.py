"""The harness of the quality benchmark: its experiments, its data, its queue on a tiny run, its arithmetic."""

import json
import math
import os
import statistics
import time
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from benchmarks.quality import figures, leaking, variants
from benchmarks.quality.__main__ import main
from benchmarks.quality.along import VALIDATION, apart_along_the_way
from benchmarks.quality.data import CHOOSING, UNTOUCHED, part_folders, split_documents, unpack
from benchmarks.quality.experiments import (
    LINPASS,
    Run,
    check,
    make_run,
    read_theme,
    runs_of,
    theme_names,
)
from benchmarks.quality.report import answer_rows, write_report
from benchmarks.quality.results import (
    Finished,
    Results,
    Spread,
    chosen_rates,
    difference,
    finished,
    worth_their_time,
)
from benchmarks.quality.schedule import Schedule, Settings
from benchmarks.quality.single_run import carry_out, train
from benchmarks.quality.tables import along_table, far_less_near, leaking_table, loss_table
from linpass import LinformerConfig, LinformerForCausalLM, LinformerForMaskedLM, layers_linformer
from linpass.errors import InputError
from linpass.training.documents import python_documents
from linpass.training.tokens import TokenStore

DOCUMENTS = 12  # a file
STEPS = 6
TINY = {
    "question": "Does the harness work?",
    "preset": "debug",
    "tokens": 64 * 8 * STEPS,
    "flags": {"vocab_size": 384, "seq_length": 64, "logging_steps": 1, "intermediate_size": 256},
    "sides": {"linformer": {}, "full": {"k": 0, "window_size": 64}},
    "learning_rates": [0.003],
    "seeds": [1],
    "reference": "full",
    "untouched": True,
    "sample": True,
    "left_to_right": True,
    "goal": -0.5,
    "also_against": ["linformer"],
}


def runs_for_all_sides(name):
    """The runs of a theme with the first seed, as if every side had a rate: another one without QK-norm."""
    theme = read_theme(name)
    names = [values.get("rate_of", theme.rate_of or side) for side, values in theme.sides.items()]
    rates = {name: 2e-3 if "no QK-norm" in name else 1e-3 for name in names}
    return [run for run in runs_of(theme, rates) if run.flags["seed"] == theme.seeds[0]]


# --- Experiments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", theme_names())
def test_linpass_train_takes_every_run(name):
    runs = runs_for_all_sides(name)
    assert {run.side for run in runs} == set(read_theme(name).sides)
    for run in runs:
        check(run)
        assert 0.99 < run.tokens / run.theme.tokens <= 1
    assert len({run.key for run in runs}) == len(runs)


def test_a_flag_that_does_not_exist_is_refused(tmp_path):
    theme = replace(read_theme("claim_1024"), sides={"full": {"windows": 3}})
    with pytest.raises(InputError, match="side 'full': --windows is no flag of linpass train; nearest: window"):
        check(make_run(theme, "full", 1e-3, 1))
    theme = replace(theme, sides={"full": {"k": 100}})
    with pytest.raises(InputError, match="k=100 must give every block"):
        check(make_run(theme, "full", 1e-3, 1))
    (tmp_path / "x.json").write_text(json.dumps(TINY | {"colour": "red"}))
    with pytest.raises(InputError, match="sets colour"):
        read_theme(str(tmp_path / "x.json"))
    (tmp_path / "x.json").write_text(json.dumps(TINY | {"also_against": ["half"]}))
    with pytest.raises(InputError, match="also_against=.'half'. must be sides"):
        read_theme(str(tmp_path / "x.json"))


@pytest.mark.parametrize("n", [1024, 4096])
def test_the_sides_of_the_claim_have_equal_budgets(n):
    from linpass.training.architectures import build_model
    from linpass.training.parser import TrainParser
    from linpass.training.train import build_config

    sizes, budgets = {}, set()
    for run in runs_for_all_sides(f"claim_{n}"):
        if run.program == LINPASS:
            parsed = TrainParser().parse([*run.command(), "--output_dir", "nowhere"])
            training = parsed.training
            with torch.device("meta"):
                sizes[run.side] = build_model(training.architecture, build_config(parsed)).num_parameters()
            names = ("max_steps", "per_device_train_batch_size", "weight_decay", "adam_beta2", "warmup_steps", "seed")
            budgets.add(tuple(getattr(training, name) for name in names) + (parsed.model.seq_length,))
            if run.side == "full":
                assert parsed.model.k == 0
                assert parsed.model.window_size >= n
    sides = {"linformer", "full", "gpt2", "llama", "window", "window of k + w"}
    sides |= {"full, no QK-norm", "linformer, no QK-norm"}
    assert set(sizes) == sides | ({"window, no QK-norm"} if n == 1024 else set())
    assert max(sizes.values()) < 1.01 * min(sizes.values())
    assert len(budgets) == 1


def test_the_claim_has_seeds_that_no_rate_was_chosen_with_and_shares_runs_with_the_ablations():
    for n in (1024, 4096):
        assert not set(read_theme(f"claim_{n}").seeds) & set(read_theme(f"rates_{n}").seeds)
    claim = {run.side: run.key for run in runs_for_all_sides("claim_1024")}
    ablations = {run.side: run.key for run in runs_for_all_sides("ablations")}
    assert claim["linformer"] == ablations["base"]
    assert claim["full"] == ablations["full attention"]
    assert claim["linformer, no QK-norm"] == ablations["no QK-norm"]


def test_a_side_may_have_rates_and_seeds_of_its_own():
    theme = replace(read_theme("rates_1024"), sides={"a": {}, "b": {"learning_rates": [0.1, 0.2], "seeds": [7, 8]}})
    theme = replace(theme, learning_rates=[0.1], seeds=[6, 7])
    found = [(run.flags["seed"], run.side, run.flags["learning_rate"]) for run in runs_of(theme, {})]
    assert found == [(6, "a", 0.1), (7, "a", 0.1), (7, "b", 0.1), (7, "b", 0.2), (8, "b", 0.1), (8, "b", 0.2)]
    assert theme.planned() == len(found)


# --- Data -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of data from a few pages of Python's documentation, and the documents."""
    from linpass.training.tokenization import train_tokenizer

    folder = tmp_path_factory.mktemp("quality")
    long = (text[:2000] for text in python_documents() if len(text) > 900)
    pages = list(islice(long, 4 * DOCUMENTS))
    files = {}
    for number, name in enumerate(("train_a", "train_b", "held_out_a", "held_out_b")):
        texts = pages[number * DOCUMENTS : (number + 1) * DOCUMENTS]
        files[name] = [text[:600] for text in texts] if name.startswith("held_out") else texts
        lines = "".join(json.dumps({"text": text}) + "\n" for text in files[name])
        (folder / f"{name}.jsonl").write_text(lines)
    train_tokenizer(files["train_a"], 384).save_pretrained(folder / "tokenizer")
    paths = {name: str(folder / f"{name}.jsonl") for name in files}
    words = ["prepare", "--train", paths["train_a"], paths["train_b"]]
    words += ["--validation", paths["held_out_a"], paths["held_out_b"], "--tokenizer", str(folder / "tokenizer")]
    assert main([*words, "--output", str(folder / "data"), "--tokens", "4000", "--parts", "2"]) == 0
    return folder / "data", files


def test_no_document_is_in_both_halves(prepared):
    data, files = prepared
    halves = {}
    for name in (CHOOSING, UNTOUCHED):
        halves[name] = [json.loads(line)["text"] for line in (data / f"{name}.jsonl").read_text().splitlines()]
    assert not set(halves[CHOOSING]) & set(halves[UNTOUCHED])
    assert sorted(halves[CHOOSING] + halves[UNTOUCHED]) == sorted(files["held_out_a"] + files["held_out_b"])
    for source in ("held_out_a", "held_out_b"):  # stratified
        assert 0 < len(set(halves[CHOOSING]) & set(files[source])) < DOCUMENTS


def test_halves_are_about_equal_and_drawn():
    sizes = np.random.default_rng(0).lognormal(sigma=2, size=200).astype(int) + 1
    chosen = np.array(split_documents(sizes.tolist(), 3))
    assert abs(sizes[chosen].sum() - sizes[~chosen].sum()) <= sizes.max()
    assert split_documents(sizes.tolist(), 3) == chosen.tolist()
    assert split_documents(sizes.tolist(), 4) != chosen.tolist()


def test_parts_hold_other_tokens_in_equal_shares(prepared):
    from linpass.training.tokenization import load_tokenizer

    data, files = prepared
    parts = [TokenStore(folder) for folder in part_folders(data, 2)]
    assert [len(part.ids) for part in parts] == [4000, 4000]
    assert [len(part) for part in parts] == [2, 2]  # a stream for each file
    lengths = [[len(stream) for stream in part] for part in parts]
    assert np.abs(np.subtract(*lengths)).max() <= 1
    tokenizer = load_tokenizer(str(data / "tokenizer"), 384)
    for stream, name in enumerate(("train_a", "train_b")):
        text = tokenizer.decode(np.concatenate([part[stream] for part in parts]))
        documents = text.split(tokenizer.eos_token)
        assert len(documents) > 2
        assert documents[0] in files[name]
        assert documents[1] in files[name]
        assert documents[0] != documents[1]


def test_what_travels_arrives(prepared, tmp_path):
    data, _files = prepared
    unpack(sorted((data / "packed").glob("*.tar.xz")), tmp_path)
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        assert path.read_bytes() == (data / path.relative_to(tmp_path)).read_bytes()
    assert (TokenStore(tmp_path / "part_1").ids == TokenStore(data / "part_1").ids).all()
    with pytest.raises(InputError, match="lacks part_2"):
        part_folders(tmp_path, 3)
    (tmp_path / "broken.tar.xz").write_bytes((data / "packed/base.tar.xz").read_bytes()[:500])
    with pytest.raises(InputError, match=r"broken\.tar\.xz"):
        unpack([tmp_path / "broken.tar.xz"], tmp_path / "other")


# --- Queue ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(prepared, tmp_path_factory):
    """Theme file and settings of a queue that trained a Linformer and full attention, both at a time."""
    folder = tmp_path_factory.mktemp("queue")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    settings = Settings(prepared[0], folder / "results", 300, processes=2, scratch=folder / "scratch")
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        Schedule([str(folder / "tiny.json")], settings).work()
    finally:
        os.environ.pop("OMP_NUM_THREADS") if threads is None else os.environ.update(OMP_NUM_THREADS=threads)
    return str(folder / "tiny.json"), settings


def test_the_queue_trains_measures_and_cleans_up(ran):
    theme, settings = ran
    results = Results(settings.output)
    rows = {row["side"]: row for row in results.runs.values()}
    assert set(rows) == {"linformer", "full"}
    for row in rows.values():
        assert 3 < row["choosing"]["loss"] < math.log(384) + 0.5
        assert row["tokens"] == 64 * 8 * STEPS
        assert row["honest"]["left_to_right"] == pytest.approx(row["honest"]["whole_rows"], abs=1e-4)
        assert row["honest"]["places"] > 100
        assert row["environment"]["torch"] == torch.__version__
        assert row["flags"]["max_steps"] == STEPS
        assert row["speed"]["tokens_per_second"] > 0
        nats, tokens = (sum(row["choosing"][f"document_{name}"]) for name in ("nats", "tokens"))
        assert nats / tokens == pytest.approx(row["choosing"]["loss"], abs=1e-4)
        assert "untouched" not in str(row).replace("'untouched': True", "")  # it says that there is one, no more
    assert rows["linformer"]["choosing"]["loss"] != rows["full"]["choosing"]["loss"]
    assert rows["linformer"]["parameters"] > rows["full"]["parameters"]
    curves = {row["side"]: row["log"] for row in results.read("curves")}
    for side in rows:
        assert [step for step, loss, _validation in curves[side] if loss is not None] == list(range(1, STEPS + 1))
        assert any(validation is not None for _step, _loss, validation in curves[side])
    untouched = {row["side"]: row["untouched"] for row in results.read("untouched")}
    assert untouched["full"]["document_tokens"] != rows["full"]["choosing"]["document_tokens"]
    prompts = {tuple(text["prompt"] for text in row["sample"]) for row in results.read("samples")}
    assert len(prompts) == 1
    assert not any(settings.scratch.iterdir())


def test_a_run_that_is_stopped_goes_on(prepared, tmp_path, capsys, monkeypatch):
    """Its log stands in the results, as unfinished. Then it ends with all steps; stopped again, it is measured only."""
    one_side = {"sides": {"full": {"k": 0, "window_size": 64}}, "also_against": [], "resumable": True}
    (tmp_path / "tiny.json").write_text(json.dumps(TINY | one_side | {"tokens": 64 * 8 * 200}))
    settings = Settings(prepared[0], tmp_path / "results", 100, scratch=tmp_path / "scratch")
    schedule = Schedule([str(tmp_path / "tiny.json")], settings)
    schedule.start(schedule.left()[0], None)
    (child,) = schedule.children
    log = child.folder / "checkpoints" / "training_log.jsonl"
    while not (log.is_file() and len(log.read_text().splitlines()) > 3):
        assert child.process.poll() is None, (child.folder / "output.txt").read_text()
        time.sleep(0.05)
    schedule.stop([child])
    assert "stopped; its checkpoint is kept" in capsys.readouterr().out
    (unfinished,) = Results(settings.output).read("curves")
    assert unfinished["unfinished"]
    assert [step for step, *_ in unfinished["log"]][:3] == [1, 2, 3]
    steps = unfinished["log"][-1][0]
    assert 3 <= steps < 200

    order = json.loads((child.folder / "order.json").read_text())
    assert train(order, child.folder)
    monkeypatch.setattr("linpass.training.train.train", lambda *_: pytest.fail("trained once more"))
    answer = carry_out(order, child.folder)
    assert [step for step, loss, _validation in answer["log"] if loss is not None] == list(range(1, 201))
    assert answer["choosing"]["loss"] > 0


def test_what_is_finished_is_not_made_again(ran, tmp_path):
    theme, settings = ran
    again = Schedule([theme], settings)
    assert again.left() == []
    start = time.monotonic()
    again.work()
    assert time.monotonic() - start < 2
    assert len((settings.output / "runs.jsonl").read_text().splitlines()) == 2

    rows = (settings.output / "runs.jsonl").read_text().splitlines()
    (tmp_path / "runs.jsonl").write_text(rows[0] + "\n" + rows[1][:100])  # killed while it wrote
    left = Schedule([theme], replace(settings, output=tmp_path)).left()
    assert [run.side for run in left] == [json.loads(rows[1])["side"]]
    failed = json.loads(rows[1]) | {"failed": "out of memory"}
    (tmp_path / "runs.jsonl").write_text(rows[0] + "\n" + json.dumps(failed) + "\n")
    assert len(Schedule([theme], replace(settings, output=tmp_path)).left()) == 1


def test_other_settings_do_not_mix(ran):
    theme, settings = ran
    with pytest.raises(InputError, match="'torch_compile': False"):
        Schedule([theme], replace(settings, torch_compile=True))


def test_nothing_is_begun_that_would_end_too_late(ran, tmp_path):
    theme, settings = ran
    took = min(row["seconds"] for row in Results(settings.output).runs.values())
    other = tmp_path / "other.json"
    other.write_text(json.dumps(TINY | {"seeds": [2]}))
    assert Schedule([str(other)], replace(settings, seconds=took / 2)).next_run(None) is None
    assert Schedule([str(other)], replace(settings, seconds=took * 100)).next_run(None).side == "linformer"


def test_the_claim_waits_for_the_rates(ran, tmp_path):
    _theme, settings = ran
    schedule = Schedule(["claim_1024", "rates_1024"], replace(settings, output=tmp_path))
    assert {run.theme.name for run in schedule.left()} == {"rates_1024"}


def test_the_report_shows_the_untouched_half_when_it_is_asked_for(ran):
    theme, settings = ran
    results = Results(settings.output)
    untouched = {row["key"]: row["untouched"] for row in results.read("untouched")}
    text = write_report(settings.output, False, [theme])
    assert "rates" not in text
    assert "| linformer |" in text
    assert "First sample" in text
    part = finished(theme, results)
    honest = {run.side: row["honest"]["left_to_right"] for run, row in part.runs}
    assert f" | {honest['full']:.4f} |" in "\n".join(leaking_table(part))
    tables = {half: "\n".join(loss_table(part, half, untouched)) for half in (CHOOSING, UNTOUCHED)}
    losses = {row["side"]: row["untouched"]["loss"] for row in results.read("untouched")}
    assert f"{losses['full']:.4f}" in tables[UNTOUCHED]
    assert f"{losses['linformer'] - losses['full']:+.4f}" in tables[UNTOUCHED]
    assert f"{losses['full']:.4f}" not in tables[CHOOSING]
    assert f"| full | 1 | {losses['full'] - losses['linformer']:+.4f} |" in tables[UNTOUCHED]
    assert "The goal, set beforehand, is -0.5 for a Linformer" in tables[CHOOSING]


def test_how_long_a_run_may_take_is_that_of_its_theme(tmp_path):
    def row(theme, side, seconds, tokens=100, n=8, **more):
        flags = {"seq_length": n, "seed": 1, "learning_rate": 0.1}
        return {"theme": theme, "side": side, "seconds": seconds, "tokens": tokens, "flags": flags, CHOOSING: {}} | more

    def seconds(theme, side, tokens=100, n=8):
        run = SimpleNamespace(theme=SimpleNamespace(name=theme), side=side, tokens=tokens, flags={"seq_length": n})
        return results.seconds(run, assumed=2.0)

    results = Results(tmp_path)
    assert seconds("a", "x") == 200.0
    rows = [row("a", "x", 50.0), row("a", "x", 30.0), row("a", "y", 900.0, stood_still=860.0), row("b", "z", 600.0)]
    results.runs = dict(enumerate(rows))
    assert seconds("a", "x") == 30.0  # the last of its side
    assert seconds("a", "y", tokens=200) == 80.0
    assert seconds("a", "z") == 50.0  # the slowest of the theme, not that side of another
    assert seconds("c", "z") == 600.0
    assert seconds("c", "new") == 600.0
    assert seconds("a", "x", n=16) == 200.0


def test_a_queue_that_stood_still_says_so(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    queue = object.__new__(Schedule)
    queue.children = [SimpleNamespace(stood_still=0.0)]
    for slept in (0.2, 5.0, 300.2, 0.3, 100.2):
        monkeypatch.setattr(time, "sleep", lambda _seconds, slept=slept: now.__setitem__(0, now[0] + slept))
        queue.wait(0.2)
    assert queue.children[0].stood_still == pytest.approx(400.0)


def test_far_less_near_weighs_ranges_by_their_places():
    pairs = [(16, 9.0), (32, 1.0), (64, 2.0), (128, 3.0), (256, 9.0), (512, 5.0), (1024, 8.0)]
    near, far = (16 * 1 + 32 * 2 + 64 * 3) / 112, (256 * 5 + 512 * 8) / 768
    assert far_less_near(pairs) == pytest.approx(far - near)
    assert far_less_near(pairs[:5]) is None


def curve(side, seed, losses):
    """A run of `long`, four steps, with validation losses at some of them."""
    theme = read_theme("long")
    own = {name: value for name, value in theme.sides[side].items() if name in theme.flags}
    flags = theme.flags | own | {"seed": seed, "max_steps": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 1}
    log = [[1, 9.0, None], *([step, None, loss] for step, loss in losses)]
    return Run(theme, side, flags), log


def test_curves_are_compared_with_full_attention_of_the_same_norm_and_seed():
    ours = [curve("linformer, no QK-norm", seed, [(2, 5.0), (4, 4.0)]) for seed in (2, 3)]
    with_norm = curve("linformer", 2, [(2, 6.0), (4, 5.0)])
    assert apart_along_the_way([*ours, with_norm], VALIDATION) == []
    beside = curve("full, no QK-norm", 2, [(2, 4.5), (3, 4.25)])
    ((run, points),) = apart_along_the_way([*ours, with_norm, beside], VALIDATION)
    assert run is ours[0][0]
    assert points == [(2 * 1024 / 1e6, 0.5)]  # the only place at which both were measured
    found = apart_along_the_way([*ours, with_norm, beside, curve("full", 2, [(4, 3.0)])], VALIDATION)
    assert [(run.side, [value for _at, value in points]) for run, points in found] == [
        ("linformer, no QK-norm", [0.5]),
        ("linformer", [2.0]),
    ]


def test_the_table_along_the_way_has_validation_and_the_training_since_the_line_before():
    our_run, ours = curve("linformer, no QK-norm", 2, [(2, 5.0), (4, 4.0)])
    their_run, theirs = curve("full, no QK-norm", 2, [(2, 4.5), (4, 4.25)])
    training = [(1, 0.5), (2, 0.25), (3, 1.0), (4, 2.0)]  # how far ours is behind
    ours += [[step, 6.0 + apart, None] for step, apart in training[1:]]
    theirs += [[step, 6.0, None] for step, _apart in training[1:]]
    ours[0][1] = theirs[0][1] + training[0][1]
    head, _rule, *body = along_table([(our_run, ours), (their_run, theirs)])[-4:]
    assert "linformer, no QK-norm, seed 2, less full, no QK-norm" in head
    assert [line.split("|")[2].strip() for line in body] == ["+0.5000, +0.3750", "-0.2500, +1.5000"]
    assert along_table([(our_run, ours)]) == []


def test_pictures_of_curves_have_a_second_panel_where_there_is_a_reference(tmp_path):
    ours = [curve("linformer, no QK-norm", seed, [(2, 5.0), (4, 4.0)]) for seed in (2, 3)]
    beside = curve("full, no QK-norm", 2, [(2, 4.5)])
    widths = []
    for curves in (ours, [*ours, beside]):
        figures.draw_curves(tmp_path / "curves.png", curves)
        widths.append(imread(tmp_path / "curves.png").shape[1])
    assert widths == [864, 1440]


def test_the_answer_has_a_row_for_each_pair_that_has_run(tmp_path):
    runs = {}
    for seed, side, found in ((2, "linformer", 4.0), (2, "full", 3.75), (3, "linformer", 4.0), (3, "window", 5.0)):
        run, _log = curve(side, seed, [])
        row = {"key": run.key, "flags": run.flags, CHOOSING: {"loss": found}}
        runs[run.key] = (run, row, {"loss": 2 * found})
    part = Finished(read_theme("long"), [(run, row) for run, row, _half in runs.values()], len(runs))
    untouched = {key: half for key, (_run, _row, half) in runs.items()}
    label = "300 M tokens, n = 1024, A, QK-norm"
    assert answer_rows(part, CHOOSING, {}) == [(label, "linformer", [0.25], 0.0)]
    assert answer_rows(part, UNTOUCHED, untouched) == [(label, "linformer", [0.5], 0.0)]
    figures.draw_answer(tmp_path / "answer.png", answer_rows(part, CHOOSING, {}), [], CHOOSING)
    assert (tmp_path / "answer.png").stat().st_size > 5000


def test_the_picture_of_ablations_has_a_row_for_each_side(tmp_path):
    sides = {"base": {2: 4.0, 3: 4.1}, "w = 32": {2: 4.5}, "full attention": {2: 3.9, 3: 4.0}, "other seeds": {4: 4.0}}
    heights = []
    for shown in (sides, {side: sides[side] for side in ("base", "w = 32")}):
        figures.draw_ablations(tmp_path / "ablations.png", shown, "base", 0.005)
        heights.append(imread(tmp_path / "ablations.png").shape[0])
    assert heights[0] - heights[1] == pytest.approx(0.24 * 120, abs=1)


def test_a_report_of_both_halves_is_not_replaced_by_one_of_one(ran, tmp_path):
    theme, settings = ran
    for path in settings.output.glob("*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    sweep = tmp_path / "rates.json"
    sweep.write_text(json.dumps(TINY))
    claim = tmp_path / "claim_tiny.json"
    values = {key: value for key, value in TINY.items() if key != "learning_rates"}
    claim.write_text(json.dumps(values | {"rates_of": str(sweep)}))
    write_report(tmp_path, True, [str(claim)])
    both = (tmp_path / "report.md").read_text()
    assert "On the untouched half" in both
    assert "by position in the window" in both
    assert "beyond 256 less 17 to 128" in both
    assert (tmp_path / "positions.png").stat().st_size > 5000
    with pytest.raises(InputError, match="go on with --untouched"):
        write_report(tmp_path, False, [theme])
    assert (tmp_path / "report.md").read_text() == both


def test_results_of_several_machines_become_one(ran, tmp_path, capsys):
    _theme, settings = ran
    first, second, into = (tmp_path / name for name in ("first", "second", "into"))
    lines = {path.name: path.read_text().splitlines() for path in settings.output.glob("*.jsonl")}
    assert {len(found) for found in lines.values()} == {2}
    for folder in (first, second):
        folder.mkdir()
    for name, (one, other) in lines.items():
        failed = json.dumps(json.loads(other) | {"failed": "out of memory"})
        half = json.dumps(json.loads(one) | ({"untouched": False} if name == "runs.jsonl" else {}))
        (first / name).write_text(f"{half}\n{failed}\n")
        (second / name).write_text(f"{other}\n{one}\n{failed}\n")
    assert main(["merge", str(first), str(second), "--into", str(into)]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": 2, "curves": 2, "untouched": 2, "samples": 2}
    assert Results(into).runs == Results(settings.output).runs
    assert main(["merge", str(first), "--into", str(into)]) == 0
    assert Results(into).runs == Results(settings.output).runs

    rows = (second / "runs.jsonl").read_text()
    (second / "runs.jsonl").write_text(rows.replace('"torch_compile": false', '"torch_compile": true'))
    assert main(["merge", str(second), "--into", str(into)]) == 2
    assert "other settings" in capsys.readouterr().err
    (second / "runs.jsonl").write_text(rows[:-50])
    assert main(["merge", str(second), "--into", str(into)]) == 2
    assert "{'runs': 1}" in capsys.readouterr().err
    assert Results(into).runs == Results(settings.output).runs


# --- Arithmetic -------------------------------------------------------------------------------------------------------


def scored(nats, tokens):
    return {"loss": sum(nats) / sum(tokens), "document_nats": nats, "document_tokens": tokens}


def test_differences_are_of_pairs():
    tokens = [10, 20, 30]
    side = {1: scored([20.0, 42.0, 61.0], tokens), 2: scored([22.0, 41.0, 66.0], tokens), 9: scored([1, 1, 1], tokens)}
    reference = {1: scored([21.0, 43.0, 64.0], tokens), 2: scored([22.5, 44.0, 66.5], tokens)}
    found = difference(side, reference)
    apart = [side[seed]["loss"] - reference[seed]["loss"] for seed in (1, 2)]
    assert found.seeds.mean == pytest.approx(sum(apart) / 2)
    assert found.seeds.standard_error == pytest.approx(abs(apart[0] - apart[1]) / 2)
    each = np.array([(-1 - 0.5) / 2, (-1 - 3) / 2, (-3 - 0.5) / 2])  # nats of each document, mean over seeds
    residuals = each - each.sum() / 60 * np.array(tokens)
    assert found.document_error == pytest.approx(math.sqrt(3 / 2 * (residuals**2).sum()) / 60)
    assert (found.better, found.documents) == (3, 3)
    assert difference(reference, side).better == 0
    seeds = 12.706 * found.seeds.standard_error  # Student's t of one degree of freedom
    assert found.half_width == pytest.approx(math.sqrt(seeds**2 + (1.96 * found.document_error) ** 2))
    assert difference({1: side[1]}, {1: reference[1]}).half_width is None
    assert difference({1: side[1]}, {2: reference[2]}) is None
    assert Spread.of([1.0]).standard_error is None
    assert Spread.of([1.0, 2.0, 4.0]).deviation == pytest.approx(statistics.stdev([1, 2, 4]))


def test_a_rate_is_chosen_when_the_sweep_of_its_side_is_complete(tmp_path):
    sweep = replace(read_theme("rates_1024"), learning_rates=[0.1, 0.2])
    runs = runs_of(sweep, {})
    results = Results(tmp_path)
    for run in runs:
        rate = run.flags["learning_rate"]
        if run.side == "full":
            answer = {"diverged": "nan"} if rate == 0.1 else {"choosing": scored([4.0], [1])}
            results.add(run, {}, answer)
        elif run.side == "linformer":
            results.add(run, {}, {"choosing": scored([3.0 + rate], [1])})
        elif run.side == "gpt2" and rate == 0.1:
            results.add(run, {}, {"choosing": scored([3.0], [1])})
    assert chosen_rates(sweep, runs, Results(tmp_path)) == {"linformer": 0.1, "full": 0.2}


def test_a_difference_that_cannot_count_gets_no_second_seed(tmp_path):
    losses = {"base": 4.0, "small": 4.004, "large": 3.994, "worse": 4.006}
    sides = {side: {"weight_decay": place / 10} for place, side in enumerate([*losses, "missing"])}
    theme = replace(read_theme("ablations"), sides=sides, least=0.005, rates_of=None, learning_rates=[0.1])
    runs, results = runs_of(theme, {}), Results(tmp_path)

    def planned():
        return [(run.side, run.flags["seed"]) for run in worth_their_time(theme, runs, results)]

    first = [(side, 2) for side in sides]
    assert planned() == first  # the reference is not there yet
    for run in runs:
        if run.flags["seed"] == 2 and run.side in losses:
            results.add(run, {}, {"choosing": scored([losses[run.side]], [1])})
    assert planned() == [*first, ("base", 3), ("large", 3), ("worse", 3)]
    assert worth_their_time(replace(theme, least=0.0), runs, results) == runs


def test_what_counts_as_finished(tmp_path):
    results = Results(tmp_path)
    claim = {run.side: run for run in runs_for_all_sides("claim_1024")}
    results.add(claim["linformer"], {}, {"choosing": scored([4.0], [1])})
    assert not results.finished(claim["linformer"])  # the untouched half is still to be measured
    assert results.finished(next(run for run in runs_for_all_sides("ablations") if run.side == "base"))
    results.add(claim["linformer"], {}, {"choosing": scored([4.0], [1]), "untouched": scored([5.0], [1])})
    assert results.finished(claim["linformer"])
    leaks = claim["lucidrains, leaks"]
    results.add(leaks, {}, {"leaking": {"training": 1.0, "whole_rows": 1.0, "left_to_right": 9.0, "places": 3}})
    assert Results(tmp_path).finished(leaks)
    results.add(claim["gpt2"], {}, {"diverged": "nan"})
    assert results.finished(claim["gpt2"])
    results.add(claim["llama"], {"failed": "out of memory"}, {})
    assert not results.finished(claim["llama"])
    results.add(claim["gpt2"], {"failed": "out of memory"}, {})  # by another machine, later
    assert Results(tmp_path).finished(claim["gpt2"])
    results.add_unfinished(claim["llama"], [[1, 9.0, None]])
    assert not Results(tmp_path).finished(claim["llama"])


def test_the_honest_loss_is_that_of_whole_rows_without_a_leak_alone():
    torch.manual_seed(0)
    fields = {"vocab_size": 40, "embed_dim": 32, "depth": 2, "heads": 2, "seq_length": 32, "k": 8, "block_size": 8}
    fields |= {"window_size": 8, "dropout": 0.0, "initializer_range": 0.3, "rank": None}
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    rows, lengths = torch.randint(0, 40, (10, 32)), leaking.prefix_lengths(32)
    assert lengths[0] == 1
    assert lengths[-1] == 31
    apart = {}
    for causal, kind in ((True, LinformerForCausalLM), (False, LinformerForMaskedLM)):
        model = kind(LinformerConfig(**fields, **special, causal=causal)).eval()

        @torch.no_grad()
        def predict(ids, model=model):
            return model(input_ids=ids).logits

        honest, whole = (loss(predict, rows, lengths) for loss in (leaking.left_to_right_loss, leaking.whole_row_loss))
        apart[causal] = abs(honest - whole)
    assert apart[True] < 1e-5
    assert apart[False] > 1e-3


@pytest.fixture
def small_model(tiny_config):
    torch.manual_seed(0)
    return lambda **fields: LinformerForCausalLM(tiny_config(position_embedding="rotary", **fields)).double().eval()


def test_slots_and_window_are_normalised_apart_and_nothing_leaks(small_model, monkeypatch):
    monkeypatch.setattr(layers_linformer, "mix_and_attend", layers_linformer.mix_and_attend)
    model, ids = small_model(), torch.randint(0, 50, (2, 32))
    later = ids.clone()
    later[:, 20:] = 1
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        variants.use_variant("dual norm")
        logits = model(ids, use_cache=False).logits
        assert (plain - logits).abs().max() > 1e-3
        assert (model(later, use_cache=False).logits - logits)[:, :20].abs().max() == 0
        for layer in model.model.layers:  # what is normalised has no scale
            layer.attention.k_proj.weight *= 1e3
            layer.attention.v_proj.weight *= 1e3
        assert (model(ids, use_cache=False).logits - logits).abs().max() < 1e-6


def test_output_layers_start_at_zero(small_model, monkeypatch):
    monkeypatch.setattr(layers_linformer, "_residual_std", layers_linformer._residual_std)
    variants.use_variant("zero output")
    for layer in small_model().model.layers:
        assert not layer.attention.o_proj.weight.any()
        assert not layer.mlp.down_proj.weight.any()
        assert layer.attention.q_proj.weight.any()


def test_weights_of_qk_norm_make_scores_sharper(small_model, monkeypatch, tmp_path):
    monkeypatch.setattr(layers_linformer, "LinformerAttention", layers_linformer.LinformerAttention)
    torch.manual_seed(0)
    plain = small_model(qk_norm=True)
    variants.use_variant("weighted QK-norm")
    model = small_model(qk_norm=True)
    model.load_state_dict(plain.state_dict(), strict=False)
    ids = torch.randint(50, (2, 32))
    with torch.no_grad():
        logits = plain(ids, use_cache=False).logits
        assert (model(ids, use_cache=False).logits - logits).abs().max() < 1e-6  # they start at one
        model.set_attn_implementation("eager")  # which returns probabilities
        for name in ("q_norm", "k_norm"):
            largest = [model(ids, output_attentions=True).attentions[0].amax(-1).mean()]
            for layer in model.model.layers:
                getattr(layer.attention, name).weight *= 4
            largest.append(model(ids, output_attentions=True).attentions[0].amax(-1).mean())
            assert largest[1] > 1.1 * largest[0]
        model.save_pretrained(tmp_path)
        opened = LinformerForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
        assert (opened(ids, use_cache=False).logits - model(ids, use_cache=False).logits).abs().max() < 1e-6
    norms = {name for name, _ in model.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert norms == {f"model.layers.{i}.attention.{x}_norm.weight" for i in range(2) for x in "qk"}
