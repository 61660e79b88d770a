"""Structured logs: one JSON object a line, through logging's "multilora.service". Prompts only where asked for."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from multilora.web.service.spec import Request

LOGGER = logging.getLogger("multilora.service")


class Log:
    """log("queued", job=3, ...). `prompts`: prompts too; else nothing that a user wrote, and no session's key."""

    def __init__(self, prompts: bool = False):
        self.prompts = prompts

    def __call__(self, event: str, **fields: Any) -> None:
        LOGGER.info(json.dumps({"time": round(time.time(), 3), "event": event, **fields}))

    def of(self, request: Request) -> dict[str, Any]:
        """What may be said of a request."""
        said: dict[str, Any] = {"action": request.action}
        recipes = request.recipes_of()
        if recipes:
            first = recipes[0]
            said |= {
                "recipes": len(recipes),
                "methods": [r.method for r in recipes],
                "loras": len(first.loras),
                "steps": first.steps,
                "size": f"{first.width}x{first.height}",
            }
            if self.prompts:
                said |= {"prompt": first.prompt, "negative_prompt": first.negative_prompt}
        return said
