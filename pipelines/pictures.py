"""The pictures that a picture is made from: read, checked, brought to one size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multilora.recipe import PICTURES, PictureUse


@dataclass(frozen=True)
class Picture:
    """A picture that another is made from: RGB, a mask is L. `reference` is its path, or "" for one in memory."""

    role: str
    image: Any
    reference: str = ""

    @property
    def sha256(self) -> str:
        """Of mode, size and pixels, so it is the same for a file, its copy in another format, and an array."""
        head = f"{self.image.mode} {self.image.width}x{self.image.height}\n"
        return hashlib.sha256(head.encode() + self.image.tobytes()).hexdigest()


def read_picture(role: str, value: Any) -> Picture:
    """A picture from a path, a PIL picture, or an array [height, width] or [height, width, 3 or 4].

    Arrays hold uint8, or floats in 0..1. Transparency is laid over white; a photo is turned as its camera says. Raises
    ValueError naming `role` for anything else.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    reference = ""
    if isinstance(value, Picture):
        return value
    if isinstance(value, (str, Path)):
        reference = str(value)
        try:
            with Image.open(Path(value).expanduser()) as opened:
                value = ImageOps.exif_transpose(opened)
                value.load()
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ValueError(f"{role}: cannot read {reference!r} as a picture: {error}") from None
    elif not isinstance(value, Image.Image):
        value = Image.fromarray(_pixels(role, value))
    if value.has_transparency_data and role != "mask_image":
        value = value.convert("RGBA")
        value = Image.alpha_composite(Image.new("RGBA", value.size, (255, 255, 255, 255)), value)
    return Picture(role, value.convert("L" if role == "mask_image" else "RGB"), reference)


def _pixels(role: str, value: Any) -> Any:
    import numpy as np

    wanted = "a path, a PIL picture, or an array [height, width] or [height, width, 3] of uint8, or floats in 0..1"
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{role}={type(value).__name__}: wanted {wanted}") from None
    if array.dtype.kind not in "uifb" or array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"{role}={type(value).__name__}: wanted {wanted}")
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        raise ValueError(f"{role}: array of shape {list(array.shape)}; wanted {wanted}")
    if array.dtype.kind in "fb":
        if not bool(((array >= 0) & (array <= 1)).all()):
            raise ValueError(f"{role}: floats from {array.min():g} to {array.max():g}; wanted {wanted}")
        array = (array.astype(np.float64) * 255.0).round()
    if array.min() < 0 or array.max() > 255:
        raise ValueError(f"{role}: values from {array.min():g} to {array.max():g}; wanted {wanted}")
    array = array.astype(np.uint8)
    return array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array


def read_pictures(given: Mapping[str, Any]) -> dict[str, Picture]:
    """The pictures by role, those that are None left out. Raises ValueError for a mask without a picture or effect."""
    pictures = {role: read_picture(role, value) for role, value in given.items() if value is not None}
    mask = pictures.get("mask_image")
    if mask is not None and "image" not in pictures:
        raise ValueError("mask_image without image: give the picture that the mask belongs to")
    for picture in pictures.values():
        check_mask(picture)
    return pictures


def check_mask(picture: Picture) -> None:
    """Raise ValueError for a mask without effect."""
    if picture.role == "mask_image" and picture.image.getextrema()[1] < 128:
        raise ValueError("mask_image: it has no white part, and only that is drawn anew")


def fit_pictures(
    pictures: Mapping[str, Picture], width: int | None, height: int | None, default: tuple[int, int], multiple: int
) -> tuple[int, int, dict[str, Any]]:
    """(width, height, role -> PIL picture of that size).

    Without width and height the picture is as large as its inputs, which must agree; with them, inputs are resized.
    Raises ValueError for sizes that differ, and those that the model cannot make.
    """
    first = next((pictures[role] for role in PICTURES if role in pictures), None)
    asked = width is not None or height is not None
    if first is not None:
        for role, picture in pictures.items():
            if picture.image.size == first.image.size or (asked and role == "control_image"):
                continue
            size, want = ("{} x {}".format(*p.image.size) for p in (picture, first))
            hint = "" if role == "mask_image" else ", or width= and height= to have it resized"
            raise ValueError(f"{role} is {size} and {first.role} is {want}: give both the same size{hint}")
    natural = first.image.size if first is not None else default
    width = natural[0] if width is None else width
    height = natural[1] if height is None else height
    check_size(width, height, multiple, first.role if first is not None and not asked else "")
    return width, height, {role: _resized(p, (width, height)) for role, p in pictures.items()}


def _resized(picture: Picture, size: tuple[int, int]) -> Any:
    from PIL import Image

    if picture.image.size == size:
        return picture.image
    nearest = picture.role == "mask_image"  # a mask has two values
    return picture.image.resize(size, Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS)


def check_size(width: Any, height: Any, multiple: int, source: str = "") -> None:
    """Raise ValueError for a side that the model cannot make, with the nearest that it can."""
    for name, value in (("width", width), ("height", height)):
        if type(value) is not int or value < multiple or value % multiple:
            low = max(multiple, value // multiple * multiple) if type(value) is int else multiple
            given = f" (of {source}; width= and height= resize it)" if source else ""
            raise ValueError(
                f"{name}={value!r}{given}: wanted a multiple of {multiple} for this model; nearest are {low} and "
                f"{low + multiple}"
            )


def same_pictures(uses: Iterable[PictureUse], given: Mapping[str, Any]) -> dict[str, Picture]:
    """The pictures of a recipe: those given, else read again from their paths.

    Raises ValueError for one that is missing, is not the recipe's (sha256), or has no place in it.
    """
    uses = {use.role: use for use in uses}
    for role in given:
        if role not in uses:
            raise ValueError(f"{role}: the recipe has no such picture; it has {', '.join(uses) or 'none'}")
    found = {}
    for role, use in uses.items():
        source = given.get(role, use.reference)
        if isinstance(source, str) and not source:
            raise ValueError(f"{role} of the recipe was in memory only; give it again: pictures={{{role!r}: ...}}")
        found[role] = read_picture(role, source)
        if found[role].sha256 != use.sha256:
            raise ValueError(
                f"{role} {found[role].reference!r} is not the picture of the recipe: sha256 "
                f"{found[role].sha256[:12]}, the recipe has {use.sha256[:12]}"
            )
    return found
