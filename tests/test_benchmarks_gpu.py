"""The harness of benchmarks.attention_gpu, with tiny shapes on a CPU: it refuses wrong results and counts floors."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tolerances import GRADIENT

from benchmarks import attention_gpu, attention_gpu_profile, attention_gpu_report, attention_host
from benchmarks import attention_gpu_bidirectional as bidirectional
from benchmarks import attention_gpu_cases as cases
from benchmarks import attention_gpu_gate as gate
from benchmarks.attention_gpu_measure import Repeats, measure_errors
from linpass import attention_linformer, kernels_linformer, operators_linformer
from linpass.attention_linformer import visible_slots, visible_tokens

_spec = importlib.util.spec_from_file_location("figures", Path(__file__).parent.parent / "docs" / "figures.py")
figures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(figures)

CPU = torch.device("cpu")
MIX_AND_ATTEND = kernels_linformer.mix_and_attend
SHAPE = cases.Shape(heads=2, dim=16, tokens=96, slots=12, block=16, window=32)
TINY = attention_gpu.Plan(
    shapes=(SHAPE, cases.Shape(8, 64, 512, 128, 32)),
    variants=(cases.CORE, (cases.OURS_IN_PYTORCH,)),
    checks=(gate.Case("tiny", 70, dim=16, heads=4, groups=2, block=16, slots=2, window=24, packed=True),),
    batch_tokens=512,
    matmul=64,
    copied=2**16,
    repeats=Repeats(3, 0.0),
)


@pytest.fixture(autouse=True)
def _without_the_interpreter(monkeypatch):
    """The harness is tested here, not the kernels: under Triton's interpreter these would take minutes."""
    monkeypatch.setattr(kernels_linformer, "mix_and_attend", attention_linformer.mix_and_attend)


@pytest.mark.parametrize(
    "shape",
    [
        cases.Shape(2, 16, 512, 128, 32),
        cases.Shape(2, 16, 2048, 256, 32),
        cases.Shape(1, 16, 1024, 64, 128),
        cases.Shape(1, 16, 640, 40, 32, window=200),
        cases.Shape(1, 16, 384, 96, 32, window=64),
    ],
)
def test_the_mask_of_flex_attention_is_the_one_that_it_would_form_itself(shape):
    from torch.nn.attention.flex_attention import create_block_mask

    mask = cases.flex_mask(shape, CPU)
    wanted = create_block_mask(mask.mask_mod, None, None, *mask.seq_lengths, device="cpu")
    for part in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, part), getattr(wanted, part)), part
    for count, order in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        for row, number in enumerate(getattr(mask, count)[0, 0].tolist()):
            found, expected = (getattr(each, order)[0, 0, row, :number].tolist() for each in (mask, wanted))
            assert sorted(found) == sorted(expected), (row, order)


def unavailable(_shape, _inputs):
    import a_package_that_nobody_has

    return a_package_that_nobody_has.attention


def test_every_row_is_written_and_stands_in_the_tables(tmp_path):
    missing = cases.Variant("not installed", unavailable)
    plan = TINY._replace(variants=(cases.CORE, (cases.OURS_IN_PYTORCH, missing)))
    result = attention_gpu.run(tmp_path / "attention.json", plan, CPU, seconds=3600)
    assert json.loads((tmp_path / "attention.json").read_text())["timing"] == json.loads(json.dumps(result["timing"]))

    names = ["linpass", "cuDNN causal", "flash causal"]
    timed = [(row["n"], row["variant"]) for row in result["timing"] if "both_ms" in row]
    rivals = [(n, "linpass, PyTorch") for n in (512, 96)]
    assert timed == [*((n, name) for n in (96, 512) for name in names), *rivals]
    turns = [(row["n"], row["variant"]) for row in result["timing"]][6:]  # all at the row with a target, then the other
    assert turns == [(n, name) for n in (512, 96) for name in ("linpass, PyTorch", "not installed")]
    for row in result["timing"]:
        if row["variant"] == "not installed":
            assert row["failed"] == "ModuleNotFoundError: No module named 'a_package_that_nobody_has'"
        else:
            assert row["passed"]
            assert max(row["errors"].values()) < 0.03
            assert min(*row["forward_ms"], *row["both_ms"], row["host_ms"]) > 0
    page = (tmp_path / "attention.md").read_text()
    assert all(name in page for name in (*names, "not installed", "## 2 heads of 16", "## 8 heads of 64"))

    found = attention_gpu_report.summary(result)
    assert found["red"] == []
    assert found["over_cudnn"].keys() == found["met"].keys() == {512}
    assert found["failed"] == [["not installed", 512], ["not installed", 96]]


