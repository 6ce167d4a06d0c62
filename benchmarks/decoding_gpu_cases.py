"""Ways to decode one token after another behind a long context: a Linformer's, and those of a Llama of equal size.

Weights are random, in bfloat16. A Linformer's context is a real prefill of random ids, in pieces; a Llama's keys and
values are random numbers written into its caches, in the shapes of a real context. Every way but the first of a model
must give the logits of the first for the same tokens before it is timed.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from benchmarks.models_gpu_cases import Size, cache_bytes, config_for, parameters, uneven_rows
from benchmarks.race import Entrant, compiled
from linpass import LinformerCache
from linpass.training.architectures import build_model

PIECE = 2**18  # tokens of a prefill call
# A context ends so many tokens before its name says, so that a block of the Linformer ends among the checked tokens.
BEFORE, CHECKED = 8, 16
# Relative error of the logits behind the last checked token, between two ways in bfloat16. Rounding in another order
# gives a fifth of it; a cache that misses the last token gives more, one that stands still five times as much.
SAME_LOGITS = 0.025
# Fresh models hardly attend: their attention adds a hundredth to the residual stream, and a cache that stands still
# would not show in the logits. Values and outputs so many times as large make it the larger part.
LOUDER = 8.0
GRAPH_WARMUP = 3
UNEVEN = "rows of different lengths: linpass, compiled"  # from half of the context to all of it


class Models:
    """One Linformer and one Llama for all contexts: seq_length and k are those of the longest."""

    def __init__(
        self, size: Size, tokens: int, slots: int, block: int, window: int, device: torch.device, seed: int = 0
    ):
        torch.manual_seed(seed)
        self.config = config_for(size, tokens, slots, block, window_size=window)
        self.device = device
        with device:
            self.linformer: Any = self._ready("linformer")
            self.llama: Any = self._ready("llama")

    @torch.no_grad()
    def _ready(self, architecture: str) -> Any:
        model: Any = build_model(architecture, self.config).to(torch.bfloat16).eval()
        for layer in model.model.layers:
            attention = layer.attention if architecture == "linformer" else layer.self_attn
            attention.v_proj.weight *= LOUDER
            attention.o_proj.weight *= LOUDER
        model.generation_config.eos_token_id = None  # rows do not end
        return model

    @property
    def parameters(self) -> dict[str, int]:
        return {"linpass": parameters(self.linformer), "Llama": parameters(self.llama)}


class Situation:
    """A batch behind a context, and the tokens that all ways are checked with.

    Args:
        context: tokens that each row has seen, BEFORE more or less.
        tokens: decoded in one timed call.
        options: of torch.compile.
    """

    def __init__(self, models: Models, context: int, batch: int, tokens: int, options: dict):
        self.models, self.context, self.batch = models, context - BEFORE, batch
        self.tokens, self.options = tokens, options
        self.room = self.context + max(tokens, CHECKED) + BEFORE  # of a static cache
        torch.manual_seed(context + batch)
        size, device = (batch, CHECKED), models.device
        self.checked = torch.randint(models.config.vocab_size, size, device=device)
        self.truth: dict[str, Tensor] = {}

    def linformer_cache(self, is_compileable: bool = False, uneven: bool = False) -> LinformerCache:
        """The cache after the context, through the public API; the same ids every time.

        ``uneven``: of rows that hold from half of the context to all of it.
        """
        config, device = self.models.config, self.models.device
        generator = torch.Generator(device).manual_seed(0)
        cache, left = LinformerCache(config, is_compileable), self.context
        piece = max(1, PIECE // self.batch // config.block_size) * config.block_size
        keep = uneven_rows(self.batch, left).to(device) if uneven else None
        while left:
            size = (self.batch, min(piece, left))
            ids = torch.randint(config.vocab_size, size, generator=generator, device=device)
            left -= size[1]
            mask = None if keep is None else keep[:, : self.context - left]
            inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
            with torch.no_grad():
                self.models.linformer(**inputs, use_cache=True, logits_to_keep=1)
        return cache

    @cached_property
    def llama_dynamic(self) -> DynamicCache:
        self.refuse_without_room(copies=2)  # an old and a new one of a layer while it grows
        cache = DynamicCache(config=self.models.llama.config)
        for layer in range(self.models.config.depth):
            cache.update(*self._llama_states(layer), layer)
        return cache

    def llama_static(self) -> StaticCache:
        self.refuse_without_room(copies=1)
        config = self.models.config
        cache = StaticCache(config=self.models.llama.config, max_cache_len=self.room)
        cache.early_initialization(self.batch, config.heads, config.head_dim, torch.bfloat16, self.models.device)
        for number, layer in enumerate(cache.layers):
            key, value = self._llama_states(number)
            layer.keys[:, :, : self.context].copy_(key)  # pyright: ignore[reportOptionalSubscript]
            layer.values[:, :, : self.context].copy_(value)  # pyright: ignore[reportOptionalSubscript]
        rewind_static(cache, self.context)
        return cache

    def _llama_states(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [B, G, context, D], the same every time."""
        config, device = self.models.config, self.models.device
        generator = torch.Generator(device).manual_seed(layer)
        size = (self.batch, config.heads, self.context, config.head_dim)
        key, value = (torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2))
        return key, value

    def refuse_without_room(self, copies: int) -> None:
        """Say so before the device's memory is full."""
        if self.models.device.type != "cuda":
            return
        config = self.models.config
        layer = 4 * self.batch * config.heads * self.room * config.head_dim  # keys and values, two bytes a number
        needed = layer * (config.depth + copies)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if needed > 0.95 * free:
            raise torch.OutOfMemoryError(
                f"keys and values of {self.context:,} tokens x {self.batch} rows need {needed / 2**30:.0f} GiB; "
                f"{free / 2**30:.0f} GiB are free"
            )

    def check(self, model: str, decoder: "Decoder") -> float:
        """Relative error of the logits behind the checked tokens, beside the first way of this model.

        Raises:
            ValueError: they are others.
        """
        for token in range(CHECKED):
            decoder.ids.copy_(self.checked[:, token : token + 1])
            decoder.step()
        logits = decoder.logits.float()
        truth = self.truth.setdefault(model, logits.clone())
        error = ((logits - truth).norm() / truth.norm()).item()
        if not error < SAME_LOGITS:
            raise ValueError(
                f"its logits after {CHECKED} tokens are not those of the eager model: relative error {error:.2g}"
            )
        return error


