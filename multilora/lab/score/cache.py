"""Vectors and answers that were paid for once: by the hash of picture or text, in memory and in a SQLite file.

A file's rows are kept under everything that they depend on (weights by hash, preprocessing, precision, library), which
the file says in clear in its table `models`. Several processes may share a file. Deleting it costs time, nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sqlite3
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

KEPT = 16384  # rows in memory per model: 32 MB at 512 numbers a row
_TABLES = """
CREATE TABLE IF NOT EXISTS models (model TEXT PRIMARY KEY, facts TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS rows (
    model TEXT NOT NULL, thing TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY (model, thing)
) WITHOUT ROWID;
"""


def picture_hash(image: Image.Image) -> str:
    """sha256 of a picture's size and RGB pixels: equal pictures share it whatever file they came from."""
    rgb = image.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height} ".encode() + rgb.tobytes()).hexdigest()


def text_hash(text: str) -> str:
    """sha256 of "text " and a text in UTF-8."""
    return hashlib.sha256(b"text " + text.encode()).hexdigest()


def weights_hash(model: torch.nn.Module) -> str:
    """sha256 of a model's tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def model_key(facts: Mapping[str, Any]) -> tuple[str, str]:
    """(sha256, JSON) of what a model's rows depend on."""
    text = json.dumps(dict(facts), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest(), text


class File:
    """One cache file. Threads share its connection under a lock; a forked process must not use it.

    Raises ValueError when the path is no cache file. What cannot be written (disk full, read-only) is said once as a
    warning and costs nothing but the caching.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._lock = threading.Lock()
        self._known: set[str] = set()
        self._writable = True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=30, check_same_thread=False, isolation_level=None)
            self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + _TABLES)
        except (OSError, sqlite3.Error) as error:
            raise ValueError(
                f"cache of scores {self.path}: not a cache file that can be written ({error}); name another, or "
                "remove it: a cache holds nothing that cannot be computed again"
            ) from error

    def get(self, model: str, things: Sequence[str]) -> dict[str, bytes]:
        """The values that are there."""
        found: dict[str, bytes] = {}
        with self._lock, self._reported("read"):
            for first in range(0, len(things), 500):  # SQLite's bound on variables of one statement
                part = things[first : first + 500]
                marks = ",".join("?" * len(part))
                found |= dict(
                    self._db.execute(f"SELECT thing, value FROM rows WHERE model = ? AND thing IN ({marks})",
                                     (model, *part))
                )  # fmt: skip
        return found

    def put(self, model: str, facts: str, rows: Mapping[str, bytes]) -> None:
        """Add values; those that another process has added meanwhile stay."""
        if not rows or not self._writable:
            return
        with self._lock, self._reported("written to"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                if model not in self._known:
                    self._db.execute("INSERT OR IGNORE INTO models VALUES (?, ?)", (model, facts))
                self._db.executemany("INSERT OR IGNORE INTO rows VALUES (?, ?, ?)",
                                     [(model, thing, value) for thing, value in rows.items()])  # fmt: skip
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite ends it itself when the disk is full
                    self._db.execute("ROLLBACK")
                raise
            self._known.add(model)

    @contextlib.contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            self._writable = False
            warnings.warn(f"cache of scores {self.path} cannot be {what}: {error}", RuntimeWarning, stacklevel=4)

    def close(self) -> None:
        self._db.close()


@functools.cache
def cache_file(path: str) -> File:
    """The open cache of a path, one per process."""
    return File(path)


class Vectors:
    """Rows [n, d] of things, computed once per hash.

    compute   things -> float32 [n, d] on the CPU
    hashed    a thing's hash
    facts     what the rows depend on, as JSON can say it; asked for when there is a file only
    path      of the cache file; "" keeps rows in memory only
    """

    def __init__(
        self,
        compute: Callable[[list[Any]], torch.Tensor],
        hashed: Callable[[Any], str],
        facts: Callable[[], Mapping[str, Any]],
        path: str = "",
    ) -> None:
        self._compute, self._hashed, self._facts, self._path = compute, hashed, facts, path
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self.computed = 0  # rows that no cache had

    @functools.cached_property
    def _key(self) -> tuple[str, str]:
        return model_key(self._facts())

    def __call__(self, things: Sequence[Any]) -> torch.Tensor:
        """The rows, in order. Equal things are computed once."""
        hashes = [self._hashed(thing) for thing in things]
        with self._lock:
            found = {h: self._kept[h] for h in hashes if h in self._kept}
        wanted = {h: thing for h, thing in zip(hashes, things, strict=True) if h not in found}
        if wanted and self._path:
            stored = cache_file(self._path).get(self._key[0], list(wanted))
            found |= {h: torch.from_numpy(np.frombuffer(value, "<f4").copy()) for h, value in stored.items()}
            wanted = {h: thing for h, thing in wanted.items() if h not in found}
        if wanted:
            rows = self._compute(list(wanted.values()))
            self.computed += len(wanted)
            new = dict(zip(wanted, rows, strict=True))
            found |= new
            if self._path:
                values = {h: row.numpy().astype("<f4").tobytes() for h, row in new.items()}
                cache_file(self._path).put(*self._key, values)
        with self._lock:
            for h in hashes:
                self._kept[h] = found[h]
                self._kept.move_to_end(h)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return torch.stack([found[h] for h in hashes]) if hashes else torch.empty(0, 0)
