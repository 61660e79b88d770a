"""Weight of a LoRA over the steps of a picture.

A schedule is a number or points `weight@position`, joined by commas (or semicolons), in the order in which a run meets
them. Between two points the weight moves on a straight line; before the first and after the last it stays. Two points
at one position are a jump, the second weight holds from that position on.

    0.8                     0.8 throughout
    0@0,1@0.5               from 0 at the start to 1 at half of the run, then 1
    1@0.4,0@0.4             on for the first 40 %, then off
    0@5,1@6   0@0s,1@1s     a position above 1 is a step, and so are all others then; `s` says so for small ones
    1@7sigma,0@2sigma       by noise level, from high to low, linear in sigma

A fraction and a step do not go together: `1@0.4,0@5` is refused, `1@0.4s,0@5s` and `1@0,0@5` are steps.

Steps count from 0. The fraction of step i of n is i / (n - 1): the first step is at 0, the last at 1, so `0@0,1@1`
reaches both of its weights; a run of one step is at 0. The spelling is that of sd-webui-loractl
(github.com/cheald/sd-webui-loractl), whose fraction runs to 1 a step earlier, and of SD.Next.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

__all__ = ["Schedule"]

LARGEST = 1e6  # of a weight: 1e30 is finite, and so is no picture that it makes
FRACTION, STEP, SIGMA = "", "s", "sigma"
ALLOWED = "wanted a number such as 0.8 or points weight@position such as '0@0,1@0.5', '1@3s,0@6s', '1@7sigma,0@2sigma'"


def _number(value: Any, what: str, shown: Any) -> float:
    """`value` as a finite float without a sign on zero."""
    try:
        if isinstance(value, bool) or not isinstance(value, (str, Real)):
            raise ValueError
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{shown!r}: {what} {value!r} is not a number; {ALLOWED}") from None
    if not math.isfinite(number):
        raise ValueError(f"{shown!r}: {what} {value!r} is not finite; {ALLOWED}")
    if abs(number) > LARGEST:
        raise ValueError(f"{shown!r}: {what} {value!r} is beyond the limit of {LARGEST:g}; {ALLOWED}")
    return number + 0.0


def _position(value: Any, shown: Any) -> tuple[float, str]:
    """A position and the unit that it is marked with, "" when it is not marked."""
    text, unit = value, FRACTION
    if isinstance(value, str):
        text = value.strip().lower()
        unit = SIGMA if text.endswith(SIGMA) else STEP if text.endswith(STEP) else FRACTION
        text = text.removesuffix(unit)
    position = _number(text, "position", shown)
    if position < 0:
        raise ValueError(f"{shown!r}: position {value!r} is negative; positions count from 0 at the start; {ALLOWED}")
    return position, unit


def _unit(positions: list[tuple[float, str]], shown: Any) -> str:
    """The one unit of all positions: as marked, else steps when one of them is above 1, else fractions."""
    marked = {unit for _, unit in positions if unit}
    if len(marked) > 1 or (SIGMA in marked and any(unit != SIGMA for _, unit in positions)):
        raise ValueError(f"{shown!r} mixes sigmas with other positions: mark all with sigma or none; {ALLOWED}")
    unit = marked.pop() if marked else STEP if any(position > 1 for position, _ in positions) else FRACTION
    fraction = next((p for p, own in positions if not own and 0 < p < 1), None)
    if unit == STEP and fraction is not None:
        raise ValueError(
            f"{shown!r} mixes steps with the fraction {_short(fraction)}: write {_short(fraction)}s for a step, or "
            f"all positions as fractions; {ALLOWED}"
        )
    return unit


def _short(number: float) -> str:
    return repr(number).removesuffix(".0")


@dataclass(frozen=True)
class Schedule:
    """A weight over the steps; see the module's docstring. Immutable and hashable.

    points  ((weight, position), ...) in the order of the run; one point at position 0 for a constant
    unit    "" fractions of the run, "s" steps, "sigma" noise levels

    Made by `parse`, `window` or `*`; `str()` gives the shortest spelling, and `parse(str(schedule)) == schedule`.
    """

    points: tuple[tuple[float, float], ...]
    unit: str = FRACTION

    @classmethod
    def parse(cls, value: Any) -> Schedule:
        """A schedule from a number, a string, a list of (weight, position), or a Schedule.

        Raises ValueError, with the value and what is allowed, for NaN, infinity, text that is no number, an empty
        string or list, negative or unsorted positions, three points at one position, and mixed units.
        """
        if isinstance(value, Schedule):
            return value
        if isinstance(value, str):
            parts = [p.strip() for p in re.split("[,;]", value)]
            if len(parts) == 1 and "@" not in value:
                return cls.parse(_number(parts[0], "weight", value))
            return cls._of([cls._pair(p, value) for p in parts], value)
        if getattr(value, "ndim", None) == 0:  # a scalar of numpy or torch
            value = value.item()
        if isinstance(value, Iterable):
            pairs = list(value)
            if not all(isinstance(p, (tuple, list)) and len(p) == 2 for p in pairs):
                raise ValueError(f"{value!r}: a list holds pairs (weight, position); {ALLOWED}")
            return cls._of(pairs, value)
        return cls(((_number(value, "weight", value), 0.0),))

    @staticmethod
    def _pair(text: str, shown: str) -> tuple[str, str]:
        weight, at, position = text.partition("@")
        if not at:
            raise ValueError(f"{shown!r}: the point {text!r} has no @position; {ALLOWED}")
        return weight, position

    @classmethod
    def _of(cls, pairs: list, shown: Any) -> Schedule:
        if not pairs:
            raise ValueError(f"{shown!r} is empty; {ALLOWED}")
        weights = [_number(weight, "weight", shown) for weight, _ in pairs]
        marked = [_position(position, shown) for _, position in pairs]
        unit = _unit(marked, shown)
        positions = [position for position, _ in marked]
        if positions != sorted(positions, reverse=unit == SIGMA):
            order = "from high to low, as a run meets them" if unit == SIGMA else "from low to high"
            raise ValueError(f"{shown!r}: positions are not in order, {order}; {ALLOWED}")
        crowded = [p for p in positions if positions.count(p) > 2]
        if crowded:
            raise ValueError(f"{shown!r}: three points at {_short(crowded[0])}, a jump has two; {ALLOWED}")
        if len(set(weights)) == 1:
            return cls(((weights[0], 0.0),))
        return cls(tuple(zip(weights, positions, strict=True)), unit)

    @classmethod
    def window(cls, weight: Any, start: Any = 0, stop: Any = None) -> Schedule:
        """`weight` from `start` on and before `stop`, 0 elsewhere.

        start, stop  positions as in a string: 0.2, "3s", 5, "7sigma"; stop None (or the fraction 1) is the end.
                     With sigmas give both, start above stop

        Raises ValueError as `parse` does.
        """
        shown = f"window({weight!r}, {start!r}, {stop!r})"
        ends = [_position(p, shown) for p in (start, stop) if p is not None]
        unit = _unit(ends, shown)
        to_the_end = len(ends) == 1 or (unit == FRACTION and ends[1][0] == 1)
        points = [] if unit != SIGMA and ends[0][0] == 0 else [(0, start)]
        points.append((weight, start))
        if not to_the_end:
            if ends[0] == ends[1]:
                raise ValueError(f"{shown} is empty: stop lies after start; {ALLOWED}")
            points += [(weight, stop), (0, stop)]
        return cls._of([(w, f"{_short(_position(p, shown)[0])}{unit}") for w, p in points], shown)

    def at(self, step: int, steps: int, sigma: float | None = None) -> float:
        """The weight at a step of a run: step counts from 0, sigma is the noise level where the step begins.

        Raises ValueError when the schedule goes by sigma and none is given.
        """
        if self.constant is not None:
            return self.constant
        if self.unit == SIGMA:
            if sigma is None:
                raise ValueError(f"schedule '{self}' goes by sigma and none is known; use steps or fractions")
            return self._curve(-sigma, -1.0)
        if self.unit == STEP:
            return self._curve(float(step), 1.0)
        return self._curve(min(step / (steps - 1), 1.0) if steps > 1 else 0.0, 1.0)

    def _curve(self, where: float, sign: float) -> float:
        before = None
        for weight, position in self.points:
            position *= sign
            if where < position:
                if before is None:
                    return weight
                first, left = before
                return first + (weight - first) * ((where - left) / (position - left))
            before = (weight, position)
        return self.points[-1][0]

    @property
    def constant(self) -> float | None:
        """The weight when it never changes, else None."""
        return self.points[0][0] if len(self.points) == 1 else None

    @property
    def is_zero(self) -> bool:
        return self.constant == 0.0

    @property
    def peak(self) -> float:
        """The weight of the largest magnitude, with its sign; the first of several."""
        return max((weight for weight, _ in self.points), key=abs)

    def __mul__(self, by: Any) -> Schedule:
        if isinstance(by, bool) or not isinstance(by, Real):
            return NotImplemented
        by = _number(by, "factor", by)
        return Schedule._of([(w * by, f"{_short(p)}{self.unit}") for w, p in self.points], f"{self} * {by}")

    __rmul__ = __mul__

    def __str__(self) -> str:
        if self.constant is not None:
            return _short(self.constant)
        # Steps need their mark where no position above 1 says it, or one of them would be a fraction.
        plain = any(p > 1 for _, p in self.points) and not any(0 < p < 1 for _, p in self.points)
        unit = "" if self.unit == STEP and plain else self.unit
        return ",".join(f"{_short(w)}@{_short(p)}{unit}" for w, p in self.points)
