"""Updates of LoRA, LoHa, LoKr and DoRA layers by hand, with numpy, from the tensors that their writers hold."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).numpy()


def hand_lora(down, up, scale: float, shape) -> np.ndarray:
    down, up = f64(down), f64(up)
    out = np.zeros((up.shape[0], down[0].size))
    for r in range(down.shape[0]):
        out += np.outer(up[:, r].ravel(), down[r].ravel())
    return (scale * out).reshape(shape)


def hand_core(core, left, right) -> np.ndarray:
    """sum over i, j of core[i, j, k..] left[i, o] right[j, c] as [o, c, k..]"""
    half = np.tensordot(f64(left).T, f64(core), 1)  # [o, j, k..]
    return np.moveaxis(np.tensordot(half, f64(right), ([1], [0])), -1, 1)


def hand_loha(p: dict, scale: float, shape) -> np.ndarray:
    if p.get("t1") is not None:
        one, two = (hand_core(p[f"t{i}"], p[f"w{i}_a"], p[f"w{i}_b"]) for i in (1, 2))
        return (scale * one * two).reshape(shape)
    return (scale * (f64(p["w1_a"]) @ f64(p["w1_b"])) * (f64(p["w2_a"]) @ f64(p["w2_b"]))).reshape(shape)


def hand_lokr(p: dict, scale: float, shape) -> np.ndarray:
    one = f64(p["w1"]) if p.get("w1") is not None else f64(p["w1_a"]) @ f64(p["w1_b"])
    if p.get("w2") is not None:
        two = f64(p["w2"])
    elif p.get("t2") is not None:
        two = hand_core(p["t2"], p["w2_a"], p["w2_b"])
    else:
        two = f64(p["w2_a"]) @ f64(p["w2_b"])
    two = two.reshape(two.shape[0], shape[1] // one.shape[1], *shape[2:])
    whole = np.zeros(shape)
    for i in range(one.shape[0]):
        for j in range(one.shape[1]):
            rows = slice(i * two.shape[0], (i + 1) * two.shape[0])
            whole[rows, j * two.shape[1] : (j + 1) * two.shape[1]] = one[i, j] * two
    return scale * whole


def hand_dora(weight, delta: np.ndarray, magnitude: np.ndarray, *, per_output: bool, eps: float = 0.0) -> np.ndarray:
    weight = f64(weight)
    new, whole = weight + delta, np.zeros_like(weight)
    for i in range(weight.shape[0] if per_output else weight.shape[1]):
        at = i if per_output else (slice(None), i)
        whole[at] = magnitude.ravel()[i] * new[at] / (np.sqrt((new[at] ** 2).sum()) + eps) - weight[at]
    return whole


def _lycoris_update(own: dict, layer: nn.Module, decomposed: str) -> np.ndarray:
    shape, alpha = layer.weight.shape, float(own["alpha"]) if "alpha" in own else 0.0
    if "diff" in own or "w_norm" in own:
        return f64(own.get("diff", own.get("w_norm"))).reshape(shape)
    if "lora_up.weight" in own:
        scale = alpha / own["lora_down.weight"].shape[0]
        if "lora_mid.weight" in own:
            up, down = own["lora_up.weight"].flatten(1).T, own["lora_down.weight"].flatten(1)
            delta = scale * hand_core(own["lora_mid.weight"], up, down)
        else:
            delta = hand_lora(own["lora_down.weight"], own["lora_up.weight"], scale, shape)
    elif "hada_w1_a" in own:
        short = {k.removeprefix("hada_"): v for k, v in own.items()}
        delta = hand_loha(short, alpha / own["hada_w1_b"].shape[0], shape)
    else:
        short = {k.removeprefix("lokr_"): v for k, v in own.items()}
        ranks = [own[k].shape[0] for k in ("lokr_w1_b", "lokr_w2_b") if k in own]
        delta = hand_lokr(short, alpha / ranks[0] if ranks else 1.0, shape)
    if not decomposed:
        return delta
    eps = float(np.finfo(np.float32).eps)
    return hand_dora(layer.weight, delta, f64(own["dora_scale"]), per_output=decomposed == "out", eps=eps)
