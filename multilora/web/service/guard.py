"""What stands between the network and gradio: logins with a brake, and a middleware for what gradio leaves open.

Gradio 6.31 answers /cancel and /reset without a login, takes any number of wrong passwords, reads request bodies of
any size, has no quota of uploads, hands an upload to whoever knows its path, lets programs call a page's own events by
name, and answers many a request that it cannot read with status 500. The middleware closes these.
"""

from __future__ import annotations

import collections
import hashlib
import hmac
import json
import os
import re
import secrets
import threading
import time
import traceback
import urllib.parse
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from multilora.web.service.limits import Limits
from multilora.web.service.log import LOGGER

BODY_BYTES = 8 * 2**20  # of a request that is no upload; pictures and LoRAs are uploaded
REMEMBERED = 10_000  # addresses, names, session hashes and uploaded paths, oldest forgotten first
SESSION_LENGTH = 128  # of gradio's session hashes, which pages make of about ten characters
WRONG, LOCKED_SECONDS = 5, 60.0  # wrong passwords of one name, and how long it is locked then
TRIES_AN_ADDRESS, WINDOW = 20, 300.0  # logins of one address within so many seconds
_SCRYPT = {"n": 2**14, "r": 8, "p": 1, "dklen": 32}


def hashed(password: str, salt: bytes | None = None) -> str:
    """A password as it stands in the file of --auth: scrypt:SALT:HASH."""
    salt = salt or secrets.token_bytes(16)
    digest = hashlib.scrypt(password.encode(), salt=salt, **_SCRYPT)
    return f"scrypt:{salt.hex()}:{digest.hex()}"


def read_users(path: str | Path) -> dict[str, str]:
    """{name: hash} from lines NAME:scrypt:SALT:HASH. ValueError naming file and line for anything else."""
    users = {}
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--auth {str(path)!r}: cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        if not name.strip() or not re.fullmatch(r"scrypt:[0-9a-f]{32}:[0-9a-f]{64}", rest.strip()):
            raise ValueError(f"--auth {str(path)!r}, line {number}: wanted NAME:HASH, see multilora app --new-user")
        users[name.strip()] = rest.strip()
    if not users:
        raise ValueError(f"--auth {str(path)!r}: names no user; see multilora app --new-user")
    return users


class Logins:
    """gradio's `auth` function: (name, password) -> whether they go together.

    After WRONG wrong passwords in a row a name is locked for LOCKED_SECONDS, also against the right one.
    """

    def __init__(self, users: dict[str, str], clock: Callable[[], float] = time.monotonic):
        self._users, self._clock = users, clock
        self._wrong: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._nobody = hashed(secrets.token_hex(8))
        self._lock = threading.Lock()

    def __call__(self, name: str, password: str) -> bool:
        now = self._clock()
        with self._lock:
            count, since = self._wrong.get(name, (0, now))
            if count >= WRONG and now - since < LOCKED_SECONDS:
                return False
        # An unknown name costs as much time as a known one.
        _, salt, digest = self._users.get(name, self._nobody).split(":")
        found = hashed(password, bytes.fromhex(salt)).split(":")[2]
        right = hmac.compare_digest(found, digest) and name in self._users
        with self._lock:
            if right:
                self._wrong.pop(name, None)
            else:
                count = self._wrong.get(name, (0, now))[0] % WRONG + 1
                self._wrong[name] = (count, now)
                _bounded(self._wrong)
        return right


