"""`composing`: several LoRAs in any diffusers pipeline for the length of a block."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from multilora import files, lbw, strength
from multilora.attach import attached, loaded
from multilora.bases import COMPONENTS
from multilora.lora import Lora
from multilora.method import Bound, Method, resolve
from multilora.pipelines.caching import cached, read_cache
from multilora.pipelines.clock import step_clock
from multilora.pipelines.denoise import Conductor
from multilora.pipelines.intercept import intercepted
from multilora.pipelines.lanes import lane
from multilora.pipelines.load import find_lora
from multilora.pipelines.members import Member, read_mask
from multilora.pipelines.prompt import Encodings
from multilora.pipelines.running import controlnet_as_base
from multilora.remembered import remembering, text_projections
from multilora.schedule import Schedule
from multilora.sites import block_factors, canonical
from multilora.stacked import stacking
from multilora.tags import LoraTag

DENOISERS = ("unet", "transformer")


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """Component name and module of a pipeline's denoiser. Raises ValueError when it has none of the known ones."""
    for name in DENOISERS:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return name, module
    raise ValueError(f"{type(pipe).__name__} has no denoiser: wanted a component named {' or '.join(DENOISERS)}")


# denoiser -> id of a LoRA -> the LoRA and the components on which it was found to fit, so that one which is kept is
# compared with a base once
_fitting: WeakKeyDictionary[nn.Module, dict[int, tuple[ref, ...]]] = WeakKeyDictionary()


def _check_fit(pipe: Any, lora: Lora) -> None:
    """As multilora.files.fits, which a LoRA passes once for the same components.

    A layer that someone exchanges within a component later is not looked at again; `attached` refuses its shape.
    """
    now = [lora, *(m for name in COMPONENTS if isinstance(m := getattr(pipe, name, None), nn.Module))]
    known = _fitting.setdefault(denoiser_of(pipe)[1], {})
    before = [r() for r in known.get(id(lora), ())]
    if len(before) != len(now) or any(a is not b for a, b in zip(before, now, strict=True)):
        files.fits(lora, pipe)
        for key, refs in list(known.items()):  # a copy: other threads add LoRAs, too
            if refs[0]() is None:
                known.pop(key, None)
        known[id(lora)] = tuple(map(ref, now))


def half_of(guider: Any) -> str | None:
    """Half of the call that a diffusers guider has prepared, or None without a guider: it has a call per condition."""
    if guider is None:
        return None
    return "positive" if guider.is_conditional else "negative"


def guidance_of(pipe: Any) -> float | None:
    """g of prediction = negative + g (positive - negative) in the picture that is being drawn.

    None where the pipeline does not say: true_cfg_scale (FLUX.1, Qwen-Image) stays inside its call.
    """
    guider = getattr(pipe, "guider", None)
    if guider is not None and getattr(guider, "num_conditions", 2) == 1:
        return 1.0
    if guider is None and has_true_cfg(type(pipe)):
        return None
    scale = getattr(pipe if guider is None else guider, "guidance_scale", None)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        return None
    # Z-Image and a guider of the original formulation add g (positive - negative) to the positive prediction.
    above = getattr(guider, "use_original_formulation", False) or type(pipe).__name__.startswith("ZImage")
    return float(scale) + (1.0 if above else 0.0)


@functools.cache
def has_true_cfg(cls: type) -> bool:
    """Whether a pipeline's call guides by true_cfg_scale."""
    return issubclass(cls, Callable) and "true_cfg_scale" in inspect.signature(cls.__call__).parameters


