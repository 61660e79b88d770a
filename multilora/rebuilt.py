"""The rebuilt form of one adapted module: W0 + sum_i row_i delta_i in the place of W0, and W0 back, bit for bit."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from multilora.side import Branch, Row, Stack
from multilora.sites import Site, nearest, quantised

FORMS = ("auto", "side", "rebuilt", "bank")
WIDE = (torch.float32, torch.float64)
Merged = tuple[Tensor, Tensor | None]  # weight, and bias where a LoRA has one
_AWAY: dict[int, Tensor] = {}  # id of a parameter that holds merged numbers -> its own numbers
_AWAY_LOCK = threading.Lock()


def pristine(parameter: Tensor) -> Tensor:
    """The base's own numbers of a parameter, whichever merged ones another thread's run has in their place now."""
    with _AWAY_LOCK:
        return _AWAY.get(id(parameter), parameter).detach()


def tied_parameters(model: nn.Module, sites: Sequence[Site]) -> set[int]:
    """Ids of the parameters that more than one module holds, or one module of two sites: changing the one's would
    change the other's."""
    seen: set[int] = set()
    named = Counter(site.module for site in sites)
    tied = {id(p) for module, names in named.items() if names > 1 for p in module._parameters.values()}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def mergeable(site: Site, tied: set[int]) -> bool:
    """Whether the module's weight may be exchanged: plain, floating point, its own, in memory."""
    module = site.module
    weight = module._parameters.get("weight")
    if weight is None or type(weight) is not nn.Parameter or id(weight) in tied:
        return False
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    if site.kind != "norm" and not isinstance(module, plain):
        return False
    has_bias = any(part is not None and part.bias is not None for part in site.parts)
    if has_bias and module._parameters.get("bias") is None:
        return False
    trained = any(t.requires_grad for p in site.parts if p is not None and p.rank for t in (p.down, p.up))
    return weight.is_floating_point() and weight.device.type != "meta" and not trained


def moving(model: nn.Module) -> str:
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


def form_of(form: str, model: nn.Module, sites: Sequence[Site]) -> str:
    """The form that "auto" stands for, or the one asked for. Raises ValueError where the model cannot have it."""
    if form not in FORMS:
        raise ValueError(f"form {form!r}: wanted one of {', '.join(FORMS)}{nearest(str(form), FORMS)}")
    why = moving(model)
    if form in ("rebuilt", "bank"):
        if why:
            raise ValueError(f"form {form!r}: {why}, so its weights cannot be exchanged; use form='side' or 'auto'")
        for site in sites:
            if what := quantised(site.module):
                raise ValueError(f"form {form!r}: {site.path} is a quantised {what}; use form='side' or 'auto'")
        return form
    if form == "auto" and not why and sites:
        tied = tied_parameters(model, sites)
        if all(mergeable(site, tied) and site.module.weight.dtype in WIDE for site in sites):
            return "rebuilt"
    return "side"


class Weight:
    """The weight (and bias) of one site: the pristine tensors, and merged ones put in their place by pointer."""

    def __init__(self, site: Site, branch: Branch):
        self.site, self.branch = site, branch
        names = ["weight"]
        if any(part is not None and part.bias is not None for part in site.parts):
            names.append("bias")
        self.parameters = [site.module._parameters[name] for name in names]
        self.base = [parameter.data for parameter in self.parameters]
        self.now: Merged | None = None  # what stands in place of the base
        self.nbytes = sum(t.numel() * t.element_size() for t in self.base)

    def build(self, row: Row, out: Merged | None = None) -> Merged:
        """Merged weight and bias for a [k] row, in new memory or that of `out`; summed in float32 or wider."""
        base = self.base[0]
        wide = base.dtype if base.dtype in WIDE else torch.float32
        stacked = self.branch.stacked((base.device, wide))
        if out is None:
            out = (torch.empty_like(base, memory_format=torch.contiguous_format),
                   torch.empty_like(self.base[1]) if len(self.base) > 1 else None)  # fmt: skip
        _merge(self.site, stacked, row, base, out[0], wide)
        if out[1] is not None:
            total = self.base[1].to(wide, copy=True)
            for v, bias in zip(self.site.row(row.rows[0]), stacked.bias, strict=True):
                if v and bias is not None:
                    total.add_(bias, alpha=v)
            out[1].copy_(total)
        return out

    def put(self, merged: Merged) -> None:
        self.now = merged
        with _AWAY_LOCK:
            for parameter, base, tensor in zip(self.parameters, self.base, merged, strict=False):
                _AWAY[id(parameter)] = base
                parameter.data = tensor

    def restore(self) -> None:
        """The original tensors back. A model that was moved or cast meanwhile gets their copy where it is now."""
        if self.now is None:
            return
        with _AWAY_LOCK:
            for parameter, base in zip(self.parameters, self.base, strict=True):
                same = parameter.device == base.device and parameter.dtype == base.dtype
                parameter.data = base if same else base.to(parameter.device, parameter.dtype)
                _AWAY.pop(id(parameter), None)
        self.now = None

    @property
    def displaced(self) -> bool:
        """Whether something else has replaced the merged weight."""
        return self.now is not None and self.parameters[0].data_ptr() != self.now[0].data_ptr()


def _merge(site: Site, s: Stack, row: Row, base: Tensor, out: Tensor, wide: torch.dtype) -> None:
    """out = base + sum_i row_i delta_i, summed in `wide` and rounded once."""
    total = base.to(wide).reshape(base.shape[0], -1)
    target = out.view(total.shape) if out.dtype == wide else torch.empty_like(total)
    weights = site.row(row.rows[0])
    if any(v and rank for v, rank in zip(weights, site.ranks, strict=True)):
        layout = row.layout(site, (base.device, wide))
        down, up = s.folded(layout)
        left, right = (down.T, up) if site.kind == "embedding" else (up.T, down.flatten(1))
        torch.addmm(total, left, right, alpha=layout.alpha, out=target)
    else:
        target.copy_(total)
    for v, dense in zip(weights, s.dense, strict=True):
        if v and dense is not None:
            target.add_(dense.reshape(target.shape), alpha=v)
    if out.dtype != wide:
        out.copy_(target.view(out.shape))
