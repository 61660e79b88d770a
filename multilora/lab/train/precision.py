"""Whether bfloat16 pays off on this processor: without instructions for it a training step is several times slower."""

import torch


def fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AMX, AVX-512 BF16, or the Arm extension)."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