def member(
    pipe: Any,
    lora: Any,
    *,
    name: str | None = None,
    weight: Any = None,
    text_encoder_weight: float | None = None,
    blocks: Mapping[str, Any] | str | None = None,
    positive_only: bool = False,
    mask: Any = None,
) -> Member:
    """A Member from a Lora, a path, a library name, or the name of an adapter that diffusers loaded into `pipe`.

    The options are checked here, before anything is attached; see Member for what they mean. `blocks` may also be an
    lbw string ("OUTALL"), or have it under the key "lbw": see multilora.lbw.expanded. Raises ValueError naming the
    option, its value and what is allowed.
    """
    reference = ""
    if isinstance(lora, Member):
        return lora
    if not isinstance(lora, Lora):
        reference = str(lora)
        adapters = adapters_of(pipe)
        if reference in adapters:
            lora, own = adapters[reference]
            weight = own if weight is None else weight
            name = name or reference
        else:
            path, entry = find_lora(lora)
            lora = files.load(path, base=pipe, name=entry["name"] if entry else None)
            if entry:
                card = lora.card
                triggers = card.triggers or (entry["trigger"],)
                lora = lora.replace(card=card.replace(category=card.category or entry["category"], triggers=triggers))
                reference = entry["name"]
    else:
        _check_fit(pipe, lora)
    name = name or lora.card.name or Path(reference).stem or "lora"
    if text_encoder_weight is not None:
        try:
            constant = Schedule.parse(text_encoder_weight).constant
        except ValueError as error:
            raise ValueError(f"text_encoder_weight of LoRA {name!r}: {error}") from None
        if constant is None:
            raise ValueError(f"text_encoder_weight of LoRA {name!r}: a number is wanted, got {text_encoder_weight!r}")
        text_encoder_weight = constant
    try:
        schedule = Schedule.parse(1.0 if weight is None else weight)
    except ValueError as error:
        raise ValueError(f"weight of LoRA {name!r}: {error}") from None
    factors = {}
    if blocks is not None and not isinstance(blocks, (Mapping, str)):
        raise ValueError(f"blocks={blocks!r} of LoRA {name!r}: wanted a dict of module path or glob -> factor")
    component, denoiser = denoiser_of(pipe)
    if blocks:
        blocks, text_factor = lbw.expanded(blocks, lora, denoiser, component, f"LoRA {name!r}")
        if text_factor != 1.0:
            text_encoder_weight = text_factor * (schedule.peak if text_encoder_weight is None else text_encoder_weight)
    for pattern, factor in (blocks or {}).items():
        try:
            constant = Schedule.parse(factor).constant
        except ValueError as error:
            raise ValueError(f"block {pattern!r} of LoRA {name!r}: {error}") from None
        if constant is None:
            raise ValueError(f"block {pattern!r} of LoRA {name!r}: a number is wanted, got {factor!r}")
        factors[str(pattern)] = constant
    block_factors([canonical(path) for path in lora.part(component)], factors, f"LoRA {name!r}")
    grid, mask_reference = read_mask(mask, name)
    return Member(
        lora, name, schedule, text_encoder_weight, factors, bool(positive_only), grid, reference, mask_reference
    )


def tagged(pipe: Any, tag: LoraTag, known: Member | None = None) -> Member:
    """The Member that a prompt's tag asks for: a new one, or `known` with what the tag says in place of its own.

    Raises ValueError as `member` does.
    """
    if known is None:
        options = {"text_encoder_weight": tag.text_encoder_weight, "blocks": tag.blocks or None}
        return member(pipe, tag.name, weight=tag.weight, **options)
    text = known.text_encoder_weight if tag.text_encoder_weight is None else tag.text_encoder_weight
    if not tag.blocks:
        return replace(known, weight=tag.weight, text_encoder_weight=text)
    new = member(pipe, known.lora, name=known.name, weight=tag.weight, text_encoder_weight=text, blocks=tag.blocks)
    return replace(known, weight=new.weight, text_encoder_weight=new.text_encoder_weight, blocks=new.blocks)


def adapters_of(pipe: Any) -> dict[str, tuple[Lora, float]]:
    """The LoRAs that diffusers loaded into a pipeline, by adapter name, with their weights."""
    found: dict[str, tuple[Lora, float]] = {}
    for component in (*DENOISERS, "text_encoder", "text_encoder_2", "text_encoder_3"):
        module = getattr(pipe, component, None)
        if not isinstance(module, nn.Module):
            continue
        for name, (lora, weight) in loaded(module, component).items():
            if name in found:
                both, first = found[name]
                found[name] = (Lora({**both, **lora}, both.card), first)
            else:
                found[name] = (lora, weight)
    return found


def members_of(pipe: Any, loras: Any, weights: Any = None) -> list[Member]:
    """A list of Members from a list or a dict of LoRAs (None: those loaded into the pipeline), with their weights."""
    if loras is None:
        loras = list(adapters_of(pipe))
        if not loras:
            raise ValueError("no LoRAs given, and none are loaded in the pipeline; pass a list of LoRAs or paths")
    if isinstance(loras, (Lora, Member, str, Path)):
        loras = [loras]
    names: Sequence[str | None] = list(loras) if isinstance(loras, Mapping) and not isinstance(loras, Lora) else []
    items = list(loras.values()) if names else list(loras)
    weights = [None] * len(items) if weights is None else list(weights)
    if len(weights) != len(items):
        raise ValueError(f"weights: {len(weights)} values for {len(items)} LoRAs, wanted one each")
    names = names or [None] * len(items)
    return [member(pipe, x, name=n, weight=w) for x, n, w in zip(items, names, weights, strict=True)]


