"""Train a Linformer on your own text with transformers.Trainer: `python examples/train_with_trainer.py [FILE.txt ...]`.

Without a file it reads the README.
"""

import sys
from pathlib import Path

from transformers import Trainer, TrainingArguments, set_seed

from linpass import LinformerConfig, LinformerForCausalLM
from linpass.training.data import ChunkDataset, chunk_documents, train_tokenizer

files = sys.argv[1:] or [Path(__file__).parent.parent / "README.md"]
documents = [Path(file).read_text(encoding="utf-8") for file in files]
tokenizer = train_tokenizer(documents, vocab_size=512)

set_seed(0)
config = LinformerConfig(
    vocab_size=512,
    embed_dim=64,
    depth=2,
    seq_length=128,
    k=32,
    block_size=16,
    window_size=32,
    position_embedding="rotary",
    projection="convolution",
    rank=None,
    dropout=0.0,
    pad_token_id=tokenizer.pad_token_id,
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
)
trainer = Trainer(
    model=LinformerForCausalLM(config),
    args=TrainingArguments(
        output_dir="trainer_output",
        max_steps=60,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        logging_steps=20,
        save_strategy="no",
    ),
    train_dataset=ChunkDataset(chunk_documents(documents, tokenizer, config.seq_length, "training")),
    processing_class=tokenizer,
)
trainer.train()

model = trainer.model.eval()
prompt = tokenizer("The model", return_tensors="pt").to(model.device)
output = model.generate(**prompt, max_new_tokens=40, do_sample=True)
print(tokenizer.decode(output[0]))
