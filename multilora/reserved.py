"""Room in a model for LoRAs that come and go under one compiled or captured graph.

    with reserved(unet, paths, max_loras=5, max_rank=16) as room:
        unet.compile()
        room.load([fox, robe])
        room.row = [0.8, 0.6]
        unet(...)                     # compiles; other LoRAs and other rows then run in the same graph

`multilora.attach` folds a row into the factors, which is less arithmetic, and runs a compiled model's side form
eagerly. Here factors and row are tensors of one size at one address, so that neither torch.compile nor a CUDA graph
sees a change. Three operations a layer for all LoRAs and samples: shrink, times the row, expand into the output.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from multilora.compiled import Eager
from multilora.held import holding
from multilora.kernels import routed as kernels
from multilora.lora import Lora, LowRank
from multilora.sites import Site, kind_of, label, live_modules, nearest, quantised


class _Place:
    """The forward hook of one module and its factors: down [in, R] and up [R, out], R = max_loras * max_rank."""

    def __init__(self, room: Room, module: nn.Module) -> None:
        self.room, self.weight = room, module.weight
        self.grow()

    def grow(self) -> None:
        out, wide = self.weight.shape
        self.down = self.weight.new_zeros(wide, self.room.size)
        self.up = self.weight.new_zeros(self.room.size, out)

    def fill(self, parts: Sequence[LowRank | None]) -> None:
        rank = self.room.max_rank
        self.down.zero_()
        self.up.zero_()
        for i, part in enumerate(parts):
            if part is not None:
                mine = slice(i * rank, i * rank + part.rank)
                self.down[:, mine] = part.down.T
                self.up[mine] = part.up.T

    def __call__(self, module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        x, scale = args[0], self.room.scale
        h = kernels.shrunk(x, self.down)
        h = (h.view(len(scale), -1, h.shape[-1]) * scale[:, None]).flatten(0, 1) if len(scale) > 1 else h * scale
        return kernels.add_expanded(y, h, self.up)


class Room:
    """What `reserved` yields.

    max_loras, max_rank, samples   what there is room for
    paths  the modules that may be adapted
    scale  [samples, max_loras * max_rank] the row, an entry per rank
    grown  how often the room was made larger: each time, a compiled graph that holds it is compiled anew, once
    """

    def __init__(self, sites: Sequence[Site], max_loras: int, max_rank: int, samples: int, component: str | None):
        self.max_loras, self.max_rank, self.samples = max_loras, max_rank, samples
        self.paths, self.component, self.grown, self.count = tuple(s.path for s in sites), component, 0, 0
        self._like = sites[0].module.weight
        self.scale = self._zeros()
        self._places = {site.path: _Place(self, site.module) for site in sites}
        self._hooks = [site.module.register_forward_hook(self._places[site.path]) for site in sites]

    @property
    def size(self) -> int:
        return self.max_loras * self.max_rank

    def _zeros(self) -> Tensor:
        return self._like.new_zeros(self.samples, self.size)

    @torch.no_grad()
    def load(self, loras: Sequence[Lora]) -> None:
        """These LoRAs in the place of those before; the row becomes zero.

        More LoRAs or higher ranks than there is room for make the room larger and warn: compiled graphs are compiled
        anew, captured ones must be captured anew.

        Raises ValueError, and changes nothing, for a module that is not reserved or does not fit, and for a part that
        is not low-rank or has a bias.
        """
        parts = [lora.part(self.component) for lora in loras]
        for i, each in enumerate(parts):
            for path, part in each.items():
                self._check(label(loras[i], i), path, part)
        ranks = [part.rank for each in parts for part in each.values()]
        count, rank = max(len(loras), self.max_loras), max([*ranks, self.max_rank])
        if (count, rank) != (self.max_loras, self.max_rank):
            warnings.warn(
                f"reserved: {len(loras)} LoRAs of ranks up to {max(ranks)} do not fit into the room for "
                f"{self.max_loras} of rank {self.max_rank}; it now holds {count} of rank {rank}, and what was "
                f"compiled is compiled anew, once",
                stacklevel=3,  # past torch.no_grad
            )
            self.max_loras, self.max_rank, self.grown = count, rank, self.grown + 1
            self.scale = self._zeros()
            for place in self._places.values():
                place.grow()
        for path, place in self._places.items():
            place.fill([each.get(path) for each in parts])
        self.count = len(loras)
        self.scale.zero_()

    def _check(self, who: str, path: str, part: Any) -> None:
        if path not in self._places:
            raise ValueError(f"{who}: {path} is not among the {len(self.paths)} reserved modules"
                             f"{nearest(path, self.paths, 1)}; reserve it too")  # fmt: skip
        if not isinstance(part, LowRank) or part.bias is not None:
            raise ValueError(f"{who}: {path} is not a plain low-rank part; use multilora.attach, which takes any")
        out, wide = self._places[path].weight.shape
        if tuple(part.down.shape[1:]) != (wide,) or part.up.shape[0] != out:
            raise ValueError(f"{who}: {path} has down {list(part.down.shape)} and up {list(part.up.shape)}, wanted "
                             f"[r, {wide}] and [{out}, r]")  # fmt: skip

    @property
    def row(self) -> list[list[float]]:
        """[samples][loras]; set as [loras] for all samples, or [samples][loras]."""
        return self.scale.view(self.samples, self.max_loras, -1)[:, : self.count, 0].tolist()

    @row.setter
    def row(self, value: Any) -> None:
        rows = torch.as_tensor(value, dtype=self.scale.dtype)
        if rows.shape not in ((self.count,), (self.samples, self.count)) or not torch.isfinite(rows).all():
            raise ValueError(f"row of shape {list(rows.shape)}: wanted finite numbers, [{self.count}] or "
                             f"[{self.samples}, {self.count}]")  # fmt: skip
        with torch.no_grad():
            each = self.scale.view(self.samples, self.max_loras, self.max_rank)[:, : self.count]
            each.copy_(rows[..., None].to(self.scale.device).expand(each.shape))

    def close(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()


@contextlib.contextmanager
def reserved(
    model: nn.Module,
    paths: Sequence[str],
    *,
    max_loras: int,
    max_rank: int,
    samples: int = 1,
    component: str | None = None,
) -> Iterator[Room]:
    """Room for LoRAs on the linear modules of these paths, for the length of the block; yields the Room, empty.

    max_loras, max_rank   what a compiled or captured graph will hold; every layer pays for all of it
    samples    rows of a call: 1 is one row for all samples, else the batch of the call
    component  as in multilora.attach: LoRAs name their modules under it

    For inference. The model is compiled or captured inside the block; with the block the graph ends.
    Raises ValueError for a path that is no plain linear module, a size below 1 and a model that is compiled already;
    RuntimeError where LoRAs are attached to the model.
    """
    for name, value in (("max_loras", max_loras), ("max_rank", max_rank), ("samples", samples)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"reserved: {name}={value!r}, wanted a whole number of at least 1")
    if Eager(model).compiled:
        raise ValueError("reserved: the model is compiled already, and its graph would not see the LoRAs; compile it "
                         "inside the block")  # fmt: skip
    live = live_modules(model)
    sites = []
    for path in paths:
        if path not in live:
            raise ValueError(f"reserved: {path!r} is no module of the {type(model).__name__}{nearest(path, [*live])}")
        module = live[path]
        if type(module) is not nn.Linear or quantised(module):
            what = quantised(module) or f"{type(module).__name__} ({kind_of(module)})"
            raise ValueError(f"reserved: {path} is a {what}, wanted a plain nn.Linear; use multilora.attach")
        sites.append(Site(path, module, "linear", (), ()))
    if len({(s.module.weight.dtype, s.module.weight.device) for s in sites}) != 1:
        raise ValueError(f"reserved: {len(sites)} modules; wanted at least one, all of one dtype on one device")
    with holding(model, sites):
        room = Room(sites, max_loras, max_rank, samples, component)
        try:
            yield room
        finally:
            room.close()
