"""Compose, Compare and Recipe without a browser: controls and recipes say the same, nothing is lost on the way."""

from __future__ import annotations

import base64
import io
import shlex
import types
from pathlib import Path

import gradio as gr
import pytest
import typer
from PIL import Image

from multilora.recipe import LoraUse, PictureUse, Recipe, RecipeError, Resolved
from multilora.schedule import Schedule
from multilora.web import compose_api, elsewhere, history, words
from multilora.web.app import build
from multilora.web.asked import PNG, plain, read_uses, recipe_of, settings_of
from multilora.web.picker import curve, shelf
from multilora.web.recipe import read_text
from multilora.web.service import Limits, Picture, Refused, Service
from multilora.web.service.spec import opened


@pytest.fixture(scope="module")
def service():
    with Service(engine="tests.service_engine:Stub", limits=Limits(waiting=2, seconds=60)) as service:
        yield service


@pytest.fixture
def session(service, request):
    return service.session(request.node.name[:150])


def mask_url(size=(8, 8)):
    image = Image.new("L", size)
    image.paste(255, (0, 0, size[0] // 2, size[1]))
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return PNG + base64.b64encode(stream.getvalue()).decode()


def settings(**changes):
    listed = [
        {"reference": "korv", "name": "korv", "weight": "0@0,1@0.5", "on": True, "text_encoder_weight": 0.25,
         "blocks": {"mid": 0.5}, "positive_only": True, "mask": mask_url()},
        {"reference": "dotta", "name": "poncho", "weight": -0.75, "on": True},
        {"reference": "burgo", "name": "burgo", "weight": 1, "on": False},
    ]  # fmt: skip
    return {"prompt": "a fox", "negative_prompt": "rain", "loras": listed, "method": "switch",
            "options": {"every": 3}, "seed": 12, "steps": 5, "guidance_scale": 2.5, "width": 8, "height": 8,
            "scheduler": "DDIMScheduler", "base": "embedded", **changes}  # fmt: skip


def drawn(recipe, masks):
    """The recipe as a picture carries it, whose masks are in `extra`."""
    coded = {name: base64.b64encode(data).decode() for name, data in masks.items()}
    uses = [u.model_copy(update={"mask_sha256": "0" * 64 if u.name in coded else None}) for u in recipe.loras]
    made = Resolved(device="cpu", dtype="float32", threads=1, form="side", passes_per_call=2)
    return recipe.model_copy(update={"loras": uses, "extra": {"masks": coded}, "resolved": made})


# -- controls -> recipe -> controls ---------------------------------------------------------------------------------


def test_every_control_is_in_the_recipe(service, session):
    recipe, masks = recipe_of(service, session, settings())
    assert [use.name for use in recipe.loras] == ["korv", "poncho"]  # burgo is off
    korv, poncho = recipe.loras
    assert (korv.weight, korv.text_encoder_weight, korv.blocks, korv.positive_only) == (
        "0@0,1@0.5",
        0.25,
        {"mid": 0.5},
        True,
    )
    assert (poncho.weight, poncho.reference) == (-0.75, "dotta")
    assert recipe.options == {"every": 3, "schedule": "paper", "compensate": 0.0}
    said = (recipe.prompt, recipe.negative_prompt, recipe.method, recipe.seed, recipe.steps, recipe.guidance_scale)
    assert said == ("a fox", "rain", "switch", 12, 5, 2.5)
    assert (recipe.width, recipe.height, recipe.scheduler, recipe.base) == (8, 8, "DDIMScheduler", "embedded")
    image = opened(masks["korv"])
    assert [image.getpixel((x, 3)) for x in (0, 3, 4, 7)] == [255, 255, 0, 0]


def test_empty_controls_stand_for_the_bases_own_values(service, session):
    recipe, _ = recipe_of(service, session, {"prompt": "a fox", "loras": ["korv"], "steps": None, "scheduler": ""})
    assert (recipe.steps, recipe.guidance_scale, recipe.width, recipe.height) == (3, 3.0, 8, 8)
    assert recipe.loras[0].weight == 1.0


def test_a_mask_follows_the_size_of_the_picture(service, session):
    _, masks = recipe_of(service, session, settings(width=16, height=24))
    assert opened(masks["korv"]).size == (16, 24)


def test_a_picture_restores_every_control_and_is_then_made_from_its_own_recipe(service, session):
    asked = settings()
    recipe, masks = recipe_of(service, session, asked)
    picture = drawn(recipe, masks)
    found, notes = settings_of(service, session, picture)
    assert notes == []
    assert plain(found.settings) == plain(asked)
    again, more = recipe_of(service, session, found.settings, found)
    assert again.resolved == picture.resolved
    assert again.extra == picture.extra
    assert not more


def test_a_changed_control_makes_a_new_recipe_that_keeps_what_no_control_shows(service, session):
    recipe, _ = recipe_of(service, session, settings(loras=["korv"]))
    old = drawn(recipe, {}).model_copy(update={
        "text_encoder": "first", "scale": 0.5, "pipeline_options": {"clip_skip": 1}, "scheduler_config": {"a": 1},
    })  # fmt: skip
    found, _ = settings_of(service, session, old)
    new, _ = recipe_of(service, session, {**found.settings, "seed": 13}, found)
    assert (new.seed, new.resolved) == (13, None)
    assert (new.text_encoder, new.scale, new.pipeline_options, new.scheduler_config) == (
        "first",
        0.5,
        {"clip_skip": 1},
        {"a": 1},
    )
    other, _ = recipe_of(service, session, {**found.settings, "scheduler": "EulerDiscreteScheduler"}, found)
    assert other.scheduler_config == {}  # it was the other scheduler's


def test_picture_three_of_a_call_is_restored_with_its_own_seed(service, session):
    recipe, _ = recipe_of(service, session, settings(loras=[]))
    found, _ = settings_of(service, session, recipe.model_copy(update={"images": 4, "index": 3}))
    assert found.settings["seed"] == 15
    again, _ = recipe_of(service, session, found.settings, found)
    assert (again.images, again.index) == (4, 3)


def test_a_lora_is_found_by_its_content_whatever_it_is_called(service, session):
    korv = next(e for e in service.library(session) if e.name == "korv")
    use = LoraUse(name="my fox", reference="/home/me/fox.safetensors", sha256=korv.sha256)
    recipe = Recipe(prompt="x", base="embedded", loras=[use], steps=2, guidance_scale=1, width=8, height=8, seed=0)
    found, notes = settings_of(service, session, recipe)
    assert (found.whole, notes) == (True, [])
    assert found.settings["loras"][0]["reference"] == "korv"
    assert found.recipe.loras[0].reference == "korv"


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (LoraUse(name="gone", reference="upload:12", sha256="1" * 64), "gone is not in your library: upload"),
        (LoraUse(name="korv", reference="korv", sha256="1" * 64), "korv is another file"),
    ],
)
def test_a_lora_that_is_not_here_is_said_and_the_recipe_is_not_taken_as_whole(service, session, use, words):
    recipe = Recipe(prompt="x", base="embedded", loras=[use], steps=2, guidance_scale=1, width=8, height=8, seed=0)
    found, notes = settings_of(service, session, recipe)
    assert words in notes[0]
    assert (found.whole, found.settings["loras"]) == (False, [])


