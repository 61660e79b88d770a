"""Files of many tensors, one tensor at a time; and the merge of full fine-tuned checkpoints.

    merge_checkpoints(["cats/", "dogs/"], [1, 1], ["cats.fisher.safetensors", "dogs.fisher.safetensors"], out="both/")

A checkpoint is a mapping name -> tensor, a .safetensors file, or a folder of them (the shards of one model). Of files
one tensor per model is in memory at a time.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multilora.fishers import Fisher, checked_fisher, consents, fisher_mean, norm_over
from multilora.stored import Stored, write_tensors

WEIGHTS_ONLY = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx")  # other spellings of a model's weights


@torch.no_grad()
def merge_checkpoints(
    models: Sequence[str | Path | Mapping[str, Tensor]],
    weights: Sequence[float] | None = None,
    fishers: Sequence[str | Path | Mapping[str, Tensor]] | None = None,
    out: str | Path | None = None,
    *,
    base: str | Path | Mapping[str, Tensor] | None = None,
    head: Sequence[str] = (),
    component: str = "",
    normalize: bool = True,
    floor: float = 1e-6,
    favor_target: bool = True,
    dtype: torch.dtype | None = None,
    echo: Callable[[str, int, int], None] | None = None,
) -> Path | dict[str, Tensor]:
    """theta = sum_m w_m F_m theta_m / sum_m w_m F_m, entry by entry (Matena and Raffel, arXiv 2111.09832).

    models     of one architecture; the first is the target
    weights    one per model, at least 0 and not all 0; None for 1 each
    fishers    one per model, named as the tensors are (`multilora.lab.train.fisher.estimate` without a LoRA); None for
               the weighted mean
    out        a .safetensors file, or a folder, which gets the target's shards and the small files beside them; None
               returns the merged tensors
    base       where a tensor comes from that is neither merged nor the target's: those that match `head`. None: the
               target
    head       globs of tensor names that are not merged, such as "classifier.*": a body is shared, a head is a task's
    component  of a pipeline ("unet"), where the Fishers' names carry it and the checkpoints' do not
    normalize, floor, favor_target    as of the merge method `fisher`; the defaults are those of the published code
    dtype      of the merged tensors; None keeps the target's

    Whole-number tensors must be equal in all models. A written file or folder appears complete or not at all, and
    never over one of the inputs. Raises ValueError naming model and tensor when names, shapes or Fishers do not fit, a
    weight is bad, a result is not finite, or `out` is an input or a folder that is not empty.
    """
    if len(models) < 1:
        raise ValueError("merge_checkpoints: no models given")
    out = None if out is None else Path(out).expanduser()
    with contextlib.ExitStack() as files:
        opened = [_opened(m, files) for m in models]
        start = opened[0] if base is None else _opened(base, files)
        _check_out(out, [m for m in (*models, base, *(fishers or ())) if isinstance(m, (str, Path))])
        given = [1.0] * len(opened) if weights is None else list(weights)
        consents(given, len(opened), "merge_checkpoints", "models")
        known = None if fishers is None else _fishers(fishers, len(opened), files)
        outside = _head(opened[0], head)
        for i, model in enumerate(opened[1:], 2):
            _same_names(opened[0], model, i, outside)
        body = [name for name in opened[0] if name not in outside]
        at = _lookups(known, body, opened, component)
        norms = None if known is None or not normalize else [norm_over(f, at.values()) for f in known]
        source = {n: opened[0] if base is None and n not in start else start for n in outside}

        def merged(name: str) -> Tensor:
            if name in outside:
                if name not in source[name]:
                    raise ValueError(f"merge_checkpoints: the base lacks {name!r}, which is not merged")
                return source[name][name]
            tensors = [model[name] for model in opened]
            first = tensors[0]
            if not first.is_floating_point():
                if not all(torch.equal(first, t) for t in tensors[1:]):
                    raise ValueError(f"merge_checkpoints: {name!r} holds {first.dtype} and differs between the models")
                return first
            found = None if known is None else [f[at[name]] for f in known]
            mean = fisher_mean(tensors, found, given, norms=norms, floor=floor, favor_target=favor_target)
            mean = mean.to(first.dtype if dtype is None else dtype)
            if not torch.isfinite(mean).all():
                raise ValueError(f"merge_checkpoints: the result for {name!r} has values that are not finite")
            return mean

        def told(names: Sequence[str], total: int) -> Iterator[Tensor]:
            for name in names:
                tensor = merged(name)
                if echo is not None:
                    counter[0] += 1
                    echo(name, counter[0], total)
                yield tensor

        counter = [0]
        names = list(opened[0])
        if out is None:
            return {n: t.clone() for n, t in zip(names, told(names, len(names)), strict=True)}
        about = {"weights": given, "normalize": normalize, "floor": floor, "favor_target": favor_target}
        about |= {"method": "mean" if known is None else "fisher", "head": list(head)}
        layout = _layout(names, opened[0], source, dtype, outside)
        if out.suffix == ".safetensors":
            return write_tensors(out, layout, told(list(layout), len(names)), {"multilora_merge": json.dumps(about)})
        return _write_folder(out, opened[0], layout, lambda part: told(part, len(names)), about)


def _opened(model: Any, files: contextlib.ExitStack) -> Mapping[str, Tensor]:
    if isinstance(model, (str, Path)):
        return files.enter_context(Stored(model))
    if not isinstance(model, Mapping) or not model or not all(isinstance(t, Tensor) for t in model.values()):
        raise ValueError(
            f"merge_checkpoints: {type(model).__name__}: wanted a .safetensors file, a folder of them, or a state dict"
        )
    return model


def _name(model: Mapping[str, Tensor], number: int) -> str:
    return model.path.name if isinstance(model, Stored) else f"model number {number}"


def _fishers(fishers: Sequence[Any], count: int, files: contextlib.ExitStack) -> list[Fisher]:
    if len(fishers) != count:
        raise ValueError(f"merge_checkpoints: {len(fishers)} Fishers for {count} models, wanted one each")
    return [checked_fisher(f, f"merge_checkpoints: Fisher number {i}", files) for i, f in enumerate(fishers, 1)]


def _head(target: Mapping[str, Tensor], head: Sequence[str]) -> set[str]:
    if isinstance(head, str):
        raise ValueError(f"merge_checkpoints: head={head!r}: wanted a list of globs, such as ['classifier.*']")
    found = set()
    for glob in head:
        matching = {name for name in target if fnmatchcase(name, glob)}
        if not matching:
            raise ValueError(f"merge_checkpoints: head {glob!r} matches none of the {len(target)} tensors")
        found |= matching
    return found


def _same_names(target: Mapping[str, Tensor], model: Mapping[str, Tensor], number: int, outside: set[str]) -> None:
    who = _name(model, number)
    missing = [n for n in target if n not in model and n not in outside]
    more = [n for n in model if n not in target and n not in outside]
    if missing or more:
        what = f"lacks {missing[0]!r}" if missing else f"has {more[0]!r}, which {_name(target, 1)} lacks"
        count = len(missing) + len(more)
        others = f" ({count} tensors differ)" if count > 1 else ""
        raise ValueError(f"merge_checkpoints: {who} {what}{others}; put heads of single tasks into head=[...]")
    for name in target:
        if name not in outside and _shape(target, name) != _shape(model, name):
            raise ValueError(
                f"merge_checkpoints: {name!r} of {who} is {list(_shape(model, name))}, in {_name(target, 1)} "
                f"{list(_shape(target, name))}; models of one architecture are wanted"
            )


def _shape(model: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return model.layout[name][1] if isinstance(model, Stored) else tuple(model[name].shape)


def _dtype(model: Mapping[str, Tensor], name: str) -> torch.dtype:
    return model.layout[name][0] if isinstance(model, Stored) else model[name].dtype


def _lookups(
    fishers: Sequence[Fisher] | None, body: Sequence[str], models: Sequence[Mapping[str, Tensor]], component: str
) -> dict[str, str]:
    """Tensor name -> its name in the Fishers, for every floating-point tensor of the body."""
    found: dict[str, str] = {}
    for name in body if fishers is not None else ():
        if not _dtype(models[0], name).is_floating_point:
            continue
        own = f"{component}.{name}" if component else name
        for i, fisher in enumerate(fishers, 1):
            if own not in fisher:
                raise ValueError(
                    f"merge_checkpoints: the Fisher of {_name(models[i - 1], i)} has no {own!r} (it has {len(fisher)} "
                    "tensors); it was estimated for another model or for fewer layers, or component= is missing"
                )
            if fisher.shape(own) != _shape(models[0], name):
                shapes = f"{list(fisher.shape(own))}, the tensor is {list(_shape(models[0], name))}"
                raise ValueError(f"merge_checkpoints: the Fisher of {_name(models[i - 1], i)} for {own!r} is {shapes}")
        found[name] = own
    return found


def _layout(
    names: Sequence[str],
    target: Mapping[str, Tensor],
    source: Mapping[str, Mapping[str, Tensor]],
    dtype: torch.dtype | None,
    outside: set[str],
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    layout = {}
    for name in names:
        of = source.get(name, target)
        if name not in of:
            raise ValueError(f"merge_checkpoints: the base lacks {name!r}, which is not merged")
        own = _dtype(of, name)
        merged = name not in outside and own.is_floating_point and dtype is not None
        layout[name] = (dtype if merged else own, _shape(of, name))
    return layout


def _check_out(out: Path | None, inputs: Sequence[str | Path]) -> None:
    if out is None:
        return
    for given in inputs:
        path = Path(given).expanduser().resolve()
        if out.resolve() == path or path in out.resolve().parents or out.resolve() in path.parents:
            raise ValueError(f"out={str(out)!r} is or lies in the input {given}; inputs are never written over")
    if out.suffix != ".safetensors" and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={str(out)!r}: wanted a .safetensors file, or a folder that is new or empty")


def _write_folder(
    out: Path,
    target: Mapping[str, Tensor],
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    told: Callable[[Sequence[str]], Iterator[Tensor]],
    about: Mapping[str, Any],
) -> Path:
    """The target's shards and small files in a new folder, renamed into place when all of it is there."""
    shards = {"model.safetensors": list(layout)}
    beside: list[Path] = []
    if isinstance(target, Stored):
        shards = {path.name: [n for n in target.names_in(path) if n in layout] for path in target.files}
        beside = [p for p in target.path.iterdir() if p.is_file()] if target.path.is_dir() else []
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for file in beside:
            if file.suffix != ".safetensors" and file.suffix not in WEIGHTS_ONLY:
                shutil.copyfile(file, temporary / file.name)
        for file, names in shards.items():
            part = {n: layout[n] for n in names}
            texts = {"format": "pt", "multilora_merge": json.dumps(about)}
            write_tensors(temporary / file, part, told(list(part)), texts)
        if out.is_dir():
            out.rmdir()
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return out
