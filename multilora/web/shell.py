"""What every page of the app gets: the service, who asks, and what pages share."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from multilora.web.background import Background
from multilora.web.service import Service, Session


@dataclass
class Shell:
    """One app that is being built.

    service   what draws, merges and keeps files
    app       the gr.Blocks around all pages; `shell.app.load(...)` runs when a browser opens it
    tabs      the gr.Tabs of the pages; `gr.Tabs(selected="merge")` as its output opens that page
    library   a gr.State that changes when the LoRAs of the user change: a page that adds or removes one returns
              `shell.changed()` into it, a page that lists them listens to `shell.library.change`
    background  what pages leave running: evaluations, grids, searches
    restore   set by the Compose page: `(recipe, session) -> values` for the components `controls`, which it restores
    """

    service: Service
    app: gr.Blocks
    tabs: gr.Tabs
    library: gr.State
    background: Background = field(default_factory=Background)
    controls: list[Any] = field(default_factory=list)
    restore: Callable[..., list[Any]] | None = None

    @staticmethod
    def changed() -> str:
        """A value that `library` has never had."""
        return secrets.token_hex(8)

    def session(self, request: gr.Request) -> Session:
        """Whose request it is; pages never make a session of their own."""
        return session_of(self.service, request)


def session_of(service: Service, request: gr.Request) -> Session:
    """The session of the user, or of this browser's cookie, by the names of service.guard; else one for the call."""
    if request.username:
        return service.session(f"user:{request.username}")
    cookie = request.cookies.get("multilora-visitor", "")
    return service.session(f"visitor:{cookie or secrets.token_urlsafe(24)}")
