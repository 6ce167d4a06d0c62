"""Train a Linformer on texts with transformers.Trainer: `python examples/train_with_trainer.py [FILE.txt ...]`."""

import sys
from pathlib import Path

from transformers import Trainer, TrainingArguments, set_seed

from linpass import LinformerConfig, LinformerForCausalLM
from linpass.training.callbacks import LossLoggerCallback, SampleTextCallback, ThroughputCallback
from linpass.training.collators import DynamicChunkingCollator
from linpass.training.tokenization import train_tokenizer

files = sys.argv[1:] or [Path(__file__).parent.parent / "README.md"]
documents = [part for file in files for part in Path(file).read_text(encoding="utf-8").split("\n## ")]
tokenizer = train_tokenizer(documents, vocab_size=512)
set_seed(0)
sizes = {"vocab_size": 512, "embed_dim": 64, "depth": 2, "seq_length": 128, "k": 32, "block_size": 16, "rank": None}
ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
collator = DynamicChunkingCollator(tokenizer, seq_length=128, deletion_probability=0.02)
trainer = Trainer(
    model=LinformerForCausalLM(LinformerConfig(**sizes, **ids, window_size=32)),
    args=TrainingArguments("trainer_output", num_train_epochs=15, per_device_train_batch_size=2, learning_rate=3e-3),
    train_dataset=[{"input_ids": ids} for ids in tokenizer(documents)["input_ids"]],
    data_collator=collator,  # cuts each document anew in each epoch; as a callback it learns which
    processing_class=tokenizer,
    callbacks=[
        collator,
        ThroughputCallback(),
        LossLoggerCallback("trainer_output/log.jsonl", "trainer_output/loss.png"),
        SampleTextCallback(tokenizer, ["The model"], interval=30, max_new_tokens=30),
    ],
)
trainer.train()
