"""The web app's front door: `python app.py`. One page for now; its pages will live in multilora/web."""

from __future__ import annotations

import functools
from typing import Any

from multilora.method import methods
from multilora.pipelines.load import EMBEDDED, library


@functools.cache
def composer() -> Any:
    """The embedded pipeline, loaded when the first picture is asked for."""
    from multilora.pipelines.image import Composer

    return Composer.from_pretrained(EMBEDDED)


def compose(prompt: str, names: list[str], method: str, weight: float, seed: float) -> tuple[Any, str]:
    """Draw the prompt with these LoRAs of the embedded library; returns the picture and its settings as text."""
    import gradio as gr

    from multilora.pipelines.image import Composer

    try:
        mine = Composer(composer().pipe, base=EMBEDDED)  # a list of LoRAs of its own; the pipeline runs one at a time
        for name in names:
            mine.add(name, weight=weight)
        out = mine(prompt, method=method, seed=int(seed))
    except ValueError as error:
        raise gr.Error(str(error)) from None
    return out.images[0], out.recipe.parameters()


def page() -> Any:
    """The page, built from the library and the method records."""
    import gradio as gr

    entries, records = library(), methods("route")
    names = [(f"{e['name']} ({e['category']}): write '{e['trigger']}'", e["name"]) for e in entries.values()]
    choices = [(f"{name.replace('_', ' ')}: {record.title}", name) for name, record in records.items()]
    with gr.Blocks(title="multilora") as app:
        gr.Markdown("# multilora\nSeveral LoRAs in one picture.")
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(label="Prompt, with the triggers of the LoRAs", lines=2)
                loras = gr.Dropdown(names, label="LoRAs", multiselect=True)
                method = gr.Dropdown(choices, value="merge", label="Method")
                weight = gr.Slider(0, 2, 1, step=0.05, label="Weight of each LoRA")
                seed = gr.Number(7, label="Seed", precision=0, minimum=0)
                button = gr.Button("Draw", variant="primary")
            with gr.Column():
                picture = gr.Image(label="Picture", format="png")
                settings = gr.Textbox(label="Settings", lines=3)
        inputs = [prompt, loras, method, weight, seed]
        button.click(compose, inputs, [picture, settings], api_name="compose", concurrency_limit=1)
    return app


if __name__ == "__main__":
    page().launch()
