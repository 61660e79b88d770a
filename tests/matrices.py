"""Three LoRAs over layers of every kind, and numpy's view of them: whole float64 matrices; Gram matrices for them."""

import math

import numpy
import torch

from multilora.lora import Card, Lora, LowRank

WEIGHTS = (0.8, -0.5, 1.3)
# (kind, rank and alpha of each LoRA); odd sizes, one rank above the layer's smaller side, one of 1, alpha absent once
RANKS = ((2, 3.0), (9, 4.0), (1, None))
SIZES = {"linear": (11, 7), "conv": (8, 3, 3, 2), "point": (6, 9, 1, 1), "embedding": (13, 5)}


def raw(kind, rank, seed):
    """Numbers as a file has them: down, up, in float64."""
    random = numpy.random.default_rng([seed, rank, len(kind)])
    out, *rest = reversed(SIZES[kind]) if kind == "embedding" else SIZES[kind]
    return random.standard_normal((rank, *rest)), random.standard_normal((out, rank))


def delta_of(kind, down, up, alpha):
    """The update as a numpy matrix [out, in * kernel] (an embedding's is [dim, entries])."""
    scale = (alpha if alpha is not None else len(down)) / len(down)
    return scale * up @ down.reshape(len(down), -1)


def drawn(dtype=torch.float64):
    """Three LoRAs of unequal ranks and alphas over all kinds, the last without "point"; and numpy's view of them."""
    loras, matrices = [], []
    for i, (rank, alpha) in enumerate(RANKS):
        parts, own = {}, {}
        for kind in SIZES:
            if kind == "point" and i == 2:
                continue
            down, up = (torch.tensor(a).to(dtype).double().numpy() for a in raw(kind, rank, i))
            named = "embedding" if kind == "embedding" else None
            bias = torch.full((len(up),), i + 1.0, dtype=dtype) if kind == "linear" and i else None
            pair = torch.tensor(down).to(dtype), torch.tensor(up).to(dtype)
            parts[f"unet.{kind}"] = LowRank.from_factors(*pair, alpha=alpha, kind=named, bias=bias)
            own[f"unet.{kind}"] = delta_of(kind, down, up, alpha)
        loras.append(Lora(parts, Card(name=f"l{i}")))
        matrices.append(own)
    return loras, matrices


def matrix(part):
    delta = part.delta(torch.float64)
    return (delta.T if part.kind == "embedding" else delta.flatten(1)).numpy()


def close(lora, wanted, tolerance=1e-12):
    assert set(lora) == set(wanted)
    for key, want in wanted.items():
        far = numpy.linalg.norm(matrix(lora[key]) - want) / max(numpy.linalg.norm(want), 1e-300)
        assert far <= tolerance, (key, far)


def total(matrices, weights):
    keys = dict.fromkeys(k for m in matrices for k in m)
    return {k: sum(w * m[k] for m, w in zip(matrices, weights, strict=True) if k in m) for k in keys}


def grams_for(loras, keys, rows=40, seed=0):
    random = numpy.random.default_rng(seed)
    found = []
    for _ in loras:
        own = {}
        for key in keys:
            kind = key.removeprefix("unet.")
            size = SIZES[kind][0] if kind == "embedding" else math.prod(SIZES[kind][1:])
            x = random.standard_normal((rows, size)) * numpy.exp(random.standard_normal(size))
            own[key] = torch.tensor(x.T @ x)
        found.append(own)
    return found
