"""Under a picture that a gate had a part in: what the gate did, layer by layer and step by step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from multilora.method import methods
from multilora.recipe import Recipe
from multilora.web import history, words
from multilora.web.endpoints import endpoint, telling
from multilora.web.said import followed
from multilora.web.service import GateMap, Refused
from multilora.web.shell import Shell


def gated(method: str) -> bool:
    """Whether a route method asks a gate, trained or not (Arrow's needs no training)."""
    record = methods("route").get(method)
    return record is not None and (method == "arrow" or any(o.name == "gate" for o in record.options))


class MapOfGate:
    """The components; `of` gives their values for a picture. name: component with the file's name in the history."""

    def __init__(self, shell: Shell, name: Any):
        self.shell = shell
        with gr.Accordion("What the gate did", open=False, visible=False) as self.group:
            ask = gr.Button("Draw it once more and look", size="md", elem_id="ml-gate")
            self.said = gr.HTML("", apply_default_css=False)
            self.image = gr.Image(show_label=False, interactive=False, type="filepath", format="png", visible=False,
                                  buttons=["download", "fullscreen"], elem_id="ml-gate-map")  # fmt: skip
        self.components = [self.group, self.said, self.image]
        ask.click(self._look, name, [self.said, self.image], api_visibility="private", show_progress="hidden")

    def of(self, recipe: Recipe | None) -> dict[Any, Any]:
        """Shown for a picture of a gated method; without a map until one is asked for."""
        shown = recipe is not None and gated(recipe.method)
        return {self.group: gr.update(visible=shown), self.said: "", self.image: gr.update(value=None, visible=False)}

    def _look(self, name: str, request: gr.Request) -> Iterator[dict[Any, Any]]:
        session = self.shell.session(request)
        try:
            recipe = history.kept(session, name).recipe
            job = self.shell.service.submit(GateMap(recipe=unresolved(recipe)), session)
            going = followed(job, "drawing it once more")
            result = yield from telling(going, lambda line: {self.said: words.status(line, "busy")})
        except ValueError as error:
            yield {self.said: words.status(str(error), "error")}
            return
        yield {self.said: told(result.facts), self.image: gr.update(value=str(result.files[0].path), visible=True)}


def unresolved(recipe: Recipe) -> Recipe:
    """The picture of a recipe by itself: its own seed, and nothing that binds it to one machine."""
    return recipe.model_copy(update={"resolved": None, "seed": recipe.seed + recipe.index, "index": 0, "images": 1})


def told(facts: dict[str, Any]) -> str:
    """The two numbers of a map, explained."""
    even = 1 / max(1, len(facts["names"]))
    return words.status(
        f"The strongest LoRA has {facts['strongest']:.2f} of all shares ({even:.2f} would be even); in each place the "
        f"largest share is {facts['sharpest']:.2f} on average.", "done"
    )  # fmt: skip


def map_endpoint(shell: Shell) -> None:
    """The same for programs; called inside the app's blocks."""

    def gate_map(recipe: dict, request: gr.Request = None) -> tuple[Path, dict]:
        """Draw a recipe of a gated method (mole, arrow) and show what its gate does in every layer at every step.

        Args:
            recipe: as `read_recipe` gives it

        Returns:
            a PNG, and {"strongest", "sharpest", "names"}
        """
        said = Recipe.checked(recipe)
        if not gated(said.method):
            raise Refused(f"method {said.method!r} asks no gate")
        result = shell.service.submit(GateMap(recipe=unresolved(said)), shell.session(request)).result()
        return result.files[0].path, result.facts

    endpoint(gate_map)
