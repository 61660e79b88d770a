"""Where a picture's time goes: torch's profiler, grouped by part of the pipeline.

    with profiled() as profile:
        composer("a fox in a robe")
    for part in profile.parts: print(part)

A part is told by what runs inside it: text encoders, denoiser and VAE by their model classes, and the LoRAs by the
branches beside adapted layers and by the weights that are exchanged. Every moment belongs to the innermost part, and
what is in none (scheduler, the pipeline's own code, rows and means of a composition) is the rest. The profiler itself
takes time, most where operations are many and small. Inside a model that torch.compile has taken whole, nothing is
told apart.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.autograd.profiler_util import EventList, FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from multilora import attach

PICTURE, REST, DENOISER, LORAS = "picture", "the rest", "denoiser", "LoRAs"
# Module of the class -> part. The first that the name starts with counts.
_MODELS = (
    ("diffusers.models.unets.", DENOISER),
    ("diffusers.models.transformers.", DENOISER),
    ("diffusers.models.controlnets.", "ControlNet"),
    ("diffusers.models.autoencoders.", "VAE"),
    ("transformers.models.", "text encoders"),
)
_LABEL = "multilora: "
_MOST = 5  # operations that are named


@dataclass(frozen=True)
class Part:
    """A part's seconds on the host and on an accelerator, its runs, and the operations that take most of it.

    operations  (name, calls, seconds on the device that works), the longest first
    """

    name: str
    seconds: float
    device_seconds: float
    runs: int
    operations: tuple[tuple[str, int, float], ...]


@dataclass
class Profile:
    """Filled when the block of `profiled` ends: the parts, the longest first, and the pictures' seconds together."""

    parts: list[Part] = field(default_factory=list)
    seconds: float = 0.0


def _part(module: nn.Module) -> str | None:
    where = type(module).__module__
    return next((part for start, part in _MODELS if where.startswith(start)), None)


class _Labels:
    """Entered by modules and functions; a part inside itself is one."""

    def __init__(self) -> None:
        self._mine = threading.local()

    @property
    def open(self) -> list[tuple[Any, str, Any]]:
        return self._mine.__dict__.setdefault("open", [])

    def enter(self, owner: Any, part: str) -> None:
        if not self.open or self.open[-1][1] != part:
            label = record_function(_LABEL + part)
            label.__enter__()
            self.open.append((owner, part, label))

    def leave(self, owner: Any) -> None:
        if self.open and self.open[-1][0] is owner:
            self.open.pop()[2].__exit__(None, None, None)

    def before(self, module: nn.Module, args: Any) -> None:
        within = self.open[-1][1] if self.open else PICTURE
        if within == PICTURE and (part := _part(module)):  # a VAE has blocks of a U-Net
            self.enter(module, part)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.leave(module)

    def around(self, function: Callable, part: str) -> Callable:
        def labelled(*args: Any, **kwargs: Any) -> Any:
            owner = object()
            self.enter(owner, part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave(owner)

        return labelled


@contextlib.contextmanager
def profiled() -> Iterator[Profile]:
    """Profile what `Composer` draws in the block, in every thread. Not to be nested."""
    from multilora.pipelines.image import Composer

    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else the profiler tells the terminal that it starts and stops
    labels, found = _Labels(), Profile()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with contextlib.ExitStack() as stack:
        hooks = nn.modules.module
        for handle in (
            hooks.register_module_forward_pre_hook(labels.before),
            hooks.register_module_forward_hook(labels.after, always_call=True),
        ):
            stack.callback(handle.remove)
        for owner, name, part in (
            (Composer, "__call__", PICTURE),
            (attach._Hook, "__call__", LORAS),
            (attach.Bank, "_exchange", LORAS),
        ):
            stack.enter_context(mock.patch.object(owner, name, labels.around(getattr(owner, name), part)))
        run = stack.enter_context(profile(activities=kinds))
        yield found
    events = run.events()
    found.parts = parts_of(events)
    found.seconds = sum(e.time_range.elapsed_us() for e in events if e.name == _LABEL + PICTURE) / 1e6


def parts_of(events: EventList | list[FunctionEvent]) -> list[Part]:
    """The parts that lie within pictures; every event's own time belongs to the nearest label around it."""
    host: Counter[str] = Counter()
    device: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    operations: dict[str, dict[str, list[float]]] = {}
    for event in events:
        label = event
        while label is not None and not label.name.startswith(_LABEL):
            label = label.cpu_parent
        if label is None or not _within_a_picture(label):
            continue
        name = label.name.removeprefix(_LABEL)
        name = REST if name == PICTURE else name
        own, busy = event.self_cpu_time_total / 1e6, event.self_device_time_total / 1e6
        host[name] += own
        device[name] += busy
        if event is label:
            runs[name] += 1
        else:
            count = operations.setdefault(name, {}).setdefault(event.name, [0, 0.0, 0.0])
            count[0] += 1
            count[1] += own
            count[2] += busy
    works = 2 if any(device.values()) else 1
    parts = []
    for name, seconds in host.items():
        longest = sorted(operations.get(name, {}).items(), key=lambda item: -item[1][works])[:_MOST]
        listed = tuple((operation, int(each[0]), each[works]) for operation, each in longest)
        parts.append(Part(name, seconds, device[name], runs[name], listed))
    return sorted(parts, key=lambda part: -(part.device_seconds or part.seconds))


def _within_a_picture(label: FunctionEvent | None) -> bool:
    while label is not None:
        if label.name == _LABEL + PICTURE:
            return True
        label = label.cpu_parent
    return False
