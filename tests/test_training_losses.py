"""The loss without logits against all logits at once: value, gradients, memory, and inside models and the Trainer."""

import copy
import inspect
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LabelSmoother

from linpass import LinformerForCausalLM, LinformerForMaskedLM
from linpass.training import losses
from linpass.training.losses import (
    choose_implementation,
    linear_cross_entropy,
    restore_forward,
    use_linear_cross_entropy,
)

ROWS, FEATURES, VOCABULARY = 23, 8, 50
EXACT = 1e-10  # float64: sums of at most a few hundred terms, in another order
HAS_TORCH = hasattr(nn, "LinearCrossEntropyOptions")
CHUNKED = [
    pytest.param("torch", marks=pytest.mark.skipif(not HAS_TORCH, reason="torch 2.13 has it")),
    "checkpoint",
]
TINY = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA_SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA_SIZES |= {"num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Three rows of logits at a time: many chunks, the last one shorter."""
    monkeypatch.setattr(losses, "LOGITS_PER_CHUNK", 3 * VOCABULARY)


def problem(ignored="some", dtype=torch.float64, std=1.0):
    """Hidden states, a head and targets."""
    hidden_ND = (std * torch.randn(ROWS, FEATURES)).to(dtype).requires_grad_()
    weight_VD = torch.randn(VOCABULARY, FEATURES).to(dtype).requires_grad_()
    target_N = torch.randint(0, VOCABULARY, (ROWS,))
    target_N[{"none": slice(0), "some": slice(0, None, 4), "all": slice(None)}[ignored]] = -100
    return hidden_ND, weight_VD, target_N


def loss_and_gradients(loss, *leaves):
    """The loss, and its gradients where it is weighted by a number other than 1."""
    gradients = torch.autograd.grad((loss * torch.linspace(0.5, 1.5, loss.numel()).view_as(loss)).sum(), leaves)
    return [loss.detach(), *gradients]


def assert_close(actual, expected, tolerance=EXACT):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True, check_dtype=False)


def by_hand(hidden_ND, weight_VD, target_N, smoothing):
    """The losses of the rows that count, one number at a time."""
    found = []
    for hidden, target in zip(hidden_ND.tolist(), target_N.tolist(), strict=True):
        logits = [sum(h * w for h, w in zip(hidden, row, strict=True)) for row in weight_VD.tolist()]
        log_total = math.log(sum(math.exp(logit) for logit in logits))
        wanted = [smoothing / VOCABULARY + (1 - smoothing) * (v == target) for v in range(VOCABULARY)]
        if target != -100:
            found.append(sum(share * (log_total - logit) for share, logit in zip(wanted, logits, strict=True)))
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("implementation", [*CHUNKED, "plain", "auto"])
def test_value_is_the_one_by_hand(implementation, smoothing):
    hidden_ND, weight_VD, target_N = problem()
    rows = by_hand(hidden_ND, weight_VD, target_N, smoothing)
    for reduction, expected in (("sum", sum(rows)), ("mean", sum(rows) / len(rows))):
        loss = linear_cross_entropy(
            *(hidden_ND, weight_VD, target_N),
            reduction=reduction,
            label_smoothing=smoothing,
            implementation=implementation,
        )
        assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("reduction", "ignored"),
    [*(("mean", rows) for rows in ("none", "some")), *((r, rows) for r in ("sum", "none") for rows in ("some", "all"))],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_value_and_gradients_are_those_of_all_logits(implementation, smoothing, reduction, ignored):
    hidden_ND, weight_VD, target_N = problem(ignored)
    expected = F.cross_entropy(F.linear(hidden_ND, weight_VD), target_N, reduction=reduction, label_smoothing=smoothing)
    actual = linear_cross_entropy(
        *(hidden_ND, weight_VD, target_N),
        reduction=reduction,
        label_smoothing=smoothing,
        implementation=implementation,
    )
    assert actual.shape == expected.shape
    assert_close(loss_and_gradients(actual, hidden_ND, weight_VD), loss_and_gradients(expected, hidden_ND, weight_VD))


