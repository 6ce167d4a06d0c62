"""What transformers expects of a model: saving, loading, initial weights, heads, losses, resizing, checkpointing."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerances import ORACLE
from transformers import AutoModel, Trainer, TrainingArguments
from versions import CHECKPOINTING

from linpass import (
    LinformerConfig,
    LinformerForCausalLM,
    LinformerForMaskedLM,
    LinformerForSequenceClassification,
    LinformerForTokenClassification,
    LinformerModel,
    LowRankLinear,
    modeling_linformer,
)
from linpass.attention_linformer import pooling_weight

HEADS = [
    LinformerModel,
    LinformerForCausalLM,
    LinformerForMaskedLM,
    LinformerForSequenceClassification,
    LinformerForTokenClassification,
]
FIRST_OUTPUT = {LinformerModel: "last_hidden_state"}
SHARINGS = ("none", "headwise", "key-value", "layerwise")


def config_for(head, tiny_config, **changes):
    return tiny_config(**{"causal": head is not LinformerForMaskedLM, **changes})


def run(model, ids, **kwargs):
    return getattr(model(ids, **kwargs), FIRST_OUTPUT.get(type(model), "logits"))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_save_and_load_gives_the_same_logits_to_the_bit(head, sharing, build, tiny_config, tmp_path):
    model = build(head, config_for(head, tiny_config, projection_sharing=sharing, rank=4), dtype=torch.float32)
    ids = torch.randint(0, 50, (2, 21))
    model.save_pretrained(tmp_path)
    loaded, report = head.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(run(loaded.eval(), ids), run(model, ids))
    assert torch.equal(run(copy.deepcopy(model), ids), run(model, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_of_a_checkpoint_is_kept(dtype, build, tiny_config, tmp_path):
    build(LinformerForCausalLM, tiny_config(), dtype=dtype).save_pretrained(tmp_path)
    model = LinformerForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == dtype
    ids = torch.randint(0, 50, (2, 21))
    output = model(ids, labels=ids)
    assert output.logits.dtype == dtype
    output.loss.backward()
    assert LinformerForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("head", HEADS[2:])
def test_a_causal_checkpoint_opens_in_every_head(head, build, tiny_config, tmp_path):
    model = build(LinformerForCausalLM, tiny_config(), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = head.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 50, (2, 21))
    assert torch.equal(loaded.model(ids).last_hidden_state, model.model(ids).last_hidden_state)
    base = LinformerModel.from_pretrained(tmp_path).eval()
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    again = LinformerForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(again.model(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_masked_lm_on_a_causal_checkpoint_warns(tiny_config, monkeypatch):
    said = []
    monkeypatch.setattr(modeling_linformer.logger, "warning_once", said.append)
    LinformerForMaskedLM(tiny_config(causal=False))
    assert not said
    LinformerForMaskedLM(tiny_config())
    assert "stays causal" in said[0]


def test_causal_lm_refuses_an_encoder(tiny_config):
    with pytest.raises(ValueError, match="causal=True.*LinformerForMaskedLM"):
        LinformerForCausalLM(tiny_config(causal=False))


@pytest.mark.parametrize("head", HEADS)
def test_one_seed_one_model(head, tiny_config):
    config = config_for(head, tiny_config, rank=4)
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        states.append(head(config).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("projection", ["learned", "convolution"])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_mixing_starts_as_pooling(causal, projection, sharing, tiny_config):
    config = tiny_config(causal=causal, projection=projection, projection_sharing=sharing)
    model = LinformerModel(config)
    projections = {name: p for name, p in model.named_parameters() if "projection." in name}
    per_layer = {"none": 2, "headwise": 2, "key-value": 1, "layerwise": 0.5}[sharing]
    assert len(projections) == per_layer * config.depth
    for weight in projections.values():
        if causal:
            expected = pooling_weight(8, 2, torch.float32).repeat(weight.shape[1] // 8, 1)
            assert (weight - expected).abs().max() < 1e-7
        elif projection == "convolution":
            assert torch.equal(weight, torch.full_like(weight, 0.25))
        else:
            noise = weight - pooling_weight(32, 8, torch.float32)
            assert 0 < noise.std() < 0.01


def test_initial_standard_deviations(tiny_config):
    config = tiny_config(embed_dim=256, vocab_size=500, rank=32, depth=3, initializer_range=0.03)
    model = LinformerForCausalLM(config)
    block = model.model.layers[1]
    assert model.lm_head.weight.std().item() == pytest.approx(0.03, rel=0.05)
    assert block.attention.q_proj.weight.std().item() == pytest.approx(0.03, rel=0.05)
    assert block.attention.o_proj.weight.std().item() == pytest.approx(0.03 / 6**0.5, rel=0.05)
    up = block.mlp.up_proj
    assert isinstance(up, LowRankLinear)
    assert (up.u.weight @ up.v.weight).std().item() == pytest.approx(0.03, rel=0.05)
    down = block.mlp.down_proj
    assert (down.u.weight @ down.v.weight).std().item() == pytest.approx(0.03 / 6**0.5, rel=0.05)


@pytest.mark.parametrize("head", HEADS)
def test_missing_weights_are_initialised_and_present_ones_kept(head, build, tiny_config, tmp_path):
    """A checkpoint that lost all but one tensor: the rest comes as from the constructor, never as raw memory."""
    config = config_for(head, tiny_config, rank=4, projection_sharing="none", causal=True)
    build(head, config, dtype=torch.float32).save_pretrained(tmp_path)
    name = "layers.0.attention.projection.key" if head is LinformerModel else "model.layers.0.attention.projection.key"
    kept = load_file(tmp_path / "model.safetensors")[name]
    save_file({name: kept}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = head.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_parameter(name), kept)
    for parameter_name, parameter in loaded.named_parameters():
        assert parameter.isfinite().all()
        if parameter_name == name:
            continue
        if "norm" in parameter_name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        elif "projection." in parameter_name:
            assert (parameter - pooling_weight(8, 2, torch.float32).repeat(4, 1)).abs().max() < 1e-7
        else:
            assert 0 < parameter.std() < 0.3
    assert not list(loaded.buffers())  # nothing that loading through the meta device could lose


def test_context_extension_keeps_the_slots_per_block(build, tiny_config, tmp_path):
    config = tiny_config(position_embedding="rotary", projection="convolution")
    model = build(LinformerForCausalLM, config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    longer = LinformerForCausalLM.from_pretrained(tmp_path, seq_length=128, k=32).eval()
    ids = torch.randint(0, 50, (1, 60))
    assert torch.equal(longer(ids[:, :32]).logits, model(ids[:, :32]).logits)
    assert not torch.equal(longer(ids).logits[:, -1], model(ids).logits[:, -1])  # it sees further back
    with pytest.raises(ValueError, match="needs k=32"):
        LinformerForCausalLM.from_pretrained(tmp_path, seq_length=128, k=16)


@pytest.mark.parametrize("tied", [True, False])
def test_resize_token_embeddings(tied, build, tiny_config, tmp_path):
    model = build(LinformerForCausalLM, tiny_config(tie_word_embeddings=tied), dtype=torch.float32)
    ids = torch.randint(0, 50, (2, 21))
    before = model(ids).logits
    model.resize_token_embeddings(57)
    assert model.config.vocab_size == 57
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    after = model(torch.where(ids == 3, 56, ids)).logits
    assert after.shape == (2, 21, 57)
    assert (model(ids).logits[..., :50] - before).abs().max() < 1e-5
    model.save_pretrained(tmp_path)
    assert torch.equal(LinformerForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("head", HEADS[1:])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(head, use_reentrant, build, tiny_config):
    model = build(head, config_for(head, tiny_config, projection_sharing="layerwise")).train()
    ids = torch.randint(0, 50, (2, 21))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = torch.randint(0, 2, (2,)) if head is LinformerForSequenceClassification else ids % model.config.num_labels
    gradients = []
    for on in (False, True):
        if on:
            enable = getattr(model, f"{CHECKPOINTING}_enable")
            enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():  # what all layers share is summed in another order
        assert (gradients[1][name] - expected).abs().max() < 1e-15 * max(1, expected.abs().max().item()), name


@pytest.mark.parametrize("head", [LinformerForCausalLM, LinformerForMaskedLM, LinformerForTokenClassification])
def test_num_items_in_batch_is_honoured(head, build, tiny_config):
    model = build(head, config_for(head, tiny_config))
    ids = torch.randint(0, 50, (4, 21))
    labels = ids % model.config.num_labels if head is LinformerForTokenClassification else ids
    whole = model(ids, labels=labels).loss
    count = labels[:, 1:].numel() if head is LinformerForCausalLM else labels.numel()
    parts = sum(model(ids[rows], labels=labels[rows], num_items_in_batch=count).loss for rows in ([0], [1, 2, 3]))
    assert abs(whole - parts) < 1e-6  # the loss itself is formed in float32


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("regression", torch.arange(12.0).view(4, 3).double()),
        ("single_label_classification", torch.tensor([0, 2, 1, 1])),
        ("multi_label_classification", torch.tensor([[0.0, 1.0, 1.0]] * 4).double()),
    ],
)
def test_num_items_in_batch_is_honoured_by_every_problem_type(problem_type, labels, build, tiny_config):
    model = build(LinformerForSequenceClassification, tiny_config(num_labels=3, problem_type=problem_type))
    ids = torch.randint(0, 50, (4, 12))
    parts = sum(
        model(ids[rows], labels=labels[rows], num_items_in_batch=labels.numel()).loss for rows in ([0], [1, 2, 3])
    )
    assert abs(model(ids, labels=labels).loss - parts) < 1e-6


def test_label_smoothing_shifts_the_labels(tiny_config, tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    model = LinformerForCausalLM(tiny_config())
    batch = {
        name: torch.stack([row[name] for row in Rows(4).rows]) for name in ("input_ids", "attention_mask", "labels")
    }
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
    loss = trainer.compute_loss(model, dict(batch))
    logits = model(**batch).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.1
    )
    assert abs(loss - expected) < 1e-5


def test_shift_labels_are_honoured(build, tiny_config):
    model = build(LinformerForCausalLM, tiny_config())
    ids = torch.randint(0, 50, (2, 21))
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    assert abs(model(ids, labels=ids).loss - model(ids, labels=ids, shift_labels=shifted).loss) < 1e-6
    other = torch.randint(0, 50, (2, 21))
    assert abs(model(ids, labels=ids).loss - model(ids, labels=ids, shift_labels=other).loss) > 1e-3


def test_logits_to_keep(build, tiny_config):
    model = build(LinformerForCausalLM, tiny_config())
    ids = torch.randint(0, 50, (2, 21))
    logits = model(ids).logits
    assert torch.equal(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    assert torch.equal(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]])
    mask = torch.rand(2, 21) > 0.5
    assert torch.equal(model(ids, logits_to_keep=mask).logits, logits[mask])


@pytest.mark.parametrize("head", HEADS)
def test_hidden_states_and_tuples(head, build, tiny_config):
    model = build(head, config_for(head, tiny_config))
    ids = torch.randint(0, 50, (2, 21))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    output = model(ids, attention_mask=mask, output_hidden_states=True)
    assert [states.shape for states in output.hidden_states] == [(2, 21, 32)] * 3
    # In the order given, not in the order of the grid: the padded row shows what the row alone shows.
    alone = model(ids[:1, 4:], output_hidden_states=True).hidden_states
    for states, expected in zip(output.hidden_states, alone, strict=True):
        assert (states[0, 4:] - expected[0]).abs().max() < 1e-12
    as_tuple = model(ids, attention_mask=mask, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output[0])


def test_sequence_classification_pools_the_last_real_token_or_the_mean(build, tiny_config):
    ids = torch.zeros(3, 12, dtype=torch.long)  # pad_token_id is 0: ids must not tell what is padding
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :5], mask[1, 7:] = 0, 0
    for causal in (True, False):
        model = build(LinformerForSequenceClassification, tiny_config(causal=causal, num_labels=3))
        hidden = model.model(ids, attention_mask=mask).last_hidden_state
        if causal:
            pooled = torch.stack((hidden[0, 11], hidden[1, 6], hidden[2, 11]))
        else:
            pooled = torch.stack((hidden[0, 5:].mean(0), hidden[1, :7].mean(0), hidden[2].mean(0)))
        logits = model(ids, attention_mask=mask).logits
        assert (logits - pooled @ model.score.weight.T).abs().max() < 1e-12
        unmasked = model(ids).logits
        assert (unmasked[2] - logits[2]).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("regression", torch.rand(4, 3).double()),
        ("single_label_classification", torch.tensor([0, 2, 1, 1])),
        ("multi_label_classification", torch.randint(0, 2, (4, 3)).double()),
    ],
)
def test_problem_types(problem_type, labels, build, tiny_config):
    model = build(LinformerForSequenceClassification, tiny_config(num_labels=3, problem_type=problem_type))
    output = model(torch.randint(0, 50, (4, 12)), labels=labels)
    expected = {
        "regression": torch.nn.functional.mse_loss,
        "single_label_classification": torch.nn.functional.cross_entropy,
        "multi_label_classification": torch.nn.functional.binary_cross_entropy_with_logits,
    }[problem_type](output.logits, labels)
    assert abs(output.loss - expected) < 1e-6


class Rows(torch.utils.data.Dataset):
    """Rows of different lengths: accumulation is right only if every token counts the same."""

    def __init__(self, count=16):
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for length in torch.randint(4, 28, (count,), generator=generator).tolist():
            ids, mask = torch.zeros(28, dtype=torch.long), torch.zeros(28, dtype=torch.long)
            ids[:length] = torch.randint(1, 50, (length,), generator=generator)
            mask[:length] = 1
            labels = ids.masked_fill(mask == 0, -100)
            self.rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_trainer_accumulation_and_checkpointing_change_nothing(tiny_config, tmp_path):
    losses, weights = [], []
    for batch, steps, checkpointing in ((8, 1, False), (2, 4, False), (1, 8, True)):
        torch.manual_seed(2)
        model = LinformerForCausalLM(tiny_config())
        arguments = TrainingArguments(
            output_dir=str(tmp_path / f"{batch}"),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            **{CHECKPOINTING: checkpointing},
            max_steps=4,
            learning_rate=1e-2,
            logging_steps=1,
            optim="sgd",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=3,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        losses.append([(entry["loss"], entry["grad_norm"]) for entry in history])
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for other in (1, 2):
        assert torch.allclose(torch.tensor(losses[other]), torch.tensor(losses[0]), atol=2e-4)
        assert (weights[other] - weights[0]).abs().max() < 1e-6


def test_training_twice_with_one_seed_gives_the_same_losses(tiny_config, tmp_path):
    runs = []
    for _ in range(2):
        torch.manual_seed(2)
        model = LinformerForCausalLM(tiny_config(dropout=0.1))
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=5, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
            disable_tqdm=True, seed=3, per_device_train_batch_size=4, learning_rate=1e-2,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(runs[0]) == 5
    assert runs[0] == runs[1]
    assert runs[0][-1] < runs[0][0]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("projection", ["learned", "convolution", "pooling"])
def test_no_branch_looks_at_a_value(causal, projection, tiny_config):
    """On the meta device every look at a value raises: what passes here cannot make an accelerator wait."""
    config = tiny_config(causal=causal, projection=projection, position_embedding="rotary")
    with torch.device("meta"):
        model = LinformerModel(config)
        ids, mask = torch.zeros(2, 21, dtype=torch.long), torch.ones(2, 21, dtype=torch.long)
        assert model(ids).last_hidden_state.shape == (2, 21, 32)
        output = model(ids, attention_mask=mask, position_ids=ids, use_cache=True)
        output.last_hidden_state.sum().backward()
        if causal:
            model(ids, document_ids=ids, attention_mask=mask)
            more = model(ids[:, :4], attention_mask=mask, past_key_values=output.past_key_values)
            model(ids[:, :1], attention_mask=mask, past_key_values=more.past_key_values)


def test_position_ids_are_checked_against_the_mask(build, tiny_config):
    model = build(LinformerForCausalLM, tiny_config())
    ids = torch.randint(0, 50, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    usual = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 7)  # any number at padding
    model(ids, attention_mask=mask, position_ids=usual)
    with pytest.raises(ValueError, match="position_ids"):
        model(ids, attention_mask=mask, position_ids=torch.arange(9)[None])
    with pytest.raises(ValueError, match="position_ids"):
        model(ids, position_ids=torch.arange(9)[None] + 1)


def test_wrong_inputs_are_refused(build, tiny_config):
    model = build(LinformerForCausalLM, tiny_config())
    ids = torch.randint(0, 50, (2, 9))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="exactly one"):
        model()
    for shape in [(2, 1, 9, 9), (2, 8), (2, 10), (3, 9)]:  # a longer one is for what a cache holds
        with pytest.raises(ValueError, match=r"attention_mask has shape .*\[2, 9\]"):
            model(ids, attention_mask=torch.ones(shape))
    encoder = build(LinformerForMaskedLM, tiny_config(causal=False))
    with pytest.raises(ValueError, match="document_ids.*causal"):
        encoder(ids, document_ids=torch.zeros_like(ids))


def test_attention_implementation_is_chosen_as_usual(tiny_config, tmp_path):
    model = LinformerForCausalLM(tiny_config())
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path)
    assert (
        LinformerForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").config._attn_implementation
        == "eager"
    )
    with pytest.raises((ValueError, ImportError)):
        LinformerForCausalLM(LinformerConfig(**tiny_config().to_dict(), attn_implementation="flash_attention_2"))


@pytest.mark.parametrize("head", HEADS)
def test_auto_model_takes_every_head(head, tiny_config, tmp_path):
    head(config_for(head, tiny_config)).save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is LinformerModel


def test_autocast_trains(tiny_config):
    model = LinformerForCausalLM(tiny_config(position_embedding="rotary", qk_norm=True))
    ids = torch.randint(0, 50, (2, 21))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(ids, attention_mask=mask, labels=ids).loss
    mixed.backward()
    assert abs(mixed - model(ids, attention_mask=mask, labels=ids).loss) < 0.02
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_loss_makes_no_cache_unless_asked(build, tiny_config):
    model = build(LinformerForCausalLM, tiny_config())
    ids = torch.randint(0, 50, (2, 20))
    plain, cached = model(ids, labels=ids), model(ids, labels=ids, use_cache=True)
    assert plain.past_key_values is None
    assert cached.past_key_values.get_seq_length() == model(ids).past_key_values.get_seq_length() == 20
    assert (plain.loss - cached.loss).abs() < ORACLE
