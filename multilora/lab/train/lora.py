"""Train a LoRA for a diffusion pipeline from a folder of pictures and captions.

    from multilora.lab.train.lora import train
    train("zib/", "embedded", "zib.safetensors", trigger="zib alien")

Every random number of step s belongs to (seed, sample number), not to a running generator: an interrupted and resumed
run gives the bits of an uninterrupted one, and the order of the data does not depend on the number of processes. With
several processes (`accelerate launch`) the gradients are averaged in one reduction a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from multilora import files
from multilora.lab.train import adapt
from multilora.lab.train.cache import Store, encode_texts, latents_of, prior_examples
from multilora.lab.train.data import Example, digest, read_folder, with_trigger
from multilora.lab.train.loop import Run, forget
from multilora.lab.train.loss import Family, family_of_pipeline
from multilora.lora import Card, Lora

# What a LoRA of the embedded world needs; other bases start from common practice.
EMBEDDED_SETTINGS = {"steps": 240, "lr": 2e-3, "high_noise": 0.5}
OTHER_SETTINGS = {"steps": 1000, "lr": 1e-4, "high_noise": 0.0}
FORMATS = ("diffusers", "peft", "kohya")


@dataclass(frozen=True)
class Trained:
    """A finished training: the file or PEFT folder, the loss of each step run here, what was adapted."""

    path: Path
    steps: int
    losses: tuple[float, ...] = field(repr=False)
    modules: int
    seconds: float
    samples: tuple[Path, ...] = ()


def train(
    data: str | Path,
    base: Any = "embedded",
    out: str | Path = "lora.safetensors",
    *,
    trigger: str | None = None,
    name: str | None = None,
    category: str = "",
    rank: int = 8,
    alpha: float | None = None,
    modules: str | Sequence[str] = "all",
    dropout: float = 0.0,
    steps: int | None = None,
    batch: int = 8,
    accumulate: int = 1,
    lr: float | None = None,
    warmup: int = 10,
    weight_decay: float = 0.01,
    text_encoder: bool = False,
    text_encoder_lr: float | None = None,
    min_snr: float | None = None,
    high_noise: float | None = None,
    caption_dropout: float = 0.1,
    prior: str | Path | None = None,
    prior_weight: float = 1.0,
    prior_count: int | None = None,
    size: int | None = None,
    seed: int = 0,
    mixed_precision: str | None = None,
    gradient_checkpointing: bool = False,
    checkpoint_every: int = 100,
    resume: bool = True,
    sample_every: int = 0,
    sample_prompts: Sequence[str] = (),
    format: str = "diffusers",
    dtype: torch.dtype = torch.float16,
    echo: Callable[[str], None] | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    cancel: Any = None,
) -> Trained:
    """Train a LoRA and write it, with its card and recipe, to `out` (a .safetensors file, a folder for "peft").

    data: a folder (`multilora.lab.train.data.read_folder`). base: "embedded", a folder, a hub id, or a loaded
    pipeline, which is left as it was. trigger: a new name and its class word ("zib alien"); captions without it get it
    in front. alpha: None means rank. modules: "all", groups joined by "+" (attention, feed_forward, convolution,
    projection) or path endings. steps, lr, high_noise (share of samples from the noisiest fifth): None takes
    EMBEDDED_SETTINGS or OTHER_SETTINGS. text_encoder: train the CLIP text encoders too, at text_encoder_lr (a quarter
    of lr by default). min_snr: gamma of the min-SNR weighting. prior: a folder of pictures of the plain class, or
    "generate": as many from the base itself. mixed_precision: None, "fp16" or "bf16". cancel: like threading.Event;
    set, it stops the run with a checkpoint and raises `multilora.pipelines.denoise.Cancelled`. progress(step, steps,
    {"loss", "lr", "seconds"}).

    Raises BadData (a ValueError) for a folder it cannot use, before anything is written, and ValueError for settings
    out of range, a pipeline it cannot train, a checkpoint of other settings, or a loss that is not finite.
    """
    given = {k: v for k, v in locals().items() if k not in _NOT_SETTINGS}
    given |= {k: v for k, v in _defaults(base).items() if given[k] is None}
    settings = _checked(given)
    out = Path(out).expanduser()
    _check_out(out, format)
    say = echo or (lambda line: None)
    began = time.monotonic()

    examples = read_folder(data)  # before the base: a bad folder should not wait for gigabytes
    pipe = _pipeline(base)
    family = family_of_pipeline(pipe)
    settings["size"] = size or native_size(pipe, family)
    examples = with_trigger(read_folder(data, size=settings["size"]), trigger)
    accelerator = _accelerator(pipe, family, mixed_precision)
    components = {family.denoiser: getattr(pipe, family.denoiser)}
    if text_encoder:
        components |= {n: getattr(pipe, n) for n in family.encoders if getattr(pipe, n, None) is not None}
    for model in components.values():
        adapt.refuse_adapters(model)
    frozen = {n: [p.requires_grad for p in m.parameters()] for n, m in components.items()}
    others = _freeze(pipe, components)
    rng = torch.random.get_rng_state()
    try:
        prior_data = prior_examples(prior, examples, pipe, out, trigger, prior_count, settings["size"], seed, say)
        store = Store(
            latents_of(pipe, family, examples, settings["size"]),
            [e.caption for e in examples],
            None if text_encoder else encode_texts(pipe, family, [e.caption for e in [*examples, *prior_data]]),
        )
        prior_store = Store(
            latents_of(pipe, family, prior_data, settings["size"]), [e.caption for e in prior_data], store.texts
        ) if prior_data else None  # fmt: skip
        torch.manual_seed(seed)
        groups = []
        for component, model in components.items():
            inner = component != family.denoiser
            paths = adapt.chosen(model, _text_paths(model) if inner else modules)
            new = adapt.inject(model, paths, rank, settings["alpha"], dropout)
            groups.append({"params": new, "base_lr": settings["text_encoder_lr" if inner else "lr"]})
        if gradient_checkpointing:
            components[family.denoiser].enable_gradient_checkpointing()
            components[family.denoiser].train()
        count = sum(len(adapt.layers(m)) for m in components.values())
        size_of = sum(p.numel() for g in groups for p in g["params"])
        say(f"{len(examples)} pictures, {count} layers, {size_of:,} parameters")
        bound = settings | {"data": digest(examples), "prior_data": digest(prior_data), "processes":
                            accelerator.num_processes}  # fmt: skip
        run = Run(pipe, family, store, prior_store, groups, settings, bound, accelerator, out)
        losses, samples = run.steps(resume, checkpoint_every, sample_every, sample_prompts, progress, cancel, say)
        parts = adapt.read_out(components, settings["alpha"])
    finally:
        for component, model in components.items():
            adapt.take_off(model)
            if gradient_checkpointing and component == family.denoiser:
                model.disable_gradient_checkpointing()
                model.eval()
            for parameter, flag in zip(model.parameters(), frozen[component], strict=True):
                parameter.requires_grad_(flag)
        for parameter in others:
            parameter.requires_grad_(True)
        torch.random.set_rng_state(rng)
        forget(accelerator)
    path = out
    if accelerator.is_main_process:
        lora = Lora(parts, _card(name, category, trigger, out, family))
        recipe = _recipe(settings, bound, base, pipe, examples, losses)
        out.parent.mkdir(parents=True, exist_ok=True)
        path = files.save(lora, out, format=format, dtype=dtype, base=pipe, metadata={"recipe": recipe})
        run.checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    seconds = time.monotonic() - began
    say(f"wrote {path} after {seconds:.0f} s")
    return Trained(Path(path), settings["steps"], tuple(losses), count, seconds, tuple(samples))


_NOT_SETTINGS = ("data", "base", "out", "name", "category", "checkpoint_every", "resume", "sample_every",
                 "sample_prompts", "format", "dtype", "echo", "progress", "cancel")  # fmt: skip


def _defaults(base: Any) -> Mapping[str, float]:
    embedded = isinstance(base, str) and base == "embedded"
    return EMBEDDED_SETTINGS if embedded else OTHER_SETTINGS


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """The settings, completed and in range, as JSON-able values."""
    s = dict(given)
    s["alpha"] = float(s["rank"] if s["alpha"] is None else s["alpha"])
    s["text_encoder_lr"] = s["lr"] / 4 if s["text_encoder_lr"] is None else s["text_encoder_lr"]
    s["prior"] = None if s["prior"] is None else str(s["prior"])
    s["modules"] = s["modules"] if isinstance(s["modules"], str) else list(s["modules"])
    limits = {"rank": (1, 4096), "alpha": (0, 1e5), "dropout": (0, 1), "steps": (1, 10**7), "batch": (1, 4096),
              "accumulate": (1, 4096), "lr": (0, 1), "text_encoder_lr": (0, 1), "warmup": (0, 10**6),
              "caption_dropout": (0, 1), "high_noise": (0, 1), "prior_weight": (0, 1e3), "min_snr": (0, 1e4),
              "size": (16, 8192)}  # fmt: skip
    for key, (low, high) in limits.items():
        value = s[key]
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            raise ValueError(f"{key}={value!r}: wanted {low} to {high}")
    if s["mixed_precision"] not in (None, "no", "fp16", "bf16"):
        raise ValueError(f"mixed_precision={s['mixed_precision']!r}: wanted None, 'fp16' or 'bf16'")
    return s


def _check_out(out: Path, format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: wanted one of {', '.join(FORMATS)}")
    if format != "peft" and out.suffix != ".safetensors":
        raise ValueError(f"out={str(out)!r}: the {format} format is a .safetensors file")
    if format == "peft" and out.suffix == ".safetensors":
        raise ValueError(f"out={str(out)!r}: the PEFT format is a folder, not a file")


def _pipeline(base: Any) -> Any:
    if not isinstance(base, str | Path):
        return base
    from multilora.pipelines.load import load_pipeline

    return load_pipeline(str(base))


def native_size(pipe: Any, family: Family) -> int:
    """The picture size in pixels that the denoiser was made for; FLUX does not say: 512 then."""
    sample = getattr(pipe, family.denoiser).config.get("sample_size")
    sample = max(sample) if isinstance(sample, list | tuple) else sample
    return int(sample) * pipe.vae_scale_factor if sample else 512


def _text_paths(encoder: torch.nn.Module) -> list[str]:
    import re

    pattern = re.compile(adapt.TEXT)
    return [p for p, m in encoder.named_modules() if isinstance(m, torch.nn.Linear) and pattern.search(p)]


def _freeze(pipe: Any, components: Mapping[str, torch.nn.Module]) -> list[torch.nn.Parameter]:
    """Freeze the pipeline's other modules; the parameters that were trainable before."""
    others = [m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module) and n not in components]
    found = [p for m in others for p in m.parameters() if p.requires_grad]
    for parameter in found:
        parameter.requires_grad_(False)
    return found


