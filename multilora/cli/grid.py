"""`multilora grid`: one picture per value of any fields of a recipe, on a contact sheet."""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from multilora.cli import arguments, demo
from multilora.cli.batch import shown_progress, stopped_by_signals
from multilora.cli.console import note, print_json
from multilora.cli.order import quiet


def grid(
    prompt: Annotated[str | None, typer.Argument(help="what to draw, with the triggers of the LoRAs")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="[NAME=]FILE_OR_LIBRARY_NAME[:WEIGHT]; repeat")] = None,
    x: Annotated[
        str,
        typer.Option("--x", help="FIELD=A,B (or A|B): method, weight, NAME.weight, steps, guidance, seed, every, ..."),
    ] = "method=merge,switch,composite",
    y: Annotated[str | None, typer.Option("--y", help="likewise, downwards; default none")] = None,
    method: Annotated[str, typer.Option(help="where no axis is the method")] = "merge",
    option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of the methods that have it")] = None,
    seed: Annotated[int, typer.Option(help="of the starting noise, the same in every cell", min=0)] = demo.SEED,
    steps: Annotated[int | None, typer.Option(help="denoising steps")] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance scale")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT")] = None,
    negative: Annotated[str | None, typer.Option(help="what not to draw")] = None,
    scheduler: Annotated[str | None, typer.Option(help="diffusers class name, default the base's own")] = None,
    base: Annotated[str, typer.Option(help="'embedded', a pipeline folder or a hub id")] = "embedded",
    clip: Annotated[
        str | None, typer.Option(help="CLIP scorer: an OpenAI name or a file; default the embedded one on its base")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="of the processor", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default the best there is")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="folder; default out/grid_...; give it again to go on")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print paths, values and readings as JSON")] = False,
) -> None:
    """Draw a grid over one or two fields of a recipe, with presence and CLIP score under each picture."""
    from multilora.lab.evaluate import grid as lab
    from multilora.pipelines.load import EMBEDDED, find_lora, library

    loras = [arguments.read_lora(text) for text in lora or []]
    if prompt is None:
        if loras or base != EMBEDDED:
            raise ValueError("PROMPT is missing: say what to draw, with the triggers of the LoRAs (multilora loras)")
        prompt, names = demo.scene(library())
        loras = [arguments.LoraArgument(name) for name in names]
    across, down = lab.axis(x), lab.axis(y) if y is not None else None
    axes = [each for each in (across, down) if each is not None]
    chosen = next((list(each.values) for each in axes if each.field == "method"), [method])
    arguments.read_methods(chosen, option or [])
    given = {
        key.rpartition(".")[2]: value for key, value in arguments.read_pairs("--option", option or [], "KEY=VALUE")
    }
    uses, elements, doubled = [], {}, set()
    for one in loras:
        path, entry = find_lora(one.source)
        name = one.name or (entry["name"] if entry else path.stem)
        uses.append({"name": name, "reference": one.source, "weight": 1.0 if one.weight is None else one.weight})
        if entry and base == EMBEDDED:
            doubled |= {entry["category"]} & set(elements)
            elements[entry["category"]] = entry["name"]
    elements = {c: name for c, name in elements.items() if c not in doubled}  # of two of a kind, one can be seen
    width, height = arguments.read_size(size)
    fields: dict[str, Any] = {
        "steps": steps, "guidance_scale": guidance, "width": width, "height": height, "negative_prompt": negative,
        "scheduler": scheduler,
    }  # fmt: skip
    row = {"prompt": prompt, "base": base, "method": method, "options": given, "loras": uses, "seed": seed,
           **{k: v for k, v in fields.items() if v is not None}}  # fmt: skip
    if not any(each.field == "method" for each in axes):
        row["options"] = dict(arguments.read_methods([method], option or [])[0].options)
    lab.rows_of(row, across, down)
    folder = out or Path("out") / lab.folder_of(row, across, down)
    arguments.check_folder(folder)
    from multilora.lab.evaluate.readings import Readers
    from multilora.lab.evaluate.workers import ComposerRenderer

    quiet()
    embedded = base == EMBEDDED
    readers = Readers.load("b" if elements else None, clip or ("embedded" if embedded else None))
    cells = len(across.values) * len(down.values if down else [1])
    with contextlib.redirect_stdout(sys.stderr), stopped_by_signals() as stop, shown_progress(cells) as progress:
        found = lab.draw_grid(
            row, across, down, folder, readers=readers, elements=elements,
            make=partial(ComposerRenderer, device, threads), settings={"threads": threads, "device": device},
            stop=stop, progress=progress,
        )  # fmt: skip
    for error in found.errors:
        note(f"a picture failed: {error.splitlines()[0] if error else 'no reason given'}")
    if as_json:
        squares = [s for line in found.squares for s in line if s is not None]
        print_json(
            {
                "sheet": found.sheet and str(found.sheet),
                "read_by": dict(found.read_by),
                "cells": [_said(s) for s in squares],
            }
        )
    elif found.sheet:
        print(found.sheet)
    if found.stopped:
        note("stopped; run the same command to go on")
        raise typer.Exit(130)
    if found.errors:
        raise typer.Exit(1)


def _said(square: Any) -> dict[str, Any]:
    seen, clip = dict(square.reading.seen), square.reading.clip
    return {"x": square.x, "y": square.y or None, "path": str(square.path), "seen": seen,
            "clip": None if clip != clip else clip}  # fmt: skip
