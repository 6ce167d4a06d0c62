"""Sequence classification by an encoder, a pooling, a feature map and one linear layer, as a transformers model.

The values of the linear layer come from a solver, not from here; everything that inference needs is here. Saved folders
carry this file, so that they load with ``trust_remote_code=True`` where linpass is not installed.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from .configuration_closed_form import ClosedFormConfig
from .feature_maps_closed_form import KernelFeatures, RandomFeatures
from .modeling_linformer import LinformerModel


class ClosedFormForSequenceClassification(PreTrainedModel):
    """``encoder -> pooling -> feature_map -> classifier``; the classifier is an ``nn.Linear``.

    Rows are turned so that each starts at its first real token before the encoder sees them, and pooled over real
    tokens: padding, on whichever side, changes no logit. From the pooled vector on everything is computed in the dtype
    of the classifier, also under autocast; half precision keeps the head in float32 when a folder is loaded.
    """

    config_class = ClosedFormConfig
    config: ClosedFormConfig
    base_model_prefix = "encoder"
    # The encoder says what it cannot do when it is built.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = False
    # Kernel values and sums over landmarks are worth nothing in half precision.
    _keep_in_fp32_modules_strict = ["classifier", "feature_map"]
    # Encoders taken out of some classifiers have none, and what it gives is not used here.
    _keys_to_ignore_on_load_missing = [r"^encoder\.pooler\."]

    def __init__(self, config: ClosedFormConfig, encoder: PreTrainedModel | None = None):
        """``encoder``: one that exists; see :meth:`from_encoder`."""
        super().__init__(config)
        self.num_labels: int = config.num_labels
        if encoder is None:
            encoder = _build_encoder(config)
        else:
            for module in encoder.modules():
                module._is_hf_initialized = True  # post_init must not draw its weights again
        self.encoder = encoder
        config.encoder_config = encoder.config  # one object: a change of either is a change of both
        self.supports_gradient_checkpointing = encoder.supports_gradient_checkpointing
        self.feature_map = _build_feature_map(config)
        self.classifier = nn.Linear(config.head_width, config.num_labels)
        self.post_init()

    @classmethod
    def from_encoder(cls, encoder: PreTrainedModel, **fields: Any) -> "ClosedFormForSequenceClassification":
        """A classifier around an encoder, whose tensors and configuration are used as they are.

        Args:
            encoder: what ``AutoModel`` loads, or a model with a head, whose base is taken.
            fields: of :class:`ClosedFormConfig`: num_labels, pooling, normalize, feature_map, ...
        Raises:
            ValueError: a class that ``AutoModel`` would not build from the encoder's configuration, or a broken field.
        """
        encoder = encoder.base_model
        config = cls.config_class(encoder_config=encoder.config, **fields)
        with torch.device("meta"):
            expected = type(_build_encoder(config)).__name__
        if type(encoder).__name__ != expected:
            raise ValueError(
                f"encoder is a {type(encoder).__name__}, but a saved folder would be opened as {expected}, which is "
                f"what AutoModel makes of model_type {encoder.config.model_type!r}"
            )
        reference = next((p for p in encoder.parameters() if p.is_floating_point()), torch.empty(0))
        model = cls(config, encoder)
        for head in (model.feature_map, model.classifier):
            head.to(reference.device, torch.promote_types(reference.dtype, torch.float32))
        return model.train(encoder.training)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (RandomFeatures, KernelFeatures)):
            for name, value in module.initial_buffers().items():
                init.copy_(getattr(module, name), value)

    def save_pretrained(self, save_directory, *args: Any, **kwargs: Any):
        """Save weights, configuration and code; AutoModelForSequenceClassification opens the folder."""
        self.config.validate_architecture()  # before anything is written
        return super().save_pretrained(save_directory, *args, **kwargs)

    def embed(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Pooled rows [B, D], normalised where the configuration says so: what the feature map gets.

        Args:
            attention_mask: [B, T], 0 is padding; None: every token is real, whatever its id.
            kwargs: go to the encoder.
        Raises:
            ValueError: a mask of another shape than the tokens.
        """
        tokens = (input_ids, token_type_ids, position_ids, inputs_embeds)
        return self._encode(*tokens, attention_mask, **kwargs)[0]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """See :meth:`embed`; ``labels`` [B], or [B, num_labels] for regression and multi-label.

        Hidden states and attentions, where asked for, are of rows that start at their first real token.
        """
        tokens = (input_ids, token_type_ids, position_ids, inputs_embeds)
        pooled, outputs = self._encode(*tokens, attention_mask, **kwargs)
        with _own_precision(pooled):
            logits = self.classifier(self.feature_map(pooled))
        loss = None if labels is None else self._loss(logits, labels, num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions") or None,
        )

    def _encode(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ):
        """Pooled rows and the outputs of the encoder."""
        per_token = {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        per_token = {name: value for name, value in per_token.items() if value is not None}
        if ("input_ids" in per_token) == ("inputs_embeds" in per_token):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        shape = per_token["input_ids" if "input_ids" in per_token else "inputs_embeds"].shape[:2]
        if attention_mask is not None:
            if attention_mask.shape != shape:
                raise ValueError(
                    f"attention_mask has shape {list(attention_mask.shape)}; it needs {list(shape)}, one per token"
                )
            order = _from_first_real_token(attention_mask)
            attention_mask = attention_mask.gather(1, order)
            per_token = {name: _reordered(value, order) for name, value in per_token.items()}
        if "use_cache" in inspect.signature(self.encoder.forward).parameters:
            kwargs = {**kwargs, "use_cache": False}
        kwargs = {**kwargs, "return_dict": True}
        outputs = self.encoder(**per_token, attention_mask=attention_mask, **kwargs)
        hidden_states = outputs.last_hidden_state
        with _own_precision(hidden_states):
            hidden_states = hidden_states.to(self.classifier.weight.dtype)
            pooled = _pool(hidden_states, attention_mask, self.config.pooling)
            return F.normalize(pooled, dim=-1) if self.config.normalize else pooled, outputs

    def _loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        loss = self.loss_function(
            logits=logits,
            labels=labels,
            pooled_logits=logits,
            config=self.config,
            num_items_in_batch=num_items_in_batch,
        )
        if num_items_in_batch is not None and self.config.problem_type != "single_label_classification":
            # transformers' other two losses are means whatever it says
            return loss * (labels.numel() / num_items_in_batch)
        return loss


def _build_encoder(config: ClosedFormConfig) -> PreTrainedModel:
    """Without weights; a Linformer also where Auto classes do not know it."""
    if config.encoder_config.model_type == LinformerModel.config_class.model_type:
        return LinformerModel._from_config(config.encoder_config)
    return AutoModel.from_config(config.encoder_config)


def _build_feature_map(config: ClosedFormConfig) -> nn.Module:
    if config.feature_map is None:
        return nn.Identity()
    width, seed = config.pooled_width, config.feature_seed
    if config.feature_map in ("relu", "rff"):
        return RandomFeatures(config.feature_map, width, config.num_features, config.bandwidth, seed)
    parameters = {name: getattr(config, name) for name in ("degree", "scale", "offset", "order", "depth")}
    return KernelFeatures(
        config.kernel,
        width,
        config.num_features,
        whiten=config.feature_map == "nystrom",
        bandwidth=config.bandwidth,
        seed=seed,
        **parameters,
    )


def _from_first_real_token(attention_mask: Tensor) -> Tensor:
    """[B, T]: the columns of each row, starting at its first real token and going round."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    first = (attention_mask != 0).int().argmax(1, keepdim=True)
    return (columns + first) % attention_mask.shape[1]


def _reordered(per_token: Tensor, order: Tensor) -> Tensor:
    """[B, T] or [B, T, D] (or one row for all of them) with its columns in another order."""
    per_token = per_token.expand(len(order), *per_token.shape[1:])
    index = order if per_token.dim() == 2 else order[..., None].expand(-1, -1, per_token.shape[-1])
    return per_token.gather(1, index)


def _pool(hidden_states: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """[B, T, D] -> [B, D], of rows that start at their first real token."""
    if pooling == "first":
        return hidden_states[:, 0]
    if attention_mask is None:
        return hidden_states[:, -1] if pooling == "last" else hidden_states.mean(1)
    keep = attention_mask != 0
    if pooling == "last":
        last = (keep * torch.arange(keep.shape[1], device=keep.device)).argmax(1)
        return hidden_states[torch.arange(len(keep), device=keep.device), last]
    total = hidden_states.masked_fill(~keep[..., None], 0).sum(1)
    return total / keep.sum(1, keepdim=True).clamp(min=1).to(total.dtype)


def _own_precision(like: Tensor):
    """Autocast off: it would round products to half precision that the solver computed exactly."""
    return torch.autocast("cpu" if like.device.type == "meta" else like.device.type, enabled=False)


ClosedFormConfig.register_for_auto_class()
ClosedFormForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
