"""What gates of picture LoRAs learn from: scenes whose captions no held-out prompt says."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from multilora.lab.world.caption import caption
from multilora.lab.world.designs import DESIGNS
from multilora.lab.world.render import render
from multilora.lab.world.report import composed_scene
from multilora.lab.world.scene import Scene, sample_scene

MOST = 50  # pictures of a set at most
REFERENCES = 48  # pictures that a gate learns from, of each set


def gate_scene(chosen: Sequence[str], index: int) -> Scene:
    """Scene `index` to learn from, with all the designs; its caption is none of the held-out ones of the set."""
    designs = {DESIGNS[name].category: name for name in chosen}
    plain = {} if "style" in designs else {"style": "flat"}
    held_out = {caption(composed_scene(chosen, i), 1) for i in range(MOST)}
    for attempt in range(1000):
        rng = random.Random(f"gate/{'+'.join(chosen)}/{index}/{attempt}")
        scene = sample_scene(rng, designs=designs, **plain)
        if caption(scene, 1) not in held_out:
            return scene
    raise ValueError(f"{'+'.join(chosen)}: every caption is a held-out one")


def draw_references(chosen: Sequence[str], folder: Path, count: int = REFERENCES) -> Path:
    """A folder of rendered pictures that show all the designs, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        scene = gate_scene(chosen, i)
        render(scene).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(caption(scene, 1) + "\n", encoding="utf-8")
    return folder


def own_captions(chosen: Sequence[str], count: int = 8) -> list[list[str]]:
    """[LoRAs] captions of scenes with one design each."""
    return [[caption(gate_scene([name], i), 1) for i in range(count)] for name in chosen]
