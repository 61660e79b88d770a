"""Losses of a pipeline's predictions that are differentiable in the weights: on reference pictures, or on none.

Both compare predictions at fixed noisy latents, drawn once: every call sees the same, so two calls differ by the
weights alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multilora.chosen import Row
from multilora.lab.objectives import gradients, weighed
from multilora.lab.train.cache import latents_of
from multilora.lab.train.data import Example, read_folder
from multilora.lab.train.lora import native_size
from multilora.lab.train.loss import Family, family_of_pipeline
from multilora.lab.train.observed import self_drawn
from multilora.lab.train.seeds import mixed_seed
from multilora.lora import Lora
from multilora.pipelines.composing import composing
from multilora.pipelines.lanes import lane


@dataclass(frozen=True)
class Case:
    """A prediction that is asked for: noisy latents and target [c, h, w], what the denoiser is told, the caption."""

    noisy: Tensor
    time: Tensor
    caption: str
    target: Tensor


class Matched:
    """Mean squared difference of the predictions from the targets of some cases."""

    def __init__(self, pipe: Any, family: Family, cases: Sequence[Case], name: str, batch: int = 8) -> None:
        self.pipe, self.family, self.cases, self.name, self.batch = pipe, family, list(cases), name, batch

    def __call__(self, loras: Sequence[Lora], rows: Sequence[Row]) -> list[Any]:
        learning = gradients(rows)
        found = []
        with lane(getattr(self.pipe, self.family.denoiser)), weighed(_models(self.pipe, self.family), loras) as put:
            for row in rows:
                put(row)
                total: Any = 0.0
                with torch.enable_grad() if learning else torch.no_grad():
                    for first in range(0, len(self.cases), self.batch):
                        part = self.cases[first : first + self.batch]
                        wanted = torch.stack([case.target for case in part])
                        errors = (_predicted(self.pipe, self.family, part) - wanted).square().flatten(1).mean(1)
                        total = total + errors.sum()
                found.append(total / len(self.cases))
        return found if learning else [float(value) for value in found]


def reference_loss(
    pipe: Any, data: str | Path, *, draws: int = 4, size: int | None = None, seed: int = 0, batch: int = 8
) -> Matched:
    """The training loss on a few pictures with captions (a folder as `multilora train` reads it).

    draws: noise levels per picture. Raises BadData (a ValueError) naming bad files; ValueError for a pipeline that
    LoRAs cannot be trained for.
    """
    family = family_of_pipeline(pipe)
    size = size or native_size(pipe, family)
    examples: list[Example] = read_folder(data, size=size)
    latents = latents_of(pipe, family, examples, size).mean
    return Matched(pipe, family, _noised(pipe, family, latents, [e.caption for e in examples], draws, seed),
                   "training loss", batch)  # fmt: skip


def own_predictions(
    pipe: Any,
    loras: Sequence[Lora],
    prompts: Sequence[Sequence[str]],
    *,
    draws: int = 4,
    steps: int = 12,
    size: int | None = None,
    seed: int = 0,
    batch: int = 8,
) -> Matched:
    """How far the composed model is from each LoRA alone on its own prompts: no pictures are needed.

    prompts  [loras] the prompts of each
    draws    noise levels per prompt
    steps    of the picture that the LoRA alone draws for a prompt, whose noised latents are the inputs

    The target is the prediction of LoRA i alone at weight 1 (the first term of ZipLoRA's objective, arXiv 2311.13600,
    equation 3). Raises ValueError when a LoRA has no prompt.
    """
    family = family_of_pipeline(pipe)
    texts = [prompts] if isinstance(prompts, str) else [own for own in prompts if isinstance(own, str)]
    if texts:
        raise ValueError(f"own predictions: wanted a list of prompts for each LoRA, got the text {texts[0]!r}")
    if len(prompts) != len(loras) or not all(own and all(map(str.strip, own)) for own in prompts):
        raise ValueError(f"own predictions: prompts for {sum(map(bool, prompts))} of {len(loras)} LoRAs, wanted all")
    size, cases = size or native_size(pipe, family), []
    for i, (lora, own) in enumerate(zip(loras, prompts, strict=True)):
        with _rested(pipe), composing(pipe, [lora]):
            latents, captions = self_drawn(pipe, family, own, len(own), steps, size, mixed_seed(seed, i))
        found = _noised(pipe, family, latents, captions, draws, mixed_seed(seed, i, "noise"))
        with torch.no_grad(), weighed(_models(pipe, family), [lora]) as put:
            put([1.0])
            for first in range(0, len(found), batch):
                part = found[first : first + batch]
                for case, target in zip(part, _predicted(pipe, family, part), strict=True):
                    cases.append(Case(case.noisy, case.time, case.caption, target))
    return Matched(pipe, family, cases, "own predictions", batch)


def _noised(pipe: Any, family: Family, latents: Tensor, captions: Sequence[str], draws: int, seed: int) -> list[Case]:
    """`draws` cases of each picture's latents [n, c, h, w], their noise levels spread evenly (stratified)."""
    loss, denoiser = family.loss(pipe), next(getattr(pipe, family.denoiser).parameters())
    cases = []
    for i, caption in enumerate(captions):
        generator = torch.Generator().manual_seed(mixed_seed(seed, "case", i))
        u = torch.rand(draws, 2, generator=generator)
        u[:, 1] = (torch.arange(draws) + u[:, 1]) / draws
        noise = torch.randn(draws, *latents.shape[1:], generator=generator).to(denoiser.device)
        x = latents[i : i + 1].to(denoiser.device).expand_as(noise)
        t = loss.draw(u, 0.0).to(denoiser.device)
        noisy, time, target = loss.noisy(x, noise, t), loss.time(t), loss.target(x, noise, t)
        cases += [Case(noisy[d].to(denoiser.dtype), time[d], caption, target[d].float()) for d in range(draws)]
    return cases


def _predicted(pipe: Any, family: Family, cases: Sequence[Case]) -> Tensor:
    noisy = torch.stack([case.noisy for case in cases])
    text = family.text(pipe, [case.caption for case in cases])
    text = {key: value.to(noisy.device, noisy.dtype) for key, value in text.items()}
    return family.predict(pipe, noisy, torch.stack([case.time for case in cases]), text).float()


def _models(pipe: Any, family: Family) -> dict[str | None, Any]:
    return {name: getattr(pipe, name) for name in (*family.encoders, family.denoiser) if getattr(pipe, name, None)}


@contextlib.contextmanager
def _rested(pipe: Any) -> Any:
    """A fresh scheduler for a block."""
    own = pipe.scheduler
    pipe.scheduler = type(own).from_config(own.config)
    try:
        yield
    finally:
        pipe.scheduler = own
