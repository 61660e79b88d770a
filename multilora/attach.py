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
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from multilora.compiled import Eager
from multilora.forms import Branch, Row, merged_into, mergeable
from multilora.lora import Lora
from multilora.sites import Site, nearest, sites_of
from multilora.takeover import disabled, loaded

__all__ = ["Bank", "attached", "loaded"]

FORMS = ("auto", "side", "rebuilt", "bank")
# Modules that a bank holds now. Two LoRA sets on one module would mix two users' pictures.
_HELD: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_HELD_LOCK = threading.Lock()
_KEPT_ROWS = 4  # rows whose folded factors are kept


class _Merged:
    """The weight of one site: its pristine tensor, and merged ones put in its place."""

    def __init__(self, site: Site, branch: Branch):
        self.site, self.branch = site, branch
        self.parameter = site.module._parameters["weight"]
        self.base = self.parameter.data
        self.bias_parameter = site.module._parameters.get("bias")
        self.bias_base = None if self.bias_parameter is None else self.bias_parameter.data
        self.has_bias = any(p is not None and p.bias is not None for p in site.parts)
        self.now: tuple[Tensor, Tensor | None] | None = None  # in place, None while it is the base

    @property
    def nbytes(self) -> int:
        return self.base.numel() * self.base.element_size()

    def build(self, row: Sequence[float], out: tuple[Tensor, Tensor | None] | None) -> tuple[Tensor, Tensor | None]:
        """Merged weight and bias for a row, written to `out` when given."""
        wide = self.base.dtype if self.base.dtype in (torch.float32, torch.float64) else torch.float32
        stack = self.branch.stacked((self.base.device, wide))
        if out is None:
            out = (torch.empty_like(self.base, memory_format=torch.contiguous_format),
                   torch.empty_like(self.bias_base) if self.has_bias else None)  # fmt: skip
        if stack.down is not None or any(d is not None for d in stack.dense):
            merged_into(self.site, stack, row, self.base, out[0])
        else:
            out[0].copy_(self.base)
        if out[1] is not None:
            total = self.bias_base.to(wide).clone()
            for v, f, bias in zip(row, self.site.factors, stack.bias, strict=True):
                if bias is not None:
                    total.add_(bias, alpha=v * f)
            out[1].copy_(total)
        return out

    def put(self, merged: tuple[Tensor, Tensor | None]) -> None:
        self.now = merged
        self.parameter.data = merged[0]
        if merged[1] is not None:
            self.bias_parameter.data = merged[1]

    def restore(self) -> None:
        """The original tensors back. A model that was moved meanwhile gets them where and as it is now."""
        if self.now is None:
            return
        pairs = [(self.parameter, self.now[0], self.base)]
        if self.now[1] is not None:
            pairs.append((self.bias_parameter, self.now[1], self.bias_base))
        for parameter, merged, base in pairs:
            moved = parameter.data.device != base.device or parameter.data.dtype != base.dtype
            parameter.data = base.to(parameter.data) if moved else base
            del merged
        self.now = None

    def in_place(self) -> bool:
        return self.now is not None and self.parameter.data_ptr() == self.now[0].data_ptr()


