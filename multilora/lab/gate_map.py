"""What a gate does: the share of each LoRA per group of layers and step (of a picture) or token (of a text), as a map.

found = map_of_picture(pipe, loras, resolve("route", "mole", gate="gate.safetensors"), "a zib alien ...")
draw_map(found, title="zib_merlo_burgo").save("map.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from multilora.lab.chart import COLOURS, WIDTH, _canvas, _cut, _end, _font, _heading, _legend, _stacked, _text, _ticks
from multilora.lab.schedule_chart import _tint
from multilora.lab.sheet import GREY, INK, LINE, MARGIN
from multilora.lora import Lora
from multilora.method import Bound
from multilora.pipelines.composing import composing
from multilora.pipelines.text import TextComposer
from multilora.pipelines.text_load import is_seq2seq
from multilora.routing import Asked, mean_shares
from multilora.trace import Seen, by_step, traced

_LABEL = 300  # room for names of groups
_MOST_GROUPS = 80


@dataclass(frozen=True)
class GateMap:
    """The shares that a gate has given.

    names    [k] of the LoRAs; groups [g] of the layers that share an answer, in the order they ran
    shares   [n, g, k], n steps or tokens; nan where a group gave no answer
    columns  [n] what a column is: the number of its step, or its token
    axis     "step" or "token"
    made     the picture, or the text with its prompt
    prompt   how many of the columns are tokens of the prompt
    unread   the last token of a text, which was made and not read: no gate was asked about it
    """

    names: tuple[str, ...]
    groups: tuple[str, ...]
    shares: Tensor
    columns: tuple[str, ...]
    axis: str
    made: Any = None
    prompt: int = 0
    unread: str = ""

    @property
    def strongest(self) -> float:
        """Mean share of the LoRA that has most over all: 1 / k where a gate is balanced (arXiv 2404.13628: .68)."""
        return float(self.shares.nanmean((0, 1)).max())

    @property
    def sharpest(self) -> float:
        """Mean over groups and columns of the largest share there: how much gates decide, balanced or not."""
        return float(self.shares.max(-1).values.nanmean())


def map_of_picture(
    pipe: Any,
    loras: Sequence[Lora],
    bound: Bound,
    prompt: str,
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 3.0,
) -> GateMap:
    """Draw one picture and keep what the gate answers, the mean over the halves of guidance.

    Raises ValueError for a method that asks no gate.
    """
    watched, runs = traced(bound)
    own = pipe.scheduler
    pipe.scheduler = type(own).from_config(own.config)
    try:
        with composing(pipe, list(loras), watched, weights=weights):
            image = pipe(
                prompt, num_inference_steps=steps, guidance_scale=guidance,
                generator=torch.Generator().manual_seed(seed),
            ).images[0]  # fmt: skip
    finally:
        pipe.scheduler = own
    return map_of_runs(loras, bound, runs, image)


def map_of_runs(loras: Sequence[Lora], bound: Bound, runs: Sequence[Sequence[Seen]], image: Any = None) -> GateMap:
    """The map of a picture that was drawn by the first of `multilora.trace.traced(bound)`; runs is the second.

    Raises ValueError for a method that asks no gate.
    """
    seen = by_step(_drawn(runs, bound))
    rows = [dict(zip(a.shares, mean_shares(a.shares), strict=True)) for a in _asked(seen)]
    return _gathered(loras, rows, [str(one.step) for one in seen], "step", image)


def map_of_text(
    model: Any,
    tokenizer: Any,
    loras: Sequence[Lora],
    bound: Bound,
    prompt: str,
    *,
    weights: Sequence[Any] | None = None,
    max_new_tokens: int = 24,
    cancel: Any = None,
    **generate: Any,
) -> GateMap:
    """Answer a prompt and keep what the gate answers for every token that the model reads.

    generate  as of TextComposer: do_sample (default False), temperature, seed, ...

    LoRAs of weight 0 have no part. Raises ValueError for a method that asks no gate, weights that are all 0, an
    encoder-decoder, whose tokens are two texts, and what TextComposer refuses.
    """
    if is_seq2seq(model):
        raise ValueError("a gate's map is of one text; an encoder-decoder reads two")
    composer, read = TextComposer(model, tokenizer), _Read()
    composer.loras.clear()  # adapters that PEFT put on the model
    for lora, weight in zip(loras, weights or [None] * len(loras), strict=True):
        composer.add(lora, weight=weight)
    used = [member.lora for member in composer.loras.values() if not member.weight.is_zero]
    if not used:
        raise ValueError("no LoRA with a weight other than 0: no gate is asked")
    watched, runs = traced(bound)
    settings = {"do_sample": False, **generate, "max_new_tokens": max_new_tokens, "cancel": cancel}
    composer(prompt, watched, streamer=read, **settings)
    rows: list[dict[str, Tensor]] = []
    for call, asked in enumerate(_asked(_drawn(runs, bound))):
        for t in range(1 if call else read.prompt):
            rows.append({g: s[0, t] if s.ndim == 3 else s.reshape(-1, s.shape[-1])[0]
                         for g, s in asked.shares.items()})  # fmt: skip
    words, text = [tokenizer.decode([i]) for i in read.ids], tokenizer.decode(read.ids, skip_special_tokens=True)
    found = _gathered(used, rows, words[: len(rows)], "token", text)
    return replace(found, prompt=read.prompt, unread="".join(words[len(rows) :]))


class _Read:
    """A streamer of transformers: the ids of a text, and how many of them are its prompt's."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.prompt = 0

    def put(self, ids: Tensor) -> None:
        self.ids += ids.reshape(-1).tolist()
        self.prompt = self.prompt or len(self.ids)

    def end(self) -> None:
        """Nothing is kept back."""


