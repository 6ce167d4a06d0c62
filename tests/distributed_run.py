"""What several processes do in test_training_distributed.py."""

import json
import os
from pathlib import Path

import numpy as np
from checkpoint_run import allow_fsdp_on_cpu
from transformers import set_seed

from linpass import LinformerConfig, LinformerForCausalLM
from linpass.cli import main
from linpass.training.collators import DynamicChunkingCollator
from linpass.training.parser import TrainingArguments
from linpass.training.sampling import ChunkBorders, ChunkDataset
from linpass.training.tokenization import train_tokenizer
from linpass.training.trainer import LanguageModelTrainer

SEQ, BLOCK, EPOCHS = 32, 8, 2
LENGTHS = (70, 9, 33, 100, 2, 48, 61, 1, 20, 130)  # of documents: 20 chunks, some from places drawn for each epoch
BORDERS = ChunkBorders(SEQ, seed=4)


def train_by_command(flags, sharded=False):
    """`linpass train`; sharded: --fsdp does on CPUs what it does on GPUs."""
    if sharded:
        allow_fsdp_on_cpu()
    assert main(["train", *flags]) == 0


def numbered_documents():
    """No token stands twice in them, so that a row tells which tokens were seen; 0 is padding."""
    ends = np.cumsum(LENGTHS)
    return [np.arange(end - length + 1, end + 1) for length, end in zip(LENGTHS, ends, strict=True)]


class RecordingTrainer(LanguageModelTrainer):
    """Keeps (epoch, optimizer step, tokens of each row) of every batch that this process trains on."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        tokens = [row[real].tolist() for row, real in rows]
        self.seen.append((int(self.state.epoch + 1e-6), self.state.global_step, tokens))
        return super().compute_loss(model, inputs, *args, **kwargs)


def train_and_record(folder, rows, accumulation, packing):
    """Two epochs on the numbered documents, then an evaluation; what was seen and logged goes to a file per process."""
    set_seed(0)
    sizes = {"embed_dim": 16, "depth": 1, "heads": 2, "seq_length": SEQ, "k": 8, "block_size": BLOCK, "window_size": 8}
    config = LinformerConfig(vocab_size=sum(LENGTHS) + 1, rank=None, dropout=0.0, pad_token_id=0, **sizes)
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    documents = numbered_documents()
    tokenizer = train_tokenizer(["The text of a small test."], 300)
    trainer = RecordingTrainer(
        model=LinformerForCausalLM(config),
        args=arguments,
        train_dataset=ChunkDataset(documents, BORDERS),
        eval_dataset=ChunkDataset(documents, BORDERS, random=False),
        data_collator=DynamicChunkingCollator(tokenizer, SEQ, packing=packing, block_size=BLOCK),
        pack_block=BLOCK if packing else None,
    )
    trainer.seen = []
    trainer.train()
    evaluation = trainer.evaluate()
    log = [[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "grad_norm" in entry]
    result = {"seen": trainer.seen, "log": log, "evaluation": [evaluation["eval_loss"], evaluation["eval_tokens"]]}
    name = f"{'packed' if packing else 'plain'}.{os.environ.get('RANK', 0)}"
    Path(folder, name).write_text(json.dumps(result), encoding="utf-8")


def record_both(folder, rows, accumulation):
    for packing in (False, True):
        train_and_record(folder, rows, accumulation, packing)
