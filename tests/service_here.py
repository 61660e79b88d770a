"""The service with its worker in this process: the real engine, loaded once, for tests of what pages do with it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from multilora.web.app import build, look
from multilora.web.service import Limits, Service, front
from multilora.web.service.engine import Engine
from multilora.web.service.guard import launch_options
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
        if engine().pipe is None:  # a base that could not be loaded took the place of this one
            engine().hold("embedded")
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


@contextlib.contextmanager
def served(service: Service, **options: Any) -> Iterator[tuple[Any, str]]:
    """(the app with all pages, its address) while the block runs."""
    app = build(service)
    app.queue()
    launched = {**look(), **launch_options(service), "quiet": True, "prevent_thread_lock": True, **options}
    launched["_frontend"] = False  # else gradio gives up when it cannot reach itself within 3 s, as on a busy machine
    try:
        _, url, _ = app.launch(**launched)
        yield app, url
    finally:
        app.close(verbose=False)


@contextlib.contextmanager
def browsing(address: str, width: int = 1440, height: int = 1000, theme: str = "light") -> Iterator[Any]:
    """A tab of Debian's Chromium on an address; an error of the page's own scripts fails the test."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
        tab.set_default_timeout(180_000)
        errors: list[str] = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(address)
        yield tab
        browser.close()
        assert not errors
