"""Frequency split: in each band of frequencies, the LoRAs that change it most are heard; our own.

    d_i = e_i - base          E_i(b) = mean power of d_i in band b, divided by the mean over the bands
    prediction = base + sum_i F^-1[ (E_i(b) / max_j E_j(b))^sharpness F[d_i] ]

LoRAs differ in the frequencies that they act on: styles and textures in high ones, backgrounds and shapes in low ones
(arXiv 2502.04923, section 3, which uses it to order turns). In a plain sum of differences all of them speak in all
bands. Here the one whose change has most of its power in a band keeps it whole, and the others step back there.
"""

from typing import Annotated, Any

from multilora.method import Opt, method
from multilora.plan import Moment, Pass, one_hot


@method(
    title="Sum of differences in which each band of frequencies belongs to the LoRAs that change it most",
    paper="multilora",
    cost="k + 1",
    laws=("single", "zero", "gauge", "permutation"),
)
def frequency_split(
    loras,
    *,
    bands: Annotated[int, Opt("rings of equal width, from slow changes over the picture to fine ones", 2, 64)] = 4,
    sharpness: Annotated[
        float, Opt("0: the sum of differences; 1: by share of power; more: a band to its loudest LoRA", 0.0, 64.0)
    ] = 1.0,
):
    """A base pass that only compares, and k one-hot passes. One LoRA needs no comparison.

    Predictions [B, channels, .., H, W] have the frequencies of H and W; [B, tokens, channels] (FLUX, Qwen-Image,
    logits) those along the tokens. Bands and powers are each sample's own, summed over its channels.
    """
    k = len(loras)

    def plan(moment: Moment) -> list[Pass]:
        own = [Pass(one_hot(moment.weights, i), mix=1.0) for i in range(k)]
        return own if k == 1 else [Pass((0.0,) * k, mix=1.0 - k), *own]

    def combine(outputs: list[Any], moment: Moment) -> Any:
        if k == 1:
            return outputs[0]
        if isinstance(outputs[0], list):  # samples without a batch dimension
            return [split([p[None] for p in each], bands, sharpness)[0] for each in zip(*outputs, strict=True)]
        return split(outputs, bands, sharpness)

    plan.combine = combine
    return plan


def split(outputs, bands: int, sharpness: float):
    """The prediction out of [base, e_1, .., e_k], tensors [B, C, .., H, W] or [B, tokens, C]."""
    import torch

    wide = torch.promote_types(outputs[0].dtype, torch.float32)
    base, *own = [o.to(wide) for o in outputs]
    where = (1,) if base.ndim == 3 else (-2, -1)
    waves = torch.fft.fftn(torch.stack(own) - base, dim=[d if d < 0 else d + 1 for d in where])  # [k, B, ..]
    ring = rings([base.shape[d] for d in where], bands).to(base.device)
    ring = ring[:, None] if base.ndim == 3 else ring
    power = waves.abs().square()
    here = torch.zeros((*power.shape[:2], bands), dtype=wide, device=base.device)  # [k, B, bands]
    for band in range(bands):
        inside = (ring == band).expand(power.shape[2:])
        if inside.any():
            here[..., band] = power[:, :, inside].mean(-1)
    loud = here / here.mean(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
    share = (loud / loud.amax(0).clamp(min=torch.finfo(wide).tiny)) ** sharpness
    factor = share[..., ring.reshape(-1)].reshape(*share.shape[:2], *[1] * (power.ndim - 2 - ring.ndim), *ring.shape)
    change = torch.fft.ifftn((waves * factor).sum(0), dim=where).real
    return (base + change).to(outputs[0].dtype)


def rings(sizes, bands: int):
    """[sizes] the band of every frequency of a transform of these sizes: 0 slowest, by distance from frequency 0."""
    import torch

    axes = [torch.fft.fftfreq(n, dtype=torch.float64) / 0.5 for n in sizes]  # -1 to 1, in units of the finest wave
    far = sum(a.square() for a in torch.meshgrid(*axes, indexing="ij")).sqrt() / len(sizes) ** 0.5
    return (far * bands).long().clamp(max=bands - 1)
