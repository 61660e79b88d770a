"""Checkpoints of a LoRA training: one safetensors file, replaced atomically, bound to the settings that made it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


def save(
    path: Path, step: int, parameters: Sequence[nn.Parameter], optimiser: Any, settings: Mapping[str, Any], scaler: Any
) -> None:
    """Write weights, optimiser state and settings after `step` finished steps."""
    from safetensors.torch import save_file

    tensors = {f"weight.{i}": p.detach().cpu().clone() for i, p in enumerate(parameters)}
    for i, state in optimiser.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"optimiser.{i}.{key}"] = torch.as_tensor(value).detach().cpu().clone()
    about = {"step": step, "settings": dict(settings), "scaler": scaler.state_dict() if scaler is not None else None}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata={"multilora": json.dumps(about)})
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())
    os.replace(temporary, path)


def restore(
    path: Path, parameters: Sequence[nn.Parameter], optimiser: Any, settings: Mapping[str, Any], scaler: Any
) -> int:
    """Load a checkpoint into parameters and optimiser; the number of finished steps, 0 where there is none.

    Raises ValueError naming the settings that differ from those of the checkpoint.
    """
    from safetensors import safe_open

    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["multilora"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
    old, new = about["settings"], json.loads(json.dumps(dict(settings)))
    changed = [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in {**old, **new} if old.get(k) != new.get(k)]
    if changed:
        raise ValueError(
            f"checkpoint {path} was made with other settings ({'; '.join(changed)}); use the same ones, delete it, or "
            "pass resume=False"
        )
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(tensors[f"weight.{i}"])
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    if scaler is not None and about["scaler"]:
        scaler.load_state_dict(about["scaler"])
    return int(about["step"])
