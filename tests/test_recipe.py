"""Recipes: read back as written, in JSON and in a PNG; every wrong field is named; a file is whole or absent."""

import json
import os
import stat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from multilora.recipe import CHUNK, PARAMETERS, LoraUse, Recipe, RecipeError, Resolved, save_png

PLAIN = {
    "prompt": "a zib alien in a robe",
    "base": "embedded",
    "steps": 30,
    "guidance_scale": 4.0,
    "width": 128,
    "height": 96,
    "seed": 7,
}
FULL = {
    **PLAIN,
    "negative_prompt": "blurry, dark",
    "base_family": "sd15",
    "loras": [
        LoraUse(name="zib", reference="zib", sha256="ab" * 32, weight=0.8, blocks={"*.attn2.*": 0.5}),
        LoraUse(name="robe", weight="0@0,1@0.5", text_encoder_weight=0.3, positive_only=True, mask="m.png"),
    ],
    "method": "switch",
    "options": {"every": 3, "schedule": "paper"},
    "scheduler": "DDIMScheduler",
    "images": 2,
    "index": 1,
    "resolved": Resolved(device="cpu", dtype="float32", threads=2, form="side", passes_per_call=4),
}
PICTURE = Image.new("RGB", (16, 8), (200, 30, 60))


def test_round_trip_through_json_and_png(tmp_path):
    recipe = Recipe(**FULL)
    assert Recipe.read(recipe.json) == recipe
    path = save_png(PICTURE, tmp_path / "new" / "a.png", recipe)
    assert Recipe.from_png(path) == recipe
    with Image.open(path) as picture:
        assert picture.convert("RGB").tobytes() == PICTURE.tobytes()


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=text, negative=text, name=text, weight=st.floats(allow_nan=False, allow_infinity=False))
def test_any_text_survives_a_png(tmp_path, prompt, negative, name, weight):
    loras = [LoraUse(name=name, weight=weight)]
    recipe = Recipe(**{**PLAIN, "prompt": prompt, "negative_prompt": negative, "loras": loras})
    assert Recipe.from_png(save_png(PICTURE, tmp_path / "t.png", recipe)) == recipe


def test_a_recipe_of_version_1_is_read():
    """It had no task and no pictures; written again it is of this version."""
    old = {**PLAIN, "version": 1, "loras": [{"name": "zib"}], "images": 2, "index": 1}
    recipe = Recipe.read(json.dumps(old))
    assert recipe == Recipe(**{**old, "version": 2})
    assert (recipe.task, recipe.pictures, recipe.strength) == ("text-to-image", [], None)
    with pytest.raises(RecipeError, match="version"):
        Recipe.checked({**PLAIN, "version": True})


def test_a_recipe_holds_its_pictures():
    uses = [{"role": "image", "reference": "a.png", "sha256": "ab" * 32}, {"role": "mask_image", "sha256": "cd" * 32}]
    recipe = Recipe(**PLAIN, task="inpainting", pictures=uses, strength=0.6, pipeline_options={"clip_skip": 1})
    assert Recipe.read(recipe.json) == recipe
    assert "Denoising strength: 0.6" in recipe.parameters()
    with pytest.raises(RecipeError, match=r"pictures\.0\.role: .*got 'photo'"):
        Recipe.checked({**PLAIN, "pictures": [{"role": "photo", "sha256": ""}]})


def test_parameters_text():
    assert Recipe(**PLAIN).parameters() == (
        "a zib alien in a robe\n"
        "Steps: 30, Sampler: default, CFG scale: 4, Seed: 7, Size: 128x96, Model: embedded, Version: multilora"
    )
    assert Recipe(**FULL).parameters() == (
        "a zib alien in a robe <lora:zib:0.8> <lora:robe:0@0,1@0.5>\n"
        "Negative prompt: blurry, dark\n"
        "Steps: 30, Sampler: DDIMScheduler, CFG scale: 4, Seed: 8, Size: 128x96, Model: embedded, "
        'Lora hashes: "zib: abababababab", LoRA method: switch, Version: multilora'
    )
    assert 'Model: "a, b: c"' in Recipe(**{**PLAIN, "base": "a, b: c"}).parameters()


