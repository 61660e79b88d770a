"""Composer: any diffusers pipeline, LoRAs and a method -> pictures with their recipe."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import inspect
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from multilora import files
from multilora.method import Bound, Method, resolve, unknown
from multilora.pipelines.clock import Clock, step_clock
from multilora.pipelines.composing import adapters_of, composing, denoiser_of, member, tagged
from multilora.pipelines.denoise import Cancelled, Conductor, intercepted
from multilora.pipelines.inputs import bound_arguments
from multilora.pipelines.lanes import lane
from multilora.pipelines.load import EMBEDDED, EMBEDDED_DEFAULTS, load_pipeline
from multilora.pipelines.members import Member, fit_mask
from multilora.pipelines.preview import preview as latent_preview
from multilora.recipe import LoraUse, Recipe, Resolved
from multilora.tags import parse_prompt

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
    """

    def __init__(self, pipe: Any, base: str = ""):
        self.component, self.denoiser = denoiser_of(pipe)
        self.pipe = pipe
        self.base = base or str(getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__)
        self.loras: dict[str, Member] = {}
        for name, (lora, weight) in adapters_of(pipe).items():
            self.add(lora, name=name, weight=weight)

    @classmethod
    def from_pretrained(
        cls, base: str | Path = EMBEDDED, *, torch_dtype: Any = None, device: str | None = None, **kwargs: Any
    ) -> Composer:
        """From "embedded", a folder or a hub id; see load_pipeline."""
        return cls(load_pipeline(base, torch_dtype=torch_dtype, device=device, **kwargs), base=str(base))

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
        call = inspect.signature(self.pipe.__call__).parameters
        own = {n: call[n].default for n in ("num_inference_steps", "guidance_scale") if n in call}
        return {**own, **EMBEDDED_DEFAULTS} if self.base == EMBEDDED else own

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of a picture when the caller gives none."""
        sample = getattr(self.pipe, "default_sample_size", None) or self.denoiser.config.sample_size
        h, w = (sample, sample) if isinstance(sample, int) else sample
        factor = self.pipe.vae_scale_factor
        return w * factor, h * factor

    def _check_size(self, width: int, height: int) -> None:
        patch = getattr(self.denoiser.config, "patch_size", None) or 1
        packed = 2 if hasattr(self.pipe, "_unpack_latents") else 1
        multiple = self.pipe.vae_scale_factor * max(patch, packed)
        for name, value in (("width", width), ("height", height)):
            if type(value) is not int or value < multiple or value % multiple:
                low = max(multiple, value // multiple * multiple) if type(value) is int else multiple
                raise ValueError(
                    f"{name}={value!r}: wanted a multiple of {multiple} for this model; nearest are {low} and "
                    f"{low + multiple}"
                )

    def _tagged(self, prompt: str) -> tuple[str, list[Member]]:
        """The prompt without its `<lora:...>` tags, and the composer's members with the tagged ones added.

        A tag that names a member gives that member its weight for this picture.
        """
        clean, tags = parse_prompt(prompt)
        members = dict(self.loras)
        for tag in tags:
            members[tag.name] = tagged(self.pipe, tag, members.get(tag.name))
        return clean, list(members.values())

    @contextlib.contextmanager
    def _scheduler(self, name: str | None, config: Mapping[str, Any] | None) -> Any:
        """A fresh scheduler for one run: no state from the last picture, none left behind."""
        import diffusers

        own = self.pipe.scheduler
        cls = type(own)
        if name:
            known = [c.__name__ for c in own.compatibles]
            cls = getattr(diffusers, name, None)
            if cls is None or (name not in known and name != type(own).__name__):
                raise unknown("scheduler for this pipeline", name, {*known, type(own).__name__})
        try:
            self.pipe.scheduler = cls.from_config({**own.config, **(config or {})})
            yield self.pipe.scheduler
        finally:
            self.pipe.scheduler = own

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        method: str | Method | Bound = "merge",
        options: Mapping[str, Any] | None = None,
        *,
        seed: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        width: int | None = None,
        height: int | None = None,
        num_images_per_prompt: int = 1,
        scheduler: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        text_encoder: str = "per_row",
        scale: float = 1.0,
        form: str = "auto",
        passes_per_call: int | None = None,
        progress: Callable[[int, int, dict], None] | None = None,
        preview: Callable[[int, int, Any], None] | None = None,
        cancel: Any = None,
        **method_options: Any,
    ) -> Composed:
        """Draw the prompt with the composer's LoRAs, and those that it names as `<lora:name:0.8>`.

        method, options        a route method and its options (also as keywords: every=5)
        seed                   of the starting noise; None draws one, the recipe holds it. Picture i of several uses
                               seed + i
        width, height          in pixels, default the model's own size
        scheduler              class name of a compatible diffusers scheduler, default the pipeline's
        text_encoder, scale, form, passes_per_call, cancel    see composing
        progress               called after each step of the scheduler (two per step for Heun and the like) with
                               (step, steps, {"method": ..., "passes": ...})
        preview                likewise, with (step, steps, small PIL picture)

        Other keywords go to the method. Raises ValueError for bad arguments before anything runs, Cancelled when
        `cancel` was set: then there is no picture.
        """
        bound = resolve("route", method, **{**(options or {}), **method_options})
        defaults = self.defaults
        steps = defaults.get("num_inference_steps", 50) if num_inference_steps is None else num_inference_steps
        guidance = defaults.get("guidance_scale", 1.0) if guidance_scale is None else guidance_scale
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"num_inference_steps={steps!r}: wanted a whole number of at least 1")
        if isinstance(guidance, bool) or not isinstance(guidance, (int, float)) or not abs(guidance) < float("inf"):
            raise ValueError(f"guidance_scale={guidance!r}: a finite number is wanted")
        if type(num_images_per_prompt) is not int or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt!r}: wanted a whole number of at least 1")
        for argument, text in (("prompt", prompt), ("negative_prompt", negative_prompt or "")):
            if not isinstance(text, str):
                raise ValueError(f"{argument}={text!r}: a string is wanted")
        width = self.size[0] if width is None else width
        height = self.size[1] if height is None else height
        self._check_size(width, height)
        prompt, members = self._tagged(prompt)
        factor = self.pipe.vae_scale_factor * (2 if hasattr(self.pipe, "_unpack_latents") else 1)
        for m in members:
            if m.mask is not None:
                fit_mask(m.mask, (height // factor, width // factor), m.name)
        seed = secrets.randbelow(2**32) if seed is None else seed
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= 2**63 - num_images_per_prompt:
            span = f"0 to 2**63 - {num_images_per_prompt}"
            raise ValueError(f"seed={seed!r}: wanted a whole number from {span}, picture i has seed + i")
        generator = [torch.Generator("cpu").manual_seed(seed + i) for i in range(num_images_per_prompt)]
        conductor: Conductor | None = None
        clock: Clock | None = None

        def step_end(pipe: Any, i: int, t: Any, tensors: dict) -> dict:
            if cancel is not None and cancel.is_set():
                raise Cancelled(f"cancelled after step {i + 1} of {steps}")
            now, of = clock.step + 1, clock.steps
            if progress is not None:
                progress(now, of, {"method": bound.record.name, "passes": conductor.passes[-1] if conductor else 1})
            if preview is not None:
                preview(now, of, latent_preview(pipe, tensors["latents"], height, width))
            return tensors

        with contextlib.ExitStack() as stack:
            stack.enter_context(lane(self.denoiser))
            used = stack.enter_context(self._scheduler(scheduler, scheduler_config))
            conductor = stack.enter_context(
                composing(
                    self.pipe,
                    members,
                    bound,
                    text_encoder=text_encoder,
                    scale=scale,
                    form=form,
                    passes_per_call=passes_per_call,
                    cancel=cancel,
                )
            )
            clock = conductor.clock if conductor else stack.enter_context(_counted(self.pipe, self.denoiser))
            images = self.pipe(
                prompt,
                negative_prompt=negative_prompt or None,
                num_inference_steps=steps,
                guidance_scale=float(guidance),
                width=width,
                height=height,
                num_images_per_prompt=num_images_per_prompt,
                generator=generator if num_images_per_prompt > 1 else generator[0],
                callback_on_step_end=step_end,
            ).images
            if conductor is not None and conductor.calls == 0:
                raise RuntimeError("the pipeline never called its denoiser; nothing was composed")
            recipe = Recipe(
                prompt=prompt,
                negative_prompt=negative_prompt or "",
                base=self.base,
                base_family=files.family_of_model(self.pipe),
                loras=[_use(m) for m in members],
                method=bound.record.name,
                options=bound.options,
                scheduler=type(used).__name__,
                scheduler_config=dict(scheduler_config or {}),
                steps=steps,
                guidance_scale=float(guidance),
                width=width,
                height=height,
                seed=seed,
                images=num_images_per_prompt,
                text_encoder=text_encoder,
                scale=scale,
                resolved=Resolved(
                    device=str(self.denoiser.device),
                    dtype=str(self.denoiser.dtype).removeprefix("torch."),
                    threads=torch.get_num_threads(),
                    form=conductor.bank.form if conductor else form,
                    passes_per_call=passes_per_call or (max(conductor.passes) if conductor else 1),
                    versions={p: importlib.metadata.version(p) for p in ("torch", "diffusers", "transformers")},
                ),
            )
            return Composed(list(images), recipe, list(conductor.passes) if conductor else [])

    def compose(self, recipe: Recipe, **callbacks: Any) -> Composed:
        """Make a recipe again. The composer's own LoRAs are not used.

        A recipe of one picture of several makes all of them; its own is number `recipe.index`.
        Raises ValueError when the recipe is for another base, or a LoRA file is missing or has changed (sha256).
        `callbacks` are progress, preview and cancel.
        """
        if recipe.base != self.base:
            raise ValueError(f"this recipe is for base {recipe.base!r}, this composer holds {self.base!r}")
        again = Composer.__new__(Composer)
        again.__dict__.update({**self.__dict__, "loras": {}})
        for use in recipe.loras:
            own = self.loras.get(use.name)
            source = use.reference or (own.lora if own else None)
            if source is None:
                raise ValueError(f"LoRA {use.name!r} of the recipe has no file; add it under that name first")
            again.add(
                source,
                name=use.name,
                weight=use.weight,
                text_encoder_weight=use.text_encoder_weight,
                blocks=use.blocks,
                positive_only=use.positive_only,
                mask=use.mask or (own.mask if own else None),
            )
            found = again.loras[use.name].lora.card.sha256
            if use.sha256 and found and found != use.sha256:
                raise ValueError(
                    f"LoRA {use.name!r} at {use.reference!r} is not the file of the recipe: sha256 {found[:12]}, the "
                    f"recipe has {use.sha256[:12]}"
                )
        resolved = recipe.resolved
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
            scheduler_config=recipe.scheduler_config,
            text_encoder=recipe.text_encoder,
            scale=recipe.scale,
            form=resolved.form if resolved else "auto",
            passes_per_call=resolved.passes_per_call if resolved else None,
            **callbacks,
        )
        out.recipe = out.recipe.model_copy(update={"index": recipe.index})
        return out


@contextlib.contextmanager
def _counted(pipe: Any, denoiser: torch.nn.Module) -> Iterator[Clock]:
    """The step clock of a picture without LoRAs: calls of the denoiser are counted and nothing else."""
    with step_clock(pipe.scheduler, lambda: getattr(pipe, "_num_timesteps", None)) as clock:
        forward = getattr(denoiser, "_orig_mod", denoiser).forward

        def count(model: Callable, args: tuple, kwargs: dict) -> Any:
            clock.call(bound_arguments(forward, args, kwargs).get("timestep"))
            return model(*args, **kwargs)

        with intercepted(denoiser, count):
            yield clock


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
