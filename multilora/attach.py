"""Put a LoRA set on any module by module path, hold its row, and leave the module as it was.

    with attached(model, [fox, robe]) as bank:
        bank.row = [0.8, 0.6]
        y = model(x)

Three forms, equal within 1e-5 in float32. `side`: a forward hook on every adapted module adds two thin matmuls.
`rebuilt`: the weights become W0 + sum_i row_i delta_i, from a pristine W0, and the hooks have nothing to do. `bank`:
merged weights are kept per row within a byte budget and exchanged by pointer. A row per sample or token, and a gate,
always run on the side, with W0 back in place.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from multilora.compiled import Eager
from multilora.held import holding
from multilora.lora import Lora
from multilora.rebuilt import Merged, Weight, form_of, mergeable, tied_parameters
from multilora.rebuilt_many import Many, rebuilt_at_once
from multilora.routing import Asked
from multilora.side import Branch, Row, branches_of
from multilora.sites import Site, sites_of
from multilora.takeover import disabled, loaded

__all__ = ["Bank", "attached", "loaded"]

_KEPT_ROWS, _KEPT_BYTES = 64, 256 << 20  # rows whose folded factors are kept, and the size of these at most


# The weights while they are exchanged: equal to no row, so that an interrupted exchange is done again.
_HALFWAY = object()


class _Hook:
    """The forward hook of one site. An object, so that `Bank` recognises its own hooks whatever happens."""

    def __init__(self, bank: Bank, site: Site, branch: Branch):
        self.bank, self.path, self.branch, self.weight = bank, site.path, branch, bank._weights.get(site)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        bank, path = self.bank, self.path
        bank.calls[path] += 1
        row, gate = bank._row, bank._gate
        merged = self.weight is not None and self.weight.now is not None
        if gate is None and (row is None or merged or path in bank.ready):
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        y = output[0] if isinstance(output, tuple) else output
        if gate is not None:
            y = gate.add(self, x, y) if isinstance(gate, Asked) else self.branch.tensor(x, y, gate(path, x))
        elif isinstance(row, Row):
            y = self.branch.numbers(x, y, row)
        else:
            y = self.branch.tensor(x, y, row)
        return (y, *output[1:]) if isinstance(output, tuple) else y


class Bank:
    """A LoRA set on a model: the row that all adapted modules read, and what undoes it. Made by `attached`.

    row    [k] for all samples, [B, k] per sample, [B, T, k] per token; numbers, nested sequences or a tensor.
           B is the batch of the adapted modules' inputs. Zero (the base model) until set
    gate   None, or a callable `gate(path, x) -> row tensor` that every adapted module asks instead of the row; an
           Asked (multilora.routing) also sees what each LoRA alone would add there
    form   "side", "rebuilt" or "bank": what a [k] row uses
    paths  the adapted modules, in the model's order
    calls  path -> calls since `reset_calls()`; when dozing, those that no hook was needed for are not all counted
    """

    def __init__(
        self, model: nn.Module, sites: list[Site], k: int, form: str, bank_bytes: int, optional: Sequence[str] = (),
        dozing: bool = False,
    ):  # fmt: skip
        self.model, self.sites, self.k, self.form, self.bank_bytes = model, sites, k, form, bank_bytes
        self.dozing = dozing
        self.paths = tuple(site.path for site in sites)
        self.optional = frozenset(optional)
        self.calls: dict[str, int] = dict.fromkeys(self.paths, 0)
        self.ready: set[str] = set()  # modules whose output has the LoRAs' part already: multilora.remembered
        self.eager = Eager(model)
        self._branches = branches_of(sites, getattr(model, "_orig_mod", model))
        tied = tied_parameters(model, sites)
        plain = [] if form == "side" else [site for site in sites if mergeable(site, tied)]
        self._weights = {site: Weight(site, self._branches[site]) for site in plain}
        self._scratch: dict[Site, Merged] = {}
        self._many: Many | None = None
        self._kept: OrderedDict[tuple[float, ...], dict[Site, Merged]] = OrderedDict()
        self._rows: OrderedDict[Any, Row] = OrderedDict()
        self._row: Row | Tensor | None = None
        self._gate: Callable[[str, Tensor], Tensor] | None = None
        self._in_weights: Any = None  # the [k] row that the weights hold
        self._hooks: dict[Site, Any] = {}
        self.placed = False  # whether the model is ours now
        self._inside = False  # whether the gate has been asked for something else than hooks

    # -- what the user sets ----------------------------------------------------------------------------------------

    @property
    def row(self) -> Any:
        if isinstance(self._row, Row):
            return self._row.rows if self._row.per_sample else self._row.rows[0]
        return (0.0,) * self.k if self._row is None else self._row

    @row.setter
    def row(self, value: Any) -> None:
        self._row = self._read(value)
        self._settle()

    @property
    def gate(self) -> Callable[[str, Tensor], Tensor] | None:
        return self._gate

    @gate.setter
    def gate(self, gate: Callable[[str, Tensor], Tensor] | None) -> None:
        if gate is not None and not callable(gate):
            raise ValueError(f"gate: wanted None or a callable (path, x) -> row, got {type(gate).__name__}")
        self._gate = gate
        self._settle()

    def _read(self, value: Any) -> Row | Tensor:
        if isinstance(value, Tensor):
            shape = tuple(value.shape)
            if value.requires_grad or value.ndim == 3:
                if shape[-1] != self.k or value.ndim > 3:
                    raise ValueError(self._wanted(shape))
                return value
            value = value.tolist()
        try:
            value = tuple(tuple(map(float, v)) if isinstance(v, (Sequence, Tensor)) else float(v) for v in value)
        except TypeError:
            value = torch.as_tensor(value, dtype=torch.get_default_dtype())
            if value.ndim != 3 or value.shape[-1] != self.k:
                raise ValueError(self._wanted(tuple(value.shape))) from None
            return value
        known = self._rows.get(value)
        if known is None:
            per_sample = bool(value) and isinstance(value[0], tuple)
            rows = value if per_sample else (value,)
            if any(not isinstance(r, tuple) or len(r) != self.k for r in rows):
                raise ValueError(self._wanted((len(rows), len(rows[0])) if per_sample else (len(value),)))
            if any(v != v or abs(v) == float("inf") for r in rows for v in r):
                raise ValueError(f"row {value}: finite numbers are wanted")
            known = self._rows[value] = Row(rows, per_sample)
            while len(self._rows) > 1 and (
                len(self._rows) > _KEPT_ROWS or sum(row.nbytes for row in self._rows.values()) > _KEPT_BYTES
            ):
                self._rows.popitem(last=False)
        else:
            self._rows.move_to_end(value)
        return known

    def _wanted(self, shape: tuple[int, ...]) -> str:
        k = self.k
        return f"row of shape {list(shape)} for {k} LoRAs: wanted [{k}], [B, {k}] or [B, T, {k}]"

    # -- placing ---------------------------------------------------------------------------------------------------

    def place(self) -> None:
        """Put the hooks anew, for a model whose hooks something else has dropped."""
        self._unhook()
        self.placed = True
        if self._hooks_wanted():
            for site in self.sites:
                self._hook(site)
        self._inside = hasattr(self._gate, "inside")

    def _hook(self, site: Site, first: bool = False) -> None:
        self._drop(site)
        hook, module = _Hook(self, site, self._branches[site]), site.module
        inside = getattr(self._gate, "inside", None)  # a gate that can do without hooks: multilora.token_route
        placed = None if inside is None else inside(hook, module)
        self._hooks[site] = placed or module.register_forward_hook(hook, with_kwargs=True, prepend=first)

    def _doze(self) -> None:
        """Off with hooks that would only count calls, once they have: with one torch calls a module 6 us slower."""
        own = [s for s in self._hooks if self.calls[s.path] and len(s.module._forward_hooks) == 1]
        if own and not Eager(self.model).compiled:  # a graph traced now would not ask for hooks that come later
            for site in own:
                self._hooks.pop(site).remove()

    def _wake(self) -> None:
        """All hooks, in front of those that others have put there meanwhile."""
        if self.placed and len(self._hooks) < len(self.sites) and self._hooks_wanted():
            for site in self.sites:
                if site not in self._hooks:
                    self._hook(site, first=True)

    def _hooks_wanted(self) -> bool:
        # A graph compiled with our hooks in it would keep them after we are gone.
        return not self.eager.compiled or self.eager.on

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.popitem()[1].remove()
        for site in self.sites:
            self._drop(site)

    def _drop(self, site: Site) -> None:
        """Off with a hook that an interrupt cut off from its handle."""
        module = site.module

        def ours(hook: Any) -> bool:  # of this site: a module may be there under two names
            return getattr(hook, "bank", None) is self and hook.path == site.path

        for key in [key for key, hook in module._forward_hooks.items() if ours(hook)]:
            module._forward_hooks.pop(key)
            module._forward_hooks_with_kwargs.pop(key, None)
        if ours(module.__dict__.get("forward")):
            del module.__dict__["forward"]

    def _settle(self) -> None:
        """Bring the weights and the hooks in line with the row and the gate."""
        row = self._row
        plain = self._gate is None and (row is None or (isinstance(row, Row) and not row.per_sample))
        acts = plain and row is not None and not row.zero
        idle = self.dozing and plain and (not acts or len(self._weights) == len(self.sites))
        if not idle:
            self._wake()
        try:
            self._exchange(row if acts and self._weights else None)
        except BaseException:
            self._restore()  # all that the row asks for is added by the hooks then
            self._wake()
            raise
        if self.eager.compiled:
            side = not plain or (acts and len(self._weights) < len(self.sites))
            if side != self.eager.on:
                self.eager.turn(side)
                self.place()
        if self._inside != hasattr(self._gate, "inside"):
            self.place()
        if idle:
            self._doze()

    def _exchange(self, row: Row | None) -> None:
        """The merged weights of a [k] row in place, or with None the base weights."""
        wanted = None if row is None else row.rows[0]
        if wanted == self._in_weights:
            return
        self._in_weights = _HALFWAY
        if row is None:
            self._restore()
            self._in_weights = None
            return
        with torch.inference_mode(False), torch.no_grad():
            kept = self._bank_entry(row) if self.form == "bank" else None
            at_once = rebuilt_at_once(self, wanted) if kept is None else ()
            for site, weight in self._weights.items():
                if kept is None and site not in at_once:
                    self._scratch[site] = weight.build(row, self._scratch.get(site))
                merged = (kept or self._scratch)[site]
                if weight.now is not merged or weight.displaced:
                    weight.put(merged)
        self._in_weights = wanted

    def _restore(self) -> None:
        for weight in self._weights.values():
            weight.restore()

    def _bank_entry(self, row: Row) -> dict[Site, Merged] | None:
        """Merged weights of a row from the bank, made when missing, the ones used longest ago dropped for them.

        None when the budget does not hold one set of weights.
        """
        key = row.rows[0]
        if key not in self._kept:
            size = sum(weight.nbytes for weight in self._weights.values())
            if size > self.bank_bytes:
                return None
            while (len(self._kept) + 1) * size > self.bank_bytes:
                self._restore()
                self._kept.popitem(last=False)
            self._kept[key] = {site: weight.build(row) for site, weight in self._weights.items()}
        self._kept.move_to_end(key)
        return self._kept[key]

    # -- checking --------------------------------------------------------------------------------------------------

    def reset_calls(self) -> None:
        for path in self.calls:
            self.calls[path] = 0
        self._wake()

    def check_called(self) -> None:
        """RuntimeError when an adapted module was not called since `reset_calls()` or has lost its merged weight."""
        for site, weight in self._weights.items():
            if weight.displaced:
                raise RuntimeError(
                    f"{site.path}: its merged weight was replaced by something else (offloading or a move to another "
                    f"device?); use form='side'"
                )
        if not self._hooks_wanted():
            return
        missed = [p for p, n in self.calls.items() if n == 0 and p not in self.optional]
        if missed:
            raise RuntimeError(
                f"{len(missed)} of {len(self.calls)} adapted modules were not called, first {missed[0]!r}: its LoRA "
                f"had no effect. A graph compiled by other means ignores hooks (use form='rebuilt', or attach before "
                f"compiling); a module that this call rightly skips belongs into optional=[...]"
            )

    @contextlib.contextmanager
    def again(self) -> Iterator[Bank]:
        """Attached once more after the `attached` block, with what was built there; in the end the model is as it was.

        Raises RuntimeError when other LoRAs are attached to the model.
        """
        with holding(self.model, self.sites), disabled(self.model):
            try:
                self.place()
                self.reset_calls()
                yield self
            finally:
                try:
                    self.rest()
                except BaseException:  # a second interrupt must not leave half of it in place
                    self.rest()
                    raise

    def rest(self) -> None:
        """Hooks off, the base weights in place; what was built stays. May be called again."""
        self._row = self._gate = None
        self.placed = False
        self._unhook()
        self._restore()
        self._in_weights = None
        self.eager.turn(False)

    def close(self) -> None:
        """Undo everything and drop what was built for rows; may be called again."""
        self.rest()
        self._kept.clear()
        self._scratch.clear()
        self._many = None
        self._rows.clear()


@contextlib.contextmanager
def attached(
    model: nn.Module,
    loras: Sequence[Lora],
    *,
    component: str | None = None,
    form: str = "auto",
    blocks: Sequence[Mapping[str, float] | None] | None = None,
    bank_bytes: int = 2 << 30,
    optional: Sequence[str] = (),
    dozing: bool = False,
) -> Iterator[Bank]:
    """The LoRAs on `model` for the length of a block; yields the Bank, whose row starts at zero (the base model).

    component   "unet" takes the LoRAs' modules under "unet." and drops that prefix; None takes their paths as they are
    form        "side", "rebuilt", "bank", or "auto": rebuilt when every adapted weight is plain float32 or float64
                and stays where it is, else side
    blocks      per LoRA None or {module path or glob: factor}; see multilora.sites.block_factors
    bank_bytes  budget of the bank form; a set beyond it is rebuilt at each change of row
    optional    paths that a forward may leave out
    dozing      hooks come off while the weights hold the row, after each was called once. Faster; not for a block in
                which the model is compiled: a graph traced meanwhile ignores them when they are back

    LoRAs that PEFT or diffusers loaded into `model` are switched off meanwhile. However the block ends, weights (their
    bytes), hooks and adapters are those from before.

    Raises ValueError for a path that is no module of the model, a shape that does not fit, a bad block or form; and
    RuntimeError when LoRAs are attached to the model already. Then nothing is attached.
    """
    loras = list(loras)
    if not loras:
        raise ValueError("attached: no LoRAs given; without LoRAs run the model as it is")
    for i, lora in enumerate(loras):
        if not isinstance(lora, Lora):
            raise ValueError(f"LoRA number {i + 1} is a {type(lora).__name__}, wanted a Lora (see multilora.load)")
    sites = sites_of(model, loras, component, blocks)
    bank: Bank | None = None
    with holding(model, sites), disabled(model):
        try:
            bank = Bank(model, sites, len(loras), form_of(form, model, sites), bank_bytes, optional, dozing)
            bank.place()
            yield bank
        finally:
            if bank is not None:
                try:
                    bank.close()
                except BaseException:  # a second interrupt must not leave half of it in place
                    bank.close()
                    raise
