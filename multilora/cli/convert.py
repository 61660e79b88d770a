"""`multilora convert`: a LoRA in another format or precision, with block weights baked in."""

from __future__ import annotations

from typing import Annotated

import typer

from multilora.cli import arguments
from multilora.cli.console import note, print_json
from multilora.cli.target import AsJson, Base, Dtype, Force, Format, Out, Target, WithCard, find, in_words, load


def convert(
    file: Annotated[str, typer.Argument(help="[NAME=]FILE_OR_LIBRARY_NAME[:WEIGHT]")],
    out: Out,
    format: Format = None,
    dtype: Dtype = None,
    blocks: Annotated[
        list[str] | None,
        typer.Option("--block", help="GLOB=FACTOR of modules, such as '*attn2*=0.5', baked in; repeat"),
    ] = None,
    base: Base = None,
    card: WithCard = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a LoRA in another format or precision; a weight or block weights are baked in."""
    wanted = [arguments.read_lora(file)]
    weight = arguments.read_weights(None, wanted)[0]
    factors = arguments.read_blocks(blocks or [])
    paths = find(wanted)
    target = Target.checked(out, format, dtype, force, card, base, paths)
    lora = load(wanted, paths, base)[0]
    if factors or weight != 1.0:
        from multilora.merge.linear import linear

        lora = linear([lora], [arguments.block_weights(weight, factors)])
    found = target.write(lora)
    if as_json:
        print_json({"result": found})
        return
    note(in_words(found))
    print(found["path"])
