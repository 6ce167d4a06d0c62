"""The Linformer as transformers models: base, causal LM, masked LM, sequence and token classification.

Layers are in ``layers_linformer``, the mathematics in ``attention_linformer``, what decoding remembers in
``cache_linformer``. Saved folders carry these files, so that they load with ``trust_remote_code=True`` where linpass is
not installed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_linformer import (
    TokenGrid,
    continued_grid,
    next_token_grid,
    packed_grid,
    plain_grid,
    require,
)
from .cache_linformer import LinformerCache
from .configuration_linformer import LinformerConfig
from .kernels_linformer import rotary_angles
from .layers_linformer import LinformerAttention, LinformerBlock, SequenceProjection, slot_positions

logger = logging.get_logger(__name__)


class LinformerPreTrainedModel(PreTrainedModel):
    """Capabilities, initial weights, and saved folders that carry their code."""

    config_class = LinformerConfig
    config: LinformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LinformerBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _is_stateful = True  # the cache cannot be rolled back: no assisted generation
    _can_compile_fullgraph = False
    _can_record_outputs = {"hidden_states": LinformerBlock, "attentions": LinformerAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SequenceProjection):
            module.reset()
        elif isinstance(module, nn.Linear) and hasattr(module, "init_std"):
            init.normal_(module.weight, std=module.init_std)

    def save_pretrained(self, save_directory, *args: Any, **kwargs: Any):
        """Save weights, configuration and code; every Auto class opens the folder, with linpass installed or not."""
        self.config.validate_architecture()  # before anything is written
        # save_pretrained enters only the class that is saved; an encoder or a classifier opens from the same folder.
        self.config.auto_map = {
            "AutoConfig": "configuration_linformer.LinformerConfig",
            "AutoModel": "modeling_linformer.LinformerModel",
            "AutoModelForCausalLM": "modeling_linformer.LinformerForCausalLM",
            "AutoModelForMaskedLM": "modeling_linformer.LinformerForMaskedLM",
            "AutoModelForSequenceClassification": "modeling_linformer.LinformerForSequenceClassification",
            "AutoModelForTokenClassification": "modeling_linformer.LinformerForTokenClassification",
        }
        return super().save_pretrained(save_directory, *args, **kwargs)


class LinformerModel(LinformerPreTrainedModel):
    """Embeddings, blocks and a final norm; hidden states out."""

    def __init__(self, config: LinformerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embed_dim)
        learned = config.position_embedding == "learned"
        self.embed_positions = nn.Embedding(config.seq_length, config.embed_dim) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        # Owned once, here, and passed to the layers: a parameter that is registered twice cannot be saved.
        shared = config.projection_sharing == "layerwise" and config.layer_k(0)
        self.projection = SequenceProjection(config, 0) if shared else None
        self.layers = nn.ModuleList([LinformerBlock(config, layer_idx) for layer_idx in range(config.depth)])
        self.norm = nn.RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LinformerCache | None = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: [B, T]; or inputs_embeds [B, T, E].
            attention_mask: [B, T], or longer where it also covers the cache; 0 is padding, wherever it stands.
            position_ids: not needed; a token's index follows from the mask and the cache. Checked against it.
            past_key_values: a :class:`LinformerCache`.
            document_ids: [B, T]; packed documents, each starting at a multiple of block_size. Causal, without a cache.
        Raises:
            ValueError: inputs that contradict each other or go past what the configuration can hold.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        tokens = inputs_embeds.shape[1]
        if tokens == 0:
            raise ValueError("input_ids holds no token; a row needs at least one")
        if past_key_values is not None and not isinstance(past_key_values, LinformerCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; a Linformer keeps mixtures of tokens, it "
                "needs a LinformerCache"
            )
        if past_key_values is not None and not past_key_values.fits(self.config):
            raise ValueError(
                "past_key_values was made for another configuration: depth, heads, k, block_size, seq_length and "
                "window_size must be this model's"
            )
        if past_key_values is not None and not torch.compiler.is_compiling():
            past_key_values.make_writable()
        use_cache = bool(use_cache) and self.config.causal and document_ids is None
        if past_key_values is None and use_cache:
            past_key_values = LinformerCache(self.config)
        past = past_key_values if past_key_values is not None and past_key_values.has_tokens else None
        keep = self._real_tokens(attention_mask, inputs_embeds.shape[:2], past)
        if document_ids is not None and (not self.config.causal or past_key_values is not None):
            raise ValueError(
                "document_ids packs several documents in a row: this is for causal models, without past_key_values"
            )
        grid = self._token_grid(inputs_embeds, keep, document_ids, past)
        self._check_past(attention_mask, tokens, past)
        self._check_length(grid, tokens, past)
        if position_ids is not None:
            same = position_ids[..., -tokens:].to(inputs_embeds.device) == grid.index_BT
            require(
                (same if keep is None else same | ~keep).all(),
                "position_ids must be what attention_mask and cache say, cumsum(mask) - 1 at every real token: a "
                "Linformer mixes tokens by that index. Leave position_ids out, or use document_ids for packed rows",
            )

        hidden_states = inputs_embeds
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(grid.index_BT)
            angles, slot_angles = None, {}
        else:
            angles = self._angles(grid.positions_BN(), hidden_states.dtype)
            slots = set(self.config.every_k) - {0}
            exact_enough = torch.promote_types(hidden_states.dtype, torch.float32)  # sums of a block are in it
            slot_angles = {k: self._angles(slot_positions(self.config, k, grid), exact_enough) for k in sorted(slots)}
        hidden_states = self.dropout(hidden_states)
        shared_weights = None if self.projection is None else self.projection(hidden_states)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                grid=grid,
                angles=angles,
                slot_angles=slot_angles,
                shared_weights=shared_weights,
                past_key_values=past_key_values,
            )
        if past_key_values is not None:
            past_key_values.count(grid)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _angles(self, position_BN: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return rotary_angles(position_BN, self.config.head_dim, self.config.rotary_base, dtype)

    # Below, `past` is a cache that holds tokens, else None.
    def _real_tokens(
        self, attention_mask: Tensor | None, shape: torch.Size, past: LinformerCache | None
    ) -> Tensor | None:
        """True where a token of this call is real, [B, T]; None where no mask was given."""
        if attention_mask is None:
            return None
        given, tokens = attention_mask.shape, shape[1]
        fits = len(given) == 2 and given[0] == shape[0]
        if not (fits and (given[1] == tokens or (past is not None and given[1] > tokens))):
            longer = "" if past is None else " or longer"
            raise ValueError(
                f"attention_mask has shape {list(given)}; a Linformer takes [batch, tokens], one number "
                f"per token of this call and, before them, of the cache: {list(shape)}{longer}"
            )
        return attention_mask[:, given[1] - tokens :] != 0

    def _token_grid(self, inputs_embeds, keep, document_ids, past: LinformerCache | None) -> TokenGrid:
        (batch, tokens), device = inputs_embeds.shape[:2], inputs_embeds.device
        if document_ids is not None:
            if document_ids.shape != (batch, tokens):
                raise ValueError(
                    f"document_ids has shape {list(document_ids.shape)}; it needs {[batch, tokens]}, one per token"
                )
            return packed_grid(document_ids.to(device), self.config.block_size, keep)
        if past is None:
            return plain_grid(tokens, device, keep)
        if not self.config.causal:
            raise ValueError("past_key_values: an encoder (causal=False) has no cache")
        seen = past.layers[0].seen.clone()  # it counts on in place, a backward pass may want what it was
        if len(seen) != batch:
            raise ValueError(f"past_key_values holds {len(seen)} rows, the batch has {batch}")
        if tokens == 1:
            return next_token_grid(seen, keep)
        return continued_grid(tokens, seen, self.config.block_size, keep)

    def _check_past(self, attention_mask: Tensor | None, tokens: int, past: LinformerCache | None) -> None:
        """A mask that also covers the cache must say of it what was said when its tokens were given."""
        if attention_mask is None or past is None:
            return
        cache, columns = past.layers[0], attention_mask.shape[1] - tokens
        if columns:
            same = ((attention_mask[:, :columns] != 0).sum(-1) == cache.seen).all()
            require(
                same | (cache.columns != columns),
                "attention_mask masks other tokens of the past than when they were given: what is in a LinformerCache "
                "has been mixed and cannot be masked any more",
            )

    def _check_length(self, grid: TokenGrid, tokens: int, past: LinformerCache | None) -> None:
        limit, continues = self.config.max_tokens, past is not None
        if limit is None or (tokens <= limit and not continues):
            return
        row = f"of what the cache holds and {tokens} more" if continues else f"of {tokens} tokens"
        message = (
            f"a row {row} is longer than seq_length={limit}: position_embedding={self.config.position_embedding!r}, "
            f"projection={self.config.projection!r}, causal={self.config.causal} end there; rotary positions with "
            "projection 'convolution' or 'pooling' and causal=True do not"
        )
        if grid.keep_BT is None and grid.first_block_BC is None and not continues:
            raise ValueError(message)
        require(grid.index_BT.max() < limit, message)  # padding and packing take columns, not positions


class LinformerForCausalLM(LinformerPreTrainedModel, GenerationMixin):
    """Next-token prediction that cannot see the future; ``generate`` with a cache of constant size."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LinformerConfig):
        if not config.causal:
            raise ValueError(
                "LinformerForCausalLM needs causal=True: with causal=False a position sees the tokens that it has to "
                "predict; use LinformerForMaskedLM"
            )
        super().__init__(config)
        self.model = LinformerModel(config)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_generated_length(self, generation_config, *args: Any, **kwargs: Any):
        """Note the columns of the prompt: what comes after them was generated."""
        prompt_columns = kwargs["input_ids_length"]
        if prompt_columns == 0 and kwargs["model_input_name"] == "input_ids":
            raise ValueError("the prompt holds no token; generate needs at least one")
        generation_config = super()._prepare_generated_length(generation_config, *args, **kwargs)
        generation_config._prompt_columns = prompt_columns
        return generation_config

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args: Any
    ):
        """The cache that ``generate`` fills, refused before the first token where it could not hold them all."""
        past = model_kwargs.get("past_key_values")
        if past is not None and not isinstance(past, LinformerCache):
            raise ValueError(f"past_key_values is a {type(past).__name__}; generate needs a LinformerCache here")
        kind = generation_config.cache_implementation
        if kind not in (None, "static"):
            raise ValueError(
                f"cache_implementation={kind!r}: a Linformer has one cache, of constant size; leave "
                "cache_implementation out, or give 'static' to have the steps compiled"
            )
        mask, columns = model_kwargs.get("attention_mask"), generation_config._prompt_columns
        # Positions are those of the mask, which transformers leaves out where it masks nothing.
        wide = (tensor.shape[1] for tensor in (mask, model_kwargs.get("position_ids")) if tensor is not None)
        held, given = 0 if past is None else past.get_seq_length(), max(columns, *wide, 0)
        if held and given <= held:
            raise ValueError(
                f"past_key_values holds {held} tokens, the prompt with its attention_mask has {given}: generate needs "
                "at least one more than the cache holds; a LinformerCache mixes tokens and cannot give one back"
            )
        self._refuse_too_many_tokens(generation_config, mask, max_cache_length + 1)
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        if rows > 1 and generation_config._eos_token_tensor is not None:
            ends = generation_config._eos_token_tensor, generation_config._pad_token_tensor
            model_kwargs["row_ends"] = (columns, *ends)
        if past is None and generation_config.use_cache is not False:
            if kind == "static" or generation_config.compile_config is not None:
                model_kwargs["past_key_values"] = self._cache_of_compiled_steps(generation_config, rows)
            else:
                model_kwargs["past_key_values"] = LinformerCache(self.config)
            return
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args
        )

    def _cache_of_compiled_steps(self, generation_config, rows: int) -> LinformerCache:
        """The same tensors for every call that does not hand them out: a graph that was recorded still fits."""
        cache = getattr(self, "_kept_cache", None)
        if cache is None or not cache.fits(self.config) or generation_config.return_dict_in_generate:
            cache = LinformerCache(self.config, is_compileable=True)
        cache.allocate(rows, self.config.num_key_value_heads, self.config.head_dim, self.dtype, self.device)
        self._kept_cache = None if generation_config.return_dict_in_generate else cache
        return cache

    def prepare_inputs_for_generation(self, input_ids, *args: Any, inputs_embeds=None, row_ends=None, **kwargs: Any):
        """transformers' inputs, with what ``generate`` writes behind the end of a row masked.

        A row that has ended is filled up while others go on. That filling must not enter the cache: it could not be
        taken out for a second turn. A step of one token gets tensors of one shape, however long the row: what the
        cache holds needs neither mask nor positions any more.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        generated = 0 if row_ends is None else input_ids.shape[1] - row_ends[0]
        if generated > 0:
            written, (end, pad) = input_ids[:, -generated:], (ids.to(input_ids.device) for ids in row_ends[1:])
            ends = torch.isin(written, end)
            # Rows that another criterion has ended are filled, too; where padding is an end, it is found like one.
            filling = ((ends.cumsum(-1) - ends.long()) > 0) | ((written == pad) & ~ends)
            mask = inputs.get("attention_mask")
            if mask is None:
                mask = torch.ones_like(input_ids)
            inputs["attention_mask"] = torch.cat((mask[:, :-generated], mask[:, -generated:] * ~filling), 1)
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        is_step = ids is not None and ids.shape[1] == 1 and not kwargs.get("is_first_iteration")
        if is_step and inputs.get("past_key_values") is not None:
            inputs.pop("position_ids", None)
            if mask is not None:
                inputs["attention_mask"] = mask[:, -1:].clone(memory_format=torch.contiguous_format)
        return inputs

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """For compiled steps transformers would make a mask of four dimensions; a Linformer takes the one it has."""
        return attention_mask

    def _refuse_too_many_tokens(self, generation_config, attention_mask: Tensor | None, total: int) -> None:
        limit = self.config.max_tokens
        if limit is None:
            return
        if attention_mask is not None:
            # Only the tokens that the mask keeps take up positions; it also covers what the cache holds.
            columns = attention_mask.shape[1]
            new = generation_config.max_new_tokens
            total = columns + new if new is not None else total
            total -= columns - int((attention_mask != 0).sum(-1).max())
        if total > limit:
            raise ValueError(
                f"prompt and new tokens come to {total}, more than seq_length={limit} which this configuration can "
                f"hold (position_embedding={self.config.position_embedding!r}, projection="
                f"{self.config.projection!r}): shorten the prompt or max_new_tokens"
            )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """See :meth:`LinformerModel.forward`; ``labels`` are the inputs, shifted inside, -100 is ignored.

        In packed rows set the first label of every document to -100: its prediction comes from another document. With
        labels there is no cache unless ``use_cache`` asks for one: a loss is wanted, not a continuation.
        """
        if use_cache is None and labels is not None and past_key_values is None:
            use_cache = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            document_ids=document_ids,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(_keep_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions or None,
        )


class LinformerForMaskedLM(LinformerPreTrainedModel):
    """Prediction of masked tokens; meant for ``causal=False``."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LinformerConfig):
        super().__init__(config)
        if config.causal:
            logger.warning_once(
                "LinformerForMaskedLM with causal=True stays causal: a masked token is predicted from the left alone. "
                "Set causal=False for the bidirectional encoder."
            )
        self.model = LinformerModel(config)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """See :meth:`LinformerModel.forward`; ``labels`` [B, T] stand where their tokens do, -100 is ignored."""
        kwargs.pop("use_cache", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions or None
        )