@pytest.mark.parametrize("implementation", CHUNKED)
def test_all_rows_ignored(implementation):
    hidden_ND, weight_VD, target_N = problem("all")
    total = linear_cross_entropy(hidden_ND, weight_VD, target_N, reduction="sum", implementation=implementation)
    total.backward()
    assert total.item() == 0
    assert not hidden_ND.grad.any()
    assert not weight_VD.grad.any()
    assert linear_cross_entropy(hidden_ND, weight_VD, target_N, implementation=implementation).isnan()


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_one_factor_frozen(implementation, frozen):
    hidden_ND, weight_VD, target_N = problem()
    [hidden_ND, weight_VD][frozen].requires_grad_(False)
    free = [hidden_ND, weight_VD][1 - frozen]
    expected = F.cross_entropy(F.linear(hidden_ND, weight_VD), target_N)
    actual = linear_cross_entropy(hidden_ND, weight_VD, target_N, implementation=implementation)
    assert_close(loss_and_gradients(actual, free), loss_and_gradients(expected, free))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_bfloat16(implementation, smoothing):
    # bfloat16 rounds at 4e-3: logits and probabilities once each, and the sum of 8 chunks' gradients seven times. The
    # loss is a mean of rounded numbers; PyTorch's own scalar loss, rounded after each chunk, would be off by 1e-2.
    hidden_ND, weight_VD, target_N = problem(dtype=torch.bfloat16)
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden_ND, weight_VD)]
    expected = F.cross_entropy(F.linear(*wide), target_N, label_smoothing=smoothing)
    actual = linear_cross_entropy(
        hidden_ND, weight_VD, target_N, label_smoothing=smoothing, implementation=implementation
    )
    assert actual.dtype == torch.float32
    assert actual.item() == pytest.approx(expected.item(), rel=2e-3)
    for a, b in zip(
        torch.autograd.grad(actual, (hidden_ND, weight_VD)), torch.autograd.grad(expected, wide), strict=True
    ):
        assert (a.double() - b).norm() < 1.5e-2 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_autocast_casts_as_linear_does(implementation, dtype):
    hidden_ND, weight_VD, target_N = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.cross_entropy(F.linear(hidden_ND.to(dtype), weight_VD).float(), target_N)
        actual = linear_cross_entropy(hidden_ND.to(dtype), weight_VD, target_N, implementation=implementation)
    assert actual.item() == pytest.approx(expected.item(), rel=4e-3)
    for a, b in zip(*(torch.autograd.grad(x, (hidden_ND, weight_VD)) for x in (actual, expected)), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 1.5e-2 * b.norm()


def test_a_head_filled_up_to_aligned_rows_is_the_same_head():
    hidden_ND = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    weight_VD = torch.randn(101, 8, dtype=torch.float64, requires_grad=True)
    target_N = torch.randint(0, 101, (20,))
    wide_ND, wide_VD = losses._with_aligned_ids(hidden_ND, weight_VD)
    assert wide_VD.shape == (128, 16)
    filled = F.cross_entropy(F.linear(wide_ND, wide_VD), target_N)
    truth = F.cross_entropy(F.linear(hidden_ND, weight_VD), target_N)
    assert filled.item() == pytest.approx(truth.item(), rel=1e-14)
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden_ND, weight_VD)) for x in (filled, truth)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    assert losses._with_aligned_ids(wide_ND, wide_VD) == (wide_ND, wide_VD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_filling_has_no_probability_and_no_gradient(dtype):
    """Nor makes it what is not a number of others' gradients."""
    hidden_ND, weight_VD = (torch.randn(rows, 8, dtype=dtype) for rows in (20, 101))
    wide_ND, wide_VD = (tensor.detach().requires_grad_() for tensor in losses._with_aligned_ids(hidden_ND, weight_VD))
    logits_NV = F.linear(wide_ND, wide_VD)
    assert not logits_NV.softmax(-1)[:, 101:].any()
    F.cross_entropy(logits_NV.float(), torch.arange(20)).backward()
    assert wide_ND.grad.isfinite().all()
    assert wide_VD.grad[:101].isfinite().all()
    assert not wide_VD.grad[101:].any()


def test_liger_gives_what_pytorch_gives():
    """Values and gradients, each factor frozen or not, with no token at all."""
    pytest.importorskip("liger_kernel")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("liger_run.py")
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.stdout == "equal\n", run.stderr


@pytest.mark.parametrize("field", ["accum_dtype", "_input"])
def test_another_liger_is_refused(field, monkeypatch):
    class Other:
        @staticmethod
        def forward(ctx, _input, weight, target, bias=None, ignore_index=-100, reduction="mean", accum_dtype=None):
            raise AssertionError

    names = {name: each for name, each in inspect.signature(Other.forward).parameters.items() if name != field}
    Other.forward.__signature__ = inspect.Signature(list(names.values()))
    module = SimpleNamespace(LigerFusedLinearCrossEntropyFunction=Other)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_linear_cross_entropy", module)
    with pytest.raises(ValueError, match=f"takes no {field}; linpass needs 0.6.2"):
        losses._liger_loss(*problem(dtype=torch.float32), "sum", 0.0, -100)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["liger", "auto", "checkpoint"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_on_cuda_in_bfloat16(implementation, smoothing, device, monkeypatch):
    if implementation == "liger":
        pytest.importorskip("liger_kernel")
    monkeypatch.setattr(losses, "LOGITS_PER_CHUNK", 512 * 5003)
    hidden_ND = torch.randn(2000, 64, device=device).bfloat16().requires_grad_()
    weight_VD = torch.randn(5003, 64, device=device).bfloat16().requires_grad_()
    target_N = torch.randint(0, 5003, (2000,), device=device)
    target_N[::7] = -100
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden_ND, weight_VD)]
    expected = F.cross_entropy(F.linear(*wide), target_N, label_smoothing=smoothing)
    actual = linear_cross_entropy(
        hidden_ND, weight_VD, target_N, label_smoothing=smoothing, implementation=implementation
    )
    assert actual.item() == pytest.approx(expected.item(), rel=2e-3)
    gradients = torch.autograd.grad(actual, (hidden_ND, weight_VD))
    for a, b in zip(gradients, torch.autograd.grad(expected, wide), strict=True):
        assert (a.double() - b).norm() < 1.5e-2 * b.norm()


