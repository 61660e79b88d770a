"""The folder of a batch: its pictures, the journal of what became of each item, and the lock of its one driver.

    DIR/driver.lock       locked by the running driver, with its process and machine
    DIR/journal.sqlite    the items, and what became of each
    DIR/pictures/ID.png   a picture is there, whole, or not at all: its rename is what commits it

The journal is an index. What it says about pictures is checked against the folder whenever a driver starts, and a
journal that was lost or torn is made again from the pictures. SQLite's WAL needs a disk of this machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from multilora.lab.evaluate.items import BatchError, Item
from multilora.recipe import Recipe, RecipeError

TRIES = 3  # an item that has failed this often is left alone
# A process that is killed with an item in hand says little about the item: people and machines kill too. One that is
# found in this many dead hands (more memory than there is, say) is left alone as well.
KILLS = 10
WAITING, DONE, FAILED = "waiting", "done", "failed"
_COLUMNS = "id, line, status, tries, kills, seed, method, sha256, bytes, seconds, worker, error"
_TABLES = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE items (
    id TEXT PRIMARY KEY, place INTEGER NOT NULL, line INTEGER NOT NULL, recipe TEXT NOT NULL, seed INTEGER NOT NULL,
    method TEXT NOT NULL, status TEXT NOT NULL DEFAULT 'waiting', at_work INTEGER NOT NULL DEFAULT 0,
    tries INTEGER NOT NULL DEFAULT 0, kills INTEGER NOT NULL DEFAULT 0, sha256 TEXT, bytes INTEGER, seconds REAL,
    worker TEXT, error TEXT
);
"""


class Journal:
    """One batch's folder, opened by its driver. `notes` are lines for the user about what was found and mended.

    Raises BatchError when another driver has the folder, and OSError when it cannot be written to.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.pictures = self.folder / "pictures"
        self.notes: list[str] = []
        self.pictures.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder / "driver.lock")
        try:
            self._db = self._opened(self.folder / "journal.sqlite")
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: Any) -> None:
        self._db.close()
        self._lock.close()

    def picture(self, id: str) -> Path:
        """Where an item's picture is, or will be."""
        return self.pictures / f"{id}.png"

    def settings(self) -> dict[str, Any]:
        """The settings that the folder was made with; empty for a new one."""
        return {name: json.loads(value) for name, value in self._db.execute("SELECT name, value FROM settings")}

    def recipes(self) -> dict[str, tuple[int, str]]:
        """Item -> (line, recipe as JSON); empty for a new folder."""
        return {id: (line, text) for id, line, text in self._db.execute("SELECT id, line, recipe FROM items")}

    def enter(self, items: Iterable[Item], settings: Mapping[str, Any]) -> None:
        """Write down the items and settings of a new batch, all or nothing."""
        with self._db:
            self._db.executemany(
                "INSERT INTO settings VALUES (?, ?)", [(name, json.dumps(v)) for name, v in settings.items()]
            )
            self._db.executemany(
                "INSERT INTO items (id, place, line, recipe, seed, method) VALUES (?, ?, ?, ?, ?, ?)",
                [
                    # SQLite's integers are those of 64 bits, as seeds are
                    (one.id, place, one.line, one.recipe.json, one.recipe.seed, one.recipe.method)
                    for place, one in enumerate(items)
                ],
            )

    def mend(self, crash: str = "") -> None:
        """Make journal and folder agree after whatever ended the last driver.

        crash   what the last driver's own process left when it died of the item in its hands, or ""
        """
        there = {}
        with os.scandir(self.pictures) as entries:
            for entry in entries:
                if entry.name.startswith(".") and entry.name.endswith(".part"):
                    os.unlink(entry.path)
                elif entry.name.endswith(".png"):
                    there[entry.name.removesuffix(".png")] = entry.stat().st_size
        found = lost = 0
        rows = list(self._db.execute("SELECT id, status, bytes, at_work FROM items"))
        with self._db:
            for id, status, size, at_work in rows:
                if status == DONE and there.get(id) != size:
                    lost += 1
                    self._set(id, status=WAITING, sha256=None, bytes=None)
                elif status != DONE and id in there and self._whole(id):
                    found += 1
                    data = self.picture(id).read_bytes()
                    self._set(id, status=DONE, sha256=_sha256(data), bytes=len(data), error=None, at_work=0)
                elif at_work and crash:
                    self.failed(id, crash)
                elif at_work:
                    self.killed(id)
        if found:
            self.notes.append(f"{found} pictures were there that the journal did not have")
        if lost:
            self.notes.append(f"{lost} pictures are gone or were changed; they are drawn again")

    def retry_failed(self) -> None:
        """Give the items that were left alone another round of tries."""
        with self._db:
            self._db.execute("UPDATE items SET status = 'waiting', tries = 0, kills = 0 WHERE status = 'failed'")

    def waiting(self) -> dict[str, int]:
        """The items to draw, in the order of the file -> how often each has gone wrong."""
        rows = self._db.execute("SELECT id, tries + kills FROM items WHERE status = 'waiting' ORDER BY place")
        return dict(rows.fetchall())

    def counts(self) -> dict[str, int]:
        """How many items are waiting, done and failed."""
        found = dict(self._db.execute("SELECT status, count(*) FROM items GROUP BY status").fetchall())
        return {status: found.get(status, 0) for status in (WAITING, DONE, FAILED)}

    # -- what becomes of an item; each is on disk when the call returns -----------------------------------------------

    def started(self, id: str) -> None:
        """This very process now draws the item: should it die, the item was in its hands."""
        with self._db:
            self._set(id, at_work=1)

    def drawn(self, id: str, data: bytes, seconds: float, worker: str = "") -> Path:
        """Commit a picture. Raises OSError when there is no room; then no part of it is left."""
        path = self.picture(id)
        temporary = path.with_name(f".{id}.part")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(self.pictures)
        with self._db:
            self._set(
                id, status=DONE, at_work=0, sha256=_sha256(data), bytes=len(data), seconds=seconds, worker=worker,
                error=None,
            )  # fmt: skip
        return path

    def failed(self, id: str, error: str) -> bool:
        """The item went wrong by itself; True when it is left alone from now on."""
        return self._wrong(id, "tries", TRIES, error)

    def killed(self, id: str) -> bool:
        """The process that had the item was killed; True when the item is left alone from now on."""
        error = f"each of the {KILLS} processes that drew it was killed; perhaps it needs more memory than there is"
        return self._wrong(id, "kills", KILLS, error)

    def given_back(self, id: str) -> None:
        """The item was not drawn, and nothing is held against it."""
        with self._db:
            self._set(id, at_work=0)

    def rows(self) -> list[dict[str, Any]]:
        """What became of every item, in the order of the file."""
        return _rows(self._db)

    def _wrong(self, id: str, column: str, limit: int, error: str) -> bool:
        with self._db:
            (count,) = self._db.execute(f"SELECT {column} FROM items WHERE id = ?", (id,)).fetchone()
            last = count + 1 >= limit
            told = error if last or column == "tries" else None
            self._set(id, **{column: count + 1}, status=FAILED if last else WAITING, error=told, at_work=0)
        return last

    def _set(self, id: str, **values: Any) -> None:
        names = ", ".join(f"{name} = ?" for name in values)
        self._db.execute(f"UPDATE items SET {names} WHERE id = ?", (*values.values(), id))

    def _whole(self, id: str) -> bool:
        """Whether an item's file is its picture from first to last byte."""
        try:
            return Recipe.from_png(self.picture(id)).extra.get("item") == id
        except RecipeError:
            return False

    def _opened(self, path: Path) -> sqlite3.Connection:
        """The journal; one that is torn is put aside and a new one begun."""
        try:
            return _connected(path)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            aside = next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.name}.torn-{n}")).exists())
            for end in ("", "-wal", "-shm"):
                if (part := path.with_name(path.name + end)).exists():
                    os.replace(part, aside.with_name(aside.name + end))
            self.notes.append(f"{path.name} was torn ({error}); kept as {aside.name}, made again from the pictures")
            return _connected(path)


