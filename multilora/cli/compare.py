"""`multilora compare`: LoRAs side by side."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer

from multilora.cli import arguments
from multilora.cli.console import print_json
from multilora.cli.target import AsJson, Base, find, load


def compare(
    files: Annotated[list[str], typer.Argument(help="[NAME=]FILE_OR_LIBRARY_NAME, two or more")],
    base: Base = None,
    plot: Annotated[Path | None, typer.Option(help="a .png with everything as charts")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace the picture of --plot")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare LoRAs: cosine in all and by block, energy by rank, directions they share."""
    if plot is not None:
        arguments.check_picture(plot, force)
    wanted = [arguments.read_lora(text) for text in files]
    loras = load(wanted, find(wanted), base)
    from multilora.compare import compare as compared
    from multilora.compare import in_words

    found = compared(loras)
    if plot is not None:
        from multilora.lab.chart import draw_comparison
        from multilora.recipe import save_png

        save_png(draw_comparison(found), plot)
    if as_json:
        print_json(found.as_dict())
        return
    for i, name in enumerate(found.names):
        ranks = ", ".join(f"{float(share):.0%} of the energy in rank {rank}" for share, rank in found.ranks[i].items())
        print(f"{name}: {found.modules[i]} modules, norm {found.norms[i]:.4g}; {ranks}")
    for i, j in itertools.combinations(range(len(loras)), 2):
        print(in_words(found, i, j))
        strongest = sorted(found.blocks.items(), key=lambda b: -abs(b[1].cosine[i][j] or 0.0))[:3]
        shown = [f"{name} {block.cosine[i][j]:+.2f}" for name, block in strongest if block.cosine[i][j]]
        print(f"  by block: {', '.join(shown)}" if shown else "  no block in common")
        for side, words in (("in", "input"), ("out", "output")):
            share, chance = (getattr(found, f"{what}_{side}")[i][j] for what in ("overlap", "chance"))
            if share is not None:
                print(f"  shared {words} directions: {share:.0%}, by chance {chance:.0%}")
    if plot is not None:
        print(plot)