def test_a_picture_made_from_a_picture_is_refused_in_words(service, session):
    uses = [PictureUse(role="image", sha256="2" * 64)]
    recipe = Recipe(prompt="x", base="embedded", steps=2, guidance_scale=1, width=8, height=8, seed=0, pictures=uses)
    with pytest.raises(Refused, match="made from another one"):
        settings_of(service, session, recipe)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loras": [{"reference": "korv", "wieght": 1}]}, "field of a LoRA 'wieght'.*weight"),
        ({"loras": [{"reference": "korv", "weight": "much"}]}, "LoRA 'korv'.*'much'"),
        ({"loras": [{"reference": "korv", "blocks": {"mid": "x"}}]}, "LoRA 'korv': blocks.mid"),
        ({"loras": [{"reference": "korv", "mask": "data:image/png;base64,!"}]}, "mask of LoRA 'korv'"),
        ({"loras": [{"reference": "korv", "mask": base64.b64encode(b"GIF89a").decode()}]}, "mask of LoRA 'korv'"),
        ({"loras": ["../korv"]}, "'../korv' is not in your library"),
        ({"loras": "korv"}, "a list is wanted"),
        ({"method": "swich"}, "switch"),
        ({"options": {"every": 0}}, "every=0"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": -1}, "seed"),
        ({"steps": 0}, "steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
    ],
)
def test_what_cannot_be_is_refused_by_name(service, session, changes, words):
    with pytest.raises(ValueError, match=words):
        recipe_of(service, session, settings(**changes))


