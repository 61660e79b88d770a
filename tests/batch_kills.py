"""Batches whose driver and workers are killed in turn, and what must be true of them afterwards."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from multilora.lab.evaluate.journal import read_rows

SCRIPT = Path(__file__).parent / "batch_standin.py"
PATIENCE = 300.0  # seconds without a new picture after which something hangs


@dataclass
class Killed:
    """kills of drivers and of workers; pictures begun beyond one per item; and how many might have been in hand."""

    drivers: int = 0
    workers: int = 0
    again: int = 0
    in_hand: int = 0
    most: int = 0  # workers of the largest team
    seconds: float = 0.0

    @property
    def kills(self) -> int:
        return self.drivers + self.workers


def kill_in_turn(
    folder: Path,
    recipes: list[Mapping],
    kills: int,
    teams: Iterable[int],
    address: str = "",
    seconds: float = 0.01,
    seed: int = 0,
    extra: Iterable[str] = (),
    limit: float = float("inf"),
) -> Killed:
    """Draw `recipes` into folder/out while driver and workers are killed (SIGKILL) in turn; then let it end.

    teams    numbers of workers, one after another, for the drivers; 0 is a driver that draws itself
    address  of the Ray cluster for the others
    limit    seconds after which no more is killed
    """
    (folder / "recipes.jsonl").write_text("\n".join(json.dumps(line) for line in recipes))
    log = folder / "log"
    log.touch()
    rng, teams, found, began = random.Random(seed), itertools.cycle(teams), Killed(), time.monotonic()

    def begun() -> list[str]:
        return [line for line in log.read_text().split("\n")[:-1] if line]

    def start(team: int) -> subprocess.Popen:
        command = [sys.executable, str(SCRIPT), *(str(folder / n) for n in ("recipes.jsonl", "out", "log"))]
        with open(folder / "stderr", "a") as errors:
            return subprocess.Popen([*command, str(seconds), str(team), address, *extra], stderr=errors)

    def wait(run: subprocess.Popen, more: int) -> bool:
        """True when `more` pictures were begun; False when the driver has ended."""
        wanted, end = len(begun()) + more, time.monotonic() + PATIENCE
        while len(begun()) < wanted:
            if run.poll() is not None:
                return False
            assert time.monotonic() < end, (folder / "stderr").read_text()[-3000:]
            time.sleep(0.002)
        time.sleep(rng.random() * 2 * seconds)
        return True

    while found.kills < kills and time.monotonic() - began < limit:
        team = next(teams)
        run = start(team)
        for victim in ("worker", "driver") if team and kills - found.kills > 1 else ("driver",):
            left = len(recipes) - len({line.split(" ", 1)[1] for line in begun()})
            mean = max(1, left // (kills - found.kills))
            if not wait(run, rng.randint(1, 2 * mean - 1)):
                break
            if victim == "worker":
                pid = int(begun()[-1].split()[0])
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    break
                found.workers += 1
                found.in_hand += 1
            else:
                run.kill()
                found.drivers += 1
                found.in_hand += max(1, team)
            found.most = max(found.most, team, 1)
        code = run.wait()
        assert code in (0, -signal.SIGKILL), f"{code}: {(folder / 'stderr').read_text()[-3000:]}"
        if code == 0 and left == 0:
            break
    run = start(0)
    assert run.wait() == 0
    found.again = len(begun()) - len(recipes)
    found.seconds = time.monotonic() - began
    return found


def check(folder: Path, reference: Mapping[str, bytes], found: Killed) -> None:
    """Nothing lost, twice or torn; the very bytes of an uninterrupted run; little was drawn again."""
    there = {p.name: p.read_bytes() for p in (folder / "out" / "pictures").iterdir()}
    assert there == reference
    rows = read_rows(folder / "out")
    assert len(rows) == len(reference)
    assert {row["status"] for row in rows} == {"done"}
    assert found.again <= found.in_hand <= found.most * found.kills