def read_rows(folder: str | Path) -> list[dict[str, Any]]:
    """What has become of every item so far, also while a driver is at work. Raises BatchError where no batch is."""
    path = Path(folder) / "journal.sqlite"
    if not path.is_file():
        raise BatchError(f"{folder}: no batch in this folder ({path.name} is missing)")
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=30.0)
    try:
        return _rows(db)
    finally:
        db.close()


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The settings that a folder was made with, empty where there is none or its journal is torn."""
    path = Path(folder) / "journal.sqlite"
    if not path.is_file():
        return {}
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=30.0)) as db:
            return {name: json.loads(value) for name, value in db.execute("SELECT name, value FROM settings")}
    except (sqlite3.DatabaseError, ValueError):
        return {}


def _rows(db: sqlite3.Connection) -> list[dict[str, Any]]:
    cursor = db.execute(f"SELECT {_COLUMNS} FROM items ORDER BY place")
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def _connected(path: Path) -> sqlite3.Connection:
    """A checked journal with its tables. Raises sqlite3.DatabaseError for a torn one."""
    db = sqlite3.connect(path, timeout=30.0)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")  # NORMAL may lose the last commits when the power goes
        state = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if state != "ok":
            raise sqlite3.DatabaseError(state)
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not {"settings", "items"} <= tables:
            db.executescript(f"BEGIN IMMEDIATE; {_TABLES} COMMIT;")
        return db
    except BaseException:
        db.close()
        raise


def _locked(path: Path) -> Any:
    """The lock file, held until it is closed or this process ends in whatever way."""
    import fcntl  # not on Windows, where only this command is missing

    file = open(path, "a+")  # noqa: SIM115 (the caller keeps it open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise BatchError(
            f"{path.parent}: a batch is running in this folder: {holder}; wait for it, stop it, or give another --out"
        ) from None
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}")
    file.flush()
    return file


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
