"""The base model's own small tokenizer and text encoder."""

import json
import re
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from multilora.lab.world.caption import caption
from multilora.lab.world.designs import DESIGNS
from multilora.lab.world.scene import sample_scene

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def _words(settings):
    """Every word of many captions, and of every trigger, with its count."""
    counts = Counter()
    for i in range(4000):
        counts.update(re.findall(r"[a-z]+", caption(sample_scene(settings.held_out_seed + 200_000 + i))))
    for word in " ".join(design.trigger for design in DESIGNS.values()).split():
        counts[word] += 1
    return counts


def write_tokenizer(folder, settings):
    """Write a byte-level BPE in CLIP's files (vocab.json, merges.txt) in which every caption word is one token."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    counts = _words(settings)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix=WORD_END, unk_token=END))
    trainer = trainers.BpeTrainer(
        vocab_size=20_000, min_frequency=1, end_of_word_suffix=WORD_END, show_progress=False, special_tokens=[]
    )
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    learner.train_from_iterator([" ".join(sorted(counts))], trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in merges]
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
