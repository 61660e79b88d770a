"""What a pipeline must be before every request: its modules, hooks, scheduler, and samples of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 32  # values of each tensor that are looked at
_REGISTER = nn.Module.register_parameter  # PEFT exchanges it while it loads an adapter, see reliability of its races


@dataclass(frozen=True)
class State:
    """A snapshot.

    samples   component.name -> SAMPLES values of the tensor, spread over it, as bytes on the CPU
    modules   component.path -> (class, hooks and pre-hooks on it, own attributes that hide a method)
    """

    samples: dict[str, Tensor]
    modules: dict[str, tuple]
    scheduler: tuple
    meta: int

    @classmethod
    def of(cls, pipe: Any) -> State:
        """The state of a diffusers pipeline as it is now."""
        samples, modules, meta = {}, {}, 0
        for component, model in pipe.components.items():
            if not isinstance(model, nn.Module):
                continue
            for path, module in model.named_modules():
                hooks = (tuple(module._forward_hooks), tuple(module._forward_pre_hooks))
                hidden = tuple(name for name in ("forward", "__multilora_conduct__") if name in module.__dict__)
                modules[f"{component}.{path}"] = (type(module), hooks, hidden, module.training)
            named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            meta += sum(t.is_meta for t in named.values())
            picked = {n: _picked(t) for n, t in named.items() if t.numel() and not t.is_meta}
            samples |= {f"{component}.{n}": t for n, t in _together(picked).items()}
        scheduler = pipe.scheduler
        return cls(samples, modules, (id(scheduler), type(scheduler), repr(dict(scheduler.config))), meta)

    def differences(self, now: State) -> list[str]:
        """What of `now` is not as it was, in words; empty when all is well."""
        found = []
        if nn.Module.register_parameter is not _REGISTER:
            found.append("torch.nn.Module.register_parameter is patched")
        if now.meta != self.meta:
            found.append(f"{now.meta} tensors without values, {self.meta} before")
        if now.scheduler != self.scheduler:
            found.append("the scheduler is another one")
        found += _changed("modules", self.modules, now.modules, lambda a, b: a == b)
        found += _changed("weights", self.samples, now.samples, torch.equal)
        return found


def _changed(what: str, before: dict, now: dict, same: Any) -> list[str]:
    names = [n for n in before if n not in now or not same(before[n], now[n])] + [n for n in now if n not in before]
    return [f"{what}: {len(names)} not as before, first {names[0]}"] if names else []


def _picked(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]


def _together(picked: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as bytes on the CPU, moved in one piece per device and dtype."""
    groups: dict[tuple, list[str]] = {}
    for name, tensor in picked.items():
        groups.setdefault((tensor.device, tensor.dtype), []).append(name)
    found = {}
    for names in groups.values():
        # Copied, for a view on the CPU would follow the weight; as bytes, since NaN equals nothing.
        moved = torch.cat([picked[n] for n in names]).cpu()
        for name, part in zip(names, moved.split([picked[n].numel() for n in names]), strict=True):
            found[name] = part.view(torch.uint8)
    return found
