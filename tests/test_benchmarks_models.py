"""The benchmarks of whole models and of decoding, tiny and on a CPU: rows, resumption, what they refuse, arithmetic."""

import copy
import importlib.util
import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    decoding_gpu,
    decoding_gpu_cases,
    decoding_gpu_report,
    models_gpu,
    models_gpu_report,
    race,
    report_file,
)
from benchmarks import models_gpu_cases as cases
from benchmarks.report_file import Report

_spec = importlib.util.spec_from_file_location("figures", Path(__file__).parent.parent / "docs" / "figures_models.py")
figures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(figures)

CPU = torch.device("cpu")
EAGER = models_gpu.SMOKE._replace(modes=("eager",))
# torch.compile complains about its own use of autograd functions
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def broken(_config):
    raise RuntimeError("this model\ncannot be made")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All parts once; one of the models cannot be made."""
    path = tmp_path_factory.mktemp("models") / "models.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cases.CAUSAL, "GPT-2", broken)
        return path, models_gpu.run(path, EAGER, CPU, seconds=3600)


def test_every_row_is_written_and_stands_in_the_tables(trained):
    path, result = trained
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    found = [(section, row["variant"]) for section in models_gpu.PARTS for row in result[section] if "ms" in row]
    wanted = {"training": [*cases.CAUSAL], "prefill": [*cases.PREFILL], "encoder": [*cases.MASKED_LM]}
    wanted["training"].remove("GPT-2")
    assert sorted(found) == sorted((section, name) for section, names in wanted.items() for name in names)
    for row in (row for part in models_gpu.PARTS for row in result[part] if "ms" in row):
        tokens = row["tokens_per_step"] if "mode" in row else row["n"] * row["batch"]
        assert row["tokens_per_s"] == pytest.approx(1e3 * tokens / row["ms"][0], rel=1e-3, abs=0.06)
        assert row["repeats"] == 4
    page = path.with_suffix(".md").read_text()
    assert all(name in page for name in (*cases.CAUSAL, "BERT", "## Training", "## Prefill"))
    figures.draw_training(path.with_suffix(".png"), result)
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_a_short_prompt_is_read_compiled_too(tmp_path, monkeypatch):
    monkeypatch.setattr(models_gpu, "LONGEST_COMPILED_PROMPT", 64)
    plan = models_gpu.SMOKE._replace(parts=("prefill",), prefill={64: (16, 16), 128: (16, 16)}, batches=(1, 2))
    result = models_gpu.run(tmp_path / "models.json", plan, CPU, seconds=3600)
    rows = [(row.get("mode"), row["n"], row["batch"]) for row in result["prefill"] if row["variant"] == "linpass"]
    assert rows == [(None, 64, 1), (None, 64, 2), (None, 128, 1), (None, 128, 2), ("compiled", 64, 1)]
    assert all("ms" in row for row in result["prefill"])
    ratios = models_gpu_report.summary(result)["prefill_over_llama"]
    assert list(ratios) == ["1 x 64", "2 x 64", "1 x 128", "2 x 128", "1 x 64, compiled"]
    assert "| 64 | 1 | yes |" in (tmp_path / "models.md").read_text()


def test_a_model_that_fails_says_why_and_ends_nothing(trained):
    _, result = trained
    failed = [row for row in result["training"] if "failed" in row]
    assert [(row["variant"], row["failed"]) for row in failed] == [("GPT-2", "RuntimeError: this model cannot be made")]
    assert models_gpu_report.summary(result)["failed"] == ["GPT-2, n=64 mode=eager"]


def test_a_group_that_is_whole_is_not_measured_again(trained, tmp_path, monkeypatch):
    """One with a row that failed is, all of it: only times of one run are compared."""
    _, first = trained
    warmed = []
    monkeypatch.setattr(race, "warm", lambda *given, warm=race.warm: warmed.append(1) or warm(*given))
    monkeypatch.setattr(models_gpu, "PARTS", ("training", "prefill", "encoder"))
    second = models_gpu.run(tmp_path / "models.json", EAGER, CPU, seconds=3600, done=first)
    assert len(warmed) == len(cases.CAUSAL)
    assert second["encoder"] == first["encoder"]
    assert second["prefill"] == first["prefill"]
    assert [row["variant"] for row in second["training"] if "ms" in row] == [*cases.CAUSAL]


def test_too_little_memory_is_an_answer(tmp_path):
    done = {"rows": [{"n": 1, "failed": "OutOfMemoryError: of course"}, {"n": 2, "failed": "RuntimeError: once"}]}
    done |= {"environment": {"commit": "older"}}
    report = Report(tmp_path / "rows.json", 3600, "theme", {"commit": "newer"}, ("rows",), str, done)
    assert report.result["environment"]["commit"] == "newer; earlier rows: older"
    assert report.add("rows", {"n": 1}, dict) == done["rows"][0]
    assert report.add("rows", {"n": 2}, lambda: {"ms": 1}) == {"n": 2, "ms": 1, "run": 2}


def test_rows_tell_their_run(tmp_path):
    """Rows of a first run have no number; the page names those of later ones."""
    done, rows = None, [{"variant": "a", "n": 1}, {"variant": "a", "n": 2}, {"variant": "b", "n": 1}]
    for number in (1, 2, 3):
        where = {"commit": f"commit {number}", "date": "today", "command": "x.py"}
        report = Report(tmp_path / "rows.json", 3600, "theme", where, ("rows",), str, done)
        for names in rows[:number]:
            report.add("rows", names, lambda: {"ms": 1})
        done = report.close(lambda _: "tables\n")
    assert [row.get("run") for row in done["rows"]] == [None, 2, 3]
    assert [run["commit"] for run in done["environment"]["runs"]] == ["commit 1", "commit 2", "commit 3"]
    lines = (tmp_path / "rows.md").read_text().splitlines()
    assert lines[0] == "tables"
    assert lines[-2:] == [
        "| 2 | commit 2 | today |  | `x.py` | rows, a: n = 2 |",
        "| 3 | commit 3 | today |  | `x.py` | rows, b: n = 1 |",
    ]


def test_a_row_without_room_says_what_was_asked_for():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 129.00 GiB. GPU 0 has a total capacity of")
    assert report_file.failure(error) == {"failed": "OutOfMemoryError: Tried to allocate 129.00 GiB"}
    assert report_file.has_no_room(report_file.failure(error))
    assert report_file.failure(ValueError("n:  3")) == {"failed": "ValueError: n: 3"}


def test_a_row_that_takes_too_long_has_failed(tmp_path):
    """And the timer that was running before runs on."""
    limits = signal.signal(signal.SIGALRM, signal.SIG_IGN), signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        report = Report(tmp_path / "rows.json", 3600, "theme", {}, ("rows",), str, row_seconds=0.2)
        assert report.add("rows", {"n": 1}, lambda: time.sleep(30)) is not None
        assert report.add("rows", {"n": 2}, lambda: {"ms": 1}) == {"n": 2, "ms": 1}
        assert report.result["rows"][0]["failed"] == "TimeoutError: took more than 0.2 s"
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] < 1000
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGALRM, limits[0])
        signal.setitimer(signal.ITIMER_REAL, *limits[1])


def test_a_row_that_the_end_of_the_time_cuts_off_was_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(report_file, "LEAST_SECONDS", 0.1)
    report = Report(tmp_path / "rows.json", 0.3, "theme", {}, ("rows",), str, row_seconds=30)
    assert report.add("rows", {"n": 1}, lambda: time.sleep(30)) is None
    assert report.result["rows"] == []
    assert report.result["left_out"] == [{"section": "rows", "n": 1}]


def test_every_commit_of_a_result_is_named_once(tmp_path):
    commits = []
    for commit in ("a", "b", "b", "a"):
        done = {"environment": {"commit": commits[-1]}} if commits else None
        report = Report(tmp_path / "rows.json", 1, "theme", {"commit": commit}, ("rows",), str, done)
        commits.append(report.result["environment"]["commit"])
    assert commits == ["a", "b; earlier rows: a", "b; earlier rows: a", "a; earlier rows: b"]


def test_nothing_is_begun_when_the_time_is_over(tmp_path):
    result = models_gpu.run(tmp_path / "models.json", EAGER, CPU, seconds=0)
    assert not any(result[part] for part in models_gpu.PARTS)
    assert len(result["left_out"]) == len(cases.CAUSAL) + len(cases.PREFILL) + len(cases.MASKED_LM)
    assert "Left out for want of time" in (tmp_path / "models.md").read_text()


def test_one_that_fails_in_a_later_turn_is_out(tmp_path):
    report, turns = Report(tmp_path / "rows.json", 3600, "theme", {}, ("rows",), str), []

    def fails_at_last():
        turns.append(1)
        if len(turns) == 6:
            raise RuntimeError("enough")

    builders = {"a": lambda: race.Entrant(fails_at_last, 1), "b": lambda: race.Entrant(lambda: None, 1)}
    race.race(report, "rows", {}, builders, CPU, race.Rounds(3, 2))
    assert [(row["variant"], row.get("failed")) for row in report.result["rows"]] == [
        ("a", "RuntimeError: enough"),
        ("b", None),
    ]


def test_models_have_equal_parameters():
    config = cases.config_for(models_gpu.SMOKE.size, 64, 16, 16, window_size=32)
    counts = {name: cases.parameters(build(config)) for name, build in cases.CAUSAL.items()}
    encoder = cases.config_for(models_gpu.SMOKE.size, 64, 16, 64, causal=False, projection="learned")
    for name in ("Llama", "GPT-2"):
        assert counts[name] == pytest.approx(counts[cases.OURS], rel=0.01)
    assert cases.parameters(cases.bert(encoder)) == pytest.approx(cases.parameters(cases.linformer(encoder)), rel=0.01)
    mixing = sum(w.numel() for name, w in cases.linformer(config).named_parameters() if ".projection." in name)
    assert mixing > 0
    assert counts[cases.BOUND] == counts[cases.FULL] == counts[cases.OURS] - mixing


@pytest.mark.filterwarnings("ignore:::torch", "ignore:.*should not be instantiated:DeprecationWarning")  # of torch
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT"])
def test_compiled_rivals_attend_without_a_mask(name):
    """With one they would not reach PyTorch's causal kernels, and the comparison would be with the mask."""
    from benchmarks.models_gpu_cases import CAUSAL, MASKED_LM, training_step

    config = cases.config_for(cases.Size(32, 1, 2, 384), 64, 16, 16, window_size=32, causal=name != "BERT")
    asked = []

    def looking(graph, _inputs):
        for node in graph.graph.nodes:
            if "scaled_dot_product_attention" in str(node.target):
                asked.append((node.kwargs.get("attn_mask"), bool(node.kwargs.get("is_causal"))))
        return graph.forward

    build = (CAUSAL | MASKED_LM)[name]
    torch.compiler.reset()
    with cases.without_masks():
        training_step(build, config, 128, torch.device("cpu"), {"backend": looking}).call()
    assert asked == [(None, name != "BERT")]


