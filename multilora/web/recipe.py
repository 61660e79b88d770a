"""The Recipe page: drop a picture in, and every control of Compose says what it was made with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from multilora.recipe import Recipe
from multilora.web import elsewhere, said
from multilora.web.shell import Shell

HELP = """A picture that was drawn here is a PNG with its recipe inside: prompt, LoRAs and their weights, method, seed,
and the versions that decide its bits. Drop the file as it was downloaded (many programs drop the recipe when they save
a copy), or paste a link. Compose then has every control as it was, and **Draw** makes the same picture."""


def page(shell: Shell) -> None:
    """The page. It fills the controls of Compose, which stands before it in the list of pages."""
    private = {"api_visibility": "private", "show_progress": "hidden"}
    gr.HTML(said.STYLE)
    gr.Markdown(HELP)
    with gr.Row():
        with gr.Column(min_width=320):
            file = gr.File(
                label="A PNG that was drawn here", file_types=[".png"], type="filepath", height=150, elem_id="ml-drop"
            )
            text = gr.Textbox(label="Or a link, or a recipe as JSON", lines=2, elem_id="ml-pasted")
            read = gr.Button("Read it", size="md")
            state = gr.HTML("", apply_default_css=False, elem_id="ml-read")
            to_compose = gr.Button("Open in Compose", variant="primary", interactive=False, elem_id="ml-open")
        with gr.Column(min_width=320):
            table = gr.HTML("", apply_default_css=False)
    held = gr.State(None)

    def take(recipe: Recipe, request: gr.Request) -> dict[Any, Any]:
        """Fill the controls and say what was found."""
        values = shell.restore(recipe, shell.session(request))
        return {
            **dict(zip(shell.controls, values, strict=True)),
            held: recipe.json,
            table: _table(recipe),
            state: said.said("Every control of Compose is set to this recipe."),
            to_compose: gr.Button(interactive=True),
        }

    def refused(error: ValueError) -> dict[Any, Any]:
        return {state: said.said(str(error), bad=True), table: "", to_compose: gr.Button(interactive=False)}

    def dropped(path: str | None, request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Read a file."""
        if path is None:
            yield {state: ""}
            return
        try:
            yield take(Recipe.from_png(path), request)
        except ValueError as error:
            yield refused(ValueError(str(error).replace(path, path.rpartition("/")[2])))

    def pasted(words: str, request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Read a link or JSON."""
        try:
            yield take(read_text(words), request)
        except ValueError as error:
            yield refused(error)

    outputs = [*shell.controls, held, table, state, to_compose]
    file.change(dropped, file, outputs, **private)
    read.click(pasted, text, outputs, **private)
    text.submit(pasted, text, outputs, **private)
    to_compose.click(lambda: gr.Tabs(selected="compose"), None, shell.tabs, queue=False, **private)


def read_text(words: str) -> Recipe:
    """The recipe of a link or of JSON. Raises RecipeError in words."""
    words = words.strip()
    if words.startswith("{"):
        return Recipe.read(words, "this text")
    mark = f"{elsewhere.LINK}="
    return elsewhere.unpacked(words.rpartition(mark)[2].partition("&")[0] if mark in words else words)


def _table(recipe: Recipe) -> str:
    """The recipe in words."""
    rows: dict[str, Any] = {"prompt": recipe.prompt, "not": recipe.negative_prompt}
    for use in recipe.loras:
        extra = [f"weight {use.weight}"]
        extra += [f"text encoder {use.text_encoder_weight:g}"] if use.text_encoder_weight is not None else []
        extra += ["positive only"] if use.positive_only else []
        extra += ["masked"] if use.mask_sha256 else []
        extra += [f"blocks {use.blocks}"] if use.blocks else []
        rows[f"LoRA {use.name}"] = ", ".join(extra)
    options = ", ".join(f"{k}={v}" for k, v in recipe.options.items())
    rows |= {
        "method": f"{recipe.method.replace('_', ' ')}{f' ({options})' if options else ''}",
        "seed": str(recipe.seed + recipe.index), "steps": str(recipe.steps), "guidance": f"{recipe.guidance_scale:g}",
        "size": f"{recipe.width} x {recipe.height}", "scheduler": recipe.scheduler, "base": recipe.base,
    }  # fmt: skip
    if recipe.resolved:
        made = recipe.resolved
        rows["chosen"] = made.choice
        rows["made on"] = (
            f"{made.device}, {made.dtype}, {made.threads} thread{'s' if made.threads > 1 else ''}, {made.form}"
        )
        rows["versions"] = made.versions
    return said.facts(rows, "What it was made with")
