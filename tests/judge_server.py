"""A small OpenAI-compatible server on this machine, whose answers a test decides."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

GREY = [Image.new("RGB", (24, 16), (level,) * 3) for level in range(0, 256, 20)]


def brighter(asked, number=0):
    """A judge without bias: the brighter picture wins."""
    a, b = (picture.convert("L").getpixel((3, 3)) for picture in asked.pictures)
    return f"One is brighter.\nVERDICT: {'TIE' if a == b else 'A' if a > b else 'B'}"


class Asked:
    """One question as the server got it."""

    def __init__(self, body: dict[str, Any], headers: Any) -> None:
        self.body, self.headers = body, headers
        content = body["messages"][0]["content"]
        self.text = next(part["text"] for part in content if part["type"] == "text")
        urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        self.pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, reply: Callable[[Asked, int], Any]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.asked, self.looked = reply, [], []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        """Nothing on the terminal of a test."""

    def do_GET(self) -> None:
        self.server.looked.append((self.path, self.headers["Authorization"]))
        self.respond(200, {"data": []}) if self.path == "/v1/models" else self.respond(404, {})

    def do_POST(self) -> None:
        asked = Asked(json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.headers)
        with self.server.lock:
            self.server.asked.append(asked)
            number = len(self.server.asked)
        reply = self.server.reply(asked, number) if self.path == "/v1/chat/completions" else (404, {})
        if isinstance(reply, str):
            usage = {"prompt_tokens": 100, "completion_tokens": 7}
            reply = 200, {"choices": [{"message": {"content": reply}}], "usage": usage}
        self.respond(*reply)

    def respond(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def serving(reply: Callable[[Asked, int], Any]) -> Iterator[Server]:
    """reply: (question, its number from 1) -> text of an answer, or (status, JSON or bytes[, headers])."""
    server = Server(reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
