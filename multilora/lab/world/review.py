"""Pictures for a reviewer who has not seen the prompts, and how often recogniser B and the prompts agree with them.

`pages` draws numbered pictures without words and keeps what was asked in sealed.json; the reviewer fills a JSON file
{number: {head: label}}; `count` puts the agreement into the report's journal. `grids` draws the pictures with words
that the README of assets/ shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from multilora.lab.journal import Journal
from multilora.lab.sheet import Cell, contact_sheet
from multilora.lab.world.caption import caption
from multilora.lab.world.designs import DESIGNS
from multilora.lab.world.eyes import HEADS
from multilora.lab.world.loras import pictures, stream_scene, target
from multilora.lab.world.report import GUIDANCE, HELD_OUT, STEPS, requested
from multilora.lab.world.scene import sample_scene

SHOWN = HELD_OUT + 100_000  # first scene of the pictures for a reviewer: others than the report's
CONTEXTS = 4  # pictures of each LoRA, without and with it
PAGE = 20  # pictures on a page
BATCH = 12


def class_of(label: str) -> str:
    """The class word of a label of the recognisers: a design's is its class."""
    return DESIGNS[label].kind if label in DESIGNS else label


def choices() -> dict[str, list[str]]:
    """What a reviewer may answer, by head: class words and colours, no names of designs."""
    return {head: sorted({class_of(label) for label in labels}) for head, labels in HEADS.items()}


def _drawn(pipe: Any, texts: Sequence[str], first: int, loras: Sequence[Any] = ()) -> list[Image.Image]:
    images = []
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        seeds = range(first + start, first + start + len(part))
        images += pictures(pipe, part, seeds, loras, steps=STEPS, guidance=GUIDANCE)
    return images


def base_pictures(pipe: Any, count: int) -> list[tuple[Image.Image, str, dict[str, str]]]:
    """(picture, prompt, the elements that it names) of the base alone on held-out prompts."""
    scenes = [sample_scene(SHOWN + i) for i in range(count)]
    texts = [caption(scene, 1) for scene in scenes]
    named = [requested(scene, text) for scene, text in zip(scenes, texts, strict=True)]
    return list(zip(_drawn(pipe, texts, 0), texts, named, strict=True))


def lora_pictures(pipe: Any, name: str, path: Any) -> list[tuple[Image.Image, str, dict[str, str]]]:
    """The same with one LoRA at weight 1 (path None: without it) in CONTEXTS held-out scenes that show its design."""
    scenes = [stream_scene(name, "review", i) for i in range(CONTEXTS)]
    texts = [caption(scene, 1) for scene in scenes]
    # A design's own colours are not those of the words, and a style's inks hide the rest.
    named = [{**requested(scene, text), DESIGNS[name].category: DESIGNS[name].kind}
             for scene, text in zip(scenes, texts, strict=True)]  # fmt: skip
    return list(zip(_drawn(pipe, texts, 1000, [] if path is None else [path]), texts, named, strict=True))


def pages(pipe: Any, assets: Path, out: Path, base_count: int, echo: Callable[[str], None] = print) -> Path:
    """Numbered pictures on pages without words, and `out`/sealed.json with prompts, named elements and B's labels."""
    from multilora.lab.score.presence import load_recogniser

    found = [(*entry, "") for entry in base_pictures(pipe, base_count)]
    for name in DESIGNS:
        if target(name, assets).exists():
            found += [(*entry, name) for entry in lora_pictures(pipe, name, target(name, assets))]
            echo(f"review: pictures of {name}")
    out.mkdir(parents=True, exist_ok=True)
    seen = load_recogniser(assets / "recogniser_b.safetensors").labels([entry[0] for entry in found])
    sealed = {
        str(i): {"prompt": text, "named": named, "lora": lora, "b": {h: class_of(label) for h, label in b.items()}}
        for i, ((_, text, named, lora), b) in enumerate(zip(found, seen, strict=True), 1)
    }
    (out / "sealed.json").write_text(json.dumps(sealed, indent=1) + "\n")
    for first in range(0, len(found), PAGE):
        cells = [Cell(entry[0], str(first + i)) for i, entry in enumerate(found[first : first + PAGE], 1)]
        page = contact_sheet([cells[i : i + 5] for i in range(0, len(cells), 5)], side=256)
        page.save(out / f"page{first // PAGE + 1:02d}.png")
    return out


def count(sealed: Path, answers: Path, journal: Journal) -> dict[str, Any]:
    """Agreement per head as (agreeing, answered), written into the journal.

    heads  recogniser B and the reviewer, on all pictures where the reviewer gave a label of the head
    named  the prompt's word and the reviewer, where the prompt names the element: what the pictures show

    An answer "?" counts against the prompt, and is left out of the agreement with B. Raises ValueError for an answer
    that is no label of its head.
    """
    asked, told = json.loads(sealed.read_text()), json.loads(answers.read_text())
    known, heads, named = choices(), {h: [0, 0] for h in HEADS}, {h: [0, 0] for h in HEADS}
    for number, labels in told.items():
        for head, label in labels.items():
            if head not in known or label not in (*known[head], "?", "none"):
                wanted = known.get(head, f"a head of {', '.join(known)}")
                raise ValueError(f"{answers.name}: picture {number}, {head} is {label!r}, wanted {wanted}")
            if label in known[head]:
                heads[head][1] += 1
                heads[head][0] += label == asked[number]["b"][head]
            word = asked[number]["named"].get(head)
            if word is not None:
                named[head][1] += 1
                named[head][0] += label == word
    facts = {"heads": heads, "named": named, "pictures": len(told)}
    journal.add(f"review/{len(told)}", **facts)
    return facts


def grids(pipe: Any, assets: Path, out: Path, echo: Callable[[str], None] = print) -> None:
    """`out`/base.jpg: 24 held-out prompts; `out`/NAME.jpg: each LoRA in four contexts, without and with it."""
    out.mkdir(parents=True, exist_ok=True)
    cells = [Cell(image, "", text) for image, text, _ in base_pictures(pipe, 24)]
    sheet = contact_sheet([cells[i : i + 6] for i in range(0, 24, 6)], title="The base, held-out prompts", side=128)
    sheet.save(out / "base.jpg", quality=82)
    for name, design in DESIGNS.items():
        path = target(name, assets)
        if not path.exists():
            continue
        rows = [
            [Cell(image, "with" if on else "without", text if on else "") for image, text, _ in
             lora_pictures(pipe, name, path if on else None)]
            for on in (False, True)
        ]  # fmt: skip
        sheet = contact_sheet(rows, title=design.trigger, subtitle=design.description, side=128)
        sheet.save(out / f"{name}.jpg", quality=80)
        echo(f"review: grid of {name}")
