"""ZipLoRA: LoRAs as one, every column of their updates weighted by a trained number (arXiv 2311.13600).

    from multilora.lab.train.ziplora import train
    train(["zib", "inka"], "embedded", "both.safetensors")

The update of a layer is sum_i delta_i diag(m_i), m_i [in] (of a convolution a number per input channel): of the rank
of the LoRAs' sum, which it is at first, when every m_i is 1. The loss is the paper's equation 3: how far the model
with all LoRAs is from the model with each alone, on that one's own prompts, plus `similarity` times what the m_i of
two LoRAs have in common in a layer. The paper writes |m_i . m_j|, summed over the layers; here it is the mean over
columns, layers and pairs, so that one `similarity` does for wide and narrow models; it is far below the paper's at the
same number. The distance is the mean squared one. The paper has two LoRAs; any number works.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multilora import files
from multilora.lab.objectives_denoising import Matched, own_predictions
from multilora.lab.search import own_prompts
from multilora.lab.train.gates import read_set
from multilora.lab.train.lora import Trained
from multilora.lora import Lora, LowRank
from multilora.pipelines.denoise import Cancelled
from multilora.pipelines.load import load_pipeline
from multilora.writing import _not_an_input, rendered

Columns = list[dict[str, Tensor]]  # of each LoRA: key -> m [in]
PROMPTS = 2  # of each LoRA, where none are given


def columns_of(loras: Sequence[Lora]) -> Columns:
    """Ones for every layer that has columns to weigh; embeddings, norms and whole differences stay as they are."""
    return [
        {k: torch.ones(p.down.shape[1]) for k, p in one.items() if isinstance(p, LowRank) and p.kind != "embedding"}
        for one in loras
    ]


def weighted(lora: Lora, columns: Mapping[str, Tensor]) -> Lora:
    """The LoRA with delta diag(m) for its deltas: exact, on `down` alone."""

    def part(key: str, own: Any) -> Any:
        if key not in columns:
            return own
        m = columns[key].to(own.down.device).reshape(1, -1, *[1] * (own.down.ndim - 2))
        return dataclasses.replace(own, down=own.down.to(torch.promote_types(own.down.dtype, m.dtype)) * m)

    return Lora({key: part(key, own) for key, own in lora.items()}, lora.card)


def in_common(columns: Columns) -> Tensor:
    """[] mean over layers and pairs of LoRAs of |m_i . m_j| / in; 0 where no layer has two LoRAs."""
    found = [
        (a[key] * b[key]).mean().abs()
        for a, b in combinations(columns, 2)
        for key in a
        if key in b and a[key].shape == b[key].shape
    ]
    return torch.stack(found).mean() if found else torch.zeros(())


def zipped(loras: Sequence[Lora], columns: Columns) -> Lora:
    """One LoRA: the sum of the weighted ones."""
    each = [weighted(lora, own) for lora, own in zip(loras, columns, strict=True)]
    return sum(each[1:], each[0])


def train(
    loras: Sequence[Any],
    base: Any = "embedded",
    out: str | Path = "zipped.safetensors",
    *,
    prompts: Sequence[Sequence[str]] | None = None,
    steps: int = 100,
    lr: float = 0.01,
    similarity: float = 0.01,
    draws: int = 4,
    batch: int = 8,
    size: int | None = None,
    seed: int = 0,
    echo: Callable[[str], None] | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    cancel: Any = None,
) -> Trained:
    """Train the columns' numbers, and write LoRAs and numbers as one LoRA to `out`.

    loras       paths, library names or Loras, at least two; they stay as they are
    base        "embedded", a folder or a hub id of a pipeline, or one that is loaded, which is left as it was
    prompts     [loras] each one's own; by default scenes of the embedded world, else its trigger words
    similarity  the paper's lambda, of the mean above
    draws       noise levels of each prompt; every step sees all of them, `batch` at a time

    Raises ValueError for fewer than two LoRAs, a setting out of range, a LoRA without a prompt, a sum that no format
    of one file can hold, an `out` that is one of the LoRAs (all of these before anything is trained), or a loss that
    is not finite (with step and learning rate); Cancelled when `cancel` is set. Then nothing is written.
    """
    out, began, say = Path(out).expanduser(), time.monotonic(), echo or (lambda line: None)
    _check(len(loras), out, steps=(steps, 1, 10**6), lr=(lr, 0, 1), similarity=(similarity, 0, 1e6),
           draws=(draws, 1, 1000), batch=(batch, 1, 4096))  # fmt: skip
    pipe = load_pipeline(str(base)) if isinstance(base, (str, Path)) else base
    with torch.inference_mode(False), _still(pipe):
        found, entries = read_set(loras, pipe)
        columns = columns_of(found)
        numbers = [m.requires_grad_() for one in columns for m in one.values()]
        if not numbers:
            raise ValueError("ziplora: none of the LoRAs has a low-rank layer, so there are no columns to weigh")
        format = _format(zipped(found, _held(columns)), out)
        prompts = _prompts(found, entries) if prompts is None else prompts
        loss = own_predictions(pipe, found, prompts, draws=draws, size=size, seed=seed, batch=batch)
        wide = sum(m.numel() for m in numbers)
        say(f"{len(found)} LoRAs, {wide:,} columns; {len(loss.cases)} predictions of one LoRA")
        optimiser, losses = torch.optim.AdamW(numbers, lr=lr, weight_decay=0.0), []
        for step in range(steps):
            if cancel is not None and cancel.is_set():
                raise Cancelled(f"cancelled after {step} of {steps} steps; nothing is written")
            error, common = _gradients(loss, found, columns, numbers, similarity)
            losses.append(error + similarity * common)
            if not math.isfinite(losses[-1]):
                raise ValueError(f"ziplora: the loss is {losses[-1]} at step {step} with lr={lr:g}: try a tenth of "
                                 "the learning rate, or float32")  # fmt: skip
            optimiser.step()
            if progress is not None:
                progress(step + 1, steps, {"loss": losses[-1], "error": error, "common": common})
        options = {"steps": steps, "lr": lr, "similarity": similarity, "draws": draws, "size": size, "seed": seed}
        made = {"ziplora": options | {"prompts": [list(own) for own in prompts]}}
        files.save(zipped(found, _held(columns)), out, format=format, metadata=made)
    seconds = time.monotonic() - began
    say(f"wrote {out} after {seconds:.0f} s; loss {losses[0]:.4g} to {losses[-1]:.4g}")
    return Trained(out, steps, tuple(losses), len({key for one in columns for key in one}), seconds)


def _gradients(
    loss: Matched, loras: Sequence[Lora], columns: Columns, numbers: Sequence[Tensor], similarity: float
) -> tuple[float, float]:
    """(error, what is in common); the numbers get their gradients, one batch of predictions in memory at a time."""
    error, row, numbers = 0.0, torch.ones(len(loras)), list(numbers)
    for number in numbers:
        number.grad = None
    with torch.enable_grad():
        common = in_common(columns)
        if common.requires_grad:
            (similarity * common).backward(inputs=numbers)
        for first in range(0, len(loss.cases), loss.batch):
            cases = loss.cases[first : first + loss.batch]
            each = [weighted(lora, own) for lora, own in zip(loras, columns, strict=True)]
            part = Matched(loss.pipe, loss.family, cases, loss.name, loss.batch)(each, [row])[0]
            part = part * (len(cases) / len(loss.cases))
            part.backward(inputs=numbers)
            error += float(part.detach())
    return error, float(common.detach())


def _held(columns: Columns) -> Columns:
    return [{key: m.detach() for key, m in one.items()} for one in columns]


@contextlib.contextmanager
def _still(pipe: Any) -> Iterator[None]:
    """No gradient for the pipeline's own weights: graphs need not keep what only these would."""
    models = [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
    learning = [p for model in models for p in model.parameters() if p.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _format(lora: Lora, out: Path) -> str:
    """The first format of one file that can hold the LoRA, before any work: raises as `save` would."""
    for format in ("diffusers", "kohya"):
        try:
            ready = rendered(lora, out, format=format)
            break
        except ValueError:
            if format == "kohya":
                raise
    for file in ready:
        _not_an_input(lora, file)
    return format


def _prompts(loras: Sequence[Lora], entries: Sequence[Any]) -> list[list[str]]:
    for lora, entry in zip(loras, entries, strict=True):
        if entry is None and not lora.card.triggers:
            raise ValueError(f"LoRA {lora.card.name!r} has no trigger words on its card: give prompts, some for each "
                             "LoRA, that it is to be seen in")  # fmt: skip
    return own_prompts(entries, loras, PROMPTS)


def _check(count: int, out: Path, **settings: tuple[float, float, float]) -> None:
    if count < 2:
        raise ValueError(f"ziplora: {count} LoRAs, wanted at least two")
    if out.suffix != ".safetensors" or out.is_dir():
        raise ValueError(f"out={str(out)!r}: a LoRA is a .safetensors file")
    for name, (value, low, high) in settings.items():
        whole = isinstance(value, int) or name in ("lr", "similarity")
        if not (whole and low <= value <= high and math.isfinite(value)):
            raise ValueError(f"{name}={value!r}: wanted {'' if name in ('lr', 'similarity') else 'a whole number, '}"
                             f"{low} to {high}")  # fmt: skip
