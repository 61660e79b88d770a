"""A choice of LoRAs: a list to type in, and the pictures of the library to pick from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from multilora.web.service import Entry
from multilora.web.shell import Shell

SHARED = "page"  # the session by which pages see what everyone may use, before a browser asks


def listed(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """Choices of a list: name, category and trigger shown, the reference meant."""
    return [
        (f"{e.name} ({e.category})" + (f", trigger: {e.trigger}" if e.trigger else ""), e.reference) for e in entries
    ]


def tiles(entries: Sequence[Entry]) -> list[tuple[Any, str]]:
    """Pictures of a gallery with names; a grey one where there is no preview."""
    return [(str(e.preview) if e.preview else _blank(), e.name) for e in entries]


def _blank() -> Any:
    from PIL import Image

    return Image.new("RGB", (64, 64), (128, 128, 128))


class Shelf:
    """The choice on one page. `loras`: the gr.Dropdown whose value is the references, in the order chosen."""

    def __init__(self, shell: Shell, label: str, info: str):
        self.shell = shell
        entries = shell.service.library(shell.service.session(SHARED))
        self.loras = gr.Dropdown(listed(entries), value=[], label=label, info=info, multiselect=True)
        with gr.Accordion("Library: click a picture to add it, again to take it out", open=True):
            self.gallery = gr.Gallery(
                tiles(entries), show_label=False, columns=6, height=300, allow_preview=False, interactive=False,
                object_fit="cover", elem_classes="ml-shelf", buttons=[],
            )  # fmt: skip
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        self.gallery.select(self._toggled, self.loras, [self.loras, self.gallery], **private)
        shell.app.load(self._listed, self.loras, [self.loras, self.gallery], **private)
        shell.library.change(self._listed, self.loras, [self.loras, self.gallery], **private)

    def _toggled(self, chosen: list[str], event: gr.SelectData, request: gr.Request) -> tuple[Any, Any]:
        entries = self.shell.service.library(self.shell.session(request))
        index = event.index if isinstance(event.index, int) else -1
        if not 0 <= index < len(entries):
            return gr.skip(), gr.skip()
        reference = entries[index].reference
        left = [r for r in chosen if r != reference]
        return (left if reference in chosen else [*chosen, reference]), gr.Gallery(selected_index=None)

    def _listed(self, chosen: list[str], request: gr.Request) -> tuple[Any, Any]:
        """What this user has now; what was chosen and is gone is taken out."""
        entries = self.shell.service.library(self.shell.session(request))
        known = {e.reference for e in entries}
        value = [r for r in chosen or [] if r in known]
        return gr.Dropdown(listed(entries), value=value), gr.Gallery(tiles(entries), selected_index=None)
