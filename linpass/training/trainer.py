"""The Trainer of ``linpass train``: chunks of documents in, a loss without logits, an evaluation that counts tokens."""

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, StateDictType
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import speed_metrics

from linpass.training.checkpoints import CrashSafeTrainer
from linpass.training.collators import IGNORED
from linpass.training.losses import use_linear_cross_entropy
from linpass.training.sampling import ChunkDataset, ChunkSampler


class LanguageModelTrainer(CrashSafeTrainer):
    """A :class:`CrashSafeTrainer` for language models on the chunks of documents.

    - Rows come from a :class:`ChunkSampler`: with several processes every chunk is seen exactly once an epoch, the last
      step is filled with rows of padding.
    - The loss is computed without the logits (:func:`use_linear_cross_entropy`), label smoothing included.
    - ``evaluate`` gives the mean over all validation tokens, not over batches of different length, and their number.
    - A causal model is not given the attention mask: padding stands behind every real token, which cannot see it, and
      gathering the real ones takes time. Nothing that is scored changes.
    - ``data_wait_share`` in the log is the share of the time that the training loop waited for a batch: an upper bound
      of the device's idle time for want of data, because the device works on while the loop waits.

    Args:
        pack_block: chunks share rows, each starting at a multiple of this; None: one chunk a row.
        corpus: [D], number of each training document's corpus.
        mixing_weights: [corpora], share of each in the tokens of an epoch; None: as it is.
    """

    model: PreTrainedModel
    model_wrapped: nn.Module
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        *arguments: Any,
        pack_block: int | None = None,
        corpus: NDArray[np.integer] | None = None,
        mixing_weights: Sequence[float] | None = None,
        **keywords: Any,
    ) -> None:
        self.pack_block, self.corpus, self.mixing_weights = pack_block, corpus, mixing_weights
        self.train_sampler: ChunkSampler | None = None
        super().__init__(*arguments, **keywords)
        self.model_is_causal = self.model.config.__class__.__name__ != "LinformerConfig" or self.model.config.causal
        use_linear_cross_entropy(self.model, label_smoothing=self.args.label_smoothing_factor)
        self.label_smoother = None  # the Trainer's own would ask for logits
        self.add_callback(_SamplerEpoch(self))
        self._waited, self._since = 0.0, time.perf_counter()

    def _get_train_sampler(self, train_dataset: Any = None) -> ChunkSampler | None:
        if self.train_sampler is not None:  # planning packed epochs takes time
            return self.train_sampler
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        arguments = self.args
        rows = self._train_batch_size * arguments.world_size
        options = {"pack_block": self.pack_block, "corpus": self.corpus, "weights": self.mixing_weights}
        seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
        epochs = math.ceil(arguments.num_train_epochs)
        if arguments.max_steps > 0:
            one_epoch = len(ChunkSampler(dataset, rows, seed, **options))
            epochs = math.ceil(arguments.max_steps * arguments.gradient_accumulation_steps * rows / one_epoch)
        self.train_sampler = ChunkSampler(dataset, rows, seed, epochs=epochs, **options)
        return self.train_sampler

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The validation rows in order, shared out over the processes, filled up with rows of padding."""
        dataset: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        rows = self.args.eval_batch_size * self.args.world_size
        loader: DataLoader = DataLoader(
            dataset,
            batch_size=self.args.eval_batch_size,
            sampler=ChunkSampler(dataset, rows, shuffle=False, pack_block=self.pack_block),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # its own: an evaluation must not move the generator that dropout draws from
        )
        return self.accelerator.prepare(loader)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss in nats over every validation token that is predicted, their number, and the speed."""
        start = time.time()
        loader = self.get_eval_dataloader(eval_dataset)
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in loader:
            batch = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                # For one item instead of all: the loss is a sum, of each process's own tokens.
                loss = model(**self._model_inputs(batch), num_items_in_batch=torch.tensor(1.0))["loss"]
            totals += torch.stack((loss.double(), self._scored(batch["labels"]).double()))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        sums: Any = self.accelerator.reduce(totals, reduction="sum")
        total, tokens = sums.tolist()
        model.train(was_training)
        loss = total / max(tokens, 1)
        metrics: dict[str, float] = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700.0)),
            f"{metric_key_prefix}_tokens": int(tokens),
        }
        samples = len(eval_dataset if eval_dataset is not None else self.eval_dataset)  # type: ignore[arg-type]
        metrics |= speed_metrics(metric_key_prefix, start, samples)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._waited, self._since = 0.0, time.perf_counter()
        return metrics

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        return super().compute_loss(model, self._model_inputs(inputs), *arguments, **keywords)

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if not self.model_is_causal:
            return inputs
        return {name: value for name, value in inputs.items() if name != "attention_mask"}

    def _scored(self, labels: Tensor) -> Tensor:
        return ((labels[..., 1:] if self.model_is_causal else labels) != IGNORED).sum()

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> tuple[list, Any]:
        start = time.perf_counter()
        batches, items = super().get_batch_samples(*arguments, **keywords)
        self._waited += time.perf_counter() - start
        # Rows of one token predict none; a step of nothing else would divide 0 by 0.
        return batches, items.clamp(min=1) if isinstance(items, Tensor) else items

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            logs["data_wait_share"] = round(self._waited / max(now - self._since, 1e-9), 6)
            self._waited, self._since = 0.0, now
        super().log(logs, *arguments, **keywords)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what ``from_pretrained`` loads; with FSDP the whole weights, also where checkpoints hold shards."""
        if _internal_call:  # for a checkpoint
            super().save_model(output_dir, _internal_call)
        elif not self.is_fsdp_enabled:
            super().save_model(output_dir)
        else:
            plugin: Any = self.accelerator.state.fsdp_plugin
            kind, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
            try:
                super().save_model(output_dir)
            finally:
                plugin.state_dict_type = kind

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model: Any = self.model
        kind = type(model)
        if state_dict is not None:  # gathered from all processes, where tied weights have become copies
            state_dict = {key: value for key, value in state_dict.items() if key not in model.all_tied_weights_keys}
        if isinstance(model, FSDPModule):  # a class that torch made; the folder would get torch's code and its name
            model.__class__ = kind.__bases__[-1]
        try:
            super()._save(output_dir, state_dict)
        finally:
            model.__class__ = kind

    def describe_batch(self, epoch: int, batch: int) -> str:
        if self.train_sampler is None or not isinstance(self.train_dataset, ChunkDataset):
            return ""
        size = self._train_batch_size
        start = (batch * self.args.world_size + self.args.process_index) * size
        numbers = [number for row in self.train_sampler.rows(epoch)[start : start + size] for number in row]
        _epoch, documents, chunks = self.train_dataset.locate(numbers)
        places = [f"{document} (chunk {chunk})" for document, chunk in zip(documents, chunks, strict=True)]
        return f"training documents {', '.join(places)}"


class _SamplerEpoch(TrainerCallback):
    """Tells the sampler its epoch: accelerate's wrappers do not, with several processes."""

    def __init__(self, trainer: LanguageModelTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        if self.trainer.train_sampler is not None:
            self.trainer.train_sampler.set_epoch(int(state.epoch or 0))
