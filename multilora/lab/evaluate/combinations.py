"""Which LoRAs are drawn together: ComposLoRA's combinations (arXiv 2402.16843, section 4) over any library.

A library is a folder of LoRAs with a listing, or the listing itself. Two listings are read: our library.json, and the
published testbed's *_lora_info.json, {category: [{"id", "name", "trigger": [words]}]} with a file ID.safetensors each.
Without a listing, the files' own cards must say category and triggers.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multilora.method import unknown

# The published order, in which the first LoRA matters to Switch; "garment" is the embedded world's word for clothing.
ORDER = ("character", "clothing", "garment", "style", "background", "object")
CHARACTER = "character"
LISTING, PUBLISHED = "library.json", "*_lora_info.json"


class LibraryError(ValueError):
    """A library that cannot be used; the message names the file and what is wrong in it."""


@dataclass(frozen=True)
class Entry:
    """One LoRA of a library. `reference` is what a recipe calls it: a path, or a name of the embedded library."""

    name: str
    reference: str
    category: str
    triggers: tuple[str, ...]
    split: str = ""


@dataclass(frozen=True)
class Library:
    """LoRAs with categories. `world`: they are designs of the embedded world, whose recognisers know them."""

    source: str
    entries: tuple[Entry, ...]
    world: bool = False

    def of(self, split: str) -> Library:
        """The entries of a split; "all", and a library without splits, keep everything.

        Raises UnknownName for a split that the library does not have.
        """
        known = {e.split for e in self.entries} - {""}
        if split == "all" or not known:
            return self
        if split not in known:
            raise unknown("split of the library", split, {*known, "all"})
        return Library(self.source, tuple(e for e in self.entries if e.split == split), self.world)


def combinations(entries: Sequence[Entry], k: int) -> list[tuple[Entry, ...]]:
    """Every set of k entries with no category twice and, where the library has characters, one of them.

    Sets are in the published order of categories. Raises ValueError for k below 1, and when there is no such set.
    """
    if k < 1:
        raise ValueError(f"k = {k}: wanted at least 1 LoRA")
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.category, []).append(entry)
    names = sorted(groups, key=lambda c: (ORDER.index(c) if c in ORDER else len(ORDER), c))
    chosen = [c for c in itertools.combinations(names, k) if CHARACTER not in groups or CHARACTER in c]
    if not chosen:
        told = ", ".join(f"{len(groups[c])} {c}" for c in names) or "no LoRAs"
        raise ValueError(
            f"k = {k}: no set of {k} LoRAs of different categories in this library ({told}); the largest k is "
            f"{len(names)}"
        )
    return [members for c in chosen for members in itertools.product(*(groups[name] for name in c))]


def read_library(source: str | Path = "embedded", files: str | Path | None = None) -> Library:
    """The library "embedded", of a folder, or of a listing; `files` is the folder of its LoRAs, default beside it.

    Raises LibraryError naming every LoRA that is missing, or what is wrong in the listing.
    """
    from multilora.pipelines.load import assets

    path = assets() / "loras" if str(source) == "embedded" else Path(source).expanduser()
    if path.is_dir():
        found = [path / LISTING] if (path / LISTING).is_file() else sorted(path.glob(PUBLISHED))
        if len(found) > 1:
            told = ", ".join(p.name for p in found)
            raise LibraryError(f"{path}: several listings in it ({told}); give one of them instead of the folder")
        if not found:
            return _from_cards(path)
        path = found[0]
    if not path.is_file():
        raise LibraryError(f"library {str(source)!r}: wanted 'embedded', a folder of LoRAs, or its listing")
    try:
        listing = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LibraryError(f"{path}: cannot be read as JSON: {error}") from None
    folder = Path(files).expanduser() if files is not None else path.parent
    if not isinstance(listing, dict):
        raise LibraryError(f"{path}: wanted an object with 'loras', or one list per category")
    own = isinstance(listing.get("loras"), list)
    rows = _own(listing, path) if own else _published(listing, path)
    embedded = folder.resolve() == (assets() / "loras").resolve()
    entries = tuple(_entry(row, path, folder, embedded) for row in rows)
    missing = [e.reference for e in entries if not embedded and not Path(e.reference).exists()]
    if missing:
        raise LibraryError(f"{path}: {len(missing)} LoRAs are missing:\n  " + "\n  ".join(missing))
    _distinct(entries, path)
    return Library(str(source), entries, own and listing.get("base") == "embedded" and _designs(entries))


def _own(listing: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    return [row if isinstance(row, dict) else {"name": row} for row in listing["loras"]]


def _published(listing: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    rows = []
    for category, members in listing.items():
        if not isinstance(members, list) or not all(isinstance(m, dict) for m in members):
            raise LibraryError(f"{path}: {category}: wanted a list of objects with 'id', 'name' and 'trigger'")
        rows += [{**m, "name": m.get("id"), "file": f"{m.get('id')}.safetensors", "category": category}
                 for m in members]  # fmt: skip
    return rows


def _entry(row: dict[str, Any], path: Path, folder: Path, embedded: bool) -> Entry:
    for field in ("name", "file", "category"):
        if not isinstance(row.get(field), str) or not row[field]:
            raise LibraryError(f"{path}: LoRA {row.get('name')!r}: {field}: wanted a text, got {row.get(field)!r}")
    triggers = row.get("triggers", row.get("trigger", ()))
    triggers = (triggers,) if isinstance(triggers, str) else tuple(triggers or ())
    if not triggers or not all(isinstance(t, str) and t for t in triggers):
        raise LibraryError(f"{path}: LoRA {row['name']!r}: trigger: wanted words that call it up, got {triggers!r}")
    reference = row["name"] if embedded else str(folder / row["file"])
    return Entry(row["name"], reference, row["category"], triggers, str(row.get("split") or ""))


def _from_cards(folder: Path) -> Library:
    """A folder without a listing: what the files say of themselves."""
    from multilora import files

    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise LibraryError(f"{folder}: no {LISTING}, no {PUBLISHED} and no .safetensors files in it")
    entries, silent = [], []
    for path in paths:
        card = files.load(path).card
        if not (card.category and card.triggers):
            silent.append(path.name)
        entries.append(Entry(path.stem, str(path), card.category, tuple(card.triggers)))
    if silent:
        raise LibraryError(
            f"{folder}: these files do not say their category and trigger: {', '.join(silent)}. Put a {LISTING} "
            'beside them: {"loras": [{"name": ..., "file": ..., "category": "character", "trigger": ...}, ...]}'
        )
    return Library(str(folder), tuple(entries))


def _distinct(entries: Sequence[Entry], path: Path) -> None:
    name, count = Counter(e.name for e in entries).most_common(1)[0] if entries else ("", 0)
    if count > 1:
        raise LibraryError(f"{path}: LoRA {name!r} is listed {count} times")
    if not entries:
        raise LibraryError(f"{path}: lists no LoRAs")


def _designs(entries: Sequence[Entry]) -> bool:
    from multilora.lab.world.designs import DESIGNS

    return all(e.name in DESIGNS and DESIGNS[e.name].category == e.category for e in entries)
