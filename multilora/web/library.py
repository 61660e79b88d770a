"""The Library page: the LoRAs there are, what each of them is, uploads, and the base that the pages work on."""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from multilora.recipe import LoraUse, Recipe
from multilora.web import said as words
from multilora.web.endpoints import endpoint, finished, telling
from multilora.web.service import Base, Compose, Entry, Inspect, Refused, Service, Session
from multilora.web.shelf import SHARED, tiles
from multilora.web.shell import Shell

ALL, MINE = "all", "my uploads"
ADMITTED = (
    "A .safetensors file of one LoRA: diffusers, PEFT, kohya / A1111 or LyCORIS keys. It is checked before anything "
    "reads it: header, keys against the base, shapes, ranks, and that every number is finite. It is yours alone, and "
    "is deleted when you leave."
)
_PRIVATE: dict[str, Any] = {"api_visibility": "private"}


# -- what the page does, without gradio ---------------------------------------------------------------------------


def matching(entries: Sequence[Entry], text: str = "", category: str = ALL) -> list[Entry]:
    """The entries of a category (or ALL, or MINE) that have all of the words in name, trigger or description."""
    parts = (text or "").lower().split()

    def fits(e: Entry) -> bool:
        if category not in (ALL, None, "") and not (e.owned if category == MINE else e.category == category):
            return False
        about = f"{e.name} {e.trigger} {e.description} {e.category}".lower()
        return all(part in about for part in parts)

    return [e for e in entries if fits(e)]


def inspected(service: Service, session: Session, reference: str) -> Generator[str, None, dict[str, Any]]:
    """Words on how it goes; the return value is what `multilora inspect` knows of a LoRA."""
    request = Inspect(reference=reference, base=session.base)
    result = yield from words.followed(service.submit(request, session), "reading")
    return result.facts


def loaded(service: Service, session: Session, base: str) -> Generator[str, None, dict[str, Any]]:
    """Words on how the loading of a base goes; the return value is its facts, and the session works on it from now.

    base  "embedded", a folder or a hub id. Raises Refused when it may not be named here, or cannot be loaded.
    """
    base = base.strip()
    if not base:
        raise Refused("no base is named; wanted 'embedded', the folder of a pipeline, or a hub id such as owner/name")
    if base in service.bases:
        yield f"{base}: loading"
    result = yield from words.followed(service.submit(Base(base=base), session), f"loading {base}")
    session.base = "" if result.facts["base"] == service.bases[0] else result.facts["base"]
    return result.facts


def previewed(service: Service, session: Session, entry: Entry) -> Generator[str, None, Entry]:
    """Words on how the drawing of an upload's preview goes, from its own triggers; the return value is the entry."""
    facts = service.about(session.base or None)
    recipe = Recipe(
        prompt=entry.trigger or entry.name, base=facts["base"], base_family=facts["family"], seed=7,
        loras=[LoraUse(name=entry.name, reference=entry.reference)], steps=facts["steps"],
        guidance_scale=facts["guidance_scale"], width=facts["width"], height=facts["height"],
        scheduler=facts["scheduler"],
    )  # fmt: skip
    job = service.submit(Compose(recipe=recipe, preview=False), session)
    result = yield from words.followed(job, "drawing the preview, step")
    stream = io.BytesIO()
    result.pictures[0].image.save(stream, format="PNG")
    return service.set_preview(session, entry.reference, stream.getvalue())


def retitled(session: Session, reference: str, trigger: str, description: str) -> Entry:
    """An upload with other words on its card. Raises Refused for one that is not this session's."""
    if reference not in session.uploads:
        raise Refused("the card of a LoRA can be changed by who uploaded it")
    for name, text, most in (("trigger", trigger, 200), ("description", description, 1000)):
        if len(text) > most:
            raise Refused(f"{name}: {len(text)} characters, up to {most} are allowed")
    entry = replace(session.uploads[reference], trigger=trigger.strip(), description=description.strip())
    session.uploads[reference] = entry
    return entry