def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch):
    def ten_percent_off(query, *arguments, **others):
        return attention_linformer.mix_and_attend(query * 1.1, *arguments, **others)

    monkeypatch.setattr(kernels_linformer, "mix_and_attend", ten_percent_off)
    plan = TINY._replace(parts=("timing",), shapes=TINY.shapes[:1], variants=(cases.CORE,))
    result = attention_gpu.run(tmp_path / "attention.json", plan, CPU, seconds=3600)
    assert [row["variant"] for row in result["timing"]] == ["cuDNN causal", "flash causal"]
    assert attention_gpu_report.summary(result)["red"] == [["linpass", "tiny"]]


def test_errors_at_the_timed_shape_are_judged_too(tmp_path, monkeypatch):
    def right_for_packed_rows(query, *arguments, first_block_BC=None, **others):
        query = query if first_block_BC is not None else query * 1.1
        return attention_linformer.mix_and_attend(query, *arguments, first_block_BC=first_block_BC, **others)

    monkeypatch.setattr(kernels_linformer, "mix_and_attend", right_for_packed_rows)
    plan = TINY._replace(parts=("timing",), shapes=TINY.shapes[:1], variants=(cases.CORE,))
    first = attention_gpu.run(tmp_path / "attention.json", plan, CPU, seconds=3600)["timing"][0]
    assert first["variant"] == "linpass"
    assert "not timed" in first["failed"]
    assert "both_ms" not in first


def test_nothing_is_begun_when_the_time_is_over(tmp_path):
    result = attention_gpu.run(tmp_path / "attention.json", TINY, CPU, seconds=0)
    assert result["timing"] == result["gate"] == []
    assert "Left out for want of time" in (tmp_path / "attention.md").read_text()


def test_a_second_run_measures_what_the_first_left_out(tmp_path, monkeypatch):
    """Rows that failed are tried again."""
    plan = TINY._replace(shapes=TINY.shapes[:1])
    first = attention_gpu.run(tmp_path / "first.json", plan, CPU, seconds=3600)
    del first["timing"][1]
    first["timing"][1] |= {"failed": "for a reason that has gone"}
    measured = []
    monkeypatch.setattr(
        attention_gpu, "measure", lambda *arguments, m=attention_gpu.measure: measured.append(1) or m(*arguments)
    )
    second = attention_gpu.run(tmp_path / "second.json", plan, CPU, seconds=3600, done=first)
    assert len(measured) == 2
    timed = ["linpass", "cuDNN causal", "flash causal", "linpass, PyTorch"]
    assert [row["variant"] for row in second["timing"]] == timed
    assert second["gate"] == first["gate"]
    assert second["timing"][0] == first["timing"][0]
    assert second["ceilings"] == first["ceilings"]


def gated_slots_at_once(query, key, value, write, gate):
    """Every pair of a query and a token that it sees, [B, H, T, T, M], in place of a token after the other."""
    write, total = write.transpose(1, 2)[:, :, None], gate.transpose(1, 2).cumsum(2)
    faded = (total[:, :, :, None] - total[:, :, None]).exp()
    seen = torch.ones(len(gate[0]), len(gate[0])).tril()[..., None]
    scores = (faded * write * seen * (query @ key.mT)[..., None]).sum(3) / query.shape[-1] ** 0.5
    weight = (faded * write * seen * scores.softmax(-1)[:, :, :, None]).sum(-1)
    return weight @ value


def test_the_truth_of_gated_slots():
    """In the last row of the batch, gradients included; so it measures errors."""
    states = [torch.randn(2, 20, 3, 8, dtype=torch.float64).transpose(1, 2) for _ in range(3)]
    gate = torch.nn.functional.logsigmoid(torch.randn(2, 20, 3, 5, dtype=torch.float64))
    leaves, names = [*states, 1 - gate.exp(), gate], ("query", "key", "value", "write", "gate")
    attention = cases.Attention(gated_slots_at_once, leaves, names, cases.gated_slots_truth)
    found = measure_errors(attention, cases.Shape(3, 8, 20, 5, block=4, window=0))
    assert found["errors"].keys() == {"output", *names}
    assert max(found["errors"].values()) < GRADIENT[torch.float64]


def leaks(query, key, value, *arguments, **others):
    return attention_linformer.mix_and_attend(query, key, value.roll(-1, 2), *arguments, **others)


