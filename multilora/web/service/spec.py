"""What can be asked of a worker and what comes back. Requests are immutable, and pickled when they are submitted."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from multilora.recipe import Finite, Recipe

MOST_PIXELS = 2**24  # of a picture that is sent: a small file may hold a very large one


class Request(BaseModel):
    """One request; `action` names the function of multilora.web.service.actions that fulfils it.

    LoRAs are named by the references of `service.library(session)`, also inside a recipe: never by a path.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    action: ClassVar[str]

    def references(self) -> list[str]:
        """The LoRAs and files of the session that the request names."""
        return []

    def recipes_of(self) -> list[Recipe]:
        """The recipes that it draws, which the limits look at."""
        return []

    def bases(self) -> set[str]:
        """The bases that it names; "" is the server's first one."""
        return {recipe.base for recipe in self.recipes_of()} or {getattr(self, "base", "")}


class _Drawn(Request):
    """pictures  role ("image", "mask_image", "control_image") -> bytes of a picture file
    masks     name of a LoRA in the recipe -> bytes of a picture file, white where the LoRA acts
    preview   send small pictures while it runs
    score     also CLIP score, and presence of each LoRA's element on the embedded world
    """

    pictures: dict[str, bytes] = Field(default_factory=dict)
    masks: dict[str, bytes] = Field(default_factory=dict)
    preview: bool = True
    score: bool = False

    def references(self) -> list[str]:
        return [use.reference for recipe in self.recipes_of() for use in recipe.loras]


class Compose(_Drawn):
    """Draw a recipe. One without `resolved` is new; one with it is made again, to the bit."""

    action: ClassVar[str] = "compose"
    recipe: Recipe

    def recipes_of(self) -> list[Recipe]:
        return [self.recipe]


class Compare(_Drawn):
    """Draw several recipes one after another as one job; every picture is sent when it is there."""

    action: ClassVar[str] = "compare"
    recipes: tuple[Recipe, ...] = Field(min_length=1)

    def recipes_of(self) -> list[Recipe]:
        return list(self.recipes)


class GateMap(_Drawn):
    """What the gate of a recipe does at every step, as a picture: facts strongest and sharpest, and one file."""

    action: ClassVar[str] = "gate_map"
    recipe: Recipe

    def recipes_of(self) -> list[Recipe]:
        return [self.recipe]


class _OnBase(Request):
    """base  that it is about; "" for the server's first one"""

    base: str = Field(default="", max_length=400)


class Score(_OnBase):
    """CLIP score of pictures (bytes of files) for a text, and presence of the elements of LoRAs (references)."""

    action: ClassVar[str] = "score"
    images: tuple[bytes, ...] = Field(min_length=1)
    prompt: str
    loras: tuple[str, ...] = ()

    def references(self) -> list[str]:
        return list(self.loras)


class Share(BaseModel):
    """A LoRA of a merge with its weight, a number or {glob: number}."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    reference: str
    weight: Finite | dict[str, Finite] = 1.0


class Merge(_OnBase):
    """LoRAs into one file. `options` are the method's; a value "file:..." is the reference of an earlier output.

    format  "diffusers", "kohya" or "peft" (a zip of its folder); dtype: "fp32", "fp16", "bf16" or as computed
    """

    action: ClassVar[str] = "merge"
    loras: tuple[Share, ...] = Field(min_length=1)
    method: str = "linear"
    options: dict[str, Any] = Field(default_factory=dict)
    rank: int | None = Field(default=None, ge=1)
    energy: Finite | None = None
    name: str | None = Field(default=None, max_length=80)
    format: Literal["diffusers", "kohya", "peft"] = "diffusers"
    dtype: Literal["fp32", "fp16", "bf16"] | None = None

    def references(self) -> list[str]:
        listed = [
            v for value in self.options.values() for v in (value if isinstance(value, (list, tuple)) else [value])
        ]
        return [s.reference for s in self.loras] + [v for v in listed if isinstance(v, str) and v.startswith("file:")]


class Inspect(_OnBase):
    """What a LoRA of the library is: the facts of `multilora inspect --json`, checked against the base."""

    action: ClassVar[str] = "inspect"
    reference: str

    def references(self) -> list[str]:
        return [self.reference]


class Fisher(_OnBase):
    """The diagonal Fisher of a LoRA from pictures that the model draws itself; its output serves merge `fisher`."""

    action: ClassVar[str] = "fisher"
    reference: str
    weight: Finite = 1.0
    estimator: Literal["probe", "empirical"] = "probe"
    examples: int = Field(default=64, ge=1, le=4096)
    pictures: int = Field(default=8, ge=1, le=64)
    steps: int = Field(default=10, ge=1, le=50)
    seed: int = Field(default=0, ge=0, lt=2**63)

    def references(self) -> list[str]:
        return [self.reference]


class Gram(_OnBase):
    """Gram matrices of the inputs that a LoRA's layers see while it draws; its output serves merge `regmean`."""

    action: ClassVar[str] = "gram"
    reference: str
    weight: Finite = 1.0
    pictures: int = Field(default=4, ge=1, le=64)
    steps: int = Field(default=10, ge=1, le=150)
    seed: int = Field(default=0, ge=0, lt=2**63)

    def references(self) -> list[str]:
        return [self.reference]


