"""The left side of Compose: everything that decides a picture, as components, and their values as settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from multilora.cli.demo import METHODS
from multilora.web.method_blocks import MethodBlocks, titled
from multilora.web.picker import picker, shelf
from multilora.web.service import Entry, Service

FLAGS = ("preview", "score")


class Controls:
    """Built where it is made.

    components  all controls in the order in which `read` takes their values and `write` gives them
    """

    def __init__(self, service: Service):
        entries = service.library(service.session("page"))
        self.prompt = gr.Textbox(
            label="Prompt", lines=2, max_lines=6, elem_id="ml-prompt", submit_btn=False,
            info="What to draw. LoRAs answer to their trigger words, which a click writes. Shift+Enter draws.",
            placeholder="a korv fox in a dotta poncho, on a palma beach",
        )  # fmt: skip
        self.loras = picker(entries, elem_id="ml-loras")
        self.method = MethodBlocks(
            "route", "auto", label="Method", elem_id="ml-method", info="How several LoRAs share one picture."
        )
        self.compared = gr.CheckboxGroup(
            titled(self.method.records), value=list(METHODS), label="Compare methods draws each of these",
            elem_id="ml-compared", info="The same prompt, LoRAs and seed under every method that is ticked.",
        )  # fmt: skip
        with gr.Accordion("Seed, steps, size and more", open=False, elem_id="ml-settings"):
            with gr.Row():
                self.seed = gr.Number(7, label="Seed", precision=0, minimum=0, elem_id="ml-seed", min_width=120,
                                      info="One seed, one picture: the starting noise.")  # fmt: skip
                dice = gr.Button("New seed", size="sm", min_width=90, elem_classes="ml-beside")
            with gr.Row():
                self.steps = gr.Number(None, label="Steps", precision=0, minimum=1, elem_id="ml-steps", min_width=120,
                                       info="Denoising steps; more take longer.")  # fmt: skip
                self.guidance = gr.Number(None, label="Guidance", step=0.5, min_width=120,
                                          info="How strongly the prompt pulls; 1 is not at all.")  # fmt: skip
            with gr.Row():
                self.width = gr.Number(None, label="Width", precision=0, step=8, minimum=8, elem_id="ml-width",
                                       min_width=120, info="pixels")  # fmt: skip
                self.height = gr.Number(None, label="Height", precision=0, step=8, minimum=8, elem_id="ml-height",
                                        min_width=120, info="pixels")  # fmt: skip
            self.negative = gr.Textbox(
                label="Negative prompt", lines=1, info="What not to draw.", elem_id="ml-negative"
            )
            with gr.Row():
                self.scheduler = gr.Dropdown([], value=None, label="Scheduler", min_width=200, allow_custom_value=True,
                                             info="The rule that removes the noise, step by step.")  # fmt: skip
                self.base = gr.Dropdown(
                    list(service.bases), value=service.bases[0], label="Base model", min_width=200,
                    allow_custom_value=service.open_bases, visible=len(service.bases) > 1 or service.open_bases,
                    info="The model that the LoRAs change: embedded, a folder or a hub id.",
                )  # fmt: skip
            with gr.Row():
                self.preview = gr.Checkbox(True, label="Live preview", info="Show the picture as it grows.")
                self.score = gr.Checkbox(True, label="Score it", info="CLIP score, and is each LoRA's thing there?")
        dice.click(None, None, self.seed, js="() => Math.floor(Math.random() * 2 ** 31)", api_visibility="private")
        self.plain = {
            "prompt": self.prompt, "loras": self.loras, "seed": self.seed, "steps": self.steps,
            "guidance_scale": self.guidance, "width": self.width, "height": self.height,
            "negative_prompt": self.negative, "scheduler": self.scheduler, "base": self.base,
        }  # fmt: skip
        flags = [self.preview, self.score, self.compared]
        self.components = [*self.plain.values(), *self.method.components, *flags]

    def read(self, values: Sequence[Any]) -> tuple[dict[str, Any], dict[str, bool]]:
        """(settings as `asked.recipe_of` takes them, preview and score) of the components' values."""
        settings = dict(zip(self.plain, values, strict=False))
        method, options = self.method.read(values[len(self.plain) : -3])
        settings |= {"method": method, "options": options[method]}
        return settings, dict(zip(FLAGS, map(bool, values[-3:-1]), strict=True))

    def read_compared(self, values: Sequence[Any]) -> list[tuple[str, dict[str, Any]]]:
        """(method, options) of each that is ticked."""
        _, options = self.method.read(values[len(self.plain) : -3])
        return [(name, options[name]) for name in values[-1] or []]

    def write(self, settings: dict[str, Any]) -> list[Any]:
        """Values of the components for settings."""
        chosen = self.method.write(settings["method"], settings["options"])
        return [*(settings[name] for name in self.plain), *chosen, *[gr.skip()] * 3]

    def on_shelf(self, entries: Sequence[Entry]) -> Any:
        """A change of `loras` to another library."""
        return gr.HTML(library=shelf(entries))

    def defaults(self, facts: dict[str, Any]) -> dict[Any, Any]:
        """A base's own settings, as changes by component."""
        own = facts.get("scheduler")
        return {
            self.steps: facts["steps"], self.guidance: facts["guidance_scale"], self.width: facts["width"],
            self.height: facts["height"], self.base: facts["base"],
            self.scheduler: gr.Dropdown(facts.get("schedulers") or [own or ""], value=own),
        }  # fmt: skip
