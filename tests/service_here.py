"""The service with its worker in this process: the real engine, loaded once, for tests of what pages do with it."""

from __future__ import annotations

import functools
from typing import Any

from multilora.web.service import Limits, Service, front
from multilora.web.service.engine import Engine
from multilora.web.service.worker import Answer, Task


@functools.cache
def engine() -> Engine:
    return Engine("embedded", "cpu")


class Here:
    """A Worker without a process."""

    broken, starts, pid = "", 1, 0

    def __init__(self, name: str, settings: dict[str, Any]):
        self.about: dict[str, Any] | None = None

    @property
    def alive(self) -> bool:
        return self.about is not None

    def start(self) -> None:
        self.about = engine().about()

    def wait_ready(self, stop: Any = None) -> bool:
        return True

    def run(self, task: Task, on_event: Any, cancelled: Any, seconds: float, grace: float) -> Answer:
        return engine().run(task, on_event, cancelled)

    def stop(self, seconds: float = 0.0) -> None:
        self.about = None

    kill = stop


def here(monkeypatch: Any, steps: int = 2, **options: Any) -> Service:
    """A service whose pictures have a few steps where a page takes the base's own number."""
    monkeypatch.setattr(front, "Worker", Here)
    service = Service(**{"limits": Limits(per_user=4), **options})
    service.about()
    service._facts["embedded"]["steps"] = steps
    return service


def told(going: Any) -> tuple[list[Any], Any]:
    """(what a generator yields, what it returns)."""
    lines = []
    while True:
        try:
            lines.append(next(going))
        except StopIteration as end:
            return lines, end.value
