"""What has another name in another version of transformers."""

from transformers import TrainingArguments

# The field is renamed in transformers 5.2x; both names are in use.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