def test_a_picture_holds_one_measurement_of_each_width(tmp_path):
    """Files of one day are drawn together, unless two have the same width; older ones are left out."""

    def write(name, date, *widths):
        timing = [{"heads": heads, "dim": dim, "file": name} for heads, dim in widths]
        result = {"theme": "attention_gpu", "environment": {"date": date}, "timing": timing}
        (tmp_path / f"attention_{name}_202611.json").write_text(json.dumps(result))

    write("a", "2026-11-21", (8, 64), (16, 128))
    write("b", "2026-11-22", (8, 64))
    write("c", "2026-11-22", (16, 128))
    assert [row["file"] for row in figures.newest_gpu_result(tmp_path)["timing"]] == ["b", "c"]
    write("d", "2026-11-22", (16, 128))
    with pytest.raises(ValueError, match=r"attention_c_202611.json and attention_d_202611.json.*16 heads of 128"):
        figures.newest_gpu_result(tmp_path)


def test_the_gate_sees_the_future():
    assert gate.check_causality(attention_linformer.mix_and_attend, CPU, 200)["passed"]
    assert not gate.check_causality(leaks, CPU, 200)["passed"]


@pytest.mark.parametrize("fault", ["unwritten", "not the same twice"])
def test_the_gate_sees(fault):
    case = TINY.checks[0]

    def faulty(query, *arguments, **others):
        output = attention_linformer.mix_and_attend(query, *arguments, **others)
        if fault == "unwritten":
            return torch.cat((output[:, :, :-1], torch.empty_like(output[:, :, :1])), 2)
        return output + 1e-3 * torch.randn_like(output)

    assert gate.check(attention_linformer.mix_and_attend, case, CPU)["passed"]
    row = gate.check(faulty, case, CPU)
    assert not row["passed"]
    assert gate.check(faulty, case, CPU, must_agree=False)["passed"] == (fault == "not the same twice")
    assert row["not_finite"] > 0 if fault == "unwritten" else not row["runs_agree"]


def test_floor_counts_the_visible_pairs():
    b, w, r, view = SHAPE.layout[:4]
    token = torch.arange(SHAPE.tokens)
    slots = visible_slots(token, torch.arange(SHAPE.slots) // r, b, view)
    pairs = int(slots.sum() + visible_tokens(token, token, b, w).sum())
    mixing = 4 * SHAPE.tokens * r * SHAPE.dim  # keys and values; backward twice that
    flop = 3 * SHAPE.heads * (14 * SHAPE.dim * pairs + 3 * mixing)
    limited = attention_gpu_report.floor(SHAPE, 3, flop_per_s=1e6, bytes_per_s=1e15)
    assert limited["floor_ms"] == pytest.approx(flop / 1e3, abs=1e-3)
    assert limited["bound_by"] == {"forward": "operations", "backward": "operations"}
    states = 2 * 3 * SHAPE.heads * SHAPE.tokens * SHAPE.dim  # bytes of queries, keys, values or output
    weights = 2 * SHAPE.tokens * r  # bytes of E or F
    limited = attention_gpu_report.floor(SHAPE, 3, flop_per_s=1e15, bytes_per_s=1e6)
    assert limited["floor_ms"] == pytest.approx((11 * states + 6 * weights) / 1e3, abs=1e-3)


def attend_slots(query, key, value, count=None):
    """Attention over slots by PyTorch's own function."""
    visible = None if count is None else (torch.arange(key.shape[2]) < count[:, None])[:, None, None]
    repeats = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(repeats, 1) for states in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)


@pytest.mark.parametrize("sets", [1, 2])
def test_the_gate_of_slots_sees_a_row_that_is_mixed_with_the_wrong_weights(sets):
    case = bidirectional.Case("tiny", 77, 10, dim=16, heads=4, groups=2, sets=sets)
    assert bidirectional.check(attention_linformer, case, CPU)["passed"]

    def swapped(query, key, value, weights):
        return attention_linformer.mix_sequence_and_attend(query, key, value, weights[::-1])

    assert not bidirectional.check(SimpleNamespace(mix_sequence_and_attend=swapped), case, CPU)["passed"]


SMALL_SLOTS = bidirectional.Case("tiny", 77, 10, dim=16, heads=4, groups=2, sets=2, counts=(10, 3))


