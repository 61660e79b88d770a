"""Run by test_kernels_triton.py: every kernel is compiled to machine code for GPUs that this machine need not have."""

import itertools

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from multilora.kernels import triton_index, triton_rebuild, triton_segments
from multilora.kernels.triton_shared import TYPES, accumulator

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
FLOATS = {"y", "x", "down", "up", "scale", "weight"}  # pointers to the tensors' own type


def kernels(dtype):
    """(kernel, its compile-time arguments) as the launchers choose them for a layer of 320, rank 16."""
    wide = accumulator(dtype)
    tiles = {"WIDE": wide, "UPCAST": False, "BT": 32, "BI": 64, "BR": 16, "BO": 64}
    for scaled, add in itertools.product((False, True), repeat=2):
        yield triton_segments._segments, {"SCALED": scaled, "ADD": add, **tiles}
    yield triton_index._shrink, {"PART": 1024, "WIDE": wide, "BI": 128, "BR": 16}
    yield triton_index._expand, {"ADD": True, "WIDE": wide, "BO": 64, "BR": 16}
    kinds = {"KIND": TYPES[dtype], "FACTORS": TYPES[dtype], "SCALES": TYPES[dtype], "WIDE": wide}
    yield triton_rebuild._rebuild, {**kinds, "COUNT": triton_rebuild.COLUMNS, "TILE": triton_rebuild.TILE, "BR": 32}


def signature(kernel, constants, dtype):
    found = {}
    for name in kernel.arg_names:
        if name in constants:
            found[name] = "constexpr"
        elif name == "h":
            found[name] = "*fp64" if dtype == torch.float64 else "*fp32"
        elif name in FLOATS:
            found[name] = f"*{NAMES[dtype]}"
        elif name in ("index", "table", "layer_of"):
            found[name] = "*i64"
        else:
            found[name] = "fp32" if name == "alpha" else "i32"
    return found


def main():
    done = 0
    for architecture, dtype in itertools.product((80, 90), NAMES):
        for kernel, constants in kernels(dtype):
            source = ASTSource(kernel, signature(kernel, constants, dtype), constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
            assert len(compiled.asm["cubin"]) > 1000, (kernel, dtype, architecture)
            done += 1
    print(f"{done} compiled")


if __name__ == "__main__":
    main()
