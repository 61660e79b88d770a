"""The door before gradio: who asks for a picture while the line is full is told so before gradio computes for him.

Gradio takes about .1 s of computing from a request to the line of `jobs`; of 200 people who came at once some waited
half a minute for a refusal. At the door it is a look at a list.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Container
from typing import Any

from pydantic import TypeAdapter, ValidationError

from multilora.web.service.health import Counts
from multilora.web.service.jobs import Line, busy, too_many
from multilora.web.service.limits import Refused

REMEMBERED = 1000  # pages that are told why
_JOINS = re.compile(r"(?:/gradio_api)?/(?:queue/join|(?:run|api)/(?P<run>[^/]+)|(?:call|call/v2)/(?P<named>[^/]+))/?")


def draws(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Mark the function of an event that draws for Compose: only these are counted, and refused, at the door.

    Other work (maps of gates, previews of a library) is refused by the line itself, later.
    """
    fn.draws = True
    return fn


class Place:
    """Of one request. event: gradio's id for it, "" as long as gradio has given none."""

    def __init__(self, owner: str):
        self.owner, self.event = owner, ""


class Door:
    """Places for requests from the door on until gradio has ended their event: as many as may wait and run.

    It refuses nobody whom the line would take, but for those who are still on their way to it. Used in the thread of
    the server's loop.
    """

    def __init__(self, line: Line, workers: int, counts: Counts):
        self.line, self.workers, self.counts = line, workers, counts
        self.places: list[Place] = []
        self._told: OrderedDict[str, str] = OrderedDict()

    def enter(self, owner: str, going: Container[str]) -> Place:
        """A place for a request. Raises Refused, "busy" or "limit".

        owner  as the guard knows him, "" for nobody; going: ids of the events that gradio has not ended
        """
        self.places = [p for p in self.places if not p.event or p.event in going]
        limits = self.line.limits
        mine = sum(p.owner == owner for p in self.places) if owner else 0
        if mine >= limits.per_user + self.workers:
            raise too_many(mine - self.workers, limits.per_user)
        if len(self.places) >= limits.waiting + self.workers or len(self.line) >= limits.waiting:
            raise busy(limits.waiting, f"in {self.seconds()} s")
        self.places.append(Place(owner))
        return self.places[-1]

    def leave(self, place: Place) -> None:
        """A request has ended without an event."""
        self.places = [p for p in self.places if p is not place]

    def seconds(self) -> int:
        """When it is worth to try again: a job's seconds, on average, for each worker; 1 to 60."""
        run = self.counts.seconds["run"]
        return min(60, max(1, round(run["sum"] / run["count"] / self.workers))) if run["count"] else 10

    def tell(self, page: str, why: str) -> None:
        """Keep why a page (gradio's session hash) was refused: gradio's own words there say less."""
        self._told[page] = why
        while len(self._told) > REMEMBERED:
            self._told.popitem(last=False)

    def told(self, page: str | None) -> str:
        """Why a page was refused, once; "" when it was not."""
        return self._told.pop(page or "", "")


class Doorkeeper:
    """The middleware (ASGI), behind the guard, which has read the body and knows the owner."""

    def __init__(self, app: Any, service: Any):
        self.app, self.service, self.door = app, service, service.door
        self._drawing: set[int | str] | None = None  # numbers and names of the events that draw

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        owner, data = scope.get("multilora.asked", ("", None))
        if data is None or not self._draws(scope, data):
            return await self.app(scope, receive, send)
        try:
            place = self.door.enter(owner, _going(scope["app"].get_blocks()._queue))
        except Refused as error:
            if isinstance(data.get("session_hash"), str):
                self.door.tell(data["session_hash"], str(error))
            self.service.refused(error, action="draw")
            return await self._refuse(send, error)
        body = b""

        async def sending(message: dict) -> None:
            nonlocal body
            body += message.get("body", b"")
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                place.event = _event(body)
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            if not place.event:
                self.door.leave(place)

    def _draws(self, scope: dict, data: Any) -> bool:
        """Whether a POST asks for an event that draws: by number, as pages do, or by the name of an endpoint."""
        found = _JOINS.fullmatch(scope["path"])
        if found is None or not isinstance(data, dict):
            return False
        if self._drawing is None:
            drawing = [f for f in scope["app"].get_blocks().fns.values() if getattr(f.fn, "draws", False)]
            self._drawing = {f._id for f in drawing} | {f.api_name for f in drawing if isinstance(f.api_name, str)}
        if found["named"]:  # there gradio goes by the name alone
            return found["named"] in self._drawing
        try:  # as gradio reads it: "3" and 3.0 are 3
            return TypeAdapter(int | None).validate_python(data.get("fn_index")) in self._drawing or (
                found["run"] in self._drawing
            )
        except ValidationError:
            return False

    async def _refuse(self, send: Any, error: Refused) -> None:
        """In the form of gradio's own refusals, which its clients know: 503 is a full queue."""
        words = json.dumps({"detail": str(error), "error": str(error)}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(words)),
                   (b"retry-after", b"%d" % self.door.seconds())]  # fmt: skip
        status = 429 if error.code == "limit" else 503
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": words})


def _going(queue: Any) -> set[str]:
    """Ids of the events that gradio's queue holds or runs. Its own `event_ids_to_events` keeps some for ever: those
    that are cancelled while they end."""
    waiting = (event for line in queue.event_queue_per_concurrency_id.values() for event in line.queue)
    running = (event for job in queue.active_jobs if job for event in job)
    return {event._id for event in (*waiting, *running)}


def _event(body: bytes) -> str:
    """The id in gradio's answer to who has joined its queue; "" in any other answer."""
    try:
        return str(json.loads(body)["event_id"])
    except (ValueError, TypeError, KeyError):
        return ""