def test_the_encoders_attention_has_a_theme_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels_linformer, "attend_slots", attend_slots, raising=False)
    plan = attention_gpu.BIDIRECTIONAL._replace(
        shapes=(cases.Shape(8, 64, 512, 128, block=512, window=0),),
        variants=(bidirectional.CORE,),
        checks=(SMALL_SLOTS,),
        **{name: getattr(TINY, name) for name in ("batch_tokens", "matmul", "copied", "repeats")},
    )
    result = attention_gpu.run(tmp_path / "both.json", plan, CPU, seconds=3600)
    assert [row["variant"] for row in result["timing"] if row["passed"]] == ["linpass", "cuDNN full", "flash full"]
    ours, theirs = result["timing"][:2]
    found = attention_gpu_report.summary(result)
    assert found["over_cudnn"] == {512: round(theirs["both_ms"][0] / ours["both_ms"][0], 3)}
    assert found["met"] == {512: found["over_cudnn"][512] >= 1.3}
    assert "# Bidirectional attention" in (tmp_path / "both.md").read_text()


def test_the_gate_of_slots_sees_a_slot_that_is_not_held():
    assert bidirectional.check(SimpleNamespace(attend_slots=attend_slots), SMALL_SLOTS, CPU)["passed"]

    def sees_all(query, key, value, count=None):
        return attend_slots(query, key, value)

    row = bidirectional.check(SimpleNamespace(attend_slots=sees_all), SMALL_SLOTS, CPU)
    assert not row["passed"]


def test_every_query_is_paired_with_every_slot():
    shape = bidirectional.SHAPES[0]
    assert shape.bidirectional
    assert shape.pairs == 512 * 128
    flop = 3 * shape.heads * (14 * shape.dim * shape.pairs + 12 * shape.tokens * shape.slots * shape.dim)
    limited = attention_gpu_report.floor(shape, 3, flop_per_s=1e6, bytes_per_s=1e15)
    assert limited["floor_ms"] == pytest.approx(flop / 1e3, rel=1e-6)


def test_the_profile_of_a_call_becomes_a_table(tmp_path, capsys):
    head = '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
    rows = [
        ("0", "forward_kernel(int)", "Speed", "Duration", "us", "1,234.5"),
        ("0", "forward_kernel(int)", "Speed", "DRAM Throughput", "%", "41.25"),
        ("0", "forward_kernel(int)", "Speed", "SM Frequency", "Ghz", "1.9"),
        ("1", "sum(float)", "Speed", "Duration", "ns", "2500"),
    ]
    lines = ["==PROF== Connected", head, *(",".join(f'"{cell}"' for cell in row) for row in rows)]
    (tmp_path / "profile.csv").write_text("\n".join(lines))
    attention_gpu_profile.main(["--table", str(tmp_path / "profile.csv")])
    printed = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.strip().split("\n")]
    assert printed[0][:3] == ["kernel", "µs", "DRAM, %"]
    assert printed[2][:3] == ["forward_kernel", "1234", "41.25"]
    assert printed[3][:3] == ["sum", "2.5", ""]
    with pytest.raises(ValueError, match="no line begins with"):
        attention_gpu_profile.profile_table(["nothing"])


def test_the_call_for_a_profile_runs():
    attention_gpu_profile.main(["--tokens", "256"])


def test_the_processors_time_is_measured_without_starting_a_kernel(tmp_path, monkeypatch):
    """And nothing of that stays behind."""
    if kernels_linformer.triton is None:
        pytest.skip("needs Triton: make setup")
    monkeypatch.setattr(kernels_linformer, "mix_and_attend", MIX_AND_ATTEND)
    monkeypatch.setattr(attention_host, "CALLS", 1)
    monkeypatch.setattr(attention_host, "BATCHES", 2)
    monkeypatch.setattr(attention_host, "COMPILER", {"backend": "eager"})
    monkeypatch.setattr(torch, "set_num_threads", lambda _count: None)
    before = operators_linformer.launch, kernels_linformer.mix_and_attend_op, kernels_linformer.INTERPRETED
    attention_host.main([str(tmp_path / "host.json")])
    assert before == (operators_linformer.launch, kernels_linformer.mix_and_attend_op, kernels_linformer.INTERPRETED)
    calls = attention_host.calls_of_models(torch.device("cpu"))
    assert not any(call().requires_grad for what, call in calls.items() if "compiled" not in what)
    rows = json.loads((tmp_path / "host.json").read_text())["host"]
    assert all(row["us"][0] > 0 for row in rows)
    assert {(row["attention"], row["what"]) for row in rows if row["kernels"] == "named"} == {
        (way, what)
        for way in ("causal", "bidirectional")
        for what in (
            "both passes",
            "forward",
            "forward: the operator",
            "backward",
            "backward: the operator",
            "a function that does nothing, both passes",
        )
    } | {
        ("whole model", f"{what}, {model}")
        for what in ("a prompt", "a prompt, compiled", "the next token")
        for model in ("linpass", "Llama")
    }
    assert "| causal | forward: the operator | named |" in (tmp_path / "host.md").read_text()
