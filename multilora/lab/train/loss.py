"""Diffusion losses and how each family of pipelines is asked for a prediction: one small table.

    noise   x_t = sqrt(a) x0 + sqrt(1 - a) n, target n (epsilon), sqrt(a) n - sqrt(1 - a) x0 (v) or x0 (sample)
    flow    x_s = (1 - s) x0 + s n, target n - x0                      (rectified flow, https://arxiv.org/abs/2403.03206)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from multilora.method import unknown

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def snr(alphas_cumprod: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio a / (1 - a) at timesteps t [n]."""
    a = alphas_cumprod.to(t.device)[t].double()
    return a / (1 - a)


def min_snr_weights(alphas_cumprod: torch.Tensor, t: torch.Tensor, gamma: float, prediction: str) -> torch.Tensor:
    """Min-SNR-gamma loss weights [n], https://arxiv.org/abs/2303.09556, equation 6 and its forms for x0 and v.

    min(snr, gamma) / snr for epsilon, / (snr + 1) for v, min(snr, gamma) for x0. At zero terminal SNR the weight of
    epsilon is its limit, 1.
    """
    ratio = snr(alphas_cumprod, t)
    capped = ratio.clamp(max=gamma)
    if prediction == "epsilon":
        return torch.where(ratio > 0, capped / ratio.clamp(min=1e-12), torch.ones_like(ratio)).float()
    if prediction == "v_prediction":
        return (capped / (ratio + 1)).float()
    if prediction == "sample":
        return capped.float()
    raise unknown("prediction type", prediction, PREDICTIONS)


def _broadcast(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (like.ndim - 1)).to(like)


