"""Ray actors as the workers of a batch: on this machine, or on a running cluster.

Ray starts, places and watches the actors; a lost one is replaced. A picture comes back as bytes and only the driver
writes, so that workers share no disk with it, and one that outlives its driver can do no harm.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from multilora.lab.evaluate.items import BatchError, Item
from multilora.lab.evaluate.workers import BACK, KILLED, WRONG, Crash, Outcome, Renderer, crash_file, draw

MOMENT = 0.5  # seconds that `results` waits at most
STARTS = 3  # failed starts in a row, per worker, after which there is no point in another
STORE_BYTES = 200 * 2**20  # of Ray's object store: pictures on their way, nothing else


class RayWorkers:
    """Actors with a renderer each.

    workers   how many; None: one per GPU of the cluster, else one per processor
    address   of a running cluster ("auto", "host:port"); None: a cluster on this machine, for this batch
    threads   processors that an actor takes

    Raises BatchError when Ray is not installed or the cluster cannot be reached.
    """

    shares_fate = False

    def __init__(
        self,
        make: Callable[[], Renderer],
        folder: Path,
        workers: int | None = None,
        address: str | None = None,
        threads: int = 1,
    ) -> None:
        try:
            import ray
        except ImportError:
            raise BatchError("--workers and --ray need Ray: pip install 'multilora[ray]'") from None
        self._ray, self._make, self._folder = ray, make, Path(folder).absolute()
        self._mine = not ray.is_initialized()
        if self._mine:
            self._connect(address, workers, threads)
        room = ray.cluster_resources()
        gpus = room.get("GPU", 0.0)
        self.workers = workers or int(gpus) or max(1, int(room.get("CPU", 1)) // threads)
        self._share = {"num_cpus": threads, "num_gpus": min(1.0, gpus / self.workers)}
        self._starting: dict[Any, tuple[Any, Crash]] = {}
        self._idle: list[tuple[Any, Crash]] = []
        self._drawing: dict[Any, tuple[Any, Crash, Item]] = {}
        self._failed_starts = 0
        for _ in range(self.workers):
            self._start()

    def _connect(self, address: str | None, workers: int | None, threads: int) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet = {"log_to_driver": False, "logging_level": "error"}
        try:
            if address is not None:
                self._ray.init(address=address, **quiet)
                return
            self._ray.init(
                num_cpus=(workers or os.cpu_count() or 1) * threads,
                object_store_memory=STORE_BYTES,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",  # nobody else has business with it
                **quiet,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise BatchError(f"Ray at {address or 'this machine'} cannot be reached: {error}") from None

    def _start(self) -> None:
        crash = Crash(crash_file(self._folder, uuid.uuid4().hex[:8]))
        actor = self._ray.remote(**self._share, max_restarts=0, max_task_retries=0)(_Actor).remote(
            self._make, os.getcwd(), str(crash.path)
        )
        self._starting[actor.ready.remote()] = (actor, crash)

    def free(self) -> int:
        return len(self._idle)

    def busy(self) -> int:
        return len(self._drawing)

    def give(self, item: Item) -> None:
        actor, crash = self._idle.pop()
        self._drawing[actor.draw.remote(item)] = (actor, crash, item)

    def results(self, stop: Any) -> list[Outcome]:
        waiting = [*self._drawing, *self._starting]
        ready, _ = self._ray.wait(waiting, timeout=MOMENT)
        # One at a time keeps the workers busy one by one; take what else is ready without waiting.
        more, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=0) if ready else ([], [])
        return [outcome for ref in {*ready, *more} if (outcome := self._taken(ref)) is not None]

    def _taken(self, ref: Any) -> Outcome | None:
        starts = ref in self._starting
        actor, crash, item = (*self._starting.pop(ref), None) if starts else self._drawing.pop(ref)
        try:
            value = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            self._ray.kill(actor)
            told = crash.read()
            if starts:
                self._failed_starts += 1
                if self._failed_starts >= STARTS * self.workers:
                    raise BatchError(f"no worker can be started; the last one said: {told or error}") from None
            self._start()
            return None if item is None else Outcome(item, WRONG if told else KILLED, error=told)
        self._idle.append((actor, crash))
        self._failed_starts = 0
        return None if starts else value

    def end(self, seconds: float) -> list[Outcome]:
        until = time.monotonic() + seconds
        outcomes = []
        while self._drawing and (left := until - time.monotonic()) > 0:
            ready, _ = self._ray.wait(list(self._drawing), timeout=left)
            for ref in ready:
                item = self._drawing.pop(ref)[2]
                try:
                    outcomes.append(self._ray.get(ref))
                except self._ray.exceptions.RayError:
                    outcomes.append(Outcome(item, BACK))
        outcomes += [Outcome(item, BACK) for _, _, item in self._drawing.values()]
        held = [*self._idle, *self._starting.values(), *(pair[:2] for pair in self._drawing.values())]
        for actor, crash in held:
            self._ray.kill(actor)
            crash.path.unlink(missing_ok=True)
        self._drawing.clear()
        if self._mine:
            self._ray.shutdown()
        return outcomes


class _Actor:
    """A worker process. It works in the driver's folder where that is there, so that relative paths mean the same."""

    def __init__(self, make: Callable[[], Renderer], folder: str, crash: str) -> None:
        if os.path.isdir(folder):
            os.chdir(folder)
        if os.path.isdir(os.path.dirname(crash)):
            self._file = open(crash, "w")  # noqa: SIM115 (written to by a dying process)
            faulthandler.enable(self._file, all_threads=False)
        self._renderer = make()

    def ready(self) -> str:
        return f"{socket.gethostname()}:{os.getpid()}"

    def draw(self, item: Item) -> Outcome:
        return draw(self._renderer, item)