class Guard:
    """The middleware (ASGI), in front of a gradio app with or without logins.

    Owners are user names where there are logins, else a cookie of this browser; a client without one owns nothing,
    and its uploads are reachable by their unguessable paths only, as in gradio itself.
    """

    def __init__(self, app: Any, service: Any, clock: Callable[[], float] = time.monotonic):
        self.app, self.service, self._clock = app, service, clock
        self.limits: Limits = service.limits
        self._logins: OrderedDict[str, deque] = OrderedDict()
        self._uploads: OrderedDict[str, deque] = OrderedDict()
        self._sessions: OrderedDict[str, str] = OrderedDict()  # gradio's session hash -> owner
        self._paths: OrderedDict[str, set[str]] = OrderedDict()  # uploaded path -> owners

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, method = scope["path"].removeprefix("/gradio_api").rstrip("/") or "/", scope["method"]
        host = (scope.get("client") or ("",))[0]
        # The pattern of a route matches before a last newline, too; the comparisons below do not.
        if re.search(r"[\x00-\x1f\x7f]", scope["path"]):
            return await _answer(send, 404, "Not Found")
        if method == "GET" and path == "/healthz":
            status = self.service.health()["status"]
            return await _answer(send, 200 if status == "ok" else 503, json.dumps({"status": status}), "json")
        if method == "GET" and path == "/metrics":
            if host not in ("127.0.0.1", "::1"):
                return await _answer(send, 404, "Not Found")
            return await _answer(send, 200, self.service.metrics(), "plain; version=0.0.4")
        tools = path == "/mcp" or path.startswith("/mcp/")
        if tools:  # gradio hands a caller's cookies on to its one own client, which then would be someone else's
            scope = {**scope, "headers": [(k, v) for k, v in scope["headers"] if k != b"cookie"]}
        owner, cookie = ("", "") if tools else self._owner(scope)
        if method == "POST":
            refused, receive = await self._post(scope, receive, path, host, owner)
            if refused:
                return await _answer(send, *refused)
        elif "/file=" in path or path.startswith("/file/"):
            asked = path.partition("/file=")[2] or path.removeprefix("/file/")
            if not self._may(asked, owner) or not self._may(urllib.parse.unquote(asked), owner):
                return await _answer(send, 403, "This file belongs to someone else.")
        if self._unlisted(scope, path):
            return await _answer(send, 404, "There is no such endpoint.")
        sending = self._sending(send, path, method, owner, cookie)
        try:
            await self.app(scope, receive, sending)
        except Exception as error:  # gradio fails on many requests that it cannot read, where 4xx is the answer
            at = traceback.extract_tb(error.__traceback__)[-1]
            said = {"event": "unreadable", "method": method, "path": path[:80], "at": f"{at.filename}:{at.lineno}"}
            LOGGER.warning(json.dumps({**said, "error": f"{type(error).__name__}: {str(error)[:200]}"}))
            await sending.end()

    @staticmethod
    def _unlisted(scope: dict, path: str) -> bool:
        """Whether a path names a function that programs may not call: a page's own event, or one that is not there.

        Pages call those by number; `predict` is their name for that."""
        found = re.fullmatch(r"/(run|api|call|call/v2)/([^/]+)", path)
        if found is None or (found[2] == "predict" and found[1] in ("run", "api")):
            return False
        functions = scope["app"].get_blocks().fns.values()
        return not any(f.api_name == found[2] and f.api_visibility != "private" for f in functions)

    def _owner(self, scope: dict) -> tuple[str, str]:
        """(owner, a new cookie to set or "")."""
        cookies = _cookies(scope)
        app = scope.get("app")
        if getattr(app, "auth", None) is not None:
            token = cookies.get(f"access-token-{app.cookie_id}") or cookies.get(
                f"access-token-unsecure-{app.cookie_id}"
            )
            user = app.tokens.get(token)
            return (f"user:{user}" if user else ""), ""
        mine = cookies.get("multilora-visitor", "")
        if re.fullmatch(r"[\w-]{32}", mine):
            return f"visitor:{mine}", ""
        return "", secrets.token_urlsafe(24)

    async def _post(self, scope: dict, receive: Any, path: str, host: str, owner: str) -> tuple[tuple | None, Any]:
        """(status and text of a refusal or None, the receive function to go on with)."""
        size = _length(scope)
        if (b"sec-fetch-site", b"cross-site") in scope["headers"]:  # so says a browser, of a page that is not ours
            return (403, "Another site may not do this here."), receive
        if path == "/login" and self._over(self._logins, host, 1, TRIES_AN_ADDRESS, WINDOW):
            return (429, "Too many logins from this address; please wait five minutes."), receive
        if path == "/upload":
            if size is None or size > self.limits.upload_bytes + BODY_BYTES:
                return (413, f"An upload may have {self.limits.upload_bytes:,} bytes."), receive
            who = owner if owner.startswith("user:") else host  # a visitor's cookie is made anew at will
            if self._over(self._uploads, who, size, self.limits.hour_bytes, 3600.0):
                return (429, f"Only {self.limits.hour_bytes:,} bytes may be uploaded within an hour."), receive
            return None, receive
        body, whole = b"", False
        while not whole:
            message = await receive()
            if message["type"] == "http.disconnect":
                return (400, "The request ended early."), receive
            body += message.get("body", b"")
            whole = not message.get("more_body", False)
            if len(body) > BODY_BYTES:
                return (413, f"A request may have {BODY_BYTES:,} bytes."), receive
        refused = self._body(scope, path, body, owner)
        return refused, _again(body, receive)

    def _body(self, scope: dict, path: str, body: bytes, owner: str) -> tuple | None:
        protected = path in ("/cancel", "/reset")
        app = scope.get("app")
        if protected and getattr(app, "auth", None) is not None and not owner:
            return (401, "Please log in.")
        try:
            data = json.loads(body) if body else None
        except (ValueError, RecursionError):
            return (400, "This is not JSON.") if protected or path.startswith("/queue") else None
        session = data.get("session_hash") if isinstance(data, dict) else None
        if isinstance(session, str) and len(session) > SESSION_LENGTH:
            return (400, f"A session's name has at most {SESSION_LENGTH} characters.")
        if isinstance(session, str):
            whose = self._sessions.get(session)
            if whose and whose != owner:
                return (403, "This session belongs to someone else.")
            if path == "/queue/join" and owner:
                self._sessions[session] = owner
                _bounded(self._sessions)
        if not all(self._may(text, owner) for text in _texts(data)):
            return (403, "This file belongs to someone else.")
        scope["multilora.asked"] = owner, data
        return None

    def _may(self, path: str, owner: str) -> bool:
        """Whether a text is no uploaded file's path, or that of one of the owner's."""
        whose = self._paths.get(os.path.normpath(path)) if len(path) < 4096 and "/" in path else None
        return whose is None or owner in whose

    def _over(self, seen: OrderedDict[str, deque], who: str, amount: float, limit: float, window: float) -> bool:
        now = self._clock()
        past = seen.setdefault(who, deque())
        while past and now - past[0][0] > window:
            past.popleft()
        if sum(n for _, n in past) + amount > limit:
            return True
        past.append((now, amount))
        seen.move_to_end(who)
        _bounded(seen)
        return False

    def _sending(self, send: Any, path: str, method: str, owner: str, cookie: str) -> Sending:
        mine = owner or (f"visitor:{cookie}" if cookie else "")
        uploads = path == "/upload" and method == "POST" and mine
        # Called without the queue, a function that refuses its values is for gradio a mistake of the server's.
        refused = 422 if method == "POST" and path.startswith(("/run/", "/api/")) else 500
        return Sending(send, cookie, refused, (lambda body: self._uploaded(body, mine)) if uploads else None)

    def _uploaded(self, body: bytes, owner: str) -> None:
        try:
            paths = json.loads(body)
        except ValueError:
            return  # an error of gradio's in words
        for path in paths if isinstance(paths, list) else []:
            if isinstance(path, str):
                # Equal content has one path; whoever uploads it has it already, so each of them may.
                self._paths.setdefault(os.path.normpath(path), set()).add(owner)
        _bounded(self._paths)


