"""Raw bytes of a safetensors file -> tensors, metadata and hash, strictly read. What the tensors mean is files.py's.

The one place where the bytes of a LoRA file, which may come from a stranger, are looked at, and the one function that
opens a path. A file is read once, from one descriptor, into memory of its own: it may be replaced, cut or rewritten
afterwards (a memory map would then change under the reader or kill the process with SIGBUS). Its header is parsed and
checked here and nowhere else, so no second parser can see other tensors.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import re
import stat
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from multilora.limits import LOCAL, Limits, shown

# First bytes -> what such a file is. A header's length could begin alike, but would lie beyond the end of the file.
KINDS = {
    b"PK": "a zip or a PyTorch pickle",
    b"\x80": "a Python pickle",
    b"(": "a Python pickle",
    b"c__builtin__\n": "a Python pickle",
    b"cbuiltins\n": "a Python pickle",
    b"cposix\n": "a Python pickle",
    b"cos\n": "a Python pickle",
    b"version https://git-lfs": "a Git LFS pointer: the real file was not downloaded",
    b"<": "a web page",
    b"GGUF": "a GGUF model",
    b"{": "JSON text",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x7fELF": "a program",
    b"#!": "a script",
}
# What the same is by its name.
SUFFIXES = {
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".th"), "a pickle, which is never read"),
    **dict.fromkeys((".zip", ".tar", ".gz", ".7z", ".rar"), "an archive, unpack it first"),
    ".gguf": "a GGUF model, which is not read",
    ".onnx": "an ONNX model, which is not read",
}
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
# Whole numbers are read as an alpha and as nothing else.
WHOLE = {"U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
_OTHERS = {
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
_FIELDS = {"dtype", "shape", "data_offsets"}
_NAME = re.compile(r"[A-Za-z0-9_.-]+").fullmatch
_FORMAT_HEADER = 100_000_000  # bytes; the format's own bound, for bases


# -- paths ----------------------------------------------------------------------------------------------------------


def located(path: str | Path, root: str | Path | None = None) -> Path:
    """The existing file or folder that a path means; nothing is opened, nothing is ever downloaded.

    root  a library's folder: the path is then relative to it, and may not leave it by "..", absolute or through a
          symbolic link. Links inside it are followed. None takes any path of the machine

    Raises ValueError with the path's last name and the reason.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise ValueError(f"a LoRA file is named by a path, got {type(path).__name__}")
    name = shown(Path(text).name or text)
    if "\0" in text:
        raise ValueError(f"{name}: a path holds no NUL character")
    if root is None:
        found = Path(text).expanduser()
    else:
        parts = re.split(r"[/\\]", text)
        if not text or Path(text).is_absolute() or parts[0].endswith(":") or parts[0] in ("", "~") or ".." in parts:
            wanted = "give a path below its folder, without '..' and not absolute"
            raise ValueError(f"{name}: outside the library: {wanted}")
        found = Path(root).expanduser() / text
    try:
        real = Path(os.path.realpath(found, strict=True))
        top = None if root is None else Path(os.path.realpath(Path(root).expanduser(), strict=True))
    except FileNotFoundError:
        hub = root is None and re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.endswith(".safetensors")
        hint = "; names on a hub are never looked up here, download the file first" if hub else ""
        raise ValueError(f"{name}: no such file ({shown(found, 300)}){hint}") from None
    except OSError as error:
        raise ValueError(f"{name}: this path cannot be followed ({error.strerror})") from None
    if top is not None and top not in real.parents:
        raise ValueError(f"{name}: outside the library: it leads to another folder")
    return real if root is not None else found


def opened(path: Path, *, where: str, root: str | Path | None = None) -> tuple[BinaryIO, int]:
    """(stream, size in bytes) of a regular file. With a root no link is followed on the way down from it.

    Raises ValueError, beginning with `where`, for pipes, devices, folders and what cannot be read.
    """
    # A pipe would block the open, a device may act on it: look first, and again at what really was opened.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        _regular(os.stat(path), where)
        handle = os.open(path, flags) if root is None else _open_below(_real(root), path, flags)
    except OSError as error:
        link = "; no link is followed inside a library" if root is not None and error.errno == errno.ELOOP else ""
        raise ValueError(f"{where}: cannot be read ({error.strerror}){link}") from None
    stream = os.fdopen(handle, "rb")
    try:
        status = os.fstat(handle)
        _regular(status, where)
    except ValueError:
        stream.close()
        raise
    return stream, status.st_size


def _real(root: str | Path) -> Path:
    return Path(os.path.realpath(Path(root).expanduser()))


def _regular(status: os.stat_result, where: str) -> None:
    kinds = {
        "a folder": stat.S_ISDIR, "a named pipe": stat.S_ISFIFO, "a device": stat.S_ISCHR,
        "a disk": stat.S_ISBLK, "a socket": stat.S_ISSOCK,
    }  # fmt: skip
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for name, test in kinds.items() if test(status.st_mode)), "something else")
        raise ValueError(f"{where}: not a regular file, this is {kind}")