def test_a_gpt2_of_long_rows_is_equal_without_its_table_of_positions():
    config = cases.config_for(models_gpu.SMOKE.size, 4096, 16, 256, window_size=256)
    model = cases.gpt2(config)
    table = model.transformer.wpe.weight
    assert table.shape == (4096, 32)
    wanted = cases.parameters(cases.full_attention(config))
    assert table.numel() > wanted
    assert cases.parameters(model) - table.numel() == pytest.approx(wanted, rel=0.01)


def test_the_bound_mixes_no_tokens_and_trains_every_projection():
    config = cases.config_for(models_gpu.SMOKE.size, 64, 16, 16, window_size=32)
    model = cases.bound(config)
    ids = torch.randint(384, (1, 64))
    other = ids.clone()
    other[0, 10] = (ids[0, 10] + 1) % 384
    logits = model(ids, use_cache=False).logits
    changed = (model(other, use_cache=False).logits != logits).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [10]
    logits.square().mean().backward()
    attention = model.model.layers[0].attention
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        assert projection.weight.grad.abs().max() > 0


def test_compiled_steps_are_the_same_training(tmp_path):
    plan = models_gpu.SMOKE._replace(parts=("training",), names=(cases.BOUND,))
    result = models_gpu.run(tmp_path / "models.json", plan, CPU, seconds=3600)
    compiled, eager = result["training"]
    assert [compiled["mode"], eager["mode"]] == ["compiled", "eager"]
    assert compiled["loss"] == pytest.approx(eager["loss"], abs=0.02)
    assert models_gpu_report.losses_apart(result) == []


