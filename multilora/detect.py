"""What a file is, said aloud: format, algorithms, the trainer that wrote it, words of its metadata worth showing.

Keys and shapes decide what is read and how; metadata is a stranger's text here and only ever shown, cut and cleaned.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from multilora.bases import FAMILIES
from multilora.lora import Lora

# Entries of a header that say something about the file, by the name they get in provenance["metadata"].
WORDS = (
    "ss_base_model_version", "ss_sd_model_name", "ss_network_module", "ss_network_dim", "ss_network_alpha",
    "ss_output_name", "modelspec.title", "modelspec.architecture", "modelspec.author", "modelspec.trigger_phrase",
    "software", "name",
)  # fmt: skip
TAGS = "ss_tag_frequency"
_LONGEST = 200  # characters of one shown text
_MOST_TAGS = 8
_TAG_TEXT = 4_000_000  # longest JSON of tag counts that is looked into


def clean(text: str, longest: int = _LONGEST) -> str:
    """A stranger's text as one short line: no control or direction characters, cut."""
    plain = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text[: 4 * longest])
    plain = " ".join(plain.split())
    return plain if len(plain) <= longest else plain[: longest - 1] + "…"


def tags(text: str) -> str:
    """The tags that occur most often in sd-scripts' `ss_tag_frequency`, most frequent first; "" when it has none."""
    if len(text) > _TAG_TEXT:
        return ""
    try:
        folders = json.loads(text)
    except (ValueError, RecursionError):  # also numbers of thousands of digits
        return ""
    counts: dict[str, int] = {}
    for folder in folders.values() if isinstance(folders, dict) else ():
        for tag, count in folder.items() if isinstance(folder, dict) else ():
            if isinstance(count, int) and tag.strip():
                counts[tag.strip()] = counts.get(tag.strip(), 0) + count
    first = sorted(counts, key=lambda tag: -counts[tag])[:_MOST_TAGS]
    return clean(", ".join(clean(tag, 60) for tag in first), 300)


def words(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries of a header that are worth showing, cleaned; the commonest tags under "tags"."""
    found = {name: clean(metadata[name]) for name in WORDS if metadata.get(name)}
    common = tags(metadata.get(TAGS, ""))
    return {**found, "tags": common} if common else found


def format_of(keys: Iterable[str], algorithms: set[str], *, peft: bool) -> str:
    """ "peft", "lycoris", "kohya" or "diffusers", by the spelling of the keys."""
    keys = list(keys)
    if peft:
        return "peft"
    own = (".dora_scale", ".lora_mid.weight", ".w_norm", ".b_norm")
    if algorithms & {"loha", "lokr", "norm"} or any(k.startswith("lycoris_") or k.endswith(own) for k in keys):
        return "lycoris"
    return "kohya" if any(k.startswith(("lora_", "diffusion_model.")) for k in keys) else "diffusers"


def trainer_of(keys: Iterable[str], metadata: Mapping[str, str], *, peft: bool) -> str:
    """The best guess at the program that wrote a file, as words; "" when nothing tells."""
    keys = list(keys)
    module = metadata.get("ss_network_module", "")
    if "multilora" in metadata:
        return "multilora"
    if any(name.startswith("ot_") for name in metadata):
        return "OneTrainer"
    if "ai-toolkit" in metadata.get("software", "") or "ostris" in metadata.get("software", ""):
        return "ai-toolkit"
    if "lycoris" in module:
        return "LyCORIS in kohya sd-scripts"
    if any(word in module for word in ("lora_qwen", "lora_zimage", "lora_wan", "lora_hunyuan", "lora_flux_2")):
        return "musubi-tuner"
    if module or any(name.startswith("ss_") for name in metadata):
        return "kohya sd-scripts"
    if peft:
        return "PEFT"
    if any(".processor." in k and "_lora" in k and k.startswith(("double_blocks", "single_blocks")) for k in keys):
        return "XLabs"
    if any(k.startswith("lycoris_") for k in keys):
        return "lycoris-lora (SimpleTuner)"
    if any("hada_" in k or "lokr_" in k or k.endswith((".w_norm", ".lora_mid.weight")) for k in keys):
        return "lycoris-lora"
    if "lora_adapter_metadata" in metadata:
        return "diffusers"
    if any(k.startswith("diffusion_model.") for k in keys):
        return "a trainer for ComfyUI (ai-toolkit, ...)"
    if any(k.startswith("lora_") for k in keys):
        return "kohya sd-scripts or alike"
    return "diffusers" if any(k.startswith(("unet.", "transformer.", "text_encoder.")) for k in keys) else ""


def description(lora: Lora) -> dict[str, Any]:
    """What is known of a Lora, in plain words and numbers, for people to read.

    name, family and base (its full name), format, trainer, algorithms, modules, components with their number of
    modules, ranks with theirs, dense (modules kept as whole differences), alphas (as the file had them), dtype,
    triggers, metadata, left_out.
    """
    provenance = lora.card.provenance
    ranks: dict[int, int] = {}
    components: dict[str, int] = {}
    for key, part in lora.items():
        first = key.split(".", 1)[0]
        name = first if first in lora.components else ""
        components[name] = components.get(name, 0) + 1
        if part.rank is not None:
            ranks[part.rank] = ranks.get(part.rank, 0) + 1
    family = lora.card.family
    return {
        "name": lora.card.name,
        "sha256": lora.card.sha256,
        "family": family,
        "base": FAMILIES.get(family, family) if family else "unknown",
        "format": provenance.get("format", ""),
        "trainer": provenance.get("trainer", ""),
        "algorithms": list(provenance.get("algorithms", ())),
        "modules": len(lora),
        "components": dict(sorted(components.items())),
        "ranks": dict(sorted(ranks.items())),
        "dense": sum(part.rank is None for part in lora.values()),
        "alphas": list(provenance.get("alphas", ())),
        "dtypes": sorted({str(part.dtype).removeprefix("torch.") for part in lora.values()}),
        "category": lora.card.category,
        "triggers": list(lora.card.triggers),
        "metadata": dict(provenance.get("metadata", {})),
        "left_out": list(provenance.get("left_out", ())),
    }
