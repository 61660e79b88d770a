"""The web app's shell: pages in tabs, theme and launch; `multilora app` and `python app.py` serve it.

A page is a module of this folder with `page(shell)`, which builds its blocks, and a line in PAGES.
"""

from __future__ import annotations

import importlib
from typing import Any

import gradio as gr

from multilora.web.service import Service
from multilora.web.shell import Shell

# id of the tab (also of a link: `?page=compose`), its title, the module
PAGES = (("compose", "Compose", "multilora.web.compose"),)


def build(service: Service) -> gr.Blocks:
    """The app with every page on this service."""
    with gr.Blocks(title="multilora", analytics_enabled=False) as app:
        gr.Markdown("# multilora\nSeveral LoRAs in one picture.")
        library = gr.State("")
        with gr.Tabs(selected=PAGES[0][0]) as tabs:
            shell = Shell(service, app, tabs, library)
            for name, title, module in PAGES:
                with gr.Tab(title, id=name):
                    importlib.import_module(module).page(shell)
    return app


def launch(service: Service, **options: Any) -> None:
    """Serve the app until the process is interrupted; options are gradio's `launch`'s."""
    app = build(service)
    app.queue(default_concurrency_limit=service.limits.waiting + len(service.workers))
    app.launch(**options)
