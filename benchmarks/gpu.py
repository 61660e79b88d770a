"""The GPU's table: goals G1 to G10, each against its baseline in the same run; minutes on one card.

    python benchmarks/gpu.py [G1 G5 ...] > benchmarks/gpu.md       needs torch, triton, peft, transformers, diffusers
    python benchmarks/gpu.py --out so_far.md                       the table after each goal too, should time run out
    python benchmarks/gpu.py --dry-run                             the same calls at small sizes on the CPU

A bare machine needs a checkout and no installation of this package. Times are CUDA events, the ways in turn, as
medians; A/A is the first way against itself. A way that cannot run (no diffusers, no Triton) is named with the reason,
and so is one that fails: the others still run, and the exit status is 1. Models have random weights of true shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from goals import HEAD, Row

from multilora.captured import captured
from multilora.kernels import choice


@dataclass(frozen=True)
class Setting:
    """Where and how large; small: a dry run, every call once and graphs replaced by the calls themselves."""

    device: torch.device
    small: bool
    rounds: int
    half: torch.dtype

    def graph(self, call: Callable[[], Any], bank: Any = None) -> Callable[[], Any]:
        """The call as a CUDA graph; on the CPU the call, behind the same guard."""
        return captured(call, bank, recorder=lambda same: same) if self.device.type == "cpu" else captured(call, bank)

    def randn(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, device=self.device, dtype=self.half)

    @functools.cached_property
    def bandwidth(self) -> float:
        """Bytes a second that a copy moves, reading and writing."""
        source = torch.empty(2**20 if self.small else 2**30, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / times(self, {"copy": lambda: target.copy_(source)})["copy"]


@dataclass
class Report:
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # what was timed -> median
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def took(self, goal: str, found: dict[str, float]) -> None:
        self.seconds |= {f"{goal}: {name}": value for name, value in found.items()}


def once(setting: Setting, call: Callable[[], Any], repeats: int) -> float:
    """Seconds of one call."""
    if setting.device.type == "cpu":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def times(setting: Setting, ways: dict[str, Callable[[], Any]], repeats: int = 5) -> dict[str, float]:
    """Median seconds of each way, in turn; the first is timed twice a round, as "A/A"."""
    turns = {**ways, "A/A": next(iter(ways.values()))}
    for call in () if setting.small else turns.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(setting.rounds):
        for name, call in turns.items():
            found[name].append(once(setting, call, repeats))
    return {name: statistics.median(values) for name, values in found.items()}


def agree(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    """Speed of a wrong result is worth nothing. 16 bits through a whole model: 3%."""
    off = ((got.float() - want.float()).norm() / want.float().norm()).item()
    if not off <= (0.03 if got.dtype.itemsize == 2 else 1e-4):
        raise RuntimeError(f"{what}: the result is off by {off:.1e}, relative")


def implementations(setting: Setting, report: Report, goal: str) -> list[str]:
    """Kernels that run here: plain PyTorch, and Triton or the reason why not."""
    reason = choice.why_not_triton(setting.device)
    if reason:
        report.left_out.append(f"{goal}: Triton, {reason}")
    return ["torch"] if reason else ["torch", "triton"]


@contextlib.contextmanager
def kernels(name: str) -> Iterator[None]:
    """All adapted layers run this implementation."""
    before = os.environ.get(choice.VARIABLE)
    os.environ[choice.VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(choice.VARIABLE)
        if before is not None:
            os.environ[choice.VARIABLE] = before


def sections() -> dict[str, Callable[[Setting, Report], None]]:
    import gpu_decoding
    import gpu_pictures

    return {
        "G1": gpu_pictures.composite,  # G1 to G3 share their ways
        "G4": gpu_pictures.switch,
        "G5": gpu_decoding.decoding,  # G5 to G7
        "G8": gpu_decoding.pair,
        "G9": gpu_pictures.rebuild,
        "G10": gpu_pictures.branch_cache,
    }


@torch.no_grad()
def run(
    setting: Setting, wanted: list[str], minutes: float, keep: Callable[[Report], None] = lambda _: None
) -> Report:
    """keep   is given the report after every section"""
    report, began = Report(), time.monotonic()
    _ = setting.bandwidth  # first: a kernel that breaks the context must not cost the table
    for name, section in sections().items():
        if wanted and name not in wanted:
            continue
        if time.monotonic() - began > 60 * minutes:
            report.left_out.append(f"{name}: the {minutes:g} minutes are over")
            continue
        print(f"{name} ... at {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        try:
            section(setting, report)
            if setting.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except ImportError as error:
            report.left_out.append(f"{name}: {error}")
        except Exception as error:  # one goal's failure must not cost the others theirs
            traceback.print_exc()
            report.failed.append(f"{name}: {type(error).__name__}: {error}")
        keep(report)
    print(f"done at {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return report


def lines(setting: Setting, report: Report) -> list[str]:
    where = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "CPU"
    found = ["# The GPU's goals\n", f"Made by `python benchmarks/gpu.py`, which says how. {where}, torch "
             f"{torch.__version__}, {str(setting.half).removeprefix('torch.')}, {setting.rounds} rounds."]  # fmt: skip
    if setting.small:
        found.append("\n**Dry run on the CPU at small sizes: every call was made, nothing here is a measurement.**")
        found += ["\n| | | goal | stretch |", "|---|---|---|---|"]
        found += [f"| {row.goal} | {row.what} | {row.bounds} |" for row in report.rows]
    else:
        found += [f"\nA copy moves {setting.bandwidth / 1e12:.2f} TB/s.\n\n{HEAD}", *map(str, report.rows)]
    found += [f"\nNot run. {line}." for line in report.left_out] + [f"\n**Failed. {line}**" for line in report.failed]
    if not setting.small:
        found += ["\n| milliseconds | median |", "|---|---|"]
        found += [f"| {name} | {1000 * value:.3f} |" for name, value in report.seconds.items()]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("goals", nargs="*", metavar="GOAL", choices=[[], "G1", "G4", "G5", "G8", "G9", "G10"],
                        help="G1 (to G3), G4, G5 (to G7), G8, G9, G10; default all")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="every call once, at small sizes, on the CPU")
    parser.add_argument("--minutes", type=float, default=8, help="no goal is begun after these")
    parser.add_argument("--out", type=Path, help="also write the table here, anew after each goal")
    given = parser.parse_args(arguments)
    if not given.dry_run and not torch.cuda.is_available():
        print("no CUDA device here; `--dry-run` makes the same calls at small sizes on the CPU", file=sys.stderr)
        return 1
    device = torch.device("cpu" if given.dry_run else "cuda")
    setting = Setting(device, given.dry_run, 1 if given.dry_run else 7, torch.float32 if given.dry_run else torch.half)

    def keep(report: Report) -> None:
        if given.out:
            given.out.write_text("\n".join(lines(setting, report)) + "\n", encoding="utf-8")

    report = run(setting, given.goals, given.minutes, keep)
    print("\n".join(lines(setting, report)))
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.modules["gpu"] = sys.modules["__main__"]  # the sections import from here
    sys.exit(main())