def test_parameters_are_in_the_png_where_other_tools_look(tmp_path):
    recipe = Recipe(**FULL)
    with Image.open(save_png(PICTURE, tmp_path / "a.png", recipe)) as picture:
        assert picture.text[PARAMETERS] == recipe.parameters()
        assert json.loads(picture.text[CHUNK])["method"] == "switch"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, r"steps: .*greater than or equal to 1 \(got 0\)"),
        ({"seed": -1}, r"seed: .*\(got -1\)"),
        ({"width": "wide"}, r"width: .*integer.*'wide'"),
        ({"guidance_scale": float("nan")}, r"guidance_scale: a finite number is wanted"),
        ({"loras": [{"name": "a", "weight": float("inf")}]}, r"loras\.0\.weight: a finite number is wanted, got inf"),
        ({"loras": [{"name": "a", "weight": None}]}, r"loras\.0\.weight: a number or a schedule"),
        ({"loras": [{"weight": 1}]}, r"loras\.0\.name: Field required"),
        ({"loras": [{"name": "a", "wait": 1}]}, r"loras\.0\.wait: Extra"),
        ({"images": 2, "index": 2}, r"index: picture 2 of 2"),
        ({"steps": 0, "seed": -1}, r"steps: .*; seed: "),
        ({"version": 3}, r"has version 3, this multilora reads up to 2; upgrade"),
        ({"version": 0}, r"version: "),
    ],
)
def test_wrong_fields_are_named(change, message):
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.read(json.dumps({**PLAIN, **change}), "fox.png")
    assert str(caught.value).startswith("fox.png: ")


@pytest.mark.parametrize("content", ["", "[]", "3", "{", "[" * 100_000])
def test_what_is_no_recipe_says_so(content):
    with pytest.raises(RecipeError, match=r"recipe: (its recipe is|prompt)"):
        Recipe.read(content)


def test_files_without_a_recipe(tmp_path):
    path = tmp_path / "x.png"
    with pytest.raises(RecipeError, match="no such file"):
        Recipe.from_png(path)
    path.write_bytes(b"not a picture")
    with pytest.raises(RecipeError, match="not a PNG"):
        Recipe.from_png(path)
    PICTURE.save(path, format="JPEG")
    with pytest.raises(RecipeError, match="not a PNG"):
        Recipe.from_png(path)
    PICTURE.save(path)
    with pytest.raises(RecipeError, match=r"no multilora recipe in this PNG\. Many"):
        Recipe.from_png(path)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(PARAMETERS, "a fox\nSteps: 3")
    PICTURE.save(path, pnginfo=chunks)
    with pytest.raises(RecipeError, match="of another program"):
        Recipe.from_png(path)
    whole = save_png(PICTURE, path, Recipe(**PLAIN)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecipeError, match=r"x\.png"):
        Recipe.from_png(path)
    with pytest.raises(RecipeError, match=tmp_path.name):
        Recipe.from_png(tmp_path)


class _Breaks:
    """A picture whose encoder fails half-way."""

    def save(self, file, **_):
        file.write(b"\x89PNG half")
        raise RuntimeError("disk on fire")


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = save_png(PICTURE, tmp_path / "a.png", Recipe(**PLAIN))
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="disk on fire"):
        save_png(_Breaks(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]
    with pytest.raises(ValueError, match=r"got suffix '\.jpg'"):
        save_png(PICTURE, tmp_path / "a.jpg")


def test_a_picture_has_the_usual_permissions(tmp_path):
    mask = os.umask(0o022)
    try:
        path = save_png(PICTURE, tmp_path / "a.png")
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
