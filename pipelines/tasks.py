"""Tasks: what a picture is made from, and the pipeline class of the same family that makes it.

diffusers has one class per task. `tasks_of` lists those of a pipeline's family, from diffusers' own AUTO mappings;
`sibling` puts the components of one pipeline into another class.
"""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Iterable
from typing import Any

TEXT_TO_IMAGE = "text-to-image"
# (pictures given, with a ControlNet) -> the task's name.
_NAMES = {
    (frozenset(), False): TEXT_TO_IMAGE,
    (frozenset({"image"}), False): "image-to-image",
    (frozenset({"image", "mask_image"}), False): "inpainting",
    (frozenset({"control_image"}), False): "control",
    (frozenset({"image", "control_image"}), False): "control image-to-image",
    (frozenset({"image", "mask_image", "control_image"}), False): "control inpainting",
    (frozenset({"control_image"}), True): "ControlNet",
    (frozenset({"image", "control_image"}), True): "ControlNet image-to-image",
    (frozenset({"image", "mask_image", "control_image"}), True): "ControlNet inpainting",
    (frozenset({"image", "mask_image"}), True): "ControlNet inpainting without control_image",
}
# In diffusers, but in none of its mappings.
_UNLISTED = {"qwenimage-controlnet": ("QwenImageControlNetInpaintPipeline",)}
# How a pipeline is run, beside its components and config.
_STATE = ("_progress_bar_config", "_offload_device", "_offload_gpu_id", "_all_hooks", "hf_device_map", "watermark")
_WIDTHS = ("cross_attention_dim", "joint_attention_dim", "pooled_projection_dim", "caption_projection_dim")


def roles(cls: type) -> dict[str, str]:
    """Picture that a pipeline class works on ("image", "mask_image", "control_image") -> its argument's name."""
    call = inspect.signature(cls.__call__).parameters
    if "control_mask" in call:  # a ControlNet that inpaints: its condition is the picture itself
        return {"image": "control_image", "mask_image": "control_mask"}
    if needs_controlnet(cls) and "control_image" not in call and "image" in call:
        return {"control_image": "image"}
    return {name: name for name in ("image", "mask_image", "control_image") if name in call}


def needs_controlnet(cls: type) -> bool:
    """Whether a pipeline class has a ControlNet among its components."""
    return "controlnet" in inspect.signature(cls.__init__).parameters


def task_name(given: Iterable[str], controlnet: bool) -> str:
    """The name of the task with these pictures."""
    given = frozenset(given)
    return _NAMES.get((given, controlnet)) or " and ".join(sorted(given))


def _family(key: str) -> str:
    """A mapping's key without its ControlNet: "stable-diffusion-xl-controlnet-pag" -> "stable-diffusion-xl-pag"."""
    return re.sub(r"-controlnet(?!-union)(-inpaint)?", "", key)


@functools.cache
def _listed() -> list[tuple[str, str, type]]:
    """(family, task or "" for what the class's arguments say, class) of every pipeline in diffusers' mappings."""
    import diffusers
    from diffusers.pipelines import auto_pipeline as auto

    mappings = (
        auto.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        auto.AUTO_INPAINT_PIPELINES_MAPPING,
    )
    found = []
    for mapping in mappings:
        for key, cls in mapping.items():
            plain = mapping is mappings[0] and "control_image" not in roles(cls) and not needs_controlnet(cls)
            # Classes such as Flux2Pipeline are listed for text alone, and take pictures as well.
            found += [(_family(key), TEXT_TO_IMAGE, cls)] if plain else []
            found += [(_family(key), "", cls)] if roles(cls) else []
    for key, names in _UNLISTED.items():
        found += [(_family(key), "", cls) for name in names if (cls := getattr(diffusers, name, None))]
    return found


def family_of(cls: type) -> str | None:
    """diffusers' name of the family of a pipeline class ("stable-diffusion-xl"), or None when it has none."""
    for base in cls.__mro__:
        for family, _, listed in _listed():
            if listed is base:
                return family
    return None


def tasks_of(pipe: Any) -> dict[str, type]:
    """Task -> pipeline class, of all tasks that the pipeline's family has. The pipeline's own class comes first."""
    own = type(pipe)
    found = {task_name(roles(own), needs_controlnet(own)): own}
    if not _takes_noise(pipe):
        return found
    family = family_of(own)
    if family is None:
        return found
    for listed, task, cls in _listed():
        if listed == family:
            found.setdefault(task or task_name(roles(cls), needs_controlnet(cls)), cls)
    return found