def test_two_loras_of_one_name_get_two_names(service, session):
    uses, _ = read_uses(service, session, ["korv", {"reference": "dotta", "name": "korv"}])
    assert [use.name for use in uses] == ["korv", "korv-2"]


# -- elsewhere ------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(service, session):
    made, masks = recipe_of(service, session, settings(prompt='a "korv" fox\'s $HOME; naïve'))
    return drawn(made, masks)


def test_a_link_holds_the_whole_recipe(recipe):
    link = elsewhere.link(recipe, "http://127.0.0.1:7860/")
    assert link.startswith("http://127.0.0.1:7860/?recipe=")
    assert read_text(link) == read_text(recipe.json) == recipe
    assert read_text(link + "&page=compose") == recipe


@pytest.mark.parametrize(
    "change", [lambda t: t[:-20], lambda t: "%%%", lambda t: t[:10] + "AAAA" + t[14:], lambda t: ""]
)
def test_a_broken_link_is_said_in_words(recipe, change):
    with pytest.raises(RecipeError, match="link"):
        elsewhere.unpacked(change(elsewhere.packed(recipe)))


def test_a_link_cannot_unfold_to_more_than_a_recipe(monkeypatch, recipe):
    monkeypatch.setattr(elsewhere, "MOST", 100)
    with pytest.raises(RecipeError, match="no whole recipe"):
        elsewhere.unpacked(elsewhere.packed(recipe))


def test_the_command_line_is_read_back_as_the_recipe(recipe):
    from multilora.cli.compose import compose

    app = typer.Typer()
    app.command()(compose)
    name, verb, *given = shlex.split(elsewhere.command(recipe))
    found = typer.main.get_command(app).make_context("compose", given).params
    assert (name, verb) == ("multilora", "compose")
    assert found["prompt"] == recipe.prompt
    assert found["lora"] == ["korv:0@0,1@0.5", "poncho=dotta:-0.75"]
    assert (found["method"], found["option"]) == ("switch", ["every=3", "schedule=paper", "compensate=0.0"])
    assert (found["block"], found["mask"]) == (["korv:mid=0.5"], ["korv=korv-mask.png"])
    assert (found["text_weight"], found["positive_only"]) == (["korv=0.25"], ["korv"])
    assert (found["seed"], found["steps"], found["guidance"], found["size"]) == (12, 5, 2.5, "8x8")
    assert (found["negative"], found["scheduler"]) == ("rain", "DDIMScheduler")


def test_the_program_asks_the_composer_for_the_recipe(recipe, monkeypatch, tmp_path):
    from multilora.pipelines import image

    calls = []

    class Composer:
        @classmethod
        def from_pretrained(cls, base):
            calls.append(("base", base))
            return cls()

        def add(self, source, **options):
            calls.append((source, options))

        def __call__(self, prompt, **options):
            calls.append((prompt, options))
            return types.SimpleNamespace(images=[Image.new("RGB", (1, 1))])

    monkeypatch.setattr(image, "Composer", Composer)
    monkeypatch.chdir(tmp_path)
    exec(elsewhere.python(recipe), {})
    base, korv, poncho, asked = calls
    assert base == ("base", "embedded")
    assert korv == ("korv", {"name": "korv", "weight": "0@0,1@0.5", "text_encoder_weight": 0.25,
                             "blocks": {"mid": 0.5}, "positive_only": True, "mask": "korv-mask.png"})  # fmt: skip
    assert poncho == ("dotta", {"name": "poncho", "weight": -0.75})
    assert asked[0] == recipe.prompt
    assert asked[1] == {
        "method": "switch", "options": recipe.options, "negative_prompt": "rain", "seed": 12, "num_inference_steps": 5,
        "guidance_scale": 2.5, "width": 8, "height": 8, "scheduler": "DDIMScheduler",
    }  # fmt: skip
    assert (tmp_path / "picture.png").exists()


