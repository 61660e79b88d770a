"""`multilora world`: the embedded world, drawn and trained from nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from multilora.cli import arguments

world = typer.Typer(help="the embedded world: draw its scenes, rebuild its models and LoRAs", no_args_is_help=True)


@world.command()
def draw(
    out: Annotated[Path, typer.Option(help="folder for pictures, captions, labels and galleries")] = Path("out/world"),
    count: Annotated[int, typer.Option(help="scenes", min=1, max=1_000_000)] = 24,
    seed: Annotated[int, typer.Option(help="another seed, other scenes", min=0)] = 0,
    design: Annotated[
        list[str] | None, typer.Option(help="a named design that every scene shows, such as zib; one a category")
    ] = None,
) -> None:
    """Draw scenes of the embedded world with captions and labels, and galleries of scenes and designs."""
    from multilora.lab.world.designs import DESIGNS
    from multilora.lab.world.stages import draw as draw_scenes
    from multilora.method import unknown

    designs: dict[str, str] = {}
    for name in design or []:
        if name not in DESIGNS:
            raise unknown("--design", name, DESIGNS)
        other = designs.setdefault(DESIGNS[name].category, name)
        if other != name:
            raise ValueError(f"--design {name}: {other} is a {DESIGNS[name].category} already; one a category")
    arguments.check_folder(out)
    draw_scenes(
        out, count, seed, echo=lambda text: print(text, file=sys.stderr), **({"designs": designs} if designs else {})
    )
    print(out / "gallery.png")


@world.command()
def train(
    out: Annotated[Path, typer.Option(help="folder for data, checkpoints, log and assets/")] = Path("out/world"),
    stage: Annotated[list[str] | None, typer.Option(help="only this stage; repeat. Default all, in order")] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="every stage at a size of seconds, to see that it runs")
    ] = False,
    stages: Annotated[bool, typer.Option("--stages", help="list the stages and stop")] = False,
    text: Annotated[
        bool, typer.Option("--text", help="the text model and its LoRAs instead of the pictures'")
    ] = False,
) -> None:
    """Rebuild the embedded models and LoRAs from nothing; run again to go on where it stopped."""
    from multilora.cli.console import print_table
    from multilora.lab.world.stages import STAGES, TEXT_STAGES
    from multilora.lab.world.stages import train as train_world
    from multilora.method import unknown

    table = TEXT_STAGES if text else STAGES
    if stages:
        print_table(("stage", "what it makes"), [(name, entry[1]) for name, entry in table.items()])
        return
    for name in stage or []:
        if name not in table:
            raise unknown("--stage", name, table)
    arguments.check_folder(out)
    train_world(out, stage, smoke, echo=lambda line: print(line, file=sys.stderr, flush=True), text=text)
    print(out)


@world.command()
def review(
    out: Annotated[Path, typer.Option(help="folder of the pages, sealed.json and grids/")] = Path("out/review"),
    assets: Annotated[
        Path | None, typer.Option(help="folder with base, loras and recognisers; default the package's")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="a reviewer's JSON {number: {head: label}}: count it into --journal")
    ] = None,
    journal: Annotated[Path, typer.Option(help="the report's journal")] = Path("out/world/report.jsonl"),
    count: Annotated[int, typer.Option(help="pictures of the base; each LoRA adds four", min=1)] = 112,
) -> None:
    """Draw numbered pictures without words for a reviewer, and grids with words; or count a reviewer's answers."""
    from multilora.cli.console import print_json
    from multilora.lab.journal import Journal
    from multilora.lab.world import review as lab

    def echo(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if answers is not None:
        print_json(lab.count(out / "sealed.json", answers, Journal(journal)))
        return
    from multilora.pipelines.load import assets as packaged
    from multilora.pipelines.load import load_pipeline

    arguments.check_folder(out)
    folder = assets or packaged()
    pipe = load_pipeline(folder / "base", device="cpu")
    lab.grids(pipe, folder, out / "grids", echo)
    lab.pages(pipe, folder, out, count, echo)
    (out / "choices.json").write_text(json.dumps(lab.choices(), indent=1) + "\n")
    print(out)
