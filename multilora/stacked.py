"""A row per sample in the bank form: each run of samples has its merged weights, all of them one batched matmul.

With the LoRAs inside the weights a batched Composite costs as many kernels as the bare model. It takes the memory of
the adapted weights once for each distinct row, within the bank's budget; beyond it the layers run on the side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from multilora.attach import Bank
from multilora.rebuilt import Weight
from multilora.side import Row, segments
from multilora.sites import Site


class Stacked:
    """The merged weights of the last row per sample. nbytes: what they take."""

    def __init__(self, bank: Bank):
        self.bank, self.nbytes, self._row = bank, 0, None
        self._weights: dict[Site, tuple[Tensor, Tensor | None] | None] = {}
        self._rows: list[Row] = []

    def clear(self) -> None:
        self.nbytes, self._row = 0, None
        self._weights.clear()

    def weights(self, site: Site, weight: Weight) -> tuple[Tensor, Tensor | None] | None:
        """([segments, in, out], [segments, 1, out] or None) under the bank's row; None beyond the budget."""
        if self._row is not self.bank._row:
            self.clear()
            self._row = row = self.bank._row
            size = len(row.rows) // segments(row.rows)
            self._rows = [Row((each,), False) for each in row.rows[::size]]
        if site not in self._weights:
            size = weight.nbytes * len(self._rows)
            within = self.nbytes + size <= self.bank.bank_bytes
            self._weights[site] = self._built(site, weight) if within else None
            self.nbytes += size if within else 0
        return self._weights[site]

    def _built(self, site: Site, weight: Weight) -> tuple[Tensor, Tensor | None]:
        with torch.inference_mode(False), torch.no_grad():
            built = [weight.build(row) for row in self._rows]
            biases = [site.module.bias if bias is None else bias for _, bias in built]
            bias = None if biases[0] is None else torch.stack(biases)[:, None]
            return torch.stack([w for w, _ in built]).mT, bias

    def applies(self, x: Any) -> bool:
        bank, row = self.bank, self.bank._row
        return (
            bank.gate is None
            and isinstance(row, Row)
            and row.per_sample
            and isinstance(x, Tensor)
            and x.ndim > 1
            and x.shape[0] == len(row.rows)
            and not x.requires_grad
        )

    @contextlib.contextmanager
    def _around(self, site: Site, weight: Weight) -> Iterator[None]:
        module, path, ready = site.module, site.path, self.bank.ready
        own = module.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            ready.discard(path)
            if args or kwargs or not self.applies(x) or x.dtype != weight.base[0].dtype:
                return own(x, *args, **kwargs)
            found = self.weights(site, weight)
            if found is None:
                return own(x)
            ready.add(path)
            merged, bias = found
            flat = x.reshape(len(merged), -1, x.shape[-1])
            y = torch.bmm(flat, merged) if bias is None else torch.baddbmm(bias, flat, merged)
            return y.view(*x.shape[:-1], y.shape[-1])

        try:
            module.__dict__["forward"] = forward
            yield
        finally:
            ready.discard(path)
            if module.__dict__.get("forward") is forward:
                del module.__dict__["forward"]


@contextlib.contextmanager
def stacking(bank: Bank) -> Iterator[Stacked]:
    """The bank's plain linear layers take rows per sample as one batched matmul, for the length of the block.

    Only in the bank form. A compiled model, and modules whose forward something else has replaced, are left as they
    are.
    """
    stacked = Stacked(bank)
    with contextlib.ExitStack() as stack:
        if bank.form == "bank" and not bank.eager.compiled:
            for site, weight in bank._weights.items():
                if type(site.module) is nn.Linear and "forward" not in site.module.__dict__:
                    stack.enter_context(stacked._around(site, weight))
        stack.callback(stacked.clear)
        yield stacked
