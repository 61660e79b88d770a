"""Small language models with seeded random weights, a tokenizer of characters for them, and random LoRAs."""

from __future__ import annotations

import functools
import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from multilora.lora import Card, Lora
from tests import tiny, tiny_more
from tests.tiny import seeded

ALPHABET = string.ascii_lowercase + " +=0123456"
FAMILIES = ("llama", "qwen2", "t5")


@functools.cache
def tokenizer(seq2seq: bool = False) -> PreTrainedTokenizerFast:
    """40 tokens at most: padding, end, unknown and one per character; an encoder-decoder's ends every text."""
    words = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *ALPHABET])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    if seq2seq:
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@functools.cache
def t5() -> T5ForConditionalGeneration:
    """Two encoder and two decoder layers of width 16 with two heads; no dropout."""
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
                      decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)  # fmt: skip
    return seeded(T5ForConditionalGeneration(config), 3)


def model(family: str):
    """The model of a family, the same object each time; whoever changes its weights takes a copy."""
    return t5() if family == "t5" else getattr(tiny_more, family)()


def loras(family: str, k: int, strength: float = 2.0, rank: int = 3) -> list[Lora]:
    """k LoRAs of ranks rank, rank + 1, ... on all attention and feed-forward linears, each with a large effect."""
    ends = {"t5": (".q", ".k", ".v", ".o", ".wi", ".wo")}.get(family, ("_proj",))
    made = [tiny.lora_for(model(family), rank + i, seed=i, strength=strength, modules=ends) for i in range(k)]
    return [Lora(dict(lora), Card(name=f"{family}{i}")) for i, lora in enumerate(made)]
