"""The app's MCP tools, called as an assistant would: list tools, merge two LoRAs, ask the language model.

pip install -e '.[mcp]'    # in the checkout
multilora app --mcp --port 7860 &
python examples/mcp_client.py http://127.0.0.1:7860
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import json
from typing import Any

from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client


async def run(url: str) -> dict[str, Any]:
    """What the tools said: "tools" (names), "loras", "merge" (facts, and the file's address), "answers"."""
    async with (
        streamable_http_client(f"{url.rstrip('/')}/gradio_api/mcp/") as (read, write, _),
        ClientSession(read, write) as session,
    ):
        await session.initialize()
        tools = {tool.name: tool for tool in (await session.list_tools()).tools}
        for name, tool in sorted(tools.items()):
            print(f"{name}: {tool.description.partition('.')[0]}")
        loras = await _called(session, "list_loras", {"text": "", "category": "character"})
        names = [entry["reference"] for entry in ast.literal_eval(loras[0])][:2]
        asked = {"loras": names, "weights": [0.8, -0.3], "method": "svd", "rank": 4, "name": "pair"}
        facts, file = await _called(session, "merge", asked)
        said = await _called(session, "answer", {"prompt": "reverse korv =", "loras": ["reverse"], "tokens": 8})
        return {
            "tools": tools,
            "loras": names,
            "merge": (ast.literal_eval(facts), file),
            "answers": ast.literal_eval(said[0]),
        }


async def _called(session: ClientSession, tool: str, arguments: dict[str, Any]) -> list[str]:
    """The texts of a tool's result, one per value, as Python writes them. RuntimeError, in words, when it refuses.

    Who asks to hear of the progress gets every value as a part of its own, pictures as pictures; else gradio writes
    them all into one text.
    """

    async def told(progress: float, total: float | None, message: str | None) -> None:
        print(f"{tool}: {message}")

    result = await session.call_tool(tool, arguments, progress_callback=told)
    texts = [part.text for part in result.content if part.type == "text"]
    if result.isError:
        raise RuntimeError(f"{tool}: {' '.join(texts)}")
    return texts


if __name__ == "__main__":
    reader = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    reader.add_argument("url")
    found = asyncio.run(run(reader.parse_args().url))
    print(json.dumps({key: value for key, value in found.items() if key != "tools"}, indent=1))