def _open_below(root: Path, path: Path, flags: int) -> int:
    """Open a real path folder by folder from its root, so that no link that appears meanwhile leads out of it."""
    if root not in path.parents:
        raise ValueError(f"{shown(path.name)}: outside the library")
    if os.open not in os.supports_dir_fd:
        return os.open(path, flags)
    *folders, last = path.relative_to(root).parts
    below = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for folder in folders:
            inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=below)
            os.close(below)
            below = inner
        return os.open(last, flags | os.O_NOFOLLOW, dir_fd=below)
    finally:
        os.close(below)


# -- JSON -----------------------------------------------------------------------------------------------------------


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"key {shown(twice)} occurs twice")
    return seen


def parse_json(text: str | bytes, *, where: str, limits: Limits = LOCAL) -> Any:
    """The value of a JSON text that nobody vouches for.

    Raises ValueError, beginning with `where`, for what is too long, too deep, no JSON, or names a field twice.
    """
    if len(text) > limits.text_bytes:
        raise ValueError(f"{where} has {len(text):,} bytes, above the limit text_bytes={limits.text_bytes:,}")
    value = _json(text, where)
    if _deeper(value, limits.json_depth):
        raise ValueError(f"{where} is nested too deep, the limit is json_depth={limits.json_depth}")
    return value