def card(entry: Entry) -> str:
    """What is known of a LoRA without the model, as a table."""
    own = entry.facts
    rows = {
        "Category": entry.category,
        "Trigger": entry.trigger or "none in the file",
        "About": entry.description,
        "Base": own.get("base", ""),
        "Format": own.get("format", ""),
        "Layers": own.get("modules", ""),
        "Ranks": own.get("ranks", {}),
        "Left out": own.get("left_out", []),
        "sha256": entry.sha256,
        "Owner": "you" if entry.owned else "everyone",
    }
    return words.facts(rows, entry.name)


def report(facts: dict[str, Any]) -> str:
    """What `multilora inspect` knows of a LoRA, as tables."""
    total = sum(facts["energy_by_block"].values()) or 1.0
    rows = {
        "Base": facts["base"],
        "Format": ", ".join([facts["format"], *facts["algorithms"]]),
        "Trained with": facts["trainer"],
        "Layers": {k or "model": v for k, v in facts["components"].items()},
        "Ranks": facts["ranks"],
        "Whole matrices": facts["dense"] or "",
        "Numbers": facts["dtypes"],
        "Alphas": facts["alphas"],
        "Triggers": facts["triggers"],
        "Size of the update": facts["norm"],
        "Left out": facts["left_out"],
        "Remarks": facts["warnings"],
    }
    ranks = {f"rank {r}": share for r, share in enumerate(facts["energy_by_rank"][:16], 1)}
    blocks = {block: value / total for block, value in facts["energy_by_block"].items()}
    return (
        words.facts(rows, "Inspected")
        + words.bars(blocks, "Where it acts", "share of its squared size by block")
        + words.bars(ranks, "How many directions it needs", "share that the largest directions of each layer hold")
    )


# -- the page -----------------------------------------------------------------------------------------------------


