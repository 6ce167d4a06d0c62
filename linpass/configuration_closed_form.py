"""Configuration of a classifier that is a frozen encoder and a head in closed form: encoder, pooling, feature map."""

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig

from .configuration_linformer import LinformerConfig

POOLINGS = ("mean", "first", "last")
FEATURE_MAPS = ("relu", "rff", "nystrom", "kernel")
KERNELS = ("linear", "rbf", "laplace", "polynomial", "arc_cosine", "deep")


@strict
class ClosedFormConfig(PretrainedConfig):
    r"""An encoder's configuration, and how its hidden states become the features of the linear layer.

    Args:
        encoder_config: of any model that ``AutoModel`` builds, or of a Linformer; the object, or its dictionary with
            ``model_type``.
        pooling: hidden states of a row -> one vector: "mean" of the real tokens, "first" or "last" real token.
        normalize: divide the pooled vector by its L2 norm.
        feature_map: None, the linear layer acts on the pooled vector; "relu" or "rff", random features; "nystrom",
            whitened kernel against landmarks; "kernel", plain kernel against landmarks (the dual form).
        num_features: F, the width of the feature map: random features (even for "rff") or landmarks.
        kernel: of "nystrom" and "kernel": linear, rbf, laplace, polynomial, arc_cosine or deep.
        bandwidth: unit of length of "relu", "rff" and of the kernels rbf and laplace. None: measured on the data.
        degree, scale, offset: of the polynomial kernel :math:`(s\, x \cdot y + o)^d`.
        order: 0 or 1, of the arc-cosine kernel.
        depth: ReLU layers of the deep kernel.
        feature_seed: of the random features and of the choice of landmarks.

    Raises:
        ValueError: a value breaks a rule; the message names field, value and rule.
        StrictDataclassFieldValidationError: a value of a wrong type.

    Example:
        >>> from transformers import BertConfig
        >>> ClosedFormConfig(encoder_config=BertConfig(hidden_size=32, num_attention_heads=4)).head_width
        32
    """

    model_type = "closed_form"
    sub_configs = {"encoder_config": AutoConfig}
    has_no_defaults_at_init = True  # an encoder has to be named

    encoder_config: dict[str, Any] | PretrainedConfig | None = None
    pooling: str = "mean"
    normalize: bool = False
    feature_map: str | None = None
    num_features: int | None = None
    kernel: str = "rbf"
    bandwidth: float | int | None = None
    degree: int = 3
    scale: float | int = 1.0
    offset: float | int = 1.0
    order: int = 1
    depth: int = 2
    feature_seed: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.encoder_config is None:
            raise ValueError("encoder_config=None: give the configuration of an encoder")
        if isinstance(self.encoder_config, dict):
            self.encoder_config = _config_of(self.encoder_config)
        super().__post_init__(**kwargs)
        self.validate_architecture()

    @property
    def pooled_width(self) -> int:
        """D, features of a pooled row."""
        return self.encoder_config.get_text_config().hidden_size

    @property
    def head_width(self) -> int:
        """Inputs of the linear layer: F with a feature map, else D."""
        return self.pooled_width if self.feature_map is None else self.num_features

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """The encoder's: vocabulary and width are its own, and resized embeddings must be written there."""
        return self.encoder_config.get_text_config(*args, **kwargs)

    def save_pretrained(self, save_directory, *args: Any, **kwargs: Any):
        """As transformers', after a check of the fields: a broken configuration writes nothing."""
        self.validate_architecture()
        return super().save_pretrained(save_directory, *args, **kwargs)

    def validate_architecture(self) -> None:
        """Raise ValueError where a field is out of range or fields do not fit each other."""
        choices = {"pooling": POOLINGS, "kernel": KERNELS, "order": (0, 1)}
        choices |= {} if self.feature_map is None else {"feature_map": FEATURE_MAPS}
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                listed = ", ".join(str(value) for value in valid)
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {listed}")
        if not isinstance(getattr(self.encoder_config.get_text_config(), "hidden_size", None), int):
            raise ValueError(f"encoder_config of type {self.encoder_config.model_type!r} has no hidden_size")
        self._validate_ranges()

    def _validate_ranges(self) -> None:
        positive = {"degree": self.degree, "depth": self.depth}
        positive |= {} if self.feature_map is None else {"num_features": self.num_features}
        for name, value in positive.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive whole number")
        if self.feature_map == "rff" and self.num_features % 2:
            raise ValueError(f"num_features={self.num_features} must be even for feature_map='rff'")
        if self.bandwidth is not None and not 0 < self.bandwidth < float("inf"):
            raise ValueError(f"bandwidth={self.bandwidth!r} must be a positive number or None")
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale={self.scale!r} must be a positive number")
        if not 0 <= self.offset < float("inf"):
            raise ValueError(f"offset={self.offset!r} must be 0 or more: the kernel would not be positive definite")


def _config_of(fields: dict[str, Any]) -> PretrainedConfig:
    """The encoder's configuration from its dictionary; a Linformer's also where Auto classes do not know it."""
    # auto_map names files of the folder that the encoder came from; this folder has its own.
    fields = {name: value for name, value in copy.deepcopy(fields).items() if name != "auto_map"}
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ValueError("encoder_config has no model_type; give the dictionary that config.to_dict() returns")
    if model_type == LinformerConfig.model_type:
        return LinformerConfig.from_dict(fields)
    return AutoConfig.for_model(model_type, **fields)
