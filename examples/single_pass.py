"""Fit a classifier's head in one pass with SinglePassTrainer; then add rows, forget some, and solve again.

Runs as it is: the rows are passages of documentation, the encoder is trained on the spot by ``sources``. With your own:
``AutoModelForSequenceClassification.from_pretrained(NAME, num_labels=...)`` and any data set that a Trainer takes.
"""

from transformers import AutoModelForSequenceClassification

from linpass.singlepass import SinglePassArguments, SinglePassTrainer
from linpass.singlepass.command_arguments import SourceArguments
from linpass.singlepass.sources import encode, find_encoder, load_tokenizer, read_rows

sources = SourceArguments()
train, test = read_rows(sources, seed=0)
name = find_encoder(sources, train)
tokenizer = load_tokenizer(name)
model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(train.classes))


def rows(text):
    ids = encode(text.texts, tokenizer, 128)
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, text.labels, strict=True)]


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


trainer = SinglePassTrainer(
    model=model,
    args=SinglePassArguments("trainer_output/single_pass", save_strategy="no", report_to=[], estimator="ridge"),
    train_dataset=rows(train)[:3000],
    eval_dataset=rows(test),
    processing_class=tokenizer,
    compute_metrics=accuracy,
)
trainer.train()
print("3,000 rows:", trainer.evaluate()["eval_accuracy"])
trainer.update(rows(train)[3000:])
print("and the others:", trainer.evaluate()["eval_accuracy"])
trainer.forget(range(500))
print("without the first 500:", trainer.evaluate()["eval_accuracy"])
trainer.refit(regularization=1.0)
print("another regularization, from the same sums:", trainer.evaluate()["eval_accuracy"])
trainer.save_model("trainer_output/single_pass_model")
AutoModelForSequenceClassification.from_pretrained("trainer_output/single_pass_model")  # an ordinary checkpoint