def rows_of(tokens_per_s: dict) -> dict:
    """A result with these speeds, {(n, mode, variant): tokens per second}."""
    rows = [
        {"n": n, "mode": mode, "variant": name, "ms": [1, 1, 1], "tokens_per_s": speed, "loss": 3.0}
        for (n, mode, name), speed in tokens_per_s.items()
    ]
    return {"training": rows, "encoder": [], "prefill": [], "left_out": []}


def test_ours_is_compared_with_the_faster_rival_in_its_faster_mode():
    speeds = {(1024, "eager", "linpass"): 90, (1024, "compiled", "linpass"): 120, (1024, "compiled", "Llama"): 100}
    speeds |= {(1024, "eager", "GPT-2"): 110, (1024, "compiled", "GPT-2"): 105, (8192, "eager", "linpass"): 79}
    speeds |= {(1024, "eager", cases.BOUND): 130, (8192, "eager", cases.BOUND): 100}
    found = models_gpu_report.summary(rows_of(speeds))["training"]
    assert found[1024]["rival"] == "GPT-2, eager"
    assert found[1024]["over_rival"] == 1.091
    assert found[1024]["over_bound"] == 0.923
    assert found[1024]["rival_met"] is found[1024]["bound_met"] is True
    assert found[8192]["over_rival"] is found[8192]["rival_met"] is None
    assert found[8192]["bound_met"] is False


