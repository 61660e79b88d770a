"""Compose and Recipe for programs: typed endpoints of the API, and tools of the MCP server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from multilora.method import methods
from multilora.recipe import Recipe
from multilora.web import compare, elsewhere, history
from multilora.web.asked import recipe_of, settings_of
from multilora.web.endpoints import endpoint
from multilora.web.service import Compose, Job, Picture
from multilora.web.service.door import draws
from multilora.web.shell import Shell

TOLD_EVERY = 1.0  # seconds between two messages to a client that waits


def endpoints(shell: Shell) -> None:
    """Make the endpoints; called inside the app's blocks."""
    service = shell.service

    @draws
    def compose(
        request: gr.Request, prompt: str, loras: list[Any] | None = None, method: str = "auto",
        options: dict[str, Any] | None = None, negative_prompt: str = "", seed: int = 7, steps: int | None = None,
        guidance_scale: float | None = None, width: int | None = None, height: int | None = None,
        scheduler: str | None = None, score: bool = False, base: str | None = None,
    ) -> Iterator[tuple[Path | None, dict]]:  # fmt: skip
        """Draw a picture with several LoRAs.

        Args:
            prompt: what to draw, with the trigger words of the LoRAs
            loras: references of the library such as "korv", or objects {"reference": "korv", "weight": 0.8}; weight is a number or a schedule such as "0@0,1@0.5"; further fields: name, text_encoder_weight, blocks, positive_only, mask (a PNG in base64)
            method: how LoRAs are combined, a name that `methods` lists
            options: the method's own options, such as {"every": 5} for switch
            negative_prompt: what not to draw
            seed: of the starting noise; one seed, one picture
            steps: denoising steps; none is the base's own number, as with all that follow
            guidance_scale: how strongly the prompt pulls
            width: in pixels
            height: in pixels
            scheduler: a diffusers class name
            score: also measure CLIP score and the presence of each LoRA's element
            base: the model, when the server has several

        Returns:
            the PNG, which holds its recipe, and {"recipe", "scores", "seconds"}; while it runs, the step
        """  # noqa: E501
        session = shell.session(request)
        settings = {
            "prompt": prompt, "loras": loras or [], "method": method, "options": options or {},
            "negative_prompt": negative_prompt, "seed": seed, "steps": steps, "guidance_scale": guidance_scale,
            "width": width, "height": height, "scheduler": scheduler, "base": base,
        }  # fmt: skip
        recipe, masks = recipe_of(service, session, settings)
        job = service.submit(Compose(recipe=recipe, masks=masks, preview=False, score=score), session)
        for step in _steps(job):
            yield None, step
        (picture,) = job.result().pictures
        yield history.keep(session, picture).path, _about(picture)

    @draws
    def compose_recipe(request: gr.Request, recipe: dict, score: bool = False) -> Iterator[tuple[Path | None, dict]]:
        """Make a picture again from its recipe, to the bit where nothing that decides bits has changed.

        Args:
            recipe: as `read_recipe` gives it
            score: also measure CLIP score and presence

        Returns:
            the PNG, and {"recipe", "scores", "seconds", "notes"}
        """
        session = shell.session(request)
        found, notes = settings_of(service, session, Recipe.checked(recipe))
        if not found.whole:
            raise ValueError(" ".join(notes))
        again, masks = recipe_of(service, session, found.settings, found)
        job = service.submit(Compose(recipe=again, masks=masks, preview=False, score=score), session)
        for step in _steps(job):
            yield None, step
        (picture,) = job.result().pictures
        yield history.keep(session, picture).path, {**_about(picture), "notes": notes}

    @draws
    def compare_methods(
        request: gr.Request, prompt: str, loras: list[Any], method_names: list[str] | None = None,
        negative_prompt: str = "", seed: int = 7,
        steps: int | None = None, guidance_scale: float | None = None, score: bool = True,
    ) -> Iterator[tuple[list[Path] | None, dict]]:  # fmt: skip
        """Draw one prompt, LoRAs and seed under several methods.

        Args:
            prompt: what to draw, with the trigger words of the LoRAs
            loras: as for `compose`
            method_names: names that `methods` lists; none is merge, switch, composite and sum_of_differences
            negative_prompt: what not to draw
            seed: of the starting noise
            steps: denoising steps
            guidance_scale: how strongly the prompt pulls
            score: also measure CLIP score and presence

        Returns:
            a PNG per method, and {"pictures": [{"recipe", "scores", "seconds"}, ...]}
        """
        from multilora.cli.demo import METHODS

        session = shell.session(request)
        settings = {"prompt": prompt, "loras": loras, "negative_prompt": negative_prompt, "seed": seed,
                    "steps": steps, "guidance_scale": guidance_scale}  # fmt: skip
        chosen = [(name, {}) for name in method_names or METHODS]
        wanted = compare.asked(service, session, settings, chosen, preview=False, score=score)
        job = service.submit(wanted, session)
        for step in _steps(job):
            yield None, step
        pictures = job.result().pictures
        yield [history.keep(session, p).path for p in pictures], {"pictures": [_about(p) for p in pictures]}

    def read_recipe(picture: Path) -> dict:
        """The recipe that a PNG of multilora carries.

        Args:
            picture: the PNG as it was downloaded; programs that save a copy often drop the recipe

        Returns:
            the recipe, as `compose_recipe` takes it
        """
        return Recipe.from_png(picture).model_dump(mode="json")

    def share_recipe(recipe: dict) -> dict:
        """A recipe for use elsewhere.

        Args:
            recipe: as `read_recipe` gives it

        Returns:
            {"query", "command", "python"}: what a link to this app ends with, a command line, a program
        """
        said = Recipe.checked(recipe)
        query = f"?{elsewhere.LINK}={elsewhere.packed(said)}"
        return {"query": query, "command": elsewhere.command(said), "python": elsewhere.python(said)}

    def list_methods() -> list:
        """The methods by which LoRAs are combined during a run.

        Returns:
            for each: name, title, cost in runs of the model per step (k LoRAs), paper, options
        """
        return [
            {"name": m.name, "title": m.title, "cost": m.cost, "paper": m.paper,
             "options": [{"name": o.name, "type": o.type.__name__, "default": o.default, "help": o.help,
                          "minimum": o.minimum, "maximum": o.maximum, "choices": list(o.choices)} for o in m.options]}
            for m in methods("route").values()
        ]  # fmt: skip

    for fn in (compose, compose_recipe, compare_methods, read_recipe, share_recipe, list_methods):
        endpoint(fn)


def _steps(job: Job) -> Iterator[dict[str, Any]]:
    """How far a job is, now and then; it ends with the job."""
    last = time.monotonic()
    for event in job.events():
        if event.kind == "progress" and time.monotonic() - last >= TOLD_EVERY:
            last = time.monotonic()
            yield {"step": event.step, "steps": event.steps, "number": event.number, "of": event.of}


def _about(picture: Picture) -> dict[str, Any]:
    return {"recipe": picture.recipe.model_dump(mode="json"), "scores": picture.scores, "seconds": picture.seconds}
