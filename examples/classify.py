"""Fine-tune a Linformer encoder to tell two kinds of sentences apart, on sentences that this script makes."""

import itertools
import random

import torch
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from linpass import LinformerConfig, LinformerForSequenceClassification
from linpass.training.tokenization import train_tokenizer

SUBJECTS = ("The film", "This book", "Her last song", "The whole meal", "Our journey")
OPINIONS = (("was dull", "bored us", "failed badly", "was a waste"), ("was superb", "moved us", "shone", "was a joy"))
ENDINGS = ("from the start", "as everyone said", "", "to my surprise", "once again")

sentences = [
    (f"{subject} {opinion} {ending}".strip() + ".", label)
    for label, opinions in enumerate(OPINIONS)
    for subject, opinion, ending in itertools.product(SUBJECTS, opinions, ENDINGS)
]
random.Random(0).shuffle(sentences)
tokenizer = train_tokenizer([sentence for sentence, _label in sentences[:160]], vocab_size=400)
rows = [{**tokenizer(sentence), "labels": label} for sentence, label in sentences]
train, test = rows[:160], rows[160:]

set_seed(0)
config = LinformerConfig(
    vocab_size=400,
    embed_dim=64,
    depth=2,
    seq_length=64,
    k=16,
    causal=False,
    rank=None,
    num_labels=2,
    pad_token_id=tokenizer.pad_token_id,
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
)
trainer = Trainer(
    model=LinformerForSequenceClassification(config),
    args=TrainingArguments(
        output_dir="trainer_output",
        num_train_epochs=6,
        learning_rate=2e-3,
        per_device_train_batch_size=16,
        logging_steps=20,
        save_strategy="no",
    ),
    train_dataset=train,
    data_collator=DataCollatorWithPadding(tokenizer),
    processing_class=tokenizer,
)
trainer.train()
predictions = trainer.predict(test)
accuracy = (predictions.predictions.argmax(-1) == predictions.label_ids).mean()
print(f"accuracy on {len(test)} sentences that were not trained on: {accuracy:.2f}")

model = trainer.model.eval()
with torch.no_grad():
    logits = model(**tokenizer("The whole journey was superb.", return_tensors="pt").to(model.device)).logits
print(f"'The whole journey was superb.' is positive with probability {logits.softmax(-1)[0, 1]:.2f}")
