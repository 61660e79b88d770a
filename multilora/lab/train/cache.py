"""What a training keeps in memory: latents, text encodings, and the prior's pictures."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from multilora.lab.train.data import Example, class_caption, pixels, read_folder
from multilora.lab.train.loss import Family, Text

CHUNK = 8


@dataclass(frozen=True)
class Latents:
    """Mean and deviation [n, c, h, w] of each picture's latents; deviation None where the encoder gives one point."""

    mean: torch.Tensor
    deviation: torch.Tensor | None


@dataclass(frozen=True)
class Store:
    """A data set ready for training. texts: caption -> encoding tensors [...], or None when encoders are trained."""

    latents: Latents
    captions: list[str]
    texts: dict[str, Text] | None

    def __len__(self) -> int:
        return len(self.captions)


@torch.no_grad()
def latents_of(pipe: Any, family: Family, examples: Sequence[Example], size: int) -> Latents | None:
    """Encode every picture once, in the autoencoder's own precision (float32 where its configuration asks for it)."""
    if not examples:
        return None
    vae = pipe.vae
    before = vae.dtype
    upcast = bool(getattr(vae.config, "force_upcast", False)) and before != torch.float32
    if upcast:
        vae.to(torch.float32)
    shift = (getattr(vae.config, "shift_factor", None) or 0.0) if family.shifted else 0.0
    means, deviations = [], []
    for first in range(0, len(examples), CHUNK):
        x = torch.stack([pixels(e.picture, size) for e in examples[first : first + CHUNK]])
        found = vae.encode(x.to(vae.device, vae.dtype))
        if hasattr(found, "latent_dist"):
            means.append(found.latent_dist.mean.float())
            deviations.append(found.latent_dist.std.float() * vae.config.scaling_factor)
        else:
            means.append(found.latents.float())
        means[-1] = (means[-1] - shift) * vae.config.scaling_factor
    if upcast:
        vae.to(before)
    return Latents(torch.cat(means), torch.cat(deviations) if deviations else None)


@torch.no_grad()
def encode_texts(pipe: Any, family: Family, captions: Sequence[str]) -> dict[str, Text]:
    """Encode every distinct caption, and the empty one, once."""
    wanted = sorted({"", *captions})
    found: dict[str, Text] = {}
    for first in range(0, len(wanted), CHUNK):
        part = wanted[first : first + CHUNK]
        encoded = family.text(pipe, part)
        found |= {caption: {k: v[i] for k, v in encoded.items()} for i, caption in enumerate(part)}
    return found


def prior_examples(
    prior: str | Path | None,
    examples: Sequence[Example],
    pipe: Any,
    out: Path,
    trigger: str | None,
    count: int | None,
    size: int,
    seed: int,
    say: Callable[[str], None],
) -> list[Example]:
    """Pictures of the plain class: a folder's, or, for "generate", drawn by the base into `<out>.prior`, kept there.

    The prompts of generated pictures are the training captions without the trigger's name.
    """
    if prior is None:
        return []
    if str(prior) != "generate":
        return read_folder(prior, size=size)
    if not trigger:
        raise ValueError('prior="generate" needs a trigger (a name and a class word) to know the plain class')
    folder = out.with_name(out.stem + ".prior")
    count = count or len(examples)
    prompts = [class_caption(examples[i % len(examples)].caption, trigger) for i in range(count)]
    names = [f"{i:04d}" for i in range(count)]
    if [folder / f"{n}.txt" for n in names if not (folder / f"{n}.txt").is_file()]:
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for first in range(0, count, 4):
            part = prompts[first : first + 4]
            generators = [torch.Generator().manual_seed(seed * 1_000_003 + first + i) for i in range(len(part))]
            pictures = pipe(part, generator=generators, height=size, width=size, num_inference_steps=25).images
            for name, prompt, picture in zip(names[first:], part, pictures, strict=False):
                picture.save(temporary / f"{name}.png")
                (temporary / f"{name}.txt").write_text(prompt, encoding="utf-8")
            say(f"prior pictures: {first + len(part)}/{count}")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    return read_folder(folder, size=size)[:count]
