"""LoRAtorio: in each patch, the LoRA that moves the prediction furthest from the base's has most to say (2508.11624).

    c_i = cos(e_i, e_base) in a patch, over its channels and positions
    prediction = sum_i Omega_i e_i,   Omega = softmax_i(-c_i / temperature), the same for all positions of a patch

The shares sum to 1 as Composite's do. Conditional and unconditional predictions are weighed by their own patches each.
The paper also draws the unconditional one half way to the base's; its own ablation finds nothing from that, and
guidance-distilled models have none, so it is left out, as is its choice of LoRAs from a pool at each step. The
temperature is ours: the paper's was not at hand.
"""

from typing import Annotated, Any

from multilora.method import Opt, method
from multilora.plan import Moment, Pass, one_hot
from multilora.predictions import batched


@method(
    title="One pass per LoRA; each patch of the picture listens most to the LoRA that changes it most",
    paper="https://arxiv.org/abs/2508.11624",
    cost="k + 1",
    laws=("single", "zero", "gauge", "permutation"),
)
def loratorio(
    loras,
    *,
    patch: Annotated[int, Opt("side of a patch in positions of the latents; tokens are patches already", 1)] = 2,
    temperature: Annotated[float, Opt("of the shares: low gives a patch to one LoRA", minimum=1e-6)] = 0.02,
):
    """A base pass that only compares, and k one-hot passes. One LoRA needs no comparison.

    Predictions [B, channels, .., H, W] have patches of H and W; [B, tokens, channels] (FLUX, Qwen-Image, logits) have
    a share per token.
    """
    k = len(loras)

    def plan(moment: Moment) -> list[Pass]:
        own = [Pass(one_hot(moment.weights, i)) for i in range(k)]
        return own if k == 1 else [Pass((0.0,) * k, mix=0.0), *(Pass(p.row, mix=1.0 / k) for p in own)]

    def combine(outputs: list[Any], moment: Moment) -> Any:
        return outputs[0] if k == 1 else batched(lambda o: weighed(o, patch, temperature), outputs)

    plan.combine = combine
    return plan


def weighed(outputs, patch: int, temperature: float):
    """sum_i Omega_i e_i of outputs [base, e_1, .., e_k], tensors [B, C, .., H, W] or [B, tokens, C]."""
    import torch

    wide = torch.promote_types(outputs[0].dtype, torch.float32)
    base, *own = [o.to(wide) for o in outputs]
    channels = -1 if base.ndim == 3 else 1

    def product(a, b):
        """The scalar product of every patch, at each of its positions."""
        found = (a * b).sum(channels, keepdim=True)
        return found if base.ndim == 3 or patch == 1 else _pooled(found, patch)

    tiny = torch.finfo(wide).tiny
    size = product(base, base)
    cosines = [product(e, base) / (product(e, e) * size).clamp(min=tiny).sqrt() for e in own]
    shares = torch.softmax(-torch.stack(cosines) / temperature, 0)
    return (shares * torch.stack(own)).sum(0).to(outputs[0].dtype)


def _pooled(values, patch: int):
    """The mean over patches of the last two dimensions, spread over each patch; those at the edge may be smaller."""
    from torch.nn.functional import avg_pool2d

    height, width = values.shape[-2:]
    found = avg_pool2d(values.reshape(-1, 1, height, width), patch, ceil_mode=True)
    found = found.repeat_interleave(patch, -2).repeat_interleave(patch, -1)[..., :height, :width]
    return found.reshape(values.shape)
