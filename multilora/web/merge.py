"""The Merge page: several LoRAs become one file; what was kept, how they overlap, pictures of before and after."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from multilora.method import methods
from multilora.web import said as words
from multilora.web.endpoints import endpoint, finished, telling
from multilora.web.merging import ESTIMATED, heat_maps, merged, overlap, previews, summary, triggers
from multilora.web.options import chosen, control, explained
from multilora.web.service import Output, Refused
from multilora.web.shelf import Shelf
from multilora.web.shell import Shell

MOST = 8  # LoRAs with a slider of their own
FORMATS = {"diffusers": "diffusers", "kohya": "kohya, for A1111 and ComfyUI", "peft": "PEFT, a zip of its folder"}
DTYPES = {"as computed": None, "32 bit": "fp32", "16 bit": "fp16", "bfloat16": "bf16"}
_ELSEWHERE = ("rank", "energy", *ESTIMATED.values())  # options that the page asks for in its own place
_PRIVATE: dict[str, Any] = {"api_visibility": "private"}


def page(shell: Shell) -> None:
    """The page: sources and method on the left, what came of them on the right."""
    service, records = shell.service, methods("merge")
    made = gr.State(None)  # {"output": Output, "uses": [(reference, name, weight)], "file": reference for pictures}
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            gr.HTML(words.intro("Several LoRAs become one file: as fast as one LoRA, and for any program."))
            shelf = Shelf(shell, "LoRAs to merge", "type a name, or pick pictures below")
            sliders = [
                gr.Slider(-2, 2, 1, step=0.05, label=f"weight {i + 1}", visible=False, interactive=True)
                for i in range(MOST)
            ]
            choices = [(name.replace("_", " "), name) for name in records]
            method = gr.Dropdown(choices, value="linear", label="Method", info="how the updates become one")
            about = gr.HTML(explained(records["linear"]), apply_default_css=False)
            groups, controls, taken = [], [], []
            for name, record in records.items():
                options = [o for o in record.options if o.name not in _ELSEWHERE]
                if options:
                    with gr.Group(visible=False) as group:
                        controls += [control(option) for option in options]
                    groups.append((name, group))
                    taken.append((name, options))
            with gr.Group(visible=False) as estimating:
                gr.Markdown(
                    "This method looks at what each LoRA does: the model draws a few pictures with it first. "
                    "It takes a while once; estimates are kept until you leave.",
                    container=True,
                )
                examples = gr.Slider(
                    4, 256, 32, step=4, label="examples", info="noisy pictures looked at; fisher only"
                )
                pictures = gr.Slider(1, 32, 4, step=1, label="pictures", info="drawn per LoRA; more is steadier")
                steps = gr.Slider(2, 50, 10, step=1, label="steps", info="of each of these pictures")
            with gr.Accordion("Size and file", open=False):
                rank = gr.Number(None, label="rank", precision=0, minimum=1, placeholder="as many as it needs",
                                 info="largest rank of a layer: smaller is a smaller file")  # fmt: skip
                energy = gr.Number(None, label="energy to keep", minimum=0, maximum=1, step=0.01, placeholder="all",
                                   info="share of each layer's squared size, such as 0.95")  # fmt: skip
                name = gr.Textbox(label="Name", max_length=80, placeholder="the sources' names joined")
                form = gr.Radio([(v, k) for k, v in FORMATS.items()], value="diffusers", label="Format",
                                info="diffusers files work in most programs")  # fmt: skip
                dtype = gr.Radio(list(DTYPES), value="as computed", label="Numbers",
                                 info="16 bit halves the file; differences are not visible")  # fmt: skip
            with gr.Row():
                go = gr.Button("Merge", variant="primary", scale=3)
                stop = gr.Button("Stop", variant="secondary", scale=1)
        with gr.Column(scale=6, min_width=320):
            status = gr.HTML(words.said("Choose two or more LoRAs, then press Merge."), apply_default_css=False)
            with gr.Row(visible=False) as ready:
                download = gr.DownloadButton("Download", variant="primary")
                keep = gr.Button("Add to my LoRAs")
            table = gr.HTML(apply_default_css=False)
            with gr.Group(visible=False) as before_after:
                prompt = gr.Textbox(label="Prompt of the previews", lines=2, max_length=1000,
                                    info="empty: the triggers of all sources")  # fmt: skip
                seed = gr.Number(7, label="Seed", precision=0, minimum=0, info="the same noise in each picture")
                draw = gr.Button("Draw before and after")
            gallery = gr.Gallery(
                label="Each source alone, then the merge", columns=3, format="png", visible=False, height="auto",
                object_fit="contain", interactive=False, elem_classes="ml-pictures",
            )  # fmt: skip
            maps = gr.HTML(apply_default_css=False)

    def weigh(references: list[str], request: gr.Request) -> list[Any]:
        known = {e.reference: e for e in service.library(shell.session(request))}
        shown = [known[r].name for r in references[:MOST] if r in known] + [""] * MOST
        return [gr.Slider(visible=bool(name), label=f"weight of {name}") for name in shown[:MOST]]

    def show(name: str) -> list[Any]:
        estimates = gr.Group(visible=name in ESTIMATED)
        return [explained(records[name]), estimates, *(gr.Group(visible=n == name) for n, _ in groups)]

    def run(request: gr.Request, references: list[str], which: str, *values: Any) -> Iterator[list[Any]]:
        r, e, label, form, kind, *numbers = values[:8]
        weights, own = values[8 : 8 + len(references)], _options(which, taken, values[8 + MOST :])
        how = {
            "rank": None if r is None else int(r), "energy": e, "dtype": DTYPES[kind],
            "name": (label or "").strip() or None,
            "estimate": dict(zip(("examples", "pictures", "steps"), map(int, numbers), strict=True)),
        }  # fmt: skip

        def tell(line: str, bad: bool = False) -> list[Any]:
            return [words.said(line, bad), *[gr.skip()] * 6]

        try:
            if len(references) > MOST:
                raise Refused(f"{len(references)} LoRAs: this page merges up to {MOST}, the API more")
            session = shell.session(request)
            uses = [(x, service.entry(session, x).name, w) for x, w in zip(references, weights, strict=True)]
            going = merged(service, session, references, weights, which, own, format=form, **how)
            facts, output = yield from telling(going, tell)
            file = output
            if form == "peft":  # pictures are drawn with single files
                _, file = yield from telling(merged(service, session, references, weights, which, own, **how), tell)
            alike = yield from telling(overlap(service, session, references), tell)
        except ValueError as error:
            yield tell(str(error), bad=True)
            return
        yield [
            words.said(f"{output.name} is ready"), {"output": output, "uses": uses, "file": file},
            gr.DownloadButton(f"Download {output.name}", value=str(output.path)), gr.Row(visible=True), summary(facts),
            gr.Group(visible=True), heat_maps(alike),
        ]  # fmt: skip

    def before(state: dict[str, Any] | None, text: str, number: float, request: gr.Request) -> Iterator[Any]:
        try:
            session = shell.session(request)
            file = _file(state, session)
            text = text.strip() or triggers([service.entry(session, r) for r, *_ in state["uses"]])
            for images, line in previews(service, session, state["uses"], file.reference, text, int(number or 0)):
                yield words.said(line), gr.Gallery(images, visible=True, columns=min(3, len(state["uses"]) + 1))
        except ValueError as error:
            yield words.said(str(error), bad=True), gr.skip()

    def add(state: dict[str, Any] | None, request: gr.Request) -> tuple[Any, Any]:
        try:
            session = shell.session(request)
            file = _file(state, session)
            entry = service.upload(session, file.path, session.base or None, Path(file.name).stem)
        except ValueError as error:
            return words.said(str(error), bad=True), gr.skip()
        return words.said(f"{entry.name} is among your LoRAs now, on every page"), shell.changed()

    shelf.loras.change(weigh, shelf.loras, sliders, show_progress="hidden", **_PRIVATE)
    method.change(show, method, [about, estimating, *(g for _, g in groups)], show_progress="hidden", **_PRIVATE)
    numbers = [rank, energy, name, form, dtype, examples, pictures, steps]
    shown = [status, made, download, ready, table, before_after, maps]
    merging = go.click(
        run, [shelf.loras, method, *numbers, *sliders, *controls], shown, scroll_to_output=True, **_PRIVATE
    )
    drawing = draw.click(before, [made, prompt, seed], [status, gallery], **_PRIVATE)
    stop.click(lambda: words.said("stopped"), None, status, cancels=[merging, drawing], **_PRIVATE)
    keep.click(add, made, [status, shell.library], **_PRIVATE)
    _endpoints(shell)


def _options(which: str, taken: list[tuple[str, Any]], values: tuple[Any, ...]) -> dict[str, Any]:
    """The method's own of the values of all methods' controls."""
    for name, options in taken:
        if name == which:
            return chosen(options, values[: len(options)])
        values = values[len(options) :]
    return {}


def _file(state: dict[str, Any] | None, session: Any) -> Output:
    if not state or state["file"].reference not in session.outputs:
        raise Refused("there is no merge here, or its file is gone; press Merge first")
    return state["file"]


def _endpoints(shell: Shell) -> None:
    service = shell.service

    def merge(
        loras: list[str], weights: list[float] | None = None, method: str = "linear", options: dict | None = None,
        rank: int | None = None, energy: float | None = None, name: str | None = None,
        format: Literal["diffusers", "kohya", "peft"] = "diffusers",
        dtype: Literal["fp32", "fp16", "bf16"] | None = None, request: gr.Request = None,
    ) -> Iterator[tuple[dict, Path]]:  # fmt: skip
        """Merge LoRAs into one file.

        Args:
            loras: references of the library, see list_loras
            weights: one number per LoRA, may be negative; default 1 each
            method: such as linear, svd, ties or fisher; see list_merge_methods
            options: of the method, such as {"density": 0.3}; see list_merge_methods
            rank: largest rank of a layer of the result
            energy: share of each layer's energy to keep, above 0 and at most 1
            name: of the result
            format: diffusers, kohya (A1111, ComfyUI) or peft (a zip)
            dtype: of the numbers in the file; default as computed
        Returns:
            what was made: ranks, energy kept, shares of the sources, the reference for preview_merge
            the file
        """
        session = shell.session(request)
        how = {"rank": rank, "energy": energy, "name": name, "format": format, "dtype": dtype}
        going = merged(service, session, loras, weights, method, options or {}, **how)
        facts, output = yield from telling(going, lambda line: ({"state": line}, None))
        yield {**facts, "reference": output.reference}, output.path

    def list_merge_methods() -> list:
        """The methods by which LoRAs become one.

        Returns:
            for each: name, title, paper, options with type, default, range and help
        """
        keys = ("name", "default", "help", "minimum", "maximum")
        return [
            {"name": m.name, "title": m.title, "paper": m.paper, "options": [
                {**{k: getattr(o, k) for k in keys}, "type": o.type.__name__, "choices": list(o.choices)}
                for o in m.options
            ]}
            for m in methods("merge").values()
        ]  # fmt: skip

    def compare_loras(loras: list[str], request: gr.Request = None) -> dict:
        """How much LoRAs agree: cosine in all and by block, energy by rank, directions they share.

        Args:
            loras: references of the library, two or more
        Returns:
            names, norms, cosine, blocks, spectrum, overlap_in, overlap_out, and what chance alone gives
        """
        going = overlap(service, shell.session(request), loras)
        return finished(going)

    def preview_merge(
        loras: list[str], file: str, prompt: str = "", weights: list[float] | None = None, seed: int = 7,
        request: gr.Request = None,
    ) -> Iterator[gr.Gallery]:  # fmt: skip
        """Draw each source of a merge alone, then the merge, on one prompt and seed.

        Args:
            loras: references of the sources
            file: the reference that merge gave, of a diffusers or kohya file
            prompt: default the triggers of the sources
            weights: of the sources, default 1 each
            seed: of the noise
        Returns:
            the pictures with captions
        """
        session = shell.session(request)
        entries = [service.entry(session, reference) for reference in loras]
        weights = weights or [1.0] * len(entries)
        if len(weights) != len(entries):
            raise Refused(f"weights: {len(weights)} numbers for {len(entries)} LoRAs, one each is wanted")
        uses = [(e.reference, e.name, w) for e, w in zip(entries, weights, strict=True)]
        for images, _ in previews(service, session, uses, file, prompt or triggers(entries), seed):
            yield images

    for fn in (merge, list_merge_methods, compare_loras, preview_merge):
        endpoint(fn)
