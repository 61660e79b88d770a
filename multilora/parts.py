"""One layer's weight update: `LowRank` (up @ down) or `Dense` (the whole difference), each with an optional bias.

The scale alpha / rank is folded into `up` once, by `LowRank.from_factors`; nothing after it knows about alpha. Sums
concatenate ranks, so they are exact for any ranks; a sign or a weight goes on `up` only. Sums and products are
computed and stored in float32 at least; tensors that no algebra touched keep the dtype they came in.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KINDS = ("linear", "conv", "embedding")

def _work(*tensors: Tensor) -> torch.dtype:
    """The dtype that algebra on these tensors is done in: the widest of them, float32 at least."""
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def _fine(tensor: Tensor) -> torch.dtype:
    """float64 where the device has it: factorisations of thin matrices cost little and lose nothing there."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def finite_factor(value: Any) -> float:
    """`value` as a float; ValueError when a LoRA cannot be multiplied by it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"a LoRA is multiplied by a finite number, got {value!r}")
    return float(value)


def _folded(up: Tensor, scale: float) -> Tensor | None:
    """up * scale in the dtype of `up`, None where it is not exact in it."""
    exact = up.to(_fine(up)) * scale
    stored = exact.to(up.dtype)
    return stored if torch.equal(stored.to(exact.dtype), exact) else None


def _sum_bias(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    dtype = _work(a, b)
    return a.to(dtype) + b.to(dtype)


def _scaled(tensor: Tensor | None, by: float) -> Tensor | None:
    return None if tensor is None else tensor.to(_work(tensor)) * by


def _moved(part: Any, dtype: torch.dtype | None, device: Any) -> Any:
    fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    moved = {n: t.to(device=device, dtype=dtype) for n, t in fields.items() if isinstance(t, Tensor)}
    return dataclasses.replace(part, **moved)


@dataclass(frozen=True, eq=False)
class LowRank:
    """A low-rank update of one layer.

    down  [r, in, *kernel]; an embedding's is [r, num_embeddings]
    up    [out, r]; an embedding's is [embedding_dim, r]
    bias  [out] update of the bias, or None
    kind  "linear", "conv" or "embedding"

    A grouped convolution's weight is [out, in / groups, *kernel], and so is its update: the same `down` acts on the
    channels of every group. The algebra and `delta` hold for it; one plain convolution by `down` does not compute it.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None = None
    kind: str = "linear"

    def __post_init__(self) -> None:
        down, up, kind = self.down, self.up, self.kind
        if kind not in KINDS:
            raise ValueError(f"kind of a low-rank update is one of {', '.join(KINDS)}, got {kind!r}")
        fits = down.ndim >= 3 if kind == "conv" else down.ndim == 2
        if not fits or up.ndim != 2 or min(down.shape) < 1 or min(up.shape) < 1:
            wanted = f"down [rank, in{', *kernel' if kind == 'conv' else ''}] and up [out, rank]"
            got = f"down {list(down.shape)} and up {list(up.shape)}"
            raise ValueError(f"a {kind} update wants {wanted} with rank at least 1, got {got}")
        if up.shape[1] != down.shape[0]:
            got = f"down {list(down.shape)} has {down.shape[0]}, up {list(up.shape)} has {up.shape[1]}"
            raise ValueError(f"ranks differ: {got}")
        if self.bias is not None and self.bias.shape != up.shape[:1]:
            raise ValueError(f"bias update {list(self.bias.shape)} does not fit up {list(up.shape)}: wanted [out]")

    @classmethod
    def from_factors(
        cls,
        down: Tensor,
        up: Tensor,
        *,
        alpha: float | None = None,
        rslora: bool = False,
        bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        kind: str | None = None,
    ) -> LowRank:
        """The update with its scale folded into `up`: the only place that knows alpha.

        down, up  as in files: [r, in, *kernel] and [out, r] or [out, r, 1, 1]
        alpha     None means alpha = rank (scale 1); the scale is alpha / rank (arXiv 2106.09685), with rslora
                  alpha / sqrt(rank) (arXiv 2312.03732)
        bias      update of the layer's bias as it is; up_bias is that of `up` (PEFT's lora_bias), scaled like it
        kind      None: "linear" for a two-dimensional down, else "conv"

        The stored dtype stays where folding is exact in it, else both factors become float32. Raises ValueError for
        shapes that are no pair and for an alpha that is not a finite number.
        """
        if up.ndim > 2:
            if up.numel() != up.shape[0] * up.shape[1]:
                raise ValueError(f"up {list(up.shape)}: wanted [out, rank] or a convolution with a 1 x 1 kernel")
            up = up.flatten(1)
        kind = kind or ("linear" if down.ndim == 2 else "conv")
        if bias is not None and up_bias is not None:
            raise ValueError("bias and up_bias are two spellings of one update, give one of them")
        part = cls(down, up, bias if up_bias is None else up_bias, kind)
        if alpha is None and not rslora:
            return part
        alpha = float(part.rank if alpha is None else alpha)
        if not math.isfinite(alpha):
            raise ValueError(f"alpha is a finite number, got {alpha}")
        scale = alpha / (math.sqrt(part.rank) if rslora else part.rank)
        if scale == 1.0:
            return part
        # The first row alone tells nearly always that folding is not exact, before work is done on all of them.
        stored = None if _folded(up[:1], scale) is None else _folded(up, scale)
        if stored is None:
            dtype = _work(down, up)
            down, stored = down.to(dtype), (up.to(_fine(up)) * scale).to(dtype)
        return cls(down, stored, bias if up_bias is None else _scaled(up_bias, scale), kind)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the base layer's weight: (out, in), (out, in, *kernel) or (num_embeddings, embedding_dim)."""
        if self.kind == "embedding":
            return (self.down.shape[1], self.up.shape[0])
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.down.dtype, self.up.dtype)

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """The update as a tensor of `shape`, computed in float32 at least (float64 when asked for)."""
        work = _work(self.down, self.up)
        work = work if dtype is None else torch.promote_types(work, dtype)
        delta = self.up.to(work) @ self.down.to(work).flatten(1)
        delta = delta.T if self.kind == "embedding" else delta.reshape(self.shape)
        return delta.contiguous().to(dtype or work)

    def to(self, dtype: torch.dtype | None = None, device: Any = None) -> LowRank:
        return _moved(self, dtype, device)

    def dense(self) -> Dense:
        """The same update with its whole weight difference."""
        return Dense(self.delta(), self.bias, self.kind)

    def reshaped(self, shape: tuple[int, ...]) -> LowRank:
        """The same update for a layer that is a 1 x 1 convolution in one model and a linear in another.

        Raises ValueError when `shape` is another weight.
        """
        if tuple(shape) == self.shape:
            return self
        if self.kind == "embedding" or not _one_by_one(self.shape, tuple(shape)):
            raise ValueError(f"a weight update of shape {list(self.shape)} cannot act on a weight {list(shape)}")
        down = self.down.reshape(self.rank, *shape[1:])
        return LowRank(down, self.up, self.bias, "linear" if len(shape) == 2 else "conv")

    def _reduced(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Orthonormal left [out, m], right [in, n] and the svd (u, s, v) of the small matrix between them."""
        left, a = torch.linalg.qr(self.up.to(_fine(self.up)))
        right, b = torch.linalg.qr(self.down.to(_fine(self.down)).flatten(1).T)
        u, s, vh = torch.linalg.svd(a @ b.T, full_matrices=False)
        return left, right, u, s, vh

    def singular_values(self) -> Tensor:
        """The singular values of the update, largest first, at most rank many."""
        return self._reduced()[3]

    def row_space(self) -> Tensor:
        """[in, n] an orthonormal basis of the inputs that the update answers to, in float64 where there is one.

        n is at most the rank; directions below the rounding of the stored factors are left out.
        """
        _, right, _, s, vh = self._reduced()
        floor = torch.finfo(self.dtype if self.dtype == torch.float64 else torch.float32).eps
        return right @ vh[s > floor * len(s) * s[0]].T if len(s) else right[:, :0]

    def truncate(self, rank: int | None = None, energy: float | None = None) -> LowRank:
        """The best update of a smaller rank (Eckart-Young), from the factors alone; see Lora.truncate."""
        return self.truncated(rank, energy)[0]

    def truncated(self, rank: int | None = None, energy: float | None = None) -> tuple[LowRank, float, float]:
        """(truncate(), the energy that it left out, the energy); energy is the sum of squared singular values."""
        if self.dtype == torch.float64 or _fine(self.up) != torch.float64:
            left, right, u, s, vh = self._reduced()
            keep = _kept(s, rank, energy)
            part = self._from_svd(left @ u[:, :keep], s[:keep], vh[:keep] @ right.T)
        else:
            part, s = self._truncated_by_gram(rank, energy)
        squares = s.square()
        return part, float(squares[part.rank :].sum()), float(squares.sum())

    def _truncated_by_gram(self, rank: int | None, energy: float | None) -> tuple[LowRank, Tensor]:
        """(the best update of a smaller rank, all singular values), several times faster than QR.

        Gram matrices square the condition: in float64 they lose what lies below 1e-8 of the largest singular value,
        which is less than the rounding of the float32 factors this is for. It needs no Cholesky factor and no inverse
        of a Gram matrix, so factors of deficient rank (equal LoRAs, a LoRA of zeros) are nothing special.
        """
        down, up = self.down.to(torch.float64).flatten(1), self.up.to(torch.float64)
        ups = up.T @ up
        sizes, vectors = torch.linalg.eigh(down @ down.T)
        root = vectors * sizes.clamp(min=0.0).sqrt()  # down = root @ (orthonormal rows)
        squares, turn = torch.linalg.eigh(root.T @ ups @ root)
        s = squares.flip(0).clamp(min=0.0).sqrt()[: min(up.shape[0], down.shape[1])]
        keep = _kept(s, rank, energy)
        turned = root @ turn.flip(1)[:, :keep]  # up @ turned = left singular vectors times s
        kept = s[:keep]
        clear = kept > 1e-7 * s[0]
        scale = torch.where(clear, kept, 1.0)
        left = turned * torch.where(clear, scale.rsqrt(), 0.0)
        right = (ups @ turned) * torch.where(clear, scale.pow(-1.5), 0.0)
        dtype = _work(self.down, self.up)
        new = (right.T @ down).reshape(-1, *self.down.shape[1:])
        return LowRank(new.to(dtype), (up @ left).to(dtype), self.bias, self.kind), s

    def _from_svd(self, u: Tensor, s: Tensor, vh: Tensor) -> LowRank:
        dtype, root = _work(self.down, self.up), s.sqrt()
        down = (root[:, None] * vh).reshape(-1, *self.down.shape[1:])
        return LowRank(down.to(dtype), (u * root).to(dtype), self.bias, self.kind)

    def energy(self) -> float:
        """The squared Frobenius norm of the weight's update."""
        down, up = self.down.to(_fine(self.down)).flatten(1), self.up.to(_fine(self.up))
        return max(float(((down @ down.T) * (up.T @ up)).sum()), 0.0)

    def norm(self) -> float:
        return math.hypot(float(self.singular_values().norm()), _norm(self.bias))

    def __mul__(self, by: float) -> LowRank:
        by = finite_factor(by)
        return LowRank(self.down, _scaled(self.up, by), _scaled(self.bias, by), self.kind)

    def __add__(self, other: LowRank | Dense) -> LowRank | Dense:
        if isinstance(other, Dense):
            return self.dense() + other
        _same_shape(self, other)
        dtype = _work(self.down, self.up, other.down, other.up)
        down = torch.cat([self.down.to(dtype), other.down.to(dtype)])
        up = torch.cat([self.up.to(dtype), other.up.to(dtype)], dim=1)
        return LowRank(down, up, _sum_bias(self.bias, other.bias), self.kind)


@dataclass(frozen=True, eq=False)
class Dense:
    """A whole weight difference of one layer (`diff` in files), or only one of its bias.

    weight  tensor of the base layer's weight shape (a norm's is [features]), or None
    bias    [out] or None
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    kind: str = "linear"

    def __post_init__(self) -> None:
        if self.weight is None and self.bias is None:
            raise ValueError("a dense update wants a weight or a bias, got neither")
        if self.kind not in KINDS:
            raise ValueError(f"kind of a dense update is one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.weight is not None and (self.weight.ndim < 1 or min(self.weight.shape) < 1):
            raise ValueError(f"weight difference has shape {list(self.weight.shape)}, wanted that of a layer's weight")
        if self.bias is not None and self.bias.ndim != 1:
            raise ValueError(f"bias difference has shape {list(self.bias.shape)}, wanted [out]")

    rank = None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of the base layer's weight; None for a bias alone."""
        return None if self.weight is None else tuple(self.weight.shape)

    @property
    def dtype(self) -> torch.dtype:
        return (self.bias if self.weight is None else self.weight).dtype

    def delta(self, dtype: torch.dtype | None = None) -> Tensor | None:
        """The weight difference, or None for a bias alone."""
        return self.weight if self.weight is None else self.weight.to(dtype or _work(self.weight))

    def to(self, dtype: torch.dtype | None = None, device: Any = None) -> Dense:
        return _moved(self, dtype, device)

    def dense(self) -> Dense:
        return self

    def reshaped(self, shape: tuple[int, ...]) -> Dense:
        """As LowRank.reshaped."""
        if self.weight is None or tuple(shape) == self.shape:
            return self
        if not _one_by_one(self.shape, tuple(shape)):
            raise ValueError(f"a weight update of shape {list(self.shape)} cannot act on a weight {list(shape)}")
        return Dense(self.weight.reshape(shape), self.bias, "linear" if len(shape) == 2 else "conv")

    def truncate(self, rank: int | None = None, energy: float | None = None) -> LowRank | Dense:
        """The best low-rank update, by the svd of the weight; one-dimensional weights and lone biases stay dense."""
        return self.truncated(rank, energy)[0]

    def truncated(self, rank: int | None = None, energy: float | None = None) -> tuple[LowRank | Dense, float, float]:
        """As LowRank.truncated; what stays dense loses nothing."""
        if self.weight is None or self.weight.ndim < 2:
            return self, 0.0, self.energy()
        matrix = self.weight.to(_work(self.weight))
        matrix = matrix.T if self.kind == "embedding" else matrix.flatten(1)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        keep = _kept(s, rank, energy)
        shape = vh.shape[1:] if self.kind == "embedding" else self.weight.shape[1:]
        root = s[:keep].sqrt()
        part = LowRank((root[:, None] * vh[:keep]).reshape(keep, *shape), u[:, :keep] * root, self.bias, self.kind)
        squares = s.to(_fine(s)).square()
        return part, float(squares[keep:].sum()), float(squares.sum())

    def energy(self) -> float:
        """As LowRank.energy."""
        return _norm(self.weight) ** 2

    def norm(self) -> float:
        return math.hypot(_norm(self.weight), _norm(self.bias))

    def __mul__(self, by: float) -> Dense:
        by = finite_factor(by)
        return Dense(_scaled(self.weight, by), _scaled(self.bias, by), self.kind)

    def __add__(self, other: LowRank | Dense) -> Dense:
        other = other.dense()
        if self.weight is None or other.weight is None:
            weight, kind = (other.weight, other.kind) if self.weight is None else (self.weight, self.kind)
        else:
            _same_shape(self, other)
            dtype = _work(self.weight, other.weight)
            weight, kind = self.weight.to(dtype) + other.weight.to(dtype), self.kind
        return Dense(weight, _sum_bias(self.bias, other.bias), kind)


def _norm(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else float(tensor.to(_fine(tensor)).norm())


def _one_by_one(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return a[:2] == b[:2] and all(n == 1 for n in (*a[2:], *b[2:]))


def _same_shape(a: LowRank | Dense, b: LowRank | Dense) -> None:
    if (a.shape, a.kind) != (b.shape, b.kind):
        raise ValueError(f"updates of different layers: {a.kind} {list(a.shape)} and {b.kind} {list(b.shape)}")


def _kept(s: Tensor, rank: int | None, energy: float | None) -> int:
    """How many of the singular values stay: at least 1, at most `rank`, enough for `energy`, none that are noise."""
    keep = len(s) if rank is None else min(rank, len(s))
    if energy is not None:
        held = s.square().cumsum(0)
        # The last sum is the total; noise below its rounding is not energy.
        enough = held >= held[-1] * (energy - len(s) * torch.finfo(s.dtype).eps)
        keep = min(keep, int(enough.int().argmax()) + 1)
    return max(keep, 1)
