"""Arithmetic of a model's predictions: a tensor [B, ...], or a list with one tensor per sample (Z-Image)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def each(fn: Callable, *predictions: Any) -> Any:
    """fn over tensors, or over the tensors of lists one by one."""
    if isinstance(predictions[0], list):
        return [fn(*each) for each in zip(*predictions, strict=True)]
    return fn(*predictions)


def mean(predictions: Sequence[Any], mix: Sequence[float]) -> Any:
    """Sum of mix * prediction; one prediction at share 1 is handed through untouched."""
    if len(predictions) == 1 and mix[0] == 1.0:
        return predictions[0]
    total = each(lambda p: p * mix[0], predictions[0])
    for p, share in zip(predictions[1:], mix[1:], strict=True):
        total = each(lambda a, b, s=share: a + b * s, total, p)
    return total


def batched(fn: Callable, predictions: Sequence[Any]) -> Any:
    """fn([tensor [B, ...], ...]) -> [B, ...]; where predictions are lists, sample by sample as batches of one."""
    if isinstance(predictions[0], list):
        return [fn([p[None] for p in each])[0] for each in zip(*predictions, strict=True)]
    return fn(predictions)


def norms(prediction: Any) -> Any:
    """Euclidean norm of every sample, in float32 at least and of a shape that broadcasts over the prediction."""
    import torch  # methods import this file and must list themselves without torch

    whole = isinstance(prediction, list)

    def norm(p: Any) -> Any:
        dims = tuple(range(0 if whole else 1, p.ndim))
        wide = torch.promote_types(p.dtype, torch.float32)
        return torch.linalg.vector_norm(p, dim=dims, keepdim=True, dtype=wide)

    return each(norm, prediction)


def shapes(prediction: Any) -> Any:
    """The shape or shapes, to tell whether two predictions are of the same samples."""
    return [tuple(p.shape) for p in prediction] if isinstance(prediction, list) else tuple(prediction.shape)
