"""The action behind the coloured tokens of the Text page: which LoRAs a gate picks for each token of an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from multilora.web.service.actions import action
from multilora.web.service.spec import Output, Result, Text


class TextGate(Text):
    """The answer "loras" of a Text, made once more, with what its gate says: facts, and the map by layer as a file.

    facts  {"names", "colours", "tokens", "groups", "strongest", "sharpest"}; tokens are {"token", "prompt", "shares"},
           shares as in names, the mean over the groups of layers, None for the last one, which no layer has read
    """

    action: ClassVar[str] = "text_gate"


@action("text_gate")
def text_gate(engine: Any, call: Any) -> Result:
    """What the gate of a text says, token by token (multilora.lab.gate_map)."""
    from multilora.lab.chart import COLOURS
    from multilora.lab.gate_map import draw_map, map_of_text
    from multilora.method import resolve, unknown
    from multilora.pipelines.text_load import text_library, text_lora
    from multilora.recipe import save_png
    from multilora.web.service.language import _model

    r, known, path = call.request, text_library(), Path(call.task.folder) / "text-gate-map.png"
    for share in r.loras:
        if share.reference not in known:  # also the guard against paths: the loader would take them
            raise unknown("text LoRA", share.reference, known)
    bound = resolve("route", r.method, **r.options)
    model, tokenizer = _model(r.model, engine.device)
    loras = [text_lora(model, known[share.reference], share.reference) for share in r.loras]
    drawn = {"do_sample": True, "temperature": r.temperature, "seed": r.seed} if r.temperature else {}
    found = map_of_text(
        model, tokenizer, loras, bound, r.prompt, weights=[s.weight for s in r.loras], max_new_tokens=r.tokens,
        cancel=call.cancel, **drawn,
    )  # fmt: skip
    call.check_cancel()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(draw_map(found, title=f"What {r.method} does", subtitle=r.prompt), path)
    mean = found.shares.nanmean(1).tolist()
    tokens = [
        {"token": word, "prompt": i < found.prompt, "shares": shares}
        for i, (word, shares) in enumerate(zip(found.columns, mean, strict=True))
    ]
    if found.unread:
        tokens.append({"token": found.unread, "prompt": False, "shares": None})
    facts = {
        "names": list(found.names),
        "colours": ["#{:02x}{:02x}{:02x}".format(*COLOURS[i % len(COLOURS)]) for i in range(len(found.names))],
        "tokens": tokens,
        "groups": len(found.groups),
        "strongest": found.strongest,
        "sharpest": found.sharpest,
    }
    return Result(facts=facts, files=[Output(path.name, path)])
