"""From what was asked for to pictures on disk: fill in, check everything cheap, load, draw, save."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from multilora.cli import arguments, demo
from multilora.cli.console import note
from multilora.cli.shots import Shot, Taken, draw_again, draw_sheet, save, sheet_name, take, tell_differences
from multilora.recipe import PICTURES, PictureUse, Recipe

# Names of a request, as Composer takes them, whose field in a recipe is called otherwise.
FIELDS = {"num_inference_steps": "steps", "num_images_per_prompt": "images"}


@dataclass(frozen=True)
class Order:
    """What was asked for, before the demonstration's or the prompt's LoRAs are filled in."""

    prompt: str | None
    loras: list[arguments.LoraArgument]
    lora_options: dict[str, dict[str, Any]]
    methods: list[str]
    options: list[str]
    compare: bool
    singles: bool
    base: str
    show_schedule: bool = False  # also draw the weights over the steps
    presets: Path | None = None  # file of the user's own lbw presets
    controlnet: str | None = None  # its folder
    alone: dict[str, str] = field(default_factory=dict)  # prompts of singles by LoRA ("": the base); else the prompt


def filled(order: Order, request: dict[str, Any]) -> Order:
    """The order with the demonstration in place of nothing, and the prompt's <lora:...> tags as LoRAs.

    Raises ValueError when there are LoRAs and no prompt.
    """
    from multilora import lbw
    from multilora.pipelines.load import EMBEDDED, library
    from multilora.tags import parse_prompt

    if order.prompt is None:
        if order.loras or order.base != EMBEDDED or "image" in request or "control_image" in request:
            raise ValueError("PROMPT is missing: say what to draw, with the triggers of the LoRAs (multilora loras)")
        text, names = demo.scene(library())
        request.setdefault("seed", demo.SEED)
        sheet = order.compare or not order.methods
        return replace(
            order,
            prompt=text,
            loras=[arguments.LoraArgument(name) for name in names],
            methods=order.methods or list(demo.METHODS),
            compare=sheet,
            singles=sheet,
            alone=demo.alone(library(), names),
        )
    presets = lbw.read_presets(order.presets) if order.presets else {}
    text, tags = parse_prompt(order.prompt, presets)
    tagged = [arguments.LoraArgument(tag.name, None, str(tag.weight)) for tag in tags]
    options = {name: dict(own) for name, own in order.lora_options.items()}
    for tag in tags:
        own = {"text_encoder_weight": tag.text_encoder_weight, "blocks": dict(tag.blocks)}
        options[tag.name] = {**options.get(tag.name, {}), **{k: v for k, v in own.items() if v not in (None, {})}}
    for name, own in options.items():
        if "lbw" in own.get("blocks", {}):
            try:
                own["blocks"] = {**own["blocks"], "lbw": lbw.checked(own["blocks"]["lbw"], presets)}
            except ValueError as error:
                raise ValueError(f"--block {name}:lbw={own['blocks']['lbw']}: {error}") from None
    methods = order.methods or ["auto"]
    return replace(order, prompt=text, loras=[*order.loras, *tagged], lora_options=options, methods=methods)


def fresh(
    order: Order, request: dict[str, Any], device: str | None, out: Path
) -> tuple[list[Taken], Path | None, Path | None]:
    """Draw an order and save it. `request` are keywords of the Composer.

    Returns the variants with their paths, the contact sheet's path where methods are compared, and the schedule's
    where it was asked for. Raises ValueError
    for whatever does not fit; what needs no model is found before one is loaded.
    """
    from multilora.pipelines.load import find_lora
    from multilora.trace import traced

    order = filled(order, request)
    bound = arguments.read_methods(order.methods, order.options)
    for lora in order.loras:
        find_lora(lora.source)
    options = arguments.options_of(order.loras, order.lora_options)
    if order.compare and not order.loras:
        raise ValueError("--compare: needs at least one --lora; without any, all methods draw the base")
    if order.singles and not order.compare:
        raise ValueError("--singles: goes with --compare")
    arguments.check_out(out, not order.compare and request.get("num_images_per_prompt", 1) == 1)
    request.setdefault("seed", secrets.randbelow(2**32))
    note(f"loading {order.base}")
    quiet()

    from multilora.pipelines.image import Composer

    composer = Composer.from_pretrained(order.base, device=device, controlnet=order.controlnet)
    members = [
        composer.add(lora.source, name=lora.name, weight=lora.weight, **own)
        for lora, own in zip(order.loras, options, strict=True)
    ]
    shots = []
    if order.singles:
        shots = [Shot("base", [], "merge", "no LoRA", order.alone.get(""))]
        shots += [Shot(m.name, [m], "merge", _about(m), order.alone.get(m.name)) for m in members]
    singles = len(shots)
    drawn: dict[str, list] = {}
    for b in bound:
        title = b.record.name.replace("_", " ")
        settings = ", ".join(f"{name}={value}" for name, value in b.options.items())
        if order.show_schedule:
            b, drawn[title] = traced(b)
        shots.append(Shot(title, members, b, settings))
    taken = take(composer, shots, {"prompt": order.prompt, **request})
    save(taken, out)
    plot = _plotted(taken[singles], members, drawn) if order.show_schedule else None
    sheet = draw_sheet(taken, singles, out / sheet_name(taken[singles:])) if order.compare else None
    return taken, sheet, plot


def _plotted(shot: Taken, members: list[Any], drawn: dict[str, list]) -> Path | None:
    """The chart of what the methods did over the steps, beside the first picture; None where no LoRA acted."""
    from multilora.lab.schedule_chart import draw_schedule
    from multilora.trace import by_step

    runs = {title: by_step(plans[0]) for title, plans in drawn.items() if plans}
    if not runs:
        note("--show-schedule: no LoRA acts, so there is nothing to plot")
        return None
    recipe = shot.recipes[0]
    names = [m.name for m in members if not m.weight.is_zero]
    subtitle = f"{recipe.steps} steps, {recipe.scheduler}"
    path = shot.paths[0].with_name(f"{shot.paths[0].stem}_schedule.png")
    draw_schedule(names, runs, title=recipe.prompt, subtitle=subtitle).save(path)
    return path


def again(
    source: Path,
    changes: dict[str, Any],
    method: str | None,
    options: list[str],
    device: str | None,
    out: Path,
    controlnet: str | None = None,
) -> Taken:
    """Draw the picture of a PNG again and save it; `changes` are keywords of the Composer that replace the recipe's.

    Raises ValueError (RecipeError) when the PNG has no recipe, or base or LoRAs are not what they were.
    """
    recipe = Recipe.from_png(source)
    pictures = {name: changes.pop(name) for name in PICTURES if name in changes}
    wanted = _changed(recipe, changes, method, options)
    wanted = wanted.model_copy(
        update={
            "controlnet": controlnet or wanted.controlnet,
            "pictures": [u for u in wanted.pictures if u.role not in pictures]
            + [PictureUse(role=p.role, reference=p.reference, sha256=p.sha256) for p in pictures.values()],
        }
    )
    several = wanted.images > 1 and "num_images_per_prompt" in changes
    arguments.check_out(out, not several)
    note(f"loading {recipe.base}")
    quiet()

    import torch

    from multilora.pipelines.image import Composer

    dtype = None
    if wanted.resolved is not None:
        torch.set_num_threads(wanted.resolved.threads)  # it decides the order of sums, and so the last bits
        dtype = getattr(torch, wanted.resolved.dtype, None)
    folder = wanted.controlnet if Path(wanted.controlnet or "?", "config.json").is_file() else None
    composer = Composer.from_pretrained(recipe.base, torch_dtype=dtype, device=device, controlnet=folder)
    taken = draw_again(composer, wanted, None if several else wanted.index)
    save([taken], out)
    tell_differences(wanted, taken.recipes[0])
    return taken


def quiet() -> None:
    """No progress bars for reading files that are here already; those of downloads stay."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _changed(recipe: Recipe, changes: dict[str, Any], method: str | None, options: list[str]) -> Recipe:
    changes = {FIELDS.get(name, name): value for name, value in changes.items()}
    fields = recipe.model_dump()
    for name in ("form", "passes_per_call"):
        if name in changes:
            value = changes.pop(name)
            if recipe.resolved is None:
                raise ValueError(f"{name}={value!r}: this recipe has no resolved settings that it could replace")
            fields["resolved"][name] = value
    if "seed" in changes or "images" in changes:
        fields |= {"seed": recipe.seed + recipe.index, "images": 1, "index": 0}
    if method or options:
        name = method or recipe.method
        bound = arguments.read_methods([name], options)[0]
        kept = recipe.options if name == recipe.method else {}
        given = {key.rpartition(".")[2] for key, _ in arguments.read_pairs("--option", options, "KEY=VALUE")}
        fields["method"] = name
        if name != recipe.method:
            fields["resolved"] = None  # form and batching suited the other method
        fields["options"] = {n: v if n in given else kept.get(n, v) for n, v in bound.options.items()}
    if fields["resolved"] and (options or changes.keys() - {"seed", "images"}):
        fields["resolved"]["choice"] = ""  # another request: a method that chooses does so anew
    return Recipe.checked({**fields, **changes}, "changed recipe")


def _about(member: Any) -> str:
    weight = member.weight.constant
    at = "" if weight == 1.0 else f" at {member.weight if weight is None else f'{weight:g}'}"
    return f"{member.lora.card.category} alone{at}".strip()


def described(shot: Taken) -> list[dict[str, Any]]:
    """A drawn variant as JSON, one entry per picture."""
    return [
        {
            "path": str(path),
            "title": shot.title,
            "seconds": round(shot.seconds, 3),
            "runs_per_step": shot.passes,
            "recipe": recipe.model_dump(mode="json"),
        }
        for path, recipe in zip(shot.paths, shot.recipes, strict=True)
    ]
