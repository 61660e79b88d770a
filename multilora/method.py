"""`@method` and the frozen record behind every way of combining LoRAs. The only registry.

A method is a function in its own file of `merge/`, `weigh/` or `route/`. Its name is the function's, its kind is the
folder's, its options are the keyword-only arguments. Dropping a file into a folder is all it takes to add one.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import pkgutil
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

KINDS = ("merge", "weigh", "route")
# DESIGN section 10. tests/test_laws.py holds one check per name.
LAWS = ("single", "zero", "gauge", "permutation", "mean_of_equals", "linear")


class UnknownName(ValueError):
    """A name that is not in a known set; the message says which names are near."""


def unknown(what: str, name: object, known: Iterable[str]) -> UnknownName:
    """The error for a name outside `known`: what was asked for, the nearest names, all the names."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    listed = ", ".join(known[:40]) + (f", and {len(known) - 40} more" if len(known) > 40 else "")
    return UnknownName(f"unknown {what} {name!r}.{hint} Known: {listed or 'none'}.")


@dataclass(frozen=True)
class Opt:
    """Annotation of an option: `every: Annotated[int, Opt("steps per LoRA", minimum=1)] = 5`."""

    help: str
    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True)
class Option:
    """One option of a method as the command line and the app draw it."""

    name: str
    type: type
    default: Any
    help: str = ""
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[Any, ...] = ()

    def check(self, value: Any, owner: str) -> Any:
        """`value` as this option's type; strings are read. Raises ValueError with the option's name and range."""
        where = f"option {self.name}={value!r} of {owner}"
        if self.choices:
            if value not in self.choices:
                raise ValueError(f"{where}: allowed are {', '.join(map(repr, self.choices))}")
            return value
        if value is None and self.default is None:
            return None
        try:
            if self.type is bool:
                read = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
                value = value if isinstance(value, bool) else read[str(value).lower()]
            elif self.type is int:
                if isinstance(value, bool) or float(value) != int(float(value)):
                    raise ValueError
                value = int(float(value))
            elif self.type is float:
                value = float(value)
        except (TypeError, ValueError, KeyError, OverflowError):
            raise ValueError(f"{where}: a {self.type.__name__} is wanted") from None
        if self.type in (int, float):
            if not math.isfinite(value):
                raise ValueError(f"{where}: a finite number is wanted")
            low, high = self.minimum, self.maximum
            if (low is not None and value < low) or (high is not None and value > high):
                span = f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}"
                raise ValueError(f"{where}: allowed is {span}")
        return value


def options_of(fn: Callable) -> tuple[Option, ...]:
    """The keyword-only arguments of a function as options, read off its annotations."""
    hints = typing.get_type_hints(fn, include_extras=True)
    found = []
    for p in inspect.signature(fn).parameters.values():
        if p.kind is not p.KEYWORD_ONLY:
            continue
        hint, opt = hints.get(p.name, str), Opt("")
        if typing.get_origin(hint) is typing.Annotated:
            hint, *extra = typing.get_args(hint)
            opt = next((e for e in extra if isinstance(e, Opt)), opt)
        choices: tuple[Any, ...] = ()
        if typing.get_origin(hint) is Literal:
            choices = typing.get_args(hint)
            hint = type(choices[0])
        elif type(None) in typing.get_args(hint):
            hint = next(a for a in typing.get_args(hint) if a is not type(None))
        found.append(Option(p.name, hint, p.default, opt.help, opt.minimum, opt.maximum, choices))
    return tuple(found)


@dataclass(frozen=True)
class Method:
    """A method's record. Calling it with LoRAs runs it; without, it binds options: `switch(every=5)`.

    cost is said in runs of the model per step ("1", "k", "k + 1"; k LoRAs); laws are the identities of DESIGN
    section 10 that it promises.
    """

    name: str
    kind: str
    title: str
    paper: str
    cost: str
    laws: tuple[str, ...]
    options: tuple[Option, ...]
    fn: Callable = field(repr=False, compare=False)

    def check(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options checked and completed with defaults. Raises ValueError on an unknown name or a bad value."""
        known = {o.name: o for o in self.options}
        for name in options:
            if name not in known:
                raise unknown(f"option of {self.name}", name, known)
        return {n: o.check(options[n], self.name) if n in options else o.default for n, o in known.items()}

    def __call__(self, *args: Any, **options: Any) -> Any:
        options = self.check(options)
        return self.fn(*args, **options) if args else Bound(self, options)


@dataclass(frozen=True)
class Bound:
    """A method with its options settled; call it with what its kind takes (`loras`, and `weights` for merges)."""

    record: Method
    options: dict[str, Any]

    def __call__(self, *args: Any) -> Any:
        return self.record.fn(*args, **self.options)


def method(*, title: str, paper: str, cost: str, laws: tuple[str, ...] = ()) -> Callable[[Callable], Method]:
    """Make a function the method of its file. Raises ValueError when name, file or laws do not fit."""

    def wrap(fn: Callable) -> Method:
        kind, _, file = fn.__module__.rpartition(".")
        kind = kind.rpartition(".")[2]
        if file != fn.__name__:
            raise ValueError(f"method {fn.__name__} lives in {fn.__module__}: the file must have the method's name")
        for law in laws:
            if law not in LAWS:
                raise unknown(f"law of method {fn.__name__}", law, LAWS)
        return Method(fn.__name__, kind, title, paper, cost, tuple(laws), options_of(fn), fn)

    return wrap


def methods(kind: str) -> dict[str, Method]:
    """All methods of a kind ("merge", "weigh" or "route") by name, sorted; the folder is the list."""
    if kind not in KINDS:
        raise unknown("kind of method", kind, KINDS)
    package = importlib.import_module(f"multilora.{kind}")
    found = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
        record = getattr(importlib.import_module(f"{package.__name__}.{info.name}"), info.name, None)
        if not isinstance(record, Method):
            raise ValueError(f"multilora/{kind}/{info.name}.py must define a method named {info.name}")
        found[info.name] = record
    return found


def resolve(kind: str, which: str | Method | Bound, **options: Any) -> Bound:
    """A name, a record or a bound method, with options over it, as one bound method.

    Raises UnknownName for a name that is not a method of this kind, ValueError for bad options.
    """
    if isinstance(which, str):
        known = methods(kind)
        if which not in known:
            raise unknown(f"{kind} method", which, known)
        which = known[which]
    record, bound = (which.record, which.options) if isinstance(which, Bound) else (which, {})
    if not isinstance(record, Method) or record.kind != kind:
        raise ValueError(f"wanted a {kind} method by name or record, got {which!r}")
    return Bound(record, record.check({**bound, **options}))
