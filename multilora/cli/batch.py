"""`multilora batch`: a picture for each line of a recipes.jsonl, exactly once, on one process or many."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from multilora.cli import arguments
from multilora.cli.console import bars, note, print_json

TOLD_EVERY = 15.0  # seconds between lines where there is no terminal to draw a bar on


def batch(
    recipes: Annotated[Path, typer.Argument(help="a .jsonl file, one recipe a line, at least with a prompt")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of the batch; give it again to go on")],
    workers: Annotated[int | None, typer.Option(help="Ray actors on this machine; default this process alone")] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="of a running Ray cluster, or auto")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="of the processor for each picture; default all of them, shared by the workers")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default the best there is")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="also what has failed three times before")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print what became of every line as JSON")] = False,
) -> None:
    """Draw every line of a recipes.jsonl; run it again to go on where it stopped."""
    arguments.check_batch(out, workers, threads)
    from multilora.lab.evaluate.batch import run_batch
    from multilora.lab.evaluate.items import read_items
    from multilora.lab.evaluate.journal import read_settings
    from multilora.lab.evaluate.workers import ComposerRenderer

    items = read_items(recipes)
    # Threads may decide the last bits of a picture: a batch that is gone on with keeps its number.
    threads = threads or read_settings(out).get("threads") or max(1, (os.cpu_count() or 1) // (workers or 1))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    team = None
    if workers is not None or ray is not None:
        from multilora.lab.evaluate.ray_workers import RayWorkers

        team = partial(RayWorkers, workers=workers, address=ray, threads=threads)
    # Ray tells on stdout which of its processes have died.
    with contextlib.redirect_stdout(sys.stderr), stopped_by_signals() as stop, shown_progress(len(items)) as progress:
        summary = run_batch(
            items,
            out,
            partial(ComposerRenderer, device, threads),
            settings={"threads": threads, "device": device, **versions},
            workers=team,
            stop=stop,
            progress=progress,
            retry_failed=retry_failed,
            note=note,
        )
    if as_json:
        print_json({"done": summary.done, "failed": summary.failed, "total": summary.total, "items": summary.rows})
    for row in summary.rows:
        if row["status"] == "failed":
            note(f"line {row['line']} failed: {(row['error'] or '').splitlines()[0]}")
    rest = f", {summary.failed} failed" if summary.failed else ""
    note(f"{summary.done} of {summary.total} pictures done{rest}; {summary.drawn} now, in {summary.seconds:.0f} s")
    if summary.stopped:
        note("stopped; run the same command to go on")
        raise typer.Exit(130)
    if not as_json:
        print(out / "pictures")
    if summary.failed:
        raise typer.Exit(1)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets; a second Ctrl-C ends the process as ever."""
    stop = threading.Event()

    def stopping(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, stopping) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def shown_progress(total: int) -> Iterator[Callable[[Any], None]]:
    """Progress as a bar on a terminal, else as a line now and then."""
    with bars() as start:
        bar = start("pictures", total)
        last = [time.monotonic()]

        def told(now: Any) -> None:
            text = status(now)
            bar(now.done + now.failed, text)
            if not sys.stderr.isatty() and time.monotonic() - last[0] >= TOLD_EVERY:
                last[0] = time.monotonic()
                note(f"{now.done} of {now.total} pictures, {text}")

        yield told


def status(now: Any) -> str:
    """Rate, time left and failures of a Progress, in words."""
    if not now.rate:
        return "starting"
    rate = f"{now.rate:.1f} a second" if now.rate >= 1 else f"{1 / now.rate:.1f} s each"
    left = int(now.left)
    spent = f"{left // 3600} h {left % 3600 // 60} min" if left >= 3600 else f"{left // 60} min {left % 60} s"
    return ", ".join([rate, f"{spent} left", *([f"{now.failed} failed"] if now.failed else [])])