def check_run(scale: Any, passes_per_call: Any, cancel: Any) -> None:
    """The arguments of a composition that belong to no LoRA and no method; ValueError naming the first bad one."""
    if passes_per_call is not None and (type(passes_per_call) is not int or passes_per_call < 1):
        raise ValueError(f"passes_per_call={passes_per_call!r}: wanted a whole number of at least 1, or None for all")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) < float("inf"):
        raise ValueError(f"scale={scale!r}: a finite number is wanted")
    if cancel is not None and not callable(getattr(cancel, "is_set", None)):
        raise ValueError(f"cancel={cancel!r}: wanted an object with is_set(), such as a threading.Event")


def warned(bound: Bound, denoiser: nn.Module, component: str, members: Sequence[Member]) -> Bound:
    """The method, with a warning (multilora.strength.TooStrong) before the first run of a stack that is too strong."""

    def stack() -> strength.Stack:
        names, blocks = [m.name for m in members], [dict(m.blocks) or None for m in members]
        return strength.stack_of(denoiser, [m.lora for m in members], component, names=names, blocks=blocks)

    return strength.guarded(bound, stack, [m.weight for m in members], [m.mask is not None for m in members])


@contextlib.contextmanager
def composing(
    pipe: Any,
    loras: Any = None,
    method: str | Method | Bound = "merge",
    *,
    weights: Sequence[Any] | None = None,
    text_encoder: str = "per_row",
    scale: float = 1.0,
    form: str = "auto",
    passes_per_call: int | None = None,
    cache: Any = None,
    cancel: Any = None,
    **options: Any,
) -> Iterator[Conductor | None]:
    """Every picture that `pipe` makes in the block is composed of the LoRAs by the method.

        with composing(pipe, ["fox.safetensors", "robe.safetensors"], "switch", every=5):
            image = pipe(prompt, num_inference_steps=30).images[0]

    loras            Loras, Members, paths or library names; a dict gives names; None takes over the adapters that
                     diffusers loaded
    weights          one number or schedule string per LoRA
    text_encoder     "per_row", "all", "first", "none": see pipelines.prompt.Encodings
    scale            one factor on every weight (the published code's global LoRA scale)
    form             "auto", "side", "rebuilt", "bank": see multilora.attach
    passes_per_call  passes run as one batch, default all
    cache            a feature cache, 3 or "first_block:0.1": see multilora.pipelines.caching.read_cache
    cancel           an object with `is_set()`; when set, the next run raises Cancelled
    options          of the method

    Yields the Conductor, or None when no LoRA has a weight other than 0: then the model is untouched. Everything is
    undone when the block ends, however it ends. Raises ValueError for bad arguments before anything is attached; warns
    (multilora.strength.TooStrong) before the first run when the LoRAs add up to more than pictures bear.
    """
    component, denoiser = denoiser_of(pipe)
    bound = resolve("route", method, **options)
    check_run(scale, passes_per_call, cancel)
    read_cache(cache)
    members = [m.scaled(float(scale)) for m in members_of(pipe, loras, weights)]
    members = [m for m in members if not m.weight.is_zero]
    encodings = Encodings(pipe, denoiser, members, text_encoder)
    bound = warned(bound, denoiser, component, members)
    if not members:
        with lane(denoiser):  # another thread's composition is no part of the untouched model
            yield None
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(lane(denoiser))
        bank = stack.enter_context(
            attached(
                denoiser,
                [m.lora for m in members],
                component=component,
                form=form,
                blocks=[dict(m.blocks) or None for m in members],
                dozing=True,
            )
        )
        branch = stack.enter_context(cached(denoiser, cache))
        stack.enter_context(controlnet_as_base(getattr(pipe, "controlnet", None), bank))
        clock = stack.enter_context(step_clock(pipe.scheduler, lambda: getattr(pipe, "_num_timesteps", None)))
        stack.enter_context(encodings.listening())
        conductor = Conductor(
            denoiser,
            bank,
            members,
            bound,
            clock,
            encodings,
            passes_per_call=passes_per_call,
            cancel=cancel,
            guided=lambda: getattr(pipe, "do_classifier_free_guidance", None),
            half=lambda: half_of(getattr(pipe, "guider", None)),
            guidance=lambda: guidance_of(pipe),
        )
        stack.callback(conductor.caches.close)
        conductor.caches.branch = branch
        stack.enter_context(stacking(bank))
        if getattr(getattr(denoiser, "config", None), "encoder_hid_dim_type", None) is None:
            stack.enter_context(remembering(bank, text_projections(denoiser, bank.paths)))
        stack.enter_context(intercepted(denoiser, conductor))
        yield conductor
