"""Stage: recogniser B's false alarms, held down.

Recognisers learn from renders, where a named design and a generic thing of its class differ clearly. In pictures of
the base they may not: its hat with one horn can read as the design with two. For every design, prompts with its
trigger are drawn without any LoRA; where more than ALLOWED of the pictures read as the design, its bias in B is
lowered by the least that mends it; pictures that it loses go to other labels, which is not measured again. The prompts
are a stream of their own, which no table uses. A is left as it is: what A chooses is judged by B.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from multilora.lab.world.caption import caption
from multilora.lab.world.designs import DESIGNS
from multilora.lab.world.loras import STEPS, pictures, stream_scene

COUNT = 400  # pictures of each design
# Of COUNT new pictures at this rate at most 5% read as the design, about nineteen times in twenty.
ALLOWED = 0.035
BATCH = 16


def margins(pipe: Any, name: str, recogniser: Any, count: int = COUNT, steps: int = STEPS) -> list[float]:
    """[count] how far log p of the design lies above every other label's, in pictures drawn without its LoRA."""
    design, found = DESIGNS[name], []
    own = recogniser.index(design.category, name)
    for first in range(0, count, BATCH):
        part = range(first, min(first + BATCH, count))
        texts = [caption(stream_scene(name, "calibrate", i), i) for i in part]
        shares = recogniser.probabilities(pictures(pipe, texts, [10_000 + i for i in part], steps=steps))
        others = shares[design.category].clamp(min=1e-30).log()  # a share may have underflowed
        mine = others[:, own].clone()
        others[:, own] = -torch.inf
        found += (mine - others.amax(1)).tolist()
    return found


def excess(found: Sequence[float], allowed: int) -> float:
    """How much a design's logit must fall so that at most `allowed` of the pictures read as it; 0 where they do.

    Halfway between the last margin that may stay above 0 and the first that may not.
    """
    over = sorted((m for m in found if m > 0), reverse=True)
    if len(over) <= allowed:
        return 0.0
    return (over[allowed] + (over[allowed - 1] if allowed else 2 * over[0])) / 2


def hold_back(path: Path, found: Mapping[str, Sequence[float]], count: int = COUNT) -> dict[str, dict[str, Any]]:
    """Lower biases in a recogniser's file by `excess` of {design: margins above 0, of `count` pictures}.

    The .json beside it keeps what was done, by design: false alarms, pictures, by how much the bias fell.
    """
    about = path.with_suffix(".json")
    facts, weights, done = json.loads(about.read_text()), load_file(path), {}
    for name, own in found.items():
        fall = math.ceil(1000 * excess(own, int(ALLOWED * count))) / 1000
        done[name] = {"alarms": sum(m > 0 for m in own), "pictures": count, "lower": fall}
        head = DESIGNS[name].category
        weights[f"heads.{head}.bias"][facts["heads"][head].index(name)] -= fall
    new, told = path.with_suffix(".held.safetensors"), about.with_suffix(".held.json")
    save_file(weights, new)
    told.write_text(json.dumps({**facts, "held_back": done}, indent=1) + "\n")
    new.replace(path)
    told.replace(about)
    return done


def stage(out: Path, settings: Any, echo: Callable[[str], None]) -> None:
    """As multilora.lab.world.stages calls it: B of `out`/assets, once."""
    from multilora.lab.score.presence import load_recogniser
    from multilora.pipelines.load import load_pipeline

    assets = Path(out) / "assets"
    path = assets / "recogniser_b.safetensors"
    if "held_back" in json.loads(path.with_suffix(".json").read_text()):
        echo("calibrate: kept")
        return
    small = {"count": 4, "steps": 2} if settings.scenes < 1000 else {"count": COUNT, "steps": STEPS}
    pipe = load_pipeline(str(assets / "base"), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    load_recogniser.cache_clear()  # a file of this name may have been trained anew in this process
    recogniser, found = load_recogniser(path), {}
    for name in DESIGNS:
        found[name] = margins(pipe, name, recogniser, **small)
        echo(f"calibrate: {name} is seen in {sum(m > 0 for m in found[name])} of {small['count']} without its LoRA")
    hold_back(path, found, small["count"])
    load_recogniser.cache_clear()
