"""A file of measurements, one JSON line per finished piece, with what each took: to stop and go on at any time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from multilora.lab.machine import machine

_spent: list[float] = []  # wall and CPU clocks at this process's last line, in whichever journal it was


def restart_clock() -> None:
    """What was spent until now belongs to no line."""
    _spent[:] = time.perf_counter(), time.process_time()


class Journal:
    """Finished pieces by key.

    Each line says under `ran` when and on what it was measured, and the seconds (wall, CPU) since this process's line
    before it: what an experiment trains on the way counts to the line that needed it, and where several come from one
    batch the first has all of its time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[str, dict[str, Any]] = {}
        if not _spent:
            restart_clock()
        if path.is_file():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                self.lines[entry["key"]] = entry

    def __contains__(self, key: str) -> bool:
        return key in self.lines

    def add(self, key: str, **facts: Any) -> None:
        wall, cpu = _spent
        restart_clock()
        took = [round(_spent[0] - wall, 2), round(_spent[1] - cpu, 2)]
        ran = {"on": datetime.now(UTC).date().isoformat(), "machine": machine(), "seconds": took}
        self.lines[key] = {"key": key, **facts, "ran": ran}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = (json.dumps(self.lines[key]) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:  # one write: other processes append to the same file
            if (written := file.write(line)) != len(line):
                raise OSError(f"{self.path}: {written} of {len(line)} bytes of a line were written; is the disk full?")

    def of(self, part: str) -> list[dict[str, Any]]:
        return [entry for key, entry in self.lines.items() if key.split("/")[0] == part]


def ran(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """[when, on what, wall minutes, CPU minutes, lines] of measurements; lines kept before this was noted say so."""
    entries = list(entries)
    known = [e["ran"] for e in entries if "ran" in e]
    days = sorted({one["on"] for one in known})
    devices = {e["device"] for e in entries if e.get("device", "CPU") != "CPU"}
    machines = [*sorted({one["machine"] for one in known}), *sorted(devices)]
    wall, cpu = (sum(one["seconds"][i] for one in known) / 60 for i in (0, 1))
    missing = len(entries) - len(known)
    return [
        " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "",
        "; ".join(machines),
        f"{wall:.1f}" if known else "",
        f"{cpu:.1f}" if known else "",
        f"{len(entries)}" + (f", {missing} of them without date and time" if missing else ""),
    ]
