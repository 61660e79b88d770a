"""A worker: a process that owns a device's pipeline, and the handle by which the service holds it.

The process is spawned, so that it shares nothing, and a crash in it takes nobody else. Messages over one pipe:
(kind, number, content). It ends when the pipe does, so it never outlives the service.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import pickle
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from multilora.web.service.spec import Event, Request, Result

_CONTEXT = multiprocessing.get_context("spawn")
_POLL = 0.05


class WorkerLost(RuntimeError):
    """The process ended, was ended because it took too long, or does not answer."""


@dataclass(frozen=True)
class Task:
    """A request as the worker gets it.

    places  reference -> library name or path; folder: where files go that it makes
    """

    number: int
    request: Request
    places: dict[str, str]
    folder: str


@dataclass(frozen=True)
class Answer:
    """How a task ended: "done", "cancelled", "failed" (code, message). drift: what of the pipeline is not as before.

    spent  the worker should be replaced
    """

    kind: str
    result: Result | None = None
    code: str = ""
    message: str = ""
    drift: list[str] = field(default_factory=list)
    spent: bool = False


class Cancel:
    """`is_set` for one task: the shared number is that of the task to stop."""

    def __init__(self, shared: Any, number: int):
        self._shared, self._number = shared, number

    def is_set(self) -> bool:
        return self._shared.value == self._number


def main(engine: str, settings: dict[str, Any], channel: Any, cancelled: Any) -> None:
    """The process. `engine`, as "module:class", is imported here and made with the settings."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the service decides when we go
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the service is gone
        try:
            module, _, name = engine.partition(":")
            made = getattr(importlib.import_module(module), name)(**settings)
        except Exception as error:
            words = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            channel.send(("broken", 0, words))
            return
        channel.send(("ready", 0, made.about()))
        while True:
            payload = channel.recv_bytes()
            task: Task = pickle.loads(payload)  # from our own service, over our own pipe
            answer = made.run(task, lambda event, n=task.number: channel.send(("event", n, event)),
                              Cancel(cancelled, task.number))  # fmt: skip
            channel.send(("answer", task.number, answer))
            if answer.spent:
                return


class Worker:
    """The service's handle: start, run one task at a time, stop.

    about  what the engine says of itself once it is ready; broken: why it could not start
    """

    def __init__(self, engine: str, settings: dict[str, Any]):
        self._engine, self._settings = engine, settings
        self._process: Any = None
        self._channel: Any = None
        self._cancelled = _CONTEXT.RawValue("q", 0)
        self.about: dict[str, Any] | None = None
        self.broken = ""
        self.starts = 0

    @property
    def pid(self) -> int | None:
        """Of the process, None when there is none."""
        process = self._process
        with contextlib.suppress(ValueError):  # closed by the thread that serves
            return process.pid if process is not None else None
        return None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        process = self._process
        with contextlib.suppress(ValueError):
            return process is not None and process.is_alive()
        return False

    def start(self) -> None:
        """Start the process, without waiting for it to be ready."""
        self.stop(0)
        mine, its = _CONTEXT.Pipe()
        arguments = (self._engine, self._settings, its, self._cancelled)
        self._process = _CONTEXT.Process(target=main, args=arguments, daemon=True, name="multilora-worker")
        self._process.start()
        its.close()  # so that its end is seen
        self._channel, self.about, self.broken = mine, None, ""
        self.starts += 1

    def wait_ready(self, seconds: float = 900.0, stop: Callable[[], bool] = lambda: False) -> bool:
        """Whether it is ready; False with `broken` set when it cannot be, or when `stop` says so."""
        until = time.monotonic() + seconds
        while self.about is None and not self.broken and not stop():
            try:
                kind, _, content = self._receive(until)
            except WorkerLost as error:
                if stop():
                    return False
                self.broken = str(error)
                break
            if kind == "ready":
                self.about = content
            elif kind == "broken":
                self.broken = content
        return self.about is not None

    def run(
        self, task: Task, on_event: Callable[[Event], None], cancelled: threading.Event, seconds: float, grace: float
    ) -> Answer:
        """Run a task. `grace`: seconds that it may go on after `cancelled` before the process is ended.

        Raises WorkerLost when the process ends, or had to be.
        """
        try:
            self._channel.send_bytes(pickle.dumps(task))
        except (OSError, ValueError) as error:
            raise WorkerLost(f"the worker is gone ({error})") from None
        until, told = time.monotonic() + seconds, False
        while True:
            if cancelled.is_set() and not told:
                self._cancelled.value, told = task.number, True
                until = min(until, time.monotonic() + grace)
            message = self._receive(until, _POLL)
            if message is None:
                continue
            kind, number, content = message
            if number != task.number:
                continue
            if kind == "answer":
                return content
            on_event(content)

    def _receive(self, until: float, seconds: float | None = None) -> Any:
        """The next message; None when there is none within `seconds`. Raises WorkerLost at `until` at the latest."""
        left = until - time.monotonic()
        try:
            if left > 0 and self._channel.poll(left if seconds is None else min(seconds, left)):
                return self._channel.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            raise WorkerLost(f"the worker process ended ({_ended(code)})") from None
        if time.monotonic() >= until:
            self.stop(0)
            raise WorkerLost("the worker took too long and was ended")
        return None

    def kill(self) -> None:
        """End the process now; whoever waits for it gets WorkerLost."""
        process = self._process
        with contextlib.suppress(ValueError):  # the serving thread has closed it in the meantime
            if process is not None and process.is_alive():
                process.kill()

    def stop(self, seconds: float = 5.0) -> None:
        """End the process: by closing its pipe, after `seconds` by force."""
        if self._process is None:
            return
        if self._channel is not None:
            self._channel.close()
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(10)
        self._process.close()
        self._process = self._channel = None


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"status {code}"
