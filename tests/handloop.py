"""The reference of the parity table: a denoising loop by hand, in plain torch.

None of multilora's code runs here. A LoRA set is {module path: (down, up)} per LoRA; its effect is a deep copy of the
model whose weights are W + sum_i w_i up_i @ down_i, added up in float64. The loop is our own: own prompt encoding, own
guidance, the step lists are written out, the scheduler is diffusers' own object.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

PROMPT = "a red fox in a wizard robe"
NEGATIVE = "blurry"
T5_LENGTH = 24

Factors = Mapping[str, tuple[Tensor, Tensor]]
# (share of the prediction, weight of each LoRA in the denoiser, weight of each LoRA in the text encoders)
Branch = tuple[float, tuple[float, ...], tuple[float, ...]]

# Which step call number j of an 8-step run belongs to.
STEPS_OF_CALLS = {
    1: [0, 1, 2, 3, 4, 5, 6, 7],
    2: [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7],  # Heun, KDPM2: the last step has one call
}
# LoRA Switch with 3 LoRAs, two steps each, over 8 steps.
SWITCH_OF_STEPS = [0, 0, 1, 1, 2, 2, 0, 0]


def factors(lora: Mapping) -> dict[str, tuple[Tensor, Tensor]]:
    """The bare numbers of a LoRA: {key: (down, up)}; the scale is in `up` already."""
    return {key: (part.down, part.up) for key, part in lora.items()}


def dense(module: nn.Module, loras: Sequence[Factors], weights: Sequence[float], component: str) -> nn.Module:
    """A deep copy of `module` with W + sum_i w_i up_i @ down_i as its weights."""
    model = copy.deepcopy(module)
    total: dict[str, Tensor] = {}
    for lora, weight in zip(loras, weights, strict=True):
        for key, (down, up) in lora.items():
            if key.startswith(component + ".") and weight:
                path = key[len(component) + 1 :]
                delta = weight * (up.double() @ down.double().flatten(1))
                total[path] = total[path] + delta if path in total else delta
    for path, delta in total.items():
        layer = _layer(model, path)
        layer.weight.data = (layer.weight.double() + delta.reshape(layer.weight.shape)).to(layer.weight.dtype)
    return model


def _layer(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:  # older and newer transformers disagree on whether this level exists
        return model.get_submodule(f"text_model.{path}")


def branches(method: str, step: int, w: Sequence[float], has_text: Sequence[bool]) -> list[Branch]:
    """The runs of the model at one step, from the papers' formulas, for 3 LoRAs, every=2, 8 steps."""

    def run(share: float, used: Sequence[int]) -> Branch:
        row = tuple(w[i] if i in used else 0.0 for i in range(len(w)))
        return share, row, tuple(r if has else 0.0 for r, has in zip(row, has_text, strict=True))

    everyone = range(len(w))
    if method == "base":
        return [run(1.0, ())]
    if method == "merge":
        return [run(1.0, everyone)]
    if method == "switch":
        return [run(1.0, (SWITCH_OF_STEPS[step],))]
    if method == "composite":
        return [run(1.0 / len(w), (i,)) for i in everyone]
    if method == "sum_of_differences":  # base + sum_i (e_i - base)
        return [run(1.0 - len(w), ()), *(run(1.0, (i,)) for i in everyone)]
    raise KeyError(method)


