"""`multilora reproduce`: the papers' claims measured on the embedded models."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from multilora.cli import arguments


def reproduce(
    name: Annotated[list[str] | None, typer.Argument(help="experiments; all by default")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of reproduction.md, text.md and text/")] = Path(
        "out/reproduce"
    ),
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", min=1, help="processes side by side; by default one a core, 4 at most"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a few questions each, to see that it runs")] = False,
    listed: Annotated[bool, typer.Option("--list", help="list the experiments and stop")] = False,
) -> None:
    """Measure what the nine papers claim on the embedded models; run again to go on where it stopped."""
    from multilora.cli.console import note, print_table
    from multilora.lab.journal import Journal
    from multilora.lab.reproduce.bench import FULL, SMOKE
    from multilora.lab.reproduce.page import NAMES, experiment, measured, verdict_line
    from multilora.lab.reproduce.page import reproduce as run

    found = [experiment(one) for one in name or NAMES]
    if listed:
        print_table(("experiment", "claim"), [(one.name, one.claim) for one in found])
        return
    arguments.check_folder(out)
    jobs = jobs or min(4, os.cpu_count() or 1)  # a process took 1.2 GB (AMD EPYC)
    page = run(name or (), out, size=SMOKE if quick else FULL, jobs=jobs, echo=_say)
    journal = Journal(out / "text" / "report.jsonl")
    for one in measured(journal):
        note(f"{one.title}: {verdict_line(one, journal)}")
    print(page)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
