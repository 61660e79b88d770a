"""The six families as tests call them: a pipeline, LoRAs with parts in all text encoders, calls that make pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from multilora.lora import Lora
from tests import tiny, tiny_more

PROMPT, NEGATIVE = "a red fox", "blur"
# Of different lengths: Qwen-Image masks the shorter one, Z-Image hands over lists.
PROMPTS, NEGATIVES = ["a fox", "two robes, much ink"], ["", "blur and noise"]
WEIGHTS, RANKS = (0.9, 1.1), (2, 5)

PIPES: dict[str, Callable[..., Any]] = {
    "sd15": tiny.sd15,
    "sdxl": tiny.sdxl,
    "sd3": tiny.sd3,
    "flux": tiny.flux,
    "qwen": tiny_more.qwen_pipe,
    "zimage": tiny_more.z_pipe,
}
_SIZE = {"height": 32, "width": 32}
# Arguments of every call; of guided ones; of those without guidance.
ALWAYS: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sdxl": {},
    "sd3": {"max_sequence_length": 16},
    "flux": {"max_sequence_length": 16},
    "qwen": {**_SIZE},
    "zimage": {**_SIZE, "max_sequence_length": 64},
}
GUIDED = {f: {"true_cfg_scale" if f in ("flux", "qwen") else "guidance_scale": 4.0} for f in PIPES}
PLAIN = {f: {"true_cfg_scale" if f in ("flux", "qwen") else "guidance_scale": 0.0 if f == "zimage" else 1.0}
         for f in PIPES}  # fmt: skip
# At which effects of 0.02 and more show at every call of the run.
STRENGTH = {"sdxl": 4.0, "qwen": 1.5}


@functools.cache
def pipe(family: str, dtype: torch.dtype | None = None) -> Any:
    """One pipeline per family for all tests that leave it as it was."""
    return PIPES[family](dtype)


@functools.cache
def loras(family: str, text: bool = True) -> tuple[Lora, ...]:
    """Two LoRAs of different ranks with parts in the denoiser and, with `text`, in every text encoder."""
    strength = STRENGTH.get(family, 1.0)
    return tuple(
        tiny.lora_for(pipe(family), rank=r, seed=i, strength=strength, text_encoder=text, name=("fox", "robe")[i])
        for i, r in enumerate(RANKS)
    )


def call(family: str, guided: bool = True, prompts: int = 1, images: int = 1, steps: int = 2, **options: Any):
    """A function of a pipeline that makes latents: `images` pictures of each of one or two prompts."""
    fixed = {
        **ALWAYS[family], **(GUIDED if guided else PLAIN)[family], "output_type": "latent",
        "num_images_per_prompt": images, "num_inference_steps": steps, **options,
    }  # fmt: skip

    def make(pipeline: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        # Z-Image's pipeline writes into the lists that it is given: new ones each time.
        texts = {"prompt": PROMPT if prompts == 1 else list(PROMPTS)}
        if guided:
            texts["negative_prompt"] = NEGATIVE if prompts == 1 else list(NEGATIVES)
        return pipeline(**texts, generator=generator, **fixed).images

    return make
