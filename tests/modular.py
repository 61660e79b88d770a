"""Small modular pipelines of SDXL and Qwen-Image, built from configs: diffusers' blocks around tiny components."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from diffusers import ClassifierFreeGuidance, QwenImageAutoBlocks, StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines.qwenimage import prompt_templates
from torch import Tensor

from tests import scene, tiny, tiny_more

BLOCKS = {"sdxl": StableDiffusionXLAutoBlocks, "qwen": QwenImageAutoBlocks}
SCALE = 4.0


def standard(family: str, dtype: torch.dtype | None = None):
    """The family's standard pipeline, with the prompt template that its modular text block has."""
    if family == "sdxl":
        return tiny.sdxl(dtype)
    pipe = tiny_more.qwen_pipe(dtype)
    pipe.prompt_template_encode = prompt_templates.QWENIMAGE_PROMPT_TEMPLATE
    pipe.prompt_template_encode_start_idx = prompt_templates.QWENIMAGE_PROMPT_TEMPLATE_START_IDX
    return pipe


def modular(pipe, family: str, manager=None):
    """A modular pipeline with a standard one's components; 32 x 32 pictures."""
    made = BLOCKS[family]().init_pipeline(components_manager=manager)
    made.update_components(**{n: c for n, c in pipe.components.items() if n in made.component_names and c is not None})
    made.update_components(guider=ClassifierFreeGuidance(guidance_scale=SCALE))
    return made


def draw(pipe, steps: int = 3, seed: int = 0, output: str = "latents", **options) -> Tensor:
    """Latents of one picture by a modular pipeline."""
    wanted = {"prompt": scene.PROMPT, "negative_prompt": scene.NEGATIVE, "height": 32, "width": 32, **options}
    generator = torch.Generator().manual_seed(seed)
    return pipe(num_inference_steps=steps, generator=generator, output=output, **wanted)


def draw_standard(pipe, family: str, steps: int = 3, seed: int = 0, **options) -> Tensor:
    """Latents of the same picture by the standard pipeline, in the modular one's shape."""
    scale = {"sdxl": "guidance_scale", "qwen": "true_cfg_scale"}[family]
    wanted = {"prompt": scene.PROMPT, "negative_prompt": scene.NEGATIVE, "height": 32, "width": 32, scale: SCALE}
    generator = torch.Generator().manual_seed(seed)
    latents = pipe(num_inference_steps=steps, generator=generator, output_type="latent", **wanted, **options).images
    return latents if family == "sdxl" else pipe._unpack_latents(latents, 32, 32, pipe.vae_scale_factor)


@contextmanager
def guided(pipe, guider):
    """A guider in a pipeline for a block, as a user puts it there: `update_components` and nothing else."""
    before = pipe.guider
    try:
        pipe.update_components(guider=guider)
        yield guider
    finally:
        pipe.update_components(guider=before)
