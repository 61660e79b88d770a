"""Latents to a small RGB picture while a run goes on, by one linear map per autoencoder.

The map is measured, not tabulated: the decoder is shown one constant latent per channel, once per autoencoder.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from PIL import Image
from torch import Tensor

_MAPS: weakref.WeakKeyDictionary[Any, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def _rgb_map(vae: Any, channels: int) -> tuple[Tensor, Tensor]:
    """([C, 3], [3]): change of the decoder's mean colour per unit of each latent channel, and its colour at zero."""
    if vae not in _MAPS:
        parameter = next(vae.parameters())
        probes = torch.zeros(channels + 1, channels, 8, 8, device=parameter.device, dtype=parameter.dtype)
        for c in range(channels):
            probes[c, c] = 1.0
        if hasattr(vae.config, "temperal_downsample"):  # of films: [B, C, frames, h, w]
            probes = probes[:, :, None]
        colours = vae.decode(probes, return_dict=False)[0].float().flatten(2).mean(dim=2).cpu()
        _MAPS[vae] = (colours[:-1] - colours[-1], colours[-1])
    return _MAPS[vae]


def preview(pipe: Any, latents: Tensor, height: int, width: int) -> Image.Image:
    """The first of `latents` as a picture of one pixel per latent position. Packed latents [B, n, C] are unpacked."""
    if latents.ndim == 3:
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    config = pipe.vae.config
    z = latents[:1].float().cpu()
    if z.ndim == 5:  # Qwen-Image: one frame, and a scale and shift for each channel
        mean, std = (torch.tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std))
        z = z[:, :, 0] * std + mean
    else:
        z = z / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    slopes, zero = _rgb_map(pipe.vae, z.shape[1])
    rgb = torch.einsum("bchw,cr->bhwr", z, slopes) + zero
    pixels = ((rgb[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), bytes(pixels.flatten().tolist()))
