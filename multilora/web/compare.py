"""Comparison: one recipe under several methods, side by side, and two of them under a slider."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from multilora.web import history, words
from multilora.web.asked import Restored, recipe_of
from multilora.web.controls import Controls
from multilora.web.service import Compare, Refused, Service, Session


class Sheet:
    """The components: pictures with captions, two drop-downs and the slider between what they name."""

    def __init__(self):
        self.pictures = gr.Gallery(
            show_label=False, columns=2, height="auto", object_fit="contain", interactive=False, preview=False,
            elem_id="ml-sheet", buttons=["fullscreen"],
        )  # fmt: skip
        self.drawn = gr.State([])  # (caption, path) of each picture
        with gr.Row():
            self.left = gr.Dropdown([], label="Left of the slider", filterable=False, min_width=140)
            self.right = gr.Dropdown([], label="Right of the slider", filterable=False, min_width=140)
        self.slider = gr.ImageSlider(
            show_label=False, interactive=False, type="filepath", elem_id="ml-slider", buttons=["fullscreen"],
            max_height=480,
        )  # fmt: skip
        self.components = [self.pictures, self.drawn, self.left, self.right, self.slider]
        for side in (self.left, self.right):
            side.input(_between, [self.left, self.right, self.drawn], self.slider, queue=False,
                       show_progress="hidden", api_visibility="private")  # fmt: skip

    def of(self, drawn: Sequence[history.Kept]) -> dict[Any, Any]:
        """Values of the components for the pictures so far."""
        named = [(k.recipe.method.replace("_", " "), str(k.path)) for k in drawn]
        captions = [f"{name}: {words.short(k.scores)}".rstrip(": ") for (name, _), k in zip(named, drawn, strict=True)]
        names = [name for name, _ in named]
        return {
            self.pictures: [(path, caption) for (_, path), caption in zip(named, captions, strict=True)],
            self.drawn: named,
            self.left: gr.update(choices=names, value=names[0]),
            self.right: gr.update(choices=names, value=names[-1]),
            self.slider: (named[0][1], named[-1][1]) if len(named) > 1 else None,
        }


def request(
    service: Service, session: Session, controls: Controls, values: Sequence[Any], restored: Restored | None
) -> Compare:
    """The request for what the controls say. Raises ValueError when no method is ticked, or as `recipe_of` does."""
    methods = controls.read_compared(values)
    if not methods:
        raise Refused("Tick at least one method to compare, below Method.")
    settings, flags = controls.read(values)
    return asked(service, session, settings, methods, restored, **flags)


def asked(
    service: Service,
    session: Session,
    settings: dict[str, Any],
    methods: Sequence[tuple[str, dict[str, Any]]],
    restored: Restored | None = None,
    **flags: bool,
) -> Compare:
    """The request for one picture per (method, options). Raises ValueError as `recipe_of` does."""
    recipes, masks = [], {}
    for method, options in methods:
        recipe, own = recipe_of(service, session, {**settings, "method": method, "options": options}, restored)
        recipes.append(recipe)
        masks |= own
    return Compare(recipes=tuple(recipes), masks=masks, **flags)


def _between(left: str, right: str, drawn: list[tuple[str, str]]) -> tuple[str, str] | None:
    paths = dict(drawn)
    return (paths[left], paths[right]) if left in paths and right in paths else None
