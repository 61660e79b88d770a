"""What a worker can do: one function per action, `(engine, call) -> Result`, in one table.

A new action is a Request in spec.py and a function here, or anywhere that is imported from here.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from multilora.recipe import LoraUse
from multilora.web.service.spec import Event, Output, Result, opened

ACTIONS: dict[str, Callable[[Any, Any], Result]] = {}


def action(name: str) -> Callable[[Callable], Callable]:
    """Register a function as the action of this name."""

    def wrap(fn: Callable) -> Callable:
        if name in ACTIONS:
            raise ValueError(f"action {name!r} is there already")
        ACTIONS[name] = fn
        return fn

    return wrap


@action("base")
def base(engine: Any, call: Any) -> Result:
    """Load a base; what it is."""
    return Result(facts=engine.about())


@action("compose")
def compose(engine: Any, call: Any) -> Result:
    """Draw a recipe."""
    r = call.request
    return Result(engine.draw(call, r.recipe, pictures=r.pictures, masks=r.masks, preview=r.preview, score=r.score))


@action("compare")
def compare(engine: Any, call: Any) -> Result:
    """Draw recipes one after another; each picture is sent when it is there."""
    r, drawn = call.request, []
    for i, recipe in enumerate(r.recipes):
        call.check_cancel()
        names = {use.name for use in recipe.loras}
        masks = {name: data for name, data in r.masks.items() if name in names}
        options = {"pictures": r.pictures, "masks": masks, "preview": r.preview, "score": r.score}
        new = engine.draw(call, recipe, number=i, of=len(r.recipes), **options)
        for picture in new:
            call.emit(Event("picture", number=i, of=len(r.recipes), picture=picture))
        drawn += new
    return Result(drawn)


@action("score")
def score(engine: Any, call: Any) -> Result:
    """Scores of pictures, in their order: facts["scores"]."""
    images = [opened(data).convert("RGB") for data in call.request.images]
    uses = [LoraUse(name=reference, reference=reference) for reference in call.request.loras]
    return Result(facts={"scores": engine.scored(images, call.request.prompt, uses, call)})


@action("merge")
def merge(engine: Any, call: Any) -> Result:
    """Several LoRAs into one file; facts: ranks, energy kept, shares of the inputs."""
    import multilora
    from multilora.compare import energy_kept, shares_of
    from multilora.elementwise import echoing
    from multilora.method import resolve

    r, places = call.request, call.task.places
    loras = [engine.lora(places[share.reference]) for share in r.loras]
    bound = resolve("merge", r.method, **{name: _placed(value, places) for name, value in r.options.items()})

    def echo(key: str, done: int, of: int) -> None:
        call.check_cancel()
        call.emit(Event("progress", step=done, steps=of))

    with echoing(echo):
        merged = multilora.merge(loras, [_weight(share.weight) for share in r.loras], method=bound)
    call.check_cancel()
    before = merged.card.provenance
    lost = before.get("energy_lost", (before.get("merge") or {}).get("energy_lost"))
    whole, kept = merged, 1.0 if lost is None else 1.0 - lost
    if r.rank is not None or r.energy is not None:
        merged = whole.truncate(**{k: v for k, v in (("rank", r.rank), ("energy", r.energy)) if v is not None})
        kept *= energy_kept(whole, merged)[0]
    if not merged:
        raise ValueError("nothing is left of the merge: every weight is 0")
    if r.name:
        merged = merged.replace(card=merged.card.replace(name=r.name))
    output = _written(merged, r, Path(call.task.folder), engine)
    ranks = sorted({part.rank for part in merged.values() if part.rank is not None})
    shares = shares_of(merged, loras)
    facts = {
        "name": merged.card.name,
        "method": bound.record.name,
        "options": {k: v for k, v in bound.options.items() if k not in ("fishers", "grams")},
        "modules": len(merged),
        "ranks": ranks,
        "dense": sum(part.rank is None for part in merged.values()),
        "norm": merged.norm(),
        "energy_kept": kept,
        "inputs": [
            {"name": lora.card.name, "reference": s.reference, "weight": s.weight, "share": share}
            for lora, s, share in zip(loras, r.loras, shares, strict=True)
        ],
        "bytes": output.path.stat().st_size,
        "format": r.format,
    }
    return Result(facts=facts, files=[output])


def _weight(weight: Any) -> Any:
    return dict(weight) if isinstance(weight, dict) else float(weight)


def _placed(value: Any, places: dict[str, str]) -> Any:
    """A method's option with references of files as their paths; any other path is a user's text and stays one."""
    if isinstance(value, (list, tuple)):
        return [_placed(v, places) for v in value]
    if isinstance(value, str) and value.startswith("file:"):
        return places[value]
    if isinstance(value, str) and ("/" in value or "\\" in value or value.endswith(".safetensors")):
        raise ValueError(
            f"option {value!r:.80}: files are named by the reference of an output of yours, not by a path"
        )
    return value


def _written(merged: Any, request: Any, folder: Path, engine: Any) -> Output:
    import multilora

    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w-]+", "-", merged.card.name)[:60].strip("-") or "merged"
    options = {"format": request.format, "dtype": request.dtype}
    if request.format != "peft":
        path = folder / f"{name}.safetensors"
        multilora.save(merged, path, **options)
        return Output(path.name, path)
    inner = folder / name
    multilora.save(merged, inner, **options, base=engine.pipe)
    path = folder / f"{name}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(p for p in inner.rglob("*") if p.is_file()):
            archive.write(file, Path(name) / file.relative_to(inner))
    return Output(path.name, path)


@action("inspect")
def inspect(engine: Any, call: Any) -> Result:
    """Facts of a LoRA: base, format, ranks, triggers, norm, energy by block and by rank, what is odd."""
    from multilora.compare import energies, spectrum_of
    from multilora.detect import description

    lora = engine.lora(call.task.places[call.request.reference])
    notes = list(lora.card.provenance.get("notes", ()))
    return Result(
        facts={
            **description(lora),
            "norm": lora.norm(),
            "energy_by_block": energies(lora),
            "energy_by_rank": spectrum_of(lora),
            "warnings": notes,
        }
    )


@action("fisher")
def fisher(engine: Any, call: Any) -> Result:
    """The diagonal Fisher of a LoRA, with progress; its file serves `merge`."""
    from multilora.lab.train.fisher import estimate

    r = call.request
    path = Path(call.task.folder) / "fisher.safetensors"
    lora = engine.lora(call.task.places[r.reference])

    def progress(done: int, of: int, info: dict) -> None:
        call.emit(Event("progress", step=done, steps=of))

    found = estimate(
        engine.pipe, lora, estimator=r.estimator, examples=r.examples, out=path, resume=False, weight=r.weight,
        pictures=r.pictures, steps=r.steps, seed=r.seed, progress=progress, cancel=call.cancel,
    )  # fmt: skip
    facts = {"tensors": len(found), **{k: v for k, v in found.about.items() if isinstance(v, (str, int, float))}}
    return Result(facts=facts, files=[Output(f"{lora.card.name or 'lora'}-fisher.safetensors", path)])


from multilora.web.service import language, studies, text_gate  # noqa: E402, F401 - they register their actions here
