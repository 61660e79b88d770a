"""Stage: the decoder trained on, on latents as the base makes them.

A picture's latents are disturbed to a middle noise level and brought back by the U-Net in a few steps: they keep the
picture's content and get the U-Net's own small errors, which the decoder learns to read as the clean picture. The
encoder, and so the latents, stay as they are: nothing else has to be trained again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from multilora.lab.world.autoencoder import picture_loss, pictures_of, psnr
from multilora.lab.world.caption import caption
from multilora.lab.world.scene import sample_scene
from multilora.lab.world.text import encode_texts

FIRST_SCENE = 20_000_000  # beyond the scenes of the decoder's first training
LEVELS, STEPS = (100, 520), 3  # timesteps that latents are disturbed to; steps back


class Renoised:
    """Latents and words -> latents as the base makes them: disturbed to a timestep of LEVELS, and STEPS back."""

    def __init__(self, base: Path, settings: Any) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=torch.float32).eval()
        self.text = CLIPTextModel.from_pretrained(base / "text_encoder", torch_dtype=torch.float32).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
        self.length = settings.tokens
        ddim = DDIMScheduler(settings.train_steps, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
        self.alpha = ddim.alphas_cumprod

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor, texts: list[str], generator: torch.Generator) -> torch.Tensor:
        words = self.text(encode_texts(self.tokenizer, texts, self.length)).last_hidden_state
        start = int(torch.randint(*LEVELS, (1,), generator=generator))
        noise = torch.randn(latents.shape, generator=generator)
        x = self.alpha[start].sqrt() * latents + (1 - self.alpha[start]).sqrt() * noise
        times = np.linspace(start, 0, STEPS + 1).round().astype(int)
        for now, after in pairwise(times):
            signal, level = self.alpha[now].sqrt(), (1 - self.alpha[now]).sqrt()
            v = self.unet(x, torch.full((len(x),), int(now)), words).sample
            clean, noise = signal * x - level * v, level * x + signal * v
            if after == 0:
                return clean
            x = self.alpha[after].sqrt() * clean + (1 - self.alpha[after]).sqrt() * noise
        return clean


def polish(base: Path, settings: Any, minutes: float, echo: Callable[[str], None] = print) -> AutoencoderTiny:
    """Train the decoder of the base in `base` for `minutes`; half of each batch is the base's own latents."""
    vae = AutoencoderTiny.from_pretrained(base / "vae", torch_dtype=torch.float32)
    vae.encoder.requires_grad_(False)
    renoised = Renoised(base, settings)
    optimiser = torch.optim.AdamW(vae.decoder.parameters(), lr=settings.polish_rate, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(settings.seed + 5)
    held_out = pictures_of(range(settings.held_out_seed, settings.held_out_seed + 48), settings.size)
    before = psnr(vae, held_out)
    began, step, average = time.time(), 0, None
    half = max(settings.decoder_batch // 2, 1)
    while (progress := (time.time() - began) / (minutes * 60)) < 1:
        fall = 0.5 + 0.5 * float(np.cos(np.pi * progress))
        for group in optimiser.param_groups:
            group["lr"] = settings.polish_rate * min(1.0, (step + 1) / 50) * fall
        first = settings.scene_seed + FIRST_SCENE + step * 2 * half
        seeds = range(first, first + 2 * half)
        wanted = torch.from_numpy(pictures_of(seeds, settings.size)).float() / 255
        with torch.no_grad():
            latents = vae.encode(wanted * 2 - 1).latents
        made = renoised(latents[:half], [caption(sample_scene(seed)) for seed in seeds[:half]], generator)
        level = torch.rand(half, 1, 1, 1, generator=generator) * settings.decoder_noise
        noisy = latents[half:] + level * torch.randn(latents[half:].shape, generator=generator)
        loss = picture_loss(vae.decode(torch.cat([made, noisy])).sample / 2 + 0.5, wanted)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimiser.step()
        step += 1
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % 50 == 0:
            echo(f"polish: {step * 2 * half} pictures, loss {average:.4f}, {time.time() - began:.0f} s")
    vae.eval()
    echo(f"polish: {step} steps, round trip {before:.2f} -> {psnr(vae, held_out):.2f} dB")
    return vae


def stage(out: Path, settings: Any, echo: Callable[[str], None]) -> None:
    """As multilora.lab.world.stages calls it: once; `out`/unpolished keeps the decoder from before."""
    base, kept = Path(out) / "assets" / "base", Path(out) / "unpolished"
    if kept.is_dir():
        return
    vae = polish(base, settings, settings.polish_minutes, echo)
    shutil.copytree(base / "vae", kept)
    vae.half().save_pretrained(base / "vae")
    shutil.copy(kept / "config.json", base / "vae" / "config.json")
