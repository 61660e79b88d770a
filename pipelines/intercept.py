"""A module's calls sent elsewhere: `with intercepted(module, conduct)`.

A call is intercepted at the class (an instance gets a subclass whose `__call__` is ours), not at `forward`:
accelerate's and diffusers' offload hooks replace `forward` and drop whatever stood there after each picture, and
torch.compile guards on it. Inside a pass the module has its own class again, so nothing underneath sees us.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


@functools.cache
def _conducted(cls: type) -> type:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        conduct = self.__dict__["__multilora_conduct__"]

        def model(*args: Any, **kwargs: Any) -> Any:
            own = type(self)
            self.__class__ = cls
            try:
                return self(*args, **kwargs)
            finally:
                self.__class__ = own

        return conduct(model, args, kwargs)

    return type(cls.__name__, (cls,), {"__call__": __call__, "__multilora_of__": cls, "__module__": cls.__module__})


@contextlib.contextmanager
def intercepted(module: nn.Module, conduct: Callable[[Callable, tuple, dict], Any]) -> Iterator[None]:
    """Send calls of `module` to `conduct(model, args, kwargs)`, where `model` is the module as it was.

    Raises RuntimeError when the module is intercepted already.
    """
    cls = type(module)
    if hasattr(cls, "__multilora_of__"):
        raise RuntimeError(f"{cls.__name__} already runs a composition; finish that one first")
    try:  # from here on: an interrupt may come between any two lines
        module.__dict__["__multilora_conduct__"] = conduct
        module.__class__ = _conducted(cls)
        yield
    finally:
        module.__class__ = cls
        module.__dict__.pop("__multilora_conduct__", None)
