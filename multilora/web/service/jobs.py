"""Jobs, their messages, and the line in which they wait."""

from __future__ import annotations

import dataclasses
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from multilora.web.service.limits import Limits, Refused
from multilora.web.service.spec import Event, Request

_LATEST = ("queued", "progress", "preview")  # of which only the newest is worth reading
_DONE = ("done", "error", "cancelled")


class Job:
    """One submitted request. `id` cannot be guessed; `session` is its owner's.

    `state` is "waiting", "running", or the kind of the last event.
    """

    def __init__(self, number: int, session: str, request: Request, payload: bytes):
        self.id = secrets.token_urlsafe(12)
        self.number, self.session, self.action, self.payload = number, session, request.action, payload
        self.recipes = request.recipes_of()
        self.state = "waiting"
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.cancelled = threading.Event()
        self.last: Event | None = None
        self._unread: list[Event] = []
        self._changed = threading.Condition()
        self._on_cancel: Callable[[Job], None] = lambda job: None

    def put(self, event: Event) -> None:
        """Add a message; what a slow reader has not read of progress and previews is replaced. Nothing follows the
        last one."""
        with self._changed:
            if self.last is not None:
                return
            if event.kind in _LATEST:
                self._unread = [e for e in self._unread if e.kind != event.kind]
            self._unread.append(event)
            if event.last:
                self.last, self.state = event, event.kind
            self._changed.notify_all()

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """Messages as they come, up to the last one. Closing the iterator before (a closed tab) cancels the job.

        timeout  seconds without any message after which TimeoutError is raised, and the job cancelled
        """
        ended = False
        try:
            while not ended:
                with self._changed:
                    if not self._changed.wait_for(lambda: self._unread or self.last, timeout):
                        raise TimeoutError(f"no message of job {self.id} in {timeout:g} s")
                    event = self._unread.pop(0) if self._unread else self.last
                ended = event.last
                yield event
        finally:
            if not ended:
                self.cancel()

    def result(self, timeout: float | None = None) -> Any:
        """The Result when the job is done. Raises Refused with its message when it failed or was cancelled, and
        TimeoutError when it is not done in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.last is not None, timeout):
                raise TimeoutError(f"job {self.id} is not done after {timeout:g} s")
        if self.last.kind == "done":
            return self.last.result
        raise Refused(self.last.message or "cancelled", self.last.code or self.last.kind)

    def cancel(self) -> None:
        """Stop it: at once when it waits, else at the next run of the model. There is no picture then."""
        self.cancelled.set()
        self._on_cancel(self)


class Line:
    """The jobs that wait. Users take turns: the second job of one comes after the first of everyone else."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.closed = ""
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._served = ""
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of jobs that run."""
        return len(self._running)

    def _order(self) -> list[Job]:
        seen: dict[str, int] = {}
        for job in self._running:
            seen[job.session] = seen.get(job.session, 0) + 1
        seen.setdefault(self._served, 1)  # its turn was the last one
        turns = []
        for job in self._waiting:
            turns.append((seen.get(job.session, 0), job.number, job))
            seen[job.session] = seen.get(job.session, 0) + 1
        return [job for *_, job in sorted(turns, key=lambda turn: turn[:2])]

    def join(self, job: Job) -> None:
        """Wait in line. Raises Refused ("busy" or "limit") when the line or the user's part of it is full."""
        with self._changed:
            if self.closed:
                raise Refused(self.closed, "stopped")
            mine = sum(j.session == job.session for j in self._waiting)
            if mine >= self.limits.per_user:
                raise too_many(mine, self.limits.per_user)
            if len(self._waiting) >= self.limits.waiting:
                raise busy(len(self._waiting))
            self._waiting.append(job)
            self._tell()
            self._changed.notify_all()

    def take(self, timeout: float) -> Job | None:
        """The next job, or None when there is none after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.closed, timeout)
            if not self._waiting:
                return None
            job = self._order()[0]
            self._waiting.remove(job)
            self._running.append(job)
            self._served = job.session
            job.state, job.started = "running", time.monotonic()
            self._tell()
            return job

    def done(self, job: Job) -> None:
        """A running job has ended."""
        with self._changed:
            self._running = [j for j in self._running if j is not job]
            self._tell()
            self._changed.notify_all()

    def leave(self, job: Job) -> bool:
        """Take a waiting job out; False when it does not wait."""
        with self._changed:
            if job not in self._waiting:
                return False
            self._waiting.remove(job)
            self._tell()
            return True

    def jobs(self) -> list[Job]:
        """All jobs that run or wait."""
        with self._changed:
            return [*self._running, *self._waiting]

    def close(self, message: str) -> list[Job]:
        """Take no more jobs; those that waited are given back."""
        with self._changed:
            self.closed = message
            left, self._waiting = self._waiting, []
            self._changed.notify_all()
            return left

    def wait_idle(self, timeout: float) -> bool:
        """Whether nothing runs any more within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, timeout)

    def _tell(self) -> None:
        for position, job in enumerate(self._order()):
            job.put(Event("queued", position=position))


def busy(waiting: int, when: str = "in a minute") -> Refused:
    """What someone is told who finds the line full."""
    return Refused(
        f"the server is busy: {waiting} requests wait, which is as many as it takes. Please try again {when}", "busy"
    )


def too_many(mine: int, most: int) -> Refused:
    """What a user is told whose part of the line is full."""
    return Refused(
        f"{mine} of your requests wait already; this server lets {most} wait per user. Wait for one, or cancel one",
        "limit",
    )


def numbered(event: Event, number: int, of: int) -> Event:
    """An event of picture `number` of `of`."""
    return dataclasses.replace(event, number=number, of=of)
