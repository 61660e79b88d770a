"""The cells of the table of families and tasks: a pipeline, LoRAs and a call of the pipeline, for every one.

    CELLS                  all; tests/test_cells.py asserts them, benchmarks/cells.py writes docs/families/table.md
    results(setting)       {method: Result}: per call against dense weights in the pipeline's own loop (tests/dense.py)
    composer_of, call_of   a Composer of a family and task, and a call of its pipeline with the arguments written out

Two pictures per prompt in every cell.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection

from multilora.lora import Lora
from multilora.pipelines import tasks
from multilora.pipelines.composing import composing
from multilora.pipelines.image import Composer
from tests import dense, families, scene, tiny, tiny_tasks
from tests.tiny_tasks import FAMILIES

METHODS = ("merge", "switch", "composite")
ONE = 1e-5
# U-Nets run floor(3 * 0.7) = 2 of the 3 steps, transformers' pipelines all 3.
STEPS, STRENGTH, WEIGHTS = 3, 0.7, (1.3, 1.1)
SIZED_BY_IMAGE = ("StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline",
                  "StableDiffusionPAGImg2ImgPipeline", "StableDiffusionXLPAGImg2ImgPipeline")  # fmt: skip
MASKED = "ControlNet inpainting without control_image"  # the ControlNet sees the picture with a hole
TEXT, TWO = "LoRAs with text-encoder parts", "two prompts"


# -- a family's task ------------------------------------------------------------------------------------------------


def composer_of(family: str, task: str, text: bool = False) -> tuple[Composer, list[Lora]]:
    """A Composer around the family's text-to-image pipeline, with two LoRAs, and a ControlNet for its tasks."""
    pipe = FAMILIES[family][0]()
    net = tiny_tasks.controlnet(family, pipe, task == MASKED) if "ControlNet" in task else None
    composer = Composer(pipe, controlnet=net)
    loras = scene.loras(pipe, 2, text=text, strength=1.8 if family == "sdxl" else 1.0)
    for lora, weight in zip(loras, WEIGHTS, strict=True):
        composer.add(lora, weight=weight)
    return composer, loras


def call_of(family: str, task: str, pipe: Any, pictures: int = 2, seed: int = 7, **more: Any) -> dense.Call:
    """A call of the pipeline itself, its arguments written out."""
    _, quick, guidance = FAMILIES[family]
    given = tiny_tasks.inputs(task)
    if task == MASKED:
        given = {"control_image": given["image"], "control_mask": given["mask_image"]}
    elif (family, task) == ("z", "ControlNet inpainting"):
        given["mask_image"] = [given["mask_image"]] * pictures
    elif "image" in given:
        given |= {"image": [given["image"]] * pictures, "strength": STRENGTH}
    if family in ("sd15", "sdxl") and task == "ControlNet":
        given = {"image": given["control_image"]}
    if "ControlNet" in task:
        given["controlnet_conditioning_scale"] = 0.5
    if type(pipe).__name__ in tiny_tasks.UNGUIDED:
        guidance = {}
    elif guidance:
        guidance = {**guidance, "negative_prompt": scene.NEGATIVE}
    side = tiny_tasks.SIZE
    sides = {} if type(pipe).__name__ in SIZED_BY_IMAGE else {"width": side, "height": side}
    wanted = {"output_type": "latent", **given, **quick, **guidance, **sides, **more}

    def call(pipe: Any) -> Any:
        seeds = [torch.Generator().manual_seed(seed + i) for i in range(pictures)]
        torch.manual_seed(0)  # SD3's and Qwen-Image's ControlNets encode control images with the global generator
        return pipe(
            prompt=scene.PROMPT, num_inference_steps=STEPS, num_images_per_prompt=pictures, generator=seeds, **wanted
        ).images

    return call


# -- what a cell is -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What a cell compares. `straight` is the same call without what bends its guidance."""

    pipe: Any
    loras: list[Lora]
    weights: tuple[float, ...]
    call: dense.Call
    straight: dense.Call | None = None
    bent: bool = False  # guidance is not linear in the predictions
    effect: float = 0.02
    methods: tuple[str, ...] = METHODS


