"""Prompts and completions for a language model: read, checked, tokenised and padded.

A data folder holds .jsonl files, one example a line: {"prompt": "2+3=", "completion": "5"}, or {"text": "..."}. The
loss counts completions only; of a "text" it counts all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multilora.lab.train.data import FORMATS as PICTURES
from multilora.lab.train.data import LISTED, BadData

IGNORED = -100  # label of a token that no loss counts, as transformers has it
NOT_TEXTS = "metadata.jsonl"  # lists the captions of a folder of pictures


@dataclass(frozen=True)
class TextExample:
    """One example: what is given and what is to be said; `prompt` None for a plain text. where: file and line.

    type: what kind of sample it is, for trainers that ask; "" where the data do not say.
    """

    prompt: str | None
    completion: str
    where: str
    type: str = ""


@dataclass(frozen=True)
class Tokens:
    """A tokenised example: ids [n] and labels [n] of a decoder; ids [n] and labels [m] of an encoder-decoder.

    A decoder's label belongs to the token at its own place, which the place before predicts; the first is IGNORED.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def counted(self) -> int:
        """How many tokens the loss counts."""
        return sum(label != IGNORED for label in self.labels)


def holds_texts(data: Any) -> bool:
    """Whether a path is a .jsonl file or a folder with .jsonl files of texts (and no pictures)."""
    path = Path(data).expanduser()
    if path.is_file():
        return path.suffix == ".jsonl"
    if not path.is_dir():
        return False
    files = [p for p in path.iterdir() if p.is_file()]
    pictures = any(p.suffix.lower() in PICTURES for p in files)
    return not pictures and any(p.suffix == ".jsonl" and p.name != NOT_TEXTS for p in files)