class Hand:
    """One family's loop. Subclasses say how to encode a prompt and how to call the model once."""

    denoiser: str
    encoders: tuple[str, ...]

    def __init__(self, pipe, loras: Sequence[Factors], weights: Sequence[float]):
        self.pipe, self.loras, self.weights = pipe, loras, weights
        self.has_text = [any(k.startswith("text_encoder") for k in lora) for lora in loras]
        self._models: dict[tuple, nn.Module] = {}
        self._texts: dict[tuple, dict] = {}

    def model(self, component: str, weights: tuple[float, ...]) -> nn.Module:
        if (component, weights) not in self._models:
            module = getattr(self.pipe, component)
            self._models[component, weights] = dense(module, self.loras, weights, component)
        return self._models[component, weights]

    def text(self, prompt: str, weights: tuple[float, ...]) -> dict[str, Tensor]:
        if (prompt, weights) not in self._texts:
            models = [self.model(c, weights) for c in self.encoders]
            self._texts[prompt, weights] = self.encode(prompt, models)
        return self._texts[prompt, weights]

    @torch.no_grad()
    def run(
        self, plan: Callable[[int], list[Branch]], scheduler, order: int, guidance: float | None, latents: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """(predictions, one per call of the denoiser as the pipeline makes them; latents after 8 steps)."""
        self.set_timesteps(scheduler, latents)
        latents = self.start(latents, scheduler)
        calls: list[Tensor] = []
        assert len(scheduler.timesteps) == len(STEPS_OF_CALLS[order])
        for t, step in zip(scheduler.timesteps, STEPS_OF_CALLS[order], strict=True):
            x = self.scaled(latents, t, scheduler)
            prompts = [PROMPT] if guidance is None else [NEGATIVE, PROMPT]
            x = torch.cat([x] * len(prompts))
            mean = torch.zeros_like(x)
            for share, row, text_row in plan(step):
                texts = [self.text(prompt, text_row) for prompt in prompts]
                text = {name: torch.cat([each[name] for each in texts]) for name in texts[0]}
                mean = mean + share * self.predict(self.model(self.denoiser, row), x, t.repeat(len(x)), text)
            calls += self.as_called(mean)
            guided = mean if guidance is None else mean[:1] + guidance * (mean[1:] - mean[:1])
            latents = scheduler.step(guided, t, latents, return_dict=False)[0]
        return calls, latents

    def method(self, name: str, scheduler, order: int, guidance: float | None, latents: Tensor):
        return self.run(
            lambda step: branches(name, step, self.weights, self.has_text), scheduler, order, guidance, latents
        )

    def set_timesteps(self, scheduler, latents: Tensor) -> None:
        scheduler.set_timesteps(8)

    def start(self, latents: Tensor, scheduler) -> Tensor:
        return latents

    def scaled(self, latents: Tensor, t: Tensor, scheduler) -> Tensor:
        return latents

    def as_called(self, prediction: Tensor) -> list[Tensor]:
        return [prediction]

    def encode(self, prompt: str, models: list[nn.Module]) -> dict[str, Tensor]:
        raise NotImplementedError

    def predict(self, model: nn.Module, x: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError


def ids(tokenizer, prompt: str, length: int) -> Tensor:
    return tokenizer([prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


class HandSD15(Hand):
    denoiser, encoders = "unet", ("text_encoder",)

    def encode(self, prompt, models):
        return {"embeds": models[0](ids(self.pipe.tokenizer, prompt, 77))[0]}

    def start(self, latents, scheduler):
        return latents * scheduler.init_noise_sigma

    def scaled(self, latents, t, scheduler):
        return scheduler.scale_model_input(latents, t)

    def predict(self, model, x, t, text):
        return model(x, t, encoder_hidden_states=text["embeds"]).sample


class HandSD3(Hand):
    denoiser, encoders = "transformer", ("text_encoder", "text_encoder_2", "text_encoder_3")

    def encode(self, prompt, models):
        """The CLIPs' last but one layers side by side, padded to T5's width, T5 after them; pooled side by side."""
        clips = [
            m(ids(t, prompt, 77), output_hidden_states=True)
            for m, t in zip(models[:2], (self.pipe.tokenizer, self.pipe.tokenizer_2), strict=True)
        ]
        t5 = models[2](ids(self.pipe.tokenizer_3, prompt, T5_LENGTH))[0]
        clip = torch.cat([c.hidden_states[-2] for c in clips], dim=2)
        clip = torch.cat([clip, clip.new_zeros(1, clip.shape[1], t5.shape[2] - clip.shape[2])], dim=2)
        return {
            "embeds": torch.cat([clip, t5], dim=1),
            "pooled": torch.cat([c.text_embeds for c in clips], dim=1),
        }

    def predict(self, model, x, t, text):
        return model(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=text["embeds"],
            pooled_projections=text["pooled"],
        ).sample


class HandFlux(Hand):
    """Packed latents [1, 16, C] of a 4 x 4 grid; the negative prompt has its own call, after the positive one."""

    denoiser, encoders = "transformer", ("text_encoder", "text_encoder_2")

    def encode(self, prompt, models):
        return {
            "pooled": models[0](ids(self.pipe.tokenizer, prompt, 77)).pooler_output,
            "embeds": models[1](ids(self.pipe.tokenizer_2, prompt, T5_LENGTH))[0],
        }

    def set_timesteps(self, scheduler, latents):
        # The shift grows linearly from 0.5 at 256 positions to 1.15 at 4096.
        mu = 0.5 + (1.15 - 0.5) * (latents.shape[1] - 256) / (4096 - 256)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8), mu=mu)

    def predict(self, model, x, t, text):
        side = math.isqrt(x.shape[1])
        places = [[0.0, float(i // side), float(i % side)] for i in range(x.shape[1])]
        return model(
            hidden_states=x,
            timestep=(t / 1000).to(x.dtype),
            pooled_projections=text["pooled"],
            encoder_hidden_states=text["embeds"],
            txt_ids=x.new_zeros(T5_LENGTH, 3),
            img_ids=x.new_tensor(places),
        ).sample

    def as_called(self, prediction):
        return list(reversed(prediction.split(1)))


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, Frobenius norms."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).double().norm() / b.double().norm())


class Recorder:
    """Stands in for a denoiser in a pipeline and keeps the first entry of all that it returns."""

    def __init__(self, module: nn.Module):
        self._module, self.calls = module, []

    def __getattr__(self, name: str):
        return getattr(self._module, name)

    def __call__(self, *args, **kwargs):
        output = self._module(*args, **kwargs)
        self.calls.append(output[0].clone())
        return output
