"""`multilora compose --profile`: where the pictures' time goes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from multilora.cli.console import print_table


@contextlib.contextmanager
def kept(wanted: bool) -> Iterator[Any]:
    """The profile of the block, or None where it is not wanted."""
    if not wanted:
        yield None
        return
    from multilora.pipelines.profiling import profiled

    with profiled() as found:
        yield found


def print_profile(found: Any) -> None:
    """A line per part, the longest first, and the operations that take most of it."""
    device = sum(part.device_seconds for part in found.parts)
    host = sum(part.seconds for part in found.parts)
    rows = []
    for part in found.parts:
        share = part.device_seconds / device if device else part.seconds / (host or 1)
        longest = ", ".join(f"{name} {seconds:.3f} s ({calls})" for name, calls, seconds in part.operations[:3])
        busy = (f"{part.device_seconds:.3f}",) if device else ()
        rows.append((part.name, f"{share:.0%}", f"{part.seconds:.3f}", *busy, str(part.runs), longest))
    busy = ("device s",) if device else ()
    print_table(("part", "share", "host s", *busy, "runs", "longest operations (calls)"), rows)
    print(f"{found.seconds:.2f} s in all, under the profiler, which takes time itself")
