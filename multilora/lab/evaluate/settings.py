"""How an evaluation draws: the embedded world's settings and those of the published testbed, ComposLoRA.

ComposLoRA (arXiv 2402.16843) has 22 LoRAs for Stable Diffusion 1.5: for anime and for reality each 3 characters and 2
each of clothing, style, background and object, which make 24, 72, 96 and 48 sets for k = 2 to 5. The LoRA files and
the lists of their triggers are the authors' to give: download them, and point --library at *_lora_info.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from multilora.method import unknown

TESTBED = {"character": 3, "clothing": 2, "style": 2, "background": 2, "object": 2}  # of each of the two


@dataclass(frozen=True)
class Settings:
    """What every picture of an evaluation shares.

    scale      of all LoRAs at once, beside each one's weight
    width, height  in pixels; None: the base's own
    options    of methods, by method
    prompt     with {triggers}, the trigger words of the set's LoRAs joined by commas
    """

    base: str = "embedded"
    steps: int = 25
    guidance: float = 3.0
    width: int | None = None
    height: int | None = None
    scale: float = 1.0
    scheduler: str | None = None
    negative: str = ""
    prompt: str = "{triggers}"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    def with_(self, **changes: Any) -> Settings:
        """These settings with what is not None in place of their own. Raises ValueError naming a bad one."""
        told = {name: value for name, value in changes.items() if value is not None}
        if told.get("steps", 1) < 1:
            raise ValueError(f"steps {told['steps']}: wanted at least 1")
        if "{triggers}" not in told.get("prompt", "{triggers}"):
            raise ValueError(f"prompt {told['prompt']!r}: wanted {{triggers}} in it, where the trigger words go")
        return replace(self, **told)


# `negative`: the paper's code writes "EasyNegative" as plain text and does not load the embedding of that name, so it
# is a word like any other. Bases: Counterfeit-V2.5 for anime; Realistic_Vision_V5.1 with sd-vae-ft-mse for reality.
_PUBLISHED = {"scheduler": "DPMSolverMultistepScheduler", "scale": 0.8, "options": {"switch": {"every": 5}}}
PRESETS = {
    "world": Settings(),
    "anime": Settings(base="", steps=200, guidance=10.0, width=512, height=512, negative="EasyNegative", **_PUBLISHED),
    "reality": Settings(base="", steps=100, guidance=7.0, width=768, height=1024, **_PUBLISHED),
}


def preset(name: str) -> Settings:
    """The settings of a name. Raises UnknownName."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]
