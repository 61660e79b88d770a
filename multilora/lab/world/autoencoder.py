"""The autoencoder: an exact PCA of 8 x 8 patches as `AutoencoderTiny`'s encoder, and a trained decoder.

The encoder has no non-linear stage (num_encoder_blocks all 0), so its convolutions can hold any linear
map of a patch: two strided ones move space to depth (3 -> 12 -> 48 channels), the third projects the
48 x 2 x 2 patch on the components, the last one subtracts the mean.
"""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from multilora.lab.world.render import render
from multilora.lab.world.scene import sample_scene

PATCH = 8


def pictures_of(seeds, size=128):
    """Scene seeds -> uint8 [n, 3, size, size]."""
    found = [np.asarray(render(sample_scene(seed), size)) for seed in seeds]
    return np.stack(found).transpose(0, 3, 1, 2)


def patches_of(pictures):
    """uint8 [n, 3, h, w] -> float64 [n * h/8 * w/8, 192] in 0..1, in (channel, row, column) order."""
    count, channels, height, width = pictures.shape
    cut = pictures.reshape(count, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(-1, channels * PATCH * PATCH).astype(np.float64) / 255


def fit_pca(pictures, components, rms):
    """The affine projection of a patch: {"mean" [192], "projection" [192, c]}.

    Component i is divided by the square root of its deviation, so the low ones stay the larger ones;
    one factor brings the latents' root mean square to `rms`.
    """
    patches = patches_of(pictures)
    mean = patches.mean(0)
    values, vectors = np.linalg.eigh(np.cov(patches - mean, rowvar=False))
    order = np.argsort(values)[::-1][:components]
    deviation = np.sqrt(np.maximum(values[order], 1e-12))
    vectors = vectors[:, order] * np.sign(vectors[:, order].sum(0) + 1e-9)
    scale = rms / np.sqrt(deviation.mean())
    return {
        "mean": mean,
        "projection": vectors / np.sqrt(deviation) * scale,
        "explained": values[order] / values.sum(),
        "deviation": np.sqrt(deviation) * scale,
    }


def build(settings):
    """The model with an untrained decoder and an empty encoder."""
    wide, narrow = settings.encoder_width, settings.decoder_width
    return AutoencoderTiny(
        latent_channels=settings.latent_channels,
        encoder_block_out_channels=(wide,) * 4,
        num_encoder_blocks=(0,) * 4,
        decoder_block_out_channels=(narrow,) * 4,
        num_decoder_blocks=settings.decoder_blocks,
        upsampling_scaling_factor=2,
        scaling_factor=1.0,
    )


@torch.no_grad()
def write_encoder(model, pca):
    """Write the PCA into the encoder's convolution weights.

    The channel of input channel c at offset (y, x) of its 2 x 2 (then 4 x 4) block is kept at
    (c * 2 + y) * 2 + x per level, as torch's pixel_unshuffle orders it.
    """
    first, second, third, fourth, last = (layer for layer in model.encoder.layers)
    for layer in (first, second, third, fourth, last):
        layer.weight.zero_()
        if layer.bias is not None:
            layer.bias.zero_()
    for channel in range(3):
        first.weight[channel, channel, 1, 1] = 1
    for layer, channels in ((second, 3), (third, 12)):
        for channel in range(channels):
            for y in range(2):
                for x in range(2):
                    layer.weight[(channel * 2 + y) * 2 + x, channel, 1 + y, 1 + x] = 1
    projection = torch.from_numpy(pca["projection"]).float()
    components = projection.shape[1]
    grid = projection.reshape(3, PATCH, PATCH, components)
    for channel in range(3):
        for row in range(PATCH):
            for column in range(PATCH):
                # row = 4 * (offset at level 3) + 2 * (offset at level 2) + (offset at level 1)
                inner = (channel * 2 + row % 2) * 2 + column % 2
                middle = (inner * 2 + row // 2 % 2) * 2 + column // 2 % 2
                fourth.weight[:components, middle, 1 + row // 4, 1 + column // 4] = grid[channel, row, column]
    for component in range(components):
        last.weight[component, component, 1, 1] = 1
    last.bias.copy_(-torch.from_numpy(pca["mean"] @ pca["projection"]).float())


def fit(out, settings, echo=print):
    """Stage: fit the PCA, write `out`/pca.npz. Does nothing where the file exists."""
    path = Path(out) / "pca.npz"
    if path.exists():
        return dict(np.load(path))
    seeds = range(settings.held_out_seed + 500_000, settings.held_out_seed + 500_000 + settings.pca_scenes)
    pca = fit_pca(pictures_of(seeds, settings.size), settings.latent_channels, settings.latent_rms)
    np.savez(path, **pca)
    echo(f"pca: {pca['explained'].sum():.3f} of the variance in {settings.latent_channels} channels")
    return pca


def _gradient(x):
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def picture_loss(made, wanted):
    """L1 of pixels, of their differences (sharp edges) and of the halved picture. Pictures in 0..1."""
    loss = (made - wanted).abs().mean()
    for a, b in zip(_gradient(made), _gradient(wanted), strict=True):
        loss = loss + 0.7 * (a - b).abs().mean()
    return loss + 0.5 * (F.avg_pool2d(made, 4) - F.avg_pool2d(wanted, 4)).abs().mean()


def recolour(pictures, generator):
    """Swap and invert colour channels of a third of the pictures: colours that the base never draws."""
    for i in range(len(pictures)):
        if torch.rand((), generator=generator) < 0.33:
            pictures[i] = pictures[i, torch.randperm(3, generator=generator)]
            if torch.rand((), generator=generator) < 0.3:
                pictures[i] = 1 - pictures[i]
    return pictures


def psnr(model, pictures):
    """uint8 [n, 3, h, w] -> decibels of the mean squared error, after encoding and decoding."""
    wanted = torch.from_numpy(pictures).float() / 255
    errors = []
    with torch.no_grad():
        for part in wanted.split(16):
            made = (model.decode(model.encode(part * 2 - 1).latents).sample / 2 + 0.5).clamp(0, 1)
            errors.append(((made - part) ** 2).mean((1, 2, 3)))
    return float(-10 * torch.log10(torch.cat(errors)).mean())


def train_decoder(out, settings, echo=print):
    """Stage: train the decoder on fresh renders; `out`/decoder.pt is the checkpoint, `out`/vae the result."""
    out = Path(out)
    torch.manual_seed(settings.seed)
    model = build(settings)
    write_encoder(model, fit(out, settings, echo))
    model.encoder.requires_grad_(False)
    optimiser = torch.optim.AdamW(model.decoder.parameters(), lr=settings.decoder_rate, betas=(0.9, 0.99))
    seen, spent, path = 0, 0.0, out / "decoder.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.decoder.load_state_dict(state["decoder"])
        optimiser.load_state_dict(state["optimiser"])
        seen, spent = state["seen"], state["spent"]
    generator = torch.Generator().manual_seed(settings.seed + seen)
    limit, started, last_save, step = settings.decoder_minutes * 60, time.time() - spent, time.time(), 0
    average = None
    while seen < settings.decoder_pictures and time.time() - started < limit:
        progress = max(seen / settings.decoder_pictures, (time.time() - started) / limit)
        ramp = min(1.0, (step + 20) / 120)
        fall = 0.5 + 0.5 * np.cos(np.pi * min(progress, 1.0))
        for group in optimiser.param_groups:
            group["lr"] = float(settings.decoder_rate * ramp * fall)
        start = settings.scene_seed + 10_000_000 + seen
        wanted = torch.from_numpy(pictures_of(range(start, start + settings.decoder_batch), settings.size)).float()
        wanted = recolour(wanted / 255, generator)
        with torch.no_grad():
            latents = model.encode(wanted * 2 - 1).latents
            level = torch.rand(len(latents), 1, 1, 1, generator=generator) * settings.decoder_noise
            latents = latents + level * torch.randn(latents.shape, generator=generator)
        made = model.decode(latents).sample / 2 + 0.5
        loss = picture_loss(made, wanted)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.decoder.parameters(), 1.0)
        optimiser.step()
        seen, step = seen + settings.decoder_batch, step + 1
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % 50 == 0:
            echo(f"decoder: {seen} pictures, loss {average:.4f}, {time.time() - started:.0f} s")
        if time.time() - last_save > 120:
            last_save = time.time()
            _save(path, model, optimiser, seen, last_save - started)
            model.save_pretrained(out / "vae")
    _save(path, model, optimiser, seen, time.time() - started)
    model.save_pretrained(out / "vae")
    return model


def _save(path, model, optimiser, seen, spent):
    state = {
        "decoder": model.decoder.state_dict(),
        "optimiser": optimiser.state_dict(),
        "seen": seen,
        "spent": spent,
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)