def _drawn(runs: Sequence[Sequence[Seen]], bound: Bound) -> list[Seen]:
    """The run whose gates were asked; others were only planned, to know how strong the LoRAs are together."""
    for run in runs:
        rows = [p.row for one in run for p in one.passes]
        if all(isinstance(row, Asked) for row in rows) and any(row.shares for row in rows):
            return list(run)
    raise ValueError(f"method {bound.record.name} asks no gate; maps are of mole, arrow and other gated methods")


def _asked(seen: Sequence[Seen]) -> list[Asked]:
    return [p.row for one in seen for p in one.passes]


def _gathered(loras: Any, rows: list[dict[str, Tensor]], columns: Sequence[str], axis: str, made: Any) -> GateMap:
    names = [lora.card.name or f"LoRA {i + 1}" for i, lora in enumerate(loras)]
    groups = list(dict.fromkeys(group for row in rows for group in row))
    none = torch.full((len(names),), float("nan"))
    shares = torch.stack([torch.stack([row[g].float().cpu() if g in row else none for g in groups]) for row in rows])
    return GateMap(tuple(names), tuple(groups), shares.detach(), tuple(columns), axis, made)


def draw_map(found: GateMap, *, title: str, subtitle: str = "") -> Image.Image:
    """One RGB picture of chart.WIDTH pixels and any height: for each LoRA groups down, steps or tokens across."""
    words = f"Colour: share of the LoRA, from none to all; mean of the strongest LoRA {found.strongest:.2f}, of the "
    words += f"largest share in each place {found.sharpest:.2f}"
    parts = [_heading(title, 30), *([_text(subtitle)] if subtitle else []), _legend(found.names), _text(words)]
    for i, name in enumerate(found.names):
        mean = float(found.shares[..., i].nanmean())
        parts += [_heading(f"{name}: {mean:.2f} on the whole"), _panel(found, i)]
    if len(found.groups) > _MOST_GROUPS:
        parts.append(_text(f"The first {_MOST_GROUPS} of {len(found.groups)} groups of layers."))
    return _stacked(parts)


def _panel(found: GateMap, i: int) -> Image.Image:
    groups, values = found.groups[:_MOST_GROUPS], found.shares[..., i].tolist()
    font, high, n = _font(15), 18, len(values)
    left, bottom = MARGIN + _LABEL, high * len(groups)
    wide = (WIDTH - MARGIN - left) / n
    picture, draw = _canvas(bottom + 62)
    for r, group in enumerate(groups):
        y, name = high * r, _end(group or "all layers", font, _LABEL - 10)
        draw.text((MARGIN, y + high / 2), name, font=font, fill=INK, anchor="lm")
        for c in range(n):
            x, share = left + wide * c, values[c][r]
            if share == share and share > 0:  # not nan
                box = (round(x), y + 1, max(round(x), round(x + wide) - 1), y + high - 1)
                draw.rectangle(box, fill=_tint(COLOURS[i % len(COLOURS)], min(1.0, share)))
        draw.line((left, y + high, WIDTH - MARGIN, y + high), fill=LINE)
    spelled = found.axis == "token" and wide >= 14
    for c in range(n) if spelled else [t for t in _ticks(max(1, n - 1)) if t < n]:
        word = found.columns[c] if found.axis == "step" else found.columns[c].strip() or "·" if spelled else str(c)
        at = (left + wide * (c + 0.5), bottom + 6)
        draw.text(at, _cut(word, font, wide) if spelled else word, font=font, fill=GREY, anchor="mt")
    draw.text(((left + WIDTH - MARGIN) / 2, bottom + 30), found.axis, font=font, fill=GREY, anchor="mt")
    return picture
