"""The arguments of one denoiser call, by the table of families: by name, for several passes at once, for one half.

What the table does not know is run in turn on copied inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from multilora.pipelines.families import ENCODINGS, TABLE, Inputs


def class_name(denoiser: torch.nn.Module) -> str:
    """The model's own class name, under torch.compile's wrapper and under our own call interception."""
    inner = getattr(denoiser, "_orig_mod", denoiser)
    return getattr(type(inner), "__multilora_of__", type(inner)).__name__


def inputs_of(denoiser: torch.nn.Module) -> Inputs | None:
    """The table's row for this denoiser, or None for a class that is not in it."""
    return TABLE.get(class_name(denoiser))


def alone(denoiser: torch.nn.Module, paths: Sequence[str]) -> bool:
    """Whether LoRAs on these module paths allow one row per run of the model only, so that passes run in turn.

    Attention processors that are none of diffusers' plain ones may deal with the samples of a batch by their number,
    as those of perturbed-attention guidance do, which cut it in two or three.
    """
    table = inputs_of(denoiser)
    if table is None:
        return True
    config = getattr(getattr(denoiser, "_orig_mod", denoiser), "config", None) or {}
    doubled = any(config.get(name) for name in table.in_turn)
    processors = {type(p) for m in denoiser.modules() if (p := getattr(m, "processor", None)) is not None}
    strange = any(not p.__module__.startswith("diffusers.models.") or p.__name__.startswith("PAG") for p in processors)
    return doubled or strange or any(fnmatchcase(path, glob) for path in paths for glob in table.joined)


def encodings_of(denoiser: torch.nn.Module, returned: Sequence[Any]) -> dict[str, Any] | None:
    """What `encode_prompt` returned, by name: tensors or lists of them. None for a family that is not in the table.

    None values and empty lists are left out.
    """
    name = class_name(denoiser)
    names = ENCODINGS.get(name + "+pooled" if name == "UNet2DConditionModel" and len(returned) == 4 else name)
    if names is None or len(names) != len(returned):
        return None
    found = zip(names, returned, strict=True)
    return {n: v for n, v in found if isinstance(v, Tensor) or (isinstance(v, list) and v)}


