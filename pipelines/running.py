"""What stands around one run of a pipeline: its own scheduler, and a step clock where no LoRA brings one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict

from multilora.method import unknown
from multilora.pipelines.clock import Clock, step_clock
from multilora.pipelines.inputs import bound_arguments, inputs_of
from multilora.pipelines.intercept import intercepted
from multilora.pipelines.tasks import roles


@contextlib.contextmanager
def fresh_scheduler(pipe: Any, name: str | None, config: Mapping[str, Any] | None) -> Iterator[Any]:
    """A fresh scheduler for one run: no state from the last picture, none left behind."""
    import diffusers

    own = pipe.scheduler
    cls = type(own)
    if name:
        known = [c.__name__ for c in own.compatibles]
        cls = getattr(diffusers, name, None)
        if cls is None or (name not in known and name != type(own).__name__):
            raise unknown("scheduler for this pipeline", name, {*known, type(own).__name__})
    try:
        pipe.scheduler = cls.from_config({**own.config, **(config or {})})
        yield pipe.scheduler
    finally:
        pipe.scheduler = own


@contextlib.contextmanager
def fixed_randomness(device: torch.device) -> Iterator[None]:
    """torch's global generators of the CPU and of `device` seeded for the block, and as they were after it.

    Not every random number of a pipeline comes from its `generator`: SD3's ControlNet encodes the control image with
    the global one. The seed is the same for every picture, so that picture i of several is the lone one of seed + i.

    The generators are the process's own. Of blocks that overlap in several threads the first one keeps their states
    and the last one puts them back; SD3's ControlNets in two threads at once may share what is drawn in between.
    """
    own = _generators(device)
    with _RANDOM:
        for name, generator in own.items():
            users, state = _kept.get(name) or (0, generator.get_state())
            _kept[name] = (users + 1, state)
            generator.manual_seed(0)
    try:
        yield
    finally:
        with _RANDOM:
            for name, generator in own.items():
                users, state = _kept.pop(name)
                if users > 1:
                    _kept[name] = (users - 1, state)
                else:
                    generator.set_state(state)


_RANDOM = threading.Lock()
_kept: dict[str, tuple[int, torch.Tensor]] = {}  # generator -> (blocks that run, its state before the first of them)


def _generators(device: torch.device) -> dict[str, torch.Generator]:
    """The global generators that a picture on `device` may draw from. `torch.manual_seed` would seed all devices'."""
    found = {"cpu": torch.default_generator}
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        found[f"cuda:{index}"] = torch.cuda.default_generators[index]
    return found


@contextlib.contextmanager
def plain_latents(pipe: Any) -> Iterator[None]:
    """A U-Net on latents of other than 4 channels inpaints too.

    diffusers' pipelines that inpaint take a U-Net whose config says 4 for one on plain latents, and refuse others or
    forget the mask, though nothing else in them depends on it. So such a U-Net says 4 for the run.
    """
    unet = getattr(pipe, "unet", None)
    unet = getattr(unet, "_orig_mod", unet)
    channels = pipe.vae.config.latent_channels if "mask_image" in roles(type(pipe)) and unet is not None else 4
    if channels == 4 or unet.config.in_channels != channels:
        yield
        return
    own = unet._internal_dict
    try:
        unet._internal_dict = FrozenDict({**own, "in_channels": 4})
        yield
    finally:
        unet._internal_dict = own


@contextlib.contextmanager
def counted(pipe: Any, denoiser: torch.nn.Module) -> Iterator[Clock]:
    """The step clock of a picture without LoRAs: calls of the denoiser are counted and nothing else."""
    with step_clock(pipe.scheduler, lambda: getattr(pipe, "_num_timesteps", None)) as clock:
        forward = getattr(denoiser, "_orig_mod", denoiser).forward
        table = inputs_of(denoiser)
        time = table.time if table is not None else "timestep"

        def count(model: Callable, args: tuple, kwargs: dict) -> Any:
            clock.call(bound_arguments(forward, args, kwargs).get(time))
            return model(*args, **kwargs)

        with intercepted(denoiser, count):
            yield clock


@contextlib.contextmanager
def controlnet_as_base(net: Any, bank: Any) -> Iterator[None]:
    """A ControlNet that runs modules of the denoiser (Z-Image's does) runs them without LoRAs.

    It comes before the passes of a step, and one run of it serves all of them: whatever row the last pass has left is
    not its own.
    """
    adapted = {id(site.module) for site in bank.sites}
    shares = isinstance(net, torch.nn.Module) and any(id(m) in adapted for m in net.modules())
    if not shares:
        yield
        return

    def plain(model: Callable, args: tuple, kwargs: dict) -> Any:
        bank.gate = None
        bank.row = (0.0,) * bank.k
        return model(*args, **kwargs)

    with intercepted(net, plain):
        yield