class Sending:
    """The send function of one request: adds headers and the cookie, and gives the whole body to `told`.

    refused  what stands for gradio's status 500
    """

    def __init__(self, send: Any, cookie: str, refused: int, told: Callable[[bytes], None] | None):
        self._send, self._cookie, self._refused, self._told = send, cookie, refused, told
        self._body, self._state = b"", "new"

    async def __call__(self, message: dict) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", []), (b"x-content-type-options", b"nosniff"),
                       (b"referrer-policy", b"same-origin")]  # fmt: skip
            if self._cookie:
                text = f"multilora-visitor={self._cookie}; Path=/; HttpOnly; SameSite=Lax"
                headers.append((b"set-cookie", text.encode()))
            status = self._refused if message["status"] == 500 else message["status"]
            message = {**message, "headers": headers, "status": status}
            self._state = "sized" if any(name.lower() == b"content-length" for name, _ in headers) else "open"
        elif message["type"] == "http.response.body":
            if self._told is not None:
                self._body += message.get("body", b"")
            if not message.get("more_body", False):
                self._state = "ended"
                if self._told is not None:
                    self._told(self._body)
        await self._send(message)

    async def end(self) -> None:
        """End it after an error in the app: by a refusal, or where the stream is. A body that has a length and is
        not all there cannot be ended well: then RuntimeError, upon which the server hangs up."""
        if self._state == "new":
            await _answer(self._send, 400, "This request cannot be read.")
        elif self._state == "open":
            await self._send({"type": "http.response.body", "body": b""})
        elif self._state == "sized":
            raise RuntimeError("an answer was broken off")


def launch_options(
    service: Any, *, host: str = "127.0.0.1", port: int | None = None, users: dict[str, str] | None = None
) -> dict[str, Any]:
    """Arguments for gradio's `launch`, as this service wants it: nothing shared, nothing allowed, nothing shown."""
    from starlette.middleware import Middleware

    from multilora.web.service.door import Doorkeeper

    return {
        "server_name": host,
        "server_port": port,
        "auth": Logins(users) if users else None,
        "share": False,
        "allowed_paths": [],
        "max_file_size": service.limits.upload_bytes,
        "show_error": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        "strict_cors": True,
        "state_session_capacity": service.limits.sessions,
        "footer_links": [],
        "app_kwargs": {"middleware": [Middleware(Guard, service=service), Middleware(Doorkeeper, service=service)]},
    }


def _bounded(found: OrderedDict) -> None:
    while len(found) > REMEMBERED:
        found.popitem(last=False)


def _cookies(scope: dict) -> dict[str, str]:
    lines = [v.decode("latin-1") for k, v in scope["headers"] if k == b"cookie"]
    pairs = [part.strip().partition("=") for line in lines for part in line.split(";")]
    return {name: value for name, _, value in pairs}


def _length(scope: dict) -> int | None:
    found = [v for k, v in scope["headers"] if k == b"content-length"]
    return int(found[0]) if found and found[0].isdigit() else None


def _texts(data: Any) -> list[str]:
    found, todo = [], collections.deque([data])
    while todo:
        each = todo.popleft()
        if isinstance(each, str):
            found.append(each)
        elif isinstance(each, (dict, list)):
            todo.extend(each.values() if isinstance(each, dict) else each)
    return found


def _again(body: bytes, receive: Any) -> Any:
    """A receive function that gives the body that was read, then whatever else comes."""
    given = False

    async def receiving() -> dict:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receiving


async def _answer(send: Any, status: int, text: str, kind: str = "plain; charset=utf-8") -> None:
    kind = "application/json" if kind == "json" else f"text/{kind}"
    headers = [(b"content-type", kind.encode()), (b"x-content-type-options", b"nosniff")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
