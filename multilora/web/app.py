"""The web app's shell: pages in tabs, theme and launch; `multilora app` and `python app.py` serve it.

A page is a module of this folder with `page(shell)`, which builds its blocks, and a line in PAGES.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import gradio as gr

from multilora.web.service import Service
from multilora.web.shell import Shell

# id of the tab, its title, the module. `?tab=compose` opens it; `page` is gradio's own word, for another kind of page.
# Recipe fills the controls of Compose, built before.
PAGES = (
    ("compose", "Compose", "multilora.web.compose"),
    ("merge", "Merge", "multilora.web.merge"),
    ("library", "Library", "multilora.web.library"),
    ("text", "Text", "multilora.web.text"),
    ("evaluate", "Evaluate", "multilora.web.evaluate"),
    ("weights", "Weights", "multilora.web.search"),
    ("recipe", "Recipe", "multilora.web.recipe"),
)
STYLE = Path(__file__).parent / "static" / "app.css"
DARK = """() => {
  const dark = document.body.classList.toggle("dark");
  localStorage.setItem("multilora-dark", dark ? "1" : "0");
}"""
# What was chosen last time, else what the system says, which gradio follows by itself. A phone that may zoom out
# lays the page out anew, twice as wide, as soon as one thing in it is wider than the screen.
REMEMBER = """() => {
  document.querySelector("meta[name=viewport]").content += ", minimum-scale=1";
  const chosen = localStorage.getItem("multilora-dark");
  if (chosen !== null && !location.search.includes("__theme")) document.body.classList.toggle("dark", chosen === "1");
}"""


def build(service: Service) -> gr.Blocks:
    """The app with every page on this service."""
    with gr.Blocks(title="multilora", analytics_enabled=False, delete_cache=(3600, 6 * 3600)) as app:
        with gr.Row(elem_classes="ml-title-bar"):
            gr.Markdown("# multilora\nSeveral LoRAs in one picture.")
            dark = gr.Button("Light / dark", size="sm", min_width=110)
        dark.click(None, None, None, js=DARK, api_visibility="private")
        library = gr.State("")
        with gr.Tabs(selected=PAGES[0][0]) as tabs:
            shell = Shell(service, app, tabs, library)
            for name, title, module in PAGES:
                with gr.Tab(title, id=name):
                    importlib.import_module(module).page(shell)

        def wanted(request: gr.Request) -> Any:
            """Open the page that the link names."""
            page = request.query_params.get("tab", "")
            return gr.Tabs(selected=page) if page in [name for name, *_ in PAGES] else gr.skip()

        app.load(wanted, None, tabs, queue=False, show_progress="hidden", api_visibility="private")
        app.load(None, None, None, js=REMEMBER, api_visibility="private")
    return app


def look() -> dict[str, Any]:
    """Theme and style, for gradio's `launch`. Fonts are the system's: nothing is loaded from elsewhere."""
    theme = gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    # gradio's own grey has a contrast of 2.6 on white, too little for words.
    theme = theme.set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")
    return {"theme": theme, "css_paths": [STYLE]}


def launch(service: Service, **options: Any) -> tuple[gr.Blocks, str]:
    """Serve the app until the process is interrupted; options are gradio's `launch`'s.

    With prevent_thread_lock=True it returns at once: the app, to be closed, and its address.
    """
    app = build(service)
    # The service has the line. Gradio must hold nobody back, or whoever is to be refused waits to hear it: each job
    # that waits or runs keeps one of its threads, and there are more for those who only ask.
    app.queue(default_concurrency_limit=None)
    threads = 2 * (service.limits.waiting + len(service.workers)) + 40
    # _frontend: gradio asks its own page once, and gives up on a machine that takes 3 s to answer.
    _, address, _ = app.launch(**{**look(), "_frontend": False, "max_threads": threads, **options})
    return app, address
