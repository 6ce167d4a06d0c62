"""The features of a head: what a model's final linear layer is given, row by row, read by a hook.

Nothing about an architecture is written down here: the head is found by its width, the token that a decoder classifies
by watching which one its logits come from.

Shapes: B rows of a batch, T tokens, D features, C outputs of the head.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from linpass.errors import InputError

NO_ROWS = (
    "ForMaskedLM",
    "ForPreTraining",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForConditionalGeneration",
)  # heads of models that have neither a label per row or token nor the next token as target
SAME = {"rtol": 1e-2, "atol": 1e-3, "equal_nan": True}  # a cast to bfloat16 between the head and the logits is none


def find_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the final linear layer: the last one, outside the encoder, with ``num_labels`` outputs.

    A language model's is what ``get_output_embeddings`` gives.

    Raises:
        InputError: there is none, or the model's task is none of those that :class:`Task` knows.
    """
    kind = type(model).__name__
    if kind.endswith(NO_ROWS):
        raise InputError(
            f"model={kind} must classify sequences or tokens, or predict the next token; pooling='mean' would take its "
            "encoder for a sequence classifier"
        )
    if is_language_model(model):
        wanted = "its get_output_embeddings() gives none"
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        names = [name for name, module in model.named_modules() if module is head and isinstance(head, nn.Linear)]
    else:
        num_labels = model.config.num_labels  # type: ignore[union-attr]
        wanted = f"none with num_labels={num_labels} outputs stands outside its encoder"
        names = [
            name
            for name, module in outside_encoder(model)
            if isinstance(module, nn.Linear) and module.out_features == num_labels
        ]
    if not names:
        raise InputError(f"model={kind} must have a final nn.Linear to write the solution into: {wanted}")
    return names[-1], model.get_submodule(names[-1])  # type: ignore[return-value]


def is_language_model(model: nn.Module) -> bool:
    """Whether the model's outputs are the logits of the next token."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def is_token_classifier(model: nn.Module) -> bool:
    """Whether every token has a label of its own."""
    return type(model).__name__.endswith("ForTokenClassification")


def encoder_prefix(model: nn.Module) -> str:
    """How the names of the encoder's modules begin; "" of a model without a head, and of one that does not say."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


def outside_encoder(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of what the encoder's outputs go through, in the order of their definition."""
    inside = encoder_prefix(model)
    return [(name, module) for name, module in model.named_modules() if not inside or not f"{name}.".startswith(inside)]


def has_head(model: nn.Module) -> bool:
    """Whether the model is more than an encoder: it holds one, or its class is named for what it is for."""
    return encoder_prefix(model) != "" or re.search("For[A-Z]", type(model).__name__) is not None


def untrained_layers(model: nn.Module, head: nn.Module | None) -> list[str]:
    """Layers before the head that look as they were drawn, "encoder" for all of the encoder.

    A bias that is exactly zero everywhere has never been trained; nor has a normalisation that is exactly one, nor an
    encoder in which all are. Features that go through such layers are random projections of what was trained.

    Args:
        head: the final layer, which need not be trained; None where the encoder's hidden states are the features.
    """
    inside = encoder_prefix(model)
    found = ["encoder"] if _never_trained(model.get_submodule(inside.rstrip("."))) else []
    if head is None:
        return found
    poolers = [(name, module) for name, module in model.named_modules() if "pooler" in name.split(".")]
    for name, module in poolers + outside_encoder(model) if inside else []:
        weight, bias = (dict(module.named_parameters(recurse=False)).get(part) for part in ("weight", "bias"))
        drawn_linear = isinstance(module, nn.Linear) and bias is not None and not bool(bias.any())
        drawn_scale = weight is not None and weight.dim() == 1 and bool((weight == 1).all())
        if module is not head and (drawn_linear or drawn_scale):
            found.append(name)
    return found


def _never_trained(encoder: nn.Module) -> bool:
    """Whether every scale of a normalisation is what it began as: one, or zero where one is added to it."""
    named = encoder.named_parameters()
    scales = [parameter for name, parameter in named if name.endswith("weight") and parameter.dim() == 1]
    return bool(scales) and all(bool((scale == scale[0]).all()) and scale[0] in (0, 1) for scale in scales)


@contextmanager
def captured_input(model: nn.Module, source: nn.Module, every_token: bool) -> Iterator["HeadInput"]:
    """A function ``inputs -> features`` that lives as long as the ``with`` block; the model is left as it was.

    Args:
        source: the module whose input is wanted: the head, or a module before it.
        every_token: the features of all tokens [B, T, D] and not of one per row [B, D].
    """
    capture = HeadInput(model, source, every_token)
    handles = (source.register_forward_pre_hook(capture.before), source.register_forward_hook(capture.after))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # dropout would be noise in the features
    try:
        yield capture
    finally:
        for module, was_training in modes:
            module.training = was_training
        for handle in handles:
            handle.remove()


class HeadInput:
    """See :func:`captured_input`."""

    def __init__(self, model: nn.Module, source: nn.Module, every_token: bool):
        self.model, self.source, self.every_token = model, source, every_token
        self.seen: Tensor | None = None
        self.given: Tensor | None = None
        parameters = inspect.signature(model.forward).parameters
        self.options = {"use_cache": False} if "use_cache" in parameters else {}

    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        """Features in the dtype that the model computes in.

        Raises:
            InputError: the model's logits are not what the head gives for one token, or for each of them.
        """
        self.seen = self.given = None
        with torch.no_grad():
            outputs = self.model(**inputs, **self.options)
        kind = type(self.model).__name__
        if self.seen is None or self.given is None:
            raise InputError(f"model={kind} must call its final layer; its forward does not")
        logits = getattr(outputs, "logits", None)
        if logits is None:
            raise InputError(f"model={kind} must return an output with logits")
        if not self.every_token and self.seen.dim() == 3:
            return self._one_token(logits)
        given = self.given.reshape(-1).float()
        if isinstance(self.source, nn.Linear) and not (
            given.numel() == logits.numel() and torch.allclose(logits.reshape(-1).float(), given, **SAME)
        ):
            raise InputError(f"model={kind} must return what its final layer gives; it changes that, or takes another")
        return self.seen

    def before(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Keep what the head is given; where all of it is wanted its outputs are not, so it gets one token to do."""
        self.seen = arguments[0].detach()
        return (arguments[0][:, :1],) if self.every_token else arguments

    def after(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Let a head that scores every token give each a mark instead: the model then picks the mark of the row's."""
        self.given = output.detach()
        if self.every_token or output.dim() != 3:
            return None
        self.given = _marks(output.shape[1], output.device)[None, :, None].expand(output.shape)
        return self.given

    def _one_token(self, logits: Tensor) -> Tensor:
        assert self.seen is not None
        assert self.given is not None
        is_token_BT = logits.flatten(1)[:, :1] == self.given[0, :, 0]
        if logits.dim() != 2 or not bool((is_token_BT.sum(1) == 1).all()):
            raise InputError(
                f"model={type(self.model).__name__} must take a row's logits from one of its tokens; it mixes several"
            )
        return self.seen[torch.arange(len(logits), device=self.seen.device), is_token_BT.int().argmax(1)]


def _marks(tokens: int, device: torch.device) -> Tensor:
    """[T] different numbers; a mean of several is none of them."""
    return torch.arange(2, tokens + 2, dtype=torch.float32, device=device).sqrt()