def _takes_noise(pipe: Any) -> bool:
    """Whether the denoiser takes plain latents; U-Nets that were trained to inpaint or edit have more channels."""
    unet, vae = getattr(pipe, "unet", None), getattr(pipe, "vae", None)
    return unet is None or vae is None or unet.conv_in.in_channels == vae.config.latent_channels


def class_for(pipe: Any, given: Iterable[str]) -> tuple[str, type]:
    """(task, pipeline class) that makes a picture from the pictures `given`, by the names of Composer's arguments.

    Raises ValueError naming the family, the task and the tasks that it has.
    """
    given, own = frozenset(given), type(pipe)
    if given == frozenset(roles(own)):
        return task_name(given, needs_controlnet(own)), own
    found = tasks_of(pipe)
    wanted = [n for n in (task_name(given, False), task_name(given, True)) if n in found]
    if wanted:
        return wanted[0], found[wanted[0]]
    if not given and family_of(own) is None:  # an unknown class: let it say what it needs
        return TEXT_TO_IMAGE, own
    name = task_name(given, "control_image" in given)
    family = family_of(own)
    who = f"family {family}" if family else own.__name__
    if not _takes_noise(pipe):
        who += f" with a U-Net of {pipe.unet.conv_in.in_channels} input channels"
    raise ValueError(f"{who} has no task {name!r} in diffusers; its tasks are {', '.join(sorted(found))}")


def sibling(pipe: Any, cls: type, controlnet: Any = None) -> Any:
    """A pipeline of class `cls` with the components of `pipe`; nothing is copied, moved or cast.

    `cls.from_pipe` would cast every component, also those that the user holds in another dtype. What the user set on
    `pipe` (sizes, templates, progress bar, offload) holds in the sibling. Raises ValueError when `cls` needs a
    component that is not there.
    """
    if type(pipe) is cls and (controlnet is None or controlnet is getattr(pipe, "controlnet", None)):
        return pipe
    have: dict[str, Any] = {**pipe.config, **pipe.components}
    if controlnet is not None:
        have["controlnet"] = controlnet
    wanted = {n: p for n, p in inspect.signature(cls.__init__).parameters.items() if n != "self"}
    missing = [n for n, p in wanted.items() if n not in have and p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if missing:
        raise ValueError(f"{cls.__name__} needs a {missing[0]}, which {type(pipe).__name__} does not have")
    new = cls(**{n: have[n] for n in wanted if n in have})
    new.register_to_config(_name_or_path=pipe.config.get("_name_or_path"))
    for name, value in vars(pipe).items():
        # Their own caches and processors differ between classes; plain values are sizes and templates.
        plain = isinstance(value, (str, int, float)) and not name.startswith("_") and name in vars(new)
        if plain or name in _STATE:
            new.__dict__[name] = value
    return new


def check_controlnet(pipe: Any, controlnet: Any) -> None:
    """Raise ValueError when a ControlNet is none, or is not one for this pipeline's family or widths."""
    own = type(pipe)
    classes = [c for c in ([own] if needs_controlnet(own) else tasks_of(pipe).values()) if needs_controlnet(c)]
    kinds: list[type] = []
    for cls in classes:
        annotation = inspect.signature(cls.__init__).parameters["controlnet"].annotation
        parts = typing.get_args(annotation) or (annotation,)
        kinds += [part for part in parts if isinstance(part, type) and part not in kinds]
    if not classes:
        raise ValueError(f"controlnet: {own.__name__} has no ControlNet task in diffusers")
    if not isinstance(controlnet, tuple(kinds)):
        names = " or ".join(k.__name__ for k in kinds if not k.__name__.startswith("Multi"))
        raise ValueError(f"controlnet is a {type(controlnet).__name__}; this pipeline wants a {names}")
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    for net in getattr(controlnet, "nets", [controlnet]):
        for name in _WIDTHS:
            theirs, ours = getattr(net.config, name, None), getattr(denoiser.config, name, None)
            if None not in (theirs, ours) and theirs != ours:
                raise ValueError(
                    f"controlnet was made for another model: its {name} is {theirs}, this pipeline's is {ours}"
                )
