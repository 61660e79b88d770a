"""`multilora world`: the embedded world, drawn and trained from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

world = typer.Typer(help="the embedded world: draw its scenes, rebuild its models and LoRAs", no_args_is_help=True)


@world.command()
def draw(
    out: Annotated[Path, typer.Option(help="the picture to write")] = Path("out/world.png"),
    count: Annotated[int, typer.Option(help="scenes", min=1, max=1024)] = 32,
    columns: Annotated[int, typer.Option(help="scenes in a row", min=1, max=64)] = 8,
    seed: Annotated[int, typer.Option(help="another seed, other scenes", min=0)] = 0,
    designs: Annotated[bool, typer.Option(help="the named designs that LoRAs teach")] = False,
) -> None:
    """Draw a gallery of the embedded world's scenes."""
    from multilora.cli.arguments import check_out
    from multilora.lab.world.render import design_gallery, gallery
    from multilora.recipe import save_png

    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {str(out)!r}: wanted a .png file")
    check_out(out, single=True)
    picture = design_gallery(seed=seed) if designs else gallery(count, seed, columns)
    print(save_png(picture, out))
