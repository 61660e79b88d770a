"""A recipe for use elsewhere: as a link to this app, as a command, as Python."""

from __future__ import annotations

import base64
import binascii
import json
import shlex
import zlib
from typing import Any

from multilora.recipe import LoraUse, Recipe, RecipeError

LINK = "recipe"  # the name in the query of a link
MOST = 2**20  # bytes of a recipe that a link may unfold to


def packed(recipe: Recipe) -> str:
    """A recipe as letters that a URL may hold."""
    text = recipe.model_dump_json(exclude_defaults=True).encode()
    return base64.urlsafe_b64encode(zlib.compress(text, 9)).decode().rstrip("=")


def unpacked(text: str) -> Recipe:
    """The recipe of `packed`. Raises RecipeError in words for anything else."""
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        unfolded = zlib.decompressobj()
        said = unfolded.decompress(data, MOST)
    except (binascii.Error, ValueError, zlib.error):
        raise RecipeError("this link holds no recipe: it was cut off, or changed on its way") from None
    if unfolded.unconsumed_tail or not unfolded.eof:
        raise RecipeError("this link holds no whole recipe: it was cut off on its way")
    return Recipe.read(said, "link")


def link(recipe: Recipe, address: str) -> str:
    """A link that opens the app at `address` with this recipe in its controls."""
    return f"{address.rstrip('/')}/?{LINK}={packed(recipe)}"


def command(recipe: Recipe) -> str:
    """The command line that draws the recipe. A mask is named as a file, which the PNG's recipe holds."""
    words = ["multilora", "compose", recipe.prompt]
    for use in recipe.loras:
        words += ["--lora", f"{'' if _plain(use) else use.name + '='}{_source(use)}:{use.weight}"]
    words += ["--method", recipe.method]
    for name, value in recipe.options.items():
        words += ["--option", f"{name}={value}"]
    for use in recipe.loras:
        for glob, factor in use.blocks.items():
            words += ["--block", f"{use.name}:{glob}={factor:g}"]
        if use.text_encoder_weight is not None:
            words += ["--text-weight", f"{use.name}={use.text_encoder_weight:g}"]
        if use.positive_only:
            words += ["--positive-only", use.name]
        if use.mask_sha256:
            words += ["--mask", f"{use.name}={use.name}-mask.png"]
    words += ["--seed", str(recipe.seed + recipe.index), "--steps", str(recipe.steps)]
    words += ["--guidance", repr(recipe.guidance_scale), "--size", f"{recipe.width}x{recipe.height}"]
    if recipe.negative_prompt:
        words += ["--negative", recipe.negative_prompt]
    if recipe.scheduler:
        words += ["--scheduler", recipe.scheduler]
    if recipe.text_encoder != "per_row":
        words += ["--text-encoder", recipe.text_encoder]
    if recipe.cache:
        words += ["--cache", recipe.cache]
    if recipe.base != "embedded":
        words += ["--base", recipe.base]
    return shlex.join(words)


def python(recipe: Recipe) -> str:
    """A Python program that draws the recipe."""
    lines = [
        "from multilora.pipelines.image import Composer", "",
        f"composer = Composer.from_pretrained({recipe.base!r})",
    ]  # fmt: skip
    for use in recipe.loras:
        said: dict[str, Any] = {"name": use.name, "weight": use.weight}
        if use.text_encoder_weight is not None:
            said["text_encoder_weight"] = use.text_encoder_weight
        if use.blocks:
            said["blocks"] = dict(use.blocks)
        if use.positive_only:
            said["positive_only"] = True
        if use.mask_sha256:
            said["mask"] = f"{use.name}-mask.png"
        lines.append(f"composer.add({_source(use)!r}, {_arguments(said)})")
    asked: dict[str, Any] = {"method": recipe.method}
    if recipe.options:
        asked["options"] = dict(recipe.options)
    if recipe.negative_prompt:
        asked["negative_prompt"] = recipe.negative_prompt
    asked |= {"seed": recipe.seed + recipe.index, "num_inference_steps": recipe.steps}
    asked |= {"guidance_scale": recipe.guidance_scale, "width": recipe.width, "height": recipe.height}
    if recipe.scheduler:
        asked["scheduler"] = recipe.scheduler
    if recipe.text_encoder != "per_row":
        asked["text_encoder"] = recipe.text_encoder
    if recipe.cache:
        asked["cache"] = recipe.cache
    each = ",\n    ".join(f"{name}={value!r}" for name, value in asked.items())
    lines += [f"out = composer(\n    {json.dumps(recipe.prompt, ensure_ascii=False)},\n    {each},\n)"]
    lines += ['out.images[0].save("picture.png")']
    return "\n".join(lines) + "\n"


def _arguments(said: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in said.items())


def _source(use: LoraUse) -> str:
    """What stands for the LoRA on another machine: its name in the embedded library, else its file."""
    own = ("upload:", "file:")
    return f"{use.name}.safetensors" if use.reference.startswith(own) else use.reference or use.name


def _plain(use: LoraUse) -> bool:
    return use.name == _source(use).rpartition("/")[2].removesuffix(".safetensors")