def bound_arguments(forward: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments by name (positional ones too), absent ones left out."""
    arguments = inspect.signature(forward).bind(*args, **kwargs).arguments
    extra = {}
    for p in inspect.signature(forward).parameters.values():
        if p.kind is p.VAR_KEYWORD:
            extra = arguments.pop(p.name, {})
    return {**arguments, **extra}


def batch_of(table: Inputs, arguments: Mapping[str, Any]) -> int:
    """How many samples the call has."""
    sample = arguments[table.sample]
    return len(sample) if isinstance(sample, list) else sample.shape[0]


def batchable(table: Inputs | None, arguments: Mapping[str, Any]) -> bool:
    """Whether several passes of this call can run as one batch: the class and every argument in use are in the table
    and as the table says."""
    if table is None:
        return False
    batch = batch_of(table, arguments)
    for path, value in _entries(table, arguments):
        if path in table.lists:
            if not isinstance(value, list) or len(value) != batch or any(isinstance(v, list) for v in value):
                return False
        elif path in table.per_sample:
            if any(t.ndim and t.shape[0] not in (1, batch) for t in _tensors(value)):
                return False
        elif path not in table.shared:
            return False
    return True


def _entries(table: Inputs, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(path, value) of every argument in use; dicts that the table knows by their entries come as these."""
    known = table.per_sample | table.shared | table.lists
    for name, value in arguments.items():
        if value is None:
            continue
        if isinstance(value, Mapping) and name not in known:
            yield from ((f"{name}.{key}", entry) for key, entry in value.items() if entry is not None)
        else:
            yield name, value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _tensors(v)


def repeat(table: Inputs, arguments: Mapping[str, Any], times: int) -> dict[str, Any]:
    """The arguments for `times` passes as one batch: [B, ...] -> [times * B, ...], lists likewise. Containers are new,
    so that a model may consume them."""
    if times == 1:
        return copied(dict(arguments), lambda t: t)
    batch = batch_of(table, arguments)

    def again(t: Tensor) -> Tensor:
        return t.repeat(times, *[1] * (t.ndim - 1)) if t.ndim and t.shape[0] == batch else t

    return _per_sample(table, arguments, again, lambda entries: entries * times)


def part(table: Inputs, arguments: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The arguments of the samples from `start` up to `stop`."""
    batch = batch_of(table, arguments)

    def cut(t: Tensor) -> Tensor:
        return t[start:stop] if t.ndim and t.shape[0] == batch else t

    return _per_sample(table, arguments, cut, lambda entries: entries[start:stop])


def _per_sample(
    table: Inputs, arguments: Mapping[str, Any], of_tensor: Callable[[Tensor], Tensor], of_list: Callable[[list], list]
) -> dict[str, Any]:
    result = copied(dict(arguments), lambda t: t)
    for path, value in _entries(table, arguments):
        if path in table.lists:
            put(result, path, of_list(value))
        elif path in table.per_sample:
            put(result, path, copied(value, of_tensor))
    return result


def copied(value: Any, tensor: Callable[[Tensor], Tensor] = Tensor.clone) -> Any:
    """The same argument with its own containers and `tensor(t)` for its tensors: what consumes or writes it leaves the
    original."""
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, dict):
        return {k: copied(v, tensor) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        entries = [copied(v, tensor) for v in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value


def put(arguments: dict[str, Any], path: str, value: Any) -> None:
    """Set `arguments["arg"]` or `arguments["arg"]["key"]` (path "arg.key") without touching the caller's dict."""
    name, _, key = path.partition(".")
    arguments[name] = {**arguments[name], key: value} if key else value


def get(arguments: Mapping[str, Any], path: str) -> Any:
    """The argument at "arg" or "arg.key", or None."""
    name, _, key = path.partition(".")
    value = arguments.get(name)
    return value.get(key) if key and isinstance(value, Mapping) else None if key else value


def joined(values: Sequence[Any]) -> Any:
    """Per-sample values one after the other: tensors along dimension 0, lists end to end."""
    if values[0] is None:
        return None
    if isinstance(values[0], list):
        return [entry for value in values for entry in value]
    return values[0] if len(values) == 1 else torch.cat(list(values))


def fitted(value: Any, samples: int) -> Any:
    """An encoding of n prompts for `samples` samples: each prompt's entry once per picture of it, side by side."""
    times = samples // len(value)
    if times == 1:
        return value
    if isinstance(value, list):
        return [entry for entry in value for _ in range(times)]
    return value.repeat_interleave(times, dim=0)


def alike(value: Any, sample: Any) -> Any:
    """A prompt encoding on the device of the latents and, where it is numbers, in their dtype."""
    like = sample[0] if isinstance(sample, list) else sample
    return copied(value, lambda t: t.to(like) if t.is_floating_point() else t.to(like.device))


def shapes(value: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in _tensors(value)]


def same_halves(table: Inputs, arguments: Mapping[str, Any]) -> bool:
    """Whether the first half of the samples has the same latents as the second, as guided calls have."""
    sample = arguments[table.sample]
    half, odd = divmod(batch_of(table, arguments), 2)
    return not odd and all(torch.equal(a, b) for a, b in zip(sample[:half], sample[half:], strict=True))


def grid(table: Inputs, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """(h, w) of the prediction in latent positions."""
    sample = arguments[table.sample]
    if table.layout != "packed":
        return tuple((sample[0] if isinstance(sample, list) else sample).shape[-2:])
    if "img_shapes" in arguments:  # (frames, h, w) of the picture, then of what it refers to
        first = arguments["img_shapes"][0]
        return tuple((first[0] if isinstance(first, list) else first)[-2:])
    ids = arguments["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    own = ids[ids[:, 0] == 0]  # a picture that it refers to has another number here
    return int(own[:, 1].max()) + 1, int(own[:, 2].max()) + 1


def spread(table: Inputs, mask: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """A mask [h, w] in the layout of a prediction: [1, 1, h, w], or [1, tokens, 1] with 0 beyond the picture's own."""
    if table.layout != "packed":
        return mask[None, None]
    tokens = arguments[table.sample].shape[1]
    return torch.nn.functional.pad(mask.reshape(-1), (0, tokens - mask.numel())).reshape(1, -1, 1)
