"""What one user may ask for. Component limits of a page are no protection: every request is checked here."""

from __future__ import annotations

from dataclasses import dataclass

from multilora.recipe import PICTURES
from multilora.web.service.spec import Compare, Fisher, Gram, Merge, Overlap, Request, Score, Text, _Drawn


class Refused(ValueError):
    """A request that is not taken; the message says why and what to do. `code`: "busy", "limit", "disk" or
    "request"."""

    def __init__(self, message: str, code: str = "request"):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Limits:
    """waiting           jobs that may wait, of all users; per_user of one user (the running one not counted)
    seconds           that a job may run
    upload_bytes      of one file; session_bytes of all files of a session; hour_bytes uploaded by one within an hour
    sessions          that are remembered; idle_seconds after which one is forgotten, with its files
    """

    waiting: int = 20
    per_user: int = 2
    seconds: float = 900.0
    steps: int = 150
    side: int = 2048
    images: int = 4
    compared: int = 12
    loras: int = 16
    prompt: int = 4000
    recipe: int = 2**20
    scored: int = 16
    picture_bytes: int = 32 * 2**20
    upload_bytes: int = 2**30
    session_bytes: int = 4 * 2**30
    hour_bytes: int = 8 * 2**30
    sessions: int = 1000
    idle_seconds: float = 6 * 3600.0


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Refused(f"num_train_timesteps={value!r:.40}: a number is wanted")
    return value


def check(request: Request, limits: Limits) -> None:
    """Raises Refused naming the field, its value and the limit."""

    def most(name: str, value: float, limit: float) -> None:
        if value > limit:
            raise Refused(f"{name} is {value:g}, this server allows up to {limit:g}", "limit")

    for recipe in request.recipes_of():
        most("steps", recipe.steps, limits.steps)
        most("width", recipe.width, limits.side)
        most("height", recipe.height, limits.side)
        most("number of pictures", recipe.images, limits.images)
        most("number of LoRAs", len(recipe.loras), limits.loras)
        most("length of the prompt", len(recipe.prompt), limits.prompt)
        most("length of the negative prompt", len(recipe.negative_prompt), limits.prompt)
        if recipe.controlnet:
            raise Refused("controlnet: this server has none")
        most("length of the recipe", len(recipe.json), limits.recipe)
        for name, value in recipe.options.items():
            if isinstance(value, str) and ("/" in value or "\\" in value or value.endswith(".safetensors")):
                raise Refused(f"option {name}={value!r:.80}: a path is not taken here")
        most("num_train_timesteps", _number(recipe.scheduler_config.get("num_train_timesteps", 1)), 10_000)
        for use in recipe.loras:
            if use.mask:
                raise Refused(f"mask of LoRA {use.name!r}: send the picture itself (masks=...), not a path")
            if not use.reference:
                raise Refused(f"LoRA {use.name!r} has no reference; choose it from the library, or upload its file")
        for picture in recipe.pictures:
            if picture.reference:
                raise Refused(f"{picture.role}: send the picture itself (pictures=...), not a path")
        if "<lora:" in recipe.prompt:
            raise Refused("prompt: <lora:...> tags are not read here; choose the LoRAs in the list")
    sent: list[tuple[str, bytes]] = []
    if isinstance(request, _Drawn):
        for role in request.pictures:
            if role not in PICTURES:
                raise Refused(f"pictures: {role!r} is not one of {', '.join(PICTURES)}")
        names = {use.name for recipe in request.recipes_of() for use in recipe.loras}
        for name in request.masks:
            if name not in names:
                raise Refused(f"masks: {name!r} is not a LoRA of the recipe")
        sent = [*request.pictures.items(), *((f"mask of {n}", data) for n, data in request.masks.items())]
    if isinstance(request, Compare):
        most("number of variants", len(request.recipes), limits.compared)
    if isinstance(request, Score):
        most("number of pictures", len(request.images), limits.scored)
        most("length of the prompt", len(request.prompt), limits.prompt)
        sent = [(f"picture {i + 1}", data) for i, data in enumerate(request.images)]
    if isinstance(request, (Merge, Overlap, Text)):
        most("number of LoRAs", len(request.loras), limits.loras)
    if isinstance(request, Text):
        most("length of the prompt", len(request.prompt), limits.prompt)
    if isinstance(request, (Fisher, Gram)):
        most("steps", request.steps, limits.steps)
    for name, data in sent:
        most(f"{name}: number of bytes", len(data), limits.picture_bytes)