def test_losses_that_differ_between_modes_are_told():
    result = rows_of({(64, "eager", "linpass"): 1, (64, "compiled", "linpass"): 2})
    assert models_gpu_report.losses_apart(result) == []
    result["training"][1]["loss"] = 3.1
    assert models_gpu_report.summary(result)["losses_apart"] == [["training", 64, "linpass", 3.1, 3.0]]


def test_the_profile_lists_what_took_longest(tmp_path):
    report = Report(tmp_path / "rows.json", 3600, "theme", {}, ("rows",), str)
    a, b = torch.randn(200, 200), torch.randn(200)
    builders = {"product": lambda: race.Entrant(lambda: (a @ a, b + b), 1)}
    race.race(report, "rows", {}, builders, CPU, race.Rounds(2, 2, profile=True))
    profile = report.result["rows"][0]["profile"]
    assert profile["top"][0][0] == "aten::mm"
    assert profile["kernels_ms"] >= profile["top"][0][2] > 0


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    path = tmp_path_factory.mktemp("decoding") / "decoding.json"
    names = (name for name in decoding_gpu_cases.WAYS if "compiled" not in name)
    plan = decoding_gpu.SMOKE._replace(names=tuple(names))
    return path, decoding_gpu.run(path, plan, CPU, seconds=3600)


def test_every_way_to_decode_is_measured_or_says_why_not(decoded):
    path, result = decoded
    rows = {(row["context"], row["variant"]): row for row in result["decoding"]}
    for context, batch in decoding_gpu.SMOKE.situations:
        assert rows[context, "linpass, CUDA graph"]["failed"] == "ValueError: CUDA graphs need a CUDA device"
        for name in ("linpass, eager", "linpass, generate", "Llama, generate", "Llama, dynamic cache"):
            row = rows[context, name]
            assert row["tokens_per_s"] == pytest.approx(1e3 * batch / row["ms"][0], rel=1e-3, abs=0.06)
    for name, grows in (("linpass, eager", False), ("Llama, dynamic cache", True)):
        a_row = [rows[context, name]["cache_bytes"] / batch for context, batch in decoding_gpu.SMOKE.situations]
        assert (a_row[1] > 1.5 * a_row[0]) if grows else a_row[0] == pytest.approx(a_row[1], rel=0.01)  # a counter
    page = path.with_suffix(".md").read_text()
    assert all(text in page for text in ("## Batch 1", "## Batch 2", "Llama, dynamic cache", "Failed"))
    figures.draw_decoding(path.with_suffix(".png"), result)
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_a_compiled_static_cache_gives_the_logits_of_a_dynamic_one(tmp_path):
    names = ("Llama, dynamic cache", "Llama, static cache, compiled")
    plan = decoding_gpu.SMOKE._replace(situations=((64, 2),), names=names, size=cases.Size(32, 1, 2, 384))
    result = decoding_gpu.run(tmp_path / "decoding.json", plan, CPU, seconds=3600)
    dynamic, static = result["decoding"]
    assert dynamic["logits_error"] == 0
    assert 0 <= static["logits_error"] < 0.025
    assert static["cache_bytes"] > dynamic["cache_bytes"]


def test_rows_of_different_lengths_are_decoded_compiled(tmp_path):
    plan = decoding_gpu.SMOKE._replace(names=(decoding_gpu_cases.UNEVEN,), size=cases.Size(32, 1, 2, 384))
    (row,) = decoding_gpu.run(tmp_path / "decoding.json", plan, CPU, seconds=3600)["decoding"]  # not of one row
    assert row["batch"] == 2
    assert row["ms"][0] > 0
    models = decoding_gpu_cases.Models(plan.size, plan.seq_length, plan.slots, plan.block, plan.window, CPU)
    cache = decoding_gpu_cases.Situation(models, 72, 6, plan.tokens, plan.compiler).linformer_cache(uneven=True)
    assert cache.layers[0].seen.tolist() == [64, 56, 48, 40, 32, 64]


