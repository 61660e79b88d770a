"""Experiments by name, one after the other or in several processes that append to the same journals."""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from multilora.lab.journal import restart_clock
from multilora.lab.reproduce.bench import Bench, Experiment, Size


def read(name: str) -> Experiment:
    """The experiment of a file of this folder."""
    return importlib.import_module(f"multilora.lab.reproduce.{name}").EXPERIMENT


def measure(one: Experiment, part: str, bench: Bench) -> None:
    """An experiment or, by its name, a part of one."""
    bench.echo(f"{one.title}{part and f': {part}'}")
    restart_clock()
    (one.parts[part] if part else one.measure)(bench)


def side_by_side(
    jobs: int, pieces: Sequence[tuple[str, str]], report: Path, work: Path, size: Size, echo: Callable[[str], None]
) -> None:
    """Measure pieces, (experiment, part or ""), in `jobs` processes; they begin in order.

    An error of one ends all of them at once; ChildProcessError where a process ended by itself.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    others = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin, (threads,))
    try:
        running = {pool.submit(_alone, *piece, report, work, size, echo): piece for piece in pieces}
        for job in concurrent.futures.as_completed(running):
            _check(job, ", ".join(filter(None, running[job])), jobs, echo)
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise


def _check(job: concurrent.futures.Future, shown: str, jobs: int, echo: Callable[[str], None]) -> None:
    try:
        job.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"one of {jobs} processes ended by itself, in {shown} or beside it; for lack of memory, try fewer (--jobs "
            "1). What was measured is kept: run it again to go on"
        ) from error
    except Exception:
        echo(f"{shown} failed; the other processes are ended")
        raise


def _begin(threads: int) -> None:
    """In a new process: Ctrl-C is the first one's to answer, and with the first one this one ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _alone(name: str, part: str, report: Path, work: Path, size: Size, echo: Callable[[str], None]) -> None:
    measure(read(name), part, Bench.embedded(report, work, size, echo))
