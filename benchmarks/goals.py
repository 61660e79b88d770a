"""A goal's line in a table of results, and times taken in turn."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HEAD = "| | | measured | A/A | goal | stretch | |\n|---|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Row:
    """What was measured over what, and the bounds.

    spread  quartiles of one way against itself, round by round; None for counts, which are the same everywhere
    least   the bounds are from below
    """

    goal: str
    what: str
    measured: float
    bound: float | None = None
    stretch: float | None = None
    spread: tuple[float, float] | None = None
    least: bool = False

    @property
    def verdict(self) -> str:
        """met, met within A/A (the bound lies inside the spread around what was measured), missed, or nothing."""
        if self.bound is None:
            return ""
        sign = -1 if self.least else 1
        if sign * self.measured <= sign * self.bound:
            return "met"
        low, high = self.spread or (1.0, 1.0)
        best = self.measured * (high if self.least else low)
        return "met within A/A" if sign * best <= sign * self.bound else "missed"

    @property
    def bounds(self) -> str:
        """Goal and stretch, as two columns."""
        sign = ">=" if self.least else "<="
        return " | ".join("" if b is None else f"{sign} {shown(b)}" for b in (self.bound, self.stretch))

    def __str__(self) -> str:
        spread = "" if self.spread is None else f"{self.spread[0]:.2f} to {self.spread[1]:.2f}"
        return f"| {self.goal} | {self.what} | {shown(self.measured)} | {spread} | {self.bounds} | {self.verdict} |"


def shown(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 0.001 else f"{value:.3f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class Times:
    """Seconds of each way, two of every round: a call follows one of another way, so that all meet cold caches."""

    each: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.each[name])

    def over(self, name: str, other: str) -> float:
        return self.median(name) / self.median(other)

    @property
    def spread(self) -> tuple[float, float]:
        """A/A: quartiles of the first way's second call of a round by its first."""
        first = next(iter(self.each.values()))
        ratios = [b / a for a, b in zip(first[::2], first[1::2], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return quartiles[0], quartiles[2]


def cpu_seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def in_turn(ways: dict[str, Callable[[], Any]], rounds: int) -> Times:
    """A B C A B C in every round: the seconds of each way, after a call of each that does not count."""
    for call in ways.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(2 * rounds):
        for name, call in ways.items():
            found[name].append(cpu_seconds(call))
    return Times(found)


def machine() -> str:
    """The processor, and what else it has to do."""
    import torch

    from multilora.lab.machine import processor

    return (f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), load average "
            f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}")  # fmt: skip