def read_texts(data: str | Path | Sequence[Mapping[str, str]]) -> list[TextExample]:
    """The examples of a folder of .jsonl files (in the order of their names), of one file, or of a list of mappings.

    Raises BadData (a ValueError) naming file and line of every bad line (the first five in words): no such folder, no
    .jsonl file in it, not UTF-8, not JSON, no object, neither "prompt" and "completion" nor "text", an empty
    completion, a field that is no string; and when nothing is left.
    """
    problems: list[str] = []
    if isinstance(data, (str, Path)):
        path = Path(data).expanduser()
        source = f"training texts {path}"
        found = [example for file in _files(path) for example in _lines(file, problems)]
    else:
        source = "training texts"
        entries = list(data) if isinstance(data, Sequence) else None
        if entries is None:
            raise BadData(f"{source}: got {type(data).__name__}, wanted a folder, a .jsonl file or a list of mappings")
        made = (_example(entry, f"example {i}", problems) for i, entry in enumerate(entries, 1))
        found = [example for example in made if example is not None]
    if problems:
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise BadData(f"{source}: {count}: {'; '.join(problems[:LISTED])}{more}")
    if not found:
        raise BadData(f"{source}: no example in it")
    return found


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix != ".jsonl":
            raise BadData(f"training texts {path}: wanted a .jsonl file or a folder of them")
        return [path]
    if not path.is_dir():
        raise BadData(f"training texts {path}: no such folder or file")
    files = sorted(p for p in path.glob("*.jsonl") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise BadData(f'training texts {path}: no .jsonl file in it, one {{"prompt": ..., "completion": ...}} a line')
    return files


def _lines(file: Path, problems: list[str]) -> list[TextExample]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        problems.append(f"{file.name}: not UTF-8 ({error.reason} at byte {error.start})")
        return []
    found: list[TextExample] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{where}: not JSON ({error.msg})")
            continue
        example = _example(entry, where, problems)
        if example is not None:
            found.append(example)
    if not any(line.strip() for line in lines):
        problems.append(f"{file.name}: empty")
    return found


def _example(entry: Any, where: str, problems: list[str]) -> TextExample | None:
    wanted = 'wanted {"prompt": ..., "completion": ...} or {"text": ...}'
    if not isinstance(entry, Mapping):
        problems.append(f"{where}: a {type(entry).__name__}, {wanted}")
        return None
    pair = "prompt" in entry or "completion" in entry
    names = ("prompt", "completion") if pair else ("text",)
    for name in names:
        value = entry.get(name)
        if not isinstance(value, str):
            what = f"{name!r} is a {type(value).__name__}" if name in entry else f"no {name!r}"
            problems.append(f"{where}: {what}, {wanted}; its fields are {', '.join(map(repr, entry)) or 'none'}")
            return None
        if not value.strip() and name != "prompt":  # an empty prompt is a completion from nothing
            problems.append(f"{where}: {name!r} is empty")
            return None
    if pair and "text" in entry:
        problems.append(f"{where}: both a 'prompt' and a 'text', {wanted}")
        return None
    completion = entry["completion"] if pair else entry["text"]
    return TextExample(entry["prompt"] if pair else None, completion, where, str(entry.get("type", "")))


def digest(examples: Sequence[TextExample]) -> str:
    """SHA-256 of what is said, not of file names."""
    found = hashlib.sha256()
    for example in examples:
        found.update(json.dumps([example.prompt, example.completion]).encode())
    return found.hexdigest()


def tokenised(examples: Sequence[TextExample], tokenizer: Any, *, seq2seq: bool, length: int) -> list[Tokens]:
    """The examples as tokens, an end token after each, cut off after `length` tokens.

    Raises BadData naming the line: a completion that `length` leaves nothing of, a completion with tokens that the
    tokenizer does not know, a plain text for an encoder-decoder.
    """
    return [_tokens(example, tokenizer, seq2seq, length) for example in examples]


def _tokens(example: TextExample, tokenizer: Any, seq2seq: bool, length: int) -> Tokens:
    if seq2seq:
        if example.prompt is None:
            raise BadData(f"{example.where}: an encoder-decoder is trained on 'prompt' and 'completion', not 'text'")
        ids = _ids(tokenizer, example.prompt)[:length]
        labels = _ended(_ids(tokenizer, example.completion, target=True), tokenizer)[:length]
        given = 0
    else:
        start = [] if example.prompt is None else _unended(_ids(tokenizer, example.prompt), tokenizer)
        whole = _unended(_ids(tokenizer, (example.prompt or "") + example.completion), tokenizer)
        if whole[: len(start)] != start:  # a token across the border: the prompt stays as generation will see it
            whole = start + _ids(tokenizer, example.completion, special=False)
        ids, given = _ended(whole, tokenizer)[:length], len(start)
        unseen = max(given, 1)  # nothing predicts a first token
        labels = [IGNORED] * min(unseen, len(ids)) + ids[unseen:]
    answer = [label for label in labels if label != IGNORED]
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in answer and unknown != getattr(tokenizer, "eos_token_id", None):
        raise BadData(f"{example.where}: {example.completion!r:.60} has characters that the tokenizer does not know")
    if not ids or not answer:
        raise BadData(f"{example.where}: no token to learn within {length} tokens (the prompt alone has {given})")
    return Tokens(tuple(ids), tuple(labels))


def _ids(tokenizer: Any, text: str, *, target: bool = False, special: bool = True) -> list[int]:
    made = tokenizer(text_target=text) if target else tokenizer(text, add_special_tokens=special)
    return list(made["input_ids"])


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _unended(ids: list[int], tokenizer: Any) -> list[int]:
    """Without the end token that some tokenizers add."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and len(ids) > 1 else ids


def padded(batch: Sequence[Tokens], pad: int) -> dict[str, Tensor]:
    """{"input_ids" [B, n], "attention_mask" [B, n], "labels" [B, n or m]}: padding right, masked, without a loss."""
    wide, deep = max(len(one.ids) for one in batch), max(len(one.labels) for one in batch)
    return {
        "input_ids": torch.tensor([[*one.ids, *[pad] * (wide - len(one.ids))] for one in batch]),
        "attention_mask": torch.tensor([[1] * len(one.ids) + [0] * (wide - len(one.ids)) for one in batch]),
        "labels": torch.tensor([[*one.labels, *[IGNORED] * (deep - len(one.labels))] for one in batch]),
    }
