"""The action of the Text page: one prompt, answered by the base model, with LoRAs beside it, and with them merged."""

from __future__ import annotations

import time
from typing import Any

from multilora.web.service.actions import action
from multilora.web.service.spec import Event, Result

_held: dict[str, tuple[Any, Any]] = {}  # the language model that this worker answered with last


def _model(name: str, device: str | None) -> tuple[Any, Any]:
    """(model, tokenizer), kept for the next request. Raises ValueError when there is none at `name`."""
    from multilora.pipelines.text_load import load_text

    if name not in _held:
        _held.clear()
        _held[name] = load_text(name, device=device)
    return _held[name]


@action("text")
def text(engine: Any, call: Any) -> Result:
    """Answers to a prompt, one kind after another, each streamed."""
    import multilora
    from multilora.method import resolve, unknown
    from multilora.pipelines.text import TextComposer
    from multilora.pipelines.text_load import text_library, text_lora

    r, known = call.request, text_library()
    for share in r.loras:
        if share.reference not in known:  # also the guard against paths: the loader would take them
            raise unknown("text LoRA", share.reference, known)
    resolve("route", r.method, **r.options)
    merging = resolve("merge", r.merge)
    model, tokenizer = _model(r.model, engine.device)
    loras = [text_lora(model, known[share.reference], share.reference) for share in r.loras]
    weights = [dict(s.weight) if isinstance(s.weight, dict) else float(s.weight) for s in r.loras]
    drawn: dict[str, Any] = {"do_sample": False}
    if r.temperature:
        drawn = {"do_sample": True, "temperature": r.temperature, "seed": r.seed}
    answers, seconds = {}, {}
    for number, kind in enumerate(r.answers):
        call.check_cancel()
        composer, began = TextComposer(model, tokenizer), time.perf_counter()
        if kind == "loras":
            for share, lora, weight in zip(r.loras, loras, weights, strict=True):
                composer.add(lora, share.reference, weight)
        elif kind == "merged" and loras:
            merged = multilora.merge(loras, weights, method=merging)
            if merged:
                composer.add(merged, "merged")
        method, options = (r.method, r.options) if kind == "loras" else ("merge", {})
        said = ""
        pieces = composer.stream(
            r.prompt, method, options=options, cancel=call.cancel, max_new_tokens=r.tokens, **drawn
        )
        for piece in pieces:
            said += piece
            call.emit(Event("text", number=number, of=len(r.answers), message=piece))
        answers[kind], seconds[kind] = said.strip(), time.perf_counter() - began
    return Result(facts={"answers": answers, "seconds": seconds, "model": r.model})