class LinformerForSequenceClassification(LinformerPreTrainedModel):
    """One label per row, from the last real token (causal) or the mean of the real tokens (encoder)."""

    def __init__(self, config: LinformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LinformerModel(config)
        self.score = nn.Linear(config.embed_dim, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """See :meth:`LinformerModel.forward`; ``labels`` [B], or [B, num_labels] for regression and multi-label."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(self._pool(outputs.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            items = kwargs.get("num_items_in_batch")
            if items is not None and self.config.problem_type != "single_label_classification":
                loss = loss * (labels.numel() / items)  # transformers' other two losses are means whatever it says
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions or None,
        )

    def _pool(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """[B, T, E] -> [B, E]. Without a mask every token is real, whatever its id."""
        batch, tokens = hidden_states.shape[:2]
        if attention_mask is None:
            return hidden_states[:, -1] if self.config.causal else hidden_states.mean(1)
        keep = attention_mask[:, attention_mask.shape[1] - tokens :] != 0
        if self.config.causal:
            last = (keep * torch.arange(tokens, device=keep.device)).argmax(-1)
            return hidden_states[torch.arange(batch, device=keep.device), last]
        total = hidden_states.masked_fill(~keep[..., None], 0).sum(1)
        return total / keep.sum(1, keepdim=True).clamp(min=1).to(total.dtype)


class LinformerForTokenClassification(LinformerPreTrainedModel):
    """One label per token."""

    def __init__(self, config: LinformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LinformerModel(config)
        self.score = nn.Linear(config.embed_dim, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """See :meth:`LinformerModel.forward`; ``labels`` [B, T], -100 is ignored."""
        kwargs.pop("use_cache", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, config=self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions or None
        )


def _keep_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The hidden states whose logits are wanted: the last n (0: all), positions [n] or [B, n], or a boolean [B, T]."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.dim() == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.gather(1, logits_to_keep[..., None].expand(-1, -1, hidden_states.shape[-1]))


# Trainer's label smoothing shifts the labels of the causal models that this dictionary names, and of no others.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("linformer", "LinformerForCausalLM")

LinformerConfig.register_for_auto_class()
LinformerModel.register_for_auto_class("AutoModel")
LinformerForCausalLM.register_for_auto_class("AutoModelForCausalLM")
LinformerForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
LinformerForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
LinformerForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
