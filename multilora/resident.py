"""A library of LoRAs larger than memory: names, of which at most so many bytes are loaded at a time.

    library = Library("loras", base=pipe, limit_bytes=8 << 30)
    library.prefetch("ink")                         # the next one, while something else runs
    with library.using(["fox", "robe"]) as loras:   # {"fox": Lora, "robe": Lora}, kept for the length of the block
        ...

What was used longest ago makes room. LoRAs in use and pinned ones never do.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from multilora import files
from multilora.bases import base_of
from multilora.limits import LOCAL, Limits, shown
from multilora.lora import Lora
from multilora.method import unknown

_ABSENT, _LOADING, _READY = "absent", "loading", "ready"
Stamp = tuple[tuple[str, int, int, int, int], ...]


@dataclass(eq=False)
class _Entry:
    """One file in one state of it; a file that changes on the disk gets a new entry.

    size      bytes that it needs: the file's until it has been read, then those of its tensors
    storages  data pointer -> bytes of its tensors' memory
    users     blocks of `using` that hold it
    """

    name: str
    path: Path
    stamp: Stamp
    size: int
    state: str = _ABSENT
    lora: Lora | None = None
    storages: dict[int, int] = field(default_factory=dict)
    users: int = 0
    error: BaseException | None = None


class Library:
    """LoRAs by name, loaded when they are wanted, at most `limit_bytes` of them at a time. Threads may share it.

    source       a folder: its .safetensors files and PEFT folders by their names without the ending, new files
                 included as they come; or a mapping of names to paths, such as
                 `{entry.label: entry.path for entry in multilora.store.Store(...)}`
    base         as in multilora.load: what every file is checked against
    limit_bytes  of the tensors of all loaded LoRAs together, memory that two of them share counted once. A file that
                 is being read counts with its size. Not in it: what a run makes of the LoRAs that it uses (see
                 `multilora.attach`: stacked copies of about the same size in the side form, merged weights in the
                 others), and for the length of one read the layers that it converts
    pinned       names that stay once they are loaded
    limits       of a single file, as in multilora.load

    Raises ValueError for a limit below 1, a source that is neither, and two files of one name.
    """

    def __init__(
        self,
        source: str | Path | Mapping[str, str | Path],
        base: Any = None,
        *,
        limit_bytes: int,
        pinned: Iterable[str] = (),
        limits: Limits = LOCAL,
    ) -> None:
        if isinstance(limit_bytes, bool) or not isinstance(limit_bytes, int) or limit_bytes < 1:
            raise ValueError(f"limit_bytes={limit_bytes!r}: wanted a whole number of at least 1")
        self.limit_bytes = limit_bytes
        # A small file of another algorithm may stand for large tensors: no more than would fit in 16 bits each.
        self._limits = replace(limits, expanded_total=min(limits.expanded_total, max(1, limit_bytes // 2)))
        self._base = None if base is None else base_of(base)
        self._folder: Path | None = None
        self._paths: dict[str, Path] = {}
        if isinstance(source, Mapping):
            self._paths = {str(name): Path(path).expanduser() for name, path in source.items()}
        elif isinstance(source, (str, Path)) and Path(source).expanduser().is_dir():
            self._folder = Path(source).expanduser().resolve()
            self._paths = _found(self._folder)
        else:
            raise ValueError(f"library {shown(source)}: wanted a folder of LoRAs, or a mapping of names to paths")
        self.loads = 0  # files read so far
        self._pinned: set[str] = set()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the one used longest ago first
        self._retired: list[_Entry] = []  # of files that have changed since, while somebody uses them
        self._changed = threading.Condition()
        self._turn = threading.Lock()  # one request at a time gathers its LoRAs, so that no two wait for each other
        self._mine = threading.local()
        self._closed = False
        self._background = ThreadPoolExecutor(1, thread_name_prefix="multilora-library")
        for name in pinned:
            self.pin(name)

    # -- what is there ---------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """All names, loaded or not, sorted."""
        if self._folder is not None:
            self._paths = _found(self._folder)
        return sorted(self._paths)

    def __contains__(self, name: object) -> bool:
        return name in self._paths or name in self.names

    def __len__(self) -> int:
        return len(self.names)

    def path(self, name: str) -> Path:
        """The file or folder of a name. Raises UnknownName."""
        if name not in self:
            raise unknown("LoRA of the library", name, self._paths)
        return self._paths[name]

    @property
    def resident(self) -> tuple[str, ...]:
        """The names that are loaded now, the one used longest ago first."""
        with self._changed:
            return tuple(name for name, entry in self._entries.items() if entry.state == _READY)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all loaded LoRAs and of the files that are being read; never above limit_bytes."""
        with self._changed:
            return self._total()

    def _total(self) -> int:
        entries = [*self._entries.values(), *self._retired]
        storages: dict[int, int] = {}
        for entry in entries:
            storages |= entry.storages
        return sum(storages.values()) + sum(entry.size for entry in entries if entry.state == _LOADING)

    def pin(self, name: str) -> None:
        """Keep a LoRA once it is loaded. Raises UnknownName."""
        self.path(name)
        with self._changed:
            self._pinned.add(name)

    def unpin(self, name: str) -> None:
        """Let a LoRA make room for others again."""
        with self._changed:
            self._pinned.discard(name)
            self._changed.notify_all()

    # -- using -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def using(self, names: Iterable[str]) -> Iterator[dict[str, Lora]]:
        """The LoRAs of these names by name; none of them is dropped before the block ends.

        The dict is empty afterwards: who keeps a Lora beyond the block keeps memory that the limit does not know of.

        Several are loaded by two threads. Waits while LoRAs in use by other threads leave no room. A file that has
        changed since it was loaded is loaded again; blocks that use the old one keep it.

        Raises UnknownName; ValueError for a file that is not admitted, and when these LoRAs and the pinned ones are
        together above the limit; RuntimeError after close(), and inside another such block of the same thread, which
        could wait for itself.
        """
        names = list(dict.fromkeys(names))
        for name in names:
            self.path(name)
        if getattr(self._mine, "busy", False):
            raise RuntimeError("this thread is using LoRAs of the library already; name all of them in one using(...)")
        self._mine.busy = True
        taken: list[_Entry] = []
        found: dict[str, Lora] = {}
        try:
            with self._turn:
                with self._changed:
                    self._check_open()
                    for name in names:
                        entry = self._current(name)
                        entry.users += 1
                        taken.append(entry)
                    for name in reversed(names[1:]):
                        self._background.submit(self._ahead, name)
                self._gather(taken)
            found = {entry.name: entry.lora for entry in taken}
            yield found
        finally:
            found.clear()  # a variable that outlives the block must not keep what the library counts as dropped
            self._mine.busy = False
            with self._changed:
                for entry in taken:
                    entry.users -= 1
                self._tidy()
                self._changed.notify_all()

    def prefetch(self, name: str) -> Future[bool]:
        """Load a LoRA in the background, while the model runs, if others that nobody uses can make room for it.

        The future's result says whether it is loaded; it raises what `using` would raise. Raises UnknownName, and
        RuntimeError after close().
        """
        self.path(name)
        with self._changed:
            self._check_open()
            return self._background.submit(self._fetch, name)

    def _ahead(self, name: str) -> None:
        # The request that this is for meets the same error in its own thread.
        with contextlib.suppress(ValueError):
            self._fetch(name)

    def _fetch(self, name: str) -> bool:
        with self._changed:
            entry = self._current(name)
            if entry.state == _LOADING:
                self._changed.wait_for(lambda: entry.state != _LOADING)
            if entry.state == _READY or not self._fits(entry.size):
                return entry.state == _READY
            entry.state = _LOADING
        self._read(entry)
        return entry.state == _READY

    def close(self) -> None:
        """Drop everything that nobody uses, after the load that is under way; the rest when its blocks end.

        From here on `using` and `prefetch` raise RuntimeError.
        """
        with self._changed:
            self._closed = True
        self._background.shutdown(cancel_futures=True)
        with self._changed:
            self._tidy()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this library of LoRAs is closed: close() was called; make a new Library")

    def _tidy(self) -> None:
        """Let go of old states of files that nobody uses any more; of everything unused when closed."""
        self._retired = [entry for entry in self._retired if entry.users or entry.state == _LOADING]
        if self._closed:
            for entry in self._entries.values():
                if entry.state == _READY and not entry.users:
                    self._drop(entry)

    # -- loading; all but _gather and _read under the lock -----------------------------------------------------------

    def _current(self, name: str) -> _Entry:
        """The entry of the file as it is on the disk now, as the one used last."""
        path = self._paths[name]
        stamp = _stamp(path)
        entry = self._entries.get(name)
        if entry is None or entry.stamp != stamp:
            if entry is not None and (entry.users or entry.state == _LOADING):
                self._retired.append(entry)
            entry = self._entries[name] = _Entry(name, path, stamp, sum(size for *_, size in stamp))
        self._entries.move_to_end(name)
        return entry

    def _gather(self, taken: list[_Entry]) -> None:
        """Load all of these, whichever thread does it."""
        while True:
            with self._changed:
                failed = next((entry for entry in taken if entry.error is not None), None)
                if failed is not None:
                    raise failed.error
                absent = [entry for entry in taken if entry.state == _ABSENT]
                if all(entry.state == _READY for entry in taken):
                    return
                if not absent or not self._fits(absent[0].size):
                    if absent:
                        self._refuse(taken, absent[0])
                    self._changed.wait()
                    continue
                entry = absent[0]
                entry.state = _LOADING
            self._read(entry)

    def _refuse(self, taken: list[_Entry], entry: _Entry) -> None:
        """ValueError when waiting would not make room for `entry`."""
        where = shown(entry.path.name)
        limit = f"above the limit limit_bytes={self.limit_bytes:,} of this library"
        if entry.size > self.limit_bytes:
            raise ValueError(f"{where}: {entry.size:,} bytes, {limit}")
        pinned = [e for e in self._entries.values() if e.name in self._pinned and e.state == _READY and e not in taken]
        need = sum(e.size for e in (*taken, *pinned))
        if need > self.limit_bytes:
            beside = f" beside the pinned {', '.join(e.name for e in pinned)}" if pinned else ""
            raise ValueError(
                f"{where}: {', '.join(e.name for e in taken)}{beside} have {need:,} bytes together, {limit}; use "
                f"fewer at a time or raise it"
            )

    def _fits(self, size: int) -> bool:
        """Whether `size` bytes more stay within the limit, after dropping what was used longest ago."""
        idle = [e for e in self._entries.values() if e.state == _READY and not e.users and e.name not in self._pinned]
        while (total := self._total()) + size > self.limit_bytes and idle:
            self._drop(idle.pop(0))
        return total + size <= self.limit_bytes

    def _drop(self, entry: _Entry) -> None:
        entry.lora, entry.storages, entry.state = None, {}, _ABSENT
        self._changed.notify_all()

    def _read(self, entry: _Entry) -> None:
        """Read the file of an entry in state loading. Its state is ready afterwards, or absent where it was larger."""
        lora, error = None, None
        try:
            lora = self._load(entry)
        except BaseException as raised:
            error = raised
            raise
        finally:
            with self._changed:
                self.loads += 1
                if lora is None:
                    self._drop(entry)
                    entry.error = error
                    if self._entries.get(entry.name) is entry:
                        del self._entries[entry.name]
                else:
                    self._keep(entry, lora)
                self._tidy()  # its file may have changed meanwhile, and nobody have asked for the old one
                self._changed.notify_all()

    def _load(self, entry: _Entry) -> Lora:
        path = entry.path
        if self._folder is None:
            lora = files.load(path, self._base, name=entry.name, limits=self._limits)
        else:
            inside = path.relative_to(self._folder)
            lora = files.load(inside, self._base, name=entry.name, limits=self._limits, root=self._folder)
        if _stamp(path) != entry.stamp:
            raise ValueError(f"{shown(path.name)}: changed while it was read; ask for it again")
        return lora

    def _keep(self, entry: _Entry, lora: Lora) -> None:
        storages = _storages(lora)
        size = sum(storages.values())
        fits = size <= entry.size or self._fits(size - entry.size)
        entry.size = size
        if fits:
            entry.lora, entry.storages, entry.state = lora, storages, _READY
        else:  # asked for again with the size that is known now
            entry.state = _ABSENT