def test_refuses_what_it_cannot_run():
    hidden_ND, weight_VD, target_N = problem()
    with pytest.raises(ValueError, match="reduction='median' must be one of"):
        linear_cross_entropy(hidden_ND, weight_VD, target_N, reduction="median")
    with pytest.raises(ValueError, match="implementation='fast' must be one of"):
        linear_cross_entropy(hidden_ND, weight_VD, target_N, implementation="fast")
    with pytest.raises(ValueError, match="implementation='liger' needs CUDA"):
        linear_cross_entropy(hidden_ND, weight_VD, target_N, implementation="liger")


def test_without_pytorchs_operation_the_chunks_are_checkpointed(monkeypatch):
    hidden_ND = problem()[0]
    assert choose_implementation("auto", hidden_ND) == ("torch" if HAS_TORCH else "checkpoint")
    monkeypatch.delattr(nn, "LinearCrossEntropyOptions", raising=False)
    assert choose_implementation("auto", hidden_ND) == "checkpoint"
    with pytest.raises(ValueError, match="implementation='torch' needs torch 2.13"):
        choose_implementation("torch", hidden_ND)


# Inside models.


def causal_models(tiny_config) -> dict[str, Any]:
    """One small model of each kind, by name: functions, because building takes time."""
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return {
        "linformer": lambda: LinformerForCausalLM(tiny_config()),
        "linformer-tied": lambda: LinformerForCausalLM(tiny_config(tie_word_embeddings=True, dropout=0.2)),
        "gpt2-tied": lambda: GPT2LMHeadModel(GPT2Config(**TINY, **gpt2)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**TINY, **gpt2, tie_word_embeddings=False)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY, **LLAMA_SIZES)),
    }


NAMES = ["linformer", "linformer-tied", "gpt2-tied", "gpt2", "llama"]


def batch():
    ids = torch.randint(0, VOCABULARY, (2, 24))
    labels = ids.clone()
    labels[0, 3:9] = -100
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    labels[1, 20:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model, loss):
    """The loss and the gradients of the parameters."""
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def own_gradients(model, inputs):
    """Loss and gradients of a call with labels, the same dropout each time."""
    torch.manual_seed(5)
    output = model(**inputs)
    return gradients(model, output.loss)