class Overlap(_OnBase):
    """How much LoRAs agree: the facts of `multilora compare --json`."""

    action: ClassVar[str] = "overlap"
    loras: tuple[str, ...] = Field(min_length=1)

    def references(self) -> list[str]:
        return list(self.loras)


class Text(Request):
    """What a language model answers, streamed as "text" events: facts["answers"], kind -> text.

    model     "embedded", a folder or a hub id; anything but the first only where users may name bases
    loras     of the embedded text library, by name
    answers   kinds, in the order wanted: "base" (no LoRA), "loras" (composed by the method while it answers),
              "merged" (made one LoRA by `merge` first)
    tokens    new ones at most; temperature: 0 takes the likeliest token each time
    """

    action: ClassVar[str] = "text"
    model: str = Field(default="embedded", max_length=400)
    prompt: str = Field(min_length=1)
    loras: tuple[Share, ...] = ()
    method: str = "merge"
    options: dict[str, Any] = Field(default_factory=dict)
    merge: str = "linear"
    answers: tuple[Literal["base", "loras", "merged"], ...] = Field(default=("base", "loras", "merged"), min_length=1)
    tokens: int = Field(default=32, ge=1, le=1024)
    temperature: Finite = Field(default=0.0, ge=0.0, le=10.0)
    seed: int = Field(default=0, ge=0, lt=2**63)

    def bases(self) -> set[str]:
        return {"" if self.model == "embedded" else self.model}


class Base(_OnBase):
    """Load a base model and say what it is (the facts of `service.about`)."""

    action: ClassVar[str] = "base"


@dataclass(frozen=True)
class Picture:
    """A picture as the PNG that holds its recipe, and its scores: {"clip": 27.1, "clip_model": "", "presence": {}}.

    presence  LoRA's name -> {"category", "label", "probability", "present"}
    seconds   that it took
    """

    png: bytes
    recipe: Recipe
    scores: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @functools.cached_property
    def image(self) -> Any:
        """The picture as PIL."""
        return opened(self.png)


@dataclass(frozen=True)
class Output:
    """A file that a job made, owned by its session: name for the download, path, reference for later requests."""

    name: str
    path: Path
    reference: str = ""


@dataclass(frozen=True)
class Result:
    """What a job made: pictures with their recipes, JSON-able facts, files."""

    pictures: list[Picture] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    files: list[Output] = field(default_factory=list)


@dataclass(frozen=True)
class Event:
    """One message of a job.

    kind      "queued" (position: 0 is next), "progress" (step of steps; number of of), "preview" (image: PIL),
              "picture" (picture: one of several is there), "text" (message: the next piece of answer `number` of
              `of`), "note" (message), and one at the end: "done" (result), "error" (message in words, code),
              "cancelled"
    code      of an error: "request" (what was asked), "memory", "nan", "worker", "timeout", "stopped", "disk"
    """

    kind: str
    position: int = 0
    step: int = 0
    steps: int = 0
    number: int = 0
    of: int = 1
    image: Any = None
    picture: Picture | None = None
    result: Result | None = None
    message: str = ""
    code: str = ""

    @property
    def last(self) -> bool:
        """Whether the job ends with it."""
        return self.kind in ("done", "error", "cancelled")


def opened(data: bytes) -> Any:
    """Bytes of a picture file as PIL. ValueError when they are none (PNG, JPEG and WebP are read)."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} are more pixels than {MOST_PIXELS:,}")
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"a picture was wanted (PNG, JPEG or WebP), this cannot be read as one: {error}") from None
    return image
