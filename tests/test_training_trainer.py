"""The Trainer: the same loss however a step is cut up, an exact evaluation, no logits, errors that name the batch."""

import copy
import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, set_seed

from linpass import LinformerConfig, LinformerForCausalLM, LinformerForMaskedLM
from linpass.training.checkpoints import DivergedError
from linpass.training.collators import DynamicChunkingCollator
from linpass.training.losses import restore_forward
from linpass.training.parser import TrainingArguments
from linpass.training.sampling import ChunkBorders, ChunkDataset
from linpass.training.tokenization import train_tokenizer
from linpass.training.trainer import LanguageModelTrainer

SEQ = 32


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The text of a small test."], 300, mask=True)


def build(architecture="linformer", **options):
    set_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "vocab_size": 300}
    if architecture == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_positions=SEQ, n_embd=16, n_layer=2, n_head=2, **ids))
    if architecture == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(max_position_embeddings=SEQ, **sizes, **ids))
    values = {
        **{"embed_dim": 16, "depth": 2, "heads": 2, "seq_length": SEQ, "k": 8, "block_size": 8, "window_size": 8},
        **{"rank": None, "dropout": 0.0, **ids, **options},
    }
    model = LinformerForCausalLM if values.get("causal", True) else LinformerForMaskedLM
    return model(LinformerConfig(**values))


def trainer_for(tokenizer, folder, model, lengths=(70, 9, 33, 100, 2, 48, 61), objective="causal", **options):
    generator = np.random.default_rng(0)
    documents = [generator.integers(2, 298, length) for length in lengths]
    borders = ChunkBorders(SEQ, seed=0)
    packing = options.pop("pack_block", None)
    arguments = {
        **{"output_dir": str(folder), "use_cpu": True, "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none"},
        **{"per_device_train_batch_size": 8, "num_train_epochs": 2, "save_strategy": "no", "disable_tqdm": True},
        **options,
    }
    return LanguageModelTrainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=ChunkDataset(documents, borders),
        eval_dataset=ChunkDataset(documents[:5], borders, random=False),
        data_collator=DynamicChunkingCollator(
            tokenizer, SEQ, objective=objective, packing=packing is not None, block_size=packing or 1
        ),
        processing_class=tokenizer,
        pack_block=packing,
    )


def logged(trainer, *names):
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "grad_norm" in entry]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_step_may_be_cut_up_in_any_way(tokenizer, tmp_path, smoothing):
    curves = []
    for batch, accumulation in ((8, 1), (1, 8), (2, 4)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = trainer_for(tokenizer, tmp_path, build().double(), label_smoothing_factor=smoothing, **options)
        trainer.train()
        curves.append(logged(trainer, "loss", "grad_norm"))
    assert len(curves[0]) == 4
    for curve in curves[1:]:
        torch.testing.assert_close(torch.tensor(curve), torch.tensor(curves[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["linformer", "gpt2", "llama"])
def test_the_loss_is_transformers_loss_with_the_mask(tokenizer, tmp_path, architecture):
    """Neither the loss without logits nor the mask that is left away changes value or gradient."""
    model = build(architecture).double().train()
    if architecture == "gpt2":
        model.eval()  # its dropout
    plain = copy.deepcopy(model)
    trainer = trainer_for(tokenizer, tmp_path, model)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in (3, 4, 8)] + [[]])
    assert batch["attention_mask"].sum() < batch["attention_mask"].numel()
    loss = trainer.compute_loss(model, batch)
    keep = batch["attention_mask"].any(-1)  # transformers' own mask of a row of padding alone is not always finite
    logits = plain(input_ids=batch["input_ids"][keep], attention_mask=batch["attention_mask"][keep]).logits
    # transformers' own loss would round to float32
    truth = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][keep][:, 1:].flatten())
    assert loss.item() == pytest.approx(truth.item(), rel=1e-10)
    loss.backward()
    truth.backward()
    for (name, ours), (_name, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize(("objective", "packing"), [("causal", None), ("causal", 8), ("masked", None)])
def test_evaluation_counts_every_token_once(tokenizer, tmp_path, packing, objective):
    model = build(causal=objective == "causal").double().eval()
    for size in (2, 3):
        trainer = trainer_for(
            tokenizer, tmp_path, model, objective=objective, pack_block=packing, per_device_eval_batch_size=size
        )
        metrics = trainer.evaluate()
        restore_forward(model)
        total, tokens = 0.0, 0
        for row in trainer.eval_dataset:
            batch = trainer.data_collator([row])
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
            labels = batch["labels"][0]
            for place in range(SEQ):
                if labels[place] != -100:
                    total -= output[0, place - (objective == "causal"), labels[place]].item()
                    tokens += 1
        assert metrics["eval_tokens"] == tokens
        assert metrics["eval_loss"] == pytest.approx(total / tokens, rel=1e-10)
        assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-10)