@dataclass(frozen=True)
class Noise:
    """The noise loss of one scheduler configuration."""

    alphas_cumprod: torch.Tensor
    prediction: str

    @classmethod
    def of(cls, scheduler: Any) -> Noise:
        """From any discrete scheduler's configuration (DDPM, DDIM, DPM-Solver++, Euler, ...)."""
        from diffusers import DDPMScheduler

        known = DDPMScheduler.from_config(scheduler.config)
        if known.config.prediction_type not in PREDICTIONS:
            raise unknown("prediction type of the scheduler", known.config.prediction_type, PREDICTIONS)
        return cls(known.alphas_cumprod, known.config.prediction_type)

    def draw(self, u: torch.Tensor, high_noise: float) -> torch.Tensor:
        """Timesteps [n] from u [n, 2] in 0..1: uniform, a share `high_noise` of them from the noisiest fifth."""
        count = len(self.alphas_cumprod)
        top = count - count // 5
        uniform = (u[:, 1] * count).long()
        noisy = top + (u[:, 1] * (count - top)).long()
        return torch.where(u[:, 0] < high_noise, noisy, uniform).clamp(max=count - 1)

    def noisy(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = _broadcast(self.alphas_cumprod.to(t.device)[t], x)
        return a.sqrt() * x + (1 - a).sqrt() * noise

    def target(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x
        a = _broadcast(self.alphas_cumprod.to(t.device)[t], x)
        return a.sqrt() * noise - (1 - a).sqrt() * x

    def time(self, t: torch.Tensor) -> torch.Tensor:
        """What the denoiser is told."""
        return t

    def weights(self, t: torch.Tensor, min_snr: float | None) -> torch.Tensor | None:
        return None if min_snr is None else min_snr_weights(self.alphas_cumprod, t, min_snr, self.prediction)


@dataclass(frozen=True)
class Flow:
    """Rectified flow with logit-normal sigmas, moved by the scheduler's static shift."""

    shift: float = 1.0
    scale: float = 1000.0  # what the denoiser is told: sigma times this

    @classmethod
    def of(cls, scheduler: Any, scale: float) -> Flow:
        config = scheduler.config
        return cls(1.0 if config.get("use_dynamic_shifting") else float(config.get("shift", 1.0)), scale)

    def draw(self, u: torch.Tensor, high_noise: float) -> torch.Tensor:
        """Sigmas [n] from u [n, 2] in 0..1: sigmoid of a normal variable, a share `high_noise` of them from 0.8..1."""
        sigma = torch.sigmoid(torch.special.ndtri(u[:, 1].double().clamp(1e-6, 1 - 1e-6))).float()
        sigma = torch.where(u[:, 0] < high_noise, 0.8 + 0.2 * u[:, 1], sigma)
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def noisy(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        s = _broadcast(t, x)
        return (1 - s) * x + s * noise

    def target(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return noise - x

    def time(self, t: torch.Tensor) -> torch.Tensor:
        return t * self.scale

    def weights(self, t: torch.Tensor, min_snr: float | None) -> torch.Tensor | None:
        if min_snr is not None:
            raise ValueError(f"min_snr={min_snr} is for noise losses; this pipeline is trained by flow matching")
        return None


Text = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """How to train one family. `denoiser` and `encoders` are the pipeline's component names.

    text(pipe, captions) -> per-sample tensors [n, ...]; predict(pipe, noisy, time, text) -> prediction like noisy.
    """

    name: str
    denoiser: str
    encoders: tuple[str, ...]  # text encoders that may be trained
    loss: Callable[[Any], Noise | Flow]
    text: Callable[[Any, list[str]], Text]
    predict: Callable[[Any, torch.Tensor, torch.Tensor, Text], torch.Tensor]
    shifted: bool = False  # latents are (z - shift_factor) * scaling_factor, not z * scaling_factor


def _device(pipe: Any, denoiser: str) -> torch.device:
    return next(getattr(pipe, denoiser).parameters()).device


def _sd_text(pipe: Any, captions: list[str]) -> Text:
    return {"states": pipe.encode_prompt(captions, _device(pipe, "unet"), 1, False)[0]}


def _sd_predict(pipe: Any, x: torch.Tensor, time: torch.Tensor, text: Text) -> torch.Tensor:
    return pipe.unet(x, time, encoder_hidden_states=text["states"], return_dict=False)[0]


def _sdxl_text(pipe: Any, captions: list[str]) -> Text:
    states, _, pooled, _ = pipe.encode_prompt(
        captions, device=_device(pipe, "unet"), num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"states": states, "pooled": pooled}


def _sdxl_predict(pipe: Any, x: torch.Tensor, time: torch.Tensor, text: Text) -> torch.Tensor:
    side = (x.shape[-2] * pipe.vae_scale_factor, x.shape[-1] * pipe.vae_scale_factor)
    ids = torch.tensor([[*side, 0, 0, *side]], device=x.device, dtype=x.dtype).expand(len(x), -1)
    added = {"text_embeds": text["pooled"], "time_ids": ids}
    return pipe.unet(
        x, time, encoder_hidden_states=text["states"], added_cond_kwargs=added, return_dict=False
    )[0]


def _sd3_text(pipe: Any, captions: list[str]) -> Text:
    states, _, pooled, _ = pipe.encode_prompt(
        captions, None, None, device=_device(pipe, "transformer"), do_classifier_free_guidance=False
    )
    return {"states": states, "pooled": pooled}


def _sd3_predict(pipe: Any, x: torch.Tensor, time: torch.Tensor, text: Text) -> torch.Tensor:
    return pipe.transformer(
        hidden_states=x, timestep=time, encoder_hidden_states=text["states"], pooled_projections=text["pooled"],
        return_dict=False,
    )[0]  # fmt: skip


def _flux_text(pipe: Any, captions: list[str]) -> Text:
    states, pooled, _ = pipe.encode_prompt(captions, None, device=_device(pipe, "transformer"))
    return {"states": states, "pooled": pooled}


def _flux_predict(pipe: Any, x: torch.Tensor, time: torch.Tensor, text: Text) -> torch.Tensor:
    n, channels, height, width = x.shape
    packed = x.view(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    packed = packed.reshape(n, height * width // 4, channels * 4)
    places = torch.zeros(height // 2, width // 2, 3, device=x.device, dtype=x.dtype)
    places[..., 1] = torch.arange(height // 2, device=x.device)[:, None]
    places[..., 2] = torch.arange(width // 2, device=x.device)[None]
    words = torch.zeros(text["states"].shape[1], 3, device=x.device, dtype=x.dtype)
    guided = pipe.transformer.config.guidance_embeds
    out = pipe.transformer(
        hidden_states=packed, timestep=time, guidance=torch.ones_like(time) if guided else None,
        pooled_projections=text["pooled"], encoder_hidden_states=text["states"], txt_ids=words,
        img_ids=places.flatten(0, 1), return_dict=False,
    )[0]  # fmt: skip
    out = out.view(n, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return out.reshape(n, channels, height, width)


def _noise(pipe: Any) -> Noise:
    return Noise.of(pipe.scheduler)


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("sd15", "unet", ("text_encoder",), _noise, _sd_text, _sd_predict),
        Family("sdxl", "unet", ("text_encoder", "text_encoder_2"), _noise, _sdxl_text, _sdxl_predict),
        Family("sd3", "transformer", ("text_encoder", "text_encoder_2"),
               lambda pipe: Flow.of(pipe.scheduler, 1000.0), _sd3_text, _sd3_predict, True),
        Family("flux", "transformer", ("text_encoder",),
               lambda pipe: Flow.of(pipe.scheduler, 1.0), _flux_text, _flux_predict, True),
    )
}  # fmt: skip


def family_of_pipeline(pipe: Any) -> Family:
    """The family of a pipeline, by its denoiser's class. Raises ValueError with what can be trained."""
    transformer, unet = getattr(pipe, "transformer", None), getattr(pipe, "unet", None)
    kind = type(transformer if transformer is not None else unet).__name__
    if kind == "SD3Transformer2DModel":
        return FAMILIES["sd3"]
    if kind == "FluxTransformer2DModel":
        return FAMILIES["flux"]
    if kind == "UNet2DConditionModel" and unet.config.in_channels == unet.config.out_channels:
        return FAMILIES["sdxl" if getattr(pipe, "text_encoder_2", None) is not None else "sd15"]
    raise ValueError(
        f"LoRAs are trained for Stable Diffusion 1.x, 2.x and XL, SD3 and FLUX pipelines; this is a "
        f"{type(pipe).__name__} with a {kind}"
    )