class Bank:
    """A LoRA set on a model: the row that all adapted modules read, and what undoes it. Made by `attached`.

    row    [k] for all samples, [B, k] per sample, [B, T, k] per token; numbers, nested sequences or a tensor.
           B is the batch of the adapted modules' inputs. Zero (the base model) until set
    gate   None, or a callable `gate(path, x) -> row tensor` that every adapted module asks instead of the row
    form   "side", "rebuilt" or "bank": what a [k] row uses
    paths  the adapted modules, in the model's order
    calls  path -> calls since `reset_calls()`
    """

    def __init__(self, model: nn.Module, sites: list[Site], k: int, form: str, bank_bytes: int, optional: Sequence[str]):
        self.model, self.sites, self.k, self.form, self.bank_bytes = model, sites, k, form, bank_bytes
        self.paths = tuple(site.path for site in sites)
        self.optional = frozenset(optional)
        self.calls: dict[str, int] = dict.fromkeys(self.paths, 0)
        self.eager = Eager(model)
        self._branches = {site: Branch(site) for site in sites}
        self._merged: dict[Site, _Merged] = {}
        if form != "side":
            shared = _shared_parameters(model)
            self._merged = {
                site: _Merged(site, branch)
                for site, branch in self._branches.items()
                if mergeable(site) and not branch.trained and id(site.module._parameters["weight"]) not in shared
            }
        self._scratch: dict[Site, tuple[Tensor, Tensor | None]] = {}
        self._kept: OrderedDict[tuple[float, ...], dict[Site, tuple]] = OrderedDict()
        self._rows: OrderedDict[Any, Row] = OrderedDict()
        self._row: Row | Tensor | None = None
        self._gate: Callable[[str, Tensor], Tensor] | None = None
        self._in_weights: Any = None  # the [k] row that the weights hold
        self._hooks: list[Any] = []
        self._closed = False

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
        if gate is not self._gate:
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
            while len(self._rows) > _KEPT_ROWS:
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
        if self._hooks_wanted():
            for site in self.sites:
                hook = self._hook(site, self._branches[site])
                self._hooks.append(site.module.register_forward_hook(hook, with_kwargs=True))

    def _hooks_wanted(self) -> bool:
        # A graph compiled with our hooks in it would keep them after we are gone.
        return not self.eager.compiled or self.eager.on

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _hook(self, site: Site, branch: Branch) -> Callable:
        path, calls, merged = site.path, self.calls, self._merged.get(site)

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            calls[path] += 1
            row = self._row
            if self._gate is None and (row is None or (merged is not None and merged.now is not None)):
                return None
            x = args[0] if args else next(iter(kwargs.values()))
            y = output[0] if isinstance(output, tuple) else output
            if self._gate is not None:
                total = branch.gated(x, y, self._gate(path, x))
            elif isinstance(row, Row):
                total = branch(x, y, row)
            else:
                total = branch.gated(x, y, row)
            return (total, *output[1:]) if isinstance(output, tuple) else total

        return hook

    def _settle(self) -> None:
        """Bring the weights and the hooks in line with the row and the gate."""
        row = self._row
        plain = self._gate is None and (row is None or (isinstance(row, Row) and not row.per_sample))
        weights = row.rows[0] if plain and row is not None and self._merged and not row.zero else None
        if weights != self._in_weights:
            self._exchange(weights)
        if self.eager.compiled:
            side = not plain or (row is not None and not row.zero and len(self._merged) < len(self.sites))
            if side != self.eager.on:
                self.eager.turn(side)
                self.place()

    def _exchange(self, weights: tuple[float, ...] | None) -> None:
        self._in_weights = None
        if weights is None:
            for merged in self._merged.values():
                merged.restore()
            return
        with torch.inference_mode(False), torch.no_grad():
            kept = self._kept.get(weights)
            if kept is None and self.form == "bank":
                kept = self._keep(weights)
            if kept is not None:
                self._kept.move_to_end(weights)
            for site, merged in self._merged.items():
                if kept is None:
                    own = self._scratch[site] = merged.build(weights, self._scratch.get(site))
                else:
                    own = kept[site]
                merged.put(own)
        self._in_weights = weights

    def _keep(self, weights: tuple[float, ...]) -> dict[Site, tuple] | None:
        """Merged weights of a row as a new entry of the bank, the oldest ones dropped; None beyond the budget."""
        size = sum(m.nbytes for m in self._merged.values())
        if size > self.bank_bytes:
            return None
        while (len(self._kept) + 1) * size > self.bank_bytes:
            for merged in self._merged.values():
                merged.restore()
            self._kept.popitem(last=False)
        kept = {site: merged.build(weights, None) for site, merged in self._merged.items()}
        self._kept[weights] = kept
        return kept

    # -- checking --------------------------------------------------------------------------------------------------

    def reset_calls(self) -> None:
        for path in self.calls:
            self.calls[path] = 0

    def check_called(self) -> None:
        """Raise RuntimeError when an adapted module was not called since `reset_calls()`, or lost its merged weight."""
        for site, merged in self._merged.items():
            if merged.now is not None and not merged.in_place():
                raise RuntimeError(
                    f"{site.path}: its merged weight was replaced by something else (offloading or a move to another "
                    f"device?); use form='side'"
                )
        if not self._hooks_wanted():
            return
        missed = [p for p, n in self.calls.items() if n == 0 and p not in self.optional]
        if missed:
            raise RuntimeError(
                f"{len(missed)} of {len(self.calls)} adapted modules were not called, first {missed[0]!r}: its LoRA had "
                f"no effect. A graph compiled by other means ignores hooks (use form='rebuilt', or attach before "
                f"compiling); a module that this call rightly skips belongs into optional=[...]"
            )

    def close(self) -> None:
        """Undo everything; may be called again."""
        self._closed = True
        self._row = self._gate = None
        self._unhook()
        self._exchange(None)
        self.eager.turn(False)
        self._kept.clear()
        self._scratch.clear()
        self._rows.clear()