# -- the page's parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0.8", "0@0,1@0.5", "1@2s,0@4s"])
def test_the_drawn_curve_is_the_schedule(text):
    schedule = Schedule.parse(text)
    assert curve({"text": text, "steps": 7}) == {"weights": [schedule.at(i, 7) for i in range(7)]}


def test_a_schedule_that_is_none_is_said_and_one_by_sigma_shown_over_sigma():
    assert "position" in curve({"text": "0@x", "steps": 7})["error"]
    assert curve({"text": "1@7sigma,0@2sigma", "steps": 7}) == {"points": [[7.0, 1.0], [2.0, 0.0]], "unit": "sigma"}
    assert "error" in curve({})


def test_the_shelf_has_a_small_preview_of_every_lora(service, session):
    listed = shelf(service.library(session))
    assert len(listed) == len(service.library(session)) > 4
    for each in listed:
        data = base64.b64decode(each["preview"].removeprefix("data:image/webp;base64,"))
        assert max(Image.open(io.BytesIO(data)).size) <= 128


def test_names_from_files_cannot_become_markup():
    found = {
        "clip": 1.0,
        "clip_model": "<b>",
        "presence": {"<i>": {"category": "<u>", "probability": 0.5, "present": False}},
    }
    said = words.scores(found) + words.status("<script>", "error") + words.notes(["<img>"])
    for bad in ("<i><", "<u>", "<script>", "<img>", "(measured by <b>"):
        assert bad not in said


def test_history_keeps_the_very_bytes_and_the_newest(service, session, monkeypatch):
    monkeypatch.setattr(history, "MOST", 3)
    recipe, _ = recipe_of(service, session, settings(loras=[]))
    from multilora.recipe import png_bytes

    for seed in range(5):
        own = recipe.model_copy(update={"seed": seed})
        data = png_bytes(Image.new("RGB", (3, 2), (seed, 0, 0)), own)
        found = history.keep(session, Picture(data, own, {"clip": 7.0}, 0.5))
        assert found.path.read_bytes() == data
    assert [Recipe.from_png(p).seed for p in history.files(session)] == [4, 3, 2]
    again = history.kept(session, found.path.name)
    assert (again.recipe.seed, again.scores, again.seconds) == (4, {"clip": 7.0}, 0.5)
    with pytest.raises(Refused, match="no longer kept"):
        history.kept(session, "../../etc/passwd")


def asking(key):
    return types.SimpleNamespace(username=key, cookies={}, session_hash=key, headers={}, query_params={})


def test_the_endpoint_draws_and_the_picture_it_gives_is_made_again_by_its_recipe(service):
    app = build(service)
    calls = {f.api_name: f.fn for f in app.fns.values() if f.api_visibility == "public"}
    *_, (path, about) = calls["compose"](asking("ann"), "a fox", ["korv"], "switch", {"every": 2}, seed=77)
    with Image.open(path) as image:
        assert image.getpixel((0, 0)) == (77, 0, 0)
    read = calls["read_recipe"](str(path))
    assert read == about["recipe"]
    *_, (again, _) = calls["compose_recipe"](asking("ann"), read)
    assert Path(again).read_bytes() == Path(path).read_bytes()
    assert "--option every=2" in calls["share_recipe"](read)["command"]
    assert {"switch", "merge"} <= {m["name"] for m in calls["list_methods"]()}
    with pytest.raises(gr.Error, match="'nothing' is not in your library"):
        list(calls["compose"](asking("bob"), "a fox", ["nothing"]))
    assert not any(job.session == "user:bob" for job in service._line.jobs())


def test_leaving_an_endpoint_cancels_its_job(service, monkeypatch):
    monkeypatch.setattr(compose_api, "TOLD_EVERY", 0.0)
    app = build(service)
    fn = next(f.fn for f in app.fns.values() if f.api_name == "compose")
    going = fn(asking("eve"), "a fox", steps=100)
    next(going)
    job = next(job for job in service._line.jobs() if job.session == "user:eve")
    going.close()
    assert job.cancelled.is_set()
