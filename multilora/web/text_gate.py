"""Under the answers of a gated method: each token in the colour of the LoRA that the gate gave most weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from multilora.method import methods, unknown
from multilora.web import words
from multilora.web.endpoints import telling
from multilora.web.gate_map import gated, told
from multilora.web.options import embedded
from multilora.web.said import followed
from multilora.web.service import Refused, Session, Text
from multilora.web.service.text_gate import TextGate
from multilora.web.shell import Shell

EVEN = 0.005  # shares that are nearer to each other than this have no strongest
STYLE = """<style>
.ml-tokens{display:flex;flex-wrap:wrap;gap:3px;margin:.25rem 0 .75rem;color:var(--body-text-color)}
.ml-token{display:inline-flex;flex-direction:column;align-items:center;min-width:1.6em;padding:2px 4px 1px;
 border-radius:4px 4px 0 0;white-space:pre;font-family:var(--font-mono);line-height:1.25;
 border-bottom:4px solid var(--hue,var(--border-color-primary));
 background:color-mix(in srgb,var(--hue,transparent) var(--strength,0%),transparent)}
.ml-token small{font-family:var(--font);font-size:.7em}
.ml-key{list-style:none;margin:.5rem 0;padding:0;color:var(--body-text-color)}
.ml-key li{margin:.15rem 0}
.ml-key i{display:inline-block;width:1em;height:1em;border-radius:2px;vertical-align:-.15em}
.ml-key small,.ml-read{color:var(--body-text-color-subdued)}
.ml-read{margin:0;padding:.6rem 0 .1rem;font-size:var(--text-sm)}
.ml-shares summary{cursor:pointer;color:var(--body-text-color)}
.ml-shares td,.ml-shares th{font-variant-numeric:tabular-nums}
</style>"""


def gates_of(method: str) -> dict[str, list[str]] | None:
    """Name of each gate of the embedded text model for a method -> its LoRAs; None where a method takes no gate."""
    record = methods("route").get(method)
    if record is None or not any(option.name == "gate" for option in record.options):
        return None
    return embedded(method, language=True)


def options_of(method: str, gate: str) -> dict[str, str]:
    """The option that names a gate. Raises UnknownName for any but an embedded one: a path is not taken here."""
    if not gate:
        return {}
    known = gates_of(method) or {}
    if gate not in known:
        raise unknown(f"gate of {method}", gate, known)
    return {"gate": gate}


class GateTokens:
    """The components; `follow` fills them for an answer."""

    def __init__(self, shell: Shell):
        self.shell = shell
        with gr.Accordion("What the gate did", open=True, visible=False) as self.group:
            self.said = gr.HTML("", apply_default_css=False)
            self.tokens = gr.HTML("", apply_default_css=False, elem_id="ml-gate-tokens")
            with gr.Accordion("Layer by layer", open=False, visible=False) as self.more:
                self.image = gr.Image(show_label=False, interactive=False, type="filepath", format="png",
                                      buttons=["download", "fullscreen"], elem_id="ml-text-gate-map")  # fmt: skip
        self.components = [self.group, self.said, self.tokens, self.more, self.image]

    def of(self, method: str, loras: Sequence[str]) -> dict[Any, Any]:
        """Empty; in sight where a gate will be asked."""
        shown = bool(loras) and gated(method)
        return {self.group: gr.update(visible=shown), self.said: "", self.tokens: "", self.image: None,
                self.more: gr.update(visible=False)}  # fmt: skip

    def follow(self, request: Text, session: Session) -> Iterator[dict[Any, Any]]:
        """The answer of a request made once more, and what its gate says of each token."""
        if not (request.loras and gated(request.method)):
            return
        try:
            job = self.shell.service.submit(TextGate.model_validate(request.model_dump()), session)
            going = followed(job, "looking at the gate")
            result = yield from telling(going, lambda line: {self.said: words.status(line, "busy")})
        except ValueError as error:
            yield {self.said: words.status(str(error), "error")}
            return
        yield {self.said: told(result.facts), self.tokens: coloured(result.facts), self.more: gr.update(visible=True),
               self.image: str(result.files[0].path)}  # fmt: skip


def looked_at(shell: Shell, request: Text, session: Session) -> tuple[Path, dict[str, Any]]:
    """The map as a PNG and its facts. Raises Refused for a method without a gate, or no LoRAs."""
    if not gated(request.method):
        raise Refused(f"method {request.method!r} asks no gate")
    if not request.loras:
        raise Refused("no LoRA is chosen: a gate chooses among them")
    result = shell.service.submit(TextGate.model_validate(request.model_dump()), session).result()
    return result.files[0].path, result.facts


def coloured(facts: dict[str, Any]) -> str:
    """Prompt and answer as HTML, a token in the colour and with the number of its strongest LoRA; the key, which says
    what a LoRA has on the whole; and all the shares as a table."""
    tokens, count = facts["tokens"], facts["groups"]
    first = [_strongest(one["shares"]) for one in tokens]
    read = [one["shares"] for one in tokens if one["shares"] is not None]
    layers = f" Shares are the mean of {count} groups of layers." if count > 1 else ""
    parts = [STYLE, '<ul class="ml-key">']
    for i, (name, colour) in enumerate(zip(facts["names"], facts["colours"], strict=True)):
        mean = sum(shares[i] for shares in read) / max(1, len(read))
        parts.append(
            f'<li><i style="background:{colour}"></i> <b>{i + 1} {escape(name)}</b> <small>{mean:.2f} of all shares, '
            f"most at {first.count(i)} of {len(read)} tokens</small></li>"
        )
    parts.append("</ul>")
    for prompt, title in ((True, "Prompt"), (False, "Answer")):
        shown = [_token(facts, one, i) for one, i in zip(tokens, first, strict=True) if one["prompt"] is prompt]
        if shown:
            about = f"{title}: tokens with the numbers of their strongest LoRAs"
            parts.append(f'<p class="ml-read">{title}</p><div class="ml-tokens" role="group" aria-label="{about}">'
                         f'{"".join(shown)}</div>')  # fmt: skip
    parts.append(
        f'<p class="ml-read">The number is that of the LoRA with most weight while the model read the token; the '
        f"deeper the colour, the more. The last token is made and not read.{layers}</p>{_table(facts, first)}"
    )
    return "".join(parts)


def _strongest(shares: Sequence[float] | None) -> int | None:
    """The place of the largest share, None where there is none."""
    if shares is None:
        return None
    most = max(shares)
    near = [i for i, share in enumerate(shares) if most - share < EVEN]
    return near[0] if len(near) == 1 else None


def _token(facts: dict[str, Any], one: dict[str, Any], strongest: int | None) -> str:
    if strongest is None:
        style, mark = "", "–" if one["shares"] is None else "="
    else:
        strength = 15 + 40 * one["shares"][strongest]
        style, mark = f' style="--hue:{facts["colours"][strongest]};--strength:{strength:.0f}%"', str(strongest + 1)
    about = _said(facts["names"], one["shares"])
    return f'<span class="ml-token"{style} title="{about}">{_spelled(one["token"])}<small>{mark}</small></span>'


def _said(names: Sequence[str], shares: Sequence[float] | None) -> str:
    if shares is None:
        return "made, not read: no gate was asked"
    return escape(", ".join(f"{name} {share:.2f}" for name, share in zip(names, shares, strict=True)), quote=True)


def _spelled(token: str) -> str:
    """A token that can be seen."""
    return escape(token if token.strip() else {"\n": "⏎", "\t": "⇥"}.get(token, "␣" * len(token) or "∅"))


def _table(facts: dict[str, Any], first: Sequence[int | None]) -> str:
    head = "".join(f'<th scope="col">{i + 1} {escape(name)}</th>' for i, name in enumerate(facts["names"]))
    lines = [f'<tr><th scope="col">in</th><th scope="col">token</th>{head}</tr>']
    for one, strongest in zip(facts["tokens"], first, strict=True):
        shares = one["shares"] or ["not read"] * len(facts["names"])
        cells = [f"{share:.2f}" if isinstance(share, float) else share for share in shares]
        cells = [f"<td><b>{cell}</b></td>" if i == strongest else f"<td>{cell}</td>" for i, cell in enumerate(cells)]
        place = "prompt" if one["prompt"] else "answer"
        lines.append(f'<tr><td>{place}</td><th scope="row">{_spelled(one["token"])}</th>{"".join(cells)}</tr>')
    return (f'<details class="ml-shares"><summary>All shares as a table</summary><div class="ml-wide" tabindex="0">'
            f'<table class="ml-table"><tbody>{"".join(lines)}</tbody></table></div></details>')  # fmt: skip
