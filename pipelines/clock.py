"""The step clock: which step a call of the denoiser belongs to, read off the scheduler.

A step is one interval of sigmas. With a scheduler of second order (Heun, KDPM2, DPM-Solver SDE) two denoiser calls
belong to each, one to the last. PNDM's first two calls are one step, because the second, at the repeated timestep,
does the first interval again (PLMS); of its Runge-Kutta warm-up four calls are one. Several calls between two calls of
`scheduler.step` (guidance in turn, a corrector) are one step too. The first step that a picture executes is step 0,
wherever in the schedule it begins.

`scheduler.step_index` is not used: DDIM, DDPM and PNDM have none, and Heun's counts half steps. Counted are the calls
of `scheduler.step`; the start is where the first timestep that the denoiser gets lies among `scheduler.timesteps`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["Clock", "step_clock"]


class Clock:
    """What time it is in the picture that a scheduler is making. Made by `step_clock`.

    step      executed step of the last denoiser call, from 0
    steps     how many steps this picture executes
    t         timestep of the last call, in the scheduler's units; NaN before the first call
    sigma     noise level where the step begins, the same for all its calls: the scheduler's sigma, or
              sqrt((1 - a) / a) with a = alphas_cumprod[t] where it has no sigmas, or None
    calls     [(call, step), ...] of the picture, call counting from 0
    advances  calls of `scheduler.step` in the picture
    """

    def __init__(self, scheduler: Any, length: Callable[[], int | None] | None = None) -> None:
        self.scheduler = scheduler
        self._length = length
        self._forget()

    def _forget(self) -> None:
        """A new picture begins: `set_timesteps` was called."""
        self.step, self.steps, self.advances = 0, 0, 0
        self.t, self.sigma = math.nan, None
        self.calls: list[tuple[int, int]] = []
        self._times: list[float] = []
        self._first = 0  # position in the timesteps of the first executed one
        self._last = -1  # position, from the first executed, of the last call
        self._certain = True  # whether _first is settled
        self._own_units = False  # whether the denoiser gets timesteps in the scheduler's units
        self._advances_then = -1

    def call(self, t: Any = None) -> int:
        """The step of one denoiser call; to be called once for each.

        t  the timestep that the denoiser gets: number or tensor [] or [B], in the scheduler's units where possible.
           Its place in memory or value says where an image-to-image picture begins; None or other units are fine for
           schedulers that pipelines tell where to begin (those with `begin_index`), and for pictures from noise
        """
        if not self.calls:
            self._begin(t)
        elif not self._certain:
            self._settle(t)
        position = max(self.advances, self._last)
        if self._own_units and self.advances == self._advances_then:
            position = max(position, self._moved_on(t, position))
        position = min(position, self._entries() - 1) if self._times else position
        self._last, self._advances_then = position, self.advances
        if not self.steps:
            self.steps = self._step_of(self._entries() - 1) + 1
        self.step = self._step_of(position)
        self.t = self._times[self._first + position] if self._times else _value(t)
        self.sigma = self._sigma(position)
        self.calls.append((len(self.calls), self.step))
        return self.step

    # -- where the picture begins -------------------------------------------------------------------------------

    def _begin(self, t: Any) -> None:
        timesteps = getattr(self.scheduler, "timesteps", None)
        self._times = [float(v) for v in timesteps.tolist()] if isinstance(timesteps, Tensor) else []
        begin = getattr(self.scheduler, "begin_index", None)
        place = _place(t, timesteps)
        nearest = min((abs(v - _value(t)) for v in self._times), default=math.nan)
        matches = [i for i, v in enumerate(self._times) if _same(v, t) and abs(v - _value(t)) == nearest]
        if place is not None:
            self._first = place
        elif begin is not None:
            self._first = int(begin)
        elif matches:
            # PNDM's repeated timestep: the second call tells which of the two it was.
            self._first, self._certain = matches[0], len(matches) == 1
        self._own_units = bool(self._times) and _same(self._times[self._first], t)

    def _settle(self, t: Any) -> None:
        """The first timestep stood twice in the schedule; a different one right after it means its second place."""
        if self.advances == 1:
            if not _same(self._times[self._first + 1], t):
                self._first, self.steps = self._first + 1, 0
            self._certain = True

    def _moved_on(self, t: Any, position: int) -> int:
        """Position of a timestep that came without `scheduler.step`: a pipeline steps a copy of the scheduler."""
        ahead = self._times[self._first + position :]
        if not ahead or _same(ahead[0], t):
            return position
        return next((position + i for i, v in enumerate(ahead) if _same(v, t)), position)

    def _entries(self) -> int:
        """Timesteps that this picture executes, by what the pipeline says, else to the end of the schedule."""
        rest = len(self._times) - self._first
        said = self._length() if self._length is not None else None
        return max(1, min(rest, int(said)) if isinstance(said, int) and said > 0 else rest)

    # -- from timesteps to intervals ----------------------------------------------------------------------------

    def _step_of(self, position: int) -> int:
        """Interval of the timestep at `position`, counted from the first executed one."""
        warm_up = getattr(self.scheduler, "prk_timesteps", None)
        if hasattr(self.scheduler, "plms_timesteps"):  # PNDM counts its calls from the start of the picture
            warm_up = 0 if warm_up is None else len(warm_up)
            if position < warm_up:
                return position // 4
            return warm_up // 4 + position - warm_up if warm_up else max(0, position - 1)
        order = getattr(self.scheduler, "order", 1)
        return (self._first + position) // order - self._first // order

    def _sigma(self, position: int) -> float | None:
        if not self._times:
            return None
        begins = self._first + position
        while begins > self._first and self._step_of(begins - 1 - self._first) == self.step:
            begins -= 1
        sigmas = getattr(self.scheduler, "sigmas", None)
        if isinstance(sigmas, Tensor) and len(sigmas) >= len(self._times):
            return float(sigmas[begins])
        alphas = getattr(self.scheduler, "alphas_cumprod", None)
        t = int(self._times[begins])
        if not isinstance(alphas, Tensor) or not 0 <= t < len(alphas):
            return None
        alpha = float(alphas[t])
        return math.sqrt((1.0 - alpha) / alpha) if alpha > 0 else math.inf


def _value(t: Any) -> float:
    if isinstance(t, Tensor):
        t = t.flatten()[0] if t.numel() else math.nan
    return math.nan if t is None else float(t)


def _same(time: float, t: Any) -> bool:
    """Whether `t` is this timestep, read with the rounding that bfloat16 may have done to it."""
    value = _value(t)
    exact = isinstance(t, Tensor) and t.dtype in (torch.float16, torch.bfloat16)
    return math.isclose(time, value, rel_tol=8e-3 if exact else 1e-6, abs_tol=1e-6)


def _place(t: Any, timesteps: Any) -> int | None:
    """Index in `timesteps` of an element `t` that was taken from it (a pipeline's loop takes views), or None."""
    if not isinstance(t, Tensor) or not isinstance(timesteps, Tensor) or t.dtype != timesteps.dtype or not t.numel():
        return None
    if timesteps.ndim != 1 or any(n > 1 and s for n, s in zip(t.shape, t.stride(), strict=True)):
        return None
    if t.device != timesteps.device or t.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    index, rest = divmod(t.storage_offset() - timesteps.storage_offset(), timesteps.stride(0))
    return index if rest == 0 and 0 <= index < len(timesteps) else None


class _Told:
    """A scheduler's method that also tells the clock. A copy of the scheduler gets its own plain method back."""

    def __init__(self, owner: Any, name: str, told: Callable[[], None]) -> None:
        self.owner, self.name, self.method, self.told = owner, name, getattr(owner, name), told
        # Pipelines look for `eta`, `timesteps` and `sigmas` in the signature.
        functools.update_wrapper(self, self.method, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.method(*args, **kwargs)
        self.told()
        return result

    def __deepcopy__(self, memo: dict) -> Any:
        owner = memo.get(id(self.owner), self.owner)
        return functools.partial(getattr(type(owner), self.name), owner)


@contextlib.contextmanager
def step_clock(scheduler: Any, length: Callable[[], int | None] | None = None) -> Iterator[Clock]:
    """A Clock that runs with `scheduler` inside the block; the denoiser's hook calls `clock.call(t)`.

        with step_clock(pipe.scheduler) as clock:
            pipe(prompt)                       # clock.step, clock.steps, clock.t, clock.sigma at each call

    length  gives how many timesteps the pipeline's loop will run, or None; for pictures that stop before the end of
            the schedule (SDXL's denoising_end). In diffusers: lambda: getattr(pipe, "_num_timesteps", None)

    `set_timesteps` and `step` of this instance are wrapped and given back when the block ends, however it ends; other
    instances are untouched. Raises ValueError for an object without the two.
    """
    missing = [name for name in ("set_timesteps", "step") if not callable(getattr(scheduler, name, None))]
    if missing:
        raise ValueError(f"step clock wants a diffusers scheduler, {type(scheduler).__name__} has no {missing[0]}()")
    clock = Clock(scheduler, length)

    def advance() -> None:
        clock.advances += 1

    with contextlib.ExitStack() as stack:
        for name, told in (("set_timesteps", clock._forget), ("step", advance)):
            stack.callback(_put_back, scheduler, name, scheduler.__dict__.get(name))
            scheduler.__dict__[name] = _Told(scheduler, name, told)
        yield clock


def _put_back(scheduler: Any, name: str, own: Any) -> None:
    if own is None:
        scheduler.__dict__.pop(name, None)
    else:
        scheduler.__dict__[name] = own
