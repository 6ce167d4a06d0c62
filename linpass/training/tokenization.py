"""The tokenizer of a run: trained on its text, or loaded; with a mask token where the objective needs one."""

import hashlib
import json
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from linpass.errors import InputError

END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"


def train_tokenizer(documents: Iterable[str], vocab_size: int, mask: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE with at most ``vocab_size`` ids, in which every text can be written.

    One special token, ``<|endoftext|>``, opens, ends and pads; ``mask`` adds ``<|mask|>``. Padding goes left, where
    generation needs it.

    Raises:
        InputError: ``vocab_size`` has no room for the 256 bytes and the special token.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END_OF_TEXT, MASK] if mask else [END_OF_TEXT]
    least = len(alphabet) + len(special)
    if vocab_size < least:
        raise InputError(f"vocab_size={vocab_size} must be at least {least} to train a byte-level tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        mask_token=MASK if mask else None,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],  # the model takes no token_type_ids
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str, vocab_size: int, mask: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or the Hub that fits a model of ``vocab_size`` ids.

    Args:
        mask: give it a mask token, ``<|mask|>``, where it has none; it may be the one id more than ``vocab_size``.

    Raises:
        InputError: it cannot be loaded, has no end-of-text token, or has more ids than the model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"tokenizer={name!r} could not be loaded: {error}") from error
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token  # of a masked-language-model's tokenizer
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer={name!r} must have an eos_token, which separates the documents")
    ids = 1 + max(tokenizer.get_vocab().values())
    if ids > vocab_size:
        raise InputError(f"vocab_size={vocab_size} must be at least {ids}, the ids of tokenizer={name!r}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if mask and tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short text that is another one when some text would get other ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else _rules(backend)
    text = f"{type(tokenizer).__name__} eos={tokenizer.eos_token_id} {rules}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def _rules(backend: Tokenizer) -> str:
    # Truncation and padding are of the last call, not of the tokenizer.
    rules = json.loads(backend.to_str())
    return json.dumps({key: value for key, value in rules.items() if key not in ("truncation", "padding")})