def page(shell: Shell) -> None:
    """The page: the shelf and what may be done with it on the left, the chosen LoRA on the right."""
    service = shell.service
    everyone = service.library(service.session(SHARED))
    categories = [ALL, MINE, *dict.fromkeys(e.category for e in everyone)]
    picked = gr.State("")
    with gr.Row():
        with gr.Column(scale=6, min_width=320):
            gr.HTML(words.intro("The LoRAs that you can use on every page. Pick one to see what it is."))
            with gr.Row():
                search = gr.Textbox(label="Search", placeholder="name, trigger or description", scale=2)
                category = gr.Dropdown(categories, value=ALL, label="Category", filterable=False, min_width=140)
            gallery = gr.Gallery(
                tiles(everyone), show_label=False, columns=6, height=420, allow_preview=False, interactive=False,
                object_fit="cover", elem_classes="ml-shelf", buttons=[],
            )  # fmt: skip
            none = gr.HTML(apply_default_css=False)
            with gr.Group():
                file = gr.File(
                    label="Upload a LoRA", file_count="single", type="filepath", height=130, elem_id="ml-upload"
                )
                name = gr.Textbox(label="Its name", max_length=60, placeholder="the file's name", info=ADMITTED)
                upload = gr.Button("Check and add", variant="primary")
            with gr.Accordion("Base model", open=False):
                about = gr.HTML(apply_default_css=False)
                base = gr.Textbox(
                    label="Another base", placeholder="a folder, or owner/name of the hub",
                    info="its family is detected; your pages work on it from then on" if service.open_bases
                    else f"served here: {', '.join(service.bases)}",
                )  # fmt: skip
                load = gr.Button("Load")
        with gr.Column(scale=5, min_width=320):
            status = gr.HTML(words.said("Nothing is picked yet."), apply_default_css=False)
            with gr.Group(visible=False) as chosen:
                picture = gr.Image(label="Preview", height=240, interactive=False, buttons=[], format="png")
                trigger = gr.Textbox(label="Trigger", interactive=False, buttons=["copy"],
                                     info="words in a prompt that wake this LoRA")  # fmt: skip
            facts = gr.HTML(apply_default_css=False)
            with gr.Row(visible=False) as actions:
                inspect = gr.Button("Inspect")
            with gr.Group(visible=False) as own:
                description = gr.Textbox(label="Description of your upload", lines=2, max_length=1000)
                with gr.Row():
                    save = gr.Button("Save the card")
                    draw = gr.Button("Draw preview")
                    remove = gr.Button("Remove", variant="stop")
            details = gr.HTML(apply_default_css=False)
    shown = [picked, chosen, picture, trigger, facts, actions, own, description, details]

    def entry_of(entry: Entry | None) -> list[Any]:
        """Values of `shown`."""
        there = entry is not None
        mine = there and entry.owned
        return [
            entry.reference if there else "",
            gr.Group(visible=there),
            str(entry.preview) if there and entry.preview else None,
            gr.Textbox(entry.trigger if there else "", interactive=mine),
            card(entry) if there else "",
            gr.Row(visible=there),
            gr.Group(visible=mine),
            entry.description if there else "",
            "",
        ]

    def listing(request: gr.Request, text: str, which: str) -> list[Any]:
        found = matching(service.library(shell.session(request)), text, which)
        empty = "" if found else words.said("No LoRA matches; try other words, or another category.")
        return [gr.Gallery(tiles(found), selected_index=None), empty]

    def pick(event: gr.SelectData, request: gr.Request, text: str, which: str) -> list[Any]:
        found = matching(service.library(shell.session(request)), text, which)
        if not isinstance(event.index, int) or event.index >= len(found):
            return [words.said("This list has changed; pick again.", bad=True), *[gr.skip()] * len(shown)]
        return [words.said(found[event.index].name), *entry_of(found[event.index])]

    def admit(request: gr.Request, path: str | None, label: str) -> list[Any]:
        rest = [gr.skip()] * (len(shown) + 2)
        if not path:
            return [words.said("No file is chosen; choose a .safetensors file first.", bad=True), *rest]
        try:
            session = shell.session(request)
            entry = service.upload(session, path, session.base or None, (label or "").strip() or None)
        except ValueError as error:
            return [words.said(f"Not added. {error}", bad=True), None, *rest[1:]]
        return [words.said(f"{entry.name} is among your LoRAs now"), None, shell.changed(), *entry_of(entry)]

    def look(request: gr.Request, reference: str) -> Iterator[list[Any]]:
        try:
            going = inspected(service, shell.session(request), reference)
            found = yield from telling(going, lambda line: [words.said(line), gr.skip()])
        except ValueError as error:
            yield [words.said(str(error), bad=True), ""]
            return
        yield [words.said(f"{found['name']}: {found['base']}"), report(found)]

    def picture_of(request: gr.Request, reference: str) -> Iterator[list[Any]]:
        try:
            session = shell.session(request)
            going = previewed(service, session, service.entry(session, reference))
            entry = yield from telling(going, lambda line: [words.said(line), gr.skip(), gr.skip()])
        except ValueError as error:
            yield [words.said(str(error), bad=True), gr.skip(), gr.skip()]
            return
        yield [words.said(f"drawn: {entry.trigger or entry.name}"), str(entry.preview), shell.changed()]

    def rename(request: gr.Request, reference: str, own_trigger: str, about: str) -> list[Any]:
        try:
            entry = retitled(shell.session(request), reference, own_trigger, about)
        except ValueError as error:
            return [words.said(str(error), bad=True), gr.skip(), gr.skip()]
        return [words.said("saved"), card(entry), shell.changed()]

    def drop(request: gr.Request, reference: str) -> list[Any]:
        try:
            session = shell.session(request)
            gone = service.entry(session, reference).name
            service.remove(session, reference)
        except ValueError as error:
            return [words.said(str(error), bad=True), gr.skip(), *[gr.skip()] * len(shown)]
        return [words.said(f"{gone} is removed, its file deleted"), shell.changed(), *entry_of(None)]

    def hold(request: gr.Request, wanted: str) -> Iterator[list[Any]]:
        try:
            session = shell.session(request)
            going = loaded(service, session, wanted)
            found = yield from telling(going, lambda line: [words.said(line), gr.skip()])
        except ValueError as error:
            yield [words.said(str(error), bad=True), gr.skip()]
            return
        yield [words.said(f"{found['base']} is loaded; your pages work on it"), base_card(found)]

    def held(request: gr.Request) -> str:
        session = shell.session(request)
        facts = service.known(session.base or service.bases[0])
        return base_card(facts) if facts else words.said("the base is loading")

    quiet = {"show_progress": "hidden", **_PRIVATE}
    for event in (search.change, category.change, shell.library.change, shell.app.load):
        event(listing, [search, category], [gallery, none], **quiet)
    shell.app.load(held, None, about, **quiet)
    gallery.select(pick, [search, category], [status, *shown], scroll_to_output=True, **quiet)
    upload.click(admit, [file, name], [status, file, shell.library, *shown], **_PRIVATE)
    looking = inspect.click(look, picked, [status, details], **_PRIVATE)
    drawing = draw.click(picture_of, picked, [status, picture, shell.library], **_PRIVATE)
    save.click(rename, [picked, trigger, description], [status, facts, shell.library], **_PRIVATE)
    remove.click(drop, picked, [status, shell.library, *shown], cancels=[looking, drawing], **_PRIVATE)
    load.click(hold, base, [status, about], **_PRIVATE)
    base.submit(hold, base, [status, about], **_PRIVATE)
    _endpoints(shell)


