"""Linformer language models that do not leak the future, native in transformers.

Importing this package registers the models with transformers' Auto classes.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cache_linformer import LinformerCache
    from .configuration_closed_form import ClosedFormConfig
    from .configuration_linformer import LinformerConfig
    from .layers_linformer import LowRankLinear
    from .modeling_closed_form import ClosedFormForSequenceClassification
    from .modeling_linformer import (
        LinformerForCausalLM,
        LinformerForMaskedLM,
        LinformerForSequenceClassification,
        LinformerForTokenClassification,
        LinformerModel,
    )

__version__ = "0.1.0"

_HOME = {
    "ClosedFormConfig": "configuration_closed_form",
    "ClosedFormForSequenceClassification": "modeling_closed_form",
    "LinformerConfig": "configuration_linformer",
    "LinformerCache": "cache_linformer",
    "LinformerForCausalLM": "modeling_linformer",
    "LinformerForMaskedLM": "modeling_linformer",
    "LinformerForSequenceClassification": "modeling_linformer",
    "LinformerForTokenClassification": "modeling_linformer",
    "LinformerModel": "modeling_linformer",
    "LowRankLinear": "layers_linformer",
}

__all__ = [
    "ClosedFormConfig",
    "ClosedFormForSequenceClassification",
    "LinformerCache",
    "LinformerConfig",
    "LinformerForCausalLM",
    "LinformerForMaskedLM",
    "LinformerForSequenceClassification",
    "LinformerForTokenClassification",
    "LinformerModel",
    "LowRankLinear",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'linpass' has no attribute {name!r}")
    register_auto_classes()
    value = getattr(import_module(f"linpass.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register_auto_classes() -> None:
    """Make transformers' Auto classes know the models of this package; calling it again changes nothing."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    from linpass import (
        configuration_closed_form,
        configuration_linformer,
        modeling_closed_form,
        modeling_linformer,
    )

    config_class = configuration_linformer.LinformerConfig
    AutoConfig.register("linformer", config_class, exist_ok=True)
    AutoModel.register(config_class, modeling_linformer.LinformerModel, exist_ok=True)
    AutoModelForCausalLM.register(config_class, modeling_linformer.LinformerForCausalLM, exist_ok=True)
    AutoModelForMaskedLM.register(config_class, modeling_linformer.LinformerForMaskedLM, exist_ok=True)
    AutoModelForSequenceClassification.register(
        config_class, modeling_linformer.LinformerForSequenceClassification, exist_ok=True
    )
    AutoModelForTokenClassification.register(
        config_class, modeling_linformer.LinformerForTokenClassification, exist_ok=True
    )

    closed_form = configuration_closed_form.ClosedFormConfig
    AutoConfig.register("closed_form", closed_form, exist_ok=True)
    AutoModelForSequenceClassification.register(
        closed_form, modeling_closed_form.ClosedFormForSequenceClassification, exist_ok=True
    )


def _only_help_is_asked() -> bool:
    """``linpass ... --help``: the command line answers before torch is imported, which takes seconds."""
    return Path(sys.argv[0]).stem == "linpass" and not {"-h", "--help"}.isdisjoint(sys.argv[1:])


if not _only_help_is_asked():
    register_auto_classes()
