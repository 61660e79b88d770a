"""The Triton kernels in Triton's interpreter, against float64; their custom ops; compiled for GPUs that are not here.

The interpreter is chosen when Triton is imported, so these tests run in a process of their own: pytest on the file
triton_kernels.py, with TRITON_INTERPRET=1.
"""

import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from multilora.kernels import choice
from multilora.kernels import routed as kernels

ROOT = Path(__file__).parents[1]


def python(*words, **environment):
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=given, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize("marked", ["not long", "long"])
def test_in_the_interpreter(marked):
    out = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", marked,
                 "tests/triton_kernels.py", TRITON_INTERPRET="1")  # fmt: skip
    assert " passed" in out
    assert "failed" not in out
    assert "skipped" not in out


@pytest.mark.long
def test_every_kernel_compiles_for_gpus_in_every_type():
    assert "compiled" in python("tests/triton_compile.py")


X, DOWN, UP = torch.ones(4, 9), torch.ones(2, 3, 9), torch.ones(2, 7, 3)


def test_triton_without_a_gpu_is_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"routed_segments: implementation='triton': .*the tensors are on cpu"):
        kernels.routed_segments(X, DOWN, UP, implementation="triton")
    monkeypatch.setenv(choice.VARIABLE, "triton")
    with pytest.raises(ValueError, match=r"routed_segments: implementation='triton': .*the tensors are on cpu"):
        kernels.routed_segments(X, DOWN, UP)
    monkeypatch.setattr(choice, "_version", lambda: "")
    with pytest.raises(ValueError, match="Triton is not installed"):
        kernels.routed_segments(X, DOWN, UP)
    monkeypatch.setattr(choice, "_version", lambda: "4.0.1")
    with pytest.raises(ValueError, match=r"Triton 4\.0\.1 is installed, the kernels are for 3.6 to 3.9"):
        kernels.routed_segments(X, DOWN, UP)
    monkeypatch.setenv(choice.VARIABLE, "fast")
    with pytest.raises(ValueError, match="MULTILORA_KERNELS='fast': wanted one of torch, reference, triton"):
        kernels.routed_segments(X, DOWN, UP)


def test_what_has_no_triton_kernel_says_so_when_asked_for_by_name(monkeypatch):
    x, down, up, row = torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3), torch.ones(4, 3), torch.ones(1)
    with pytest.raises(ValueError, match="routed_conv: there is no Triton kernel for it"):
        kernels.routed_conv(x, down, up, row, (3,), implementation="triton")
    monkeypatch.setenv(choice.VARIABLE, "triton")  # a wish for the whole process leaves it to PyTorch, as doctor says
    assert kernels.routed_conv(x, down, up, row, (3,)).shape == (1, 4, 3, 3)


def test_the_process_may_ask_for_the_reference(monkeypatch):
    want = kernels.routed_segments(X, DOWN, UP)
    monkeypatch.setenv(choice.VARIABLE, "reference")
    monkeypatch.setattr(kernels.reference, "routed_segments", lambda *_: "the reference")
    assert kernels.routed_segments(X, DOWN, UP) == "the reference"
    assert torch.equal(kernels.routed_segments(X, DOWN, UP, implementation="torch"), want)


def test_on_cuda_devices_triton_rebuilds_weights_unasked(monkeypatch):
    x = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.setattr(choice, "_version", lambda: "3.9.0")
    assert choice.chosen(None, "rebuild_", x) == "triton"
    assert choice.chosen(None, "routed", x) == "torch"
    assert choice.chosen("torch", "rebuild_", x) == "torch"
    assert choice.chosen(None, "rebuild_", X) == "torch"
    monkeypatch.setenv(choice.VARIABLE, "torch")
    assert choice.chosen(None, "rebuild_", x) == "torch"
    monkeypatch.delenv(choice.VARIABLE)
    monkeypatch.setattr(choice, "_version", lambda: "4.0.1")
    assert choice.chosen(None, "rebuild_", x) == "torch"


def test_one_line_says_what_runs_and_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(choice, "_version", lambda: "3.9.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choice.described() == "plain PyTorch runs; Triton kernels cannot run: no CUDA device"
    monkeypatch.setenv(choice.VARIABLE, "triton")
    assert choice.described() == "Triton 3.9.0 asked for by MULTILORA_KERNELS: refused, no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choice.described() == "Triton 3.9.0 asked for by MULTILORA_KERNELS: runs on CUDA devices"
    monkeypatch.delenv(choice.VARIABLE)
    told = "plain PyTorch runs, Triton 3.9.0 for rebuild_; MULTILORA_KERNELS=triton asks for Triton 3.9.0"
    assert choice.described() == told
    monkeypatch.setenv(choice.VARIABLE, "torch")
    assert choice.described() == "plain PyTorch runs; MULTILORA_KERNELS=triton asks for Triton 3.9.0"


def test_doctor_says_it_and_calls_a_wish_that_cannot_be_met_broken(monkeypatch):
    doctor = importlib.import_module("multilora.cli.doctor")  # the command of that name hides the module elsewhere

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(choice, "_version", lambda: "3.9.0")
    found = doctor.CHECKS["adapted layers"]()
    assert (found.state, found.found) == ("ok", "plain PyTorch runs; Triton kernels cannot run: no CUDA device")
    monkeypatch.setenv(choice.VARIABLE, "triton")
    found = doctor.CHECKS["adapted layers"]()
    assert (found.state, found.found) == ("broken", choice.described())
    assert "unset MULTILORA_KERNELS" in found.advice
