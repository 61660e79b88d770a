"""Actions that look at LoRAs rather than draw: how much they agree, what their layers see, what a gate does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from multilora.web.service.actions import action
from multilora.web.service.spec import Event, Output, Result


@action("overlap")
def overlap(engine: Any, call: Any) -> Result:
    """LoRAs side by side: multilora.compare.Comparison as facts."""
    from multilora.compare import compare

    places = call.task.places
    return Result(facts=compare([engine.lora(places[name]) for name in call.request.loras]).as_dict())


@action("gram")
def gram(engine: Any, call: Any) -> Result:
    """Gram matrices of the inputs of a LoRA's layers, gathered while it draws from its own triggers."""
    from multilora.lab.train.gram import grams

    r, path = call.request, Path(call.task.folder) / "grams.safetensors"
    lora = engine.lora(call.task.places[r.reference])
    composer = engine.composer()
    composer.add(lora, name="lora", weight=r.weight)
    prompts = lora.card.triggers or ("",)

    def progress(step: int, steps: int, info: dict) -> None:
        call.emit(Event("progress", step=number * steps + step, steps=r.pictures * steps))

    with grams(engine.pipe, lora) as collected:
        for number in range(r.pictures):
            prompt = prompts[number % len(prompts)]
            composer(prompt, seed=r.seed + number, num_inference_steps=r.steps, progress=progress, cancel=call.cancel)
    collected.save(path, lora_sha256=lora.card.sha256, pictures=r.pictures, steps=r.steps, seed=r.seed)
    facts = {"layers": len(collected), "pictures": r.pictures, "bytes": path.stat().st_size}
    return Result(facts=facts, files=[Output(f"{lora.card.name or 'lora'}-grams.safetensors", path)])


@action("gate_map")
def gate_map(engine: Any, call: Any) -> Result:
    """A recipe drawn once more, with what its gate answers in every layer at every step (multilora.lab.gate_map)."""
    from multilora.lab.gate_map import draw_map, map_of_runs
    from multilora.method import resolve
    from multilora.recipe import save_png
    from multilora.trace import traced

    recipe, path = call.request.recipe, Path(call.task.folder) / "gate-map.png"
    engine.hold(recipe.base)
    if recipe.pictures or any(use.mask_sha256 for use in recipe.loras):
        raise ValueError("a gate's map is of a picture from a prompt alone: take masks and input pictures out")
    composer = engine.composer()
    for use in recipe.loras:
        composer.add(
            engine.lora(call.task.places[use.reference]), name=use.name, weight=use.weight, blocks=use.blocks or None,
            text_encoder_weight=use.text_encoder_weight, positive_only=use.positive_only,
        )  # fmt: skip
    bound = resolve("route", recipe.method, **recipe.options)
    watched, runs = traced(bound)

    def progress(step: int, steps: int, info: dict) -> None:
        call.emit(Event("progress", step=step, steps=steps))

    made = composer(
        recipe.prompt, recipe.negative_prompt or None, watched, seed=recipe.seed + recipe.index,
        num_inference_steps=recipe.steps, guidance_scale=recipe.guidance_scale, width=recipe.width,
        height=recipe.height, scheduler=recipe.scheduler, text_encoder=recipe.text_encoder, scale=recipe.scale,
        progress=progress, cancel=call.cancel,
    )  # fmt: skip
    loras = [member.lora for member in composer.loras.values()]
    found = map_of_runs(loras, bound, runs, made.images[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(draw_map(found, title=f"What {recipe.method} does", subtitle=recipe.prompt), path)
    facts = {"strongest": found.strongest, "sharpest": found.sharpest, "names": list(found.names)}
    return Result(facts=facts, files=[Output(path.name, path)])