def plain_gradients(model, inputs, shift=True, num_items_in_batch=None, shift_labels=None):
    """The same from all logits; transformers' loss would round them to float32."""
    torch.manual_seed(5)
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    target = inputs["labels"] if shift_labels is None else shift_labels
    if shift and shift_labels is None:
        logits, target = logits[:, :-1], target[:, 1:]
    if num_items_in_batch is None:
        return gradients(model, F.cross_entropy(logits.flatten(0, 1), target.flatten()))
    total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
    return gradients(model, total / num_items_in_batch)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_model_gives_the_same_loss_and_gradients(name, training, tiny_config):
    model = causal_models(tiny_config)[name]().double().train(training)
    inputs = batch()
    variants = [{}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}]
    variants.append({"shift_labels": inputs["labels"].flip(0)})
    expected = [copy.deepcopy(plain_gradients(model, inputs, **extra)) for extra in variants]
    transformers_loss = [own_gradients(model, inputs | extra)[0] for extra in variants]
    use_linear_cross_entropy(model)
    assert model.training is training
    assert model(**inputs).logits is None
    for extra, wanted, other in zip(variants, expected, transformers_loss, strict=True):
        found = own_gradients(model, inputs | extra)
        assert_close(found, wanted)
        assert found[0].item() == pytest.approx(other.item(), rel=1e-6)


def test_masked_model_does_not_shift(tiny_config, build):
    model = build(LinformerForMaskedLM, tiny_config(causal=False))
    inputs = batch()
    expected = copy.deepcopy(plain_gradients(model, inputs, shift=False))
    use_linear_cross_entropy(model)
    assert model(**inputs).logits is None
    assert_close(own_gradients(model, inputs), expected)


@pytest.mark.parametrize("items", [None, 9])
@pytest.mark.parametrize("name", ["linformer", "gpt2-tied"])
def test_smoothing_is_the_trainers(name, items, tiny_config):
    model = causal_models(tiny_config)[name]().double().eval()
    inputs = batch()
    labels = inputs.pop("labels")
    smoother = LabelSmoother(epsilon=0.1)
    loss = smoother(model(**inputs), labels, shift_labels=True, num_items_in_batch=items)
    # the Trainer's smoother sums the smoothed part in float32
    expected = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
    use_linear_cross_entropy(model, label_smoothing=0.1)
    assert_close(own_gradients(model, inputs | {"labels": labels, "num_items_in_batch": items}), expected, 1e-6)


def test_readers_of_the_signature_find_the_models_own(tiny_config):
    model = causal_models(tiny_config)["linformer"]()
    before = inspect.signature(model.forward)
    use_linear_cross_entropy(model)
    assert inspect.signature(model.forward) == before


def test_copies_and_pickles_compute_with_their_own_weights(tiny_config):
    model = causal_models(tiny_config)["gpt2-tied"]().eval()
    use_linear_cross_entropy(model)
    inputs = batch()
    expected = model(**inputs).loss.item()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        assert twin(**inputs).logits is None
        assert twin(**inputs).loss.item() == pytest.approx(expected, rel=1e-6)
        model.load_state_dict(twin.state_dict())


def test_saved_folder_is_the_same(tiny_config, tmp_path):
    model = causal_models(tiny_config)["linformer-tied"]()
    model.save_pretrained(tmp_path / "before")
    use_linear_cross_entropy(model)
    model.save_pretrained(tmp_path / "after")
    before, after = (
        {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()} for folder in ("before", "after")
    )
    assert before == after


def test_calls_without_labels_are_the_old_ones_and_restore_brings_the_rest_back(tiny_config):
    model = causal_models(tiny_config)["linformer"]().eval()
    inputs = batch()
    prompt = inputs["input_ids"][:, :8]
    expected, loss = model.generate(prompt, max_new_tokens=5, do_sample=False), model(**inputs).loss
    use_linear_cross_entropy(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), expected)
    assert model(input_ids=prompt).logits.shape == (2, 8, VOCABULARY)
    assert model(prompt, labels=prompt, return_dict=False)[0].dim() == 0
    restore_forward(model)
    assert "forward" not in vars(model)
    assert torch.equal(model(**inputs).loss, loss)
    assert model(**inputs).logits is not None
    restore_forward(model)  # twice is once


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Gemma2ForCausalLM(Gemma2Config(**TINY, **LLAMA_SIZES)), "scaled or capped logits"),
        (lambda: GraniteForCausalLM(GraniteConfig(**TINY, **LLAMA_SIZES, logits_scaling=3.0)), "scaled or capped"),
        (lambda: PhiForCausalLM(PhiConfig(**TINY, **LLAMA_SIZES)), "without bias"),
    ],
    ids=["capped", "scaled", "bias"],
)
def test_refuses_a_model_with_another_head(model, reason):
    model = model().train()
    with pytest.raises(ValueError, match=reason):
        use_linear_cross_entropy(model)
    assert "forward" not in vars(model)
    assert model(**batch()).logits is not None
    assert all(module.training for module in model.modules())


