"""The base model's own small tokenizer and text encoder."""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from multilora.lab.world.caption import caption
from multilora.lab.world.designs import DESIGNS
from multilora.lab.world.scene import sample_scene

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def _words(settings):
    """Every word of many captions, and of every trigger, in the alphabet's order."""
    texts = [caption(sample_scene(settings.held_out_seed + 200_000 + i)) for i in range(4000)]
    texts += [design.trigger for design in DESIGNS.values()]
    return sorted({word for text in texts for word in re.findall(r"[a-z]+", text)})


def _merges(words):
    """BPE merges until every word is one token: the most frequent pair first, of equals the first in the alphabet.

    Not `tokenizers`' trainer: with equal counts its order changes from run to run, and with it the token numbers.
    """
    spelled = [[*word[:-1], word[-1] + WORD_END] for word in words]
    merges = []
    while pairs := Counter(pair for word in spelled for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in spelled:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = ["".join(best)]
                at += 1
    return merges


def write_tokenizer(folder, settings):
    """Write a byte-level BPE in CLIP's files (vocab.json, merges.txt) in which every caption word is one token."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(_words(settings))
    tokens = letters + [letter + WORD_END for letter in letters] + ["".join(pair) for pair in merges]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    for token in (START, END):
        vocab[token] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2"] + [" ".join(pair) for pair in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": settings.tokens,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
        "add_prefix_space": False,
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    special = {name: config[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    return CLIPTokenizer.from_pretrained(folder)


def encode_texts(tokenizer, texts, length):
    """Texts -> int64 [n, length], padded and cut."""
    found = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return found.input_ids


def build_text_encoder(tokenizer, settings):
    """An untrained `CLIPTextModel`; its hidden states [n, tokens, width] feed the U-Net's cross-attention."""
    torch.manual_seed(settings.seed + 1)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.text_width,
            intermediate_size=4 * settings.text_width,
            projection_dim=settings.text_width,
            num_hidden_layers=settings.text_layers,
            num_attention_heads=settings.text_heads,
            max_position_embeddings=settings.tokens,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
