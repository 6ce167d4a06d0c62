"""Two processes do what one does: torchrun and accelerate launch, DDP and FSDP, gloo on CPUs.

Not here: FSDP 1, which transformers will drop and torch refuses on CPUs; mixed precision; several machines.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_run import start, start_together
from distributed_run import BORDERS, EPOCHS, LENGTHS, numbered_documents, record_both, train_by_command
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from linpass.cli import main
from linpass.training.checkpoints import find_damage
from linpass.training.output_folder import LOG_NAME
from linpass.training.sampling import ChunkDataset

SAME: dict[str, Any] = {"rel": 1e-5, "abs": 1e-6}  # sums in another order
GLOBAL_BATCH = 8
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    # --multi_gpu, because --cpu starts one process, whatever --num_processes says
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    + ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Three steps an epoch; in its last one four rows of eight are padding, all of them the second process's."""
    folder, draws = tmp_path_factory.mktemp("text"), random.Random(0)
    words = ["".join(draws.choices("abcdefghijklmnop", k=draws.randint(2, 7))) for _ in range(300)]
    for name, count in (("train", 20), ("validation", 5)):
        texts = [" ".join(draws.choices(words, k=draws.randint(3, 90))) for _ in range(count)]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    files = ["--text_files", str(folder / "train.jsonl"), "--validation_files", str(folder / "validation.jsonl")]
    chunks = ["--chunks_per_document", "1", "--deletion_probability", "0.1", "--cache_dir", str(folder)]
    steps = ["--max_steps", "8", "--logging_steps", "1", "--lr_scheduler_type", "constant"]
    saving = ["--eval_strategy", "steps", "--eval_steps", "4", "--save_strategy", "steps", "--save_steps", "4"]
    return ["--preset", "debug", "--use_cpu", "True", "--disable_tqdm", "True", *files, *chunks, *steps, *saving]


