"""`multilora train`: LoRAs from a folder of pictures and captions."""

from __future__ import annotations

import typer

train = typer.Typer(help="train LoRAs", no_args_is_help=True)


@train.callback()
def _train() -> None:
    """Train LoRAs."""
