"""Three LoRAs of unequal ranks, each without a layer that others have, and their updates as float64 arrays."""

import pytest
import torch

from multilora.lora import Card, Dense, Lora, LowRank

SHAPES = {"lin": (11, 7), "wide": (5, 17), "conv": (6, 5, 3, 2), "point": (9, 4, 1, 1), "emb": (23, 6)}
WEIGHTS = (0.8, 1.3, 0.6)


def lora(seed, rank, skip=(), dtype=torch.float64, alpha=None):
    """Random factors of one rank and an alpha that is not the rank; also a norm, a lone bias and a dense layer."""
    g = torch.Generator().manual_seed(seed)
    alpha = rank + 1.5 if alpha is None else alpha

    def r(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    parts = {}
    for name, shape in SHAPES.items():
        kind = {"emb": "embedding", "lin": "linear", "wide": "linear"}.get(name, "conv")
        out, rest = (shape[1], shape[:1]) if kind == "embedding" else (shape[0], shape[1:])
        bias = r(out) if name in ("lin", "conv") else None
        parts[f"unet.{name}"] = LowRank.from_factors(r(rank, *rest), r(out, rank), alpha=alpha, bias=bias, kind=kind)
    parts |= {"unet.norm": Dense(r(10), r(10)), "unet.only": Dense(bias=r(8)), "unet.full": Dense(r(6, 5))}
    kept = {k: p for k, p in parts.items() if k.split(".")[1] not in skip}
    return Lora(kept, Card(name=f"l{seed}", family="sd15", sha256=f"{seed:064x}"))


@pytest.fixture(scope="module")
def loras():
    """Ranks 3, 5 and 2; each lacks a layer that others have."""
    return [lora(1, 3, ("wide",)), lora(2, 5, ("conv", "norm")), lora(3, 2, ("emb", "full", "wide"))]


def tensors(x):
    """{key: float64 array} of weights, and of biases under "<key>.bias"."""
    found = {k: p.delta(torch.float64).numpy() for k, p in x.items() if p.shape is not None}
    return found | {f"{k}.bias": p.bias.double().numpy() for k, p in x.items() if p.bias is not None}