def _json(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(f"{where} is no JSON that is read here: nested too deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON ({error})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no JSON (byte {error.start} is not UTF-8)") from None
    except ValueError as error:  # a name that occurs twice, a number of thousands of digits
        raise ValueError(f"{where} is no JSON that is read here ({error})") from None


def _deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested more than `most` deep."""
    level = [value]
    for _ in range(most + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return any(isinstance(v, (dict, list)) for v in level)


# -- header ---------------------------------------------------------------------------------------------------------


def header_length(start: bytes, size: int, where: str, most: int = _FORMAT_HEADER) -> int:
    """Bytes of the JSON header, from the first bytes (64 of them, if there are so many) of a file of `size` bytes.

    Raises ValueError, beginning with `where`, that says what the file is when it is none. Nothing is allocated.
    """
    length = struct.unpack("<Q", start[:8])[0] if size >= 8 else size
    if length > size - 8:
        plain = start.lstrip(b"\xef\xbb\xbf \t\r\n")
        for first, kind in KINDS.items():
            if start.startswith(first) or (first == b"<" and plain.startswith(first)):
                raise ValueError(f"{where}: not safetensors, this is {kind}; only .safetensors files are read")
    if size < 10:
        raise ValueError(f"{where}: not safetensors, {size} bytes are too short for a header")
    if length > size - 8:
        raise ValueError(f"{where}: not safetensors or truncated, its header would be {length} bytes of {size - 8}")
    if length > most:
        raise ValueError(f"{where}: its header has {length:,} bytes, above the limit header_bytes={most:,}")
    return length


def read_header(data: bytes, size: int, where: str) -> dict[str, Any]:
    """The JSON header at the start of a safetensors file of `size` bytes, for a base: entries are not checked.

    Raises ValueError, beginning with `where`, that says what the file is when it is none.
    """
    return _header(data[8 : 8 + header_length(data[:64], size, where)], where)


def _header(raw: bytes, where: str) -> dict[str, Any]:
    header = _json(raw, f"{where}: not safetensors, its header")
    if not isinstance(header, dict):
        raise ValueError(f"{where}: not safetensors, its header is a {type(header).__name__}, wanted an object")
    return header


def _metadata(header: dict[str, Any], where: str) -> dict[str, str]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{where}: __metadata__ in the header must map names to texts")
    return metadata


def _named(key: str, where: str, limits: Limits) -> None:
    if len(key) > limits.key_chars or not _NAME(key):
        wanted = f"wanted 1 to {limits.key_chars} letters, digits, dots, underscores and hyphens (limit key_chars)"
        raise ValueError(f"{where}: key {shown(key)} has {len(key)} characters: {wanted}")
    if "__" in key and re.search(r"(^|\.)__\w*__(\.|$)", key):
        raise ValueError(f"{where}: key {key}: names of Python's own (__...__) are no layers")


def _entry(key: str, entry: Any, where: str, limits: Limits) -> tuple[int, int, str, torch.dtype, list[int]]:
    """(begin, end, key, dtype, shape) of a tensor, checked on its own. Files have thousands: the good way is fast."""
    _named(key, where, limits)
    if type(entry) is not dict or entry.keys() != _FIELDS:
        missing = _FIELDS - (entry.keys() if isinstance(entry, dict) else set())
        why = f"lacks its {', '.join(sorted(missing))}" if missing else "has fields that no safetensors file has"
        raise ValueError(f"{where}: key {key}: its entry in the header {why}")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    lists = type(shape) is list and type(offsets) is list and len(offsets) == 2
    count, low, high = 1, 1, 1
    for n in (*shape, *offsets) if lists else (None,):
        if type(n) is not int or n < 0:
            wanted = "shape and data_offsets must be lists of whole numbers of at least 0"
            raise ValueError(f"{where}: key {key}: {wanted}")
    if len(shape) > limits.ndim:
        raise ValueError(f"{where}: key {key} has {len(shape)} dimensions, above the limit ndim={limits.ndim}")
    for n in shape:
        count, low, high = count * n, min(low, n), max(high, n)
    if high > limits.dimension:
        what = f"shape {shown(shape)} is above the limit dimension={limits.dimension:,}"
        raise ValueError(f"{where}: key {key}: {what}")
    if low < 1:
        raise ValueError(f"{where}: key {key}: shape {shape} holds no values")
    kind = FLOATS.get(dtype) if type(dtype) is str else None
    if kind is None:
        kind = _other(key, dtype, count, where)
    begin, end = offsets
    if end - begin != count * kind.itemsize:
        wanted = f"{dtype} of shape {shape} takes {count * kind.itemsize}"
        raise ValueError(f"{where}: key {key}: data_offsets {shown(offsets)} are {shown(end - begin)} bytes, {wanted}")
    return begin, end, key, kind, shape


def _other(key: str, dtype: Any, count: int, where: str) -> torch.dtype:
    """The dtype of an alpha that is a whole number; ValueError for everything else."""
    if not isinstance(dtype, str) or dtype not in WHOLE | _OTHERS:
        raise ValueError(f"{where}: key {key}: not valid safetensors, its dtype is {shown(repr(dtype), 40)}")
    if dtype in WHOLE and key.endswith(".alpha") and count == 1:
        return WHOLE[dtype]
    found = (WHOLE | _OTHERS)[dtype]
    raise ValueError(f"{where}: key {key} is {found} ({dtype}), wanted F16, BF16, F32 or F64; convert it first")


def _entries(header: Mapping[str, Any], size: int, where: str, limits: Limits) -> list[tuple]:
    """The tensors of a header in the order of their bytes: they tile the `size` bytes after it exactly."""
    if len(header) > limits.tensors:
        raise ValueError(f"{where}: {len(header):,} tensors, above the limit tensors={limits.tensors:,}")
    entries = sorted((_entry(key, entry, where, limits) for key, entry in header.items()), key=lambda e: e[:2])
    at = 0
    for begin, end, key, *_ in entries:
        if begin != at:
            kind = "overlap those before" if begin < at else "leave a hole"
            raise ValueError(f"{where}: key {key}: data_offsets {shown([begin, end])} {kind}, the bytes go on at {at}")
        at = end
    return entries


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: the small objects of a large header set it off again and again."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


# -- tensors --------------------------------------------------------------------------------------------------------


def read_tensors(
    path: Path, limits: Limits = LOCAL, *, root: str | Path | None = None, where: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """(tensors by key, metadata, sha256) of a safetensors file; every tensor owns its memory.

    where  what errors call the file; default is its name

    Nothing is allocated before the whole header is checked. Raises ValueError naming file, key or field, and limit.
    """
    where = where or shown(path.name)
    stream, size = opened(path, where=where, root=root)
    digest = hashlib.sha256()
    with stream:
        if size > limits.file_bytes:
            raise ValueError(f"{where}: {size:,} bytes, above the limit file_bytes={limits.file_bytes:,}")
        start = _exactly(stream, min(64, size), where)
        length = header_length(start, size, where, limits.header_bytes)
        raw = start[8 : 8 + length] + _exactly(stream, max(0, length + 8 - len(start)), where)
        with _uncollected():
            header = _header(raw, where)
            if raw[:1] != b"{":
                raise ValueError(f"{where}: not safetensors, its header begins with {raw[:1]!r}, wanted an object")
            metadata = _metadata(header, where)
            entries = _entries(header, size - 8 - length, where, limits)
        said = 8 + length + (entries[-1][1] if entries else 0)
        if said != size:
            raise ValueError(f"{where}: truncated or overlong, has {size} bytes, its header says {said}")
        digest.update(start[:8] + raw)
        stream.seek(8 + length)
        tensors = {}
        for begin, end, key, dtype, shape in entries:
            flat = torch.empty(end - begin, dtype=torch.uint8)
            data = memoryview(flat.numpy())
            got = stream.readinto(data)
            if got != end - begin:
                raise ValueError(f"{where}: was cut while it was read, at byte {8 + length + begin + got} of {size}")
            digest.update(data)
            tensors[key] = flat.view(dtype).reshape(shape)
    return {key: tensors[key] for key in header}, metadata, digest.hexdigest()


def _exactly(stream: BinaryIO, count: int, where: str) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise ValueError(f"{where}: was cut while it was read")
    return data


def read_json(path: Path, limits: Limits = LOCAL, *, root: str | Path | None = None, where: str | None = None) -> Any:
    """The value in a JSON file that nobody vouches for; ValueError, beginning with `where`, as for parse_json."""
    where = where or shown(path.name)
    stream, size = opened(path, where=where, root=root)
    with stream:
        if size > limits.text_bytes:
            raise ValueError(f"{where} has {size:,} bytes, above the limit text_bytes={limits.text_bytes:,}")
        return parse_json(stream.read(limits.text_bytes + 1), where=where, limits=limits)
