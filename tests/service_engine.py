"""Engines for tests of the service. Stub: no model, faults on request; Faulty: the real one, faults at a step."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from multilora.recipe import png_bytes
from multilora.web.service.spec import Event, Picture, Result
from multilora.web.service.worker import Answer, Task


def fault_of(recipe: Any, step: int) -> str:
    """The fault that a recipe asks for at this step; one with a "flag" file happens once, and makes the file."""
    wanted = recipe.extra.get("fault", "")
    if not wanted or step != recipe.extra.get("at", 2):
        return ""
    flag = recipe.extra.get("flag")
    if flag:
        if Path(flag).exists():
            return ""
        Path(flag).touch()
    return wanted


class Stub:
    """Draws one pixel of the seed's colour in `steps` steps. faults: die, raise, hang (until extra["until"] is there),
    drift."""

    def __init__(self, base: str, device: str | None = None, clip: str = ""):
        if base == "missing":
            raise ValueError("base 'missing': no such folder")
        self.base = base

    def about(self) -> dict[str, Any]:
        drawn = {"family": "sd15", "steps": 3, "guidance_scale": 3.0, "width": 8, "height": 8, "scheduler": None}
        return {"base": self.base, "device": "stub", "pid": os.getpid(), **drawn}

    def run(self, task: Task, emit: Any, cancel: Any) -> Answer:
        from PIL import Image

        recipe = getattr(task.request, "recipe", None)
        if recipe is None:
            return Answer("failed", code="request", message=f"{task.request.action}: this stand-in draws only")
        for step in range(1, recipe.steps + 1):
            fault = fault_of(recipe, step)
            if fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "raise":
                return Answer("failed", code="failed", message="this request failed: RuntimeError: on purpose")
            while fault == "hang" and not Path(recipe.extra["until"]).exists():
                time.sleep(0.01)
            if cancel.is_set():
                return Answer("cancelled")
            emit(Event("progress", step=step, steps=recipe.steps))
            time.sleep(recipe.extra.get("pause", 0.0))
            if fault == "drift":
                return Answer("done", Result(), drift=["weights: 1 not as before, first unet.x"])
        image = Image.new("RGB", (1, 1), (recipe.seed % 256, 0, 0))
        return Answer("done", Result([Picture(png_bytes(image, recipe), recipe)]))


def faulty() -> type:
    """The real engine, with faults: die, raise, nan, memory (whenever more than extra["room"] passes are in a call),
    drift, hook. Made in a function, so that Stub's process imports no torch."""
    import torch

    from multilora.web.service.engine import Engine

    class Faulty(Engine):
        def _composed(self, call: Any, recipe: Any, least: Any, *rest: Any) -> Any:
            if recipe.extra.get("fault") == "memory" and (least or len(recipe.loras)) > recipe.extra["room"]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super()._composed(call, recipe, least, *rest)

        def stepped(self, recipe: Any, step: int) -> None:
            fault = fault_of(recipe, step)
            if fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "raise":
                raise RuntimeError("on purpose")
            if fault == "drift":
                next(self.denoiser.parameters()).data.view(-1)[0] += 1
            if fault == "hook":
                self.denoiser.register_forward_hook(lambda *_: None)
            if fault == "nan":
                self.denoiser.register_forward_pre_hook(_poison, with_kwargs=True)

    def _poison(module: Any, args: tuple, kwargs: dict) -> Any:
        module._forward_pre_hooks.clear()  # this hook is the only one; it acts once
        module._forward_pre_hooks_with_kwargs.clear()
        return (
            (args[0] * float("nan"), *args[1:])
            if args
            else (args, {**kwargs, "sample": kwargs["sample"] * float("nan")})
        )

    return Faulty


def __getattr__(name: str) -> Any:
    if name == "Faulty":
        return faulty()
    raise AttributeError(name)
