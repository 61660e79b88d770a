"""Weights of a merge: one number per LoRA, or numbers per block; and the card of what comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from multilora.lora import Card, Dense, Lora, LowRank
from multilora.sites import block_factors, label, matching

Weight = float | Mapping[str, float]


def weights_of(loras: Sequence[Lora], weights: Sequence[Weight], *, name: str) -> Callable[[str], list[float]]:
    """A function key -> [k] the weights of the LoRAs there.

    weights  one per LoRA: a finite number, or {exact key or glob: number}. A glob is matched as in
             multilora.sites.block_factors (the last that matches counts, an exact key before any glob, 1 where none
             does: write "*" first for another default), against the whole key ("unet.mid_block.*") or, where none of
             the LoRA's keys is meant by that, against the key inside its component ("mid_block.*")
    name     of the method, for errors

    The function answers for every key of any of the LoRAs. Raises ValueError naming the LoRA and the glob when the
    counts differ, a weight is no finite number, or a glob matches none of its LoRA's modules.
    """
    loras, weights = list(loras), list(weights)
    if len(loras) != len(weights):
        raise ValueError(f"{name}: {len(weights)} weights for {len(loras)} LoRAs, wanted one each")
    for i, lora in enumerate(loras):
        if not isinstance(lora, Lora):
            what = type(lora).__name__
            raise ValueError(f"{name}: LoRA number {i + 1} is a {what}, wanted a Lora; multilora.load reads files")
    keys = list(dict.fromkeys(key for lora in loras for key in lora))
    numbers: list[float | dict[str, float]] = []
    for i, (lora, weight) in enumerate(zip(loras, weights, strict=True)):
        who = f"{name}: {label(lora, i)}"
        if isinstance(weight, Mapping):
            blocks = {_spelled(pattern, lora): value for pattern, value in weight.items()}
            block_factors(list(lora), blocks, who)
            numbers.append(block_factors(keys, blocks, who))
        elif isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"{who}: a weight is a finite number or {{glob: number}}, got {weight!r}")
        else:
            numbers.append(float(weight))
    return lambda key: [n[key] if isinstance(n, dict) else n for n in numbers]


def _spelled(pattern: Any, lora: Lora) -> str:
    """The pattern as it matches whole keys; as it came when it matches nothing either way."""
    inside = [f"{component}.{pattern}" for component in lora.components if component]
    return next((p for p in (str(pattern), *inside) if matching(p, list(lora))), str(pattern))


def merged_card(loras: Sequence[Lora], weights: Sequence[Weight], method: str, **facts: Any) -> Card:
    """The card of a merge: names, triggers and family as of a sum, `terms` with their weights, and how it was made.

    A term under block weights keeps its own weight and gains an entry in its list `blocks`, applied in order. A LoRA
    at weight 0 is left out. `facts` are the options and results worth keeping (JSON-able), under provenance["merge"].
    """
    cards = []
    for lora, weight in zip(loras, weights, strict=True):
        if isinstance(weight, Mapping):
            terms = [{**t, "blocks": [*t.get("blocks", []), dict(weight)]} for t in lora.card.terms()]
            cards.append(lora.card.replace(sha256="", provenance={"terms": terms}))
        elif weight:
            cards.append(lora.card.scaled(float(weight)))
    total = cards[0] if cards else Card()
    for card in cards[1:]:
        total = total.plus(card)
    if len(cards) == 1 and method == "linear" and not facts:
        return total
    made = {"terms": total.terms() if cards else [], "merge": {"method": method, **facts}}
    return total.replace(sha256="", provenance=made)


def weighted_sum(loras: Sequence[Lora], weights: Sequence[Weight], *, name: str) -> dict[str, LowRank | Dense]:
    """The exact sum of the updates at their weights, by key; terms at weight 0 are left out.

    Raises ValueError as weights_of does, and where two LoRAs have different layers under one key.
    """
    weight_at = weights_of(loras, weights, name=name)
    total: dict[str, LowRank | Dense] = {}
    for key in dict.fromkeys(key for lora in loras for key in lora):
        for i, (lora, weight) in enumerate(zip(loras, weight_at(key), strict=True)):
            if key not in lora or not weight:
                continue
            term = lora[key] if weight == 1.0 else lora[key] * weight
            try:
                total[key] = total[key] + term if key in total else term
            except ValueError as error:
                raise ValueError(f"{name}: {label(lora, i)}, {key}: {error}") from None
    return total
