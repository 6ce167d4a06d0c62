"""LoRA of the package peft: adapters on the layers by their names, trained, saved, opened by Auto class, and merged."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, TaskType, get_peft_model
from tolerances import VALUE, relative_error
from transformers import Trainer, TrainingArguments
from versions import CHECKPOINTING

from linpass import LinformerForCausalLM


# What peft itself asks transformers for.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_is_trained_saved_opened_and_merged(checkpointing, tiny_config, tmp_path):
    base = LinformerForCausalLM(tiny_config(position_embedding="rotary"))
    base.save_pretrained(tmp_path / "base")
    base = LinformerForCausalLM.from_pretrained(tmp_path / "base")
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    targets = ["q_proj", "v_proj", "up_proj"]
    model = get_peft_model(base, LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=targets))
    ids = torch.randint(1, 50, (16, 24))
    with torch.no_grad():
        before = model(input_ids=ids, labels=ids).loss
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=30,
        learning_rate=2e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{CHECKPOINTING: checkpointing},
    )
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
    model.eval()
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss < before - 0.1
    kept = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): w for name, w in model.state_dict().items()
    }
    assert all(torch.equal(kept[name], weight) for name, weight in weights.items())

    model.save_pretrained(tmp_path / "adapter")
    opened = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert torch.equal(opened(input_ids=ids).logits, logits)
        prompt = {"input_ids": ids[:2, :5], "attention_mask": torch.ones(2, 5, dtype=torch.long)}
        written = opened.generate(**prompt, max_new_tokens=8, do_sample=False)
        merged = opened.merge_and_unload()
        assert type(merged) is LinformerForCausalLM
        assert relative_error(merged(input_ids=ids).logits, logits) < VALUE[torch.float32]
        assert torch.equal(merged.generate(**prompt, max_new_tokens=8, do_sample=False), written)