def test_no_tensor_of_a_step_is_as_large_as_the_logits(tokenizer, tmp_path, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    monkeypatch.setattr("linpass.training.losses.LOGITS_PER_CHUNK", 2**22)  # of real sizes; these fit into one
    model = build(vocab_size=20_000)
    trainer = trainer_for(tokenizer, tmp_path, model, lengths=(32,) * 64)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(64)])
    with Largest() as largest:
        trainer.compute_loss(model, batch).backward()
    assert largest.elements < 64 * SEQ * 20_000 / 2
    restore_forward(model)
    with Largest() as largest:
        model(**batch).loss.backward()
    assert largest.elements >= 64 * SEQ * 20_000


def test_a_batch_of_single_tokens_is_no_division_by_zero(tokenizer, tmp_path):
    trainer = trainer_for(tokenizer, tmp_path, build(), lengths=(1, 1, 1, 1, 5), per_device_train_batch_size=1)
    trainer.train()
    assert all(math.isfinite(loss) for (loss,) in logged(trainer, "loss"))


def test_the_log_tells_the_wait_for_data(tokenizer, tmp_path):
    trainer = trainer_for(tokenizer, tmp_path, build())
    trainer.train()
    shares = [share for (share,) in logged(trainer, "data_wait_share")]
    assert len(shares) == 4
    assert all(0 < share < 1 for share in shares)


def test_every_epoch_draws_other_batches_and_one_seed_gives_one_run(tokenizer, tmp_path):
    def batches(**options):
        trainer = trainer_for(tokenizer, tmp_path, build(), **options)
        seen = []
        step = trainer.training_step

        def training_step(model, inputs, *rest):
            seen.append(inputs["input_ids"].clone())
            return step(model, inputs, *rest)

        trainer.training_step = training_step
        trainer.train()
        return seen

    first = batches()
    assert len(first) == 4
    assert not torch.equal(first[0], first[2])
    assert all(torch.equal(*pair) for pair in zip(first, batches(dataloader_num_workers=2), strict=True))
    assert not torch.equal(first[0], batches(data_seed=1)[0])


def test_a_nan_names_the_step_and_the_documents(tokenizer, tmp_path):
    model = build()
    trainer = trainer_for(tokenizer, tmp_path, model, per_device_train_batch_size=4)
    sampler = trainer._get_train_sampler()
    poison = 3
    original = trainer.compute_loss

    def compute_loss(*arguments, **keywords):
        loss = original(*arguments, **keywords)
        return loss * float("nan") if trainer.state.global_step == poison else loss

    trainer.compute_loss = compute_loss
    with pytest.raises(DivergedError) as error:
        trainer.train()
    _epoch, documents, _chunks = trainer.train_dataset.locate([n for row in sampler.rows(0)[12:16] for n in row])
    assert "step 4" in str(error.value)
    assert "batch 3" in str(error.value)
    for document in documents:
        assert f"{document} (chunk" in str(error.value)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
def test_bfloat16_checkpointing_and_compilation_run(tokenizer, tmp_path):
    plain = trainer_for(tokenizer, tmp_path, build(), max_steps=2)
    plain.train()
    reference = torch.tensor(logged(plain, "loss", "grad_norm"))
    name = "activation_checkpointing"
    if not hasattr(plain.args, name):
        name = "gradient_checkpointing"  # before transformers 5.2x
    for options, tolerance in (
        ({name: True}, 1e-5),
        ({"bf16": True}, 0.03),
        ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, 1e-4),
    ):
        trainer = trainer_for(tokenizer, tmp_path, build(), max_steps=2, **options)
        trainer.train()
        torch.testing.assert_close(
            torch.tensor(logged(trainer, "loss", "grad_norm")), reference, rtol=tolerance, atol=tolerance
        )
