"""The Compose page: prompt, LoRAs, method and settings become a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from multilora.method import methods
from multilora.recipe import LoraUse, Recipe
from multilora.web.service import Compose, Entry, Service, Session
from multilora.web.shell import Shell


def page(shell: Shell) -> None:
    """The page, built from the library and the method records."""
    service = shell.service
    choices = [(f"{name.replace('_', ' ')}: {record.title}", name) for name, record in methods("route").items()]

    def compose(
        prompt: str, names: list[str], method: str, weight: float, seed: float, request: gr.Request
    ) -> Iterator[tuple[Any, str]]:
        """Draw the prompt with these LoRAs; yields previews, then the picture and its settings as text."""
        yield from drawn(service, shell.session(request), prompt, names, method, weight, int(seed))

    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(label="Prompt, with the triggers of the LoRAs", lines=2)
            loras = gr.Dropdown(_listed(service.library(service.session("page"))), label="LoRAs", multiselect=True)
            method = gr.Dropdown(choices, value="merge", label="Method")
            weight = gr.Slider(0, 2, 1, step=0.05, label="Weight of each LoRA")
            seed = gr.Number(7, label="Seed", precision=0, minimum=0)
            button = gr.Button("Draw", variant="primary")
            stop = gr.Button("Stop")
        with gr.Column():
            picture = gr.Image(label="Picture", format="png")
            settings = gr.Textbox(label="Settings", lines=3)
    running = button.click(compose, [prompt, loras, method, weight, seed], [picture, settings], api_name="compose")
    stop.click(None, cancels=[running])  # closes the generator, which cancels the job


def drawn(
    service: Service, session: Session, prompt: str, names: Sequence[str], method: str, weight: float, seed: int
) -> Iterator[tuple[Any, str]]:
    """(picture or None, text) as the job goes on. `names` are references of the library.

    Raises gradio's Error, in words, for what is refused or fails.
    """
    try:
        facts = service.about()
        uses = [LoraUse(name=service.entry(session, n).name, reference=n, weight=weight) for n in names or []]
        recipe = Recipe(
            prompt=prompt, base=facts["base"], base_family=facts["family"], loras=uses, method=method, seed=seed,
            steps=facts["steps"], guidance_scale=facts["guidance_scale"], width=facts["width"],
            height=facts["height"], scheduler=facts["scheduler"],
        )  # fmt: skip
        job = service.submit(Compose(recipe=recipe), session)
    except ValueError as error:  # Refused and pydantic's are ValueErrors
        raise gr.Error(str(error)) from None
    image = None
    for event in job.events():
        if event.kind == "queued":
            yield image, f"waiting, {event.position} before you"
        elif event.kind == "progress":
            yield image, f"step {event.step} of {event.steps}"
        elif event.kind == "preview":
            image = event.image
        elif event.kind == "error":
            raise gr.Error(event.message)
    if job.last.kind == "cancelled":
        yield image, "cancelled"
        return
    made = job.result().pictures[0]
    yield made.image, made.recipe.parameters()


def _listed(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    return [(f"{e.name} ({e.category}): write '{e.trigger}'" if e.trigger else e.name, e.reference) for e in entries]
