"""The Weights page: a search for weights that runs in the background, its curve, and the way back to Compose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr

from multilora.recipe import LoraUse, Recipe
from multilora.web import said as words
from multilora.web.background import RUNNING
from multilora.web.endpoints import endpoint
from multilora.web.evaluating import status
from multilora.web.searching import METHODS, SCORED, best, curve, search_words, table
from multilora.web.service import Refused, Session
from multilora.web.shelf import Shelf
from multilora.web.shell import Shell

ASKED = "asked.json"
EVERY = 2.0  # seconds between two looks at a run
INTRO = (
    "How strong should each LoRA be? A search draws the same scenes from the same noise with many weights, scores "
    "what it sees, and keeps the best weights. Stop it at any time: the best so far stay."
)
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}


def page(shell: Shell) -> None:
    """The page: what to weigh and how, the search's curve, its best weights."""
    service, background = shell.service, shell.background
    gr.HTML(words.intro(INTRO))
    with gr.Row(elem_classes="ml-columns"):
        with gr.Column(scale=4, min_width=320):
            shelf = Shelf(shell, "LoRAs to weigh", "two or more; the weights are found together")
            method = gr.Radio([(told, name) for name, (told, _) in METHODS.items()], value="lorahub", label="Search",
                              info="without gradients any score will do; by gradient it matches each LoRA's own "
                                   "predictions, and draws nothing")  # fmt: skip
            score = gr.Radio([(told, name) for name, told in SCORED.items()], value="both", label="Score",
                             info="what the search without gradients makes as high as it can")  # fmt: skip
            budget = gr.Slider(10, 400, 40, step=1, label="Candidates",
                               info="weights that are tried; steps of the optimiser by gradient")  # fmt: skip
            with gr.Accordion("More", open=False):
                prompts = gr.Textbox("", label="Prompts", lines=3, info="one a line; none: scenes of the embedded "
                                     "world with all these LoRAs")  # fmt: skip
                pictures = gr.Slider(1, 8, 2, step=1, label="Pictures of each prompt")
                steps = gr.Slider(1, service.limits.steps, 12, step=1, label="Steps", info="of denoising a picture")
            with gr.Row():
                start = gr.Button("Search", variant="primary", elem_id="ml-search")
                stop = gr.Button("Stop, keep the best")
        with gr.Column(scale=7, min_width=320):
            state = gr.HTML(apply_default_css=False)
            chart = gr.Image(label="Curve", show_label=False, format="png", interactive=False, visible=False,
                             buttons=["download", "fullscreen"])  # fmt: skip
            found = gr.HTML(apply_default_css=False)
            use = gr.Button("Use these weights in Compose", variant="primary", interactive=False)
    timer, seen = gr.Timer(EVERY, active=False), gr.State("")

    def names(session: Session, references: list[str]) -> list[str]:
        known = {e.reference: e.name for e in service.library(session)}
        return [known.get(reference, reference) for reference in references]

    def look(request: gr.Request, before: str) -> list[Any]:
        """state, timer, chart, best weights, the button, seen; the latter only when there is something new."""
        session = shell.session(request)
        now = background.state(session, "search")
        nothing = "Nothing has run yet. With these settings a search takes some minutes."
        line, going = status(now, nothing, "candidates"), gr.Timer(active=now.status == RUNNING)
        key = f"{now.folder} {now.status} {now.done}"
        if key == before:
            return [line, going, gr.skip(), gr.skip(), gr.skip(), key]
        called = names(session, asked(now.folder).get("loras", []))
        image, weights = curve(now.folder, called), best(now.folder)
        there = bool(weights and called)
        return [line, going, gr.update(value=image, visible=image is not None), table(called, weights),
                gr.update(interactive=there), key]  # fmt: skip

    def begin(request: gr.Request, *values: Any) -> list[Any]:
        session = shell.session(request)
        try:
            started(shell, session, *values)
        except ValueError as error:
            return [words.said(str(error), bad=True), *[gr.skip()] * 5]
        return look(request, "")

    def end(request: gr.Request) -> str:
        going = background.stop(shell.session(request), "search")
        return words.said("stopping after the candidates in hand" if going else "nothing runs")

    def compose(request: gr.Request) -> list[Any]:
        """Compose with the best weights, as a Merge of the same LoRAs."""
        session = shell.session(request)
        folder = background.state(session, "search").folder
        try:
            recipe = weighed(shell, session, asked(folder), best(folder))
            return [*shell.restore(recipe, session), gr.Tabs(selected="compose"), gr.skip()]
        except ValueError as error:
            return [*[gr.skip()] * len(shell.controls), gr.skip(), words.said(str(error), bad=True)]

    method.change(lambda name: gr.update(visible=name == "lorahub"), method, score, **_PRIVATE)
    shown = [state, timer, chart, found, use, seen]
    start.click(begin, [shelf.loras, method, score, budget, prompts, pictures, steps], shown, **_PRIVATE)
    stop.click(end, None, state, **_PRIVATE)
    timer.tick(look, seen, shown, **_PRIVATE)
    shell.app.load(look, seen, shown, **_PRIVATE)
    use.click(compose, None, [*shell.controls, shell.tabs, state], **_PRIVATE)
    _endpoint(shell)


