"""`multilora eval`: methods compared over a library of LoRAs, with a report."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from multilora.cli import arguments
from multilora.cli.batch import shown_progress, stopped_by_signals
from multilora.cli.console import note, print_json
from multilora.cli.order import quiet

TABLES = ("cells", "categories", "differences", "wins", "costs")  # of the JSON; pictures are in tables/


def evaluation(
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of the evaluation; give it again to go on")] = Path(
        "out/evaluation"
    ),
    library: Annotated[
        str, typer.Option(help="'embedded', a folder of LoRAs, or its library.json or *_lora_info.json")
    ] = "embedded",
    files: Annotated[Path | None, typer.Option(help="folder of the listing's LoRA files, default beside it")] = None,
    methods: Annotated[
        str, typer.Option(help="comma-separated METHOD[@WEIGHT]; none: without LoRAs; all: every one without training")
    ] = "none,merge,switch,composite",
    option: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE of the methods that have it, or METHOD.KEY")
    ] = None,
    k: Annotated[str, typer.Option("--k", help="LoRAs in a picture: 3, 2-5 or 2,4")] = "2-5",
    count: Annotated[int, typer.Option(help="pictures of each method for each k", min=1)] = 100,
    split: Annotated[str, typer.Option(help="of a library that has splits: test, train or all")] = "test",
    preset: Annotated[
        str, typer.Option(help="world; anime, reality: settings of the published testbed, with --base")
    ] = "world",
    base: Annotated[str | None, typer.Option(help="'embedded', a pipeline folder or a hub id")] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps, default the preset's")] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance scale, default the preset's")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT")] = None,
    scale: Annotated[float | None, typer.Option(help="of all LoRAs at once, beside each one's weight")] = None,
    scheduler: Annotated[str | None, typer.Option(help="diffusers class name")] = None,
    negative: Annotated[str | None, typer.Option(help="what not to draw")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="with {triggers} in it; the embedded world has its own prompts")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="CLIP scorer: an OpenAI name, a file; default the embedded one on its own world")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Ray actors on this machine; default this process alone")] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="of a running Ray cluster, or auto")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="of the processor for each picture")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default the best there is")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="also what has failed three times before")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be drawn, and stop")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the tables by method and k as JSON")] = False,
) -> None:
    """Compare methods over a library: pictures on the same noise, presence and CLIP score with intervals, a report."""
    arguments.check_batch(out, workers, threads)
    ks = read_ks(k)
    width, height = arguments.read_size(size)
    from multilora.lab.evaluate.combinations import read_library
    from multilora.lab.evaluate.evaluation import CountingRenderer, Plan, evaluate
    from multilora.lab.evaluate.journal import read_settings
    from multilora.lab.evaluate.readings import Readers
    from multilora.lab.evaluate.report import findings, markdown, tables, write
    from multilora.lab.evaluate.settings import preset as preset_of

    settings = preset_of(preset).with_(
        base=base, steps=steps, guidance=guidance, width=width, height=height, scale=scale, scheduler=scheduler,
        negative=negative, prompt=prompt,
    )  # fmt: skip
    plan = Plan(read_library(library, files).of(split), read_arms(methods, option or []), ks, count, settings)
    quiet()
    embedded = plan.library.world and settings.base == "embedded"
    scorer = clip or ("embedded" if embedded else None)
    note(f"{len(plan.wanted)} pictures: {len(plan.arms)} methods, k = {k}, {count} each, {settings.steps} steps")
    if dry_run:  # loads no scorer: it may have to be fetched, and be large
        note(f"CLIP score: {scorer or 'none'}")
        return
    readers = Readers.load("b" if embedded else None, scorer)
    for what, who in readers.names.items():
        note(f"{what}: {who}")
    threads = threads or read_settings(out).get("threads") or max(1, (os.cpu_count() or 1) // (workers or 1))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    team = None
    if workers is not None or ray is not None:
        from multilora.lab.evaluate.ray_workers import RayWorkers

        team = partial(RayWorkers, workers=workers, address=ray, threads=threads)
    with (
        contextlib.redirect_stdout(sys.stderr),
        stopped_by_signals() as stop,
        shown_progress(len(plan.wanted)) as progress,
    ):
        results = evaluate(
            plan, out, readers=readers, make=partial(CountingRenderer, device, threads),
            settings={"threads": threads, "device": device, **versions}, workers=team, stop=stop, progress=progress,
            retry_failed=retry_failed, note=note,
        )  # fmt: skip
    _failures(results.failed)
    if results.shown:
        paths = write(results, out)
        made = tables(results)
        if as_json:
            print_json({name: [_plain(row) for row in made[name]] for name in TABLES})
        else:
            print(markdown(made))
            for text in findings(results):
                note(text)
            print(paths[0])
    if results.stopped:
        note(f"stopped after {len(results.shown)} of {len(plan.wanted)} pictures; run the same command to go on")
        raise typer.Exit(130)
    if results.failed:
        raise typer.Exit(1)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row with null for nan, which JSON does not have."""
    return {name: None if value != value else value for name, value in row.items()}


def _failures(failed: Sequence[tuple[str, str]]) -> None:
    for arm, error in failed[:5]:
        note(f"{arm}: a picture failed: {error.splitlines()[0] if error else 'no reason given'}")
    if len(failed) > 5:
        note(f"and {len(failed) - 5} more pictures failed")


def read_ks(text: str) -> tuple[int, ...]:
    """Numbers of LoRAs of `3`, `2-5` or `2,4`. Raises ValueError for what is none."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high <= 100:
            raise ValueError(f"--k {text!r}: wanted numbers of LoRAs from 1, such as 3, 2-5 or 2,4")
        found += range(low, high + 1)
    return tuple(dict.fromkeys(found))


def read_arms(text: str, options: Sequence[str]) -> list[Any]:
    """The arms of --methods with the options that each method has. Raises ValueError as read_methods does."""
    from multilora.lab.evaluate.evaluation import NONE, arm, training_free

    words = [w for word in text.split(",") for w in (training_free() if word.strip() == "all" else [word.strip()])]
    words = list(dict.fromkeys(words))
    names = list(dict.fromkeys(name for w in words if (name := w.partition("@")[0]) != NONE))
    given: dict[str, list[tuple[str, Any]]] = {name: [] for name in names}
    bound = {b.record.name: b for b in arguments.read_methods(names, options)}
    for key, _ in arguments.read_pairs("--option", options, "KEY=VALUE, such as every=5"):
        owner, _, plain = key.rpartition(".")
        for name in [owner] if owner else names:
            if plain in bound[name].options:
                given[name].append((plain, bound[name].options[plain]))
    return [arm(word, given.get(word.partition("@")[0], ())) for word in words]
