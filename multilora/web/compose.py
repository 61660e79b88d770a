"""The Compose page: prompt, LoRAs, method and settings become a picture, or one picture per method."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import gradio as gr

from multilora.recipe import Recipe
from multilora.web import compare, elsewhere, history, words
from multilora.web.asked import recipe_of, settings_of
from multilora.web.compose_api import endpoints
from multilora.web.controls import Controls
from multilora.web.gate_map import MapOfGate, map_endpoint
from multilora.web.service import Base, Compose, Job, Refused, Session
from multilora.web.service.door import draws
from multilora.web.shell import Shell

TOLD_EVERY = 0.25  # seconds between two messages to the browser
# On a phone the result is below the controls.
SHOW = """() => {
  if (window.innerWidth < 700) document.querySelector("#ml-state").scrollIntoView({ block: "center" });
}"""
READY = "Ready. Click LoRAs, write a prompt, then Draw."


class Running:
    """The job that each browser tab waits for, for Stop."""

    def __init__(self):
        self._jobs: dict[str, Job] = {}

    def began(self, request: gr.Request, job: Job) -> None:
        """Only the newest job of a tab is stopped by its button."""
        self._jobs[request.session_hash or ""] = job

    def ended(self, request: gr.Request, job: Job) -> None:
        """Forget it."""
        if self._jobs.get(request.session_hash or "") is job:
            del self._jobs[request.session_hash or ""]

    def stop(self, request: gr.Request) -> None:
        """Cancel the tab's job, if it has one."""
        job = self._jobs.get(request.session_hash or "")
        if job is not None:
            job.cancel()


class Result:
    """The components that show one picture and what may be done with it; `of` gives their values."""

    def __init__(self, shell: Shell):
        self.picture = gr.Image(
            label="Picture", show_label=False, interactive=False, type="filepath", format="webp",
            buttons=["fullscreen"], elem_id="ml-picture", placeholder=words.EMPTY, height=420,
        )  # fmt: skip
        self.name = gr.Textbox(visible=False)
        with gr.Row():
            self.download = gr.DownloadButton(
                "Download PNG with its recipe", interactive=False, size="md", elem_id="ml-download"
            )
            self.restore = gr.Button("Back to its settings", interactive=False, size="md", elem_id="ml-again")
        self.scores = gr.HTML("", apply_default_css=False, elem_id="ml-scores")
        self.gate = MapOfGate(shell, self.name)
        with gr.Accordion("Use it elsewhere: link, command, Python", open=False):
            common = {"interactive": False, "wrap_lines": True, "show_line_numbers": False, "buttons": ["copy"]}
            self.link = gr.Code("", label="Link: opens this app with these settings", lines=2, **common)
            self.command = gr.Code("", language="shell", label="Command line", lines=2, **common)
            self.python = gr.Code("", language="python", label="Python", lines=4, **common)
        self.components = [self.picture, self.name, self.download, self.restore, self.scores, self.link, self.command,
                           self.python, *self.gate.components]  # fmt: skip
        self.around = self.components[2:]  # what follows the picture and its name

    def of(self, found: history.Kept, request: gr.Request) -> dict[Any, Any]:
        """Values of the components for a picture of the history."""
        path, recipe = str(found.path), found.recipe
        return {
            self.picture: path,
            self.name: found.path.name,
            self.download: gr.update(value=path, interactive=True),
            self.restore: gr.update(interactive=True),
            self.scores: words.scores(found.scores),
            self.link: elsewhere.link(recipe, _address(request)),
            self.command: elsewhere.command(recipe),
            self.python: elsewhere.python(recipe),
            **self.gate.of(recipe),
        }

    def none(self) -> dict[Any, Any]:
        """Values of what is around the picture when there is none."""
        off = gr.update(interactive=False)
        texts = dict.fromkeys([self.scores, self.link, self.command, self.python], "")
        return {**texts, self.download: off, self.restore: off, **self.gate.of(None)}


