"""Many people at once, as one process of plain HTTP; the other side of `faults_app flood`.

    python -m benchmarks.faults_flood ADDRESS COUNT BODY      # prints JSON

Each sends one POST to /gradio_api/call/compose_recipe, on a connection and with a cookie of his own, and reads his
events if he is let in. All seconds are from the moment at which all of them set out: what the process itself takes to
send is in them.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time

import httpx

PLACE = "/gradio_api/call/compose_recipe"


async def ask(client: httpx.AsyncClient, body: dict, began: float) -> dict:
    """{"kind": "complete", "error" or "refused", "told", "status", "retry", "seconds"} of one person."""
    cookie = {"cookie": f"multilora-visitor={secrets.token_urlsafe(24)}"}
    answer = await client.post(PLACE, json=body, headers=cookie)
    if answer.status_code != 200:
        return {"kind": "refused", "told": answer.text, "status": answer.status_code,
                "retry": answer.headers.get("retry-after"), "seconds": time.monotonic() - began}  # fmt: skip
    event = ""
    async with client.stream("GET", f"{PLACE}/{answer.json()['event_id']}", headers=cookie) as sent:
        async for line in sent.aiter_lines():
            word, _, rest = line.partition(": ")
            event = rest if word == "event" else event
            if word == "data" and event in ("complete", "error"):
                return {"kind": event, "told": rest, "status": 200, "seconds": time.monotonic() - began}
    return {"kind": "cut", "told": "", "status": 200, "seconds": time.monotonic() - began}


async def flood(address: str, count: int, body: dict) -> list[dict]:
    """What became of `count` people who came at once."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits, verify=False) as client:
        await client.get("/robots.txt")
        began = time.monotonic()
        return await asyncio.gather(*(ask(client, body, began) for _ in range(count)))


if __name__ == "__main__":
    print(json.dumps(asyncio.run(flood(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])))))
