"""The main job, which `multilora compose` runs without arguments: one scene, four LoRAs of the embedded library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

METHODS = ("merge", "guided_merge", "switch", "composite")
# One of each; a library that lacks a name gives its first one of that category.
CHOICE = {"character": "korv", "garment": "dotta", "object": "burgo", "background": "palma"}
SEED = 3
SENTENCE = "{character} in {garment} holding {object}, on {background}, flat style"
# Colours of the plain things that stand in for a LoRA's: without it, its trigger is a word the base does not know.
PLAIN = {"character": "purple", "garment": "green"}
BARE = {"character": "a fox", "garment": "a robe", "object": "a sandwich", "background": "a beach"}


def scene(library: Mapping[str, Mapping[str, Any]]) -> tuple[str, list[str]]:
    """(prompt, names of four LoRAs of different categories).

    Raises ValueError when the library has fewer than four of the categories.
    """
    names, words = [], dict(BARE)
    for category, wanted in CHOICE.items():
        of = sorted((e for e in library.values() if e["category"] == category), key=lambda e: e.get("split", ""))
        entry = library.get(wanted) or next(iter(reversed(of)), None)
        if entry is not None and entry["category"] == category:
            names.append(entry["name"])
            words[category] = _article(entry["trigger"])
    if len(names) < len(CHOICE):
        raise ValueError(
            f"the embedded library has LoRAs of {len(names)} of the categories {', '.join(CHOICE)}; the demonstration "
            "needs one of each. Rebuild it with: multilora world train"
        )
    return SENTENCE.format(**words), names


def alone(library: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, str]:
    """The prompts of the pictures with one of the LoRAs, by its name, and "" for none: plain things for the others."""
    plain = dict(BARE)
    for name in names:
        category, kind = library[name]["category"], library[name]["class_word"]
        plain[category] = _article(f"{PLAIN.get(category, '')} {kind}".strip())
    own = {name: {library[name]["category"]: _article(library[name]["trigger"])} for name in names}
    return {name: SENTENCE.format(**{**plain, **words}) for name, words in {"": {}, **own}.items()}


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
