"""The tensors of safetensors files, read and written one at a time: for files larger than one wants in memory."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from multilora.writing import _write

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Stored(Mapping):
    """{name: tensor} of a .safetensors file or of all of them in a folder; a tensor is read when it is asked for.

    layout    name -> (dtype, shape), from the headers
    metadata  the header texts of all files together
    files     the files; names_in(file) are a file's tensors

    Use it in a `with` block, or `close()` it. Raises ValueError for what is no such file, for a tensor kind that torch
    does not have, and when two files of a folder hold one name.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.files = sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else [self.path]
        if not self.files:
            raise ValueError(f"{self.path.name}: no .safetensors files in this folder ({self.path})")
        if not self.path.exists() or self.files[0].suffix != ".safetensors":
            missing = "no such file" if not self.path.exists() else "wanted a .safetensors file or a folder of them"
            raise ValueError(f"{self.path.name}: {missing} ({self.path})")
        self.layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.metadata: dict[str, str] = {}
        self._home: dict[str, Any] = {}
        self._names: dict[Path, list[str]] = {}
        self._open = contextlib.ExitStack()
        try:
            for file in self.files:
                self._enter(file)
        except BaseException:
            self._open.close()
            raise

    def _enter(self, file: Path) -> None:
        try:
            opened = self._open.enter_context(safe_open(file, "pt"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file.name}: not valid safetensors: {error}") from None
        self.metadata.update(opened.metadata() or {})
        self._names[file] = list(opened.keys())
        for name in self._names[file]:
            if name in self._home:
                raise ValueError(f"{self.path.name}: two files of the folder hold {name!r}; wanted one model's shards")
            part = opened.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise ValueError(f"{file.name}: {name!r} is {part.get_dtype()}, which is not read here")
            self._home[name] = opened
            self.layout[name] = (DTYPES[part.get_dtype()], tuple(part.get_shape()))

    def names_in(self, file: Path) -> list[str]:
        return list(self._names[file])

    def __getitem__(self, name: str) -> Tensor:
        return self._home[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)

    def __contains__(self, name: object) -> bool:
        return name in self.layout

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def write_tensors(path: str | Path, layout: Layout, tensors: Iterable[Tensor], texts: Mapping[str, str]) -> Path:
    """A .safetensors file of `tensors`, which come one at a time in the order of `layout`; atomic.

    layout  name -> (dtype, shape) of each; the header is written from it before the first tensor is made
    texts   the header's metadata

    Raises ValueError when a tensor is not what the layout says; then nothing is written.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"{path.name}: the file is named *.safetensors")
    header: dict[str, Any] = {"__metadata__": {str(k): str(v) for k, v in texts.items()}}
    end = 0
    for name, (dtype, shape) in layout.items():
        if dtype not in _CODES:
            raise ValueError(f"{path.name}: {name!r} is {dtype}, which safetensors files do not hold")
        size = dtype.itemsize
        for n in shape:
            size *= n
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[Any]:
        yield struct.pack("<Q", len(text))
        yield text
        for (name, (dtype, shape)), tensor in zip(layout.items(), tensors, strict=True):
            if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
                got = f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f"{path.name}: {name!r} is {got}, announced was {dtype} {list(shape)}")
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            yield memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b""

    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, pieces())
    return path
