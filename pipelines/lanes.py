"""Who may use a model now: one composition at a time, the others wait instead of mixing their LoRAs in."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from torch import nn

_LANES: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_LANES_LOCK = threading.Lock()


def lane(module: nn.Module) -> Any:
    """The lock that lets one composition at a time use a model; the same thread may take it again.

    A thread takes the denoiser's lane first, then those of the text encoders in the pipeline's order.
    """
    with _LANES_LOCK:
        return _LANES.setdefault(module, threading.RLock())
