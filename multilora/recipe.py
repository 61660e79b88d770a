"""One JSON-able description of a picture: everything needed to make it again, and how a PNG carries it.

A PNG gets two text chunks: `parameters`, the text that AUTOMATIC1111's web UI writes and other tools read, and
`multilora`, this recipe as JSON. Only the second is read back.
"""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError, field_validator

VERSION = 2  # 1 had no task, pictures, ControlNet, pipeline options; all of them have defaults
CHUNK = "multilora"
PARAMETERS = "parameters"
PICTURES = ("image", "mask_image", "control_image")  # what another picture may be made from


class RecipeError(ValueError):
    """A recipe that cannot be read; the message names the file or the field."""


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"a finite number is wanted, got {value!r}")
    return value


def _number_or_schedule(value: Any) -> float | str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("a number or a schedule such as '0@0,1@0.5' is wanted")
    return _finite(float(value))


Finite = Annotated[float, AfterValidator(_finite)]
Weight = Annotated[float | str, PlainValidator(_number_or_schedule)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class LoraUse(_Model):
    """One LoRA of a picture and the options that belong to it.

    reference   path of the file, name in the embedded library, or "" for one that was in memory only
    weight      a number, or a schedule such as "0@0,1@0.5"
    blocks      exact module path or glob -> factor
    mask        path of the mask's picture; mask_sha256 is of its values
    """

    name: str
    reference: str = ""
    sha256: str | None = None
    weight: Weight = 1.0
    text_encoder_weight: Finite | None = None
    blocks: dict[str, Finite] = Field(default_factory=dict)
    positive_only: bool = False
    mask: str | None = None
    mask_sha256: str | None = None


class PictureUse(_Model):
    """A picture that this one is made from.

    role       "image", "mask_image" or "control_image"
    reference  its path, or "" for one that was in memory only
    sha256     of mode, size and pixels: "RGB 64x48" and a line feed, then the bytes row by row; a mask's mode is L
    """

    role: Literal[PICTURES]
    reference: str = ""
    sha256: str


class Resolved(_Model):
    """What decides the bits of a picture beside the request. Equal recipes with equal `resolved` are bit-equal.

    choice  what a method that chooses (auto) has chosen, in a line
    """

    device: str
    dtype: str
    threads: int = Field(ge=1)
    form: str
    passes_per_call: int = Field(ge=1)
    choice: str = ""
    versions: dict[str, str] = Field(default_factory=dict)


class Recipe(_Model):
    """A picture (or `images` of one call, of which this is number `index`); picture i has seed `seed + i`."""

    version: Literal[2] = VERSION
    task: str = "text-to-image"
    prompt: str
    negative_prompt: str = ""
    base: str
    base_family: str = ""
    loras: list[LoraUse] = Field(default_factory=list)
    method: str = "merge"
    options: dict[str, Any] = Field(default_factory=dict)
    scheduler: str | None = None
    scheduler_config: dict[str, Any] = Field(default_factory=dict)
    steps: int = Field(ge=1)
    guidance_scale: Finite
    width: int = Field(ge=1)
    height: int = Field(ge=1)
    seed: int = Field(ge=0, lt=2**63)
    images: int = Field(default=1, ge=1)
    index: int = Field(default=0, ge=0)
    pictures: list[PictureUse] = Field(default_factory=list)
    strength: Finite | None = None
    controlnet: str = ""
    controlnet_conditioning_scale: Finite | None = None
    true_cfg_scale: Finite | None = None
    pipeline_options: dict[str, Any] = Field(default_factory=dict)
    text_encoder: str = "per_row"
    cache: str = ""  # of features, as multilora.pipelines.caching.read_cache takes it
    scale: Finite = 1.0
    resolved: Resolved | None = None
    extra: dict[str, Any] = Field(default_factory=dict)

    @field_validator("index")
    @classmethod
    def _index_within(cls, value: int, info: Any) -> int:
        images = info.data.get("images")
        if images is not None and value >= images:
            raise ValueError(f"picture {value} of {images}: wanted less than images={images}")
        return value

    @property
    def json(self) -> str:  # shadows pydantic's method of version 1, which nothing here calls
        """The recipe as one line of JSON; `Recipe.read` takes it back."""
        return self.model_dump_json()

    @classmethod
    def read(cls, text: str | bytes, source: str = "recipe") -> Recipe:
        """A recipe from its JSON. Raises RecipeError naming `source` and every field that is wrong."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{source}: its recipe is not JSON: {error}") from None
        return cls.checked(data, source)

    @classmethod
    def checked(cls, data: Any, source: str = "recipe") -> Recipe:
        """A recipe from its fields. Raises RecipeError naming `source` and every field that is wrong."""
        if not isinstance(data, dict):
            raise RecipeError(f"{source}: its recipe is a {type(data).__name__}, wanted an object with fields")
        version = data.get("version", VERSION)
        if isinstance(version, int) and version > VERSION:
            raise RecipeError(
                f"{source}: its recipe has version {version}, this multilora reads up to {VERSION}; upgrade multilora"
            )
        if version == 1 and not isinstance(version, bool):
            data = {**data, "version": VERSION}
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError(f"{source}: {_explain(error)}") from None

    @classmethod
    def from_png(cls, path: str | Path) -> Recipe:
        """The recipe that a PNG carries.

        Raises RecipeError when the file is missing, is no PNG, carries no recipe, or one of a newer version.
        """
        from PIL import Image, UnidentifiedImageError

        path = Path(path)
        try:
            with Image.open(path, formats=("PNG",)) as image:
                image.load()  # text chunks may stand behind the pixels
                text = dict(image.text)
        except FileNotFoundError:
            raise RecipeError(f"{path}: no such file") from None
        except UnidentifiedImageError:
            raise RecipeError(f"{path}: not a PNG picture; only the PNG that multilora wrote holds a recipe") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise RecipeError(f"{path}: cannot be read as PNG: {error}") from None
        if CHUNK not in text:
            other = f" (it has a {PARAMETERS!r} text of another program)" if PARAMETERS in text else ""
            raise RecipeError(
                f"{path}: no multilora recipe in this PNG{other}. Many programs drop it when they save a copy; use "
                "the file that multilora wrote"
            )
        return cls.read(text[CHUNK], str(path))

    def parameters(self) -> str:
        """The recipe as AUTOMATIC1111 text: prompt with <lora:...> tags, negative prompt, one line of settings.

        A LoRA whose weight is a schedule gets the schedule in its tag; programs that know only numbers skip it.
        """
        tags = [f"<lora:{use.name}:{_weight(use.weight)}>" for use in self.loras]
        lines = [" ".join([self.prompt, *tags]).strip()]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        settings: dict[str, Any] = {
            "Steps": self.steps,
            "Sampler": self.scheduler or "default",
            "CFG scale": f"{self.guidance_scale:g}",
            "Seed": self.seed + self.index,
            "Size": f"{self.width}x{self.height}",
            "Model": self.base,
        }
        if self.strength is not None:
            settings["Denoising strength"] = f"{self.strength:g}"
        hashes = [f"{use.name}: {use.sha256[:12]}" for use in self.loras if use.sha256]
        if hashes:
            settings["Lora hashes"] = f'"{", ".join(hashes)}"'
        if self.loras:
            settings["LoRA method"] = self.method
        settings["Version"] = "multilora"
        lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in settings.items()))
        return "\n".join(lines)


def _weight(weight: float | str) -> str:
    return f"{weight:g}" if isinstance(weight, (int, float)) else weight


def _quoted(value: Any) -> str:
    """A value of the settings line; one that would break the line's commas and colons is quoted as JSON."""
    text = str(value)
    return json.dumps(text) if any(c in text for c in ",:\n") and not text.startswith('"') else text


def _explain(error: ValidationError) -> str:
    """Pydantic's complaints as `field: what is wrong (got value)`, one after another."""
    parts = []
    for issue in error.errors(include_url=False):
        field = ".".join(str(p) for p in issue["loc"]) or "recipe"
        got = "" if issue["type"] == "missing" else f" (got {issue['input']!r:.80})"
        parts.append(f"{field}: {issue['msg'].removeprefix('Value error, ')}{got}")
    return "; ".join(parts)


def png_bytes(image: Any, recipe: Recipe | None = None) -> bytes:
    """A PIL picture as the bytes of a PNG with its recipe in it; equal pictures and recipes give equal bytes."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    if recipe is not None:
        # tEXt, which every reader knows; Pillow turns to iTXt (UTF-8) when the text is not Latin-1.
        chunks.add_text(PARAMETERS, recipe.parameters())
        chunks.add_text(CHUNK, recipe.json)
    stream = io.BytesIO()
    image.save(stream, format="PNG", pnginfo=chunks)
    return stream.getvalue()


def save_png(image: Any, path: str | Path, recipe: Recipe | None = None) -> Path:
    """Write a PIL picture as PNG with its recipe in it: whole or not at all.

    The bytes go to a temporary file beside `path`, are flushed to disk, and the file is renamed over `path`. Folders
    are made as needed. Raises ValueError when `path` does not end in .png.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: a picture with its recipe is a .png file, got suffix {path.suffix!r}")
    data = png_bytes(image, recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
