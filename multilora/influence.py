"""How much the trigger words of each LoRA say in a prompt: what W-Switch and W-Composite go by (arXiv 2606.03792).

Two measures, on the encoding e(.) of a text with no LoRA in the text encoders, averaged over its tokens:

    ablation   d_i = max(1 - cos(e(prompt), e(prompt without the triggers of LoRA i)), floor)
    triggers   d_i = max(cos(e(prompt), e(triggers of LoRA i, joined by commas)), 0)

and the influence of LoRA i is d_i / sum_j d_j. The paper's text was not at hand: the formulas, the floor of 0.05 and
which method uses which are those of its code (github.com/GeorgeTsoumplekas/PromptAware-Multi-LoRA-Composition,
benchmark_multi_loras.py), where e is the mean over all token positions of CLIP's last hidden state. Where a denoiser
takes several encodings (SDXL's two encoders side by side and a pooled one, FLUX's T5 and CLIP), 1 - cos and cos are
means over them.

Ours: a LoRA without triggers, or with none of them in the prompt, has no influence that could be told and gets the
mean of the others, with one warning (the code: 0.1 or the floor, and 0); only triggers that are in the prompt count;
and where taking them out leaves nothing, the empty text is encoded (the code: d = 2).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # listing the methods imports this file and must not import torch
    from torch import Tensor

MEASURES = ("ablation", "triggers")
FLOOR = 0.05


def present(triggers: Sequence[str], texts: Sequence[str]) -> list[str]:
    """The triggers that stand in one of the texts as whole words, in any case."""
    return [t for t in triggers if t.strip() and any(_words(t).search(text) for text in texts)]


def without(text: str, triggers: Sequence[str]) -> str:
    """The text without these triggers; commas and blanks that are left over go with them."""
    for trigger in sorted(triggers, key=len, reverse=True):  # "zib alien" before "zib"
        text = _words(trigger).sub("", text)
    text = re.sub(r"(\s*,)+", ",", text)
    return re.sub(r"\s+", " ", text).strip(" ,")


def influence(cards: Sequence[Any], text: Any, *, by: str, floor: float = FLOOR) -> list[float]:
    """[loras] influence of each LoRA's trigger words in the prompt, summing to 1; see the module's docstring.

    cards  the LoRAs' cards, with `triggers`
    text   `Moment.text`: has `prompts` (the texts) and `encoded(edit)` (encodings by name of the texts as `edit`
           changes them, without LoRAs: [B, tokens, d], [B, d], or a list of [tokens, d]); None without a prompt
    by     "ablation" or "triggers"
    floor  the least d_i of "ablation"

    Warns once where a LoRA gets the mean of the others.
    """
    prompts = list(getattr(text, "prompts", ()) or ())
    found = [present(card.triggers if card else (), prompts) for card in cards]
    values: list[float | None] = [None] * len(cards)
    if any(found) and len(cards) > 1:
        whole = _vectors(text.encoded(lambda prompt: prompt))
        for i, triggers in enumerate(found):
            if not triggers:
                continue
            if by == "ablation":
                other = _vectors(text.encoded(lambda prompt, own=triggers: without(prompt, own)))
                values[i] = max(1.0 - _cosine(whole, other), floor)
            else:
                other = _vectors(text.encoded(lambda prompt, own=triggers: ", ".join(own)))
                values[i] = max(_cosine(whole, other), 0.0)
    known = [v for v in values if v is not None]
    mean = math.fsum(known) / len(known) if known else 1.0
    if len(known) < len(cards) and len(cards) > 1:
        lost = [(card and card.name) or f"number {i + 1}" for i, card in enumerate(cards) if values[i] is None]
        why = "no trigger words in the prompt" if prompts else "the prompt's words are not known"
        warnings.warn(f"LoRA {', '.join(lost)}: {why}; given the mean influence of the others", stacklevel=2)
    values = [mean if v is None else v for v in values]
    total = math.fsum(values)
    return [v / total for v in values] if total > 0 else [1.0 / len(cards)] * len(cards)


def _words(trigger: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(trigger.strip())}(?!\w)", re.IGNORECASE)


def _vectors(encodings: Mapping[str, Any]) -> list[Tensor]:
    """[encodings] of [B, d] in float64: means over the tokens; masked ones (`NAME_mask`) and paddings of lists out."""
    import torch

    found = []
    for name, value in encodings.items():
        if name.endswith("_mask"):
            continue
        if isinstance(value, (list, tuple)):
            found.append(torch.stack([v.double().mean(0) for v in value]))
        elif value.ndim == 2:
            found.append(value.double())
        elif f"{name}_mask" in encodings:
            mask = encodings[f"{name}_mask"].to(value.device).double()[..., None]
            found.append((value.double() * mask).sum(1) / mask.sum(1).clamp(min=1.0))
        else:
            found.append(value.double().mean(1))
    return found


def _cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Mean over encodings and prompts of the cosine."""
    import torch

    each = [torch.nn.functional.cosine_similarity(x, y, dim=-1).mean() for x, y in zip(a, b, strict=True)]
    return float(torch.stack([e.cpu() for e in each]).mean())