@dataclass(frozen=True)
class Cell:
    """One row of the table. `elsewhere` is the file whose tests assert it, where test_cells.py leaves it out."""

    family: str
    task: str
    what: str
    make: Callable[[], Setting]
    long: bool = True
    elsewhere: str = ""

    @property
    def id(self) -> str:
        return " ".join(f"{self.family} {self.task} {self.what}".split())


@dataclass(frozen=True)
class Result:
    """A comparison, and how far our latents are from the reference's where guidance is not linear (else None)."""

    calls: dense.Comparison
    final: float | None = None
    bend: float | None = None  # how far the reference's latents are from those of linear guidance

    def check(self, setting: Setting) -> None:
        self.calls.check(ONE, setting.effect, setting.effect)
        assert self.final is None or self.final <= 10 * ONE, f"latents differ by {self.final}"
        assert self.bend is None or self.bend >= 0.02, f"the guidance bends by {self.bend} only"


@torch.no_grad()
def results(setting: Setting) -> dict[str, Result]:
    """{method: Result} of all methods of a cell."""
    models = dense.Dense(setting.pipe, setting.loras, setting.weights, setting.call)
    found = {}
    for method in setting.methods:
        calls = dense.compare(setting.pipe, setting.loras, setting.weights, method, setting.call, models=models)
        final = bend = None
        if setting.bent:
            options = {"every": 1} if method == "switch" else {}
            with composing(setting.pipe, setting.loras, method, weights=setting.weights, **options):
                final = scene.apart(setting.call(setting.pipe), calls.final)
                if setting.straight is not None:
                    bend = scene.apart(setting.straight(setting.pipe), calls.final)
        found[method] = Result(calls, final, bend)
    return found


# -- the cells ------------------------------------------------------------------------------------------------------


def _written(family: str, setting: tuple = (True, 2, 2)) -> Setting:
    return Setting(
        families.pipe(family), list(families.loras(family)), families.WEIGHTS, families.call(family, *setting)
    )


def _task(family: str, task: str, text: bool = False) -> Setting:
    composer, loras = composer_of(family, task, text)
    if task == MASKED:
        cls = {"sd3": "StableDiffusion3ControlNetInpaintingPipeline", "qwen": "QwenImageControlNetInpaintPipeline"}
        pipe = tasks.sibling(composer.pipe, getattr(diffusers, cls[family]), composer.controlnet)
    else:
        pipe = composer.pipeline_for(*tiny_tasks.inputs(task))
    # Qwen-Image's guidance keeps the norm of the prompt's own prediction.
    return Setting(pipe, loras, WEIGHTS, call_of(family, task, pipe), bent=family == "qwen")


def _bent(family: str, task: str, own: dict[str, Any], off: dict[str, Any], cls: str = "") -> Setting:
    """A task with guidance by the arguments `own`, which is linear with `off` in their place."""
    composer, loras = composer_of(family, task)
    pipe = composer.pipeline_for(*tiny_tasks.inputs(task))
    if cls:
        pipe = tasks.sibling(composer.pipe, getattr(diffusers, cls), composer.controlnet)
        pipe.set_progress_bar_config(disable=True)
    straight = call_of(family, task, pipe, **{**own, **off})
    return Setting(pipe, loras, WEIGHTS, call_of(family, task, pipe, **own), straight, True)


def _skipped() -> Setting:
    """SD3's skip-layer guidance: one more call a step, of the positive half alone, without some layers."""
    pipe = FAMILIES["sd3"][0]()
    own = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.01, "skip_layer_guidance_stop": 1.0}
    call = call_of("sd3", "text-to-image", pipe, **own)
    straight = call_of("sd3", "text-to-image", pipe)
    return Setting(pipe, scene.loras(pipe, 2, text=True), WEIGHTS, call, straight, True)