def page(shell: Shell) -> None:
    """The page, with its part of the API."""
    service, running = shell.service, Running()
    private = {"api_visibility": "private", "show_progress": "hidden"}
    restored = gr.State(None)
    with gr.Row(elem_classes="ml-columns"):
        with gr.Column(scale=6, min_width=320):
            controls = Controls(service)
        with gr.Column(scale=5, min_width=320, elem_classes="ml-result"):
            with gr.Row(elem_classes="ml-buttons"):
                draw = gr.Button("Draw", variant="primary", size="md", elem_id="ml-draw")
                several = gr.Button("Compare methods", size="md", elem_id="ml-compare")
                stop = gr.Button("Stop", variant="stop", size="md", interactive=False, elem_id="ml-stop")
            state = gr.HTML(words.status("Loading the model…", "busy"), apply_default_css=False, elem_id="ml-state")
            remarks = gr.HTML("", apply_default_css=False)
            with gr.Tabs(selected="one") as tabs:
                with gr.Tab("Picture", id="one"):
                    result = Result(shell)
                with gr.Tab("Comparison", id="several"):
                    sheet = compare.Sheet()
            with gr.Accordion("History of this session", open=True):
                past = gr.Gallery(
                    show_label=False, columns=6, height=260, allow_preview=False, object_fit="contain",
                    fit_columns=False, visible=False, interactive=False, elem_id="ml-history", buttons=[],
                )  # fmt: skip

    buttons = [draw, several, stop]

    def pressed(busy: bool) -> dict[Any, Any]:
        # As updates: a new component in their place takes several times as long, in each request.
        return {
            draw: gr.update(interactive=not busy),
            several: gr.update(interactive=not busy),
            stop: gr.update(interactive=busy),
        }

    def gallery(session: Session) -> Any:
        paths = [str(path) for path in history.files(session)]
        return gr.update(value=paths, visible=bool(paths))

    def begin() -> dict[Any, Any]:
        """Before a picture is asked for."""
        return {**pressed(True), remarks: "", state: words.status("asking", "busy", 0.0)}

    @draws
    def one(request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        """Draw what the controls say; yields what changes on the page, up to the picture."""
        session, before = shell.session(request), values[-1]
        try:
            settings, flags = controls.read(values[:-1])
            recipe, masks = recipe_of(service, session, settings, before)
            job = service.submit(Compose(recipe=recipe, masks=masks, **flags), session)
            running.began(request, job)
            try:
                for event in told(job):
                    if event.kind in ("queued", "progress"):
                        yield {state: words.progress(event)}
                    elif event.kind == "preview":
                        yield {result.picture: event.image}
                    elif event.kind == "note":
                        yield {remarks: words.notes([event.message])}
            finally:
                running.ended(request, job)
            if job.last.kind == "cancelled":
                yield {state: words.status("Stopped; there is no picture."), result.picture: None, result.name: ""}
                return
            made = job.result().pictures[0]
        except ValueError as error:  # Refused and pydantic's are ValueErrors
            yield {state: words.status(str(error), "error")}
            return
        found = history.keep(session, made)
        line = f"Done in {made.seconds:.1f} s: {made.recipe.method.replace('_', ' ')}, seed {made.recipe.seed}"
        yield {result.picture: str(found.path), result.name: found.path.name, state: words.status(line, "done")}

    @draws
    def many(request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        """Draw it under every method that is ticked; yields what changes on the page, up to the last picture."""
        session, before = shell.session(request), values[-1]
        drawn: list[history.Kept] = []
        try:
            wanted = compare.request(service, session, controls, values[:-1], before)
            job = service.submit(wanted, session)
            running.began(request, job)
            try:
                for event in told(job):
                    if event.kind in ("queued", "progress"):
                        yield {state: words.progress(event)}
                    elif event.kind == "note":
                        yield {remarks: words.notes([event.message])}
                    elif event.kind == "picture":
                        drawn.append(history.keep(session, event.picture))
                        yield sheet.of(drawn)
            finally:
                running.ended(request, job)
            if job.last.kind == "cancelled":
                yield {state: words.status(f"Stopped after {len(drawn)} pictures.")}
                return
            job.result()
        except ValueError as error:
            yield {state: words.status(str(error), "error")}
            return
        line = f"Done in {sum(k.seconds for k in drawn):.1f} s: {len(drawn)} methods, one seed"
        first = drawn[0].path
        yield {result.picture: str(first), result.name: first.name, state: words.status(line, "done")}

    def end(name: str, request: gr.Request) -> dict[Any, Any]:
        """After it: the history, and what may be done with the picture that is shown."""
        session = shell.session(request)
        released = {**pressed(False), past: gallery(session)}
        try:
            found = result.of(history.kept(session, name), request)
        except Refused:  # none was drawn, or it was stopped
            return {**released, **result.none()}
        return {**released, **{c: found[c] for c in result.around}}

    def mistaken(request: gr.Request) -> dict[Any, Any]:
        """It was refused at the door, or something went wrong here that has no words for the user."""
        why = service.door.told(request.session_hash) or "This server made a mistake; please try again."
        return {**pressed(False), state: words.status(why, "error")}

    inputs = [*controls.components, restored]
    shown = [*result.components, state, tabs]

    def run(start: Any, tab: str, draw_it: Any, *own: Any) -> None:
        """Three events, as gradio makes every output of an event anew with each thing that the event yields: what
        changes at every step has an event with few outputs."""
        began = start(lambda: {**begin(), tabs: gr.update(selected=tab)}, None, [*buttons, remarks, state, tabs],
                      trigger_mode="once", queue=False, **private)  # fmt: skip
        drawing = began.then(draw_it, inputs, [result.picture, result.name, state, remarks, *own], **private)
        drawing.failure(mistaken, None, [state, *buttons], queue=False, **private)
        drawing.success(end, result.name, [*result.around, past, *buttons], queue=False, **private)

    for start in (draw.click, controls.prompt.submit):
        run(start, "one", one)
    run(several.click, "several", many, *sheet.components)
    for button in (draw, several):
        button.click(None, None, None, js=SHOW, **private)
    stop.click(running.stop, None, None, queue=False, **private)

    def pick(request: gr.Request, event: gr.SelectData) -> dict[Any, Any]:
        """Show a picture of the history."""
        listed = history.files(shell.session(request))
        if event.index >= len(listed):
            return {state: words.status("This picture is no longer kept.", "error")}
        return {**result.of(history.kept(shell.session(request), listed[event.index].name), request),
                tabs: gr.Tabs(selected="one")}  # fmt: skip

    past.select(pick, None, shown, queue=False, **private)

    def restore(recipe: Recipe, session: Session) -> list[Any]:
        """Values of `shell.controls` for a recipe. Raises Refused when it cannot be restored."""
        found, told_of = settings_of(service, session, recipe)
        values = controls.write(found.settings)
        line = f"Settings restored: {recipe.method.replace('_', ' ')}, seed {recipe.seed + recipe.index}"
        return [*values, found, words.status(line, "done"), words.notes(told_of)]

    shell.controls = [*controls.components, restored, state, remarks]
    shell.restore = restore

    def again(name: str, request: gr.Request) -> list[Any]:
        """The settings of the picture that is shown."""
        session = shell.session(request)
        try:
            return restore(history.kept(session, name).recipe, session)
        except ValueError as error:
            return [*[gr.skip()] * (len(shell.controls) - 2), words.status(str(error), "error"), ""]

    result.restore.click(again, result.name, shell.controls, queue=False, **private)

    def opened(request: gr.Request) -> Iterator[dict[Any, Any]]:
        """A browser opens the page: its library and history at once, the base's own settings when it is loaded."""
        session = shell.session(request)
        yield {controls.loras: controls.on_shelf(service.library(session)), past: gallery(session)}
        try:
            facts = service.about()
            yield {**controls.defaults(facts), state: words.status(READY)}
            asked = request.query_params.get(elsewhere.LINK)
            if asked:
                values = restore(elsewhere.unpacked(asked), session)
                yield dict(zip(shell.controls, values, strict=True))
        except ValueError as error:
            yield {state: words.status(str(error), "error")}

    shell.app.load(opened, None, [*controls.components, restored, state, remarks, past], **private)

    def listed(request: gr.Request) -> Any:
        """The library has changed on another page."""
        return controls.on_shelf(service.library(shell.session(request)))

    shell.library.change(listed, None, controls.loras, queue=False, **private)

    def based(base: str, request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Another base is chosen: load it, take its own settings."""
        session = shell.session(request)
        yield {state: words.status(f"loading {base}", "busy")}
        try:
            try:
                facts = service.about(base)
            except Refused:  # not loaded yet
                facts = service.submit(Base(base=base), session).result().facts
            yield {**controls.defaults(facts), state: words.status(READY)}
        except ValueError as error:
            yield {state: words.status(str(error), "error")}

    controls.base.input(based, controls.base, [*controls.components, state], **private)
    endpoints(shell)
    map_endpoint(shell)


def told(job: Job) -> Iterator[Any]:
    """A job's events, progress no faster than a browser needs it; previews come so."""
    last = 0.0
    for event in job.events():
        if event.kind == "progress":
            now = time.monotonic()
            if now - last < TOLD_EVERY:
                continue
            last = now
        yield event


def _address(request: gr.Request) -> str:
    """Where this browser has the app open: the page's own address, which a proxy before us cannot hide."""
    page = request.headers.get("referer") or f"http://{request.headers.get('host', '')}/"
    return page.partition("?")[0].partition("#")[0]