def _accelerator(pipe: Any, family: Family, mixed_precision: str | None) -> Any:
    from accelerate import Accelerator

    device = next(getattr(pipe, family.denoiser).parameters()).device
    accelerator = Accelerator(mixed_precision=mixed_precision or "no", cpu=device.type == "cpu")
    if accelerator.device != device and accelerator.num_processes > 1:
        pipe.to(accelerator.device)
    return accelerator


def _card(name: str | None, category: str, trigger: str | None, out: Path, family: Family) -> Card:
    title = name or (trigger.split(" ")[0] if trigger else out.stem)
    return Card(name=title, category=category, triggers=(trigger,) if trigger else (), family=family.name)


def _recipe(
    settings: dict[str, Any], bound: dict[str, Any], base: Any, pipe: Any, examples: Sequence[Example], losses: list
) -> dict[str, Any]:
    """What the file says about its making."""
    import importlib.metadata

    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    versions = {package: importlib.metadata.version(package) for package in packages}
    named = base if isinstance(base, str | Path) else getattr(pipe, "name_or_path", "") or type(pipe).__name__
    last = losses[-20:]
    return {
        "trainer": "multilora.lab.train.lora",
        "base": str(named),
        "settings": settings,
        "data_sha256": bound["data"],
        "pictures": len(examples),
        "final_loss": round(sum(last) / len(last), 5) if last else None,
        "versions": versions,
    }
