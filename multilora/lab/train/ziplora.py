"""ZipLoRA: LoRAs as one, every column of their updates weighted by a trained number (arXiv 2311.13600).

    from multilora.lab.train.ziplora import train
    train(["zib", "inka"], "embedded", "both.safetensors")

The update of a layer is sum_i delta_i diag(m_i), m_i [in] (of a convolution a number per input channel): of the rank
of the LoRAs' sum, which it is at first, when every m_i is 1. The loss is the paper's equation 4: how far the model
with all LoRAs is from the model with each alone, on that one's own prompts, plus `similarity` times what the m_i of
two LoRAs have in common in a layer. The paper writes |m_i . m_j|, summed over the layers; here it is the mean over
columns, layers and pairs, so that one `similarity` does for wide and narrow models. The paper has two LoRAs; any
number works.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multilora import files
from multilora.lab.objectives_denoising import own_predictions
from multilora.lab.search import own_prompts
from multilora.lab.train.gates import read_set
from multilora.lab.train.lora import Trained
from multilora.lora import Lora, LowRank
from multilora.pipelines.denoise import Cancelled
from multilora.pipelines.load import load_pipeline

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
    similarity  the paper's lambda
    draws       noise levels of each prompt; every step sees all of them

    Raises ValueError for fewer than two LoRAs, a setting out of range, a LoRA without a prompt or a loss that is not
    finite (with step and learning rate); Cancelled when `cancel` is set. Then nothing is written.
    """
    out, began, say = Path(out).expanduser(), time.monotonic(), echo or (lambda line: None)
    _check(len(loras), out, steps=(steps, 1, 10**6), lr=(lr, 0, 1), similarity=(similarity, 0, 1e6),
           draws=(draws, 1, 1000))  # fmt: skip
    pipe = load_pipeline(str(base)) if isinstance(base, (str, Path)) else base
    found, entries = read_set(loras, pipe)
    if prompts is None:
        for lora, entry in zip(found, entries, strict=True):
            if entry is None and not lora.card.triggers:
                raise ValueError(f"LoRA {lora.card.name!r} has no trigger words on its card: give prompts, some for "
                                 "each LoRA, that it is to be seen in")  # fmt: skip
        prompts = own_prompts(entries, found, PROMPTS)
    loss = own_predictions(pipe, found, prompts, draws=draws, size=size, seed=seed)
    columns = columns_of(found)
    numbers = [m.requires_grad_() for one in columns for m in one.values()]
    if not numbers:
        raise ValueError("ziplora: none of the LoRAs has a low-rank layer, so there are no columns to weigh")
    say(f"{len(found)} LoRAs, {sum(m.numel() for m in numbers):,} columns; {len(loss.cases)} predictions of one LoRA")
    optimiser, row, losses = torch.optim.AdamW(numbers, lr=lr, weight_decay=0.0), torch.ones(len(found)), []
    for step in range(steps):
        if cancel is not None and cancel.is_set():
            raise Cancelled(f"cancelled after {step} of {steps} steps; nothing is written")
        with torch.inference_mode(False), torch.enable_grad():
            each = [weighted(lora, own) for lora, own in zip(found, columns, strict=True)]
            error, common = loss(each, [row])[0], in_common(columns)
            total = error + similarity * common.to(error.device)
            if not math.isfinite(float(total.detach())):
                raise ValueError(f"ziplora: the loss is {float(total.detach())} at step {step} with lr={lr:g}: try a "
                                 "tenth of the learning rate, or float32")  # fmt: skip
            grads = torch.autograd.grad(total, numbers, allow_unused=True)
        for number, grad in zip(numbers, grads, strict=True):
            number.grad = grad
        optimiser.step()
        losses.append(float(total.detach()))
        if progress is not None:
            parts = {"error": float(error.detach()), "common": float(common.detach())}
            progress(step + 1, steps, {"loss": losses[-1], **parts})
    still = [{key: m.detach() for key, m in one.items()} for one in columns]
    options = {"steps": steps, "lr": lr, "similarity": similarity, "draws": draws, "size": size, "seed": seed}
    with torch.no_grad():
        files.save(zipped(found, still), out, metadata={"ziplora": options | {"prompts": [list(p) for p in prompts]}})
    seconds = time.monotonic() - began
    say(f"wrote {out} after {seconds:.0f} s; loss {losses[0]:.4g} to {losses[-1]:.4g}")
    return Trained(out, steps, tuple(losses), len(columns[0]), seconds)


def _check(count: int, out: Path, **settings: tuple[float, float, float]) -> None:
    if count < 2:
        raise ValueError(f"ziplora: {count} LoRAs, wanted at least two")
    if out.suffix != ".safetensors":
        raise ValueError(f"out={str(out)!r}: a LoRA is a .safetensors file")
    for name, (value, low, high) in settings.items():
        if not (low <= value <= high and math.isfinite(value)):
            raise ValueError(f"{name}={value!r}: wanted {low} to {high}")
