"""The head that the solution is written into: the model's own linear layer, or one of this package's."""

from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging

from linpass.errors import InputError
from linpass.modeling_closed_form import ClosedFormForSequenceClassification
from linpass.singlepass.arguments import SinglePassArguments
from linpass.singlepass.features import (
    encoder_prefix,
    find_head,
    has_head,
    is_language_model,
    is_token_classifier,
    untrained_layers,
)
from linpass.singlepass.solver import RidgeSolution

logger = logging.get_logger(__name__)


def with_head(model: Any, arguments: SinglePassArguments) -> Any:
    """The model itself when its own linear layer can hold the solution, else its encoder in a classifier of ours.

    Warns of layers before the head that were never trained.

    Raises:
        InputError: a model without a final linear layer, or one whose labels such a classifier cannot give.
    """
    if isinstance(model, ClosedFormForSequenceClassification):
        if arguments.own_head:
            raise InputError(
                "model has a closed-form head: kernel, pooling and normalize are those of its configuration"
            )
        if model.config.feature_map == "kernel":
            raise InputError("model is a kernel's sum over its own training rows: give its encoder, and the kernel")
        _warn_of_untrained(model, None)
        return model
    if has_head(model) and not arguments.own_head:
        _warn_of_untrained(model, find_head(model)[1])
        return model
    if is_language_model(model) or is_token_classifier(model):
        raise InputError(
            f"model={type(model).__name__} needs kernel='linear', normalize=False and no pooling: "
            "a head of this package classifies sequences"
        )
    _warn_of_untrained(model, None)
    return _classifier_around(model, arguments)


def _warn_of_untrained(model: Any, head: nn.Linear | None) -> None:
    layers, kind = untrained_layers(model, head), type(model).__name__
    if "encoder" in layers:
        logger.warning("%s: its encoder has never been trained; the features are random.", kind)
    elif layers:
        logger.warning(
            "%s: %s before the head %s never been trained; the features are random projections of the encoder's. "
            "Give a checkpoint that has been trained as a whole, or pooling='mean' to leave %s out.",
            kind,
            ", ".join(layers),
            "have" if len(layers) > 1 else "has",
            "them" if len(layers) > 1 else "it",
        )


def _classifier_around(model: Any, arguments: SinglePassArguments) -> ClosedFormForSequenceClassification:
    config = model.config
    fields: dict[str, Any] = {
        "pooling": arguments.pooling or default_pooling(config),
        "normalize": arguments.normalize,
        "bandwidth": arguments.bandwidth,
        "degree": arguments.degree,
        "depth": arguments.depth,
        "feature_seed": arguments.seed,
        "id2label": config.id2label,
        "label2id": config.label2id,
        "problem_type": config.problem_type,
    }
    if not arguments.streamed:  # as many landmarks as there will be rows
        fields |= {"feature_map": "kernel", "kernel": arguments.kernel, "num_features": 1}
    elif arguments.kernel != "linear":
        fields |= {"feature_map": arguments.kernel, "num_features": arguments.num_features}
    encoder = model.get_submodule(encoder_prefix(model).rstrip(".")) if has_head(model) else model
    try:
        return ClosedFormForSequenceClassification.from_encoder(encoder, **fields)
    except ValueError as error:
        raise InputError(str(error)) from error


def default_pooling(config: Any) -> str:
    """ "last" where tokens see only what stands before them, else "mean"."""
    model_type = config.model_type
    decoder_only = (
        model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    return "last" if getattr(config, "causal", decoder_only) else "mean"


@torch.no_grad()
def write_head(model: Any, head: nn.Linear, solution: RidgeSolution, temperature: float | None) -> None:
    """Put a solution, divided by the temperature, into the head, in the head's dtype.

    A head that is tied to the embeddings gets a weight of its own first, and the configuration says so.
    """
    if is_language_model(model) and head.weight is model.get_input_embeddings().weight:
        _untie(model, head)
    scale = 1.0 if temperature is None else 1 / temperature
    head.weight.copy_(solution.weight_CD * scale)
    if head.bias is not None:
        head.bias.copy_(solution.bias_C * scale)


def _untie(model: Any, head: nn.Linear) -> None:
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    name = f"{find_head(model)[0]}.weight"
    model.all_tied_weights_keys = {
        target: source for target, source in model.all_tied_weights_keys.items() if name not in (target, source)
    }
