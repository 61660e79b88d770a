"""`multilora compose` from pictures: files in, pictures out; bad input in words, nothing written."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from multilora import files
from multilora.recipe import Recipe
from tests import tiny, tiny_tasks
from tests.test_cli import call
from tests.tiny_tasks import mask, picture


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, a LoRA, a ControlNet and pictures in a folder."""
    folder = tmp_path_factory.mktemp("world")
    pipe = tiny.sd15()
    pipe.save_pretrained(folder / "base")
    tiny_tasks.controlnet("sd15", pipe).save_pretrained(folder / "net")
    files.save(tiny.lora_for(pipe, name="fox"), folder / "fox.safetensors")
    picture().save(folder / "a.png")
    picture(5).save(folder / "c.png")
    mask().save(folder / "m.png")
    mask(16, 32).save(folder / "small.png")
    return folder


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def compose(capsys, world, *words):
    lora = f"{world}/fox.safetensors"
    return call(
        capsys, "compose", "a fox", "--lora", lora, "--base", world / "base", "--steps", "3", "--seed", "5", *words
    )


def test_pictures_from_pictures_and_again_from_them(capsys, world):
    image, control = ("--image", world / "a.png", "--strength", "0.7"), ("--control-image", world / "c.png")
    wanted = {
        "i2i.png": (image, "image-to-image"),
        "inpaint.png": ((*image, "--mask-image", world / "m.png"), "inpainting"),
        "net.png": ((*control, "--controlnet", world / "net", "--control-scale", "0.8"), "ControlNet"),
    }
    pixels = {}
    for name, (words, task) in wanted.items():
        status, out, err = compose(capsys, world, *words, "--out", name)
        assert (status, out) == (0, f"{name}\n"), err
        recipe = Recipe.from_png(name)
        assert recipe.task == task
        assert [u.reference for u in recipe.pictures] == [str(w) for w in words if str(w).endswith(".png")]
        pixels[name] = Image.open(name).tobytes()
        status, _, err = call(capsys, "compose", "--from", name, "--out", "again.png")
        assert status == 0, err
        assert Image.open("again.png").tobytes() == pixels[name]
        assert Recipe.from_png("again.png") == recipe
    assert len(set(pixels.values())) == 3
    status, _, err = call(capsys, "compose", "--from", "i2i.png", "--image", world / "c.png", "--out", "other.png")
    assert status == 0, err
    assert Recipe.from_png("other.png").pictures[0].reference == str(world / "c.png")
    assert Image.open("other.png").tobytes() != pixels["i2i.png"]


REFUSED = {
    "no file": (["--image", "none.png"], ["--image", "none.png", "cannot read"]),
    "no picture": (["--image", "{world}/fox.safetensors"], ["--image", "fox.safetensors", "cannot read"]),
    "mask alone": (["--mask-image", "{world}/m.png"], ["--mask-image: goes with --image"]),
    "strength alone": (["--strength", "0.5"], ["--strength: goes with --image", "--option strength"]),
    "strength": (["--image", "{world}/a.png", "--strength", "2"], ["strength=2.0", "at most 1"]),
    "mask's size": (
        ["--image", "{world}/a.png", "--mask-image", "{world}/small.png"],
        ["mask_image is 16 x 32", "image is 32 x 32"],
    ),
    "net alone": (["--controlnet", "{world}/net"], ["--controlnet: goes with --control-image"]),
    "scale alone": (["--control-scale", "0.5"], ["--control-scale: goes with --control-image"]),
    "no net": (["--control-image", "{world}/c.png"], ["needs a ControlNet", "--controlnet FOLDER"]),
    "no such net": (
        ["--control-image", "{world}/c.png", "--controlnet", "none"],
        ["--controlnet 'none'", "no such folder"],
    ),
    "no ControlNet": (
        ["--control-image", "{world}/c.png", "--controlnet", "{world}/base/unet"],
        ["UNet2DConditionModel", "no ControlNet"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused(capsys, world, case):
    words, said = REFUSED[case]
    status, out, err = compose(capsys, world, *(w.format(world=world) for w in words), "--out", "no.png")
    assert (status, out) == (2, ""), err
    for word in said:
        assert word in " ".join(err.split()), err
    assert not Path("no.png").exists()


def test_a_picture_needs_a_prompt(capsys, world):
    status, _, err = call(capsys, "compose", "--image", world / "a.png")
    assert status == 2
    assert "PROMPT is missing" in err
