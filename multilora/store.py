"""A read-only store of admitted LoRA files by content: what a service accepts from strangers.

    store = Store("loras", quota=50 * 2**30)
    entry = store.add("upload.tmp.safetensors", base=pipe, label="my fox")
    lora = multilora.load(entry.path, base=pipe)

A file is named by its sha256 and nothing else; what people call it is a label that is shown and never part of a path.
It is copied, admitted from the copy, made durable and renamed, so that nobody can exchange it between check and use.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multilora.admit import admit
from multilora.limits import Limits, shown
from multilora.reading import located, opened

_PIECE = 2**20
_INCOMING = ".incoming-"  # names of copies that are not admitted yet
_STALE = 3600.0  # seconds after which such a copy is a leftover: no admission takes minutes


@dataclass(frozen=True)
class Entry:
    """One file of a store: sha256 of its bytes, where they are, how many, and the text to show for it."""

    sha256: str
    path: Path
    size: int
    label: str


class Store:
    """The files in one folder, at most `quota` bytes of them together. Threads may share it; processes may read it.

    Opening it sweeps what a killed process has left.
    """

    def __init__(self, folder: str | Path, *, quota: int = 100 * 2**30, limits: Limits | None = None) -> None:
        if isinstance(quota, bool) or not isinstance(quota, int) or quota < 1:
            raise ValueError(f"quota={quota!r}: wanted a whole number of bytes of at least 1")
        self.folder = Path(folder).expanduser().resolve()
        self.quota, self.limits = quota, limits or Limits()
        self._lock = threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sweep()

    def __iter__(self) -> Iterator[Entry]:
        """The entries, by hash."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if re.fullmatch(r"[0-9a-f]{64}", path.stem):
                yield self._entry(path)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, sha256: object) -> bool:
        return isinstance(sha256, str) and bool(re.fullmatch(r"[0-9a-f]{64}", sha256)) and self._file(sha256).is_file()

    def __getitem__(self, sha256: str) -> Entry:
        """The entry of a hash; ValueError when there is none (a hash is never made into a path before it is one)."""
        if sha256 not in self:
            raise ValueError(f"the store holds no LoRA {shown(sha256, 70)}")
        return self._entry(self._file(sha256))

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self)

    def add(
        self, path: str | Path, base: Any = None, *, label: str | None = None, root: str | Path | None = None
    ) -> Entry:
        """Copy, admit and keep a .safetensors file; the same bytes are kept once, under their first label.

        base, root  as in multilora.admit.admit
        label       what people call it; default is the file's name. Any text: it is cut and shown on one line

        Raises ValueError naming the file when it is not admitted or the quota is full. Nothing is left of it then.
        """
        source = located(path, root)
        name = shown(source.name)
        if source.suffix != ".safetensors":
            raise ValueError(f"{name}: a store takes one .safetensors file; convert a folder or another format first")
        with tempfile.TemporaryDirectory(prefix=_INCOMING, dir=self.folder) as incoming:
            copy = Path(incoming) / "incoming.safetensors"
            sha256, size = self._copied(source, copy, name, root)
            try:
                lora = admit(copy, base, limits=self.limits)
            except ValueError as error:
                raise ValueError(str(error).replace(copy.name, name, 1)) from None
            if lora.card.sha256 != sha256:
                raise ValueError(f"{name}: the store's copy changed while it was read")
            with self._lock:
                if sha256 in self:
                    return self[sha256]
                self._room(size, self.size, name)
                words = {"label": shown(source.stem if label is None else label), "size": size}
                side = Path(incoming) / "label.json"
                side.write_text(json.dumps(words), encoding="utf-8")
                os.chmod(copy, 0o444)
                os.replace(side, self._side(sha256))
                os.replace(copy, self._file(sha256))
                _flush(self.folder)
                return self[sha256]

    def _copied(self, source: Path, copy: Path, name: str, root: str | Path | None) -> tuple[str, int]:
        """(sha256, bytes) of what was copied, durable on the disk; never more than the limits allow."""
        stream, size = opened(source, where=name, root=root)
        digest, count = hashlib.sha256(), 0
        with stream, copy.open("xb") as out:
            if size > self.limits.file_bytes:
                raise ValueError(f"{name}: {size:,} bytes, above the limit file_bytes={self.limits.file_bytes:,}")
            self._room(size, 0, name)
            while count < size and (piece := stream.read(min(_PIECE, size - count))):
                digest.update(piece)
                out.write(piece)
                count += len(piece)
            out.flush()
            os.fsync(out.fileno())
        return digest.hexdigest(), count

    def _room(self, size: int, used: int, name: str) -> None:
        if used + size > self.quota:
            limit = f"above the limit quota={self.quota:,}"
            raise ValueError(f"{name}: {size:,} bytes beside the {used:,} that the store holds are {limit}")

    def remove(self, sha256: str) -> None:
        """Delete a file and its label; ValueError when there is none."""
        with self._lock:
            entry = self[sha256]
            entry.path.unlink()
            self._side(sha256).unlink(missing_ok=True)

    def sweep(self, older_than: float = _STALE) -> list[str]:
        """Delete copies that were never admitted, and labels without a file; their names come back."""
        gone = []
        for found in sorted(self.folder.iterdir()):
            leftover = found.name.startswith(_INCOMING) or (
                re.fullmatch(r"[0-9a-f]{64}\.json", found.name) and not found.with_suffix(".safetensors").exists()
            )
            if not leftover or time.time() - found.lstat().st_mtime < older_than:
                continue
            if found.is_dir() and not found.is_symlink():
                shutil.rmtree(found)
            else:
                found.unlink()
            gone.append(found.name)
        return gone

    def _file(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.safetensors"

    def _side(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.json"

    def _entry(self, path: Path) -> Entry:
        try:
            words = json.loads(self._side(path.stem).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            words = {}
        label = words.get("label") if isinstance(words, dict) else None
        return Entry(path.stem, path, path.stat().st_size, shown(label if isinstance(label, str) else path.stem[:12]))


def _flush(folder: Path) -> None:
    """Make renames in a folder durable, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
