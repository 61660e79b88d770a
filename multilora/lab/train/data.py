"""A folder of pictures and captions, checked before anything is trained or written.

Two layouts: `fox.png` beside `fox.txt` (or `fox.caption`), or a `metadata.jsonl` as Hugging Face's imagefolder reads
it, one {"file_name": "fox.png", "text": "a fox"} a line ("caption" and "prompt" serve for "text").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

# by ending: the formats (as Pillow names them) that a file of this ending may hold
FORMATS = {
    ".png": ("PNG",),
    ".jpg": ("JPEG", "MPO"),
    ".jpeg": ("JPEG", "MPO"),
    ".webp": ("WEBP",),
    ".bmp": ("BMP", "DIB"),
}
OTHER_PICTURES = (".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".svg", ".psd", ".jfif", ".jp2", ".ico")
CAPTIONS = (".txt", ".caption")
TEXT_KEYS = ("text", "caption", "prompt")
LISTED = 5  # problems that one error message names


class BadData(ValueError):
    """A training folder that cannot be used; the message names each file and its reason."""


@dataclass(frozen=True)
class Example:
    """One training picture with its caption."""

    picture: Path
    caption: str


def read_folder(folder: str | Path, *, size: int = 0) -> list[Example]:
    """The examples of a folder, in the order of their names, each picture opened and decoded once.

    size: the training size in pixels; a picture whose shorter side is under half of it is refused, a smaller one is
    enlarged. Raises BadData (a ValueError) with every bad file's name and reason: no such folder, no pictures, a
    missing, empty or undecodable caption, a caption without a picture, an unreadable or too small picture, a wrong
    ending.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise BadData(f"training folder {folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    listing = folder / "metadata.jsonl"
    problems: list[str] = []
    problems += [
        f"{p.name}: ending {p.suffix} is not read, wanted one of {' '.join(FORMATS)}"
        for p in files
        if p.suffix.lower() in OTHER_PICTURES
    ]
    if listing.is_file():
        pairs = _listed(listing, problems)
    else:
        pairs = _beside(files, problems)
    if not pairs and not problems:
        raise BadData(f"training folder {folder}: no pictures in it; wanted files ending in {' '.join(FORMATS)}")
    for example in pairs:
        reason = _unusable(example.picture, size)
        if reason:
            problems.append(f"{example.picture.name}: {reason}")
    if problems:
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise BadData(f"training folder {folder}: {count}: {'; '.join(problems[:LISTED])}{more}")
    return pairs


def _beside(files: Sequence[Path], problems: list[str]) -> list[Example]:
    pictures = [p for p in files if p.suffix.lower() in FORMATS]
    captions = {p.stem: p for p in reversed(files) if p.suffix.lower() in CAPTIONS}
    stems = [p.stem for p in pictures]
    known = set(stems) | {p.stem for p in files if p.suffix.lower() in OTHER_PICTURES}
    problems += [
        f"{p.name}: a caption without a picture" for stem, p in sorted(captions.items())
        if stem not in known and stem.lower() not in ("readme", "license", "notes")
    ]
    found = []
    for picture in pictures:
        if stems.count(picture.stem) > 1:
            problems.append(f"{picture.name}: {stems.count(picture.stem)} pictures share this name and one caption")
        elif picture.stem not in captions:
            problems.append(f"{picture.name}: no caption; wanted {picture.stem}.txt beside it, or a metadata.jsonl")
        else:
            text = _text(captions[picture.stem], problems)
            if text:
                found.append(Example(picture, text))
    return found


def _text(path: Path, problems: list[str]) -> str:
    try:
        text = " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        problems.append(f"{path.name}: not UTF-8 text ({error.reason} at byte {error.start})")
        return ""
    if not text:
        problems.append(f"{path.name}: the caption is empty")
    return text


def _listed(listing: Path, problems: list[str]) -> list[Example]:
    found = []
    root = listing.parent.resolve()
    for number, line in enumerate(listing.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{listing.name} line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{where}: not JSON ({error.msg})")
            continue
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            problems.append(f'{where}: no "file_name"')
            continue
        text = next((entry[key] for key in TEXT_KEYS if isinstance(entry.get(key), str) and entry[key].strip()), None)
        picture = listing.parent / name
        if text is None:
            problems.append(f"{where}: {name}: no caption; wanted one of the keys {', '.join(TEXT_KEYS)}")
        elif root not in picture.resolve().parents:
            problems.append(f"{where}: {name}: lies outside the folder")
        elif not picture.is_file():
            problems.append(f"{where}: {name}: no such picture")
        elif picture.suffix.lower() not in FORMATS:
            if picture.suffix.lower() not in OTHER_PICTURES or picture.parent != listing.parent:
                problems.append(f"{where}: {name}: ending {picture.suffix or 'missing'} is not read, "
                                f"wanted one of {' '.join(FORMATS)}")  # fmt: skip
        else:
            found.append(Example(picture, " ".join(text.split())))
    return found


def _unusable(path: Path, size: int) -> str | None:
    """Why this picture cannot be trained on, or None."""
    if not path.stat().st_size:
        return "the file is empty"
    try:
        with Image.open(path) as image:
            kind = image.format
            if kind not in FORMATS[path.suffix.lower()]:
                return f"holds a {kind} picture, its ending {path.suffix} says {FORMATS[path.suffix.lower()][0]}"
            image.load()
            width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"unreadable picture ({error})"
    if min(width, height) * 2 < size:
        return f"{width} x {height} px is too small, wanted at least {-(-size // 2)} px on the shorter side"
    return None


def pixels(path: Path, size: int) -> torch.Tensor:
    """The picture as float32 [3, size, size] in -1..1: upright, transparent parts white, centre square, resized."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.LANCZOS)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 over the pictures' bytes and captions, in order: what a resumed run must find unchanged."""
    found = hashlib.sha256()
    for example in examples:
        found.update(hashlib.sha256(example.picture.read_bytes()).digest())
        found.update(example.caption.encode() + b"\0")
    return found.hexdigest()


def with_trigger(examples: Sequence[Example], trigger: str | None) -> list[Example]:
    """Captions that lack the trigger get it in front. No trigger: unchanged."""
    if not trigger:
        return list(examples)
    return [
        e if trigger.lower() in e.caption.lower() else Example(e.picture, f"{trigger}, {e.caption}") for e in examples
    ]


def class_caption(caption: str, trigger: str) -> str:
    """The caption of a picture of the class only: the trigger's name (its first word) is left out.

    "a zib alien in a hat" with the trigger "zib alien" gives "a alien in a hat". Raises ValueError for a trigger of
    one word.
    """
    name, _, rest = trigger.partition(" ")
    if not rest:
        raise ValueError(f"trigger {trigger!r} has no class word; wanted a name and a class, as in 'zib alien'")
    lower = caption.lower()
    at = lower.find(trigger.lower())
    return caption if at < 0 else caption[:at] + caption[at + len(name) + 1 :]
