"""The arguments of a picture, checked before anything runs, and what a pipeline class takes of them."""

from __future__ import annotations

import inspect
import json
import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from multilora.method import unknown
from multilora.pipelines.pictures import Picture, fit_pictures
from multilora.pipelines.tasks import roles
from multilora.recipe import PictureUse


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, wanted: str = "") -> float:
    """A finite number within low..high. Raises ValueError naming it."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: {wanted or 'a finite number is wanted'}")
    return float(value)


def whole(name: str, value: Any) -> int:
    """A whole number of at least 1. Raises ValueError naming it."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: wanted a whole number of at least 1")
    return value


def text(name: str, value: Any) -> str:
    """A string. Raises ValueError naming it."""
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r}: a string is wanted")
    return value


def seeds(seed: Any, pictures: int) -> int:
    """The seed, or a new one for None. Raises ValueError for one that leaves no room for seed + i."""
    if seed is None:
        return secrets.randbelow(2**32)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= 2**63 - pictures:
        span = f"0 to 2**63 - {pictures}"
        raise ValueError(f"seed={seed!r}: wanted a whole number from {span}, picture i has seed + i")
    return seed


def size_multiple(pipe: Any, denoiser: Any) -> int:
    """Width and height of a picture are multiples of this many pixels."""
    config = denoiser.config
    patch = max(getattr(config, "patch_size", None) or 1, *getattr(config, "all_patch_size", (1,)))
    packed = 2 if hasattr(pipe, "_unpack_latents") else 1
    return pipe.vae_scale_factor * max(patch, packed)


def default_size(pipe: Any, denoiser: Any) -> tuple[int, int]:
    """(width, height) of a picture when the caller gives none; 1024 where the model does not say."""
    sample = getattr(pipe, "default_sample_size", None) or getattr(denoiser.config, "sample_size", None)
    if sample is None:
        return 1024, 1024
    h, w = (sample, sample) if isinstance(sample, int) else sample
    return w * pipe.vae_scale_factor, h * pipe.vae_scale_factor


def check_strength(value: Any, steps: int, floors: bool) -> float:
    """A strength within (0, 1] that leaves a step. `floors`: the pipeline runs int(steps * strength) of them."""
    value = number("strength", value, wanted="a number above 0 and at most 1 is wanted")
    if not 0.0 < value <= 1.0:
        raise ValueError(f"strength={value!r}: a number above 0 and at most 1 is wanted")
    if floors and int(steps * value) < 1:
        raise ValueError(
            f"strength={value:g} of num_inference_steps={steps} leaves no step to run; wanted a strength of at least "
            f"{1 / steps:g} or more steps"
        )
    return value


# -- what a pipeline takes ------------------------------------------------------------------------------------------


def guidance_argument(call: Mapping[str, inspect.Parameter]) -> str:
    """The argument of a pipeline's call that `guidance_scale` of the Composer goes to.

    Qwen-Image guides by true_cfg_scale, on by default, and its guidance_scale is for distilled models. FLUX.1 has
    both, with true_cfg_scale off.
    """
    true = call.get("true_cfg_scale")
    return "true_cfg_scale" if true is not None and true.default > 1 else "guidance_scale"


def default_of(call: Mapping[str, inspect.Parameter], name: str, otherwise: Any) -> Any:
    """A pipeline's own default of an argument of its call."""
    found = call[name].default if name in call else None
    return otherwise if found is None or found is inspect.Parameter.empty else found


@dataclass(frozen=True)
class Asked:
    """What was asked for, checked, with the pipeline's own values where the caller gave none.

    call       arguments of the pipeline's call
    recorded   the fields of the recipe that say the same
    width, height, steps, pictures, seed    as they will be; pictures is how many
    """

    call: dict[str, Any]
    recorded: dict[str, Any]
    width: int
    height: int
    steps: int
    pictures: int
    seed: int


