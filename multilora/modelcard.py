"""The model card of a LoRA: what it is and what it was made of, as the Markdown that model hubs show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from multilora import __version__
from multilora.bases import FAMILIES
from multilora.lora import Lora


def model_card(lora: Lora, *, base_model: str | None = None, weights: str = "") -> str:
    """Markdown with a YAML head: base, triggers, how it was made, its inputs by sha256. The licence is left open.

    base_model  hub id of the base, if it is known: a family alone does not tell which model of it
    weights     name of the file beside the card, for the lines that load it
    """
    card, pictures = lora.card, any(c in ("unet", "transformer") for c in lora.components)
    head: dict[str, Any] = {"library_name": "diffusers" if pictures else "peft", "tags": ["lora", "multilora"]}
    if card.provenance.get("terms") or card.provenance.get("merge"):
        head["tags"].append("merge")
    if base_model:
        head |= {"base_model": base_model, "base_model_relation": "adapter"}
    if card.triggers:
        head["instance_prompt"] = ", ".join(card.triggers)
    family = FAMILIES.get(card.family, card.family) if card.family else "an unknown base"
    # A JSON value is a YAML value.
    lines = ["---", *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in head.items()), "---", ""]
    lines += [f"# {card.name or 'LoRA'}", ""]
    ranks = sorted({p.rank for p in lora.values() if p.rank})
    shown = "" if not ranks else f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {ranks[0]} to {ranks[-1]}"
    lines += [f"A LoRA for {family}: {len(lora)} modules{shown}. Written by multilora {__version__}.", ""]
    if card.triggers:
        lines += ["Triggers: " + ", ".join(f"`{t}`" for t in card.triggers), ""]
    lines += _made(card.provenance)
    if pictures and weights:
        lines += ["## Use", "", "```python", f'pipe.load_lora_weights(".", weight_name="{weights}")', "```", ""]
    lines += ["## Licence", "", "Not stated here: those of the base and of the inputs hold. Add yours.", ""]
    return "\n".join(lines)


def _made(provenance: Any) -> list[str]:
    merge, terms = dict(provenance.get("merge") or {}), provenance.get("terms") or ()
    if not merge and not terms:
        return []
    lines = ["## How it was made", ""]
    if merge:
        options = {**merge, **(merge.get("options") or {})}
        plain = {k: v for k, v in options.items() if isinstance(v, (str, int, float, bool)) }
        said = ", ".join(f"{k}={v}" for k, v in plain.items() if k not in ("method", "energy_lost"))
        lines += [f"Method `{merge.get('method', '')}`{f' ({said})' if said else ''}.", ""]
    inputs = list(terms) or [{"weight": side, **merge[side]} for side in ("tuned", "base") if side in merge]
    if inputs:
        lines += ["| input | weight | sha256 |", "|---|---|---|"]
        lines += [f"| {_cell(t.get('name'))} | {_weight(t)} | `{t.get('sha256') or 'unknown'}` |" for t in inputs]
        lines += [""]
    cut = provenance.get("truncated")
    if cut:
        lines += [f"Cut to {', '.join(f'{k} {v:g}' for k, v in cut.items() if v is not None)} afterwards.", ""]
    return lines


def _cell(text: object) -> str:
    return str(text or "unnamed").replace("|", "\\|")


def _weight(term: dict[str, Any]) -> str:
    weight = term.get("weight", 1.0)
    blocks: Sequence[dict[str, float]] = term.get("blocks") or ()
    blocks = [blocks] if isinstance(blocks, dict) else blocks
    own = f"{weight:g}" if isinstance(weight, (int, float)) else str(weight)
    return _cell("; ".join([own, *(f"{glob}: {value:g}" for by in blocks for glob, value in by.items())]))
