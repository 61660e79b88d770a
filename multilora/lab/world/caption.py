"""Captions: varied plain English for a scene."""

import random

from multilora.lab.world.designs import DESIGNS

NOUNS = {"rabbit": ("rabbit", "rabbit", "bunny")}
PLACES = {
    "plain": ("on a plain background", "plain background"),
    "beach": ("on a beach", "at the beach", "beside the sea on a beach"),
    "forest": ("in a forest", "in the forest", "among forest trees"),
    "snow": ("in the snow", "in a snowy field", "in snow with mountains"),
    "city": ("in a city", "in the city", "in a city street"),
    "grove": ("in a grove", "in the grove", "among the stalks of a grove"),
    "night": ("at night", "on a starry night", "in the night"),
}
DESIGNED_PLACES = {
    "grove": ("in a {}", "in the {}"),
    "night": ("on a {}", "in the {}"),
    "beach": ("on a {}", "at the {}"),
    "forest": ("in a {}", "in the {}"),
}
STYLE_WORDS = {
    "flat": ("flat style", "flat illustration"),
    "pencil": ("pencil style", "pencil drawing"),
    "pixel": ("pixel style", "pixel art"),
    "neon": ("neon style", "neon lights"),
    "print": ("print style", "two ink print"),
}
WEAR = ("in {}", "wearing {}", "with {}", "in {}")
HOLD = ("holding {}", "with {}", "and {}", "holding {}")
OPENINGS = ("{}", "{}", "{}", "a picture of {}", "a drawing of {}")
SILENT = 0.1  # how often a background or a style is not mentioned


def _article(words):
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _thing(scene, category, rng):
    kind = getattr(scene, category)
    name = scene.designs.get(category)
    if name:
        return _article(DESIGNS[name].trigger)
    noun = rng.choice(NOUNS.get(kind, (kind,)))
    colour = getattr(scene, f"{category}_colour")
    if colour is None or (scene.style == "print" and rng.random() < 0.5):
        return _article(noun)
    return _article(f"{colour} {noun}")


def _place(scene, rng):
    name = scene.designs.get("background")
    if name:
        design = DESIGNS[name]
        return rng.choice(DESIGNED_PLACES.get(design.kind, ("in a {}",))).format(design.trigger)
    if rng.random() < (0.5 if scene.background == "plain" else SILENT):
        return None
    return rng.choice(PLACES[scene.background])


def _style(scene, rng):
    name = scene.designs.get("style")
    if name:
        return DESIGNS[name].trigger + rng.choice((" style", ""))
    if rng.random() < (0.5 if scene.style == "flat" else SILENT / 2):
        return None
    return rng.choice(STYLE_WORDS[scene.style])


def caption(scene, seed=0):
    """One caption; another `seed`, another wording."""
    rng = random.Random(f"{scene.seed}/{seed}/caption")
    who = _thing(scene, "character", rng)
    parts = [who]
    if scene.garment != "none":
        parts.append(rng.choice(WEAR).format(_thing(scene, "garment", rng)))
    if scene.object != "none":
        parts.append(rng.choice(HOLD).format(_thing(scene, "object", rng)))
    text = rng.choice(OPENINGS).format(" ".join(parts))
    place, style = _place(scene, rng), _style(scene, rng)
    if place:
        text += rng.choice((", ", " ")) + place
    if style:
        text = f"{style}, {text}" if rng.random() < 0.2 else f"{text}, {style}"
    return text
