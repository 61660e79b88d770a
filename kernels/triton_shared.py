"""What the Triton kernels share: types, powers of two, and the interpreter's trap."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from multilora.kernels import choice

TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def on(device: torch.device):
    """A block in which Triton launches on this device: it takes the current one, not that of its tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The type that sums are kept in."""
    if dtype not in TYPES:
        raise ValueError(f"Triton kernels: {dtype} tensors, wanted one of {', '.join(map(str, TYPES))}")
    return tl.float64 if dtype == torch.float64 else tl.float32


def upcast() -> bool:
    """Whether factors are made wide right after the load: the interpreter's arithmetic in bfloat16 is wrong."""
    return choice.interpreted()


def block(size: int, least: int = 16, most: int = 128) -> int:
    """A power of two that holds `size`, within bounds; tl.dot wants 16 at least."""
    return min(max(triton.next_power_of_2(size), least), most)
