"""Composer: any diffusers pipeline, LoRAs and a method -> pictures with their recipe."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from multilora import files
from multilora.method import Bound, Method, resolve, unknown
from multilora.pipelines import request, tasks
from multilora.pipelines.clock import Clock
from multilora.pipelines.composing import adapters_of, composing, denoiser_of, member
from multilora.pipelines.denoise import Cancelled, Conductor
from multilora.pipelines.lanes import lane
from multilora.pipelines.load import EMBEDDED, EMBEDDED_DEFAULTS, load_controlnet, load_pipeline
from multilora.pipelines.members import Member, fit_mask
from multilora.pipelines.pictures import read_pictures, same_pictures
from multilora.pipelines.preview import preview as latent_preview
from multilora.pipelines.running import counted, fixed_randomness, fresh_scheduler, plain_latents
from multilora.pipelines.shelf import asked_for, remade, served
from multilora.plan import as_explained
from multilora.recipe import LoraUse, Recipe, Resolved

__all__ = ["Cancelled", "Composed", "Composer", "composing"]


@dataclass
class Composed:
    """Pictures and the recipe that makes them again; `passes` is the number of model runs of each denoiser call."""

    images: list[Any]
    recipe: Recipe
    passes: list[int] = field(default_factory=list)

    def recipe_of(self, index: int) -> Recipe:
        """The recipe of picture `index` of this batch."""
        if not 0 <= index < len(self.images):
            raise ValueError(f"picture {index!r} of {len(self.images)}: wanted 0 to {len(self.images) - 1}")
        return self.recipe.model_copy(update={"index": index})


class Composer:
    """A pipeline with a list of LoRAs.

    composer = Composer.from_pretrained("embedded")
    composer.add("fox.safetensors", weight=0.8)
    out = composer("a fox in a robe", method="composite", seed=7)

    The pipeline may be of any task; each picture is made by the class of its family that the picture's arguments ask
    for, with the same components. A ControlNet is the pipeline's own, a diffusers model, or a folder (see
    load_controlnet). With a library (multilora.resident.Library) its LoRAs are loaded when a picture or a recipe
    names them; then prompts and recipes name no others than those and the composer's own, unless `paths` lets them
    name files too.
    """

    def __init__(self, pipe: Any, base: str = "", controlnet: Any = None, library: Any = None, *, paths: bool = False):
        self.component, self.denoiser = denoiser_of(pipe)
        self.pipe, self.library, self.paths = pipe, library, paths
        self.controlnet_reference = str(controlnet) if isinstance(controlnet, (str, Path)) else ""
        if self.controlnet_reference:
            device, dtype = self.denoiser.device, self.denoiser.dtype
            controlnet = load_controlnet(controlnet, torch_dtype=dtype, device=device)
        if controlnet is not None:
            tasks.check_controlnet(pipe, controlnet)
        self.controlnet = controlnet if controlnet is not None else getattr(pipe, "controlnet", None)
        self.base = base or str(getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__)
        self.loras: dict[str, Member] = {}
        for name, (lora, weight) in adapters_of(pipe).items():
            self.add(lora, name=name, weight=weight)

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path = EMBEDDED,
        *,
        torch_dtype: Any = None,
        device: str | None = None,
        controlnet: Any = None,
        **kwargs: Any,
    ) -> Composer:
        """From "embedded", a folder or a hub id, with a ControlNet or its folder; see load_pipeline."""
        pipe = load_pipeline(base, torch_dtype=torch_dtype, device=device, **kwargs)
        return cls(pipe, base=str(base), controlnet=controlnet)

    def add(self, lora: Any, name: str | None = None, weight: Any = None, **options: Any) -> Member:
        """Add a LoRA: a path, a name of the embedded library, or a Lora.

        weight is a number or a schedule ("0@0,1@0.5"), default 1; options are text_encoder_weight, blocks,
        positive_only and mask (see Member). Raises ValueError when the LoRA does not fit this base, or the name is
        taken.
        """
        known = [p for p in inspect.signature(member).parameters if p not in ("pipe", "lora", "name", "weight")]
        for option in options:
            if option not in known:
                raise unknown("option of a LoRA", option, known)
        new = member(self.pipe, lora, name=name, weight=weight, **options)
        if new.name in self.loras:
            raise ValueError(f"a LoRA named {new.name!r} is in the composition already; give another name")
        self.loras[new.name] = new
        return new

    def remove(self, name: str) -> None:
        """Take a LoRA out again. Raises UnknownName."""
        if name not in self.loras:
            raise unknown("LoRA", name, self.loras)
        del self.loras[name]

    @property
    def defaults(self) -> dict[str, Any]:
        """Steps and guidance used when the caller gives none."""
        return self._defaults(type(self.pipe))

    def _defaults(self, cls: type) -> dict[str, Any]:
        call = inspect.signature(cls.__call__).parameters
        own = {
            "num_inference_steps": request.default_of(call, "num_inference_steps", 50),
            "guidance_scale": request.default_of(call, request.guidance_argument(call), 1.0),
        }
        return {**own, **EMBEDDED_DEFAULTS} if self.base == EMBEDDED else own

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of a picture when the caller gives neither a size nor a picture to start from."""
        return request.default_size(self.pipe, self.denoiser)

    @property
    def tasks(self) -> list[str]:
        """What this pipeline's family can make pictures from."""
        return sorted(tasks.tasks_of(self.pipe))

    def pipeline_for(self, *given: str) -> Any:
        """The pipeline that makes a picture from "image", "mask_image" or "control_image": its components are ours.

        Raises ValueError when the family has no such task, or a ControlNet is missing.
        """
        _, cls = self._class_for(given)
        return tasks.sibling(self.pipe, cls, self.controlnet if tasks.needs_controlnet(cls) else None)

    def _class_for(self, given: Iterable[str]) -> tuple[str, type]:
        task, cls = tasks.class_for(self.pipe, given)
        if tasks.needs_controlnet(cls) and self.controlnet is None:
            raise ValueError(f"task {task!r} needs a ControlNet: Composer(controlnet=FOLDER), or --controlnet FOLDER")
        return task, cls

    @property
    def _controlnet_name(self) -> str:
        name = getattr(getattr(self.controlnet, "config", None), "_name_or_path", "")
        return self.controlnet_reference or str(name or type(self.controlnet).__name__)

    @served
    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        method: str | Method | Bound = "merge",
        options: Mapping[str, Any] | None = None,
        *,
        loras: Mapping[str, Any] | None = None,
        seed: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        width: int | None = None,
        height: int | None = None,
        num_images_per_prompt: int = 1,
        image: Any = None,
        mask_image: Any = None,
        control_image: Any = None,
        strength: float | None = None,
        controlnet_conditioning_scale: float | None = None,
        true_cfg_scale: float | None = None,
        pipeline_options: Mapping[str, Any] | None = None,
        scheduler: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        text_encoder: str = "per_row",
        scale: float = 1.0,
        form: str = "auto",
        passes_per_call: int | None = None,
        cache: Any = None,
        progress: Callable[[int, int, dict], None] | None = None,
        preview: Callable[[int, int, Any], None] | None = None,
        preview_seconds: float = 0.0,
        cancel: Any = None,
        **method_options: Any,
    ) -> Composed:
        """Draw the prompt with the composer's LoRAs, and those that it names as `<lora:name:0.8>`.

        method, options        a route method and its options (also as keywords: every=5)
        loras                  name -> weight, as tags in the prompt
        seed                   of the starting noise; None draws one, the recipe holds it. Picture i of several uses
                               seed + i
        width, height          in pixels, default the pictures' size, else the model's own
        image                  a picture to start from: a path, a PIL picture or an array (see read_picture)
        strength               how much of `image` is drawn anew, above 0 to 1; default the pipeline's. Without `image`
                               it is an option of the method, where that has one
        mask_image             what of `image` is drawn anew (white), in the picture's size
        control_image          what the ControlNet sees, by controlnet_conditioning_scale; default the pipeline's
        guidance_scale         the pipeline's; on Qwen-Image its true_cfg_scale
        true_cfg_scale         of FLUX.1: guidance by a negative prompt, beside the distilled guidance_scale
        pipeline_options       further arguments of the pipeline's call, such as {"max_sequence_length": 128}
        scheduler              class name of a compatible diffusers scheduler, default the pipeline's
        text_encoder, scale, form, passes_per_call, cache, cancel    see composing
        progress               called after each step of the scheduler (two per step for Heun and the like) with
                               (step, steps, {"method": ..., "passes": ...})
        preview                likewise, with (step, steps, small PIL picture), `preview_seconds` after the last one at
                               the earliest

        Other keywords go to the method. Raises ValueError for bad arguments before anything runs, Cancelled when
        `cancel` was set: then there is no picture.
        """
        pictures = read_pictures({"image": image, "mask_image": mask_image, "control_image": control_image})
        if strength is not None and "image" not in pictures:
            method_options, strength = {**method_options, "strength": strength}, None
        if type(preview_seconds) not in (int, float) or not preview_seconds >= 0:
            raise ValueError(f"preview_seconds={preview_seconds!r}: a number of at least 0 is wanted")
        bound = resolve("route", method, **{**(options or {}), **method_options})
        task, cls = self._class_for(pictures)
        request.text("prompt", prompt)
        prompt, members = asked_for(self, prompt, loras)
        asked = request.checked(
            self.pipe,
            cls,
            self.denoiser,
            self._defaults(cls),
            pictures,
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            width=width,
            height=height,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            strength=strength,
            controlnet_conditioning_scale=controlnet_conditioning_scale,
            pipeline_options=pipeline_options,
        )
        factor = self.pipe.vae_scale_factor * (2 if hasattr(self.pipe, "_unpack_latents") else 1)
        for m in members:
            if m.mask is not None:
                fit_mask(m.mask, (asked.height // factor, asked.width // factor), m.name)
        generator = [torch.Generator("cpu").manual_seed(asked.seed + i) for i in range(asked.pictures)]
        conductor: Conductor | None = None
        clock: Clock | None = None
        shown = -math.inf

        def step_end(pipe: Any, i: int, t: Any, tensors: dict) -> dict:
            nonlocal shown
            if cancel is not None and cancel.is_set():
                raise Cancelled(f"cancelled after step {i + 1} of {clock.steps}")
            now, of = clock.step + 1, clock.steps
            if progress is not None:
                progress(now, of, {"method": bound.record.name, "passes": conductor.passes[-1] if conductor else 1})
            if preview is not None and time.monotonic() - shown >= preview_seconds:
                preview(now, of, latent_preview(pipe, tensors["latents"], asked.height, asked.width))
                shown = time.monotonic()
            return tensors

        with contextlib.ExitStack() as stack:
            stack.enter_context(lane(self.denoiser))
            pipe = tasks.sibling(self.pipe, cls, self.controlnet if tasks.needs_controlnet(cls) else None)
            used = stack.enter_context(fresh_scheduler(pipe, scheduler, scheduler_config))
            conductor = stack.enter_context(
                composing(
                    pipe,
                    members,
                    bound,
                    text_encoder=text_encoder,
                    scale=scale,
                    form=form,
                    passes_per_call=passes_per_call,
                    cache=cache,
                    cancel=cancel,
                )
            )
            clock = conductor.clock if conductor else stack.enter_context(counted(pipe, self.denoiser))
            stack.enter_context(fixed_randomness(self.denoiser.device))
            stack.enter_context(plain_latents(pipe))
            images = pipe(
                **asked.call,
                generator=generator if asked.pictures > 1 else generator[0],
                callback_on_step_end=step_end,
            ).images
            if conductor is not None and conductor.calls == 0:
                raise RuntimeError("the pipeline never called its denoiser; nothing was composed")
            recipe = Recipe(
                **asked.recorded,
                task=task,
                controlnet=self._controlnet_name if tasks.needs_controlnet(cls) else "",
                prompt=prompt,
                base=self.base,
                base_family=files.family_of_model(self.pipe),
                loras=[_use(m) for m in members],
                method=bound.record.name,
                options=bound.options,
                scheduler=type(used).__name__,
                scheduler_config=dict(scheduler_config or {}),
                text_encoder=text_encoder,
                cache="" if cache is None else str(cache),
                scale=scale,
                resolved=Resolved(
                    device=str(self.denoiser.device),
                    dtype=str(self.denoiser.dtype).removeprefix("torch."),
                    threads=torch.get_num_threads(),
                    form=conductor.bank.form if conductor else form,
                    passes_per_call=passes_per_call or (max(conductor.passes) if conductor else 1),
                    choice=conductor.explains if conductor else "",
                    versions=_versions(),
                ),
            )
            return Composed(list(images), recipe, list(conductor.passes) if conductor else [])

    def compose(self, recipe: Recipe, pictures: Mapping[str, Any] | None = None, **callbacks: Any) -> Composed:
        """Make a recipe again. The composer's own LoRAs are not used.

        A recipe of one picture of several makes all of them; its own is number `recipe.index`.
        Raises ValueError when the recipe is for another base or ControlNet, or a LoRA's file or a picture is missing
        or has changed (sha256). `pictures` (image, mask_image, control_image) are those that were in memory only, or
        have moved; `callbacks` are progress, preview, preview_seconds and cancel.
        """
        if recipe.base != self.base:
            raise ValueError(f"this recipe is for base {recipe.base!r}, this composer holds {self.base!r}")
        if recipe.controlnet and recipe.controlnet != self._controlnet_name:
            mine = self._controlnet_name if self.controlnet is not None else "none"
            raise ValueError(f"this recipe is for ControlNet {recipe.controlnet!r}, this composer holds {mine}")
        inputs = same_pictures(recipe.pictures, pictures or {})
        resolved = recipe.resolved
        with remade(self, recipe) as again, as_explained(resolved.choice if resolved else ""):
            out = again(
                recipe.prompt,
                recipe.negative_prompt,
                recipe.method,
                recipe.options,
                seed=recipe.seed,
                num_inference_steps=recipe.steps,
                guidance_scale=recipe.guidance_scale,
                width=recipe.width,
                height=recipe.height,
                num_images_per_prompt=recipe.images,
                scheduler=recipe.scheduler,
                **inputs,
                strength=recipe.strength,
                controlnet_conditioning_scale=recipe.controlnet_conditioning_scale,
                true_cfg_scale=recipe.true_cfg_scale,
                pipeline_options=recipe.pipeline_options,
                scheduler_config=recipe.scheduler_config,
                text_encoder=recipe.text_encoder,
                cache=recipe.cache or None,
                scale=recipe.scale,
                form=resolved.form if resolved else "auto",
                passes_per_call=resolved.passes_per_call if resolved else None,
                **callbacks,
            )
        then, now = ((r.choice if r else "").partition(":")[0] for r in (resolved, out.recipe.resolved))
        if resolved and then != now:
            warnings.warn(
                f"method {recipe.method!r} chose otherwise when this recipe was made: then {resolved.choice!r}, now "
                f"{out.recipe.resolved.choice!r}. The picture is another one.",
                stacklevel=2,
            )
        out.recipe = out.recipe.model_copy(update={"index": recipe.index})
        return out


@functools.cache
def _versions() -> dict[str, str]:
    return {p: importlib.metadata.version(p) for p in ("torch", "diffusers", "transformers")}


def _use(m: Member) -> LoraUse:
    digest = hashlib.sha256(m.mask.numpy().tobytes()).hexdigest() if m.mask is not None else None
    return LoraUse(
        name=m.name,
        reference=m.reference,
        sha256=m.lora.card.sha256 or None,
        weight=m.weight.constant if m.weight.constant is not None else str(m.weight),
        text_encoder_weight=m.text_encoder_weight,
        blocks=dict(m.blocks),
        positive_only=m.positive_only,
        mask=m.mask_reference or None,
        mask_sha256=digest,
    )
