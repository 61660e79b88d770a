"""The LoRAs of Compose: a shelf of previews to choose from, and the list of the chosen ones with their options.

It lives in the browser (static/picker.js), so that clicks need no answer from here; its value is the list that
`asked.read_uses` reads.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from multilora.schedule import Schedule
from multilora.web.service import Entry

STATIC = Path(__file__).parent / "static"
SIDE = 128  # pixels of a preview on the shelf


def picker(entries: Sequence[Entry], **options: Any) -> gr.HTML:
    """The component on a library. A subclass would have gradio write a .pyi file beside this one."""
    return gr.HTML(
        [],
        html_template='<div class="ml-picker"></div>',
        js_on_load="\n".join((STATIC / f"{n}.js").read_text(encoding="utf-8") for n in ("mask", "picker")),
        apply_default_css=False,
        library=shelf(entries),
        server_functions=[curve],
        **options,
    )


def shelf(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """A library as the browser draws it."""
    return [
        {"reference": e.reference, "name": e.name, "category": e.category or "other", "trigger": e.trigger,
         "description": e.description, "preview": _preview(e.preview), "owned": e.owned}
        for e in entries
    ]  # fmt: skip


def curve(asked: dict[str, Any]) -> dict[str, Any]:
    """A schedule {"text", "steps"} as its weight at each step: {"weights": [steps]}, or {"error": what is wrong}.

    One that goes by sigma comes as {"points": [[sigma, weight], ...], "unit": "sigma"}: the sigmas of the steps are
    the scheduler's.
    """
    try:
        text, steps = asked["text"], asked["steps"]
        schedule = Schedule.parse(str(text)[:400])
        if schedule.unit == "sigma":
            return {"points": [[p, w] for w, p in schedule.points], "unit": "sigma"}
        count = min(max(int(steps or 25), 1), 200)
        return {"weights": [schedule.at(i, count) for i in range(count)]}
    except (ValueError, TypeError, KeyError) as error:
        return {"error": str(error)}


def _preview(path: Path | None) -> str:
    """A small copy as data URL, "" when there is none: it needs no request of its own, and no allowed directory."""
    from PIL import Image, UnidentifiedImageError

    if path is None:
        return ""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return ""
    small.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    small.save(stream, format="WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
