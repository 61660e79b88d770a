"""What the tests of tasks share: pictures, ControlNets of every family with random weights, and their pipelines."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    QwenImageControlNetModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImageControlNetModel,
)
from PIL import Image
from torch import nn

from tests import tiny, tiny_more

SIZE = 32


def sd3(dtype: Any = None) -> StableDiffusion3Pipeline:
    """tiny.sd3() with 16 latent channels: SD3's inpainting takes no others."""
    pipe = tiny.sd3(dtype)
    config = {**pipe.transformer.config, "in_channels": 16, "out_channels": 16}
    transformer = tiny.seeded(SD3Transformer2DModel.from_config(config), 3, 1.2)
    made = StableDiffusion3Pipeline(
        **{**pipe.components, "transformer": transformer, "vae": tiny.seeded(tiny._vae(16, flow=True), 1)}
    )
    made.set_progress_bar_config(disable=True)
    return made


# Family -> (its pipeline, arguments of its call that make it quick, arguments that switch its guidance on).
FAMILIES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "sd15": (tiny.sd15, {}, {"guidance_scale": 4.0}),
    "sdxl": (tiny.sdxl, {}, {"guidance_scale": 4.0}),
    "sd3": (sd3, {"max_sequence_length": 16}, {"guidance_scale": 4.0}),
    "flux": (tiny.flux, {"max_sequence_length": 16}, {"true_cfg_scale": 4.0}),
    "qwen": (tiny_more.qwen_pipe, {"max_sequence_length": 64}, {"true_cfg_scale": 4.0}),
    "z": (tiny_more.z_pipe, {"max_sequence_length": 96}, {"guidance_scale": 4.0}),
}
# The pipelines of these classes have no negative prompt.
UNGUIDED = ("FluxControlNetImg2ImgPipeline", "FluxControlNetInpaintPipeline")


@functools.cache
def picture(seed: int = 0, width: int = SIZE, height: int = SIZE) -> Image.Image:
    """Soft colours, no two pixels alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@functools.cache
def mask(width: int = SIZE, height: int = SIZE) -> Image.Image:
    """White on the right of a line that is no multiple of anything."""
    image = Image.new("L", (width, height), 0)
    image.paste(255, (width // 2 - 3, 4, width, height))
    return image


def inputs(task: str) -> dict[str, Image.Image]:
    """The pictures of a task by the names of Composer's arguments."""
    found = {}
    if "image-to-image" in task or "inpainting" in task:
        found["image"] = picture()
    if "inpainting" in task:
        found["mask_image"] = mask()
    if "ControlNet" in task:
        found["control_image"] = picture(5)
    return found


def controlnet(family: str, pipe: Any, masked: bool = False) -> nn.Module:
    """A small ControlNet for a pipeline, of random weights throughout: its zero convolutions are none.

    masked  one that inpaints (SD3, Qwen-Image): it takes the picture's latents with a mask
    """
    if family in ("sd15", "sdxl"):
        net = ControlNetModel.from_unet(
            pipe.unet, conditioning_embedding_out_channels=(8, 8, 16), load_weights_from_unet=False
        )
    elif family == "sd3":
        more = {"num_layers": 1, "extra_conditioning_channels": int(masked)}
        net = SD3ControlNetModel(**_shared(SD3ControlNetModel, pipe.transformer) | more)
    elif family == "flux":
        net = FluxControlNetModel(
            **_shared(FluxControlNetModel, pipe.transformer) | {"num_layers": 1, "num_single_layers": 1}
        )
    elif family == "qwen":
        more = {"num_layers": 1, "extra_condition_channels": 4 * masked}  # 2 x 2 latent positions of the mask
        net = QwenImageControlNetModel(**_shared(QwenImageControlNetModel, pipe.transformer) | more)
    else:
        config = pipe.transformer.config
        net = ZImageControlNetModel(
            control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=2 * config.in_channels + 1,
            dim=config.dim, n_refiner_layers=1, n_heads=config.n_heads, n_kv_heads=config.n_kv_heads,
        )  # fmt: skip
    tiny.seeded(net, 11, 0.6)  # more would leave no part in the prediction for the LoRAs
    if family in ("sd15", "sdxl"):
        tiny.seeded(net.controlnet_cond_embedding, 12, 2.0)
    return net


def _shared(cls: type, model: nn.Module) -> dict[str, Any]:
    """The settings of a model that a ControlNet class has too."""
    names = cls.__init__.__wrapped__.__code__.co_varnames
    return {n: v for n, v in model.config.items() if n in names and not n.startswith("_")}


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(float)
