"""Progress on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any


def note(text: str) -> None:
    """A line for the person at the terminal; never part of the output."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Warnings meant for users as one line each, without the place in the source; others as Python shows them."""
    before = warnings.showwarning

    def show(message: Any, category: type[Warning], filename: str, lineno: int, *more: Any, **named: Any) -> None:
        if issubclass(category, UserWarning):
            note(f"note: {message}")
        else:
            before(message, category, filename, lineno, *more, **named)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Aligned columns on stdout; the last one is as long as it is."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header) - 1)]
    for row in [header, *rows]:
        cells = [cell.ljust(w) for cell, w in zip(row, [*widths, 0], strict=True)]
        print("  ".join(cells).rstrip())


@contextlib.contextmanager
def bars() -> Iterator[Callable[[str, int], Callable[..., None]]]:
    """Progress bars: `bar = start(title, steps)`, then `bar(step, text)`. Silent when stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def start(title: str, steps: int) -> Callable[..., None]:
            task = progress.add_task(title, total=steps, text="")

            def bar(step: int, text: str = "", steps: int = steps) -> None:
                progress.update(task, completed=step, text=text, total=steps)

            return bar

        yield start