def checked(
    pipe: Any,
    cls: type,
    denoiser: Any,
    defaults: Mapping[str, Any],
    given: Mapping[str, Picture],
    *,
    prompt: Any,
    negative_prompt: Any,
    num_inference_steps: Any,
    guidance_scale: Any,
    true_cfg_scale: Any,
    width: Any,
    height: Any,
    num_images_per_prompt: Any,
    seed: Any,
    strength: Any,
    controlnet_conditioning_scale: Any,
    pipeline_options: Mapping[str, Any] | None,
) -> Asked:
    """The arguments of Composer for pipeline class `cls`. Raises ValueError naming the first that is wrong."""
    call = inspect.signature(cls.__call__).parameters
    where = cls.__name__

    def absent(name: str, hint: str) -> ValueError:
        return ValueError(f"{name}: {where} does not take it; {hint}")

    steps = whole("num_inference_steps", _either(num_inference_steps, defaults["num_inference_steps"]))
    by = guidance_argument(call)
    if true_cfg_scale is not None and by == "true_cfg_scale":
        if guidance_scale is not None and guidance_scale != true_cfg_scale:
            raise ValueError(
                f"guidance_scale={guidance_scale!r} and true_cfg_scale={true_cfg_scale!r}: they are one for this "
                "pipeline; give one of them"
            )
        guidance_scale, true_cfg_scale = true_cfg_scale, None
    guidance = number("guidance_scale", _either(guidance_scale, defaults["guidance_scale"]))
    count = whole("num_images_per_prompt", num_images_per_prompt)
    text("prompt", prompt)
    negative = text("negative_prompt", negative_prompt or "")
    if negative and "negative_prompt" not in call:
        raise absent(f"negative_prompt={negative!r}", "leave it out")
    if true_cfg_scale is not None:
        true_cfg_scale = number("true_cfg_scale", true_cfg_scale)
        if "true_cfg_scale" not in call:
            raise absent(f"true_cfg_scale={true_cfg_scale:g}", "guidance_scale is its guidance by a negative prompt")
    if strength is not None and "strength" not in call:
        raise absent(f"strength={strength!r}", "leave it out")
    if "strength" in call and given:
        strength = check_strength(_either(strength, call["strength"].default), steps, hasattr(pipe, "unet"))
    scale = controlnet_conditioning_scale
    if scale is not None and ("controlnet_conditioning_scale" not in call or not given):
        raise absent(f"controlnet_conditioning_scale={scale!r}", "it goes with control_image=")
    if "controlnet_conditioning_scale" in call:
        scale = number("controlnet_conditioning_scale", _either(scale, call["controlnet_conditioning_scale"].default))
    width, height, images = fit_pictures(
        given, width, height, default_size(pipe, denoiser), size_multiple(pipe, denoiser)
    )
    seed = seeds(seed, count)
    wanted = {
        "prompt": prompt,
        "negative_prompt": negative or None,
        "num_inference_steps": steps,
        by: guidance,
        "true_cfg_scale": guidance if by == "true_cfg_scale" else true_cfg_scale,
        "width": width,
        "height": height,
        "num_images_per_prompt": count,
        "strength": strength,
        "controlnet_conditioning_scale": scale,
        **{roles(cls)[role]: picture for role, picture in images.items()},
    }
    # One copy per picture: else all are encoded by the first one's generator (and SD3's pipeline fails); Z-Image's
    # ControlNet, which encodes without one, repeats its picture and forgets the mask.
    repeated = "image" if "strength" in call else "mask_image"
    if count > 1 and wanted.get(repeated) is not None and not (pipeline_options or {}).get("padding_mask_crop"):
        wanted[repeated] = [wanted[repeated]] * count
    set_here = (*wanted, "generator", "callback_on_step_end")
    options = check_options(pipeline_options or {}, call, set_here)
    recorded = {
        "negative_prompt": negative,
        "steps": steps,
        "guidance_scale": guidance,
        "true_cfg_scale": true_cfg_scale,
        "width": width,
        "height": height,
        "images": count,
        "seed": seed,
        "strength": strength,
        "controlnet_conditioning_scale": scale,
        "pictures": [PictureUse(role=p.role, reference=p.reference, sha256=p.sha256) for p in given.values()],
        "pipeline_options": options,
    }
    taken = {n: v for n, v in wanted.items() if n in call and (v is not None or n == "negative_prompt")}
    return Asked({**taken, **options}, recorded, width, height, steps, count, seed)


def _either(value: Any, default: Any) -> Any:
    return default if value is None else value


def check_options(
    options: Mapping[str, Any], call: Mapping[str, inspect.Parameter], taken: Iterable[str]
) -> dict[str, Any]:
    """Further arguments of the pipeline's call. Raises ValueError for unknown, taken and unrecordable ones."""
    if not isinstance(options, Mapping):
        raise ValueError(f"pipeline_options={options!r}: wanted a dict of arguments of the pipeline's call")
    free = [n for n in call if n not in (*taken, "self", "args", "kwargs")]
    for name, value in options.items():
        if name in taken:
            raise ValueError(f"pipeline option {name!r}: it is an argument of the Composer, or set by it")
        if name not in free:
            raise unknown("pipeline option", name, free)
        try:
            kept = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            kept = None
        if kept != (list(value) if isinstance(value, tuple) else value):
            raise ValueError(
                f"pipeline option {name} is a {type(value).__name__}: a recipe holds numbers, strings, lists, dicts; "
                "for tensors use composing(pipe, ...) around your own call"
            )
    return dict(options)
