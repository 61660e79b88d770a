"""How often torch.compile compiles while LoRAs come and go (goal C13), on a small U-Net.

    OMP_NUM_THREADS=1 python benchmarks/recompiles.py

Counted are the graphs that dynamo hands to its backend after those of the first call; the backend runs them as they
are. PEFT is beside it for the same changes. "Within" and "beyond" are what multilora.reserved declares: so many LoRAs,
of ranks up to so much, on these modules. A module that is not reserved is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from adapted_layers import call_of, with_peft
from full_size import ATTENTION, RANK, K, adapted, lora
from goals import HEAD, Row
from gpu_pictures import SMALL
from torch import nn

from multilora.attach import attached
from multilora.reserved import reserved


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(**SMALL).eval()


class Compiled:
    """A model compiled in place; `more(change)` is how many graphs a call after the change needs anew."""

    def __init__(self, model: nn.Module):
        torch._dynamo.reset()
        self.graphs = 0
        self.call = call_of(model, 2)
        model.compile(backend=self._backend)

    def _backend(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        self.graphs += 1
        return graph.forward

    def more(self, *changes: Callable[[], object]) -> int:
        before = self.graphs
        for change in changes:
            change()
            self.call()
        return self.graphs - before


def peft() -> Iterator[Row]:
    model = unet()
    names = with_peft(model, [lora(adapted(model, ATTENTION), seed) for seed in range(K)])
    model.set_adapters(names[0])
    compiled = Compiled(model)
    compiled.call()
    turns = [lambda name=name: model.set_adapters(name) for name in names]
    whole = compiled.graphs
    yield Row(
        "C13", f"diffusers with PEFT: graphs made anew by a turn of {K} LoRAs, first of {whole}", compiled.more(*turns)
    )
    yield Row("C13", "diffusers with PEFT: by another turn", compiled.more(*turns))
    weights = [lambda w=w: model.set_adapters(names[0], w) for w in (0.5, 0.6, 0.7)]
    yield Row("C13", "diffusers with PEFT: by other weights", compiled.more(*weights))


def rows_of(holder: object) -> list[Callable[[], None]]:
    """All LoRAs in turn, and other weights."""
    one_hot = [[0.8 * (i == j) for i in range(K)] for j in range(K)]
    mixed = [[0.1 * (i + j) for i in range(K)] for j in range(1, 4)]
    return [lambda row=row: setattr(holder, "row", row) for row in [*one_hot, *mixed]]


def rebuilt() -> Iterator[Row]:
    model = unet()
    compiled = Compiled(model)
    compiled.call()
    with attached(model, [lora(adapted(model, ATTENTION), seed) for seed in range(K)], form="rebuilt") as bank:
        yield Row("C13", f"rebuilt: by a turn of {K} LoRAs and other weights", compiled.more(*rows_of(bank)), 0)


def room() -> Iterator[Row]:
    model = unet()
    layers = adapted(model, ATTENTION)
    with reserved(model, list(layers), max_loras=K, max_rank=RANK) as held:
        compiled = Compiled(model)
        held.load([lora(layers, seed) for seed in range(K)])
        compiled.call()
        whole = compiled.graphs

        def others(count: int, rank: int) -> Callable[[], None]:
            return lambda: held.load([lora(layers, 50 + seed, rank) for seed in range(count)])

        what = f"reserved for {K} of rank {RANK}: by a turn of {K} LoRAs and other weights"
        yield Row("C13", what, compiled.more(*rows_of(held)), 0)
        yield Row(
            "C13", "reserved: by other LoRAs, fewer or of lower rank", compiled.more(others(5, 16), others(2, 3)), 0
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            grown = compiled.more(others(K + 1, 2 * RANK)) / whole
        if sum("do not fit into the room" in str(each.message) for each in said) != 1:
            raise RuntimeError("the room grew and did not say so once")
        yield Row("C13", f"reserved: by {K + 1} of rank {2 * RANK}, announced; times all graphs", grown, 1)
        yield Row("C13", "reserved: by what fits then", compiled.more(others(K + 1, 5), others(1, 2 * RANK)), 0)


@torch.no_grad()
def rows() -> Iterator[Row]:
    for part in (peft, rebuilt, room):
        yield from part()
    torch._dynamo.reset()


if __name__ == "__main__":
    print(HEAD)
    for row in rows():
        print(row, flush=True)
