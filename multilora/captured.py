"""A step of an adapted model as a CUDA graph: recorded once, then replayed without the host's part.

    with attached(unet, loras) as bank:
        bank.row = [1.0, 0.0]
        step = captured(lambda: unet(x, t, text).sample, bank)
        x.copy_(other)
        y = step()                     # the same tensor every time, overwritten by the next replay

A graph holds addresses, not values. In the rebuilt form all rows that are not zero have their merged weights at one
address, so the row may change between replays; in the side form a row is folded into factors of its own, and the bank
form exchanges addresses: there the graph is of one row, and a replay under another is refused. `multilora.reserved`
holds factors and row at one address; what it holds may change freely.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from multilora.attach import Bank


def record(call: Callable[[], Any], warm: int = 3) -> Callable[[], Any]:
    """`call` as a CUDA graph; warm: runs before, in which libraries and this package make what they keep."""
    if not torch.cuda.is_available():
        raise ValueError("captured: CUDA graphs need a CUDA device, and there is none; call the step itself")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Any:
        graph.replay()
        return output

    return replay


def captured(
    call: Callable[[], Any], bank: Bank | None = None, *, recorder: Callable[..., Callable[[], Any]] = record
) -> Callable[[], Any]:
    """`call` recorded, to be replayed: reads its inputs where they lie now, and gives the same tensors each time.

    bank   what `attached` yields, for a model with LoRAs: every replay checks that the graph is still of its state

    Without gradients. Raises ValueError where there is no CUDA device or gradients are on. A replay raises
    RuntimeError when the bank's row, gate or weights are no longer those of the graph, or its block has ended.
    """
    if torch.is_grad_enabled():
        raise ValueError("captured: gradients are on, and a graph has none; capture under torch.no_grad()")
    replay = recorder(call)
    if bank is None:
        return replay
    then, held = _state(bank), (bank._row, bank._gate)  # as long as they are held, no other object has their id

    def guarded(held: Any = held) -> Any:
        now = _state(bank)
        if now != then:
            what = next(name for name in then if now[name] != then[name])
            raise RuntimeError(
                f"captured: {what} changed since the graph was recorded; capture the step again, or use "
                f"form='rebuilt' or multilora.reserved, where rows may change"
            )
        return replay()

    return guarded


def _state(bank: Bank) -> dict[str, Any]:
    """What a graph of the bank's model is of."""
    # Merged weights hold the row: then no hook acts, if all modules have them.
    within = bank._in_weights is not None and len(bank._weights) == len(bank.sites)
    return {
        "the attachment": bank.placed,
        "the gate": id(bank._gate),
        "the row": None if within else id(bank._row),
        "the weights' place": tuple(w.parameters[0].data_ptr() for w in bank._weights.values()),
    }
