"""What stands around one run of a pipeline: its own scheduler, and a step clock where no LoRA brings one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from multilora.method import unknown
from multilora.pipelines.clock import Clock, step_clock
from multilora.pipelines.denoise import intercepted
from multilora.pipelines.inputs import bound_arguments


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
def counted(pipe: Any, denoiser: torch.nn.Module) -> Iterator[Clock]:
    """The step clock of a picture without LoRAs: calls of the denoiser are counted and nothing else."""
    with step_clock(pipe.scheduler, lambda: getattr(pipe, "_num_timesteps", None)) as clock:
        forward = getattr(denoiser, "_orig_mod", denoiser).forward

        def count(model: Callable, args: tuple, kwargs: dict) -> Any:
            clock.call(bound_arguments(forward, args, kwargs).get("timestep"))
            return model(*args, **kwargs)

        with intercepted(denoiser, count):
            yield clock
