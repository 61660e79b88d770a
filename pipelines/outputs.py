"""What a denoiser gives back (a tensor, list, tuple or BaseOutput), and the arithmetic of predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def prediction(output: Any) -> Any:
    """The prediction in an output: a tuple's first entry, a BaseOutput's first field, a list or a tensor itself."""
    if isinstance(output, (Tensor, list)):
        return output
    return output[0]


def each(fn: Callable, *predictions: Any) -> Any:
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


def answer(like: Any, prediction: Any) -> Any:
    """`prediction` in the container that the model gave: tensor, list, tuple or BaseOutput."""
    if isinstance(like, (Tensor, list)):
        return prediction
    if isinstance(like, tuple):
        return (prediction, *like[1:])
    first = next(iter(like.keys()))
    return type(like)(**{**like, first: prediction})


def split(output: Any, times: int) -> list[Any]:
    """An output over [times * B] samples as `times` outputs over [B]."""
    if isinstance(output, list):
        size = len(output) // times
        return [output[i * size : (i + 1) * size] for i in range(times)]
    chunks = prediction(output)
    if isinstance(chunks, list):
        return [answer(output, part) for part in split(chunks, times)]
    return [answer(output, part) for part in chunks.chunk(times)]
