"""Gates by hand, in float64: copies of models whose adapted layers are written out as loops over LoRAs and samples.

None of multilora's code runs here. A LoRA is its bare numbers: {path: (down, up)}.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn


class Gated(nn.Module):
    """y = base(x) + sum_i G_i D_i with `share(path, x, [D_i]) -> G`, [B, k] or [B, T, k]."""

    def __init__(self, base, path, deltas, share):
        super().__init__()
        self.base, self.path, self.deltas, self.share = base, path, deltas, share

    def forward(self, x, *more):
        y = self.base(x)
        parts = [None if d is None else self.apply_delta(x, d) for d in self.deltas]
        given = self.share(self.path, x, [torch.zeros_like(y) if p is None else p for p in parts])
        for i, part in enumerate(parts):
            if part is not None:
                weight = given[..., i]
                y = y + weight.reshape(*weight.shape, *[1] * (y.ndim - weight.ndim)) * part
        return y

    def apply_delta(self, x, delta):
        if isinstance(self.base, nn.Conv2d):
            return F.conv2d(x, delta, None, self.base.stride, self.base.padding)
        return F.linear(x, delta)


def gated_copy(model, loras, share, prefix=""):
    """A deep copy of `model` with Gated in place of every layer that one of the LoRAs has."""
    model = copy.deepcopy(model)
    paths = dict.fromkeys(key[len(prefix) :] for lora in loras for key in lora if key.startswith(prefix))
    for path in paths:
        base = model.get_submodule(path)
        deltas = []
        for lora in loras:
            pair = lora.get(prefix + path)
            deltas.append(None if pair is None else (pair[1] @ pair[0].flatten(1)).reshape(base.weight.shape))
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent) if parent else model
        new = Gated(base, path, deltas, share)
        if name.isdigit() and not isinstance(owner, nn.ModuleDict):
            owner[int(name)] = new
        else:
            setattr(owner, name, new)
    return model


def normalised(values):
    """A vector minus its mean, over its deviation (biased, plus 1e-5 under the root)."""
    away = values - values.sum() / len(values)
    return away / ((away * away).sum() / len(values) + 1e-5) ** 0.5


def phi(t, scale, frequencies=4):
    angles = [math.pi * 2**j * float(t) / scale for j in range(frequencies)]
    return torch.tensor([*(math.sin(a) for a in angles), *(math.cos(a) for a in angles)], dtype=torch.float64)


def mole_logits(tensors, group, parts, times=None, scale=None, token=False):
    """[B, k], per token [B, T, k], sample by sample and token by token.

    parts: k tensors [B, .., out], of a convolution [B, out, h, w]
    """
    weight, bias = tensors[f"weight.{group}"], tensors[f"bias.{group}"]
    temperature = math.exp(float(tensors[f"temperature.{group}"]))
    found = []
    for b in range(len(parts[0])):
        own = [p[b] for p in parts]
        if own[0].ndim == 3:
            own = [p.flatten(1).T for p in own]  # a convolution's places are its tokens
            per_token = False
        else:
            per_token = token and own[0].ndim == 2
        if own[0].ndim == 1:
            own = [p[None] for p in own]
        seen = [normalised(torch.cat([p[t] for p in own])) for t in range(len(own[0]))]
        rows = seen if per_token else [sum(seen) / len(seen)]
        logits = []
        for row in rows:
            value = weight @ row + bias
            if times is not None:
                value = value + tensors[f"time.{group}"] @ phi(times[b], scale)
            logits.append(value / temperature)
        found.append(torch.stack(logits) if per_token else logits[0])
    return torch.stack(found)


def softmax(logits, live=None):
    """exp over their sum along the last dimension; entries that are not live get 0."""
    weights = logits.exp()
    if live is not None:
        weights = weights * torch.tensor(live, dtype=weights.dtype)
    return weights / weights.sum(-1, keepdim=True)
