"""Raw bytes of a safetensors file -> tensors, metadata and hash, strictly read. What the tensors mean is files.py's.

The one place where bytes of a LoRA file, which may come from a stranger, are looked at.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load as parse_safetensors
from torch import Tensor


def read_header(data: bytes, size: int, where: str) -> dict[str, Any]:
    """The JSON header at the start of a safetensors file of `size` bytes, strictly read.

    Raises ValueError, beginning with `where`, that says what the file is when it is none.
    """
    kinds = {
        b"PK": "a zip or a PyTorch pickle",
        b"\x80": "a Python pickle",
        b"version https://git-lfs": "a Git LFS pointer: the real file was not downloaded",
        b"<": "a web page",
        b"GGUF": "a GGUF model",
    }
    for start, kind in kinds.items():
        # A header's length could begin with the same bytes, but then it lies beyond the end of the file.
        if data.startswith(start) and (size < 8 or struct.unpack("<Q", data[:8])[0] > size):
            raise ValueError(f"{where}: not safetensors, this is {kind}; only .safetensors files are read")
    if size < 10:
        raise ValueError(f"{where}: not safetensors, {size} bytes are too short for a header")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(size - 8, 100_000_000):
        raise ValueError(f"{where}: not safetensors or truncated, its header would be {length} bytes of {size - 8}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for name, value in pairs:
            if name in seen:
                raise ValueError(f"{where}: key {name} occurs twice in the header")
            seen[name] = value
        return seen

    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=once)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not safetensors, its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{where}: not safetensors, its header is a {type(header).__name__}, wanted an object")
    return header


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Tensors, metadata and sha256 of a file that is read once."""
    if not path.is_file():
        raise ValueError(f"{path.name}: no such file ({path})")
    data = path.read_bytes()
    header = read_header(data[:100_000_008], len(data), path.name)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{path.name}: __metadata__ in the header must map names to texts")
    (length,) = struct.unpack("<Q", data[:8])
    try:
        ends = [int(entry["data_offsets"][1]) for entry in header.values()]
    except (TypeError, KeyError, IndexError, ValueError):
        raise ValueError(f"{path.name}: an entry of the header lacks its data_offsets") from None
    if 8 + length + max(ends, default=0) != len(data):
        wanted = 8 + length + max(ends, default=0)
        raise ValueError(f"{path.name}: truncated or overlong, has {len(data)} bytes, its header says {wanted}")
    try:
        tensors = parse_safetensors(data)
    except (safetensors.SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path.name}: not valid safetensors: {error}") from None
    return tensors, metadata, hashlib.sha256(data).hexdigest()
