"""Examples for a language model, a classifier or any module: texts or tensors, read and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multilora.lab.train.data import BadData


def read_examples(data: Any, tokenizer: Any = None, length: int = 128) -> tuple[Any, str]:
    """(examples as multilora.lab.train.observed.Answered wants them, their SHA-256).

    data       one tensor [n, ...]; or a list of tensors [...] or of mappings of input tensors with a batch of 1; or
               texts: a list of strings or of {"text", "target"}, a .txt file with a text a line, or a .jsonl file of
               {"text": ..., "target": ...}
    tokenizer  for texts; at most `length` tokens each

    Raises BadData (a ValueError) naming file and line, or the example's number.
    """
    if isinstance(data, (str, Path)):
        data = _read(Path(data).expanduser())
    if isinstance(data, Tensor):
        if not len(data):
            raise BadData("the tensor of examples is empty")
        return data, _digest([{"input": data}])
    if not isinstance(data, Sequence) or not len(data):
        raise BadData(
            f"a model's Fisher needs examples, got {type(data).__name__}; wanted a .txt or .jsonl file, a list of "
            "texts or of input mappings, or a tensor [n, ...]"
        )
    found = [_example(one, i, tokenizer, length) for i, one in enumerate(data, 1)]
    return found, _digest([{"input": e} if isinstance(e, Tensor) else e for e in found])


def _read(path: Path) -> list[dict[str, str]]:
    if path.suffix not in (".txt", ".jsonl") or not path.is_file():
        what = "no such file" if not path.is_file() else "wanted a .txt or .jsonl file"
        raise BadData(f"texts {path}: {what}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise BadData(f"texts {path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix == ".txt":
            found.append({"text": line.strip()})
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadData(f"texts {path}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str) or not entry["text"].strip():
            raise BadData(f'texts {path}, line {number}: no "text"')
        found.append({k: entry[k] for k in ("text", "target") if isinstance(entry.get(k), str)})
    if not found:
        raise BadData(f"texts {path}: no text in it")
    return found


def _example(one: Any, number: int, tokenizer: Any, length: int) -> Tensor | dict[str, Tensor]:
    if isinstance(one, Tensor):
        return one
    one = {"text": one} if isinstance(one, str) else one
    if not isinstance(one, Mapping):
        raise BadData(f"example {number} is a {type(one).__name__}, wanted a text, a mapping or a tensor")
    if "text" not in one:
        for name, value in one.items():
            if isinstance(value, Tensor) and value.ndim and len(value) != 1:
                raise BadData(f"example {number}: {name} is {list(value.shape)}, wanted a batch of 1 in front")
        return dict(one)
    if tokenizer is None:
        raise BadData(f"example {number} is a text and there is no tokenizer; pass tokenizer=")
    inputs = dict(tokenizer(one["text"], truncation=True, max_length=length, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    if one.get("target"):
        inputs["labels"] = tokenizer(
            text_target=one["target"], truncation=True, max_length=length, return_tensors="pt"
        )["input_ids"]
    if not inputs["input_ids"].numel():
        raise BadData(f"example {number}: {one['text']!r:.60} has no tokens")
    return inputs


def _digest(examples: Sequence[Mapping[str, Any]]) -> str:
    found = hashlib.sha256()
    for example in examples:
        for name, value in sorted(example.items()):
            found.update(f"{name} ".encode())
            if isinstance(value, Tensor):
                flat = value.detach().cpu().contiguous().reshape(-1)
                found.update(f"{value.dtype} {list(value.shape)} ".encode())
                found.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
            else:
                found.update(repr(value).encode())
    return found.hexdigest()