def test_activation_checkpointing_and_autocast(tiny_config):
    model = causal_models(tiny_config)["linformer-tied"]().train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    inputs = batch() | {"use_cache": False}
    with torch.autocast("cpu", torch.bfloat16):
        expected = copy.deepcopy(own_gradients(model, inputs))
        use_linear_cross_entropy(model)
        enable()
        found = own_gradients(model, inputs)
    assert found[0].dtype == torch.float32
    assert found[0].item() == pytest.approx(expected[0].item(), rel=4e-3)
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert (a - b).norm() < 3e-2 * b.norm() + 1e-6


# Memory and compilation.

# torch._dynamo itself makes an object of each autograd.Function that it meets, which torch.autograd advises against.
compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def largest_allocation(run) -> int:
    """Bytes of the largest tensor that a call creates, inside PyTorch's operations too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    return max(event.self_cpu_memory_usage for event in profile.events())


@compiles
@pytest.mark.parametrize(("compiled", "smoothing"), [(False, 0.0), (False, 0.1), (True, 0.1)])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_no_tensor_is_as_large_as_the_logits(implementation, compiled, smoothing, tiny_config, monkeypatch):
    vocabulary = 3000
    monkeypatch.setattr(losses, "LOGITS_PER_CHUNK", 16 * vocabulary)
    model = LinformerForCausalLM(tiny_config(vocab_size=vocabulary, depth=1)).train()
    ids = torch.randint(0, vocabulary, (8, 32))
    logits, weight = 4 * ids.numel() * vocabulary, 4 * vocabulary * model.config.embed_dim
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    def step(forward):
        return lambda: forward(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    assert largest_allocation(step(model)) >= logits
    use_linear_cross_entropy(model, smoothing, implementation)
    forward: Any = model
    if compiled:
        torch.compiler.reset()
        forward = torch.compile(model, backend=count)
    step(forward)()
    model.zero_grad()
    assert largest_allocation(step(forward)) == weight < logits / 4
    assert (sum(len(graph.graph.nodes) for graph in graphs) > 50) is compiled  # the layers, not the wrapper alone


# Wrapped.


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["linformer", "gpt2-tied"])
def test_wrapped_for_several_devices(name, wrapper, one_process, tiny_config):
    model = causal_models(tiny_config)[name]().eval()
    inputs = batch()
    expected = copy.deepcopy(own_gradients(model, inputs))
    use_linear_cross_entropy(model)
    if wrapper == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    found = own_gradients(wrapped, inputs)
    found = [gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient for gradient in found]
    assert_close(found, expected, 1e-5)


@compiles
@pytest.mark.parametrize("precision", ["float32", "bf16", "compiled"])
def test_in_the_trainer(precision, tiny_config, tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, VOCABULARY, (12, 16))]
    history = []
    for without_logits in (False, True):
        torch.manual_seed(2)
        model = LinformerForCausalLM(tiny_config(depth=1))
        if without_logits:
            use_linear_cross_entropy(model)
        torch.compiler.reset()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            bf16=precision == "bf16",
            torch_compile=precision == "compiled",
            torch_compile_backend="eager" if precision == "compiled" else None,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses_seen = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        history.append([*losses_seen, trainer.evaluate()["eval_loss"]])
        restore_forward(model)
        assert model(rows[0]["input_ids"][None], labels=rows[0]["input_ids"][None]).logits is not None
    assert history[1] == pytest.approx(history[0], rel=1e-2 if precision == "bf16" else 1e-5)
