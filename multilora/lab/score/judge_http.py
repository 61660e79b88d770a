"""A vision-language model behind an OpenAI-compatible endpoint: POST URL/chat/completions."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import io
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from multilora.lab.score.judge import Answer, Refused
from multilora.lab.score.record import ScoreFailed

PASSING = (408, 425, 429, 500, 502, 503, 504, 529)  # statuses that another try may turn into an answer
THIS_ONE = (400, 413, 415, 422)  # statuses that may concern this one question
LARGEST = 2**20  # bytes of an answer
PATIENCE = 120.0  # seconds that a server may ask us to wait
LOCAL = ("localhost", "127.0.0.1", "::1")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would send the key along to wherever a server points."""

    def redirect_request(self, *args: Any) -> None:
        return None


class Endpoint:
    """An answerer over HTTP. Calls are made in threads: nothing here changes after the constructor.

    key       name of the environment variable with the key; without it none is sent
    side      pixels that a picture is shrunk to, longer side
    attempts  tries of one call, with waits of `first_wait` seconds doubled each time, shortened by chance
    extra     more fields of the request; None leaves one out, for servers that refuse temperature or max_tokens

    Raises ValueError for a URL that is none, an empty key, or a key over plain HTTP to another machine.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str = "",
        parallel: int = 4,
        side: int = 768,
        output_tokens: int = 300,
        attempts: int = 6,
        first_wait: float = 1.0,
        timeout: float = 120.0,
        extra: Mapping[str, Any] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ValueError(f"judge url {_shown(url)}: wanted http(s)://HOST/..., such as http://localhost:8000/v1")
        self.url = url.rstrip("/")
        self._key = os.environ.get(key, "").strip() if key else ""
        if key and not self._key:
            raise ValueError(f"judge key: the environment has no {key}, or it is empty")
        local = parts.hostname in LOCAL
        if self._key and parts.scheme == "http" and not local:
            raise ValueError(f"judge url {self.url}: the key would travel unencrypted; use https, or no key")
        self.host, self.model, self.parallel, self.side = parts.hostname, model, parallel, side
        self.attempts, self.first_wait, self.timeout = attempts, first_wait, timeout
        fields = {"temperature": 0, "max_tokens": output_tokens, **(extra or {})}
        self.extra = {name: value for name, value in fields.items() if value is not None}
        limits = (self.extra.get(name) for name in ("max_completion_tokens", "max_tokens"))
        self.output_tokens = next((limit for limit in limits if isinstance(limit, int)), output_tokens)
        self._sleep, self._chance = sleep, chance
        proxies = (urllib.request.ProxyHandler({}),) if local else ()
        self._opener = urllib.request.build_opener(_NoRedirect(), *proxies)
        self.name = f"judge {model} at {self.host}, pictures at most {side} px"
        self.facts = {"url": self.url, "model": model, "side": side, "extra": self.extra}

    def reach(self) -> None:
        """Asks for the list of models; a server without such a list that answers anything is reached."""
        try:
            self._sent("GET", "/models", None, attempts=2)
        except Refused:
            return
        except _Status as error:
            if error.code in (401, 403):
                raise

    def answer(self, question: str, pictures: Sequence[Image.Image]) -> Answer:
        """Raises Refused for this question, ScoreFailed when no try gave an answer."""
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _data_url(picture, self.side)}} for picture in pictures
        ]
        content.append({"type": "text", "text": question})
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **self.extra}
        told = self._sent("POST", "/chat/completions", json.dumps(body).encode(), self.attempts)
        try:
            said = told["choices"][0]["message"]["content"] or ""
            text = said if isinstance(said, str) else "".join(part.get("text", "") for part in said)
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ScoreFailed(f"{self.name}: the answer has no choices[0].message.content: {_shown(told)}") from None
        usage = told.get("usage") or {}
        return Answer(text, int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))

    def input_tokens(self, question: str, sizes: Sequence[tuple[int, int]]) -> int:
        """About: a token per 4 letters, and OpenAI's rule for pictures, 85 and 170 per tile of 512 px
        (https://platform.openai.com/docs/guides/images-vision); other models count otherwise."""
        tiles = 0
        for width, height in sizes:
            share = min(1.0, self.side / max(width, height))
            tiles += -(-round(width * share) // 512) * -(-round(height * share) // 512)
        return len(question) // 4 + 85 * len(sizes) + 170 * tiles

    def _sent(self, verb: str, path: str, body: bytes | None, attempts: int) -> Any:
        """The JSON of an answer. Raises _Status for a status that stays, Refused, or ScoreFailed after the tries."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        said = ""
        for attempt in range(attempts):
            asked = 0.0
            try:
                request = urllib.request.Request(self.url + path, body, headers, method=verb)
                with self._opener.open(request, timeout=self.timeout) as response:
                    data = response.read(LARGEST + 1)
                if len(data) > LARGEST:
                    raise ScoreFailed(f"{self.name}: an answer of more than {LARGEST} bytes")
                return json.loads(data)
            except urllib.error.HTTPError as error:
                said = f"status {error.code}, {self._hidden(error)}"
                if error.code in THIS_ONE:
                    raise Refused(f"{self.name}: {said}") from None
                if error.code not in PASSING:
                    raise _Status(f"{self.name}: {said}", error.code) from None
                asked = _asked_wait(error.headers.get("Retry-After"))
                if asked > PATIENCE:
                    raise ScoreFailed(f"{self.name}: {said}; it asks to wait {asked:.0f} s") from None
            except (OSError, HTTPException, ValueError) as error:  # URLError and timeouts are OSErrors
                said = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
            if attempt + 1 < attempts:
                self._sleep(max(asked, self.first_wait * 2**attempt * (0.5 + 0.5 * self._chance())))
        raise ScoreFailed(f"{self.name}: no answer from {self.url} in {attempts} tries; the last: {said}")

    def _hidden(self, error: urllib.error.HTTPError) -> str:
        try:
            text = error.read(2000).decode("utf-8", "replace")
        except (OSError, HTTPException):
            text = ""
        return _shown(text.replace(self._key, "[key]") if self._key else text)


class _Status(ScoreFailed):
    """A status that no other try will change."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def _asked_wait(value: str | None) -> float:
    """Seconds of a Retry-After header, given as seconds or as a date; 0 when there is none that can be read."""
    if not value:
        return 0.0
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _data_url(picture: Image.Image, side: int) -> str:
    shown = picture.convert("RGB")
    shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    shown.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _shown(value: Any) -> str:
    text = " ".join(str(value).split())
    return repr(text if len(text) <= 300 else text[:300] + "...")
