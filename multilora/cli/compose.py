"""`multilora compose`: prompt, LoRAs and a method -> a picture; several methods -> a contact sheet."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from multilora.cli import arguments
from multilora.cli.console import print_json

Many = list[str]


def compose(
    prompt: Annotated[str | None, typer.Argument(help="what to draw; <lora:name:0.8> adds a LoRA")] = None,
    lora: Annotated[
        Many | None, typer.Option(help="[NAME=]FILE_OR_LIBRARY_NAME[:WEIGHT], weight a number or 0@0,1@0.5; repeat")
    ] = None,
    method: Annotated[str | None, typer.Option(help="how LoRAs are combined, default auto; see: methods")] = None,
    option: Annotated[Many | None, typer.Option(help="KEY=VALUE of the method (METHOD.KEY with --compare)")] = None,
    gate: Annotated[
        str | None, typer.Option(help="of a method with one: its file, or an embedded gate's name")
    ] = None,
    compare: Annotated[str | None, typer.Option(help="methods, comma-separated: one picture each and a sheet")] = None,
    singles: Annotated[
        bool, typer.Option("--singles", help="with --compare: also the base and each LoRA alone")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="of the starting noise, default a new one")] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps")] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance scale")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT")] = None,
    num: Annotated[int | None, typer.Option(help="pictures, at seed, seed + 1, ...")] = None,
    negative: Annotated[str | None, typer.Option(help="what not to draw")] = None,
    base: Annotated[str | None, typer.Option(help="'embedded' (default), a pipeline folder or a hub id")] = None,
    image: Annotated[str | None, typer.Option(help="a picture to start from")] = None,
    strength: Annotated[float | None, typer.Option(help="with --image: how much is drawn anew, up to 1")] = None,
    mask_image: Annotated[str | None, typer.Option(help="with --image: what is drawn anew (white)")] = None,
    control_image: Annotated[str | None, typer.Option(help="what the ControlNet sees")] = None,
    controlnet: Annotated[str | None, typer.Option(help="folder of a ControlNet for the base")] = None,
    control_scale: Annotated[float | None, typer.Option(help="how much the ControlNet counts")] = None,
    scheduler: Annotated[str | None, typer.Option(help="diffusers class name, default the base's own")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="per_row, all, first or none")] = None,
    block: Annotated[
        Many | None, typer.Option(help="LORA:GLOB=FACTOR or LORA:lbw=OUTALL, weight of part of a LoRA; repeat")
    ] = None,
    lbw_presets: Annotated[
        Path | None, typer.Option(help="file of your own lbw presets, lines NAME:1,0,0,...")
    ] = None,
    mask: Annotated[Many | None, typer.Option(help="LORA=PICTURE, where the LoRA acts (white); repeat")] = None,
    text_weight: Annotated[Many | None, typer.Option(help="LORA=WEIGHT in the text encoder; repeat")] = None,
    positive_only: Annotated[Many | None, typer.Option(help="LORA that leaves the negative branch alone")] = None,
    form: Annotated[str | None, typer.Option(help="of the adapted layers: auto, side, rebuilt or bank")] = None,
    passes_per_call: Annotated[int | None, typer.Option(help="model runs in one batch, default all")] = None,
    cache: Annotated[
        str | None, typer.Option(help="skip deep layers: 3 runs the whole model every 3rd step; or first_block:0.1")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default the best there is")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="a PNG that multilora wrote: make it again, with what else is given")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder, or a .png for one picture")] = Path("out"),
    show_schedule: Annotated[
        bool, typer.Option("--show-schedule", help="also plot the weights over the steps, beside the picture")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="also say where the pictures' time goes")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print paths and recipes as JSON")] = False,
) -> None:
    """Draw a prompt with several LoRAs; without any argument, show what the methods do to four LoRAs."""
    numbers = {
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "negative_prompt": negative,
        "num_images_per_prompt": num,
        "strength": strength,
        "controlnet_conditioning_scale": control_scale,
        "scheduler": scheduler,
        "text_encoder": text_encoder,
        "form": form,
        "passes_per_call": passes_per_call,
        "cache": cache,
    }
    request = {name: value for name, value in numbers.items() if value is not None}
    option = [*(option or []), *([] if gate is None else [f"gate={gate}"])]
    for name, value in (("--num", num), ("--steps", steps)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: wanted at least 1")
    if cache is not None:
        from multilora.pipelines.caching import read_cache

        read_cache(cache)
    if size is not None:
        request["width"], request["height"] = arguments.read_size(size)
    pictures = {"image": image, "mask_image": mask_image, "control_image": control_image}
    request |= arguments.read_pictures(pictures, request, controlnet, again=source is not None)
    from multilora.cli.order import Order, again, described, fresh
    from multilora.cli.profile import kept, print_profile

    if source is not None:
        for name, value in {
            "--lora": lora, "--compare": compare, "--singles": singles, "--base": base, "--block": block,
            "--mask": mask, "--text-weight": text_weight, "--positive-only": positive_only,
            "--lbw-presets": lbw_presets, "--show-schedule": show_schedule,
        }.items():  # fmt: skip
            if value:
                raise ValueError(f"{name} does not go with --from: the recipe in {source} has its own")
        changes = {**request, **({} if prompt is None else {"prompt": prompt})}
        with kept(profile) as found:
            taken, sheet, plot = [again(source, changes, method, option or [], device, out, controlnet)], None, None
    else:
        if method and compare:
            raise ValueError("--method and --compare: give one of them")
        order = Order(
            prompt,
            [arguments.read_lora(text) for text in lora or []],
            arguments.read_lora_options(block or [], mask or [], text_weight or [], positive_only or []),
            [name.strip() for name in compare.split(",")] if compare else [method] if method else [],
            option or [],
            compare is not None,
            singles,
            base or "embedded",
            controlnet=controlnet,
            show_schedule=show_schedule,
            presets=lbw_presets,
        )
        with kept(profile) as found:
            taken, sheet, plot = fresh(order, request, device, out)
    paths = [path for shot in taken for path in shot.paths]
    if as_json:
        also = {"sheet": sheet and str(sheet), **({"schedule": str(plot)} if plot else {})}
        also |= {"profile": asdict(found)} if found else {}
        print_json({"pictures": [p for shot in taken for p in described(shot)], **also})
        return
    for path in [*paths, *(path for path in (sheet, plot) if path)]:
        print(path)
    if found:
        print_profile(found)