TURBO = {"timestep_spacing": "trailing"}
FEW_STEPS = {
    # family, scheduler and its config, steps, arguments: SDXL-Turbo's timesteps and no guidance; LCM's and TCD's
    # schedulers; FLUX.1 schnell, whose guidance is not in the model.
    "turbo, 1 step": ("sdxl", "EulerAncestralDiscreteScheduler", TURBO, 1, {"guidance_scale": 0.0}),
    "turbo, 4 steps": ("sdxl", "EulerAncestralDiscreteScheduler", TURBO, 4, {"guidance_scale": 0.0}),
    "LCM": ("sd15", "LCMScheduler", {}, 4, {"guidance_scale": 1.0}),
    "TCD": ("sd15", "TCDScheduler", {}, 2, {"guidance_scale": 1.0}),
    "schnell": ("flux", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": False, "shift": 1.0}, 2, {}),
}


def _few(model: str) -> Setting:
    """Two pictures, without guidance: the batch is not doubled."""
    family, scheduler, config, steps, options = FEW_STEPS[model]
    pipe = getattr(tiny, family)()
    pipe.scheduler = getattr(diffusers, scheduler).from_config({**pipe.scheduler.config, **config})
    loras = scene.loras(pipe, 2, strength=1.8 if family == "sdxl" else 1.2)
    quick = {"max_sequence_length": 16, "height": 32, "width": 32} if family == "flux" else {}

    def call(pipe: Any) -> Any:
        seeds = [torch.Generator().manual_seed(i) for i in (3, 4)]
        return pipe(
            "a fox", num_inference_steps=steps, generator=seeds, num_images_per_prompt=2, output_type="latent",
            **options, **quick,
        ).images  # fmt: skip

    methods = tuple(m for m in METHODS if steps > 1 or m != "switch")  # Switch wants a step for each LoRA
    return Setting(pipe, loras, WEIGHTS, call, effect=0.015, methods=methods)


def image_prompt(family: str) -> Setting:
    """IP-Adapter, by embeddings of two pictures; `straight` is the call with another image prompt."""
    generator = torch.Generator().manual_seed(2)
    if family == "sd15":
        pipe = tiny.sd15()
        pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
        embeds: Any = [torch.randn(2, 2, 24, generator=generator)]  # [negative and positive, pictures, width]
        other: Any = [-embeds[0]]
    else:
        pipe = FAMILIES["sd3"][0]()
        sd3_ip_adapter(pipe.transformer)
        embeds = torch.randn(2, 5, 24, generator=generator)  # [negative and positive, tokens, width]
        other = -embeds
    calls = [call_of(family, "text-to-image", pipe, ip_adapter_image_embeds=e) for e in (embeds, other)]
    return Setting(pipe, scene.loras(pipe, 2, text=True), WEIGHTS, *calls, bent=True)


def ip_adapter(unet: Any, width: int = 24, tokens: int = 4) -> dict[str, Any]:
    """The weights of a plain IP-Adapter for a U-Net, as its files hold them."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    inner = unet.config.cross_attention_dim
    project = {
        "proj.weight": random(tokens * inner, width), "proj.bias": random(tokens * inner),
        "norm.weight": torch.ones(inner), "norm.bias": torch.zeros(inner),
    }  # fmt: skip
    crossing = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    layers = {}
    for i, name in enumerate(crossing):  # the files count self-attentions too
        out = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        layers |= {
            f"{2 * i + 1}.to_k_ip.weight": random(out, inner),
            f"{2 * i + 1}.to_v_ip.weight": random(out, inner),
        }
    return {"image_proj": project, "ip_adapter": layers}


def sd3_ip_adapter(model: Any, width: int = 24, hidden: int = 64) -> None:
    """SD3's IP-Adapter with random weights: a resampler that knows the timestep, and processors in all blocks."""
    inner = model.config.attention_head_dim * model.config.num_attention_heads
    model.image_proj = tiny.seeded(
        IPAdapterTimeImageProjection(
            embed_dim=width, output_dim=inner, hidden_dim=hidden, depth=1, dim_head=64, heads=1, num_queries=3,
            timestep_in_dim=32,
        ),
        21,
    )  # fmt: skip
    model.image_proj.latents.data.copy_(torch.randn(1, 3, hidden, generator=torch.Generator().manual_seed(4)))
    processors = {
        name: tiny.seeded(
            SD3IPAdapterJointAttnProcessor2_0(inner, inner, model.config.attention_head_dim, hidden, scale=1.0),
            30 + i,
        )
        for i, name in enumerate(model.attn_processors)
    }
    model.set_attn_processor(processors)


# The tasks that diffusers has in each family, beside text-to-image.
CASES = [
    (family, task)
    for family in FAMILIES
    for task in ("image-to-image", "inpainting", "ControlNet", "ControlNet image-to-image", "ControlNet inpainting")
    if "ControlNet " not in task or family in ("sd15", "sdxl", "flux") or (family, task[-10:]) == ("z", "inpainting")
]
# The others take longer than the default suite has.
QUICK = {
    "sd15 inpainting", "sd15 ControlNet image-to-image", "sdxl image-to-image", "sdxl ControlNet inpainting",
    "sd3 ControlNet", "flux inpainting", "flux ControlNet inpainting", "qwen image-to-image", "z ControlNet",
    f"qwen {MASKED}", "sd3 skip-layer guidance", "sd3 IP-Adapter", "sdxl guidance rescale", "sdxl turbo, 1 step",
    "sd15 perturbed attention",
}  # fmt: skip
PAG = {"pag_scale": 3.0, "pag_adaptive_scale": 0.0}


def _listed() -> list[Cell]:
    found: list[Cell] = []

    def add(family: str, task: str, what: str, make: Callable[..., Setting], *args: Any, **options: Any) -> None:
        elsewhere = options.pop("elsewhere", "")
        special = what not in ("", TEXT) and not elsewhere
        quick = f"{family} {what if special else task}" in QUICK and not (
            what == TEXT and family not in ("sd15", "sdxl")
        )
        found.append(Cell(family, task, what, functools.partial(make, *args, **options), not quick, elsewhere))

    for family in families.PIPES:
        what = f"{TEXT}, {TWO}"
        short = "z" if family == "zimage" else family
        add(short, "text-to-image", what, _written, family, elsewhere="tests/test_families.py")
    for family, task in [*CASES, ("sd3", MASKED), ("qwen", MASKED)]:
        text = family in ("sd15", "sdxl")
        add(family, task, TEXT if text else "", _task, family, task, text)
    for family, task in (
        ("sd3", "ControlNet"),
        ("flux", "image-to-image"),
        ("qwen", "inpainting"),
        ("z", "inpainting"),
    ):
        add(family, task, TEXT, _task, family, task, True)
    for model, (family, *_) in FEW_STEPS.items():
        add(family, "text-to-image", model, _few, model)
    for family in ("sd15", "sd3"):
        add(family, "text-to-image", "IP-Adapter", image_prompt, family)
    add("sd3", "text-to-image", "skip-layer guidance", _skipped)
    rescale, unscaled = {"guidance_rescale": 0.7}, {"guidance_rescale": 0.0}
    add("sdxl", "image-to-image", "guidance rescale", _bent, "sdxl", "image-to-image", rescale, unscaled)
    bent, plain = {"cfg_normalization": 0.6}, {"cfg_normalization": False}
    add("z", "image-to-image", "guidance with a bound on its norm", _bent, "z", "image-to-image", bent, plain)
    for family, task, cls in (
        ("sd15", "ControlNet", "StableDiffusionControlNetPAGPipeline"),
        ("sdxl", "image-to-image", "StableDiffusionXLPAGImg2ImgPipeline"),
        ("sd3", "image-to-image", "StableDiffusion3PAGImg2ImgPipeline"),
    ):
        add(family, task, "perturbed attention", _bent, family, task, PAG, {"pag_scale": 0.0}, cls)
    return found


CELLS = _listed()
