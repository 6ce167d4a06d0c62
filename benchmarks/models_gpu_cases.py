"""Whole models that are measured on a GPU: ours, transformers' of equal size, and ours with attention removed.

The Linformer is that of the preset ``base`` but for n, k and b. Every model has the same vocabulary, width, depth and
heads, no dropout, an untied head, and the parameters of the Linformer within 1 %; but for a GPT-2 of long rows, whose
table of positions alone is too large for that.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, GPT2LMHeadModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bert import modeling_bert
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama

from benchmarks.race import Entrant, compiled
from linpass import LinformerConfig
from linpass.errors import InputError
from linpass.training.architectures import SAME_SIZE, build_model
from linpass.training.losses import linear_cross_entropy

PRESET = Path(__file__).resolve().parent.parent / "presets" / "base.json"
# What the measurements take from the preset beside their own n, k, b and size.
FROM_PRESET = ("window_size", "projection", "projection_sharing", "position_embedding", "qk_norm", "rank", "dropout")
LEARNING_RATE, MASKED = 8e-4, 0.15  # any: it takes no time


class Size(NamedTuple):
    """Of every model; the defaults are those of the preset ``base``."""

    embed_dim: int = 512
    depth: int = 8
    heads: int = 8
    vocab_size: int = 50257


def preset() -> dict[str, Any]:
    return json.loads(PRESET.read_text(encoding="utf-8"))


def config_for(size: Size, tokens: int, slots: int, block: int, **changes: Any) -> LinformerConfig:
    given = preset()
    fields = {name: given[name] for name in FROM_PRESET}
    fields |= {"seq_length": tokens, "k": slots, "block_size": block}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), size.vocab_size - 1)
    return LinformerConfig(**(fields | size._asdict() | ids | changes))


class WithoutAttention(nn.Module):
    """The projections of an attention layer, and between them the sum q + k + v in the place of everything else.

    A sum, because the gradient then passes through all three projections, as it does in attention; returning the values
    alone would spare the backward pass of two of them. Normalisation, rotation, mixing and attention are gone.
    """

    def __init__(self, attention: Any):
        super().__init__()
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj

    def forward(self, hidden_states: Tensor, **_ignored: Any) -> tuple[Tensor, None]:
        mixed = self.q_proj(hidden_states) + self.k_proj(hidden_states) + self.v_proj(hidden_states)
        return self.o_proj(mixed), None


def linformer(config: LinformerConfig) -> nn.Module:
    return build_model("linformer", config, "causal" if config.causal else "masked")


def bound(config: LinformerConfig) -> nn.Module:
    """No attention at all: what is left to pay whatever attention costs."""
    model: Any = linformer(config)
    for layer in model.model.layers:
        layer.attention = WithoutAttention(layer.attention)
    return model


def full_attention(config: LinformerConfig) -> nn.Module:
    """Our own class, every token seen exactly."""
    return linformer(_changed(config, k=0, window_size=config.seq_length))


def _changed(config: LinformerConfig, **changes: Any) -> LinformerConfig:
    changed = deepcopy(config)
    for name, value in changes.items():
        setattr(changed, name, value)
    changed.validate_architecture()
    return changed


def gpt2(config: LinformerConfig) -> GPT2LMHeadModel:
    """GPT-2 of equal parameters; where its table of positions leaves no room for that, equal without the table."""
    try:
        return build_model("gpt2", config)  # pyright: ignore[reportReturnType]
    except InputError:
        short = _changed(config, seq_length=1, k=0)
    with torch.device("meta"):
        same: Any = build_model("gpt2", short).config
    same.n_positions = config.seq_length
    return GPT2LMHeadModel(same)


@contextmanager
def without_masks() -> Iterator[None]:
    """transformers' models attend without a mask, compiled too, as not compiled they do where no row is padded.

    Compiled they form one of n × n for every row, which keeps PyTorch's attention from its causal kernels, and BERT's
    of transformers 5.17 from all that are fused: twice to three times the time of attention.
    """

    def no_mask(*_arguments: Any, **_names: Any) -> None:
        return None

    with ExitStack() as patches:
        for module in (modeling_llama, modeling_gpt2, modeling_bert):
            for name in {"create_causal_mask", "create_bidirectional_mask"} & vars(module).keys():
                patches.enter_context(mock.patch.object(module, name, no_mask))
        yield


class BertBody(nn.Module):
    """BERT up to the hidden states that its decoder turns into logits."""

    def __init__(self, model: BertForMaskedLM):
        super().__init__()
        self.bert, self.transform = model.bert, model.cls.predictions.transform

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> BaseModelOutput:
        hidden = self.bert(input_ids=input_ids).last_hidden_state
        return BaseModelOutput(last_hidden_state=self.transform(hidden))


def bert(config: LinformerConfig) -> BertForMaskedLM:
    """BertForMaskedLM with the parameters of the encoder, by the width of its feed-forward layers."""

    def build(width: int) -> BertForMaskedLM:
        return BertForMaskedLM(
            BertConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.embed_dim,
                num_hidden_layers=config.depth,
                num_attention_heads=config.heads,
                intermediate_size=width,
                max_position_embeddings=config.seq_length,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                tie_word_embeddings=False,
                pad_token_id=config.pad_token_id,
            )
        )

    with torch.device("meta"):
        target = parameters(linformer(config))
        at_8, at_16 = parameters(build(8)), parameters(build(16))
    width = 8 * round((8 + 8 * (target - at_8) / (at_16 - at_8)) / 8)
    model = build(max(8, width))
    if abs(parameters(model) - target) > SAME_SIZE * target:
        raise ValueError(f"no feed-forward width gives BERT the {target:,} parameters of this encoder")
    return model


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def introduce(builds: list[Callable[[LinformerConfig], Any]], config: LinformerConfig) -> None:
    """Make one of each on the meta device.

    transformers keeps a list of the classes that were made, and what is compiled is compiled anew when it has grown.
    """
    with torch.device("meta"):
        for build in builds:
            with suppress(Exception):  # its row will say why
                build(config)


Build = Callable[[LinformerConfig], Any]
OURS, BOUND, FULL = "linpass", "bound: no attention", "linpass, full attention"
UNEVEN = "linpass, rows of different lengths"
CAUSAL: dict[str, Build] = {
    OURS: linformer,
    BOUND: bound,
    "Llama": partial(build_model, "llama"),
    "GPT-2": gpt2,
    FULL: full_attention,
}
MASKED_LM: dict[str, Build] = {OURS: linformer, BOUND: bound, "BERT": bert, UNEVEN: linformer}
PREFILL: dict[str, Build] = {OURS: linformer, BOUND: bound, "Llama": partial(build_model, "llama")}


class TrainingStep:
    """One optimizer step: forward, loss, backward, AdamW; float32 weights under bfloat16 autocast.

    The loss of all models is ``linpass.training.losses.linear_cross_entropy``, which never forms the logits; without
    the bias that BERT's head would add to them.

    Args:
        ids: [B, n]; random, there is nothing to learn but their frequencies.
        masked: whether ``model`` predicts masked tokens, else the next one.
        keep: [B, n], 0 for padding; None: there is none.
        options: of torch.compile for everything before the loss; None: not compiled.
    """

    def __init__(self, model: Any, ids: Tensor, masked: bool, keep: Tensor | None, options: dict | None):
        body = BertBody(model) if isinstance(model, BertForMaskedLM) else model.base_model
        self.body = body if options is None else compiled(body, options)
        self.head, self.ids = model.get_output_embeddings().weight, ids
        self.parameters = parameters(model)
        if masked:
            self.target = ids.where(torch.rand(ids.shape, device=ids.device) < MASKED, -100)
        else:
            self.target = F.pad(ids, (0, 1), value=-100)[:, 1:]
        self.keep = {}
        if keep is not None:
            self.keep, self.target = {"attention_mask": keep}, self.target.where(keep > 0, -100)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        self.loss = ids.new_zeros((), dtype=torch.float32)

    def __call__(self) -> None:
        with torch.autocast(self.ids.device.type, torch.bfloat16):
            hidden = self.body(input_ids=self.ids, use_cache=False, **self.keep).last_hidden_state
            loss = linear_cross_entropy(hidden.flatten(0, 1), self.head, self.target.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()

    def facts(self) -> dict:
        """Parameters, and the loss of the last step; not a finite one has no row."""
        loss = self.loss.item()
        if loss != loss or loss == float("inf"):
            raise ValueError(f"its loss is {loss}")
        return {"parameters": self.parameters, "loss": round(loss, 4), "tokens_per_step": self.ids.numel()}


def training_step(
    build: Build,
    config: LinformerConfig,
    tokens: int,
    device: torch.device,
    options: dict | None,
    uneven: bool = False,
) -> Entrant:
    """A step of ``tokens`` tokens in rows of ``config.seq_length``, one at least; always the same weights and ids.

    ``uneven``: rows hold from half of that to all of it, behind their padding.
    """
    torch.manual_seed(0)
    with device:
        model = build(config).train()
        rows = max(1, tokens // config.seq_length)
        ids = torch.randint(config.vocab_size, (rows, config.seq_length))
        keep = uneven_rows(*ids.shape) if uneven else None
        step = TrainingStep(model, ids, not config.causal, keep, options)
    return Entrant(step, step.ids.numel(), facts=step.facts)


def uneven_rows(rows: int, tokens: int) -> Tensor:
    """A mask [rows, tokens], padded on the left: the first row is whole, others hold down to half of it, in eighths."""
    padding = torch.arange(rows) % 5 * (tokens // 8)
    return (torch.arange(tokens) >= padding[:, None]).long()


def prefill(build: Build, config: LinformerConfig, batch: int, device: torch.device, options: dict | None) -> Entrant:
    """A forward pass over whole prompts that leaves a cache; bfloat16 weights, logits of the last position alone.

    The model without attention has nothing to keep, and leaves none.
    """
    torch.manual_seed(0)
    with device:
        model = build(config).to(torch.bfloat16).eval()
        ids = torch.randint(config.vocab_size, (batch, config.seq_length))
    run = model if options is None else compiled(model, options)

    def call() -> Any:
        with torch.no_grad():
            return run(input_ids=ids, use_cache=build is not bound, logits_to_keep=1).past_key_values

    cache = call()
    size = None if cache is None else round(cache_bytes(cache) / 2**20, 2)
    facts = {"parameters": parameters(model), "cache_MiB": size}
    return Entrant(call, ids.numel(), facts=lambda: facts)


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors of a cache."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
