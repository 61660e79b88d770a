"""Many people at once, as one process of plain HTTP; the other side of `faults_app flood`.

    python -m benchmarks.faults_flood ADDRESS COUNT BODY      # prints JSON

Each sends one POST to /gradio_api/call/compose_recipe, on connections and with a cookie of his own, and reads his
events if he is let in. All seconds are from the moment at which all of them set out: what this process takes for
sending is in them, which is why it speaks HTTP by hand: httpx takes .3 s for 200 requests.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from urllib.parse import urlsplit

PLACE = "/gradio_api/call/compose_recipe"


class Asked:
    """A request on a connection of its own: `status`, `headers`, then the body by `lines` or `whole`."""

    async def send(self, address: str, method: str, path: str, cookie: str, body: bytes = b"") -> Asked:
        """Ask, and read the answer's head."""
        at = urlsplit(address)
        self.reader, self.writer = await asyncio.open_connection(at.hostname, at.port, limit=2**22)
        head = (f"{method} {path} HTTP/1.1", f"Host: {at.netloc}", f"Cookie: multilora-visitor={cookie}",
                "Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close")  # fmt: skip
        self.writer.write("\r\n".join([*head, "", ""]).encode() + body)
        self.status, self.headers = int((await self.reader.readline()).split()[1]), {}
        while line := (await self.reader.readline()).decode().strip():
            name, _, self.headers[name.lower()] = line.partition(": ")
        return self

    async def whole(self) -> str:
        """A body whose length is told."""
        text = (await self.reader.readexactly(int(self.headers["content-length"]))).decode()
        self.writer.close()
        return text

    async def event(self) -> tuple[str, str]:
        """The last of the server's events, ("complete" or "error", its data); "cut" when there was none."""
        kind = ""
        while line := await self.reader.readline():  # the lengths of chunks are lines, too, and mean nothing here
            word, _, rest = line.decode().rstrip().partition(": ")
            kind = rest if word == "event" else kind
            if word == "data" and kind in ("complete", "error"):
                self.writer.close()
                return kind, rest
        return "cut", ""


async def ask(address: str, body: bytes, began: float) -> dict:
    """{"kind": "complete", "error", "cut" or "refused", "told", "status", "retry", "seconds"} of one person."""
    cookie = secrets.token_urlsafe(24)
    asked = await Asked().send(address, "POST", PLACE, cookie, body)
    kind, told = "refused", await asked.whole()
    if asked.status == 200:
        events = await Asked().send(address, "GET", f"{PLACE}/{json.loads(told)['event_id']}", cookie)
        kind, told = await events.event()
    return {"kind": kind, "told": told, "status": asked.status, "retry": asked.headers.get("retry-after", "0"),
            "seconds": time.monotonic() - began}  # fmt: skip


async def flood(address: str, count: int, body: bytes) -> list[dict]:
    """What became of `count` people who came at once."""
    began = time.monotonic()
    return await asyncio.gather(*(ask(address, body, began) for _ in range(count)))


if __name__ == "__main__":
    print(json.dumps(asyncio.run(flood(sys.argv[1], int(sys.argv[2]), sys.argv[3].encode()))))