@torch.no_grad()
def advance(model: Any, ids: Tensor, cache: Any, **mask: Tensor) -> Tensor:
    """Logits behind the last of ``ids``, [B, V]; the cache holds them from now on."""
    return model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **mask).logits[:, -1]


class Decoder:
    """Greedy decoding, token by token: ``ids`` [B, 1] in and out, ``logits`` [B, V] of the last step."""

    def __init__(self, model: Any, cache: Any, ids: Tensor):
        self.model, self.cache, self.ids = model, cache, ids.clone()
        self.mask: dict[str, Tensor] = {}
        self.logits = torch.empty(0)

    def step(self) -> None:
        self.logits = advance(self.model, self.ids, self.cache, **self.mask)
        self.ids.copy_(self.logits.argmax(-1, keepdim=True))

    def entrant(self, situation: Situation, model: str, rewind=lambda: None) -> Entrant:
        """Checked before it is timed."""
        error = situation.check(model, self)

        def call() -> None:
            for _ in range(situation.tokens):
                self.step()

        def facts() -> dict:
            return {"cache_bytes": cache_bytes(self.cache), "logits_error": float(f"{error:.1e}")}

        return Entrant(call, situation.batch, situation.tokens, facts, rewind)


class CompiledDecoder(Decoder):
    """The model in one graph."""

    def __init__(self, model: Any, cache: Any, ids: Tensor, options: dict):
        super().__init__(compiled(model, {"fullgraph": True} | options), cache, ids)

    def step(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        super().step()


class GraphDecoder(Decoder):
    """The eager step captured once in a CUDA graph, and replayed."""

    def __init__(self, model: Any, cache: Any, ids: Tensor):
        super().__init__(model, cache, ids)
        if ids.device.type != "cuda":
            raise ValueError("CUDA graphs need a CUDA device")
        self.graph: Any = None
        self.eager_steps = GRAPH_WARMUP

    def step(self) -> None:
        """Some eager steps on a stream of their own, as capturing wants; then the capture; then replays."""
        if self.graph is not None:
            self.graph.replay()
        elif self.eager_steps:
            self.eager_steps -= 1
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                super().step()
            torch.cuda.current_stream().wait_stream(side)
        else:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                super().step()
            self.graph.replay()


def linformer_way(situation: Situation, kind: type[Decoder], *options: dict) -> Entrant:
    """The context goes on growing from round to round; what a token costs grows with the slots in view alone."""
    cache = situation.linformer_cache(is_compileable=kind is CompiledDecoder)
    decoder = kind(situation.models.linformer, cache, situation.checked[:, :1], *options)
    return decoder.entrant(situation, "linpass")


def linformer_uneven(situation: Situation) -> Entrant:
    """Rows of different lengths in one compiled step, which must give what the eager step gives.

    With the mask of the new tokens, as ``generate`` gives it.
    """
    for kind, options in ((Decoder, ()), (CompiledDecoder, (situation.options,))):
        cache = situation.linformer_cache(kind is CompiledDecoder, uneven=True)
        decoder = kind(situation.models.linformer, cache, situation.checked[:, :1], *options)
        decoder.mask = {"attention_mask": torch.ones_like(decoder.ids)}
        entrant = decoder.entrant(situation, UNEVEN)
    return entrant


def llama_dynamic(situation: Situation) -> Entrant:
    cache = situation.llama_dynamic
    decoder = Decoder(situation.models.llama, cache, situation.checked[:, :1])
    return decoder.entrant(situation, "Llama", lambda: rewind_dynamic(cache, situation.context))


def llama_static(situation: Situation) -> Entrant:
    cache = situation.llama_static()
    ids = situation.checked[:, :1]
    decoder = CompiledDecoder(situation.models.llama, cache, ids, situation.options)
    return decoder.entrant(situation, "Llama", lambda: rewind_static(cache, situation.context))


def generate(situation: Situation, model: Any, cache: Any, rewind) -> Entrant:
    """``generate`` behind a cache: what a user's call costs, the loop of transformers included."""
    config, device = situation.models.config, situation.models.device
    prompt: list[Tensor] = []

    def prepare() -> None:
        rewind()
        size = (situation.batch, int(cache.get_seq_length()) + 1)
        prompt[:] = [torch.randint(config.vocab_size, size, device=device)]

    def call() -> None:
        mask = torch.ones_like(prompt[0])
        new = situation.tokens
        model.generate(prompt[0], attention_mask=mask, past_key_values=cache, max_new_tokens=new, do_sample=False)

    return Entrant(call, situation.batch, situation.tokens, lambda: {"cache_bytes": cache_bytes(cache)}, prepare)


def linformer_generate(situation: Situation, is_compileable: bool = False) -> Entrant:
    """Compiled by ``generate`` itself where the cache allows it, as ``cache_implementation="static"`` does."""
    return generate(situation, situation.models.linformer, situation.linformer_cache(is_compileable), lambda: None)


def llama_generate(situation: Situation) -> Entrant:
    cache = situation.llama_dynamic
    return generate(situation, situation.models.llama, cache, lambda: rewind_dynamic(cache, situation.context))


def rewind_dynamic(cache: DynamicCache, tokens: int) -> None:
    """Forget what was decoded; the context stays where it is in memory."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :tokens], layer.values[:, :, :tokens]


def rewind_static(cache: StaticCache, tokens: int) -> None:
    for layer in cache.layers:
        layer.cumulative_length.fill_(tokens)


# The first way of a model is what its others are checked against; and a Llama is compiled before a Linformer, whose
# versions, should its cache need one for each token, fill what there is room for (Rounds.versions).
WAYS = {
    "linpass, eager": lambda situation: linformer_way(situation, Decoder),
    "Llama, dynamic cache": llama_dynamic,
    "Llama, static cache, compiled": llama_static,
    "linpass, compiled": lambda situation: linformer_way(situation, CompiledDecoder, situation.options),
    "linpass, CUDA graph": lambda situation: linformer_way(situation, GraphDecoder),
    UNEVEN: linformer_uneven,
    "linpass, generate": linformer_generate,
    "linpass, generate, compiled": lambda situation: linformer_generate(situation, is_compileable=True),
    "Llama, generate": llama_generate,
}
