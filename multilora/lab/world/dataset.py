"""Renders the base's scenes to latents and token numbers on disk, in several processes."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPTokenizer

from multilora.lab.world import autoencoder
from multilora.lab.world.caption import caption
from multilora.lab.world.scene import labels, sample_scene
from multilora.lab.world.text import encode_texts, write_tokenizer


def _shard(job):
    """Write one shard: latents [n, c, h, w] float16, tokens [n, captions, length] int16, captions and labels."""
    folder, index, settings = job
    torch.set_num_threads(1)
    path = folder / f"shard{index:04d}.npz"
    if path.exists():
        return index
    model = autoencoder.build(settings)
    autoencoder.write_encoder(model, autoencoder.fit(folder.parent, settings))
    tokenizer = CLIPTokenizer.from_pretrained(folder.parent / "tokenizer")
    first = settings.scene_seed + index * settings.shard
    seeds = range(first, first + min(settings.shard, settings.scenes - index * settings.shard))
    latents, texts, notes = [], [], []
    for start in range(0, len(seeds), 50):
        part = seeds[start : start + 50]
        pictures = torch.from_numpy(autoencoder.pictures_of(part, settings.size)).float() / 255
        with torch.no_grad():
            latents.append(model.encode(pictures * 2 - 1).latents.half().numpy())
        for seed in part:
            scene = sample_scene(seed)
            texts.extend(caption(scene, i) for i in range(settings.captions_each))
            notes.append(json.dumps({"seed": seed, "captions": texts[-settings.captions_each :], **labels(scene)}))
    tokens = encode_texts(tokenizer, texts, settings.tokens).numpy().astype(np.int16)
    tokens = tokens.reshape(len(seeds), settings.captions_each, settings.tokens)
    path.with_suffix(".jsonl").write_text("\n".join(notes) + "\n")
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, latents=np.concatenate(latents), tokens=tokens)
    temporary.rename(path)
    return index


def draw_dataset(out, settings, echo=print):
    """Stage: write `out`/data/shardNNNN.npz (+ .jsonl with captions and labels). Existing shards are kept."""
    folder = Path(out) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    autoencoder.fit(out, settings, echo)
    write_tokenizer(Path(out) / "tokenizer", settings)
    count = -(-settings.scenes // settings.shard)
    jobs = [(folder, index, settings) for index in range(count)]
    with multiprocessing.get_context("spawn").Pool(settings.processes) as pool:
        for done, _ in enumerate(pool.imap_unordered(_shard, jobs), 1):
            echo(f"data: {done} of {count} shards")


def load_dataset(out):
    """All shards: latents float16 [n, c, h, w], tokens int16 [n, captions, length]."""
    paths = [path for path in sorted((Path(out) / "data").glob("shard*.npz")) if ".tmp" not in path.name]
    if not paths:
        raise FileNotFoundError(f"{out}/data has no shards: run the stage 'data' first")
    shards = [np.load(path) for path in paths]
    return tuple(torch.from_numpy(np.concatenate([s[key] for s in shards])) for key in ("latents", "tokens"))
