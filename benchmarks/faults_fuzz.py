"""Calls of any endpoint of the app with anything: for `python -m benchmarks.faults_app fuzz`.

A call depends on (seed, number) alone, but for the ids that the server gives. Wrong are: a status of 500 or above (503
"busy" is none), a trace or a path of the server in an answer, the content of a file that nobody was given, a file
where none may be, a service that does not draw afterwards.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
SECRET = "the-canary-sings-at-noon"
DRAWN = {"prompt": "x", "base": "embedded", "steps": 1, "guidance_scale": 1, "width": 8, "height": 8, "seed": 0}
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, "", "x", "korv", "merge", "../x",
    "/etc/passwd", "file:///etc/passwd", "http://169.254.169.254/latest", "<script>alert(1)</script>", "\u202e",
    "{{7*7}}", "x" * 5000, "a\0b", [], {}, [[]], [None], [1, "2"], {"path": "/etc/passwd"}, {"a": {"b": [1]}},
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
    {"path": "x", "url": "http://127.0.0.1:1/", "meta": {"_type": "gradio.FileData"}},
    {"reference": "korv", "weight": "nan"}, [{"reference": "korv", "weight": 1e9}], [{"reference": "../x"}],
    DRAWN, {"__class__": "x"}, "data:image/png;base64,AAAA", float("nan"), float("inf"),
)  # fmt: skip
PATHS = ("/etc/passwd", "/proc/self/environ", "/proc/self/mem", "/dev/zero", "..%2f..%2f..%2fetc%2fpasswd", ".", "",
         "../../../../etc/passwd", "....//....//etc/passwd", "C:/Windows/win.ini", "http://127.0.0.1:1/x", "%00",
         "/etc/passwd%00.png", "\\\\host\\share", "/tmp", "~root/.bashrc", "x" * 5000, "%", "%ff%fe", "a\u202eb",
         "file:/etc/passwd", "proxy=http://127.0.0.1:1/x", "{}", "$(id)", "static/../../../../etc/passwd")  # fmt: skip
BODIES = (b"", b"{", b"[]", b"null", b"1", b'"x"', b"{}", b"\xff\xfe", b"[" * 3000, b'{"data":', b'{"data":null}',
          b'{"data":{}}', b'{"data":[],"fn_index":"x"}', b'{"data":[],"fn_index":null}', b'{"data":[]}' * 2,
          b'{"data":[' + b"9" * 5000 + b"]}", b'{"data":["\\ud800"]}', b"a=b&c=d", b"--x\r\n\r\n--x--")  # fmt: skip
PLACES = ("file", "file=", "proxy=", "static", "assets", "svelte", "custom_component", "stream", "heartbeat", "call",
          "run", "api", "call/v2", "queue", "monitoring", "deep_link", "theme.css", "info", "openapi.json", "config",
          "user", "token", "app_id", "dev/reload", "login_check", "startup-events", "runs", "vibe-edit", "vibe-code",
          "vibe-starter-queries", "undo-vibe-edit", "process_recording", "component_server", "upload_progress", "mcp",
          "run-history/connect", "profiling/traces", "manifest.json", "pwa_icon", "robots.txt", "logout", "login",
          "queue/status", "queue/data", "upload", "reset", "cancel", "queue/join", "healthz", "metrics", "docs",
          "gradio_api/deep_link")  # fmt: skip


def fuzz(calls: int = 5000, seed: int = 1) -> dict[str, Any]:
    """Make the calls on an app whose model is a stand-in; codes: how often each status came, found: what was wrong."""
    from benchmarks.faults_app import STUB, app, idle
    from multilora.web.service import Limits, Service

    began, codes, found = time.monotonic(), Counter(), []
    with tempfile.TemporaryDirectory(prefix="canary") as name:
        canary = Path(name, "secret.txt")
        canary.write_text(SECRET)
        outside = _outside(canary.parent)
        with Service(engine=STUB, limits=Limits(seconds=10, waiting=50, per_user=50)) as service, app(service) as url:
            fuzzer = Fuzzer(url, canary, service)
            for number in range(calls):
                what, code, wrong = fuzzer.call(random.Random(f"{seed}/{number}"))
                codes[code] += 1
                if wrong:
                    found.append((seed, number, what, wrong))
                if number % 500 == 499:
                    print(f"{number + 1:,} calls, {len(found)} findings", flush=True)
            if idle(service):
                found.append((seed, -1, "afterwards", "jobs that never end"))
            if fuzzer.browser.ask("compose_recipe", [DRAWN, False])[0] != "complete":
                found.append((seed, -1, "afterwards", "no picture is drawn"))
            if service.workers[0].starts != 1:
                found.append((seed, -1, "afterwards", "the worker was lost"))
        if _outside(canary.parent) != outside:
            found.append((seed, -1, "afterwards", f"files: {_outside(canary.parent) ^ outside}"))
    return {
        "calls": calls,
        "seed": seed,
        "codes": codes,
        "found": found,
        "mute": fuzzer.mute,
        "seconds": time.monotonic() - began,
    }


def _outside(canary: Path) -> set[tuple[str, float]]:
    """Names in places where nothing may be written, and the secret's time of change. Others may work in the checkout:
    of it only names that fuzzing uses count."""
    there = {(name, 0.0) for name in ("x", "a.txt", "x.svg", "x.safetensors") for f in (ROOT, ROOT.parent)
             if (f / name).exists()}  # fmt: skip
    return there | {(str(p), p.stat().st_mtime) for p in canary.iterdir()}


class Fuzzer:
    """One client of an app, which knows its endpoints and the ids that it was given."""

    def __init__(self, url: str, canary: Path, service: Any):
        from benchmarks.faults_app import Browser

        self.browser = Browser(url)
        self.http = self.browser.http
        config = self.http.get("/config").json()
        self.names = [f["api_name"] for f in config["dependencies"] if f["api_name"]]
        self.public = [f["api_name"] for f in config["dependencies"] if f.get("api_visibility") == "public"]
        self.count = len(config["dependencies"])
        self.inputs = {f["api_name"]: len(f["inputs"]) for f in config["dependencies"]}
        self.mute = 0  # errors without words: gradio's own, before it comes to us
        self.ids, self.paths = ["x"], [str(canary), str(service._root), *PATHS]

    def call(self, r: random.Random) -> tuple[str, int, str]:
        """(what was called, status, what is wrong with the answer or "")."""
        make = r.choice((self.named, self.named, self.joined, self.raw, self.got, self.got, self.uploaded, self.odd))
        method, path, more = make(r)
        what = f"{method} {path[:80]!r} {str(more)[:160]}"
        try:
            with self.http.stream(method, path, timeout=httpx.Timeout(20, read=3), **more) as answer:
                body = self.read(answer)
        except httpx.InvalidURL:
            return what, 0, ""
        except (UnicodeError, httpx.LocalProtocolError):
            return what, 0, ""  # it cannot even be sent
        except httpx.ReadTimeout:
            return what, 1, ""  # a stream that stays open
        except httpx.HTTPError as error:
            return what, 2, f"{type(error).__name__}: {error}"
        if answer.status_code == 200 and path.endswith("/upload"):
            self.paths += json.loads(body)
        wrong = self.wrong(answer, body)
        if answer.status_code == 200 and '"event_id"' in body[:40]:
            self.ids.append(json.loads(body)["event_id"])
            if "/call/" in path and not wrong:
                wrong = self.told(f"{path}/{self.ids[-1]}")
        return what, answer.status_code, wrong

    def told(self, path: str) -> str:
        """What is wrong with the events of a call, which must end."""
        try:
            with self.http.stream("GET", path, timeout=60) as answer:
                body = "".join(answer.iter_text())
        except httpx.HTTPError as error:
            return f"events: {type(error).__name__}: {error}"
        self.mute += 'data: {"error": null}' in body
        ended = "event: complete" in body or "event: error" in body
        return self.wrong(answer, body) or ("" if ended else f"events without an end: {body[-200:]!r}")

    @staticmethod
    def read(answer: httpx.Response) -> str:
        body, until = b"", time.monotonic() + 3
        for piece in answer.iter_raw(2**16):
            body += piece
            if len(body) > 2**22 or (b"event-stream" in answer.headers.get("content-type", "").encode()
                                     and time.monotonic() > until - 2.8):  # fmt: skip
                break
        return body.decode("utf-8", "replace")

    @staticmethod
    def wrong(answer: httpx.Response, body: str) -> str:
        if answer.status_code >= 500 and answer.status_code != 503:
            return f"status {answer.status_code}: {body[:200]!r}"
        if SECRET in body or "root:x:0:0" in body:
            return f"a file's content: {body[:80]!r}"
        kind = answer.headers.get("content-type", "")
        if ("json" in kind or "plain" in kind or "event-stream" in kind) and (
            "Traceback (most recent" in body or 'File "/' in body or "site-packages" in body or str(ROOT) in body
        ):
            return f"a trace or a path: {body[max(0, body.find('Traceback')) :][:200]!r}"
        return ""

    # -- calls: (method, path, what httpx takes more) ---------------------------------------------------------------

    def data(self, r: random.Random, count: int) -> list:
        count = count if r.random() < 0.8 else r.randrange(20)
        return [r.choice(VALUES) for _ in range(count)]

    def named(self, r: random.Random) -> tuple[str, str, dict]:
        name = r.choice((*[r.choice(self.public)] * 7, r.choice(self.names), str(r.choice(VALUES))[:40]))
        way = r.choice(("call", "call", "call", "run", "api", "call/v2"))
        body: Any = {"data": self.data(r, self.inputs.get(name, 3))}
        if way == "call/v2":
            body = {r.choice(("prompt", "loras", "x")): r.choice(VALUES)}
        return "POST", f"/gradio_api/{way}/{name}", _sent(body)

    def joined(self, r: random.Random) -> tuple[str, str, dict]:
        index = r.choice((r.randrange(self.count), r.randrange(self.count), r.choice(VALUES)))
        body = {"data": self.data(r, 4), "fn_index": index, "session_hash": r.choice(("a", "b", r.choice(VALUES))),
                "trigger_id": r.choice((None, 1, "x")), "event_data": r.choice((None, {}, "x"))}  # fmt: skip
        for gone in r.sample(list(body), r.choice((0, 0, 0, 1, 2))):
            del body[gone]
        return (
            "POST",
            r.choice(("/gradio_api/queue/join", "/gradio_api/queue/join", "/gradio_api/cancel")),
            _sent(body),
        )

    def raw(self, r: random.Random) -> tuple[str, str, dict]:
        place = r.choice(("queue/join", "cancel", "reset", "upload", f"call/{r.choice(self.names)}", r.choice(PLACES)))
        kind = r.choice(("application/json", "text/plain", "multipart/form-data; boundary=x", "x", ""))
        return "POST", f"/gradio_api/{place}", {"content": r.choice(BODIES), "headers": {"content-type": kind}}

    def got(self, r: random.Random) -> tuple[str, str, dict]:
        place = r.choice((*PLACES, *["file="] * 25))
        tail = r.choice((*self.paths, *self.ids[-3:], r.choice(self.names)))
        joint = "" if place.endswith("=") else "/"
        start = r.choice(("/gradio_api/", "/"))
        query = r.choice(("", "", "?session_hash=a", "?upload_id=x", "?__theme=dark", "?path=/etc/passwd", "?%00"))
        tail = tail.replace(" ", "%20").replace("\u202e", "%E2%80%AE") if r.random() < 0.8 else ""
        return "GET", f"{start}{place}{joint}{tail}{query}", {}

    def uploaded(self, r: random.Random) -> tuple[str, str, dict]:
        name = r.choice(("a.txt", "x.safetensors", "../../x", "/etc/passwd", "a\u202eb", "<b>.html", "x.svg", "", "."))
        data = r.choice((b"", b"<html><script>1</script>", b"PK\x03\x04", b"x" * 3000))
        return "POST", "/gradio_api/upload", {"files": {r.choice(("files", "x")): (name, data)}}

    def odd(self, r: random.Random) -> tuple[str, str, dict]:
        method = r.choice(("PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "X"))
        headers = r.choice((
            {}, {"origin": "http://evil.example"}, {"cookie": "x" * 4000}, {"host": "evil.example"},
            {"x-forwarded-host": "evil.example", "x-forwarded-proto": "javascript"}, {"range": "bytes=9-2"},
            {"accept": "*/*;q=x"}, {"x-gradio-server": "http://127.0.0.1:1"},
        ))  # fmt: skip
        return r.choice((method, "GET")), f"/{r.choice(('', 'gradio_api/'))}{r.choice(PLACES)}", {"headers": headers}


def _sent(body: Any) -> dict:
    return {
        "content": json.dumps(body).encode("utf-8", "surrogatepass"),
        "headers": {"content-type": "application/json"},
    }