def base_card(facts: dict[str, Any]) -> str:
    """Facts of a base as a table."""
    from multilora.bases import FAMILIES

    family = facts["family"]
    return words.facts(
        {
            "Base": facts["base"],
            "Family": FAMILIES.get(family, family) or "unknown",
            "Size": f"{facts['width']} x {facts['height']}",
            "Runs on": f"{facts['device']}, {facts.get('dtype', '')}",
        },
        "Your pages work on",
    )


def _endpoints(shell: Shell) -> None:
    service = shell.service

    def list_loras(text: str = "", category: str = "all", request: gr.Request = None) -> list[dict]:
        """The LoRAs that may be used: those of the server and your uploads.

        Args:
            text: words that must be in name, trigger or description
            category: such as character, style, clothing, object or background; all for every one
        Returns:
            reference (what other calls want), name, category, trigger (put it into the prompt), description, owned
        """
        keys = ("reference", "name", "category", "trigger", "description", "owned", "sha256")
        found = matching(service.library(shell.session(request)), text, category)
        return [{key: getattr(entry, key) for key in keys} for entry in found]

    def upload_lora(file: Path, name: str | None = None, request: gr.Request = None) -> dict:
        """Check a LoRA file and add it to your LoRAs, which end with your session.

        Args:
            file: a .safetensors file
            name: default the file's
        Returns:
            its reference and what is known of it
        """
        session = shell.session(request)
        if not file:
            raise Refused("no file came; a .safetensors file is wanted")
        entry = service.upload(session, file, session.base or None, name)
        return {"reference": entry.reference, **entry.facts}

    def inspect_lora(lora: str, request: gr.Request = None) -> dict:
        """What a LoRA is: base, format, ranks, triggers, norm, energy by block and by rank, what is odd.

        Args:
            lora: its reference, see list_loras
        """
        return finished(inspected(service, shell.session(request), lora))

    def remove_lora(lora: str, request: gr.Request = None) -> str:
        """Delete one of your uploads.

        Args:
            lora: its reference
        """
        service.remove(shell.session(request), lora)
        return "removed"

    def load_base(base: str, request: gr.Request = None) -> dict:
        """Load a base model; your calls work on it from then on.

        Args:
            base: embedded, a folder or a hub id such as owner/name
        Returns:
            family, size, steps, schedulers, tasks, device
        """
        return finished(loaded(service, shell.session(request), base))

    for fn in (list_loras, upload_lora, inspect_lora, remove_lora, load_base):
        endpoint(fn)