def _found(folder: Path) -> dict[str, Path]:
    """Name -> path of the LoRAs that lie in a folder."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if not (path / files.PEFT_CONFIG).is_file() and not list(path.glob(f"*/{files.PEFT_CONFIG}")):
                continue
        elif path.suffix != ".safetensors":
            continue
        name = path.name if path.is_dir() else path.stem
        if name in found:
            raise ValueError(f"library {shown(folder.name)}: {found[name].name} and {path.name} have one name")
        found[name] = path
    return found


def _stamp(path: Path) -> Stamp:
    """What tells one state of a file or PEFT folder from another: of each file name, inode, times and size."""
    try:
        parts = sorted(path.rglob("adapter_*")) if path.is_dir() else [path]
        stats = [(part.name, part.stat()) for part in parts]
    except OSError as error:
        raise ValueError(f"{shown(path.name)}: cannot be read ({error.strerror})") from None
    # The time of change (ctime) is set by the system: a program that sets a file's mtime back does not hide a write.
    return tuple((name, s.st_ino, s.st_mtime_ns, s.st_ctime_ns, s.st_size) for name, s in stats)


def _storages(lora: Lora) -> dict[int, int]:
    """Data pointer -> bytes of the memory that a LoRA's tensors lie in, each piece once."""
    values = (getattr(part, f.name) for part in lora.values() for f in fields(part))
    storages = [value.untyped_storage() for value in values if isinstance(value, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
