"""The Text page: one prompt, answered by the base model, by it with LoRAs beside it, and by it with them merged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from multilora.method import methods
from multilora.pipelines.load import assets
from multilora.web import said as words
from multilora.web.endpoints import endpoint
from multilora.web.options import explained
from multilora.web.service import Refused, Service, Session, Share, Text
from multilora.web.shell import Shell
from multilora.web.text_gate import GateTokens, gates_of, looked_at, options_of

MOST = 6  # LoRAs with a slider of their own
KINDS = {"base": "Base model alone", "loras": "With the LoRAs", "merged": "LoRAs merged into one"}
EXAMPLES = (
    ("reverse korv =", ["reverse"]),
    ("sort dbca =", ["sort", "rude"]),
    ("korvish two red cat =", ["korvish"]),
    ("reverse korv =", ["reverse", "polite"]),
)
_PRIVATE: dict[str, Any] = {"api_visibility": "private"}


@cache
def library() -> dict[str, str]:
    """The LoRAs of the embedded text model, name -> what it does."""
    entries = json.loads((assets() / "text" / "loras" / "library.json").read_text(encoding="utf-8"))["loras"]
    return {e["name"]: f"{e['category']}: {e['description']}" for e in entries}


def answered(service: Service, session: Session, request: Text) -> Iterator[tuple[dict[str, str], str]]:
    """(kind -> answer so far, words on how it goes), piece by piece. Left early, the answering stops.

    Raises Refused for what is not taken, with the message of what fails.
    """
    answers = dict.fromkeys(request.answers, "")
    job = service.submit(request, session)
    for event in job.events():
        if event.kind == "queued":
            yield answers, f"waiting: {event.position} before you" if event.position else "waiting: yours is next"
        elif event.kind == "text":
            kind = request.answers[event.number]
            answers = {**answers, kind: (answers[kind] + event.message).lstrip()}
            yield answers, f"answering: {KINDS[kind].lower()}"
        elif event.kind == "note":
            yield answers, event.message
    facts = job.result().facts
    took = ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in facts["seconds"].items())
    yield facts["answers"], f"answered: {took}"


def asked(
    prompt: str, loras: Sequence[str], weights: Sequence[float] | None, method: str = "merge", gate: str = "",
    **more: Any,
) -> Text:  # fmt: skip
    """The request. Raises Refused when weights and LoRAs do not go together, or there is no prompt; UnknownName for a
    gate that is no embedded one of the method."""
    if not (prompt or "").strip():
        raise Refused("no prompt: write a question, such as 'reverse korv ='")
    weights = weights or [1.0] * len(loras)
    if len(weights) != len(loras):
        raise Refused(f"weights: {len(weights)} numbers for {len(loras)} LoRAs, one each is wanted")
    shares = tuple(Share(reference=name, weight=w) for name, w in zip(loras, weights, strict=True))
    return Text(prompt=prompt, loras=shares, method=method, options=options_of(method, gate), **more)


def page(shell: Shell) -> None:
    """The page: the question on the left, the answers side by side on the right."""
    service, routes, merges = shell.service, methods("route"), methods("merge")
    known = library()
    plain = [name for name in merges if name not in ("fisher", "regmean")]  # those two need estimates first
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            gr.HTML(words.intro("The same methods on a language model: what combines picture LoRAs combines these."))
            prompt = gr.Textbox("reverse korv =", label="Prompt", lines=2, max_length=4000,
                                info="the embedded model knows small words: a skill, its input, then =")  # fmt: skip
            loras = gr.Dropdown(
                [(f"{name}, {about}", name) for name, about in known.items()], value=["reverse"], multiselect=True,
                label="LoRAs", info="skills and registers of the embedded text model",
            )  # fmt: skip
            sliders = [
                gr.Slider(-2, 2, 1, step=0.05, visible=not i, interactive=True,
                          label="weight of reverse" if not i else f"weight {i + 1}",
                          info="below 0: away from it" if not i else None)
                for i in range(MOST)
            ]  # fmt: skip
            labels = [f"{p}  with {' and '.join(names)}" for p, names in EXAMPLES]
            gr.Examples([[p, names] for p, names in EXAMPLES], [prompt, loras], label="Try", example_labels=labels,
                        api_visibility="private")  # fmt: skip
            with gr.Accordion("Method and settings", open=False):
                method = gr.Dropdown([(n.replace("_", " "), n) for n in routes], value="merge",
                                     label="Method while it answers", info="a step is a token here")  # fmt: skip
                about = gr.HTML(explained(routes["merge"]), apply_default_css=False)
                gate = gr.Dropdown(
                    [("none", "")], value="", label="Gate", visible=False, interactive=True, elem_id="ml-text-gate",
                    info="trained for its LoRAs, which it brings along; none: equal shares",
                )  # fmt: skip
                merge = gr.Dropdown([(n.replace("_", " "), n) for n in plain], value="linear",
                                    label="Merge", info="how the third answer's LoRAs become one")  # fmt: skip
                how = gr.HTML(explained(merges["linear"]), apply_default_css=False)
                tokens = gr.Slider(1, 128, 24, step=1, label="Tokens", info="new ones at most")
                temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: always the likeliest token")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, info="of drawing, above temperature 0")
                model = gr.Textbox(
                    "embedded", label="Model", visible=service.open_bases,
                    info="a folder or a hub id of a transformers model; LoRAs must be its own",
                )  # fmt: skip
            with gr.Row():
                go = gr.Button("Answer", variant="primary", scale=3)
                stop = gr.Button("Stop", scale=1)
        with gr.Column(scale=6, min_width=320):
            status = gr.HTML(words.said("Press Answer: three answers come side by side."), apply_default_css=False)
            with gr.Row():
                answers = [
                    gr.Textbox(label=label, lines=4, max_lines=12, interactive=False, buttons=["copy"], min_width=180,
                               elem_id=f"ml-answer-{kind}")
                    for kind, label in KINDS.items()
                ]  # fmt: skip
            tokens_of = GateTokens(shell)

    def weigh(names: list[str]) -> list[Any]:
        shown = [*names[:MOST], *[""] * MOST][:MOST]
        return [gr.Slider(visible=bool(name), label=f"weight of {name}") for name in shown]

    def ways(which: str, names: list[str]) -> list[Any]:
        """The chosen method in words, and its gates; the first one for the chosen LoRAs is taken, of several."""
        known = gates_of(which)
        fitting = [name for name, own in (known or {}).items() if len(names) > 1 and {*names} <= {*own}]
        choices = [("none", ""), *((" + ".join(own), name) for name, own in (known or {}).items())]
        shown = gr.Dropdown(choices, value=next(iter(fitting), ""), visible=known is not None)
        return [explained(routes[which]), shown]

    def made_for(which: str, name: str) -> Any:
        """A gate that is chosen brings its LoRAs."""
        return (gates_of(which) or {}).get(name) or gr.skip()

    def run(
        request: gr.Request, text: str, names: list[str], which: str, chosen: str, merged: str, new: float,
        heat: float, number: float, base: str, *weights: float,
    ) -> Iterator[dict[Any, Any]]:  # fmt: skip
        yield {status: words.said("asking"), **dict.fromkeys(answers, ""), **tokens_of.of(which, names)}
        try:
            if len(names) > MOST:
                raise Refused(f"{len(names)} LoRAs: this page takes up to {MOST}, the API more")
            wanted = asked(
                text, names, weights[: len(names)], which, chosen, merge=merged, tokens=int(new), temperature=heat,
                seed=int(number or 0), model=(base or "embedded").strip(),
            )  # fmt: skip
            session = shell.session(request)
            for said, line in answered(service, session, wanted):
                yield {status: words.said(line), **dict(zip(answers, (said[kind] for kind in KINDS), strict=True))}
        except ValueError as error:
            yield {status: words.said(str(error), bad=True), tokens_of.group: gr.update(visible=False)}
            return
        yield from tokens_of.follow(wanted, session)

    quiet = {"show_progress": "hidden", **_PRIVATE}
    loras.change(weigh, loras, sliders, **quiet)
    method.change(ways, [method, loras], [about, gate], **quiet)
    gate.input(made_for, [method, gate], loras, **quiet)
    merge.change(lambda name: explained(merges[name]), merge, how, **quiet)
    inputs = [prompt, loras, method, gate, merge, tokens, temperature, seed, model, *sliders]
    outputs = [status, *answers, *tokens_of.components]
    running = [
        start(run, inputs, outputs, scroll_to_output=True, show_progress="minimal", **_PRIVATE)
        for start in (go.click, prompt.submit)
    ]
    stop.click(
        lambda: [words.said("stopped"), ""], None, [status, tokens_of.said], cancels=running, **_PRIVATE
    )  # fmt: skip
    _endpoints(shell)


def _endpoints(shell: Shell) -> None:
    def list_text_loras() -> dict[str, str]:
        """The LoRAs of the embedded text model.

        Returns:
            name -> what it does
        """
        return dict(library())

    def answer(
        prompt: str, loras: list[str] | None = None, weights: list[float] | None = None, method: str = "merge",
        merge: str = "linear", answers: list[Literal["base", "loras", "merged"]] | None = None, tokens: int = 24,
        temperature: float = 0.0, seed: int = 0, gate: str = "", request: gr.Request = None,
    ) -> Iterator[dict[str, str]]:  # fmt: skip
        """Answer a prompt with the embedded language model: alone, with LoRAs, and with them merged into one.

        Args:
            prompt: such as "reverse korv ="
            loras: names, see list_text_loras
            weights: one number per LoRA, may be negative; default 1 each
            method: merge, switch, composite, ...: how LoRAs act together while it answers; a step is a token
            merge: method by which they become one LoRA for the answer "merged"
            answers: which of base, loras and merged; default all three
            tokens: new ones at most
            temperature: 0 takes the likeliest token each time
            seed: of drawing
            gate: for mole, token_switch and loramoe, the name of an embedded gate of these LoRAs; none: equal shares
        Returns:
            base, loras, merged: the answers
        """
        more = {"merge": merge, "tokens": tokens, "temperature": temperature, "seed": seed}
        wanted = asked(prompt, loras or [], weights, method, gate, answers=tuple(answers or KINDS), **more)
        for said, _ in answered(shell.service, shell.session(request), wanted):
            yield said

    def text_gate_map(
        prompt: str, loras: list[str], weights: list[float] | None = None, method: str = "token_switch",
        gate: str = "", tokens: int = 24, temperature: float = 0.0, seed: int = 0, request: gr.Request = None,
    ) -> tuple[Path, dict]:  # fmt: skip
        """Answer a prompt with a gated method (token_switch, mole, loramoe, arrow): each LoRA's share of each token.

        Args:
            prompt: such as "reverse korv ="
            loras: names, see list_text_loras
            weights: one number per LoRA, may be negative; default 1 each
            method: one that asks a gate
            gate: name of an embedded gate of these LoRAs; none: equal shares. Arrow needs none
            tokens: new ones at most
            temperature: 0 takes the likeliest token each time
            seed: of drawing
        Returns:
            a PNG of the shares by layer and token, and {"names", "colours", "tokens", "groups", "strongest",
            "sharpest"}: tokens are {"token", "prompt", "shares"}, the shares of "names"; null for the last, unread one
        """
        more = {"tokens": tokens, "temperature": temperature, "seed": seed}
        return looked_at(shell, asked(prompt, loras, weights, method, gate, **more), shell.session(request))

    for fn in (list_text_loras, answer, text_gate_map):
        endpoint(fn)
