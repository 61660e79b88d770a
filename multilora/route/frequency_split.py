"""Frequency split: in each band of frequencies, the LoRAs that change it most are heard; our own.

    d_i = e_i - base          E_i(b) = mean power of d_i in band b, divided by the mean over the bands
    prediction = base + sum_i F^-1[ (E_i(b) / max_j E_j(b))^sharpness F[d_i] ]

LoRAs differ in the frequencies that they act on (arXiv 2502.04923 ranks them by their effect on high ones, to order
their turns). In a plain sum of differences all of them speak in all bands. Here the one whose change has most of its
power in a band keeps it whole, and the others step back there. Not yet measured on the embedded world.
"""

from typing import Annotated, Any

from multilora.method import Opt, method
from multilora.plan import Moment, Pass, one_hot
from multilora.predictions import batched


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
        return outputs[0] if k == 1 else batched(lambda o: split(o, bands, sharpness), outputs)

    plan.combine = combine
    return plan


def split(outputs, bands: int, sharpness: float):
    """The prediction out of [base, e_1, .., e_k], tensors [B, C, .., H, W] or [B, tokens, C]."""
    import torch

    wide = torch.promote_types(outputs[0].dtype, torch.float32)
    tokens, tiny = outputs[0].ndim == 3, torch.finfo(wide).tiny
    base, *own = [(o.mT if tokens else o).to(wide) for o in outputs]  # frequencies along the last dimensions
    where = (-1,) if tokens else (-2, -1)
    waves = torch.fft.fftn(torch.stack(own) - base, dim=where).flatten(-len(where))  # [k, B, C, .., waves]
    ring = rings([base.shape[d] for d in where], bands, base.device)
    inside = torch.nn.functional.one_hot(ring, bands).to(wide)  # [waves, bands]
    power = waves.abs().square().flatten(2, -2).mean(2)  # [k, B, waves]
    here = power @ inside / inside.sum(0).clamp(min=1)
    loud = here / here.mean(-1, keepdim=True).clamp(min=tiny)
    share = (loud / loud.amax(0).clamp(min=tiny)) ** sharpness  # [k, B, bands]
    factor = share[..., ring].reshape(*power.shape[:2], *[1] * (waves.ndim - 3), -1)
    change = torch.fft.ifftn((waves * factor).sum(0).reshape(base.shape), dim=where).real
    found = (base + change).to(outputs[0].dtype)
    return found.mT if tokens else found


def rings(sizes, bands: int, device):
    """[waves] the band of every frequency of a transform of these sizes: 0 slowest, by distance from frequency 0."""
    import torch

    axes = [torch.fft.fftfreq(n, dtype=torch.float64) / 0.5 for n in sizes]  # -1 to 1, in units of the finest wave
    far = sum(a.square() for a in torch.meshgrid(*axes, indexing="ij")).sqrt() / len(sizes) ** 0.5
    return (far * bands).long().clamp(max=bands - 1).flatten().to(device)
