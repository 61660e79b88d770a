"""Who asks, and what belongs to them: uploaded LoRAs and the files that their jobs made."""

from __future__ import annotations

import os
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from multilora.web.service.limits import Limits, Refused
from multilora.web.service.spec import Output


@dataclass(frozen=True)
class Entry:
    """A LoRA that a session may use. `reference` is what requests and recipes call it; `owned`: it was uploaded here.

    facts  of an upload: what `multilora inspect` knows of it without the model
    """

    reference: str
    name: str
    category: str = ""
    trigger: str = ""
    description: str = ""
    preview: Path | None = None
    path: Path | None = None
    owned: bool = False
    sha256: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


class Session:
    """One browser, or one user where there are logins. Its folder holds what it owns, and goes with it.

    base  that its pages work on; "" for the server's first one
    """

    def __init__(self, key: str, folder: Path):
        self.key, self.folder = key, folder
        self.label = secrets.token_hex(4)  # stands for the key in logs
        self.seen = time.monotonic()
        self.base = ""
        self.uploads: dict[str, Entry] = {}
        self.outputs: OrderedDict[str, Output] = OrderedDict()
        self.taken: list[tuple[float, int]] = []  # (when, bytes) of uploads

    @property
    def size(self) -> int:
        """Bytes of everything that it owns."""
        return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())


class Sessions:
    """The sessions that are remembered, at most `limits.sessions`; the one unseen for longest makes room."""

    def __init__(self, root: Path, limits: Limits):
        self.root, self.limits = root, limits
        self._all: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()
        self._admission = threading.Lock()

    def __len__(self) -> int:
        return len(self._all)

    def get(self, key: str, busy: Sequence[str] = ()) -> Session:
        """The session of a key, a new one when there is none. Those in `busy` are not forgotten."""
        if not isinstance(key, str) or not key or len(key) > 200:
            raise Refused(f"session {key!r:.40}: a text of 1 to 200 characters is wanted")
        now = time.monotonic()
        with self._lock:
            found = self._all.get(key)
            if found is None:
                folder = self.root / secrets.token_hex(8)
                try:
                    folder.mkdir(mode=0o700)
                except OSError as error:
                    raise _disk("your files", error) from None
                found = self._all[key] = Session(key, folder)
            found.seen = now
            self._all.move_to_end(key)
            old = [k for k, s in self._all.items() if now - s.seen > self.limits.idle_seconds]
            over = list(self._all)[: max(0, len(self._all) - self.limits.sessions)]
            for gone in {*old, *over} - {key, *busy}:
                shutil.rmtree(self._all.pop(gone).folder, ignore_errors=True)
            return found

    def upload(self, session: Session, path: str | Path, base: Any, name: str | None = None) -> Entry:
        """Admit a LoRA file and keep a copy of it. Raises Refused naming file, key and limit; nothing is kept then."""
        from multilora.admit import Limits as FileLimits
        from multilora.detect import description
        from multilora.files import load
        from multilora.store import Store

        path = Path(path)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise Refused(f"{path.name}: cannot be read: {error.strerror}") from None
        self._room(session, path.name, size)
        limits = FileLimits(file_bytes=self.limits.upload_bytes)
        with self._admission:  # one at a time: it is what bounds memory here
            try:
                store = Store(session.folder / "loras", quota=self.limits.session_bytes, limits=limits)
                kept = store.add(path, base, label=name or path.stem)
                facts = description(load(kept.path, base, limits=limits, name=kept.label))
            except ValueError as error:
                raise Refused(str(error)) from None
            except OSError as error:
                raise _disk(path.name, error) from None
        reference = f"upload:{kept.sha256[:16]}"
        entry = Entry(
            reference,
            kept.label,
            category=facts.get("category") or "uploaded",
            trigger=", ".join(facts.get("triggers") or ()),
            path=kept.path,
            owned=True,
            sha256=kept.sha256,
            facts=facts,
        )
        session.taken.append((time.monotonic(), size))
        session.uploads[reference] = entry
        return entry

    def _room(self, session: Session, name: str, size: int) -> None:
        now = time.monotonic()
        session.taken = [(when, n) for when, n in session.taken if now - when < 3600]
        hour, limits = sum(n for _, n in session.taken), self.limits
        for what, found, limit in (
            ("the file", size, limits.upload_bytes),
            ("what you have uploaded within an hour", hour + size, limits.hour_bytes),
            ("all your files together", session.size + size, limits.session_bytes),
        ):
            if found > limit:
                raise Refused(f"{name}: {what} would be {found:,} bytes, this server allows {limit:,}", "limit")

    def remove(self, session: Session, reference: str) -> None:
        """Delete an upload. Raises Refused when it is not this session's."""
        entry = session.uploads.pop(reference, None)
        if entry is None:
            raise Refused(f"LoRA {reference!r}: not one that you have uploaded; only those can be removed")
        for path in (entry.path, entry.path.with_suffix(".json"), entry.preview):
            if path is not None:
                path.unlink(missing_ok=True)

    def set_preview(self, session: Session, reference: str, png: bytes) -> Entry:
        """Give an upload a preview picture."""
        if reference not in session.uploads:
            raise Refused(f"LoRA {reference!r}: not one that you have uploaded")
        path = session.folder / f"{reference.replace(':', '-')}.png"
        written(path, png)
        entry = session.uploads[reference] = replace(session.uploads[reference], preview=path)
        return entry

    def keep(self, session: Session, output: Output) -> Output:
        """Own a file that a job made; it gets a reference. The oldest go when the session's room is used up."""
        kept = replace(output, reference=f"file:{secrets.token_hex(8)}")
        session.outputs[kept.reference] = kept
        while session.size > self.limits.session_bytes and len(session.outputs) > 1:
            _, oldest = session.outputs.popitem(last=False)
            shutil.rmtree(oldest.path.parent, ignore_errors=True)
        return kept


def written(path: Path, data: bytes) -> Path:
    """Write a file of a session: whole, or not at all and Refused, when the disk does not take it."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise _disk(path.name, error) from None
    return path


def _disk(name: str, error: OSError) -> Refused:
    """What to say of a file that cannot be kept; its folder is nobody's business."""
    return Refused(f"{name}: this server cannot keep it: {error.strerror}. Please tell who runs it", "disk")
