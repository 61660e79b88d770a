"""What a denoiser gives back: a tensor, list, tuple or BaseOutput. multilora.predictions has their arithmetic."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def prediction(output: Any) -> Any:
    """The prediction in an output: a tuple's first entry, a BaseOutput's first field, a list or a tensor itself."""
    if isinstance(output, (Tensor, list)):
        return output
    return output[0]


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
