"""Which code runs an operation of `routed`: plain PyTorch, the reference or Triton; and why.

Plain PyTorch runs unless something else is asked for, by the argument `implementation` or for the whole process by the
environment variable MULTILORA_KERNELS; on CUDA devices Triton runs UNASKED, where it was measured to be many times
faster (benchmarks/gpu.md). What was asked for runs or is refused with the reason; nothing falls back in silence.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import shutil
import sysconfig

import torch
from torch import Tensor

IMPLEMENTATIONS = ("torch", "reference", "triton")
VARIABLE = "MULTILORA_KERNELS"
UNASKED = ("rebuild_",)  # one launch for all layers
TESTED = ((3, 6), (3, 9))  # versions of Triton: torch 2.11 comes with the first, torch 2.15 with the last


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU, for checking (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def asked() -> str:
    """The implementation that this process asks for. Raises ValueError for an unknown one."""
    name = os.environ.get(VARIABLE) or "torch"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{VARIABLE}={name!r}: wanted one of {', '.join(IMPLEMENTATIONS)}")
    return name


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def why_not_triton(device: torch.device | None = None) -> str:
    """Why Triton kernels cannot run (on tensors of this device, or at all), or an empty string."""
    version = _version()
    if not version:
        return "Triton is not installed"
    if not TESTED[0] <= tuple(int(part) for part in version.split(".")[:2]) <= TESTED[1]:
        span = " to ".join(".".join(map(str, v)) for v in TESTED)
        return f"Triton {version} is installed, the kernels are for {span}"
    if interpreted():
        return ""
    if device is None:
        return "" if torch.cuda.is_available() else "no CUDA device"
    return "" if device.type == "cuda" else f"the tensors are on {device.type}, Triton kernels run on CUDA devices"


@functools.cache
def why_not_unasked() -> str:
    """Why Triton should not run before somebody asks for it, or an empty string: what it needs to build its launchers,
    and the GPUs that the kernels were tried on."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if not compiler:
        return "no C compiler, which Triton needs"
    if not os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        return "no Python.h, which Triton needs"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "a GPU below compute capability 8.0"
    return ""


def chosen(implementation: str | None, operation: str, x: Tensor, has_triton: bool = True) -> str:
    """The implementation that runs an operation on x; None asks what the process asks for.

    Raises ValueError with the reason where it cannot run.
    """
    name = asked() if implementation is None else implementation
    if implementation is None and operation in UNASKED and x.is_cuda and not os.environ.get(VARIABLE):
        name = "torch" if why_not_triton(x.device) or why_not_unasked() else "triton"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {name!r}: wanted one of {', '.join(IMPLEMENTATIONS)}")
    if name != "triton":
        return name
    if not has_triton:
        if implementation is None:
            return "torch"
        raise ValueError(f"{operation}: there is no Triton kernel for it; use implementation='torch'")
    reason = why_not_triton(x.device)
    if reason:
        raise ValueError(f"{operation}: implementation='triton': {reason}; use implementation='torch'")
    return name


def described() -> str:
    """One line on what runs in this process and why."""
    name, reason, version = asked(), why_not_triton(), _version()
    if name == "triton":
        where = "in the interpreter, slow and for checking" if interpreted() else "on CUDA devices"
        return f"Triton {version} asked for by {VARIABLE}: " + (f"refused, {reason}" if reason else f"runs {where}")
    plain = "plain PyTorch runs" if name == "torch" else "the reference runs"
    if reason:
        return f"{plain}; Triton kernels cannot run: {reason}"
    if not os.environ.get(VARIABLE) and not why_not_unasked():
        plain += f", Triton {version} for {', '.join(UNASKED)}"
    return f"{plain}; {VARIABLE}=triton asks for Triton {version}"
