"""Controls for the options of a method, drawn from its record: name, type, range, default, help."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import gradio as gr

from multilora.method import Method, Option


def control(option: Option, **more: Any) -> Any:
    """The component of one option; an empty field is its default where that is none."""
    label = option.name.replace("_", " ")
    words = {"label": label, "info": option.help or None, "interactive": True, **more}
    if option.choices:
        return gr.Dropdown([(str(c), c) for c in option.choices], value=option.default, **words)
    if option.type is bool:
        return gr.Checkbox(bool(option.default), **words)
    if option.type in (int, float):
        whole = option.type is int
        bounds = {"minimum": option.minimum, "maximum": option.maximum}
        if not whole and option.default is not None and None not in bounds.values():
            return gr.Slider(value=option.default, step=(option.maximum - option.minimum) / 200, **bounds, **words)
        return gr.Number(option.default, precision=0 if whole else None, step=1 if whole else 0.05, **bounds, **words)
    return gr.Textbox(option.default or "", placeholder="as it is" if option.default is None else "", **words)


def chosen(options: Sequence[Option], values: Sequence[Any]) -> dict[str, Any]:
    """{name: value} of the controls of these options, those that are empty or at their default left out."""
    found = {}
    for option, value in zip(options, values, strict=True):
        if value in (None, "") or value == option.default:
            continue
        found[option.name] = value
    return found


def explained(record: Method) -> str:
    """A method in words as HTML: what it does, what it costs, where it is from."""
    words = html.escape(record.title)
    if record.kind == "route":
        words += f". {html.escape(record.cost)} run{'' if record.cost == '1' else 's'} of the model per step"
    if record.paper.startswith("https://"):
        source = html.escape(record.paper, quote=True)
        words += f'. <a href="{source}" target="_blank" rel="noopener">Where it is from</a>'
    return f'<p class="ml-about">{words}.</p>'
