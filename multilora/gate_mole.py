"""The gate of MoLE: shares of frozen LoRAs by what each of them would add to a layer (arXiv 2404.13628).

    E = normalise(D_1 + .. + D_k side by side)    D_i = what LoRA i alone adds to the layer, [B, T, out] each
    G = softmax((mean_T(E) e + b + s phi(t)) / tau)        [B, k] per sample, or per token without the mean
    y = W x + sum_i G_i D_i

The residual-free form: the paper's equation 5 adds up whole block outputs F + sum_i G_i E_i with the block's own x
inside every E_i, so a LoRA of zeros would not give the base back; here D_i is the LoRA's own part, and it does. With
the mean, `e` does not depend on the number of tokens, as the paper's does. phi(t), the timestep, is our addition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from multilora.gates import Gate, heads_in, setting, tensor
from multilora.lora import Lora
from multilora.method import unknown
from multilora.routing import Asked, Layer, Uniform, normalised

PER = ("linear", "layer", "block", "network")
SUMS = ("one", "count")
FREQUENCIES = 4
# What the lists of blocks are called in U-Nets, diffusion transformers and language models.
_LISTS = frozenset((
    "transformer_blocks", "single_transformer_blocks", "resnets", "attentions", "downsamplers", "upsamplers", "blocks",
    "layers", "h", "block", "noise_refiner", "context_refiner", "joint_blocks", "single_blocks", "double_blocks",
))  # fmt: skip


def group_of(path: str, per: str) -> str:
    """The modules that share a gate: "linear" each its own, "layer" an attention or feed-forward, "block", "network".

    A block is the innermost numbered member of a list of blocks; what lies in none belongs to its first path level.
    """
    if per == "linear":
        return path
    if per == "network":
        return "network"
    levels = path.split(".")
    at = max((i for i in range(1, len(levels) - 1) if levels[i].isdigit() and levels[i - 1] in _LISTS), default=-1)
    if at < 0:
        return levels[0]
    if per == "block":
        return ".".join(levels[: at + 1])
    end = at + 3 if levels[at + 1] == "layer" else at + 2  # T5: block.0.layer.1.EncDecAttention.q
    return ".".join(levels[: end if end < len(levels) else at + 1])


class MoleGate:
    """The gate's tensors and the answers it gives; a multilora.routing.Router.

    heads    group -> (path of the module that it looks at, its output width)
    tensors  weight.<group> [k, k * width], bias.<group> [k], temperature.<group> [] (its logarithm), and with
             time_scale time.<group> [k, 2 * FREQUENCIES]
    k        LoRAs of the gate; order [loras of the set] which of them each is, the others are absent: zero input, no
             share
    token    a share per token instead of per sample (layers without tokens, and convolutions, keep one per sample)
    time_scale  largest timestep, or None for a gate that does not see the time
    sums     "one": the row sums to 1 (the paper's); "count": to the number of LoRAs taking part, as Merge at 1 does
    """

    def __init__(
        self,
        heads: Mapping[str, tuple[str, int]],
        tensors: Mapping[str, Tensor],
        k: int,
        *,
        per: str = "layer",
        token: bool = False,
        time_scale: float | None = None,
        sums: str = "one",
        order: Sequence[int] | None = None,
    ) -> None:
        self.heads, self.tensors, self.k = dict(heads), dict(tensors), k
        self.per, self.token, self.time_scale, self.sums = per, token, time_scale, sums
        self.order = list(range(k)) if order is None else list(order)

    @classmethod
    def fresh(
        cls,
        heads: Mapping[str, tuple[str, int]],
        k: int,
        *,
        temperature: float = 1.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **settings: object,
    ) -> MoleGate:
        """An untrained gate, which gives every LoRA the same share. Raises ValueError for a temperature of 0."""
        if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
            raise ValueError(f"temperature={temperature!r}: wanted a number above 0")
        made = cls(heads, {}, k, **settings)
        for name, shape in made.shapes().items():
            made.tensors[name] = torch.zeros(shape, dtype=dtype, device=device)
            if name.startswith("temperature."):
                made.tensors[name] += math.log(temperature)
        return made

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""
        found: dict[str, tuple[int, ...]] = {}
        for group, (_, width) in self.heads.items():
            found[f"weight.{group}"] = (self.k, self.k * width)
            found[f"bias.{group}"] = (self.k,)
            found[f"temperature.{group}"] = ()
            if self.time_scale is not None:
                found[f"time.{group}"] = (self.k, 2 * FREQUENCIES)
        return found

    @classmethod
    def of(cls, gate: Gate, loras: Sequence[Lora] | None = None) -> MoleGate:
        """From a gate file, for a set of its LoRAs (None: all). Raises ValueError naming file and field."""
        gate.need("mole")
        order = None if loras is None else gate.order(loras)
        made = cls(
            heads_in(gate),
            {},
            len(gate.loras),
            per=setting(gate, "per", str, PER),
            token=setting(gate, "token", bool),
            time_scale=setting(gate, "time_scale", (int, float, type(None))),
            sums=setting(gate, "sums", str, SUMS),
            order=order,
        )
        if made.time_scale is not None and not made.time_scale > 0:
            raise ValueError(f"gate {gate.source}: setting time_scale is {made.time_scale!r}, wanted above 0 or null")
        for name, shape in made.shapes().items():
            made.tensors[name] = tensor(gate, name, *shape)
        return made

    def settings(self) -> dict[str, object]:
        """What its file's card keeps beside the tensors."""
        heads = {group: list(head) for group, head in self.heads.items()}
        return {"per": self.per, "token": self.token, "time_scale": self.time_scale, "sums": self.sums, "heads": heads}

    def asked(
        self,
        weights: Sequence[float] | None = None,
        time: float | Tensor | None = None,
        live: Sequence[bool] | None = None,
    ) -> Asked:
        """The gate for one run of the model, as a bank's gate or a pass's row; see multilora.routing.Asked."""
        count = len(self.order) if live is None else sum(map(bool, live))
        return Asked(self, weights, time, live, total=float(count) if self.sums == "count" else 1.0)

    # -- as a Router ------------------------------------------------------------------------------------------------

    def group(self, path: str) -> str:
        return group_of(path, self.per)

    def head(self, group: str) -> str | None:
        """The module that the group's gate looks at; other modules before it get the gate's bias and time alone."""
        known = self.heads.get(group)
        return None if known is None else known[0]

    def shares(self, layer: Layer) -> Tensor:
        group = self.group(layer.branch.site.path)
        wide = torch.promote_types(layer.y.dtype, torch.float32)
        if group not in self.heads:  # the gate was made for LoRAs without a part here
            return Uniform().shares(layer)
        logits = self._tensor(f"bias.{group}", layer.y, wide)
        if self.time_scale is not None:
            added = self._phi(layer.time, layer.y.device, wide) @ self._tensor(f"time.{group}", layer.y, wide).T
            logits = logits + added
        if layer.head:
            seen = F.linear(self.seen(layer, wide), self._tensor(f"weight.{group}", layer.y, wide))
            logits = seen + (logits[:, None] if seen.ndim == 3 and logits.ndim == 2 else logits)
        logits = logits * torch.exp(-self._tensor(f"temperature.{group}", layer.y, wide))
        return normalised(logits[..., self.order], layer.live)

    def seen(self, layer: Layer, dtype: torch.dtype) -> Tensor:
        """[B, k * width], per token [B, T, k * width]: the LoRAs' own parts, normalised together, then averaged."""
        site = layer.branch.site
        found = layer.branch.deltas(layer.x, layer.y)
        parts: list[Tensor | None] = [None] * self.k
        for place, delta in zip(self.order, found, strict=True):
            parts[place] = delta
        zeros = torch.zeros_like(layer.y)
        whole = torch.cat([(zeros if p is None else p).movedim(site.channels, -1) for p in parts], -1)
        whole = F.layer_norm(whole.to(dtype), (whole.shape[-1],))
        if whole.ndim == 2 or (self.token and whole.ndim == 3 and site.kind != "conv"):
            return whole
        return whole.flatten(1, -2).mean(1)

    def _tensor(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        return self.tensors[name].to(like.device, dtype)

    def _phi(self, time: float | Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[2 * FREQUENCIES] or [B, 2 * FREQUENCIES]: sines and cosines of pi 2^j t / time_scale."""
        if time is None:
            raise ValueError("this gate sees the timestep: give the run's time (MoleGate.asked(weights, time))")
        t = torch.as_tensor(time, device=device).to(dtype) / self.time_scale
        angles = math.pi * t[..., None] * 2.0 ** torch.arange(FREQUENCIES, device=device, dtype=dtype)
        return torch.cat([angles.sin(), angles.cos()], -1)


def masked(names: Sequence[str], mask: str) -> list[bool] | None:
    """[loras] False for those that a comma-separated mask names, None without one. Raises UnknownName."""
    out = [name.strip() for name in mask.split(",") if name.strip()]
    for name in out:
        if name not in names:
            raise unknown("LoRA in mask", name, names)
    return [name not in out for name in names] if out else None
