"""The routers of LoRAMoE: each token shares out the experts of a layer by what it carries (arXiv 2312.09979).

    y = W x + sum_i w_i up_i down_i x,    w = softmax(W_g x),    W_g [k, in], one for each adapted linear

Experts and routers are trained together on a frozen base (multilora.lab.train.loramoe); the softmax is dense, without
top-k. The paper's alpha / r is inside `up`, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from multilora.gates import Gate, setting, tensor
from multilora.lora import Lora
from multilora.routing import Asked, Layer, Uniform, normalised

# What a sample can be, in the order of the experts' halves (the paper's section 3.3).
TYPES = ("knowledge", "task")
NO_TYPE = -1


class LoramoeGate:
    """The routers' tensors and the answers they give; a multilora.routing.Router.

    widths   path of a linear -> its input width
    tensors  weight.<path> [k, in]
    k        experts; order [LoRAs of the set] which of them each is, the others are absent: no share
    """

    def __init__(
        self, widths: Mapping[str, int], tensors: Mapping[str, Tensor], k: int, order: Sequence[int] | None = None
    ) -> None:
        self.widths, self.tensors, self.k = dict(widths), dict(tensors), k
        self.order = list(range(k)) if order is None else list(order)

    @classmethod
    def fresh(
        cls,
        widths: Mapping[str, int],
        k: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> LoramoeGate:
        """Untrained routers, which give every expert the same share."""
        made = cls(widths, {}, k)
        for name, shape in made.shapes().items():
            made.tensors[name] = torch.zeros(shape, dtype=dtype, device=device)
        return made

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""
        return {f"weight.{path}": (self.k, width) for path, width in self.widths.items()}

    @classmethod
    def of(cls, gate: Gate, loras: Sequence[Lora] | None = None) -> LoramoeGate:
        """From a gate file, for a set of its experts (None: all). Raises ValueError naming file and field."""
        gate.need("loramoe")
        order = None if loras is None else gate.order(loras)
        widths = setting(gate, "widths", dict)
        for path, width in widths.items():
            if type(width) is not int or width < 1:
                raise ValueError(f"gate {gate.source}: setting widths[{path!r}] is {width!r:.60}, wanted at least 1")
            if loras and not any(path in lora for lora in loras):
                raise ValueError(f"gate {gate.source}: a router at {path}, where none of the LoRAs has a part")
        made = cls(widths, {}, len(gate.loras), order)
        for name, shape in made.shapes().items():
            made.tensors[name] = tensor(gate, name, *shape)
        return made

    def settings(self) -> dict[str, object]:
        """What its file's card keeps beside the tensors."""
        return {"per": "linear", "widths": dict(self.widths)}

    def asked(
        self,
        weights: Sequence[float] | None = None,
        time: float | Tensor | None = None,
        live: Sequence[bool] | None = None,
    ) -> Asked:
        """The routers for one run of the model, as a bank's gate or a pass's row; see multilora.routing.Asked."""
        return Asked(self, weights, time, live)

    # -- as a Router ------------------------------------------------------------------------------------------------

    def group(self, path: str) -> str:
        return path

    def head(self, group: str) -> None:
        return None

    def shares(self, layer: Layer) -> Tensor:
        """[.., k] the shares of each token of the layer's input x [.., in]; equal ones where there is no router."""
        weight = self.tensors.get(f"weight.{layer.branch.site.path}")
        if weight is None:
            return Uniform().shares(layer)
        wide = torch.promote_types(layer.y.dtype, torch.float32)
        logits = F.linear(layer.x.to(wide), weight.to(layer.x.device, wide))
        return normalised(logits[..., self.order], layer.live)


def halves(k: int) -> list[int]:
    """[k] the type of sample that each expert is for: the first half of them 0, the second 1. Wants an even k."""
    if k < 2 or k % 2:
        raise ValueError(f"{k} experts: the balancing constraint has two halves, so it wants an even number of them")
    return [0] * (k // 2) + [1] * (k // 2)


def localised_balance(shares: Mapping[str, Tensor], types: Sequence[int], mask: Tensor, delta: float = 0.1) -> Tensor:
    """The localised balancing constraint (arXiv 2312.09979, section 3.3), averaged over the layers.

        Q[n, i] = mean share of expert i over the tokens of sample n;  I[n, i] = 1 + delta where expert and sample are
        of one type, 1 - delta where not, 1 for a sample of none;  Z = I Q;  loss = var(Z) / mean(Z)^2

    shares  path -> [B, T, k], or [B T, k] of a layer that sees all tokens in one dimension
    types   [B] 0, 1, or NO_TYPE
    mask    [B, T] 0 for padding, which does not count
    returns []; 0 exactly where Q is proportional to 1 / I, and at most B k

    The unbiased variance and the squared mean are those of the published code (the paper has var / mean). There Q is a
    sum over tokens, padding among them, and the loss a sum over layers; means here keep length and depth out of it.
    A trap: the least loss gives the experts of a sample's own type *less*, (1 - delta) / (1 + delta) of the others'.
    The halves are told apart all the same; a negative delta turns them round.

    Raises ValueError for an odd number of experts, and a layer that does not see every token.
    """
    found = []
    for path, share in shares.items():
        k = share.shape[-1]
        if share.shape[:-1].numel() != mask.numel():
            raise ValueError(
                f"{path}: shares of {list(share.shape)} for {list(mask.shape)} tokens; the balancing constraint wants "
                f"layers that see every token (leave out those of an encoder-decoder or behind a router)"
            )
        share = share.reshape(*mask.shape, k)
        counted = mask.to(share.dtype)
        mass = (share * counted[..., None]).sum(1) / counted.sum(1, keepdim=True).clamp_min(1)
        own = torch.tensor(halves(k), device=share.device)
        kind = torch.as_tensor(types, device=share.device)[:, None]
        side = torch.where(kind == own, 1, -1) * (kind != NO_TYPE)
        weighed = (1 + delta * side.to(share.dtype)) * mass
        found.append(weighed.var() / weighed.mean().square())
    return torch.stack(found).mean()


def experts_folder(gate: str | Path) -> Path:
    """Where the experts of a trained gate are: beside it, one PEFT folder each."""
    gate = Path(gate).expanduser()
    return gate.with_name(f"{gate.stem}_experts")


def experts_of(gate: str | Path) -> list[Path]:
    """The experts' folders beside a gate, in its order; [] where there are none."""
    found = [p for p in experts_folder(gate).glob("*") if p.name.isdigit() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name))