def _shared_parameters(model: nn.Module) -> set[int]:
    """Parameters that more than one module holds (tied weights): changing them would change both."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _form(form: str, model: nn.Module, sites: Sequence[Site]) -> str:
    if form not in FORMS:
        raise ValueError(f"form {form!r}: wanted one of {', '.join(FORMS)}{nearest(str(form), FORMS)}")
    why = _moving(model)
    if form in ("rebuilt", "bank"):
        if why:
            raise ValueError(f"form {form!r}: {why}, so its weights cannot be exchanged; use form='side' or 'auto'")
        return form
    if form == "auto" and not why and sites:
        wide = (torch.float32, torch.float64)
        if all(mergeable(s) and s.module.weight.dtype in wide for s in sites):
            return "rebuilt"
    return "side"


def _moving(model: nn.Module) -> str:
    """Why the model's weights come and go (offloading, casting per layer), or an empty string."""
    for name, module in model.named_modules():
        where = f"{type(model).__name__}{'.' + name if name else ''}"
        if getattr(module, "_hf_hook", None) is not None:
            return f"{where} is offloaded or dispatched by accelerate"
        registry = getattr(module, "_diffusers_hook", None)
        for hook in getattr(registry, "hooks", None) or ():
            if "offload" in hook or "casting" in hook:
                return f"{where} has diffusers' {hook} hook"
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            return f"{name} is on the meta device"
    return ""


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
) -> Iterator[Bank]:
    """The LoRAs on `model` for the length of a block; yields the Bank, whose row starts at zero (the base model).

    component   "unet" takes the LoRAs' modules under "unet." and drops that prefix; None takes their paths as they are
    form        "side", "rebuilt", "bank", or "auto": rebuilt when every adapted weight is plain float32 or float64 and
                stays where it is, else side
    blocks      per LoRA None or {module path or glob: factor}; see multilora.sites.block_factors
    bank_bytes  budget of the bank form; a set beyond it is rebuilt at each change of row
    optional    paths that a forward may leave out

    LoRAs that PEFT or diffusers loaded into `model` are switched off meanwhile. However the block ends, weights (their
    bytes), hooks and adapters are those from before.

    Raises ValueError for a path that is no module of the model, a shape that does not fit, a bad block or form; and
    RuntimeError when LoRAs are attached to the model already. Then nothing is attached.
    """
    model = getattr(model, "_orig_mod", model) if not isinstance(model, nn.Module) else model
    loras = list(loras)
    if not loras:
        raise ValueError("attached: no LoRAs given; without LoRAs run the model as it is")
    for i, lora in enumerate(loras):
        if not isinstance(lora, Lora):
            raise ValueError(f"attached: LoRA number {i + 1} is a {type(lora).__name__}, wanted a Lora (multilora.load)")
    sites = sites_of(model, loras, component, blocks)
    root = getattr(model, "_orig_mod", model)
    held = {root, *(site.module for site in sites)}
    with _HELD_LOCK:
        taken = next((m for m in held if m in _HELD), None)
        if taken is not None:
            what = next((s.path for s in sites if s.module is taken), type(root).__name__)
            raise RuntimeError(
                f"LoRAs are attached to {type(root).__name__} already (at {what}); leave that `with attached(...)` "
                f"first, or give all LoRAs to one"
            )
        for module in held:
            _HELD.add(module)
    bank: Bank | None = None
    try:
        with disabled(model):
            try:
                bank = Bank(model, sites, len(loras), _form(form, model, sites), bank_bytes, optional)
                bank.place()
                yield bank
            finally:
                if bank is not None:
                    try:
                        bank.close()
                    except BaseException:  # a second interrupt must not leave half of it in place
                        bank.close()
                        raise
    finally:
        with _HELD_LOCK:
            for module in held:
                _HELD.discard(module)
