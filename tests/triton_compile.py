"""Run by test_kernels_triton.py: every kernel is compiled to machine code for GPUs that this machine need not have.

On a bare machine, from a checkout: PYTHONPATH=. python3 tests/triton_compile.py
"""

import itertools

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from multilora.kernels import triton_index, triton_rebuild, triton_segments
from multilora.kernels.triton_shared import TYPES, accumulator

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
FLOATS = {"y", "x", "down", "up", "scale", "weight"}  # pointers to the tensors' own type
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory that a program may have


def kernels(dtype):
    """(kernel, its compile-time arguments) as the launchers choose them: rank 16, and the largest tiles."""
    wide = accumulator(dtype)
    most = 32 if dtype == torch.float64 else 64
    few, many = ({"BT": bt, "BI": most, "BR": br, "BO": most} for bt, br in ((16, 16), (64, triton_segments.RANKS)))
    for scaled, add in itertools.product((False, True), repeat=2):
        yield triton_segments._segments, {"SCALED": scaled, "ADD": add, "WIDE": wide, "UPCAST": False, **few}
    yield triton_segments._segments, {"SCALED": True, "ADD": True, "WIDE": wide, "UPCAST": False, **many}
    for tokens, rank in ((1, 16), (64, 64), (64, 256)):
        part, bo = triton_index.sizes(tokens, 2, 4096, 4096, rank)
        yield triton_index._shrink, {"PART": part, "WIDE": wide, "BI": min(part, 4096 // rank), "BR": rank}
        yield triton_index._expand, {"ADD": True, "WIDE": wide, "BO": bo, "BR": rank, "BP": min(4096 // part, 16)}
    kinds = {"KIND": TYPES[dtype], "DOWN": TYPES[dtype], "UP": TYPES[dtype], "WIDE": wide}
    kinds |= {"PRECISION": triton_rebuild.precision(torch.promote_types(dtype, torch.float32)),
              "COUNT": triton_rebuild.COLUMNS}  # fmt: skip
    for even in (False, True):
        tile = triton_rebuild.HALF if even and dtype.itemsize == 2 else triton_rebuild.TILE
        yield triton_rebuild._rebuild, {**kinds, "EVEN": even, **tile}


def source(kernel, constants, dtype, aligned):
    """aligned: as Triton specialises a launch on contiguous tensors of even sizes."""
    found, given, hints = {}, dict(constants), {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            found[name] = "constexpr"
            continue
        if aligned and name in ("y_o", "x_i", "d_i", "u_o"):
            found[name], given[name] = "constexpr", 1
            continue
        if name == "h" or (name == "scale" and kernel is triton_rebuild._rebuild):
            found[name] = "*fp64" if dtype == torch.float64 else "*fp32"
        elif name in FLOATS:
            found[name] = f"*{NAMES[dtype]}"
        elif name in ("index", "table"):
            found[name] = "*i64"
        elif name == "layer_of":
            found[name] = "*i32"
        else:
            found[name] = "fp32" if name == "alpha" else "i32"
        if aligned and name != "alpha":
            hints[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, found, constexprs=given, attrs=hints)


def main():
    done, shared = 0, {}
    for architecture, dtype, aligned in itertools.product(SHARED, NAMES, (False, True)):
        for kernel, constants in kernels(dtype):
            options = {key: constants[key] for key in ("num_warps", "maxnreg") if key in constants}
            constants = {key: value for key, value in constants.items() if key not in options}
            made = source(kernel, constants, dtype, aligned)
            compiled = triton.compile(made, target=GPUTarget("cuda", architecture, 32), options=options)
            which = kernel.__name__, NAMES[dtype], architecture
            assert len(compiled.asm["cubin"]) > 1000, (which, constants)
            assert compiled.metadata.shared <= SHARED[architecture], (which, constants, compiled.metadata.shared)
            shared[which] = max(shared.get(which, 0), compiled.metadata.shared)
            done += 1
    for which, size in shared.items():
        print(*which, size, "bytes of shared memory at most")
    print(f"{done} compiled with Triton {triton.__version__}")


if __name__ == "__main__":
    main()