def with_output(flags, folder, processes, *more):
    batch = str(GLOBAL_BATCH // processes)
    sizes = ["--per_device_train_batch_size", batch, "--per_device_eval_batch_size", batch]
    return [*flags, *sizes, "--output_dir", str(folder / "model"), *more]


@pytest.fixture(scope="module")
def one(flags, tmp_path_factory):
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("one")
    assert main(["train", *with_output(flags, folder, 1)]) == 0
    return folder


def launch(launcher, flags):
    """`linpass train` in two processes that this launcher starts."""
    root = str(Path(__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "linpass.cli", "train", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory):
    """The folder of a run by torchrun, and what it printed."""
    folder = tmp_path_factory.mktemp("two")
    process = launch("torchrun", with_output(flags, folder, 2))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return folder, output


def together(function, *args, **keywords):
    """Run a function in two connected processes."""
    processes = start_together(2, function, *args, **keywords)
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]


def log_of(folder, *names):
    """These numbers of every line of the training log that has them, with the step."""
    lines = (folder / "trainer_output/model" / LOG_NAME).read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [[entry[name] for name in ("step", *names)] for entry in entries if all(name in entry for name in names)]


def results(folder):
    """Everything that a run measured, as (step, number, number)."""
    return [*log_of(folder, "loss", "grad_norm"), *log_of(folder, "eval_loss", "eval_tokens")]


def weights(folder):
    return load_file(folder / "model/model.safetensors")


def assert_close(folder, expected_folder):
    got, expected = results(folder), results(expected_folder)
    assert len(got) == len(expected) == 10
    for line, expected_line in zip(got, expected, strict=True):
        assert line == pytest.approx(expected_line, **SAME)
    got, expected = weights(folder), weights(expected_folder)
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(got[name], expected[name], rtol=1e-4, atol=1e-5), name


def assert_equal(folder, expected_folder):
    assert results(folder) == results(expected_folder)
    got, expected = weights(folder), weights(expected_folder)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def checkpoint_only(folder, source, step):
    """A folder in which a run was killed some time after this checkpoint."""
    shutil.copytree(source / "trainer_output", folder / "trainer_output")
    for path in (folder / "trainer_output/model").glob("checkpoint-*"):
        if path.name != f"checkpoint-{step}":
            shutil.rmtree(path)
    return folder


# -- DDP


def test_torchrun_gives_the_losses_norms_and_weights_of_one_process(one, two):
    assert_close(two[0], one)


def test_torchrun_prints_everything_once_and_no_warning(two):
    lines = two[1].splitlines()
    times = {"parameters; ": 1, "'eval_tokens'": 2, "'train_runtime'": 1, "Go on: linpass generate": 1}
    assert {text: sum(text in line for line in lines) for text in times} == times, two[1]
    assert not [line for line in lines if "warn" in line.lower() or "Traceback" in line]


def test_a_resumed_run_gives_the_same_bits(flags, two, tmp_path):
    checkpoint_only(tmp_path, two[0], 4)
    together(train_by_command, with_output(flags, tmp_path, 2, "--resume"))
    assert_equal(tmp_path, two[0])


def test_accelerate_launch_starts_the_same_run_and_sigterm_stops_both_at_one_step(flags, two, tmp_path):
    longer = ["--max_steps", "100000", "--eval_strategy", "no", "--save_strategy", "no"]
    process = launch("accelerate", with_output(flags, tmp_path, 2, *longer))
    log, deadline = tmp_path / "trainer_output/model" / LOG_NAME, time.monotonic() + 200
    while not (log.is_file() and '"step": 8,' in log.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert output.count("Stopping after this step with a checkpoint") == 2
    assert output.count("go on with the same command and --resume") == 1
    losses = log_of(tmp_path, "loss", "grad_norm")
    assert losses[:8] == log_of(two[0], "loss", "grad_norm")
    (checkpoint,) = (tmp_path / "trainer_output/model").glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{len(losses)}"
    assert find_damage(checkpoint) is None
    stopped_at = [json.loads((checkpoint / f"running_loss_{rank}.json").read_text()) for rank in range(2)]
    assert {state["last_logged_step"] for state in stopped_at} == {len(losses)}
    assert not (tmp_path / "model").exists()


# -- FSDP


def test_fsdp_trains_saves_and_resumes_as_one_process_does(flags, one, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    together(train_by_command, with_output(flags, whole, 2, "--fsdp"), sharded=True)
    assert_close(whole, one)
    checkpoint_only(resumed, whole, 4)
    together(train_by_command, with_output(flags, resumed, 2, "--fsdp", "--resume"), sharded=True)
    assert_equal(resumed, whole)

    files = {path.name for path in (one / "model").iterdir()}
    assert {path.name for path in (whole / "model").iterdir()} == files  # the model's code, none of torch's
    assert (whole / "model/config.json").read_text() == (one / "model/config.json").read_text()
    checkpoint = whole / "trainer_output/model/checkpoint-4"
    code = {name for name in files if name.endswith(".py")}
    assert {path.name for path in checkpoint.glob("*.py")} == code
    ids = torch.arange(2, 50)[None]
    got, expected = (AutoModelForCausalLM.from_pretrained(folder / "model")(ids).logits for folder in (whole, one))
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_fsdp_saves_whole_weights_beside_checkpoints_of_shards_and_tied_ones_once(flags, tmp_path):
    shards = ["--fsdp", "--fsdp_config", '{"state_dict_type": "SHARDED_STATE_DICT"}']
    short = ["--max_steps", "1", "--save_steps", "1", "--tie_word_embeddings", "True"]
    together(train_by_command, with_output(flags, tmp_path, 2, *shards, *short), sharded=True)
    checkpoint = tmp_path / "trainer_output/model/checkpoint-1"
    assert (checkpoint / "pytorch_model_fsdp_0").is_dir()
    assert not (checkpoint / "model.safetensors").exists()
    assert "model.embed_tokens.weight" in weights(tmp_path)
    assert "lm_head.weight" not in weights(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


# -- exactly once


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """kind -> records of one process with 8 rows a step, and of two with 2 rows twice a step."""
    alone, both = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("both")
    process = start(record_both, alone, rows=GLOBAL_BATCH, accumulation=1)
    process.join(300)
    assert process.exitcode == 0
    together(record_both, both, rows=2, accumulation=2)
    files = {kind: [alone / f"{kind}.0", both / f"{kind}.0", both / f"{kind}.1"] for kind in ("plain", "packed")}
    return {kind: [json.loads(path.read_text()) for path in paths] for kind, paths in files.items()}


both_kinds = pytest.mark.parametrize("kind", ["plain", "packed"])


@both_kinds
def test_every_token_of_every_chunk_is_seen_once_an_epoch(kind, records):
    documents = numbered_documents()
    dataset = ChunkDataset(documents, BORDERS)
    for epoch in range(EPOCHS):
        expected = Counter()
        for document, length in enumerate(LENGTHS):
            for chunk in range(dataset.counts[document]):
                begin, end = BORDERS.span(length, epoch, document, chunk)
                expected.update(documents[document][begin:end].tolist())
        alone, *both = records[kind]
        for processes in ([alone], both):
            seen = [batch for record in processes for batch in record["seen"] if batch[0] == epoch]
            assert Counter(token for _, _, rows in seen for row in rows for token in row) == expected


@both_kinds
def test_only_the_last_step_of_an_epoch_is_filled_up(kind, records):
    steps = {}
    for record in records[kind][1:]:
        for epoch, step, rows in record["seen"]:
            steps.setdefault((epoch, step), []).extend(rows)
    last = {max(step for e, step in steps if e == epoch) for epoch in range(EPOCHS)}
    assert {step for (_, step), rows in steps.items() if len(rows) < GLOBAL_BATCH or not all(rows)} <= last
    if kind == "plain":
        filled = -len(ChunkDataset(numbered_documents(), BORDERS)) % GLOBAL_BATCH
        assert filled
        assert [rows.count([]) for (_, step), rows in sorted(steps.items()) if step in last] == [filled] * EPOCHS


@both_kinds
def test_accumulation_in_two_processes_takes_the_steps_of_one(kind, records):
    alone, *both = records[kind]
    tokens = [Counter(), Counter()]
    for count, parts in zip(tokens, ([alone], both), strict=True):
        for record in parts:
            count.update((step, token) for _, step, rows in record["seen"] for row in rows for token in row)
    assert tokens[0] == tokens[1]
    for record in both:
        assert len(record["log"]) == len(alone["log"])
        for line, expected in zip(record["log"], alone["log"], strict=True):
            assert line == pytest.approx(expected, **SAME)


@both_kinds
def test_every_validation_token_is_counted_once(kind, records):
    dataset = ChunkDataset(numbered_documents(), BORDERS, random=False)
    predicted = int((dataset.chunk_lengths(range(len(dataset))) - 1).sum())
    for record in records[kind]:
        assert record["evaluation"][1] == predicted
        assert record["evaluation"][0] == pytest.approx(records[kind][0]["evaluation"][0], **SAME)
