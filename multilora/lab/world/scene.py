"""A scene: what a picture shows, exactly; sampling and labels."""

import random
from dataclasses import dataclass, field

from multilora.lab.world.designs import CATEGORIES, DESIGNS
from multilora.lab.world.draw_background import BACKGROUNDS
from multilora.lab.world.draw_character import CHARACTERS
from multilora.lab.world.draw_garment import GARMENTS
from multilora.lab.world.draw_object import COLOURLESS, OBJECTS
from multilora.lab.world.draw_style import STYLES
from multilora.lab.world.pen import COLOURS

CLASSES = {
    "character": CHARACTERS,
    "garment": GARMENTS,
    "object": OBJECTS,
    "background": BACKGROUNDS,
    "style": STYLES,
}
COLOURED = ("character", "garment", "object")
STYLE_WEIGHTS = (40, 15, 15, 15, 15)
NONE_SHARE = 0.15


@dataclass(frozen=True)
class Scene:
    """One picture. `designs` names a design per category; `seed` decides the looks and the jitter."""

    character: str
    garment: str
    object: str
    background: str
    style: str
    character_colour: str | None = None
    garment_colour: str | None = None
    object_colour: str | None = None
    designs: dict = field(default_factory=dict, hash=False)
    seed: int = 0


def _pick(rng, options, avoid=()):
    return rng.choice([option for option in options if option not in avoid])


def sample_scene(seed, /, **fixed):
    """A random scene: `seed` is an int or a random.Random; `fixed` sets fields.

    `designs={"character": "zib"}` sets that category's class too, and drops its colour.
    """
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    designs = dict(fixed.pop("designs", {}))
    values = {
        "character": rng.choice(CHARACTERS),
        "garment": "none" if rng.random() < NONE_SHARE else rng.choice(GARMENTS[1:]),
        "object": "none" if rng.random() < NONE_SHARE else rng.choice(OBJECTS[1:]),
        "background": rng.choice(BACKGROUNDS),
        "style": rng.choices(STYLES, STYLE_WEIGHTS)[0],
    }
    for category, name in designs.items():
        if name not in DESIGNS or DESIGNS[name].category != category:
            raise ValueError(f"no {category} design is named {name!r}")
        values[category] = DESIGNS[name].kind
    values.update(fixed)
    body = values.setdefault("character_colour", rng.choice(list(COLOURS)))
    values.setdefault("garment_colour", _pick(rng, COLOURS, avoid=(body,)))
    values.setdefault("object_colour", _pick(rng, COLOURS, avoid=(body,)))
    if values["garment"] == "none":
        values["garment_colour"] = None
    if values["object"] in COLOURLESS:
        values["object_colour"] = None
    for category in designs:
        if category in COLOURED:
            values[f"{category}_colour"] = None
    values.setdefault("seed", rng.randrange(2**31))
    return Scene(designs=designs, **values)


def labels(scene):
    """Exact labels: a class, a design (or None) and where there is one a colour per category.

    A colour is None where the picture does not show it: a design's own colours, a two-ink print.
    """
    found = {}
    grey = scene.style == "print" or scene.designs.get("style") in ("tessa", "gamo", "ambro", "inka")
    for category in CATEGORIES:
        found[category] = getattr(scene, category)
        found[f"{category}_design"] = scene.designs.get(category)
        if category in COLOURED:
            colour = getattr(scene, f"{category}_colour")
            found[f"{category}_colour"] = None if grey else colour
    return found
