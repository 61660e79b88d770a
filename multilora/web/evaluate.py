"""The Evaluate page: methods compared over a library, and grids; both run in the background and survive a reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from multilora.cli import demo
from multilora.method import methods
from multilora.web import said as words
from multilora.web.background import DONE, FAILED, RUNNING, STOPPED, Background
from multilora.web.endpoints import endpoint
from multilora.web.evaluating import (
    EMBEDDED,
    MOST_PICTURES,
    SPLITS,
    eval_words,
    framed,
    grid_words,
    method_names,
    pictures_of,
    report_files,
    status,
)
from multilora.web.service import Refused, Session
from multilora.web.shelf import SHARED
from multilora.web.shell import Shell

EVERY = 2.0  # seconds between two looks at a run
INTRO = (
    "Which method, at which weights, for your LoRAs? An evaluation draws many scenes by several methods from the same "
    "noise, counts which of the requested elements are in each picture, and says how sure the difference is."
)
# All take milliseconds: without the queue, a look that is under way when the page is loaded again leaves no stream.
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}


def page(shell: Shell) -> None:
    """The page: the two forms, each with how its run stands and what came of it."""
    background = shell.background
    gr.HTML(words.intro(INTRO))
    with gr.Tabs():
        with gr.Tab("Compare methods"):
            _evaluation(shell, background)
        with gr.Tab("Grid"):
            _grid(shell, background)
    _endpoints(shell, background)


def _evaluation(shell: Shell, background: Background) -> None:
    service, limits = shell.service, shell.service.limits
    choices = [("no LoRA, the prompt alone", "none")]
    choices += [(f"{n.replace('_', ' ')}: {methods('route')[n].title}", n) for n in method_names()[1:]]
    with gr.Row(elem_classes="ml-columns"):
        with gr.Column(scale=4, min_width=320):
            chosen = gr.CheckboxGroup(choices, value=["none", "merge", "switch", "composite"], label="Methods",
                                      info="each draws every scene from the same noise")  # fmt: skip
            ks = gr.CheckboxGroup([2, 3, 4, 5], value=[2, 3], label="LoRAs in a picture",
                                  info="sets with one character and no category twice")  # fmt: skip
            count = gr.Slider(1, 100, 4, step=1, label="Pictures of each method and number",
                              info="more of them, narrower intervals: 100 tell 10 points apart")  # fmt: skip
            with gr.Accordion("More", open=False):
                split = gr.Radio(list(SPLITS.items()), value="test", label="Which of the embedded LoRAs")
                steps = gr.Slider(1, limits.steps, 25, step=1, label="Steps",
                                  info="of denoising a picture; time grows with them")  # fmt: skip
            amount = gr.HTML(apply_default_css=False)
            with gr.Row():
                start = gr.Button("Start", variant="primary")
                stop = gr.Button("Stop")
        with gr.Column(scale=7, min_width=320):
            state = gr.HTML(apply_default_css=False)
            report = gr.HTML(apply_default_css=False)
            files = gr.File(label="Report and tables", file_count="multiple", interactive=False, visible=False,
                            height=200)  # fmt: skip
    timer, seen = gr.Timer(EVERY, active=False), gr.State("")

    def told(names: list[str], numbers: list[int], each: float) -> str:
        total = pictures_of(names, numbers, int(each))
        return words.said(f"{total} pictures", bad=not 0 < total <= MOST_PICTURES)

    def look(request: gr.Request, before: str) -> list[Any]:
        """status, timer, files, report, seen; files and report only when they have changed."""
        now = background.state(shell.session(request), "eval")
        line = status(now, "Nothing has run yet. With these settings the first report takes a few minutes.")
        timer = gr.Timer(active=now.status == RUNNING)
        key = f"{now.folder} {now.status} {now.done}" if now.status != RUNNING else f"{now.folder}"
        if key == before:
            return [line, timer, gr.skip(), gr.skip(), key]
        found = report_files(now.folder) if now.status in (DONE, STOPPED, FAILED) else []
        page = now.folder / "report.html" if found and now.folder else None
        return [line, timer, gr.File(found, visible=bool(found)), framed(page) if page else "", key]

    def begin(request: gr.Request, *values: Any) -> list[Any]:
        try:
            asked, total = eval_words(service, *values)
            background.start(shell.session(request), "eval", asked, total)
        except ValueError as error:
            return [words.said(str(error), bad=True), *[gr.skip()] * 4]
        return look(request, "")

    def end(request: gr.Request) -> str:
        going = background.stop(shell.session(request), "eval")
        return words.said(
            "stopping: the picture in hand is finished, then the report is made" if going else "nothing runs"
        )

    shown = [state, timer, files, report, seen]
    for event in (chosen.change, ks.change, count.change, shell.app.load):
        event(told, [chosen, ks, count], amount, **_PRIVATE)
    start.click(begin, [chosen, ks, count, split, steps], shown, **_PRIVATE)
    stop.click(end, None, state, **_PRIVATE)
    timer.tick(look, seen, shown, **_PRIVATE)
    shell.app.load(look, seen, shown, **_PRIVATE)


def _grid(shell: Shell, background: Background) -> None:
    service = shell.service
    from multilora.pipelines.load import library

    text, names = demo.scene(library()) if EMBEDDED in service.bases else ("", [])

    def listed(session: Session) -> list[tuple[str, str]]:
        return [(f"{e.name}: {e.trigger}" if e.trigger else e.name, e.reference) for e in service.library(session)]

    with gr.Row(elem_classes="ml-columns"):
        with gr.Column(scale=4, min_width=320):
            prompt = gr.Textbox(text, label="Prompt", lines=2, info="with the triggers of the LoRAs")
            loras = gr.Dropdown(listed(service.session(SHARED)), value=names, multiselect=True, label="LoRAs")
            x = gr.Textbox("method=merge,switch,composite", label="Across",
                           info="FIELD=A,B: method, weight, NAME.weight, steps, guidance, seed, every")  # fmt: skip
            y = gr.Textbox(
                "weight=0.6,1", label="Down", info="likewise, or nothing; | instead of , for texts: prompt=a|b"
            )
            with gr.Row():
                seed = gr.Number(demo.SEED, label="Seed", precision=0, minimum=0, info="same noise in all cells")
                steps = gr.Slider(1, service.limits.steps, 25, step=1, label="Steps", info="of denoising a picture")
            with gr.Row():
                start = gr.Button("Draw the grid", variant="primary")
                stop = gr.Button("Stop")
        with gr.Column(scale=7, min_width=320):
            state = gr.HTML(apply_default_css=False)
            sheet = gr.Image(
                label="Grid", format="png", interactive=False, visible=False, buttons=["download", "fullscreen"]
            )
    timer, seen = gr.Timer(EVERY, active=False), gr.State("")

    def look(request: gr.Request, before: str) -> list[Any]:
        now = background.state(shell.session(request), "grid")
        line = status(now, "No grid yet: choose a field across and one down, and see what they do.")
        key = f"{now.folder} {now.status}"
        picture = gr.skip()
        if key != before:
            path = now.folder / "grid.png" if now.folder and now.status != RUNNING else None
            there = path is not None and path.is_file()
            picture = gr.Image(str(path) if there else None, visible=there)
        return [line, gr.Timer(active=now.status == RUNNING), picture, key]

    def begin(request: gr.Request, *values: Any) -> list[Any]:
        try:
            session = shell.session(request)
            asked, total = grid_words(service, session, *values)
            background.start(session, "grid", asked, total)
        except ValueError as error:
            return [words.said(str(error), bad=True), *[gr.skip()] * 3]
        return look(request, "")

    def end(request: gr.Request) -> str:
        going = background.stop(shell.session(request), "grid")
        return words.said("stopping after the picture in hand" if going else "nothing runs")

    def choices(request: gr.Request) -> Any:
        return gr.Dropdown(listed(shell.session(request)))

    shown = [state, timer, sheet, seen]
    start.click(begin, [prompt, loras, x, y, seed, steps], shown, **_PRIVATE)
    stop.click(end, None, state, **_PRIVATE)
    timer.tick(look, seen, shown, **_PRIVATE)
    shell.app.load(look, seen, shown, **_PRIVATE)
    shell.library.change(choices, None, loras, **_PRIVATE)


def _endpoints(shell: Shell, background: Background) -> None:
    service = shell.service

    def evaluate(
        methods: list[str], k: list[int], count: int = 4, split: str = "test", steps: int = 25,
        request: gr.Request = None,
    ) -> str:  # fmt: skip
        """Start an evaluation of methods over the embedded LoRAs; it runs on when the call is over.

        Args:
            methods: names of methods; none draws the prompt without LoRAs
            k: numbers of LoRAs in a picture, of 2 to 5
            count: pictures of each method and number
            split: test (held out), train or all of the LoRAs
            steps: denoising steps of a picture
        """
        asked, total = eval_words(service, methods, k, count, split, steps)
        background.start(shell.session(request), "eval", asked, total)
        return f"{total} pictures"

    def evaluate_grid(
        prompt: str, loras: list[str], x: str, y: str = "", seed: int = 3, steps: int = 25,
        request: gr.Request = None,
    ) -> str:  # fmt: skip
        """Start a grid over one or two fields of a recipe; it runs on when the call is over.

        Args:
            prompt: what to draw, with the triggers of the LoRAs
            loras: their references, see list_loras
            x: FIELD=A,B of the columns, such as method=merge,switch or weight=0.6,1
            y: likewise of the rows, or nothing
            seed: of the starting noise, the same in every cell
            steps: denoising steps of a picture
        """
        session = shell.session(request)
        asked, total = grid_words(service, session, prompt, loras, x, y, seed, steps)
        background.start(session, "grid", asked, total)
        return f"{total} pictures"

    def evaluation_state(kind: str = "eval", request: gr.Request = None) -> dict:
        """How your latest evaluation, grid or search stands, and the numbers that it gave.

        Args:
            kind: eval, grid or search
        Returns:
            status (none, running, done, stopped, failed), done, total, seconds left, message, result
        """
        session = shell.session(request)
        now = background.state(session, kind)
        numbers = background.printed(session, kind) if now.status in (DONE, STOPPED) else {}
        return {"status": now.status, "done": now.done, "total": now.total, "left": now.left, "message": now.message,
                "result": numbers}  # fmt: skip

    def evaluation_stop(kind: str = "eval", request: gr.Request = None) -> str:
        """Stop your evaluation, grid or search: the picture in hand is finished, and what there is is reported.

        Args:
            kind: eval, grid or search
        """
        return "stopping" if background.stop(shell.session(request), kind) else "nothing runs"

    def evaluation_report(kind: str = "eval", request: gr.Request = None) -> Path:
        """The report of your latest evaluation as a page, or the sheet of your latest grid as a picture.

        Args:
            kind: eval or grid
        """
        now = background.state(shell.session(request), kind)
        path = now.folder / ("grid.png" if kind == "grid" else "report.html") if now.folder else None
        if path is None or not path.is_file():
            raise Refused("there is no report yet")
        return path

    for fn in (evaluate, evaluate_grid, evaluation_state, evaluation_stop, evaluation_report):
        endpoint(fn)
