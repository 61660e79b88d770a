"""Mean over the passes and guidance in one Triton kernel: every prediction is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from multilora.kernels import plain
from multilora.kernels.triton_shared import accumulator

BLOCK = 1024


@triton.jit
def _mean(y, outputs, factors, size, terms, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=WIDE)
    for n in range(terms):
        each = tl.load(outputs + n * size + i, mask=i < size, other=0.0).to(WIDE)
        total += tl.load(factors + n) * each
    tl.store(y + i, total.to(y.dtype.element_ty), mask=i < size)


@torch.library.custom_op("multilora::guided_mean", mutates_args=())
def guided_mean(outputs: Tensor, mix: Tensor, scale: float) -> Tensor:
    """`guided_mean` of the face."""
    y, outputs = outputs.new_empty(outputs.shape[2:]), outputs.contiguous()
    factors = plain.guided_factors(outputs, mix, scale)
    if y.numel():
        _mean[(triton.cdiv(y.numel(), BLOCK),)](
            y, outputs, factors, y.numel(), len(factors), WIDE=accumulator(outputs.dtype), BLOCK=BLOCK
        )
    return y


@guided_mean.register_fake
def _(outputs: Tensor, mix: Tensor, scale: float) -> Tensor:
    return outputs.new_empty(outputs.shape[2:])


def _keep(ctx, inputs, output) -> None:
    outputs, mix, ctx.scale = inputs
    ctx.save_for_backward(outputs, mix)


def _gradients(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    outputs, mix = ctx.saved_tensors
    both = torch.stack([(1 - ctx.scale) * gradient, ctx.scale * gradient])
    by_mix = (outputs.flatten(1) * both.flatten()).sum(1)
    return mix.to(outputs.dtype).view(-1, *[1] * both.ndim) * both, by_mix.to(mix.dtype), None


guided_mean.register_autograd(_gradients, setup_context=_keep)