class StandsStill(decoding_gpu_cases.Decoder):
    """Sees the same cache at every token, as a replayed graph does whose cache is replaced and not written to."""

    def step(self) -> None:
        cache, self.cache = self.cache, copy.deepcopy(self.cache)
        super().step()
        self.cache = cache


def test_a_way_with_other_logits_is_not_timed():
    plan = decoding_gpu.SMOKE
    models = decoding_gpu_cases.Models(plan.size, plan.seq_length, plan.slots, plan.block, plan.window, CPU)
    situation = decoding_gpu_cases.Situation(models, 64, 2, plan.tokens, plan.compiler)
    decoding_gpu_cases.linformer_way(situation, decoding_gpu_cases.Decoder)
    decoding_gpu_cases.linformer_way(situation, decoding_gpu_cases.Decoder)
    with pytest.raises(ValueError, match="not those of the eager model"):
        decoding_gpu_cases.linformer_way(situation, StandsStill)


def test_targets_of_decoding():
    def row(context, batch, variant, ms):
        speed = 1e3 * batch / ms
        return {"context": context, "batch": batch, "variant": variant, "ms": [ms] * 3, "tokens_per_s": speed}

    rows = [row(512, 1, "linpass, eager", 4.0), row(131072, 1, "linpass, eager", 4.0)]
    rows += [row(512, 1, "linpass, CUDA graph", 1.25), row(131072, 1, "linpass, CUDA graph", 1.2)]
    rows += [row(512, 1, "linpass, compiled", 1.0), row(131072, 1, "linpass, compiled", 1.3)]
    rows += [row(32768, 64, "linpass, eager", 2.0), row(32768, 64, "Llama, dynamic cache", 12.0)]
    rows += [row(32768, 64, "Llama, static cache, compiled", 11.0)]
    found = decoding_gpu_report.targets({"decoding": rows})
    assert [(figure, met) for _, figure, _, met in found] == [(1.2, False), (5.5, True)]
    assert "CUDA graph" in found[0][0]


def test_bytes_of_a_step_are_weights_and_what_is_visible():
    """4 blocks of 16 tokens with 2 slots each; 3 layers of 8 features; 100 weights, 40 of them embeddings."""
    environment = {
        "size": {"vocab_size": 5, "embed_dim": 8, "depth": 3, "heads": 2},
        "linformer": {"seq_length": 64, "k": 8, "block_size": 16, "window_size": 20},
        "parameters": {"linpass": 100},
    }
    seen = {10: 10, 16: 16 + 2, 50: 20 + 6, 64: 20 + 8, 1000: 20 + 8}  # context: rows of the cache that are visible
    for context, rows in seen.items():
        assert decoding_gpu_report.bytes_read(environment, context, 7) == 2 * (60 + 7 * 2 * 3 * 8 * rows)


@pytest.mark.parametrize("module", [models_gpu, decoding_gpu], ids=["models", "decoding"])
def test_the_command(module, tmp_path, capsys):
    few = {models_gpu: ["--only", "prefill"], decoding_gpu: ["--ways", "linpass, eager", "--contexts", "64"]}[module]
    path = tmp_path / "result.json"
    module.main([str(path), "--smoke", *few])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["failed"] == []
    result = json.loads(path.read_text())
    assert result["environment"]["command"].startswith("python -m benchmarks.")
    assert str(tmp_path) not in path.read_text()
    module.main([str(path), "--smoke", *few, "--resume", str(path)])
    again = json.loads(path.read_text())
    assert {name: again[name] for name in again if name != "environment"} == {
        name: result[name] for name in result if name != "environment"
    }


def test_without_room_llama_says_so(monkeypatch):
    plan = decoding_gpu.SMOKE
    models = decoding_gpu_cases.Models(plan.size, plan.seq_length, plan.slots, plan.block, plan.window, CPU)
    situation = decoding_gpu_cases.Situation(models, 64, 2, plan.tokens, plan.compiler)
    monkeypatch.setattr(models, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 1000))
    with pytest.raises(torch.OutOfMemoryError, match="56 tokens x 2 rows need"):
        situation.refuse_without_room(copies=1)
