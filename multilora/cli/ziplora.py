"""`multilora train ziplora`: LoRAs as one, by trained weights of the columns of their updates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from multilora.cli import arguments
from multilora.cli.console import bars, note, print_json
from multilora.cli.train import train


@train.command("ziplora")
def train_ziplora(
    lora: Annotated[list[str], typer.Argument(help="FILE_OR_LIBRARY_NAME, at least two")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the .safetensors file of the one LoRA")],
    base: Annotated[str, typer.Option(help="'embedded', a folder of a pipeline, or a hub id")] = "embedded",
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="NUMBER=TEXT that LoRA 1, 2, ... is to be seen in; default its trigger words; repeat"),
    ] = None,
    steps: Annotated[int, typer.Option(help="optimiser steps")] = 100,
    lr: Annotated[float, typer.Option(help="learning rate")] = 0.01,
    similarity: Annotated[float, typer.Option(help="price of columns that two LoRAs share")] = 0.01,
    draws: Annotated[int, typer.Option(help="noise levels per prompt")] = 4,
    size: Annotated[int | None, typer.Option(help="side of the pictures, default the base's own")] = None,
    seed: Annotated[int, typer.Option(help="of everything that is random")] = 0,
    force: Annotated[bool, typer.Option("--force", help="replace what is at --out")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Make one LoRA of several (ZipLoRA), so that each keeps what it does alone; no pictures are needed."""
    if out.exists() and not (force and out.is_file()):
        raise ValueError(f"--out {str(out)!r}: exists already; --force replaces it")
    arguments.check_folder(out.parent)
    prompts = _prompts(prompt or [], len(lora))
    from multilora.lab.train.ziplora import train as run

    with bars() as start:
        advance = None

        def progress(step: int, of: int, info: dict[str, float]) -> None:
            nonlocal advance
            advance = advance or start("ziplora", of)
            advance(step, f"error {info['error']:.4f}, in common {info['common']:.3f}")

        trained = run(lora, base, out, prompts=prompts, steps=steps, lr=lr, similarity=similarity, draws=draws,
                      size=size, seed=seed, echo=note, progress=progress)  # fmt: skip
    if as_json:
        print_json({"path": str(trained.path), "steps": trained.steps, "loss": trained.losses[-1],
                    "seconds": round(trained.seconds, 1)})  # fmt: skip
        return
    print(trained.path)


def _prompts(texts: list[str], count: int) -> list[list[str]] | None:
    """[LoRAs] prompts of each; None without any."""
    found: list[list[str]] = [[] for _ in range(count)]
    for number, text in arguments.read_pairs("--prompt", texts, "NUMBER=TEXT, such as '1=a fox'"):
        if not (number.isdecimal() and 1 <= int(number) <= count):
            raise ValueError(f"--prompt {number}={text}: wanted the number of a LoRA, 1 to {count}")
        found[int(number) - 1].append(text)
    missing = [i for i, own in enumerate(found, 1) if not own]
    if texts and missing:
        raise ValueError(f"--prompt: none for LoRA {missing[0]}; give one for each, or none at all")
    return found if texts else None
