"""Controls for the options of a method, drawn from its record: name, type, range, default, help."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

import gradio as gr

from multilora.method import Method, Option


def control(option: Option, method: str = "", **more: Any) -> Any:
    """The component of one option of a method; an empty field is its default where that is none."""
    label = option.name.replace("_", " ")
    words = {"label": label, "info": option.help or None, "interactive": True, **more}
    if option.name == "gate":  # a file of this machine is for its owner's command line
        words["info"] = "a trained gate for these LoRAs; none: equal shares, without training"
        own = [(" + ".join(names), name) for name, names in embedded(method).items()]
        return gr.Dropdown([("none", ""), *own], value=option.default or "", **words)
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


def embedded(kind: str, language: bool = False) -> dict[str, list[str]]:
    """Name of each embedded gate of a kind -> its LoRAs, off the headers: this process needs no torch.

    language  gates whose LoRAs are the text model's, else those whose LoRAs are the picture model's
    """
    from safetensors import safe_open

    from multilora.pipelines.load import assets

    library = assets() / ("text/loras" if language else "loras") / "library.json"
    own = {lora["sha256"] for lora in json.loads(library.read_text(encoding="utf-8"))["loras"]}
    found = {}
    for path in sorted((assets() / "gates").glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            card = json.loads(file.metadata()["multilora_gate"])
        if card["kind"] == kind and own.issuperset(lora["sha256"] for lora in card["loras"]):
            found[path.stem] = [lora["name"] for lora in card["loras"]]
    return found


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