def started(shell: Shell, session: Session, *values: Any) -> int:
    """Start a search, beside which its LoRAs are noted for a page that is loaded again. Number of candidates."""
    command, total = search_words(shell.service, session, *values)
    folder = shell.background.start(session, "search", command, total)
    (folder / ASKED).write_text(json.dumps({"loras": list(values[0]), "prompts": values[4]}), encoding="utf-8")
    return total


def asked(folder: Path | None) -> dict[str, Any]:
    """{"loras": references, "prompts": text} of a search's folder, {} when there is none."""
    try:
        return json.loads((folder / ASKED).read_text(encoding="utf-8")) if folder else {}
    except OSError:
        return {}


def weighed(shell: Shell, session: Session, wanted: dict[str, Any], weights: list[float]) -> Recipe:
    """A Merge of the LoRAs that were `asked` for, with these weights. Raises Refused without them."""
    if not wanted or not weights:
        raise Refused("there are no weights yet")
    entries = [shell.service.entry(session, reference) for reference in wanted["loras"]]
    facts = shell.service.about(session.base or None)
    lines = [line.strip() for line in (wanted["prompts"] or "").splitlines() if line.strip()]
    prompt = lines[0] if lines else ", ".join(e.trigger or e.name for e in entries)
    uses = [
        LoraUse(name=e.name, reference=e.reference, sha256=e.sha256 or None, weight=round(w, 3))
        for e, w in zip(entries, weights, strict=True)
    ]
    known = {name: facts[name] for name in ("steps", "guidance_scale", "width", "height", "scheduler", "base")}
    return Recipe(prompt=prompt, method="merge", loras=uses, seed=0, base_family=facts["family"], **known)


def _endpoint(shell: Shell) -> None:
    def search_weights(
        loras: list[str], method: str = "lorahub", score: str = "both", budget: int = 40, prompts: str = "",
        pictures: int = 2, steps: int = 12, request: gr.Request = None,
    ) -> str:  # fmt: skip
        """Start a search for the weights of LoRAs; it runs on when the call is over. Ask evaluation_state("search").

        Args:
            loras: their references, see list_loras
            method: lorahub (no gradients) or learned
            score: both, presence or clip
            budget: candidates of lorahub, steps of learned
            prompts: of the pictures, one a line; none draws scenes of the embedded world with all the LoRAs
            pictures: of each prompt, on the same noise for every candidate
            steps: denoising steps of a picture
        """
        values = (loras, method, score, budget, prompts, pictures, steps)
        return f"{started(shell, shell.session(request), *values)} candidates"

    endpoint(search_weights)
