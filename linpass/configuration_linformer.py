"""Configuration of the Linformer: fields, their Hugging Face names, and the rules that tie them together."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PretrainedConfig

PROJECTIONS = ("learned", "convolution", "pooling")
SHARINGS = ("none", "headwise", "key-value", "layerwise")
POSITION_EMBEDDINGS = ("learned", "rotary")


@strict
class LinformerConfig(PretrainedConfig):
    r"""What a Linformer is made of.

    Source of the model: Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity", arXiv:2006.04768.
    The causal form cuts the row in blocks of ``block_size`` tokens; a complete block is seen through
    ``k * block_size / seq_length`` slots, the last ``window_size`` tokens are seen exactly.

    Args:
        vocab_size: number of token ids.
        embed_dim: width of the hidden states (``hidden_size``).
        depth: number of blocks (``num_hidden_layers``).
        heads: number of query heads (``num_attention_heads``); divides ``embed_dim``.
        num_key_value_heads: number of key/value heads; divides ``heads``. None: as many as ``heads``.
        seq_length: tokens of a full sequence (``max_position_embeddings``).
        k: slots for a sequence of ``seq_length`` tokens, an int or one per layer; 0 is attention without slots, for
            which the rules of ``block_size`` and ``window_size`` do not count.
        block_size: tokens per block, causal only; divides ``seq_length``.
        window_size: exact tokens that a query sees, itself included, causal only; at least ``block_size``.
        causal: False is the paper's bidirectional encoder.
        projection: how tokens are mixed into slots. "learned": weights per position; "convolution": one set of weights
            for all blocks; "pooling": means, no weights.
        projection_sharing: "none": weights per key/value head, keys apart from values; "headwise": one set for keys and
            one for values per layer; "key-value": one set per layer; "layerwise": one set for the model.
        position_embedding: "learned" (added to the token embedding) or "rotary".
        rotary_base: base of the rotary angles.
        qk_norm: RMS-normalise queries and keys per head, without weights.
        intermediate_size: width of the feed-forward layer. None: ``4 * embed_dim``.
        rank: rank of the feed-forward matrices, see :class:`LowRankLinear`; None is dense.
        attention_rank: rank of the query, key, value and output projections; None is dense.
        dropout: probability, after the embeddings, the attention and the feed-forward layer.
        norm_eps: epsilon of the RMS norms.
        initializer_range: standard deviation of the initial weights.
        tie_word_embeddings: one matrix for the token embedding and the language-model head.
        pad_token_id, bos_token_id, eos_token_id: padding is told by the attention mask, never by the id.
        use_cache: return a :class:`LinformerCache` from the forward pass.

    Raises:
        ValueError: a value breaks a rule; the message names field, value, rule and the nearest valid values.
        StrictDataclassFieldValidationError: a value of a wrong type; the message names field and type.

    Example:
        >>> LinformerConfig(seq_length=512, k=128, block_size=32).slots_per_block(0)
        8
    """

    model_type = "linformer"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "embed_dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "max_position_embeddings": "seq_length",
    }

    vocab_size: int = 50257
    embed_dim: int = 512
    depth: int = 6
    heads: int = 4
    num_key_value_heads: int | None = None
    seq_length: int = 512
    k: int | list[int] | tuple[int, ...] = 128
    block_size: int = 32
    window_size: int = 128
    causal: bool = True
    projection: str = "learned"
    projection_sharing: str = "key-value"
    position_embedding: str = "learned"
    rotary_base: float | int = 10000.0
    qk_norm: bool = False
    intermediate_size: int | None = None
    rank: int | None = 256
    attention_rank: int | None = None
    dropout: float | int = 0.1
    norm_eps: float | int = 1e-6
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 50256
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        for alias, field in self.attribute_map.items():
            stored = getattr(self, field)
            if alias in kwargs and stored not in (type(self).__dataclass_fields__[field].default, kwargs[alias]):
                raise ValueError(f"{field}={stored} and {alias}={kwargs[alias]} name the same field; give one of them")
            if alias in kwargs:
                setattr(self, field, kwargs[alias])  # an alias alone would skip the field's type check
        super().__post_init__(**kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.embed_dim
        if isinstance(self.k, tuple):
            self.k = list(self.k)
        self.validate_architecture()

    @property
    def head_dim(self) -> int:
        """Features per head."""
        return self.embed_dim // self.heads

    # Attributes are read once where many would do: transformers' configurations look twice at every name.
    @property
    def every_k(self) -> list[int]:
        """Slots of each layer for a sequence of ``seq_length`` tokens."""
        k = self.k
        return k if isinstance(k, list) else [k] * self.depth

    def layer_k(self, layer_idx: int) -> int:
        """Slots of layer ``layer_idx``."""
        return self.every_k[layer_idx]

    @property
    def every_slots_per_block(self) -> list[int]:
        """r, the slots that one block of each layer gives; 0 without slots (causal)."""
        block, tokens = self.block_size, self.seq_length
        return [k * block // tokens for k in self.every_k]

    def slots_per_block(self, layer_idx: int) -> int:
        """r of layer ``layer_idx``."""
        return self.every_slots_per_block[layer_idx]

    @property
    def max_tokens(self) -> int | None:
        """Most tokens that a row can hold; None where the model runs past ``seq_length``.

        Only what has no weights per position runs on: rotary positions with convolution, pooling or no slots at all.
        An encoder stops at ``seq_length``: its k slots stand for a sequence of that length.
        """
        endless_positions = self.position_embedding == "rotary"
        endless_slots = not any(self.every_k) or (self.causal and self.projection != "learned")
        return None if endless_positions and endless_slots else self.seq_length

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """A configuration from a dictionary, with ``kwargs`` on top, checked as a whole.

        Raises:
            ValueError: ``kwargs`` change the slots per block, which the checkpoint's mixing weights were trained for.
        """
        fields = cls.__dataclass_fields__
        changed = {cls.attribute_map.get(name, name): value for name, value in kwargs.items()}
        changed = {name: value for name, value in changed.items() if name in fields and name != "dtype"}
        if not changed:
            return super().from_dict(config_dict, **kwargs)
        rest = {name: value for name, value in kwargs.items() if cls.attribute_map.get(name, name) not in changed}
        canonical = {cls.attribute_map.get(name, name): value for name, value in config_dict.items()}
        merged = canonical | changed
        # What was stored for None follows the field that it was derived from.
        if "intermediate_size" not in changed and canonical.get("intermediate_size") == 4 * canonical.get(
            "embed_dim", 0
        ):
            merged["intermediate_size"] = None
        if "num_key_value_heads" not in changed and canonical.get("num_key_value_heads") == canonical.get("heads"):
            merged["num_key_value_heads"] = None
        if {"k", "seq_length", "block_size"} & set(changed) and "seq_length" in canonical:
            cls(**canonical)._refuse_other_slots_per_block(changed)
        return super().from_dict(merged, **rest)

    def _refuse_other_slots_per_block(self, changed: dict[str, Any]) -> None:
        """Context extension keeps r: the same mixing weights, more blocks in view."""
        k = changed.get("k", self.k)
        n, b = changed.get("seq_length", self.seq_length), changed.get("block_size", self.block_size)
        if not self.causal or isinstance(k, list) != isinstance(self.k, list):
            return
        for new, old in zip(k, self.k, strict=False) if isinstance(k, list) else [(k, self.k)]:
            keep = old * n // self.seq_length
            if new != keep or (old and b != self.block_size):
                raise ValueError(
                    f"k={k}, block_size={b}, seq_length={n} change the slots per block: the checkpoint has "
                    f"{old * self.block_size // self.seq_length} per block of {self.block_size}; at seq_length={n} it "
                    f"needs k={keep}, block_size={self.block_size}"
                )

    def save_pretrained(self, save_directory, *args: Any, **kwargs: Any):
        """As transformers', after a check of the fields: a broken configuration writes nothing."""
        self.validate_architecture()
        return super().save_pretrained(save_directory, *args, **kwargs)

    def validate_architecture(self) -> None:
        """Raise ValueError where fields do not fit each other; run at construction and again before saving."""
        self._validate_ranges()
        if self.embed_dim % self.heads:
            near = _nearest(self.heads, _divisors(self.embed_dim))
            raise ValueError(f"heads={self.heads} must divide embed_dim={self.embed_dim}; nearest: {near}")
        if self.heads % self.num_key_value_heads:
            near = _nearest(self.num_key_value_heads, _divisors(self.heads))
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide heads={self.heads}; nearest: {near}"
            )
        if self.position_embedding == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"position_embedding='rotary' needs an even embed_dim / heads; {self.embed_dim} / {self.heads} is "
                f"{self.head_dim}"
            )
        if isinstance(self.k, list):
            if len(self.k) != self.depth:
                raise ValueError(f"k={self.k} must be an int or hold one value per layer; depth={self.depth}")
            if self.projection_sharing == "layerwise" and len(set(self.k)) > 1:
                raise ValueError(f"projection_sharing='layerwise' shares one matrix, so k={self.k} must be one number")
        for k in sorted(set(self.k)) if isinstance(self.k, list) else [self.k]:
            if k and self.causal:
                self._validate_causal_blocks(k)
            elif k:
                self._validate_bidirectional_slots(k)

    def _validate_ranges(self) -> None:
        positive = ["vocab_size", "embed_dim", "depth", "heads", "num_key_value_heads", "seq_length", "block_size"]
        positive += ["window_size", "intermediate_size"]
        positive += [name for name in ("rank", "attention_rank") if getattr(self, name) is not None]
        for name in positive:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive whole number")
        for k in self.k if isinstance(self.k, list) else [self.k]:
            if not isinstance(k, int) or isinstance(k, bool) or k < 0:
                raise ValueError(f"k={self.k!r} must be a whole number, 0 or more, or a list of one per layer")
        choices = {"projection": PROJECTIONS, "projection_sharing": SHARINGS, "position_embedding": POSITION_EMBEDDINGS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, allowed))}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be a probability, 0 or more and less than 1")
        for name in ("norm_eps", "initializer_range", "rotary_base"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be more than 0")

    def _validate_causal_blocks(self, k: int) -> None:
        n, b = self.seq_length, self.block_size
        if n % b:
            near = _nearest(b, _divisors(n))
            raise ValueError(f"block_size={b} must divide seq_length={n}; nearest: {near}")
        valid = [r * n // b for r in _divisors(b)]
        if k not in valid:
            raise ValueError(
                f"k={k} must give every block of block_size={b} tokens k * block_size / seq_length slots, a whole "
                f"number that divides block_size; with seq_length={n} the nearest k: {_nearest(k, valid)}"
            )
        if self.window_size < b:
            raise ValueError(
                f"window_size={self.window_size} must be at least block_size={b}, so that no past token is out of sight"
            )

    def _validate_bidirectional_slots(self, k: int) -> None:
        if k > self.seq_length:
            raise ValueError(f"k={k} must not be more than seq_length={self.seq_length}")
        if self.projection != "learned" and self.seq_length % k:
            near = _nearest(k, _divisors(self.seq_length))
            raise ValueError(
                f"k={k} must divide seq_length={self.seq_length} for projection={self.projection!r}; nearest: {near}"
            )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _nearest(value: int, valid: list[int]) -> str:
    """The valid values next to ``value``, one on either side where there are two, as text."""
    below = [v for v in valid if v < value][-1:]
    above = [v for v in valid if v > value][:1]
    return " or ".join(str(v) for v in below + above)
