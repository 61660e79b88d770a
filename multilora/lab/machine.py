"""What a measurement ran on, in words."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path


@cache
def processor() -> str:
    """The CPU's model as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def machine() -> str:
    """ "AMD EPYC, 2 cores, torch 2.15.0" """
    import torch

    return f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__.partition('+')[0]}"
